//! One pass over one resource: observe, find out the inputs, plan, apply.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use kube::{Api, Resource, ResourceExt};
use kube_runtime::controller::Action;
use tracing::{Instrument, field};

use super::{
    BuildRef,
    apply::{Announcement, begin, complete},
    context::Context,
    error::Error,
    events::Note,
    observe::{inputs, observe},
    plan::{Requeue, is_settled, plan},
    watched::{Guarded, Watched, is_new},
};
use crate::{api::v1alpha1::NodeImageBuild, contract::shorten, error::Chain};

/// A pass that takes longer is given up and tried again; an API server that hangs must not stop everything.
const LIMIT: Duration = Duration::from_secs(90);
/// A write lost a race: look again at once, with what the watch has brought by then.
const CONFLICT: Duration = Duration::from_millis(200);
/// Wait before a pass that gave way to new builds tries again.
const GAVE_WAY: Duration = Duration::from_millis(500);

/// One pass.
pub(super) async fn reconcile(object: Arc<Watched>, context: Arc<Context>) -> Result<Action, Error> {
    let began = Instant::now();
    let (uid, build) = (object.uid().unwrap_or_default(), BuildRef::of(object.as_ref()));
    if let Some(requeue) = context.news.rests(&build) {
        return Ok(action(requeue, &uid, &context));
    }
    let Some(turn) = context.starts.turn(&build) else {
        return Ok(Action::requeue(GAVE_WAY));
    };
    if !context.echoes.begin(&build) {
        return Ok(Action::await_change());
    }
    let span = tracing::info_span!(
        "reconcile",
        namespace = object.namespace().unwrap_or_default(),
        name = object.name_any(),
        generation = object.meta().generation.unwrap_or_default(),
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
    );
    let whole = object.whole.clone().filter(|_| turn.is_first);
    let result = tokio::time::timeout(LIMIT, pass(&build, whole, &context).instrument(span.clone())).await;
    context.starts.left(&build);
    context.metrics.reconciled(began.elapsed());
    let result = result.unwrap_or(Err(Error::Timeout { limit: LIMIT })).inspect_err(|error| {
        span.record("otel.status_code", "ERROR").record("otel.status_description", Chain(error).to_string());
    });
    let end = result.as_ref().map_or(End::Unsettled, |(_, end)| *end);
    if end != End::Postponed && context.echoes.end(&build, end == End::Settled) {
        context.wake(&build);
    }
    Ok(action(result?.0, &uid, &context))
}

/// What follows from a pass that went well.
fn action(requeue: Requeue, uid: &str, context: &Context) -> Action {
    match requeue {
        Requeue::Backoff => Action::requeue(context.backoff.failed(uid)),
        Requeue::After(wait) => {
            context.backoff.succeeded(uid);
            Action::requeue(wait)
        }
        Requeue::Never => {
            context.backoff.succeeded(uid);
            Action::await_change()
        }
    }
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// Nothing follows from what was written.
    Settled,
    Unsettled,
    /// Its announcement is still to be made.
    Postponed,
}

/// When to look again though nothing changed, and how it ended. `whole` is a new resource that needs no reading.
async fn pass(
    build: &BuildRef,
    whole: Option<Arc<NodeImageBuild>>,
    context: &Context,
) -> Result<(Requeue, End), Error> {
    let build = match whole {
        Some(build) => build,
        None => match read(build, context).await? {
            Some(build) => build,
            None => return Ok((Requeue::Never, End::Settled)),
        },
    };
    let reference = BuildRef::of(build.as_ref());
    let now = Timestamp::now();
    let observed = observe(build, context, now).await?;
    context.news.lacks_pod(&reference, observed.jobs.iter().any(|job| job.lacks_pod(now)));
    let inputs = inputs(&observed, context, now).await?;
    let admission = context.queue.settle(&reference, &observed.standing(&inputs, now));
    context.metrics.queued(context.queue.waiting());
    let plan = plan(&observed, &inputs, admission, context.settings.lifecycle.finished_job_ttl, now);
    tracing::debug!(?plan, "planned");
    let version = begin(&observed, &plan, context).await?;
    context.starts.left(&reference);
    let mut announcement = Announcement::new(&observed, &plan, version);
    if plan.start.is_some() && is_new(&observed.build) {
        // Of a new build there is nothing else to do.
        match context.starts.postpone(announcement) {
            None => return Ok((plan.requeue, End::Postponed)),
            Some(not_postponed) => announcement = not_postponed,
        }
    }
    complete(&observed, &plan, &announcement, context).await?;
    let settled =
        plan.start.is_some() || is_settled(&observed, &plan, context.settings.lifecycle.finished_job_ttl, now);
    Ok((plan.requeue, if settled { End::Settled } else { End::Unsettled }))
}

/// Reads the resource; nothing if it is gone, or can not be read.
async fn read(build: &BuildRef, context: &Context) -> Result<Option<Arc<NodeImageBuild>>, Error> {
    let api: Api<Guarded> = Api::namespaced(context.client.clone(), &build.namespace);
    let Some(object) = api.get_opt(&build.name).await.map_err(Error::api("read the resource"))? else {
        return Ok(None);
    };
    match object.0 {
        Ok(build) => Ok(Some(Arc::new(build))),
        Err(ref invalid) => {
            // There is no status of this version to write to; the API server keeps such objects out, so this one was
            // stored under other rules.
            let message = format!(
                "this resource can not be read ({}); write it again as the installed definition describes it",
                shorten(&invalid.error, 700)
            );
            tracing::warn!("{message}");
            context.events.publish(&object, &Note::warning("InvalidResource", "Validate", message)).await;
            Ok(None)
        }
    }
}

/// Makes an announcement that was postponed, when its turn has come: the end of a pass.
pub(super) async fn announce(announcement: Announcement, context: Arc<Context>) {
    context.starts.give_way(announcement.since).await;
    let build = announcement.build();
    let span = tracing::info_span!("announce", namespace = build.namespace, name = build.name);
    let made = tokio::time::timeout(LIMIT, announcement.make(&context).instrument(span)).await;
    let made = made.unwrap_or(Err(Error::Timeout { limit: LIMIT }));
    if let Err(error) = &made {
        tracing::debug!(%build, error = %Chain(error), "the next pass says it");
    }
    if context.echoes.end(&build, made.is_ok()) || made.is_err() {
        context.wake(&build);
    }
}

/// When to try again after an error.
#[expect(clippy::needless_pass_by_value, reason = "the controller's signature")]
pub(super) fn on_error(object: Arc<Watched>, error: &Error, context: Arc<Context>) -> Action {
    context.metrics.reconcile_failed(error.reason());
    let build = BuildRef::of(object.as_ref());
    if error.is_conflict() {
        tracing::debug!(%build, error = %Chain(error), "somebody else was faster");
        return Action::requeue(CONFLICT);
    }
    tracing::warn!(%build, error = %Chain(error), "reconciliation failed");
    // It comes back to its old place; until then the others pass.
    context.queue.leave(&build);
    Action::requeue(context.backoff.failed(&object.uid().unwrap_or_default()))
}
