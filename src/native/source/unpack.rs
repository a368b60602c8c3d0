//! Writes the files of a file system into a tree: owners, modes, times, attributes, hard links, devices and holes as they
//! were. Everything is made anew in directories of its own, so that no name leads anywhere else.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, OpenOptionsExt, PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat},
        time::TimeSpec,
    },
};

use super::{
    SourceError,
    ext4::{Ext4Error, FileSystem, Inode, Kind, ROOT},
};
use crate::native::rootfs::RUNTIME_DIRS;

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

/// A file system on its way to a directory of the tree.
pub(super) struct Unpacking<'u> {
    /// What it is, for messages.
    pub(super) name: &'u str,
    pub(super) disk: &'u File,
    pub(super) files: &'u FileSystem<'u>,
    /// The directory, as the tree's own system sees it.
    pub(super) place: &'u Path,
    pub(super) stopped: &'u (dyn Fn() -> bool + Sync),
}

impl Unpacking<'_> {
    /// To be called in a thread whose root directory is the tree.
    pub(super) fn run(&self) -> Result<(), SourceError> {
        let is_root = self.place == Path::new("/");
        let mut names: HashMap<u32, PathBuf> = HashMap::new();
        let (mut seen, mut made) = (HashSet::new(), vec![]);
        let mut directories = vec![(self.read(self.place, self.files.inode(ROOT))?, self.place.to_owned())];
        while let Some((directory, path)) = directories.pop() {
            if !seen.insert(directory.number()) {
                return Err(self.damaged(&Ext4Error::Damaged("directory")));
            }
            if path != self.place {
                written(&path, fs::create_dir(&path))?;
            }
            let only_running = is_root
                && path.parent() == Some(self.place)
                && path.file_name().is_some_and(|name| RUNTIME_DIRS.iter().any(|directory| name == *directory));
            if !only_running {
                for entry in self.read(&path, self.files.entries(&directory))? {
                    let name = entry.name.as_slice();
                    let left_out = path == self.place && name == b"lost+found";
                    if name == b"." || name == b".." || left_out {
                        continue;
                    }
                    if name.is_empty() || name.iter().any(|byte| *byte == b'/' || *byte == 0) {
                        return Err(self.damaged(&Ext4Error::Damaged("directory")));
                    }
                    if (self.stopped)() {
                        return Err(SourceError::Stopped);
                    }
                    let path = path.join(OsStr::from_bytes(name));
                    let inode = self.read(&path, self.files.inode(entry.inode))?;
                    if self.read(&path, inode.kind())? == Kind::Directory {
                        directories.push((inode, path));
                    } else if let Some(first) = names.get(&inode.number()) {
                        written(&path, fs::hard_link(first, &path))?;
                    } else if self.make(&inode, &path)? && self.read(&path, inode.names())? > 1 {
                        names.insert(inode.number(), path);
                    }
                }
            }
            made.push((directory, path));
        }
        // From the inside out: what is made in a directory changes its time.
        for (directory, path) in made.into_iter().rev() {
            self.finish(&directory, &path)?;
        }
        Ok(())
    }

    /// Makes a file that is no directory; `false` if it is nothing that stays.
    fn make(&self, inode: &Inode, path: &Path) -> Result<bool, SourceError> {
        let device = || self.read(path, inode.device()).map(|(major, minor)| makedev(major, minor));
        let kind = self.read(path, inode.kind())?;
        let node = |kind, device| mknod(path, kind, Mode::empty(), device).map_err(io::Error::from);
        match kind {
            Kind::Regular => self.copy(inode, path)?,
            Kind::Link => {
                let target = self.read(path, self.files.target(inode))?;
                written(path, symlink(OsStr::from_bytes(&target), path))?;
            }
            Kind::CharacterDevice => written(path, node(SFlag::S_IFCHR, device()?))?,
            Kind::BlockDevice => written(path, node(SFlag::S_IFBLK, device()?))?,
            Kind::Pipe => written(path, node(SFlag::S_IFIFO, 0))?,
            // It belongs to a program that runs.
            Kind::Socket => return Ok(false),
            Kind::Directory => return Err(self.damaged(&Ext4Error::Damaged("directory"))),
        }
        self.finish(inode, path)?;
        Ok(true)
    }

    fn copy(&self, inode: &Inode, path: &Path) -> Result<(), SourceError> {
        if self.read(path, inode.is_encrypted())? {
            return Err(SourceError::unsupported(
                &format!("{} of {} is encrypted", path.display(), self.name),
                "take the encryption away in the machine",
            ));
        }
        let extents = self.read(path, self.files.extents(inode))?;
        let size = self.read(path, inode.size())?;
        let create = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.set_len(size).map(|()| file)
        };
        let file = written(path, create())?;
        let mut piece = vec![0; PIECE];
        for extent in extents {
            let mut done = 0;
            while done < extent.length {
                if (self.stopped)() {
                    return Err(SourceError::Stopped);
                }
                let length = usize::try_from(extent.length - done).unwrap_or(PIECE).min(PIECE);
                let read = self.disk.read_exact_at(&mut piece[..length], extent.offset + done);
                self.read(path, read.map_err(Ext4Error::Read))?;
                written(path, file.write_all_at(&piece[..length], extent.position + done))?;
                done += length as u64;
            }
        }
        Ok(())
    }

    /// Gives a file its owner, then its mode and attributes, which a new owner takes away, and last its time.
    fn finish(&self, inode: &Inode, path: &Path) -> Result<(), SourceError> {
        let is_link = self.read(path, inode.kind())? == Kind::Link;
        let (user, group) = self.read(path, inode.owner())?;
        written(path, lchown(path, Some(user), Some(group)))?;
        if !is_link {
            let mode = self.read(path, inode.mode())?;
            written(path, fs::set_permissions(path, Permissions::from_mode(mode)))?;
        }
        for (name, value) in self.read(path, self.files.attributes(inode))? {
            written(path, xattr::set(path, OsStr::from_bytes(&name), &value))?;
        }
        let (seconds, nanoseconds) = self.read(path, inode.modified())?;
        let time = TimeSpec::new(seconds, nanoseconds.min(999_999_999).into());
        let set = utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink);
        written(path, set.map_err(io::Error::from))
    }

    fn read<T>(&self, path: &Path, result: Result<T, Ext4Error>) -> Result<T, SourceError> {
        result.map_err(|error| match error {
            Ext4Error::Unsupported(what) => SourceError::unsupported(
                &format!("{} of {} uses {what}", path.display(), self.name),
                "write the file anew in the machine",
            ),
            other => self.damaged(&other),
        })
    }

    fn damaged(&self, error: &Ext4Error) -> SourceError {
        SourceError::Damaged { place: self.name.to_owned(), why: error.to_string() }
    }
}

fn written<T>(path: &Path, result: io::Result<T>) -> Result<T, SourceError> {
    result.map_err(|source| SourceError::Write { path: path.to_owned(), source })
}
