//! Images in Prism Central: checks before anything is built, the image that it starts from, the upload of an image, and the
//! removal of what a build that ended early has left. The v3 API, which the EKS Anywhere tool uses too.
//!
//! v3 does not tell how much room a cluster has; that there is none is found out when the image is put there.

mod documents;
mod error;
mod images;
mod packer;
mod place;
mod prism;
mod source;
mod upload;

use std::{path::Path, time::Duration};

use tokio_util::sync::CancellationToken;

pub use self::{error::NutanixError, packer::PackerPlace, source::SourceDisk};
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
/// Share of fetching after which a disk goes to Prism Central that Packer's machine starts from.
const FETCHED: f64 = 0.5;

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

/// Tells how far a stage is.
#[derive(Clone, Debug)]
struct Progress {
    reporter: Reporter,
    /// What is on its way, for people.
    what: String,
    stage: Stage,
    /// Share of the stage that is over when it begins.
    begin: f64,
    /// Share of the stage that Prism Central takes.
    width: f64,
}

impl Progress {
    fn tell(&self, share: f64, message: impl Into<String>) {
        self.reporter.report(self.stage, self.begin + self.width * share, message);
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
        let width = 1.0 / (request.publish.len() + 1) as f64;
        let (reporter, what) = (self.reporter.clone(), self.target.image_name.clone());
        let progress = Progress { reporter, what, stage: Stage::Publish, begin: 0.0, width };
        let name = working_name(&request.identity.build_id);
        Upload::new(&prism, &self.target, request, name, source, &self.cancel, progress).run().await
    }

    /// Where Packer makes its machine, and what that starts from: the image that the document names, or the disk `base`,
    /// which is put there. What an attempt before this one has left is removed first.
    pub async fn packer_place(&self, request: &BuildRequest, base: Option<&Path>) -> Result<PackerPlace, NutanixError> {
        let prism = self.open(self.patience)?;
        let (reporter, what) = (self.reporter.clone(), "the disk that the machine starts from".to_owned());
        let progress = Progress { reporter, what, stage: Stage::Fetch, begin: FETCHED, width: 1.0 - FETCHED };
        // What is cancelled removes itself what it has begun.
        packer::place(&prism, &self.target, request, base, &self.cancel, progress).await
    }

    /// Downloads the disk of Packer's machine to the new file `path`.
    pub async fn fetch_made(&self, request: &BuildRequest, path: &Path) -> Result<(), NutanixError> {
        let prism = self.open(self.patience)?;
        let tell = |share: f64| {
            let message = format!("downloading the disk of the machine from {}", prism.server);
            self.reporter.report(Stage::Assemble, share, message);
        };
        let work = packer::fetch_made(&prism, &request.identity.build_id, path, tell);
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(NutanixError::Cancelled))
    }

    /// Removes what attempts of a build have left that did not end by themselves. An image that is whole stays.
    pub async fn clean(&self, request: &BuildRequest) -> Result<(), NutanixError> {
        let (prism, build_id) = (self.open(self.patience)?, &request.identity.build_id);
        if !request.engine.is_native() {
            packer::clean(&prism, build_id).await?;
        }
        images::remove_named(&prism, &working_name(build_id)).await
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
