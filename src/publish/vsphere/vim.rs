//! The methods of the vSphere Web Services API that an import needs, and the session they run in.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::RwLock;

use super::{
    VsphereError,
    soap::{CallError, Element, Endpoint, Fault, Moref},
    tls::Refused,
};
use crate::publish::patience::Patience;

/// First and longest pause between two looks at something that vCenter works on.
const LOOKS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Whether a call may be made again when its answer got lost.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Repeat {
    /// It reads, or its second time changes nothing.
    Harmless,
    /// Only if vCenter can not have seen it.
    Unseen,
}

/// User name and password.
#[derive(Clone, Debug)]
pub(super) struct Login {
    pub(super) username: SecretString,
    pub(super) password: SecretString,
}

/// The objects that a session begins with.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) root: Moref,
    property_collector: Moref,
    view_manager: Moref,
    session_manager: Moref,
    authorization_manager: Moref,
    ovf_manager: Moref,
    search_index: Moref,
    file_manager: Moref,
}

/// A session with vCenter. It logs in again where vCenter has ended it, and waits for a vCenter that is away.
#[derive(Debug)]
pub(super) struct Vim {
    endpoint: Endpoint,
    refused: Refused,
    /// For messages.
    pub(super) server: String,
    pub(super) login: Login,
    patience: Duration,
    pub(super) content: Content,
    /// Of the session; `HasPrivilegeOnEntities` asks for it.
    session_key: RwLock<String>,
}

/// An object and the properties that were asked for, as far as it has them.
#[derive(Clone, Debug)]
pub(super) struct Properties {
    pub(super) object: Moref,
    values: Vec<(String, Element)>,
}

impl Properties {
    fn read(object: &Element) -> Option<Self> {
        let properties = object.children_named("propSet");
        let values = properties
            .filter_map(|property| Some((property.text_of("name")?.to_owned(), property.child("val")?.clone())))
            .collect();
        Some(Self { object: object.child("obj")?.object()?, values })
    }

    pub(super) fn get(&self, path: &str) -> Option<&Element> {
        self.values.iter().find(|(name, _)| name == path).map(|(_, value)| value)
    }

    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.get(path).map(Element::text)
    }
}

/// What `CreateImportSpec` makes of an OVF descriptor.
#[derive(Clone, Debug)]
pub(super) struct ImportSpec {
    pub(super) spec: Option<Element>,
    /// Keys of the files to upload, for [`Lease::upload_url`].
    pub(super) files: Vec<String>,
    pub(super) errors: Vec<String>,
    pub(super) warnings: Vec<String>,
}

/// Where an import goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImportPlace<'p> {
    pub(super) pool: &'p Moref,
    pub(super) host: Option<&'p Moref>,
    pub(super) folder: &'p Moref,
    pub(super) datastore: &'p Moref,
    pub(super) network: &'p Moref,
}

/// A lease that is ready for uploads.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) object: Moref,
    /// The machine that is being made.
    pub(super) machine: Moref,
    /// Without progress for this long vCenter undoes the import.
    pub(super) timeout: Duration,
    devices: Vec<Device>,
}

#[derive(Clone, Debug)]
struct Device {
    import_key: String,
    url: String,
    thumbprint: Option<String>,
}

impl Lease {
    /// Where a file is uploaded, and the digest of the certificate there, where vCenter tells it.
    pub(super) fn upload_url(&self, file: &str) -> Option<(&str, Option<&str>)> {
        let device = self.devices.iter().find(|device| device.import_key == file)?;
        Some((device.url.as_str(), device.thumbprint.as_deref()))
    }
}

