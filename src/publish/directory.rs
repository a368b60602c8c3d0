//! A directory of this machine, where a person's build puts its image.

use std::{
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use futures::TryStreamExt;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{PublishError, Step, checksum_line, checksum_name};
use crate::package::{ImageSource, Summary};

/// One image on its way to its file.
pub(super) struct Copy<'p> {
    pub(super) directory: &'p Path,
    pub(super) cancel: &'p CancellationToken,
    pub(super) step: Step,
}

impl Copy<'_> {
    /// Writes the image. An older file of its name is replaced when the new one is whole; its checksum file is gone until
    /// then.
    pub(super) async fn run(&self, source: &ImageSource) -> Result<(Url, Summary), PublishError> {
        let path = self.directory.join(source.file_name());
        let work = self.write(source, &path);
        let summary = self.cancel.run_until_cancelled(work).await.unwrap_or(Err(PublishError::Cancelled))?;
        let absolute = std::path::absolute(&path).map_err(unwritable(&path))?;
        let url = Url::from_file_path(&absolute)
            .map_err(|()| PublishError::InvalidTarget { target: absolute.display().to_string() })?;
        Ok((url, summary))
    }

    async fn write(&self, source: &ImageSource, path: &Path) -> Result<Summary, PublishError> {
        let mut file = self.begin(path)?;
        let (mut bytes, done, summary) = source.open()?.split();
        // The summary says why the bytes were cut.
        while let Ok(Some(piece)) = bytes.try_next().await {
            file = on_a_thread(move || append(&mut file, &piece).map(|()| file), path).await?;
            self.step.report(&done);
        }
        let summary = summary.get().await?;
        let sums = path.with_file_name(checksum_name(source.file_name()));
        let (place, line) = (path.to_owned(), checksum_line(&summary, source.file_name()));
        let size = summary.size;
        let finish = move || {
            // What ends in a hole has no last byte yet.
            file.as_file().set_len(size)?;
            file.as_file().sync_all()?;
            match std::fs::remove_file(&sums) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            file.persist(&place).map_err(|error| error.error)?;
            std::fs::write(&sums, line)
        };
        on_a_thread(finish, path).await?;
        Ok(summary)
    }

    /// A file that vanishes unless it is finished.
    fn begin(&self, path: &Path) -> Result<tempfile::NamedTempFile, PublishError> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".image-").permissions(std::fs::Permissions::from_mode(0o644));
        builder.tempfile_in(self.directory).map_err(unwritable(path))
    }
}

/// Appends to the file; zeros become a hole.
fn append(file: &mut tempfile::NamedTempFile, piece: &[u8]) -> io::Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    if piece.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()]) {
        let length = i64::try_from(piece.len()).map_err(io::Error::other)?;
        return file.seek(SeekFrom::Current(length)).map(drop);
    }
    file.write_all(piece)
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
    path: &Path,
) -> Result<T, PublishError> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(unwritable(path))
}

fn unwritable(path: &Path) -> impl FnOnce(io::Error) -> PublishError {
    let path: PathBuf = path.to_owned();
    move |source| PublishError::Unwritable { path, source }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{FileExt, MetadataExt},
    };

    use super::*;
    use crate::{
        package::Format,
        progress::{Reporter, Style},
    };

    fn copy<'p>(directory: &'p Path, cancel: &'p CancellationToken) -> Copy<'p> {
        let reporter = Reporter::new(Style::Plain, Box::new(io::sink()));
        Copy { directory, cancel, step: Step { reporter, message: String::new(), from: 0.0, width: 1.0 } }
    }

    fn disk(dir: &Path) -> ImageSource {
        let path = dir.join("disk.raw");
        let file = fs::File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"data", 5 << 20).unwrap();
        ImageSource::new(path, "ubuntu-2204-kube-1-31", Format::RawGz)
    }

    #[tokio::test]
    async fn an_image_takes_the_place_of_an_older_one_with_its_checksum_beside_it() {
        let (scratch, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = out.path().join("ubuntu-2204-kube-1-31.gz");
        fs::write(&path, "old").unwrap();
        let cancel = CancellationToken::new();
        let (url, summary) = copy(out.path(), &cancel).run(&disk(scratch.path())).await.unwrap();
        assert_eq!(url.to_file_path().unwrap(), path);
        assert_eq!(fs::metadata(&path).unwrap().len(), summary.size);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        let sums = fs::read_to_string(out.path().join("ubuntu-2204-kube-1-31.gz.sha256")).unwrap();
        assert_eq!(sums, format!("{}  ubuntu-2204-kube-1-31.gz\n", summary.sha256));
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 2);
    }

    #[tokio::test]
    async fn a_raw_image_is_the_disk_with_its_holes() {
        let (scratch, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let disk = disk(scratch.path());
        let raw = ImageSource::new(disk.disk(), "ubuntu-2204-kube-1-31", Format::Raw);
        let cancel = CancellationToken::new();
        let (url, summary) = copy(out.path(), &cancel).run(&raw).await.unwrap();
        let path = out.path().join("ubuntu-2204-kube-1-31.img");
        assert_eq!(url.to_file_path().unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), fs::read(disk.disk()).unwrap());
        assert_eq!((summary.size, summary.virtual_size), (8 << 20, 8 << 20));
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 2 << 20, "the holes were written");
    }

    #[tokio::test]
    async fn nothing_is_left_of_an_image_that_was_cancelled_or_could_not_be_read() {
        let (scratch, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cancel = CancellationToken::new();
        let gone = ImageSource::new(scratch.path().join("gone"), "image", Format::RawGz);
        assert!(matches!(copy(out.path(), &cancel).run(&gone).await, Err(PublishError::Package(_))));
        cancel.cancel();
        let error = copy(out.path(), &cancel).run(&disk(scratch.path())).await.unwrap_err();
        assert!(matches!(error, PublishError::Cancelled), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_directory_that_is_not_there_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let cancel = CancellationToken::new();
        let error = copy(Path::new("/nonexistent"), &cancel).run(&disk(scratch.path())).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ubuntu-2204-kube-1-31.gz"), "{error}");
    }
}
