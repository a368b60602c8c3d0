//! Packages: updates, what every node has, and what the resource asks for. Those of Debian and Ubuntu are here, those of Red
//! Hat in [`dnf`].

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    chroot::Chroot,
    dnf,
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{BuildRequest, Classified, FailureClass, Firmware, Os, OsName, Packages, Provider},
    process::ProcessError,
};

/// Ends with 101: packages must not start their services while they are installed (invoke-rc.d, deb-systemd-invoke).
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// What names the archives that a base brings along while they are switched off.
const DISABLED: &str = ".image-builder-disabled";
/// The authorities of the system and of the build, for as long as the build needs them.
pub(super) const BUILD_AUTHORITIES: &str = "/run/image-builder/authorities.crt";
/// Where systems have their authorities: Debian's family, Red Hat's.
const SYSTEM_AUTHORITIES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"];
/// GRUB's configuration of a base names a disk that is not there; package scripts would ask GRUB to renew it.
const GRUB_CONFIGURATION: &str = "/boot/grub/grub.cfg";

/// What every node image of Debian's family has (eksa-facts 6.5: the packages of image-builder's `node` role).
const NODE: &[&str] = &[
    "apt-transport-https",
    "auditd",
    "ca-certificates",
    "chrony",
    "conntrack",
    "curl",
    "ebtables",
    "ethtool",
    "gnupg",
    "iptables",
    "jq",
    "kmod",
    "libnetfilter-acct1",
    "libnetfilter-cttimeout1",
    "libnetfilter-log1",
    "libseccomp2",
    "nfs-common",
    "openssh-server",
    "python3-netifaces",
    "python3-pip",
    "socat",
    "sudo",
    "xfsprogs",
];
/// A disk that starts by itself and configures itself: kernel, signed boot loader, cloud-init.
const MACHINE: &[&str] =
    &["cloud-guest-utils", "cloud-init", "grub2-common", "initramfs-tools", "netplan.io", "systemd-sysv", "udev"];

/// Why packages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("a package does not exist or can not be installed: correct spec.packages. {}", last_errors(.output))]
    Refused { output: String },
    #[error("the package sources do not answer as they should: {}", last_errors(.output))]
    SourcesUnavailable { output: String },
    #[error("there is no space left for packages; give the build more disk (spec.build.resources)")]
    NoSpace,
    #[error("can not {step}")]
    Step { step: &'static str, source: ProcessError },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for PackageError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Refused { .. } => FailureClass::BadInput,
            Self::SourcesUnavailable { .. } => FailureClass::Transient,
            Self::NoSpace => FailureClass::Environment,
            Self::Step { source, .. } => source.class(),
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "PackagesRefused",
            Self::SourcesUnavailable { .. } => "PackageSourcesUnavailable",
            Self::NoSpace => "DiskFull",
            Self::Step { source: ProcessError::Failed { .. }, .. } => "PackageInstallFailed",
            Self::Step { source, .. } => source.reason(),
            Self::Tree(error) => error.reason(),
        }
    }
}

/// apt and dnf mark what matters in their output.
fn last_errors(output: &str) -> String {
    const MARKS: [&str; 6] = ["E:", "W:", "Error:", " Problem", "  - ", "No match"];
    let is_marked = |line: &&str| MARKS.iter().any(|mark| line.starts_with(mark));
    let marked: Vec<_> = output.lines().filter(is_marked).map(str::trim).collect();
    if marked.is_empty() { output.to_owned() } else { marked.join(" ") }
}

/// What is installed, beyond what the resource names.
pub(super) fn recipe(os: &Os, provider: Provider, firmware: Firmware) -> Vec<&'static str> {
    if os.name == OsName::Redhat {
        return dnf::recipe(&os.version, provider, firmware);
    }
    let kernel: &[_] = match (os.name, provider) {
        (OsName::Debian, _) => &["linux-image-amd64"],
        (_, Provider::Baremetal) => &["linux-image-generic", "linux-tools-generic", "linux-cloud-tools-generic"],
        (_, _) => &["linux-image-generic", "linux-tools-virtual", "linux-cloud-tools-virtual"],
    };
    // Debian has no packages of these names.
    let initramfs: &[_] = match os.name {
        OsName::Ubuntu => &["cloud-initramfs-copymods", "cloud-initramfs-dyn-netconf"],
        OsName::Debian | OsName::Redhat => &[],
    };
    let extras: &[_] = match provider {
        Provider::Baremetal => &[],
        Provider::Vsphere => &["open-vm-tools"],
        Provider::Nutanix => &["ipvsadm", "lsscsi", "lvm2", "mdadm", "open-iscsi", "sysstat"],
    };
    let loader: &[_] = match firmware {
        Firmware::Efi => &["grub-efi-amd64-signed", "shim-signed"],
        Firmware::Bios => &["grub-pc-bin"],
    };
    let mut names: Vec<_> = [NODE, MACHINE, kernel, initramfs, loader, extras].concat();
    names.sort_unstable();
    names
}

