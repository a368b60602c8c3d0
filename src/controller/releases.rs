//! Asks release manifests whether they changed, on behalf of all builds that want to know: one task for each manifest,
//! however many builds follow it. A changed manifest reconciles its followers, which find out whether it matters to them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};

use super::BuildRef;
use crate::{
    error::Chain,
    release::{ReleaseQuery, Resolver, Version},
};

/// All manifests that are followed. Dropping it ends the tasks.
#[derive(Debug)]
pub struct Releases {
    interval: Duration,
    wake: mpsc::UnboundedSender<BuildRef>,
    inner: Arc<Mutex<Inner>>,
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
struct Inner {
    manifests: HashMap<Manifest, Followed>,
    builds: HashMap<BuildRef, Manifest>,
}

/// A manifest, as it is reached: who follows the same one shares its reads.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
struct Manifest {
    url: String,
    rewrite: Vec<(String, String)>,
    /// Which resolver: each has its own proxy and certificate authorities.
    resolver: usize,
}

#[derive(Debug)]
struct Followed {
    task: AbortHandle,
    /// What the task read last.
    current: Option<Version>,
    /// What each follower's newest build was compared with.
    compared: HashMap<BuildRef, Version>,
}

impl Releases {
    /// `wake` gets the builds whose manifest changed.
    pub fn new(interval: Duration, wake: mpsc::UnboundedSender<BuildRef>) -> Self {
        Self { interval, wake, inner: Arc::default(), tasks: Mutex::default() }
    }

    /// Whether a build has to be compared with its manifest: it changed, or was never compared.
    pub fn has_news(&self, build: &BuildRef) -> bool {
        let inner = lock(&self.inner);
        let followed = inner.builds.get(build).and_then(|manifest| inner.manifests.get(manifest));
        followed.is_none_or(|followed| match followed.compared.get(build) {
            Some(compared) => followed.current.is_some_and(|current| current != *compared),
            None => true,
        })
    }

    /// Follows the manifest of `query` on behalf of a build that is up to date with this version of it.
    pub fn follow(&self, build: &BuildRef, resolver: &Arc<Resolver>, query: &ReleaseQuery, version: Version) {
        let manifest = Manifest {
            url: query.manifest_url.clone(),
            rewrite: query.rewrite.clone(),
            resolver: Arc::as_ptr(resolver).addr(),
        };
        let mut inner = lock(&self.inner);
        if inner.builds.get(build).is_some_and(|old| *old != manifest) {
            inner.leave(build);
        }
        let Inner { manifests, builds } = &mut *inner;
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        builds.insert(build.clone(), manifest.clone());
        let followed = manifests.entry(manifest.clone()).or_insert_with(|| {
            let task = poll(
                Arc::clone(&self.inner),
                manifest,
                self.interval,
                self.wake.clone(),
                Arc::clone(resolver),
                query.clone(),
            );
            Followed { task: tasks.spawn(task), current: None, compared: HashMap::new() }
        });
        followed.compared.insert(build.clone(), version);
    }

    /// The build does not want to know any more, or is gone.
    pub fn leave(&self, build: &BuildRef) {
        lock(&self.inner).leave(build);
    }
}

impl Inner {
    fn leave(&mut self, build: &BuildRef) {
        let Some(manifest) = self.builds.remove(build) else { return };
        let Some(followed) = self.manifests.get_mut(&manifest) else { return };
        followed.compared.remove(build);
        if followed.compared.is_empty() {
            followed.task.abort();
            self.manifests.remove(&manifest);
        }
    }

    /// Takes over what was read, and gives those who have compared their builds with something else.
    fn read(&mut self, manifest: &Manifest, version: Version) -> Vec<BuildRef> {
        let Some(followed) = self.manifests.get_mut(manifest) else { return vec![] };
        if followed.current == Some(version) {
            return vec![];
        }
        followed.current = Some(version);
        let other = followed.compared.iter().filter(|(_, compared)| **compared != version);
        other.map(|(build, _)| build.clone()).collect()
    }
}

/// Nothing panics while it holds these locks; were it to happen, the data would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn poll(
    inner: Arc<Mutex<Inner>>,
    manifest: Manifest,
    interval: Duration,
    wake: mpsc::UnboundedSender<BuildRef>,
    resolver: Arc<Resolver>,
    query: ReleaseQuery,
) {
    let mut again = tokio::time::interval(interval);
    again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        again.tick().await;
        match resolver.manifest_version(&query).await {
            Ok(version) => {
                for build in lock(&inner).read(&manifest, version) {
                    tracing::debug!(%build, manifest = query.manifest_url, "the release manifest changed");
                    if wake.send(build).is_err() {
                        return;
                    }
                }
            }
            // The next look is soon enough; builds that need the manifest say what is wrong with it.
            Err(error) => {
                tracing::warn!(manifest = query.manifest_url, error = %Chain(&error), "can not read the release manifest");
            }
        }
    }
}
