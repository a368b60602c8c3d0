//! From a disk to an image in Prism Central.
//!
//! The image is made under a name of the build's own and gets its real one when Prism Central has all of it: what has the
//! real name is whole, and what has the other one can be removed by whoever finds it. An image that is replaced goes
//! after that, so that there is always one of the name.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::TryStreamExt;
use reqwest::{Body, Method};
use tokio_util::sync::CancellationToken;

use super::{
    NutanixError, PrismImage, Progress,
    documents::{Accepted, Entity, ImageIntent, ImageMetadata, ImageResources, ImageSpec, Reference},
    images,
    place::{self, Cluster},
    prism::{Prism, Sent},
};
use crate::{
    contract::{BuildIdentity, BuildRequest, NutanixTarget},
    error::Chain,
    package::{ImageSource, Summary},
};

/// How often an upload is begun that breaks off in the middle.
const UPLOADS: usize = 3;
/// Shares of the work after which the file is made, and is sent.
const PACKED: f64 = 0.4;
const SENT: f64 = 0.9;
/// Time for an answer that names what has to be removed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Time to remove what a build that ends early has left, less than a pod has to end.
const CLEANING_TIMEOUT: Duration = Duration::from_secs(45);

/// Name of what a build makes until it is whole.
pub(super) fn working_name(build_id: &str) -> String {
    format!("node-image-build-{build_id}")
}

/// Ends the description of an image, so that its build knows it again.
fn mark(identity: &BuildIdentity) -> String {
    format!("made by the NodeImageBuild {identity}")
}

/// The images that have the target's name and may be removed: one where the target says so, and what an attempt of the
/// same build made.
pub(super) async fn occupants(
    prism: &Prism,
    target: &NutanixTarget,
    identity: &BuildIdentity,
) -> Result<Vec<Entity>, NutanixError> {
    let (server, name, mark) = (prism.server.clone(), target.image_name.clone(), mark(identity));
    let all = images::named(prism, &name).await?;
    let others: Vec<_> = all.iter().filter(|image| !image.status.description.ends_with(&mark)).collect();
    match others[..] {
        [] => Ok(all),
        [_] if target.replace_existing => Ok(all),
        [other] => Err(NutanixError::NameTaken { server, name, uuid: other.metadata.uuid.clone() }),
        _ => {
            let uuids = others.iter().map(|image| image.metadata.uuid.clone()).collect();
            Err(NutanixError::Ambiguous { server, name, uuids })
        }
    }
}

/// Removes the images of the target's name that the build made.
pub(super) async fn remove_finished(
    prism: &Prism,
    target: &NutanixTarget,
    identity: &BuildIdentity,
) -> Result<(), NutanixError> {
    let mark = mark(identity);
    for image in images::named(prism, &target.image_name).await? {
        if image.status.description.ends_with(&mark) {
            images::remove(prism, &image.metadata.uuid).await?;
        }
    }
    Ok(())
}

/// One image on its way.
pub(super) struct Upload<'u> {
    pub(super) prism: &'u Prism,
    pub(super) target: &'u NutanixTarget,
    pub(super) request: &'u BuildRequest,
    /// What it is called until it is whole.
    pub(super) name: String,
    pub(super) source: &'u ImageSource,
    pub(super) cancel: &'u CancellationToken,
    pub(super) progress: Progress,
    /// Images that were begun and are not finished, which may not be listed yet.
    begun: Mutex<Vec<String>>,
}

impl<'u> Upload<'u> {
    pub(super) fn new(
        prism: &'u Prism,
        target: &'u NutanixTarget,
        request: &'u BuildRequest,
        name: String,
        source: &'u ImageSource,
        cancel: &'u CancellationToken,
        progress: Progress,
    ) -> Self {
        Self { prism, target, request, name, source, cancel, progress, begun: Mutex::default() }
    }

