//! How a build runs: its pod, its checks, when it is repeated, what is kept.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{api::core::v1::Toleration, apimachinery::pkg::api::resource::Quantity};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;
use crate::contract::{Accelerator, BootVerification, Signatures};

/// What makes the image.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum Engine {
    /// Assembles the image from a root file system; needs no installer and no virtual machine to build.
    #[default]
    Native,
    /// Runs the upstream kubernetes-sigs/image-builder (Packer and Ansible).
    ImageBuilder,
}

/// The pod that builds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Build {
    /// Compute resources of the build container.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub resources: Resources,
    /// Labels of the nodes that may build, e.g. `{node-role.example.com/build: "true"}`. Default any node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pod tolerates, as in a Pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// Longest time for one build with all its attempts, from 5m to 24h. Default `2h`.
    #[serde(default = "default_timeout")]
    #[schemars(schema_with = "schema::timeout", extend("default" = "2h"))]
    pub timeout: kube::core::Duration,
    /// How many more attempts follow one that failed for a passing reason, such as a network fault or a lost pod; 0 to
    /// 10. A wrong specification is never tried again. Default 2.
    #[serde(default = "default_retries")]
    #[schemars(range(min = 0, max = 10))]
    pub retries: u32,
}

impl Default for Build {
    fn default() -> Self {
        Self {
            resources: Resources::default(),
            node_selector: BTreeMap::new(),
            tolerations: vec![],
            timeout: default_timeout(),
            retries: default_retries(),
        }
    }
}

fn default_timeout() -> kube::core::Duration {
    Duration::from_secs(2 * 60 * 60).into()
}

fn default_retries() -> u32 {
    2
}

/// Compute resources of the build container, as in a Pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// What the node must have free. Default for each resource that is not named: `cpu: 2`, `memory: 8Gi`,
    /// `ephemeral-storage: 50Gi`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::quantities")]
    pub requests: BTreeMap<String, Quantity>,
    /// What the container may use at most, e.g. `{memory: 16Gi}`. Default no limits.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::quantities")]
    pub limits: BTreeMap<String, Quantity>,
}

impl Resources {
    /// The requests, with the default for each resource that is not named. Where only a limit is named, it is the
    /// request too, as Kubernetes does: a default above it would be refused.
    pub fn requests_with_defaults(&self) -> BTreeMap<String, Quantity> {
        let mut requests = self.requests.clone();
        for (resource, default) in [("cpu", "2"), ("memory", "8Gi"), ("ephemeral-storage", "50Gi")] {
            requests
                .entry(resource.to_owned())
                .or_insert_with(|| self.limits.get(resource).cloned().unwrap_or_else(|| Quantity(default.to_owned())));
        }
        requests
    }
}

/// How the finished image is checked before it is published.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.boot != 'Never' || self.accelerator != 'KVM'")
    .message("leave accelerator out where boot is Never: nothing is booted"))]
pub struct Verify {
    /// When the image is booted in a virtual machine: `Required` (always: with KVM where a guest really runs, else in
    /// software, which is several times slower), `WhenAccelerated` (only where KVM runs a guest) or `Never`. Default
    /// `Required`.
    #[serde(default)]
    pub boot: BootVerification,
    /// What may run that machine: `Any` or `KVM` (a node without it fails the build at once). Default `Any`.
    #[serde(default)]
    pub accelerator: Accelerator,
    /// Longest time the machine may take until its checks are done, in seconds; 60 to 7200. Default 900.
    #[serde(default = "default_verify_timeout")]
    #[schemars(range(min = 60, max = 7200))]
    pub timeout_seconds: u32,
    /// What release documents without a valid signature of AWS mean: `Require` (they are refused), `Warn` (they are used,
    /// and the operator's log tells it) or `Off` (signatures are not looked at). Default `Warn`.
    #[serde(default, skip_serializing_if = "Signatures::is_default")]
    pub signatures: Signatures,
}

impl Default for Verify {
    fn default() -> Self {
        Self {
            boot: BootVerification::default(),
            accelerator: Accelerator::default(),
            timeout_seconds: default_verify_timeout(),
            signatures: Signatures::default(),
        }
    }
}

fn default_verify_timeout() -> u32 {
    900
}

