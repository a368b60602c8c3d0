//! The operator's Prometheus metrics. Labels are bounded: never a name, never text from a pod as it is.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

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

/// Longest reason that becomes a label, in bytes.
const MAX_REASON: usize = 40;
/// Most reasons that become labels; docs/failures.md has fewer than 200.
const MAX_REASONS: usize = 256;

/// How a build ended.
#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct BuildLabels {
    /// `Succeeded`, `Failed`, `Cancelled` or `Superseded`.
    result: &'static str,
    /// The [`FailureClass`] of a failed build, else empty.
    class: &'static str,
}

/// How builds end. Each is there from the start: Prometheus sees no increase in a series that begins with 1.
const ENDS: [BuildLabels; 8] = [
    BuildLabels::unfailed("Succeeded"),
    BuildLabels::unfailed("Cancelled"),
    BuildLabels::unfailed("Superseded"),
    BuildLabels::failed(FailureClass::BadInput),
    BuildLabels::failed(FailureClass::Environment),
    BuildLabels::failed(FailureClass::Transient),
    BuildLabels::failed(FailureClass::Cancelled),
    BuildLabels::failed(FailureClass::Internal),
];

impl BuildLabels {
    const fn unfailed(result: &'static str) -> Self {
        Self { result, class: "" }
    }

    const fn failed(class: FailureClass) -> Self {
        let class = match class {
            FailureClass::BadInput => "BadInput",
            FailureClass::Environment => "Environment",
            FailureClass::Transient => "Transient",
            FailureClass::Cancelled => "Cancelled",
            FailureClass::Internal => "Internal",
        };
        Self { result: "Failed", class }
    }
}

/// Why a build failed, see [`Metrics::bounded`].
#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct FailureLabels {
    reason: String,
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
    failures: Family<FailureLabels, Counter>,
    /// Those that are labels.
    reasons: Mutex<BTreeSet<String>>,
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
        for end in &ENDS {
            drop(finished.get_or_create(end));
        }
        let failures = Family::<FailureLabels, Counter>::default();
        registry.register("build_failures", "Builds that failed, by reason", failures.clone());
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
            failures,
            reasons: Mutex::default(),
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
        self.finished.get_or_create(&BuildLabels::unfailed("Succeeded")).inc();
        for (stage, seconds) in &outcome.stage_seconds {
            self.stages.get_or_create(&StageLabels { stage: stage.as_str() }).observe(*seconds);
        }
    }

    pub fn build_failed(&self, class: FailureClass, reason: &str) {
        self.finished.get_or_create(&BuildLabels::failed(class)).inc();
        self.failures.get_or_create(&FailureLabels { reason: self.bounded(reason) }).inc();
    }

    /// The reason as a label. It comes from a pod, which may say anything: what is no word of ours, or one too many, is
    /// `Other`.
    fn bounded(&self, reason: &str) -> String {
        let word = (1..=MAX_REASON).contains(&reason.len()) && reason.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if word && (reasons.contains(reason) || reasons.len() < MAX_REASONS) {
            reasons.insert(reason.to_owned());
            reason.to_owned()
        } else {
            "Other".to_owned()
        }
    }

    pub fn build_cancelled(&self) {
        self.finished.get_or_create(&BuildLabels::unfailed("Cancelled")).inc();
    }

    pub fn build_superseded(&self) {
        self.finished.get_or_create(&BuildLabels::unfailed("Superseded")).inc();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_reason_and_only_words_become_labels() {
        let metrics = Metrics::default();
        let long = "A".repeat(MAX_REASON + 1);
        for reason in ["DiskFull", "DiskFull", "", "two words", "\"quoted\"", &long] {
            metrics.build_failed(FailureClass::Environment, reason);
        }
        let text = metrics.render().unwrap();
        let name = "node_image_builder_build_failures_total{reason=";
        assert!(text.contains(&format!("{name}\"DiskFull\"}} 2")), "{text}");
        assert!(text.contains(&format!("{name}\"Other\"}} 4")), "{text}");
        assert!(text.contains("builds_finished_total{result=\"Failed\",class=\"Environment\"} 6"), "{text}");
    }

    #[test]
    fn every_end_of_a_build_is_counted_from_nothing() {
        let text = Metrics::default().render().unwrap();
        assert_eq!(text.matches("builds_finished_total{").count(), ENDS.len());
        assert!(text.contains("builds_finished_total{result=\"Failed\",class=\"BadInput\"} 0"), "{text}");
    }

    #[test]
    fn reasons_without_end_do_not_become_labels_without_end() {
        let metrics = Metrics::default();
        for n in 0..1000 {
            metrics.build_failed(FailureClass::BadInput, &format!("Reason{n}"));
        }
        // Those, and `Other`.
        assert_eq!(metrics.render().unwrap().matches("build_failures_total{").count(), MAX_REASONS + 1);
    }
}