    /// When it fails or is cancelled, what it made is removed again.
    pub(super) async fn run(&self) -> Result<PrismImage, NutanixError> {
        let result = match self.put().await {
            // From here on it is not interrupted any more: there is no way back half-way.
            Ok((image, occupants)) => self.take_name(image, &occupants).await,
            Err(error) => Err(error),
        };
        self.clean_up().await;
        result
    }

    /// Brings a disk of so many bytes there for a machine to start from. It keeps its name, and goes with the machine.
    pub(super) async fn put_source(&self, cluster: &Cluster, disk_size: u64) -> Result<String, NutanixError> {
        let work = async {
            let summary = self.interruptible(self.summary()).await?;
            self.bring(cluster, &Summary { virtual_size: disk_size, ..summary }).await
        };
        let result = work.await;
        if result.is_err() {
            self.clean_up().await;
        }
        result
    }

    /// Size and digest of the file, once nothing of an earlier attempt has its name.
    async fn summary(&self) -> Result<Summary, NutanixError> {
        let packing = format!("packaging {}", self.progress.what);
        let tell = |share| self.progress.tell(PACKED * share, packing.clone());
        let summary = self.source.summary(|done| tell(done.share())).await?;
        images::remove_named(self.prism, &self.name).await?;
        Ok(summary)
    }

    /// Brings the image to Prism Central, under its working name. Also gives the images that have the real one.
    async fn put(&self) -> Result<(PrismImage, Vec<Entity>), NutanixError> {
        let (prism, target, identity) = (self.prism, self.target, &self.request.identity);
        let prepare = async {
            let summary = self.summary().await?;
            Ok((summary, occupants(prism, target, identity).await?, place::cluster(prism, target).await?))
        };
        let (summary, occupants, cluster) = self.interruptible(prepare).await?;
        let uuid = self.bring(&cluster, &summary).await?;
        Ok((PrismImage { name: target.image_name.clone(), uuid, summary }, occupants))
    }

    /// Sends the file, and waits until Prism Central has taken it over.
    async fn bring(&self, cluster: &Cluster, summary: &Summary) -> Result<String, NutanixError> {
        let prism = self.prism;
        let uuid = self.send(cluster, summary).await?;
        let tell = |doing: &str| {
            let doing = if doing.is_empty() { "takes over the image" } else { doing };
            self.progress.tell(SENT, format!("{}: {doing}", prism.server));
        };
        tell("");
        self.interruptible(images::await_whole(prism, &uuid, summary, tell)).await?;
        Ok(uuid)
    }

    /// Creates an image and sends its bytes; where the connection breaks, another one, because a beginning can not be
    /// continued.
    async fn send(&self, cluster: &Cluster, summary: &Summary) -> Result<String, NutanixError> {
        let prism = self.prism;
        let (mut patience, mut broken) = (prism.patience(), 0);
        loop {
            let uuid = self.create(cluster).await?;
            let (bytes, _, sent_summary) = self.source.open()?.split();
            let sent = Arc::new(AtomicU64::new(0));
            let (counter, size, progress) = (Arc::clone(&sent), summary.size, self.progress.clone());
            let message = format!("uploading {} to {}", self.progress.what, prism.server);
            let bytes = bytes.inspect_ok(move |piece| {
                let sent = counter.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
                progress.tell(PACKED + (SENT - PACKED) * share(sent, size), message.clone());
            });
            let upload = prism.upload(&uuid, summary, Body::wrap_stream(bytes), &sent);
            match self.interruptible(upload).await? {
                Sent::Whole if sent_summary.get().await?.sha256 == summary.sha256 => return Ok(uuid),
                Sent::Whole => {
                    let answer = "the disk changed while it was uploaded".to_owned();
                    return Err(NutanixError::Corrupted { server: prism.server.clone(), answer });
                }
                Sent::Cut { cause, pause } => {
                    if sent.load(Ordering::Relaxed) > 0 {
                        patience.renew();
                        broken += 1;
                    }
                    if broken == UPLOADS {
                        let answer = format!("the upload broke off {UPLOADS} times, the last time because: {cause}");
                        return Err(NutanixError::Corrupted { server: prism.server.clone(), answer });
                    }
                    let begin_anew = async {
                        patience.wait_at_least(pause, cause).await?;
                        images::remove(prism, &uuid).await
                    };
                    self.interruptible(begin_anew).await?;
                    self.forget(&uuid);
                }
            }
        }
    }

