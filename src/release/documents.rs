//! The published documents, as far as they are used. Field names are those of `anywhere.eks.amazonaws.com/v1alpha1` and
//! `distro.eks.amazonaws.com/v1alpha1`; everything else in them is ignored and not kept.

use serde::{Deserialize, de::DeserializeOwned};

/// A document that can be read from its bytes.
pub(super) trait Document: Sized + Send + Sync + 'static {
    /// What it is, for messages.
    const EXPECTED: &'static str;

    /// Reads it, or says what is wrong with it.
    fn read(bytes: &[u8]) -> Result<Self, String>;
}

/// Kind `Release` of EKS Anywhere: all its releases.
#[derive(Debug, Deserialize)]
pub(super) struct Releases {
    pub(super) spec: ReleasesSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReleasesSpec {
    pub(super) latest_version: String,
    pub(super) releases: Vec<Release>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Release {
    pub(super) version: String,
    pub(super) bundle_manifest_url: String,
    /// Grows with each release.
    #[serde(default)]
    pub(super) number: u64,
}

/// Kind `Bundles`: what one EKS Anywhere release consists of.
#[derive(Debug, Deserialize)]
pub(super) struct Bundles {
    pub(super) spec: BundlesSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BundlesSpec {
    pub(super) number: u64,
    pub(super) versions_bundles: Vec<VersionsBundle>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VersionsBundle {
    /// Kubernetes minor version: `1.31`.
    pub(super) kube_version: String,
    #[serde(rename = "eksD")]
    pub(super) eks_d: EksD,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EksD {
    pub(super) name: String,
    pub(super) manifest_url: String,
    pub(super) etcdadm: Option<Archive>,
    pub(super) crictl: Option<Archive>,
    pub(super) containerd: Option<Archive>,
}

/// A file, with its digest.
#[derive(Debug, Deserialize)]
pub(super) struct Archive {
    #[serde(default)]
    pub(super) uri: String,
    pub(super) sha256: Option<String>,
}

/// Kind `Release` of EKS Distro: one of its releases.
#[derive(Debug, Deserialize)]
pub(super) struct DistroRelease {
    pub(super) spec: DistroSpec,
    pub(super) status: DistroStatus,
}

#[derive(Debug, Deserialize)]
pub(super) struct DistroSpec {
    /// `1-31`.
    pub(super) channel: String,
    pub(super) number: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct DistroStatus {
    pub(super) components: Vec<Component>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Component {
    pub(super) name: String,
    #[serde(default)]
    pub(super) git_tag: String,
    #[serde(default)]
    pub(super) assets: Vec<Asset>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Asset {
    pub(super) name: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    pub(super) arch: Vec<String>,
    pub(super) archive: Option<Archive>,
    pub(super) image: Option<Image>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Image {
    pub(super) uri: String,
}

/// A `.sha256` file: the digest in hexadecimal, then the file's name.
#[derive(Debug)]
pub(super) struct Checksum(pub(super) String);

/// A `SHA256SUMS` file: the digests of many files.
#[derive(Debug)]
pub(super) struct Sums(pub(super) String);

/// Says which document something is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Identity {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

/// Reads YAML. The limits are some ten times what the largest bundle manifests need; no manifest has aliases.
fn yaml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_nodes: 2_000_000, max_events: 5_000_000, max_documents: 1 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| problem(&error))
}

/// What is wrong, and where, without anything of what stands there: the URL may lead to something that whoever reads the
/// message may not see.
fn problem(error: &serde_saphyr::Error) -> String {
    let place = error.location().map_or(String::new(), |at| format!(" (line {}, column {})", at.line(), at.column()));
    let text = error.to_string();
    // The names of fields are ours.
    match text.find("missing field `").and_then(|start| text[start..].split('`').nth(1)) {
        Some(field) if !text.contains('"') => format!("the field `{field}` is missing{place}"),
        Some(_) | None => format!("it is not written as such a document is{place}"),
    }
}

/// A word that names a kind or a version of an interface, and nothing else.
fn is_name(word: &str) -> bool {
    word.len() <= 63 && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"./-".contains(&byte))
}

/// All fields of a document.
pub(super) fn value(bytes: &[u8]) -> Result<serde_json::Value, String> {
    yaml(std::str::from_utf8(bytes).map_err(|_| "it is not text in UTF-8".to_owned())?)
}

fn resource<T: DeserializeOwned>(bytes: &[u8], api_version: &str, kind: &str) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text in UTF-8".to_owned())?;
    yaml(text).map_err(|problem| match yaml::<Identity>(text) {
        Ok(identity) if identity.api_version == api_version && identity.kind == kind => problem,
        Ok(identity) if !identity.kind.is_empty() && is_name(&identity.kind) && is_name(&identity.api_version) => {
            format!("it holds a {} of {}, not a {kind} of {api_version}", identity.kind, identity.api_version)
        }
        Ok(_) | Err(_) => format!("it holds no {kind} of {api_version} ({problem})"),
    })
}

impl Document for Releases {
    const EXPECTED: &'static str = "an EKS Anywhere release manifest";

    fn read(bytes: &[u8]) -> Result<Self, String> {
        resource(bytes, "anywhere.eks.amazonaws.com/v1alpha1", "Release")
    }
}

impl Document for Bundles {
    const EXPECTED: &'static str = "an EKS Anywhere bundle manifest";

    fn read(bytes: &[u8]) -> Result<Self, String> {
        resource(bytes, "anywhere.eks.amazonaws.com/v1alpha1", "Bundles")
    }
}

impl Document for DistroRelease {
    const EXPECTED: &'static str = "an EKS Distro release manifest";

    fn read(bytes: &[u8]) -> Result<Self, String> {
        resource(bytes, "distro.eks.amazonaws.com/v1alpha1", "Release")
    }
}

impl Document for Checksum {
    const EXPECTED: &'static str = "a SHA-256 checksum file";

    fn read(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text in UTF-8".to_owned())?;
        let digest = text.split_whitespace().next().unwrap_or_default();
        sha256(digest).map(Self).ok_or_else(|| "it does not begin with 64 hexadecimal digits".to_owned())
    }
}

impl Document for Sums {
    const EXPECTED: &'static str = "a list of checksums";

    fn read(bytes: &[u8]) -> Result<Self, String> {
        // The file may be signed, and what stands around the digests need not be text.
        Ok(Self(String::from_utf8_lossy(bytes).into_owned()))
    }
}

/// A SHA-256 digest in lower-case hexadecimal, if `text` is one.
pub(super) fn sha256(text: &str) -> Option<String> {
    let fits = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::token("aws-secret-0123456789")]
    #[case::json(r#"{"AccessKeyId": "aws-secret-0123456789", "Token": "aws-secret-0123456789"}"#)]
    #[case::value("apiVersion: anywhere.eks.amazonaws.com/v1alpha1\nkind: Release\nspec: aws-secret-0123456789")]
    #[case::key("aws-secret-0123456789: 1\naws-secret-0123456789: 2")]
    #[case::kind("kind: aws-secret-0123456789 and more")]
    #[case::broken("a: [aws-secret-0123456789")]
    #[case::quoted(
        "apiVersion: anywhere.eks.amazonaws.com/v1alpha1\nkind: Release\nspec: \"missing field `aws-secret-0123456789`\""
    )]
    #[case::tag("!aws-secret-0123456789 x")]
    #[case::alias("a: *aws-secret-0123456789")]
    fn what_a_url_leads_to_by_mistake_or_on_purpose_is_not_told(#[case] text: &str) {
        let problems = [
            Releases::read(text.as_bytes()).unwrap_err(),
            Bundles::read(text.as_bytes()).unwrap_err(),
            DistroRelease::read(text.as_bytes()).unwrap_err(),
            Checksum::read(text.as_bytes()).unwrap_err(),
            value(text.as_bytes()).err().unwrap_or_default(),
        ];
        assert!(problems.iter().all(|problem| !problem.contains("secret")), "{problems:?}");
    }

    #[test]
    fn what_a_manifest_lacks_is_told() {
        let text = "apiVersion: anywhere.eks.amazonaws.com/v1alpha1\nkind: Release\nspec: {releases: []}";
        let problem = Releases::read(text.as_bytes()).unwrap_err();
        assert!(problem.contains("`latestVersion`") && problem.contains("line 3"), "{problem}");
    }
}
