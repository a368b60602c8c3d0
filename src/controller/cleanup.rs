//! What builds leave in vCenter and Prism Central, and who removes it. The operator has no credentials there: a small Job
//! with the build's own document and Secrets does it, [`Scope::HalfMade`] after a build that ended without success,
//! [`Scope::Everything`] when the resource is deleted with its images. Planning is pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{Resource, ResourceExt, core::PartialObjectMeta};

use super::{
    events::Note,
    job_state::{self, JobState},
    plan::{Observed, Plan, Requeue},
    references::{Reference, Use},
    resources,
    status::raise,
};
use crate::{
    api::v1alpha1::{BUILD_ID_LABEL, BuildResult, DeletionPolicy, NodeImageBuildStatus, conditions::CLEAN_UP_FAILED},
    contract::{BuildReport, BuildRequest, Stage, shorten},
};

/// Annotation of a build's Secret: the [`Reference`]s that its clean-up needs, as JSON. Only builds that put something
/// into vCenter or Prism Central have it.
pub const NEEDS: &str = "nodeimagebuild.dev/clean-up";
/// Label of a clean-up's Job and pods: the build that it cleans up after.
pub const BUILD_LABEL: &str = "nodeimagebuild.dev/clean-up-of";
/// Label of a clean-up's Job and pods: its [`Scope`].
pub const SCOPE_LABEL: &str = "nodeimagebuild.dev/clean-up-scope";

/// A resource that is deleted waits this long for what a person can mend, then it goes.
pub(super) const LET_GO: Duration = Duration::from_secs(3600);
/// Wait before a clean-up is looked at again, whatever the watch says.
const RESYNC: Duration = Duration::from_secs(60);

/// What a clean-up removes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub enum Scope {
    /// What is not complete.
    HalfMade,
    /// Also the complete image that the build made.
    Everything,
}

impl Scope {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HalfMade => "clean-up",
            Self::Everything => "removal",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::HalfMade, Self::Everything].into_iter().find(|scope| scope.as_str() == text)
    }
}

/// A clean-up's Job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CleanUp {
    /// It works, or its deletion has begun.
    Active,
    Done,
    /// Kubernetes makes no further attempt; why.
    Failed {
        message: String,
    },
}

/// What was read about clean-ups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outside {
    /// Builds whose Secret says what a clean-up needs.
    pub builds: BTreeMap<String, Vec<Reference>>,
    /// Those of them that ended before they put anything anywhere.
    pub spotless: BTreeSet<String>,
    pub clean_ups: BTreeMap<(String, Scope), CleanUp>,
    /// Builds for which a pod cleans up.
    pub live: BTreeSet<String>,
}

/// What the Secret of such a build is marked with; nothing for other builds.
pub(super) fn annotations(
    request: &BuildRequest,
    references: &[Reference],
) -> Result<Option<BTreeMap<String, String>>, serde_json::Error> {
    use crate::contract::ProviderTarget::{Nutanix, Vsphere};
    let slot = match &request.provider_target {
        Some(Vsphere(target)) => &target.slot,
        Some(Nutanix(target)) => &target.slot,
        None => return Ok(None),
    };
    let needed = |reference: &&Reference| match &reference.used_as {
        Use::Credentials(used) => used == slot,
        Use::TrustBundle { .. } => true,
        Use::File { .. } => false,
    };
    let needs: Vec<_> = references.iter().filter(needed).collect();
    Ok(Some(BTreeMap::from([(NEEDS.to_owned(), serde_json::to_string(&needs)?)])))
}

