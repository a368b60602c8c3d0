//! Puts a finished image where machines download it. The image is packaged while it is sent, once for each target.
//!
//! A target shows an image under its final name only when it is whole; its checksum file, `<file>.sha256` in the format
//! of `sha256sum -c`, comes last.

mod directory;
mod error;
mod http;
pub mod nutanix;
mod patience;
mod s3;
mod server;
pub mod vsphere;

use std::time::Duration;

use reqwest::Client;
use tokio_util::sync::CancellationToken;
use url::Url;

pub use self::error::PublishError;
use crate::{
    contract::{Proxy, PublishTarget, Stage, upload::CHECKSUM_SUFFIX},
    http::HttpError,
    package::{Done, ImageSource, Summary},
    progress::Reporter,
    secret::Credentials,
};

/// How long a target may be away before the build gives up.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longest time for a whole upload in one request.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(6 * 60 * 60);

/// A published image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Published {
    /// Where machines download it.
    pub url: Url,
    pub summary: Summary,
}

/// Publishes images of one build.
#[derive(Clone, Debug)]
pub struct Publisher {
    client: Client,
    /// Waits for an answer as long as a whole upload takes.
    uploads: Client,
    credentials: Credentials,
    reporter: Reporter,
    cancel: CancellationToken,
    patience: Duration,
}

/// A client for uploads of a whole image in one request. The time that [`http::client`](crate::http::client) gives a
/// server to go on with its answer also runs while the request is sent.
pub fn upload_client(proxy: &Proxy, trust_bundle: Option<&[u8]>) -> Result<Client, HttpError> {
    crate::http::client_with(proxy, trust_bundle, |builder| builder.read_timeout(UPLOAD_TIMEOUT))
}

/// The part of the whole stage that one target takes, and what is being done, for progress.
#[derive(Clone, Debug)]
struct Step {
    reporter: Reporter,
    message: String,
    from: f64,
    width: f64,
}

impl Step {
    fn report(&self, done: &Done) {
        self.reporter.report(Stage::Publish, self.from + self.width * done.share(), self.message.clone());
    }
}

impl Publisher {
    /// `uploads` is an [`upload_client`].
    pub fn new(
        client: Client,
        uploads: Client,
        credentials: Credentials,
        reporter: Reporter,
        cancel: CancellationToken,
    ) -> Self {
        Self { client, uploads, credentials, reporter, cancel, patience: PATIENCE }
    }

    /// Changes how long a target may be away, counted from the last byte that it took.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Publishes to every target, in their order, and ends at the first that fails.
    pub async fn publish_all(
        &self,
        targets: &[PublishTarget],
        source: &ImageSource,
    ) -> Result<Vec<Published>, PublishError> {
        let mut published = Vec::with_capacity(targets.len());
        for (number, target) in targets.iter().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "a handful of targets")]
            let (from, width) = (number as f64 / targets.len() as f64, 1.0 / targets.len() as f64);
            published.push(self.publish_share(target, source, from, width).await?);
        }
        Ok(published)
    }

    /// Publishes to one target.
    pub async fn publish(&self, target: &PublishTarget, source: &ImageSource) -> Result<Published, PublishError> {
        self.publish_share(target, source, 0.0, 1.0).await
    }

    /// Publishes a document to a target that has its image. The stage is as good as done.
    pub async fn publish_beside(
        &self,
        target: &PublishTarget,
        document: &ImageSource,
    ) -> Result<Published, PublishError> {
        self.publish_share(target, document, 1.0, 0.0).await
    }

    async fn publish_share(
        &self,
        target: &PublishTarget,
        source: &ImageSource,
        from: f64,
        width: f64,
    ) -> Result<Published, PublishError> {
        let message = |to: &str| format!("uploading {} to {to}", source.file_name());
        let step = |to: &str| Step { reporter: self.reporter.clone(), message: message(to), from, width };
        match target {
            PublishTarget::Server { upload_url, public_url, directory, slot } => {
                let token = self.credentials.require(slot, "token")?;
                let path = format!("{directory}/{}", source.file_name());
                let server = server::ArtifactServer {
                    client: &self.client,
                    base: upload_url,
                    token: &token,
                    cancel: &self.cancel,
                    patience: self.patience,
                    step: step(&shown(upload_url)),
                };
                let summary = server.upload(&path, source).await?;
                Ok(Published { url: below(public_url, &path)?, summary })
            }
            PublishTarget::Directory { path } => {
                let copy =
                    directory::Copy { directory: path, cancel: &self.cancel, step: step(&path.display().to_string()) };
                let (url, summary) = copy.run(source).await?;
                Ok(Published { url, summary })
            }
            PublishTarget::Http { url, public_url, slot } => {
                let upload = http::Upload {
                    client: &self.uploads,
                    url: below(url, source.file_name())?,
                    login: http::Login::read(&self.credentials, slot.as_ref())?,
                    cancel: &self.cancel,
                    patience: self.patience,
                    step: step(&shown(url)),
                };
                let summary = upload.run(source).await?;
                Ok(Published { url: below(public_url.as_ref().unwrap_or(url), source.file_name())?, summary })
            }
            PublishTarget::S3 { bucket, prefix, region, endpoint, public_url, slot } => {
                let place = s3::Place { bucket, prefix, region, endpoint: endpoint.as_ref() };
                let key = place.key(source.file_name());
                let url = match public_url {
                    Some(base) => below(base, &key)?,
                    None => place.url(&key)?,
                };
                let store = place.store(&self.client, &self.credentials, slot.as_ref(), self.patience)?;
                let upload = s3::Upload { store, place, cancel: &self.cancel, step: step(&format!("bucket {bucket}")) };
                let summary = upload.run(&key, source).await?;
                Ok(Published { url, summary })
            }
        }
    }
}

/// `path` appended to the path of `base`.
fn below(base: &Url, path: &str) -> Result<Url, PublishError> {
    let mut url = base.clone();
    {
        let mut segments =
            url.path_segments_mut().map_err(|()| PublishError::InvalidTarget { target: base.to_string() })?;
        segments.pop_if_empty().extend(path.trim_start_matches('/').split('/'));
    }
    Ok(url)
}

/// A URL without what may be secret in it.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // A URL without a host has none of these.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.into()
}

/// What the checksum file says.
fn checksum_line(summary: &Summary, file_name: &str) -> String {
    format!("{}  {file_name}\n", summary.sha256)
}

/// The name of the checksum file.
fn checksum_name(name: &str) -> String {
    format!("{name}{CHECKSUM_SUFFIX}")
}

const fn content_type(source: &ImageSource) -> &'static str {
    source.format().content_type()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_appended_to_a_base_with_or_without_a_slash() {
        for base in ["http://host/images", "http://host/images/"] {
            assert_eq!(below(&base.parse().unwrap(), "ns/a.gz").unwrap().as_str(), "http://host/images/ns/a.gz");
        }
        assert_eq!(below(&"http://host".parse().unwrap(), "/a").unwrap().as_str(), "http://host/a");
    }

    #[test]
    fn shown_url_holds_no_secret() {
        assert_eq!(shown(&"https://user:pass@host/a?sig=x".parse().unwrap()), "https://host/a");
    }
}
