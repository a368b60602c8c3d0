//! From an OVA to a template in the inventory.
//!
//! The machine is made under a name of the build's own and gets its real name last, when it is complete and tagged: what
//! has the real name is whole, and what has the other one can be removed by whoever finds it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use reqwest::{Body, header};

use super::{
    Progress, VsphereError,
    inventory::Place,
    old_name,
    rest::Rest,
    soap::{Element, Moref},
    tags,
    tls::{self, Trust},
    vim::{ImportSpec, Lease, Vim},
    working_name,
};
use crate::{
    contract::{BuildRequest, Proxy, VsphereImage, VsphereTarget, shorten},
    error::Chain,
    package::{BUILD_PROPERTY, OVF_NETWORK, Ova, OvaTexts, PackageError},
};

/// How often an import is begun whose connection breaks.
const ATTEMPTS: usize = 3;
/// An upload that does not move for this long has failed.
const STALLED: Duration = Duration::from_secs(120);
/// Longest time for a whole upload.
pub(super) const UPLOAD_TIMEOUT: Duration = Duration::from_secs(6 * 60 * 60);
/// Longest time between two signs that an upload goes on.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(20);
/// The snapshot that linked clones start from.
const SNAPSHOT: &str = "root";

/// One import and what it needs.
pub(super) struct Import<'i> {
    pub(super) vim: &'i Vim,
    pub(super) rest: &'i Rest<'i>,
    pub(super) target: &'i VsphereTarget,
    pub(super) request: &'i BuildRequest,
    pub(super) place: &'i Place,
    pub(super) proxy: &'i Proxy,
    pub(super) trust: &'i Trust,
    /// Host of vCenter, for upload addresses that leave it out.
    pub(super) host: &'i str,
    pub(super) progress: Progress,
    /// The lease that is held now.
    lease: Mutex<Option<Moref>>,
}

impl<'i> Import<'i> {
    #[expect(clippy::too_many_arguments, reason = "the parts of one publication, all of them different")]
    pub(super) fn new(
        vim: &'i Vim,
        rest: &'i Rest<'i>,
        target: &'i VsphereTarget,
        request: &'i BuildRequest,
        place: &'i Place,
        proxy: &'i Proxy,
        trust: &'i Trust,
        host: &'i str,
        progress: Progress,
    ) -> Self {
        Self { vim, rest, target, request, place, proxy, trust, host, progress, lease: Mutex::new(None) }
    }