impl Vim {
    /// Opens a session.
    pub(super) async fn open(
        endpoint: Endpoint,
        refused: Refused,
        server: String,
        login: Login,
        patience: Duration,
    ) -> Result<Self, VsphereError> {
        let instance = Moref { kind: "ServiceInstance".to_owned(), id: "ServiceInstance".to_owned() };
        let method = Element::new("RetrieveServiceContent").with_object("_this", &instance);
        let mut waiting = Patience::new(server.clone(), patience);
        let answer = loop {
            match endpoint.call(&method).await {
                Ok(answer) => break answer,
                Err(CallError::Away { cause, .. }) => match refused.take() {
                    Some(thumbprint) => return Err(VsphereError::Untrusted { server, thumbprint, source: cause }),
                    None => waiting.wait(cause).await?,
                },
                Err(CallError::Fault(fault)) => {
                    return Err(VsphereError::NotVcenter { server, answer: fault.message });
                }
                Err(CallError::NotVcenter(answer)) => return Err(VsphereError::NotVcenter { server, answer }),
            }
        };
        let content = answer.child("returnval").and_then(Content::read).ok_or_else(|| VsphereError::NotVcenter {
            server: server.clone(),
            answer: "it lacks a manager that a vCenter has; is it a single host?".to_owned(),
        })?;
        let session_key = RwLock::new(String::new());
        let vim = Self { endpoint, refused, server, login, patience, content, session_key };
        vim.log_in().await?;
        Ok(vim)
    }

    async fn log_in(&self) -> Result<(), VsphereError> {
        let method = Element::new("Login")
            .with_object("_this", &self.content.session_manager)
            .with_text("userName", self.login.username.expose_secret())
            .with_text("password", self.login.password.expose_secret());
        let mut waiting = self.patience();
        loop {
            self.endpoint.forget_session();
            match self.endpoint.call(&method).await {
                Ok(answer) => {
                    let key = answer.child("returnval").and_then(|session| session.text_of("key")).unwrap_or_default();
                    key.clone_into(&mut *self.session_key.write().await);
                    return Ok(());
                }
                Err(CallError::Fault(fault)) if matches!(fault.kind.as_str(), "InvalidLogin" | "NoPermission") => {
                    return Err(VsphereError::LoginRefused { server: self.server.clone() });
                }
                Err(CallError::Away { cause, .. }) => waiting.wait(cause).await?,
                Err(error) => return Err(self.explain("log in", error)),
            }
        }
    }

