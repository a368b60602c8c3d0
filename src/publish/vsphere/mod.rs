//! Templates in vCenter: checks before anything is built, the import of an image, and the removal of what a build that
//! ended early has left.
//!
//! SOAP for the inventory, REST for tags and content libraries; see `docs/decisions/0005-own-vcenter-client.md`.

mod error;
mod import;
mod inventory;
mod library;
pub mod packer;
mod privileges;
mod rest;
pub(crate) mod soap;
mod tags;
mod tls;
mod vim;

use std::time::Duration;

use reqwest::Client;
use tokio_util::sync::CancellationToken;
use url::Url;

pub use self::error::VsphereError;
use self::{
    import::{Import, UPLOAD_TIMEOUT},
    inventory::{Inventory, KINDS, Place},
    library::Library,
    packer::PackerPlace,
    rest::Rest,
    soap::Endpoint,
    tls::{Refused, Trust},
    vim::{Login, Vim},
};
use crate::{
    contract::{BuildRequest, Proxy, Stage, VsphereImage, VsphereTarget},
    package::{Done, ImageSource, Summary},
    progress::Reporter,
    secret::Credentials,
};

/// Longest silence of vCenter in the middle of an answer.
const SILENCE: Duration = Duration::from_secs(60);
/// Time to remove what a build that ends early has left, less than a pod has to end.
const CLEANING_TIMEOUT: Duration = Duration::from_secs(45);
/// Time to say goodbye.
const LOGOUT_TIMEOUT: Duration = Duration::from_secs(5);

/// Name of what a build makes until it is complete.
fn working_name(build_id: &str) -> String {
    format!("node-image-build-{build_id}")
}

/// Name of what a build is about to replace.
fn old_name(build_id: &str) -> String {
    format!("node-image-build-{build_id}-replaced")
}

/// An image in vCenter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Imported {
    /// Name of the template, or of the item in the content library.
    pub name: String,
    /// Of the disk that was uploaded.
    pub summary: Summary,
    /// The template; an item of a content library is none.
    pub template: Option<VsphereImage>,
}

/// The way to one vCenter.
#[derive(Clone, Debug)]
pub struct Vsphere {
    /// Where images go there.
    pub target: VsphereTarget,
    pub proxy: Proxy,
    /// Additional certificate authorities (PEM).
    pub trust_bundle: Option<Vec<u8>>,
    pub credentials: Credentials,
    pub reporter: Reporter,
    pub cancel: CancellationToken,
    /// How long vCenter may be away, counted from its last answer.
    pub patience: Duration,
}

/// Tells how far the stage is.
#[derive(Clone, Debug)]
struct Progress {
    reporter: Reporter,
    message: String,
    /// Share of the stage that the import takes.
    width: f64,
}

impl Progress {
    fn upload(&self, done: &Done) {
        self.reporter.report(Stage::Publish, self.width * done.share(), self.message.clone());
    }

    fn say(&self, message: &str) {
        self.reporter.report(Stage::Publish, self.width, message);
    }
}

/// An open session.
struct Session {
    vim: Vim,
    /// For the REST API.
    client: Client,
    base: Url,
    trust: Trust,
}

impl Vsphere {
    /// Checks all that can be checked before anything is built: address, certificate, credentials, every object that the
    /// target names, the user's privileges, room in the datastore, and whether the template's name is free.
    pub async fn preflight(&self, request: &BuildRequest) -> Result<(), VsphereError> {
        let session = self.interruptible(self.open()).await?;
        let rest = session.rest();
        let result = self.interruptible(self.check(&session, &rest, request)).await;
        session.close(&rest).await;
        result
    }

