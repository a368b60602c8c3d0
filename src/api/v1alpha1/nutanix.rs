//! Images for Nutanix.

use std::collections::BTreeMap;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::{references::SecretReference, schema};

/// An image in Prism Central: `status.image.name` is the value for `NutanixMachineConfig.spec.image`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Nutanix {
    /// Host name or address of Prism Central, e.g. `prism.example.com`.
    #[schemars(schema_with = "schema::host_without_port")]
    pub endpoint: String,
    /// Port of Prism Central. Default 9440.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Secret with the keys `username` and `password`.
    pub credentials_secret_ref: SecretReference,
    /// Whether Prism Central's certificate goes unchecked. Default `false`; better is `spec.trustBundle`.
    #[serde(default)]
    pub insecure: bool,
    /// Prism Element cluster that stores the image.
    pub cluster: NutanixCluster,
    /// Subnet of the machine that builds with `engine: ImageBuilder`, which needs it, e.g. `vm-network`. With
    /// `engine: Native` only checked to exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub subnet: Option<String>,
    /// Name of the image. It must contain the Kubernetes version, as EKS Anywhere demands. Default
    /// `<os>-<version>-kube-<channel>-<build id>`, new for every build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::image_name")]
    pub image_name: Option<String>,
    /// Whether an existing image of that name is replaced, after the new one is complete. Default `false`: a name that
    /// is taken fails the build.
    #[serde(default)]
    pub replace_existing: bool,
    /// Name of an image in Prism Central to start from, instead of `spec.base`, e.g. `ubuntu-22.04-server`: the disk of
    /// the system that `spec.os` names, with its files in ext4 partitions; with `engine: ImageBuilder` one that
    /// cloud-init starts in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub source_image_name: Option<String>,
    /// Categories of the image, each an existing category and one of its values, e.g. `{Environment: Production}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub categories: BTreeMap<String, String>,
}

fn default_port() -> u16 {
    9440
}

/// A Prism Element cluster, by name or UUID.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("has(self.name) != has(self.uuid)")
    .message("write exactly one of name and uuid"))]
pub struct NutanixCluster {
    /// Name of the cluster, e.g. `pe-cluster-1`. It must be unique.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub name: Option<String>,
    /// UUID of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::uuid")]
    pub uuid: Option<String>,
}
