//! Who may build now and who waits, when the administrator limits how many builds run at the same time.
//!
//! Every pass over a resource says what the cluster shows of it: that it builds, that it wants to, or neither. Slots are
//! given in turns: to the namespace with the fewest running builds, within a namespace to who has waited longest. When a
//! slot is free, who is next is reconciled. Nothing is kept but in memory; after a start it is read from the cluster.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::mpsc;

use super::BuildRef;
use crate::api::v1alpha1::NodeImageBuildSpec;

/// A position that is shown in a status stays for at least this long.
const REFRESH: Duration = Duration::from_secs(30);
/// Positions behind this one change more often and matter less: they are looked at less often, in proportion.
const NEAR: usize = 10;
/// Longest time until a position is looked at again.
const LONGEST_REFRESH: Duration = Duration::from_secs(900);

/// How many builds may run at the same time; no limit where there is none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// All that this operator sees.
    pub total: Option<usize>,
    /// In each namespace.
    pub per_namespace: Option<usize>,
    /// Into each vCenter or Prism Central.
    pub per_server: Option<usize>,
}

impl Limits {
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// What the cluster shows of a resource.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It neither builds nor wants to.
    Idle,
    /// Its build runs.
    Builds { server: Option<String> },
    /// A build of it could start.
    Wants {
        server: Option<String>,
        since: Timestamp,
        /// An earlier build of it still runs and makes room for this one.
        replaces: bool,
    },
}

/// Whether a build that could start may do so.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Admission {
    Go,
    /// Its place among those that wait, from 1, and when to look at it again.
    Wait {
        position: usize,
        waiting: usize,
        refresh: Duration,
    },
}

/// The vCenter or Prism Central that an image goes into, as a name that is the same for the same server.
pub fn server(spec: &NodeImageBuildSpec) -> Option<String> {
    let vsphere = spec.vsphere.as_ref().map(|vsphere| &vsphere.server);
    let host = vsphere.or_else(|| spec.nutanix.as_ref().map(|nutanix| &nutanix.endpoint))?;
    Some(host.to_ascii_lowercase())
}

/// All builds that run or wait.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    wake: mpsc::UnboundedSender<BuildRef>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// With the server each goes to.
    running: BTreeMap<BuildRef, Option<String>>,
    waiting: HashMap<BuildRef, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    server: Option<String>,
    since: Timestamp,
    /// It was told that its turn has come.
    woken: bool,
    /// The position in its status: since when, which one, of how many.
    shown: Option<(Instant, usize, usize)>,
}

