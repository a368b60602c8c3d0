//! Promises about files.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::{Applies, Level, Promise, Subject};
use crate::{
    contract::{Firmware, OsName, Provider, ResolvedRelease},
    native::{
        artifacts::{CNI_DIR, etcd_archive},
        bootloader, dnf, settings, subscription,
    },
};

const fn promise(
    id: &'static str,
    what: &'static str,
    applies_to: Applies,
    how: &'static str,
    check: super::Check,
) -> Promise {
    Promise { id, what, applies_to, level: Level::Tree, how, check }
}

use Applies::{Always, KnownRelease};

pub(super) const PROMISES: &[Promise] = &[
    promise(
        "programs",
        "kubelet, kubeadm, kubectl, containerd, runc, ctr, crictl and etcdadm are where EKS Anywhere calls them",
        Always,
        "each is an executable file",
        |subject| each(PROGRAMS, |path| executable(subject, path)),
    ),
    promise(
        "cni-plugins",
        "the CNI plugins are in `/opt/cni/bin`",
        Always,
        "each of them is an executable file",
        |subject| {
            each(&["bridge", "host-device", "host-local", "loopback", "portmap"], |name| {
                executable(subject, &format!("{CNI_DIR}/{name}"))
            })
        },
    ),
    promise(
        "etcd-archive",
        "etcd's archive of the release waits in etcdadm's cache",
        KnownRelease,
        "SHA-256 of the file",
        etcd_archive_is_whole,
    ),
    promise(
        "containerd-config",
        "containerd's configuration has version 2, the release's pause image and systemd's cgroups, and leaves the table \
         `registry` to EKS Anywhere",
        Always,
        "the file, read as TOML",
        containerd_config,
    ),
    promise(
        "containerd-no-proxy",
        "no proxy of the build is left to containerd",
        Always,
        "no such drop-in",
        |subject| absent(subject, "/etc/systemd/system/containerd.service.d/http-proxy.conf"),
    ),
    promise("crictl-config", "crictl speaks to containerd's socket", Always, "`/etc/crictl.yaml`", |subject| {
        contains(subject, "/etc/crictl.yaml", "unix:///var/run/containerd/containerd.sock")
    }),
    promise(
        "kubelet-unit",
        "the kubelet has its unit, kubeadm's drop-in and its environment file",
        Always,
        "the three files",
        |subject| {
            contains(subject, "/usr/lib/systemd/system/kubelet.service", "ExecStart=/usr/bin/kubelet")?;
            let drop_in = "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf";
            contains(subject, drop_in, "/var/lib/kubelet/kubeadm-flags.env")?;
            contains(subject, settings::kubelet_environment(subject.expected.os.name), "KUBELET_EXTRA_ARGS")
        },
    ),
    promise("static-pods", "`/etc/kubernetes/manifests` is there", Always, "a directory", |subject| {
        let path = "/etc/kubernetes/manifests";
        if subject.tree.path(path).is_dir() { Ok(()) } else { Err(format!("there is no directory {path}")) }
    }),
    promise(
        "kubernetes-version",
        "`/etc/kubernetes-version` names the release's Kubernetes",
        KnownRelease,
        "the file",
        |subject| contains(subject, "/etc/kubernetes-version", &release(subject)?.kubernetes_version),
    ),
    promise(
        "shell-completion",
        "bash completes kubectl, kubeadm and crictl",
        Always,
        "their files in `/usr/share/bash-completion/completions`",
        |subject| {
            each(&["kubectl", "kubeadm", "crictl"], |name| {
                contains(subject, &format!("/usr/share/bash-completion/completions/{name}"), name)
            })
        },
    ),
    promise("module-list", "overlay and br_netfilter are loaded at the start", Always, "modules-load.d", |subject| {
        let path = "/etc/modules-load.d/kubernetes.conf";
        contains(subject, path, "overlay")?;
        contains(subject, path, "br_netfilter")
    }),
    promise("no-swap", "nothing is swapped", Always, "no swap in `/etc/fstab`, no swap files", |subject| {
        let table = read(subject, "/etc/fstab")?;
        if let Some(line) = table.lines().find(|line| line.split_whitespace().nth(2) == Some("swap")) {
            return Err(format!("/etc/fstab has {line}"));
        }
        each(&["/swap.img", "/swapfile"], |path| absent(subject, path))
    }),
    promise(
        "etcd-network-tuning",
        "traffic of etcd goes first on network interfaces",
        Always,
        "udev's rule and its script",
        |subject| {
            contains(subject, "/etc/udev/rules.d/90-etcd-tuning.rules", "/usr/local/bin/etcd-network-tuning.sh")?;
            executable(subject, "/usr/local/bin/etcd-network-tuning.sh")
        },
    ),
    promise(
        "packages",
        "the packages of the recipe are installed",
        Applies::Debian,
        "dpkg's status",
        packages_installed,
    ),
    promise(
        "packages-held",
        "no package changes on a node by itself",
        Applies::Debian,
        "every package is on hold",
        packages_held,
    ),
    promise(
        "packages-excluded",
        "the packages of the recipe are installed, and none changes on a node by itself",
        Applies::Redhat,
        "dnf's list of packages that it leaves out of updates, which is made from rpm's database",
        packages_excluded,
    ),
    promise(
        "no-automatic-updates",
        "nodes are replaced, not updated in place",
        Always,
        "apt's timers and unattended-upgrades, or dnf's timers, are masked",
        |subject| {
            let units: &[_] = match subject.expected.os.name {
                OsName::Ubuntu | OsName::Debian => {
                    &["apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service"]
                }
                OsName::Redhat => &["dnf-automatic.timer", "dnf-automatic-install.timer", "dnf-makecache.timer"],
            };
            each(units, |unit| masked(subject, unit))
        },
    ),
    promise(
        "no-firewall",
        "the network plugin owns the packet filter",
        Always,
        "ufw, or firewalld, is masked",
        |subject| masked(subject, if is_redhat(subject) { "firewalld.service" } else { "ufw.service" }),
    ),
    promise("selinux-permissive", "SELinux refuses nothing", Applies::Redhat, "`/etc/selinux/config`", |subject| {
        contains(subject, "/etc/selinux/config", "\nSELINUX=permissive\n")
    }),
    promise(
        "initramfs-drivers",
        "the initial RAM disk is made for any machine, those of QEMU, vSphere and Nutanix among them",
        Applies::Redhat,
        "dracut's configuration",
        |subject| {
            contains(subject, dnf::DRACUT, "hostonly=\"no\"")?;
            each(&["virtio_scsi", "vmw_pvscsi", "vmxnet3"], |driver| contains(subject, dnf::DRACUT, driver))
        },
    ),
    promise(
        "boot-loader-entries",
        "GRUB's tools know every kernel by an entry that names the image's disk",
        Applies::Redhat,
        "`/boot/loader/entries`, GRUB's configuration",
        boot_loader_entries,
    ),
    promise(
        "no-subscription",
        "nothing of the build's subscription is left",
        Applies::Redhat,
        "no identity, no entitlement, no package source of it",
        |subject| {
            absent(subject, subscription::REPOSITORIES)?;
            each(subscription::OWN, |directory| {
                match subject.tree.files_below(directory).map_err(|error| error.to_string())?.first() {
                    Some(file) => Err(format!("there is {file}")),
                    None => Ok(()),
                }
            })
        },
    ),
    promise(
        "no-connections",
        "no network configuration competes with the node's own",
        Applies::Redhat,
        "no connections of NetworkManager, no scripts of interfaces",
        |subject| {
            nothing_like(subject, "/etc/NetworkManager/system-connections", |_| true)?;
            nothing_like(subject, "/etc/sysconfig/network-scripts", |name| {
                name.starts_with("ifcfg-") && name != "ifcfg-lo"
            })
        },
    ),
    promise(
        "cloud-init-ec2",
        "cloud-init can read the Ec2 metadata that Tinkerbell serves",
        Applies::Provider(Provider::Baremetal),
        "the data source is there and no setting leaves it out",
        ec2_possible,
    ),
    promise(
        "cloud-init-failures",
        "cloud-init goes on after user data that it can not read",
        Always,
        "its switch `ERROR_ON_USER_DATA_FAILURE`",
        |subject| {
            let directory = settings::cloud_init(subject.tree).map_err(|error| error.to_string())?;
            contains(subject, &format!("{directory}/feature_overrides.py"), "ERROR_ON_USER_DATA_FAILURE = False")
        },
    ),
    promise(
        "cloud-init-fresh",
        "cloud-init takes the first start for the first",
        Always,
        "no state, no logs",
        |subject| {
            each(&["/var/lib/cloud", "/etc/cloud/cloud-init.disabled", "/etc/cloud/ds-identify.cfg"], |path| {
                absent(subject, path)
            })
        },
    ),
    promise(
        "no-installer-settings",
        "no settings of an installer are left to cloud-init",
        Always,
        "none of their files",
        |subject| {
            each(
                &[
                    "99-installer.cfg",
                    "90-installer-network.cfg",
                    "subiquity-disable-cloudinit-networking.cfg",
                    "curtin-preserve-sources.cfg",
                ],
                |name| absent(subject, &format!("/etc/cloud/cloud.cfg.d/{name}")),
            )
        },
    ),
    promise(
        "no-netplan",
        "no network configuration competes with the node's own",
        Applies::Debian,
        "no netplan files",
        |subject| {
            each(&["/etc/netplan", "/lib/netplan"], |directory| {
                nothing_like(subject, directory, |name| has_extension(name, "yaml"))
            })
        },
    ),
    promise("no-host-keys", "every node makes its own SSH host keys", Always, "none in `/etc/ssh`", |subject| {
        nothing_like(subject, "/etc/ssh", |name| name.starts_with("ssh_host_"))
    }),
    promise(
        "no-authorized-keys",
        "nobody can log in with a key of the build",
        Always,
        "no key files of root and homes",
        |subject| {
            absent(subject, "/root/.ssh/authorized_keys")?;
            let homes = subject.tree.list("/home").map_err(|error| error.to_string())?;
            each(&homes, |home| absent(subject, &format!("/home/{home}/.ssh/authorized_keys")))
        },
    ),
    promise("no-build-user", "no account of a build is left", Always, "no user `builder`", |subject| {
        match read(subject, "/etc/passwd")?.lines().find(|line| line.starts_with("builder:")) {
            Some(_) => Err("/etc/passwd has the user builder".to_owned()),
            None => Ok(()),
        }
    }),
    promise("no-machine-id", "every node gets its own machine id", Always, "`/etc/machine-id` is empty", |subject| {
        match read(subject, "/etc/machine-id")?.trim() {
            "" => Ok(()),
            id => Err(format!("/etc/machine-id is {id}")),
        }
    }),
    promise(
        "no-package-lists",
        "no package lists and archives take room",
        Always,
        "the directories of apt, or of dnf, are empty",
        |subject| {
            if is_redhat(subject) {
                nothing_like(subject, "/var/cache/dnf", |_| true)?;
                return nothing_like(subject, "/var/cache/yum", |_| true);
            }
            nothing_like(subject, "/var/lib/apt/lists", |_| true)?;
            nothing_like(subject, "/var/cache/apt/archives", |name| has_extension(name, "deb"))
        },
    ),
    promise("no-logs", "no log speaks of the build", Always, "every file below `/var/log` is empty", |subject| {
        let logs = subject.tree.files_below("/var/log").map_err(|error| error.to_string())?;
        each(&logs, |log| match std::fs::metadata(subject.tree.path(log)).map(|found| found.len()) {
            Ok(0) => Ok(()),
            Ok(size) => Err(format!("{log} has {size} bytes")),
            Err(error) => Err(format!("{log}: {error}")),
        })
    }),
    promise("no-build-settings", "nothing that only the build needs is left", Always, "its files", |subject| {
        let files = [
            "/usr/sbin/policy-rc.d",
            "/etc/.resolv.conf.image-builder",
            "/etc/apt/apt.conf.d/90proxy",
            "/root/.bash_history",
        ];
        each(&files, |path| absent(subject, path))?;
        each(&["/run", "/tmp", "/var/tmp"], |directory| nothing_like(subject, directory, |_| true))
    }),
    promise(
        "console",
        "the kernel speaks on screen and serial line, and starts without waiting",
        Always,
        "GRUB's configuration and its defaults",
        |subject| {
            let configuration = grub_configuration(subject);
            contains(subject, &configuration, "console=tty1 console=ttyS0")?;
            contains(subject, &configuration, "set timeout=0")?;
            let redhat = is_redhat(subject);
            let defaults = if redhat { "/etc/default/grub" } else { "/etc/default/grub.d/50-cloudimg-settings.cfg" };
            contains(subject, defaults, "GRUB_TIMEOUT=0")
        },
    ),
    promise(
        "signed-boot-chain",
        "firmware with Secure Boot starts it: shim and GRUB are those that the distribution signs",
        Applies::Firmware(Firmware::Efi),
        "the packages' files",
        |subject| {
            each(&bootloader::signed_files(subject.expected.os.name), |path| {
                if subject.tree.path(path).exists() { Ok(()) } else { Err(format!("there is no {path}")) }
            })
        },
    ),
    promise(
        "open-vm-tools-nics",
        "vSphere does not take interfaces of pods for the machine's",
        Applies::Provider(Provider::Vsphere),
        "`/etc/vmware-tools/tools.conf`",
        |subject| contains(subject, "/etc/vmware-tools/tools.conf", "exclude-nics="),
    ),
    promise(
        "nutanix-disk-timeout",
        "disks of Nutanix may take 60 seconds to answer",
        Applies::Provider(Provider::Nutanix),
        "udev's rule",
        |subject| contains(subject, "/etc/udev/rules.d/99-nutanix-scsi-timeout.rules", "echo 60"),
    ),
];

