//! Carries out a plan. Decides nothing; every step may be repeated and may be the last one this process does.

use json_patch::{AddOperation, PatchOperation, ReplaceOperation, jsonptr::PointerBuf};
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{ResourceRequirements, Secret},
    },
    apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use reqwest::StatusCode;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::time::Instant;

use super::{
    BuildRef, CONTROLLER,
    cleanup::{self, Scope},
    context::Context,
    error::{Error, api_status},
    events::Note,
    observe::is_not_found,
    plan::{Count, Farewell, Observed, Plan},
    references::references,
    resources::{
        self, Identity,
        clean_up::{CleanUpInputs, clean_up},
        job::{JobInputs, job},
        object_name,
        secret::secret,
    },
    status::release_status,
    validate::{Prepared, annotations},
    watched::Watched,
};
use crate::{
    api::v1alpha1::{FINALIZER, NodeImageBuild, NodeImageBuildStatus},
    contract::{Accelerator, Engine},
    error::Chain,
};

/// An upload token outlives the build's deadline by this much.
const TOKEN_MARGIN: std::time::Duration = std::time::Duration::from_secs(3600);

/// Begins the build that the plan starts, if it starts one. Gives the version of the resource then.
pub(super) async fn begin(observed: &Observed, plan: &Plan, context: &Context) -> Result<Option<String>, Error> {
    let build = &observed.build;
    let mut version = build.resource_version();
    if plan.add_finalizer {
        version = set_finalizers(build, true, context).await?.resource_version();
    }
    if let Some(prepared) = &plan.start {
        create(observed, prepared, context).await?;
    }
    Ok(version)
}

/// What is written and said about a resource: its status, metrics, Events.
#[derive(Debug)]
pub(super) struct Announcement {
    /// When it could be made.
    pub(super) since: Instant,
    object: Watched,
    /// A status that was computed from an old object must not overwrite a newer one.
    version: Option<String>,
    status: Option<NodeImageBuildStatus>,
    status_is_ours: bool,
    notes: Vec<Note>,
    counts: Vec<Count>,
}

impl Announcement {
    pub(super) fn new(observed: &Observed, plan: &Plan, version: Option<String>) -> Self {
        let build = observed.build.as_ref();
        Self {
            since: Instant::now(),
            object: Watched::reference(build),
            version,
            status: plan.status.clone().filter(|status| build.status.as_ref() != Some(status)),
            status_is_ours: status_is_ours(build),
            notes: plan.notes.clone(),
            counts: plan.counts.clone(),
        }
    }

    pub(super) fn build(&self) -> BuildRef {
        BuildRef::of(&self.object)
    }

    pub(super) async fn make(&self, context: &Context) -> Result<(), Error> {
        if let Some(status) = &self.status {
            self.write(status, context).await?;
        }
        for count in &self.counts {
            match count {
                Count::Started => context.metrics.build_started(),
                Count::Succeeded(outcome) => context.metrics.build_succeeded(outcome),
                Count::Failed(class, reason) => context.metrics.build_failed(*class, reason),
                Count::Cancelled => context.metrics.build_cancelled(),
                Count::Superseded => context.metrics.build_superseded(),
            }
        }
        for note in &self.notes {
            tracing::info!(reason = note.reason, "{}", note.message);
            context.events.publish(&self.object, note).await;
        }
        Ok(())
    }