impl Outside {
    /// From the Jobs, pods and Secrets of one resource.
    pub(super) fn read(jobs: &[&Job], pods: &[Pod], secrets: &[&PartialObjectMeta<Secret>]) -> Self {
        let mut outside = Self::default();
        for secret in secrets {
            let needs = secret.annotations().get(NEEDS).and_then(|json| serde_json::from_str(json).ok());
            if let (Some(build), Some(needs)) = (secret.labels().get(BUILD_ID_LABEL), needs) {
                outside.builds.insert(build.clone(), needs);
            }
        }
        for job in jobs {
            let labels = job.labels();
            if let Some(build) = labels.get(BUILD_ID_LABEL)
                && ended_before_publishing(job, pods)
            {
                outside.spotless.insert(build.clone());
            }
            let scope = labels.get(SCOPE_LABEL).and_then(|scope| Scope::parse(scope));
            if let (Some(build), Some(scope)) = (labels.get(BUILD_LABEL), scope) {
                outside.clean_ups.insert((build.clone(), scope), state(job, pods));
            }
        }
        let live = pods
            .iter()
            .filter(|pod| !job_state::has_ended(pod))
            .filter_map(|pod| pod.labels().get(BUILD_LABEL).cloned());
        outside.live = live.collect();
        outside
    }

    /// Whether anything cleans up after the build, or did. Its Jobs have to be gone before a build of that id runs again,
    /// whose half-made image they would take for the old one's.
    pub(super) fn concerns(&self, build_id: &str) -> bool {
        self.live.contains(build_id) || self.clean_ups.keys().any(|(build, _)| build == build_id)
    }

    /// Names of the clean-ups of a build.
    pub(super) fn of(&self, build_id: &str) -> impl Iterator<Item = (String, Scope)> {
        self.clean_ups.keys().filter(move |(build, _)| build == build_id).cloned()
    }
}

/// Whether the build's only attempt says that it ended in a stage before it put anything anywhere. Attempts that are gone say nothing.
fn ended_before_publishing(job: &Job, pods: &[Pod]) -> bool {
    let status = job.status.clone().unwrap_or_default();
    let failed = status.conditions.iter().flatten().any(|one| one.type_ == "Failed" && one.status == "True");
    let uid = job.uid();
    let mut own = pods.iter().filter(|pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == uid.as_ref()));
    let (Some(pod), None) = (own.next(), own.next()) else { return false };
    let report = job_state::report(pod);
    // Packer works at the provider from the beginning.
    let first = if resources::job::runs_packer(job) { Stage::Fetch } else { Stage::Publish };
    failed
        && status.failed.unwrap_or_default() <= 1
        && matches!(report, Some(BuildReport::Failed(report)) if report.stage < first)
}

fn state(job: &Job, pods: &[Pod]) -> CleanUp {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let is = |kind: &str| conditions.iter().any(|one| one.type_ == kind && one.status == "True");
    if job.meta().deletion_timestamp.is_some() {
        return CleanUp::Active;
    }
    if is("Complete") {
        return CleanUp::Done;
    }
    if !is("Failed") {
        return CleanUp::Active;
    }
    let message = match job_state::read(job, pods) {
        JobState::Failed { failure, .. } if failure.reason != "DeadlineExceeded" => failure.message,
        _ => "it did not end in time; see its pods' events".to_owned(),
    };
    CleanUp::Failed { message }
}

/// Where clean-ups stand that are wanted.
#[derive(Debug, Default)]
struct Steps {
    start: BTreeSet<(String, Scope)>,
    /// Builds for which something is under way, or will be.
    waiting: BTreeSet<String>,
    failed: Vec<(String, Scope, String)>,
}

fn steps(outside: &Outside, wanted: impl Iterator<Item = (String, Scope)>) -> Steps {
    let mut steps = Steps::default();
    for (build, scope) in wanted.filter(|(build, _)| !outside.spotless.contains(build)) {
        let key = (build.clone(), scope);
        match outside.clean_ups.get(&key) {
            Some(CleanUp::Done) => {}
            Some(CleanUp::Failed { message }) => steps.failed.push((build, scope, message.clone())),
            Some(CleanUp::Active) => {
                steps.waiting.insert(build);
            }
            None => {
                steps.start.insert(key);
                steps.waiting.insert(build);
            }
        }
    }
    steps
}