    /// Creates an image without contents. The request is not dropped half-way: its answer names what it made.
    async fn create(&self, cluster: &Cluster) -> Result<String, NutanixError> {
        let action = "create an image";
        let description = description(self.request);
        let intent = ImageIntent {
            metadata: ImageMetadata { kind: "image", categories: &self.target.categories },
            spec: ImageSpec {
                name: &self.name,
                description: &description,
                resources: ImageResources {
                    image_type: "DISK_IMAGE",
                    architecture: "X86_64",
                    initial_placement_ref_list: [Reference { kind: "cluster", uuid: &cluster.uuid }],
                },
            },
        };
        let mut create = pin!(self.prism.begin(action, Method::POST, &["images"], Some(&intent)));
        let created = tokio::select! {
            created = &mut create => created,
            () = self.cancel.cancelled() => {
                tokio::time::timeout(ANSWER_TIMEOUT, create).await.unwrap_or(Err(NutanixError::Cancelled))
            }
        };
        let created: Accepted = created?
            .filter(|created| !created.metadata.uuid.is_empty())
            .ok_or_else(|| self.prism.not_prism("it created an image without a UUID".to_owned()))?;
        let uuid = created.metadata.uuid.clone();
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).push(uuid.clone());
        self.interruptible(self.prism.finish(action, &created)).await?;
        Ok(uuid)
    }

    /// Gives the image its real name and then removes those that had it.
    async fn take_name(&self, image: PrismImage, occupants: &[Entity]) -> Result<PrismImage, NutanixError> {
        images::rename(self.prism, &image.uuid, &image.name).await?;
        self.forget(&image.uuid);
        for old in occupants {
            match images::remove(self.prism, &old.metadata.uuid).await {
                Ok(()) => {}
                Err(error @ NutanixError::Unavailable { .. }) => {
                    tracing::warn!("nobody knows whether the old image is gone, so the new one stays: {}", image.uuid);
                    return Err(error);
                }
                Err(error) => {
                    images::remove(self.prism, &image.uuid).await?;
                    return Err(NutanixError::OldImageStays {
                        server: self.prism.server.clone(),
                        name: image.name,
                        uuid: old.metadata.uuid.clone(),
                        answer: Chain(&error).to_string(),
                    });
                }
            }
        }
        Ok(image)
    }

    /// An image is finished, or gone.
    fn forget(&self, uuid: &str) {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).retain(|begun| begun != uuid);
    }

    /// Removes everything that was begun and is not finished, also what an answer that was lost would have named.
    async fn clean_up(&self) {
        let begun = std::mem::take(&mut *self.begun.lock().unwrap_or_else(PoisonError::into_inner));
        let work = async {
            for uuid in &begun {
                images::remove(self.prism, uuid).await?;
            }
            images::remove_named(self.prism, &self.name).await
        };
        let why = match tokio::time::timeout(CLEANING_TIMEOUT, work).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => Chain(&error).to_string(),
            Err(_) => "it took too long".to_owned(),
        };
        tracing::warn!(
            "an image `{}` may be left on {} ({why}); the next attempt removes it, or delete it there",
            self.name,
            self.prism.server
        );
    }

    async fn interruptible<T>(&self, work: impl Future<Output = Result<T, NutanixError>>) -> Result<T, NutanixError> {
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(NutanixError::Cancelled))
    }
}

fn description(request: &BuildRequest) -> String {
    let BuildRequest { os, release, identity, .. } = request;
    let (kubernetes, eksd) = (&release.kubernetes_version, &release.eksd_name);
    format!("{} {} with Kubernetes {kubernetes} ({eksd}), {}", os.name, os.version, mark(identity))
}

#[expect(clippy::cast_precision_loss, reason = "shown as a percentage")]
pub(super) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}
