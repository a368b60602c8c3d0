//! A root file system as a directory of files. Work on it happens [`within`] it, so that no link in it leads outside.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{OpenOptionsExt, PermissionsExt, chroot, symlink},
    },
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, unshare};

use crate::contract::{Classified, FailureClass};

/// Why a file of the image could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("can not {action} {path} in the image")]
pub struct TreeError {
    pub action: &'static str,
    pub path: String,
    pub source: io::Error,
}

impl Classified for TreeError {
    fn class(&self) -> FailureClass {
        match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::PermissionDenied => {
                FailureClass::Environment
            }
            // A base whose /etc is a file, a link in a circle.
            _ => FailureClass::BadInput,
        }
    }

    fn reason(&self) -> &'static str {
        match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "DiskFull",
            _ => "FileUnusable",
        }
    }
}

/// The files below a directory; paths are written as the booted system sees them.
#[derive(Clone, Debug)]
pub struct Tree {
    base: PathBuf,
}

impl Tree {
    pub fn at(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into() }
    }

    /// Where `path` of the system is for this process.
    pub fn path(&self, path: &str) -> PathBuf {
        self.base.join(path.trim_start_matches('/'))
    }

    /// Makes a file, with missing directories; what was there is replaced, a link too.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>, mode: u32) -> Result<(), TreeError> {
        self.copy(path, &mut content.as_ref(), mode)
    }

    /// As [`write`](Self::write), from a stream.
    pub fn copy(&self, path: &str, content: &mut impl io::Read, mode: u32) -> Result<(), TreeError> {
        self.remove(path)?;
        let place = self.path(path);
        let write = || {
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&place)?;
            io::copy(content, &mut file)?;
            file.flush()?;
            // The process's umask does not decide what an image is like.
            file.set_permissions(Permissions::from_mode(mode))
        };
        told("write", path, { write }())
    }

    /// The file's text, if there is such a file.
    pub fn read(&self, path: &str) -> Result<Option<String>, TreeError> {
        match fs::read(self.path(path)) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => told("read", path, Err(error)),
        }
    }

    /// The bytes of a file that must be there.
    pub fn read_bytes(&self, path: &str) -> Result<Vec<u8>, TreeError> {
        told("read", path, fs::read(self.path(path)))
    }

    pub fn make_dir(&self, path: &str, mode: u32) -> Result<(), TreeError> {
        let place = self.path(path);
        let make = || {
            fs::create_dir_all(&place)?;
            fs::set_permissions(&place, Permissions::from_mode(mode))
        };
        told("make the directory", path, make())
    }

    /// Makes a symbolic link in place of what is there.
    pub fn link(&self, path: &str, target: &str) -> Result<(), TreeError> {
        self.remove(path)?;
        let place = self.path(path);
        let make = || {
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            symlink(target, &place)
        };
        told("link", path, make())
    }

    /// Gives a file another name.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), TreeError> {
        told("rename", from, fs::rename(self.path(from), self.path(to)))
    }

    /// Removes a file, a link or a directory with all it holds; nothing may be there.
    pub fn remove(&self, path: &str) -> Result<(), TreeError> {
        let place = self.path(path);
        let removed = match fs::symlink_metadata(&place) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&place),
            Ok(_) => fs::remove_file(&place),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if is_missing(&error) => Ok(()),
            other => told("remove", path, other),
        }
    }

    /// Removes everything in a directory and keeps the directory.
    pub fn clear(&self, directory: &str) -> Result<(), TreeError> {
        for name in self.list(directory)? {
            self.remove(&format!("{directory}/{name}"))?;
        }
        Ok(())
    }

    /// Whether there is anything, also a link that leads nowhere.
    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    /// Permission bits of what `path` leads to.
    pub fn mode(&self, path: &str) -> Option<u32> {
        fs::metadata(self.path(path)).ok().map(|found| found.permissions().mode() & 0o7777)
    }

    pub fn is_executable(&self, path: &str) -> bool {
        self.mode(path).is_some_and(|mode| mode & 0o111 != 0)
    }

    /// Sorted names in a directory; none where there is no such directory.
    pub fn list(&self, directory: &str) -> Result<Vec<String>, TreeError> {
        let entries = match fs::read_dir(self.path(directory)) {
            Ok(entries) => entries,
            Err(error) if is_missing(&error) => return Ok(vec![]),
            Err(error) => return told("list", directory, Err(error)),
        };
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        let mut names: Vec<_> = told("list", directory, names.collect::<io::Result<_>>())?;
        names.sort();
        Ok(names)
    }

    /// Every regular file below a directory, links not followed.
    pub fn files_below(&self, directory: &str) -> Result<Vec<String>, TreeError> {
        let mut found = vec![];
        let mut directories = vec![directory.trim_end_matches('/').to_owned()];
        while let Some(directory) = directories.pop() {
            for name in self.list(&directory)? {
                let path = format!("{directory}/{name}");
                let kind = fs::symlink_metadata(self.path(&path));
                match told("look at", &path, kind)?.file_type() {
                    kind if kind.is_dir() => directories.push(path),
                    kind if kind.is_file() => found.push(path),
                    _ => {}
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Takes extended attributes whose names begin with `prefix` away from a directory and everything below it, links not
    /// followed.
    pub fn remove_attributes(&self, directory: &str, prefix: &str) -> Result<(), TreeError> {
        let mut places = vec![self.path(directory)];
        while let Some(place) = places.pop() {
            let mut remove = || {
                let kind = fs::symlink_metadata(&place)?.file_type();
                for name in xattr::list(&place)?.filter(|name| name.as_bytes().starts_with(prefix.as_bytes())) {
                    xattr::remove(&place, name)?;
                }
                if kind.is_dir() {
                    for entry in fs::read_dir(&place)? {
                        places.push(entry?.path());
                    }
                }
                Ok(())
            };
            told("take attributes away from", &place.to_string_lossy(), remove())?;
        }
        Ok(())
    }

    /// Empties a file and keeps its owner and permissions.
    pub fn truncate(&self, path: &str) -> Result<(), TreeError> {
        let file = OpenOptions::new().write(true).truncate(true).open(self.path(path));
        told("empty", path, file.map(drop))
    }

    /// Opens a file to read it.
    pub fn open(&self, path: &str) -> Result<File, TreeError> {
        told("read", path, File::open(self.path(path)))
    }
}

fn told<T>(action: &'static str, path: &str, result: io::Result<T>) -> Result<T, TreeError> {
    result.map_err(|source| TreeError { action, path: path.to_owned(), source })
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Runs `work` in a thread whose root directory is `root`: an absolute link, or one with many `..`, stays inside.
pub fn within<T: Send>(root: &Path, work: impl FnOnce(&Tree) -> T + Send) -> Result<T, TreeError> {
    let enter = || {
        // The root and the working directory of this thread only.
        unshare(CloneFlags::CLONE_FS)?;
        chroot(root)?;
        std::env::set_current_dir("/")
    };
    let told = |source| TreeError { action: "enter", path: "/".to_owned(), source };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| enter().map(|()| work(&Tree::at("/"))));
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread ended early")))
    })
    .map_err(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_links_and_sets_the_mode() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.link("/etc/resolv.conf", "../run/nowhere").unwrap();
        tree.write("/etc/resolv.conf", "nameserver", 0o640).unwrap();
        assert_eq!(tree.read("/etc/resolv.conf").unwrap().as_deref(), Some("nameserver"));
        assert_eq!(tree.mode("/etc/resolv.conf"), Some(0o640));
        assert!(!tree.exists("/run/nowhere"));
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.remove("/a/b/c").unwrap();
        tree.clear("/a").unwrap();
        assert_eq!(tree.read("/a").unwrap(), None);
        assert_eq!(tree.files_below("/").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn lists_files_but_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.write("/var/log/a/one.log", "1", 0o644).unwrap();
        tree.write("/var/log/two.log", "2", 0o644).unwrap();
        tree.link("/var/log/loop", ".").unwrap();
        assert_eq!(tree.files_below("/var/log").unwrap(), ["/var/log/a/one.log", "/var/log/two.log"]);
    }

    /// Needs root, as a build does; `make test` has it.
    #[test]
    fn an_absolute_link_in_the_tree_does_not_lead_outside() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let escape = outside.path().to_str().unwrap();
        Tree::at(dir.path()).link("/etc", escape).unwrap();
        fs::create_dir_all(dir.path().join(escape.trim_start_matches('/'))).unwrap();
        within(dir.path(), |tree| tree.write("/etc/file", "x", 0o644)).unwrap().unwrap();
        assert!(!outside.path().join("file").exists());
        assert!(dir.path().join(escape.trim_start_matches('/')).join("file").exists());
        assert_eq!(std::env::current_dir().unwrap(), Path::new(env!("CARGO_MANIFEST_DIR")));
    }
}