/// Whether a build has published, so that nothing half-made is left of it.
fn has_succeeded(observed: &Observed, status: &NodeImageBuildStatus, build_id: &str) -> bool {
    let by_history = status.history.iter().any(|one| one.build_id == build_id && one.result == BuildResult::Succeeded);
    let by_status =
        status.build_id.as_deref() == Some(build_id) && status.completion_time.is_some() && status.failure.is_none();
    let by_job =
        observed.jobs.iter().any(|job| job.build_id == build_id && matches!(job.state, JobState::Succeeded { .. }));
    by_history || by_status || by_job
}

/// Completes the plan of a resource that stays: cleans up after builds that ended without success, and keeps their Secrets
/// until that is done.
pub(super) fn plan(
    observed: &Observed,
    before: &NodeImageBuildStatus,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) {
    let outside = &observed.outside;
    let starting = plan.start.as_ref().map(|prepared| prepared.request.identity.build_id.clone());
    let is_over = |id: &String| {
        let runs = observed.jobs.iter().any(|job| job.build_id == *id && !job.state.is_finished());
        !runs && !observed.live_pods.contains(id)
    };
    let wanted: Vec<_> = outside
        .builds
        .keys()
        .filter(|id| {
            !has_succeeded(observed, status, id) && starting.as_ref() != Some(*id) && !plan.prune.contains(*id)
        })
        // The same inputs are about to be built again, which cleans up by itself.
        .filter(|id| !plan.replaces.contains(*id))
        .cloned()
        .collect();
    let half_made = wanted.iter().filter(|id| is_over(id)).map(|id| (id.clone(), Scope::HalfMade));
    let removals = plan.removals.iter().map(|id| (id.clone(), Scope::Everything));
    let steps = steps(outside, half_made.chain(removals));
    let failed = steps.failed.iter().map(|(id, _, _)| id);
    let unfinished: BTreeSet<_> =
        steps.waiting.iter().chain(failed).cloned().chain(wanted.iter().filter(|id| !is_over(id)).cloned()).collect();
    plan.delete_secrets.retain(|id| !unfinished.contains(id));
    plan.abandon.retain(|id| !unfinished.contains(id));
    // An image that goes with the resource, or after it was kept for long enough, is removed by what its Secret says,
    // whatever became of its Job.
    let spec = &observed.build.spec;
    if spec.deletion_policy == DeletionPolicy::Delete || spec.retention.is_some() {
        let in_history = |id: &String| status.history.iter().any(|entry| entry.build_id == *id);
        plan.delete_secrets
            .retain(|id| !(outside.builds.contains_key(id) && in_history(id) && has_succeeded(observed, status, id)));
    }
    for key in outside.clean_ups.keys() {
        let (id, _) = key;
        let secret_goes = plan.delete_secrets.contains(id) || plan.abandon.contains(id);
        if (secret_goes || !outside.builds.contains_key(id)) && outside.clean_ups[key] != CleanUp::Active {
            plan.delete_clean_ups.insert(key.clone());
        }
    }
    judge(observed, before, status, &steps.failed, plan, now);
    plan.clean_ups = steps.start;
}

/// Completes the plan of a resource that is deleted, once no build of it runs. Whether it has to stay for now.
pub(super) fn plan_deletion(
    observed: &Observed,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    waited: Duration,
    now: Timestamp,
) -> bool {
    let before = observed.build.status.clone().unwrap_or_default();
    let delete = observed.build.spec.deletion_policy == DeletionPolicy::Delete;
    let wanted = observed.outside.builds.keys().filter_map(|id| match (delete, has_succeeded(observed, status, id)) {
        (true, _) => Some((id.clone(), Scope::Everything)),
        (false, false) => Some((id.clone(), Scope::HalfMade)),
        (false, true) => None,
    });
    let steps = steps(&observed.outside, wanted);
    if waited >= LET_GO {
        let left = steps.failed.iter().map(|(id, _, message)| (id.clone(), message.clone()));
        let left: Vec<_> =
            left.chain(steps.waiting.iter().map(|id| (id.clone(), "it was not removed in time".to_owned()))).collect();
        plan.notes.extend(left.iter().map(|(id, message)| left_behind(observed, id, message)));
        return false;
    }
    judge(observed, &before, status, &steps.failed, plan, now);
    if before != *status {
        plan.status = Some(status.clone());
    }
    let busy = !steps.waiting.is_empty();
    plan.clean_ups = steps.start;
    plan.requeue = Requeue::After(if busy { RESYNC } else { LET_GO.saturating_sub(waited) });
    busy || !steps.failed.is_empty()
}

