//! Reads everything that the plan needs. All reads are here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Event, Pod, Secret},
};
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    core::{ApiResource, DynamicObject, PartialObjectMeta},
};
use serde::de::DeserializeOwned;

use super::{
    BuildRef, INPUTS_DIGEST, PAGE, RELEASE, RUN_DIGEST, SPEC_DIGEST, TRIGGER,
    cleanup::Outside,
    context::Context,
    error::{Error, api_status},
    job_state::{self, Blocker, JobState, PodState},
    plan::{Inputs, Observed, ObservedJob},
    queue::{Queue, Standing, server},
    rebuild::{self, BaseNow, Due, Found},
    references::{self, Lookup, ObjectKind, Reference, Use, references},
    resources::object_name,
    retention::{GROUP, KINDS, Named, Usage, VERSION, surplus},
    scoped,
    status::{condition, release_status},
    validate::{self, Refusal, Wish, wish},
    watched::{Guarded, Lean, is_new},
};
use crate::{
    api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL, NodeImageBuild, Phase, REBUILD_ANNOTATION, conditions::RECONCILING},
    contract::{Archive, Base, BaseChecksum, Classified},
    error::Chain,
    release::{ReleaseError, ReleaseQuery},
};

/// Wait before a list that failed is asked for again.
pub(super) const LIST_RETRY: Duration = Duration::from_secs(2);

/// Longest time for reading the release documents, with all their redirects and silences.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Puts all builds that run or wait into the queue, so that the first pass after a start already knows them. Waits for an
/// API server that is away.
pub(super) async fn fill(queue: &Queue, client: &Client, namespace: Option<&str>) {
    if queue.limits().is_none() {
        return;
    }
    while let Err(error) = try_to_fill(queue, client, namespace).await {
        tracing::warn!(%error, "can not list the builds that run and wait; it is tried again");
        tokio::time::sleep(LIST_RETRY).await;
    }
}

async fn try_to_fill(queue: &Queue, client: &Client, namespace: Option<&str>) -> kube::Result<()> {
    let mut servers = BTreeMap::new();
    each_page(&scoped::<Guarded>(client, namespace), ListParams::default(), |object| {
        let Ok(build) = object.0 else { return };
        let reference = BuildRef::of(&build);
        let server = server(&build.spec);
        if let (Some(status), false) = (&build.status, build.spec.suspend)
            && status.phase == Some(Phase::Queued)
            && let Some(reconciling) = condition(status, RECONCILING)
        {
            let since = reconciling.last_transition_time.0;
            queue.seed(reference.clone(), Standing::Wants { server: server.clone(), since, replaces: false });
        }
        servers.insert(reference, server);
    })
    .await?;
    each_page(&scoped::<Lean<Job>>(client, namespace), ListParams::default().labels(NAME_LABEL), |Lean(job)| {
        let active = job.metadata.deletion_timestamp.is_none() && !job_state::read(&job, &[]).is_finished();
        if let (true, Some(name)) = (active, job.labels().get(NAME_LABEL)) {
            let build = BuildRef { namespace: job.namespace().unwrap_or_default(), name: name.clone() };
            let server = servers.get(&build).cloned().flatten();
            queue.seed(build, Standing::Builds { server });
        }
    })
    .await
}

/// Hands over every object of a list without holding all of them.
pub(super) async fn each_page<K>(api: &Api<K>, mut params: ListParams, mut take: impl FnMut(K)) -> kube::Result<()>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    params.limit = Some(PAGE);
    loop {
        let page = api.list(&params).await?;
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        page.items.into_iter().for_each(&mut take);
        if params.continue_token.is_none() {
            return Ok(());
        }
    }
}

