//! The JSON file of each hypervisor: its keys, and the rules between them. Pure, but for reading.

use secrecy::SecretString;

use super::{
    UsageError,
    groups::{self, AirGapped, ExtraOverrides, ExtraPackages, Iso, Logins, Rhel, Ssh},
    keys::Keys,
    rules::{Builder, Choice, Hypervisor},
};
use crate::contract::{OsName, Proxy};

/// Lowest virtual hardware version that the images run on.
const LEAST_VMX_VERSION: u32 = 15;

/// The settings of one build.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) iso: Iso,
    pub(super) rhel: Rhel,
    pub(super) proxy: Proxy,
    pub(super) packages: ExtraPackages,
    pub(super) overrides: ExtraOverrides,
    pub(super) air_gapped: AirGapped,
    pub(super) ssh: Ssh,
    pub(super) provider: ProviderKeys,
}

/// The keys that only one hypervisor has.
#[derive(Clone, Debug)]
pub(super) enum ProviderKeys {
    Vsphere(Box<VsphereKeys>),
    /// `disk_size`, in MiB.
    Baremetal {
        disk_size: Option<u32>,
    },
    Nutanix(Box<NutanixKeys>),
    /// Nothing is built for these; their files are read so that what is wrong in them is said first.
    Other,
}

#[derive(Clone, Debug)]
pub(super) struct VsphereKeys {
    pub(super) server: Option<String>,
    pub(super) username: Option<SecretString>,
    pub(super) password: Option<SecretString>,
    /// Of the account in the template that is cloned.
    pub(super) ssh_password: Option<SecretString>,
    pub(super) insecure: bool,
    pub(super) datacenter: Option<String>,
    pub(super) cluster: Option<String>,
    pub(super) datastore: Option<String>,
    pub(super) folder: Option<String>,
    pub(super) network: Option<String>,
    pub(super) resource_pool: Option<String>,
    pub(super) convert_to_template: Option<bool>,
    pub(super) create_snapshot: bool,
    pub(super) linked_clone: Option<bool>,
    pub(super) template: Option<String>,
    pub(super) vmx_version: Option<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct NutanixKeys {
    pub(super) endpoint: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) insecure: bool,
    pub(super) username: SecretString,
    pub(super) password: SecretString,
    pub(super) cluster_name: Option<String>,
    pub(super) cluster_uuid: Option<String>,
    pub(super) subnet: Option<String>,
    pub(super) image_name: Option<String>,
    pub(super) image_url: Option<String>,
    pub(super) source_image_name: Option<String>,
    /// In GiB.
    pub(super) image_size: Option<u32>,
    /// Whether the image becomes a file of this machine, too.
    pub(super) image_export: bool,
}

impl Config {
    /// The settings for `choice`. Remarks about the keys are added to `warnings`.
    pub(super) fn take(
        mut keys: Keys,
        logins: &mut Logins<'_>,
        choice: &Choice,
        warnings: &mut Vec<String>,
    ) -> Result<Self, UsageError> {
        let config = match choice.hypervisor {
            Hypervisor::Vsphere => Self::vsphere(&mut keys, logins, choice),
            Hypervisor::Baremetal => {
                let disk_size = keys.number("disk_size", 1)?;
                Self::groups(&mut keys, logins, choice, ProviderKeys::Baremetal { disk_size })
            }
            Hypervisor::Nutanix => Self::nutanix(&mut keys, logins, choice),
            Hypervisor::Cloudstack => {
                keys.text("ansible_user_vars")?;
                Self::groups(&mut keys, logins, choice, ProviderKeys::Other)
            }
            Hypervisor::Ami => Self::ami(&mut keys, choice),
        }?;
        warnings.extend(keys.finish());
        Ok(config)
    }

