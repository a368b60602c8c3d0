//! What of all that the watches bring a pass has to begin for: a pass asks the API server for everything that a build has.
//!
//! Neither what Jobs and pods say on their way to something that a pass can do anything about, nor, when the operator begins, a
//! build that the first lists show to be at rest. Whatever is held back is only ever a reason to look, never something to act
//! on.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{Api, Client, Resource, ResourceExt, api::ListParams, core::PartialObjectMeta};
use kube_runtime::watcher::{self, Event};

use super::{
    BuildRef, build_of,
    cleanup::Outside,
    job_state,
    observe::{LIST_RETRY, each_page, observed_job},
    plan::{Left, Requeue, at_rest},
    scoped,
    watched::Lean,
};
use crate::api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL, NodeImageBuild};

/// What decides about what the watches bring.
#[derive(Debug)]
pub struct News {
    /// How long the Job of a finished build stays.
    job_ttl: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Until the first list of builds has come to its end.
    first: Option<First>,
    /// Builds at rest that no pass has begun for, and when to look at them.
    resting: HashMap<BuildRef, Requeue>,
    /// Builds whose Jobs should have a pod and have none.
    podless: HashSet<BuildRef>,
}

impl News {
    pub(super) fn new(first: First, job_ttl: Duration) -> Self {
        Self { job_ttl, inner: Mutex::new(Inner { first: Some(first), ..Inner::default() }) }
    }

    /// The first list brings this build: it rests if nothing is to be done about it.
    pub(super) fn listed(&self, build: &Arc<NodeImageBuild>) {
        let mut inner = self.lock();
        let Inner { first: Some(first), resting, podless: _ } = &mut *inner else { return };
        let reference = BuildRef::of(build.as_ref());
        if let Some(requeue) = first.rest(&reference, build, self.job_ttl, Timestamp::now()) {
            resting.insert(reference, requeue);
        }
    }

    /// The first list is complete.
    pub(super) fn all_listed(&self) {
        self.lock().first = None;
    }

    /// Something was said about the build: it does not rest.
    pub(super) fn disturb(&self, build: &BuildRef) {
        let mut inner = self.lock();
        inner.resting.remove(build);
        if let Some(first) = &mut inner.first {
            first.0.insert(build.clone(), Children::Busy);
        }
    }

    /// When to look at a build that rests; a pass that begins now may end at once. Once: the next one begins for a reason.
    pub(super) fn rests(&self, build: &BuildRef) -> Option<Requeue> {
        self.lock().resting.remove(build)
    }

    /// Whether a Job of the build should have a pod and has none.
    pub(super) fn lacks_pod(&self, build: &BuildRef, lacks: bool) {
        let mut inner = self.lock();
        if lacks {
            inner.podless.insert(build.clone());
        } else {
            inner.podless.remove(build);
        }
    }

    /// The resource is gone.
    pub(super) fn forget(&self, build: &BuildRef) {
        self.disturb(build);
        self.lacks_pod(build, false);
    }

    /// The Jobs among the events that a pass begins for.
    pub(super) fn job(&self, event: Event<Lean<Job>>) -> Option<Lean<Job>> {
        let (change, job) = change(event)?;
        self.disturb(&build_of(&job)?);
        (change != Change::Made || job_state::job_is_news(&job.0)).then_some(job)
    }

