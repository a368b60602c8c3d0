//! The parts of Kubernetes that the API server lacks, Job controller and kubelet, whose builds end at once; and what they
//! and the watches saw.

use std::{borrow::Cow, collections::HashSet, time::Duration};

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    core::{NamespaceResourceScope, PartialObjectMeta, Request},
};
use kube_runtime::{WatchStreamExt, watcher};
use node_image_builder::{
    api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL, NodeImageBuild},
    contract::{BUILD_CONTAINER, BuildOutcome, BuildReport},
};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokio::{
    sync::{OnceCell, mpsc, watch},
    task::JoinSet,
    time::timeout,
};

use crate::outcome;

/// Jobs that are ended at the same time.
const CONCURRENCY: usize = 8;

/// The cluster around the operator under test.
pub struct Cluster {
    /// Jobs that were created.
    jobs: watch::Sender<usize>,
    /// Builds whose status is `Ready`.
    ready: watch::Sender<usize>,
    /// Whether Jobs are ended.
    works: watch::Sender<bool>,
    /// Ends with this.
    _tasks: JoinSet<()>,
}

impl Cluster {
    pub fn start(client: &Client) -> Self {
        let (jobs, ready, works) =
            (watch::Sender::default(), watch::Sender::default(), watch::Sender::<bool>::new(true));
        let (created, to_end) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(see_jobs(client.clone(), jobs.clone(), created));
        tasks.spawn(see_builds(client.clone(), ready.clone()));
        tasks.spawn(end_jobs(client.clone(), works.subscribe(), to_end));
        Self { jobs, ready, works, _tasks: tasks }
    }

    /// From now on Jobs stay as they are, or end.
    pub fn work(&self, works: bool) {
        self.works.send_replace(works);
    }

    /// Waits for so many Jobs in all.
    pub async fn until_jobs(&self, count: usize, limit: Duration) {
        until(&self.jobs, count, "Jobs", limit).await;
    }

    /// Waits for so many builds that are `Ready`.
    pub async fn until_ready(&self, count: usize, limit: Duration) {
        until(&self.ready, count, "builds that are Ready", limit).await;
    }
}

async fn until(seen: &watch::Sender<usize>, count: usize, what: &str, limit: Duration) {
    let mut seen = seen.subscribe();
    let reached = timeout(limit, seen.wait_for(|seen| *seen >= count)).await.is_ok();
    assert!(reached, "{} of {count} {what} after {limit:?}", *seen.borrow());
}

type JobMeta = PartialObjectMeta<Job>;

async fn see_jobs(client: Client, seen: watch::Sender<usize>, created: mpsc::UnboundedSender<JobMeta>) {
    let watched = watcher(Api::<JobMeta>::all(client), watcher::Config::default().labels(NAME_LABEL));
    let mut jobs = watched.default_backoff().applied_objects().boxed();
    let mut known = HashSet::new();
    while let Some(job) = jobs.try_next().await.unwrap() {
        if known.insert(job.uid().unwrap()) {
            seen.send_modify(|seen| *seen += 1);
            // Nobody creates pods any more when the benchmark ends.
            if created.send(job).is_err() {
                return;
            }
        }
    }
}

/// All that is looked at of a build: this program shares the processors with what it measures.
#[derive(Clone, Debug)]
struct Seen {
    metadata: ObjectMeta,
    ready: bool,
}

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Parts {
            metadata: Metadata,
            #[serde(default)]
            status: Status,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            name: String,
            uid: String,
            resource_version: String,
        }
        #[derive(Default, Deserialize)]
        struct Status {
            #[serde(default)]
            phase: String,
        }
        let Parts { metadata, status } = Parts::deserialize(deserializer)?;
        let Metadata { name, uid, resource_version } = metadata;
        let metadata = ObjectMeta {
            name: Some(name),
            uid: Some(uid),
            resource_version: Some(resource_version),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, ready: status.phase == "Ready" })
    }
}

