//! An operator against the real API server, a release mirror, and the parts of Kubernetes that the server lacks: the
//! tests play Job controller and kubelet.

use std::{
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Method, Request, StatusCode},
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Event, Namespace, Pod, Secret},
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    client::{Body as KubeBody, ClientBuilder},
};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, NodeImageBuildStatus, Phase},
    contract::{BUILD_CONTAINER, BuildOutcome, BuildReport, BuildRequest, FailureReport, token::SigningKey},
    controller::{
        Operator,
        context::{ArtifactServerSettings, Lifecycle, Placement, Settings},
        lease::LeaseSettings,
        metrics::Metrics,
    },
    reach::Reach,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    net::TcpListener,
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{interval, timeout},
};

use crate::support::{
    self,
    apiserver::{self, ApiServer},
};

/// Longest time until something that must happen has happened.
pub const SOON: Duration = Duration::from_secs(30);

const RELEASES: &str = include_str!("../documents/eks-a-release.yaml");
const BUNDLES: &str = include_str!("../documents/bundles.yaml");
const DISTRO: &str = include_str!("../documents/kubernetes-1-31-eks-47.yaml");

/// A namespace, a mirror, an artifact server that remembers what was deleted, and possibly an operator.
pub struct Harness {
    /// An administrator's.
    pub client: Client,
    /// An operator's: that of the chart's service account.
    pub operator_client: Client,
    pub namespace: String,
    pub mirror: Arc<Mirror>,
    pub key: SigningKey,
    operator: Option<Running>,
    server: Server,
    /// Length of the audit log when the test began.
    audited: u64,
}

/// A release mirror and the artifact server's place, on one port.
pub struct Mirror {
    pub url: String,
    /// Requests to it are answered by 503.
    pub down: AtomicBool,
    /// Paths and bearer tokens of `DELETE` requests.
    pub deleted: Mutex<Vec<(String, String)>>,
    pub requests: AtomicUsize,
    /// Requests for the release manifest, and how many of them were answered by 304.
    pub manifest_requests: AtomicUsize,
    pub manifest_unchanged: AtomicUsize,
    /// The release that the manifest calls the latest.
    pub latest: Mutex<String>,
    /// Digest of the base that the builds report and the checksum list has.
    pub base: Mutex<String>,
}

/// An operator.
pub struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    pub metrics: Arc<Metrics>,
    pub ready: Arc<AtomicBool>,
}

impl Running {
    /// Stops it as SIGTERM does, and waits until it ended.
    pub async fn stop(self) {
        self.stop.send(()).unwrap();
        timeout(SOON, self.task).await.expect("the operator does not end").unwrap();
    }

