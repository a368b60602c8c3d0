//! The directory of downloaded files.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::statvfs::statvfs;
use tempfile::{NamedTempFile, TempPath};

use super::{
    FetchError,
    digest::{Expected, Hasher},
};

/// Beginnings of files have names with this.
const PART: &str = ".part-";
/// Beginnings of files that another process may go on with have names with this and the digest of the whole.
const BEGUN: &str = ".begun-";
/// A beginning that was not written to for so long belongs to a process that was killed.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// Files named by their digest.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    /// Whether beginnings stay when this process ends, so that another one goes on with them.
    pub(super) keeps_beginnings: bool,
}

/// The beginning of a file.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: File,
    /// Digest and length of what is there.
    pub(super) hasher: Hasher,
    pub(super) written: u64,
}

/// Where the beginning of a file is until it is whole.
#[derive(Debug)]
pub(super) enum PartPath {
    /// Removed with the value.
    Unnamed(TempPath),
    /// Named by the digest of the whole. Whoever goes on with it has locked the file.
    Named(PathBuf),
}

impl Cache {
    pub(super) fn open(dir: PathBuf) -> Result<Self, FetchError> {
        let cache = Self { dir, keeps_beginnings: false };
        fs::create_dir_all(&cache.dir).and_then(|()| cache.sweep()).map_err(|source| cache.unusable(source))?;
        Ok(cache)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cached file with this digest, and its size. One that has another is removed.
    pub(super) async fn find(&self, digest: &Expected) -> Result<Option<(PathBuf, u64)>, FetchError> {
        self.find_at(self.dir.join(digest.file_name()), digest).await
    }

    /// The same for a file elsewhere.
    pub(super) async fn find_at(&self, path: PathBuf, digest: &Expected) -> Result<Option<(PathBuf, u64)>, FetchError> {
        let expected = *digest;
        let checked = tokio::task::spawn_blocking(move || {
            let size = match File::open(&path) {
                Ok(file) => matching_size(file, &expected)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            if size.is_none() {
                tracing::warn!(path = %path.display(), "the cached file is damaged; it is fetched again");
                fs::remove_file(&path)?;
            }
            Ok(size.map(|size| (path, size)))
        });
        let checked = checked.await.map_err(io::Error::other).and_then(|checked| checked);
        checked.map_err(|source| self.unusable(source))
    }

    /// The beginning of a file: empty, unless beginnings are kept and there is one.
    pub(super) async fn begin(&self, digest: &Expected) -> Result<(Part, PartPath), FetchError> {
        if self.keeps_beginnings {
            let (path, hasher) = (self.dir.join(format!("{BEGUN}{}", digest.file_name())), digest.hasher());
            let found = tokio::task::spawn_blocking(move || go_on(path, hasher)).await.map_err(io::Error::other);
            // Nothing where another process is at it.
            if let Some(begun) = found.and_then(|found| found).map_err(|source| self.unusable(source))? {
                return Ok(begun);
            }
        }
        let part = tempfile::Builder::new().prefix(PART).tempfile_in(&self.dir);
        let (file, path) = part.map(NamedTempFile::into_parts).map_err(|source| self.unusable(source))?;
        Ok((Part { file, hasher: digest.hasher(), written: 0 }, PartPath::Unnamed(path)))
    }

    /// Gives a complete file its name.
    pub(super) fn keep(&self, part: PartPath, digest: &Expected) -> Result<PathBuf, FetchError> {
        let path = self.dir.join(digest.file_name());
        let named = match part {
            PartPath::Unnamed(part) => part.persist(&path).map_err(|error| error.error),
            PartPath::Named(part) => fs::rename(part, &path),
        };
        named.map_err(|source| self.unusable(source))?;
        Ok(path)
    }

    /// Bytes that can still be written.
    pub(super) fn free(&self) -> Option<u64> {
        let stat = statvfs(&self.dir).ok()?;
        stat.blocks_available().checked_mul(stat.fragment_size())
    }

    pub(super) fn unusable(&self, source: io::Error) -> FetchError {
        FetchError::Cache { path: self.dir.clone(), source }
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let untouched = entry.metadata().and_then(|metadata| metadata.modified())?.elapsed().unwrap_or_default();
            if untouched > ABANDONED && entry.file_name().to_string_lossy().starts_with(PART) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Takes a cached file out to `path`, on the same file system.
pub(super) fn take(cached: &Path, path: &Path) -> Result<(), FetchError> {
    let moved = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::rename(cached, path));
    moved.map_err(|source| FetchError::Cache { path: path.to_owned(), source })
}

impl PartPath {
    /// Nobody shall go on with this.
    pub(super) fn discard(self) -> io::Result<()> {
        match self {
            Self::Unnamed(path) => path.close(),
            Self::Named(path) => fs::remove_file(path),
        }
    }
}

/// The beginning at `path`, unless another process has it.
fn go_on(path: PathBuf, mut hasher: Hasher) -> io::Result<Option<(Part, PartPath)>> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(None),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    // Who had it may have finished it in between, and then this is the finished file.
    if !fs::metadata(&path).is_ok_and(|now| file.metadata().is_ok_and(|ours| now.ino() == ours.ino())) {
        return Ok(None);
    }
    let (mut buffer, mut written) = (vec![0; 256 * 1024], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Some((Part { file, hasher, written }, PartPath::Named(path)))),
            read => {
                hasher.update(&buffer[..read]);
                written += read as u64;
            }
        }
    }
}

/// The size of the file if it has this digest.
fn matching_size(mut file: File, expected: &Expected) -> io::Result<Option<u64>> {
    let (mut hasher, mut buffer, mut size) = (expected.hasher(), vec![0; 256 * 1024], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hasher.finish() == *expected).then_some(size)),
            read => {
                hasher.update(&buffer[..read]);
                size += read as u64;
            }
        }
    }
}
