//! New builds come first: while one of many that were applied at once has no Job yet, the others' requests wait.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, timeout_at},
};

use super::{BuildRef, apply::Announcement};

/// Passes over other builds that go on while new ones wait. There may always be new ones.
const OTHERS: usize = 8;
/// Longest time that the announcement of a start waits for other starts.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most announcements, and new resources, that are kept in memory until their turn comes.
const MOST_KEPT: usize = 512;

/// New builds whose first pass has not started them yet, and what was not said of those that it started.
#[derive(Debug)]
pub struct Starts {
    waiting: watch::Sender<HashSet<BuildRef>>,
    others: Arc<Semaphore>,
    announcements: mpsc::Sender<Announcement>,
}

/// That a pass may go on. It ends with this.
#[derive(Debug)]
pub(super) struct Turn {
    /// The build is new, and this the first pass over it.
    pub(super) is_first: bool,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Starts {
    /// Also gives the announcements, each when its turn has come.
    pub(super) fn new() -> (Self, mpsc::Receiver<Announcement>) {
        let (announcements, turns) = mpsc::channel(MOST_KEPT);
        let others = Arc::new(Semaphore::new(OTHERS));
        (Self { waiting: watch::Sender::default(), others, announcements }, turns)
    }

    /// The watch brought a new build; whether there is room to keep all of it.
    pub(super) fn arrived(&self, build: &BuildRef) -> bool {
        let mut room = false;
        self.waiting.send_if_modified(|waiting| {
            room = waiting.len() < MOST_KEPT;
            waiting.insert(build.clone());
            // It is waited for that there are none.
            false
        });
        room
    }

    /// The build has its Job, or gets none for now.
    pub(super) fn left(&self, build: &BuildRef) {
        self.waiting.send_if_modified(|waiting| waiting.remove(build) && waiting.is_empty());
    }

    /// The watch begins anew, and brings all that are new.
    pub(super) fn forget_all(&self) {
        self.waiting.send_replace(HashSet::new());
    }

    /// Lets a pass go on, unless it is one of too many over builds that are not new; then it comes back later.
    pub(super) fn turn(&self, build: &BuildRef) -> Option<Turn> {
        let waiting = self.waiting.borrow();
        let is_first = waiting.contains(build);
        let permit = if is_first || waiting.is_empty() {
            None
        } else {
            Some(Arc::clone(&self.others).try_acquire_owned().ok()?)
        };
        Some(Turn { is_first, _permit: permit })
    }

    /// Has what is to be said of a start wait for other starts. Gives it back where there are none, or no room.
    pub(super) fn postpone(&self, announcement: Announcement) -> Option<Announcement> {
        if self.waiting.borrow().is_empty() {
            return Some(announcement);
        }
        self.announcements.try_send(announcement).err().map(mpsc::error::TrySendError::into_inner)
    }

    /// Waits for other starts, unless the operator is about to end. An announcement of that time has waited long enough then.
    pub(super) async fn give_way(&self, since: Instant) {
        if self.announcements.is_closed() {
            return;
        }
        let mut waiting = self.waiting.subscribe();
        // Neither that time is over nor that there will be no other starts is a failure.
        let _ = timeout_at(since + PATIENCE, waiting.wait_for(HashSet::is_empty)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(name: &str) -> BuildRef {
        BuildRef { namespace: "images".into(), name: name.into() }
    }

    #[test]
    fn others_go_on_a_few_at_a_time_while_new_builds_wait() {
        let (starts, _turns) = Starts::new();
        let all: Vec<_> = (0..100).map(|_| starts.turn(&build("old"))).collect();
        assert!(all.iter().flatten().all(|turn| !turn.is_first) && all.iter().all(Option::is_some));
        assert!(starts.arrived(&build("a")));
        let mut few: Vec<_> = (0..100).filter_map(|_| starts.turn(&build("old"))).collect();
        assert_eq!(few.len(), OTHERS);
        assert!(starts.turn(&build("a")).unwrap().is_first);
        few.pop();
        assert!(starts.turn(&build("old")).is_some());
        starts.left(&build("a"));
        assert!(!starts.turn(&build("a")).unwrap().is_first && starts.turn(&build("old")).is_some());
    }

    #[test]
    fn not_all_of_thousands_of_new_builds_is_kept() {
        let (starts, _turns) = Starts::new();
        let kept = (0..5000).filter(|n| starts.arrived(&build(&n.to_string()))).count();
        assert_eq!(kept, MOST_KEPT);
        assert!(starts.turn(&build("4999")).unwrap().is_first);
        starts.forget_all();
        assert!(!starts.turn(&build("4999")).unwrap().is_first);
    }

    #[tokio::test(start_paused = true)]
    async fn announcements_wait_for_the_last_start_and_not_for_ever() {
        let (starts, _turns) = Starts::new();
        starts.give_way(Instant::now()).await;
        starts.arrived(&build("a"));
        starts.arrived(&build("b"));
        let begin = Instant::now();
        starts.give_way(begin).await;
        assert_eq!(begin.elapsed(), PATIENCE);
        starts.give_way(begin).await;
        assert_eq!(begin.elapsed(), PATIENCE, "it has waited");
        let leave = async {
            starts.left(&build("a"));
            tokio::time::sleep(PATIENCE / 2).await;
            starts.left(&build("b"));
        };
        let begin = Instant::now();
        tokio::join!(starts.give_way(begin), leave);
        assert_eq!(begin.elapsed(), PATIENCE / 2);
    }
}