    /// Ends it at once, wherever it is.
    pub async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

/// What there is, at the paths of the public hosts.
async fn mirror(State(mirror): State<Arc<Mirror>>, request: Request<Body>) -> Response {
    mirror.requests.fetch_add(1, Ordering::Relaxed);
    if mirror.down.load(Ordering::Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if request.method() == Method::DELETE {
        let token = request.headers()["authorization"].to_str().unwrap().trim_start_matches("Bearer ").to_owned();
        mirror.deleted.lock().unwrap().push((request.uri().path().trim_start_matches('/').to_owned(), token));
        return StatusCode::NO_CONTENT.into_response();
    }
    let text = match request.uri().path() {
        "/releases/eks-a/manifest.yaml" => {
            mirror.manifest_requests.fetch_add(1, Ordering::Relaxed);
            let latest = mirror.latest.lock().unwrap().clone();
            let etag = format!("\"{latest}\"");
            if request.headers().get("if-none-match").is_some_and(|known| *known == *etag) {
                mirror.manifest_unchanged.fetch_add(1, Ordering::Relaxed);
                return StatusCode::NOT_MODIFIED.into_response();
            }
            let text = RELEASES.replace("latestVersion: v0.26.1", &format!("latestVersion: {latest}"));
            return ([("etag", etag)], text).into_response();
        }
        "/base/SHA256SUMS" => format!("{} *root.tar.xz\n", mirror.base.lock().unwrap()),
        path if path.starts_with("/releases/bundles/") => BUNDLES.to_owned(),
        path if path.ends_with("kubernetes-1-31-eks-47.yaml") => DISTRO.to_owned(),
        path if path.ends_with(".sha256") => format!("{}  file\n", hex::encode(Sha256::digest(path))),
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    Response::new(Body::from(text))
}

impl Harness {
    /// Everything, with the operator running.
    pub async fn start(prefix: &str) -> Self {
        let mut harness = Self::without_operator(prefix).await;
        harness.start_operator();
        harness
    }

    pub async fn without_operator(prefix: &str) -> Self {
        Self::with(Server::Shared(apiserver::shared().await), prefix).await
    }

    /// Everything but an operator, on an API server of the test's own.
    pub async fn on(server: Arc<ApiServer>, prefix: &str) -> Self {
        Self::with(Server::Own(server), prefix).await
    }

    async fn with(server: Server, prefix: &str) -> Self {
        let client = server.client().await;
        let config = server.config_of(apiserver::RELEASE, apiserver::RELEASE).await;
        let operator_client = Client::try_from(config).unwrap();
        let audited = server.audited();
        let namespace = apiserver::namespace(&client, prefix).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = Arc::new(Mirror {
            url: format!("http://{}", listener.local_addr().unwrap()),
            down: false.into(),
            deleted: Mutex::default(),
            requests: AtomicUsize::new(0),
            manifest_requests: AtomicUsize::new(0),
            manifest_unchanged: AtomicUsize::new(0),
            latest: Mutex::new("v0.26.1".to_owned()),
            base: Mutex::new(hex::encode(Sha256::digest("base"))),
        });
        let router = Router::new().fallback(mirror).with_state(Arc::clone(&state));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let key = SigningKey::new(&[7; 32]).unwrap();
        Self { client, operator_client, namespace, mirror: state, key, operator: None, server, audited }
    }

    pub fn settings(&self) -> Settings {
        Settings {
            builder_image: "registry.example.com/builder:1".to_owned(),
            image_builder_image: "upstream".into(),
            release_manifest_url: format!("{}/manifest.yaml", self.mirror.url).parse().unwrap(),
            builder_service_account: None,
            lifecycle: Lifecycle::default(),
            // The mirror is on this machine.
            reach: Reach::Anywhere,
            placement: Placement::default(),
            artifact_server: Some(ArtifactServerSettings {
                upload_url: self.mirror.url.parse().unwrap(),
                public_url: "http://images.example.com".parse().unwrap(),
                key: self.key.clone(),
            }),
        }
    }

    pub fn start_operator(&mut self) {
        let settings = self.settings();
        self.start_operator_with(self.operator_client.clone(), settings);
    }

    pub fn start_operator_with(&mut self, client: Client, settings: Settings) {
        self.operator = Some(self.one_more_operator(client, settings, None));
    }

    /// An operator beside the harness's own.
    pub fn one_more_operator(&self, client: Client, settings: Settings, lease: Option<LeaseSettings>) -> Running {
        Self::run_operator(client, Some(self.namespace.clone()), settings, lease)
    }

    /// An operator for one namespace, or for all.
    pub fn run_operator(
        client: Client,
        namespace: Option<String>,
        settings: Settings,
        lease: Option<LeaseSettings>,
    ) -> Running {
        let (metrics, ready) = (Arc::default(), Arc::default());
        let operator =
            Operator { client, namespace, settings, lease, metrics: Arc::clone(&metrics), ready: Arc::clone(&ready) };
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(async move { operator.run(shutdown).await.unwrap() });
        Running { stop, task, metrics, ready }
    }

    /// What the operators of this test asked of the API server so far.
    pub fn audit(&self) -> Vec<Value> {
        self.server.audit(self.audited)
    }

    /// Stops the operator as SIGTERM does, and waits until it ended.
    pub async fn stop_operator(&mut self) {
        self.operator.take().unwrap().stop().await;
    }

    /// Ends the operator at once, wherever it is.
    pub async fn kill_operator(&mut self) {
        self.operator.take().unwrap().kill().await;
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A base whose checksum list is on the mirror.
    pub fn base(&self) -> Value {
        let url = &self.mirror.url;
        json!({ "url": format!("{url}/base/root.tar.xz"), "sha256SumsURL": format!("{url}/base/SHA256SUMS") })
    }

    /// All Jobs of the namespace.
    pub async fn jobs(&self) -> Vec<Job> {
        self.api().list(&ListParams::default()).await.unwrap().items
    }

    /// Makes the operator ask the mirror anew: a new process has no documents.
    pub async fn mirror_is_forgotten(&mut self) {
        self.stop_operator().await;
        self.start_operator();
    }

    /// Waits for so many more requests for the release manifest.
    pub async fn mirror_is_polled(&self, times: usize) {
        let begin = self.mirror.manifest_requests.load(Ordering::Relaxed);
        let asked = || self.mirror.manifest_requests.load(Ordering::Relaxed) - begin;
        let polled = until(|| async { (asked() >= times).then_some(()) });
        timeout(SOON, polled).await.unwrap_or_else(|_| panic!("the mirror is not asked: {}", asked()));
    }

    /// As if the schedule were due then.
    pub async fn set_due(&self, name: &str, at: Timestamp) {
        let at = Timestamp::from_second(at.as_second()).unwrap();
        let patch = json!({ "status": { "nextScheduledTime": at } });
        let api = self.api::<NodeImageBuild>();
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    /// Creates a resource and lets its first build succeed.
    pub async fn ready(&self, name: &str, more: Value) -> NodeImageBuildStatus {
        self.create(name, more).await;
        self.succeed(&self.job(name).await).await;
        self.until(name, "ready", |status| status.phase == Some(Phase::Ready)).await
    }

    /// The mirror as the source of releases.
    pub fn source(&self) -> Value {
        json!({
            "releaseManifestURL": format!("{}/releases/eks-a/manifest.yaml", self.mirror.url),
            "eksaBaseURL": self.mirror.url,
            "eksdBaseURL": self.mirror.url,
        })
    }

    /// A specification that takes its release from the mirror.
    fn spec(&self, more: &Value) -> Value {
        let mut spec = json!({
            "os": { "name": "ubuntu", "version": "22.04" },
            "releaseChannel": "1-31",
            "baremetal": {},
            "source": self.source(),
        });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    }

    pub async fn create(&self, name: &str, more: Value) -> NodeImageBuild {
        let build = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1",
            "kind": "NodeImageBuild",
            "metadata": { "name": name },
            "spec": self.spec(&more),
        });
        self.api().create(&PostParams::default(), &serde_json::from_value(build).unwrap()).await.unwrap()
    }

    pub async fn patch(&self, name: &str, patch: Value) -> NodeImageBuild {
        self.api().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap()
    }

    /// Waits until the resource's status is as expected.
    pub async fn until(
        &self,
        name: &str,
        what: &str,
        fits: impl Fn(&NodeImageBuildStatus) -> bool,
    ) -> NodeImageBuildStatus {
        let api = self.api::<NodeImageBuild>();
        let last = Mutex::new(None);
        let found = until(|| async {
            let build = api.get(name).await.unwrap();
            // A status of an older generation says nothing about what is waited for.
            let current = build.status.as_ref().is_some_and(|s| s.observed_generation == build.metadata.generation);
            let status = build.status.unwrap_or_default();
            *last.lock().unwrap() = Some(status.clone());
            (current && fits(&status)).then_some(status)
        });
        timeout(SOON, found).await.unwrap_or_else(|_| panic!("{name} is not {what}: {:#?}", last.lock().unwrap()))
    }

    /// Waits for the Job that the status names.
    pub async fn job(&self, name: &str) -> Job {
        let status = self.until(name, "building", |status| status.job_name.is_some()).await;
        self.api().get(&status.job_name.unwrap()).await.unwrap()
    }

    /// The build document that the Job's pod would read.
    pub async fn document(&self, job: &Job) -> BuildRequest {
        let secret: Secret = self.api().get(&job.name_any()).await.unwrap();
        serde_json::from_slice(&secret.data.unwrap()["build.json"].0).unwrap()
    }

    /// What the API server says to such a pod, without making it.
    pub async fn admit(&self, template: &Value) -> Result<(), String> {
        let pod = json!({ "metadata": { "generateName": "pod-" }, "spec": template["spec"] });
        let params = PostParams { dry_run: true, ..PostParams::default() };
        let created = self.api::<Pod>().create(&params, &serde_json::from_value(pod).unwrap()).await;
        created.map(drop).map_err(|error| error.to_string())
    }

    /// Sets the level of pod security in the namespace, and waits until the API server, which reads namespaces by a watch,
    /// goes by it.
    pub async fn enforce(&self, level: &str) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let labels = json!({ "metadata": { "labels": { "pod-security.kubernetes.io/enforce": level } } });
        namespaces.patch(&self.namespace, &PatchParams::default(), &Patch::Merge(labels)).await.unwrap();
        let container = json!({ "name": "pod", "image": "pod", "securityContext": { "privileged": true } });
        let privileged = json!({ "spec": { "containers": [container] } });
        let answer = || async {
            let goes_by_it = match self.admit(&privileged).await {
                Ok(()) => level == "privileged",
                Err(refusal) => refusal.contains(&format!("violates PodSecurity \"{level}:latest\"")),
            };
            goes_by_it.then_some(())
        };
        timeout(SOON, until(answer))
            .await
            .unwrap_or_else(|_| panic!("the API server does not go by the level {level}"));
    }

    /// The API server has no Job controller: this creates the pod it would create.
    pub async fn create_pod(&self, job: &Job, attempt: u32) -> kube::Result<Pod> {
        let template = job.spec.clone().unwrap().template;
        let mut metadata = template.metadata.unwrap_or_default();
        metadata.name = Some(format!("{}-{attempt}", job.name_any()));
        metadata.owner_references = Some(vec![kube::Resource::controller_owner_ref(job, &()).unwrap()]);
        let pod = Pod { metadata, spec: template.spec, status: None };
        self.api().create(&PostParams::default(), &pod).await
    }

    /// The kubelet's part: a state of the build container.
    pub async fn set_pod(&self, pod: &Pod, phase: &str, state: Value) -> Pod {
        let status = json!({ "status": {
            "phase": phase,
            "containerStatuses": [{
                "name": BUILD_CONTAINER, "image": "image", "imageID": "id", "ready": false, "restartCount": 0, "state": state,
            }],
        }});
        self.api().patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(status)).await.unwrap()
    }

    pub async fn run_pod(&self, pod: &Pod) {
        self.set_pod(pod, "Running", json!({ "running": { "startedAt": Timestamp::now() } })).await;
    }

    pub async fn end_pod(&self, pod: &Pod, exit_code: i32, message: &str) {
        let phase = if exit_code == 0 { "Succeeded" } else { "Failed" };
        self.set_pod(pod, phase, json!({ "terminated": { "exitCode": exit_code, "message": message } })).await;
    }

    /// The Job controller's part at the end.
    pub async fn end_job(&self, job: &Job, succeeded: bool, reason: &str) {
        let now = Timestamp::now();
        let api = self.api::<Job>();
        let before = api.get(&job.name_any()).await.unwrap().status.unwrap_or_default();
        let started = before.start_time.map_or(now, |time| time.0);
        let condition = |kind: &str| json!({ "type": kind, "status": "True", "reason": reason, "message": reason, "lastTransitionTime": now });
        let mut status =
            json!({ "startTime": started, "active": 0, "terminating": 0, "ready": 0, "uncountedTerminatedPods": {} });
        let more = if succeeded {
            json!({ "succeeded": 1, "completionTime": now, "conditions": [condition("SuccessCriteriaMet"), condition("Complete")] })
        } else {
            json!({ "failed": 1, "conditions": [condition("FailureTarget"), condition("Failed")] })
        };
        status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        api.patch_status(&job.name_any(), &PatchParams::default(), &Patch::Merge(json!({ "status": status })))
            .await
            .unwrap();
    }

    /// The whole life of a pod that publishes an image.
    pub async fn succeed(&self, job: &Job) -> BuildOutcome {
        let pod = self.create_pod(job, 0).await.unwrap();
        self.run_pod(&pod).await;
        let outcome = outcome(&self.document(job).await);
        self.end_pod(&pod, 0, &BuildReport::Succeeded(Box::new(outcome.clone())).to_termination_message()).await;
        self.end_job(job, true, "CompletionsReached").await;
        outcome
    }

    /// What was left to do of [`Self::succeed`] when it was interrupted.
    pub async fn finish(&self, job: &Job) {
        let pod: Pod = self.api().get(&format!("{}-0", job.name_any())).await.unwrap();
        if pod.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Succeeded") {
            let outcome = outcome(&self.document(job).await);
            self.end_pod(&pod, 0, &BuildReport::Succeeded(Box::new(outcome)).to_termination_message()).await;
        }
        let job: Job = self.api().get(&job.name_any()).await.unwrap();
        if job.status.as_ref().is_none_or(|status| status.completion_time.is_none()) {
            self.end_job(&job, true, "CompletionsReached").await;
        }
    }

