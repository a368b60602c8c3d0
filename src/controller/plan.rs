//! What to do and what to say, from what was observed. Pure: the same observation at the same time gives the same plan,
//! and a plan that was carried out leads to one that does nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use kube::ResourceExt;

use super::{
    cleanup::{self, Outside, Scope},
    events::Note,
    job_state::{Failure, JobState, PodState},
    queue::{Admission, Standing, ordinal, server},
    rebuild::{Due, Schedule},
    retention::{self, Usage},
    status::{Verdict, condition, failure_status, judge, record, set_image, time, trim},
    validate::{Prepared, Refusal, Wish, wish},
};
use crate::{
    api::v1alpha1::{
        BuildResult, DeletionPolicy, FINALIZER, FailureStatus, HistoryEntry, NodeImageBuild, NodeImageBuildStatus,
        Phase, ReleaseStatus, conditions,
    },
    contract::{BuildOutcome, FailureClass, Progress},
};

/// How long a pod may be unable to start before that is worth telling.
const BLOCKER_GRACE: Duration = Duration::from_secs(10);
/// A build that runs is looked at this often even when no watch says that anything changed.
const ACTIVE_RESYNC: Duration = Duration::from_secs(300);
/// A Job has its pod within this time, unless something forbids it.
const POD_EXPECTED: Duration = Duration::from_secs(3);
/// Wait before a Job without a pod, or with one that may get no user namespace, is looked at again. A Job controller that has
/// thousands to do may need minutes: the longer there is no pod, the longer the wait.
const NO_POD_RESYNC: Duration = Duration::from_secs(15);
/// What the resource asks for may become possible without anything in the cluster changing, such as a new release.
const REFUSED_RESYNC: Duration = Duration::from_secs(600);
/// Deletion waits this long for the build's pods to end.
const PODS_END: Duration = Duration::from_secs(300);
/// Deletion tries this long to remove files from the artifact server.
const FILES_END: Duration = Duration::from_secs(600);
/// Wait before something that is being deleted is looked at again.
const DELETING_RESYNC: Duration = Duration::from_secs(5);
/// Longest wait for a moment that is known: clocks are set, and a pass a day costs nothing.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// A Job of the resource.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedJob {
    pub build_id: String,
    /// Its deletion has begun.
    pub deleting: bool,
    /// It waits for what the operator no longer gives to builds.
    pub outdated: bool,
    pub created: Option<Timestamp>,
    /// What was wished when it was made.
    pub wish: Wish,
    pub inputs_digest: Option<String>,
    /// As in the status.
    pub trigger: Option<String>,
    pub release: Option<ReleaseStatus>,
    pub state: JobState,
}

impl ObservedJob {
    fn age(&self, now: Timestamp) -> Duration {
        self.created.map_or(POD_EXPECTED, |created| elapsed(created, now))
    }

    /// Whether it should have a pod by now and has none.
    pub(super) fn lacks_pod(&self, now: Timestamp) -> bool {
        matches!(self.state, JobState::Active { pod: PodState::Absent, .. })
            && !self.deleting
            && self.age(now) >= POD_EXPECTED
    }
}

/// Everything that was read.
#[derive(Clone, Debug)]
pub struct Observed {
    pub build: Arc<NodeImageBuild>,
    pub wish: Wish,
    pub jobs: Vec<ObservedJob>,
    /// Builds whose Secret exists.
    pub secrets: BTreeSet<String>,
    /// Builds that have a pod which has not ended.
    pub live_pods: BTreeSet<String>,
    /// Why no pod of a Job could be created, by build.
    pub pod_refusals: BTreeMap<String, String>,
    /// Progress of the running pod.
    pub progress: Option<Progress>,
    /// The release manifest is not the one that the newest build was compared with.
    pub manifest_changed: bool,
    /// What is left in vCenter or Prism Central.
    pub outside: Outside,
    /// What the clusters name, where older images are to go.
    pub usage: Usage,
}

/// Whether a build can be started.
#[derive(Clone, Debug, PartialEq)]
pub enum Inputs {
    /// Nothing has to start, so nobody looked.
    NotNeeded,
    Ready(Box<Prepared>, ReleaseStatus),
    /// A build was due, and would make the newest image again.
    Unchanged,
    /// Not until somebody acts.
    Refused(Refusal),
    /// Not now; it is tried again.
    Unavailable(Refusal),
}

/// What to do, in this order: finalizer, start, status, the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub add_finalizer: bool,
    /// Secret and Job to create.
    pub start: Option<Box<Prepared>>,
    /// Builds whose Jobs are deleted, with their pods.
    pub delete_jobs: BTreeSet<String>,
    /// Builds whose Secrets are deleted.
    pub delete_secrets: BTreeSet<String>,
    /// Builds that make room for another one of the same id.
    pub replaces: BTreeSet<String>,
    /// Clean-ups whose Jobs are created.
    pub clean_ups: BTreeSet<(String, Scope)>,
    /// Clean-ups whose Jobs are deleted.
    pub delete_clean_ups: BTreeSet<(String, Scope)>,
    /// Builds whose half-made uploads are deleted, then their Secret.
    pub abandon: BTreeSet<String>,
    /// Builds whose images are removed from vCenter or Prism Central: clean-ups follow from it.
    pub removals: BTreeSet<String>,
    /// Builds whose files are deleted before the status forgets them.
    pub prune: BTreeSet<String>,
    /// The status, unless the resource is going away.
    pub status: Option<NodeImageBuildStatus>,
    pub notes: Vec<Note>,
    pub counts: Vec<Count>,
    /// The pod whose log is followed.
    pub follow: Option<String>,
    /// The last thing done for a resource that is going away.
    pub farewell: Option<Farewell>,
    pub requeue: Requeue,
}

/// What becomes of the published files when the resource goes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Farewell {
    /// Builds whose files are deleted.
    pub delete: BTreeSet<String>,
    /// The artifact server had its time: what can not be deleted now stays.
    pub give_up: bool,
}

