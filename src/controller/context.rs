//! What all reconciliations share.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::Client;
use secrecy::SecretString;
use tokio::sync::mpsc;
use url::Url;

use super::{
    BuildRef,
    echoes::Echoes,
    events::Events,
    metrics::Metrics,
    news::News,
    progress::Followers,
    queue::{Limits, Queue},
    references::ObjectKind,
    releases::Releases,
    retry::Backoff,
    starts::Starts,
    validate::directory,
};
use crate::{
    contract::{Proxy, token::SigningKey},
    http::{self, HttpError},
    reach::Reach,
    release::{FRESH, Resolver},
};

/// What the administrator set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image of the build pods.
    pub builder_image: String,
    /// Image of the build pods of the engine `ImageBuilder`: upstream's own.
    pub image_builder_image: String,
    /// The EKS Anywhere release manifest of resources that name none.
    pub release_manifest_url: Url,
    /// Service account of the build pods; the namespace's default one if none.
    pub builder_service_account: Option<String>,
    /// The built-in artifact server, if there is one.
    pub artifact_server: Option<ArtifactServerSettings>,
    pub lifecycle: Lifecycle,
    /// Where the URLs of release documents and checksum lists may lead.
    pub reach: Reach,
    pub placement: Placement,
}

/// Which nodes build pods may run on, and as what. Where they are privileged, whoever chooses the node, and what runs in the
/// pod, has the node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Placement {
    /// Labels that the node must have, whatever the resource says.
    pub node_selector: BTreeMap<String, String>,
    /// Whether resources may tolerate the taint of control plane nodes.
    pub control_plane: bool,
    /// Resource of nodes with KVM, which builds that need it ask for, so that they come to such a node.
    pub kvm_resource: Option<String>,
    /// Whether build pods are root of a user namespace of their own, and not privileged.
    pub user_namespaces: bool,
}

/// How long finished builds are kept, how often releases are looked for, how many builds run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lifecycle {
    /// How long the Job of a finished build stays, with its pod and log.
    pub finished_job_ttl: Duration,
    /// Time between two looks at a release manifest that builds with `rebuild.onNewRelease` follow.
    pub release_poll_interval: Duration,
    pub limits: Limits,
}

impl Lifecycle {
    /// Kept long enough for somebody to read the log of last night's build.
    pub const FINISHED_JOB_TTL: Duration = Duration::from_secs(24 * 3600);
    /// Releases come every few weeks.
    pub const RELEASE_POLL_INTERVAL: Duration = Duration::from_secs(15 * 60);
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            finished_job_ttl: Self::FINISHED_JOB_TTL,
            release_poll_interval: Self::RELEASE_POLL_INTERVAL,
            limits: Limits::default(),
        }
    }
}

/// The built-in artifact server.
#[derive(Clone, Debug)]
pub struct ArtifactServerSettings {
    /// Where builds upload.
    pub upload_url: Url,
    /// Where machines download.
    pub public_url: Url,
    /// Signs the builds' upload tokens.
    pub key: SigningKey,
}

impl ArtifactServerSettings {
    /// A token for everything a build puts below its directory.
    pub fn token(&self, directory: &str, valid: Duration, now: jiff::Timestamp) -> SecretString {
        let expires = now.checked_add(valid).unwrap_or(jiff::Timestamp::MAX);
        SecretString::from(self.key.mint(directory, expires))
    }

    /// URL and directory of a build's files.
    pub fn place(&self, namespace: &str, name: &str, build_id: &str) -> (Url, String) {
        let directory = directory(namespace, name, build_id);
        let mut url = self.upload_url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(directory.split('/'));
        }
        (url, directory)
    }
}

/// What all reconciliations share.
pub struct Context {
    pub client: Client,
    pub settings: Settings,
    pub echoes: Echoes,
    pub events: Events,
    pub metrics: Arc<Metrics>,
    pub news: News,
    pub starts: Starts,
    pub backoff: Backoff,
    pub followers: Followers,
    pub referrers: Referrers,
    pub resolvers: Resolvers,
    pub releases: Releases,
    pub queue: Queue,
    /// For the artifact server.
    pub http: reqwest::Client,
    pub(super) wake: mpsc::UnboundedSender<BuildRef>,
}

impl Context {
    /// Has a pass begin.
    pub(super) fn wake(&self, build: &BuildRef) {
        // The other end goes with the controller.
        let _ = self.wake.send(build.clone());
    }

