//! Promises about the running system. Each asks the system itself.

use std::{
    fs,
    process::{Command, Stdio},
};

use super::{Applies, Level, Promise, Subject};
use crate::{
    contract::{Firmware, Provider, ResolvedRelease},
    native::{
        disk,
        settings::{self, Unit},
    },
};

const fn promise(
    id: &'static str,
    what: &'static str,
    applies_to: Applies,
    how: &'static str,
    check: super::Check,
) -> Promise {
    Promise { id, what, applies_to, level: Level::Guest, how, check }
}

use Applies::{Always, KnownRelease};

/// What EKS Anywhere's bootstrap data appends to containerd's configuration on nodes with registry mirrors.
const APPENDED: &str =
    "\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc/containerd/certs.d\"\n";

pub(super) const PROMISES: &[Promise] = &[
    promise("started", "the system starts without a failed unit", Always, "`systemctl --failed`", |_| {
        let failed = output("systemctl", &["list-units", "--failed", "--plain", "--no-legend", "--full"])?;
        let units: Vec<_> = failed.lines().filter_map(|line| line.split_whitespace().next()).collect();
        if units.is_empty() { Ok(()) } else { Err(format!("failed: {}", units.join(", "))) }
    }),
    promise("firmware", "it starts by UEFI", Applies::Firmware(Firmware::Efi), "`/sys/firmware/efi`", |_| {
        if fs::exists("/sys/firmware/efi").unwrap_or(false) { Ok(()) } else { Err("it started by BIOS".to_owned()) }
    }),
    promise("bios", "it starts by BIOS", Applies::Firmware(Firmware::Bios), "no `/sys/firmware/efi`", |_| {
        if fs::exists("/sys/firmware/efi").unwrap_or(true) { Err("it started by UEFI".to_owned()) } else { Ok(()) }
    }),
    promise(
        "root-partition",
        "the root file system is ext4 on partition 2 of a GPT, for redhat on partition 1, as Tinkerbell's templates expect",
        Always,
        "`/proc/mounts` and blkid",
        root_partition,
    ),
    promise(
        "esp",
        "the other partition, 1 or 2, is the EFI system partition",
        Applies::Firmware(Firmware::Efi),
        "`/proc/mounts`",
        |subject| {
            let (device, kind) = mounted("/boot/efi")?;
            let number = 3 - disk::root_number(subject.expected.os.name);
            if kind == "vfat" && device.ends_with(&number.to_string()) {
                Ok(())
            } else {
                Err(format!("/boot/efi is {kind} on {device}"))
            }
        },
    ),
    promise(
        "kubernetes-programs",
        "kubelet, kubeadm and kubectl are the release's",
        KnownRelease,
        "what they say their version is",
        |subject| {
            let version = &release(subject)?.kubernetes_version;
            says("kubelet", &["--version"], version)?;
            says("kubeadm", &["version", "-o", "short"], version)?;
            says("kubectl", &["version", "--client"], version)
        },
    ),
    promise(
        "containerd-program",
        "containerd is the release's, and runc runs",
        KnownRelease,
        "their versions",
        |subject| {
            says("containerd", &["--version"], release(subject)?.containerd.version.trim_start_matches('v'))?;
            output("runc", &["--version"]).map(drop)
        },
    ),
    promise("crictl-program", "crictl is the release's", KnownRelease, "its version", |subject| {
        says("crictl", &["--version"], release(subject)?.crictl.version.trim_start_matches('v'))
    }),
    promise("etcdadm-program", "etcdadm is the release's", KnownRelease, "its version", |subject| {
        says("etcdadm", &["version"], release(subject)?.etcdadm.version.trim_start_matches('v'))
    }),
    promise(
        "cni-programs",
        "the CNI plugins are the release's",
        KnownRelease,
        "what `host-device` says its version is",
        |subject| says("/opt/cni/bin/host-device", &["--version"], &release(subject)?.cni_plugins.version),
    ),
    promise(
        "preloaded-images",
        "the release's container images are there, under the names that kubeadm asks for",
        Always,
        "what the CRI plugin lists",
        |subject| {
            let found = output("crictl", &["images", "--output", "json"])?;
            let missing: Vec<_> = subject
                .expected
                .images
                .iter()
                .filter(|image| !found.contains(&format!("\"{image}\"")))
                .cloned()
                .collect();
            if missing.is_empty() { Ok(()) } else { Err(format!("missing: {}", missing.join(", "))) }
        },
    ),
    promise(
        "containerd-pods",
        "containerd answers the kubelet's questions",
        Always,
        "`crictl ps`, `crictl info`",
        |_| {
            output("crictl", &["ps"])?;
            let info = output("crictl", &["info"])?;
            if info.contains("\"RuntimeReady\"") {
                Ok(())
            } else {
                Err("crictl info does not speak of RuntimeReady".to_owned())
            }
        },
    ),
    promise(
        "containerd-append",
        "containerd takes the registry settings that EKS Anywhere appends to its configuration",
        Always,
        "appended as EKS Anywhere does it, restarted, asked, taken back",
        containerd_append,
    ),
    promise(
        "containerd-limits",
        "the kernel ends pods before containerd, and containerd may have any number of threads",
        Always,
        "`systemctl show`",
        |_| {
            unit_has("containerd.service", "OOMScoreAdjust", "-999")?;
            unit_has("containerd.service", "TasksMax", "infinity")
        },
    ),
    promise("kubelet-waits", "the kubelet starts with the node", Always, "`systemctl is-enabled`", |_| {
        says("systemctl", &["is-enabled", "kubelet.service"], "enabled")
    }),
    promise("services", "the services of a node are enabled", Always, "`systemctl is-enabled`", |subject| {
        let failed: Vec<_> = settings::units(subject.expected.os.name, subject.expected.provider)
            .into_iter()
            .filter_map(|unit| match unit {
                Unit::Enabled(names) => enabled(names).err(),
                Unit::Masked(_) => None,
            })
            .collect();
        if failed.is_empty() { Ok(()) } else { Err(failed.join(", ")) }
    }),
    promise("services-run", "containerd, auditd, chrony and ssh run", Always, "`systemctl is-active`", |subject| {
        let failed: Vec<_> = ["containerd.service", "auditd.service"]
            .into_iter()
            .chain(settings::daemons(subject.expected.os.name))
            .filter_map(|unit| says("systemctl", &["is-active", unit], "active").err())
            .collect();
        if failed.is_empty() { Ok(()) } else { Err(failed.join(", ")) }
    }),
    promise("modules", "overlay and br_netfilter are loaded", Always, "`/sys/module`", |subject| {
        let more: &[_] = if subject.expected.provider == Provider::Nutanix { &["ip_vs"] } else { &[] };
        let missing: Vec<_> = ["overlay", "br_netfilter"]
            .iter()
            .chain(more)
            .filter(|module| !fs::exists(format!("/sys/module/{module}")).unwrap_or(false))
            .copied()
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("not loaded: {}", missing.join(", "))) }
    }),
    promise("kernel-parameters", "kernel parameters are those of a node", Always, "`/proc/sys`", |subject| {
        let wrong: Vec<_> = settings::sysctls(subject.expected.os.name)
            .into_iter()
            .filter_map(|(name, wanted)| {
                let path = format!("/proc/sys/{}", name.replace('.', "/"));
                let found = fs::read_to_string(path).unwrap_or_default();
                (found.trim() != wanted).then(|| format!("{name} is {}", found.trim()))
            })
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join(", ")) }
    }),
    promise("swap-off", "nothing is swapped", Always, "`/proc/swaps`", |_| {
        let swaps = fs::read_to_string("/proc/swaps").map_err(|error| error.to_string())?;
        match swaps.lines().nth(1) {
            Some(line) => Err(format!("swap is on: {line}")),
            None => Ok(()),
        }
    }),
    promise(
        "cloud-init-order",
        "user data runs when containerd does",
        Always,
        "`systemctl show` of cloud-init's last two units",
        |_| {
            unit_has("cloud-config.service", "After", "containerd.service")?;
            unit_has("cloud-final.service", "After", "containerd.service")
        },
    ),
    promise(
        "cloud-init-done",
        "cloud-init ran its first start to the end",
        Always,
        "`cloud-init status --long`",
        |_| {
            // With the errors, if there are any.
            let status = output("cloud-init", &["status", "--long"])?;
            if status.contains("status: done") { Ok(()) } else { Err(status.trim().to_owned()) }
        },
    ),
    promise(
        "cloud-init-switch",
        "cloud-init goes on after user data that it can not read",
        Always,
        "the switch as its own Python reads it",
        |_| {
            let program = "from cloudinit import features; print(features.ERROR_ON_USER_DATA_FAILURE)";
            says("python3", &["-c", program], "False")
        },
    ),
    promise(
        "own-identity",
        "the started node has a machine id and SSH host keys of its own",
        Always,
        "the files",
        |_| {
            let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
            if id.trim().len() != 32 {
                return Err(format!("/etc/machine-id is `{}`", id.trim()));
            }
            let keys = fs::read_dir("/etc/ssh").map_err(|error| error.to_string())?;
            let made =
                keys.filter_map(Result::ok).any(|entry| entry.file_name().to_string_lossy().starts_with("ssh_host_"));
            if made { Ok(()) } else { Err("no SSH host keys were made".to_owned()) }
        },
    ),
    promise("address", "the node takes its address from the network it starts in", Always, "`ip -4 address`", |_| {
        let addresses = output("ip", &["-4", "-o", "address", "show", "scope", "global"])?;
        if addresses.trim().is_empty() { Err("no interface has an address".to_owned()) } else { Ok(()) }
    }),
];