/// The objects of a build in the cluster.
pub(super) async fn observe(build: Arc<NodeImageBuild>, context: &Context, now: Timestamp) -> Result<Observed, Error> {
    let namespace = build.namespace().unwrap_or_default();
    let name = build.name_any();
    let uid = build.uid().unwrap_or_default();
    let Children { jobs, pods, secrets } =
        if is_new(&build) { Children::default() } else { children(&namespace, &name, context).await? };
    let owned = |owners: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference]| {
        owners.iter().any(|owner| owner.uid == uid)
    };
    let mut observed_jobs: Vec<ObservedJob> =
        jobs.iter().filter(|job| owned(job.owner_references())).filter_map(|job| observed_job(job, &pods)).collect();

    let mut pod_refusals = BTreeMap::new();
    for job in &observed_jobs {
        if job.lacks_pod(now)
            && let Some(message) = pod_refusal(context, &namespace, &name, job, &jobs).await?
        {
            pod_refusals.insert(job.build_id.clone(), message);
        }
    }
    for job in &mut observed_jobs {
        if let JobState::Active { pod: PodState::Pending { pod, blocker, user_namespace: true, .. }, .. } =
            &mut job.state
        {
            if !context.settings.placement.user_namespaces {
                job.outdated = true;
            } else if blocker.is_none() {
                *blocker = no_user_namespace(context, &namespace, &pods, pod).await?;
            }
        }
    }
    let running = observed_jobs.iter().filter(|job| !job.deleting).find_map(|job| match &job.state {
        JobState::Active { pod: PodState::Running { pod }, .. } => Some(pod),
        _ => None,
    });
    Ok(Observed {
        wish: wish(&build),
        progress: running.and_then(|pod| context.followers.latest(&uid, pod)),
        secrets: secrets
            .iter()
            .filter(|secret| owned(secret.owner_references()))
            .filter_map(|secret: &PartialObjectMeta<Secret>| secret.labels().get(BUILD_ID_LABEL).cloned())
            .collect(),
        outside: Outside::read(
            &jobs.iter().filter(|job| owned(job.owner_references())).collect::<Vec<_>>(),
            &pods,
            &secrets.iter().filter(|secret| owned(secret.owner_references())).collect::<Vec<_>>(),
        ),
        live_pods: live_pods(&pods),
        jobs: observed_jobs,
        pod_refusals,
        usage: usage(&build, context).await?,
        manifest_changed: follow_release(&build, context),
        build,
    })
}

/// Objects that carry the name of a build.
#[derive(Default)]
struct Children {
    jobs: Vec<Job>,
    pods: Vec<Pod>,
    secrets: Vec<PartialObjectMeta<Secret>>,
}

async fn children(namespace: &str, name: &str, context: &Context) -> Result<Children, Error> {
    let ours = ListParams::default().labels(&format!("{NAME_LABEL}={name}"));
    let jobs: Api<Lean<Job>> = Api::namespaced(context.client.clone(), namespace);
    let pods: Api<Lean<Pod>> = Api::namespaced(context.client.clone(), namespace);
    let secrets: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
    let ((jobs, pods), secrets) = tokio::try_join!(
        async {
            // Pods after Jobs: what a Job says about its pod must be visible in the pod as well.
            let jobs = jobs.list(&ours).await.map_err(Error::api(format!("list the Jobs of `{name}`")))?;
            let pods = pods.list(&ours).await.map_err(Error::api(format!("list the pods of `{name}`")))?;
            Ok((jobs, pods))
        },
        async { secrets.list_metadata(&ours).await.map_err(Error::api(format!("list the Secrets of `{name}`"))) },
    )?;
    Ok(Children {
        jobs: jobs.into_iter().map(|Lean(job)| job).collect(),
        pods: pods.into_iter().map(|Lean(pod)| pod).collect(),
        secrets: secrets.items,
    })
}

