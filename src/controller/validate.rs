//! From a resource and a resolved release to one build document, or to the reason why there is none. Pure.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use k8s_openapi::api::core::v1::Toleration;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use url::Url;

use super::{
    context::{Placement, Settings},
    references::{FILE_NAME, FILES_DIR, NUTANIX_SLOT, RHSM_SLOT, VSPHERE_SLOT, publish_slot},
    resources::build_id,
};
use crate::{
    api::v1alpha1::{
        Base, Engine, Epel, ImageBuilder, InvalidField, NodeImageBuild, NodeImageBuildSpec, Nutanix, Publish,
        REBUILD_ANNOTATION, Subscription, Vsphere,
    },
    contract::{
        self, Archive, BaseChecksum, BuildIdentity, BuildRequest, ClusterReference, CredentialSlot, ExtraFile,
        FileContent, ImageBuilderSettings, NutanixTarget, OsName, PrismSource, Provider, ProviderTarget, PublishTarget,
        ResolvedRelease, TRUST_BUNDLE_FILE, VERSION, VsphereTarget,
    },
};

/// Part of a build's longest time that Packer does not get: to remove what it made, and to say so.
const CLEAN_UP_MARGIN: Duration = Duration::from_secs(300);
/// It gets at least this.
const LEAST_TIME: Duration = Duration::from_secs(60);

/// Why nothing is built. The message says what to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    pub reason: String,
    pub message: String,
}

impl Refusal {
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }

    fn not_supported(field: &str, instead: &str) -> Self {
        Self::new("NotSupported", format!("{field} is not supported by this version: {instead}"))
    }

    fn invalid(field: &str, found: &str, expected: &str) -> Self {
        Self::new("InvalidSpec", format!("{field} is `{found}`: {expected}"))
    }
}

impl From<InvalidField> for Refusal {
    fn from(error: InvalidField) -> Self {
        Self::new("InvalidSpec", error.to_string())
    }
}

/// What identifies the wish: the same values ask for the same image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wish {
    /// Digest of everything in the specification that the image depends on.
    pub spec_digest: String,
    /// Digest of how the build is run: another way to run it is worth another attempt after a failure.
    pub run_digest: String,
    /// Value of the rebuild annotation.
    pub rebuild: Option<String>,
}

/// What the resource asks for now.
pub fn wish(build: &NodeImageBuild) -> Wish {
    let run = &build.spec.build;
    let mut what = serde_json::to_value(&build.spec).unwrap_or_default();
    if let Some(what) = what.as_object_mut() {
        for field in ["suspend", "history", "retention", "deletionPolicy", "rebuild", "build"] {
            what.remove(field);
        }
    }
    Wish {
        spec_digest: digest(&what),
        run_digest: digest(run),
        rebuild: build.metadata.annotations.as_ref().and_then(|all| all.get(REBUILD_ANNOTATION)).cloned(),
    }
}

/// SHA-256 of the value as JSON with sorted keys, in lower-case hexadecimal.
fn digest(value: &impl Serialize) -> String {
    // `Value` keeps its keys sorted, whatever the order of a struct's fields.
    let value = serde_json::to_value(value).unwrap_or_default();
    hex::encode(Sha256::digest(value.to_string()))
}

/// Whether this version can build it, wherever that runs.
pub fn supported(spec: &NodeImageBuildSpec) -> Result<(), Refusal> {
    let provider = spec.provider()?;
    let subnet = spec.nutanix.as_ref().and_then(|nutanix| nutanix.subnet.as_ref());
    if spec.engine == Engine::ImageBuilder && provider == Provider::Nutanix && subnet.is_none() {
        let instead = "its machine is put there; write spec.nutanix.subnet, or engine: Native, which needs no machine";
        return Err(Refusal::not_supported("engine: ImageBuilder without a subnet", instead));
    }
    if let Some(rebuild) = &spec.rebuild {
        super::rebuild::check(rebuild)?;
    }
    spec.disk_size_mib()?;
    Ok(())
}

/// Everything that can be said without looking at anything else. To be asked first, before anything is read.
pub fn check(spec: &NodeImageBuildSpec, settings: &Settings) -> Result<(), Refusal> {
    supported(spec)?;
    placement(spec, &settings.placement)?;
    if settings.placement.user_namespaces && spec.engine == Engine::ImageBuilder {
        let instead = "the operator gives build pods a user namespace and no privileges (builds.userNamespaces), and that engine \
                       needs them; write Native, or have that setting taken away";
        return Err(Refusal::not_supported("engine: ImageBuilder in a user namespace", instead));
    }
    let targets = spec.publish_targets()?;
    if targets.iter().any(|target| target.artifact_server.is_some()) && settings.artifact_server.is_none() {
        return Err(Refusal::new(
            "NoPublishTarget",
            "the image would go to the built-in artifact server, but the operator runs without one; write spec.publish \
             with an s3 or http target, or have the operator installed with artifactServer.enabled",
        ));
    }
    Ok(())
}

