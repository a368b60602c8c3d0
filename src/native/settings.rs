//! What the image contract asks for in files and units, as data: `eksa-facts` sections 6.3 to 6.6, which are those of
//! kubernetes-sigs/image-builder's roles with the patches of EKS Anywhere.

use super::tree::{Tree, TreeError};
use crate::contract::{BuildRequest, OsName, Provider};

/// A file of the image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Setting {
    pub path: &'static str,
    pub mode: u32,
    pub content: String,
}

/// What becomes of a unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Unit {
    /// The first of these that the system has: some have other names in other versions.
    Enabled(&'static [&'static str]),
    /// Disabled, and not started by anything else either.
    Masked(&'static str),
}

/// Settings that do not depend on the build.
const FIXED: &[(&str, u32, &str)] = &[
    ("/etc/modules-load.d/kubernetes.conf", 0o644, "overlay\nbr_netfilter\n"),
    (
        "/etc/systemd/system/containerd.service.d/memory-pressure.conf",
        0o644,
        "# The kernel ends pods before it ends what runs them.\n[Service]\nOOMScoreAdjust=-999\n",
    ),
    ("/etc/systemd/system/containerd.service.d/max-tasks.conf", 0o644, "[Service]\nTasksMax=infinity\n"),
    ("/etc/crictl.yaml", 0o644, "runtime-endpoint: unix:///var/run/containerd/containerd.sock\n"),
    (
        "/usr/lib/systemd/system/kubelet.service",
        0o644,
        "[Unit]\nDescription=Kubernetes node agent\nDocumentation=https://kubernetes.io/docs/\n\
         Wants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nExecStart=/usr/bin/kubelet\nRestart=always\nStartLimitInterval=0\nRestartSec=10\n\n\
         [Install]\nWantedBy=multi-user.target\n",
    ),
    (
        "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf",
        0o644,
        "# kubeadm writes the files that are named here.\n[Service]\n\
         Environment=\"KUBELET_KUBECONFIG_ARGS=--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf \
         --kubeconfig=/etc/kubernetes/kubelet.conf\"\n\
         Environment=\"KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml\"\n\
         EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env\n\
         EnvironmentFile=-/etc/sysconfig/kubelet\nEnvironmentFile=-/etc/default/kubelet\n\
         ExecStart=\nExecStart=/usr/bin/kubelet $KUBELET_KUBECONFIG_ARGS $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS \
         $KUBELET_EXTRA_ARGS\n",
    ),
    (
        "/etc/profile.d/kubernetes.sh",
        0o644,
        "# On a control plane node kubectl speaks to its API server.\n\
         for file in /etc/kubernetes/super-admin.conf /etc/kubernetes/admin.conf; do\n\
         \tif [ -r \"$file\" ]; then\n\t\texport KUBECONFIG=\"$file\"\n\t\tbreak\n\tfi\ndone\nunset file\n\
         if [ -n \"${BASH_VERSION-}\" ] && [ -n \"${PS1-}\" ]; then\n\talias k=kubectl\nfi\n",
    ),
    (
        "/etc/udev/rules.d/90-etcd-tuning.rules",
        0o644,
        "ACTION==\"add\", SUBSYSTEM==\"net\", SUBSYSTEMS==\"pci|xen|vmbus\" \
         RUN+=\"/usr/local/bin/etcd-network-tuning.sh $name\"\n",
    ),
    (
        "/usr/local/bin/etcd-network-tuning.sh",
        0o755,
        "#!/bin/sh\n# Traffic between etcd members goes before that of its clients, and both before the rest; called by udev.\n\
         set -eu\ndevice=$1\n\
         tc qdisc add dev \"$device\" root handle 1: prio bands 3\n\
         for port in sport dport; do\n\
         \ttc filter add dev \"$device\" parent 1: protocol ip prio 1 u32 match ip \"$port\" 2380 0xffff flowid 1:1\n\
         \ttc filter add dev \"$device\" parent 1: protocol ip prio 2 u32 match ip \"$port\" 2379 0xffff flowid 1:1\n\
         done\n",
    ),
    ("/etc/systemd/system/cloud-config.service.d/boot-order.conf", 0o644, AFTER_CONTAINERD),
    ("/etc/systemd/system/cloud-final.service.d/boot-order.conf", 0o644, AFTER_CONTAINERD),
    (
        "/etc/cloud/cloud.cfg.d/05_logging.cfg",
        0o644,
        "# Warnings go to the console, everything to the file.\n_log:\n - &log_base |\n   [loggers]\n   keys=root,cloudinit\n\n   \
         [handlers]\n   keys=consoleHandler,cloudLogHandler\n\n   [formatters]\n   keys=simpleFormatter,arg0Formatter\n\n   \
         [logger_root]\n   level=DEBUG\n   handlers=consoleHandler,cloudLogHandler\n\n   \
         [logger_cloudinit]\n   level=DEBUG\n   qualname=cloudinit\n   handlers=\n   propagate=1\n\n   \
         [handler_consoleHandler]\n   class=StreamHandler\n   level=WARNING\n   formatter=arg0Formatter\n   args=(sys.stderr,)\n\n   \
         [formatter_arg0Formatter]\n   format=%(asctime)s - %(filename)s[%(levelname)s]: %(message)s\n\n   \
         [formatter_simpleFormatter]\n   format=[CLOUDINIT] %(filename)s[%(levelname)s]: %(message)s\n \
         - &log_file |\n   [handler_cloudLogHandler]\n   class=FileHandler\n   level=DEBUG\n   formatter=arg0Formatter\n   \
         args=('/var/log/cloud-init.log', 'a', 'UTF-8')\n\
         log_cfgs:\n - [ *log_base, *log_file ]\n\
         output: {all: '| tee -a /var/log/cloud-init-output.log'}\n",
    ),
    ("/etc/hosts", 0o644, "127.0.0.1 localhost localhost.local\n::1 localhost ip6-localhost ip6-loopback\n"),
];

