//! The Secrets and `ConfigMaps` that a build names: what they must hold and where the pod finds them. Pure.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::api::core::v1::Secret;
use serde::{Deserialize, Serialize};

use crate::{
    api::v1alpha1::{KeyReference, NAME_LABEL, NodeImageBuildSpec, SecretReference},
    contract::{CredentialSlot, SSH_PASSWORD},
};

/// Where the pod finds the bytes of `spec.files[index]`.
pub const FILES_DIR: &str = "/etc/image-builder/files";
/// Name of the file in a file's directory.
pub const FILE_NAME: &str = "content";

#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    Secret,
    ConfigMap,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Secret => "Secret",
            Self::ConfigMap => "ConfigMap",
        })
    }
}

/// What the pod does with an object.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Use {
    /// All keys are files of this slot.
    Credentials(CredentialSlot),
    /// One key is the content of `spec.files[index]`.
    File { index: usize, key: String },
    /// One key holds certificate authorities.
    TrustBundle { key: String },
}

/// One object that the specification names.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    pub kind: ObjectKind,
    pub name: String,
    /// The field that names it, for messages.
    pub field: String,
    /// Sets of keys, one of which must be there.
    pub keys: Vec<Vec<String>>,
    pub used_as: Use,
}

impl Reference {
    fn credentials(slot: String, secret: &SecretReference, field: String, keys: &[&[&str]]) -> Self {
        Self {
            kind: ObjectKind::Secret,
            name: secret.name.clone(),
            field,
            keys: keys.iter().map(|set| set.iter().map(|&key| key.to_owned()).collect()).collect(),
            used_as: Use::Credentials(CredentialSlot(slot)),
        }
    }

    fn key(kind: ObjectKind, reference: &KeyReference, field: String, used_as: Use) -> Self {
        Self { kind, name: reference.name.clone(), field, keys: vec![vec![reference.key.clone()]], used_as }
    }
}

/// Slot of the credentials for vCenter.
pub const VSPHERE_SLOT: &str = "vsphere";

/// Slot of the credentials for Prism Central.
pub const NUTANIX_SLOT: &str = "nutanix";

/// Slot of the credentials for the Red Hat subscription.
pub const RHSM_SLOT: &str = "rhsm";

/// Slot of the credentials for `spec.publish[index]`.
pub fn publish_slot(index: usize) -> String {
    format!("publish-{index}")
}

/// Everything that the specification names and its build mounts.
pub fn references(spec: &NodeImageBuildSpec) -> Vec<Reference> {
    let mut found = vec![];
    for (index, target) in spec.publish.iter().enumerate() {
        let field = |kind: &str| format!("spec.publish[{index}].{kind}.credentialsSecretRef");
        if let Some(secret) = target.s3.as_ref().and_then(|s3| s3.credentials_secret_ref.as_ref()) {
            let keys: &[&[&str]] = &[&["accessKeyID", "secretAccessKey"]];
            found.push(Reference::credentials(publish_slot(index), secret, field("s3"), keys));
        }
        if let Some(secret) = target.http.as_ref().and_then(|http| http.credentials_secret_ref.as_ref()) {
            let keys: &[&[&str]] = &[&["token"], &["username", "password"]];
            found.push(Reference::credentials(publish_slot(index), secret, field("http"), keys));
        }
    }
    if let Some(vsphere) = &spec.vsphere {
        let (secret, field) = (&vsphere.credentials_secret_ref, "spec.vsphere.credentialsSecretRef".to_owned());
        let keys: &[&str] = match vsphere.template {
            Some(_) => &["username", "password", SSH_PASSWORD],
            None => &["username", "password"],
        };
        found.push(Reference::credentials(VSPHERE_SLOT.to_owned(), secret, field, &[keys]));
    }
    if let Some(nutanix) = &spec.nutanix {
        let (secret, field) = (&nutanix.credentials_secret_ref, "spec.nutanix.credentialsSecretRef".to_owned());
        found.push(Reference::credentials(NUTANIX_SLOT.to_owned(), secret, field, &[&["username", "password"]]));
    }
    if let Some(subscription) = &spec.subscription {
        let (secret, field) =
            (&subscription.credentials_secret_ref, "spec.subscription.credentialsSecretRef".to_owned());
        let keys: &[&[&str]] = match subscription.server_hostname {
            Some(_) => &[&["activationKey", "orgID"]],
            None => &[&["activationKey", "orgID"], &["username", "password"]],
        };
        found.push(Reference::credentials(RHSM_SLOT.to_owned(), secret, field, keys));
    }
    for (index, file) in spec.files.iter().enumerate() {
        let objects = [
            (ObjectKind::Secret, &file.secret_key_ref, "secretKeyRef"),
            (ObjectKind::ConfigMap, &file.config_map_key_ref, "configMapKeyRef"),
        ];
        for (kind, reference, field) in objects {
            if let Some(reference) = reference {
                let used_as = Use::File { index, key: reference.key.clone() };
                found.push(Reference::key(kind, reference, format!("spec.files[{index}].{field}"), used_as));
            }
        }
    }
    if let Some(trust) = &spec.trust_bundle {
        let objects = [
            (ObjectKind::Secret, &trust.secret_key_ref, "secretKeyRef"),
            (ObjectKind::ConfigMap, &trust.config_map_key_ref, "configMapKeyRef"),
        ];
        for (kind, reference, field) in objects {
            if let Some(reference) = reference {
                let used_as = Use::TrustBundle { key: reference.key.clone() };
                found.push(Reference::key(kind, reference, format!("spec.trustBundle.{field}"), used_as));
            }
        }
    }
    found
}