/// When to look again though nothing changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Requeue {
    Never,
    After(Duration),
    /// Later each time.
    Backoff,
}

/// What the metrics count.
#[derive(Clone, Debug, PartialEq)]
pub enum Count {
    Started,
    Succeeded(Box<BuildOutcome>),
    Failed(FailureClass, String),
    Cancelled,
    Superseded,
}

impl Plan {
    /// The same plan if it only writes the status.
    fn quiet(&self) -> Self {
        Self { status: self.status.clone(), follow: self.follow.clone(), ..Self::new(self.requeue) }
    }

    fn new(requeue: Requeue) -> Self {
        Self {
            add_finalizer: false,
            start: None,
            delete_jobs: BTreeSet::new(),
            delete_secrets: BTreeSet::new(),
            replaces: BTreeSet::new(),
            clean_ups: BTreeSet::new(),
            delete_clean_ups: BTreeSet::new(),
            abandon: BTreeSet::new(),
            removals: BTreeSet::new(),
            prune: BTreeSet::new(),
            status: None,
            notes: vec![],
            counts: vec![],
            follow: None,
            farewell: None,
            requeue,
        }
    }

    /// Looks again after this time at the latest.
    pub(super) fn look_again(&mut self, wait: Duration) {
        let wait = wait.clamp(Duration::from_secs(1), LONGEST_WAIT);
        self.requeue = match self.requeue {
            Requeue::Never => Requeue::After(wait),
            Requeue::After(sooner) => Requeue::After(sooner.min(wait)),
            Requeue::Backoff => Requeue::Backoff,
        };
    }
}

/// What the present specification has led to so far.
enum Target<'o> {
    /// This Job.
    Job(&'o ObservedJob),
    /// A finished build that only the status remembers.
    Recorded,
    Nothing,
}

impl Observed {
    fn status(&self) -> NodeImageBuildStatus {
        self.build.status.clone().unwrap_or_default()
    }

    fn is_recorded(&self, build_id: &str) -> bool {
        let status = self.build.status.as_ref();
        status.is_some_and(|s| s.build_id.as_deref() == Some(build_id) && s.completion_time.is_some())
    }

    fn target(&self) -> Target<'_> {
        let status = self.build.status.as_ref();
        let of_status = status.and_then(|status| status.build_id.as_deref());
        let in_history = |id: &str| status.is_some_and(|status| status.history.iter().any(|e| e.build_id == id));
        let fits = |job: &&ObservedJob| {
            let ours = of_status == Some(job.build_id.as_str());
            let done = matches!(job.state, JobState::Succeeded { .. }) || (ours && self.is_succeeded());
            !job.deleting
                && !job.outdated
                && job.wish.spec_digest == self.wish.spec_digest
                && self.is_answered_by(job.wish.rebuild.as_ref())
                // How a build runs does not matter any more once there is an image.
                && (done || job.wish.run_digest == self.wish.run_digest)
                // A failure of the past is not the answer to a wish that was made again.
                && (ours || done || matches!(job.state, JobState::Active { .. }) || !in_history(&job.build_id))
        };
        // One that runs and is not in the status yet was started by a pass that did not come to its end.
        let newest = self
            .jobs
            .iter()
            .filter(fits)
            .max_by_key(|job| (!job.state.is_finished(), of_status == Some(job.build_id.as_str()), job.created));
        if let Some(job) = newest {
            return Target::Job(job);
        }
        let recorded = status.is_some_and(|status| {
            status.completion_time.is_some()
                && status.build_id.is_some()
                && self.is_answered_by(status.last_rebuild_token.as_ref())
                && match &status.spec_digest {
                    Some(digest) => {
                        *digest == self.wish.spec_digest
                            && (status.failure.is_none() || status.run_digest.as_ref() == Some(&self.wish.run_digest))
                    }
                    // Written by a version that did not keep it.
                    None => status.observed_generation == self.build.metadata.generation,
                }
        });
        if recorded { Target::Recorded } else { Target::Nothing }
    }

    /// Whether the status has the image of its newest build.
    fn is_succeeded(&self) -> bool {
        let status = self.build.status.as_ref();
        status.is_some_and(|status| status.completion_time.is_some() && status.failure.is_none())
    }

    /// Whether a build of this rebuild annotation is what the resource asks for. Taking the annotation away asks for
    /// nothing.
    fn is_answered_by(&self, token: Option<&String>) -> bool {
        self.wish.rebuild.is_none() || token == self.wish.rebuild.as_ref()
    }

    /// Whether a build may have to start, so that its inputs are needed.
    pub fn needs_inputs(&self, now: Timestamp) -> bool {
        self.build.metadata.deletion_timestamp.is_none()
            && !self.build.spec.suspend
            && (matches!(self.target(), Target::Nothing) || self.due(now).is_some())
    }

    /// Why the finished build may have to be followed by another one.
    pub fn due(&self, now: Timestamp) -> Option<Due> {
        let rebuild = self.build.spec.rebuild.as_ref()?;
        let finished = match self.target() {
            Target::Job(job) => job.state.is_finished() && self.is_recorded(&job.build_id),
            Target::Recorded => true,
            Target::Nothing => false,
        };
        if !finished || self.build.spec.suspend || self.build.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let manifest = (rebuild.on_new_release && self.manifest_changed).then_some(Due::Manifest);
        self.promised().filter(|at| *at <= now).map(Due::Schedule).or(manifest)
    }

    /// The time that the status says the present schedule is due at.
    fn promised(&self) -> Option<Timestamp> {
        let status = self.build.status.as_ref()?;
        let current = status.observed_generation == self.build.metadata.generation;
        status.next_scheduled_time.as_ref().filter(|_| current).map(|time| time.0)
    }

    /// Whether the newest image is already what would be made, though the specification says it otherwise.
    fn is_made(&self, prepared: &Prepared) -> bool {
        let status = self.build.status.as_ref();
        status.is_some_and(|status| {
            status.build_id.is_some()
                && self.is_succeeded()
                && self.is_answered_by(status.last_rebuild_token.as_ref())
                && status.inputs_digest.as_ref() == Some(&prepared.inputs_digest)
        })
    }

    /// What the queue has to know of this resource.
    pub fn standing(&self, inputs: &Inputs, now: Timestamp) -> Standing {
        let server = server(&self.build.spec);
        let unfinished = self.jobs.iter().any(|job| !job.state.is_finished());
        match inputs {
            Inputs::Ready(prepared, _) if prepared.trigger.is_some() || !self.is_made(prepared) => {
                let status = self.build.status.as_ref();
                let since = status.and_then(|status| condition(status, conditions::RECONCILING));
                let since = since.map_or(now, |reconciling| reconciling.last_transition_time.0);
                Standing::Wants { server, since, replaces: unfinished }
            }
            _ if unfinished => Standing::Builds { server },
            _ => Standing::Idle,
        }
    }
}

