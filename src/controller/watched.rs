//! Objects as the watches and lists bring them, without what nobody looks at.

use std::{borrow::Cow, sync::Arc};

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec, JobStatus},
        core::v1::{Container, Pod, PodSpec, PodStatus, PodTemplateSpec},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::{Resource, ResourceExt, core::error_boundary::InvalidObject};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;

use crate::api::v1alpha1::{FINALIZER, NodeImageBuild};

/// A resource that was read: one that does not parse must not stop the others. It comes without the fields that each
/// manager owns, whose maps take more room than the rest together. Who the managers are stays.
#[derive(Clone, Debug)]
pub(super) struct Guarded(pub(super) Result<NodeImageBuild, InvalidObject>);

impl<'de> Deserialize<'de> for Guarded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Value::deserialize(deserializer)?;
        let managers = object.pointer_mut("/metadata/managedFields").and_then(Value::as_array_mut);
        for manager in managers.into_iter().flatten() {
            if let Some(manager) = manager.as_object_mut() {
                manager.remove("fieldsV1");
            }
        }
        match NodeImageBuild::deserialize(&object) {
            Ok(build) => Ok(Self(Ok(build))),
            Err(error) => {
                let metadata = ObjectMeta::deserialize(&object["metadata"]).map_err(D::Error::custom)?;
                Ok(Self(Err(InvalidObject { error: error.to_string(), metadata })))
            }
        }
    }
}

impl Guarded {
    fn object_meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, Resource::meta)
    }

    fn object_meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, Resource::meta_mut)
    }
}

/// What the controller watches, and keeps in memory of every resource: which one it is, in which version. The rest is read
/// when a pass begins, but for that of a new one, which is here as long as it is new.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    metadata: ObjectMeta,
    pub(super) whole: Option<Arc<NodeImageBuild>>,
}

impl Watched {
    /// Which resource it is, in which version.
    pub(super) fn reference(object: &impl Resource) -> Self {
        let meta = object.meta();
        let metadata = ObjectMeta {
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            generation: meta.generation,
            ..ObjectMeta::default()
        };
        Self { metadata, whole: None }
    }

    fn object_meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn object_meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let guarded = Guarded::deserialize(deserializer)?;
        let reference = Self::reference(&guarded);
        Ok(Self { whole: guarded.0.ok().map(Arc::new), ..reference })
    }
}

/// Whether no pass has made anything for the resource: each adds the finalizer before it does. The object may be older
/// than the cluster's; then the finalizer can not be added, and nothing is made of what was observed here.
pub(super) fn is_new(build: &NodeImageBuild) -> bool {
    build.status.is_none()
        && build.metadata.deletion_timestamp.is_none()
        && !build.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

/// A Job or pod without the fields that managers own and most of its specification.
#[derive(Clone, Debug)]
pub(super) struct Lean<K>(pub(super) K);

impl<K: Resource> Lean<K> {
    fn object_meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn object_meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LeanMeta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<std::collections::BTreeMap<String, String>>,
    annotations: Option<std::collections::BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
}

impl From<LeanMeta> for ObjectMeta {
    fn from(lean: LeanMeta) -> Self {
        Self {
            name: lean.name,
            namespace: lean.namespace,
            uid: lean.uid,
            resource_version: lean.resource_version,
            labels: lean.labels,
            annotations: lean.annotations,
            owner_references: lean.owner_references,
            creation_timestamp: lean.creation_timestamp,
            deletion_timestamp: lean.deletion_timestamp,
            ..Self::default()
        }
    }
}

impl<'de> Deserialize<'de> for Lean<Job> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Parts {
            metadata: LeanMeta,
            spec: Option<Spec>,
            status: Option<JobStatus>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec {
            active_deadline_seconds: Option<i64>,
            template: Template,
        }
        #[derive(Deserialize)]
        struct Template {
            spec: Option<TemplateSpec>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct TemplateSpec {
            init_containers: Option<Vec<Name>>,
        }
        #[derive(Deserialize)]
        struct Name {
            name: String,
        }
        let Parts { metadata, spec, status } = Parts::deserialize(deserializer)?;
        let container = |Name { name }| Container { name, ..Container::default() };
        let pod = |spec: TemplateSpec| PodSpec {
            init_containers: spec.init_containers.map(|all| all.into_iter().map(container).collect()),
            ..PodSpec::default()
        };
        let spec = spec.map(|spec| JobSpec {
            active_deadline_seconds: spec.active_deadline_seconds,
            template: PodTemplateSpec { metadata: None, spec: spec.template.spec.map(pod) },
            ..JobSpec::default()
        });
        Ok(Self(Job { metadata: metadata.into(), spec, status }))
    }
}

impl<'de> Deserialize<'de> for Lean<Pod> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Parts {
            metadata: LeanMeta,
            spec: Option<Spec>,
            status: Option<PodStatus>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec {
            host_users: Option<bool>,
        }
        let Parts { metadata, spec, status } = Parts::deserialize(deserializer)?;
        let spec = spec.map(|spec| PodSpec { host_users: spec.host_users, ..PodSpec::default() });
        Ok(Self(Pod { metadata: metadata.into(), spec, status }))
    }
}

