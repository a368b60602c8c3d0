//! Waiting for a target that is away.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use super::PublishError;

/// Longest pause between two attempts.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// Pauses that grow, until a target was away for too long.
#[derive(Debug)]
pub(super) struct Patience {
    target: String,
    limit: Duration,
    away: Option<(Instant, ExponentialBackoff)>,
}

impl Patience {
    pub(super) fn new(target: String, limit: Duration) -> Self {
        Self { target, limit, away: None }
    }

    /// The target answered as it should.
    pub(super) fn renew(&mut self) {
        self.away = None;
    }

    /// Pauses, or gives up because of `cause`.
    pub(super) async fn wait(
        &mut self,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<(), PublishError> {
        self.wait_at_least(Duration::ZERO, cause).await
    }

    /// The same, with a pause that the target asked for.
    pub(super) async fn wait_at_least(
        &mut self,
        least: Duration,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<(), PublishError> {
        let cause = cause.into();
        let (since, delays) = self.away.get_or_insert_with(|| (Instant::now(), delays()));
        let waited = since.elapsed();
        if waited >= self.limit {
            return Err(PublishError::Unavailable { target: self.target.clone(), waited, source: cause });
        }
        tracing::warn!(target_url = %self.target, waited_seconds = waited.as_secs(), "will try again: {cause}");
        let delay = delays.next().unwrap_or(MAX_DELAY).max(least).min(self.limit.saturating_sub(waited));
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

fn delays() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(MAX_DELAY)
        .with_jitter()
        .without_max_times()
        .build()
}