impl Resource for Seen {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        NodeImageBuild::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        NodeImageBuild::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        NodeImageBuild::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        NodeImageBuild::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

async fn see_builds(client: Client, seen: watch::Sender<usize>) {
    let watched = watcher(Api::<Seen>::all(client), watcher::Config::default());
    let mut builds = watched.default_backoff().applied_objects().boxed();
    let mut ready = HashSet::new();
    while let Some(build) = builds.try_next().await.unwrap() {
        if build.ready {
            ready.insert(build.uid().unwrap());
            seen.send_replace(ready.len());
        }
    }
}

async fn end_jobs(client: Client, works: watch::Receiver<bool>, created: mpsc::UnboundedReceiver<JobMeta>) {
    let created = futures::stream::unfold(created, |mut created| async { Some((created.recv().await?, created)) });
    let template = OnceCell::new();
    created
        .for_each_concurrent(CONCURRENCY, |job| {
            let (client, mut works, template) = (client.clone(), works.clone(), &template);
            async move {
                works.wait_for(|works| *works).await.unwrap();
                let template = template.get_or_init(|| PodTemplate::of(&client, &job)).await;
                end(&client, &job, template).await;
            }
        })
        .await;
}

/// A pod as text, with these in place of what is another one in each.
struct PodTemplate(String);

const JOB: &str = "@job@";
const JOB_UID: &str = "@uid@";
const BUILD: &str = "@build@";
const BUILD_ID: &str = "@id@";

impl PodTemplate {
    /// As the Job controller makes one for this Job.
    async fn of(client: &Client, job: &JobMeta) -> Self {
        let (name, uid) = (job.name_any(), job.uid().unwrap());
        let jobs: Api<Job> = Api::namespaced(client.clone(), &job.namespace().unwrap());
        let job = jobs.get(&name).await.unwrap();
        let owner = job.controller_owner_ref(&()).unwrap();
        let template = job.spec.unwrap().template;
        let mut metadata = template.metadata.unwrap_or_default();
        metadata.name = Some(format!("{name}-0"));
        metadata.owner_references = Some(vec![owner]);
        let labels = metadata.labels.as_mut().unwrap();
        labels.insert(NAME_LABEL.to_owned(), BUILD.to_owned());
        labels.insert(BUILD_ID_LABEL.to_owned(), BUILD_ID.to_owned());
        let pod = serde_json::to_string(&Pod { metadata, spec: template.spec, status: None }).unwrap();
        Self(pod.replace(&name, JOB).replace(&uid, JOB_UID))
    }

    fn pod(&self, job: &JobMeta) -> String {
        let text = self.0.replace(JOB, &job.name_any()).replace(JOB_UID, &job.uid().unwrap());
        text.replace(BUILD, &job.labels()[NAME_LABEL]).replace(BUILD_ID, &job.labels()[BUILD_ID_LABEL])
    }
}

/// The whole life of a Job whose pod publishes an image.
async fn end(client: &Client, job: &JobMeta, template: &PodTemplate) {
    let (namespace, name) = (job.namespace().unwrap(), job.name_any());
    let (pods, jobs) = (Pod::url_path(&(), Some(&namespace)), Job::url_path(&(), Some(&namespace)));
    let pod_name = format!("{name}-0");
    send(client, Request::new(&pods).create(&PostParams::default(), template.pod(job).into_bytes())).await;
    let message = BuildReport::Succeeded(Box::new(outcome(job))).to_termination_message();
    let state = json!({ "terminated": { "exitCode": 0, "message": message } });
    let status = json!({ "status": {
        "phase": "Succeeded",
        "containerStatuses": [{
            "name": BUILD_CONTAINER, "image": "image", "imageID": "id", "ready": false, "restartCount": 0, "state": state,
        }],
    }});
    set_status(client, &pods, &pod_name, status).await;

    let now = Timestamp::now();
    let condition = |kind: &str| json!({ "type": kind, "status": "True", "reason": "CompletionsReached", "message": "Reached", "lastTransitionTime": now });
    let status = json!({ "status": {
        "startTime": now, "completionTime": now, "succeeded": 1, "active": 0, "terminating": 0, "ready": 0,
        "uncountedTerminatedPods": {}, "conditions": [condition("SuccessCriteriaMet"), condition("Complete")],
    }});
    set_status(client, &jobs, &name, status).await;
}

async fn set_status(client: &Client, path: &str, name: &str, status: Value) {
    let patch = Patch::Merge(status);
    send(client, Request::new(path).patch_subresource("status", name, &PatchParams::default(), &patch)).await;
}

/// Sends a request and does not read what the answer says.
pub async fn send(client: &Client, request: Result<axum::http::Request<Vec<u8>>, kube::core::request::Error>) {
    client.request_text(request.unwrap()).await.unwrap();
}

fn outcome(job: &JobMeta) -> BuildOutcome {
    let directory =
        format!("{}/{}/{}", job.namespace().unwrap(), job.labels()[NAME_LABEL], job.labels()[BUILD_ID_LABEL]);
    outcome::outcome("ubuntu-2204-kube-1-31.gz".to_owned(), &directory)
}