/// Settings of Debian's family.
const DEBIAN: &[(&str, u32, &str)] = &[
    ("/etc/default/kubelet", 0o644, KUBELET),
    (
        "/etc/default/grub.d/50-cloudimg-settings.cfg",
        0o644,
        "# Screen and serial console, and no waiting.\nGRUB_RECORDFAIL_TIMEOUT=0\nGRUB_TIMEOUT=0\n\
         GRUB_CMDLINE_LINUX_DEFAULT=\"console=tty1 console=ttyS0\"\nGRUB_TERMINAL=console\n",
    ),
];

/// Settings of Red Hat Enterprise Linux.
const REDHAT: &[(&str, u32, &str)] = &[
    ("/etc/sysconfig/kubelet", 0o644, KUBELET),
    (
        "/etc/default/grub",
        0o644,
        "# Screen and serial console, and no waiting.\nGRUB_TIMEOUT=0\nGRUB_DEFAULT=saved\nGRUB_DISABLE_SUBMENU=true\n\
         GRUB_DISABLE_RECOVERY=true\nGRUB_ENABLE_BLSCFG=true\nGRUB_TERMINAL=\"console serial\"\n\
         GRUB_SERIAL_COMMAND=\"serial --speed=115200\"\n\
         GRUB_CMDLINE_LINUX=\"console=tty1 console=ttyS0 transparent_hugepage=madvise\"\n",
    ),
    (
        "/etc/selinux/config",
        0o644,
        "# Files that the build made have no labels.\nSELINUX=permissive\nSELINUXTYPE=targeted\n",
    ),
];

/// The kubelet's environment, which `10-kubeadm.conf` reads from either place.
const KUBELET: &str = "KUBELET_EXTRA_ARGS=\n";
const AFTER_CONTAINERD: &str =
    "# User data may load images and start the kubelet.\n[Unit]\nAfter=containerd.service\nWants=containerd.service\n";
const USER_DATA_FAILURE: &str = "ERROR_ON_USER_DATA_FAILURE = False\n";

/// Where cloud-init's Python is: beside one version of Python in Red Hat's systems, beside all of them in Debian's.
pub(super) fn cloud_init(tree: &Tree) -> Result<String, TreeError> {
    let versions = tree.list("/usr/lib")?.into_iter().filter(|name| name.starts_with("python3."));
    let mut places = versions.map(|name| format!("/usr/lib/{name}/site-packages/cloudinit"));
    Ok(places.find(|place| tree.exists(place)).unwrap_or_else(|| "/usr/lib/python3/dist-packages/cloudinit".to_owned()))
}

/// The system's language.
const fn locale(os: OsName) -> &'static str {
    match os {
        OsName::Ubuntu | OsName::Debian => "/etc/default/locale",
        OsName::Redhat => "/etc/locale.conf",
    }
}

/// The file of the kubelet's environment.
pub(super) const fn kubelet_environment(os: OsName) -> &'static str {
    match os {
        OsName::Ubuntu | OsName::Debian => "/etc/default/kubelet",
        OsName::Redhat => "/etc/sysconfig/kubelet",
    }
}