/// Standard output of a program that ended well.
pub(super) fn output(program: &str, args: &[&str]) -> Result<String, String> {
    let called = || format!("{program} {}", args.join(" "));
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .map_err(|error| format!("{}: {error}", called()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or_else(|| text.trim());
    Err(format!("{} failed ({}): {said}", called(), output.status))
}

/// Whether a program says `wanted`; some speak on standard error, or end with a status of their own.
fn says(program: &str, args: &[&str], wanted: &str) -> Result<(), String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let words = |text: &str| text.split_whitespace().any(|word| word == wanted);
    // A word where it is one, such as `active`, which `inactive` contains too.
    let found = if wanted.bytes().all(|byte| byte.is_ascii_lowercase()) { words(&text) } else { text.contains(wanted) };
    if found {
        return Ok(());
    }
    Err(format!("{program} {} says {}, not {wanted}", args.join(" "), text.trim().lines().next().unwrap_or("nothing")))
}

fn unit_has(unit: &str, property: &str, wanted: &str) -> Result<(), String> {
    let found = output("systemctl", &["show", "--value", "--property", property, unit])?;
    if found.split_whitespace().any(|word| word == wanted) {
        return Ok(());
    }
    Err(format!("{property} of {unit} is {}", found.trim()))
}

/// Whether the first of these units that exists is enabled.
fn enabled(names: &[&str]) -> Result<(), String> {
    let found: Vec<_> = names
        .iter()
        .map(|name| (name, output("systemctl", &["is-enabled", name]).unwrap_or_else(|error| error)))
        .collect();
    // "alias" and "indirect" are enabled under another name; "static" units are started by others.
    let on = |state: &str| matches!(state.trim(), "enabled" | "alias" | "indirect" | "enabled-runtime");
    if found.iter().any(|(_, state)| on(state)) {
        return Ok(());
    }
    Err(found.iter().map(|(name, state)| format!("{name}: {}", state.trim())).collect::<Vec<_>>().join(", "))
}

fn release<'e>(subject: &Subject<'e>) -> Result<&'e ResolvedRelease, String> {
    subject.expected.release.as_ref().ok_or_else(|| "the release is not known".to_owned())
}