/// What EKS Anywhere's resources in all namespaces name, where an image is to go that one of them may use.
async fn usage(build: &NodeImageBuild, context: &Context) -> Result<Usage, Error> {
    let needed = build.metadata.deletion_timestamp.is_none()
        && build.status.as_ref().is_some_and(|status| !surplus(&build.spec, status).is_empty());
    if !needed {
        return Ok(Usage::NotNeeded);
    }
    let mut named = Named::default();
    for kind in &KINDS {
        let resource = ApiResource {
            group: GROUP.to_owned(),
            version: VERSION.to_owned(),
            api_version: format!("{GROUP}/{VERSION}"),
            kind: kind.kind.to_owned(),
            plural: kind.plural.to_owned(),
        };
        let api: Api<DynamicObject> = Api::all_with(context.client.clone(), &resource);
        match each_page(&api, ListParams::default(), |object| named.add(kind, &object.data)).await {
            // Where the kind is not installed nobody uses it. The API server says so in plain text, which has no reason.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(kube::Error::Api(status)) if status.is_forbidden() => {
                return Ok(Usage::Hidden(format!(
                    "the operator may not list {}.{GROUP}; have it installed with operator.readClusters",
                    kind.plural
                )));
            }
            result => result.map_err(Error::api(format!("list {}.{GROUP}", kind.plural)))?,
        }
    }
    Ok(Usage::Known(named))
}

/// Whether the release manifest changed, where a new release starts a build.
fn follow_release(build: &NodeImageBuild, context: &Context) -> bool {
    let follows = build.metadata.deletion_timestamp.is_none()
        && !build.spec.suspend
        && build.spec.rebuild.as_ref().is_some_and(|rebuild| rebuild.on_new_release);
    let reference = BuildRef::of(build);
    if !follows {
        context.releases.leave(&reference);
    }
    follows && context.releases.has_news(&reference)
}

fn live_pods(pods: &[Pod]) -> BTreeSet<String> {
    let live = pods.iter().filter(|pod| !job_state::has_ended(pod));
    live.filter_map(|pod| pod.labels().get(BUILD_ID_LABEL).cloned()).collect()
}

pub(super) fn observed_job(job: &Job, pods: &[Pod]) -> Option<ObservedJob> {
    let annotation = |key: &str| job.annotations().get(key).cloned();
    Some(ObservedJob {
        build_id: job.labels().get(BUILD_ID_LABEL)?.clone(),
        deleting: job.metadata.deletion_timestamp.is_some(),
        outdated: false,
        created: job.metadata.creation_timestamp.as_ref().map(|time| time.0),
        wish: Wish {
            spec_digest: annotation(SPEC_DIGEST).unwrap_or_default(),
            run_digest: annotation(RUN_DIGEST).unwrap_or_default(),
            rebuild: annotation(REBUILD_ANNOTATION),
        },
        inputs_digest: annotation(INPUTS_DIGEST),
        trigger: annotation(TRIGGER),
        release: annotation(RELEASE).and_then(|json| serde_json::from_str(&json).ok()),
        state: job_state::read(job, pods),
    })
}

/// What the Job controller says when the API server does not let it create the pod. A Job has no condition for that.
async fn pod_refusal(
    context: &Context,
    namespace: &str,
    name: &str,
    job: &ObservedJob,
    jobs: &[Job],
) -> Result<Option<String>, Error> {
    let job_name = object_name(name, &job.build_id);
    let uid = jobs.iter().find(|job| job.name_any() == job_name).and_then(ResourceExt::uid).unwrap_or_default();
    newest_event(context, namespace, &uid, "FailedCreate", &format!("Job `{job_name}`")).await
}

/// What kubelet says when it can not give the pod its user namespace. A pod has no condition for that, and waits on.
async fn no_user_namespace(
    context: &Context,
    namespace: &str,
    pods: &[Pod],
    name: &str,
) -> Result<Option<Blocker>, Error> {
    let uid = pods.iter().find(|pod| pod.name_any() == name).and_then(ResourceExt::uid).unwrap_or_default();
    let said = newest_event(context, namespace, &uid, "FailedCreatePodSandBox", &format!("pod `{name}`")).await?;
    Ok(said.as_deref().and_then(job_state::no_user_namespace))
}

