//! Packages of Red Hat Enterprise Linux, by dnf and rpm. Names are those of kubernetes-sigs/image-builder's roles with the
//! patches of EKS Anywhere (eksa-facts 6.5 and 6.6).

use super::{
    chroot::Chroot,
    packages::{BUILD_AUTHORITIES, InstalledPackage, Messages, PackageError, Step},
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{BuildRequest, Epel, Firmware, Provider},
    process::ProcessError,
};

/// Where package sources are named.
pub(super) const SOURCES: &str = "/etc/yum.repos.d";
/// dnf's own configuration; `/etc/yum.conf` leads to it.
pub(super) const CONFIGURATION: &str = "/etc/dnf/dnf.conf";
/// What packages can not change, see [`hold`].
pub(super) const EXCLUDED: &str = "exclude=";
/// How the initial RAM disk is made, also by a later update of the kernel.
pub(super) const DRACUT: &str = "/etc/dracut.conf.d/50-image-builder.conf";
/// Drivers of the machines that the images are for; those of a physical machine come with `hostonly="no"`.
const DRIVERS: &str = "virtio_blk virtio_net virtio_scsi vmw_pvscsi vmxnet3 nvme ahci";

/// What every node image has.
const NODE: &[&str] = &[
    "audit",
    "ca-certificates",
    "chrony",
    "conntrack-tools",
    "curl",
    "ethtool",
    "iproute-tc",
    "jq",
    "kmod",
    "libseccomp",
    "nfs-utils",
    "nftables",
    "openssh-server",
    "python3-netifaces",
    "python3-pip",
    "python3-requests",
    "socat",
    "sudo",
    "sysstat",
    "xfsprogs",
    "yum-utils",
];
/// A disk that starts by itself and configures itself.
const MACHINE: &[&str] =
    &["NetworkManager", "cloud-init", "cloud-utils-growpart", "dracut", "grubby", "kernel", "systemd-udev"];

/// What is installed, beyond what the resource names.
pub(super) fn recipe(version: &str, provider: Provider, firmware: Firmware) -> Vec<&'static str> {
    let filter = if version == "8" { "iptables" } else { "iptables-nft" };
    let extras: &[_] = match provider {
        Provider::Baremetal => &["linux-firmware"],
        Provider::Vsphere => &["open-vm-tools"],
        Provider::Nutanix => &["ipvsadm", "iscsi-initiator-utils", "lsscsi", "lvm2", "mdadm"],
    };
    let loader: &[_] = match firmware {
        Firmware::Efi => &["grub2-efi-x64", "shim-x64"],
        Firmware::Bios => &["grub2-pc", "grub2-pc-modules", "grub2-tools"],
    };
    let mut names: Vec<_> = [NODE, MACHINE, loader, extras, &[filter]].concat();
    names.sort_unstable();
    names
}

/// What has to be there before packages are: a kernel's scripts make its initial RAM disk.
pub(super) fn prepare(tree: &Tree) -> Result<(), TreeError> {
    let text = format!(
        "# For any machine, and the same each time.\nhostonly=\"no\"\nreproducible=\"yes\"\nadd_drivers+=\" {DRIVERS} \"\n"
    );
    tree.write(DRACUT, text, 0o644)
}

/// Trusts [`BUILD_AUTHORITIES`].
const AUTHORITIES: &str = "--setopt=sslcacert=/run/image-builder/authorities.crt";

/// Options of every call. `release` is the minor release to stay on.
fn options(release: Option<&str>, authorities: bool) -> Vec<&str> {
    let mut options = vec![
        "--assumeyes",
        "--setopt=install_weak_deps=False",
        "--setopt=retries=3",
        // A source that fails must not pass for one that has nothing new.
        "--setopt=skip_if_unavailable=False",
    ];
    if authorities {
        options.push(AUTHORITIES);
    }
    if let Some(release) = release {
        options.extend(["--releasever", release]);
    }
    options
}

fn release(request: &BuildRequest) -> Option<&str> {
    request.subscription.as_ref()?.release_version.as_deref()
}

/// Sets Extra Packages for Enterprise Linux up: the key, and the package that it has signed.
pub(super) async fn enable_epel(
    chroot: &Chroot,
    request: &BuildRequest,
    epel: &Epel,
    authorities: bool,
) -> Result<(), PackageError> {
    const KEY: &str = "/run/image-builder/epel.key";
    const PACKAGE: &str = "/run/image-builder/epel-release.rpm";
    let told = |error| classify("set Extra Packages for Enterprise Linux up", error);
    for (url, file) in [(&epel.key_url, KEY), (&epel.release_url, PACKAGE)] {
        download(chroot, url.as_str(), file, authorities).await.map_err(told)?;
    }
    chroot.run("rpm", &["--import", KEY]).await.map_err(told)?;
    let mut args = options(release(request), authorities);
    args.extend(["--setopt=localpkg_gpgcheck=True", "install", PACKAGE]);
    chroot.run("dnf", &args).await.map(drop).map_err(told)
}

