//! What the watch says about the operator's own writes of resources. A pass that knows that nothing follows from them is not
//! begun again because of them: each pass asks the API server for everything that a build has.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::Resource;

use super::BuildRef;

/// Versions of resources that passes wrote, until the watch has brought them.
#[derive(Debug, Default)]
pub struct Echoes(Mutex<BTreeMap<BuildRef, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    /// A pass is under way.
    running: bool,
    /// Another one was to begin meanwhile.
    again: bool,
    written: BTreeSet<Version>,
    /// What the watch brought meanwhile: an event may be faster than the answer to the write that it tells of.
    seen: BTreeSet<Version>,
}

/// One version of one object.
type Version = (String, String);

fn version(object: &impl Resource) -> Version {
    (object.meta().uid.clone().unwrap_or_default(), object.meta().resource_version.clone().unwrap_or_default())
}

impl Echoes {
    /// A pass begins: what it reads includes all that was written before. While an earlier one is still under way it may
    /// not; then it is due when that one ends.
    pub(super) fn begin(&self, build: &BuildRef) -> bool {
        let mut entries = self.lock();
        match entries.get_mut(build) {
            Some(entry) if entry.running => {
                entry.again = true;
                false
            }
            _ => {
                entries.insert(build.clone(), Entry { running: true, ..Entry::default() });
                true
            }
        }
    }

    /// The pass wrote this.
    pub(super) fn wrote(&self, build: &BuildRef, object: &impl Resource) {
        if let Some(entry) = self.lock().get_mut(build) {
            entry.written.insert(version(object));
        }
    }

    /// The pass ended; `settled` says that nothing follows from what it wrote. Gives whether another pass is due, because
    /// of something that happened in the meantime.
    pub(super) fn end(&self, build: &BuildRef, settled: bool) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(build) else { return false };
        let seen = if settled { !entry.seen.is_subset(&entry.written) } else { !entry.seen.is_empty() };
        let due = std::mem::take(&mut entry.again) || seen;
        entry.running = false;
        entry.written.retain(|version| settled && !entry.seen.contains(version));
        entry.seen.clear();
        if entry.written.is_empty() {
            entries.remove(build);
        }
        due
    }

    /// Whether no pass has to begin because of this object that the watch brought. Each version is held back once: a list
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
    use kube::core::{ObjectMeta, PartialObjectMeta, PartialObjectMetaExt as _};

    use super::*;
    use crate::api::v1alpha1::NodeImageBuild;

    fn build() -> BuildRef {
        BuildRef { namespace: "images".into(), name: "golden".into() }
    }

    fn object(version: &str) -> PartialObjectMeta<NodeImageBuild> {
        let (uid, resource_version) = (Some("uid".to_owned()), Some(version.to_owned()));
        ObjectMeta { uid, resource_version, ..ObjectMeta::default() }.into_response_partial()
    }

    #[test]
    fn own_writes_are_held_back_whether_the_watch_or_the_answer_is_faster() {
        let (echoes, build) = (Echoes::default(), build());
        assert!(echoes.begin(&build));
        assert!(echoes.holds(&build, &object("7")), "the watch is faster");
        echoes.wrote(&build, &object("7"));
        echoes.wrote(&build, &object("8"));
        assert!(!echoes.end(&build, true));
        assert!(echoes.holds(&build, &object("8")), "the answer is faster");
        assert!(!echoes.holds(&build, &object("8")), "a list after a gap brings it again");
        assert!(!echoes.holds(&build, &object("9")), "somebody else's");
    }

    #[test]
    fn what_others_wrote_during_a_pass_makes_another_one_due() {
        let (echoes, build) = (Echoes::default(), build());
        assert!(echoes.begin(&build));
        echoes.wrote(&build, &object("7"));
        assert!(echoes.holds(&build, &object("7")) && echoes.holds(&build, &object("8")));
        assert!(echoes.end(&build, true));
    }

    #[test]
    fn a_pass_that_something_follows_from_is_followed_by_another_one() {
        let (echoes, build) = (Echoes::default(), build());
        assert!(echoes.begin(&build));
        echoes.wrote(&build, &object("7"));
        echoes.wrote(&build, &object("8"));
        assert!(echoes.holds(&build, &object("7")));
        assert!(echoes.end(&build, false));
        assert!(!echoes.holds(&build, &object("8")));
    }

    #[test]
    fn there_is_one_pass_at_a_time_and_the_next_one_comes_when_it_ends() {
        let (echoes, build) = (Echoes::default(), build());
        assert!(echoes.begin(&build));
        assert!(!echoes.begin(&build));
        assert!(echoes.end(&build, true));
        assert!(echoes.begin(&build));
        assert!(!echoes.end(&build, true));
    }
}