/// The plan. Expects `inputs` where [`Observed::needs_inputs`], and `admission` where they are ready.
pub fn plan(observed: &Observed, inputs: &Inputs, admission: Admission, job_ttl: Duration, now: Timestamp) -> Plan {
    if let Some(deleted) = &observed.build.metadata.deletion_timestamp {
        return plan_deletion(observed, deleted.0, now);
    }
    let mut plan = Plan::new(Requeue::Never);
    let before = observed.status();
    let mut status = before.clone();
    let spec = &observed.build.spec;
    status.observed_generation = observed.build.metadata.generation;
    status.os = Some(format!("{} {}", spec.os.name, spec.os.version));
    status.provider = spec.provider().ok();

    harvest(observed, &mut status, &mut plan);
    let due = observed.due(now);
    let current = match observed.target() {
        Target::Job(job) if !job.state.is_finished() && !observed.is_recorded(&job.build_id) && spec.suspend => {
            suspend(observed, &mut status, &mut plan, now);
            None
        }
        Target::Job(_) | Target::Recorded if due.is_some() => {
            follow_up(observed, inputs, admission, &mut status, &mut plan, now)
        }
        Target::Job(job) => {
            follow_job(observed, job, &mut status, &mut plan, now);
            Some(job.build_id.clone())
        }
        Target::Recorded => {
            judge_finished(&mut status, None, now);
            status.build_id.clone()
        }
        Target::Nothing if spec.suspend => {
            suspend(observed, &mut status, &mut plan, now);
            None
        }
        Target::Nothing => match inputs {
            Inputs::Ready(prepared, _) if observed.is_made(prepared) => {
                status.spec_digest = Some(observed.wish.spec_digest.clone());
                status.run_digest = Some(observed.wish.run_digest.clone());
                judge_finished(&mut status, None, now);
                status.build_id.clone()
            }
            Inputs::Ready(prepared, release) => match admission {
                Admission::Go => {
                    start(observed, prepared, release, &mut status, &mut plan, now);
                    Some(prepared.request.identity.build_id.clone())
                }
                Admission::Wait { position, waiting, refresh } => {
                    forget_build(&mut status);
                    queue(position, waiting, &mut status, now);
                    plan.requeue = Requeue::After(refresh);
                    None
                }
            },
            Inputs::Refused(refusal) => {
                forget_build(&mut status);
                status.failure = Some(FailureStatus {
                    stage: None,
                    class: FailureClass::BadInput,
                    reason: refusal.reason.clone(),
                    message: refusal.message.clone(),
                    pod: None,
                    container: None,
                });
                judge(&mut status, Phase::Failed, Verdict::Stalled, &refusal.reason, &refusal.message, now);
                plan.requeue = Requeue::After(REFUSED_RESYNC);
                None
            }
            Inputs::Unavailable(refusal) => {
                forget_build(&mut status);
                judge(&mut status, Phase::Pending, Verdict::Reconciling, &refusal.reason, &refusal.message, now);
                plan.requeue = Requeue::Backoff;
                None
            }
            // Only while the observation and its inputs are of two minds: look again.
            Inputs::NotNeeded | Inputs::Unchanged => {
                plan.requeue = Requeue::Backoff;
                None
            }
        },
    };
    if let Some(current) = &current {
        supersede(observed, current, &mut status, &mut plan, now);
    }
    schedule(observed, due, inputs, &mut status, &mut plan, now);
    trim(&mut status.history, spec.history, spec.retention.is_some());
    tidy(observed, current.as_deref(), &status, &mut plan);
    expire(observed, &status, job_ttl, &mut plan, now);
    retention::plan(observed, &before, &mut status, &mut plan, now);
    cleanup::plan(observed, &before, &mut status, &mut plan, now);
    announce(&before, &status, &mut plan);
    plan.status = Some(status);
    plan
}

/// Whether nothing follows from a plan that only wrote the status: with that status the next one would say the same and do
/// nothing.
pub(super) fn is_settled(observed: &Observed, plan: &Plan, job_ttl: Duration, now: Timestamp) -> bool {
    let Some(status) = &plan.status else { return false };
    let told = Plan { notes: vec![], counts: vec![], ..plan.clone() };
    if told != plan.quiet() {
        return false;
    }
    let mut build = observed.build.as_ref().clone();
    build.status = Some(status.clone());
    let after = Observed { build: Arc::new(build), ..observed.clone() };
    if after.needs_inputs(now) || !retention::surplus(&after.build.spec, status).is_empty() {
        return false;
    }
    self::plan(&after, &Inputs::NotNeeded, Admission::Go, job_ttl, now) == plan.quiet()
}

/// What is there of builds that ended.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// All of them ended.
    pub jobs: Vec<ObservedJob>,
    pub secrets: BTreeSet<String>,
    pub outside: Outside,
}

