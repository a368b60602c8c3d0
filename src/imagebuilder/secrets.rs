//! A directory in memory that only this user may read. It goes when it is dropped.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::contract::{Classified, FailureClass};

/// Why secrets have no place.
#[derive(Debug, thiserror::Error)]
pub enum SecretDirError {
    #[error("can not mount a file system in memory at {}; the build must run privileged, or as root", .path.display())]
    Mount { path: PathBuf, source: nix::Error },
    #[error("can not write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Classified for SecretDirError {
    fn class(&self) -> FailureClass {
        FailureClass::Environment
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Mount { .. } => "MountRefused",
            Self::Write { .. } => "WorkDirectoryUnusable",
        }
    }
}

/// The directory.
#[derive(Debug)]
pub(super) struct SecretDir {
    path: PathBuf,
}

impl SecretDir {
    pub(super) fn mount(path: PathBuf) -> Result<Self, SecretDirError> {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| SecretDirError::Write { path: path.clone(), source })?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some("mode=0700,size=16m"))
            .map_err(|source| SecretDirError::Mount { path: path.clone(), source })?;
        Ok(Self { path })
    }

    /// Writes a file that only this user may read.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, SecretDirError> {
        let path = self.path.join(name);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(bytes));
        written.map_err(|source| SecretDirError::Write { path: path.clone(), source })?;
        Ok(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SecretDir {
    fn drop(&mut self) {
        // The mount goes with this process's namespace in any case.
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::warn!("can not unmount {}: {error}", self.path.display());
        }
    }
}