/// Sets the sources up for the build: the resource's own, the base's switched off where asked, the build's authorities.
pub(super) fn prepare(
    root: &Path,
    os: OsName,
    packages: &Packages,
    authorities: Option<&str>,
) -> Result<(), PackageError> {
    Ok(within(root, |tree| prepare_tree(tree, os, packages, authorities))??)
}

fn prepare_tree(tree: &Tree, os: OsName, packages: &Packages, authorities: Option<&str>) -> Result<(), TreeError> {
    match os {
        OsName::Ubuntu | OsName::Debian => {
            tree.write(POLICY, "#!/bin/sh\nexit 101\n", 0o755)?;
            tree.remove(GRUB_CONFIGURATION)?;
        }
        OsName::Redhat => dnf::prepare(tree)?,
    }
    if packages.disable_public_repositories {
        for file in sources(tree, os)? {
            tree.rename(&file, &format!("{file}{DISABLED}"))?;
        }
    }
    for (name, content) in &packages.repositories {
        let file = match os {
            OsName::Ubuntu | OsName::Debian => source_file(name, content),
            OsName::Redhat => format!("{}/{name}.repo", dnf::SOURCES),
        };
        tree.write(&file, content, 0o644)?;
    }
    if let Some(authorities) = authorities {
        let mut all = String::new();
        for path in SYSTEM_AUTHORITIES {
            all.push_str(&tree.read(path)?.unwrap_or_default());
        }
        tree.write(BUILD_AUTHORITIES, format!("{all}\n{authorities}\n"), 0o644)?;
    }
    Ok(())
}

/// The files that name archives.
fn sources(tree: &Tree, os: OsName) -> Result<Vec<String>, TreeError> {
    if os == OsName::Redhat {
        let names = tree.list(dnf::SOURCES)?.into_iter().map(|name| format!("{}/{name}", dnf::SOURCES));
        return Ok(names.filter(|file| Path::new(file).extension().is_some_and(|end| end == "repo")).collect());
    }
    let below = tree.list("/etc/apt/sources.list.d")?.into_iter().map(|name| format!("/etc/apt/sources.list.d/{name}"));
    let is_source = |file: &String| {
        let extension = Path::new(file).extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("list" | "sources"))
    };
    let all = std::iter::once("/etc/apt/sources.list".to_owned()).chain(below).filter(is_source);
    Ok(all.filter(|file| tree.exists(file)).collect())
}

/// apt tells the two formats apart by the file's name.
fn source_file(name: &str, content: &str) -> String {
    let deb822 = content.lines().any(|line| line.trim_start().to_ascii_lowercase().starts_with("types:"));
    let extension = if deb822 { "sources" } else { "list" };
    format!("/etc/apt/sources.list.d/{name}.{extension}")
}

/// Undoes what [`prepare`] set up for the build alone. The resource's own sources stay.
pub(super) fn restore(tree: &Tree) -> Result<(), TreeError> {
    tree.remove(POLICY)?;
    for directory in ["/etc/apt", "/etc/apt/sources.list.d", dnf::SOURCES] {
        for name in tree.list(directory)? {
            if let Some(original) = name.strip_suffix(DISABLED) {
                tree.rename(&format!("{directory}/{name}"), &format!("{directory}/{original}"))?;
            }
        }
    }
    Ok(())
}

/// A step of the installation, for progress.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    Lists,
    Upgrade,
    Install,
}

impl Step {
    pub(super) const ALL: [Self; 3] = [Self::Lists, Self::Upgrade, Self::Install];

    pub(super) const fn message(self) -> &'static str {
        match self {
            Self::Lists => "reading package lists",
            Self::Upgrade => "installing updates",
            Self::Install => "installing packages",
        }
    }

    pub(super) const fn what(self) -> &'static str {
        match self {
            Self::Lists => "read the package lists",
            Self::Upgrade => "install updates",
            Self::Install => "install packages",
        }
    }
}