/// An object that was looked up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Lookup {
    /// The names of its keys.
    Found(Vec<String>),
    /// A Secret that builds get nothing of; what it is.
    Guarded(&'static str),
    NotFound,
}

/// What is wrong with the objects that a build names: the reason and the message, of the first one.
pub fn missing(
    references: &[Reference],
    objects: &BTreeMap<(ObjectKind, String), Lookup>,
    namespace: &str,
) -> Option<(&'static str, String)> {
    references.iter().find_map(|reference| {
        let Reference { kind, name, field, keys, used_as: _ } = reference;
        match objects.get(&(*kind, name.clone())) {
            None | Some(Lookup::NotFound) => Some((
                match kind {
                    ObjectKind::Secret => "SecretNotFound",
                    ObjectKind::ConfigMap => "ConfigMapNotFound",
                },
                format!(
                    "{field} names the {kind} `{name}`, which does not exist in the namespace `{namespace}`; create it \
                     with {}, and the build starts by itself",
                    alternatives(keys)
                ),
            )),
            Some(Lookup::Found(present)) if !keys.iter().any(|set| set.iter().all(|key| present.contains(key))) => {
                Some((
                    match kind {
                        ObjectKind::Secret => "SecretKeyMissing",
                        ObjectKind::ConfigMap => "ConfigMapKeyMissing",
                    },
                    format!(
                        "the {kind} `{name}` in the namespace `{namespace}`, named by {field}, lacks {}; it has {}",
                        alternatives(keys),
                        if present.is_empty() { "no keys".to_owned() } else { quoted(present) }
                    ),
                ))
            }
            Some(Lookup::Guarded(what)) => Some((
                "SecretForbidden",
                format!(
                    "{field} names the Secret `{name}`, which is {what}: builds get nothing of such a Secret. Create another \
                     one with {}",
                    alternatives(keys)
                ),
            )),
            Some(Lookup::Found(_)) => None,
        }
    })
}

/// What a Secret is that no image and no server of the author's choice may get, whoever is its namespace's user: it is the
/// key to what others do.
pub fn guarded(secret: &Secret) -> Option<&'static str> {
    let labels = secret.metadata.labels.as_ref();
    let label = |key: &str| labels.and_then(|labels| labels.get(key)).map(String::as_str);
    match secret.type_.as_deref() {
        Some("kubernetes.io/service-account-token") => return Some("the token of a service account"),
        Some("bootstrap.kubernetes.io/token") => return Some("a token by which nodes join a cluster"),
        Some("helm.sh/release.v1") => return Some("the record of a Helm release"),
        Some(_) | None => {}
    }
    if label(NAME_LABEL).is_some() {
        return Some("the document of a build, with its upload token");
    }
    let ours = label("app.kubernetes.io/name") == Some("node-image-builder");
    (ours && label("app.kubernetes.io/component") == Some("artifact-server"))
        .then_some("the key that signs upload tokens")
}

fn quoted(keys: &[String]) -> String {
    keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" and ")
}

fn alternatives(keys: &[Vec<String>]) -> String {
    let sets: Vec<String> =
        keys.iter().map(|set| format!("the key{} {}", if set.len() == 1 { "" } else { "s" }, quoted(set))).collect();
    sets.join(", or ")
}
