//! A template in vCenter: where it goes, and what it is when it is there.

use serde::{Deserialize, Serialize};

use super::CredentialSlot;

/// Where in vCenter an image goes, and as what. Inventory objects are given by name or inventory path.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices of the user")]
pub struct VsphereTarget {
    /// Host name or address, optionally with a port.
    pub server: String,
    /// Keys of the slot: `username`, `password`.
    pub slot: CredentialSlot,
    /// Whether vCenter's certificate goes unchecked.
    #[serde(default)]
    pub insecure: bool,
    /// SHA-256 or SHA-1 digest of the only certificate that is accepted, pairs of hexadecimal digits with colons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thumbprint: Option<String>,
    pub datacenter: String,
    /// Cluster or host; here or in `resource_pool` there is a place to import to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Default is the root pool of `cluster`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_pool: Option<String>,
    pub datastore: String,
    pub network: String,
    /// Default is the datacenter's VM folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
    /// Name of the template, or of the item in `content_library`.
    pub template_name: String,
    /// Whether what has that name makes room, once the new one is complete.
    #[serde(default)]
    pub replace_existing: bool,
    /// Hardware version of the virtual machine, e.g. 15.
    pub vmx_version: u32,
    /// Whether the machine is marked as a template.
    pub convert_to_template: bool,
    #[serde(default)]
    pub create_snapshot: bool,
    /// Content library to put the image into, instead of the inventory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_library: Option<String>,
}

/// A template in vCenter's inventory.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VsphereImage {
    /// e.g. `/dc1/vm/templates/ubuntu-2204-kube-1-31`.
    pub inventory_path: String,
    /// Managed object reference, e.g. `vm-42`; changes when the template is registered anew.
    pub moref: String,
    /// UUID that vCenter gave it.
    pub instance_uuid: String,
}