/// Whether the administrator lets the build pod run where the specification wants it.
fn placement(spec: &NodeImageBuildSpec, allowed: &Placement) -> Result<(), Refusal> {
    const CONTROL_PLANE: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
    let refusal = |message: String| Err(Refusal::new("PlacementForbidden", message));
    let reaches = |toleration: &Toleration| match toleration.key.as_deref() {
        None | Some("") => true,
        Some(key) => CONTROL_PLANE.contains(&key),
    };
    if let (false, Some(index)) = (allowed.control_plane, spec.build.tolerations.iter().position(reaches)) {
        return refusal(format!(
            "spec.build.tolerations[{index}] tolerates control plane nodes, where build pods may not \
             run: tolerate the taints of other nodes by their keys, or have the operator installed with \
             builds.allowControlPlane"
        ));
    }
    for (label, value) in &allowed.node_selector {
        if let Some(other) = spec.build.node_selector.get(label).filter(|other| *other != value) {
            return refusal(format!(
                "spec.build.nodeSelector wants nodes with {label}={other}, but builds run only on those with {label}={value}: \
                 leave {label} out"
            ));
        }
    }
    Ok(())
}

/// A build that can start.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    pub request: BuildRequest,
    /// Digest of everything the image is made from.
    pub inputs_digest: String,
    /// What asks for it besides the specification and the annotation, as in the status.
    pub trigger: Option<String>,
    /// Where the upload token goes, if the built-in artifact server is a target.
    pub token_slot: Option<CredentialSlot>,
    /// What the artifact server lets this build write.
    pub directory: String,
}

/// The document of a build of `spec`, but for where its image goes. Expects that [`supported`] found nothing.
pub fn request(
    spec: &NodeImageBuildSpec,
    release: ResolvedRelease,
    identity: BuildIdentity,
) -> Result<BuildRequest, Refusal> {
    let request = BuildRequest {
        version: VERSION.to_owned(),
        identity,
        os: contract::Os { name: spec.os.name, version: spec.os.version.clone() },
        provider: spec.provider()?,
        firmware: spec.firmware()?,
        release,
        engine: engine(spec),
        base: match (spec.engine, &spec.base) {
            // Upstream's recipe names an installation medium.
            (Engine::ImageBuilder, None) if spec.nutanix.is_none() => contract::Base::Recipe,
            (Engine::ImageBuilder | Engine::Native, _) => base(spec)?,
        },
        disk_size_mib: spec.disk_size_mib()?,
        packages: contract::Packages {
            install: spec.packages.install.clone(),
            repositories: spec
                .packages
                .repositories
                .iter()
                .map(|repository| (repository.name.clone(), repository.content.clone()))
                .collect(),
            disable_public_repositories: spec.packages.disable_public_repositories,
            epel: epel(spec)?,
        },
        subscription: subscription(spec),
        files: files(spec),
        proxy: spec.proxy.clone().unwrap_or_default(),
        trust_bundle: spec.trust_bundle.as_ref().map(|_| PathBuf::from(TRUST_BUNDLE_FILE)),
        verify: contract::Verify {
            boot: spec.verify.boot,
            accelerator: spec.verify.accelerator,
            timeout_seconds: spec.verify.timeout_seconds,
        },
        provider_target: provider_target(spec)?,
        publish: vec![],
    };
    Ok(request)
}

/// The document of the build that the resource asks for; `trigger` tells builds of the same inputs apart. Expects that
/// [`check`] found nothing.
pub fn prepare(
    build: &NodeImageBuild,
    wish: &Wish,
    release: ResolvedRelease,
    trigger: Option<String>,
    settings: &Settings,
) -> Result<Prepared, Refusal> {
    let (namespace, name) =
        (build.metadata.namespace.clone().unwrap_or_default(), build.metadata.name.clone().unwrap_or_default());
    let mut request = request(&build.spec, release, BuildIdentity { namespace, name, build_id: String::new() })?;
    request.publish = publish(&build.spec, settings)?;
    let inputs_digest = inputs_digest(&request);
    let uid = build.metadata.uid.as_deref().unwrap_or_default();
    let rebuild = wish.rebuild.as_deref();
    let parts = [inputs_digest.as_str(), &wish.run_digest, rebuild.unwrap_or_default()].into_iter();
    let id = build_id(uid, &parts.chain(trigger.as_deref()).collect::<Vec<_>>());
    let directory = directory(&request.identity.namespace, &request.identity.name, &id);
    let default_name = format!("{}-{id}", request.image_stem());
    match &mut request.provider_target {
        Some(ProviderTarget::Vsphere(target)) if target.template_name.is_empty() => target.template_name = default_name,
        Some(ProviderTarget::Nutanix(target)) if target.image_name.is_empty() => target.image_name = default_name,
        Some(ProviderTarget::Vsphere(_) | ProviderTarget::Nutanix(_)) | None => {}
    }
    let mut token_slot = None;
    for target in &mut request.publish {
        if let PublishTarget::Server { directory: place, slot, .. } = target {
            place.clone_from(&directory);
            token_slot = Some(slot.clone());
        }
    }
    request.identity.build_id = id;
    Ok(Prepared { request, inputs_digest, trigger, token_slot, directory })
}

