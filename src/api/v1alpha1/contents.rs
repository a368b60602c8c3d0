//! What goes into the image: operating system, base, packages, files, and where the release's artifacts come from.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    references::{KeyReference, SecretReference},
    schema,
};
use crate::contract::OsName;

/// Operating system of the node image.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self.name != 'ubuntu' || self.version in ['22.04', '24.04']")
        .message("ubuntu is built in the versions \"22.04\" and \"24.04\": write one of them in quotes")
        .field_path(".version"),
    validation = Rule::new("self.name != 'redhat' || self.version in ['8', '9']")
        .message("redhat is built in the versions \"8\" and \"9\": write one of them in quotes")
        .field_path(".version"),
    validation = Rule::new("self.name != 'debian' || self.version == '12'")
        .message("debian is built in the version \"12\": write it in quotes")
        .field_path(".version"),
)]
pub struct Os {
    /// `ubuntu`, `redhat` or `debian`.
    pub name: OsName,
    /// Version in quotes: `"22.04"` or `"24.04"` for ubuntu, `"8"` or `"9"` for redhat, `"12"` for debian.
    #[schemars(length(max = 16))]
    pub version: String,
}

/// What the image starts from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("[has(self.sha256), has(self.sha512), has(self.sha256SumsURL)].filter(given, given).size() == 1")
    .message("write exactly one of sha256, sha512 and sha256SumsURL: a base is never used unverified"))]
pub struct Base {
    /// Where to download it. With `engine: Native` a root file system as a tar archive, plain or compressed with gzip,
    /// xz or zstd, e.g. `https://mirror.example.com/debian-12-amd64-root.tar.xz`. With `engine: ImageBuilder` the
    /// installation ISO, or for nutanix the disk of a cloud image, qcow2 or raw.
    #[schemars(schema_with = "schema::http_url")]
    pub url: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::sha256")]
    pub sha256: Option<String>,
    /// SHA-512 of the file, 128 lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::sha512")]
    pub sha512: Option<String>,
    /// URL of a `SHA256SUMS` file that lists the base by its file name, for bases that are updated in place, e.g.
    /// `https://mirror.example.com/SHA256SUMS`.
    #[serde(rename = "sha256SumsURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub sha256_sums_url: Option<String>,
}

/// Packages beyond those that every node image has.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Packages {
    /// Packages to install, as `apt` or `dnf` names them, optionally with a version, e.g. `[jq, "nginx=1.22.*"]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::package_names")]
    pub install: Vec<String>,
    /// Additional package sources while building; at most 16. They stay in the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub repositories: Vec<Repository>,
    /// Whether the package sources that the base brings along are switched off while building, so that only
    /// `repositories` are used. Default `false`.
    #[serde(default)]
    pub disable_public_repositories: bool,
    /// Extra Packages for Enterprise Linux; only for redhat. Default is that they are used, as the EKS Anywhere tool does,
    /// unless `disablePublicRepositories` is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epel: Option<Epel>,
}

/// A package source.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Repository {
    /// Name of its file, without extension, e.g. `example-tools`.
    #[schemars(schema_with = "schema::repository_name")]
    pub name: String,
    /// Contents of the file: one-line or deb822 format for ubuntu and debian, the `.repo` format for redhat. At most
    /// 16384 characters. Example: `deb [trusted=yes] https://mirror.example.com/tools ./`
    #[schemars(length(min = 1, max = 16384))]
    pub content: String,
}

/// Where Extra Packages for Enterprise Linux come from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.enabled || !(has(self.releaseURL) || has(self.gpgKeyURL))")
    .message("leave releaseURL and gpgKeyURL out where epel.enabled is false"))]
pub struct Epel {
    /// Whether EPEL is used. Default `true`.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// URL of the `epel-release` package; default is Fedora's for the version of the operating system.
    #[serde(rename = "releaseURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub release_url: Option<String>,
    /// URL of the key that signs EPEL; default is Fedora's for the version of the operating system.
    #[serde(rename = "gpgKeyURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub gpg_key_url: Option<String>,
}

fn yes() -> bool {
    true
}

/// A file to put into the image.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.content), has(self.secretKeyRef), has(self.configMapKeyRef)].filter(given, given).size() == 1")
    .message("write exactly one of content, secretKeyRef and configMapKeyRef"))]
pub struct File {
    /// Absolute path in the image, e.g. `/etc/motd`. Missing directories are made. An existing file is replaced.
    #[schemars(schema_with = "schema::file_path")]
    pub path: String,
    /// Owner's name or number in the image. Default `root`.
    #[serde(default = "root")]
    #[schemars(schema_with = "schema::account")]
    pub owner: String,
    /// Group's name or number in the image. Default `root`.
    #[serde(default = "root")]
    #[schemars(schema_with = "schema::account")]
    pub group: String,
    /// Permission bits as octal digits in quotes. Default `"0644"`.
    #[serde(default = "default_mode")]
    #[schemars(schema_with = "schema::file_mode")]
    pub mode: String,
    /// The text itself; at most 131072 characters. May be empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 131_072))]
    pub content: Option<String>,
    /// Key of a Secret that holds the bytes. The image then contains them: guard it like the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyReference>,
    /// Key of a `ConfigMap` that holds the bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyReference>,
}

fn root() -> String {
    "root".to_owned()
}

fn default_mode() -> String {
    "0644".to_owned()
}

/// Where the release documents and artifacts come from, for mirrors and networks without Internet access.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Source {
    /// URL of the EKS Anywhere release manifest. Default
    /// `https://anywhere-assets.eks.amazonaws.com/releases/eks-a/manifest.yaml`.
    #[serde(rename = "releaseManifestURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub release_manifest_url: Option<String>,
    /// Replaces `https://anywhere-assets.eks.amazonaws.com` at the beginning of every URL in those documents (the
    /// `private_artifacts_eksa_fqdn` of the EKS Anywhere tool). The mirror keeps the paths of the public host.
    #[serde(rename = "eksaBaseURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub eksa_base_url: Option<String>,
    /// Replaces `https://distro.eks.amazonaws.com` at the beginning of every URL in those documents (the
    /// `private_artifacts_eksd_fqdn` of the EKS Anywhere tool). The mirror keeps the paths of the public host.
    #[serde(rename = "eksdBaseURL", default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::http_url")]
    pub eksd_base_url: Option<String>,
}

/// Red Hat subscription of the machine while it is built. It is removed from the image at the end.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.serverHostname) || has(self.serverReleaseVersion)")
        .message("write serverReleaseVersion too: a Satellite server needs the release to subscribe to, e.g. \"9.4\""),
    validation = Rule::new("has(self.proxyHostname) == has(self.proxyPort)")
        .message("write proxyHostname and proxyPort together, or neither"),
)]
pub struct Subscription {
    /// Secret with the keys `username` and `password` (and `orgID` for a user of several organizations), or
    /// `activationKey` and `orgID`.
    pub credentials_secret_ref: SecretReference,
    /// Host name of a Satellite server, which needs `activationKey` and `orgID`. Default is Red Hat's own service. A
    /// certificate of its own authority has to be in `trustBundle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::host")]
    pub server_hostname: Option<String>,
    /// Minor release to stay on, e.g. `"9.4"`. Default is the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub server_release_version: Option<String>,
    /// Host name of a proxy for the subscription service only. Default is that of `proxy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::host_without_port")]
    pub proxy_hostname: Option<String>,
    /// Port of that proxy, 1 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub proxy_port: Option<u16>,
}