/// Kernel parameters of a node.
const SYSCTLS: &[(&str, &str)] = &[
    ("net.bridge.bridge-nf-call-iptables", "1"),
    ("net.bridge.bridge-nf-call-ip6tables", "1"),
    ("net.ipv4.ip_forward", "1"),
    ("net.ipv6.conf.all.forwarding", "1"),
    ("net.ipv6.conf.all.disable_ipv6", "0"),
    ("net.ipv4.tcp_congestion_control", "bbr"),
    ("vm.overcommit_memory", "1"),
    ("kernel.panic", "10"),
    ("kernel.panic_on_oops", "1"),
    ("fs.inotify.max_user_instances", "8192"),
    ("fs.inotify.max_user_watches", "524288"),
];

/// Kernel parameters of this image, name and value.
pub(super) fn sysctls(os: OsName) -> Vec<(&'static str, &'static str)> {
    let strict: &[_] = if os == OsName::Ubuntu { &[("net.ipv4.conf.all.rp_filter", "1")] } else { &[] };
    [SYSCTLS, strict].concat()
}

/// containerd's configuration. Version 2 is read by every containerd from 1.3 on. It must not define the table
/// `registry`: EKS Anywhere appends that one on nodes with registry mirrors.
fn containerd_config(pause_image: &str) -> String {
    format!(
        "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{pause_image}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  SystemdCgroup = true\n"
    )
}

/// All files that the contract asks for.
pub(super) fn settings(request: &BuildRequest) -> Vec<Setting> {
    let of_system = match request.os.name {
        OsName::Ubuntu | OsName::Debian => DEBIAN,
        OsName::Redhat => REDHAT,
    };
    let fixed = FIXED.iter().chain(of_system);
    let mut settings: Vec<_> =
        fixed.map(|&(path, mode, content)| Setting { path, mode, content: content.to_owned() }).collect();
    let sysctls: Vec<_> = sysctls(request.os.name).iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
    let release = &request.release;
    let mut add = |path, content| settings.push(Setting { path, mode: 0o644, content });
    // Behind the distribution's own files, which sort before.
    add("/etc/sysctl.d/99-zz-kubernetes.conf", sysctls.concat());
    add("/etc/containerd/config.toml", containerd_config(&release.pause_image));
    add("/etc/kubernetes-version", format!("{}\n", release.kubernetes_version));
    if request.provider == Provider::Vsphere {
        add(
            "/etc/vmware-tools/tools.conf",
            "# Interfaces of pods are none of the machine's.\n[guestinfo]\nexclude-nics=antrea-*,cali*,cilium*,lxc*,ovs-system,br*,flannel*,veth*,docker*,virbr*,vxlan_sys_*,genev_sys_*,gre_sys_*,stt_sys_*,????????-??????\n".to_owned(),
        );
    }
    if request.provider == Provider::Nutanix {
        add("/etc/modules-load.d/ip_vs.conf", "ip_vs\n".to_owned());
        add(
            "/etc/udev/rules.d/99-nutanix-scsi-timeout.rules",
            "ACTION==\"add\", SUBSYSTEMS==\"scsi\", ATTRS{vendor}==\"NUTANIX \", ATTRS{model}==\"VDISK\", \
             RUN+=\"/bin/sh -c 'echo 60 >/sys$DEVPATH/timeout'\"\n"
                .to_owned(),
        );
    }
    settings
}

/// Directories that must be there, though they are empty.
const DIRECTORIES: &[&str] =
    &["/etc/kubernetes/manifests", "/etc/containerd/conf.d", "/etc/containerd/certs.d", "/etc/sysconfig"];

/// Writes all settings.
pub(super) fn write(tree: &Tree, request: &BuildRequest) -> Result<(), TreeError> {
    for Setting { path, mode, content } in settings(request) {
        tree.write(path, content, mode)?;
    }
    for directory in DIRECTORIES {
        tree.make_dir(directory, 0o755)?;
    }
    // Without one cloud-init generates en_US.UTF-8 at the first start, and fails where the base can not.
    let locale = locale(request.os.name);
    if tree.read(locale)?.is_none_or(|text| !text.contains("LANG=")) {
        tree.write(locale, "LANG=C.UTF-8\n", 0o644)?;
    }
    let cloud_init = cloud_init(tree)?;
    tree.write(&format!("{cloud_init}/feature_overrides.py"), USER_DATA_FAILURE, 0o644)?;
    // cloud-init's own switches; the last assignment holds.
    let features = format!("{cloud_init}/features.py");
    if let Some(text) = tree.read(&features)?
        && !text.ends_with(USER_DATA_FAILURE)
    {
        tree.write(&features, format!("{text}\n{USER_DATA_FAILURE}"), 0o644)?;
    }
    // Scripts that Debian's cloud-init has there are called by that name.
    if request.os.name == OsName::Redhat && !tree.exists("/usr/lib/cloud-init") {
        tree.link("/usr/lib/cloud-init", "../libexec/cloud-init")?;
    }
    Ok(())
}

