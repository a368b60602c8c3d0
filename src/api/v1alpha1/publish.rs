//! Where finished images are put.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{references::SecretReference, schema};

/// One place to put the finished image. Each is given by exactly one of its keys.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.artifactServer), has(self.s3), has(self.http)].filter(given, given).size() == 1")
    .message("write exactly one of artifactServer, s3 and http in each item of publish"))]
pub struct Publish {
    /// The artifact server that is installed with the operator. Write `{}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_server: Option<ArtifactServer>,
    /// A bucket of Amazon S3 or of a store that speaks its protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3>,
    /// A server that takes `PUT` requests, such as nginx with `WebDAV`, Artifactory or Nexus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
}

/// The built-in artifact server; its addresses are set where the operator is installed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ArtifactServer {}

/// A bucket and where in it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.region) || has(self.endpoint)")
    .message("write region (for Amazon S3) or endpoint (for another store)"))]
pub struct S3 {
    /// Name of the bucket, e.g. `node-images`.
    #[schemars(schema_with = "schema::bucket")]
    pub bucket: String,
    /// Put before the name of every object, without slashes at its ends, e.g. `images/production`. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::key_prefix")]
    pub prefix: Option<String>,
    /// Region, e.g. `eu-central-1`. Default `us-east-1`, which stores with an `endpoint` of their own accept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::region")]
    pub region: Option<String>,
    /// URL of a store that is not Amazon S3, e.g. `https://minio.example.com:9000`. Default is Amazon S3 in `region`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub endpoint: Option<String>,
    /// Base of the URL that machines download from, where it differs from the store's own, e.g.
    /// `https://images.example.com`. The object's key is appended.
    #[serde(rename = "publicURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub public_url: Option<String>,
    /// Secret with the keys `accessKeyID`, `secretAccessKey` and, for temporary credentials, `sessionToken`. Without it
    /// requests are not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretReference>,
}

/// A server that takes `PUT` requests.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Http {
    /// URL of the directory that takes the image, e.g. `https://files.example.com/images`. The file's name is appended.
    #[schemars(schema_with = "schema::http_url")]
    pub url: String,
    /// URL of the directory that machines download from, where it differs.
    #[serde(rename = "publicURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub public_url: Option<String>,
    /// Secret with the key `token` (sent as a bearer token), or `username` and `password`. Without it requests carry no
    /// credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretReference>,
}
