//! Groups of keys that the JSON files of several hypervisors share, with the rules inside each. Pure.

use std::path::PathBuf;

use secrecy::SecretString;

use super::{UsageError, keys::Keys};
use crate::{
    cli::duration,
    contract::{OsName, Proxy},
};

/// What the image starts from.
#[derive(Clone, Debug, Default)]
pub(super) struct Iso {
    pub(super) url: Option<String>,
    pub(super) checksum: Option<Checksum>,
}

/// A digest in lower-case hexadecimal.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Checksum {
    Sha256(String),
    Sha512(String),
}

impl Iso {
    pub(super) fn take(keys: &mut Keys) -> Result<Self, UsageError> {
        let url = keys.text("iso_url")?;
        let digest = keys.text("iso_checksum")?;
        let kind = keys.text("iso_checksum_type")?;
        let checksum = match (&url, digest, kind.as_deref()) {
            (None, _, _) => None,
            (Some(_), None, _) => return Err(keys.missing("iso_checksum", "nothing is used unverified")),
            (Some(_), Some(digest), Some("sha256")) => Some(Checksum::Sha256(hexadecimal(keys, &digest, 64)?)),
            (Some(_), Some(digest), Some("sha512")) => Some(Checksum::Sha512(hexadecimal(keys, &digest, 128)?)),
            (Some(_), Some(_), _) => return Err(keys.invalid("iso_checksum_type", "write \"sha256\" or \"sha512\"")),
        };
        Ok(Self { url, checksum })
    }
}

fn hexadecimal(keys: &Keys, digest: &str, digits: usize) -> Result<String, UsageError> {
    if digest.len() == digits && digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(digest.to_ascii_lowercase());
    }
    Err(keys.invalid("iso_checksum", &format!("write {digits} hexadecimal digits")))
}

/// Where a login may stand beside the file of settings.
pub(super) struct Logins<'l> {
    /// The keys of `--credentials-file`.
    pub(super) file: &'l mut Keys,
    /// Reads a variable of the environment.
    pub(super) environment: &'l dyn Fn(&str) -> Option<String>,
}

impl Logins<'_> {
    /// The secret `key`: from the credentials file, else the settings, else the environment.
    pub(super) fn secret(
        &mut self,
        keys: &mut Keys,
        key: &'static str,
        variable: &str,
    ) -> Result<Option<SecretString>, UsageError> {
        let (private, written) = (self.file.secret(key)?, keys.secret(key)?);
        let set = || (self.environment)(variable).filter(|value| !value.is_empty()).map(SecretString::from);
        Ok(private.or(written).or_else(set))
    }
}

/// Red Hat subscription and EPEL.
#[derive(Clone, Debug, Default)]
pub(super) struct Rhel {
    pub(super) username: Option<SecretString>,
    pub(super) password: Option<SecretString>,
    pub(super) activation_key: Option<SecretString>,
    pub(super) org_id: Option<SecretString>,
    pub(super) server_hostname: Option<String>,
    pub(super) server_release_version: Option<String>,
    pub(super) proxy_hostname: Option<String>,
    pub(super) proxy_port: Option<u16>,
    /// `Some("")` switches EPEL off.
    pub(super) epel_rpm: Option<String>,
    pub(super) epel_key: Option<String>,
}

impl Rhel {
    /// `satellite_checked`: whether everything that a Satellite server needs has to be there.
    pub(super) fn take(
        keys: &mut Keys,
        logins: &mut Logins<'_>,
        os: OsName,
        satellite_checked: bool,
    ) -> Result<Self, UsageError> {
        let rhel = Self {
            username: logins.secret(keys, "rhel_username", "RHSM_USERNAME")?,
            password: logins.secret(keys, "rhel_password", "RHSM_PASSWORD")?,
            activation_key: logins.secret(keys, "rhsm_activation_key", "RHSM_ACTIVATION_KEY")?,
            org_id: logins.secret(keys, "rhsm_org_id", "RHSM_ORG_ID")?,
            server_hostname: keys.text("rhsm_server_hostname")?,
            server_release_version: keys.text("rhsm_server_release_version")?,
            proxy_hostname: keys.text("rhsm_server_proxy_hostname")?,
            proxy_port: keys.port("rhsm_server_proxy_port")?,
            epel_rpm: keys.present("redhat_epel_rpm")?,
            epel_key: keys.text("epel_rpm_gpg_key")?,
        };
        rhel.check(keys, os, satellite_checked)?;
        Ok(rhel)
    }

    fn check(&self, keys: &Keys, os: OsName, satellite_checked: bool) -> Result<(), UsageError> {
        if os != OsName::Redhat {
            return match self.server_hostname {
                Some(_) if satellite_checked => {
                    Err(keys.invalid("rhsm_server_hostname", "leave it out: only redhat has a subscription"))
                }
                Some(_) | None => Ok(()),
            };
        }
        if self.server_hostname.is_none() {
            let because = "redhat needs a subscription: write rhel_username and rhel_password, or rhsm_server_hostname";
            for (key, value) in [("rhel_username", &self.username), ("rhel_password", &self.password)] {
                if value.is_none() {
                    return Err(keys.missing(key, because));
                }
            }
        } else if satellite_checked {
            let because = "a Satellite server (rhsm_server_hostname) needs it";
            let given = [
                ("rhsm_server_release_version", self.server_release_version.is_some()),
                ("rhsm_activation_key", self.activation_key.is_some()),
                ("rhsm_org_id", self.org_id.is_some()),
            ];
            if let Some((key, _)) = given.into_iter().find(|(_, given)| !given) {
                return Err(keys.missing(key, because));
            }
        }
        if self.proxy_hostname.is_some() != self.proxy_port.is_some() {
            let message = "write rhsm_server_proxy_hostname and rhsm_server_proxy_port together";
            return Err(keys.invalid("rhsm_server_proxy_port", message));
        }
        Ok(())
    }
}

