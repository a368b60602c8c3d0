//! How long to wait after the n-th failure in a row of one object: exponential, with jitter, forgotten after success.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Wait after the first failure.
const FIRST: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST: Duration = Duration::from_secs(300);
/// Objects that did not fail for this long are forgotten; it covers objects that are gone for good.
const FORGET: Duration = Duration::from_secs(3600);

/// Failures in a row, by the object's uid.
#[derive(Debug, Default)]
pub struct Backoff(Mutex<HashMap<String, (u32, Instant)>>);

impl Backoff {
    /// Counts a failure and gives the wait before the next attempt.
    pub fn failed(&self, uid: &str) -> Duration {
        let now = Instant::now();
        let Ok(mut failures) = self.0.lock() else { return LONGEST };
        failures.retain(|_, (_, last)| now.duration_since(*last) < FORGET);
        let (count, last) = failures.entry(uid.to_owned()).or_insert((0, now));
        *count = count.saturating_add(1);
        *last = now;
        wait(*count, jitter(uid, *count))
    }

    /// The object is well: its next failure is the first again.
    pub fn succeeded(&self, uid: &str) {
        if let Ok(mut failures) = self.0.lock() {
            failures.remove(uid);
        }
    }
}

/// `FIRST` doubled with each failure, at most `LONGEST`, of which `jitter` (0.0 to 1.0) takes away up to a third.
fn wait(failures: u32, jitter: f64) -> Duration {
    let full = FIRST.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1).min(16))).min(LONGEST);
    full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 3.0)
}

/// Spreads objects that failed together. Needs no randomness: uids are random.
fn jitter(uid: &str, failures: u32) -> f64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (uid, failures).hash(&mut hasher);
    f64::from(u16::try_from(hasher.finish() & 0xffff).unwrap_or_default()) / f64::from(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_the_longest_and_start_again_after_success() {
        let backoff = Backoff::default();
        let waits: Vec<Duration> = (0..12).map(|_| backoff.failed("a")).collect();
        assert!(waits[0] <= FIRST && waits[0] >= FIRST.mul_f64(0.6));
        assert!(waits[4] > waits[1]);
        assert!(waits.iter().all(|wait| *wait <= LONGEST));
        assert!(waits[11] >= LONGEST.mul_f64(0.6));
        assert!(backoff.failed("b") <= FIRST, "another object has its own count");
        backoff.succeeded("a");
        assert!(backoff.failed("a") <= FIRST);
    }

    #[test]
    fn objects_that_fail_together_come_back_apart() {
        let waits: std::collections::BTreeSet<Duration> =
            (0..100).map(|n| wait(8, jitter(&format!("uid-{n}"), 8))).collect();
        assert!(waits.len() > 90);
    }
}