/// Where a build's files are on the artifact server.
pub fn directory(namespace: &str, name: &str, build_id: &str) -> String {
    format!("{namespace}/{name}/{build_id}")
}

/// Digest of everything the image is made from. Neither the build's identity nor this program's version is part of it:
/// an upgrade alone rebuilds nothing.
fn inputs_digest(request: &BuildRequest) -> String {
    let mut value = serde_json::to_value(request).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("identity");
        fields.remove("version");
    }
    if let Some(settings) = value.pointer_mut("/engine/imageBuilder").and_then(Value::as_object_mut) {
        settings.remove("timeoutSeconds");
    }
    digest(&value)
}

fn url(text: &str, field: &str) -> Result<Url, Refusal> {
    match text.parse::<Url>() {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
        Ok(_) | Err(_) => Err(Refusal::invalid(field, text, "write an http:// or https:// URL")),
    }
}

/// What the image starts from: as written, else the public one.
pub fn base(spec: &NodeImageBuildSpec) -> Result<contract::Base, Refusal> {
    let source = spec.nutanix.as_ref().and_then(|nutanix| nutanix.source_image_name.as_ref());
    let (place, sha256, sha512, sha256_sums_url) = match (&spec.base, source) {
        (Some(Base { url, sha256, sha512, sha256_sums_url }), None) => (url, sha256, sha512, sha256_sums_url),
        (None, Some(name)) => return Ok(contract::Base::PrismImage(PrismSource { prism_image: name.clone() })),
        (None, None) => return default_base(spec).map(contract::Base::Archive),
        (Some(_), Some(_)) => {
            let message =
                "spec.base and spec.nutanix.sourceImageName are both there: the image starts from one of them";
            return Err(Refusal::new("InvalidSpec", message));
        }
    };
    let checksum = match (sha256, sha512, sha256_sums_url) {
        (Some(digest), None, None) => BaseChecksum::Sha256(digest.clone()),
        (None, Some(digest), None) => BaseChecksum::Sha512(digest.clone()),
        (None, None, Some(sums)) => BaseChecksum::Sha256Sums(url(sums, "spec.base.sha256SumsURL")?),
        (_, _, _) => {
            let message = "spec.base has not exactly one checksum: write one of sha256, sha512 and sha256SumsURL";
            return Err(Refusal::new("InvalidSpec", message));
        }
    };
    Ok(contract::Base::Archive(Archive { url: url(place, "spec.base.url")?, checksum }))
}

/// Canonical's root file system of an Ubuntu release, as an archive or as a disk, with the checksums published beside it.
fn default_base(spec: &NodeImageBuildSpec) -> Result<Archive, Refusal> {
    let series = match (spec.os.name, spec.os.version.as_str()) {
        (OsName::Ubuntu, "22.04") => "jammy",
        (OsName::Ubuntu, "24.04") => "noble",
        (os, version) => {
            let why = match os {
                OsName::Redhat => {
                    "Red Hat publishes no root file system that anybody may download; make one of yours \
                                   a tar archive (docs/redhat.md)"
                }
                OsName::Ubuntu | OsName::Debian => "it has no default base",
            };
            let message = format!("spec.base is missing for {os} {version}: {why}, and write its url and checksum");
            return Err(Refusal::new("InvalidSpec", message));
        }
    };
    let directory = format!("https://cloud-images.ubuntu.com/releases/{series}/release");
    let kind = match spec.engine {
        Engine::Native => "-root.tar.xz",
        Engine::ImageBuilder => ".img",
    };
    let file = format!("ubuntu-{}-server-cloudimg-amd64{kind}", spec.os.version);
    Ok(Archive {
        url: url(&format!("{directory}/{file}"), "spec.base.url")?,
        checksum: BaseChecksum::Sha256Sums(url(&format!("{directory}/SHA256SUMS"), "spec.base.sha256SumsURL")?),
    })
}

/// What makes the disk, with the settings that only the engine `ImageBuilder` knows.
fn engine(spec: &NodeImageBuildSpec) -> contract::Engine {
    if spec.engine == Engine::Native {
        return contract::Engine::Native;
    }
    let ImageBuilder {
        first_boot_roles_pre,
        first_boot_roles_post,
        node_roles_pre,
        node_roles_post,
        reenable_public_repositories,
        ssh_timeout_seconds,
        ssh_handshake_attempts,
        ansible_verbosity,
    } = spec.image_builder.clone().unwrap_or_default();
    let timeout = Duration::from(spec.build.timeout);
    contract::Engine::ImageBuilder(Box::new(ImageBuilderSettings {
        first_boot_roles_pre,
        first_boot_roles_post,
        node_roles_pre,
        node_roles_post,
        reenable_public_repositories,
        ssh_timeout_seconds,
        ssh_handshake_attempts,
        ansible_verbosity: ansible_verbosity.unwrap_or_default(),
        template: spec.vsphere.as_ref().and_then(|vsphere| vsphere.template.clone()),
        linked_clone: spec.vsphere.as_ref().and_then(|vsphere| vsphere.linked_clone).unwrap_or_default(),
        timeout_seconds: timeout.saturating_sub(CLEAN_UP_MARGIN).max(LEAST_TIME).as_secs(),
    }))
}

