//! Where an image comes from: an in-toto statement with SLSA provenance 1.0 (slsa.dev/spec/v1.0/provenance). It names what
//! went in by digest, what was asked for and who built it. It is not signed.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use url::Url;

use crate::{
    contract::{Archive, Base, BaseChecksum, BuildRequest, FileContent, VERSION},
    native::Fetched,
};

/// Media type of the document.
pub(super) const MEDIA_TYPE: &str = "application/vnd.in-toto+json";
/// What stands between the image's file name and `.json` in the document's.
pub(super) const SUFFIX: &str = "intoto";
/// How to read `buildDefinition`.
const BUILD_TYPE: &str = "https://nodeimagebuild.dev/build/v1";
/// Who builds.
const BUILDER: &str = "https://nodeimagebuild.dev/image-builder";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: &'static str,
    subject: Vec<Resource>,
    predicate_type: &'static str,
    predicate: Predicate,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Predicate {
    build_definition: BuildDefinition,
    run_details: RunDetails,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BuildDefinition {
    build_type: &'static str,
    external_parameters: Value,
    resolved_dependencies: Vec<Resource>,
}

#[derive(Serialize)]
struct RunDetails {
    builder: Builder,
    metadata: Metadata,
}

#[derive(Serialize)]
struct Builder {
    id: &'static str,
    version: BTreeMap<&'static str, &'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    invocation_id: String,
    started_on: Timestamp,
    finished_on: Timestamp,
}

/// A file, as in-toto's `ResourceDescriptor`.
#[derive(Serialize)]
struct Resource {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    digest: BTreeMap<&'static str, String>,
}

/// The image file that a statement is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'s> {
    pub file_name: &'s str,
    pub sha256: &'s str,
}

/// The statement. `base` is where the base came from, and its digest as `sha256:...` or `sha512:...`, where they are known.
pub(super) fn document(
    request: &BuildRequest,
    (base, base_digest): (Option<&Url>, Option<&str>),
    subject: Subject<'_>,
    started_on: Timestamp,
    finished_on: Timestamp,
) -> Vec<u8> {
    let BuildRequest { os, provider, firmware, disk_size_mib, release, packages, files, verify, identity, .. } =
        request;
    let files: Vec<_> = files
        .iter()
        .map(|file| {
            let content = match &file.content {
                FileContent::Inline(text) => json!({"sha256": hex::encode(Sha256::digest(text))}),
                // It may be a secret; a digest of a short one would give it away.
                FileContent::Path(_) => Value::Null,
            };
            json!({"path": file.path, "owner": file.owner, "group": file.group, "mode": file.mode, "digest": content})
        })
        .collect();
    let repositories: BTreeMap<_, _> = packages
        .repositories
        .iter()
        .map(|(name, text)| (name, json!({"sha256": hex::encode(Sha256::digest(text))})))
        .collect();
    let external_parameters = json!({
        "os": os, "provider": provider, "firmware": firmware, "diskSizeMib": disk_size_mib, "verify": verify,
        "engine": if request.engine.is_native() { "Native" } else { "ImageBuilder" },
        "releaseChannel": release.channel, "eksaRelease": release.eksa_version, "eksdRelease": release.eksd_name,
        "packages": {
            "install": packages.install,
            "repositories": repositories,
            "disablePublicRepositories": packages.disable_public_repositories,
            "epel": packages.epel.as_ref().map(|epel| shown(&epel.release_url)),
        },
        "files": files,
    });
    let sha256 = |digest: &str| BTreeMap::from([("sha256", digest.to_owned())]);
    let digest = base_digest
        .and_then(|digest| digest.split_once(':'))
        .map(|(kind, digest)| (if kind == "sha512" { "sha512" } else { "sha256" }, digest.to_owned()));
    let mut dependencies =
        vec![Resource { name: "base".to_owned(), uri: base.map(shown), digest: digest.into_iter().collect() }];
    if let Base::Archive(Archive { checksum: BaseChecksum::Sha256Sums(url), .. }) = &request.base {
        dependencies.push(Resource {
            name: "base checksums".to_owned(),
            uri: Some(shown(url)),
            digest: BTreeMap::new(),
        });
    }
    dependencies.extend(Fetched::wanted(release).into_iter().map(|artifact| Resource {
        name: artifact.name.clone(),
        uri: Some(shown(&artifact.url)),
        digest: artifact.sha256.as_deref().map(sha256).unwrap_or_default(),
    }));
    let statement = Statement {
        kind: "https://in-toto.io/Statement/v1",
        subject: vec![Resource { name: subject.file_name.to_owned(), uri: None, digest: sha256(subject.sha256) }],
        predicate_type: "https://slsa.dev/provenance/v1",
        predicate: Predicate {
            build_definition: BuildDefinition {
                build_type: BUILD_TYPE,
                external_parameters,
                resolved_dependencies: dependencies,
            },
            run_details: RunDetails {
                builder: Builder { id: BUILDER, version: BTreeMap::from([("image-builder", VERSION)]) },
                metadata: Metadata { invocation_id: identity.to_string(), started_on, finished_on },
            },
        },
    };
    serde_json::to_vec_pretty(&statement).unwrap_or_default()
}

/// A URL without what may be secret in it.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // A URL without a host has none of these.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{contract::ExtraFile, native::sample};

    #[test]
    fn names_inputs_by_digest_and_no_secret() {
        let mut request = sample::request();
        let base = "https://user:canary@mirror/base.tar.xz?signature=canary".parse().unwrap();
        request.packages.repositories.insert("own".into(), "deb https://user:canary@own ./".into());
        let file = |path: &str, content| ExtraFile {
            path: path.into(),
            owner: "root".into(),
            group: "root".into(),
            mode: "0600".into(),
            content,
        };
        request.files = vec![
            file("/etc/motd", FileContent::Inline("canary".into())),
            file("/etc/token", FileContent::Path("/etc/image-builder/files/canary".into())),
        ];
        let subject = Subject { file_name: "debian-12-kube-1-34.gz", sha256: &"b".repeat(64) };
        let time = |text: &str| text.parse().unwrap();
        let (started, finished) = (time("2026-01-02T03:04:05Z"), time("2026-01-02T03:14:05Z"));
        let text =
            document(&request, (Some(&base), Some(&format!("sha512:{}", "c".repeat(128)))), subject, started, finished);
        assert!(!String::from_utf8_lossy(&text).contains("canary"));

        let statement: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(statement["subject"][0]["digest"]["sha256"], "b".repeat(64));
        let build = &statement["predicate"]["buildDefinition"];
        assert_eq!(build["externalParameters"]["releaseChannel"], "1-34");
        assert_eq!(build["externalParameters"]["files"][1]["digest"], Value::Null);
        let dependencies = build["resolvedDependencies"].as_array().unwrap();
        assert_eq!(dependencies[0]["digest"]["sha512"], "c".repeat(128));
        assert_eq!(dependencies[0]["uri"], "https://mirror/base.tar.xz");
        let kubelet = dependencies.iter().find(|one| one["name"] == "kubelet").unwrap();
        assert_eq!(kubelet["digest"]["sha256"], request.release.kubelet.sha256.clone().unwrap());
        let run = &statement["predicate"]["runDetails"];
        assert_eq!(run["metadata"]["startedOn"], "2026-01-02T03:04:05Z");
        assert_eq!(run["metadata"]["invocationId"], "ns/n/0123456789");
    }
}
