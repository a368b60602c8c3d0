//! One pass over one resource: observe, find out the inputs, plan, apply.

use std::{
    borrow::Cow,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Resource, ResourceExt,
    core::{DeserializeGuard, PartialObjectMeta, error_boundary::InvalidObject},
};
use kube_runtime::controller::Action;
use serde::{Deserialize, Deserializer};
use tracing::{Instrument, field};

use super::{
    BuildRef,
    apply::apply,
    context::Context,
    error::Error,
    events::Note,
    observe::{inputs, observe},
    plan::{Requeue, is_settled, plan},
};
use crate::{api::v1alpha1::NodeImageBuild, contract::shorten, error::Chain};

/// A pass that takes longer is given up and tried again; an API server that hangs must not stop everything.
const LIMIT: Duration = Duration::from_secs(90);
/// A write lost a race: look again at once, with what the watch has brought by then.
const CONFLICT: Duration = Duration::from_millis(200);

/// What the controller watches, and keeps in memory of every resource.
pub(super) type Watched = PartialObjectMeta<NodeImageBuild>;

/// Leaves of a resource which one it is, in which version. The rest is read when a pass begins.
pub(super) fn slim(watched: &mut Watched) {
    let ObjectMeta { name, namespace, uid, resource_version, generation, .. } = mem::take(&mut watched.metadata);
    watched.metadata = ObjectMeta { name, namespace, uid, resource_version, generation, ..ObjectMeta::default() };
    watched.types = None;
}

/// A resource that was read: one that does not parse must not stop the others. It comes without the fields that each
/// manager owns, whose maps take more room than the rest together. Who the managers are stays.
#[derive(Clone, Debug)]
pub(super) struct Guarded(pub(super) Result<NodeImageBuild, InvalidObject>);

impl<'de> Deserialize<'de> for Guarded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = DeserializeGuard::<NodeImageBuild>::deserialize(deserializer)?;
        for entry in object.meta_mut().managed_fields.iter_mut().flatten() {
            entry.fields_v1 = None;
        }
        Ok(Self(object.0))
    }
}

impl Resource for Guarded {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        NodeImageBuild::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        NodeImageBuild::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        NodeImageBuild::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        NodeImageBuild::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, Resource::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, Resource::meta_mut)
    }
}

/// One pass.
pub(super) async fn reconcile(object: Arc<Watched>, context: Arc<Context>) -> Result<Action, Error> {
    let began = Instant::now();
    let span = tracing::info_span!(
        "reconcile",
        namespace = object.namespace().unwrap_or_default(),
        name = object.name_any(),
        generation = object.meta().generation.unwrap_or_default(),
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
    );
    let (uid, build) = (object.uid().unwrap_or_default(), BuildRef::of(object.as_ref()));
    context.echoes.begin(&build);
    let result = tokio::time::timeout(LIMIT, pass(&build, &context).instrument(span.clone())).await;
    context.metrics.reconciled(began.elapsed());
    let result = result.unwrap_or(Err(Error::Timeout { limit: LIMIT })).inspect_err(|error| {
        span.record("otel.status_code", "ERROR").record("otel.status_description", Chain(error).to_string());
    });
    let settled = result.as_ref().is_ok_and(|(_, settled)| *settled);
    if context.echoes.end(&build, settled) {
        context.wake(&build);
    }
    match result?.0 {
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

/// When to look again though nothing changed, and whether nothing follows from what was written.
async fn pass(build: &BuildRef, context: &Context) -> Result<(Requeue, bool), Error> {
    let api: Api<Guarded> = Api::namespaced(context.client.clone(), &build.namespace);
    let Some(object) = api.get_opt(&build.name).await.map_err(Error::api("read the resource"))? else {
        return Ok((Requeue::Never, true));
    };
    let build = match object.0 {
        Ok(build) => Arc::new(build),
        Err(ref invalid) => {
            // There is no status of this version to write to; the API server keeps such objects out, so this one was
            // stored under other rules.
            let message = format!(
                "this resource can not be read ({}); write it again as the installed definition describes it",
                shorten(&invalid.error, 700)
            );
            tracing::warn!("{message}");
            context.events.publish(&object, &Note::warning("InvalidResource", "Validate", message)).await;
            return Ok((Requeue::Never, true));
        }
    };
    let now = Timestamp::now();
    let observed = observe(build, context, now).await?;
    let inputs = inputs(&observed, context, now).await?;
    let admission = context.queue.settle(&BuildRef::of(observed.build.as_ref()), &observed.standing(&inputs, now));
    context.metrics.queued(context.queue.waiting());
    let plan = plan(&observed, &inputs, admission, context.settings.lifecycle.finished_job_ttl, now);
    tracing::debug!(?plan, "planned");
    apply(&observed, &plan, context).await?;
    let settled =
        plan.start.is_some() || is_settled(&observed, &plan, context.settings.lifecycle.finished_job_ttl, now);
    Ok((plan.requeue, settled))
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn watched_resources_keep_their_managers_and_not_what_those_own() {
        let fields = json!({ "f:status": { "f:phase": {} } });
        let entry = json!({ "manager": "backup", "operation": "Update", "subresource": "status", "fieldsV1": fields });
        let mut object = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1",
            "kind": "NodeImageBuild",
            "metadata": { "name": "image", "managedFields": [entry] },
            "spec": { "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {} },
        });
        for parses in [true, false] {
            if !parses {
                object["spec"] = json!(1);
            }
            let guarded: Guarded = serde_json::from_value(object.clone()).unwrap();
            assert_eq!(guarded.0.is_ok(), parses);
            let [entry] = guarded.managed_fields() else { panic!("{guarded:?}") };
            assert_eq!((entry.manager.as_deref(), entry.subresource.as_deref()), (Some("backup"), Some("status")));
            assert_eq!(entry.fields_v1, None);
        }
    }
}