    fn vsphere(keys: &mut Keys, logins: &mut Logins<'_>, choice: &Choice) -> Result<Self, UsageError> {
        let vsphere = VsphereKeys {
            server: keys.text("vcenter_server")?,
            username: logins.secret(keys, "username", "EKSA_VSPHERE_USERNAME")?,
            password: logins.secret(keys, "password", "EKSA_VSPHERE_PASSWORD")?,
            ssh_password: logins.secret(keys, "ssh_password", "SSH_PASSWORD")?,
            insecure: keys.truth("insecure_connection")?.unwrap_or_default(),
            datacenter: keys.text("datacenter")?,
            cluster: keys.text("cluster")?,
            datastore: keys.text("datastore")?,
            folder: keys.text("folder")?,
            network: keys.text("network")?,
            resource_pool: keys.text("resource_pool")?,
            convert_to_template: keys.truth("convert_to_template")?,
            create_snapshot: keys.truth("create_snapshot")?.unwrap_or_default(),
            linked_clone: keys.truth("linked_clone")?,
            template: keys.text("template")?,
            vmx_version: keys.number("vmx_version", LEAST_VMX_VERSION)?,
        };
        keys.obsolete("vsphere_library_name", "the image goes through no content library");
        if choice.builder == Builder::Clone && vsphere.template.is_none() {
            return Err(keys.missing("template", "--builder clone needs the name of the template to clone"));
        }
        Self::groups(keys, logins, choice, ProviderKeys::Vsphere(Box::new(vsphere)))
    }

    fn nutanix(keys: &mut Keys, logins: &mut Logins<'_>, choice: &Choice) -> Result<Self, UsageError> {
        let mut login = |key, variable: &str| {
            let because = format!("Prism Central needs it; it may also stand in --credentials-file or {variable}");
            logins.secret(keys, key, variable)?.ok_or_else(|| keys.missing(key, &because))
        };
        let username = login("nutanix_username", "EKSA_NUTANIX_USERNAME")?;
        let password = login("nutanix_password", "EKSA_NUTANIX_PASSWORD")?;
        let nutanix = NutanixKeys {
            endpoint: keys.text("nutanix_endpoint")?,
            port: keys.port("nutanix_port")?,
            insecure: keys.truth("nutanix_insecure")?.unwrap_or_default(),
            username,
            password,
            cluster_name: keys.text("nutanix_cluster_name")?,
            cluster_uuid: keys.text("nutanix_cluster_uuid")?,
            subnet: keys.text("nutanix_subnet_name")?,
            image_name: keys.text("image_name")?,
            image_url: keys.text("image_url")?,
            source_image_name: keys.text("source_image_name")?,
            image_size: keys.number("image_size_gb", 0)?.filter(|size| *size > 0),
            image_export: keys.truth("image_export")?.unwrap_or_default(),
        };
        if choice.os != OsName::Ubuntu && nutanix.image_url.is_none() && nutanix.source_image_name.is_none() {
            let because = format!("{} has no public image to start from", choice.os);
            return Err(keys.missing("image_url", &because));
        }
        if choice.air_gapped && nutanix.image_name.is_none() {
            return Err(keys.missing("image_name", "--air-gapped needs it"));
        }
        Self::groups(keys, logins, choice, ProviderKeys::Nutanix(Box::new(nutanix)))
    }

    fn ami(keys: &mut Keys, choice: &Choice) -> Result<Self, UsageError> {
        for key in [
            "ami_filter_name",
            "ami_filter_owners",
            "ami_regions",
            "aws_region",
            "builder_instance_type",
            "manifest_output",
            "root_device_name",
            "subnet_id",
            "volume_size",
            "volume_type",
        ] {
            keys.text(key)?;
        }
        for key in ["ansible_extra_vars", "custom_role", "custom_role_names", "custom_role_name_list"] {
            keys.obsolete(key, "write the roles into node_custom_roles_post");
        }
        Ok(Self {
            iso: Iso::default(),
            rhel: Rhel::default(),
            proxy: groups::proxy(keys, choice.os)?,
            packages: ExtraPackages::take(keys)?,
            overrides: ExtraOverrides::take(keys)?,
            air_gapped: AirGapped::default(),
            ssh: Ssh::default(),
            provider: ProviderKeys::Other,
        })
    }

