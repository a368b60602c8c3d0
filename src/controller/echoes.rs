//! What the watches say about the operator's own writes. A pass that knows that nothing follows from them is not begun
//! again because of them: each pass asks the API server for everything that a build has.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::Resource;

use super::BuildRef;

/// Versions of objects that passes wrote, until the watches have brought them.
#[derive(Debug, Default)]
pub struct Echoes(Mutex<BTreeMap<BuildRef, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    /// A pass is under way.
    running: bool,
    written: BTreeSet<Version>,
    /// What the watches brought meanwhile: an event may be faster than the answer to the write that it tells of.
    seen: BTreeSet<Version>,
}

/// One version of one object.
type Version = (String, String);

fn version(object: &impl Resource) -> Version {
    (object.meta().uid.clone().unwrap_or_default(), object.meta().resource_version.clone().unwrap_or_default())
}

impl Echoes {
    /// A pass begins: what it reads includes all that was written before.
    pub(super) fn begin(&self, build: &BuildRef) {
        self.lock().insert(build.clone(), Entry { running: true, ..Entry::default() });
    }

    /// The pass wrote this.
    pub(super) fn wrote(&self, build: &BuildRef, object: &impl Resource) {
        if let Some(entry) = self.lock().get_mut(build) {
            entry.written.insert(version(object));
        }
    }

    /// The pass ended; `settled` says that nothing follows from what it wrote. Gives whether another pass is due, because
    /// of something that the watches brought in the meantime.
    pub(super) fn end(&self, build: &BuildRef, settled: bool) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(build) else { return false };
        let due = if settled { !entry.seen.is_subset(&entry.written) } else { !entry.seen.is_empty() };
        entry.running = false;
        entry.written.retain(|version| settled && !entry.seen.contains(version));
        entry.seen.clear();
        if entry.written.is_empty() {
            entries.remove(build);
        }
        due
    }

    /// Whether no pass has to begin because of this object that a watch brought. Each version is held back once: a list
    /// that is read anew after a gap may stand for more than it shows.
    pub(super) fn holds(&self, build: &BuildRef, object: &impl Resource) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(build) else { return false };
        let version = version(object);
        if entry.running {
            entry.seen.insert(version);
            return true;
        }
        let held = entry.written.remove(&version);
        if entry.written.is_empty() {
            entries.remove(build);
        }
        held
    }

    /// The resource is gone.
    pub(super) fn forget(&self, build: &BuildRef) {
        self.lock().remove(build);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<BuildRef, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kube::core::{ObjectMeta, PartialObjectMetaExt as _};

    use super::{super::reconcile::Watched, *};

    fn build() -> BuildRef {
        BuildRef { namespace: "images".into(), name: "golden".into() }
    }

    fn object(uid: &str, version: &str) -> Watched {
        let (uid, resource_version) = (Some(uid.to_owned()), Some(version.to_owned()));
        ObjectMeta { uid, resource_version, ..ObjectMeta::default() }.into_response_partial()
    }

    #[test]
    fn own_writes_are_held_back_whether_the_watch_or_the_answer_is_faster() {
        let (echoes, build) = (Echoes::default(), build());
        echoes.begin(&build);
        assert!(echoes.holds(&build, &object("resource", "7")), "the watch is faster");
        echoes.wrote(&build, &object("resource", "7"));
        echoes.wrote(&build, &object("job", "8"));
        assert!(!echoes.end(&build, true));
        assert!(echoes.holds(&build, &object("job", "8")), "the answer is faster");
        assert!(!echoes.holds(&build, &object("job", "8")), "a list after a gap brings it again");
        assert!(!echoes.holds(&build, &object("job", "9")), "somebody else's");
    }

    #[test]
    fn what_others_wrote_during_a_pass_makes_another_one_due() {
        let (echoes, build) = (Echoes::default(), build());
        echoes.begin(&build);
        echoes.wrote(&build, &object("resource", "7"));
        assert!(echoes.holds(&build, &object("resource", "7")) && echoes.holds(&build, &object("resource", "8")));
        assert!(echoes.end(&build, true));
    }

    #[test]
    fn a_pass_that_something_follows_from_is_followed_by_another_one() {
        let (echoes, build) = (Echoes::default(), build());
        echoes.begin(&build);
        echoes.wrote(&build, &object("resource", "7"));
        echoes.wrote(&build, &object("job", "8"));
        assert!(echoes.holds(&build, &object("resource", "7")));
        assert!(echoes.end(&build, false));
        assert!(!echoes.holds(&build, &object("job", "8")));
    }
}