const PROGRAMS: &[&str] = &[
    "/usr/bin/kubelet",
    "/usr/bin/kubeadm",
    "/usr/bin/kubectl",
    "/usr/bin/etcdadm",
    "/usr/bin/ctr",
    "/usr/bin/crictl",
    "/usr/local/bin/containerd",
    "/usr/local/bin/containerd-shim-runc-v2",
    "/usr/local/bin/ctr",
    "/usr/local/bin/crictl",
    "/usr/local/sbin/runc",
];

fn each<T>(items: &[T], check: impl Fn(&T) -> Result<(), String>) -> Result<(), String> {
    let failed: Vec<_> = items.iter().filter_map(|item| check(item).err()).collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join(", ")) }
}

fn read(subject: &Subject<'_>, path: &str) -> Result<String, String> {
    match subject.tree.read(path) {
        Ok(Some(text)) => Ok(text),
        Ok(None) => Err(format!("there is no {path}")),
        Err(error) => Err(error.to_string()),
    }
}

fn contains(subject: &Subject<'_>, path: &str, part: &str) -> Result<(), String> {
    if read(subject, path)?.contains(part) { Ok(()) } else { Err(format!("{path} does not contain {part}")) }
}

fn absent(subject: &Subject<'_>, path: &str) -> Result<(), String> {
    if subject.tree.exists(path) { Err(format!("there is {path}")) } else { Ok(()) }
}