/// When to look at a resource of whose builds no more than this is left, where nothing is to be done about it now.
pub(super) fn at_rest(build: Arc<NodeImageBuild>, left: Left, job_ttl: Duration, now: Timestamp) -> Option<Requeue> {
    let status = build.status.as_ref()?;
    let follows_releases = build.spec.rebuild.as_ref().is_some_and(|rebuild| rebuild.on_new_release);
    if follows_releases
        || build.metadata.deletion_timestamp.is_some()
        || !retention::surplus(&build.spec, status).is_empty()
    {
        return None;
    }
    let observed = Observed {
        wish: wish(&build),
        jobs: left.jobs,
        secrets: left.secrets,
        live_pods: BTreeSet::new(),
        pod_refusals: BTreeMap::new(),
        progress: None,
        manifest_changed: false,
        outside: left.outside,
        usage: Usage::NotNeeded,
        build,
    };
    if observed.needs_inputs(now) {
        return None;
    }
    let plan = plan(&observed, &Inputs::NotNeeded, Admission::Go, job_ttl, now);
    let nothing = plan == plan.quiet() && plan.follow.is_none() && plan.status == observed.build.status;
    (nothing && plan.requeue != Requeue::Backoff).then_some(plan.requeue)
}

/// A finished build whose successor may be due: starts it, or says why not. Gives the build that the status speaks of.
fn follow_up(
    observed: &Observed,
    inputs: &Inputs,
    admission: Admission,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) -> Option<String> {
    match inputs {
        Inputs::Ready(prepared, release) => match admission {
            Admission::Go => {
                start(observed, prepared, release, status, plan, now);
                return Some(prepared.request.identity.build_id.clone());
            }
            Admission::Wait { position, waiting, refresh } => {
                queue(position, waiting, status, now);
                plan.requeue = Requeue::After(refresh);
            }
        },
        Inputs::Refused(refusal) => {
            judge_finished(status, Some(&refusal.message), now);
            plan.requeue = Requeue::After(REFUSED_RESYNC);
        }
        Inputs::Unavailable(refusal) => {
            judge_finished(status, Some(&refusal.message), now);
            plan.requeue = Requeue::Backoff;
        }
        Inputs::Unchanged => {
            judge_finished(status, None, now);
            if let Some(Due::Schedule(at)) = observed.due(now) {
                let message = format!(
                    "nothing is built for the scheduled time {at}: release and base are those of the newest image"
                );
                plan.notes.push(Note::normal("Unchanged", "Build", message));
            }
        }
        Inputs::NotNeeded => {
            judge_finished(status, None, now);
            plan.requeue = Requeue::Backoff;
        }
    }
    status.build_id.clone()
}

/// The build could start, and as many run as are allowed.
fn queue(position: usize, waiting: usize, status: &mut NodeImageBuildStatus, now: Timestamp) {
    let message = format!("{} of {waiting} waiting: as many builds run as the operator allows", ordinal(position));
    judge(status, Phase::Queued, Verdict::Reconciling, "Queued", &message, now);
}

/// When the schedule is due next. A time that has come stays until its build starts, or turns out not to be needed; one
/// that comes while a build runs is covered by that build.
fn schedule(
    observed: &Observed,
    due: Option<Due>,
    inputs: &Inputs,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) {
    status.next_scheduled_time = None;
    let spec = &observed.build.spec;
    let Some(rebuild) = spec.rebuild.as_ref().filter(|_| !spec.suspend) else { return };
    let schedule = match Schedule::of(rebuild, &observed.build.uid().unwrap_or_default()) {
        Ok(None) => return,
        Ok(Some(schedule)) => schedule,
        Err(refusal) => {
            judge(status, Phase::Failed, Verdict::Stalled, &refusal.reason, &refusal.message, now);
            return;
        }
    };
    let promised = observed.promised();
    let waits = matches!(due, Some(Due::Schedule(_))) && plan.start.is_none() && *inputs != Inputs::Unchanged;
    let next = promised.filter(|at| *at > now || waits).or_else(|| schedule.next(now));
    status.next_scheduled_time = next.map(time);
    if let Some(next) = next.filter(|next| *next > now) {
        // Whole seconds are written and compared: not a moment before.
        plan.look_again(elapsed(now, next));
    }
}

/// Deletes the Jobs of builds that ended long ago, once their results are in the status.
fn expire(observed: &Observed, status: &NodeImageBuildStatus, ttl: Duration, plan: &mut Plan, now: Timestamp) {
    for job in observed.jobs.iter().filter(|job| !job.deleting) {
        let (JobState::Succeeded { completed: Some(completed), .. }
        | JobState::Failed { completed: Some(completed), .. }) = job.state
        else {
            continue;
        };
        let recorded = status.build_id.as_ref() == Some(&job.build_id)
            || status.history.iter().any(|entry| entry.build_id == job.build_id);
        let age = elapsed(completed, now);
        if recorded && age >= ttl {
            plan.delete_jobs.insert(job.build_id.clone());
        } else {
            plan.look_again(ttl.saturating_sub(age));
        }
    }
}

/// A build of its own is not under way for this specification.
fn forget_build(status: &mut NodeImageBuildStatus) {
    status.progress = None;
    status.job_name = None;
    status.build_id = None;
    status.inputs_digest = None;
    status.spec_digest = None;
    status.run_digest = None;
    status.trigger = None;
    status.attempts = None;
    status.start_time = None;
    status.completion_time = None;
    status.failure = None;
    status.release = None;
    status.last_rebuild_token = None;
}

