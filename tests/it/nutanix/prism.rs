//! A Prism Central for tests: the part of its v3 API that an image needs, as strict as the original.
//!
//! It is written from the API's own description and from what programs that use it rely on:
//!
//! | what it does | known from |
//! |---|---|
//! | paths, methods, status codes, required fields, lengths, enumerations, the headers of an upload, error documents with `message_list` and its reasons | the v3 description (`v3/swagger.json`, "Nutanix Intentful API" 3.1.0) in nutanix-cloud-native/prism-go-client |
//! | 401 has no JSON body | prism-go-client, `internal/client.go`, `CheckResponse` |
//! | lists: `kind`, `offset`, `length`, `total_matches`; a cluster's `service_list` and `is_available`; Prism Central is one of the clusters; overlay subnets have no cluster | recorded answers in prism-go-client, `v3/mocks` |
//! | a list has 20 entities where nobody says how many, and at most 500 | candlepin/virt-who pull request 383; nutanix/nutanix.ansible issue 483 |
//! | `filter` is FIQL, `name==…` | prism-go-client, `v3_service.go`, `ListAllImage`; packer-plugin-nutanix 0.8.1, `driver.go` |
//! | a change answers with `status.execution_context.task_uuid` as one text; an entity that is read has a list of them | terraform-provider-nutanix, `resource_nutanix_image.go`; nutanix.ansible, `ntnx_images.py` |
//! | an image is created without contents first, then gets them by `PUT …/file`; it is read again for the tasks of the upload, which may fail | terraform-provider-nutanix, `resource_nutanix_image.go` |
//! | a wrong checksum fails the task after the upload, not the request | terraform-provider-nutanix issue 469 and pull request 481 |
//! | `size_bytes` is the size of the disk, not of the file: 2361393152 for Ubuntu's cloud image | an answer in OVH's guide "nutanix-public-ip"; packer-plugin-nutanix takes it for the disk of a machine |
//! | the bytes of an image come by `GET …/file` as `application/octet-stream` without a length; an image that is not there: 404 with `INVALID_ARGUMENT` | a recorded answer in prism-go-client, `v3/mocks/TestOperations_GetImageContents.yaml` |
//! | they are those of the raw disk, whatever was uploaded | packer-plugin-nutanix issue 207 and pull request 122 |
//! | `checksum` has `checksum_algorithm`, `SHA_1` or `SHA_256`, and `checksum_value`; where nobody gave one it is the image service's own | the v3 description, `image_resources` |
//! | several images may have one name | packer-plugin-nutanix, `findImageByName`, and its pull request 58 |
//! | an update repeats `metadata` and `spec`, with the present `spec_version` | terraform-provider-nutanix and nutanix.ansible, both rename images so |
//! | an image of a machine's disk: `data_source_reference` of the kind `vm_disk` | packer-plugin-nutanix 0.8.1, `driver.go` |
//! | a category that does not exist: `ENTITY_NOT_FOUND` or `CATEGORY_NAME_VALUE_MISMATCH` | terraform-provider-nutanix, `resource_nutanix_category_value.go` |
//!
//! What no source tells is decided against the client: contents are taken once, a beginning can not be continued, a
//! change shows only when its task has ended, an image that is not created yet is not listed, the checksum's headers
//! must be right, a field that the description does not have is an error, the checksum is of the file that was uploaded,
//! an image without contents has no file to download, and a download can not be continued. The disk is what QEMU finds in the file.

#[path = "prism/machines.rs"]
mod machines;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Path, Request, State, connect_info::Connected},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
    serve::{IncomingStream, Listener},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use futures::StreamExt;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::AbortHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use uuid::Uuid;

use self::machines::{Guest, Machine};
use crate::support::tls::TlsParts;

pub const USERNAME: &str = "image-builder";
pub const PASSWORD: &str = "correct horse battery staple";
pub const CLUSTER: &str = "pe-cluster-1";
pub const CLUSTER_UUID: &str = "0005b0f1-8f43-a0f2-02b7-3cecef193712";
const OTHER_CLUSTER_UUID: &str = "0005a220-027e-400b-7131-ac1f6bcd1533";
const PRISM_UUID: &str = "710e3779-0030-4d55-9827-be11e7fd2d0e";
/// Requests that come until a task ends.
const TICKS: u32 = 2;
const DEFAULT_LENGTH: usize = 20;
const MAX_LENGTH: usize = 500;

