//! What the controller and the build pod say to each other: the build document in, progress lines and one report out,
//! exit codes that tell who is to blame. Plain data, no I/O. The drop-in command line builds the same document.
//!
//! The document holds no secret: credentials are files in [`CREDENTIALS_DIR`], one directory a [`CredentialSlot`],
//! mounted from the Secrets that the resource names.

mod image_builder;
mod nutanix;
pub mod token;
pub mod upload;
mod vsphere;

use std::{collections::BTreeMap, ffi::OsString, fmt, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

pub use self::{
    image_builder::{Engine, ImageBuilderSettings},
    nutanix::{ClusterReference, NutanixTarget, PrismSource},
    vsphere::{VsphereImage, VsphereTarget},
};

/// Where the pod finds its build document (a mounted Secret's key).
pub const BUILD_FILE: &str = "/etc/image-builder/build/build.json";
/// Where the pod finds credentials: `CREDENTIALS_DIR/<slot>/<key of the Secret>`.
pub const CREDENTIALS_DIR: &str = "/etc/image-builder/credentials";
/// Where the pod finds additional certificate authorities (PEM), when the resource names any.
pub const TRUST_BUNDLE_FILE: &str = "/etc/image-builder/trust/ca.crt";
/// Where the pod works; an emptyDir.
pub const WORK_DIR: &str = "/work";
/// Where Kubernetes reads the report; at most [`MAX_REPORT_BYTES`] bytes of it.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes keeps this much of a termination message.
pub const MAX_REPORT_BYTES: usize = 4096;
/// Key of the credentials for vCenter that holds the password of the account `builder` in the template that a build clones.
pub const SSH_PASSWORD: &str = "sshPassword";
/// The build container's name in its pod.
pub const BUILD_CONTAINER: &str = "build";
/// Flag of `run` in a pod that was asked for with a user namespace: without one it is not to build.
pub const USER_NAMESPACE_FLAG: &str = "--user-namespace";
/// The version that both sides must share; the pod refuses a document of another one.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The operating system of the node image.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OsName {
    Ubuntu,
    Redhat,
    Debian,
}

impl fmt::Display for OsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ubuntu => "ubuntu",
            Self::Redhat => "redhat",
            Self::Debian => "debian",
        })
    }
}

/// Operating system and version, e.g. `ubuntu` `22.04`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Os {
    pub name: OsName,
    pub version: String,
}

impl Os {
    /// The version as it stands in file names: `22.04` is `2204`.
    pub fn version_without_dots(&self) -> String {
        self.version.replace('.', "")
    }
}

/// How machines start the image.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    Bios,
    Efi,
}

/// The kind of machine an image is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    Baremetal,
    Vsphere,
    Nutanix,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Baremetal => "baremetal",
            Self::Vsphere => "vsphere",
            Self::Nutanix => "nutanix",
        })
    }
}

/// A directory of credentials in [`CREDENTIALS_DIR`], e.g. `publish-0`, `vsphere`, `rhsm`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct CredentialSlot(pub String);

impl CredentialSlot {
    /// The file that holds the key `key` of this slot's Secret.
    pub fn file(&self, key: &str) -> PathBuf {
        [CREDENTIALS_DIR, &self.0, key].iter().collect()
    }
}

/// One file to download. A digest is absent only where its publisher gives none.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Artifact {
    /// What it is, for messages: `kubelet`, `containerd`.
    pub name: String,
    pub url: Url,
    /// Lower-case hexadecimal SHA-256 of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// An artifact with the version its publisher gives it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VersionedArtifact {
    /// e.g. `v1.7.28`; empty where the manifest names none.
    pub version: String,
    pub artifact: Artifact,
}