/// Takes over results of Jobs that are not recorded yet: of the newest build, and of older ones that ended unnoticed.
fn harvest(observed: &Observed, status: &mut NodeImageBuildStatus, plan: &mut Plan) {
    let mut jobs: Vec<_> = observed.jobs.iter().filter(|job| job.state.is_finished()).collect();
    jobs.sort_by_key(|job| job.created);
    for job in jobs {
        let known =
            status.history.iter().any(|entry| entry.build_id == job.build_id && entry.result != BuildResult::Cancelled);
        if known || job.deleting || observed.is_recorded(&job.build_id) {
            continue;
        }
        let newest = status
            .history
            .iter()
            .filter(|entry| entry.result == BuildResult::Succeeded)
            .filter_map(|entry| entry.completion_time.as_ref().map(|time| time.0))
            .max();
        let mut entry = HistoryEntry {
            build_id: job.build_id.clone(),
            result: BuildResult::Failed,
            start_time: job.created.map(time),
            completion_time: None,
            image_url: None,
            image_name: None,
            image_uuid: None,
            sha256: None,
            release: job.release.clone(),
            reason: None,
        };
        match &job.state {
            JobState::Succeeded { outcome, completed } => {
                entry.result = BuildResult::Succeeded;
                entry.completion_time = completed.map(time);
                entry.image_url = outcome.image.url.as_ref().map(ToString::to_string);
                entry.image_name = Some(outcome.image.name.clone());
                entry.image_uuid.clone_from(&outcome.image.uuid);
                entry.sha256 = Some(outcome.image.sha256.clone());
                if newest.is_none_or(|newest| completed.is_none_or(|completed| completed >= newest)) {
                    set_image(status, outcome);
                }
                plan.counts.push(Count::Succeeded(outcome.clone()));
            }
            JobState::Failed { failure, completed } => {
                entry.completion_time = completed.map(time);
                entry.reason = Some(failure.reason.clone());
                plan.counts.push(Count::Failed(failure.class, failure.reason.clone()));
            }
            JobState::Active { .. } => continue,
        }
        record(&mut status.history, entry);
    }
}

/// The status of the build that `job` runs or ran.
fn follow_job(
    observed: &Observed,
    job: &ObservedJob,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) {
    if observed.is_recorded(&job.build_id) {
        judge_finished(status, None, now);
        return;
    }
    if status.build_id.as_deref() != Some(&job.build_id) {
        forget_build(status);
        status.build_id = Some(job.build_id.clone());
        status.start_time = job.created.map(time);
    }
    status.job_name = Some(super::resources::object_name(&observed.build.name_any(), &job.build_id));
    status.inputs_digest.clone_from(&job.inputs_digest);
    status.release.clone_from(&job.release);
    status.spec_digest = Some(job.wish.spec_digest.clone());
    status.run_digest = Some(job.wish.run_digest.clone());
    status.trigger.clone_from(&job.trigger);
    status.last_rebuild_token.clone_from(&job.wish.rebuild);
    match &job.state {
        JobState::Active { failed_attempts, last_failure, pod } => {
            let retries = observed.build.spec.build.retries;
            let attempt = (failed_attempts + 1).min(retries + 1);
            status.attempts = Some(i32::try_from(attempt).unwrap_or(i32::MAX));
            status.completion_time = None;
            status.failure = None;
            if let Some(progress) = &observed.progress {
                status.progress = Some(progress.clone());
            }
            plan.requeue = Requeue::After(ACTIVE_RESYNC);
            let name = status.job_name.clone().unwrap_or_default();
            let mut message = format!("the Job `{name}` builds the image");
            let mut verdict = (Phase::Building, Verdict::Reconciling, "Building");
            match pod {
                PodState::Absent => {
                    plan.requeue = Requeue::After(match POD_EXPECTED.checked_sub(job.age(now)) {
                        Some(wait) if !wait.is_zero() => wait,
                        _ => job.age(now).clamp(NO_POD_RESYNC, ACTIVE_RESYNC),
                    });
                    if let Some(refusal) = observed.pod_refusals.get(&job.build_id) {
                        (verdict, message) = pod_refused(&observed.build, refusal);
                    }
                }
                PodState::Pending { blocker: Some(blocker), since, .. } => {
                    let waited = since.map_or(BLOCKER_GRACE, |since| elapsed(since, now));
                    if waited >= BLOCKER_GRACE {
                        verdict = (Phase::Pending, Verdict::Reconciling, blocker.reason);
                        message.clone_from(&blocker.message);
                    } else {
                        plan.requeue = Requeue::After(BLOCKER_GRACE.saturating_sub(waited).max(Duration::from_secs(1)));
                    }
                }
                PodState::Pending { blocker: None, user_namespace, .. } => {
                    // Nobody watches events.
                    if *user_namespace {
                        plan.requeue = Requeue::After(NO_POD_RESYNC);
                    }
                }
                PodState::Running { pod } => plan.follow = Some(pod.clone()),
            }
            if let (true, Some(failure)) = (*failed_attempts > 0, last_failure) {
                message = format!(
                    "{message}; attempt {attempt} of {}, the one before failed: {}: {}",
                    retries + 1,
                    failure.reason,
                    failure.message
                );
            }
            judge(status, verdict.0, verdict.1, verdict.2, &message, now);
        }
        JobState::Succeeded { outcome, completed } => {
            status.completion_time = Some(time(completed.unwrap_or(now)));
            status.progress = None;
            status.failure = None;
            set_image(status, outcome);
            judge_finished(status, None, now);
        }
        JobState::Failed { failure, completed } => {
            status.completion_time = Some(time(completed.unwrap_or(now)));
            status.failure = Some(failure_status(&with_last_progress(failure, status.progress.as_ref())));
            status.progress = None;
            judge_finished(status, None, now);
        }
    }
}

/// Kubernetes does not say where a build was that it stopped; the last progress does.
fn with_last_progress(failure: &Failure, progress: Option<&Progress>) -> Failure {
    let mut failure = failure.clone();
    if let (None, Some(progress)) = (failure.stage, progress) {
        failure.stage = Some(progress.stage);
        failure.message = format!("{} (last progress: {} %, {})", failure.message, progress.percent, progress.message);
    }
    failure
}

