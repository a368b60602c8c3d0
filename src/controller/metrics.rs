//! The operator's Prometheus metrics. Labels are bounded: never a name, never text from a pod.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::contract::{BuildOutcome, FailureClass};

/// How a build ended.
#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct BuildLabels {
    /// `Succeeded`, `Failed`, `Cancelled` or `Superseded`.
    result: &'static str,
    /// The [`FailureClass`] of a failed build, else empty.
    class: &'static str,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// What the operator counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    started: Counter,
    finished: Family<BuildLabels, Counter>,
    stages: Family<StageLabels, Histogram>,
    reconcile_seconds: Histogram,
    reconcile_errors: Family<ReasonLabels, Counter>,
    leader: Gauge,
    waiting: Gauge,
    published_bytes: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("node_image_builder");
        let started = Counter::default();
        let finished = Family::<BuildLabels, Counter>::default();
        let stages = Family::<StageLabels, Histogram>::new_with_constructor(|| {
            // 1 s to over 2 h.
            Histogram::new(exponential_buckets(1.0, 2.0, 14))
        });
        let reconcile_seconds = Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let reconcile_errors = Family::<ReasonLabels, Counter>::default();
        registry.register("builds_started", "Build Jobs created", started.clone());
        registry.register("builds_finished", "Builds that ended, by result and failure class", finished.clone());
        registry.register("build_stage_seconds", "Time of each stage of successful builds", stages.clone());
        registry.register("reconcile_seconds", "Time of one reconciliation", reconcile_seconds.clone());
        registry.register("reconcile_errors", "Failed reconciliations, by reason", reconcile_errors.clone());
        let leader = Gauge::default();
        registry.register("leader", "1 for the operator that works, 0 for one that stands by", leader.clone());
        let (waiting, published_bytes) = (Gauge::default(), Counter::default());
        registry.register("builds_waiting", "Builds that wait for a slot", waiting.clone());
        registry.register(
            "published_bytes",
            "Size of all images that were published, each once",
            published_bytes.clone(),
        );
        Self {
            registry,
            started,
            finished,
            stages,
            reconcile_seconds,
            reconcile_errors,
            leader,
            waiting,
            published_bytes,
        }
    }
}

impl Metrics {
    pub fn leading(&self, leading: bool) {
        self.leader.set(leading.into());
        // Another one knows now who waits.
        self.waiting.set(0);
    }

    pub fn queued(&self, builds: usize) {
        self.waiting.set(i64::try_from(builds).unwrap_or(i64::MAX));
    }

    pub fn is_leading(&self) -> bool {
        self.leader.get() == 1
    }

    pub fn build_started(&self) {
        self.started.inc();
    }

    pub fn build_succeeded(&self, outcome: &BuildOutcome) {
        self.published_bytes.inc_by(outcome.image.size);
        self.finished.get_or_create(&BuildLabels { result: "Succeeded", class: "" }).inc();
        for (stage, seconds) in &outcome.stage_seconds {
            self.stages.get_or_create(&StageLabels { stage: stage.as_str() }).observe(*seconds);
        }
    }

    pub fn build_failed(&self, class: FailureClass) {
        let class = match class {
            FailureClass::BadInput => "BadInput",
            FailureClass::Environment => "Environment",
            FailureClass::Transient => "Transient",
            FailureClass::Cancelled => "Cancelled",
            FailureClass::Internal => "Internal",
        };
        self.finished.get_or_create(&BuildLabels { result: "Failed", class }).inc();
    }

    pub fn build_cancelled(&self) {
        self.finished.get_or_create(&BuildLabels { result: "Cancelled", class: "" }).inc();
    }

    pub fn build_superseded(&self) {
        self.finished.get_or_create(&BuildLabels { result: "Superseded", class: "" }).inc();
    }

    pub fn reconciled(&self, took: Duration) {
        self.reconcile_seconds.observe(took.as_secs_f64());
    }

    pub fn reconcile_failed(&self, reason: &'static str) {
        self.reconcile_errors.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Everything in `OpenMetrics` text.
    pub fn render(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
