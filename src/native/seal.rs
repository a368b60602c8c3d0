//! Takes everything out of the image that belongs to the build or to one machine (eksa-facts 6.5: sysprep).

use super::{
    packages, subscription,
    tree::{Tree, TreeError},
};

/// Nothing is left of these.
const REMOVED: &[&str] = &[
    "/etc/apt/apt.conf.d/90proxy",
    "/etc/cloud/cloud-init.disabled",
    "/etc/cloud/cloud.cfg.d/00-subiquity-disable-cloudinit-networking.cfg",
    "/etc/cloud/cloud.cfg.d/90-installer-network.cfg",
    "/etc/cloud/cloud.cfg.d/99-installer.cfg",
    "/etc/cloud/cloud.cfg.d/curtin-preserve-sources.cfg",
    "/etc/cloud/cloud.cfg.d/subiquity-disable-cloudinit-networking.cfg",
    "/etc/cloud/ds-identify.cfg",
    "/etc/insights-client/machine-id",
    // The disks of the machine that the base was installed on; lvm would use no others.
    "/etc/lvm/devices/system.devices",
    "/etc/pip.conf",
    "/etc/systemd/system/containerd.service.d/http-proxy.conf",
    "/etc/udev/rules.d/70-persistent-net.rules",
    "/root/.bash_history",
    "/root/.cache",
    "/root/.ssh",
    "/root/.wget-hsts",
    "/root/anaconda-ks.cfg",
    "/root/original-ks.cfg",
    "/swap.img",
    "/swapfile",
    "/var/cache/apt/pkgcache.bin",
    "/var/cache/apt/srcpkgcache.bin",
    "/var/cache/debconf/config.dat-old",
    "/var/cache/debconf/templates.dat-old",
    "/var/cache/ldconfig/aux-cache",
    "/var/lib/cloud",
    // containerd makes another one.
    "/var/lib/containerd/io.containerd.grpc.v1.introspection",
    "/var/lib/dbus/machine-id",
    // dnf begins a new history.
    "/var/lib/dnf/history.sqlite",
    "/var/lib/dnf/history.sqlite-shm",
    "/var/lib/dnf/history.sqlite-wal",
    "/var/lib/dnf/repos",
    "/var/lib/dpkg/lock",
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/rpm/.dbenv.lock",
    "/var/lib/rpm/.rpm.lock",
    // SQLite's shared memory.
    "/var/lib/rpm/rpmdb.sqlite-shm",
    "/var/lib/systemd/random-seed",
    "/var/log/journal",
];
/// These stay and are empty.
const CLEARED: &[&str] = &[
    "/dev",
    "/etc/NetworkManager/system-connections",
    "/proc",
    "/run",
    "/sys",
    "/tmp",
    "/var/cache/apt/archives",
    "/var/cache/dnf",
    "/var/cache/yum",
    "/var/lib/NetworkManager",
    "/var/lib/apt/lists",
    "/var/lib/containerd/tmpmounts",
    "/var/tmp",
];
/// Network configuration in these is that of one machine; programs may stand beside it.
const NETPLAN: &[&str] = &["/etc/netplan", "/lib/netplan"];
/// Files that begin so, in these directories, are one machine's own.
const PREFIXES: &[(&str, &str)] = &[
    ("/etc/rhsm/ca", "katello-"),
    ("/etc/ssh", "ssh_host_"),
    ("/etc/sysconfig/network-scripts", "ifcfg-"),
    ("/var/lib/dhcp", "dhclient"),
    // Berkeley DB's shared memory.
    ("/var/lib/rpm", "__db."),
];
/// What is nobody's own in spite of its name.
const COMMON: &str = "ifcfg-lo";
/// Where the resolver's configuration is during the build, and where it is kept until the end.
const RESOLVER: &str = "/etc/resolv.conf";
const KEPT_RESOLVER: &str = "/etc/.resolv.conf.image-builder";

/// Gives the programs of the image the build's name servers, for as long as it is built.
pub(super) fn lend_resolver(tree: &Tree, configuration: &str) -> Result<(), TreeError> {
    if tree.exists(RESOLVER) {
        tree.rename(RESOLVER, KEPT_RESOLVER)?;
    }
    tree.write(RESOLVER, configuration, 0o644)
}

