//! The documents of Prism Central's v3 API, as far as they are read and written here. What else an answer holds is left
//! alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// States of a task and of an entity.
pub(super) const SUCCEEDED: &str = "SUCCEEDED";
pub(super) const COMPLETE: &str = "COMPLETE";
pub(super) const ERROR: &str = "ERROR";

/// What is asked of `/<kind>s/list`.
#[derive(Debug, Serialize)]
pub(super) struct ListRequest<'l> {
    pub(super) kind: &'l str,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// In FIQL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) filter: Option<String>,
}

/// A part of a list.
#[derive(Debug, Deserialize)]
pub(super) struct List<T> {
    #[serde(default = "Vec::new")]
    pub(super) entities: Vec<T>,
    pub(super) metadata: ListMetadata,
}

#[derive(Debug, Deserialize)]
pub(super) struct ListMetadata {
    pub(super) total_matches: u64,
}

/// A cluster, subnet or image.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Entity {
    pub(super) metadata: Metadata,
    pub(super) status: Status,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Metadata {
    pub(super) uuid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) state: String,
    pub(super) message_list: Vec<Message>,
    pub(super) execution_context: ExecutionContext,
    /// Of a subnet.
    pub(super) cluster_reference: Option<ClusterUuid>,
    pub(super) resources: Resources,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct ClusterUuid {
    pub(super) uuid: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Resources {
    /// Of an image: bytes of the disk that machines get from it.
    pub(super) size_bytes: Option<u64>,
    /// Of an image: `DISK_IMAGE` or `ISO_IMAGE`.
    pub(super) image_type: String,
    /// Of an image: what its maker has said, or Prism Central has found, of the file that it was made from.
    pub(super) checksum: Option<Checksum>,
    /// Of a cluster.
    pub(super) config: ClusterConfig,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Checksum {
    /// `SHA_1` or `SHA_256`.
    pub(super) checksum_algorithm: String,
    /// In hexadecimal.
    pub(super) checksum_value: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ClusterConfig {
    pub(super) service_list: Vec<String>,
    pub(super) is_available: Option<bool>,
}

/// The tasks that work on an entity: one where it was asked to change, several where it is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ExecutionContext {
    #[serde(alias = "task_uuids")]
    task_uuid: Option<OneOrMany>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl ExecutionContext {
    pub(super) fn tasks(&self) -> &[String] {
        match &self.task_uuid {
            None => &[],
            Some(OneOrMany::One(task)) => std::slice::from_ref(task),
            Some(OneOrMany::Many(tasks)) => tasks,
        }
    }
}

/// The answer to a request for a change.
#[derive(Debug, Deserialize)]
pub(super) struct Accepted {
    pub(super) metadata: AcceptedMetadata,
    pub(super) status: AcceptedStatus,
}

#[derive(Debug, Deserialize)]
pub(super) struct AcceptedMetadata {
    /// Left out where the entity is on its way out.
    #[serde(default)]
    pub(super) uuid: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct AcceptedStatus {
    pub(super) execution_context: ExecutionContext,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Task {
    pub(super) status: String,
    pub(super) error_code: String,
    pub(super) error_detail: String,
    pub(super) progress_message: String,
}

/// What is wrong.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Message {
    pub(super) message: String,
    pub(super) reason: String,
}

/// The body of an answer that is no success.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ErrorDocument {
    pub(super) message_list: Vec<Message>,
}

/// What is asked to be an image.
#[derive(Debug, Serialize)]
pub(super) struct ImageIntent<'i> {
    pub(super) metadata: ImageMetadata<'i>,
    pub(super) spec: ImageSpec<'i>,
}

#[derive(Debug, Serialize)]
pub(super) struct ImageMetadata<'i> {
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) categories: &'i BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
pub(super) struct ImageSpec<'i> {
    pub(super) name: &'i str,
    pub(super) description: &'i str,
    pub(super) resources: ImageResources<'i>,
}

#[derive(Debug, Serialize)]
pub(super) struct ImageResources<'i> {
    pub(super) image_type: &'static str,
    pub(super) architecture: &'static str,
    pub(super) initial_placement_ref_list: [Reference<'i>; 1],
}

#[derive(Debug, Serialize)]
pub(super) struct Reference<'r> {
    pub(super) kind: &'static str,
    pub(super) uuid: &'r str,
}