    /// Ends the session. What fails is not worth a word: vCenter ends it after some time.
    pub(super) async fn log_out(&self) {
        let method = Element::new("Logout").with_object("_this", &self.content.session_manager);
        let _ = self.endpoint.call(&method).await;
        self.endpoint.forget_session();
    }

    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.server.clone(), self.patience)
    }

    fn explain(&self, action: &str, error: CallError) -> VsphereError {
        let server = self.server.clone();
        match error {
            CallError::Fault(fault) => self.fault(action, fault),
            CallError::Away { cause, .. } => {
                VsphereError::Unavailable { server, waited: Duration::ZERO, source: cause }
            }
            CallError::NotVcenter(answer) => VsphereError::NotVcenter { server, answer },
        }
    }

    pub(super) fn fault(&self, action: &str, fault: Fault) -> VsphereError {
        let Fault { kind, message } = fault;
        VsphereError::Fault { server: self.server.clone(), action: action.to_owned(), kind, message }
    }

    /// Calls a method; `action` names it for people.
    async fn call(&self, action: &str, method: &Element, repeat: Repeat) -> Result<Element, VsphereError> {
        let mut waiting = self.patience();
        let mut renewed = false;
        loop {
            match self.endpoint.call(method).await {
                Ok(answer) => return Ok(answer),
                Err(CallError::Fault(fault)) if fault.kind == "NotAuthenticated" && !renewed => {
                    tracing::info!("the session with {} has expired; logging in again", self.server);
                    self.log_in().await?;
                    renewed = true;
                }
                Err(CallError::Away { sent, cause }) => {
                    if let Some(thumbprint) = self.refused.take() {
                        let server = self.server.clone();
                        return Err(VsphereError::Untrusted { server, thumbprint, source: cause });
                    }
                    if sent && repeat == Repeat::Unseen {
                        return Err(self.explain(action, CallError::Away { sent, cause }));
                    }
                    waiting.wait(cause).await?;
                }
                Err(error) => return Err(self.explain(action, error)),
            }
        }
    }

    /// The object that a method returns.
    async fn call_for_object(&self, action: &str, method: &Element, repeat: Repeat) -> Result<Moref, VsphereError> {
        let answer = self.call(action, method, repeat).await?;
        answer.child("returnval").and_then(Element::object).ok_or_else(|| self.strange(action))
    }

    fn strange(&self, action: &str) -> VsphereError {
        VsphereError::NotVcenter { server: self.server.clone(), answer: format!("no result when asked to {action}") }
    }

    /// Name and parent of every object of these kinds.
    pub(super) async fn objects(&self, kinds: &[&str]) -> Result<Vec<Properties>, VsphereError> {
        let action = "list the inventory";
        let create = Element::new("CreateContainerView")
            .with_object("_this", &self.content.view_manager)
            .with_object("container", &self.content.root)
            .with_all(kinds.iter().map(|kind| Element::of_text("type", *kind)))
            .with_text("recursive", "true");
        let view = self.call_for_object(action, &create, Repeat::Harmless).await?;
        let traversal = Element::new("selectSet")
            .of_kind("TraversalSpec")
            .with_text("type", "ContainerView")
            .with_text("path", "view")
            .with_text("skip", "false");
        let start = Element::new("objectSet").with_object("obj", &view).with_text("skip", "true").with(traversal);
        let wanted = kinds.iter().map(|kind| property_spec(kind, &["name", "parent"])).collect();
        let objects = self.retrieve(action, wanted, start).await;
        let destroy = Element::new("DestroyView").with_object("_this", &view);
        self.call(action, &destroy, Repeat::Unseen).await?;
        objects
    }

    /// Properties of one object.
    pub(super) async fn properties(&self, object: &Moref, paths: &[&str]) -> Result<Properties, VsphereError> {
        let action = format!("read the {} {}", object.kind, object.id);
        let start = Element::new("objectSet").with_object("obj", object).with_text("skip", "false");
        let mut found = self.retrieve(&action, vec![property_spec(&object.kind, paths)], start).await?;
        found.pop().ok_or_else(|| self.strange(&action))
    }

    async fn retrieve(
        &self,
        action: &str,
        wanted: Vec<Element>,
        start: Element,
    ) -> Result<Vec<Properties>, VsphereError> {
        let collector = &self.content.property_collector;
        let mut method = Element::new("RetrievePropertiesEx")
            .with_object("_this", collector)
            .with(Element::new("specSet").with_all(wanted).with(start))
            .with(Element::new("options"));
        let mut found = vec![];
        loop {
            let answer = self.call(action, &method, Repeat::Harmless).await?;
            // Without a match there is no result.
            let Some(result) = answer.child("returnval") else { return Ok(found) };
            found.extend(result.children_named("objects").filter_map(Properties::read));
            let Some(token) = result.text_of("token") else { return Ok(found) };
            method =
                Element::new("ContinueRetrievePropertiesEx").with_object("_this", collector).with_text("token", token);
        }
    }

    /// The child of a folder or datacenter that has this name.
    pub(super) async fn find_child(&self, parent: &Moref, name: &str) -> Result<Option<Moref>, VsphereError> {
        let method = Element::new("FindChild")
            .with_object("_this", &self.content.search_index)
            .with_object("entity", parent)
            .with_text("name", name);
        let answer = self.call(&format!("look for `{name}`"), &method, Repeat::Harmless).await?;
        Ok(answer.child("returnval").and_then(Element::object))
    }

    /// Those of `privileges` that the user lacks on `entity`.
    pub(super) async fn missing_privileges(
        &self,
        entity: &Moref,
        privileges: &[&str],
    ) -> Result<Vec<String>, VsphereError> {
        let method = |session: &str| {
            Element::new("HasPrivilegeOnEntities")
                .with_object("_this", &self.content.authorization_manager)
                .with_object("entity", entity)
                .with_text("sessionId", session)
                .with_all(privileges.iter().map(|privilege| Element::of_text("privId", *privilege)))
        };
        let session = self.session_key.read().await.clone();
        let answer = self.call("check privileges", &method(&session), Repeat::Harmless).await?;
        let available = answer.children_named("returnval").flat_map(|entity| entity.children_named("privAvailability"));
        Ok(available
            .filter(|privilege| privilege.text_of("isGranted") != Some("true"))
            .filter_map(|privilege| privilege.text_of("privId").map(str::to_owned))
            .collect())
    }

    /// What vCenter makes of a descriptor. The machine is called `name`, its disks grow as they are written to.
    pub(super) async fn create_import_spec(
        &self,
        descriptor: &str,
        name: &str,
        (network_name, place): (&str, ImportPlace<'_>),
    ) -> Result<ImportSpec, VsphereError> {
        let mapping =
            Element::new("networkMapping").with_text("name", network_name).with_object("network", place.network);
        let mut parameters = Element::new("cisp")
            .with_text("locale", "")
            .with_text("deploymentOption", "")
            .with_text("entityName", name);
        if let Some(host) = place.host {
            parameters = parameters.with_object("hostSystem", host);
        }
        let method = Element::new("CreateImportSpec")
            .with_object("_this", &self.content.ovf_manager)
            .with_text("ovfDescriptor", descriptor)
            .with_object("resourcePool", place.pool)
            .with_object("datastore", place.datastore)
            .with(parameters.with(mapping).with_text("diskProvisioning", "thin"));
        let action = "read the image's OVF descriptor";
        let answer = self.call(action, &method, Repeat::Harmless).await?;
        let result = answer.child("returnval").ok_or_else(|| self.strange(action))?;
        let faults = |name: &str| {
            let faults = result.children_named(name).map(Fault::localized);
            faults.map(|fault| format!("{} ({})", fault.message, fault.kind)).collect()
        };
        Ok(ImportSpec {
            spec: result.child("importSpec").cloned(),
            files: result
                .children_named("fileItem")
                .filter_map(|file| file.text_of("deviceId").map(str::to_owned))
                .collect(),
            errors: faults("error"),
            warnings: faults("warning"),
        })
    }

    /// Begins an import and gives its lease, which has to be waited for.
    pub(super) async fn import(&self, spec: &Element, place: ImportPlace<'_>) -> Result<Moref, VsphereError> {
        let mut method = Element::new("ImportVApp")
            .with_object("_this", place.pool)
            .with(spec.clone().renamed("spec"))
            .with_object("folder", place.folder);
        if let Some(host) = place.host {
            method = method.with_object("host", host);
        }
        self.call_for_object("begin the import", &method, Repeat::Unseen).await
    }

    /// Waits until the lease is ready for uploads.
    pub(super) async fn wait_for_lease(&self, lease: &Moref) -> Result<Lease, VsphereError> {
        let action = "prepare the import";
        let mut looks = looks();
        loop {
            let found = self.properties(lease, &["state", "error", "info"]).await?;
            match found.text("state") {
                Some("ready") => {
                    let info = found.get("info").ok_or_else(|| self.strange(action))?;
                    return Lease::read(lease, info).ok_or_else(|| self.strange(action));
                }
                Some("initializing") => tokio::time::sleep(looks.next().unwrap_or(LOOKS.1)).await,
                _ => {
                    let fault = found.get("error").map_or_else(
                        || Fault { kind: "unknown fault".to_owned(), message: "the import has ended".to_owned() },
                        Fault::localized,
                    );
                    return Err(self.fault(action, fault));
                }
            }
        }
    }

    /// Tells vCenter how far the upload is, in percent, and that it goes on.
    pub(super) async fn lease_progress(&self, lease: &Moref, percent: u8) -> Result<(), VsphereError> {
        let method =
            Element::new("HttpNfcLeaseProgress").with_object("_this", lease).with_text("percent", percent.to_string());
        self.call("go on with the import", &method, Repeat::Harmless).await.map(drop)
    }

    pub(super) async fn complete_lease(&self, lease: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("HttpNfcLeaseComplete").with_object("_this", lease);
        self.call("complete the import", &method, Repeat::Unseen).await.map(drop)
    }

    /// Ends an import; vCenter removes what it has made so far.
    pub(super) async fn abort_lease(&self, lease: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("HttpNfcLeaseAbort").with_object("_this", lease);
        self.call("abort the import", &method, Repeat::Unseen).await.map(drop)
    }

    pub(super) async fn create_snapshot(&self, machine: &Moref, name: &str) -> Result<(), VsphereError> {
        let method = Element::new("CreateSnapshot_Task")
            .with_object("_this", machine)
            .with_text("name", name)
            .with_text("description", "")
            .with_text("memory", "false")
            .with_text("quiesce", "false");
        self.run("make a snapshot", &method).await
    }

    pub(super) async fn mark_as_template(&self, machine: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("MarkAsTemplate").with_object("_this", machine);
        self.call("mark the machine as a template", &method, Repeat::Unseen).await.map(drop)
    }

    pub(super) async fn rename(&self, object: &Moref, name: &str) -> Result<(), VsphereError> {
        let method = Element::new("Rename_Task").with_object("_this", object).with_text("newName", name);
        self.run(&format!("rename it to `{name}`"), &method).await
    }

    /// Deletes a machine or template with its disks.
    pub(super) async fn destroy(&self, object: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("Destroy_Task").with_object("_this", object);
        self.run("delete it", &method).await
    }

    pub(super) async fn power_off(&self, machine: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("PowerOffVM_Task").with_object("_this", machine);
        self.run("stop it", &method).await
    }

    /// Deletes a file of a datastore, e.g. `[datastore1] directory/file`.
    pub(super) async fn delete_file(&self, file: &str, datacenter: &Moref) -> Result<(), VsphereError> {
        let method = Element::new("DeleteDatastoreFile_Task")
            .with_object("_this", &self.content.file_manager)
            .with_text("name", file)
            .with_object("datacenter", datacenter);
        self.run(&format!("delete {file}"), &method).await
    }

    /// Calls a method that begins a task, and waits for its end.
    async fn run(&self, action: &str, method: &Element) -> Result<(), VsphereError> {
        let task = self.call_for_object(action, method, Repeat::Unseen).await?;
        let mut looks = looks();
        loop {
            let found = self.properties(&task, &["info.state", "info.error"]).await?;
            match found.text("info.state") {
                Some("success") => return Ok(()),
                Some("error") => {
                    let fault = found.get("info.error").map(Fault::localized);
                    let fault =
                        fault.unwrap_or_else(|| Fault { kind: "unknown fault".to_owned(), message: String::new() });
                    return Err(self.fault(action, fault));
                }
                _ => tokio::time::sleep(looks.next().unwrap_or(LOOKS.1)).await,
            }
        }
    }
}