/// Fedora's package source for a version of Red Hat Enterprise Linux, as the EKS Anywhere tool uses it.
const EPEL: &str = "https://dl.fedoraproject.org/pub/epel";

/// Extra Packages for Enterprise Linux, unless they or all public sources are switched off.
fn epel(spec: &NodeImageBuildSpec) -> Result<Option<contract::Epel>, Refusal> {
    let (release, key) = match &spec.packages.epel {
        Some(Epel { enabled: false, .. }) => return Ok(None),
        None if spec.os.name != OsName::Redhat || spec.packages.disable_public_repositories => return Ok(None),
        Some(Epel { release_url, gpg_key_url, .. }) => (release_url.clone(), gpg_key_url.clone()),
        None => (None, None),
    };
    let version = &spec.os.version;
    let release = release.unwrap_or_else(|| format!("{EPEL}/epel-release-latest-{version}.noarch.rpm"));
    let key = key.unwrap_or_else(|| format!("{EPEL}/RPM-GPG-KEY-EPEL-{version}"));
    Ok(Some(contract::Epel {
        release_url: url(&release, "spec.packages.epel.releaseURL")?,
        key_url: url(&key, "spec.packages.epel.gpgKeyURL")?,
    }))
}

/// The subscription; its proxy is that of the build where it names none, as with the EKS Anywhere tool.
fn subscription(spec: &NodeImageBuildSpec) -> Option<contract::Subscription> {
    let Subscription { credentials_secret_ref: _, server_hostname, server_release_version, proxy_hostname, proxy_port } =
        spec.subscription.as_ref()?;
    let build_proxy = || {
        let proxy = spec.proxy.as_ref()?;
        let direct = server_hostname.as_ref().is_some_and(|host| proxy.no_proxy.contains(host));
        let url = proxy.http.as_ref().filter(|_| !direct)?.parse::<Url>().ok()?;
        // One with a password is left to the environment: its password must not stand in a file of the image.
        let plain = url.username().is_empty() && url.password().is_none();
        plain.then_some(())?;
        Some((url.host_str()?.to_owned(), url.port_or_known_default()?))
    };
    Some(contract::Subscription {
        slot: CredentialSlot(RHSM_SLOT.to_owned()),
        server: server_hostname.clone(),
        release_version: server_release_version.clone(),
        proxy: proxy_hostname.clone().zip(*proxy_port).or_else(build_proxy),
    })
}

fn files(spec: &NodeImageBuildSpec) -> Vec<ExtraFile> {
    let files = spec.files.iter().enumerate();
    files
        .map(|(index, file)| ExtraFile {
            path: file.path.clone(),
            owner: file.owner.clone(),
            group: file.group.clone(),
            mode: file.mode.clone(),
            content: match &file.content {
                Some(text) => FileContent::Inline(text.clone()),
                None => FileContent::Path([FILES_DIR, &index.to_string(), FILE_NAME].iter().collect()),
            },
        })
        .collect()
}

fn publish(spec: &NodeImageBuildSpec, settings: &Settings) -> Result<Vec<PublishTarget>, Refusal> {
    let mut targets = vec![];
    for (index, target) in spec.publish_targets()?.iter().enumerate() {
        let Publish { artifact_server, s3, http } = target;
        let slot = CredentialSlot(publish_slot(index));
        let optional = |text: &Option<String>, field: &str| {
            text.as_deref().map(|text| url(text, &format!("spec.publish[{index}].{field}"))).transpose()
        };
        if let (Some(_), Some(server)) = (artifact_server, &settings.artifact_server) {
            targets.push(PublishTarget::Server {
                upload_url: server.upload_url.clone(),
                public_url: server.public_url.clone(),
                directory: String::new(),
                slot: slot.clone(),
            });
        }
        if let Some(s3) = s3 {
            targets.push(PublishTarget::S3 {
                bucket: s3.bucket.clone(),
                prefix: s3.prefix.clone().unwrap_or_default(),
                region: s3.region.clone().unwrap_or_else(|| "us-east-1".to_owned()),
                endpoint: optional(&s3.endpoint, "s3.endpoint")?,
                public_url: optional(&s3.public_url, "s3.publicURL")?,
                slot: s3.credentials_secret_ref.as_ref().map(|_| slot.clone()),
            });
        }
        if let Some(http) = http {
            targets.push(PublishTarget::Http {
                url: url(&http.url, &format!("spec.publish[{index}].http.url"))?,
                public_url: optional(&http.public_url, "http.publicURL")?,
                slot: http.credentials_secret_ref.as_ref().map(|_| slot.clone()),
            });
        }
    }
    Ok(targets)
}