/// What goes wrong, at a request that comes.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is answered so instead of being done.
    Answer { status: u16, headers: Vec<(&'static str, String)>, body: String },
    /// It is done, and the connection breaks before the answer.
    SwallowAnswer,
    /// It is done, and answered when the test says so; see [`Prism::held`] and [`Prism::release`].
    HoldAnswer,
    /// The connection breaks when so many bytes of the body have come.
    CutAfter(usize),
    /// No more bytes are taken when so many have come; see [`Prism::stalled`].
    StallAfter(usize),
    /// It is done, and its task fails for this reason.
    FailTask { code: &'static str, detail: &'static str },
}

impl Fault {
    pub fn status(status: u16) -> Self {
        Self::Answer { status, headers: vec![], body: String::new() }
    }

    /// An error document with one message.
    pub fn error(status: u16, reason: &str, message: &str) -> Self {
        let body = error_document(status, reason, message).to_string();
        Self::Answer { status, headers: vec![("content-type", "application/json".to_owned())], body }
    }

    pub fn retry_after(mut self, seconds: u32) -> Self {
        if let Self::Answer { headers, .. } = &mut self {
            headers.push(("retry-after", seconds.to_string()));
        }
        self
    }
}

/// A fault that waits for its request.
struct Armed {
    method: Method,
    /// End of the path, or a part of it that ends with a slash.
    path: &'static str,
    /// Requests of this kind that go well before.
    skip: usize,
    times: usize,
    fault: Fault,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Below `/api/nutanix/v3`.
    pub path: String,
    pub headers: HeaderMap,
    pub at: Instant,
}

struct Image {
    /// `None` until its creation has ended.
    created: bool,
    spec: Value,
    metadata: Value,
    state: &'static str,
    size: Option<u64>,
    /// Contents that came, whole or not.
    has_contents: bool,
    /// Of the file that was uploaded: algorithm and value.
    checksum: Option<(&'static str, String)>,
    file: PathBuf,
    tasks: Vec<String>,
    messages: Vec<Value>,
}

/// What happens when a task ends.
enum Effect {
    Create(String),
    Contents {
        image: String,
        size: u64,
        digest: String,
    },
    Update {
        image: String,
        spec: Value,
        metadata: Value,
    },
    Delete(String),
    CreateMachine(String),
    DeleteMachine(String),
    /// An image of the disk in a file.
    CreateOf {
        image: String,
        disk: PathBuf,
    },
}

struct Task {
    ticks: u32,
    operation: &'static str,
    effect: Option<Effect>,
    failure: Option<(&'static str, String)>,
}

/// What stands in this Prism Central.
struct Inner {
    clusters: Vec<Value>,
    subnets: Vec<Value>,
    categories: BTreeMap<String, BTreeSet<String>>,
    images: BTreeMap<String, Image>,
    tasks: BTreeMap<String, Task>,
    machines: Vec<Machine>,
    guest: Option<Guest>,
    faults: Vec<Armed>,
    seen: Vec<Seen>,
    reported_size: Option<u64>,
    /// Whether files come as they were uploaded.
    gives_uploads: bool,
}

/// A server that runs until it is dropped.
pub struct Prism {
    pub port: u16,
    /// The authority to trust, in PEM.
    pub authority: String,
    shared: Arc<Shared>,
    serving: AbortHandle,
}

struct Shared {
    inner: Mutex<Inner>,
    stalled: Semaphore,
    held: Semaphore,
    released: Semaphore,
    directory: tempfile::TempDir,
}

impl Drop for Prism {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Prism {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1").await
    }

    /// A server at this address of the machine.
    pub async fn start_at(address: &str) -> Self {
        let tls = TlsParts::new();
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Inner {
            clusters: vec![
                cluster(CLUSTER, CLUSTER_UUID, "AOS", true),
                cluster("pe-cluster-2", OTHER_CLUSTER_UUID, "AOS", true),
                cluster("prism-central", PRISM_UUID, "PRISM_CENTRAL", true),
            ],
            subnets: vec![
                subnet("vm-network", Some(CLUSTER_UUID)),
                subnet("far-network", Some(OTHER_CLUSTER_UUID)),
                subnet("overlay", None),
            ],
            categories: BTreeMap::from([(
                "Environment".to_owned(),
                ["Production", "Staging"].map(str::to_owned).into(),
            )]),
            images: BTreeMap::new(),
            tasks: BTreeMap::new(),
            machines: vec![],
            guest: None,
            faults: vec![],
            seen: vec![],
            reported_size: None,
            gives_uploads: false,
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            stalled: Semaphore::new(0),
            held: Semaphore::new(0),
            released: Semaphore::new(0),
            directory: tempfile::tempdir().unwrap(),
        });
        let service = router(Arc::clone(&shared)).into_make_service_with_connect_info::<Wire>();
        let listener = TlsListener { listener, acceptor: tls.acceptor };
        let serving = tokio::spawn(async move { axum::serve(listener, service).await });
        Self { port, authority: tls.authority, shared, serving: serving.abort_handle() }
    }

    fn inner<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        self.shared.with(work)
    }

    /// Lets the next `times` requests of this kind fail.
    pub fn arm(&self, method: Method, path: &'static str, times: usize, fault: Fault) {
        self.arm_after(0, method, path, times, fault);
    }

    /// The same for requests after the next `skip`.
    pub fn arm_after(&self, skip: usize, method: Method, path: &'static str, times: usize, fault: Fault) {
        self.inner(|inner| inner.faults.push(Armed { method, path, skip, times, fault }));
    }

    /// Every disk has this size from now on.
    pub fn report_size(&self, size: u64) {
        self.inner(|inner| inner.reported_size = Some(size));
    }

    /// Files are given as they were uploaded from now on, and not as raw disks.
    pub fn give_uploads(&self) {
        self.inner(|inner| inner.gives_uploads = true);
    }

    /// A disk that somebody else has put there, raw or qcow2.
    pub fn add_disk(&self, name: &str, disk: &std::path::Path) -> String {
        let uuid = self.add_image(name, "a disk");
        let file = self.file(&uuid);
        std::fs::copy(disk, &file).unwrap();
        let (size, digest) = (disk_size(&file), hex::encode(Sha256::digest(std::fs::read(&file).unwrap())));
        self.change(&uuid, |image| (image.size, image.checksum) = (Some(size), Some(("SHA_256", digest))));
        uuid
    }

    fn change(&self, uuid: &str, work: impl FnOnce(&mut Image)) {
        self.inner(|inner| work(inner.images.get_mut(uuid).unwrap()));
    }

    pub fn set_state(&self, uuid: &str, state: &'static str) {
        self.change(uuid, |image| image.state = state);
    }

    pub fn set_image_type(&self, uuid: &str, kind: &str) {
        self.change(uuid, |image| image.spec["resources"]["image_type"] = json!(kind));
    }

    pub fn set_size(&self, uuid: &str, size: u64) {
        self.change(uuid, |image| image.size = Some(size));
    }

    pub fn set_checksum(&self, uuid: &str, algorithm: &'static str, value: &str) {
        self.change(uuid, |image| image.checksum = Some((algorithm, value.to_owned())));
    }

    pub fn remove_images(&self) {
        self.inner(|inner| inner.images.clear());
    }

    /// Returns when an upload has come as far as [`Fault::StallAfter`] says.
    pub async fn stalled(&self) {
        self.shared.stalled.acquire().await.unwrap().forget();
    }

    /// Returns when an answer is held back by [`Fault::HoldAnswer`].
    pub async fn held(&self) {
        self.shared.held.acquire().await.unwrap().forget();
    }

    /// Lets one held answer go.
    pub fn release(&self) {
        self.shared.released.add_permits(1);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner(|inner| inner.seen.clone())
    }

    /// How often this was asked for.
    pub fn count(&self, method: &Method, path: &str) -> usize {
        self.seen().iter().filter(|seen| seen.method == method.as_str() && seen.path.contains(path)).count()
    }

    /// Name and UUID of every image, also of those that are only begun.
    pub fn images(&self) -> Vec<(String, String)> {
        self.inner(|inner| {
            let name = |image: &Image| image.spec["name"].as_str().unwrap().to_owned();
            inner.images.iter().map(|(uuid, image)| (name(image), uuid.clone())).collect()
        })
    }

    pub fn names(&self) -> Vec<String> {
        self.images().into_iter().map(|(name, _)| name).collect()
    }

    /// What a client reads of an image.
    pub fn image(&self, uuid: &str) -> Value {
        self.inner(|inner| inner.images[uuid].document(uuid))
    }

    /// The contents of an image.
    pub fn file(&self, uuid: &str) -> PathBuf {
        self.inner(|inner| inner.images[uuid].file.clone())
    }

    /// An image that somebody else has put there.
    pub fn add_image(&self, name: &str, description: &str) -> String {
        let uuid = Uuid::new_v4().to_string();
        let spec = json!({
            "name": name,
            "description": description,
            "resources": {"image_type": "DISK_IMAGE", "architecture": "X86_64"},
        });
        let mut image = Image::new(spec, json!({"kind": "image"}), &uuid, self.shared.directory.path().join(&uuid));
        (image.created, image.state, image.size, image.has_contents) = (true, "COMPLETE", Some(1 << 30), true);
        self.inner(|inner| inner.images.insert(uuid.clone(), image));
        uuid
    }

    pub fn add_cluster(&self, name: &str) -> String {
        let uuid = Uuid::new_v4().to_string();
        self.inner(|inner| inner.clusters.push(cluster(name, &uuid, "AOS", true)));
        uuid
    }

    pub fn take_cluster_away(&self, name: &str) {
        self.inner(|inner| {
            let cluster = inner.clusters.iter_mut().find(|cluster| cluster["status"]["name"] == name).unwrap();
            cluster["status"]["resources"]["config"]["is_available"] = json!(false);
        });
    }
}

fn cluster(name: &str, uuid: &str, service: &str, available: bool) -> Value {
    json!({
        "status": {
            "name": name,
            "state": "COMPLETE",
            "resources": {
                "config": {"service_list": [service], "is_available": available, "cluster_arch": "X86_64"},
                "network": {"external_ip": "10.0.0.1"},
            },
        },
        "spec": {"name": name, "resources": {}},
        "metadata": {"kind": "cluster", "uuid": uuid, "spec_version": 1, "categories": {}},
    })
}

fn subnet(name: &str, cluster: Option<&str>) -> Value {
    let mut status = json!({"name": name, "state": "COMPLETE", "resources": {"subnet_type": "OVERLAY"}});
    if let Some(cluster) = cluster {
        status["resources"] = json!({"subnet_type": "VLAN", "vlan_id": 0});
        status["cluster_reference"] = json!({"kind": "cluster", "uuid": cluster});
    }
    json!({
        "status": status,
        "spec": {"name": name, "resources": {}},
        "metadata": {"kind": "subnet", "uuid": Uuid::new_v4().to_string(), "spec_version": 0, "categories": {}},
    })
}

impl Image {
    fn new(spec: Value, metadata: Value, uuid: &str, file: PathBuf) -> Self {
        let mut metadata = metadata;
        metadata["uuid"] = json!(uuid);
        metadata["spec_version"] = json!(0);
        if metadata["categories"].is_null() {
            metadata["categories"] = json!({});
        }
        metadata["categories_mapping"] = mapping(&metadata["categories"]);
        metadata["creation_time"] = json!("2026-01-01T00:00:00Z");
        metadata["last_update_time"] = json!("2026-01-01T00:00:00Z");
        metadata["owner_reference"] =
            json!({"kind": "user", "uuid": "00000000-0000-0000-0000-000000000000", "name": "admin"});
        Self {
            created: false,
            spec,
            metadata,
            state: "PENDING",
            size: None,
            has_contents: false,
            checksum: None,
            file,
            tasks: vec![],
            messages: vec![],
        }
    }

    fn document(&self, uuid: &str) -> Value {
        let mut resources = self.spec["resources"].clone();
        if let Some(size) = self.size {
            resources["size_bytes"] = json!(size);
            resources["retrieval_uri_list"] =
                json!([format!("https://127.0.0.1:9440/api/nutanix/v3/images/{uuid}/file")]);
        }
        if let Some((algorithm, value)) = &self.checksum {
            resources["checksum"] = json!({"checksum_algorithm": algorithm, "checksum_value": value});
        }
        let mut status = json!({
            "name": self.spec["name"],
            "description": self.spec["description"],
            "state": self.state,
            "resources": resources,
            "execution_context": {"task_uuid": self.tasks},
        });
        if !self.messages.is_empty() {
            status["message_list"] = json!(self.messages);
        }
        json!({"api_version": "3.1", "metadata": self.metadata, "spec": self.spec, "status": status})
    }
}

/// The newer form of categories, which follows the older one.
fn mapping(categories: &Value) -> Value {
    categories.as_object().unwrap().iter().map(|(name, value)| (name.clone(), json!([value]))).collect()
}

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.inner.lock().unwrap())
    }
}