fn executable(subject: &Subject<'_>, path: &str) -> Result<(), String> {
    if subject.tree.is_executable(path) { Ok(()) } else { Err(format!("there is no program {path}")) }
}

fn nothing_like(subject: &Subject<'_>, directory: &str, like: impl Fn(&str) -> bool) -> Result<(), String> {
    let names = subject.tree.list(directory).map_err(|error| error.to_string())?;
    match names.iter().find(|name| like(name)) {
        Some(name) => Err(format!("there is {directory}/{name}")),
        None => Ok(()),
    }
}

fn has_extension(name: &str, extension: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, end)| end == extension)
}

fn masked(subject: &Subject<'_>, unit: &str) -> Result<(), String> {
    let path = format!("/etc/systemd/system/{unit}");
    match std::fs::read_link(subject.tree.path(&path)) {
        Ok(target) if target.as_os_str() == "/dev/null" => Ok(()),
        Ok(_) | Err(_) => Err(format!("{unit} is not masked")),
    }
}

fn release<'e>(subject: &Subject<'e>) -> Result<&'e ResolvedRelease, String> {
    subject.expected.release.as_ref().ok_or_else(|| "the release is not known".to_owned())
}

/// SHA-256 of everything that is left to read, in hexadecimal.
pub(crate) fn sha256(reader: &mut impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            read => hasher.update(&buffer[..read]),
        }
    }
}