    fn build_id(&self) -> &str {
        &self.request.identity.build_id
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Option<Moref>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Imports, tags and names the image. Call [`Self::undo`] when it fails or is dropped.
    pub(super) async fn run(&self, ova: &Ova<'_>) -> Result<VsphereImage, VsphereError> {
        clean(self.vim, self.place, self.target, self.build_id()).await?;
        self.occupant().await?;
        let texts = ova.texts().await?;
        let machine = self.import(ova, &texts).await?;
        self.progress.say("finishing the template");
        if self.target.create_snapshot {
            self.vim.create_snapshot(&machine, SNAPSHOT).await?;
        }
        if self.target.convert_to_template {
            self.vim.mark_as_template(&machine).await?;
        }
        tags::attach(self.rest, self.request, &machine).await?;
        self.take_name(&machine).await?;
        let found = self.vim.properties(&machine, &["config.instanceUuid"]).await?;
        Ok(VsphereImage {
            inventory_path: format!("{}/{}", self.place.folder_path, self.target.template_name),
            moref: machine.id,
            instance_uuid: found.text("config.instanceUuid").unwrap_or_default().to_owned(),
        })
    }

    async fn import(&self, ova: &Ova<'_>, texts: &OvaTexts) -> Result<Moref, VsphereError> {
        let place = self.place.for_import();
        let name = working_name(self.build_id());
        let found = self.vim.create_import_spec(&texts.descriptor, &name, (OVF_NETWORK, place)).await?;
        let ImportSpec { spec, files, errors, warnings } = found;
        for warning in warnings {
            tracing::warn!("{} about the image's OVF descriptor: {warning}", self.vim.server);
        }
        let not_importable = |problems| VsphereError::NotImportable { server: self.vim.server.clone(), problems };
        let (Some(spec), [file], true) = (&spec, &files[..], errors.is_empty()) else {
            let files = format!("{} files to upload instead of one", files.len());
            return Err(not_importable(if errors.is_empty() { vec![files] } else { errors }));
        };
        let mut waiting = self.vim.patience();
        for attempt in 1.. {
            let error = match self.attempt(spec, file, ova, texts).await {
                Ok(machine) => return Ok(machine),
                Err(error) => error,
            };
            self.undo().await?;
            let passing = matches!(error, VsphereError::Upload { .. } | VsphereError::LeaseLost { .. });
            if !passing || attempt == ATTEMPTS {
                return Err(error);
            }
            waiting.wait(error).await?;
        }
        Err(VsphereError::Cancelled)
    }

    async fn attempt(
        &self,
        spec: &Element,
        file: &str,
        ova: &Ova<'_>,
        texts: &OvaTexts,
    ) -> Result<Moref, VsphereError> {
        let lease = self.vim.import(spec, self.place.for_import()).await?;
        *self.held() = Some(lease.clone());
        let lease = self.vim.wait_for_lease(&lease).await?;
        self.upload(&lease, file, ova, texts).await?;
        self.vim.complete_lease(&lease.object).await.map_err(|error| self.lost(error))?;
        *self.held() = None;
        Ok(lease.machine)
    }

    /// An error of a call on the lease: without the lease the import is over.
    fn lost(&self, error: VsphereError) -> VsphereError {
        match error {
            VsphereError::Fault { message, kind, .. } => {
                VsphereError::LeaseLost { server: self.vim.server.clone(), message: format!("{message} ({kind})") }
            }
            other => other,
        }
    }

    async fn upload(&self, lease: &Lease, file: &str, ova: &Ova<'_>, texts: &OvaTexts) -> Result<(), VsphereError> {
        let Some((url, thumbprint)) = lease.upload_url(file) else {
            let problems = vec![format!("no place to upload {file} to")];
            return Err(VsphereError::NotImportable { server: self.vim.server.clone(), problems });
        };
        // A host that is vCenter itself is not named.
        let url = url.replace('*', self.host);
        let trust = match (self.trust, thumbprint) {
            (Trust::Everything, _) => Trust::Everything,
            // vCenter vouches for its hosts.
            (_, Some(thumbprint)) => Trust::Thumbprint(thumbprint.to_owned()),
            (trust, None) => trust.clone(),
        };
        let (client, refused) = tls::client(self.proxy, trust, UPLOAD_TIMEOUT)?;
        let (bytes, done, summary) = ova.open_vmdk()?.split();
        let sent = Arc::new(AtomicU64::new(0));
        let (counter, progress) = (Arc::clone(&sent), self.progress.clone());
        let bytes = bytes.inspect_ok(move |piece| {
            counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
            progress.upload(&done);
        });
        let size = texts.vmdk.size;
        let request = client
            .post(&url)
            .header(header::CONTENT_TYPE, "application/x-vnd.vmware-streamVmdk")
            .header(header::CONTENT_LENGTH, size)
            .body(Body::wrap_stream(bytes));
        let host = reqwest::Url::parse(&url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or(url);
        let failed = |answer: String| VsphereError::Upload { host: host.clone(), answer };
        let send = async {
            let response = request.send().await.map_err(|error| match refused.take() {
                Some(thumbprint) => {
                    VsphereError::Untrusted { server: host.clone(), thumbprint, source: error.without_url().into() }
                }
                None => failed(Chain(&error.without_url()).to_string()),
            })?;
            let status = response.status();
            if status.is_success() {
                return Ok(());
            }
            let text = response.text().await.unwrap_or_default();
            Err(failed(format!("{status}: {}", shorten(text.trim(), 200))))
        };
        let outcome = tokio::select! {
            outcome = send => outcome,
            error = self.keep_alive(lease, &sent, size, &failed) => Err(error),
        };
        match (outcome, summary.get().await) {
            (_, Err(error @ PackageError::Read { .. })) => Err(error.into()),
            (Err(error), _) => Err(error),
            (Ok(()), Ok(summary)) if summary == texts.vmdk => Ok(()),
            // It answered before it had everything.
            (Ok(()), _) => Err(failed("it took only a part".to_owned())),
        }
    }

    /// Tells vCenter that the upload goes on; ends only when it does not.
    async fn keep_alive(
        &self,
        lease: &Lease,
        sent: &AtomicU64,
        size: u64,
        failed: &impl Fn(String) -> VsphereError,
    ) -> VsphereError {
        let mut moved = (0, Instant::now());
        loop {
            tokio::time::sleep((lease.timeout / 5).min(PROGRESS_INTERVAL)).await;
            let now = sent.load(Ordering::Relaxed);
            if now > moved.0 {
                moved = (now, Instant::now());
            } else if moved.1.elapsed() > STALLED {
                return failed(format!("nothing was taken for {} s", STALLED.as_secs()));
            }
            // 100 is for when it is done.
            let percent = u8::try_from(now * 100 / size.max(1)).unwrap_or(99).min(99);
            if let Err(error) = self.vim.lease_progress(&lease.object, percent).await {
                return self.lost(error);
            }
        }
    }

    /// What has the template's name and may be replaced.
    async fn occupant(&self) -> Result<Option<Moref>, VsphereError> {
        occupant(self.vim, self.place, self.target, self.request).await
    }

    /// Gives the complete machine its name; what had it before makes room for it and goes.
    async fn take_name(&self, machine: &Moref) -> Result<(), VsphereError> {
        let name = &self.target.template_name;
        let old = self.occupant().await?;
        if let Some(old) = &old {
            self.vim.rename(old, &old_name(self.build_id())).await?;
        }
        if let Err(error) = self.vim.rename(machine, name).await {
            if let Some(old) = &old {
                self.vim.rename(old, name).await?;
            }
            // Another build may have taken it just now: then this tells so.
            self.occupant().await?;
            return Err(error);
        }
        if let Some(old) = old
            && let Err(error) = self.vim.destroy(&old).await
        {
            let old = old_name(self.build_id());
            tracing::warn!("the template that was replaced remains as {old}: {}", Chain(&error));
        }
        Ok(())
    }

    /// Ends the import that is under way, and removes what it made.
    pub(super) async fn undo(&self) -> Result<(), VsphereError> {
        let lease = self.held().take();
        if let Some(lease) = lease
            && let Err(error) = self.vim.abort_lease(&lease).await
        {
            tracing::debug!("the import had ended by itself: {}", Chain(&error));
        }
        clean(self.vim, self.place, self.target, self.build_id()).await
    }
}

/// What has the template's name in the place, if it may be replaced: because the target says so, or because it is of the
/// same build.
pub(super) async fn occupant(
    vim: &Vim,
    place: &Place,
    target: &VsphereTarget,
    request: &BuildRequest,
) -> Result<Option<Moref>, VsphereError> {
    let name = &target.template_name;
    let Some(found) = vim.find_child(&place.folder, name).await? else { return Ok(None) };
    if found.kind == "VirtualMachine" && (target.replace_existing || is_of(vim, &found, request).await?) {
        return Ok(Some(found));
    }
    Err(VsphereError::NameTaken { name: name.clone(), place: format!("the folder `{}`", place.folder_path) })
}

/// Whether a machine was made by an earlier attempt of the same build.
async fn is_of(vim: &Vim, machine: &Moref, request: &BuildRequest) -> Result<bool, VsphereError> {
    let found = vim.properties(machine, &["config.vAppConfig.property"]).await?;
    let properties = found.get("config.vAppConfig.property").map(|list| list.children.as_slice()).unwrap_or_default();
    let identity = request.identity.to_string();
    let is = |property: &Element, name: &str, value: &str| property.text_of(name) == Some(value);
    Ok(properties.iter().any(|property| is(property, "id", BUILD_PROPERTY) && is(property, "defaultValue", &identity)))
}

/// Removes what an attempt of this build left. A template that was about to be replaced gets its name back.
pub(super) async fn clean(
    vim: &Vim,
    place: &Place,
    target: &VsphereTarget,
    build_id: &str,
) -> Result<(), VsphereError> {
    if let Some(old) = vim.find_child(&place.folder, &old_name(build_id)).await? {
        match vim.find_child(&place.folder, &target.template_name).await? {
            Some(_) => remove(vim, place, &old_name(build_id), None).await?,
            None => vim.rename(&old, &target.template_name).await?,
        }
    }
    remove(vim, place, &working_name(build_id), None).await
}

/// Removes the finished template of a build. What another build, or a person, has put in its place stays.
pub(super) async fn remove_finished(
    vim: &Vim,
    place: &Place,
    target: &VsphereTarget,
    request: &BuildRequest,
) -> Result<(), VsphereError> {
    remove(vim, place, &target.template_name, Some(request)).await
}

/// Deletes a machine until it is gone, if it was made by the build `of`. vCenter refuses while an import still holds it,
/// which ends when the import's lease does.
async fn remove(vim: &Vim, place: &Place, name: &str, of: Option<&BuildRequest>) -> Result<(), VsphereError> {
    let mut waiting = vim.patience();
    while let Some(machine) = vim.find_child(&place.folder, name).await? {
        if let Some(build) = of
            && !(machine.kind == "VirtualMachine" && is_of(vim, &machine, build).await?)
        {
            return Ok(());
        }
        if let Err(error) = vim.destroy(&machine).await
            && !matches!(&error, VsphereError::Fault { kind, .. } if kind == "ManagedObjectNotFound")
            && let Err(cause) = waiting.wait(error).await
        {
            let what = format!("{}/{name}", place.folder_path);
            return Err(VsphereError::LeftBehind { server: vim.server.clone(), what, cause: Box::new(cause.into()) });
        }
    }
    Ok(())
}
