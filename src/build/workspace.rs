//! The directories of one build. Everything a build writes is below one of them and goes with it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::contract::{Classified, FailureClass};

/// Why the workspace can not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkspaceError {
    #[error("can not use the work directory {}", .path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("can not remove {}; remove it by hand", .path.display())]
    Remove { path: PathBuf, source: io::Error },
}

impl Classified for WorkspaceError {
    fn class(&self) -> FailureClass {
        FailureClass::Environment
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Create { .. } => "WorkDirectoryUnusable",
            Self::Remove { .. } => "WorkDirectoryNotRemoved",
        }
    }
}

/// A build's directories, made empty at the start.
#[derive(Debug)]
pub(super) struct Workspace {
    dir: PathBuf,
}

impl Workspace {
    /// Makes an empty workspace `build` in `work_dir`. What a killed attempt left there is removed; the download cache
    /// beside it stays.
    pub(super) fn create(work_dir: &Path) -> Result<Self, WorkspaceError> {
        let dir = work_dir.join("build");
        remove(&dir)?;
        for path in [&dir, &work_dir.join("cache")] {
            fs::create_dir_all(path).map_err(|source| WorkspaceError::Create { path: path.clone(), source })?;
        }
        Ok(Self { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Verified downloads, named by digest; shared by attempts that share the work directory.
    pub(super) fn cache(&self) -> PathBuf {
        self.dir.with_file_name("cache")
    }

    /// Removes everything but the cache.
    pub(super) fn remove(self) -> Result<(), WorkspaceError> {
        remove(&self.dir)
    }
}

fn remove(dir: &Path) -> Result<(), WorkspaceError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(WorkspaceError::Remove { path: dir.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_a_killed_attempt_left_and_keeps_the_cache() {
        let work = tempfile::tempdir().unwrap();
        let first = Workspace::create(work.path()).unwrap();
        fs::write(first.dir().join("left-over"), "x").unwrap();
        fs::write(first.cache().join("sha256-0"), "x").unwrap();
        let second = Workspace::create(work.path()).unwrap();
        assert_eq!(fs::read_dir(second.dir()).unwrap().count(), 0);
        assert!(second.cache().join("sha256-0").exists());
        second.remove().unwrap();
        assert!(!work.path().join("build").exists());
    }
}