/// Everything an image takes from one EKS Anywhere release and the EKS Distro release it names.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResolvedRelease {
    /// EKS Anywhere version, e.g. `v0.26.1`.
    pub eksa_version: String,
    /// Number of its bundle manifest.
    pub bundle_number: u64,
    /// Release channel with a dash, e.g. `1-31`.
    pub channel: String,
    /// Name of the EKS Distro release, e.g. `kubernetes-1-31-eks-47`: the value of the vSphere tag `eksdRelease`.
    pub eksd_name: String,
    /// Kubernetes version, e.g. `v1.31.14`.
    pub kubernetes_version: String,
    /// Version tag of EKS Distro's images, e.g. `v1.31.14-eks-1-31-47`.
    pub full_version: String,
    /// Registry prefix of the images, e.g. `public.ecr.aws/eks-distro`.
    pub image_repository: String,
    /// The sandbox image, e.g. `public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47`.
    pub pause_image: String,
    pub kubelet: Artifact,
    pub kubeadm: Artifact,
    pub kubectl: Artifact,
    /// Archives of container images to load into the image, in the order of their names.
    pub images: Vec<Artifact>,
    pub cni_plugins: VersionedArtifact,
    pub etcd: VersionedArtifact,
    pub etcdadm: VersionedArtifact,
    pub containerd: VersionedArtifact,
    pub crictl: VersionedArtifact,
}

/// How the base root file system's digest is known.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BaseChecksum {
    /// Lower-case hexadecimal SHA-256.
    Sha256(String),
    /// Lower-case hexadecimal SHA-512.
    Sha512(String),
    /// A `SHA256SUMS` file that lists the base by its file name.
    Sha256Sums(Url),
}

/// What an image starts from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Base {
    Archive(Archive),
    /// A disk image in the Prism Central that the image goes to.
    PrismImage(PrismSource),
    /// The installation medium that upstream's recipe names; for the engine `ImageBuilder` only.
    Recipe,
}

/// A root file system as a tar archive, plain or compressed by gzip, xz or zstd; for the engine `ImageBuilder` an
/// installation medium.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Archive {
    pub url: Url,
    pub checksum: BaseChecksum,
}

/// Packages beyond the recipe's own.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Packages {
    /// Names, as the package manager takes them; may carry `=version`.
    #[serde(default)]
    pub install: Vec<String>,
    /// Additional package sources, each one file: name -> contents of a `.list`, `.sources` or `.repo` file.
    #[serde(default)]
    pub repositories: BTreeMap<String, String>,
    /// Whether the base's own package sources are switched off while building.
    #[serde(default)]
    pub disable_public_repositories: bool,
    /// Extra Packages for Enterprise Linux, for redhat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epel: Option<Epel>,
}

/// Where Extra Packages for Enterprise Linux come from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Epel {
    /// The package that sets the package source up.
    pub release_url: Url,
    /// The key that this package and all others of the source are signed with.
    pub key_url: Url,
}

/// Red Hat subscription while building. Keys of the slot: `username` and `password` with an optional `orgID`, or
/// `activationKey` and `orgID`.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Subscription {
    pub slot: CredentialSlot,
    /// Host name of a Satellite server, with its port where that is not 443; else Red Hat's own service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Minor release to stay on, e.g. `9.4`; else the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_version: Option<String>,
    /// Host name and port of the proxy for the subscription service, where it differs from the build's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<(String, u16)>,
}

/// A file to put into the image.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExtraFile {
    /// Absolute path in the image.
    pub path: String,
    pub owner: String,
    pub group: String,
    /// Octal digits, e.g. `0644`.
    pub mode: String,
    pub content: FileContent,
}

/// Where a file's bytes come from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FileContent {
    /// The text itself.
    Inline(String),
    /// The file at this path where the build runs: a mounted Secret or `ConfigMap`, or a file of the CLI's user.
    Path(PathBuf),
}

/// Proxy for everything the build downloads. Never left behind in the image.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Proxy {
    /// Proxy for `http` URLs, e.g. `http://proxy.example.com:3128`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub http: Option<String>,
    /// Proxy for `https` URLs, e.g. `http://proxy.example.com:3128`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub https: Option<String>,
    /// Hosts, domains and networks that are reached directly, e.g. `10.0.0.0/8`, `.svc`, `example.com`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), inner(length(max = 253)))]
    pub no_proxy: Vec<String>,
}

