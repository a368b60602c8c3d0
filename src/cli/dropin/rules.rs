//! Which flags go together: the rules of the EKS Anywhere CLI, in its order. Pure.

use std::fmt;

use super::{
    UsageError,
    flags::{BuildFlags, given},
};
use crate::contract::{Firmware, OsName, Signatures};

/// What the image is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Hypervisor {
    Vsphere,
    Baremetal,
    Nutanix,
    Cloudstack,
    Ami,
}

impl Hypervisor {
    const ALL: [Self; 5] = [Self::Vsphere, Self::Baremetal, Self::Nutanix, Self::Cloudstack, Self::Ami];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Vsphere => "vsphere",
            Self::Baremetal => "baremetal",
            Self::Nutanix => "nutanix",
            Self::Cloudstack => "cloudstack",
            Self::Ami => "ami",
        }
    }
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an image for vSphere comes about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Builder {
    Iso,
    Clone,
}

/// Flags that go together, with their defaults filled in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Choice {
    pub(super) os: OsName,
    /// With its dot: `22.04`, `9`.
    pub(super) os_version: String,
    pub(super) hypervisor: Hypervisor,
    /// With a dash: `1-31`.
    pub(super) channel: String,
    pub(super) firmware: Firmware,
    pub(super) builder: Builder,
    pub(super) eksa_release: Option<String>,
    /// URL of the EKS Anywhere release manifest, unless it is the public one.
    pub(super) release_manifest_url: Option<String>,
    pub(super) signatures: Signatures,
    pub(super) air_gapped: bool,
    pub(super) ansible_verbosity: u8,
}

/// The flags, if they go together, and what has no effect.
pub(super) fn choose(flags: &BuildFlags) -> Result<(Choice, Vec<String>), UsageError> {
    let os = match flags.os.as_str() {
        "ubuntu" => OsName::Ubuntu,
        "redhat" => OsName::Redhat,
        // Not in the original, which is no reason to keep it from people who build it in a cluster.
        "debian" => OsName::Debian,
        other => return Err(UsageError::flag("--os", other, "write ubuntu, redhat or debian")),
    };
    let hypervisor = Hypervisor::ALL.into_iter().find(|known| known.as_str() == flags.hypervisor).ok_or_else(|| {
        let expected = "write vsphere, baremetal, nutanix, cloudstack or ami";
        UsageError::flag("--hypervisor", &flags.hypervisor, expected)
    })?;
    match (hypervisor, os) {
        (Hypervisor::Cloudstack, OsName::Ubuntu | OsName::Debian) => {
            return Err(UsageError::flag(
                "--os",
                &flags.os,
                "write redhat: cloudstack images are built of redhat only",
            ));
        }
        (Hypervisor::Ami, OsName::Redhat | OsName::Debian) => {
            return Err(UsageError::flag("--os", &flags.os, "write ubuntu: ami images are built of ubuntu only"));
        }
        (_, _) => {}
    }
    let ansible_verbosity =
        u8::try_from(flags.ansible_verbosity).ok().filter(|level| *level <= 6).ok_or_else(|| {
            UsageError::flag("--ansible-verbosity", &flags.ansible_verbosity.to_string(), "write a number from 0 to 6")
        })?;
    let os_version = os_version(os, flags)?;
    let firmware = firmware(os, &os_version, hypervisor, &flags.firmware)?;
    air_gapped(os, hypervisor, flags)?;
    let mut warnings = vec![];
    let builder = match (flags.builder.as_str(), hypervisor) {
        ("iso", _) => Builder::Iso,
        ("clone", Hypervisor::Vsphere) => Builder::Clone,
        (other, Hypervisor::Vsphere) => {
            return Err(UsageError::flag("--builder", other, "write iso or clone"));
        }
        (other, _) => {
            warnings.push(format!("--builder {other} has no effect: it is for --hypervisor vsphere"));
            Builder::Iso
        }
    };
    let choice = Choice {
        os,
        os_version,
        hypervisor,
        channel: channel(&flags.release_channel)?,
        firmware,
        builder,
        eksa_release: Some(flags.eksa_release.clone()).filter(|version| !version.is_empty()),
        release_manifest_url: Some(flags.release_manifest_url.clone()).filter(|url| !url.is_empty()),
        signatures: flags.signatures.into(),
        air_gapped: flags.air_gapped,
        ansible_verbosity,
    };
    if flags.config(hypervisor).is_none() {
        let needed = match hypervisor {
            Hypervisor::Vsphere | Hypervisor::Nutanix | Hypervisor::Cloudstack => true,
            // Without a file there are no mirrors.
            Hypervisor::Baremetal => os != OsName::Ubuntu || flags.air_gapped,
            Hypervisor::Ami => false,
        };
        if needed {
            let because = if flags.air_gapped { "with --air-gapped " } else { "" };
            return Err(UsageError::flags(
                format!("--{hypervisor}-config is missing"),
                format!("{because}--hypervisor {hypervisor} and --os {os} need the JSON file with the settings"),
            ));
        }
    }
    Ok((choice, warnings))
}