fn etcd_archive_is_whole(subject: &Subject<'_>) -> Result<(), String> {
    let etcd = &release(subject)?.etcd;
    let path = etcd_archive(&etcd.version);
    let mut file = subject.tree.open(&path).map_err(|_| format!("there is no {path}"))?;
    let found = sha256(&mut file).map_err(|error| format!("{path}: {error}"))?;
    if etcd.artifact.sha256.as_ref() == Some(&found) { Ok(()) } else { Err(format!("{path} has the digest {found}")) }
}

fn containerd_config(subject: &Subject<'_>) -> Result<(), String> {
    let path = "/etc/containerd/config.toml";
    let config: toml::Table = read(subject, path)?.parse().map_err(|error| format!("{path} is no TOML: {error}"))?;
    if config.get("version").and_then(toml::Value::as_integer) != Some(2) {
        return Err(format!("{path} is not of version 2"));
    }
    let cri = config.get("plugins").and_then(|plugins| plugins.get("io.containerd.grpc.v1.cri"));
    let cri = cri.ok_or_else(|| format!("{path} does not configure the CRI plugin"))?;
    if cri.get("registry").is_some() {
        return Err(format!("{path} defines the table registry"));
    }
    let image = cri.get("sandbox_image").and_then(toml::Value::as_str).unwrap_or_default();
    if let Some(release) = &subject.expected.release
        && image != release.pause_image
    {
        return Err(format!("sandbox_image is {image}"));
    }
    let runc = ["containerd", "runtimes", "runc", "options", "SystemdCgroup"]
        .iter()
        .try_fold(cri, |table, key| table.get(key));
    if runc.and_then(toml::Value::as_bool) == Some(true) { Ok(()) } else { Err("SystemdCgroup is not true".to_owned()) }
}