impl Proxy {
    /// The variables that programs read a proxy from, in both spellings.
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        let no_proxy = (!self.no_proxy.is_empty()).then(|| self.no_proxy.join(","));
        [("http_proxy", &self.http), ("https_proxy", &self.https), ("no_proxy", &no_proxy)]
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?)))
            .flat_map(|(name, value)| [(name.into(), value.clone().into()), (name.to_uppercase().into(), value.into())])
            .collect()
    }
}

/// When the finished image is booted before it is published.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum BootVerification {
    /// Always: with KVM where a guest really runs, else in software, which is several times slower.
    #[default]
    Required,
    /// Only where KVM runs a guest; elsewhere the build succeeds without it and says so.
    WhenAccelerated,
    /// Never.
    Never,
}

/// What may run the verification guest.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum Accelerator {
    /// KVM if a probe guest runs under it, else software emulation.
    #[default]
    Any,
    /// KVM only: a node without it fails the build at once, before anything is downloaded.
    #[serde(rename = "KVM")]
    Kvm,
}

/// What release documents without a valid signature of AWS mean.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
pub enum Signatures {
    /// They are refused.
    Require,
    /// They are used, and it is told.
    #[default]
    Warn,
    /// Signatures are not looked at.
    Off,
}

impl Signatures {
    /// Whether it is what counts where nothing is written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How the image is checked before it is published.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Verify {
    pub boot: BootVerification,
    pub accelerator: Accelerator,
    /// Longest time the guest may take until its checks are done, in seconds.
    pub timeout_seconds: u32,
}

/// A place that finished images are put. Credentials are in the slot, never here.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PublishTarget {
    /// The built-in artifact server.
    #[serde(rename_all = "camelCase")]
    Server {
        /// Where the pod uploads, e.g. `http://artifacts.node-image-builder.svc`.
        upload_url: Url,
        /// Where machines download, the base of `status.imageURL`.
        public_url: Url,
        /// Directory under both URLs: `<namespace>/<name>/<build id>`. Key `token` of the slot holds a token for it.
        directory: String,
        slot: CredentialSlot,
    },
    /// A directory of the machine that builds: where the command line puts its images. No resource leads here.
    Directory { path: PathBuf },
    /// Plain HTTP `PUT` below a URL; keys of the slot, all optional: `token`, or `username` and `password`.
    #[serde(rename_all = "camelCase")]
    Http {
        url: Url,
        /// Base of the URL machines download from, where it differs.
        #[serde(skip_serializing_if = "Option::is_none")]
        public_url: Option<Url>,
        #[serde(skip_serializing_if = "Option::is_none")]
        slot: Option<CredentialSlot>,
    },
    /// An S3-compatible store; keys of the slot: `accessKeyID`, `secretAccessKey`, optional `sessionToken`.
    #[serde(rename_all = "camelCase")]
    S3 {
        bucket: String,
        /// Key prefix without slashes at its ends.
        #[serde(default)]
        prefix: String,
        region: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        endpoint: Option<Url>,
        /// Base of the URL machines download from, where it differs from the store's own.
        #[serde(skip_serializing_if = "Option::is_none")]
        public_url: Option<Url>,
        #[serde(skip_serializing_if = "Option::is_none")]
        slot: Option<CredentialSlot>,
    },
}

/// Where the image goes as the provider's own kind of object, before anything is put to a [`PublishTarget`].
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ProviderTarget {
    /// A template in vCenter, or an item of a content library there.
    Vsphere(VsphereTarget),
    /// An image in Prism Central.
    Nutanix(NutanixTarget),
}

/// Identity of one build.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BuildIdentity {
    pub namespace: String,
    pub name: String,
    /// Ten hexadecimal digits, new for every build of the resource.
    pub build_id: String,
}

