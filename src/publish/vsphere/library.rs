//! Content libraries: an OVF item instead of a template in the inventory.

use std::time::Duration;

use futures::TryStreamExt;
use reqwest::{Body, Client, Method, header};
use serde::Deserialize;
use serde_json::json;

use super::{
    Progress, VsphereError, old_name,
    rest::{Rest, SESSION_HEADER},
    soap::Moref,
    working_name,
};
use crate::{
    contract::{BuildRequest, VsphereTarget, shorten},
    error::Chain,
    package::{Ova, OvaTexts, PackageError},
};

const LIBRARIES: &str = "content/library";
const ITEMS: &str = "content/library/item";
const SESSIONS: &str = "content/library/item/update-session";
/// An update session ends after some minutes without a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Between two looks at what vCenter makes of the files.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Deserialize)]
struct Session {
    state: String,
    #[serde(default)]
    error_message: Option<Explanation>,
}

#[derive(Deserialize)]
struct Explanation {
    #[serde(default)]
    default_message: String,
}

#[derive(Deserialize)]
struct File {
    upload_endpoint: Endpoint,
}

#[derive(Deserialize)]
struct Endpoint {
    uri: String,
}

/// One library and what is needed to fill it.
pub(super) struct Library<'v> {
    pub(super) rest: &'v Rest<'v>,
    /// Waits as long as an upload takes.
    pub(super) uploads: &'v Client,
    pub(super) target: &'v VsphereTarget,
    pub(super) name: &'v str,
    pub(super) server: &'v str,
}

