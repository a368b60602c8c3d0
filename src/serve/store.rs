//! The data directory. All calls block.
//!
//! ```text
//! images/<directory>/<file>             the image
//! images/<directory>/.<file>.json       its sizes, for headers
//! images/<directory>/<file>.sha256      written last: an image without it is not there
//! uploads/<id>.part, uploads/<id>.json  unfinished uploads
//! ```

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    error::Refusal,
    path::{ImagePath, StorePath},
};
use crate::contract::upload::CHECKSUM_SUFFIX;

/// What the server knows of a complete image beside its bytes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Details {
    /// Lower-case hexadecimal SHA-256.
    pub(super) sha256: String,
    /// Bytes of the disk it unpacks to, if the uploader told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uncompressed_size: Option<u64>,
}

/// What became of a finished upload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Published {
    New,
    /// An image of the same contents was there already.
    Already,
}

/// Which image a new one may replace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Replace {
    Nothing,
    Anything,
    /// The one with this SHA-256.
    Exactly(String),
}

#[derive(Debug)]
pub(super) struct Store {
    images: PathBuf,
    uploads: PathBuf,
    min_free_bytes: u64,
    /// Held while names appear or disappear and while an image is opened, so that nobody meets one image's bytes with
    /// another's checksum, or a half-published image.
    layout: Mutex<()>,
}

impl Store {
    pub(super) fn open(data_dir: &Path, min_free_bytes: u64) -> io::Result<Self> {
        let (images, uploads) = (data_dir.join("images"), data_dir.join("uploads"));
        fs::create_dir_all(&images)?;
        fs::create_dir_all(&uploads)?;
        Ok(Self { images, uploads, min_free_bytes, layout: Mutex::new(()) })
    }

    pub(super) fn uploads(&self) -> &Path {
        &self.uploads
    }

    /// Refuses when `more` bytes would leave less free space than the server keeps.
    pub(super) fn ensure_space(&self, more: u64) -> Result<(), Refusal> {
        let stat = nix::sys::statvfs::statvfs(&self.uploads).map_err(io::Error::from)?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if free < self.min_free_bytes.saturating_add(more) { Err(Refusal::DiskFull) } else { Ok(()) }
    }

    /// Opens a complete image.
    pub(super) fn image(&self, path: &ImagePath) -> Result<(File, Details), Refusal> {
        let _layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let sha256 = self.checksum(path)?.ok_or(Refusal::NotFound)?;
        let file = File::open(path.below(&self.images)).map_err(absent)?;
        let details = fs::read(self.details_file(path)).ok().and_then(|json| serde_json::from_slice(&json).ok());
        // The checksum file decides; details of another image are none.
        let details = details.filter(|details: &Details| details.sha256 == sha256);
        Ok((file, details.unwrap_or(Details { sha256, uncompressed_size: None })))
    }

    /// The contents of an image's checksum file.
    pub(super) fn checksum_file(&self, path: &ImagePath) -> Result<String, Refusal> {
        fs::read_to_string(self.marker(path)).map_err(absent)
    }