    /// Writes the whole status, unless somebody changed the resource in the meantime.
    async fn write(&self, status: &NodeImageBuildStatus, context: &Context) -> Result<(), Error> {
        let (build, version) = (self.build(), &self.version);
        let api: Api<NodeImageBuild> = Api::namespaced(context.client.clone(), &build.namespace);
        let result = if self.status_is_ours {
            let patch = json!({
                "apiVersion": NodeImageBuild::api_version(&()),
                "kind": NodeImageBuild::kind(&()),
                "metadata": { "resourceVersion": version },
                "status": status,
            });
            api.patch_status(&build.name, &PatchParams::apply(CONTROLLER).force(), &Patch::Apply(&patch)).await
        } else {
            let version = ReplaceOperation {
                path: PointerBuf::from_tokens(["metadata", "resourceVersion"]),
                value: json!(version),
            };
            let status = AddOperation { path: PointerBuf::from_tokens(["status"]), value: json!(status) };
            let patch = json_patch::Patch(vec![PatchOperation::Replace(version), PatchOperation::Add(status)]);
            let params = PatchParams { field_manager: Some(CONTROLLER.to_owned()), ..PatchParams::default() };
            api.patch_status(&build.name, &params, &Patch::Json::<()>(patch)).await
        };
        let written = result.map_err(Error::api("write the status"))?;
        context.echoes.wrote(&build, &written);
        Ok(())
    }
}

/// Carries out the rest of a plan that has begun.
pub(super) async fn complete(
    observed: &Observed,
    plan: &Plan,
    announcement: &Announcement,
    context: &Context,
) -> Result<(), Error> {
    let Plan {
        add_finalizer: _,
        start: _,
        delete_jobs,
        delete_secrets,
        replaces: _,
        clean_ups,
        delete_clean_ups,
        abandon,
        removals: _,
        prune,
        status: _,
        notes: _,
        counts: _,
        follow,
        farewell,
        requeue: _,
    } = plan;
    let build = &observed.build;
    let (namespace, name) = (build.namespace().unwrap_or_default(), build.name_any());
    for id in prune {
        delete_files(build, id, context).await?;
    }
    announcement.make(context).await?;
    let uid = build.uid().unwrap_or_default();
    match follow {
        Some(pod) => context.followers.follow(&uid, &BuildRef::of(build.as_ref()), pod),
        None => context.followers.stop(&uid),
    }
    let secrets: Api<Secret> = Api::namespaced(context.client.clone(), &namespace);
    for id in delete_secrets {
        delete(&secrets, &object_name(&name, id), build).await?;
    }
    let jobs: Api<Job> = Api::namespaced(context.client.clone(), &namespace);
    for id in delete_jobs {
        delete(&jobs, &object_name(&name, id), build).await?;
    }
    for (id, scope) in delete_clean_ups {
        delete(&jobs, &resources::clean_up::name(&name, id, *scope), build).await?;
    }
    for (id, scope) in clean_ups {
        match create_clean_up(observed, id, *scope, context).await {
            // Nothing can be created in a namespace that is being deleted, not even an event.
            Err(error) if error.is_namespace_terminating() && build.metadata.deletion_timestamp.is_some() => {
                let note =
                    cleanup::left_behind(observed, id, "the namespace is being deleted, so nothing can run in it");
                tracing::warn!(reason = note.reason, "{}", note.message);
                context.events.publish(build.as_ref(), &note).await;
                return set_finalizers(build, false, context).await.map(drop);
            }
            result => result?,
        }
    }
    for id in abandon {
        delete_files(build, id, context).await?;
        delete(&secrets, &object_name(&name, id), build).await?;
    }
    if let Some(Farewell { delete: builds, give_up }) = farewell {
        for id in builds {
            match delete_files(build, id, context).await {
                Err(error) if *give_up => {
                    let message = format!("{}; it stays there", Chain(&error));
                    context.events.publish(build.as_ref(), &Note::warning("FilesLeft", "Delete", message)).await;
                }
                result => result?,
            }
        }
        set_finalizers(build, false, context).await?;
    }
    Ok(())
}