/// When the image is built again though its specification did not change. (The annotation `nodeimagebuild.dev/rebuild`
/// asks for one build at once.)
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.schedule) || !has(self.timeZone)")
        .message("timeZone is that of schedule: write schedule too, or leave timeZone out"),
    validation = Rule::new("has(self.schedule) || !self.force")
        .message("force is about the times of schedule: write schedule too, or leave force out"),
    validation = Rule::new("has(self.schedule) || self.onNewRelease")
        .message("write schedule or onNewRelease: true, or leave rebuild out"),
)]
pub struct Rebuild {
    /// Times to build at, in cron format (minute, hour, day of month, month, day of week) or as `@hourly`, `@daily`,
    /// `@weekly`, `@monthly`, e.g. `0 3 * * 1` for Mondays at 3. Each resource starts up to five minutes later, at a
    /// moment of its own. Nothing is built while release and base are those of the newest image, unless `force` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::schedule")]
    pub schedule: Option<String>,
    /// Time zone of `schedule`, e.g. `Europe/Berlin`. Default `Etc/UTC`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::time_zone")]
    pub time_zone: Option<String>,
    /// Whether every time of `schedule` starts a build, though release and base are those of the newest image: for
    /// package updates of the operating system, which are only seen by building. Default `false`.
    #[serde(default)]
    pub force: bool,
    /// Whether a new EKS Anywhere or EKS Distro release for the channel starts a build. Default `false`.
    #[serde(default)]
    pub on_new_release: bool,
}

/// Which published images stay. Without it all of them do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Retention {
    /// How many images stay, 1 to 50: the newest ones, and besides them those that a `TinkerbellDatacenterConfig`,
    /// `TinkerbellMachineConfig`, `VSphereMachineConfig` or `NutanixMachineConfig` in the cluster names.
    #[schemars(range(min = 1, max = 50))]
    pub keep: u32,
}

/// How many finished builds stay in `status.history`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct History {
    /// Successful builds, 0 to 20. Default 3.
    #[serde(default = "default_history")]
    #[schemars(range(min = 0, max = 20))]
    pub successful: u32,
    /// Failed builds, 0 to 20. Default 3.
    #[serde(default = "default_history")]
    #[schemars(range(min = 0, max = 20))]
    pub failed: u32,
}

impl Default for History {
    fn default() -> Self {
        Self { successful: default_history(), failed: default_history() }
    }
}

fn default_history() -> u32 {
    3
}

/// What becomes of published images when the resource is deleted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// They stay.
    #[default]
    Retain,
    /// Those of the builds in `status.history` are deleted from the built-in artifact server, vCenter and Prism Central.
    Delete,
}

/// Settings that only the engine `ImageBuilder` knows.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageBuilder {
    /// Ansible roles that run before those of the first start (`firstboot_custom_roles_pre`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::role_names")]
    pub first_boot_roles_pre: Vec<String>,
    /// Ansible roles that run after those of the first start (`firstboot_custom_roles_post`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::role_names")]
    pub first_boot_roles_post: Vec<String>,
    /// Ansible roles that run before those of the node (`node_custom_roles_pre`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::role_names")]
    pub node_roles_pre: Vec<String>,
    /// Ansible roles that run after those of the node (`node_custom_roles_post`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::role_names")]
    pub node_roles_post: Vec<String>,
    /// Whether package sources that were switched off while building are switched on again at the end
    /// (`reenable_public_repos`). Default `true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reenable_public_repositories: Option<bool>,
    /// Longest time until the machine that is built in answers by SSH, in seconds; 60 to 14400 (`ssh_timeout`). Default
    /// 2400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 60, max = 14400))]
    pub ssh_timeout_seconds: Option<u32>,
    /// How often the SSH handshake is tried, 1 to 1000 (`ssh_handshake_attempts`). Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub ssh_handshake_attempts: Option<u32>,
    /// How much Ansible says, 0 to 6. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 6))]
    pub ansible_verbosity: Option<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_are_not_named_keep_their_defaults() {
        let resources = Resources {
            requests: BTreeMap::from([("cpu".into(), Quantity("4".into()))]),
            limits: BTreeMap::from([("memory".into(), Quantity("4Gi".into()))]),
        };
        let expected = [("cpu", "4"), ("ephemeral-storage", "50Gi"), ("memory", "4Gi")];
        let expected = expected.map(|(resource, quantity)| (resource.to_owned(), Quantity(quantity.to_owned())));
        assert_eq!(resources.requests_with_defaults(), BTreeMap::from(expected));
    }
}