/// Runs one step. `names` are the packages of [`Step::Install`].
pub(super) async fn run(
    chroot: &Chroot,
    request: &BuildRequest,
    step: Step,
    names: &[&str],
    authorities: bool,
) -> Result<(), PackageError> {
    match request.os.name {
        OsName::Ubuntu | OsName::Debian => run_apt(chroot, step, names, authorities).await,
        OsName::Redhat => dnf::run(chroot, request, step, names, authorities).await,
    }
}

async fn run_apt(chroot: &Chroot, step: Step, names: &[&str], authorities: bool) -> Result<(), PackageError> {
    let ca_info = format!("Acquire::https::CAInfo={BUILD_AUTHORITIES}");
    let mut args = vec![
        "--yes",
        "-o",
        "Acquire::Retries=3",
        // A source that fails must not pass for one that has nothing new.
        "-o",
        "APT::Update::Error-Mode=any",
        "-o",
        "Dpkg::Options::=--force-confdef",
        "-o",
        "Dpkg::Options::=--force-confold",
        // The whole tree is thrown away when the build is killed: nothing has to survive a crash.
        "-o",
        "Dpkg::Options::=--force-unsafe-io",
        "-o",
        "Dpkg::Use-Pty=0",
        "-o",
        "APT::Sandbox::User=root",
    ];
    if authorities {
        args.extend(["-o", ca_info.as_str()]);
    }
    match step {
        Step::Lists => args.push("update"),
        Step::Upgrade => args.extend(["dist-upgrade"]),
        Step::Install => {
            args.extend(["install", "--no-install-recommends", "--allow-change-held-packages", "--"]);
            args.extend(names);
        }
    }
    match chroot.run("apt-get", &args).await {
        Ok(_) => Ok(()),
        Err(error) => Err(classify(step.what(), error)),
    }
}

/// After all packages: what nothing needs any more goes, and everything stays at its version.
pub(super) async fn finish(chroot: &Chroot, os: OsName) -> Result<(), PackageError> {
    if os == OsName::Redhat {
        return dnf::finish(chroot).await;
    }
    let step = "finish the packages";
    let told = |error| classify(step, error);
    chroot.run("apt-get", &["--yes", "-o", "Dpkg::Use-Pty=0", "autoremove", "--purge"]).await.map_err(told)?;
    chroot.run("apt-get", &["clean"]).await.map_err(told)?;
    let hold = "dpkg-query --show --showformat '${binary:Package} hold\\n' | dpkg --set-selections";
    chroot.run("/bin/sh", &["-c", hold]).await.map_err(told)?;
    Ok(())
}

/// A package that is installed in the image.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Serialize, Deserialize)]
pub struct InstalledPackage {
    pub name: String,
    pub version: String,
    /// `amd64`, or `all` where it does not matter; `x86_64` and `noarch` of Red Hat's.
    pub architecture: String,
    /// The package of sources it was made from, which security notices name; the name of its file where it is Red Hat's.
    pub source: String,
    /// Empty where `source` says it.
    pub source_version: String,
}

/// Everything that is installed, sorted by name.
pub(super) async fn list(chroot: &Chroot, os: OsName) -> Result<Vec<InstalledPackage>, PackageError> {
    if os == OsName::Redhat {
        return dnf::list(chroot).await;
    }
    let format = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\t${source:Version}\n";
    let output = chroot.run("dpkg-query", &["--show", "--showformat", format]).await;
    let output = output.map_err(|error| classify("list the packages", error))?;
    Ok(installed(&output.stdout))
}

/// Reads a list of packages: a line each, with status, name, version, architecture, source and its version between tabs.
pub(crate) fn installed(listing: &str) -> Vec<InstalledPackage> {
    let mut packages: Vec<_> = listing
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t').map(str::to_owned);
            let status = fields.next()?;
            let mut next = || fields.next();
            let package = InstalledPackage {
                name: next()?,
                version: next()?,
                architecture: next()?,
                source: next()?,
                source_version: next()?,
            };
            // The second letter is what it is, the first what it should be.
            (status.as_bytes().get(1) == Some(&b'i')).then_some(package)
        })
        .collect();
    packages.sort();
    packages
}

/// Messages of a program that has one exit code for everything. They are not translated here, and tell who has to act.
pub(super) struct Messages {
    pub(super) no_space: &'static [&'static str],
    pub(super) unavailable: &'static [&'static str],
    pub(super) refused: &'static [&'static str],
}

impl Messages {
    pub(super) fn classify(&self, step: &'static str, error: ProcessError) -> PackageError {
        let ProcessError::Failed { output, .. } = &error else { return PackageError::Step { step, source: error } };
        let has = |texts: &[&str]| texts.iter().any(|text| output.contains(text));
        if has(self.no_space) {
            PackageError::NoSpace
        } else if has(self.unavailable) {
            PackageError::SourcesUnavailable { output: output.clone() }
        } else if has(self.refused) {
            PackageError::Refused { output: output.clone() }
        } else {
            PackageError::Step { step, source: error }
        }
    }
}

