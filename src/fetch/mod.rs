//! Downloads: verified while they are written, resumed where the server allows it, cached by their digest.
//!
//! The cache directory holds finished files only, named by their digest, and unnamed beginnings that are removed on any
//! failure, unless they are for another process to go on with. A cached file is read and verified again before it is used.

mod cache;
mod digest;
mod download;
mod error;
mod shares;
pub(crate) mod sums;
mod transport;

use std::path::{Path, PathBuf};

pub use error::{ChecksumMismatch, FetchError};
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::Client;
use tokio_util::sync::CancellationToken;
pub use transport::{Patience, TransportError};
pub(crate) use transport::{distrusts_certificate, document, retry_after, shown};
use url::Url;

use self::{cache::Cache, digest::Expected, download::Download, shares::Shares};
use crate::{
    contract::{Archive, Artifact, BaseChecksum},
    progress::Reporter,
};

/// Downloads that run at the same time. More do not fill a line better, and CDNs slow such clients down.
const PARALLEL: usize = 4;
/// `SHA256SUMS` files list some hundred files.
const LARGEST_SUMS: u64 = 8 * 1024 * 1024;

/// The digest, `sha256:` and hexadecimal digits, that a `SHA256SUMS` file lists for the file at the end of a URL, or the
/// names that it has instead.
pub(crate) fn listed_digest(sums: &str, file: &Url) -> Result<String, Vec<String>> {
    let found = sums::find(sums, &sums::file_name(file));
    found.map(|digest| digest.to_string()).map_err(|missing| missing.nearest)
}

/// Brings files into a cache directory.
#[derive(Debug)]
pub struct Fetcher {
    client: Client,
    cache: Cache,
    cancel: CancellationToken,
    patience: Patience,
}

/// A file to download, and the digest it must have.
#[derive(Debug)]
struct Wanted<'w> {
    name: &'w str,
    url: &'w Url,
    digest: Expected,
}

impl<'w> Wanted<'w> {
    fn of(artifact: &'w Artifact) -> Result<Self, FetchError> {
        let Artifact { name, url, sha256 } = artifact;
        let no_digest = || FetchError::NoDigest { name: name.clone(), url: shown(url) };
        let digest = Expected::sha256(sha256.as_deref().ok_or_else(no_digest)?, name)?;
        Ok(Self { name, url, digest })
    }
}

impl Fetcher {
    /// A fetcher that keeps files in `cache_dir`, which is made if need be, and stops when `cancel` is.
    pub fn new(client: Client, cache_dir: impl Into<PathBuf>, cancel: CancellationToken) -> Result<Self, FetchError> {
        Ok(Self { client, cache: Cache::open(cache_dir.into())?, cancel, patience: Patience::default() })
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// Keeps the beginnings of files that could not be fetched whole, for another process that does the same.
    #[must_use]
    pub fn keep_beginnings(mut self) -> Self {
        self.cache.keeps_beginnings = true;
        self
    }

    /// The verified file of `artifact`. `on_progress` is told the bytes that are there and, if known, all of them.
    pub async fn fetch(
        &self,
        artifact: &Artifact,
        on_progress: impl Fn(u64, Option<u64>) + Send + Sync,
    ) -> Result<PathBuf, FetchError> {
        self.obtain(&Wanted::of(artifact)?, &on_progress).await
    }

    /// Brings the verified file of `artifact` to `path`, which is on the file system of the cache, and leaves nothing of
    /// it in the cache. A file that is there already and has the digest stays.
    pub async fn fetch_to(
        &self,
        artifact: &Artifact,
        path: &Path,
        on_progress: impl Fn(u64, Option<u64>) + Send + Sync,
    ) -> Result<(), FetchError> {
        let wanted = Wanted::of(artifact)?;
        let there = self.cache.find_at(path.to_owned(), &wanted.digest);
        if let Some((_, size)) = self.unless_cancelled(there).await?? {
            on_progress(size, Some(size));
            return Ok(());
        }
        let cached = self.obtain(&wanted, &on_progress).await?;
        cache::take(&cached, path)
    }

    /// The verified files of `artifacts` in their order, some of them fetched at the same time. The first failure ends
    /// all. `reporter` is told what share of them is there.
    pub async fn fetch_all(&self, artifacts: &[Artifact], reporter: &Reporter) -> Result<Vec<PathBuf>, FetchError> {
        let shares = Shares::new(artifacts.len(), reporter);
        let downloads = artifacts.iter().enumerate().map(|(index, artifact)| {
            let shares = &shares;
            async move {
                let path = self.fetch(artifact, |done, total| shares.reached(index, done, total)).await?;
                shares.finished(index);
                Ok::<_, FetchError>((index, path))
            }
        });
        let mut paths: Vec<_> = stream::iter(downloads).buffer_unordered(PARALLEL).try_collect().await?;
        paths.sort_unstable();
        Ok(paths.into_iter().map(|(_, path)| path).collect())
    }

    /// The verified root file system archive of `base`, and its digest as `sha256:…` or `sha512:…`.
    pub async fn fetch_base(
        &self,
        base: &Archive,
        on_progress: impl Fn(u64, Option<u64>) + Send + Sync,
    ) -> Result<(PathBuf, String), FetchError> {
        const NAME: &str = "the base root file system";
        let digest = match &base.checksum {
            BaseChecksum::Sha256(digest) => Expected::sha256(digest, NAME)?,
            BaseChecksum::Sha512(digest) => Expected::sha512(digest, NAME)?,
            BaseChecksum::Sha256Sums(url) => self.listed(url, &base.url).await?,
        };
        let shown = digest.to_string();
        let path = self.obtain(&Wanted { name: NAME, url: &base.url, digest }, &on_progress).await?;
        Ok((path, shown))
    }

    /// The digest that the `SHA256SUMS` file at `sums` lists for `file`.
    async fn listed(&self, sums: &Url, file: &Url) -> Result<Expected, FetchError> {
        let document = document(&self.client, sums, None, LARGEST_SUMS, &self.patience);
        let document = self.unless_cancelled(document).await??;
        let bytes = document.map(|document| document.bytes).unwrap_or_default();
        sums::find(&String::from_utf8_lossy(&bytes), &sums::file_name(file)).map_err(|missing| FetchError::NotListed {
            sums: shown(sums),
            file: sums::file_name(file),
            nearest: missing.nearest,
        })
    }

    async fn obtain(
        &self,
        wanted: &Wanted<'_>,
        on_progress: &(impl Fn(u64, Option<u64>) + Sync),
    ) -> Result<PathBuf, FetchError> {
        if let Some((path, size)) = self.unless_cancelled(self.cache.find(&wanted.digest)).await?? {
            on_progress(size, Some(size));
            return Ok(path);
        }
        // A file that does not match is fetched once more from the start: a proxy or a mirror may have been in the middle
        // of an update.
        let mut mismatch = None;
        for _ in 0..2 {
            let download = Download::new(&self.client, &self.cache, &self.patience, wanted, on_progress);
            match self.unless_cancelled(download.run()).await? {
                Err(error @ FetchError::ChecksumMismatch(_)) => {
                    tracing::warn!(%error, "the download is thrown away");
                    mismatch = Some(error);
                }
                done => return done,
            }
        }
        mismatch.map_or(Err(FetchError::Cancelled), Err)
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, FetchError> {
        self.cancel.run_until_cancelled(work).await.ok_or(FetchError::Cancelled)
    }

    /// Where the files are.
    pub fn cache_dir(&self) -> &Path {
        self.cache.dir()
    }
}
