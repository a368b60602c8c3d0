//! The var-files that the EKS Anywhere tool would give to Packer (eksa-facts 2 and 4.5): one type a file, its keys in the
//! words of upstream's templates. Pure.
//!
//! All values are texts. What has no value of its own and is `None` is left out, so that upstream's default counts.

#![expect(clippy::struct_field_names, reason = "upstream's names")]

use serde::Serialize;
use serde_json::Value;

use crate::contract::{
    Artifact, Base, BaseChecksum, BuildRequest, Classified, ClusterReference, FailureClass, ImageBuilderSettings,
    NutanixTarget, OsName, Provider, ProviderTarget, Proxy, ResolvedRelease, VsphereTarget,
};

/// Packages of every Debian node beside upstream's own, as the EKS Anywhere tool has them.
const EXTRA_DEBS: &str = "nfs-common xfsprogs";

/// Why a release gives no var-files.
#[derive(Debug, thiserror::Error)]
pub enum VarFileError {
    #[error(
        "{name} of {release} is at {url}, and upstream's recipe looks for it at {expected} below a common URL; use \
         engine: Native for this release, or mend the mirror"
    )]
    Layout { name: String, release: String, url: String, expected: String },
    #[error("the release {release} gives no SHA-256 of {name}, and nothing is installed unverified; mend the mirror")]
    NoDigest { name: String, release: String },
    #[error("the release {release} has no {name}; use another release, or mend the mirror")]
    Missing { name: &'static str, release: String },
}

impl Classified for VarFileError {
    fn class(&self) -> FailureClass {
        FailureClass::BadInput
    }

    fn reason(&self) -> &'static str {
        "ReleaseUnsuitable"
    }
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Known(…)")
    }
}

/// One var-file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VarFile {
    /// Without `.json`.
    pub name: &'static str,
    pub vars: Value,
}

impl VarFile {
    fn new(name: &'static str, vars: &impl Serialize) -> Self {
        // Structs of texts: nothing in them can fail.
        Self { name, vars: serde_json::to_value(vars).unwrap_or_default() }
    }
}

/// Secrets and results of looking at artifacts: what the build document does not say itself.
#[derive(Clone, Default)]
pub struct Known {
    /// Lower-case hexadecimal SHA-256 of the plugin `host-device` in the release's archive.
    pub host_device_sha256: String,
    /// The installation medium on this machine and its digest, `sha256:…` or `sha512:…`, where the document names one.
    pub medium: Option<(String, String)>,
    /// Files with package sources, on this machine.
    pub repositories: Vec<String>,
    pub rhel_username: String,
    pub rhel_password: String,
    pub rhsm_activation_key: Option<String>,
    pub rhsm_org_id: Option<String>,
    /// For vCenter or Prism Central.
    pub username: String,
    pub password: String,
}

#[derive(Serialize)]
struct Kubernetes<'a> {
    containerd_sha256: &'a str,
    containerd_url: &'a str,
    crictl_source_type: &'a str,
    crictl_url: &'a str,
    crictl_sha256: &'a str,
    kubernetes_container_registry: &'a str,
    kubernetes_http_source: &'a str,
    kubernetes_load_additional_imgs: &'a str,
    kubernetes_semver: &'a str,
    kubernetes_full_version: &'a str,
    kubernetes_series: &'a str,
    kubernetes_source_type: &'a str,
    etcd_http_source: &'a str,
    etcd_version: &'a str,
    etcd_sha256: &'a str,
    etcdadm_http_source: &'a str,
    etcdadm_version: &'a str,
}

#[derive(Serialize)]
struct Cni<'a> {
    kubernetes_cni_deb_version: &'a str,
    kubernetes_cni_rpm_version: &'a str,
    kubernetes_cni_http_checksum: String,
    kubernetes_cni_http_source: &'a str,
    kubernetes_cni_semver: &'a str,
    kubernetes_cni_source_type: &'a str,
    kubernetes_cni_host_device_sha256: &'a str,
}