impl fmt::Display for BuildIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.name, self.build_id)
    }
}

/// One build, with every choice made: the pod decides nothing that the controller could.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BuildRequest {
    /// [`VERSION`] of the side that wrote it.
    pub version: String,
    pub identity: BuildIdentity,
    pub os: Os,
    pub provider: Provider,
    pub firmware: Firmware,
    pub release: ResolvedRelease,
    /// What makes the disk.
    #[serde(default, skip_serializing_if = "Engine::is_native")]
    pub engine: Engine,
    pub base: Base,
    /// Size of the disk in MiB.
    pub disk_size_mib: u64,
    #[serde(default)]
    pub packages: Packages,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription: Option<Subscription>,
    #[serde(default)]
    pub files: Vec<ExtraFile>,
    #[serde(default)]
    pub proxy: Proxy,
    /// Whether [`TRUST_BUNDLE_FILE`] (or the CLI's file) is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_bundle: Option<PathBuf>,
    pub verify: Verify,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_target: Option<ProviderTarget>,
    pub publish: Vec<PublishTarget>,
}

impl BuildRequest {
    /// Name of the image file without extension: `<os>-<version>-kube-<channel>`, as the EKS Anywhere CLI names it. It
    /// satisfies EKS Anywhere's rule that an image URL contains the Kubernetes version.
    pub fn image_stem(&self) -> String {
        format!("{}-{}-kube-{}", self.os.name, self.os.version_without_dots(), self.release.channel)
    }
}

/// Parts of a build, in their order. They name progress, metrics and the place of a failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Stage {
    Prepare,
    Fetch,
    Install,
    Seal,
    Assemble,
    Verify,
    Publish,
}

impl Stage {
    pub const ALL: [Self; 7] =
        [Self::Prepare, Self::Fetch, Self::Install, Self::Seal, Self::Assemble, Self::Verify, Self::Publish];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "Prepare",
            Self::Fetch => "Fetch",
            Self::Install => "Install",
            Self::Seal => "Seal",
            Self::Assemble => "Assemble",
            Self::Verify => "Verify",
            Self::Publish => "Publish",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who has to act on a failure, hence whether another attempt makes sense.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FailureClass {
    /// The specification, a document it leads to, or a credential is wrong. Another attempt fails the same way.
    BadInput,
    /// The node or the cluster lacks something: KVM, disk space, permission. Another attempt there fails the same way.
    Environment,
    /// A network fault, a lost pod, a service that is away: another attempt may succeed.
    Transient,
    /// The build was asked to stop.
    Cancelled,
    /// A defect of this program or of a tool it runs.
    Internal,
}

impl FailureClass {
    /// Exit code of the build process (sysexits(3) where one fits); the Job's `podFailurePolicy` reads it.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::BadInput => 65,
            Self::Environment => 69,
            Self::Internal => 70,
            Self::Transient => 75,
            Self::Cancelled => 130,
        }
    }

    /// Whether the same build may be tried again as it is.
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Transient | Self::Internal)
    }
}

/// Errors that can end a build say who has to act and give a reason for conditions, events and metrics.
pub trait Classified: std::error::Error {
    fn class(&self) -> FailureClass;
    /// A constant in `PascalCase`, documented in `docs/failures.md`.
    fn reason(&self) -> &'static str;
}

/// One line of progress on the pod's standard output.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgressLine {
    pub progress: Progress,
}

/// How far a build is.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Part of the build that runs now.
    pub stage: Stage,
    /// Share of the whole build that is done, 0 to 100.
    #[schemars(range(min = 0, max = 100))]
    pub percent: u8,
    /// What is being done, for a person.
    pub message: String,
}

/// What a build ends with, in the pod's termination message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BuildReport {
    Succeeded(Box<BuildOutcome>),
    Failed(FailureReport),
}

/// The finished image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BuildOutcome {
    pub image: ImageReport,
    /// How the image was verified, e.g. `booted with KVM in 21 s`, or why it was not booted.
    pub verification: String,
    /// Seconds each stage took.
    pub stage_seconds: BTreeMap<Stage, f64>,
}

