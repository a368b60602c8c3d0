//! Finds what Packer made, and brings it to where every engine puts its disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    contract::{Classified, FailureClass},
    package,
};

/// Why there is no disk though Packer succeeded.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    #[error(
        "Packer succeeded and left no disk in {}; upstream's recipe in the image of the build pod is not one of those in \
         docs/engines.md", .directory.display()
    )]
    None { directory: PathBuf },
    #[error("can not read what Packer left in {}", .directory.display())]
    Read { directory: PathBuf, source: io::Error },
    #[error("can not make a raw disk of {}, which Packer exported", .path.display())]
    Unpack { path: PathBuf, source: io::Error },
}

impl Classified for ResultError {
    fn class(&self) -> FailureClass {
        match self {
            Self::None { .. } | Self::Read { .. } => FailureClass::Environment,
            // What was cut on its way may be whole the next time.
            Self::Unpack { source, .. } => match source.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                    FailureClass::Transient
                }
                _ => FailureClass::Environment,
            },
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::None { .. } => "RecipeUnusable",
            Self::Read { .. } => "WorkDirectoryUnusable",
            Self::Unpack { .. } => "DiskUnreadable",
        }
    }
}

/// Moves the disk that is in `output` to `disk`. Beside it there may be firmware variables: the larger one is the disk.
pub(super) fn bring(output: &Path, disk: &Path) -> Result<(), ResultError> {
    let found = largest(output, |_| true)?;
    fs::rename(found, disk).map_err(|source| ResultError::Read { directory: output.to_owned(), source })
}

/// Makes `disk` of the VMDK that was exported to `output`, which then goes.
pub(super) async fn unpack(output: &Path, disk: &Path) -> Result<(), ResultError> {
    let path = largest(output, |path| path.extension().is_some_and(|extension| extension == "vmdk"))?;
    let (from, to) = (path.clone(), disk.to_owned());
    let work = tokio::task::spawn_blocking(move || package::unpack(&from, &to).and_then(|()| fs::remove_file(&from)));
    let done = work.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|source| ResultError::Unpack { path, source })
}

/// The largest file in `output` that is `wanted`.
fn largest(output: &Path, wanted: impl Fn(&Path) -> bool) -> Result<PathBuf, ResultError> {
    let read = |source| ResultError::Read { directory: output.to_owned(), source };
    let none = || ResultError::None { directory: output.to_owned() };
    let entries = match fs::read_dir(output) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
        entries => entries.map_err(read)?,
    };
    let mut best: Option<(u64, PathBuf)> = None;
    for entry in entries {
        let entry = entry.map_err(read)?;
        let metadata = entry.metadata().map_err(read)?;
        let larger = best.as_ref().is_none_or(|(size, _)| metadata.len() > *size);
        if metadata.is_file() && larger && wanted(&entry.path()) {
            best = Some((metadata.len(), entry.path()));
        }
    }
    Ok(best.ok_or_else(none)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_found_beside_firmware_variables() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("output");
        fs::create_dir(&output).unwrap();
        fs::write(output.join("efivars.fd"), "small").unwrap();
        fs::write(output.join("machine"), "the larger one").unwrap();
        let disk = dir.path().join("disk.raw");
        bring(&output, &disk).unwrap();
        assert_eq!(fs::read_to_string(disk).unwrap(), "the larger one");
    }

    #[test]
    fn a_recipe_without_a_result_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let error = bring(&dir.path().join("output"), &dir.path().join("disk.raw")).unwrap_err();
        assert_eq!(error.reason(), "RecipeUnusable");
    }
}
