//! The Secret that carries the build document, and the upload token where the built-in artifact server is a target.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use secrecy::{ExposeSecret, SecretString};

use super::Identity;

/// Key of the build document.
pub const DOCUMENT: &str = "build.json";
/// Key of the upload token.
pub const TOKEN: &str = "artifact-token";

/// The Secret, immutable: a new document is a new build. `annotations` say what a clean-up of the build needs.
pub fn secret(
    identity: &Identity,
    annotations: Option<BTreeMap<String, String>>,
    document: String,
    token: Option<&SecretString>,
) -> Secret {
    let mut data = BTreeMap::from([(DOCUMENT.to_owned(), document)]);
    if let Some(token) = token {
        data.insert(TOKEN.to_owned(), token.expose_secret().to_owned());
    }
    let metadata = ObjectMeta { annotations, ..identity.metadata() };
    Secret { metadata, string_data: Some(data), immutable: Some(true), ..Secret::default() }
}