/// The proxy of everything that is downloaded.
pub(super) fn proxy(keys: &mut Keys, os: OsName) -> Result<Proxy, UsageError> {
    let http = keys.text("http_proxy")?;
    let https = keys.text("https_proxy")?;
    let exceptions = keys.text("no_proxy")?.unwrap_or_default();
    let no_proxy = exceptions.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).collect();
    for (key, value) in [("http_proxy", &http), ("https_proxy", &https)] {
        if let Some(text) = value
            && !text.parse::<url::Url>().is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        {
            return Err(keys.invalid(key, "write a URL such as http://proxy.example.com:3128"));
        }
    }
    // The port as it is written: a parsed URL drops one that is its scheme's own.
    let has_port = |text: &String| {
        text.trim_end_matches('/').rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    };
    if os == OsName::Redhat && http.as_ref().is_some_and(|http| !has_port(http)) {
        let message =
            "write its port for redhat, e.g. http://proxy.example.com:3128: the subscription service needs it";
        return Err(keys.invalid("http_proxy", message));
    }
    Ok(Proxy { http, https, no_proxy })
}

/// Packages beyond the recipe's own.
#[derive(Clone, Debug, Default)]
pub(super) struct ExtraPackages {
    pub(super) debs: Vec<String>,
    pub(super) rpms: Vec<String>,
    /// Files with package sources on this machine.
    pub(super) repos: Vec<PathBuf>,
}

impl ExtraPackages {
    pub(super) fn take(keys: &mut Keys) -> Result<Self, UsageError> {
        let (debs, rpms) = (keys.list("extra_debs")?, keys.list("extra_rpms")?);
        let repos: Vec<PathBuf> = keys.list("extra_repos")?.into_iter().map(PathBuf::from).collect();
        if repos.iter().any(|repo| !repo.is_absolute()) {
            return Err(
                keys.invalid("extra_repos", "write absolute paths of files on this machine, separated by spaces")
            );
        }
        Ok(Self { debs, rpms, repos })
    }
}

/// Ansible roles, and what becomes of the public package sources.
#[derive(Clone, Debug, Default)]
pub(super) struct ExtraOverrides {
    pub(super) firstboot_pre: Vec<String>,
    pub(super) firstboot_post: Vec<String>,
    pub(super) node_pre: Vec<String>,
    pub(super) node_post: Vec<String>,
    pub(super) disable_public_repos: Option<bool>,
    pub(super) reenable_public_repos: Option<bool>,
}

impl ExtraOverrides {
    pub(super) fn take(keys: &mut Keys) -> Result<Self, UsageError> {
        Ok(Self {
            firstboot_pre: keys.list("firstboot_custom_roles_pre")?,
            firstboot_post: keys.list("firstboot_custom_roles_post")?,
            node_pre: keys.list("node_custom_roles_pre")?,
            node_post: keys.list("node_custom_roles_post")?,
            disable_public_repos: keys.truth("disable_public_repos")?,
            reenable_public_repos: keys.truth("reenable_public_repos")?,
        })
    }

    pub(super) fn has_roles(&self) -> bool {
        [&self.firstboot_pre, &self.firstboot_post, &self.node_pre, &self.node_post]
            .iter()
            .any(|roles| !roles.is_empty())
    }
}

/// Private mirrors.
#[derive(Clone, Debug, Default)]
pub(super) struct AirGapped {
    /// In place of `https://distro.eks.amazonaws.com`.
    pub(super) eksd: Option<String>,
    /// In place of `https://anywhere-assets.eks.amazonaws.com`.
    pub(super) eksa: Option<String>,
}

impl AirGapped {
    /// `required`: `--air-gapped` is written.
    pub(super) fn take(keys: &mut Keys, required: bool) -> Result<Self, UsageError> {
        let names = [
            "eksa_build_tooling_repo_url",
            "image_builder_repo_url",
            "private_artifacts_eksd_fqdn",
            "private_artifacts_eksa_fqdn",
        ];
        let mut values = [const { None }; 4];
        for (value, key) in values.iter_mut().zip(names) {
            *value = keys.text(key)?;
            if required && value.is_none() {
                return Err(keys.missing(key, "--air-gapped needs it"));
            }
        }
        let [_, _, eksd, eksa] = values;
        for (key, value) in [(names[2], &eksd), (names[3], &eksa)] {
            if value.as_ref().is_some_and(|url| !url.starts_with("https://") && !url.starts_with("http://")) {
                return Err(keys.invalid(key, "write it with https://, e.g. https://mirror.example.com/eks-d"));
            }
        }
        Ok(Self { eksd, eksa })
    }
}

/// How the machine that is built in is waited for.
#[derive(Clone, Debug, Default)]
pub(super) struct Ssh {
    pub(super) timeout_seconds: Option<u32>,
    pub(super) handshake_attempts: Option<u32>,
}

impl Ssh {
    pub(super) fn take(keys: &mut Keys) -> Result<Self, UsageError> {
        let timeout_seconds = match keys.text("ssh_timeout")? {
            None => None,
            Some(text) => Some(
                duration::parse(&text)
                    .ok()
                    .and_then(|duration| u32::try_from(duration.as_secs()).ok())
                    .ok_or_else(|| keys.invalid("ssh_timeout", "write a duration such as \"40m\" or \"1h30m\""))?,
            ),
        };
        Ok(Self { timeout_seconds, handshake_attempts: keys.number("ssh_handshake_attempts", 1)? })
    }
}