impl Content {
    fn read(content: &Element) -> Option<Self> {
        let object = |name: &str| content.child(name).and_then(Element::object);
        Some(Self {
            root: object("rootFolder")?,
            property_collector: object("propertyCollector")?,
            view_manager: object("viewManager")?,
            session_manager: object("sessionManager")?,
            authorization_manager: object("authorizationManager")?,
            ovf_manager: object("ovfManager")?,
            search_index: object("searchIndex")?,
            file_manager: object("fileManager")?,
        })
    }
}

impl Lease {
    fn read(lease: &Moref, info: &Element) -> Option<Self> {
        let devices = info.children_named("deviceUrl").filter_map(|device| {
            Some(Device {
                import_key: device.text_of("importKey")?.to_owned(),
                url: device.text_of("url")?.to_owned(),
                thumbprint: device.text_of("sslThumbprint").filter(|text| !text.is_empty()).map(str::to_owned),
            })
        });
        Some(Self {
            object: lease.clone(),
            machine: info.child("entity")?.object()?,
            timeout: Duration::from_secs(info.text_of("leaseTimeout")?.parse().ok()?),
            devices: devices.collect(),
        })
    }
}

fn property_spec(kind: &str, paths: &[&str]) -> Element {
    Element::new("propSet")
        .with_text("type", kind)
        .with_text("all", "false")
        .with_all(paths.iter().map(|path| Element::of_text("pathSet", *path)))
}

fn looks() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default().with_min_delay(LOOKS.0).with_max_delay(LOOKS.1).without_max_times().build()
}
