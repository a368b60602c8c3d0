//! One pass over one resource: observe, find out the inputs, plan, apply.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use kube::{Resource, ResourceExt, core::DeserializeGuard};
use kube_runtime::controller::Action;
use tracing::{Instrument, field};

use super::{
    BuildRef,
    apply::apply,
    context::Context,
    error::Error,
    events::Note,
    observe::{inputs, observe},
    plan::{Requeue, plan},
};
use crate::{api::v1alpha1::NodeImageBuild, contract::shorten, error::Chain};

/// A pass that takes longer is given up and tried again; an API server that hangs must not stop everything.
const LIMIT: Duration = Duration::from_secs(90);
/// A write lost a race: look again at once, with what the watch has brought by then.
const CONFLICT: Duration = Duration::from_millis(200);

/// What the controller watches: resources that do not parse must not stop the others.
pub(super) type Guarded = DeserializeGuard<NodeImageBuild>;

/// One pass.
pub(super) async fn reconcile(object: Arc<Guarded>, context: Arc<Context>) -> Result<Action, Error> {
    let began = Instant::now();
    let span = tracing::info_span!(
        "reconcile",
        namespace = object.namespace().unwrap_or_default(),
        name = object.name_any(),
        generation = object.meta().generation.unwrap_or_default(),
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
    );
    let uid = object.uid().unwrap_or_default();
    let result = tokio::time::timeout(LIMIT, pass(&object, &context).instrument(span.clone())).await;
    context.metrics.reconciled(began.elapsed());
    let result = result.unwrap_or(Err(Error::Timeout { limit: LIMIT })).inspect_err(|error| {
        span.record("otel.status_code", "ERROR").record("otel.status_description", Chain(error).to_string());
    });
    match result? {
        Requeue::Backoff => Ok(Action::requeue(context.backoff.failed(&uid))),
        Requeue::After(wait) => {
            context.backoff.succeeded(&uid);
            Ok(Action::requeue(wait))
        }
        Requeue::Never => {
            context.backoff.succeeded(&uid);
            Ok(Action::await_change())
        }
    }
}

async fn pass(object: &Guarded, context: &Context) -> Result<Requeue, Error> {
    let build = match &object.0 {
        Ok(build) => Arc::new(build.clone()),
        Err(invalid) => {
            // There is no status of this version to write to; the API server keeps such objects out, so this one was
            // stored under other rules.
            let message = format!(
                "this resource can not be read ({}); write it again as the installed definition describes it",
                shorten(&invalid.error, 700)
            );
            tracing::warn!("{message}");
            context.events.publish(object, &Note::warning("InvalidResource", "Validate", message)).await;
            return Ok(Requeue::Never);
        }
    };
    let observed = observe(build, context).await?;
    let now = Timestamp::now();
    let inputs = inputs(&observed, context, now).await?;
    let admission = context.queue.settle(&BuildRef::of(observed.build.as_ref()), &observed.standing(&inputs, now));
    context.metrics.queued(context.queue.waiting());
    let plan = plan(&observed, &inputs, admission, context.settings.lifecycle.finished_job_ttl, now);
    tracing::debug!(?plan, "planned");
    apply(&observed, &plan, context).await?;
    Ok(plan.requeue)
}

/// When to try again after an error.
#[expect(clippy::needless_pass_by_value, reason = "the controller's signature")]
pub(super) fn on_error(object: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Action {
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
