//! The Job that removes what a build has left outside the cluster.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec, PodFailurePolicy},
        core::v1::{
            Capabilities, Container, PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements,
            SeccompProfile, SecurityContext, Toleration,
        },
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

use super::{
    super::{
        cleanup::{BUILD_LABEL, SCOPE_LABEL, Scope},
        references::Reference,
    },
    Identity,
    job::{Mounts, failure_rules},
    object_name,
};
use crate::{
    api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL},
    contract::{BUILD_CONTAINER, BUILD_FILE},
};

/// How often it is tried again where vCenter or Prism Central is away.
const RETRIES: i32 = 3;
/// Longest time for all attempts, in seconds.
const DEADLINE_SECONDS: i64 = 1200;
/// The user that it runs as, and the group that may read what comes from Secrets.
const USER: i64 = 65532;
const SECRET_MODE: i32 = 0o440;

/// What the Job is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct CleanUpInputs<'a> {
    /// Of the build that is cleaned up after.
    pub identity: &'a Identity,
    pub scope: Scope,
    pub image: &'a str,
    pub service_account: Option<&'a str>,
    pub references: &'a [Reference],
    pub node_selector: BTreeMap<String, String>,
    pub tolerations: Vec<Toleration>,
}

/// Name of the Job.
pub fn name(resource: &str, build_id: &str, scope: Scope) -> String {
    object_name(resource, &format!("{build_id}-{}", scope.as_str()))
}

/// The Job. It does not have the label of the build's own Job and pods, which are counted. A Secret that is gone does
/// not keep its pod from starting: the program says what it lacks.
pub fn clean_up(inputs: CleanUpInputs<'_>) -> Job {
    let CleanUpInputs { identity, scope, image, service_account, references, node_selector, tolerations } = inputs;
    let mut mounts = Mounts::default();
    mounts.document(&identity.object_name());
    mounts.references(references);
    let Mounts { mut volumes, mounts } = mounts;
    for volume in &mut volumes {
        if let Some(secret) = &mut volume.secret {
            (secret.optional, secret.default_mode) = (Some(true), Some(SECRET_MODE));
        }
        if let Some(config_map) = &mut volume.config_map {
            config_map.optional = Some(true);
        }
    }
    let mut args = vec!["clean-up".to_owned(), "--build".to_owned(), BUILD_FILE.to_owned()];
    if scope == Scope::Everything {
        args.push("--finished-too".to_owned());
    }
    let requests = [("cpu", "50m"), ("memory", "64Mi")];
    let container = Container {
        name: BUILD_CONTAINER.to_owned(),
        image: Some(image.to_owned()),
        args: Some(args),
        resources: Some(ResourceRequirements {
            requests: Some(requests.map(|(key, value)| (key.to_owned(), Quantity(value.to_owned()))).into()),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(mounts),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("File".to_owned()),
        ..Container::default()
    };
    let pod = PodSpec {
        containers: vec![container],
        volumes: Some(volumes),
        restart_policy: Some("Never".to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        service_account_name: service_account.map(str::to_owned),
        node_selector: (!node_selector.is_empty()).then_some(node_selector),
        tolerations: (!tolerations.is_empty()).then_some(tolerations),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    };
    let mut metadata = identity.metadata();
    metadata.name = Some(name(&identity.name, &identity.build_id, scope));
    let mut labels = identity.labels();
    labels.remove(BUILD_ID_LABEL);
    labels.insert(NAME_LABEL.to_owned(), identity.name.clone());
    labels.insert(BUILD_LABEL.to_owned(), identity.build_id.clone());
    labels.insert(SCOPE_LABEL.to_owned(), scope.as_str().to_owned());
    labels.insert("app.kubernetes.io/component".to_owned(), "clean-up".to_owned());
    metadata.labels = Some(labels.clone());
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(RETRIES),
            active_deadline_seconds: Some(DEADLINE_SECONDS),
            pod_failure_policy: Some(PodFailurePolicy { rules: failure_rules() }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}
