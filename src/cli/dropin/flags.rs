//! The flags of `image-builder build`, with the names and defaults of the EKS Anywhere CLI. What is not given is an
//! empty text, as there, so that scripts may pass `--firmware "$FIRMWARE"`.

use std::path::PathBuf;

use clap::{
    ArgAction, Args, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};

use super::rules::Hypervisor;
use crate::contract::Signatures;

/// What to build.
#[derive(Clone, Debug, Args)]
pub(crate) struct BuildFlags {
    /// Operating system of the image: ubuntu or redhat; or debian, which the EKS Anywhere CLI does not have.
    #[arg(long)]
    pub(super) os: String,
    /// Version of the operating system: 22.04 or 24.04 for ubuntu, 8 or 9 for redhat, 12 for debian. Default 22.04, 8 or 12.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "VERSION")]
    pub(super) os_version: String,
    /// What the image is for: vsphere, baremetal, nutanix, cloudstack or ami.
    #[arg(long)]
    pub(super) hypervisor: String,
    /// Kubernetes release channel of EKS Distro: 1-31 or 1.31 for Kubernetes 1.31.
    #[arg(long, default_value = "1-31", value_name = "CHANNEL")]
    pub(super) release_channel: String,
    /// JSON file with the settings for --hypervisor vsphere.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) vsphere_config: Option<PathBuf>,
    /// JSON file with the settings for --hypervisor baremetal.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) baremetal_config: Option<PathBuf>,
    /// JSON file with the settings for --hypervisor nutanix.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) nutanix_config: Option<PathBuf>,
    /// JSON file with the settings for --hypervisor cloudstack.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) cloudstack_config: Option<PathBuf>,
    /// JSON file with the settings for --hypervisor ami.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) ami_config: Option<PathBuf>,
    /// JSON file that lists files to put into the image.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) files_config: Option<PathBuf>,
    /// JSON file with user names and passwords under the same keys as in the file of the hypervisor, which then needs
    /// none. Nobody else may read it (chmod 600).
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) credentials_file: Option<PathBuf>,
    /// How machines start the image: bios or efi. Default efi for baremetal (bios for redhat 8), else bios.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) firmware: String,
    /// How the image for vsphere comes about: iso, or clone of the template that the settings name.
    #[arg(long, default_value = "iso")]
    pub(super) builder: String,
    /// EKS Anywhere release, e.g. v0.26.1. Default the latest.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "VERSION")]
    pub(super) eksa_release: String,
    /// URL of the EKS Anywhere release manifest. Default that of the public releases.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "URL", env = "EKSA_RELEASE_MANIFEST_URL")]
    pub(super) release_manifest_url: String,
    /// Archive that `download manifests` made.
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) manifest_tarball: Option<PathBuf>,
    /// What release documents without a valid signature of AWS mean: require (they are refused), warn or off.
    #[arg(long, value_enum, ignore_case = true, default_value = "warn", value_name = "POLICY")]
    pub(super) signatures: SignaturePolicy,
    /// Use private mirrors only: needs --manifest-tarball, and the mirrors in the settings.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "false",
        hide_default_value = true, default_missing_value = "true", value_name = "BOOL", value_parser = boolean)]
    pub(super) air_gapped: bool,
    /// How much Ansible says, 0 to 6; only where the image is made with Ansible.
    #[arg(long, default_value_t = 0, value_name = "LEVEL", allow_negative_numbers = true)]
    pub(super) ansible_verbosity: i64,
    /// Accepted for scripts: no build leaves anything behind that would have to be removed.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "false",
        hide_default_value = true, default_missing_value = "true", value_name = "BOOL", value_parser = boolean)]
    pub(super) force: bool,
    /// Accept operating systems that are not released.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "false",
        hide_default_value = true, default_missing_value = "true", value_name = "BOOL", value_parser = boolean)]
    pub(super) dev: bool,
}

/// What release documents without a valid signature mean.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum SignaturePolicy {
    Require,
    Warn,
    Off,
}

impl From<SignaturePolicy> for Signatures {
    fn from(policy: SignaturePolicy) -> Self {
        match policy {
            SignaturePolicy::Require => Self::Require,
            SignaturePolicy::Warn => Self::Warn,
            SignaturePolicy::Off => Self::Off,
        }
    }
}

impl BuildFlags {
    /// The archive of manifests, if one is named.
    pub(crate) fn manifest_tarball(&self) -> Option<&PathBuf> {
        given(self.manifest_tarball.as_ref())
    }

    /// The settings for the hypervisor, if any.
    pub(super) fn config(&self, hypervisor: Hypervisor) -> Option<&PathBuf> {
        let file = match hypervisor {
            Hypervisor::Vsphere => &self.vsphere_config,
            Hypervisor::Baremetal => &self.baremetal_config,
            Hypervisor::Nutanix => &self.nutanix_config,
            Hypervisor::Cloudstack => &self.cloudstack_config,
            Hypervisor::Ami => &self.ami_config,
        };
        given(file.as_ref())
    }
}

/// A path that is not empty.
pub(super) fn given(file: Option<&PathBuf>) -> Option<&PathBuf> {
    file.filter(|file| !file.as_os_str().is_empty())
}

/// Reads a path, which may be empty.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// A truth value as Go programs take it.
pub(crate) fn boolean(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false"),
    }
}
