//! What was asked for as the specification of a `NodeImageBuild`. Pure.

use std::collections::BTreeMap;

use secrecy::SecretString;

use super::{
    UsageError,
    config::{Config, NutanixKeys, ProviderKeys, VsphereKeys},
    files::LocalFile,
    groups::{Checksum, Rhel},
    load::Wanted,
    rules::{Builder, Choice, Hypervisor},
};
use crate::{
    api::v1alpha1::{
        BareMetal, Base, Build, DeletionPolicy, Engine, Epel, History, ImageBuilder, NodeImageBuildSpec, Nutanix,
        NutanixCluster, Os, Packages, SecretReference, Source, Subscription, Verify, Vsphere,
    },
    contract::{CredentialSlot, Firmware, OsName, SSH_PASSWORD},
};

/// Endings of root file system archives, which the native engine starts from.
const ARCHIVES: [&str; 6] = [".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst"];

/// A specification, and what stands beside it.
#[derive(Clone, Debug)]
pub(crate) struct Translation {
    /// Without `files`: their contents are not read yet.
    pub(crate) spec: NodeImageBuildSpec,
    /// The Secrets that the specification names.
    pub(crate) secrets: Vec<Secret>,
    /// Files of this machine that go into the image.
    pub(crate) files: Vec<LocalFile>,
    /// What a build on this machine ends with.
    pub(crate) ending: Ending,
}

/// What a build on this machine ends with. A resource puts its image into the provider in any case.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Ending {
    /// Whether the image is put into the provider, which is then asked before anything else.
    pub(crate) import: bool,
    /// Whether the image becomes a file in the current directory.
    pub(crate) file: bool,
}

/// A Secret that the specification names.
#[derive(Clone, Debug)]
pub(crate) struct Secret {
    pub(crate) name: String,
    /// What a build knows it by.
    pub(crate) slot: CredentialSlot,
    /// The values that are known.
    pub(crate) values: BTreeMap<&'static str, SecretString>,
    /// The keys that the operator needs.
    pub(crate) needed: Vec<&'static str>,
}

/// The specification of the resource `name`. What has no effect is added to `warnings`.
pub(crate) fn translate(wanted: Wanted, name: &str, warnings: &mut Vec<String>) -> Result<Translation, UsageError> {
    let Wanted { choice, config, files, repositories } = wanted;
    supported(&choice)?;
    let engine = engine(&choice, &config);
    without_effect(&choice, &config, engine, warnings);
    let mut secrets = vec![];
    let (mut baremetal, mut vsphere, mut nutanix) = (None, None, None);
    let mut disk_size = None;
    let mut base = config.iso.url.clone().map(|url| checked_base(url, config.iso.checksum.clone()));
    match &config.provider {
        ProviderKeys::Baremetal { disk_size: size } => {
            baremetal = Some(BareMetal {});
            disk_size = size.map(|mib| format!("{mib}Mi"));
        }
        ProviderKeys::Vsphere(keys) => {
            let known = [("username", keys.username.as_ref()), ("password", keys.password.as_ref())];
            let secret = if choice.builder == Builder::Clone {
                let [username, password] = known;
                let account = (SSH_PASSWORD, keys.ssh_password.as_ref());
                login(name, "vsphere", &mut secrets, [username, password, account])
            } else {
                login(name, "vsphere", &mut secrets, known)
            };
            vsphere = Some(vsphere_spec(keys, choice.builder, secret));
        }
        ProviderKeys::Nutanix(keys) => {
            disk_size = keys.image_size.map(|gib| format!("{gib}Gi"));
            base = keys.image_url.clone().map(listed_base);
            nutanix = Some(nutanix_spec(
                keys,
                login(
                    name,
                    "nutanix",
                    &mut secrets,
                    [("username", Some(&keys.username)), ("password", Some(&keys.password))],
                ),
            ));
        }
        ProviderKeys::Other => {}
    }
    if choice.builder == Builder::Clone {
        // The template is what the image starts from.
        base = None;
    }
    let redhat = choice.os == OsName::Redhat;
    let subscription = redhat.then(|| subscription(&config.rhel, name, &mut secrets));
    let spec = NodeImageBuildSpec {
        os: Os { name: choice.os, version: choice.os_version.clone() },
        release_channel: choice.channel.clone(),
        eksa_release: choice.eksa_release.clone(),
        engine,
        firmware: (choice.firmware != default_firmware(&choice)).then_some(choice.firmware),
        base,
        disk_size,
        packages: Packages {
            install: if redhat { config.packages.rpms.clone() } else { config.packages.debs.clone() },
            repositories,
            disable_public_repositories: config.overrides.disable_public_repos.unwrap_or_default(),
            epel: if redhat { epel(&config.rhel) } else { None },
        },
        files: vec![],
        proxy: (config.proxy.http.is_some() || config.proxy.https.is_some()).then(|| config.proxy.clone()),
        trust_bundle: None,
        source: source(&choice, &config),
        subscription,
        baremetal,
        vsphere,
        nutanix,
        publish: vec![],
        build: Build::default(),
        verify: Verify { signatures: choice.signatures, ..Verify::default() },
        rebuild: None,
        image_builder: (engine == Engine::ImageBuilder).then(|| image_builder(&choice, &config)),
        suspend: false,
        history: History::default(),
        retention: None,
        deletion_policy: DeletionPolicy::default(),
    };
    Ok(Translation { spec, secrets, files, ending: ending(&config.provider) })
}

