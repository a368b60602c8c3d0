//! What the controller reports about a `NodeImageBuild`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::contract::{FailureClass, Progress, Provider, Stage};

/// Observed state of a `NodeImageBuild`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeImageBuildStatus {
    /// `metadata.generation` that this status speaks about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Summary for people: `Pending`, `Queued`, `Building`, `Ready`, `Failed` or `Suspended`. Programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// `Ready`, `Reconciling` and `Stalled`, with the meaning that kstatus gives them; `CleanUpFailed` and
    /// `RetentionBlocked` where something is left that is to go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Operating system and version, e.g. `ubuntu 22.04`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// Kind of machine the image is for: `baremetal`, `vsphere` or `nutanix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// Where machines download the newest image, the value for `TinkerbellDatacenterConfig.spec.osImageURL`. It stays
    /// while a newer image is built.
    #[serde(rename = "imageURL", default, skip_serializing_if = "Option::is_none")]
    pub image_url: Option<String>,
    /// The newest image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageStatus>,
    /// Releases that the newest build takes its artifacts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseStatus>,
    /// Digest of the base of the newest image, `sha256:` or `sha512:` and hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// How far the running build is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Name of the Job of the newest build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_name: Option<String>,
    /// Identity of the newest build, ten hexadecimal digits.
    #[serde(rename = "buildID", default, skip_serializing_if = "Option::is_none")]
    pub build_id: Option<String>,
    /// Digest of everything the newest build was made from. An equal digest needs no new build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs_digest: Option<String>,
    /// Digest of what the specification says about the image, when the newest build started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_digest: Option<String>,
    /// Digest of `spec.build` when the newest build started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_digest: Option<String>,
    /// How many pods the newest build has had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub attempts: Option<i32>,
    /// When the newest build started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the newest build ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Seconds that each stage of the newest build took, e.g. `{Fetch: 12.4}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, f64>")]
    pub stage_seconds: BTreeMap<Stage, f64>,
    /// Why the newest build failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureStatus>,
    /// How the newest image was verified, e.g. `booted with KVM in 21 s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<String>,
    /// Value of the annotation `nodeimagebuild.dev/rebuild` that the newest build answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rebuild_token: Option<String>,
    /// What started the newest build, if that was not the specification or the annotation: a time of `spec.rebuild.schedule`
    /// or a new release, e.g. `schedule 2026-11-30T03:02:11Z` or `release v0.26.1 kubernetes-1-31-eks-48`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trigger: Option<String>,
    /// When `spec.rebuild.schedule` is due next, with the offset of this resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_scheduled_time: Option<Time>,
    /// Finished builds, the newest first; `spec.history` limits them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    // Written as a whole: merged item by item, the API server would choose the order.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub history: Vec<HistoryEntry>,
}

/// Summary of the state, for people.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Nothing runs yet.
    Pending,
    /// As many builds run as the administrator allows; this one waits for its turn.
    Queued,
    /// A build is on its way.
    Building,
    /// The image of the present specification is published.
    Ready,
    /// No image could be built from the present specification.
    Failed,
    /// `spec.suspend` is set and nothing runs.
    Suspended,
}

/// A published image.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageStatus {
    /// Name of the file, of the template in vCenter or of the image in Prism Central.
    pub name: String,
    /// `raw.gz`, `ova` or `qcow2`.
    pub format: String,
    /// Bytes of the published file.
    #[schemars(range(min = 0))]
    pub size: u64,
    /// Bytes of the disk it unpacks to.
    #[schemars(range(min = 0))]
    pub virtual_size: u64,
    /// SHA-256 of the published file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// UUID of the image in Prism Central, which `NutanixMachineConfig.spec.image` takes too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Inventory path of the template in vCenter, e.g. `/dc1/vm/templates/ubuntu-2204-kube-1-31`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory_path: Option<String>,
    /// Managed object reference of the template in vCenter, e.g. `vm-42`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moref: Option<String>,
    /// UUID that vCenter gave the template.
    #[serde(rename = "instanceUUID", default, skip_serializing_if = "Option::is_none")]
    pub instance_uuid: Option<String>,
    /// Further places that the same file was published to, in the order of `spec.publish`.
    #[serde(rename = "additionalURLs", default, skip_serializing_if = "Vec::is_empty")]
    pub additional_urls: Vec<String>,
    /// Where the list of everything in the image is (CycloneDX JSON), beside the image. Images that are published nowhere
    /// but in vCenter or Prism Central have none.
    #[serde(rename = "sbomURL", default, skip_serializing_if = "Option::is_none")]
    pub sbom_url: Option<String>,
    /// Where the statement of what the image was made from is (in-toto, SLSA provenance), beside the image.
    #[serde(rename = "provenanceURL", default, skip_serializing_if = "Option::is_none")]
    pub provenance_url: Option<String>,
}

/// Releases that an image takes its artifacts from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseStatus {
    /// EKS Anywhere version, e.g. `v0.26.1`.
    pub eksa_release: String,
    /// Number of its bundle manifest.
    #[schemars(range(min = 0))]
    pub bundle_number: u64,
    /// Name of the EKS Distro release, e.g. `kubernetes-1-31-eks-47`: the value of the vSphere tag `eksdRelease`.
    pub eksd_release: String,
    /// Kubernetes version, e.g. `v1.31.14`.
    pub kubernetes_version: String,
}

/// Why a build failed and what to do.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailureStatus {
    /// Part of the build that failed; absent where no pod ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// Who has to act: `BadInput` (the specification or a credential), `Environment` (the node or the cluster),
    /// `Transient` (nobody: another attempt may succeed), `Cancelled` (nobody: the build was asked to stop), `Internal`
    /// (the developers of this program).
    pub class: FailureClass,
    /// One word for programs, e.g. `ChecksumMismatch`.
    pub reason: String,
    /// What happened and what to do, for people.
    pub message: String,
    /// Name of the pod that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Name of its container that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// A finished build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// Identity of the build, ten hexadecimal digits.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How it ended: `Succeeded`, `Failed` or `Cancelled`.
    pub result: BuildResult,
    /// When it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Where its image is.
    #[serde(rename = "imageURL", default, skip_serializing_if = "Option::is_none")]
    pub image_url: Option<String>,
    /// Name of its file, of its template in vCenter or of its image in Prism Central.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_name: Option<String>,
    /// UUID of its image in Prism Central.
    #[serde(rename = "imageUUID", default, skip_serializing_if = "Option::is_none")]
    pub image_uuid: Option<String>,
    /// SHA-256 of its image, 64 lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Releases it took its artifacts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseStatus>,
    /// Why it failed, one word, e.g. `ChecksumMismatch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How a build ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum BuildResult {
    /// Its image was published.
    Succeeded,
    /// It has no image.
    Failed,
    /// It was asked to stop.
    Cancelled,
}
