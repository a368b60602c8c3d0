//! What a build's Job and pods show, reduced to the few states that the plan distinguishes. Pure.

use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ContainerState, ContainerStateTerminated, Pod, PodStatus},
};

use super::resources::job::EXIT_CODES;
use crate::contract::{BUILD_CONTAINER, BuildOutcome, BuildReport, FailureClass, Stage, shorten};

/// Longest text taken over from a pod into conditions and status, in bytes. A pod is not trusted to be brief.
const MAX_TEXT: usize = 2048;

/// A build's Job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobState {
    /// The Job works or waits; says nothing about a pod.
    Active { failed_attempts: u32, last_failure: Option<Failure>, pod: PodState },
    /// The pod ended well and its report was readable.
    Succeeded { outcome: Box<BuildOutcome>, completed: Option<Timestamp> },
    /// Kubernetes makes no further attempt, or the result can not be read.
    Failed { failure: Failure, completed: Option<Timestamp> },
}

/// The pod of the current attempt.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PodState {
    /// No pod yet, or only pods of attempts that ended.
    Absent,
    /// It does not run yet; `blocker` says why, where Kubernetes does. That there is no user namespace for it only an event
    /// says.
    Pending { pod: String, since: Option<Timestamp>, blocker: Option<Blocker>, user_namespace: bool },
    /// The build container runs. It may hang all the same.
    Running { pod: String },
}

/// What keeps a pod from starting. It may pass by itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Blocker {
    pub reason: &'static str,
    pub message: String,
}

/// Why an attempt or a whole build failed, and where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    pub stage: Option<Stage>,
    pub class: FailureClass,
    pub reason: String,
    pub message: String,
    pub pod: Option<String>,
    pub container: Option<String>,
}

impl JobState {
    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Succeeded { .. } | Self::Failed { .. })
    }
}

/// Whether the state of the Job may call for anything: not while it waits for its first pod to end.
pub(super) fn job_is_news(job: &Job) -> bool {
    let failed = job.status.as_ref().is_some_and(|status| status.failed.unwrap_or_default() > 0);
    failed || job.metadata.deletion_timestamp.is_some() || read(job, &[]).is_finished()
}

/// Whether the state of the pod may call for anything: neither when it was only just created nor when it ended well, which its
/// Job says as well.
pub(super) fn pod_is_news(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let untouched = status.is_none_or(|status| status.conditions.is_none() && status.container_statuses.is_none());
    match phase(pod) {
        "Pending" | "" => !untouched || pod.metadata.deletion_timestamp.is_some(),
        "Succeeded" => false,
        _ => true,
    }
}

/// Whether nothing runs in the pod any more.
pub(super) fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Reads the Job and those of `pods` that belong to it.
pub fn read(job: &Job, pods: &[Pod]) -> JobState {
    let uid = job.metadata.uid.as_deref();
    let mut pods: Vec<&Pod> = pods
        .iter()
        .filter(|pod| pod.metadata.owner_references.iter().flatten().any(|owner| Some(owner.uid.as_str()) == uid))
        .collect();
    pods.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));

    let status = job.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let condition =
        |kind: &str| conditions.iter().find(|condition| condition.type_ == kind && condition.status == "True");
    let last_failure = pods.iter().rev().find(|pod| phase(pod) == "Failed").map(|pod| pod_failure(pod));

    if let Some(complete) = condition("Complete") {
        let completed = status.completion_time.or(complete.last_transition_time.clone()).map(|time| time.0);
        let pod = pods.iter().rev().find(|pod| phase(pod) == "Succeeded");
        return match pod.map(|pod| (pod, report(pod))) {
            Some((_, Some(BuildReport::Succeeded(outcome)))) => JobState::Succeeded { outcome, completed },
            Some((pod, _)) => JobState::Failed { failure: report_missing(pod), completed },
            None => JobState::Failed { failure: pod_gone(), completed },
        };
    }
    if let Some(failed) = condition("Failed") {
        let completed = failed.last_transition_time.as_ref().map(|time| time.0);
        let reason = failed.reason.as_deref().unwrap_or_default();
        let failure = match (reason, last_failure) {
            ("DeadlineExceeded", last) => deadline_exceeded(job, last),
            (_, Some(failure)) => failure,
            (_, None) => Failure {
                stage: None,
                class: FailureClass::Transient,
                reason: "PodLost".to_owned(),
                message: format!(
                    "the Job failed ({reason}: {}) and its pods are gone, so nothing tells why; {REBUILD_HINT}",
                    shorten(failed.message.as_deref().unwrap_or("no message"), MAX_TEXT)
                ),
                pod: None,
                container: None,
            },
        };
        return JobState::Failed { failure, completed };
    }
    let current = pods.iter().rev().find(|pod| matches!(phase(pod), "Pending" | "Running" | ""));
    JobState::Active {
        failed_attempts: u32::try_from(status.failed.unwrap_or(0)).unwrap_or(0),
        last_failure,
        pod: current.map_or(PodState::Absent, |pod| pod_state(pod)),
    }
}

