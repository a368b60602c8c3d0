//! The operator: keeps every [`NodeImageBuild`] and its Job in step.
//!
//! `reconcile` runs for one resource at a time: `observe` reads, [`validate`] turns resource and release into a build
//! document, [`plan`] decides, `apply` writes. Only `observe` and `apply` talk to anybody; everything is derived from what
//! stands in the cluster, so the process may end at any time. Of several operators one works, see [`lease`].

pub mod admin;
mod apply;
pub mod cleanup;
pub mod context;
pub mod echoes;
pub mod error;
pub mod events;
pub mod job_state;
pub mod lease;
pub mod metrics;
pub mod news;
mod observe;
pub mod plan;
pub mod progress;
pub mod queue;
pub mod rebuild;
mod reconcile;
pub mod references;
pub mod releases;
pub mod resources;
pub mod retention;
pub mod retry;
pub mod starts;
mod status;
pub mod validate;
mod watched;

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use backon::ExponentialBuilder;
use futures::{
    Stream, StreamExt, TryStreamExt,
    future::ready,
    stream::{self, BoxStream},
};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::ListParams,
    core::{NamespaceResourceScope, PartialObjectMeta},
};
use kube_runtime::{
    WatchStreamExt,
    controller::{Config as ControllerConfig, Controller, Error as ControllerError},
    reflector::{self, ObjectRef, reflector},
    watcher::{self, Event, watcher},
};
use tokio::sync::{mpsc, watch};

use self::{
    apply::Announcement,
    context::{Context, Referrers, Resolvers, Settings},
    echoes::Echoes,
    events::Events,
    lease::{Election, LeaseSettings},
    metrics::Metrics,
    news::{First, News},
    progress::Followers,
    queue::Queue,
    reconcile::{announce, on_error, reconcile},
    references::ObjectKind,
    releases::Releases,
    retry::Backoff,
    starts::Starts,
    watched::{Lean, Watched, is_new},
};
use crate::{
    api::v1alpha1::{NAME_LABEL, NodeImageBuild},
    http::HttpError,
};

/// Field manager of everything we write, and reporter of our events.
pub const CONTROLLER: &str = "node-image-builder";
/// Annotation of a Job: digest of what was wished, see [`validate::Wish`].
const SPEC_DIGEST: &str = "nodeimagebuild.dev/spec-digest";
/// Annotation of a Job: digest of how the build runs, see [`validate::Wish`].
const RUN_DIGEST: &str = "nodeimagebuild.dev/run-digest";
/// Annotation of a Job: digest of everything the image is made from.
const INPUTS_DIGEST: &str = "nodeimagebuild.dev/inputs-digest";
/// Annotation of a Job: the releases that the image takes its artifacts from, as in the status.
const RELEASE: &str = "nodeimagebuild.dev/release";

/// Annotation of a Job: what asked for it besides the specification and the annotation, as in the status.
const TRIGGER: &str = "nodeimagebuild.dev/trigger";

/// Resources reconciled at the same time: enough to start 500 builds in seconds without flooding the API server. Each has
/// connections of its own, with their buffers: with 128 at a time they take more memory than all resources.
const CONCURRENCY: u16 = 32;
/// Announcements of starts that are made at the same time.
const ANNOUNCEMENTS: usize = 8;
/// Objects of one page of a list. Pages are held in memory while they are read.
const PAGE: u32 = 100;
/// Wait before a watch that broke is begun again, the first time and at most. All watches of a controller wait for each
/// other, and each of them fails twice when an API server is restarted (the connection, then the history that is
/// forgotten): with kube-runtime's 30 s it would be blind for a minute after that.
const FIRST_REWATCH: Duration = Duration::from_millis(200);
const LONGEST_REWATCH: Duration = Duration::from_secs(2);
/// Wait before looking again whether the definition is there.
const DEFINITION_RETRY: Duration = Duration::from_secs(2);

/// Namespace and name of a resource.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct BuildRef {
    pub namespace: String,
    pub name: String,
}

impl BuildRef {
    pub fn of(object: &impl Resource) -> Self {
        let meta = object.meta();
        Self { namespace: meta.namespace.clone().unwrap_or_default(), name: meta.name.clone().unwrap_or_default() }
    }

    fn object(&self) -> ObjectRef<Watched> {
        ObjectRef::new(&self.name).within(&self.namespace)
    }
}

impl fmt::Display for BuildRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The operator, ready to run.
pub struct Operator {
    pub client: Client,
    /// The only namespace it looks at; all if none.
    pub namespace: Option<String>,
    pub settings: Settings,
    /// The lease that lets one of several operators work; without it, this one must be the only one.
    pub lease: Option<LeaseSettings>,
    pub metrics: Arc<Metrics>,
    /// Set when it has seen the resource's definition, and works or stands by.
    pub ready: Arc<AtomicBool>,
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client: _, namespace, settings, lease, metrics: _, ready } = self;
        f.debug_struct("Operator")
            .field("namespace", namespace)
            .field("settings", settings)
            .field("lease", lease)
            .field("ready", ready)
            .finish_non_exhaustive()
    }
}