/// Whether the system has a unit of this name.
pub(super) fn has_unit(tree: &Tree, name: &str) -> bool {
    ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"]
        .iter()
        .any(|directory| tree.exists(&format!("{directory}/{name}")))
}

/// The daemon that sets the clock, and that of SSH, as the system calls them.
pub(super) const fn daemons(os: OsName) -> [&'static str; 2] {
    match os {
        OsName::Ubuntu | OsName::Debian => ["chrony.service", "ssh.service"],
        OsName::Redhat => ["chronyd.service", "sshd.service"],
    }
}

/// What would update packages, or filter packets. Nodes are replaced, not updated in place, and the cluster's network
/// plugin owns the packet filter.
const DEBIAN_MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "apt-daily.service",
    "apt-daily-upgrade.service",
    "unattended-upgrades.service",
    "ufw.service",
];
const REDHAT_MASKED: &[&str] = &[
    "dnf-automatic.timer",
    "dnf-automatic-install.timer",
    "dnf-makecache.timer",
    "dnf-makecache.service",
    "firewalld.service",
];

/// Units that the contract speaks about.
pub(super) fn units(os: OsName, provider: Provider) -> Vec<Unit> {
    let mut units = vec![
        Unit::Enabled(&["containerd.service"]),
        Unit::Enabled(&["kubelet.service"]),
        Unit::Enabled(&["auditd.service"]),
        Unit::Enabled(&["cloud-init-local.service"]),
        // The second name before cloud-init 24.3.
        Unit::Enabled(&["cloud-init-network.service", "cloud-init.service"]),
        Unit::Enabled(&["cloud-config.service"]),
        Unit::Enabled(&["cloud-final.service"]),
    ];
    let masked = match os {
        OsName::Ubuntu | OsName::Debian => {
            units.extend([Unit::Enabled(&["chrony.service"]), Unit::Enabled(&["ssh.service"])]);
            DEBIAN_MASKED
        }
        OsName::Redhat => {
            let names: [&[_]; 3] = [&["chronyd.service"], &["sshd.service"], &["NetworkManager.service"]];
            units.extend(names.map(Unit::Enabled));
            REDHAT_MASKED
        }
    };
    units.extend(masked.iter().copied().map(Unit::Masked));
    match (provider, os) {
        (Provider::Baremetal, _) => {}
        (Provider::Vsphere, OsName::Redhat) => units.push(Unit::Enabled(&["vmtoolsd.service"])),
        (Provider::Vsphere, _) => units.push(Unit::Enabled(&["open-vm-tools.service"])),
        (Provider::Nutanix, _) => units.push(Unit::Enabled(&["iscsid.service"])),
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_leaves_the_registry_table_to_eks_anywhere() {
        let config = containerd_config("registry/pause:1");
        assert!(config.contains("sandbox_image = \"registry/pause:1\"") && config.contains("SystemdCgroup = true"));
        assert!(!config.contains("registry]"), "{config}");
    }

    #[test]
    fn cloud_init_goes_on_after_a_failure_of_user_data() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        let mut request = crate::native::sample::request();
        for (os, features) in [
            (OsName::Debian, "/usr/lib/python3/dist-packages/cloudinit/features.py"),
            (OsName::Redhat, "/usr/lib/python3.9/site-packages/cloudinit/features.py"),
        ] {
            tree.write(features, "ERROR_ON_USER_DATA_FAILURE = True\n", 0o644).unwrap();
            request.os.name = os;
            write(&tree, &request).unwrap();
            write(&tree, &request).unwrap();
            let text = tree.read(features).unwrap().unwrap();
            assert_eq!(text.matches("ERROR_ON_USER_DATA_FAILURE = False").count(), 1, "{text}");
        }
        assert!(tree.path("/etc/kubernetes/manifests").is_dir());
    }
}