fn provider_target(spec: &NodeImageBuildSpec) -> Result<Option<ProviderTarget>, Refusal> {
    match (&spec.vsphere, &spec.nutanix) {
        (Some(vsphere), _) => vsphere_target(spec, vsphere).map(Some),
        (None, Some(nutanix)) => nutanix_target(spec, nutanix).map(Some),
        (None, None) => Ok(None),
    }
}

/// Without a name of its own the image is named after the build's identity, which is not known yet.
fn nutanix_target(spec: &NodeImageBuildSpec, nutanix: &Nutanix) -> Result<ProviderTarget, Refusal> {
    let Nutanix {
        endpoint,
        port,
        credentials_secret_ref: _,
        insecure,
        cluster,
        subnet,
        image_name,
        replace_existing,
        // The base.
        source_image_name: _,
        categories,
    } = nutanix;
    if let Some(name) = image_name {
        // EKS Anywhere looks for 131 in the name without these.
        let letters: String = name.chars().filter(|c| !matches!(c, '-' | '.' | '_')).collect();
        if !letters.contains(&spec.release_channel.replace('-', "")) {
            let expected = format!(
                "EKS Anywhere takes only images with the Kubernetes version in their name, write e.g. \
                 ubuntu-2204-kube-{}",
                spec.release_channel
            );
            return Err(Refusal::invalid("spec.nutanix.imageName", name, &expected));
        }
    }
    let cluster = match (&cluster.name, &cluster.uuid) {
        (Some(name), None) => ClusterReference::Name(name.clone()),
        (None, Some(uuid)) => ClusterReference::Uuid(uuid.to_lowercase()),
        (_, _) => {
            let message = "spec.nutanix.cluster has not exactly one of name and uuid: write one of them";
            return Err(Refusal::new("InvalidSpec", message));
        }
    };
    Ok(ProviderTarget::Nutanix(NutanixTarget {
        endpoint: endpoint.clone(),
        port: *port,
        slot: CredentialSlot(NUTANIX_SLOT.to_owned()),
        insecure: *insecure,
        cluster,
        subnet: subnet.clone(),
        image_name: image_name.clone().unwrap_or_default(),
        replace_existing: *replace_existing,
        categories: categories.clone(),
    }))
}

/// Without a name of its own the template is named after the build's identity, which is not known yet.
fn vsphere_target(spec: &NodeImageBuildSpec, vsphere: &Vsphere) -> Result<ProviderTarget, Refusal> {
    let Vsphere {
        server,
        credentials_secret_ref: _,
        insecure,
        thumbprint,
        datacenter,
        cluster,
        resource_pool,
        datastore,
        network,
        folder,
        template_name,
        replace_existing,
        vmx_version,
        convert_to_template,
        create_snapshot,
        content_library,
        template,
        linked_clone,
    } = vsphere;
    for (field, given) in [("template", template.is_some()), ("linkedClone", linked_clone.is_some())] {
        if given && spec.engine == Engine::Native {
            let message = format!(
                "spec.vsphere.{field} is about cloning in vCenter, which only engine: ImageBuilder does: write that \
                 engine, or leave {field} out"
            );
            return Err(Refusal::new("InvalidSpec", message));
        }
    }
    // What the EKS Anywhere tool's machines have.
    let default_version = if spec.os.name == OsName::Redhat && spec.os.version == "9" { 18 } else { 15 };
    Ok(ProviderTarget::Vsphere(VsphereTarget {
        server: server.clone(),
        slot: CredentialSlot(VSPHERE_SLOT.to_owned()),
        insecure: *insecure,
        thumbprint: thumbprint.clone(),
        datacenter: datacenter.clone(),
        cluster: cluster.clone(),
        resource_pool: resource_pool.clone(),
        datastore: datastore.clone(),
        network: network.clone(),
        folder: folder.clone(),
        template_name: template_name.clone().unwrap_or_default(),
        replace_existing: *replace_existing,
        vmx_version: vmx_version.unwrap_or(default_version),
        convert_to_template: convert_to_template.unwrap_or(content_library.is_none()),
        create_snapshot: *create_snapshot,
        content_library: content_library.clone(),
    }))
}

/// Where the release documents come from, for the resolver: manifest URL and prefix replacements.
pub fn source(spec: &NodeImageBuildSpec) -> (Option<String>, Vec<(String, String)>) {
    let source = spec.source.clone().unwrap_or_default();
    let prefixes = [
        ("https://anywhere-assets.eks.amazonaws.com", source.eksa_base_url),
        ("https://distro.eks.amazonaws.com", source.eksd_base_url),
    ];
    let replaced = prefixes.into_iter().filter_map(|(public, private)| Some((public.to_owned(), private?))).collect();
    (source.release_manifest_url, replaced)
}

