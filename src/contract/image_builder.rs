//! What only the engine `ImageBuilder` needs to know of a build.

use serde::{Deserialize, Serialize};
use url::Url;

use super::CredentialSlot;

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription: Option<RedhatSubscription>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epel: Option<EpelSource>,
    /// Template in vCenter that is cloned to build in, instead of installing from a medium.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Whether `template` is cloned as a linked clone of its snapshot.
    #[serde(default)]
    pub linked_clone: bool,
    /// Longest time that Packer may take, in seconds. It is not part of what the image is made from.
    pub timeout_seconds: u64,
}

/// Red Hat subscription of the machine that is built in.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RedhatSubscription {
    /// Keys of the slot: `username` and `password`, or `activationKey` and `orgID`.
    pub slot: CredentialSlot,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_release_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_hostname: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_port: Option<u16>,
}

/// Where Extra Packages for Enterprise Linux come from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EpelSource {
    /// EPEL is not used.
    Off,
    /// From these; Fedora's where one is not named.
    #[serde(rename_all = "camelCase")]
    From {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        release_url: Option<Url>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gpg_key_url: Option<Url>,
    },
}