/// How a person asks for another attempt.
pub const REBUILD_HINT: &str =
    "to try again, set a new value of the annotation nodeimagebuild.dev/rebuild on the NodeImageBuild";

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn name(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}

fn build_state(status: &PodStatus) -> Option<&ContainerState> {
    status.container_statuses.iter().flatten().find(|container| container.name == BUILD_CONTAINER)?.state.as_ref()
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    build_state(pod.status.as_ref()?)?.terminated.as_ref()
}

/// What the build container of a pod said in the end.
pub(super) fn report(pod: &Pod) -> Option<BuildReport> {
    serde_json::from_str(terminated(pod)?.message.as_deref()?).ok()
}

fn pod_state(pod: &Pod) -> PodState {
    let status = pod.status.clone().unwrap_or_default();
    let state = build_state(&status);
    if state.is_some_and(|state| state.running.is_some()) {
        return PodState::Running { pod: name(pod) };
    }
    // The image of a container that runs before the build keeps it from starting as well.
    let before = status.init_container_statuses.iter().flatten().find_map(|one| one.state.as_ref()?.waiting.as_ref());
    let waiting = before.or_else(|| state?.waiting.as_ref());
    let image_blocker = waiting.and_then(|waiting| {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let message = shorten(waiting.message.as_deref().unwrap_or_default(), MAX_TEXT);
        match reason {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" | "RegistryUnavailable" => {
                Some(Blocker {
                    reason: "ImagePullFailed",
                    message: format!(
                        "the node can not get the builder image ({reason}: {message}); check the operator's \
                         --builder-image and the node's access to that registry"
                    ),
                })
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => Some(Blocker {
                reason: "ContainerNotCreated",
                message: format!("the node can not start the build container ({reason}: {message})"),
            }),
            _ => None,
        }
    });
    let unschedulable = status.conditions.iter().flatten().find(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
    });
    let blocker = image_blocker.or_else(|| {
        unschedulable.map(|condition| Blocker {
            reason: "Unschedulable",
            message: format!(
                "no node takes the build pod: {}; make room, or change spec.build.resources, nodeSelector or tolerations",
                shorten(condition.message.as_deref().unwrap_or("no message"), MAX_TEXT)
            ),
        })
    });
    PodState::Pending {
        pod: name(pod),
        since: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
        blocker,
        user_namespace: pod.spec.as_ref().is_some_and(|spec| spec.host_users == Some(false)),
    }
}

/// What keeps a pod from starting that kubelet has no user namespace for, by what it says of the pod's sandbox.
pub(super) fn no_user_namespace(said: &str) -> Option<Blocker> {
    ["hostUsers", "user namespace", "userns", "idmap"].iter().any(|word| said.contains(word)).then(|| Blocker {
        reason: "UserNamespacesUnsupported",
        message: format!(
            "the node gives the build pod no user namespace ({}); choose nodes with containerd 2.0, runc 1.2 and Linux 6.3 or \
             newer (builds.nodeSelector), or have the operator installed without builds.userNamespaces",
            shorten(said, MAX_TEXT)
        ),
    })
}

fn deadline_exceeded(job: &Job, last: Option<Failure>) -> Failure {
    let seconds = job.spec.as_ref().and_then(|spec| spec.active_deadline_seconds).unwrap_or_default();
    let earlier =
        last.as_ref().map_or(String::new(), |failure| format!("; an earlier attempt failed: {}", failure.message));
    Failure {
        stage: last.as_ref().and_then(|failure| failure.stage),
        class: FailureClass::Environment,
        reason: "DeadlineExceeded".to_owned(),
        message: format!(
            "the build did not finish within spec.build.timeout ({seconds} s, all attempts together) and was \
             stopped{earlier}; allow more time or give it more CPU"
        ),
        pod: last.and_then(|failure| failure.pod),
        container: Some(BUILD_CONTAINER.to_owned()),
    }
}

fn report_missing(pod: &Pod) -> Failure {
    Failure {
        stage: None,
        class: FailureClass::Internal,
        reason: "ReportMissing".to_owned(),
        message: format!(
            "the build container ended with success but left no readable report, so the image can not be trusted; is \
             the builder image of the operator's version ({})? {REBUILD_HINT}",
            crate::contract::VERSION
        ),
        pod: Some(name(pod)),
        container: Some(BUILD_CONTAINER.to_owned()),
    }
}

fn pod_gone() -> Failure {
    Failure {
        stage: None,
        class: FailureClass::Transient,
        reason: "ReportLost".to_owned(),
        message: format!("the build ended, but its pod was removed before its report was read; {REBUILD_HINT}"),
        pod: None,
        container: None,
    }
}