    /// The whole life of a pod that fails for good.
    pub async fn fail(&self, job: &Job, failure: FailureReport) {
        let pod = self.create_pod(job, 0).await.unwrap();
        self.run_pod(&pod).await;
        let code = failure.class.exit_code().into();
        self.end_pod(&pod, code, &BuildReport::Failed(failure).to_termination_message()).await;
        self.end_job(job, false, "PodFailurePolicy").await;
    }

    /// Deletes a pod as the garbage collector does, at once.
    pub async fn remove_pods(&self) {
        self.api::<Pod>()
            .delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default())
            .await
            .unwrap();
    }

    /// Reasons and notes of the events about the resource.
    pub async fn events(&self, name: &str) -> Vec<(String, String)> {
        let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let events = self.api::<Event>().list(&about).await.unwrap();
        events.items.into_iter().map(|e| (e.reason.unwrap_or_default(), e.message.unwrap_or_default())).collect()
    }

    /// Waits for an event and gives its note.
    pub async fn event(&self, name: &str, reason: &str) -> String {
        let found = until(|| async {
            self.events(name).await.into_iter().find(|(found, _)| found == reason).map(|(_, note)| note)
        });
        timeout(SOON, found).await.unwrap_or_else(|_| panic!("no event {reason} about {name}"))
    }

    /// Waits until the object is gone.
    pub async fn until_gone<K>(&self, name: &str)
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api = self.api::<K>();
        let gone = until(|| async { api.get_opt(name).await.unwrap().is_none().then_some(()) });
        timeout(SOON, gone).await.unwrap_or_else(|_| panic!("{name} is still there"));
    }
}