    async fn check(&self, session: &Session, rest: &Rest<'_>, request: &BuildRequest) -> Result<(), VsphereError> {
        let vim = &session.vim;
        let place = self.place(vim).await?;
        let by_packer = !request.engine.is_native();
        privileges::check(vim, &self.target, &place, &vim.content.root, by_packer).await?;
        let datastore = vim.properties(&place.datastore, &["summary.freeSpace"]).await?;
        let free = datastore.text("summary.freeSpace").and_then(|free| free.parse().ok()).unwrap_or(u64::MAX);
        let needed = request.disk_size_mib << 20;
        if free < needed {
            return Err(VsphereError::NoSpace { datastore: self.target.datastore.clone(), needed, free });
        }
        match &self.target.content_library {
            Some(name) => self.library(session, rest, &session.client, name).check_name(request).await,
            None => import::occupant(vim, &place, &self.target, request).await.map(drop),
        }
    }

    /// What Packer is told about where the target is.
    pub async fn packer_place(&self) -> Result<PackerPlace, VsphereError> {
        let session = self.interruptible(self.open()).await?;
        let work = async {
            let inventory = self.inventory(&session.vim).await?;
            Ok(inventory.for_packer(&self.resolve(&session.vim, &inventory)?))
        };
        let result = self.interruptible(work).await;
        session.close(&session.rest()).await;
        result
    }

    /// Puts the image, which is packaged as OVA, where the target says. When it fails or is cancelled, what it made is
    /// removed again.
    pub async fn publish(&self, request: &BuildRequest, source: &ImageSource) -> Result<Imported, VsphereError> {
        let format = source.format().as_str();
        let ova = source.ova().ok_or(VsphereError::NotAnOva { format })?;
        let session = self.interruptible(self.open()).await?;
        let rest = session.rest();
        let result = Box::pin(self.put(&session, &rest, request, &ova)).await;
        session.close(&rest).await;
        result
    }

    async fn put(
        &self,
        session: &Session,
        rest: &Rest<'_>,
        request: &BuildRequest,
        ova: &crate::package::Ova<'_>,
    ) -> Result<Imported, VsphereError> {
        let name = self.target.template_name.clone();
        #[expect(clippy::cast_precision_loss, reason = "a handful of targets")]
        let progress = Progress {
            reporter: self.reporter.clone(),
            message: format!("uploading {name} to {}", self.target.server),
            width: 1.0 / (request.publish.len() + 1) as f64,
        };
        let place = self.interruptible(self.place(&session.vim)).await?;
        let build_id = &request.identity.build_id;
        let template = if let Some(library) = &self.target.content_library {
            let (uploads, _) = tls::client(&self.proxy, session.trust.clone(), UPLOAD_TIMEOUT)?;
            let library = self.library(session, rest, &uploads, library);
            let work = async {
                library.clean(build_id).await?;
                library.put(ova, &ova.texts().await?, request, &place.datastore, &progress).await
            };
            let result = self.interruptible(work).await;
            self.finish(build_id, result, library.clean(build_id)).await?;
            None
        } else {
            let host = session.base.host_str().unwrap_or_default();
            let (vim, trust) = (&session.vim, &session.trust);
            let import = Import::new(vim, rest, &self.target, request, &place, &self.proxy, trust, host, progress);
            let result = self.interruptible(import.run(ova)).await;
            Some(self.finish(build_id, result, import.undo()).await?)
        };
        let summary = ova.texts().await?.vmdk;
        Ok(Imported { name, summary, template })
    }

    /// The result; after a failure only once everything is removed.
    async fn finish<T>(
        &self,
        build_id: &str,
        result: Result<T, VsphereError>,
        clean: impl Future<Output = Result<(), VsphereError>>,
    ) -> Result<T, VsphereError> {
        let Err(cause) = result else { return result };
        match tokio::time::timeout(CLEANING_TIMEOUT, clean).await {
            Ok(Ok(())) => Err(cause),
            Ok(Err(_)) | Err(_) => Err(VsphereError::LeftBehind {
                server: self.target.server.clone(),
                what: working_name(build_id),
                cause: Box::new(cause),
            }),
        }
    }