fn os_version(os: OsName, flags: &BuildFlags) -> Result<String, UsageError> {
    let (default, known) = match os {
        OsName::Ubuntu => ("22.04", "write 22.04 or 24.04"),
        OsName::Redhat => ("8", "write 8 or 9"),
        OsName::Debian => ("12", "write 12"),
    };
    match (os, flags.os_version.as_str()) {
        (_, "") => Ok(default.to_owned()),
        (OsName::Ubuntu, version @ ("22.04" | "24.04"))
        | (OsName::Redhat, version @ ("8" | "9"))
        | (OsName::Debian, version @ "12") => Ok(version.to_owned()),
        (OsName::Ubuntu, "20.04") if flags.dev => Ok("20.04".to_owned()),
        (_, other) => Err(UsageError::flag("--os-version", other, format!("{known} for {os}"))),
    }
}

fn firmware(os: OsName, version: &str, hypervisor: Hypervisor, wanted: &str) -> Result<Firmware, UsageError> {
    let efi_disk = hypervisor == Hypervisor::Baremetal && (os != OsName::Redhat || version == "9");
    let expected = |text: &str| Err(UsageError::flag("--firmware", wanted, text));
    match wanted {
        "" if efi_disk => Ok(Firmware::Efi),
        "efi" if !matches!(hypervisor, Hypervisor::Vsphere | Hypervisor::Baremetal) => {
            expected(&format!("write bios, or leave it out: {hypervisor} images start by bios"))
        }
        "efi" if os == OsName::Redhat && version != "9" => {
            expected("write bios, or leave it out: redhat 8 images start by bios")
        }
        "efi" => Ok(Firmware::Efi),
        "bios" if efi_disk => expected("write efi, or leave it out: these baremetal images start by efi"),
        "" | "bios" => Ok(Firmware::Bios),
        _ => expected("write bios or efi"),
    }
}

fn air_gapped(os: OsName, hypervisor: Hypervisor, flags: &BuildFlags) -> Result<(), UsageError> {
    if !flags.air_gapped {
        return Ok(());
    }
    if given(flags.manifest_tarball.as_ref()).is_none() {
        return Err(UsageError::flags(
            "--air-gapped needs --manifest-tarball",
            "run `image-builder download manifests` where the Internet is, and name its archive",
        ));
    }
    if os == OsName::Redhat {
        return Err(UsageError::flags("--air-gapped builds no redhat", "write --os ubuntu"));
    }
    if hypervisor == Hypervisor::Ami {
        return Err(UsageError::flags(
            "--air-gapped builds no ami",
            "write --hypervisor baremetal, vsphere, nutanix or cloudstack",
        ));
    }
    Ok(())
}