    fn checksum(&self, path: &ImagePath) -> Result<Option<String>, Refusal> {
        match fs::read_to_string(self.marker(path)) {
            Ok(text) => Ok(text.split_ascii_whitespace().next().map(str::to_owned)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether an upload with this outcome could be published, before its bytes are sent.
    pub(super) fn check_replace(&self, path: &ImagePath, replace: &Replace) -> Result<(), Refusal> {
        self.may_replace(path, replace, None).map(|_| ())
    }

    /// Whether the same image is there already, or may take the place of what is there.
    fn may_replace(&self, path: &ImagePath, replace: &Replace, sha256: Option<&str>) -> Result<Published, Refusal> {
        let current = self.checksum(path)?;
        match (&current, replace) {
            (Some(current), _) if Some(current.as_str()) == sha256 => Ok(Published::Already),
            (None, Replace::Nothing) | (_, Replace::Anything) => Ok(Published::New),
            (Some(current), Replace::Exactly(expected)) if current == expected => Ok(Published::New),
            (Some(current), Replace::Nothing) => match sha256 {
                // The digest decides when it is known.
                None => Ok(Published::New),
                Some(_) => Err(Refusal::Conflict(format!(
                    "/{path} holds a complete image with the SHA-256 {current}; delete its directory first, or send \
                     `If-Match: \"{current}\"` to replace it"
                ))),
            },
            (_, Replace::Exactly(_)) => {
                Err(Refusal::Conflict(format!("/{path} does not hold the image that `If-Match` names")))
            }
        }
    }

    /// Gives the finished, verified `part` its final name. Its bytes are on disk before the name is.
    pub(super) fn publish(
        &self,
        part: &Path,
        path: &ImagePath,
        details: &Details,
        replace: &Replace,
    ) -> Result<Published, Refusal> {
        File::open(part)?.sync_all()?;
        let _layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        if self.may_replace(path, replace, Some(&details.sha256))? == Published::Already {
            return Ok(Published::Already);
        }
        let target = path.below(&self.images);
        let directory = target.parent().unwrap_or(&self.images);
        if target.is_dir() {
            return Err(Refusal::Conflict(format!("/{path} is a directory")));
        }
        fs::create_dir_all(directory).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                Refusal::Conflict(format!("a directory of /{path} is an image"))
            }
            _ => error.into(),
        })?;
        match fs::remove_file(self.marker(path)) {
            Ok(()) => sync_dir(directory)?,
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error.into()),
        }
        fs::rename(part, &target)?;
        let json = serde_json::to_vec(details).map_err(io::Error::other)?;
        self.write(&self.details_file(path), &json)?;
        sync_dir(directory)?;
        self.write(&self.marker(path), format!("{}  {}\n", details.sha256, path.file_name()).as_bytes())?;
        self.sync_parents(directory)?;
        Ok(Published::New)
    }

    /// Removes everything in a directory; it may be absent.
    pub(super) fn remove(&self, directory: &StorePath) -> Result<(), Refusal> {
        let _layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let target = directory.below(&self.images);
        match fs::symlink_metadata(&target) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                return Err(Refusal::BadRequest(format!("/{directory} is an image; delete the directory it is in")));
            }
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        remove_markers(&target)?;
        fs::remove_dir_all(&target)?;
        // Parents that are empty now; the first that is not ends it.
        let parents = target.ancestors().skip(1).take_while(|parent| *parent != self.images);
        for parent in parents {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Removes images that never became complete and are older than `age`: what a crash left.
    pub(super) fn remove_incomplete(&self, age: Duration) -> io::Result<()> {
        let _layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        remove_unmarked(&self.images, age)
    }

    /// Writes a small file so that it is there whole or not at all.
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().suffix(".part").tempfile_in(&self.uploads)?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    fn sync_parents(&self, directory: &Path) -> io::Result<()> {
        directory.ancestors().take_while(|parent| parent.starts_with(&self.images)).try_for_each(sync_dir)
    }

    fn marker(&self, path: &ImagePath) -> PathBuf {
        self.images.join(format!("{path}{CHECKSUM_SUFFIX}"))
    }

    fn details_file(&self, path: &ImagePath) -> PathBuf {
        path.below(&self.images).with_file_name(format!(".{}.json", path.file_name()))
    }
}

fn sync_dir(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory)
}

fn absent(error: io::Error) -> Refusal {
    if is_absent(&error) { Refusal::NotFound } else { error.into() }
}

/// So that a removal that is interrupted leaves no image that seems complete.
fn remove_markers(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_markers(&entry.path())?;
        } else if entry.file_name().to_string_lossy().ends_with(CHECKSUM_SUFFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn remove_unmarked(directory: &Path, age: Duration) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if entry.file_type()?.is_dir() {
            remove_unmarked(&path, age)?;
            continue;
        }
        let image = name.strip_prefix('.').and_then(|name| name.strip_suffix(".json")).unwrap_or(&name);
        let complete =
            name.ends_with(CHECKSUM_SUFFIX) || path.with_file_name(format!("{image}{CHECKSUM_SUFFIX}")).exists();
        if !complete && is_older(&entry.metadata()?, age) {
            tracing::info!(path = %path.display(), "removing an image that was never completed");
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

pub(super) fn is_older(metadata: &fs::Metadata, age: Duration) -> bool {
    metadata.modified().is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|old| old >= age))
}