/// Conditions of a build that ended, from what the status remembers. `obstacle` keeps the next one from starting.
fn judge_finished(status: &mut NodeImageBuildStatus, obstacle: Option<&str>, now: Timestamp) {
    let obstacle =
        obstacle.map_or(String::new(), |obstacle| format!("; the next build is due and can not start: {obstacle}"));
    if let Some(failure) = status.failure.clone() {
        let message = format!("{}{obstacle}", failure.message);
        judge(status, Phase::Failed, Verdict::Stalled, &failure.reason, &message, now);
    } else {
        let place = status.image_url.clone().or(status.image.as_ref().map(|image| image.name.clone()));
        let message = format!("the image is published: {}{obstacle}", place.unwrap_or_default());
        judge(status, Phase::Ready, Verdict::Ready, "ImagePublished", &message, now);
    }
}

fn pod_refused(build: &NodeImageBuild, refusal: &str) -> ((Phase, Verdict, &'static str), String) {
    let namespace = build.namespace().unwrap_or_default();
    if refusal.contains("violates PodSecurity") {
        let message = format!(
            "the namespace `{namespace}` forbids build pods, which need the Pod Security level `privileged`: {refusal}. Move \
             the NodeImageBuild to a namespace for builds, or have an administrator run `kubectl label namespace {namespace} \
             pod-security.kubernetes.io/enforce=privileged --overwrite`"
        );
        return ((Phase::Pending, Verdict::Stalled, "PodForbidden"), message);
    }
    let message = format!("Kubernetes can not create the build pod: {refusal}; it is tried again");
    ((Phase::Pending, Verdict::Reconciling, "PodNotCreated"), message)
}

fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

fn start(
    observed: &Observed,
    prepared: &Prepared,
    release: &ReleaseStatus,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) {
    let id = prepared.request.identity.build_id.clone();
    forget_build(status);
    status.last_rebuild_token.clone_from(&observed.wish.rebuild);
    let old = observed.jobs.iter().find(|job| job.build_id == id);
    if old.is_some() || observed.outside.concerns(&id) {
        // The same inputs once more: an earlier, failed Job of the same name makes room first.
        if old.is_some_and(|old| !old.deleting) {
            plan.delete_jobs.insert(id.clone());
            plan.delete_secrets.insert(id.clone());
        }
        plan.delete_clean_ups.extend(observed.outside.of(&id));
        plan.replaces.insert(id);
        let message = "an earlier Job of the same inputs is being deleted";
        judge(status, Phase::Pending, Verdict::Reconciling, "Replacing", message, now);
        plan.requeue = Requeue::After(DELETING_RESYNC);
        return;
    }
    status.build_id = Some(id.clone());
    let name = super::resources::object_name(&observed.build.name_any(), &id);
    let message = format!("the Job `{name}` builds the image");
    status.job_name = Some(name);
    status.inputs_digest = Some(prepared.inputs_digest.clone());
    status.spec_digest = Some(observed.wish.spec_digest.clone());
    status.run_digest = Some(observed.wish.run_digest.clone());
    status.trigger.clone_from(&prepared.trigger);
    status.release = Some(release.clone());
    status.start_time = Some(time(now));
    status.attempts = Some(1);
    judge(status, Phase::Building, Verdict::Reconciling, "Building", &message, now);
    plan.add_finalizer = !observed.build.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    let cause = prepared.trigger.as_ref().map_or(String::new(), |trigger| format!(", because of: {trigger}"));
    plan.notes.push(Note::normal(
        "BuildStarted",
        "Build",
        format!("{message} of Kubernetes {} ({}){cause}", release.kubernetes_version, release.eksd_release),
    ));
    plan.counts.push(Count::Started);
    plan.start = Some(Box::new(prepared.clone()));
    plan.requeue = Requeue::After(POD_EXPECTED);
}

/// Cancels what runs because `spec.suspend` is set.
fn suspend(observed: &Observed, status: &mut NodeImageBuildStatus, plan: &mut Plan, now: Timestamp) {
    for job in observed.jobs.iter().filter(|job| !job.deleting && !job.state.is_finished()) {
        cancel(job, "Suspended", status, plan, now);
        plan.counts.push(Count::Cancelled);
        plan.notes.push(Note::normal(
            "Cancelled",
            "Cancel",
            format!("the build {} is cancelled because spec.suspend is true", job.build_id),
        ));
    }
    forget_build(status);
    let message = "spec.suspend is true: nothing is built until it is false";
    judge(status, Phase::Suspended, Verdict::Idle, "Suspended", message, now);
}

/// Cancels builds of older specifications.
fn supersede(observed: &Observed, current: &str, status: &mut NodeImageBuildStatus, plan: &mut Plan, now: Timestamp) {
    let old = |job: &&ObservedJob| job.build_id != current && !job.deleting && !job.state.is_finished();
    for job in observed.jobs.iter().filter(old) {
        cancel(job, "Superseded", status, plan, now);
        plan.counts.push(Count::Superseded);
        plan.notes.push(Note::normal(
            "Superseded",
            "Cancel",
            format!("the build {} is cancelled: {current} takes its place", job.build_id),
        ));
    }
}

fn cancel(job: &ObservedJob, reason: &str, status: &mut NodeImageBuildStatus, plan: &mut Plan, now: Timestamp) {
    plan.delete_jobs.insert(job.build_id.clone());
    record(
        &mut status.history,
        HistoryEntry {
            build_id: job.build_id.clone(),
            result: BuildResult::Cancelled,
            start_time: job.created.map(time),
            completion_time: Some(time(now)),
            image_url: None,
            image_name: None,
            image_uuid: None,
            sha256: None,
            release: job.release.clone(),
            reason: Some(reason.to_owned()),
        },
    );
}

/// Deletes what is left of builds that the history does not hold any more, and of cancelled ones once their pods ended.
fn tidy(observed: &Observed, current: Option<&str>, status: &NodeImageBuildStatus, plan: &mut Plan) {
    let result = |id: &str| status.history.iter().find(|entry| entry.build_id == id).map(|entry| entry.result);
    for job in observed.jobs.iter().filter(|job| !job.deleting && job.state.is_finished()) {
        if current != Some(&job.build_id) && result(&job.build_id).is_none() {
            plan.delete_jobs.insert(job.build_id.clone());
            plan.delete_secrets.insert(job.build_id.clone());
        }
    }
    let starting = plan.start.as_ref().map(|prepared| prepared.request.identity.build_id.as_str());
    for id in &observed.secrets {
        let has_job = observed.jobs.iter().any(|job| job.build_id == *id);
        if has_job || observed.live_pods.contains(id) || starting == Some(id) {
            continue;
        }
        match result(id) {
            Some(BuildResult::Cancelled | BuildResult::Failed) => plan.abandon.insert(id.clone()),
            Some(BuildResult::Succeeded) | None => plan.delete_secrets.insert(id.clone()),
        };
    }
}

/// Events for what changed between the two.
fn announce(before: &NodeImageBuildStatus, after: &NodeImageBuildStatus, plan: &mut Plan) {
    let finished = |status: &NodeImageBuildStatus| status.completion_time.as_ref().and(status.build_id.clone());
    if let Some(id) = finished(after).filter(|id| finished(before).as_ref() != Some(id)) {
        plan.notes.push(match &after.failure {
            None => Note::normal(
                "BuildSucceeded",
                "Build",
                format!("the build {id} published {}", after.image_url.as_deref().unwrap_or("the image")),
            ),
            Some(failure) => {
                let stage = failure.stage.map_or(String::new(), |stage| format!(" in the stage {stage}"));
                let message = format!("the build {id} failed{stage}: {}: {}", failure.reason, failure.message);
                Note::warning("BuildFailed", "Build", message)
            }
        });
        return;
    }
    let stalled = |status| condition(status, conditions::STALLED).map(|c| (c.reason.clone(), c.message.clone()));
    if let Some((reason, message)) = stalled(after).filter(|now| stalled(before).as_ref() != Some(now)) {
        plan.notes.push(Note::warning(&reason, "Validate", message));
        return;
    }
    // Trouble that may pass by itself: told once, when it begins.
    let reconciling = |status| condition(status, conditions::RECONCILING).map(|c| c.reason.clone());
    if let Some(now) = condition(after, conditions::RECONCILING)
        && !matches!(now.reason.as_str(), "Building" | "Replacing" | "Queued")
        && reconciling(before).as_ref() != Some(&now.reason)
    {
        plan.notes.push(Note::warning(&now.reason, "Build", now.message.clone()));
    } else if before.build_id == after.build_id
        && let (Some(old), Some(new)) = (before.attempts, after.attempts)
        && new > old
        && let Some(now) = condition(after, conditions::RECONCILING)
    {
        plan.notes.push(Note::warning("AttemptFailed", "Build", now.message.clone()));
    }
}

/// Stop the build, wait for its pods, delete files, let the resource go.
fn plan_deletion(observed: &Observed, deleted: Timestamp, now: Timestamp) -> Plan {
    let mut plan = Plan::new(Requeue::Never);
    let build = &observed.build;
    if !build.finalizers().iter().any(|finalizer| finalizer == FINALIZER) {
        return plan;
    }
    // Which images are complete has to be known when the Jobs are gone.
    let mut status = observed.status();
    harvest(observed, &mut status, &mut plan);
    if observed.status() != status {
        plan.status = Some(status.clone());
    }
    // Finished ones go with the resource: until then they tell what may be left.
    for job in observed.jobs.iter().filter(|job| !job.deleting && !job.state.is_finished()) {
        plan.delete_jobs.insert(job.build_id.clone());
        plan.counts.push(Count::Cancelled);
        let message = format!("the build {} is cancelled because the NodeImageBuild is deleted", job.build_id);
        plan.notes.push(Note::normal("Cancelled", "Cancel", message));
    }
    let waited = elapsed(deleted, now);
    let runs = observed.jobs.iter().any(|job| !job.state.is_finished()) || !observed.live_pods.is_empty();
    if runs && waited < PODS_END {
        plan.requeue = Requeue::After(DELETING_RESYNC);
        return plan;
    }
    if cleanup::plan_deletion(observed, &mut status, &mut plan, waited, now) {
        return plan;
    }
    let succeeded: BTreeSet<String> = status
        .history
        .iter()
        .filter(|entry| entry.result == BuildResult::Succeeded)
        .map(|entry| entry.build_id.clone())
        .chain(status.build_id.clone().filter(|_| observed.is_succeeded()))
        .collect();
    let others = status.history.iter().map(|entry| entry.build_id.clone()).chain(observed.secrets.iter().cloned());
    let mut delete: BTreeSet<String> = others.filter(|id| !succeeded.contains(id)).collect();
    match build.spec.deletion_policy {
        DeletionPolicy::Delete => {
            // Without its Secret nobody knows where an image is.
            let unknown = succeeded.iter().any(|id| !observed.outside.builds.contains_key(id));
            delete.extend(succeeded);
            let servers = [
                (build.spec.vsphere.is_some() && unknown, "vCenter"),
                (build.spec.nutanix.is_some() && unknown, "Prism Central"),
            ];
            let servers = servers.into_iter().filter_map(|(there, place)| there.then_some(place));
            let places: Vec<_> = retention::places_of_persons(&build.spec).chain(servers).collect();
            if !places.is_empty() && status.image.is_some() {
                let places = places.join(", ");
                let message = format!("images in {places} are not deleted; delete them there");
                plan.notes.push(Note::warning("ImagesLeft", "Delete", message));
            }
        }
        DeletionPolicy::Retain => {}
    }
    plan.requeue = Requeue::Never;
    plan.farewell = Some(Farewell { delete, give_up: waited >= FILES_END });
    plan
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    /// A build that has just ended well; `more` is added to the specification.
    fn ended(more: &serde_json::Value, history: &serde_json::Value) -> Observed {
        let mut build = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
            "metadata": { "name": "golden", "namespace": "images", "generation": 1, "finalizers": [FINALIZER] },
            "spec": { "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {} },
            "status": { "buildID": "b", "history": history },
        });
        build["spec"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let build: NodeImageBuild = serde_json::from_value(build).unwrap();
        let outcome = json!({
            "image": {
                "url": "http://images.example.com/b/x-131.gz", "name": "x-131.gz", "format": "raw.gz", "size": 1,
                "virtualSize": 2, "sha256": "00",
            },
            "verification": "booted", "stageSeconds": {},
        });
        let wish = wish(&build);
        let job = ObservedJob {
            build_id: "b".to_owned(),
            deleting: false,
            outdated: false,
            created: Some(Timestamp::UNIX_EPOCH),
            wish: wish.clone(),
            inputs_digest: None,
            trigger: None,
            release: None,
            state: JobState::Succeeded {
                outcome: serde_json::from_value(outcome).unwrap(),
                completed: Some(Timestamp::UNIX_EPOCH),
            },
        };
        Observed {
            build: Arc::new(build),
            wish,
            jobs: vec![job],
            secrets: BTreeSet::from(["b".to_owned()]),
            live_pods: BTreeSet::new(),
            pod_refusals: BTreeMap::new(),
            progress: None,
            manifest_changed: false,
            outside: Outside::default(),
            usage: Usage::NotNeeded,
        }
    }

    #[rstest]
    #[case::end_of_a_build(json!({}), json!([]), true)]
    #[case::an_older_image_may_go(json!({ "retention": { "keep": 1 } }), json!([{ "buildID": "a", "result": "Succeeded" }]), false)]
    fn it_is_known_whether_anything_follows_from_a_status(
        #[case] more: serde_json::Value,
        #[case] history: serde_json::Value,
        #[case] expected: bool,
    ) {
        let (observed, now, ttl) = (ended(&more, &history), Timestamp::UNIX_EPOCH, Duration::from_secs(60));
        let plan = plan(&observed, &Inputs::NotNeeded, Admission::Go, ttl, now);
        assert_eq!(plan.status.as_ref().unwrap().phase, Some(Phase::Ready));
        assert_eq!(is_settled(&observed, &plan, ttl, now), expected);
    }

    /// What the next operator finds of a build that ended well.
    fn recorded(more: &serde_json::Value) -> (Arc<NodeImageBuild>, ObservedJob) {
        let (mut observed, now) = (ended(more, &json!([])), Timestamp::UNIX_EPOCH);
        let plan = plan(&observed, &Inputs::NotNeeded, Admission::Go, Duration::from_secs(60), now);
        let mut build = observed.build.as_ref().clone();
        build.status = plan.status;
        // Without its pod nothing tells what it made.
        let failure = Failure {
            stage: None,
            class: FailureClass::Transient,
            reason: String::new(),
            message: String::new(),
            pod: None,
            container: None,
        };
        let mut job = observed.jobs.remove(0);
        job.state = JobState::Failed { failure, completed: Some(now) };
        (Arc::new(build), job)
    }

    #[test]
    fn a_build_rests_until_its_job_goes() {
        let (build, job) = recorded(&json!({}));
        let rests = |jobs: &[&ObservedJob], secrets: &[&str], seconds| {
            let jobs = jobs.iter().map(|job| (*job).clone()).collect();
            let secrets = secrets.iter().map(|id| (*id).to_owned()).collect();
            let left = Left { jobs, secrets, outside: Outside::default() };
            at_rest(Arc::clone(&build), left, Duration::from_secs(60), Timestamp::from_second(seconds).unwrap())
        };
        assert_eq!(rests(&[&job], &["b"], 20), Some(Requeue::After(Duration::from_secs(40))));
        assert_eq!(rests(&[], &[], 20), Some(Requeue::Never));
        assert_eq!(rests(&[&job], &["b"], 60), None, "the Job's time is over");
        assert_eq!(rests(&[], &["b"], 20), None, "a Secret without a Job");
        assert_eq!(rests(&[&job], &["a", "b"], 20), None, "a Secret of an older build");
        let other = ObservedJob { build_id: "a".to_owned(), ..job.clone() };
        assert_eq!(rests(&[&job, &other], &["b"], 20), None, "a Job whose result is not recorded");
    }

    #[test]
    fn a_build_that_something_is_to_be_done_about_does_not_rest() {
        let rests = |more: &serde_json::Value, change: &dyn Fn(&mut NodeImageBuild)| {
            let (build, job) = recorded(more);
            let mut build = build.as_ref().clone();
            change(&mut build);
            let left = Left { jobs: vec![job], ..Left::default() };
            at_rest(Arc::new(build), left, Duration::from_secs(60), Timestamp::UNIX_EPOCH).is_some()
        };
        assert!(rests(&json!({}), &|_| {}));
        assert!(!rests(&json!({ "rebuild": { "onNewRelease": true } }), &|_| {}));
        assert!(!rests(&json!({}), &|build| build.status = None));
        assert!(!rests(&json!({}), &|build| build.metadata.generation = Some(2)));
        assert!(!rests(&json!({}), &|build| build.spec.release_channel = "1-32".into()));
        let deleted =
            |build: &mut NodeImageBuild| build.metadata.deletion_timestamp = Some(time(Timestamp::UNIX_EPOCH));
        assert!(!rests(&json!({}), &deleted));
        let again = |build: &mut NodeImageBuild| {
            build.metadata.annotations = Some([(crate::api::v1alpha1::REBUILD_ANNOTATION.into(), "1".into())].into());
        };
        assert!(!rests(&json!({}), &again));
    }

    #[test]
    fn what_is_deleted_is_looked_at_again() {
        let (observed, now, ttl) = (ended(&json!({}), &json!([])), Timestamp::UNIX_EPOCH, Duration::ZERO);
        let plan = plan(&observed, &Inputs::NotNeeded, Admission::Go, ttl, now);
        assert_eq!(plan.delete_jobs.len(), 1, "its time is over");
        assert!(!is_settled(&observed, &plan, ttl, now));
    }
}