/// Downloads a file by the image's curl.
pub(super) async fn download(chroot: &Chroot, url: &str, file: &str, authorities: bool) -> Result<(), ProcessError> {
    let mut args = vec!["--silent", "--show-error", "--fail", "--location", "--retry", "3", "--output", file];
    if authorities {
        args.extend(["--cacert", BUILD_AUTHORITIES]);
    }
    args.extend(["--", url]);
    chroot.run("curl", &args).await.map(drop)
}

/// Runs one step. `names` are the packages of [`Step::Install`].
pub(super) async fn run(
    chroot: &Chroot,
    request: &BuildRequest,
    step: Step,
    names: &[&str],
    authorities: bool,
) -> Result<(), PackageError> {
    let mut args = options(release(request), authorities);
    match step {
        Step::Lists => args.push("makecache"),
        Step::Upgrade => args.push("upgrade"),
        Step::Install => {
            args.push("install");
            args.extend(names);
        }
    }
    chroot.run("dnf", &args).await.map(drop).map_err(|error| classify(step.what(), error))
}

/// Puts every kernel with an initial RAM disk for any machine into `/boot`. Scripts of the kernel's packages may have made
/// one of those already, in a base one for the machine that made the base.
const KERNELS: &str = r#"set -eu
for modules in /lib/modules/*; do
	version=${modules##*/}
	[ -e "$modules/vmlinuz" ] || [ -e "/boot/vmlinuz-$version" ] || continue
	[ -e "/boot/vmlinuz-$version" ] || cp "$modules/vmlinuz" "/boot/vmlinuz-$version"
	[ -e "/boot/initramfs-$version.img" ] && [ "$1" -ot "/boot/initramfs-$version.img" ] ||
		dracut --force --no-hostonly --kver "$version" "/boot/initramfs-$version.img" >&2
done
"#;

/// After all packages: kernels can start, only the newest of them stays, and everything stays at its version.
pub(super) async fn finish(chroot: &Chroot) -> Result<(), PackageError> {
    let step = "finish the packages";
    let told = |error| classify(step, error);
    match chroot.run("dnf", &["--assumeyes", "remove", "--oldinstallonly"]).await {
        // It fails where there are none.
        Err(ProcessError::Failed { output, .. }) if output.contains("No old installonly packages") => {}
        removed => removed.map(drop).map_err(told)?,
    }
    chroot.run("/bin/sh", &["-c", KERNELS, "kernels", DRACUT]).await.map_err(told)?;
    chroot.run("dnf", &["clean", "all"]).await.map_err(told)?;
    let names = chroot.run("rpm", &["--query", "--all", "--queryformat", "%{NAME}\\n"]).await.map_err(told)?;
    within(chroot.root(), |tree| hold(tree, &names.stdout))??;
    // What changes left in the database's file depends on their order.
    chroot.run("rpm", &["--rebuilddb"]).await.map_err(told)?;
    Ok(())
}

/// Leaves everything that is installed out of any update, as upstream's image-builder does it.
fn hold(tree: &Tree, names: &str) -> Result<(), TreeError> {
    let mut names: Vec<_> = names.lines().filter(|name| *name != "gpg-pubkey").collect();
    names.sort_unstable();
    names.dedup();
    let text = tree.read(CONFIGURATION)?.unwrap_or_else(|| "[main]\n".to_owned());
    let kept: Vec<_> = text.lines().filter(|line| !line.starts_with(EXCLUDED)).collect();
    tree.write(CONFIGURATION, format!("{}\n{EXCLUDED}{}\n", kept.join("\n"), names.join(" ")), 0o644)
}

/// Everything that is installed, sorted by name.
pub(super) async fn list(chroot: &Chroot) -> Result<Vec<InstalledPackage>, PackageError> {
    let format = "%{NAME}\\t%{EPOCHNUM}:%{VERSION}-%{RELEASE}\\t%{ARCH}\\t%{SOURCERPM}\\n";
    let output = chroot.run("rpm", &["--query", "--all", "--queryformat", format]).await;
    let output = output.map_err(|error| classify("list the packages", error))?;
    Ok(installed(&output.stdout))
}