#[derive(Serialize)]
struct Common<'a> {
    pause_image: &'a str,
    extra_debs: &'a str,
    http_proxy: &'a str,
    https_proxy: &'a str,
    no_proxy: String,
}

#[derive(Serialize)]
struct AdditionalComponents<'a> {
    additional_url_images: &'a str,
    additional_url_images_list: &'a str,
    load_additional_components: &'a str,
}

/// The medium that the machine is installed from.
#[derive(Default, Serialize)]
struct Iso {
    #[serde(skip_serializing_if = "Option::is_none")]
    iso_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iso_checksum: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iso_checksum_type: Option<&'static str>,
}

/// Subscription and EPEL; user name and password are always written.
#[derive(Default, Serialize)]
struct Rhel<'a> {
    rhel_username: &'a str,
    rhel_password: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_server_hostname: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_server_release_version: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_activation_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_org_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_server_proxy_hostname: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rhsm_server_proxy_port: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    redhat_epel_rpm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epel_rpm_gpg_key: Option<String>,
}

/// What is installed in addition, and the roles of the user.
#[derive(Default, Serialize)]
struct Extra<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    http_proxy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    https_proxy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    no_proxy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_debs: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_rpms: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_repos: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firstboot_custom_roles_pre: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firstboot_custom_roles_post: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_custom_roles_pre: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_custom_roles_post: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disable_public_repos: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reenable_public_repos: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Ssh {
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh_handshake_attempts: Option<String>,
}

#[derive(Serialize)]
struct Baremetal<'a> {
    disk_size: String,
    #[serde(flatten)]
    iso: Iso,
    #[serde(flatten)]
    rhel: Rhel<'a>,
    #[serde(flatten)]
    extra: Extra<'a>,
    #[serde(flatten)]
    ssh: Ssh,
}

#[derive(Serialize)]
struct VsphereLibrary {
    output_dir: &'static str,
}

#[derive(Serialize)]
struct Vsphere<'a> {
    vcenter_server: &'a str,
    username: &'a str,
    password: &'a str,
    datacenter: &'a str,
    cluster: &'a str,
    datastore: &'a str,
    folder: &'a str,
    network: &'a str,
    resource_pool: &'a str,
    insecure_connection: String,
    convert_to_template: String,
    create_snapshot: String,
    linked_clone: String,
    template: &'a str,
    vmx_version: String,
    #[serde(flatten)]
    iso: Iso,
    #[serde(flatten)]
    rhel: Rhel<'a>,
    #[serde(flatten)]
    extra: Extra<'a>,
    #[serde(flatten)]
    ssh: Ssh,
}

#[derive(Serialize)]
struct Nutanix<'a> {
    nutanix_endpoint: &'a str,
    nutanix_port: String,
    nutanix_insecure: String,
    nutanix_cluster_name: &'a str,
    nutanix_subnet_name: &'a str,
    nutanix_username: &'a str,
    nutanix_password: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    nutanix_cluster_uuid: Option<&'a str>,
    image_name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_url: Option<&'a str>,
    /// As in the EKS Anywhere tool; the engine itself fetches the image.
    image_export: &'static str,
    #[serde(flatten)]
    rhel: Rhel<'a>,
    #[serde(flatten)]
    extra: Extra<'a>,
}