/// A published image.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageReport {
    /// File name, or the name of the template or image in the provider.
    pub name: String,
    /// `raw.gz`, `ova`, `qcow2`.
    pub format: String,
    /// Where machines download it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// Further places the same file was published to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub additional_urls: Vec<Url>,
    /// Bytes of the published file.
    pub size: u64,
    /// Bytes of the disk it unpacks to.
    pub virtual_size: u64,
    /// Lower-case hexadecimal SHA-256 of the published file.
    pub sha256: String,
    /// The template in vCenter, where the image is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsphere: Option<VsphereImage>,
    /// UUID of the image in Prism Central, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Resolved digest of the base: of its archive, of the disk that came from Prism Central, or of the installation medium,
    /// where it is known. `sha256:...` or `sha512:...`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// Where the list of what is in the image is (CycloneDX).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sbom: Option<Url>,
    /// Where the statement of what it was made from is (in-toto).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Url>,
}

/// Why a build failed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureReport {
    pub stage: Stage,
    pub class: FailureClass,
    /// See [`Classified::reason`].
    pub reason: String,
    /// What happened and what to do, for a person.
    pub message: String,
}

impl BuildReport {
    /// The report as JSON of at most [`MAX_REPORT_BYTES`] bytes: a long failure message loses its middle.
    pub fn to_termination_message(&self) -> String {
        let mut report = self.clone();
        loop {
            let text = serde_json::to_string(&report).unwrap_or_default();
            let excess = text.len().saturating_sub(MAX_REPORT_BYTES);
            if excess == 0 {
                return text;
            }
            match &mut report {
                Self::Failed(failure) if failure.message.len() > 64 => {
                    let keep = failure.message.len().saturating_sub(excess + 16).max(32);
                    failure.message = shorten(&failure.message, keep);
                }
                Self::Succeeded(outcome) if !outcome.image.additional_urls.is_empty() => {
                    outcome.image.additional_urls.pop();
                }
                Self::Failed(_) | Self::Succeeded(_) => return text,
            }
        }
    }
}

/// `text` in at most `max` bytes: its beginning and its end, cut at character boundaries.
pub fn shorten(text: &str, max: usize) -> String {
    const GAP: &str = " … ";
    if text.len() <= max {
        return text.to_owned();
    }
    let half = max.saturating_sub(GAP.len()) / 2;
    let head = (0..=half).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    let tail = (text.len() - half..=text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    format!("{}{GAP}{}", &text[..head], &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_given_in_both_spellings_and_absent_without_one() {
        assert_eq!(Proxy::default().environment(), []);
        let proxy = Proxy {
            http: Some("http://p:3128".into()),
            https: None,
            no_proxy: vec![".svc".into(), "10.0.0.0/8".into()],
        };
        let given: Vec<_> =
            proxy.environment().into_iter().map(|(k, v)| format!("{}={}", k.display(), v.display())).collect();
        assert_eq!(
            given,
            [
                "http_proxy=http://p:3128",
                "HTTP_PROXY=http://p:3128",
                "no_proxy=.svc,10.0.0.0/8",
                "NO_PROXY=.svc,10.0.0.0/8"
            ]
        );
    }

    #[test]
    fn long_failure_message_fits_the_termination_message() {
        let report = BuildReport::Failed(FailureReport {
            stage: Stage::Fetch,
            class: FailureClass::BadInput,
            reason: "ChecksumMismatch".into(),
            message: format!("start {} end", "\"ü".repeat(4000)),
        });
        let text = report.to_termination_message();
        assert!(text.len() <= MAX_REPORT_BYTES, "{} bytes", text.len());
        let BuildReport::Failed(failure) = serde_json::from_str(&text).unwrap() else { panic!("not a failure") };
        assert!(failure.message.starts_with("start ") && failure.message.ends_with(" end"));
    }
}