impl Operator {
    /// Runs until `shutdown` completes, then ends what is under way.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + Sync + 'static) -> Result<(), HttpError> {
        let http = crate::http::client(&crate::contract::Proxy::default(), None)?;
        let (stop, stopped) = watch::channel(false);
        let work = self.serve(&http, stopped);
        tokio::pin!(work, shutdown);
        tokio::select! {
            () = &mut work => {}
            () = &mut shutdown => {
                tracing::info!("shutting down");
                stop.send_replace(true);
                work.await;
            }
        }
        Ok(())
    }

    /// Works while it holds the lease, and stands by while another one does.
    async fn serve(&self, http: &reqwest::Client, stopped: watch::Receiver<bool>) {
        let builds = scoped::<NodeImageBuild>(&self.client, self.namespace.as_deref());
        tokio::select! {
            () = wait_for_definition(&builds) => {}
            () = until_stopped(stopped.clone()) => return,
        }
        let ready = || self.ready.store(true, Ordering::Release);
        let mut election = self.lease.clone().map(|lease| Election::new(self.client.clone(), lease));
        loop {
            if let Some(election) = &mut election {
                tokio::select! {
                    () = election.acquire(ready) => {}
                    () = until_stopped(stopped.clone()) => return,
                }
            }
            self.metrics.leading(true);
            let lost = async {
                match &mut election {
                    Some(election) => election.hold().await,
                    None => std::future::pending().await,
                }
            };
            // Whatever is under way when the lease is lost is dropped at once: another operator goes on with it.
            let ended = tokio::select! {
                () = self.lead(http, stopped.clone()) => true,
                () = lost => false,
            };
            self.metrics.leading(false);
            if ended {
                break;
            }
        }
        if let Some(election) = &mut election {
            election.release().await;
        }
    }

    /// The controller itself, until it is stopped.
    async fn lead(&self, http: &reqwest::Client, stopped: watch::Receiver<bool>) {
        let Self { client, namespace, settings, lease: _, metrics, ready } = self;
        let namespace = namespace.as_deref();
        let (wake, woken) = mpsc::unbounded_channel();
        let queue = Queue::new(settings.lifecycle.limits, wake.clone());
        tokio::select! {
            () = observe::fill(&queue, client, namespace) => {}
            () = until_stopped(stopped.clone()) => return,
        }
        ready.store(true, Ordering::Release);
        let mut children = Children::watch(client, namespace);
        let first = tokio::select! {
            first = First::read(&mut children.jobs, &mut children.pods, client, namespace) => first,
            () = until_stopped(stopped.clone()) => return,
        };
        let (starts, announcements) = Starts::new();
        let context = Arc::new(Context {
            news: News::new(first, settings.lifecycle.finished_job_ttl),
            starts,
            events: Events::new(client.clone()),
            followers: Followers::new(client.clone(), wake.clone()),
            releases: Releases::new(settings.lifecycle.release_poll_interval, wake.clone()),
            echoes: Echoes::default(),
            wake,
            queue,
            metrics: Arc::clone(metrics),
            backoff: Backoff::default(),
            referrers: Referrers::default(),
            resolvers: Resolvers::new(settings.lifecycle.release_poll_interval, settings.reach),
            http: http.clone(),
            settings: settings.clone(),
            client: client.clone(),
        });
        let controller = controller(client, namespace, children, &context, woken);
        let store = controller.store();
        // Before its first list is there a controller does not end by itself, and has nothing to end.
        let stopped_early = async {
            tokio::select! {
                () = until_stopped(stopped.clone()) => {}
                _ = store.wait_until_ready() => std::future::pending().await,
            }
        };
        let running = controller
            .graceful_shutdown_on(until_stopped(stopped.clone()))
            .run(reconcile, on_error, Arc::clone(&context))
            .for_each(|result| {
                match result {
                    // Logged where it happened.
                    Ok(_) | Err(ControllerError::ReconcilerFailed(..)) => {}
                    Err(ControllerError::ObjectNotFound(gone)) => {
                        context.forget(&BuildRef { namespace: gone.namespace.unwrap_or_default(), name: gone.name });
                    }
                    Err(error) => tracing::warn!(%error, "watching failed; it is tried again"),
                }
                std::future::ready(())
            });
        let announcing = turns(announcements, until_stopped(stopped.clone()))
            .for_each_concurrent(ANNOUNCEMENTS, |announcement| announce(announcement, Arc::clone(&context)));
        tokio::select! {
            ((), ()) = async { tokio::join!(running, announcing) } => {}
            () = stopped_early => {}
        }
    }
}

/// The announcements as they come, until the operator is stopped and the last one is there.
fn turns(
    announcements: mpsc::Receiver<Announcement>,
    stopped: impl Future<Output = ()>,
) -> impl Stream<Item = Announcement> {
    stream::unfold((announcements, Box::pin(stopped)), |(mut announcements, mut stopped)| async move {
        loop {
            tokio::select! {
                biased;
                next = announcements.recv() => return next.map(|next| (next, (announcements, stopped))),
                () = &mut stopped, if !announcements.is_closed() => announcements.close(),
            }
        }
    })
}