/// What goes from an operator to the API server. It may break off for good after some writes, which is what the operator's
/// death looks like from there.
#[derive(Clone, Default)]
pub struct Traffic(Arc<TrafficInner>);

#[derive(Default)]
struct TrafficInner {
    writes: Mutex<Vec<String>>,
    last: Option<usize>,
    died: Notify,
    cut: AtomicBool,
    refused: AtomicUsize,
}

impl Traffic {
    pub fn dying_after(writes: usize) -> Self {
        Self(Arc::new(TrafficInner { last: Some(writes), ..TrafficInner::default() }))
    }

    /// An operator's client whose requests are counted.
    pub async fn client(&self) -> Client {
        self.count(apiserver::shared().await.config_of(apiserver::RELEASE, apiserver::RELEASE).await)
    }

    /// The same for an administrator, on behalf of a user if one is given.
    pub async fn client_as(&self, user: Option<&str>) -> Client {
        let mut config = apiserver::shared().await.config().await;
        config.auth_info.impersonate = user.map(ToOwned::to_owned);
        self.count(config)
    }

    fn count(&self, config: Config) -> Client {
        let traffic = self.clone();
        let gate = tower::filter::FilterLayer::new(move |request: Request<KubeBody>| traffic.pass(request));
        ClientBuilder::try_from(config).unwrap().with_layer(&gate).build()
    }