/// The var-files of a build, in the order that Packer gets them: later ones win. Packer gets them after upstream's own.
pub fn generate(
    request: &BuildRequest,
    settings: &ImageBuilderSettings,
    known: &Known,
) -> Result<Vec<VarFile>, VarFileError> {
    let mut files = vec![
        kubernetes(&request.release)?,
        common(request),
        cni(&request.release, &known.host_device_sha256)?,
        additional_components(&request.release)?,
    ];
    match (request.provider, &request.provider_target) {
        (Provider::Vsphere, Some(ProviderTarget::Vsphere(target))) => {
            files.push(VarFile::new("vsphere-library", &VsphereLibrary { output_dir: "./output" }));
            files.push(vsphere(request, settings, known, target));
        }
        (Provider::Nutanix, Some(ProviderTarget::Nutanix(target))) => {
            files.push(nutanix(request, settings, known, target));
        }
        (Provider::Baremetal | Provider::Vsphere | Provider::Nutanix, _) => {
            files.push(baremetal(request, settings, known));
        }
    }
    Ok(files)
}

/// The digest of an artifact.
pub(super) fn digest<'a>(artifact: &'a Artifact, release: &ResolvedRelease) -> Result<&'a str, VarFileError> {
    artifact
        .sha256
        .as_deref()
        .ok_or_else(|| VarFileError::NoDigest { name: artifact.name.clone(), release: release.eksd_name.clone() })
}

/// What stands before `path` in the URL of an artifact.
fn source<'a>(artifact: &'a Artifact, path: &str, release: &ResolvedRelease) -> Result<&'a str, VarFileError> {
    artifact.url.as_str().strip_suffix(path).ok_or_else(|| VarFileError::Layout {
        name: artifact.name.clone(),
        release: release.eksd_name.clone(),
        url: artifact.url.to_string(),
        expected: path.to_owned(),
    })
}

/// Name of the file that package sources are written to: its ending tells their format.
pub(super) fn repository_file(os: OsName, name: &str, content: &str) -> String {
    let deb822 = content.lines().any(|line| line.trim_start().to_ascii_lowercase().starts_with("types:"));
    let extension = match os {
        OsName::Redhat => "repo",
        OsName::Ubuntu | OsName::Debian if deb822 => "sources",
        OsName::Ubuntu | OsName::Debian => "list",
    };
    format!("{name}.{extension}")
}

fn kubernetes(release: &ResolvedRelease) -> Result<VarFile, VarFileError> {
    let version = &release.kubernetes_version;
    let vars = Kubernetes {
        containerd_sha256: digest(&release.containerd.artifact, release)?,
        containerd_url: release.containerd.artifact.url.as_str(),
        crictl_source_type: "http",
        crictl_url: release.crictl.artifact.url.as_str(),
        crictl_sha256: digest(&release.crictl.artifact, release)?,
        kubernetes_container_registry: &release.image_repository,
        kubernetes_http_source: source(&release.kubelet, &format!("/{version}/bin/linux/amd64/kubelet"), release)?,
        kubernetes_load_additional_imgs: "true",
        kubernetes_semver: version,
        kubernetes_full_version: &release.full_version,
        // v1.31.14 is of the series v1.31.
        kubernetes_series: version.rsplit_once('.').map_or(version.as_str(), |(series, _)| series),
        kubernetes_source_type: "http",
        etcd_http_source: release.etcd.artifact.url.as_str(),
        etcd_version: &release.etcd.version,
        etcd_sha256: digest(&release.etcd.artifact, release)?,
        etcdadm_http_source: release.etcdadm.artifact.url.as_str(),
        etcdadm_version: &release.etcdadm.version,
    };
    Ok(VarFile::new("kubernetes", &vars))
}

fn common(request: &BuildRequest) -> VarFile {
    let Proxy { http, https, no_proxy } = &request.proxy;
    let vars = Common {
        pause_image: &request.release.pause_image,
        extra_debs: EXTRA_DEBS,
        http_proxy: http.as_deref().unwrap_or_default(),
        https_proxy: https.as_deref().unwrap_or_default(),
        no_proxy: no_proxy.join(","),
    };
    VarFile::new("common", &vars)
}