/// What the Job carries so that its build can be recognised later.
pub fn annotations(wish: &Wish, prepared: &Prepared, release: &str) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([
        (super::SPEC_DIGEST.to_owned(), wish.spec_digest.clone()),
        (super::RUN_DIGEST.to_owned(), wish.run_digest.clone()),
        (super::INPUTS_DIGEST.to_owned(), prepared.inputs_digest.clone()),
        (super::RELEASE.to_owned(), release.to_owned()),
    ]);
    if let Some(rebuild) = &wish.rebuild {
        annotations.insert(REBUILD_ANNOTATION.to_owned(), rebuild.clone());
    }
    if let Some(trigger) = &prepared.trigger {
        annotations.insert(super::TRIGGER.to_owned(), trigger.clone());
    }
    annotations
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn release() -> ResolvedRelease {
        let artifact = |name: &str| json!({"name": name, "url": format!("https://artifacts.example.com/{name}")});
        let versioned = |name: &str| json!({"version": "v1", "artifact": artifact(name)});
        serde_json::from_value(json!({
            "eksaVersion": "v0.26.1", "bundleNumber": 112, "channel": "1-31", "eksdName": "kubernetes-1-31-eks-47",
            "kubernetesVersion": "v1.31.14", "fullVersion": "v1.31.14-eks-1-31-47", "imageRepository": "r",
            "pauseImage": "p", "kubelet": artifact("kubelet"), "kubeadm": artifact("kubeadm"),
            "kubectl": artifact("kubectl"), "images": [], "cniPlugins": versioned("cni"), "etcd": versioned("etcd"),
            "etcdadm": versioned("etcdadm"), "containerd": versioned("containerd"), "crictl": versioned("crictl"),
        }))
        .unwrap()
    }

    /// A resource for vSphere; `more` is added to `spec.vsphere`.
    fn vsphere(os: (&str, &str), more: Value) -> NodeImageBuild {
        let mut settings = json!({
            "server": "vcenter.example.com", "credentialsSecretRef": {"name": "vcenter"}, "datacenter": "dc1",
            "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network"
        });
        let Value::Object(more) = more else { panic!("not an object") };
        settings.as_object_mut().unwrap().extend(more);
        serde_json::from_value(json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
            "metadata": {"name": "image", "namespace": "images", "uid": "6f1d"},
            "spec": {
                "os": {"name": os.0, "version": os.1}, "releaseChannel": "1-31", "vsphere": settings,
                "base": {"url": "https://base.example.com/root.tar.xz", "sha256": "00"},
            },
        }))
        .unwrap()
    }

    fn prepared(build: &NodeImageBuild) -> Prepared {
        let settings = Settings {
            builder_image: "b".into(),
            image_builder_image: "i".into(),
            release_manifest_url: "http://mirror/manifest.yaml".parse().unwrap(),
            builder_service_account: None,
            artifact_server: None,
            lifecycle: super::super::context::Lifecycle::default(),
            reach: crate::reach::Reach::default(),
            placement: Placement::default(),
        };
        prepare(build, &wish(build), release(), None, &settings).unwrap()
    }

    fn target(build: &NodeImageBuild) -> VsphereTarget {
        match prepared(build).request.provider_target {
            Some(ProviderTarget::Vsphere(target)) => target,
            Some(ProviderTarget::Nutanix(_)) | None => panic!("no target for vCenter"),
        }
    }

    #[test]
    fn vsphere_settings_get_their_defaults() {
        let build = vsphere(("ubuntu", "22.04"), json!({}));
        let id = prepared(&build).request.identity.build_id;
        let expected = VsphereTarget {
            server: "vcenter.example.com".into(),
            slot: CredentialSlot("vsphere".into()),
            insecure: false,
            thumbprint: None,
            datacenter: "dc1".into(),
            cluster: Some("cluster1".into()),
            resource_pool: None,
            datastore: "datastore1".into(),
            network: "VM Network".into(),
            folder: None,
            template_name: format!("ubuntu-2204-kube-1-31-{id}"),
            replace_existing: false,
            vmx_version: 15,
            convert_to_template: true,
            create_snapshot: false,
            content_library: None,
        };
        assert_eq!(target(&build), expected);
    }

    #[test]
    fn vsphere_settings_are_passed_on() {
        let settings = json!({
            "insecure": true, "resourcePool": "images", "folder": "/dc1/vm/templates", "templateName": "golden",
            "replaceExisting": true, "vmxVersion": 19, "convertToTemplate": false, "createSnapshot": true,
        });
        let found = target(&vsphere(("ubuntu", "22.04"), settings));
        assert_eq!((found.insecure, found.resource_pool.as_deref()), (true, Some("images")));
        assert_eq!((found.folder.as_deref(), found.template_name.as_str()), (Some("/dc1/vm/templates"), "golden"));
        assert_eq!((found.replace_existing, found.vmx_version), (true, 19));
        assert_eq!((found.convert_to_template, found.create_snapshot), (false, true));
    }

    #[rstest]
    #[case::redhat_9(("redhat", "9"), 18)]
    #[case::redhat_8(("redhat", "8"), 15)]
    #[case::debian(("debian", "12"), 15)]
    fn hardware_version_is_that_of_the_eks_anywhere_tool(#[case] os: (&str, &str), #[case] version: u32) {
        assert_eq!(target(&vsphere(os, json!({}))).vmx_version, version);
    }

    /// A resource for redhat; `more` is added to its specification.
    fn redhat(more: &Value) -> NodeImageBuild {
        let mut build = vsphere(("redhat", "9"), json!({}));
        let mut spec = serde_json::to_value(&build.spec).unwrap();
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        build.spec = serde_json::from_value(spec).unwrap();
        build
    }

    #[test]
    fn redhat_needs_a_base_of_ones_own() {
        let spec = redhat(&json!({"base": null})).spec;
        supported(&spec).unwrap();
        let refusal = base(&spec).unwrap_err();
        assert_eq!(refusal.reason, "InvalidSpec");
        assert!(refusal.message.contains("spec.base is missing for redhat 9"), "{}", refusal.message);
    }

    #[rstest]
    #[case::as_the_eks_anywhere_tool(json!({}), Some("https://dl.fedoraproject.org/pub/epel/epel-release-latest-9.noarch.rpm"))]
    #[case::switched_off(json!({"epel": {"enabled": false}}), None)]
    #[case::private_sources_only(json!({"disablePublicRepositories": true}), None)]
    #[case::a_private_one(
        json!({"disablePublicRepositories": true, "epel": {"releaseURL": "https://mirror.test/epel.rpm"}}),
        Some("https://mirror.test/epel.rpm")
    )]
    fn epel_is_used_unless_it_is_not_wanted(#[case] packages: Value, #[case] expected: Option<&str>) {
        let found = prepared(&redhat(&json!({"packages": packages}))).request.packages.epel;
        assert_eq!(found.as_ref().map(|epel| epel.release_url.as_str()), expected);
        if let Some(epel) = found {
            assert!(epel.key_url.as_str().ends_with("/RPM-GPG-KEY-EPEL-9"));
        }
        assert_eq!(prepared(&vsphere(("debian", "12"), json!({}))).request.packages.epel, None);
    }

    #[rstest]
    #[case::its_own(json!({"proxyHostname": "own.test", "proxyPort": 8080}), "http://p.test:3128", Some(("own.test", 8080)))]
    #[case::that_of_the_build(json!({}), "http://p.test:3128", Some(("p.test", 3128)))]
    #[case::one_with_a_password(json!({}), "http://u:secret@p.test:3128", None)]
    #[case::reached_directly(json!({"serverHostname": "satellite.test"}), "http://p.test:3128", None)]
    fn the_subscription_has_a_proxy(#[case] more: Value, #[case] proxy: &str, #[case] expected: Option<(&str, u16)>) {
        let mut subscription = json!({"credentialsSecretRef": {"name": "rhsm"}, "serverReleaseVersion": "9.4"});
        subscription.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let proxy = json!({"http": proxy, "noProxy": ["satellite.test"]});
        let build = redhat(&json!({"subscription": subscription, "proxy": proxy}));
        let found = prepared(&build).request.subscription.unwrap();
        assert_eq!(found.proxy.as_ref().map(|(host, port)| (host.as_str(), *port)), expected);
        assert_eq!(found.release_version.as_deref(), Some("9.4"));

        let references = super::super::references::references(&build.spec);
        let reference =
            references.iter().find(|found| found.field == "spec.subscription.credentialsSecretRef").unwrap();
        assert_eq!(reference.used_as, super::super::references::Use::Credentials(found.slot));
        // A Satellite server takes no user.
        assert_eq!(reference.keys.len(), if found.server.is_some() { 1 } else { 2 });
    }

    #[test]
    fn an_item_of_a_library_is_no_template() {
        let found = target(&vsphere(("ubuntu", "22.04"), json!({"contentLibrary": "images"})));
        assert_eq!((found.content_library.as_deref(), found.convert_to_template), (Some("images"), false));
    }

    #[test]
    fn other_settings_are_another_image_and_the_same_ones_are_not() {
        let digest = |more| prepared(&vsphere(("ubuntu", "22.04"), more)).inputs_digest;
        assert_eq!(digest(json!({})), digest(json!({"replaceExisting": false})));
        assert_ne!(digest(json!({})), digest(json!({"datastore": "datastore2"})));
    }

    #[rstest]
    #[case("template", json!("base"))]
    #[case("linkedClone", json!(true))]
    fn cloning_is_left_to_the_other_engine(#[case] field: &str, #[case] value: Value) {
        let build = vsphere(("ubuntu", "22.04"), json!({field: value}));
        let settings = Settings {
            builder_image: "b".into(),
            image_builder_image: "i".into(),
            release_manifest_url: "http://mirror/manifest.yaml".parse().unwrap(),
            builder_service_account: None,
            artifact_server: None,
            lifecycle: super::super::context::Lifecycle::default(),
            reach: crate::reach::Reach::default(),
            placement: Placement::default(),
        };
        let refusal = prepare(&build, &wish(&build), release(), None, &settings).unwrap_err();
        let named = format!("spec.vsphere.{field}");
        assert!(refusal.message.contains(&named) && refusal.message.contains("engine: ImageBuilder"), "{refusal:?}");
    }

    fn metal(os: (&str, &str), more: Value) -> NodeImageBuildSpec {
        let mut spec = json!({
            "os": {"name": os.0, "version": os.1}, "releaseChannel": "1-31", "baremetal": {}, "engine": "ImageBuilder",
        });
        let Value::Object(more) = more else { panic!("not an object") };
        spec.as_object_mut().unwrap().extend(more);
        serde_json::from_value(spec).unwrap()
    }

    fn identity() -> BuildIdentity {
        BuildIdentity { namespace: "images".into(), name: "image".into(), build_id: String::new() }
    }

    #[test]
    fn settings_of_the_engine_image_builder_are_passed_on() {
        let spec = metal(
            ("redhat", "9"),
            json!({
                "base": {"url": "https://mirror.example.com/rhel.iso", "sha256": "00"},
                "subscription": {"credentialsSecretRef": {"name": "rhsm"}},
                "packages": {"epel": {"enabled": false}},
                "build": {"timeout": "3h"},
                "imageBuilder": {"nodeRolesPost": ["/roles/own"], "ansibleVerbosity": 2},
            }),
        );
        supported(&spec).unwrap();
        let request = request(&spec, release(), identity()).unwrap();
        let contract::Engine::ImageBuilder(settings) = &request.engine else { panic!("{request:?}") };
        assert_eq!(settings.node_roles_post, ["/roles/own"]);
        assert_eq!((settings.ansible_verbosity, settings.timeout_seconds), (2, 3 * 3600 - 300));
        assert_eq!(request.packages.epel, None);
        let slot = CredentialSlot("rhsm".into());
        assert_eq!(request.subscription.as_ref().map(|subscription| &subscription.slot), Some(&slot));
        let references = super::super::references::references(&spec);
        assert_eq!(references[0].used_as, super::super::references::Use::Credentials(slot));
    }

    #[test]
    fn without_a_base_the_recipes_own_medium_is_used_and_more_time_is_no_other_image() {
        let digest = |timeout: &str| {
            let spec = metal(("ubuntu", "22.04"), json!({"build": {"timeout": timeout}}));
            let request = request(&spec, release(), identity()).unwrap();
            assert_eq!(request.base, contract::Base::Recipe);
            inputs_digest(&request)
        };
        assert_eq!(digest("2h"), digest("4h"));
    }

    #[test]
    fn a_machine_in_prism_central_needs_a_subnet_and_starts_from_a_disk() {
        let mut spec = metal(("ubuntu", "22.04"), json!({}));
        spec.baremetal = None;
        spec.nutanix = serde_json::from_value(json!({
            "endpoint": "prism.example.com", "credentialsSecretRef": {"name": "prism"}, "cluster": {"name": "pe1"},
        }))
        .unwrap();
        let refusal = supported(&spec).unwrap_err();
        assert_eq!(refusal.reason, "NotSupported");
        assert!(refusal.message.contains("write spec.nutanix.subnet"), "{refusal:?}");
        spec.nutanix.as_mut().unwrap().subnet = Some("vm-network".into());
        supported(&spec).unwrap();
        let contract::Base::Archive(disk) = base(&spec).unwrap() else { panic!("no disk to start from") };
        assert!(disk.url.path().ends_with("/ubuntu-22.04-server-cloudimg-amd64.img"), "{disk:?}");
    }

    #[test]
    fn a_template_is_cloned_with_the_password_of_its_account() {
        let mut build = vsphere(("ubuntu", "22.04"), json!({"template": "base", "linkedClone": true}));
        (build.spec.engine, build.spec.base) = (Engine::ImageBuilder, None);
        supported(&build.spec).unwrap();
        let request = prepared(&build).request;
        let contract::Engine::ImageBuilder(settings) = &request.engine else { panic!("{request:?}") };
        assert_eq!((settings.template.as_deref(), settings.linked_clone), (Some("base"), true));
        assert_eq!(request.base, contract::Base::Recipe);
        let references = super::super::references::references(&build.spec);
        assert_eq!(references[0].keys, [["username", "password", "sshPassword"]]);
    }

    #[test]
    fn credentials_for_vcenter_are_mounted() {
        let build = vsphere(("ubuntu", "22.04"), json!({}));
        let references = super::super::references::references(&build.spec);
        let [reference] = &references[..] else { panic!("{references:?}") };
        assert_eq!(
            (reference.name.as_str(), reference.field.as_str()),
            ("vcenter", "spec.vsphere.credentialsSecretRef")
        );
        assert_eq!(reference.keys, [["username", "password"]]);
        let slot = CredentialSlot("vsphere".into());
        assert_eq!(reference.used_as, super::super::references::Use::Credentials(slot));
    }
}