/// Whether the settings name the place in the provider that the image is put to. `because` says who puts it there.
pub(crate) fn names_its_place(spec: &NodeImageBuildSpec, because: &str) -> Result<(), UsageError> {
    let mut missing = vec![];
    if let Some(vsphere) = &spec.vsphere {
        for (key, value) in [
            ("vcenter_server", &vsphere.server),
            ("datacenter", &vsphere.datacenter),
            ("datastore", &vsphere.datastore),
            ("network", &vsphere.network),
        ] {
            if value.is_empty() {
                missing.push(key);
            }
        }
        if vsphere.cluster.is_none() && vsphere.resource_pool.is_none() {
            missing.push("cluster (or resource_pool)");
        }
    }
    if let Some(nutanix) = &spec.nutanix {
        if nutanix.endpoint.is_empty() {
            missing.push("nutanix_endpoint");
        }
        if nutanix.cluster.name.is_none() && nutanix.cluster.uuid.is_none() {
            missing.push("nutanix_cluster_name (or nutanix_cluster_uuid)");
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(UsageError::flags(format!("the settings lack {}", missing.join(", ")), format!("write them: {because}")))
}

/// As in the EKS Anywhere tool: an OVA is left to the person unless a template is wanted, an image for Nutanix is in Prism
/// Central and becomes a file on demand.
fn ending(provider: &ProviderKeys) -> Ending {
    match provider {
        ProviderKeys::Vsphere(keys) => Ending { import: keys.convert_to_template == Some(true), file: true },
        ProviderKeys::Nutanix(keys) => Ending { import: true, file: keys.image_export },
        ProviderKeys::Baremetal { .. } | ProviderKeys::Other => Ending { import: false, file: true },
    }
}

/// Mirrors count with `--air-gapped` only, as in the original.
fn source(choice: &Choice, config: &Config) -> Option<Source> {
    let mirror = |url: &Option<String>| url.clone().filter(|_| choice.air_gapped);
    let source = Source {
        release_manifest_url: choice.release_manifest_url.clone(),
        eksa_base_url: mirror(&config.air_gapped.eksa),
        eksd_base_url: mirror(&config.air_gapped.eksd),
    };
    (source != Source::default()).then_some(source)
}

/// What the resource can say at all.
fn supported(choice: &Choice) -> Result<(), UsageError> {
    match choice.hypervisor {
        Hypervisor::Vsphere | Hypervisor::Baremetal | Hypervisor::Nutanix => {}
        other @ (Hypervisor::Cloudstack | Hypervisor::Ami) => {
            let instead = "write baremetal, vsphere or nutanix, or use the EKS Anywhere tool for it";
            return Err(UsageError::not_supported(format!("--hypervisor {other}"), instead));
        }
    }
    if choice.os_version == "20.04" {
        return Err(UsageError::not_supported("--os-version 20.04", "write 22.04 or 24.04"));
    }
    Ok(())
}

/// The native engine, unless something is asked for that only Packer and Ansible do.
fn engine(choice: &Choice, config: &Config) -> Engine {
    let start = match &config.provider {
        ProviderKeys::Nutanix(keys) => &keys.image_url,
        ProviderKeys::Vsphere(_) | ProviderKeys::Baremetal { .. } | ProviderKeys::Other => &config.iso.url,
    };
    let installer = start.as_ref().is_some_and(|url| !is_archive(url));
    if installer || choice.builder == Builder::Clone || config.overrides.has_roles() {
        Engine::ImageBuilder
    } else {
        Engine::Native
    }
}

/// Whether a URL leads to a root file system archive and not to an installer or a disk.
fn is_archive(url: &str) -> bool {
    let path = url.split(['?', '#']).next().unwrap_or_default().to_ascii_lowercase();
    ARCHIVES.iter().any(|ending| path.ends_with(ending))
}

fn without_effect(choice: &Choice, config: &Config, engine: Engine, warnings: &mut Vec<String>) {
    let redhat = choice.os == OsName::Redhat;
    let (ansible, clone) = (engine == Engine::ImageBuilder, choice.builder == Builder::Clone);
    let mirrors = config.air_gapped.eksa.is_some() || config.air_gapped.eksd.is_some();
    let mut remarks = vec![
        ("extra_rpms", !redhat && !config.packages.rpms.is_empty(), "it is for redhat"),
        ("extra_debs", redhat && !config.packages.debs.is_empty(), "it is for ubuntu"),
        (
            "private_artifacts_eksa_fqdn or private_artifacts_eksd_fqdn",
            mirrors && !choice.air_gapped,
            "it is for --air-gapped",
        ),
        ("ssh_timeout", !ansible && config.ssh.timeout_seconds.is_some(), "this image is made without SSH"),
        (
            "ssh_handshake_attempts",
            !ansible && config.ssh.handshake_attempts.is_some(),
            "this image is made without SSH",
        ),
        ("--ansible-verbosity", !ansible && choice.ansible_verbosity > 0, "this image is made without Ansible"),
        (
            "reenable_public_repos",
            !ansible && config.overrides.reenable_public_repos.is_some(),
            "the package sources of the base are as they were when the image is finished",
        ),
    ];
    if let ProviderKeys::Vsphere(keys) = &config.provider {
        let only = "it is for --builder clone";
        remarks.push(("template", !clone && keys.template.is_some(), only));
        remarks.push(("linked_clone", !clone && keys.linked_clone.is_some(), only));
        remarks.push(("iso_url", clone && config.iso.url.is_some(), "the image starts from the template"));
    }
    if let ProviderKeys::Nutanix(keys) = &config.provider {
        let both = keys.image_url.is_some() && keys.source_image_name.is_some();
        remarks.push(("source_image_name", both, "the image starts from image_url"));
    }
    warnings.extend(
        remarks.into_iter().filter(|(_, given, _)| *given).map(|(key, _, why)| format!("{key} has no effect: {why}")),
    );
}

fn default_firmware(choice: &Choice) -> Firmware {
    let efi = choice.hypervisor == Hypervisor::Baremetal && !(choice.os == OsName::Redhat && choice.os_version == "8");
    if efi { Firmware::Efi } else { Firmware::Bios }
}

fn checked_base(url: String, checksum: Option<Checksum>) -> Base {
    let (sha256, sha512) = match checksum {
        Some(Checksum::Sha256(digest)) => (Some(digest), None),
        Some(Checksum::Sha512(digest)) => (None, Some(digest)),
        None => (None, None),
    };
    Base { url, sha256, sha512, sha256_sums_url: None }
}

/// A base whose checksum stands in a `SHA256SUMS` file beside it: `image_url` has no key for one.
fn listed_base(url: String) -> Base {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let sums = path.rsplit_once('/').map(|(directory, _)| format!("{directory}/SHA256SUMS"));
    Base { url, sha256: None, sha512: None, sha256_sums_url: sums }
}

/// The Secret for `role`, with those of the `values` that are known.
fn login<const N: usize>(
    name: &str,
    role: &str,
    secrets: &mut Vec<Secret>,
    values: [(&'static str, Option<&SecretString>); N],
) -> SecretReference {
    let name = format!("{name}-{role}");
    secrets.push(Secret {
        name: name.clone(),
        slot: CredentialSlot(role.to_owned()),
        needed: values.iter().map(|(key, _)| *key).collect(),
        values: values.into_iter().filter_map(|(key, value)| Some((key, value?.clone()))).collect(),
    });
    SecretReference { name }
}

fn vsphere_spec(keys: &VsphereKeys, builder: Builder, credentials_secret_ref: SecretReference) -> Vsphere {
    let clone = builder == Builder::Clone;
    Vsphere {
        server: keys.server.clone().unwrap_or_default(),
        credentials_secret_ref,
        insecure: keys.insecure,
        thumbprint: None,
        datacenter: keys.datacenter.clone().unwrap_or_default(),
        cluster: keys.cluster.clone(),
        resource_pool: keys.resource_pool.clone(),
        datastore: keys.datastore.clone().unwrap_or_default(),
        network: keys.network.clone().unwrap_or_default(),
        folder: keys.folder.clone(),
        template_name: None,
        replace_existing: false,
        vmx_version: keys.vmx_version,
        convert_to_template: keys.convert_to_template,
        create_snapshot: keys.create_snapshot,
        content_library: None,
        template: keys.template.clone().filter(|_| clone),
        linked_clone: keys.linked_clone.filter(|_| clone),
    }
}

/// The original replaces an image of the same name.
fn nutanix_spec(keys: &NutanixKeys, credentials_secret_ref: SecretReference) -> Nutanix {
    let cluster = match &keys.cluster_uuid {
        Some(uuid) => NutanixCluster { name: None, uuid: Some(uuid.clone()) },
        None => NutanixCluster { name: keys.cluster_name.clone(), uuid: None },
    };
    Nutanix {
        endpoint: keys.endpoint.clone().unwrap_or_default(),
        port: keys.port.unwrap_or(9440),
        credentials_secret_ref,
        insecure: keys.insecure,
        cluster,
        subnet: keys.subnet.clone(),
        image_name: keys.image_name.clone(),
        replace_existing: keys.image_name.is_some(),
        source_image_name: keys.source_image_name.clone().filter(|_| keys.image_url.is_none()),
        categories: BTreeMap::new(),
    }
}

fn subscription(rhel: &Rhel, name: &str, secrets: &mut Vec<Secret>) -> Subscription {
    let credentials_secret_ref = if rhel.server_hostname.is_some() {
        login(name, "rhsm", secrets, [("activationKey", rhel.activation_key.as_ref()), ("orgID", rhel.org_id.as_ref())])
    } else {
        login(name, "rhsm", secrets, [("username", rhel.username.as_ref()), ("password", rhel.password.as_ref())])
    };
    Subscription {
        credentials_secret_ref,
        server_hostname: rhel.server_hostname.clone(),
        server_release_version: rhel.server_release_version.clone(),
        proxy_hostname: rhel.proxy_hostname.clone(),
        proxy_port: rhel.proxy_port,
    }
}

/// An empty package URL switches EPEL off.
fn epel(rhel: &Rhel) -> Option<Epel> {
    match (rhel.epel_rpm.as_deref(), &rhel.epel_key) {
        (None, None) => None,
        (Some(""), _) => Some(Epel { enabled: false, release_url: None, gpg_key_url: None }),
        (url, key) => Some(Epel { enabled: true, release_url: url.map(ToOwned::to_owned), gpg_key_url: key.clone() }),
    }
}

fn image_builder(choice: &Choice, config: &Config) -> ImageBuilder {
    let overrides = &config.overrides;
    ImageBuilder {
        first_boot_roles_pre: overrides.firstboot_pre.clone(),
        first_boot_roles_post: overrides.firstboot_post.clone(),
        node_roles_pre: overrides.node_pre.clone(),
        node_roles_post: overrides.node_post.clone(),
        reenable_public_repositories: overrides.reenable_public_repos,
        ssh_timeout_seconds: config.ssh.timeout_seconds,
        ssh_handshake_attempts: config.ssh.handshake_attempts,
        ansible_verbosity: Some(choice.ansible_verbosity).filter(|level| *level > 0),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::dropin::{load::load, testing::flags};

    /// The same as the EKS Anywhere tool: see docs/command-line.md.
    #[rstest]
    #[case::metal("baremetal", json!({}), false, true)]
    #[case::ova("vsphere", json!({}), false, true)]
    #[case::no_template("vsphere", json!({ "convert_to_template": "false" }), false, true)]
    #[case::template("vsphere", json!({ "convert_to_template": "true" }), true, true)]
    #[case::prism("nutanix", json!({ "nutanix_username": "u", "nutanix_password": "p" }), true, false)]
    #[case::export(
        "nutanix", json!({ "nutanix_username": "u", "nutanix_password": "p", "image_export": "true" }), true, true
    )]
    fn an_image_ends_where_the_settings_want_it(
        #[case] hypervisor: &str,
        #[case] settings: Value,
        #[case] import: bool,
        #[case] file: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        std::fs::write(&config, settings.to_string()).unwrap();
        let line = format!(
            "--os ubuntu --hypervisor {hypervisor} --{hypervisor}-config {} --signatures require",
            config.display()
        );
        let (wanted, _) = load(&flags(&line)).unwrap();
        let translation = translate(wanted, "name", &mut vec![]).unwrap();
        assert_eq!(translation.ending, Ending { import, file });
        assert_eq!(translation.spec.verify.signatures, crate::contract::Signatures::Require);
    }
}