    /// The pods among the events that a pass begins for.
    pub(super) fn pod(&self, event: Event<Lean<Pod>>) -> Option<Lean<Pod>> {
        let (change, pod) = change(event)?;
        let build = build_of(&pod)?;
        self.disturb(&build);
        let news = match change {
            Change::Made => job_state::pod_is_news(&pod.0) || self.lock().podless.contains(&build),
            Change::Gone => !job_state::has_ended(&pod.0),
            Change::Unknown => true,
        };
        news.then_some(pod)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What happened to an object.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Change {
    /// It was created or written.
    Made,
    Gone,
    /// A list that is read anew after a gap may stand for more than it shows.
    Unknown,
}

fn change<K>(event: Event<K>) -> Option<(Change, K)> {
    match event {
        Event::Apply(object) => Some((Change::Made, object)),
        Event::Delete(object) => Some((Change::Gone, object)),
        Event::InitApply(object) => Some((Change::Unknown, object)),
        Event::Init | Event::InitDone => None,
    }
}

/// What the first lists show of the builds' Jobs, pods and Secrets.
#[derive(Debug, Default)]
pub(super) struct First(HashMap<BuildRef, Children>);

#[derive(Debug)]
enum Children {
    /// Only a pass can tell.
    Busy,
    /// All are of builds that ended.
    Ended {
        /// Uid of the resource that owns them.
        owner: String,
        left: Left,
    },
}

impl First {
    /// Reads the first list of each watch, which then goes on from there without a gap, and lists the Secrets. Waits for an
    /// API server that is away.
    pub(super) async fn read(
        jobs: &mut (impl Stream<Item = watcher::Result<Event<Lean<Job>>>> + Unpin),
        pods: &mut (impl Stream<Item = watcher::Result<Event<Lean<Pod>>>> + Unpin),
        client: &Client,
        namespace: Option<&str>,
    ) -> Self {
        let (mut first, mut live) = (Self::default(), HashSet::new());
        tokio::join!(
            first_list(jobs, |job| match job {
                Some(Lean(job)) => first.add_job(&job),
                None => first.0.clear(),
            }),
            first_list(pods, |pod| match pod {
                Some(pod) if !job_state::has_ended(&pod.0) => live.extend(build_of(&pod)),
                Some(_) => {}
                None => live.clear(),
            })
        );
        let secrets = scoped::<PartialObjectMeta<Secret>>(client, namespace);
        while let Err(error) = first.add_secrets(&secrets).await {
            tracing::warn!(%error, "can not list the Secrets of builds; it is tried again");
            tokio::time::sleep(LIST_RETRY).await;
        }
        first.0.extend(live.into_iter().map(|build| (build, Children::Busy)));
        first
    }

    fn add_job(&mut self, job: &Job) {
        // Without pods: of a Job that ended it is known whether it ended well, and when.
        let observed = observed_job(job, &[]).filter(|observed| !observed.deleting && observed.state.is_finished());
        match observed {
            Some(observed) => self.add(job, |left| left.jobs.push(observed)),
            None => self.add_busy(job),
        }
    }

    async fn add_secrets(&mut self, api: &Api<PartialObjectMeta<Secret>>) -> kube::Result<()> {
        each_page(api, ListParams::default().labels(NAME_LABEL), |secret| {
            let outside = Outside::read(&[], &[], &[&secret]);
            match secret.labels().get(BUILD_ID_LABEL) {
                Some(id) => self.add(&secret, |left| {
                    left.secrets.insert(id.clone());
                    left.outside.builds.extend(outside.builds);
                }),
                None => self.add_busy(&secret),
            }
        })
        .await
    }

    fn add_busy(&mut self, object: &impl Resource) {
        if let Some(build) = build_of(object) {
            self.0.insert(build, Children::Busy);
        }
    }

    /// Adds an object that rests, unless it belongs to something else than the others.
    fn add(&mut self, object: &impl Resource, add: impl FnOnce(&mut Left)) {
        let Some(build) = build_of(object) else { return };
        let owner = object.owner_references().first().map(|owner| owner.uid.clone()).unwrap_or_default();
        let children = self.0.entry(build);
        let children = children.or_insert_with(|| Children::Ended { owner: owner.clone(), left: Left::default() });
        match children {
            Children::Ended { owner: known, left } if *known == owner => add(left),
            Children::Ended { .. } | Children::Busy => *children = Children::Busy,
        }
    }

    fn rest(
        &mut self,
        reference: &BuildRef,
        build: &Arc<NodeImageBuild>,
        job_ttl: Duration,
        now: Timestamp,
    ) -> Option<Requeue> {
        // A list that broke off brings it once more; then only a pass can tell.
        let left = match self.0.insert(reference.clone(), Children::Busy) {
            None => Left::default(),
            Some(Children::Ended { owner, left }) if build.uid().as_ref() == Some(&owner) => left,
            Some(Children::Ended { .. } | Children::Busy) => return None,
        };
        at_rest(Arc::clone(build), left, job_ttl, now)
    }
}

/// Reads what a watch begins with. Nothing is handed over where it begins anew.
async fn first_list<K>(
    watch: &mut (impl Stream<Item = watcher::Result<Event<K>>> + Unpin),
    mut take: impl FnMut(Option<K>),
) {
    while let Some(event) = watch.next().await {
        match event {
            Ok(Event::InitApply(object) | Event::Apply(object)) => take(Some(object)),
            Ok(Event::Init) => take(None),
            Ok(Event::Delete(_)) => {}
            Ok(Event::InitDone) => return,
            Err(error) => {
                tracing::warn!(%error, "can not list what there is; it is tried again");
                tokio::time::sleep(LIST_RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::v1alpha1::FINALIZER;

    const TTL: Duration = Duration::from_secs(3600);

    /// A build that is suspended, of which nothing but what the lists show can call for anything.
    fn build() -> Arc<NodeImageBuild> {
        let condition = json!({
            "type": "Ready", "status": "False", "reason": "Suspended", "observedGeneration": 1,
            "message": "spec.suspend is true: nothing is built until it is false",
            "lastTransitionTime": "2026-11-27T00:00:00Z",
        });
        let build = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
            "metadata": {
                "name": "golden", "namespace": "images", "uid": "uid", "generation": 1, "finalizers": [FINALIZER],
            },
            "spec": {
                "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {}, "suspend": true,
            },
            "status": {
                "observedGeneration": 1, "phase": "Suspended", "os": "ubuntu 22.04", "provider": "baremetal",
                "conditions": [condition], "history": [{ "buildID": "a", "result": "Failed" }],
            },
        });
        Arc::new(serde_json::from_value(build).unwrap())
    }

    /// An object of that build.
    fn object<K: DeserializeOwned>(owner: &str, more: &Value) -> K {
        let owner = json!({ "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild", "name": "golden", "uid": owner });
        let mut object = json!({ "metadata": {
            "name": "golden-a", "namespace": "images", "ownerReferences": [owner],
            "labels": { NAME_LABEL: "golden", BUILD_ID_LABEL: "a" },
        }});
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(object).unwrap()
    }

    fn ended_job() -> Value {
        json!({ "status": { "conditions": [{ "type": "Failed", "status": "True", "lastTransitionTime": Timestamp::now() }] } })
    }

    fn rests(first: First) -> bool {
        let news = News::new(first, TTL);
        news.listed(&build());
        news.rests(&BuildRef::of(build().as_ref())).is_some()
    }

    #[test]
    fn only_builds_of_which_all_is_over_rest() {
        assert!(rests(First::default()));
        let with = |objects: &[(&str, Value)]| {
            let mut first = First::default();
            for (owner, more) in objects {
                first.add_job(&object(owner, more));
            }
            rests(first)
        };
        assert!(with(&[("uid", ended_job())]));
        assert!(!with(&[("uid", json!({}))]), "a Job that runs");
        assert!(!with(&[("another", ended_job())]), "a Job of a resource that had the same name");
        assert!(!with(&[("uid", ended_job()), ("another", ended_job())]));
    }

    #[test]
    fn what_happens_while_builds_are_listed_is_not_missed() {
        let (news, build) = (News::new(First::default(), TTL), build());
        let reference = BuildRef::of(build.as_ref());
        news.disturb(&reference);
        news.listed(&build);
        assert_eq!(news.rests(&reference), None, "it happened before");
        let news = News::new(First::default(), TTL);
        news.listed(&build);
        assert!(news.job(Event::Apply(Lean(object("uid", &json!({}))))).is_none());
        assert_eq!(news.rests(&reference), None, "it happened after");
        let news = News::new(First::default(), TTL);
        news.listed(&build);
        news.all_listed();
        assert!(news.rests(&reference).is_some());
        assert_eq!(news.rests(&reference), None, "the second time there is a reason");
        news.listed(&build);
        assert_eq!(news.rests(&reference), None, "a list that is read anew says nothing of Jobs and pods");
    }

    #[test]
    fn a_pod_that_was_waited_for_is_news_and_so_is_all_after_a_gap() {
        let news = News::new(First::default(), TTL);
        let pod = |phase: &str| Lean(object::<Pod>("job", &json!({ "status": { "phase": phase } })));
        assert!(news.pod(Event::Apply(pod("Pending"))).is_none());
        news.lacks_pod(&BuildRef::of(build().as_ref()), true);
        assert!(news.pod(Event::Apply(pod("Pending"))).is_some());
        news.lacks_pod(&BuildRef::of(build().as_ref()), false);
        assert!(news.pod(Event::Apply(pod("Pending"))).is_none());
        assert!(news.pod(Event::InitApply(pod("Pending"))).is_some());
        assert!(news.pod(Event::Delete(pod("Pending"))).is_some());
        assert!(news.pod(Event::Delete(pod("Succeeded"))).is_none());
    }

    #[tokio::test]
    async fn a_first_list_that_breaks_off_begins_anew() {
        let error = || watcher::Error::NoResourceVersion;
        let events =
            [Ok(Event::Init), Ok(Event::InitApply(1)), Ok(Event::Init), Ok(Event::InitApply(2)), Ok(Event::InitDone)];
        let mut seen = vec![];
        let mut watch = stream::iter(events);
        first_list(&mut watch, |one| match one {
            Some(one) => seen.push(one),
            None => seen.clear(),
        })
        .await;
        assert_eq!(seen, [2]);
        let mut broken = stream::iter([Err(error()), Ok(Event::<u8>::InitDone)]);
        tokio::time::pause();
        first_list(&mut broken, drop).await;
    }
}