/// The message of the newest event about an object with this reason.
async fn newest_event(
    context: &Context,
    namespace: &str,
    uid: &str,
    reason: &str,
    what: &str,
) -> Result<Option<String>, Error> {
    let events: Api<Event> = Api::namespaced(context.client.clone(), namespace);
    let about = format!("involvedObject.uid={uid},reason={reason}");
    let found = events
        .list(&ListParams::default().fields(&about))
        .await
        .map_err(Error::api(format!("list the events of the {what}")))?;
    let newest = found.items.into_iter().max_by_key(|event| {
        event.last_timestamp.as_ref().map(|time| time.0).or(event.event_time.as_ref().map(|time| time.0))
    });
    Ok(newest.and_then(|event| event.message))
}

/// Whether the build can start, and with what.
pub(super) async fn inputs(observed: &Observed, context: &Context, now: Timestamp) -> Result<Inputs, Error> {
    let build = &observed.build;
    let reference = BuildRef::of(build.as_ref());
    if build.metadata.deletion_timestamp.is_some() {
        context.referrers.set(&reference, []);
    }
    if !observed.needs_inputs(now) {
        return Ok(Inputs::NotNeeded);
    }
    if let Err(refusal) = validate::check(&build.spec, &context.settings) {
        return Ok(Inputs::Refused(refusal));
    }
    let references = references(&build.spec);
    // Before the objects are read: a change in between must not go unnoticed.
    context.referrers.set(&reference, references.iter().map(|one| (one.kind, one.name.clone())));
    let objects = look_up(&references, &reference.namespace, context).await?;
    let lookups = objects.iter().map(|(key, object)| (key.clone(), object.into())).collect();
    if let Some((reason, message)) = references::missing(&references, &lookups, &reference.namespace) {
        return Ok(Inputs::Refused(Refusal::new(reason, message)));
    }
    let trust_bundle = references.iter().find_map(|reference| match &reference.used_as {
        Use::TrustBundle { key } => match objects.get(&(reference.kind, reference.name.clone()))? {
            Object::Data(data) => data.get(key),
            Object::Guarded(_) | Object::NotFound => None,
        },
        Use::Credentials(_) | Use::File { .. } => None,
    });
    let prepared = prepare(observed, trust_bundle.map(Vec::as_slice), context, now).await;
    Ok(prepared.unwrap_or_else(|why_not| why_not))
}

/// Resolves the release and makes the build document, or says why there is none.
async fn prepare(
    observed: &Observed,
    trust_bundle: Option<&[u8]>,
    context: &Context,
    now: Timestamp,
) -> Result<Inputs, Inputs> {
    let (build, due) = (&observed.build, observed.due(now));
    let (manifest_url, rewrite) = validate::source(&build.spec);
    let query = ReleaseQuery {
        manifest_url: manifest_url.unwrap_or_else(|| context.settings.release_manifest_url.to_string()),
        eksa_release: build.spec.eksa_release.clone(),
        channel: build.spec.release_channel.clone(),
        rewrite,
        signatures: build.spec.verify.signatures,
    };
    let proxy = build.spec.proxy.clone().unwrap_or_default();
    let resolver = context.resolvers.get(&proxy, trust_bundle).map_err(|error| why_not(&error))?;
    let slow = || {
        Inputs::Unavailable(Refusal::new(
            "ManifestTimeout",
            format!(
                "reading the release documents of {} took longer than {} s; is that server reachable from the operator?",
                query.manifest_url,
                RESOLVE_TIMEOUT.as_secs()
            ),
        ))
    };
    let resolved = async {
        // Before the release: what changes in between is seen by the next look at the manifest.
        let version = match due {
            Some(_) => Some(resolver.manifest_version(&query).await?),
            None => None,
        };
        Ok((version, resolver.resolve(&query).await?))
    };
    let resolved = tokio::time::timeout(RESOLVE_TIMEOUT, resolved).await.map_err(|_| slow())?;
    let (version, release) = resolved.map_err(|error: ReleaseError| why_not(&error))?;
    let shown = release_status(&release);
    let make = |trigger| validate::prepare(build, &observed.wish, release.clone(), trigger, &context.settings);
    let mut prepared = make(None).map_err(Inputs::Refused)?;
    if let (Some(due), Some(rebuild), Some(status)) = (due, &build.spec.rebuild, &build.status) {
        let listed = match (&due, &prepared.request.base) {
            (Due::Schedule(_), Base::Archive(Archive { url, checksum: BaseChecksum::Sha256Sums(sums) })) => {
                let read = resolver.listed_digest(sums, url);
                let read = tokio::time::timeout(RESOLVE_TIMEOUT, read).await.map_err(|_| slow())?;
                Some(read.map_err(|error| why_not(&error))?)
            }
            (_, _) => None,
        };
        let base = match (&prepared.request.base, &listed) {
            (_, Some(digest)) => BaseNow::Digest(digest),
            (Base::Archive(_) | Base::Recipe, None) => BaseNow::Fixed,
            // The operator does not talk to Prism Central.
            (Base::PrismImage(_), None) => BaseNow::Unknown,
        };
        let found = Found { inputs_digest: &prepared.inputs_digest, release: &shown, base };
        let Some(trigger) = rebuild::cause(rebuild, due, status, found) else {
            let reference = BuildRef::of(build.as_ref());
            if let (true, Some(version)) = (rebuild.on_new_release, version) {
                context.releases.follow(&reference, &resolver, &query, version);
            }
            return Ok(Inputs::Unchanged);
        };
        prepared = make(Some(trigger)).map_err(Inputs::Refused)?;
    }
    Ok(Inputs::Ready(Box::new(prepared), shown))
}

