//! Images in Prism Central: checks before anything is built, the image that it starts from, the upload of an image, and the
//! removal of what a build that ended early has left. The v3 API, which the EKS Anywhere tool uses too.
//!
//! v3 does not tell how much room a cluster has; that there is none is found out when the image is put there.

mod documents;
mod error;
mod images;
mod place;
mod prism;
mod source;
mod upload;

use std::{path::Path, time::Duration};

use tokio_util::sync::CancellationToken;

pub use self::{error::NutanixError, source::SourceDisk};
use self::{
    prism::{Login, Prism},
    upload::{Upload, working_name},
};
use crate::{
    contract::{Base, BuildRequest, NutanixTarget, PrismSource, Proxy, Stage},
    http,
    package::{Format, ImageSource, Summary},
    progress::Reporter,
    secret::Credentials,
};

/// Longest time for a whole upload.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(6 * 60 * 60);
/// A check before a build is not worth a longer wait.
const PREFLIGHT_PATIENCE: Duration = Duration::from_secs(20);

/// Share of fetching that the image takes which a build starts from: it is the largest file by far.
const SOURCE_SHARE: f64 = 0.8;

/// A finished image in Prism Central.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PrismImage {
    pub name: String,
    pub uuid: String,
    /// Of the file that was uploaded.
    pub summary: Summary,
}

/// The way to one Prism Central.
#[derive(Clone, Debug)]
pub struct Nutanix {
    /// Where images go there.
    pub target: NutanixTarget,
    pub proxy: Proxy,
    /// Additional certificate authorities (PEM).
    pub trust_bundle: Option<Vec<u8>>,
    pub credentials: Credentials,
    pub reporter: Reporter,
    pub cancel: CancellationToken,
    /// How long Prism Central may be away, counted from its last answer or the last byte that it took.
    pub patience: Duration,
}

/// Tells how far the stage is.
#[derive(Clone, Debug)]
struct Progress {
    reporter: Reporter,
    /// Share of the stage that Prism Central takes.
    width: f64,
}

impl Progress {
    fn tell(&self, share: f64, message: impl Into<String>) {
        self.reporter.report(Stage::Publish, self.width * share, message);
    }
}

impl Nutanix {
    /// Checks all that can be checked before anything is built: address, certificate, credentials, every object that the
    /// target names, and whether the image's name is free.
    pub async fn preflight(&self, request: &BuildRequest) -> Result<(), NutanixError> {
        let prism = self.open(self.patience.min(PREFLIGHT_PATIENCE))?;
        let work = async {
            let source = match &request.base {
                Base::PrismImage(source) => Some(source.prism_image.as_str()),
                Base::Archive(_) | Base::Recipe => None,
            };
            place::check(&prism, &self.target, source).await?;
            upload::occupants(&prism, &self.target, &request.identity).await.map(drop)
        };
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(NutanixError::Cancelled))
    }

    /// Downloads the image that the build starts from to the new file `path`.
    pub async fn fetch_source(&self, source: &PrismSource, path: &Path) -> Result<SourceDisk, NutanixError> {
        let prism = self.open(self.patience)?;
        let work = async {
            let image = source::find(&prism, &source.prism_image).await?;
            let image = image.map_err(|problem| place::not_found(&prism, vec![problem]))?;
            let tell = |share: f64| {
                let message = format!("downloading {} from {}", source.prism_image, prism.server);
                self.reporter.report(Stage::Fetch, SOURCE_SHARE * share, message);
            };
            source::download(&prism, &image, path, tell).await
        };
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(NutanixError::Cancelled))
    }

    /// Puts the image, which is packaged as qcow2, where the target says. When it fails or is cancelled, what it made is
    /// removed again.
    pub async fn publish(&self, request: &BuildRequest, source: &ImageSource) -> Result<PrismImage, NutanixError> {
        if *source.format() != Format::Qcow2 {
            return Err(NutanixError::NotQcow2 { format: source.format().as_str() });
        }
        let prism = self.open(self.patience)?;
        #[expect(clippy::cast_precision_loss, reason = "a handful of targets")]
        let progress = Progress { reporter: self.reporter.clone(), width: 1.0 / (request.publish.len() + 1) as f64 };
        Upload::new(&prism, &self.target, request, source, &self.cancel, progress).run().await
    }

    /// Removes what attempts of a build have left that did not end by themselves. An image that is whole stays.
    pub async fn clean(&self, request: &BuildRequest) -> Result<(), NutanixError> {
        images::remove_named(&self.open(self.patience)?, &working_name(&request.identity.build_id)).await
    }

    /// Removes all that a build has made, the whole image too. What another build, or a person, has put in its place stays.
    pub async fn remove(&self, request: &BuildRequest) -> Result<(), NutanixError> {
        self.clean(request).await?;
        upload::remove_finished(&self.open(self.patience)?, &self.target, &request.identity).await
    }

    fn open(&self, patience: Duration) -> Result<Prism, NutanixError> {
        let client = |timeout: Option<Duration>| {
            http::client_with(&self.proxy, self.trust_bundle.as_deref(), |builder| {
                let builder = builder.tls_danger_accept_invalid_certs(self.target.insecure);
                // The client takes the whole time until an answer begins for silence.
                if let Some(timeout) = timeout { builder.read_timeout(timeout) } else { builder }
            })
        };
        let login = Login {
            username: self.credentials.require(&self.target.slot, "username")?,
            password: self.credentials.require(&self.target.slot, "password")?,
        };
        Prism::new(&self.target, client(None)?, client(Some(UPLOAD_TIMEOUT))?, login, patience)
    }
}
