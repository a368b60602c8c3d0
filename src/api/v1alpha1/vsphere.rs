//! Images for vSphere.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::{references::SecretReference, schema};

/// A template in vCenter: `status.image.name` is the value for `VSphereMachineConfig.spec.template`. Inventory objects
/// are named by their name, or by their inventory path where a name is not unique.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.cluster) || has(self.resourcePool)")
        .message("write cluster or resourcePool: vCenter needs a place to import to"),
    validation = Rule::new("!self.insecure || !has(self.thumbprint)")
        .message("write thumbprint or insecure: true, not both: a thumbprint makes the connection safe"),
    validation = Rule::new("has(self.template) || !has(self.linkedClone)")
        .message("linkedClone says how template is cloned: write template too, or leave linkedClone out"),
    validation = Rule::new("!has(self.contentLibrary) || !has(self.convertToTemplate)")
        .message("convertToTemplate is for images in the inventory: leave it out where contentLibrary is set"),
    validation = Rule::new("!has(self.contentLibrary) || !self.createSnapshot")
        .message("createSnapshot is for images in the inventory: leave it out where contentLibrary is set"),
)]
pub struct Vsphere {
    /// Host name or address of vCenter, optionally with a port (default 443), e.g. `vcenter.example.com`.
    #[schemars(schema_with = "schema::host")]
    pub server: String,
    /// Secret with the keys `username` and `password`; with `template` also `sshPassword`.
    pub credentials_secret_ref: SecretReference,
    /// Whether vCenter's certificate goes unchecked. Default `false`; better is `thumbprint` or `spec.trustBundle`.
    #[serde(default)]
    pub insecure: bool,
    /// SHA-256 or SHA-1 digest of vCenter's certificate, the only one then accepted, e.g. `A1:B2:...`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::thumbprint")]
    pub thumbprint: Option<String>,
    /// Datacenter, e.g. `dc1`.
    #[schemars(length(min = 1, max = 255))]
    pub datacenter: String,
    /// Cluster or host to import to, e.g. `cluster1`. Default is that of `resourcePool`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub cluster: Option<String>,
    /// Resource pool to import to, e.g. `/dc1/host/cluster1/Resources/images`. Default is the root pool of `cluster`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub resource_pool: Option<String>,
    /// Datastore for the template's disk, e.g. `datastore1`.
    #[schemars(length(min = 1, max = 255))]
    pub datastore: String,
    /// Network of the template's adapter, e.g. `VM Network`.
    #[schemars(length(min = 1, max = 255))]
    pub network: String,
    /// Folder for the template, e.g. `/dc1/vm/templates`. Default is the datacenter's VM folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub folder: Option<String>,
    /// Name of the result. Default `<os>-<version>-kube-<channel>-<build id>`, new for every build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::image_name")]
    pub template_name: Option<String>,
    /// Whether an existing template of that name is replaced, after the new one is complete and tagged. Default `false`:
    /// a name that is taken fails the build.
    #[serde(default)]
    pub replace_existing: bool,
    /// Hardware version of the virtual machine, 15 or higher. Default 15, for redhat 9 18.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 15, max = 99))]
    pub vmx_version: Option<u32>,
    /// Whether the imported machine is marked as a template. Default `true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub convert_to_template: Option<bool>,
    /// Whether the result gets a snapshot, which linked clones of EKS Anywhere need. Default `false`.
    #[serde(default)]
    pub create_snapshot: bool,
    /// Content library to put the result into, instead of the inventory, e.g. `eks-a-templates`. It is created where it
    /// does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 80))]
    pub content_library: Option<String>,
    /// Template in vCenter to clone and build in, instead of a new disk, by its name in the datacenter's VM folder or its
    /// path below that, e.g. `templates/base-ubuntu-2204`. It has the account `builder` that upstream's recipe makes, whose
    /// password the Secret has as `sshPassword`. Only with `engine: ImageBuilder`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub template: Option<String>,
    /// Whether `template` is cloned as a linked clone of its snapshot. Default `false`. Only with `engine: ImageBuilder`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked_clone: Option<bool>,
}