/// Why a pod that Kubernetes calls failed did so.
fn pod_failure(pod: &Pod) -> Failure {
    let failure = |class, reason: &str, message: String| Failure {
        stage: None,
        class,
        reason: reason.to_owned(),
        message,
        pod: Some(name(pod)),
        container: Some(BUILD_CONTAINER.to_owned()),
    };
    let stopped = match report(pod) {
        Some(BuildReport::Failed(report)) => {
            let failure = Failure {
                stage: Some(report.stage),
                reason: shorten(&report.reason, 128),
                ..failure(report.class, "", shorten(&report.message, MAX_TEXT))
            };
            // One that was told to stop does not know why; Kubernetes may.
            if report.class != FailureClass::Cancelled {
                return failure;
            }
            Some(failure)
        }
        Some(BuildReport::Succeeded(_)) | None => None,
    };
    let status = pod.status.clone().unwrap_or_default();
    let told = shorten(status.message.as_deref().unwrap_or("no message"), MAX_TEXT);
    match status.reason.as_deref() {
        Some("Evicted") => {
            return failure(
                FailureClass::Environment,
                "PodEvicted",
                format!(
                    "the node evicted the build pod ({told}); raise spec.build.resources.requests (ephemeral-storage, \
                     memory) so that a node with room is chosen"
                ),
            );
        }
        Some("DeadlineExceeded") => {
            return failure(
                FailureClass::Environment,
                "DeadlineExceeded",
                format!("the attempt took too long ({told})"),
            );
        }
        Some(_) | None => {}
    }
    if let Some(disruption) =
        status.conditions.iter().flatten().find(|c| c.type_ == "DisruptionTarget" && c.status == "True")
    {
        return failure(
            FailureClass::Transient,
            "PodDisrupted",
            format!(
                "the cluster removed the build pod ({}: {})",
                disruption.reason.as_deref().unwrap_or("no reason"),
                shorten(disruption.message.as_deref().unwrap_or("no message"), MAX_TEXT)
            ),
        );
    }
    if let Some(failure) = stopped {
        return failure;
    }
    let Some(end) = terminated(pod) else {
        return failure(
            FailureClass::Transient,
            "PodLost",
            format!(
                "the pod failed without its container having run ({}: {told})",
                status.reason.as_deref().unwrap_or("no reason")
            ),
        );
    };
    let text = shorten(end.message.as_deref().unwrap_or("no message").trim(), MAX_TEXT);
    match end.reason.as_deref() {
        Some("OOMKilled") => failure(
            FailureClass::Environment,
            "OutOfMemory",
            "the build needed more memory than its limit and was killed; raise spec.build.resources.limits.memory"
                .to_owned(),
        ),
        Some("StartError" | "ContainerCannotRun") => failure(
            FailureClass::Environment,
            "ContainerNotCreated",
            format!("the node could not start the build container: {text}"),
        ),
        Some(_) | None => failure(
            class_of_exit_code(end.exit_code),
            "BuildCrashed",
            format!(
                "the build container ended with exit code {}{} and left no readable report ({text}); see `kubectl logs -n {} {}`",
                end.exit_code,
                end.signal.map_or(String::new(), |signal| format!(" by signal {signal}")),
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                name(pod),
            ),
        ),
    }
}

fn class_of_exit_code(code: i32) -> FailureClass {
    EXIT_CODES.into_iter().find(|class| i32::from(class.exit_code()) == code).unwrap_or(FailureClass::Internal)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_and_pods_are_news_when_something_may_follow() {
        let job = |status| serde_json::from_value::<Job>(json!({ "status": status })).unwrap();
        assert!(!job_is_news(&Job::default()) && !job_is_news(&job(json!({ "active": 1, "ready": 1 }))));
        let ended = json!({ "conditions": [{ "type": "Complete", "status": "True" }] });
        assert!(job_is_news(&job(json!({ "active": 1, "failed": 1 }))) && job_is_news(&job(ended)));
        let pod = |status| serde_json::from_value::<Pod>(json!({ "status": status })).unwrap();
        for quiet in [json!({ "phase": "Pending" }), json!({ "phase": "Succeeded", "conditions": [] })] {
            assert!(!pod_is_news(&pod(quiet)));
        }
        for news in [
            json!({ "phase": "Pending", "conditions": [] }),
            json!({ "phase": "Running" }),
            json!({ "phase": "Failed" }),
        ] {
            assert!(pod_is_news(&pod(news)));
        }
    }

    #[test]
    fn a_build_that_stopped_because_its_pod_was_evicted_says_so() {
        let report = json!({ "failed": {
            "stage": "Install", "class": "Cancelled", "reason": "Cancelled", "message": "the build was cancelled",
        }});
        let end = json!({ "exitCode": 130, "message": report.to_string() });
        let status = |reason: Option<&str>| {
            let build = json!({ "name": BUILD_CONTAINER, "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "terminated": end } });
            json!({ "phase": "Failed", "reason": reason, "message": "it used too much", "containerStatuses": [build] })
        };
        for (reason, expected) in [(Some("Evicted"), "PodEvicted"), (None, "Cancelled")] {
            let pod: Pod = serde_json::from_value(json!({ "status": status(reason) })).unwrap();
            assert_eq!(pod_failure(&pod).reason, expected);
        }
    }
}