/// Seals the tree. Nothing is mounted below it any more, and no program of the image runs after this.
pub(super) fn seal(tree: &Tree) -> Result<(), TreeError> {
    packages::restore(tree)?;
    tree.remove(RESOLVER)?;
    if tree.exists(KEPT_RESOLVER) {
        tree.rename(KEPT_RESOLVER, RESOLVER)?;
    }
    for path in REMOVED {
        tree.remove(path)?;
    }
    for directory in CLEARED {
        tree.clear(directory)?;
    }
    for directory in NETPLAN {
        for name in tree.list(directory)? {
            if has_extension(&name, "yaml") {
                tree.remove(&format!("{directory}/{name}"))?;
            }
        }
    }
    for (directory, prefix) in PREFIXES {
        for name in tree.list(directory)? {
            if name.starts_with(prefix) && name != COMMON {
                tree.remove(&format!("{directory}/{name}"))?;
            }
        }
    }
    subscription::forget(tree)?;
    for home in tree.list("/home")? {
        for file in [".bash_history", ".ssh/authorized_keys"] {
            tree.remove(&format!("/home/{home}/{file}"))?;
        }
    }
    for log in tree.files_below("/var/log")? {
        if is_rotated(&log) { tree.remove(&log)? } else { tree.truncate(&log)? }
    }
    // Empty, systemd makes a new one at the first start; "uninitialized" would run units for the very first boot again.
    tree.write("/etc/machine-id", "", 0o444)?;
    // cloud-init sets the node's own.
    tree.write("/etc/hostname", "localhost.local\n", 0o644)
}

fn has_extension(path: &str, extension: &str) -> bool {
    path.rsplit_once('.').is_some_and(|(_, end)| end == extension)
}

/// Whether a log is an older part of another one, such as `syslog.1` and `dpkg.log.2.gz`.
fn is_rotated(path: &str) -> bool {
    let path = path.strip_suffix(".gz").or_else(|| path.strip_suffix(".xz")).unwrap_or(path);
    path.rsplit_once('.').is_some_and(|(_, end)| !end.is_empty() && end.bytes().all(|byte| byte.is_ascii_digit()))
        || has_extension(path, "old")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_build_or_of_a_machine_stays() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.link("/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf").unwrap();
        lend_resolver(&tree, "nameserver 10.0.0.1\n").unwrap();
        assert!(tree.read("/etc/resolv.conf").unwrap().unwrap().contains("10.0.0.1"));
        let gone = [
            "/etc/ssh/ssh_host_ed25519_key",
            "/etc/netplan/50-cloud-init.yaml",
            "/var/lib/cloud/instance/x",
            "/var/lib/apt/lists/archive_Packages",
            "/tmp/x",
            "/root/.ssh/authorized_keys",
            "/home/me/.bash_history",
            "/var/log/syslog.1",
            "/var/log/apt/term.log.1.gz",
            "/var/log/journal/id/system.journal",
            "/etc/cloud/ds-identify.cfg",
            "/etc/pki/consumer/key.pem",
            "/etc/pki/entitlement/123-key.pem",
            "/etc/yum.repos.d/redhat.repo",
            "/etc/rhsm/ca/katello-server-ca.pem",
            "/var/lib/rhsm/cache/entitlement_status.json",
            "/var/lib/dnf/history.sqlite",
            "/var/cache/dnf/baseos-0123/repodata/repomd.xml",
            "/etc/NetworkManager/system-connections/eth0.nmconnection",
            "/etc/sysconfig/network-scripts/ifcfg-eth0",
            "/root/anaconda-ks.cfg",
        ];
        let stays = [
            "/lib/netplan/generate",
            "/etc/ssh/sshd_config",
            "/home/me/data",
            "/etc/cloud/cloud.cfg",
            "/etc/rhsm/ca/redhat-uep.pem",
            "/etc/sysconfig/network-scripts/ifcfg-lo",
            "/etc/yum.repos.d/own.repo",
        ];
        for path in gone.iter().chain(&stays) {
            tree.write(path, "x", 0o600).unwrap();
        }
        tree.write("/var/log/dpkg.log", "words", 0o640).unwrap();
        tree.write("/etc/machine-id", "0123456789abcdef\n", 0o444).unwrap();
        seal(&tree).unwrap();
        for path in gone {
            assert!(!tree.exists(path), "{path} is still there");
        }
        for path in stays {
            assert!(tree.exists(path), "{path} is gone");
        }
        assert_eq!(tree.read("/var/log/dpkg.log").unwrap().as_deref(), Some(""));
        assert_eq!(tree.mode("/var/log/dpkg.log"), Some(0o640));
        assert_eq!(tree.read("/etc/machine-id").unwrap().as_deref(), Some(""));
        let resolver = std::fs::read_link(dir.path().join("etc/resolv.conf")).unwrap();
        assert_eq!(resolver.to_str(), Some("../run/systemd/resolve/stub-resolv.conf"));
    }

    #[test]
    fn rotated_logs_are_told_from_current_ones() {
        for rotated in ["/var/log/syslog.1", "/var/log/a.log.12.gz", "/var/log/cloud-init.log.old"] {
            assert!(is_rotated(rotated), "{rotated}");
        }
        for current in ["/var/log/wtmp", "/var/log/dpkg.log", "/var/log/apt/eipp.log.xz"] {
            assert!(!is_rotated(current), "{current}");
        }
    }
}