fn cni(release: &ResolvedRelease, host_device_sha256: &str) -> Result<VarFile, VarFileError> {
    let plugins = &release.cni_plugins;
    let path = format!("/{0}/cni-plugins-linux-amd64-{0}.tar.gz", plugins.version);
    let vars = Cni {
        kubernetes_cni_deb_version: "",
        kubernetes_cni_rpm_version: "",
        kubernetes_cni_http_checksum: format!("sha256:{}", digest(&plugins.artifact, release)?),
        kubernetes_cni_http_source: source(&plugins.artifact, &path, release)?,
        kubernetes_cni_semver: &plugins.version,
        kubernetes_cni_source_type: "http",
        kubernetes_cni_host_device_sha256: host_device_sha256,
    };
    Ok(VarFile::new("cni", &vars))
}

/// The release's sandbox image once more, as kubeadm's own tag of it may be another one.
fn additional_components(release: &ResolvedRelease) -> Result<VarFile, VarFileError> {
    let pause = release.images.iter().find(|image| image.url.path().ends_with("/pause.tar"));
    let missing = || VarFileError::Missing { name: "pause.tar", release: release.eksd_name.clone() };
    let vars = AdditionalComponents {
        additional_url_images: "true",
        additional_url_images_list: pause.ok_or_else(missing)?.url.as_str(),
        load_additional_components: "true",
    };
    Ok(VarFile::new("additional_components", &vars))
}

fn baremetal(request: &BuildRequest, settings: &ImageBuilderSettings, known: &Known) -> VarFile {
    let vars = Baremetal {
        disk_size: request.disk_size_mib.to_string(),
        iso: iso(request, known),
        rhel: rhel(request, known),
        extra: extra(request, settings, known),
        ssh: ssh(settings),
    };
    VarFile::new("baremetal", &vars)
}

fn vsphere(request: &BuildRequest, settings: &ImageBuilderSettings, known: &Known, target: &VsphereTarget) -> VarFile {
    let vars = Vsphere {
        vcenter_server: &target.server,
        username: &known.username,
        password: &known.password,
        datacenter: &target.datacenter,
        cluster: target.cluster.as_deref().unwrap_or_default(),
        datastore: &target.datastore,
        folder: target.folder.as_deref().unwrap_or_default(),
        network: &target.network,
        resource_pool: target.resource_pool.as_deref().unwrap_or_default(),
        insecure_connection: target.insecure.to_string(),
        convert_to_template: target.convert_to_template.to_string(),
        create_snapshot: target.create_snapshot.to_string(),
        linked_clone: settings.linked_clone.to_string(),
        template: settings.template.as_deref().unwrap_or_default(),
        vmx_version: target.vmx_version.to_string(),
        iso: iso(request, known),
        rhel: rhel(request, known),
        extra: extra(request, settings, known),
        ssh: ssh(settings),
    };
    VarFile::new("vsphere", &vars)
}

fn nutanix(request: &BuildRequest, settings: &ImageBuilderSettings, known: &Known, target: &NutanixTarget) -> VarFile {
    let (name, uuid) = match &target.cluster {
        ClusterReference::Name(name) => (name.as_str(), None),
        ClusterReference::Uuid(uuid) => ("", Some(uuid.as_str())),
    };
    let vars = Nutanix {
        nutanix_endpoint: &target.endpoint,
        nutanix_port: target.port.to_string(),
        nutanix_insecure: target.insecure.to_string(),
        nutanix_cluster_name: name,
        nutanix_subnet_name: target.subnet.as_deref().unwrap_or_default(),
        nutanix_username: &known.username,
        nutanix_password: &known.password,
        nutanix_cluster_uuid: uuid,
        image_name: &target.image_name,
        image_url: match &request.base {
            Base::Archive(base) => Some(base.url.as_str()),
            Base::Recipe | Base::PrismImage(_) => None,
        },
        image_export: "true",
        rhel: rhel(request, known),
        extra: extra(request, settings, known),
    };
    VarFile::new("nutanix", &vars)
}