impl Inner {
    /// A task that has been begun, and its UUID.
    fn begin(&mut self, operation: &'static str, effect: Effect, failure: Option<(&'static str, String)>) -> String {
        let uuid = Uuid::new_v4().to_string();
        self.tasks.insert(uuid.clone(), Task { ticks: 0, operation, effect: Some(effect), failure });
        uuid
    }

    /// Time goes on: tasks that had theirs end.
    fn tick(&mut self) {
        let mut ended = vec![];
        for task in self.tasks.values_mut() {
            task.ticks += 1;
            if task.ticks > TICKS
                && let Some(effect) = task.effect.take()
            {
                ended.push((effect, task.failure.clone()));
            }
        }
        for (effect, failure) in ended {
            match failure {
                Some((code, detail)) => self.fail(&effect, code, &detail),
                None => self.carry_out(effect),
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Create(uuid) => {
                if let Some(image) = self.images.get_mut(&uuid) {
                    (image.created, image.state) = (true, "COMPLETE");
                }
            }
            Effect::Contents { image, size, digest } => {
                if let Some(image) = self.images.get_mut(&image) {
                    (image.size, image.state) = (Some(size), "COMPLETE");
                    image.checksum = Some(("SHA_256", digest));
                }
            }
            Effect::Update { image, spec, metadata } => {
                if let Some(image) = self.images.get_mut(&image) {
                    (image.spec, image.metadata) = (spec, metadata);
                }
            }
            Effect::Delete(uuid) => {
                self.images.remove(&uuid);
            }
            Effect::CreateMachine(uuid) => {
                if let Some(machine) = self.machine(&uuid) {
                    machine.created = true;
                }
            }
            Effect::DeleteMachine(uuid) => self.remove_machine(&uuid),
            Effect::CreateOf { image, disk } => {
                if let Some(image) = self.images.get_mut(&image) {
                    std::fs::copy(&disk, &image.file).unwrap();
                    (image.created, image.has_contents, image.state) = (true, true, "COMPLETE");
                    image.size = Some(disk_size(&image.file));
                }
            }
        }
    }

    /// What a task that failed leaves behind.
    fn fail(&mut self, effect: &Effect, reason: &str, detail: &str) {
        if let Effect::Contents { image, .. } | Effect::Create(image) | Effect::CreateOf { image, .. } = effect
            && let Some(image) = self.images.get_mut(image)
        {
            image.state = "ERROR";
            image.messages.push(json!({"message": detail, "reason": reason}));
        }
    }
}

