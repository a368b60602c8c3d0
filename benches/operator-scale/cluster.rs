//! The parts of Kubernetes that the API server lacks, Job controller and kubelet, whose builds end at once; and what they
//! and the watches saw.

use std::{collections::HashSet, time::Duration};

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use kube_runtime::{WatchStreamExt, watcher};
use node_image_builder::{
    api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL, NodeImageBuild, Phase},
    contract::{BUILD_CONTAINER, BuildOutcome, BuildReport},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
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

async fn see_jobs(client: Client, seen: watch::Sender<usize>, created: mpsc::UnboundedSender<Job>) {
    let watched = watcher(Api::<Job>::all(client), watcher::Config::default().labels(NAME_LABEL));
    let mut jobs = watched.default_backoff().applied_objects().boxed();
    let mut known = HashSet::new();
    while let Some(job) = jobs.try_next().await.unwrap() {
        if known.insert(job.uid().unwrap()) {
            seen.send_modify(|seen| *seen += 1);
            created.send(job).unwrap();
        }
    }
}

async fn see_builds(client: Client, seen: watch::Sender<usize>) {
    let watched = watcher(Api::<NodeImageBuild>::all(client), watcher::Config::default());
    let mut builds = watched.default_backoff().applied_objects().boxed();
    let mut ready = HashSet::new();
    while let Some(build) = builds.try_next().await.unwrap() {
        if build.status.as_ref().is_some_and(|status| status.phase == Some(Phase::Ready)) {
            ready.insert(build.uid().unwrap());
            seen.send_replace(ready.len());
        }
    }
}

async fn end_jobs(client: Client, works: watch::Receiver<bool>, created: mpsc::UnboundedReceiver<Job>) {
    let created = futures::stream::unfold(created, |mut created| async { Some((created.recv().await?, created)) });
    created
        .for_each_concurrent(CONCURRENCY, |job| {
            let (client, mut works) = (client.clone(), works.clone());
            async move {
                works.wait_for(|works| *works).await.unwrap();
                end(&client, &job).await;
            }
        })
        .await;
}

/// The whole life of a Job whose pod publishes an image.
async fn end(client: &Client, job: &Job) {
    let namespace = job.namespace().unwrap();
    let template = job.spec.clone().unwrap().template;
    let mut metadata = template.metadata.unwrap_or_default();
    let pod_name = format!("{}-0", job.name_any());
    metadata.name = Some(pod_name.clone());
    metadata.owner_references = job.controller_owner_ref(&()).map(|owner| vec![owner]);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let pod = Pod { metadata, spec: template.spec, status: None };
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let message = BuildReport::Succeeded(Box::new(outcome(job))).to_termination_message();
    let state = json!({ "terminated": { "exitCode": 0, "message": message } });
    let status = json!({ "status": {
        "phase": "Succeeded",
        "containerStatuses": [{
            "name": BUILD_CONTAINER, "image": "image", "imageID": "id", "ready": false, "restartCount": 0, "state": state,
        }],
    }});
    pods.patch_status(&pod_name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();

    let now = Timestamp::now();
    let condition = |kind: &str| json!({ "type": kind, "status": "True", "reason": "CompletionsReached", "message": "Reached", "lastTransitionTime": now });
    let status = json!({ "status": {
        "startTime": now, "completionTime": now, "succeeded": 1, "active": 0, "terminating": 0, "ready": 0,
        "uncountedTerminatedPods": {}, "conditions": [condition("SuccessCriteriaMet"), condition("Complete")],
    }});
    let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace);
    jobs.patch_status(&job.name_any(), &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
}

fn outcome(job: &Job) -> BuildOutcome {
    let directory =
        format!("{}/{}/{}", job.namespace().unwrap(), job.labels()[NAME_LABEL], job.labels()[BUILD_ID_LABEL]);
    outcome::outcome("ubuntu-2204-kube-1-31.gz".to_owned(), &directory)
}