/// Adds or removes our finalizer, unless somebody changed the resource in the meantime.
async fn set_finalizers(build: &NodeImageBuild, ours: bool, context: &Context) -> Result<NodeImageBuild, Error> {
    let mut finalizers: Vec<&str> =
        build.finalizers().iter().map(String::as_str).filter(|finalizer| *finalizer != FINALIZER).collect();
    if ours {
        finalizers.push(FINALIZER);
    }
    let patch = json!({ "metadata": { "resourceVersion": build.resource_version(), "finalizers": finalizers } });
    let params = PatchParams { field_manager: Some(CONTROLLER.to_owned()), ..PatchParams::default() };
    let api = builds(build, context);
    match api.patch(&build.name_any(), &params, &Patch::Merge(&patch)).await {
        // It went away while its finalizer was removed.
        Err(error) if !ours && is_not_found(&error) => Ok(build.clone()),
        result => {
            let written = result.map_err(Error::api("set the finalizer"))?;
            context.echoes.wrote(&BuildRef::of(build), &written);
            Ok(written)
        }
    }
}

fn builds(build: &NodeImageBuild, context: &Context) -> Api<NodeImageBuild> {
    Api::namespaced(context.client.clone(), &build.namespace().unwrap_or_default())
}

/// Creates the Secret, then the Job.
async fn create(observed: &Observed, prepared: &Prepared, context: &Context) -> Result<(), Error> {
    let build = &observed.build;
    let identity = Identity {
        namespace: prepared.request.identity.namespace.clone(),
        name: prepared.request.identity.name.clone(),
        build_id: prepared.request.identity.build_id.clone(),
        owner: build.controller_owner_ref(&()).unwrap_or_default(),
    };
    let spec = &build.spec.build;
    let timeout = std::time::Duration::from(spec.timeout);
    let token = match (&prepared.token_slot, &context.settings.artifact_server) {
        (Some(_), Some(server)) => {
            let valid = timeout.saturating_add(TOKEN_MARGIN);
            Some(server.token(&prepared.directory, valid, jiff::Timestamp::now()))
        }
        (_, _) => None,
    };
    let document = serde_json::to_string(&prepared.request).map_err(|source| Error::Document { source })?;
    let references = references(&build.spec);
    let release = serde_json::to_string(&release_status(&prepared.request.release))
        .map_err(|source| Error::Document { source })?;
    let needs = cleanup::annotations(&prepared.request, &references).map_err(|source| Error::Document { source })?;
    let job = job(JobInputs {
        identity: &identity,
        annotations: annotations(&observed.wish, prepared, &release),
        image: &context.settings.builder_image,
        upstream_image: match prepared.request.engine {
            Engine::Native => None,
            Engine::ImageBuilder(_) => Some(&context.settings.image_builder_image),
        },
        service_account: context.settings.builder_service_account.as_deref(),
        references: &references,
        token_slot: prepared.token_slot.as_ref(),
        resources: ResourceRequirements {
            requests: Some(spec.resources.requests_with_defaults()),
            limits: (!spec.resources.limits.is_empty()).then(|| spec.resources.limits.clone()),
            claims: None,
        },
        user_namespace: context.settings.placement.user_namespaces,
        device: match prepared.request.verify.accelerator {
            Accelerator::Kvm => context.settings.placement.kvm_resource.as_deref(),
            Accelerator::Any => None,
        },
        node_selector: node_selector(build, context),
        tolerations: spec.tolerations.clone(),
        timeout_seconds: u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX),
        retries: spec.retries,
    });
    post(
        &Api::namespaced(context.client.clone(), &identity.namespace),
        &secret(&identity, needs, document, token.as_ref()),
        build,
    )
    .await?;
    post(&Api::namespaced(context.client.clone(), &identity.namespace), &job, build).await
}

/// The labels that a node must have, those that the administrator demands among them.
fn node_selector(build: &NodeImageBuild, context: &Context) -> std::collections::BTreeMap<String, String> {
    let mut labels = build.spec.build.node_selector.clone();
    labels.extend(context.settings.placement.node_selector.clone());
    labels
}