// ---- the wire ----

/// What a handler knows of its connection.
#[derive(Clone, Debug)]
struct Wire {
    cut: Arc<AtomicBool>,
}

impl Connected<IncomingStream<'_, TlsListener>> for Wire {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        stream.remote_addr().clone()
    }
}

struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = Cuttable;
    type Addr = Wire;

    async fn accept(&mut self) -> (Cuttable, Wire) {
        loop {
            let (stream, _): (TcpStream, SocketAddr) = self.listener.accept().await.unwrap();
            // A client that distrusts the certificate ends the handshake.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                let cut = Arc::new(AtomicBool::new(false));
                return (Cuttable { stream, cut: Arc::clone(&cut) }, Wire { cut });
            }
        }
    }

    fn local_addr(&self) -> io::Result<Wire> {
        Ok(Wire { cut: Arc::default() })
    }
}

/// A connection that can be made to break.
struct Cuttable {
    stream: TlsStream<TcpStream>,
    cut: Arc<AtomicBool>,
}

impl Cuttable {
    fn check(&self) -> io::Result<()> {
        if self.cut.load(Ordering::SeqCst) { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl AsyncRead for Cuttable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Cuttable {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

// ---- requests ----

fn router(shared: Arc<Shared>) -> Router {
    let api = Router::new()
        .route("/images", post(create_image))
        .route("/images/list", post(list_images))
        .route("/images/{uuid}", get(read_image).put(update_image).delete(delete_image))
        .route("/images/{uuid}/file", put(upload_file).get(download_file))
        .route("/tasks/{uuid}", get(read_task))
        .route("/vms", post(machines::create))
        .route("/vms/list", post(machines::list_all))
        .route("/vms/{uuid}", get(machines::read).delete(machines::delete))
        .route("/clusters/list", post(list_clusters))
        .route("/clusters/{uuid}", get(read_cluster))
        .route("/subnets/list", post(list_subnets))
        .route("/subnets/{uuid}", get(read_subnet))
        .route("/categories/{name}/{value}", get(read_category))
        .fallback(async || error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "there is no such path"))
        .with_state(Arc::clone(&shared))
        .layer(middleware::from_fn_with_state(shared, guard));
    Router::new().nest("/api/nutanix/v3", api)
}

type Refused = Box<Response>;

fn error_document(status: u16, reason: &str, message: &str) -> Value {
    json!({
        "api_version": "3.1",
        "code": status,
        "kind": "image",
        "message_list": [{"message": message, "reason": reason}],
        "state": "ERROR",
    })
}

fn error(status: StatusCode, reason: &str, message: &str) -> Response {
    (status, axum::Json(error_document(status.as_u16(), reason, message))).into_response()
}

#[expect(clippy::unnecessary_box_returns, reason = "it is an error, which is kept small")]
fn invalid(message: &str) -> Refused {
    Box::new(error(StatusCode::UNPROCESSABLE_ENTITY, "INVALID_REQUEST", message))
}

fn accepted(document: Value) -> Response {
    (StatusCode::ACCEPTED, axum::Json(document)).into_response()
}

/// A fault that concerns how a request is done.
#[derive(Clone)]
struct Planned(Option<Fault>);

/// Notes the request, checks who asks, and lets faults happen.
async fn guard(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let wire = request.extensions().get::<ConnectInfo<Wire>>().unwrap().0.clone();
    let fault = shared.with(|inner| {
        inner.tick();
        inner.seen.push(Seen {
            method: method.to_string(),
            path: path.clone(),
            headers: request.headers().clone(),
            at: Instant::now(),
        });
        let armed = inner.faults.iter_mut().find(|armed| {
            let fits = if armed.path.ends_with('/') { path.contains(armed.path) } else { path.ends_with(armed.path) };
            armed.times > 0 && armed.method == method && fits
        })?;
        if armed.skip > 0 {
            armed.skip -= 1;
            return None;
        }
        armed.times -= 1;
        Some(armed.fault.clone())
    });
    let expected = format!("Basic {}", STANDARD.encode(format!("{USERNAME}:{PASSWORD}")));
    if request.headers().get(header::AUTHORIZATION).is_none_or(|given| given != expected.as_str()) {
        return (StatusCode::UNAUTHORIZED, "<html>401 Unauthorized</html>").into_response();
    }
    if let Some(Fault::Answer { status, headers, body }) = fault {
        // An answer in the middle of a body may be lost with the connection.
        let _ = axum::body::to_bytes(request.into_body(), usize::MAX).await;
        let mut answer = (StatusCode::from_u16(status).unwrap(), body).into_response();
        for (name, value) in headers {
            answer.headers_mut().insert(name, value.parse().unwrap());
        }
        return answer;
    }
    let (swallow, hold) = (matches!(fault, Some(Fault::SwallowAnswer)), matches!(fault, Some(Fault::HoldAnswer)));
    request.extensions_mut().insert(Planned(fault));
    let response = next.run(request).await;
    if hold {
        shared.held.add_permits(1);
        shared.released.acquire().await.unwrap().forget();
    }
    if swallow {
        wire.cut.store(true, Ordering::SeqCst);
    }
    response
}

/// A JSON body that has the described fields and no others.
async fn read_json<T: DeserializeOwned>(request: Request) -> Result<(T, Planned), Refused> {
    let planned = request.extensions().get::<Planned>().unwrap().clone();
    if request.headers().get(header::CONTENT_TYPE).is_none_or(|given| given != "application/json") {
        let refused =
            error(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE_ERROR", "send application/json");
        return Err(Box::new(refused));
    }
    let bytes = axum::body::to_bytes(request.into_body(), 1 << 20).await.map_err(|cut| invalid(&cut.to_string()))?;
    let parsed =
        serde_json::from_slice(&bytes).map_err(|wrong| invalid(&format!("given input is invalid: {wrong}")))?;
    Ok((parsed, planned))
}

fn failure(planned: &Planned) -> Option<(&'static str, String)> {
    match planned.0 {
        Some(Fault::FailTask { code, detail }) => Some((code, detail.to_owned())),
        _ => None,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListRequest {
    kind: Option<String>,
    filter: Option<String>,
    length: Option<i64>,
    offset: Option<i64>,
    sort_attribute: Option<String>,
    sort_order: Option<SortOrder>,
}

#[derive(Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum SortOrder {
    Ascending,
    Descending,
}

async fn list(
    shared: Arc<Shared>,
    request: Request,
    kind: &str,
    all: impl FnOnce(&mut Inner) -> Vec<Value>,
) -> Response {
    let (wanted, _): (ListRequest, _) = match read_json(request).await {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    match part(wanted, kind, shared.with(all)) {
        Ok(document) => axum::Json(document).into_response(),
        Err(refused) => *refused,
    }
}

fn part(wanted: ListRequest, kind: &str, mut entities: Vec<Value>) -> Result<Value, Refused> {
    let ListRequest { kind: given, filter, length, offset, sort_attribute, sort_order } = wanted;
    if given.is_some_and(|given| given != kind) {
        return Err(invalid("kind is that of another list"));
    }
    if sort_attribute.is_some() || matches!(sort_order, Some(SortOrder::Ascending | SortOrder::Descending)) {
        return Err(invalid("this server does not sort"));
    }
    let number = |given: Option<i64>, default: usize, least: usize, most: usize| match given.map(usize::try_from) {
        None => Ok(default),
        Some(Ok(number)) if (least..=most).contains(&number) => Ok(number),
        Some(_) => Err(invalid("length or offset is out of range")),
    };
    let length = number(length, DEFAULT_LENGTH, 1, MAX_LENGTH)?;
    let offset = number(offset, 0, 0, usize::MAX)?;
    if let Some(filter) = filter {
        let attribute = if kind == "vm" { "vm_name==" } else { "name==" };
        let name = filter.strip_prefix(attribute).ok_or_else(|| invalid("only the name is known"))?;
        entities.retain(|entity| entity["status"]["name"] == name);
    }
    let total = entities.len();
    let entities: Vec<_> = entities.into_iter().skip(offset).take(length).collect();
    Ok(json!({
        "api_version": "3.1",
        "metadata": {"kind": kind, "total_matches": total, "offset": offset, "length": entities.len()},
        "entities": entities,
    }))
}

async fn list_clusters(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    list(shared, request, "cluster", |inner| inner.clusters.clone()).await
}

async fn list_subnets(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    list(shared, request, "subnet", |inner| inner.subnets.clone()).await
}

fn of_uuid(entities: &[Value], uuid: &str) -> Response {
    match entities.iter().find(|entity| entity["metadata"]["uuid"] == uuid) {
        Some(entity) => axum::Json(entity).into_response(),
        None => error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "there is no such entity"),
    }
}

async fn read_cluster(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>) -> Response {
    shared.with(|inner| of_uuid(&inner.clusters, &uuid))
}

async fn read_subnet(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>) -> Response {
    shared.with(|inner| of_uuid(&inner.subnets, &uuid))
}

async fn list_images(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let all = |inner: &mut Inner| {
        inner.images.iter().filter(|(_, image)| image.created).map(|(uuid, image)| image.document(uuid)).collect()
    };
    list(shared, request, "image", all).await
}

async fn read_category(State(shared): State<Arc<Shared>>, Path((name, value)): Path<(String, String)>) -> Response {
    shared.with(|inner| match inner.categories.get(&name) {
        Some(values) if values.contains(&value) => {
            axum::Json(json!({"api_version": "3.1", "name": name, "value": value, "system_defined": false}))
                .into_response()
        }
        Some(_) => error(
            StatusCode::UNPROCESSABLE_ENTITY,
            "CATEGORY_NAME_VALUE_MISMATCH",
            "the category does not have this value",
        ),
        None => error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "there is no such category"),
    })
}

async fn read_task(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>) -> Response {
    shared.with(|inner| {
        let Some(task) = inner.tasks.get(&uuid) else {
            return error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "there is no such task");
        };
        let operation = task.operation;
        let status = match (&task.effect, &task.failure, task.ticks) {
            (None, Some(_), _) => "FAILED",
            (None, None, _) => "SUCCEEDED",
            (Some(_), _, 0 | 1) => "QUEUED",
            (Some(_), _, _) => "RUNNING",
        };
        let mut document = json!({
            "api_version": "3.1",
            "uuid": uuid,
            "operation_type": operation,
            "status": status,
            "percentage_complete": if task.effect.is_none() { 100 } else { 50 },
            "progress_message": if task.effect.is_none() { operation.to_owned() } else { format!("{operation} runs") },
        });
        if let (None, Some((code, detail))) = (&task.effect, &task.failure) {
            document["error_code"] = json!(code);
            document["error_detail"] = json!(detail);
        }
        axum::Json(document).into_response()
    })
}

// ---- images ----

/// What a client may write of an image's metadata, and what it may repeat.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    kind: String,
    #[serde(default)]
    categories: BTreeMap<String, String>,
    categories_mapping: Option<BTreeMap<String, Vec<String>>>,
    #[serde(default)]
    use_categories_mapping: bool,
    spec_version: Option<u64>,
    uuid: Option<String>,
    #[serde(rename = "spec_hash")]
    _spec_hash: Option<String>,
    #[serde(rename = "creation_time")]
    _creation_time: Option<String>,
    #[serde(rename = "last_update_time")]
    _last_update_time: Option<String>,
    #[serde(rename = "owner_reference")]
    _owner_reference: Option<Value>,
    #[serde(rename = "project_reference")]
    _project_reference: Option<Value>,
    #[serde(rename = "name")]
    _name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Intent<S> {
    #[serde(rename = "api_version")]
    _api_version: Option<String>,
    metadata: Metadata,
    spec: S,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    name: String,
    description: Option<String>,
    resources: Resources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    image_type: Option<String>,
    architecture: Option<String>,
    #[serde(default)]
    initial_placement_ref_list: Vec<Reference>,
    data_source_reference: Option<Reference>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    kind: String,
    uuid: String,
}

impl Intent<Spec> {
    /// What is stored of it.
    fn check(&self, inner: &Inner) -> Result<(Value, Value), Refused> {
        let Self { metadata, spec, _api_version: _ } = self;
        if metadata.kind != "image" {
            return Err(invalid("metadata.kind is not image"));
        }
        if metadata.use_categories_mapping {
            return Err(invalid("this server knows categories only"));
        }
        if spec.name.is_empty() || spec.name.len() > 256 {
            return Err(invalid("spec.name has not 1 to 256 characters"));
        }
        if spec.description.as_ref().is_some_and(|description| description.len() > 1000) {
            return Err(invalid("spec.description has more than 1000 characters"));
        }
        let Resources { image_type, architecture, initial_placement_ref_list, data_source_reference } = &spec.resources;
        if let Some(reference) = data_source_reference
            && (reference.kind != "vm_disk" || inner.disk(&reference.uuid).is_none())
        {
            let message = format!("there is no {} {}", reference.kind, reference.uuid);
            return Err(Box::new(error(StatusCode::UNPROCESSABLE_ENTITY, "REFERENCE_ERROR", &message)));
        }
        if !image_type.as_deref().is_some_and(|given| ["DISK_IMAGE", "ISO_IMAGE"].contains(&given)) {
            return Err(invalid("image_type is not DISK_IMAGE or ISO_IMAGE"));
        }
        if architecture.as_deref().is_some_and(|given| !["X86_64", "PPC64", "PPC64LE"].contains(&given)) {
            return Err(invalid("architecture is not known"));
        }
        for reference in initial_placement_ref_list {
            let known = inner.clusters.iter().any(|cluster| cluster["metadata"]["uuid"] == reference.uuid.as_str());
            if reference.kind != "cluster" || !known {
                let message = format!("the cluster {} does not exist", reference.uuid);
                return Err(Box::new(error(StatusCode::UNPROCESSABLE_ENTITY, "REFERENCE_ERROR", &message)));
            }
        }
        for (name, value) in &metadata.categories {
            if !inner.categories.get(name).is_some_and(|values| values.contains(value)) {
                let message = format!("there is no category {name} with the value {value}");
                let reason = "CATEGORY_NAME_VALUE_MISMATCH";
                return Err(Box::new(error(StatusCode::UNPROCESSABLE_ENTITY, reason, &message)));
            }
        }
        let mut stored = json!({
            "name": spec.name,
            "resources": {"image_type": image_type, "architecture": architecture.as_deref().unwrap_or("X86_64")},
        });
        if let Some(description) = &spec.description {
            stored["description"] = json!(description);
        }
        if !initial_placement_ref_list.is_empty() {
            let references: Vec<_> = initial_placement_ref_list
                .iter()
                .map(|reference| json!({"kind": reference.kind, "uuid": reference.uuid}))
                .collect();
            stored["resources"]["initial_placement_ref_list"] = json!(references);
        }
        Ok((stored, json!({"kind": "image", "categories": metadata.categories})))
    }
}

async fn create_image(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (intent, planned): (Intent<Spec>, _) = match read_json(request).await {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    shared.with(|inner| {
        if intent.metadata.uuid.is_some() || intent.metadata.spec_version.is_some() {
            return *invalid("an image that does not exist has no uuid and no spec_version");
        }
        let (spec, metadata) = match intent.check(inner) {
            Ok(stored) => stored,
            Err(refused) => return *refused,
        };
        let uuid = Uuid::new_v4().to_string();
        let image = Image::new(spec, metadata, &uuid, shared.directory.path().join(&uuid));
        let mut document = image.document(&uuid);
        inner.images.insert(uuid.clone(), image);
        let reference = &intent.spec.resources.data_source_reference;
        let effect = match reference.as_ref().and_then(|reference| inner.disk(&reference.uuid)) {
            Some(disk) => Effect::CreateOf { image: uuid, disk },
            None => Effect::Create(uuid),
        };
        let task = inner.begin("create_image_intentful", effect, failure(&planned));
        document["status"]["execution_context"]["task_uuid"] = json!(task);
        accepted(document)
    })
}

fn no_image() -> Response {
    error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "the image does not exist")
}

async fn read_image(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>) -> Response {
    shared.with(|inner| match inner.images.get(&uuid) {
        Some(image) => axum::Json(image.document(&uuid)).into_response(),
        None => no_image(),
    })
}

async fn update_image(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>, request: Request) -> Response {
    let (intent, planned): (Intent<Spec>, _) = match read_json(request).await {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    shared.with(|inner| {
        let Some(image) = inner.images.get(&uuid) else { return no_image() };
        let present = image.metadata["spec_version"].as_u64();
        if intent.metadata.spec_version != present {
            return error(StatusCode::CONFLICT, "SPEC_UPDATE_ERROR", "edit conflict: the spec_version is another one");
        }
        if intent.metadata.uuid.as_ref().is_some_and(|given| *given != uuid) {
            return *invalid("metadata.uuid is that of another image");
        }
        let (spec, new) = match intent.check(inner) {
            Ok(stored) => stored,
            Err(refused) => return *refused,
        };
        let image = &inner.images[&uuid];
        if spec["resources"] != image.spec["resources"] {
            return *invalid("the contents of an image can not be changed");
        }
        let follows = mapping(&new["categories"]);
        if intent.metadata.categories_mapping.as_ref().is_some_and(|given| json!(given) != follows) {
            return *invalid("categories and categories_mapping say different things");
        }
        let mut metadata = image.metadata.clone();
        metadata["categories"] = new["categories"].clone();
        metadata["categories_mapping"] = follows;
        metadata["spec_version"] = json!(present.unwrap_or_default() + 1);
        let mut document = image.document(&uuid);
        document["spec"] = spec.clone();
        let effect = Effect::Update { image: uuid, spec, metadata };
        let task = inner.begin("update_image_intentful", effect, failure(&planned));
        document["status"]["state"] = json!("PENDING");
        document["status"]["execution_context"]["task_uuid"] = json!(task);
        accepted(document)
    })
}

async fn delete_image(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>, request: Request) -> Response {
    let planned = request.extensions().get::<Planned>().unwrap().clone();
    shared.with(|inner| {
        if !inner.images.contains_key(&uuid) {
            return no_image();
        }
        let task = inner.begin("delete_image_intentful", Effect::Delete(uuid), failure(&planned));
        deletion("image", &task)
    })
}

/// The answer to who deletes an entity.
fn deletion(kind: &str, task: &str) -> Response {
    accepted(json!({
        "api_version": "3.1",
        "metadata": {"kind": kind, "categories": {}},
        "spec": "",
        "status": {"state": "DELETE_PENDING", "execution_context": {"task_uuid": task}},
    }))
}

/// What the headers of an upload say about its bytes.
fn announced_checksum(headers: &HeaderMap) -> Result<Option<String>, Refused> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    match (text("x-nutanix-checksum-type").as_deref(), text("x-nutanix-checksum-bytes")) {
        (None, None) => Ok(None),
        (Some("SHA_256"), Some(digest)) if digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(Some(digest))
        }
        (_, _) => Err(invalid("the headers of the checksum are not right")),
    }
}

async fn upload_file(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(wire): ConnectInfo<Wire>,
    Path(uuid): Path<String>,
    request: Request,
) -> Response {
    let planned = request.extensions().get::<Planned>().unwrap().clone();
    if request.headers().get(header::CONTENT_TYPE).is_none_or(|given| given != "application/octet-stream") {
        let message = "send application/octet-stream";
        return error(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE_ERROR", message);
    }
    let announced = match announced_checksum(request.headers()) {
        Ok(announced) => announced,
        Err(refused) => return *refused,
    };
    let begun = shared.with(|inner| {
        let image = inner.images.get_mut(&uuid).ok_or_else(|| Box::new(no_image()))?;
        if !image.created {
            return Err(invalid("the image is not created yet"));
        }
        if image.has_contents {
            return Err(invalid("the image has its contents already"));
        }
        image.has_contents = true;
        Ok(image.file.clone())
    });
    let path = match begun {
        Ok(path) => path,
        Err(refused) => return *refused,
    };
    let Some(digest) = receive(&shared, &wire, &planned, request.into_body(), &path).await else {
        // The client is gone, so nobody reads this.
        return StatusCode::BAD_REQUEST.into_response();
    };
    let wrong = announced
        .filter(|announced| *announced != digest)
        .map(|announced| ("INTERNAL_ERROR", format!("checksum mismatch: expected {announced}, computed {digest}")));
    let size = tokio::task::spawn_blocking(move || disk_size(&path)).await.unwrap();
    shared.with(|inner| {
        let effect = Effect::Contents { image: uuid.clone(), size: inner.reported_size.unwrap_or(size), digest };
        let task = inner.begin("upload_image_contents", effect, wrong.or_else(|| failure(&planned)));
        if let Some(image) = inner.images.get_mut(&uuid) {
            image.state = "PENDING";
            image.tasks.push(task);
        }
    });
    StatusCode::OK.into_response()
}

/// The digest of the whole body; `None` where it was cut.
async fn receive(shared: &Shared, wire: &Wire, planned: &Planned, body: Body, path: &PathBuf) -> Option<String> {
    let mut file = tokio::fs::File::create(path).await.unwrap();
    let (mut digest, mut size, mut bytes) = (Sha256::new(), 0, body.into_data_stream());
    while let Some(piece) = bytes.next().await {
        let piece: Bytes = piece.ok()?;
        digest.update(&piece);
        file.write_all(&piece).await.unwrap();
        size += piece.len();
        match planned.0 {
            Some(Fault::CutAfter(limit)) if size >= limit => wire.cut.store(true, Ordering::SeqCst),
            Some(Fault::StallAfter(limit)) if size >= limit => {
                shared.stalled.add_permits(1);
                std::future::pending::<()>().await;
            }
            _ => {}
        }
    }
    file.flush().await.unwrap();
    (!wire.cut.load(Ordering::SeqCst)).then(|| hex::encode(digest.finalize()))
}

async fn download_file(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(wire): ConnectInfo<Wire>,
    Path(uuid): Path<String>,
    request: Request,
) -> Response {
    let planned = request.extensions().get::<Planned>().unwrap().clone();
    if request.headers().contains_key(header::RANGE) {
        return *invalid("a part of an image can not be read");
    }
    let found = shared.with(|inner| {
        let image = inner.images.get(&uuid).ok_or_else(|| {
            let message = format!("image : {uuid} does not exist.");
            Box::new(error(StatusCode::NOT_FOUND, "INVALID_ARGUMENT", &message))
        })?;
        if image.state != "COMPLETE" || !image.file.exists() {
            return Err(invalid("the image has no contents"));
        }
        Ok((image.file.clone(), inner.gives_uploads))
    });
    let (file, as_uploaded) = match found {
        Ok(found) => found,
        Err(refused) => return *refused,
    };
    let file = if as_uploaded { file } else { tokio::task::spawn_blocking(move || raw(&file)).await.unwrap() };
    let file = tokio::fs::File::open(file).await.unwrap();
    let mut sent = 0;
    let pieces = tokio_util::io::ReaderStream::with_capacity(file, 256 * 1024).then(move |piece| {
        sent += piece.as_ref().map_or(0, Bytes::len);
        let (fault, wire, shared) = (planned.0.clone(), wire.clone(), Arc::clone(&shared));
        async move {
            match fault {
                Some(Fault::CutAfter(limit)) if sent >= limit => wire.cut.store(true, Ordering::SeqCst),
                Some(Fault::StallAfter(limit)) if sent >= limit => {
                    shared.stalled.add_permits(1);
                    std::future::pending::<()>().await;
                }
                _ => {}
            }
            piece
        }
    });
    ([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(pieces)).into_response()
}

/// The disk in a file, raw.
fn raw(file: &std::path::Path) -> PathBuf {
    let raw = file.with_extension("raw");
    let converted = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(file).arg(&raw).status();
    assert!(converted.expect("qemu-img is there").success());
    raw
}

/// Bytes of the disk in a file, as QEMU sees it.
fn disk_size(path: &PathBuf) -> u64 {
    let output =
        Command::new("qemu-img").args(["info", "--output=json"]).arg(path).output().expect("qemu-img is there");
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["virtual-size"].as_u64().unwrap()
}