/// `1-31` from `1-31` or `1.31`.
pub(crate) fn channel(text: &str) -> Result<String, UsageError> {
    let channel = text.replace('.', "-");
    let minor = channel.strip_prefix("1-").unwrap_or_default();
    if (1..=3).contains(&minor.len()) && minor.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(channel);
    }
    Err(UsageError::flag("--release-channel", text, "write 1-31 or 1.31 for Kubernetes 1.31"))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{
        super::testing::{flags, try_flags},
        *,
    };

    const CONFIGS: &str =
        "--vsphere-config c --baremetal-config c --nutanix-config c --cloudstack-config c --ami-config c";

    /// Combinations that are accepted.
    struct Row {
        os: &'static str,
        versions: &'static [&'static str],
        hypervisor: &'static str,
        builders: &'static [&'static str],
        /// The first one is the default.
        firmwares: &'static [&'static str],
    }

    const fn row(
        os: &'static str,
        versions: &'static [&'static str],
        hypervisor: &'static str,
        builders: &'static [&'static str],
        firmwares: &'static [&'static str],
    ) -> Row {
        Row { os, versions, hypervisor, builders, firmwares }
    }

    const ACCEPTED: [Row; 13] = [
        // Ours.
        row("debian", &["12"], "vsphere", &["iso", "clone"], &["bios", "efi"]),
        row("debian", &["12"], "baremetal", &["iso"], &["efi"]),
        row("debian", &["12"], "nutanix", &["iso"], &["bios"]),
        // The original's.
        row("ubuntu", &["22.04", "24.04"], "vsphere", &["iso", "clone"], &["bios", "efi"]),
        row("ubuntu", &["22.04", "24.04"], "baremetal", &["iso"], &["efi"]),
        row("ubuntu", &["22.04", "24.04"], "nutanix", &["iso"], &["bios"]),
        row("ubuntu", &["22.04", "24.04"], "ami", &["iso"], &["bios"]),
        row("redhat", &["8"], "vsphere", &["iso", "clone"], &["bios"]),
        row("redhat", &["8"], "baremetal", &["iso"], &["bios"]),
        row("redhat", &["8", "9"], "nutanix", &["iso"], &["bios"]),
        row("redhat", &["8", "9"], "cloudstack", &["iso"], &["bios"]),
        row("redhat", &["9"], "vsphere", &["iso", "clone"], &["bios", "efi"]),
        row("redhat", &["9"], "baremetal", &["iso"], &["efi"]),
    ];

    fn check(os: &str, version: &str, hypervisor: &str, builder: &str, firmware: &str) -> bool {
        let line = format!("--os {os} --os-version {version} --hypervisor {hypervisor} {CONFIGS} --builder {builder}");
        let line = format!("{line} --firmware={firmware}");
        let row = ACCEPTED.iter().find(|row| {
            row.os == os
                && row.hypervisor == hypervisor
                && row.versions.contains(&version)
                && (firmware.is_empty() || row.firmwares.contains(&firmware))
        });
        match (choose(&flags(&line)), row) {
            (Ok((choice, warnings)), Some(row)) => {
                let chosen = if choice.firmware == Firmware::Bios { "bios" } else { "efi" };
                assert_eq!(chosen, if firmware.is_empty() { row.firmwares[0] } else { firmware }, "{line}");
                // Where there is nothing to choose the original ignores the builder without a word.
                let ignored = !row.builders.contains(&builder);
                assert_eq!(choice.builder == Builder::Clone, builder == "clone" && !ignored, "{line}");
                assert_eq!(!warnings.is_empty(), ignored, "{line}: {warnings:?}");
                true
            }
            (Err(_), None) => false,
            (result, _) => panic!("{line}: {result:?}"),
        }
    }

    #[test]
    fn accepts_the_combinations_of_the_original_and_those_of_debian() {
        let mut accepted = 0;
        for os in ["ubuntu", "redhat", "debian", "Ubuntu", "bottlerocket"] {
            for version in ["22.04", "24.04", "20.04", "2204", "8", "9", "10", "12"] {
                for hypervisor in ["vsphere", "baremetal", "nutanix", "cloudstack", "ami", "VSphere", "snow"] {
                    for builder in ["iso", "clone"] {
                        for firmware in ["", "bios", "efi", "uefi"] {
                            accepted += usize::from(check(os, version, hypervisor, builder, firmware));
                        }
                    }
                }
            }
        }
        // With each builder; for each version, with each firmware and with none.
        let each = |row: &Row| 2 * row.versions.len() * (row.firmwares.len() + 1);
        assert_eq!(accepted, ACCEPTED.iter().map(each).sum::<usize>());
    }

    #[rstest]
    #[case::os("--os centos --hypervisor vsphere", "--os is `centos`: write ubuntu, redhat or debian")]
    #[case::os_case("--os Ubuntu --hypervisor vsphere", "--os is `Ubuntu`")]
    #[case::hypervisor("--os ubuntu --hypervisor kvm", "vsphere, baremetal, nutanix, cloudstack or ami")]
    #[case::cloudstack("--os ubuntu --hypervisor cloudstack", "redhat only")]
    #[case::ami("--os redhat --hypervisor ami", "ubuntu only")]
    #[case::verbosity_high("--os ubuntu --hypervisor baremetal --ansible-verbosity 7", "from 0 to 6")]
    #[case::verbosity_low("--os ubuntu --hypervisor baremetal --ansible-verbosity -1", "from 0 to 6")]
    #[case::redhat_version("--os redhat --os-version 7 --hypervisor vsphere", "write 8 or 9 for redhat")]
    #[case::ubuntu_version("--os ubuntu --os-version 20.04 --hypervisor vsphere", "write 22.04 or 24.04 for ubuntu")]
    #[case::firmware("--os ubuntu --hypervisor vsphere --firmware uefi", "write bios or efi")]
    #[case::efi_nutanix("--os ubuntu --hypervisor nutanix --firmware efi", "nutanix images start by bios")]
    #[case::efi_cloudstack("--os redhat --hypervisor cloudstack --firmware efi", "cloudstack images start by bios")]
    #[case::efi_redhat_8(
        "--os redhat --os-version 8 --hypervisor vsphere --firmware efi",
        "redhat 8 images start by bios"
    )]
    #[case::bios_disk("--os ubuntu --hypervisor baremetal --firmware bios", "start by efi")]
    #[case::bios_redhat_9("--os redhat --os-version 9 --hypervisor baremetal --firmware bios", "start by efi")]
    #[case::no_tarball("--os ubuntu --hypervisor baremetal --air-gapped", "needs --manifest-tarball")]
    #[case::air_gapped_redhat("--os redhat --hypervisor vsphere --air-gapped --manifest-tarball t", "builds no redhat")]
    #[case::air_gapped_ami("--os ubuntu --hypervisor ami --air-gapped --manifest-tarball t", "builds no ami")]
    #[case::builder("--os ubuntu --hypervisor vsphere --builder ova", "write iso or clone")]
    #[case::channel("--os ubuntu --hypervisor vsphere --release-channel v1.31", "write 1-31 or 1.31")]
    #[case::channel_patch("--os ubuntu --hypervisor vsphere --release-channel 1.31.2", "write 1-31 or 1.31")]
    fn refuses_what_the_original_refuses_and_says_what_to_write(#[case] line: &str, #[case] message: &str) {
        let error = choose(&flags(&format!("{line} {CONFIGS}"))).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[rstest]
    #[case("--os ubuntu --hypervisor vsphere", "--vsphere-config is missing")]
    #[case("--os ubuntu --hypervisor nutanix --nutanix-config=", "--nutanix-config is missing")]
    #[case("--os redhat --hypervisor cloudstack", "--cloudstack-config is missing")]
    #[case("--os redhat --hypervisor baremetal", "--baremetal-config is missing")]
    #[case("--os ubuntu --hypervisor baremetal --air-gapped --manifest-tarball t", "--baremetal-config is missing")]
    fn settings_are_needed_where_the_original_needs_them(#[case] line: &str, #[case] message: &str) {
        let error = choose(&flags(line)).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }

    #[rstest]
    #[case("--os ubuntu --hypervisor baremetal")]
    #[case("--os ubuntu --hypervisor ami")]
    fn settings_are_optional_where_the_original_needs_none(#[case] line: &str) {
        choose(&flags(line)).unwrap();
    }

    #[test]
    fn defaults_are_those_of_the_original() {
        let (choice, warnings) = choose(&flags("--os ubuntu --hypervisor baremetal")).unwrap();
        let expected = Choice {
            os: OsName::Ubuntu,
            os_version: "22.04".into(),
            hypervisor: Hypervisor::Baremetal,
            channel: "1-31".into(),
            firmware: Firmware::Efi,
            builder: Builder::Iso,
            eksa_release: None,
            release_manifest_url: None,
            signatures: Signatures::Warn,
            air_gapped: false,
            ansible_verbosity: 0,
        };
        assert_eq!((choice, warnings), (expected, vec![]));
        let (choice, _) = choose(&flags("--os redhat --hypervisor vsphere --vsphere-config c")).unwrap();
        assert_eq!(choice.os_version, "8");
    }

    #[rstest]
    #[case::dash("1-31", "1-31")]
    #[case::dot("1.31", "1-31")]
    #[case::later("1-36", "1-36")]
    fn channels_are_written_with_a_dash_or_a_dot(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(channel(text).unwrap(), expected);
    }

    #[rstest]
    // Today's and the first version's spellings of flags.
    #[case::v0_1_2("--os ubuntu --hypervisor baremetal --release-channel 1-23 --force")]
    #[case::equals("--os=ubuntu --hypervisor=baremetal --force=true --air-gapped=false --dev=T")]
    #[case::empty(
        "--os ubuntu --hypervisor baremetal --firmware= --eksa-release= --files-config= --os-version= --manifest-tarball="
    )]
    #[case::dev("--os ubuntu --os-version 20.04 --dev --hypervisor baremetal")]
    fn flags_are_taken_as_scripts_write_them(#[case] line: &str) {
        choose(&flags(line)).unwrap();
    }

    #[rstest]
    #[case::no_os("--hypervisor baremetal")]
    #[case::no_hypervisor("--os ubuntu")]
    #[case::boolean("--os ubuntu --hypervisor baremetal --force=maybe")]
    #[case::number("--os ubuntu --hypervisor baremetal --ansible-verbosity many")]
    fn lines_that_are_no_flags_are_refused_at_once(#[case] line: &str) {
        assert!(try_flags(line).is_err());
    }
}