    /// Writes so far, without those of events.
    pub fn writes(&self) -> Vec<String> {
        self.0.writes.lock().unwrap().clone()
    }

    /// From now on nothing gets through.
    pub fn cut(&self) {
        self.0.cut.store(true, Ordering::Relaxed);
    }

    /// Requests that did not get through since the network was cut.
    pub fn refused(&self) -> usize {
        self.0.refused.load(Ordering::Relaxed)
    }

    pub fn mend(&self) {
        self.0.cut.store(false, Ordering::Relaxed);
    }

    pub async fn died(&self) {
        self.0.died.notified().await;
    }

    fn pass(&self, request: Request<KubeBody>) -> Result<Request<KubeBody>, tower::BoxError> {
        if self.0.cut.load(Ordering::Relaxed) {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
            return Err("the network is cut".into());
        }
        let mut writes = self.0.writes.lock().unwrap();
        if self.0.last.is_some_and(|last| writes.len() >= last) {
            self.0.died.notify_one();
            return Err("the operator is dead".into());
        }
        let path = request.uri().path().to_owned();
        if request.method() != Method::GET && !path.starts_with("/apis/events.k8s.io/") {
            writes.push(format!("{} {path}", request.method()));
        }
        Ok(request)
    }
}

/// Asks again until there is an answer.
pub async fn until<T, F: Future<Output = Option<T>>>(ask: impl Fn() -> F) -> T {
    let mut again = interval(Duration::from_millis(25));
    loop {
        again.tick().await;
        if let Some(answer) = ask().await {
            return answer;
        }
    }
}