    /// The resource is gone.
    pub(super) fn forget(&self, build: &BuildRef) {
        self.echoes.forget(build);
        self.news.forget(build);
        self.starts.left(build);
        self.referrers.set(build, []);
        self.releases.leave(build);
        self.queue.leave(build);
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Which builds name which Secrets and `ConfigMaps`, so that a change of one reaches them.
#[derive(Debug, Default)]
pub struct Referrers(Mutex<ReferrersInner>);

#[derive(Debug, Default)]
struct ReferrersInner {
    by_object: BTreeMap<(ObjectKind, String, String), BTreeSet<BuildRef>>,
    by_build: BTreeMap<BuildRef, BTreeSet<(ObjectKind, String, String)>>,
}

impl Referrers {
    /// The objects, by kind and name, that `build` names now.
    pub fn set(&self, build: &BuildRef, objects: impl IntoIterator<Item = (ObjectKind, String)>) {
        let objects: BTreeSet<_> =
            objects.into_iter().map(|(kind, name)| (kind, build.namespace.clone(), name)).collect();
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for old in inner.by_build.remove(build).unwrap_or_default() {
            if let Some(builds) = inner.by_object.get_mut(&old) {
                builds.remove(build);
                if builds.is_empty() {
                    inner.by_object.remove(&old);
                }
            }
        }
        for object in &objects {
            inner.by_object.entry(object.clone()).or_default().insert(build.clone());
        }
        if !objects.is_empty() {
            inner.by_build.insert(build.clone(), objects);
        }
    }

    /// The builds that name the object.
    pub fn of(&self, kind: ObjectKind, namespace: &str, name: &str) -> Vec<BuildRef> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let builds = inner.by_object.get(&(kind, namespace.to_owned(), name.to_owned()));
        builds.into_iter().flatten().cloned().collect()
    }
}

/// Release resolvers, one for each way to reach the network, so that their caches are shared.
#[derive(Debug)]
pub struct Resolvers {
    /// How long a document is used without asking whether it changed.
    fresh: Duration,
    reach: Reach,
    inner: Mutex<HashMap<Network, Arc<Resolver>>>,
}

/// A proxy as text, and additional certificate authorities.
type Network = (String, Option<Vec<u8>>);

impl Resolvers {
    /// Networks are few; past this many, all are forgotten rather than kept for ever.
    const MOST: usize = 32;

    /// Whoever asks for a document once in `interval` gets what the server has.
    pub fn new(interval: Duration, reach: Reach) -> Self {
        Self { fresh: interval.min(FRESH) / 2, reach, inner: Mutex::default() }
    }

    /// The resolver for a proxy and additional certificate authorities (PEM).
    pub fn get(&self, proxy: &Proxy, trust_bundle: Option<&[u8]>) -> Result<Arc<Resolver>, HttpError> {
        let key = (format!("{proxy:?}"), trust_bundle.map(<[u8]>::to_vec));
        let mut resolvers = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resolver) = resolvers.get(&key) {
            return Ok(Arc::clone(resolver));
        }
        let resolver = Resolver::new(http::client_reaching(proxy, trust_bundle, self.reach)?).reaching(self.reach);
        let resolver = Arc::new(resolver.without_retries().with_freshness(self.fresh));
        if resolvers.len() >= Self::MOST {
            resolvers.clear();
        }
        resolvers.insert(key, Arc::clone(&resolver));
        Ok(resolver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn referrers_follow_what_builds_name_now() {
        let referrers = Referrers::default();
        let build = |name: &str| BuildRef { namespace: "images".into(), name: name.into() };
        referrers.set(&build("a"), [(ObjectKind::Secret, "s".to_owned()), (ObjectKind::ConfigMap, "c".to_owned())]);
        referrers.set(&build("b"), [(ObjectKind::Secret, "s".to_owned())]);
        assert_eq!(referrers.of(ObjectKind::Secret, "images", "s"), [build("a"), build("b")]);
        assert_eq!(referrers.of(ObjectKind::Secret, "other", "s"), []);
        referrers.set(&build("a"), []);
        assert_eq!(referrers.of(ObjectKind::Secret, "images", "s"), [build("b")]);
        assert_eq!(referrers.of(ObjectKind::ConfigMap, "images", "c"), []);
    }
}
