//! An image in Prism Central: where it goes, and as what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::CredentialSlot;

/// Where in Prism Central an image goes, and as what.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NutanixTarget {
    /// Host name or address.
    pub endpoint: String,
    pub port: u16,
    /// Keys of the slot: `username`, `password`.
    pub slot: CredentialSlot,
    /// Whether Prism Central's certificate goes unchecked.
    #[serde(default)]
    pub insecure: bool,
    /// The Prism Element cluster that stores the image.
    pub cluster: ClusterReference,
    /// Name of a subnet that must exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    pub image_name: String,
    /// Whether an image that has that name makes room, once the new one is complete.
    #[serde(default)]
    pub replace_existing: bool,
    /// Existing categories, each with one of its values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub categories: BTreeMap<String, String>,
}

/// A Prism Element cluster.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ClusterReference {
    Name(String),
    Uuid(String),
}

/// A disk image in Prism Central to start from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PrismSource {
    /// Its name, which no other image has.
    pub prism_image: String,
}