fn iso(request: &BuildRequest, known: &Known) -> Iso {
    let Base::Archive(base) = &request.base else { return Iso::default() };
    if let Some((path, digest)) = &known.medium {
        let (kind, checksum) = match digest.split_once(':') {
            Some(("sha512", digest)) => ("sha512", digest),
            Some((_, digest)) => ("sha256", digest),
            None => ("sha256", digest.as_str()),
        };
        return Iso {
            iso_url: Some(path.clone()),
            iso_checksum: Some(checksum.to_owned()),
            iso_checksum_type: Some(kind),
        };
    }
    let (kind, checksum) = match &base.checksum {
        BaseChecksum::Sha256(digest) => ("sha256", digest.clone()),
        BaseChecksum::Sha512(digest) => ("sha512", digest.clone()),
        // Packer reads the list itself.
        BaseChecksum::Sha256Sums(url) => ("file", url.to_string()),
    };
    Iso { iso_url: Some(base.url.to_string()), iso_checksum: Some(checksum), iso_checksum_type: Some(kind) }
}

fn rhel<'a>(request: &'a BuildRequest, known: &'a Known) -> Rhel<'a> {
    let mut vars = Rhel { rhel_username: &known.rhel_username, rhel_password: &known.rhel_password, ..Rhel::default() };
    match &request.packages.epel {
        Some(epel) => {
            vars.redhat_epel_rpm = Some(epel.release_url.to_string());
            vars.epel_rpm_gpg_key = Some(epel.key_url.to_string());
        }
        None if request.os.name == OsName::Redhat => vars.redhat_epel_rpm = Some(String::new()),
        None => {}
    }
    let Some(subscription) = &request.subscription else { return vars };
    vars.rhsm_server_hostname = subscription.server.as_deref();
    vars.rhsm_server_release_version = subscription.release_version.as_deref();
    vars.rhsm_activation_key = known.rhsm_activation_key.as_deref();
    vars.rhsm_org_id = known.rhsm_org_id.as_deref();
    if let Some((host, port)) = &subscription.proxy {
        vars.rhsm_server_proxy_hostname = Some(host);
        vars.rhsm_server_proxy_port = Some(port.to_string());
    }
    vars
}

/// Unlike with the EKS Anywhere tool, the user's packages come in addition to [`EXTRA_DEBS`].
fn extra<'a>(request: &'a BuildRequest, settings: &ImageBuilderSettings, known: &Known) -> Extra<'a> {
    let list = |items: &[String]| (!items.is_empty()).then(|| items.join(" "));
    let packages = list(&request.packages.install);
    let (debs, rpms) = match request.os.name {
        OsName::Redhat => (None, packages),
        OsName::Ubuntu | OsName::Debian => (packages.map(|more| format!("{EXTRA_DEBS} {more}")), None),
    };
    let Proxy { http, https, no_proxy } = &request.proxy;
    Extra {
        http_proxy: http.as_deref(),
        https_proxy: https.as_deref(),
        no_proxy: (!no_proxy.is_empty()).then(|| no_proxy.join(",")),
        extra_debs: debs,
        extra_rpms: rpms,
        extra_repos: list(&known.repositories),
        firstboot_custom_roles_pre: list(&settings.first_boot_roles_pre),
        firstboot_custom_roles_post: list(&settings.first_boot_roles_post),
        node_custom_roles_pre: list(&settings.node_roles_pre),
        node_custom_roles_post: list(&settings.node_roles_post),
        disable_public_repos: request.packages.disable_public_repositories.then_some("true"),
        reenable_public_repos: settings.reenable_public_repositories.map(|on| if on { "true" } else { "false" }),
    }
}

fn ssh(settings: &ImageBuilderSettings) -> Ssh {
    Ssh {
        ssh_timeout: settings.ssh_timeout_seconds.map(|seconds| format!("{seconds}s")),
        ssh_handshake_attempts: settings.ssh_handshake_attempts.map(|attempts| attempts.to_string()),
    }
}