fn why_not<E: Classified + 'static>(error: &E) -> Inputs {
    let refusal = Refusal::new(error.reason(), Chain(error).to_string());
    if error.class().is_retryable() { Inputs::Unavailable(refusal) } else { Inputs::Refused(refusal) }
}

/// An object that the specification names.
enum Object {
    /// Its data, of which only the trust bundle's is looked at.
    Data(BTreeMap<String, Vec<u8>>),
    Guarded(&'static str),
    NotFound,
}

impl From<&Object> for Lookup {
    fn from(object: &Object) -> Self {
        match object {
            Object::Data(data) => Self::Found(data.keys().cloned().collect()),
            Object::Guarded(what) => Self::Guarded(what),
            Object::NotFound => Self::NotFound,
        }
    }
}

impl Object {
    fn of_secret(secret: Secret) -> Self {
        match references::guarded(&secret) {
            Some(what) => Self::Guarded(what),
            None => Self::Data(secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect()),
        }
    }

    fn of_config_map(map: ConfigMap) -> Self {
        let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
        let binary = map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
        Self::Data(text.chain(binary).collect())
    }
}

async fn look_up(
    references: &[Reference],
    namespace: &str,
    context: &Context,
) -> Result<BTreeMap<(ObjectKind, String), Object>, Error> {
    let mut found = BTreeMap::new();
    for reference in references {
        let key = (reference.kind, reference.name.clone());
        if found.contains_key(&key) {
            continue;
        }
        let operation = format!("read the {} `{}`", reference.kind, reference.name);
        let object = match reference.kind {
            ObjectKind::Secret => {
                let api: Api<Secret> = Api::namespaced(context.client.clone(), namespace);
                let secret = api.get_opt(&reference.name).await.map_err(Error::api(operation))?;
                secret.map(Object::of_secret)
            }
            ObjectKind::ConfigMap => {
                let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), namespace);
                let map = api.get_opt(&reference.name).await.map_err(Error::api(operation))?;
                map.map(Object::of_config_map)
            }
        };
        found.insert(key, object.unwrap_or(Object::NotFound));
    }
    Ok(found)
}

/// Whether the API server says that there is no such object.
pub(super) fn is_not_found(error: &kube::Error) -> bool {
    api_status(error).is_some_and(kube::core::Status::is_not_found)
}