/// Says what stays when a resource goes before it is cleaned up after it.
pub(super) fn left_behind(observed: &Observed, build_id: &str, why: &str) -> Note {
    let message = format!(
        "what the build {build_id} made in {} stays there ({why}); look there for node-image-build-{build_id}{} and delete it",
        place(observed),
        if observed.build.spec.deletion_policy == DeletionPolicy::Delete { " and its image" } else { "" },
    );
    Note::warning("ImagesLeft", "Delete", message)
}

fn place(observed: &Observed) -> &'static str {
    if observed.build.spec.nutanix.is_some() { "Prism Central" } else { "vCenter" }
}

/// Tells of clean-ups that failed for good: a condition while it is so, an event when it begins.
fn judge(
    observed: &Observed,
    before: &NodeImageBuildStatus,
    status: &mut NodeImageBuildStatus,
    failed: &[(String, Scope, String)],
    plan: &mut Plan,
    now: Timestamp,
) {
    status.conditions.retain(|condition| condition.type_ != CLEAN_UP_FAILED);
    let [(id, scope, why), more @ ..] = failed else { return };
    let build = &observed.build;
    let (namespace, name) = (build.namespace().unwrap_or_default(), build.name_any());
    let job = resources::clean_up::name(&name, id, *scope);
    let others = if more.is_empty() { String::new() } else { format!(" (and {} more builds)", more.len()) };
    let end = if build.metadata.deletion_timestamp.is_some() {
        format!(
            ". It goes {} minutes after its deletion without that, at once by `kubectl patch nib -n {namespace} {name} \
             --type merge -p '{{\"metadata\":{{\"finalizers\":null}}}}'`; then node-image-build-{id} may be left there",
            LET_GO.as_secs() / 60
        )
    } else {
        String::new()
    };
    let message = format!(
        "what the build {id} left in {} could not be removed{others}: {}; mend that, then run `kubectl delete job -n \
         {namespace} {job}` to have it tried again{end}",
        place(observed),
        shorten(why, 2048),
    );
    if raise(before, status, (CLEAN_UP_FAILED, "CleanUpFailed"), &message, now) {
        plan.notes.push(Note::warning("CleanUpFailed", "CleanUp", message));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::by_the_other_engine(json!([]), "Install", true)]
    #[case::by_packer(json!([{"name": "copy-program"}]), "Install", false)]
    #[case::by_packer_before_it_began(json!([{"name": "copy-program"}]), "Prepare", true)]
    fn a_build_that_ended_before_it_put_anything_anywhere_needs_no_clean_up(
        #[case] init_containers: serde_json::Value,
        #[case] stage: &str,
        #[case] expected: bool,
    ) {
        let job: Job = serde_json::from_value(json!({
            "metadata": {"name": "job", "uid": "uid"},
            "spec": {"template": {"spec": {"initContainers": init_containers, "containers": [{"name": "build"}]}}},
            "status": {"failed": 1, "conditions": [{"type": "Failed", "status": "True"}]},
        }))
        .unwrap();
        let failed = json!({"failed": {"stage": stage, "class": "Transient", "reason": "NoAddress", "message": ""}});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "job", "uid": "uid"}]},
            "status": {"phase": "Failed", "containerStatuses": [{
                "name": "build", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 75, "message": failed.to_string()}},
            }]},
        }))
        .unwrap();
        assert_eq!(ended_before_publishing(&job, &[pod]), expected);
    }
}