/// Device and type of what is mounted there.
fn mounted(place: &str) -> Result<(String, String), String> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| error.to_string())?;
    mounts
        .lines()
        .rev()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.next()?;
            (fields.next()? == place).then(|| Some((device.to_owned(), fields.next()?.to_owned())))?
        })
        .ok_or_else(|| format!("nothing is mounted at {place}"))
}

fn root_partition(subject: &Subject<'_>) -> Result<(), String> {
    let (device, kind) = mounted("/")?;
    let number = disk::root_number(subject.expected.os.name).to_string();
    if kind != "ext4" || !device.ends_with(&number) {
        return Err(format!("/ is {kind} on {device}"));
    }
    let disk = device.trim_end_matches(|c: char| c.is_ascii_digit());
    let table = output("blkid", &["-p", "-o", "value", "-s", "PTTYPE", disk])?;
    if table.trim() == "gpt" { Ok(()) } else { Err(format!("the partition table of {disk} is {}", table.trim())) }
}

fn containerd_append(_: &Subject<'_>) -> Result<(), String> {
    let path = "/etc/containerd/config.toml";
    let before = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let apply = |text: &str| {
        fs::write(path, text).map_err(|error| format!("{path}: {error}"))?;
        output("systemctl", &["restart", "containerd.service"]).map(drop)
    };
    let appended = apply(&format!("{before}{APPENDED}")).and_then(|()| {
        output("crictl", &["info"])?;
        // containerd 2 does not show this part of its configuration to the kubelet.
        let taken = output("containerd", &["config", "dump"])?.contains("/etc/containerd/certs.d");
        if taken { Ok(()) } else { Err("containerd does not use the appended configuration".to_owned()) }
    });
    appended.and(apply(&before))
}