impl Library<'_> {
    /// The library, which is made on `datastore` where it does not exist.
    async fn id(&self, datastore: &Moref) -> Result<String, VsphereError> {
        if let Some(id) = self.find_library().await? {
            return Ok(id);
        }
        let create = json!({"create_spec": {
            "name": self.name, "type": "LOCAL",
            "storage_backings": [{"type": "DATASTORE", "datastore_id": datastore.id}],
        }});
        let action = format!("create the content library `{}`", self.name);
        self.rest.post(&action, "content/local-library", create).await
    }

    async fn find_library(&self) -> Result<Option<String>, VsphereError> {
        let search = json!({"spec": {"name": self.name, "type": "LOCAL"}});
        let path = format!("{LIBRARIES}?~action=find");
        let ids: Option<Vec<String>> = self.rest.post("look for content libraries", &path, search).await?;
        Ok(ids.unwrap_or_default().into_iter().next())
    }

    async fn find_item(&self, library: &str, name: &str) -> Result<Option<String>, VsphereError> {
        let search = json!({"spec": {"library_id": library, "name": name}});
        let path = format!("{ITEMS}?~action=find");
        let ids: Option<Vec<String>> = self.rest.post("look for library items", &path, search).await?;
        Ok(ids.unwrap_or_default().into_iter().next())
    }

    /// Whether the name of the target is free, or may be taken by `request`.
    pub(super) async fn check_name(&self, request: &BuildRequest) -> Result<(), VsphereError> {
        let Some(library) = self.find_library().await? else { return Ok(()) };
        self.occupant(&library, request).await.map(drop)
    }

    /// What has the target's name and may be replaced.
    async fn occupant(&self, library: &str, request: &BuildRequest) -> Result<Option<String>, VsphereError> {
        let name = &self.target.template_name;
        let Some(item) = self.find_item(library, name).await? else { return Ok(None) };
        if self.target.replace_existing || self.description(&item).await?.contains(&mark(request)) {
            return Ok(Some(item));
        }
        Err(VsphereError::NameTaken { name: name.clone(), place: format!("the content library `{}`", self.name) })
    }

    async fn description(&self, item: &str) -> Result<String, VsphereError> {
        #[derive(Deserialize)]
        struct Item {
            description: Option<String>,
        }
        let item: Item = self.rest.get("read a library item", &format!("{ITEMS}/id:{item}")).await?;
        Ok(item.description.unwrap_or_default())
    }

    /// Uploads descriptor, manifest and disk as one item, which gets its name when it is complete.
    pub(super) async fn put(
        &self,
        ova: &Ova<'_>,
        texts: &OvaTexts,
        request: &BuildRequest,
        datastore: &Moref,
        progress: &Progress,
    ) -> Result<(), VsphereError> {
        let library = self.id(datastore).await?;
        self.occupant(&library, request).await?;
        let release = &request.release;
        let description = format!(
            "{} {}, Kubernetes {}, {}; {}",
            request.os.name,
            request.os.version,
            release.kubernetes_version,
            release.eksd_name,
            mark(request)
        );
        let name = working_name(&request.identity.build_id);
        let create =
            json!({"create_spec": {"library_id": library, "name": name, "type": "ovf", "description": description}});
        let item: String = self.rest.post("create a library item", ITEMS, create).await?;
        let session: String =
            self.rest.post("begin an upload", SESSIONS, json!({"create_spec": {"library_item_id": item}})).await?;
        let files = self.upload(&session, ova, texts, progress);
        tokio::select! {
            result = files => result?,
            error = self.keep_alive(&session) => return Err(error),
        }
        self.complete(&session).await?;
        let old = self.occupant(&library, request).await?;
        if let Some(old) = &old {
            self.rename(old, &old_name(&request.identity.build_id)).await?;
        }
        if let Err(error) = self.rename(&item, &self.target.template_name).await {
            if let Some(old) = &old {
                self.rename(old, &self.target.template_name).await?;
            }
            return Err(error);
        }
        if let Some(old) = old
            && let Err(error) = self.delete(&old).await
        {
            tracing::warn!("the item that was replaced remains in the library `{}`: {}", self.name, Chain(&error));
        }
        Ok(())
    }

    async fn upload(
        &self,
        session: &str,
        ova: &Ova<'_>,
        texts: &OvaTexts,
        progress: &Progress,
    ) -> Result<(), VsphereError> {
        for (name, text) in [(ova.descriptor_name(), &texts.descriptor), (ova.manifest_name(), &texts.manifest)] {
            self.upload_file(session, &name, text.len() as u64, Body::from(text.clone())).await?;
        }
        let (bytes, done, summary) = ova.open_vmdk()?.split();
        let progress = progress.clone();
        let bytes = bytes.inspect_ok(move |_| progress.upload(&done));
        let sent = self.upload_file(session, &ova.vmdk_name(), texts.vmdk.size, Body::wrap_stream(bytes)).await;
        match (sent, summary.get().await) {
            (_, Err(error @ PackageError::Read { .. })) => Err(error.into()),
            (sent, _) => sent,
        }
    }

    async fn upload_file(&self, session: &str, name: &str, size: u64, body: Body) -> Result<(), VsphereError> {
        let add = json!({"file_spec": {"name": name, "source_type": "PUSH", "size": size}});
        // The path of files has another name than that of sessions.
        let path = format!("content/library/item/updatesession/file/id:{session}?~action=add");
        let file: File = self.rest.post(&format!("add the file {name}"), &path, add).await?;
        let failed = |answer: String| VsphereError::Upload { host: self.server.to_owned(), answer };
        let response = self
            .uploads
            .put(&file.upload_endpoint.uri)
            .header(SESSION_HEADER, session)
            .header(header::CONTENT_LENGTH, size)
            .body(body)
            .send()
            .await
            .map_err(|error| failed(Chain(&error.without_url()).to_string()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let text = response.text().await.unwrap_or_default();
        Err(failed(format!("{status}: {}", shorten(text.trim(), 200))))
    }

    /// Ends only when the session did.
    async fn keep_alive(&self, session: &str) -> VsphereError {
        loop {
            tokio::time::sleep(KEEP_ALIVE).await;
            let path = format!("{SESSIONS}/id:{session}?~action=keep-alive");
            let alive = self.rest.send("go on with the upload", Method::POST, &path, Some(json!({}))).await;
            if let Err(error) = alive {
                return error;
            }
        }
    }

    async fn complete(&self, session: &str) -> Result<(), VsphereError> {
        let action = "complete the upload";
        let path = format!("{SESSIONS}/id:{session}");
        self.rest.send(action, Method::POST, &format!("{path}?~action=complete"), Some(json!({}))).await?;
        loop {
            let found: Session = self.rest.get(action, &path).await?;
            match found.state.as_str() {
                "DONE" => break,
                "ACTIVE" => tokio::time::sleep(LOOK).await,
                state => {
                    let message = found.error_message.map(|error| error.default_message).unwrap_or_default();
                    let problems = vec![format!("{message} ({state})")];
                    return Err(VsphereError::NotImportable { server: self.server.to_owned(), problems });
                }
            }
        }
        self.rest.send(action, Method::DELETE, &path, None).await
    }

    async fn rename(&self, item: &str, name: &str) -> Result<(), VsphereError> {
        let update = json!({"update_spec": {"name": name}});
        let action = format!("rename a library item to `{name}`");
        self.rest.send(&action, Method::PATCH, &format!("{ITEMS}/id:{item}"), Some(update)).await
    }

    async fn delete(&self, item: &str) -> Result<(), VsphereError> {
        self.rest.send("delete a library item", Method::DELETE, &format!("{ITEMS}/id:{item}"), None).await
    }

    /// Removes the finished item of a build. What another build, or a person, has put in its place stays.
    pub(super) async fn remove_finished(&self, request: &BuildRequest) -> Result<(), VsphereError> {
        let Some(library) = self.find_library().await? else { return Ok(()) };
        match self.find_item(&library, &self.target.template_name).await? {
            Some(item) if self.description(&item).await?.contains(&mark(request)) => self.delete(&item).await,
            Some(_) | None => Ok(()),
        }
    }

    /// Removes what an attempt of this build left, and gives an item back its name that was about to be replaced.
    pub(super) async fn clean(&self, build_id: &str) -> Result<(), VsphereError> {
        let Some(library) = self.find_library().await? else { return Ok(()) };
        if let Some(old) = self.find_item(&library, &old_name(build_id)).await? {
            match self.find_item(&library, &self.target.template_name).await? {
                Some(_) => self.delete(&old).await?,
                None => self.rename(&old, &self.target.template_name).await?,
            }
        }
        match self.find_item(&library, &working_name(build_id)).await? {
            Some(item) => self.delete(&item).await,
            None => Ok(()),
        }
    }
}

/// How an item tells which build it is of.
fn mark(request: &BuildRequest) -> String {
    format!("build {}", request.identity)
}