/// Of apt-get and dpkg.
const MESSAGES: Messages = Messages {
    no_space: &["No space left on device", "You don't have enough free space"],
    unavailable: &[
        "Failed to fetch",
        "Temporary failure resolving",
        "Could not resolve",
        "Could not connect",
        "Connection failed",
        "Connection timed out",
        "Hash Sum mismatch",
        "Some index files failed",
        "is not signed",
        "Release file",
        "NO_PUBKEY",
        "certificate",
    ],
    refused: &[
        "Unable to locate package",
        "has no installation candidate",
        "was not found",
        "unmet dependencies",
        "Unable to correct problems",
        "Couldn't find any package",
    ],
};

fn classify(step: &'static str, error: ProcessError) -> PackageError {
    MESSAGES.classify(step, error)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::unknown("E: Unable to locate package nosuch", FailureClass::BadInput, "PackagesRefused")]
    #[case::version("E: Version '9' for 'jq' was not found", FailureClass::BadInput, "PackagesRefused")]
    #[case::dns(
        "W: Failed to fetch http://m/  Temporary failure resolving 'm'",
        FailureClass::Transient,
        "PackageSourcesUnavailable"
    )]
    #[case::full("dpkg: error: No space left on device", FailureClass::Environment, "DiskFull")]
    #[case::script("dpkg: error processing package x", FailureClass::Internal, "PackageInstallFailed")]
    fn the_message_of_apt_tells_who_has_to_act(
        #[case] output: &str,
        #[case] class: FailureClass,
        #[case] reason: &str,
    ) {
        let failed = ProcessError::Failed {
            program: "apt-get".into(),
            status: "exit status: 100".into(),
            code: Some(100),
            output: output.into(),
        };
        let error = classify("install packages", failed);
        assert_eq!((error.class(), error.reason()), (class, reason), "{error}");
    }

    #[test]
    fn packages_that_were_removed_are_not_listed() {
        let listing = "ii \tzlib1g\t1:1.2.13\tamd64\tzlib\t1:1.2.13\nrc \told\t1\tall\told\t1\n\
                       hi \tapt\t2.6.1\tamd64\tapt\t2.6.1\n";
        let packages = installed(listing);
        let names: Vec<_> = packages.iter().map(|package| (package.name.as_str(), package.source.as_str())).collect();
        assert_eq!(names, [("apt", "apt"), ("zlib1g", "zlib")]);
    }

    #[test]
    fn sources_are_switched_off_and_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.write("/etc/apt/sources.list", "deb http://public ./", 0o644).unwrap();
        tree.write("/etc/apt/sources.list.d/ubuntu.sources", "Types: deb", 0o644).unwrap();
        let packages = Packages {
            install: vec![],
            repositories: BTreeMap::from([
                ("own".into(), "deb http://own ./".into()),
                ("new".into(), "Types: deb".into()),
            ]),
            disable_public_repositories: true,
            epel: None,
        };
        prepare_tree(&tree, OsName::Debian, &packages, None).unwrap();
        assert_eq!(
            sources(&tree, OsName::Debian).unwrap(),
            ["/etc/apt/sources.list.d/new.sources", "/etc/apt/sources.list.d/own.list"]
        );
        assert!(tree.is_executable(POLICY));
        restore(&tree).unwrap();
        assert_eq!(sources(&tree, OsName::Debian).unwrap().len(), 4);
        assert_eq!(tree.read("/etc/apt/sources.list").unwrap().as_deref(), Some("deb http://public ./"));
        assert!(!tree.exists(POLICY));
    }

    #[test]
    fn every_provider_has_a_kernel_and_its_extras() {
        let system = |name, version: &str| Os { name, version: version.into() };
        let (ubuntu, debian) = (system(OsName::Ubuntu, "22.04"), system(OsName::Debian, "12"));
        assert!(recipe(&ubuntu, Provider::Baremetal, Firmware::Efi).contains(&"linux-tools-generic"));
        assert!(recipe(&ubuntu, Provider::Vsphere, Firmware::Bios).contains(&"open-vm-tools"));
        assert!(recipe(&debian, Provider::Nutanix, Firmware::Bios).contains(&"open-iscsi"));
        assert!(recipe(&debian, Provider::Baremetal, Firmware::Efi).contains(&"linux-image-amd64"));
    }
}