/// Creates the Job that cleans up after a build.
async fn create_clean_up(observed: &Observed, id: &str, scope: Scope, context: &Context) -> Result<(), Error> {
    let build = &observed.build;
    let identity = Identity {
        namespace: build.namespace().unwrap_or_default(),
        name: build.name_any(),
        build_id: id.to_owned(),
        owner: build.controller_owner_ref(&()).unwrap_or_default(),
    };
    let job = clean_up(CleanUpInputs {
        identity: &identity,
        scope,
        image: &context.settings.builder_image,
        service_account: context.settings.builder_service_account.as_deref(),
        references: observed.outside.builds.get(id).map(Vec::as_slice).unwrap_or_default(),
        node_selector: node_selector(build, context),
        tolerations: build.spec.build.tolerations.clone(),
    });
    post(&Api::namespaced(context.client.clone(), &identity.namespace), &job, build).await
}

/// Creates an object whose name says what it is. That it exists already is fine if it is ours.
async fn post<K>(api: &Api<K>, object: &K, owner: &NodeImageBuild) -> Result<(), Error>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let (kind, name) = (K::kind(&()), object.name_any());
    let params = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
    match api.create(&params, object).await {
        Ok(_) => Ok(()),
        Err(error) if api_status(&error).is_some_and(kube::core::Status::is_already_exists) => {
            let there = api.get_metadata(&name).await.map_err(Error::api(format!("read the {kind} `{name}`")))?;
            let ours =
                there.owner_references().iter().any(|reference| Some(&reference.uid) == owner.metadata.uid.as_ref());
            if ours { Ok(()) } else { Err(Error::Foreign { kind: if kind == "Job" { "Job" } else { "Secret" }, name }) }
        }
        Err(error) => Err(Error::api(format!("create the {kind} `{name}`"))(error)),
    }
}

/// Deletes an object of ours together with what it owns. That it is gone already is fine.
async fn delete<K>(api: &Api<K>, name: &str, owner: &NodeImageBuild) -> Result<(), Error>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let kind = K::kind(&());
    let there = api.get_metadata_opt(name).await.map_err(Error::api(format!("read the {kind} `{name}`")))?;
    let Some(there) = there else { return Ok(()) };
    if !there.owner_references().iter().any(|reference| Some(&reference.uid) == owner.metadata.uid.as_ref()) {
        return Ok(());
    }
    // The very object that was looked at, not a successor of the same name.
    let preconditions = Preconditions { uid: there.uid(), resource_version: None };
    match api.delete(name, &DeleteParams::background().preconditions(preconditions)).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) || api_status(&error).is_some_and(kube::core::Status::is_conflict) => Ok(()),
        Err(error) => Err(Error::api(format!("delete the {kind} `{name}`"))(error)),
    }
}

/// Whether every field of the status is the operator's by server-side apply. What another manager owns as well, e.g. a
/// backup tool that restored it, stays when apply leaves it out, and the time an old build ended would end the next one.
fn status_is_ours(build: &NodeImageBuild) -> bool {
    let ours = |entry: &ManagedFieldsEntry| {
        entry.manager.as_deref() == Some(CONTROLLER) && entry.operation.as_deref() == Some("Apply")
    };
    build.managed_fields().iter().filter(|entry| entry.subresource.as_deref() == Some("status")).all(ours)
}

/// Deletes what a build put on the artifact server. That there is nothing is fine.
async fn delete_files(build: &NodeImageBuild, build_id: &str, context: &Context) -> Result<(), Error> {
    let Some(server) = &context.settings.artifact_server else { return Ok(()) };
    let (url, directory) = server.place(&build.namespace().unwrap_or_default(), &build.name_any(), build_id);
    let token = server.token(&directory, std::time::Duration::from_secs(300), jiff::Timestamp::now());
    let request = context.http.delete(url.clone()).bearer_auth(token.expose_secret());
    let request = request.timeout(std::time::Duration::from_secs(20));
    let shown = url.to_string();
    let answer = request.send().await.map_err(|source| Error::CleanupTransport { url: shown.clone(), source })?;
    match answer.status() {
        StatusCode::NOT_FOUND => Ok(()),
        status if status.is_success() => Ok(()),
        status => Err(Error::Cleanup { url: shown, answer: status.to_string() }),
    }
}