impl Drop for Harness {
    /// Whatever a test is about, its operator must never want more than the chart gives it.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let forbidden = |entry: &Value| {
            entry["objectRef"]["namespace"] == *self.namespace
                && entry["annotations"]["authorization.k8s.io/decision"] == "forbid"
        };
        let refused: Vec<_> = self.audit().into_iter().filter(forbidden).collect();
        assert!(refused.is_empty(), "the chart's role does not allow {refused:#?}");
    }
}

/// The API server of a test.
enum Server {
    Shared(&'static ApiServer),
    Own(Arc<ApiServer>),
}

impl std::ops::Deref for Server {
    type Target = ApiServer;

    fn deref(&self) -> &ApiServer {
        match self {
            Self::Shared(server) => server,
            Self::Own(server) => server,
        }
    }
}

/// What a build of this document would report.
pub fn outcome(request: &BuildRequest) -> BuildOutcome {
    let name = format!("{}.gz", request.image_stem());
    let directory = format!("{}/{}/{}", request.identity.namespace, request.identity.name, request.identity.build_id);
    support::outcome::outcome(name, &directory)
}

/// Status and reason of a condition.
pub fn condition<'s>(status: &'s NodeImageBuildStatus, kind: &str) -> Option<(&'s str, &'s str)> {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind)?;
    Some((&found.status, &found.reason))
}

/// Message of a condition.
pub fn message<'s>(status: &'s NodeImageBuildStatus, kind: &str) -> &'s str {
    status.conditions.iter().find(|condition| condition.type_ == kind).map_or("", |condition| &condition.message)
}