/// Name and status of every package that dpkg knows.
fn packages(subject: &Subject<'_>) -> Result<Vec<(String, String)>, String> {
    let status = read(subject, "/var/lib/dpkg/status")?;
    let field = |record: &str, name: &str| {
        record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned))
    };
    Ok(status.split("\n\n").filter_map(|record| Some((field(record, "Package")?, field(record, "Status")?))).collect())
}

fn packages_installed(subject: &Subject<'_>) -> Result<(), String> {
    let packages = packages(subject)?;
    each(&subject.expected.packages, |wanted| {
        let installed = packages.iter().any(|(name, status)| name == wanted && status.ends_with(" installed"));
        if installed { Ok(()) } else { Err(format!("{wanted} is not installed")) }
    })
}

fn packages_held(subject: &Subject<'_>) -> Result<(), String> {
    let free: Vec<_> = packages(subject)?
        .into_iter()
        .filter(|(_, status)| status.ends_with(" installed") && !status.starts_with("hold "))
        .map(|(name, _)| name)
        .collect();
    match free.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(format!("{} packages are not on hold, such as {first}", free.len())),
    }
}

fn is_redhat(subject: &Subject<'_>) -> bool {
    subject.expected.os.name == OsName::Redhat
}

fn grub_configuration(subject: &Subject<'_>) -> String {
    format!("{}/grub.cfg", bootloader::grub_dir(subject.expected.os.name))
}

