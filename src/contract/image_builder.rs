//! What only the engine `ImageBuilder` needs to know of a build.

use serde::{Deserialize, Serialize};

/// What makes the disk.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Engine {
    /// Assembles it from a root file system.
    #[default]
    Native,
    /// Runs kubernetes-sigs/image-builder.
    ImageBuilder(Box<ImageBuilderSettings>),
}

impl Engine {
    /// Whether it is what counts where nothing is written.
    pub fn is_native(&self) -> bool {
        *self == Self::Native
    }
}

/// Settings for Packer and Ansible. What both engines understand stands in the build document itself.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ImageBuilderSettings {
    /// Roles that run before those of the first start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_boot_roles_pre: Vec<String>,
    /// Roles that run after those of the first start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_boot_roles_post: Vec<String>,
    /// Roles that run before those of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_roles_pre: Vec<String>,
    /// Roles that run after those of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_roles_post: Vec<String>,
    /// Whether package sources that were switched off while building are switched on again at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reenable_public_repositories: Option<bool>,
    /// Longest time until the machine that is built in answers by SSH, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_timeout_seconds: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_handshake_attempts: Option<u32>,
    /// How often `-v` is given to Ansible, 0 to 6.
    #[serde(default)]
    pub ansible_verbosity: u8,
    /// Template in vCenter that is cloned to build in, instead of installing from a medium.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Whether `template` is cloned as a linked clone of its snapshot.
    #[serde(default)]
    pub linked_clone: bool,
    /// Longest time that Packer may take, in seconds. It is not part of what the image is made from.
    pub timeout_seconds: u64,
}
