//! The objects that the controller makes, and their names. Pure.

pub mod clean_up;
pub mod job;
pub mod secret;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use sha2::{Digest, Sha256};

use crate::api::v1alpha1::{BUILD_ID_LABEL, NAME_LABEL};

/// Longest name of an object that is also a host name.
const MAX_NAME: usize = 63;
/// Digits of a build id.
const BUILD_ID_DIGITS: usize = 10;

/// The identity of one build: the same resource (its uid) and the same parts always give the same id.
pub fn build_id(uid: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in std::iter::once(&uid).chain(parts) {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())[..BUILD_ID_DIGITS].to_owned()
}

/// Name of a build's Job and Secret. The id alone makes it unique, so a long name may be cut.
pub fn object_name(name: &str, build_id: &str) -> String {
    let room = MAX_NAME - build_id.len() - 1;
    let name: String = name.chars().map(|c| if c == '.' { '-' } else { c }).take(room).collect();
    format!("{}-{build_id}", name.trim_end_matches('-'))
}

/// What all objects of a build have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    pub namespace: String,
    /// Of the `NodeImageBuild`.
    pub name: String,
    pub build_id: String,
    pub owner: OwnerReference,
}

impl Identity {
    pub fn object_name(&self) -> String {
        object_name(&self.name, &self.build_id)
    }

    fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            (NAME_LABEL.to_owned(), self.name.clone()),
            (BUILD_ID_LABEL.to_owned(), self.build_id.clone()),
            ("app.kubernetes.io/name".to_owned(), "node-image-builder".to_owned()),
            ("app.kubernetes.io/component".to_owned(), "build".to_owned()),
            ("app.kubernetes.io/managed-by".to_owned(), "node-image-builder".to_owned()),
        ])
    }

    fn metadata(&self) -> ObjectMeta {
        ObjectMeta {
            name: Some(self.object_name()),
            namespace: Some(self.namespace.clone()),
            labels: Some(self.labels()),
            owner_references: Some(vec![self.owner.clone()]),
            ..ObjectMeta::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_are_valid_and_stable(name in "[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", digest in "[0-9a-f]{64}") {
            let id = build_id("uid", &[&digest, "token"]);
            prop_assert_eq!(&id, &build_id("uid", &[&digest, "token"]));
            let object = object_name(&name, &id);
            prop_assert!(object.len() <= MAX_NAME);
            prop_assert!(object.ends_with(&id));
            prop_assert!(object.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
        }
    }

    #[test]
    fn every_input_changes_the_build_id() {
        let id = build_id("uid", &["digest", "token"]);
        for (uid, parts) in [
            ("uid2", ["digest", "token"]),
            ("uid", ["digest2", "token"]),
            ("uid", ["digest", ""]),
            ("uidd", ["igest", "token"]),
        ] {
            assert_ne!(id, build_id(uid, &parts));
        }
        assert_eq!(id.len(), BUILD_ID_DIGITS);
    }
}