fn packages_excluded(subject: &Subject<'_>) -> Result<(), String> {
    let text = read(subject, dnf::CONFIGURATION)?;
    let excluded = text.lines().find_map(|line| line.strip_prefix(dnf::EXCLUDED)).unwrap_or_default();
    each(&subject.expected.packages, |wanted| {
        let listed = excluded.split(' ').any(|name| name == wanted);
        if listed { Ok(()) } else { Err(format!("{wanted} is not installed, or may be updated")) }
    })
}

fn boot_loader_entries(subject: &Subject<'_>) -> Result<(), String> {
    let names = subject.tree.list(bootloader::ENTRIES).map_err(|error| error.to_string())?;
    if names.is_empty() {
        return Err(format!("there is nothing in {}", bootloader::ENTRIES));
    }
    let started = read(subject, &grub_configuration(subject))?;
    each(&names, |name| {
        let path = format!("{}/{name}", bootloader::ENTRIES);
        let entry = read(subject, &path)?;
        let options = entry.lines().find_map(|line| line.strip_prefix("options ")).unwrap_or_default();
        if !options.is_empty() && started.contains(options) {
            Ok(())
        } else {
            Err(format!("{path} has not the options that the image starts with"))
        }
    })
}

fn ec2_possible(subject: &Subject<'_>) -> Result<(), String> {
    let directory = settings::cloud_init(subject.tree).map_err(|error| error.to_string())?;
    let source = &format!("{directory}/sources/DataSourceEc2.py");
    if !subject.tree.exists(source) {
        return Err(format!("there is no {source}"));
    }
    let directory = "/etc/cloud/cloud.cfg.d";
    let names = subject.tree.list(directory).map_err(|error| error.to_string())?;
    let mut files: Vec<_> = names.into_iter().map(|name| format!("{directory}/{name}")).collect();
    files.push("/etc/cloud/cloud.cfg".to_owned());
    each(&files, |file| {
        let text = read(subject, file)?;
        match text.lines().find(|line| line.trim_start().starts_with("datasource_list:")) {
            Some(line) if !line.contains("Ec2") => Err(format!("{file} has {}", line.trim())),
            Some(_) | None => Ok(()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Os;
    use crate::native::{
        image_contract::{Expected, check},
        sample,
        tree::Tree,
    };

    /// A tree that keeps every promise.
    fn good(expected: &Expected) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        let mut request = sample::request();
        request.provider = expected.provider;
        request.os = expected.os.clone();
        crate::native::settings::write(&tree, &request).unwrap();
        for path in PROGRAMS {
            tree.write(path, "program", 0o755).unwrap();
        }
        for name in ["bridge", "host-device", "host-local", "loopback", "portmap"] {
            tree.write(&format!("{CNI_DIR}/{name}"), "program", 0o755).unwrap();
        }
        tree.write(&etcd_archive(&request.release.etcd.version), sample::ETCD, 0o644).unwrap();
        for name in ["kubectl", "kubeadm", "crictl"] {
            tree.write(&format!("/usr/share/bash-completion/completions/{name}"), name, 0o644).unwrap();
        }
        let records: Vec<_> =
            expected.packages.iter().map(|name| format!("Package: {name}\nStatus: hold ok installed\n")).collect();
        let status = records.join("\n");
        tree.write("/var/lib/dpkg/status", status, 0o644).unwrap();
        for unit in crate::native::settings::units(expected.os.name, expected.provider) {
            if let crate::native::settings::Unit::Masked(unit) = unit {
                tree.link(&format!("/etc/systemd/system/{unit}"), "/dev/null").unwrap();
            }
        }
        for path in [
            "/usr/lib/python3/dist-packages/cloudinit/sources/DataSourceEc2.py",
            "/usr/lib/shim/shimx64.efi.signed",
            "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        ] {
            tree.write(path, "x", 0o644).unwrap();
        }
        tree.write("/etc/cloud/cloud.cfg", "datasource_list: [NoCloud, Ec2, None]\n", 0o644).unwrap();
        tree.write("/etc/fstab", "UUID=x / ext4 defaults 0 1\n", 0o644).unwrap();
        tree.write("/etc/passwd", "root:x:0:0::/root:/bin/bash\n", 0o644).unwrap();
        tree.write("/etc/machine-id", "", 0o444).unwrap();
        tree.write("/var/log/dpkg.log", "", 0o644).unwrap();
        tree.write("/boot/grub/grub.cfg", "set timeout=0\nlinux x console=tty1 console=ttyS0\n", 0o600).unwrap();
        if expected.os.name == OsName::Redhat {
            redhat(&tree, expected);
        }
        (dir, tree)
    }

    /// What a tree of Red Hat's has beside that.
    fn redhat(tree: &Tree, expected: &Expected) {
        let version = "5.14.0-427.el9.x86_64";
        for path in [format!("/boot/vmlinuz-{version}"), format!("/boot/initramfs-{version}.img")] {
            tree.write(&path, "x", 0o600).unwrap();
        }
        for name in ["shimx64", "grubx64", "mmx64"] {
            tree.write(&format!("/boot/efi/EFI/redhat/{name}.efi"), "x", 0o700).unwrap();
        }
        bootloader::configure(tree, OsName::Redhat, uuid::Uuid::nil(), None).unwrap();
        tree.write("/etc/fstab", "UUID=x / ext4 defaults 0 1\n", 0o644).unwrap();
        dnf::prepare(tree).unwrap();
        tree.write(dnf::CONFIGURATION, format!("[main]\nexclude={}\n", expected.packages.join(" ")), 0o644).unwrap();
    }

    fn failures(tree: &Tree, expected: &Expected) -> Vec<String> {
        check(&Subject { tree, expected }, Level::Tree, None)
            .into_iter()
            .filter(|result| result.failure.is_some())
            .map(|result| result.id)
            .collect()
    }

    /// One way to break each promise, and nothing else.
    fn break_promise(id: &str, tree: &Tree, os: OsName) {
        let redhat = os == OsName::Redhat;
        let replace = |path: &str, from: &str, to: &str| {
            let text = tree.read(path).unwrap().unwrap();
            assert!(text.contains(from), "{path} does not contain {from}");
            tree.write(path, text.replace(from, to), 0o644).unwrap();
        };
        let add = |path: &str| tree.write(path, "x", 0o644).unwrap();
        match id {
            "programs" => tree.write("/usr/bin/kubeadm", "no program", 0o644).unwrap(),
            "cni-plugins" => tree.remove("/opt/cni/bin/loopback").unwrap(),
            "etcd-archive" => {
                tree.write(&etcd_archive(&sample::request().release.etcd.version), "damaged", 0o644).unwrap();
            }
            "containerd-config" => replace(
                "/etc/containerd/config.toml",
                "version = 2\n",
                "version = 2\nplugins.\"io.containerd.grpc.v1.cri\".registry.config_path = \"/etc/containerd/certs.d\"\n",
            ),
            "containerd-no-proxy" => add("/etc/systemd/system/containerd.service.d/http-proxy.conf"),
            "crictl-config" => replace("/etc/crictl.yaml", "containerd.sock", "crio.sock"),
            "kubelet-unit" => tree.remove(settings::kubelet_environment(os)).unwrap(),
            "static-pods" => tree.remove("/etc/kubernetes/manifests").unwrap(),
            "kubernetes-version" => replace("/etc/kubernetes-version", "v1.", "v0."),
            "shell-completion" => tree.remove("/usr/share/bash-completion/completions/kubeadm").unwrap(),
            "module-list" => replace("/etc/modules-load.d/kubernetes.conf", "overlay\n", ""),
            "no-swap" => replace("/etc/fstab", "UUID=x", "/swapfile none swap sw 0 0\nUUID=x"),
            "etcd-network-tuning" => tree.remove("/usr/local/bin/etcd-network-tuning.sh").unwrap(),
            "packages" => replace(
                "/var/lib/dpkg/status",
                "Package: socat\nStatus: hold ok installed",
                "Package: socat\nStatus: hold ok config-files",
            ),
            "packages-held" => {
                replace("/var/lib/dpkg/status", "Package: jq\nStatus: hold ok", "Package: jq\nStatus: install ok");
            }
            "packages-excluded" => replace(dnf::CONFIGURATION, " kernel", ""),
            "no-automatic-updates" if redhat => add("/etc/systemd/system/dnf-makecache.timer"),
            "no-automatic-updates" => add("/etc/systemd/system/apt-daily.timer"),
            "no-firewall" if redhat => tree.remove("/etc/systemd/system/firewalld.service").unwrap(),
            "no-firewall" => tree.remove("/etc/systemd/system/ufw.service").unwrap(),
            "selinux-permissive" => replace("/etc/selinux/config", "permissive", "enforcing"),
            "initramfs-drivers" => replace(dnf::DRACUT, "vmw_pvscsi", ""),
            "boot-loader-entries" => {
                let name = tree.list(bootloader::ENTRIES).unwrap().remove(0);
                replace(&format!("{}/{name}", bootloader::ENTRIES), "root=UUID=", "root=/dev/sda");
            }
            "no-subscription" => add("/etc/pki/entitlement/1-key.pem"),
            "no-connections" => add("/etc/NetworkManager/system-connections/eth0.nmconnection"),
            "cloud-init-ec2" => replace("/etc/cloud/cloud.cfg", "Ec2, ", ""),
            "cloud-init-failures" => {
                replace("/usr/lib/python3/dist-packages/cloudinit/feature_overrides.py", "False", "True");
            }
            "cloud-init-fresh" => add("/var/lib/cloud/instance"),
            "no-installer-settings" => add("/etc/cloud/cloud.cfg.d/99-installer.cfg"),
            "no-netplan" => add("/etc/netplan/50-cloud-init.yaml"),
            "no-host-keys" => add("/etc/ssh/ssh_host_rsa_key"),
            "no-authorized-keys" => add("/home/someone/.ssh/authorized_keys"),
            "no-build-user" => replace("/etc/passwd", "root:", "builder:x:1000:1000::/home/builder:/bin/bash\nroot:"),
            "no-machine-id" => tree.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n", 0o444).unwrap(),
            "no-package-lists" if redhat => add("/var/cache/dnf/baseos.solv"),
            "no-package-lists" => add("/var/lib/apt/lists/archive_Packages"),
            "no-logs" => add("/var/log/dpkg.log"),
            "no-build-settings" => add("/usr/sbin/policy-rc.d"),
            "console" => {
                replace(&format!("{}/grub.cfg", bootloader::grub_dir(os)), "set timeout=0", "set timeout=5");
            }
            "signed-boot-chain" => tree.remove(bootloader::signed_files(os)[1]).unwrap(),
            "open-vm-tools-nics" => tree.remove("/etc/vmware-tools/tools.conf").unwrap(),
            "nutanix-disk-timeout" => tree.remove("/etc/udev/rules.d/99-nutanix-scsi-timeout.rules").unwrap(),
            id => panic!("nothing here breaks {id}: add it"),
        }
    }

    #[test]
    fn every_broken_promise_is_found_and_no_other() {
        for (os, version) in [(OsName::Debian, "12"), (OsName::Redhat, "9")] {
            for provider in [Provider::Baremetal, Provider::Vsphere, Provider::Nutanix] {
                let expected = Expected { os: Os { name: os, version: version.into() }, ..sample::expected(provider) };
                let packages = crate::native::packages::recipe(&expected.os, provider, expected.firmware);
                let expected = Expected { packages: packages.into_iter().map(str::to_owned).collect(), ..expected };
                let (_dir, tree) = good(&expected);
                assert_eq!(failures(&tree, &expected), Vec::<String>::new());
                for promise in PROMISES.iter().filter(|promise| promise.applies_to.to(&expected)) {
                    let (_dir, tree) = good(&expected);
                    break_promise(promise.id, &tree, os);
                    assert_eq!(failures(&tree, &expected), [promise.id]);
                }
            }
        }
    }
}