async fn until_stopped(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the end as well.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// The operator may be started before its definition is installed.
async fn wait_for_definition(builds: &Api<NodeImageBuild>) {
    let mut told = false;
    while let Err(error) = builds.list_metadata(&ListParams::default().limit(1)).await {
        if !told {
            tracing::warn!(%error, "can not list NodeImageBuilds yet; is the CustomResourceDefinition installed?");
            told = true;
        }
        tokio::time::sleep(DEFINITION_RETRY).await;
    }
}

/// The watches of what belongs to builds.
struct Children {
    jobs: BoxStream<'static, watcher::Result<Event<Lean<Job>>>>,
    pods: BoxStream<'static, watcher::Result<Event<Lean<Pod>>>>,
}

impl Children {
    fn watch(client: &Client, namespace: Option<&str>) -> Self {
        let of_builds = watcher::Config::default().page_size(PAGE).labels(NAME_LABEL);
        Self {
            jobs: watcher(scoped(client, namespace), of_builds.clone()).boxed(),
            pods: watcher(scoped(client, namespace), of_builds).boxed(),
        }
    }
}

fn controller(
    client: &Client,
    namespace: Option<&str>,
    children: Children,
    context: &Arc<Context>,
    woken: mpsc::UnboundedReceiver<BuildRef>,
) -> Controller<Watched> {
    let all = watcher::Config::default().page_size(PAGE);
    let progress = stream::unfold((woken, Arc::clone(context)), |(mut woken, context)| async move {
        let build = woken.recv().await?;
        context.news.disturb(&build);
        Some((build.object(), (woken, context)))
    });
    let [secrets, config_maps, brought, echoed, of_jobs, of_pods] = std::array::from_fn(|_| Arc::clone(context));
    let (reader, writer) = reflector::store();
    let builds = watcher(scoped::<Watched>(client, namespace), all.clone()).map_ok(move |event| take(event, &brought));
    let builds = reflector(writer, builds)
        .applied_objects()
        .try_filter(move |build| ready(!echoed.echoes.holds(&BuildRef::of(build), build)));
    let jobs = children.jobs.try_filter_map(move |event| ready(Ok(of_jobs.news.job(event))));
    let pods = children.pods.try_filter_map(move |event| ready(Ok(of_pods.news.pod(event))));
    Controller::for_stream(builds, reader)
        .with_config(ControllerConfig::default().concurrency(CONCURRENCY))
        .trigger_backoff(watcher::ExponentialBackoff::from(
            ExponentialBuilder::default()
                .with_min_delay(FIRST_REWATCH)
                .with_max_delay(LONGEST_REWATCH)
                .with_jitter()
                .without_max_times(),
        ))
        .owns_stream(jobs)
        .watches_stream(pods, |pod| build_of(&pod).map(|build| build.object()))
        .watches(scoped::<PartialObjectMeta<Secret>>(client, namespace), all.clone(), move |secret| {
            referring(&secrets, ObjectKind::Secret, &secret)
        })
        .watches(scoped::<PartialObjectMeta<ConfigMap>>(client, namespace), all, move |map| {
            referring(&config_maps, ObjectKind::ConfigMap, &map)
        })
        .reconcile_on(progress)
}

/// Takes over what the watch of builds brings, and leaves of it what stays in memory.
fn take(event: Event<Watched>, context: &Context) -> Event<Watched> {
    let lighten = |mut watched: Watched| {
        let new = watched.whole.take().filter(|build| is_new(build));
        watched.whole = new.filter(|build| context.starts.arrived(&BuildRef::of(build.as_ref())));
        watched
    };
    match event {
        Event::Init => {
            context.starts.forget_all();
            Event::Init
        }
        Event::InitApply(watched) => {
            if let Some(build) = &watched.whole {
                context.news.listed(build);
            }
            Event::InitApply(lighten(watched))
        }
        Event::InitDone => {
            context.news.all_listed();
            Event::InitDone
        }
        Event::Apply(watched) => {
            context.news.disturb(&BuildRef::of(&watched));
            Event::Apply(lighten(watched))
        }
        Event::Delete(watched) => {
            context.forget(&BuildRef::of(&watched));
            Event::Delete(Watched::reference(&watched))
        }
    }
}

/// The build that an object of ours belongs to by its label.
fn build_of(object: &impl Resource) -> Option<BuildRef> {
    let name = object.labels().get(NAME_LABEL)?.clone();
    Some(BuildRef { namespace: object.namespace().unwrap_or_default(), name })
}

fn referring(context: &Context, kind: ObjectKind, object: &impl Resource) -> Vec<ObjectRef<Watched>> {
    let BuildRef { namespace, name } = BuildRef::of(object);
    context.referrers.of(kind, &namespace, &name).iter().map(BuildRef::object).collect()
}