    /// Removes what attempts of a build have left that did not end by themselves. A template that is complete stays.
    pub async fn clean(&self, request: &BuildRequest) -> Result<(), VsphereError> {
        self.clean_up(request, false).await
    }

    /// Removes all that a build has made, the complete template or library item too. What another build, or a person, has
    /// put in its place stays; so do tags and the library itself, which others use.
    pub async fn remove(&self, request: &BuildRequest) -> Result<(), VsphereError> {
        self.clean_up(request, true).await
    }

    async fn clean_up(&self, request: &BuildRequest, finished_too: bool) -> Result<(), VsphereError> {
        let session = self.open().await?;
        let rest = session.rest();
        let build_id = &request.identity.build_id;
        let work = async {
            let place = self.place(&session.vim).await?;
            if !request.engine.is_native() {
                packer::clean(&session.vim, &place, build_id).await?;
            }
            if let Some(library) = &self.target.content_library {
                let library = self.library(&session, &rest, &session.client, library);
                library.clean(build_id).await?;
                return if finished_too { library.remove_finished(request).await } else { Ok(()) };
            }
            import::clean(&session.vim, &place, &self.target, build_id).await?;
            if finished_too {
                import::remove_finished(&session.vim, &place, &self.target, request).await?;
            }
            Ok(())
        };
        let result = work.await;
        session.close(&rest).await;
        result
    }

    fn library<'l>(
        &'l self,
        session: &'l Session,
        rest: &'l Rest<'l>,
        uploads: &'l Client,
        name: &'l str,
    ) -> Library<'l> {
        Library { rest, uploads, target: &self.target, name, server: &session.vim.server }
    }

    async fn interruptible<T>(&self, work: impl Future<Output = Result<T, VsphereError>>) -> Result<T, VsphereError> {
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(VsphereError::Cancelled))
    }

    async fn open(&self) -> Result<Session, VsphereError> {
        let server = &self.target.server;
        let base = Url::parse(&format!("https://{server}"))
            .ok()
            .filter(|url| url.path() == "/")
            .ok_or_else(|| VsphereError::InvalidServer { server: server.clone() })?;
        let trust = match (&self.target.thumbprint, self.target.insecure) {
            (Some(thumbprint), _) => Trust::Thumbprint(thumbprint.clone()),
            (None, true) => Trust::Everything,
            (None, false) => Trust::Authorities(self.trust_bundle.clone().unwrap_or_default()),
        };
        let login = Login {
            username: self.credentials.require(&self.target.slot, "username")?,
            password: self.credentials.require(&self.target.slot, "password")?,
        };
        let (client, refused): (Client, Refused) = tls::client(&self.proxy, trust.clone(), SILENCE)?;
        let mut sdk = base.clone();
        sdk.set_path("/sdk");
        let endpoint = Endpoint::new(client.clone(), sdk);
        let vim = Vim::open(endpoint, refused, server.clone(), login, self.patience).await?;
        Ok(Session { vim, client, base, trust })
    }

    /// The objects that the target names.
    async fn place(&self, vim: &Vim) -> Result<Place, VsphereError> {
        self.resolve(vim, &self.inventory(vim).await?)
    }

    async fn inventory(&self, vim: &Vim) -> Result<Inventory, VsphereError> {
        Ok(Inventory::new(vim.objects(KINDS).await?))
    }

    fn resolve(&self, vim: &Vim, inventory: &Inventory) -> Result<Place, VsphereError> {
        inventory
            .resolve(&self.target)
            .map_err(|problems| VsphereError::NotFound { server: vim.server.clone(), problems })
    }
}

impl Session {
    fn rest(&self) -> Rest<'_> {
        Rest::new(self.client.clone(), &self.base, &self.vim)
    }

    /// vCenter ends what does not end here after some time.
    async fn close(&self, rest: &Rest<'_>) {
        let goodbye = async {
            rest.log_out().await;
            self.vim.log_out().await;
        };
        let _ = tokio::time::timeout(LOGOUT_TIMEOUT, goodbye).await;
    }
}