impl Queue {
    /// `wake` gets the builds whose turn has come.
    pub fn new(limits: Limits, wake: mpsc::UnboundedSender<BuildRef>) -> Self {
        Self { limits, wake, inner: Mutex::default() }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What was running and waiting before this process began.
    pub fn seed(&self, build: BuildRef, standing: Standing) {
        let mut inner = self.lock();
        match standing {
            Standing::Idle => {}
            Standing::Builds { server } => drop(inner.running.insert(build, server)),
            Standing::Wants { server, since, replaces: _ } => {
                inner.waiting.insert(build, Waiting { server, since, woken: false, shown: None });
            }
        }
    }

    /// How many builds wait for a slot.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Takes over what the cluster shows of one resource, and says whether it may start. That it may gives it a slot.
    pub fn settle(&self, build: &BuildRef, standing: &Standing) -> Admission {
        if self.limits.is_none() {
            return Admission::Go;
        }
        let mut inner = self.lock();
        let released = match standing {
            Standing::Idle => inner.running.remove(build).is_some() | inner.waiting.remove(build).is_some(),
            Standing::Builds { server } => {
                inner.running.insert(build.clone(), server.clone());
                inner.waiting.remove(build).is_some()
            }
            Standing::Wants { server, replaces: true, .. } => {
                inner.running.insert(build.clone(), server.clone());
                inner.waiting.remove(build);
                return Admission::Go;
            }
            Standing::Wants { server, since, replaces: false } => {
                let released = inner.running.remove(build).is_some();
                let entry = inner.waiting.entry(build.clone()).or_insert_with(|| Waiting {
                    server: None,
                    since: *since,
                    woken: false,
                    shown: None,
                });
                entry.server.clone_from(server);
                entry.since = *since;
                entry.woken = false;
                released
            }
        };
        let wants = matches!(standing, Standing::Wants { .. });
        if !wants && !released {
            return Admission::Go;
        }
        let next = inner.next(self.limits);
        let admission = if !wants {
            Admission::Go
        } else if next.contains(build) {
            if let Some(entry) = inner.waiting.remove(build) {
                inner.running.insert(build.clone(), entry.server);
            }
            Admission::Go
        } else {
            inner.wait(build)
        };
        for other in next {
            if let Some(entry) = inner.waiting.get_mut(&other)
                && !std::mem::replace(&mut entry.woken, true)
            {
                // The receiver lives as long as the controller.
                let _ = self.wake.send(other);
            }
        }
        admission
    }

    /// The resource is gone, or nothing can be said of it: it must not stand in the others' way.
    pub fn leave(&self, build: &BuildRef) {
        self.settle(build, &Standing::Idle);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is counted while slots are given.
#[derive(Default)]
struct Counts<'i> {
    total: usize,
    namespaces: HashMap<&'i str, usize>,
    servers: HashMap<&'i str, usize>,
}

impl<'i> Counts<'i> {
    fn add(&mut self, build: &'i BuildRef, server: Option<&'i String>) {
        self.total += 1;
        *self.namespaces.entry(&build.namespace).or_default() += 1;
        if let Some(server) = server {
            *self.servers.entry(server).or_default() += 1;
        }
    }

    fn namespace(&self, name: &str) -> usize {
        self.namespaces.get(name).copied().unwrap_or_default()
    }

    fn has_room(&self, limits: Limits, build: &BuildRef, server: Option<&String>) -> bool {
        let below = |count: usize, limit: Option<usize>| limit.is_none_or(|limit| count < limit);
        let on_server = server.map_or(0, |server| self.servers.get(server.as_str()).copied().unwrap_or_default());
        below(self.total, limits.total)
            && below(self.namespace(&build.namespace), limits.per_namespace)
            && (server.is_none() || below(on_server, limits.per_server))
    }
}

impl Inner {
    /// Those whose turn it is, in order, within the limits.
    fn next(&self, limits: Limits) -> Vec<BuildRef> {
        let mut counts = Counts::default();
        for (build, server) in &self.running {
            counts.add(build, server.as_ref());
        }
        // Where all slots are taken nobody is next, however many wait.
        if limits.total.is_some_and(|total| counts.total >= total) {
            return vec![];
        }
        let mut lines = self.lines();
        let mut next = vec![];
        loop {
            // In each line the first that has room; of those, who belongs to the namespace with the fewest builds.
            let heads = lines.iter().filter_map(|(namespace, line)| {
                let index =
                    line.iter().position(|(build, entry)| counts.has_room(limits, build, entry.server.as_ref()))?;
                let (build, entry) = line[index];
                Some(((counts.namespace(namespace), entry.since, build), *namespace, index))
            });
            let Some((_, namespace, index)) = heads.min_by(|a, b| a.0.cmp(&b.0)) else { return next };
            let Some((build, entry)) = lines.get_mut(namespace).and_then(|line| line.remove(index)) else {
                return next;
            };
            counts.add(build, entry.server.as_ref());
            next.push(build.clone());
        }
    }

    /// Who waits, by namespace, the longest first.
    fn lines(&self) -> BTreeMap<&str, VecDeque<(&BuildRef, &Waiting)>> {
        let mut lines: BTreeMap<&str, VecDeque<_>> = BTreeMap::new();
        for (build, entry) in &self.waiting {
            lines.entry(&build.namespace).or_default().push_back((build, entry));
        }
        for line in lines.values_mut() {
            line.make_contiguous().sort_by_key(|(build, entry)| (entry.since, *build));
        }
        lines
    }

    /// The place of `build` among all that wait, from 1, as if slots became free one by one.
    fn position(&self, build: &BuildRef) -> usize {
        let mut counts = Counts::default();
        for (running, server) in &self.running {
            counts.add(running, server.as_ref());
        }
        let mut lines = self.lines();
        for position in 1..=self.waiting.len() {
            let heads = lines.iter().filter_map(|(namespace, line)| {
                let (head, entry) = line.front()?;
                Some(((counts.namespace(namespace), entry.since, *head), *namespace))
            });
            let Some((_, namespace)) = heads.min_by(|a, b| a.0.cmp(&b.0)) else { break };
            let Some((head, _)) = lines.get_mut(namespace).and_then(VecDeque::pop_front) else { break };
            if head == build {
                return position;
            }
            counts.add(head, None);
        }
        self.waiting.len()
    }

    /// What a waiting build's status shows: the same as before until it is time to look again.
    fn wait(&mut self, build: &BuildRef) -> Admission {
        let shown = self.waiting.get(build).and_then(|entry| entry.shown);
        if let Some((at, position, waiting)) = shown
            && let Some(refresh) = refresh(position).checked_sub(at.elapsed()).filter(|left| !left.is_zero())
        {
            return Admission::Wait { position, waiting, refresh };
        }
        let (position, waiting) = (self.position(build), self.waiting.len());
        if let Some(entry) = self.waiting.get_mut(build) {
            entry.shown = Some((Instant::now(), position, waiting));
        }
        Admission::Wait { position, waiting, refresh: refresh(position) }
    }
}

fn refresh(position: usize) -> Duration {
    let times = u32::try_from(position.div_ceil(NEAR)).unwrap_or(u32::MAX);
    REFRESH.saturating_mul(times).min(LONGEST_REFRESH)
}

/// `1st`, `2nd`, `3rd`, `4th`, ...
pub fn ordinal(number: usize) -> String {
    let suffix = match (number % 10, number % 100) {
        (1, tens) if tens != 11 => "st",
        (2, tens) if tens != 12 => "nd",
        (3, tens) if tens != 13 => "rd",
        _ => "th",
    };
    format!("{number}{suffix}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn build(name: &str) -> BuildRef {
        let (namespace, name) = name.split_once('/').unwrap();
        BuildRef { namespace: namespace.into(), name: name.into() }
    }

    fn wants(since: i64, server: Option<&str>) -> Standing {
        let since = Timestamp::from_second(since).unwrap();
        Standing::Wants { server: server.map(Into::into), since, replaces: false }
    }

    fn queue(total: Option<usize>, per_namespace: Option<usize>, per_server: Option<usize>) -> (Queue, Woken) {
        let (wake, woken) = mpsc::unbounded_channel();
        (Queue::new(Limits { total, per_namespace, per_server }, wake), Woken(woken))
    }

    struct Woken(mpsc::UnboundedReceiver<BuildRef>);

    impl Woken {
        fn all(&mut self) -> Vec<String> {
            std::iter::from_fn(|| self.0.try_recv().ok()).map(|build| build.to_string()).collect()
        }
    }

    fn position(admission: Admission) -> Option<(usize, usize)> {
        match admission {
            Admission::Go => None,
            Admission::Wait { position, waiting, .. } => Some((position, waiting)),
        }
    }

    #[test]
    fn without_limits_everything_starts() {
        let (queue, _woken) = queue(None, None, None);
        assert!((0..100).all(|n| queue.settle(&build(&format!("a/{n}")), &wants(n, None)) == Admission::Go));
    }

    #[test]
    fn a_free_slot_wakes_who_is_next_and_only_them() {
        let (queue, mut woken) = queue(Some(1), None, None);
        assert_eq!(queue.settle(&build("a/1"), &wants(1, None)), Admission::Go);
        assert_eq!(position(queue.settle(&build("a/3"), &wants(3, None))), Some((1, 1)));
        assert_eq!(position(queue.settle(&build("a/2"), &wants(2, None))), Some((1, 2)));
        assert_eq!(woken.all(), [""; 0]);
        queue.settle(&build("a/1"), &Standing::Builds { server: None });
        queue.settle(&build("a/1"), &Standing::Idle);
        assert_eq!(woken.all(), ["a/2"]);
        // The slot is for who was woken, whoever else asks.
        assert!(position(queue.settle(&build("a/3"), &wants(3, None))).is_some());
        assert_eq!(queue.settle(&build("a/2"), &wants(2, None)), Admission::Go);
    }

    #[test]
    fn a_namespace_with_many_waiting_does_not_hold_up_the_others() {
        let (queue, _woken) = queue(Some(2), None, None);
        for n in 0..2 {
            assert_eq!(queue.settle(&build(&format!("many/{n}")), &wants(n, None)), Admission::Go);
        }
        for n in 2..50 {
            queue.settle(&build(&format!("many/{n}")), &wants(n, None));
        }
        // Last to come, next to build.
        assert_eq!(position(queue.settle(&build("few/1"), &wants(100, None))), Some((1, 49)));
    }

    #[test]
    fn each_limit_holds_and_lets_others_pass() {
        let (queue, _woken) = queue(None, Some(2), Some(1));
        assert_eq!(queue.settle(&build("a/1"), &wants(1, Some("vc1"))), Admission::Go);
        assert!(position(queue.settle(&build("a/2"), &wants(2, Some("vc1")))).is_some(), "the server is taken");
        assert_eq!(queue.settle(&build("a/3"), &wants(3, Some("vc2"))), Admission::Go);
        assert!(position(queue.settle(&build("a/4"), &wants(4, None))).is_some(), "the namespace has two");
        assert_eq!(queue.settle(&build("b/1"), &wants(5, None)), Admission::Go);
    }

    #[test]
    fn who_leaves_or_is_replaced_frees_or_keeps_the_slot() {
        let (queue, mut woken) = queue(Some(1), None, None);
        queue.settle(&build("a/1"), &wants(1, None));
        queue.settle(&build("a/2"), &wants(2, None));
        queue.settle(&build("a/3"), &wants(3, None));
        let replaced = Standing::Wants { server: None, since: Timestamp::from_second(9).unwrap(), replaces: true };
        assert_eq!(queue.settle(&build("a/1"), &replaced), Admission::Go);
        assert_eq!(woken.all(), [""; 0]);
        queue.leave(&build("a/2"));
        queue.leave(&build("a/1"));
        assert_eq!(woken.all(), ["a/3"]);
        assert_eq!(queue.waiting(), 1);
    }

    #[test]
    fn what_ran_before_the_start_counts() {
        let (queue, _woken) = queue(Some(1), None, None);
        queue.seed(build("a/1"), Standing::Builds { server: None });
        queue.seed(build("a/2"), wants(2, None));
        assert_eq!(position(queue.settle(&build("a/3"), &wants(3, None))), Some((2, 2)));
    }

    #[test]
    fn a_shown_position_stays_for_a_while() {
        let (queue, _woken) = queue(Some(1), None, None);
        queue.settle(&build("a/1"), &wants(1, None));
        let shown = queue.settle(&build("a/2"), &wants(2, None));
        for n in 3..200 {
            queue.settle(&build(&format!("a/{n}")), &wants(n, None));
        }
        assert_eq!(position(queue.settle(&build("a/2"), &wants(2, None))), position(shown));
        assert!(refresh(1) == REFRESH && refresh(100) > refresh(10) && refresh(100_000) == LONGEST_REFRESH);
    }

    #[test]
    fn ordinals_are_english() {
        let words = [1, 2, 3, 4, 11, 12, 13, 21, 102, 111].map(ordinal);
        assert_eq!(words, ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]);
    }

    proptest! {
        /// Whatever comes in whatever order: limits hold, and every build runs in the end.
        #[test]
        fn limits_hold_and_nobody_starves(
            builds in prop::collection::vec((0..3u8, 0..3u8, 0..50i64), 1..40),
            total in 1..4usize, per_namespace in 1..3usize, per_server in 1..3usize,
        ) {
            let (queue, mut woken) = queue(Some(total), Some(per_namespace), Some(per_server));
            let all: HashMap<BuildRef, Standing> = builds.iter().enumerate().map(|(n, (namespace, server, since))| {
                let server = (*server > 0).then(|| format!("vc{server}"));
                (build(&format!("ns{namespace}/{n}")), wants(*since, server.as_deref()))
            }).collect();
            let mut running: Vec<BuildRef> = vec![];
            let mut done = 0;
            for (build, standing) in &all {
                if queue.settle(build, standing) == Admission::Go {
                    running.push(build.clone());
                }
            }
            while let Some(ended) = running.pop() {
                prop_assert!(running.len() < total);
                for one in &running {
                    let same = |other: &&BuildRef| other.namespace == one.namespace;
                    prop_assert!(running.iter().filter(same).count() <= per_namespace);
                }
                done += 1;
                queue.settle(&ended, &Standing::Idle);
                for next in std::iter::from_fn(|| woken.0.try_recv().ok()).collect::<Vec<_>>() {
                    if queue.settle(&next, &all[&next]) == Admission::Go {
                        running.push(next);
                    }
                }
            }
            prop_assert_eq!(done, all.len());
        }
    }
}