    /// The groups that all but ami have. Nutanix starts from an image in place of an ISO and has no settings for SSH.
    fn groups(
        keys: &mut Keys,
        logins: &mut Logins<'_>,
        choice: &Choice,
        provider: ProviderKeys,
    ) -> Result<Self, UsageError> {
        let nutanix = matches!(provider, ProviderKeys::Nutanix(_));
        let (iso, ssh) = if nutanix { (Iso::default(), Ssh::default()) } else { (Iso::take(keys)?, Ssh::take(keys)?) };
        let rhel = Rhel::take(keys, logins, choice.os, !nutanix)?;
        let from_template = nutanix || choice.builder == Builder::Clone;
        if iso.url.is_none() && !from_template {
            if choice.os != OsName::Ubuntu {
                let because = format!("{} has no public image to start from", choice.os);
                return Err(keys.missing("iso_url", &because));
            }
            if choice.air_gapped {
                return Err(keys.missing("iso_url", "--air-gapped needs it, on a mirror"));
            }
        }
        let config = Self {
            iso,
            rhel,
            proxy: groups::proxy(keys, choice.os)?,
            packages: ExtraPackages::take(keys)?,
            overrides: ExtraOverrides::take(keys)?,
            air_gapped: AirGapped::take(keys, choice.air_gapped)?,
            ssh,
            provider,
        };
        if choice.air_gapped && config.packages.repos.is_empty() {
            return Err(keys.missing("extra_repos", "--air-gapped needs package sources on a mirror"));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rstest::rstest;
    use secrecy::ExposeSecret;
    use serde_json::{Value, json};

    use super::{
        super::{rules::choose, testing::flags},
        *,
    };

    const BARE_METAL: &str = "--os ubuntu --hypervisor baremetal";
    const AIR_GAPPED: &str = "--os ubuntu --hypervisor baremetal --air-gapped --manifest-tarball t";
    const REDHAT: &str = "--os redhat --hypervisor baremetal";
    const VSPHERE: &str = "--os ubuntu --hypervisor vsphere";
    const NUTANIX: &str = "--os ubuntu --hypervisor nutanix";

    fn take(line: &str, config: &Value) -> Result<(Config, Vec<String>), UsageError> {
        let configs = "--vsphere-config c --baremetal-config c --nutanix-config c --cloudstack-config c --ami-config c";
        let (choice, mut warnings) = choose(&flags(&format!("{line} {configs}")))?;
        let mut file = Keys::none();
        let mut logins = Logins { file: &mut file, environment: &|_| None };
        let keys = Keys::parse(Path::new("c.json"), &config.to_string())?;
        Config::take(keys, &mut logins, &choice, &mut warnings).map(|config| (config, warnings))
    }

    /// Settings that are accepted, with one of `changes` made: a value, or nothing in its place.
    fn whole(line: &str) -> Value {
        let iso = json!({ "iso_url": "https://a.test/x.iso", "iso_checksum": "ab".repeat(32), "iso_checksum_type": "sha256" });
        let mut config = match line {
            _ if line.contains("ami") => json!({}),
            NUTANIX => json!({ "nutanix_username": "u", "nutanix_password": "p" }),
            _ if line.contains("nutanix") => json!({ "nutanix_username": "u", "nutanix_password": "p",
                "image_url": "https://a.test/x.img", "rhel_username": "u", "rhel_password": "p" }),
            _ => iso,
        };
        if line.contains("redhat") {
            config["rhel_username"] = json!("u");
            config["rhel_password"] = json!("p");
        }
        if line == AIR_GAPPED {
            for key in ["eksa_build_tooling_repo_url", "image_builder_repo_url"] {
                config[key] = json!("https://git.test/x.git");
            }
            for key in ["private_artifacts_eksd_fqdn", "private_artifacts_eksa_fqdn"] {
                config[key] = json!("https://mirror.test");
            }
            config["extra_repos"] = json!("/etc/apt/sources.list.d/mirror.list");
        }
        config
    }

    #[rstest]
    #[case::iso_without_checksum(BARE_METAL, "iso_checksum", json!(""), "iso_checksum is missing")]
    #[case::iso_checksum_type(BARE_METAL, "iso_checksum_type", json!("md5"), "write \"sha256\" or \"sha512\"")]
    #[case::iso_checksum_length(BARE_METAL, "iso_checksum", json!("ab"), "write 64 hexadecimal digits")]
    #[case::disk_size(BARE_METAL, "disk_size", json!("8G"), "disk_size is not valid")]
    #[case::no_text(BARE_METAL, "disk_size", json!(8192), "write the value in quotes")]
    #[case::relative_repository(BARE_METAL, "extra_repos", json!("a.list"), "write absolute paths")]
    #[case::truth(BARE_METAL, "disable_public_repos", json!("yes"), "write \"true\" or \"false\"")]
    #[case::ssh_timeout(BARE_METAL, "ssh_timeout", json!("40"), "write a duration")]
    #[case::ssh_timeout_back(BARE_METAL, "ssh_timeout", json!("1h-5m"), "write a duration")]
    #[case::ssh_timeout_huge(BARE_METAL, "ssh_timeout", json!("99999999999999999999h"), "write a duration")]
    #[case::satellite_ubuntu(BARE_METAL, "rhsm_server_hostname", json!("s.test"), "only redhat has a subscription")]
    #[case::no_iso(REDHAT, "iso_url", Value::Null, "iso_url is missing: redhat has no public image")]
    #[case::no_username(REDHAT, "rhel_username", Value::Null, "rhel_username is missing")]
    #[case::no_password(REDHAT, "rhel_password", json!(""), "rhel_password is missing")]
    #[case::satellite(REDHAT, "rhsm_server_hostname", json!("s.test"), "rhsm_server_release_version is missing")]
    #[case::proxy_port(REDHAT, "http_proxy", json!("http://proxy.test"), "write its port for redhat")]
    #[case::half_a_proxy(REDHAT, "rhsm_server_proxy_hostname", json!("proxy.test"), "together")]
    #[case::proxy(BARE_METAL, "https_proxy", json!("proxy.test:3128"), "write a URL such as")]
    #[case::vmx_version(VSPHERE, "vmx_version", json!("14"), "at least \"15\"")]
    #[case::vmx_number(VSPHERE, "vmx_version", json!("new"), "at least \"15\"")]
    #[case::template("--os ubuntu --hypervisor vsphere --builder clone", "template", json!(""), "template is missing")]
    #[case::nutanix_username(NUTANIX, "nutanix_username", json!(""), "nutanix_username is missing")]
    #[case::nutanix_password(NUTANIX, "nutanix_password", Value::Null, "EKSA_NUTANIX_PASSWORD")]
    #[case::nutanix_port(NUTANIX, "nutanix_port", json!("94400"), "write a port")]
    #[case::nutanix_size(NUTANIX, "image_size_gb", json!("-1"), "image_size_gb is not valid")]
    #[case::nutanix_redhat("--os redhat --hypervisor nutanix", "image_url", Value::Null, "image_url is missing")]
    #[case::mirror_iso(AIR_GAPPED, "iso_url", Value::Null, "iso_url is missing: --air-gapped needs it")]
    #[case::mirror_tooling(
        AIR_GAPPED,
        "eksa_build_tooling_repo_url",
        Value::Null,
        "eksa_build_tooling_repo_url is missing"
    )]
    #[case::mirror_builder(AIR_GAPPED, "image_builder_repo_url", json!(""), "image_builder_repo_url is missing")]
    #[case::mirror_eksd(
        AIR_GAPPED,
        "private_artifacts_eksd_fqdn",
        Value::Null,
        "private_artifacts_eksd_fqdn is missing"
    )]
    #[case::mirror_eksa(
        AIR_GAPPED,
        "private_artifacts_eksa_fqdn",
        Value::Null,
        "private_artifacts_eksa_fqdn is missing"
    )]
    #[case::mirror_scheme(AIR_GAPPED, "private_artifacts_eksa_fqdn", json!("mirror.test"), "write it with https://")]
    #[case::mirror_repository(AIR_GAPPED, "extra_repos", Value::Null, "extra_repos is missing")]
    fn refuses_settings_that_the_original_refuses(
        #[case] line: &str,
        #[case] key: &str,
        #[case] value: Value,
        #[case] message: &str,
    ) {
        let mut config = whole(line);
        if key != "template" {
            take(line, &config).unwrap();
        }
        config[key] = value;
        let error = take(line, &config).unwrap_err().to_string();
        assert!(error.starts_with("c.json: ") && error.contains(message), "{error}");
    }

    #[test]
    fn satellite_needs_no_user_and_is_not_checked_for_nutanix() {
        let satellite = [
            ("rhel_username", json!("")),
            ("rhsm_server_hostname", json!("s.test")),
            ("rhsm_server_release_version", json!("9.4")),
            ("rhsm_activation_key", json!("key")),
            ("rhsm_org_id", json!("1")),
        ];
        let mut config = whole(REDHAT);
        for (key, value) in satellite {
            config[key] = value;
        }
        let (taken, _) = take(REDHAT, &config).unwrap();
        assert_eq!(taken.rhel.activation_key.unwrap().expose_secret(), "key");
        for key in ["rhsm_activation_key", "rhsm_org_id", "rhsm_server_release_version"] {
            let mut less = config.clone();
            less[key] = json!("");
            assert!(take(REDHAT, &less).unwrap_err().to_string().contains(key));
        }
        let mut config = whole("--os redhat --hypervisor nutanix");
        config["rhsm_server_hostname"] = json!("s.test");
        config["rhel_password"] = json!("");
        take("--os redhat --hypervisor nutanix", &config).unwrap();
    }

    /// Every key of every version, by hypervisor; see the documentation of the EKS Anywhere CLI.
    #[rstest]
    #[case::vsphere(
        "--os ubuntu --hypervisor vsphere",
        "vcenter_server username password datacenter cluster datastore \
        folder network resource_pool insecure_connection convert_to_template create_snapshot linked_clone template \
        vmx_version ISO RHEL PROXY PACKAGES OVERRIDES MIRRORS SSH"
    )]
    #[case::baremetal("--os ubuntu --hypervisor baremetal", "disk_size ISO RHEL PROXY PACKAGES OVERRIDES MIRRORS SSH")]
    #[case::nutanix(
        "--os ubuntu --hypervisor nutanix",
        "nutanix_endpoint nutanix_port nutanix_insecure \
        nutanix_cluster_name nutanix_cluster_uuid nutanix_subnet_name image_name image_url image_size_gb image_export \
        source_image_name RHEL PROXY PACKAGES OVERRIDES MIRRORS"
    )]
    #[case::cloudstack(
        "--os redhat --hypervisor cloudstack",
        "ansible_user_vars ISO RHEL PROXY PACKAGES OVERRIDES MIRRORS SSH"
    )]
    #[case::ami(
        "--os ubuntu --hypervisor ami",
        "ami_filter_name ami_filter_owners ami_regions aws_region \
        builder_instance_type manifest_output root_device_name volume_size volume_type subnet_id PROXY PACKAGES OVERRIDES"
    )]
    fn knows_every_key_of_the_original(#[case] line: &str, #[case] keys: &str) {
        let keys = keys
            .replace("ISO", "iso_url iso_checksum iso_checksum_type")
            .replace("RHEL", "rhel_username rhel_password rhsm_server_hostname rhsm_server_release_version \
                rhsm_activation_key rhsm_org_id rhsm_server_proxy_hostname rhsm_server_proxy_port redhat_epel_rpm epel_rpm_gpg_key")
            .replace("PROXY", "http_proxy https_proxy no_proxy")
            .replace("PACKAGES", "extra_debs extra_rpms extra_repos")
            .replace("OVERRIDES", "firstboot_custom_roles_pre firstboot_custom_roles_post node_custom_roles_pre \
                node_custom_roles_post disable_public_repos reenable_public_repos")
            .replace("MIRRORS", "eksa_build_tooling_repo_url image_builder_repo_url private_artifacts_eksd_fqdn \
                private_artifacts_eksa_fqdn")
            .replace("SSH", "ssh_timeout ssh_handshake_attempts");
        let mut config = whole(line);
        for key in keys.split_whitespace() {
            if config.get(key).is_none() {
                config[key] = json!("");
            }
        }
        let (_, warnings) = take(line, &config).unwrap();
        assert_eq!(warnings, [""; 0]);
        config["zzz"] = json!("");
        assert_eq!(take(line, &config).unwrap().1.len(), 1);
    }

    #[rstest]
    #[case::library("--os ubuntu --hypervisor vsphere", "vsphere_library_name")]
    #[case::role("--os ubuntu --hypervisor ami", "custom_role_name_list")]
    fn keys_of_the_first_version_are_known_and_told(#[case] line: &str, #[case] key: &str) {
        let mut config = whole(line);
        config[key] = json!("x");
        let (_, warnings) = take(line, &config).unwrap();
        assert!(warnings.len() == 1 && warnings[0].contains(&format!("{key} has no effect")), "{warnings:?}");
    }

    #[test]
    fn an_empty_epel_package_is_not_an_absent_one() {
        let mut config = whole(REDHAT);
        assert_eq!(take(REDHAT, &config).unwrap().0.rhel.epel_rpm, None);
        config["redhat_epel_rpm"] = json!("");
        assert_eq!(take(REDHAT, &config).unwrap().0.rhel.epel_rpm.as_deref(), Some(""));
    }
}