/// Asks for a type of ours as for the kind that it stands for.
macro_rules! stands_for {
    ($kind:ty, $($type:ty),+) => {$(
        impl Resource for $type {
            type DynamicType = ();
            type Scope = <$kind as Resource>::Scope;

            fn kind((): &()) -> Cow<'_, str> {
                <$kind as Resource>::kind(&())
            }

            fn group((): &()) -> Cow<'_, str> {
                <$kind as Resource>::group(&())
            }

            fn version((): &()) -> Cow<'_, str> {
                <$kind as Resource>::version(&())
            }

            fn plural((): &()) -> Cow<'_, str> {
                <$kind as Resource>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                self.object_meta()
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                self.object_meta_mut()
            }
        }
    )+};
}

stands_for!(NodeImageBuild, Guarded, Watched);
stands_for!(Job, Lean<Job>);
stands_for!(Pod, Lean<Pod>);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::resources::job::runs_packer, *};

    #[test]
    fn resources_keep_their_managers_and_not_what_those_own() {
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
            let watched: Watched = serde_json::from_value(object.clone()).unwrap();
            assert_eq!((watched.name_any(), watched.whole.is_some()), ("image".to_owned(), parses));
        }
    }

    #[test]
    fn pods_and_jobs_keep_what_tells_how_they_are() {
        let metadata = json!({
            "name": "x", "uid": "u", "resourceVersion": "7", "labels": { "a": "b" }, "managedFields": [{ "fieldsV1": {} }],
            "creationTimestamp": "2026-11-27T00:00:00Z",
        });
        let pod = json!({
            "metadata": metadata, "spec": { "hostUsers": false, "containers": [{ "name": "build" }] },
            "status": { "phase": "Running" },
        });
        let Lean(pod): Lean<Pod> = serde_json::from_value(pod).unwrap();
        assert_eq!((pod.labels()["a"].as_str(), pod.metadata.managed_fields.as_ref()), ("b", None));
        assert_eq!(pod.spec.unwrap().host_users, Some(false));
        assert_eq!(pod.status.unwrap().phase.as_deref(), Some("Running"));
        let template = json!({ "spec": { "initContainers": [{ "name": "copy-program", "image": "i" }] } });
        let spec = json!({ "backoffLimit": 1, "activeDeadlineSeconds": 60, "template": template });
        let job = json!({ "metadata": metadata, "spec": spec, "status": { "failed": 1 } });
        let Lean(job): Lean<Job> = serde_json::from_value(job).unwrap();
        assert!(runs_packer(&job) && job.metadata.creation_timestamp.is_some());
        assert_eq!(job.spec.as_ref().unwrap().active_deadline_seconds, Some(60));
        assert_eq!(job.status.unwrap().failed, Some(1));
    }
}
