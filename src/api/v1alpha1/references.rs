//! References to objects in the resource's own namespace.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// A Secret in the namespace of the `NodeImageBuild`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SecretReference {
    /// Name of the Secret, e.g. `vcenter-credentials`.
    #[schemars(schema_with = "schema::object_name")]
    pub name: String,
}

/// One key of a Secret or `ConfigMap` in the namespace of the `NodeImageBuild`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct KeyReference {
    /// Name of the Secret or `ConfigMap`, e.g. `corporate-ca`.
    #[schemars(schema_with = "schema::object_name")]
    pub name: String,
    /// Key in its data, e.g. `ca.crt`.
    #[schemars(schema_with = "schema::data_key")]
    pub key: String,
}

/// Additional certificate authorities, from one object.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.configMapKeyRef) != has(self.secretKeyRef)")
    .message("write exactly one of configMapKeyRef and secretKeyRef"))]
pub struct TrustBundle {
    /// Key of a `ConfigMap` that holds PEM certificates, e.g. `{name: corporate-ca, key: ca.crt}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyReference>,
    /// Key of a Secret that holds PEM certificates, e.g. `{name: corporate-ca, key: ca.crt}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyReference>,
}