fn installed(listing: &str) -> Vec<InstalledPackage> {
    let mut packages: Vec<_> = listing
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            let (name, version) = (fields.next()?, fields.next()?);
            let (architecture, source) = (fields.next()?, fields.next()?);
            // Keys are listed among packages, without an architecture.
            (architecture != "(none)").then(|| InstalledPackage {
                name: name.to_owned(),
                version: version.strip_prefix("0:").unwrap_or(version).to_owned(),
                architecture: architecture.to_owned(),
                source: if source == "(none)" { String::new() } else { source.to_owned() },
                source_version: String::new(),
            })
        })
        .collect();
    packages.sort();
    packages
}

/// Of dnf, rpm and curl.
const MESSAGES: Messages = Messages {
    no_space: &["No space left on device", "more space needed on"],
    unavailable: &[
        "Failed to download metadata",
        "Cannot download",
        "Curl error",
        "curl: (",
        "Error downloading packages",
        "Could not resolve host",
        "No more mirrors to try",
    ],
    refused: &[
        "No match for argument",
        "Unable to find a match",
        "nothing provides",
        "conflicting requests",
        "All matches were filtered out",
        "no enabled repositories",
        "GPG check FAILED",
        "is not signed",
    ],
};

fn classify(step: &'static str, error: ProcessError) -> PackageError {
    MESSAGES.classify(step, error)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::contract::{Classified, FailureClass};

    #[rstest]
    #[case::unknown("No match for argument: nosuch\nError: Unable to find a match: nosuch", "PackagesRefused")]
    #[case::broken("Error: \n Problem: conflicting requests\n  - nothing provides x needed by y", "PackagesRefused")]
    #[case::no_source("Error: There are no enabled repositories in \"/etc/yum.repos.d\".", "PackagesRefused")]
    #[case::dns(
        "Error: Failed to download metadata for repo 'a': Cannot prepare internal mirrorlist: Curl error (6)",
        "PackageSourcesUnavailable"
    )]
    #[case::full("Error Summary\nAt least 12MB more space needed on the / filesystem.", "DiskFull")]
    #[case::script("Error: Transaction failed", "PackageInstallFailed")]
    fn the_message_of_dnf_tells_who_has_to_act(#[case] output: &str, #[case] reason: &str) {
        let failed = ProcessError::Failed {
            program: "dnf".into(),
            status: "exit status: 1".into(),
            code: Some(1),
            output: output.into(),
        };
        let error = classify("install packages", failed);
        assert_eq!(error.reason(), reason, "{error}");
        assert_eq!(error.class() == FailureClass::Transient, reason == "PackageSourcesUnavailable");
    }

    #[test]
    fn keys_are_no_packages_and_epochs_stay() {
        let listing = "gpg-pubkey\t0:fd431d51-4ae0493b\t(none)\t(none)\n\
                       openssl\t1:3.0.7-27.el9\tx86_64\topenssl-3.0.7-27.el9.src.rpm\n\
                       bash\t0:5.1.8-9.el9\tx86_64\tbash-5.1.8-9.el9.src.rpm\n";
        let packages = installed(listing);
        let shown: Vec<_> = packages.iter().map(|package| (package.name.as_str(), package.version.as_str())).collect();
        assert_eq!(shown, [("bash", "5.1.8-9.el9"), ("openssl", "1:3.0.7-27.el9")]);
        assert_eq!(packages[1].source, "openssl-3.0.7-27.el9.src.rpm");
    }

    #[test]
    fn everything_that_is_installed_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.write(CONFIGURATION, "[main]\ngpgcheck=1\nexclude=old\n", 0o644).unwrap();
        hold(&tree, "kernel-core\nbash\nkernel-core\ngpg-pubkey\n").unwrap();
        hold(&tree, "kernel-core\nbash\n").unwrap();
        let text = tree.read(CONFIGURATION).unwrap().unwrap();
        assert_eq!(text, "[main]\ngpgcheck=1\nexclude=bash kernel-core\n");
    }

    #[test]
    fn every_provider_has_its_extras_and_every_firmware_its_loader() {
        assert!(recipe("9", Provider::Vsphere, Firmware::Efi).contains(&"open-vm-tools"));
        assert!(recipe("9", Provider::Nutanix, Firmware::Bios).contains(&"iscsi-initiator-utils"));
        assert!(recipe("9", Provider::Baremetal, Firmware::Efi).contains(&"shim-x64"));
        let bare_metal_8 = recipe("8", Provider::Baremetal, Firmware::Bios);
        assert!(bare_metal_8.contains(&"grub2-pc-modules") && bare_metal_8.contains(&"iptables"));
    }
}
