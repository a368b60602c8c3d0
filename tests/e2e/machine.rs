//! A machine that a built image was written to, as Tinkerbell does it.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, http::Uri};
use serde_json::json;

use crate::{
    cluster::{TestNamespace, served_files},
    mirror::spec,
};

/// Start, bootstrap and a pod on a machine without KVM.
pub const LIMIT: Duration = Duration::from_secs(15 * 60);
/// The machine's name.
pub const NODE: &str = "provisioned";
/// This machine as QEMU's network shows it to a guest.
pub const HOST_IN_GUEST: &str = "10.0.2.2";

/// An image that the artifact server keeps from an earlier test, else a new one.
pub async fn image(namespace: &TestNamespace) -> PathBuf {
    let served = || served_files().into_iter().find(|file| file.ends_with("debian-12-kube-1-34.gz"));
    if let Some(image) = served() {
        return image;
    }
    let mut spec = spec();
    spec["verify"] = json!({"boot": "Never"});
    namespace.apply("for-a-machine", spec).await;
    namespace.wait_ready("for-a-machine", LIMIT).await;
    served().expect("the image is published")
}

/// Serves user data and the little that Tinkerbell knows of a machine, in the format of Ec2, beside what `more` serves.
/// Gives its port.
pub async fn serve(user_data: &str, more: Router) -> u16 {
    let answer = async |State(user_data): State<String>, uri: Uri| {
        let answer = match uri.path() {
            "/2009-04-04/meta-data/" => "instance-id\nlocal-hostname\n",
            "/2009-04-04/meta-data/instance-id" => "i-0123456789",
            "/2009-04-04/meta-data/local-hostname" => NODE,
            "/2009-04-04/user-data" => &user_data,
            _ => return (StatusCode::NOT_FOUND, String::new()),
        };
        (StatusCode::OK, answer.to_owned())
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = Router::new().fallback(answer).with_state(user_data.to_owned()).merge(more);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    port
}

/// Writes the files that EKS Anywhere's default Tinkerbell template writes, to the partition that it writes them to.
pub fn provision(disk: &Path, dir: &Path, metadata: u16) {
    let files = [
        (
            "/etc/netplan/config.yaml",
            "network:\n  version: 2\n  ethernets:\n    all:\n      match: {name: \"en*\"}\n      dhcp4: true\n"
                .to_owned(),
        ),
        ("/etc/cloud/cloud.cfg.d/99-disable-network-config.cfg", "network: {config: disabled}\n".to_owned()),
        (
            "/etc/cloud/cloud.cfg.d/10_tinkerbell.cfg",
            format!(
                "datasource:\n  Ec2:\n    metadata_urls: [\"http://{HOST_IN_GUEST}:{metadata}\"]\n    strict_id: false\n\
                 manage_etc_hosts: localhost\nwarnings: {{dsid_missing_source: off}}\n"
            ),
        ),
        ("/etc/cloud/ds-identify.cfg", "datasource: Ec2\n".to_owned()),
    ];
    let table = gpt::GptConfig::new().open(disk).unwrap();
    let offset = table.partitions()[&2].first_lba * 512;
    let mut commands = String::new();
    for (number, (path, content)) in files.iter().enumerate() {
        let source = dir.join(format!("file-{number}"));
        fs::write(&source, content).unwrap();
        let _ = writeln!(commands, "write {} {path}", source.display());
    }
    let script = dir.join("debugfs");
    fs::write(&script, commands).unwrap();
    let device = format!("{}?offset={offset}", disk.display());
    let output = Command::new("debugfs").args(["-w", "-f"]).arg(script).arg(device).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("not found"), "debugfs: {said}");
}

/// A running machine; it is switched off when dropped.
pub struct Machine {
    qemu: Child,
    console: PathBuf,
}

impl Machine {
    pub fn start(disk: &Path, dir: &Path) -> Self {
        let console = dir.join("console");
        let variables = dir.join("variables.fd");
        fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &variables).unwrap();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048", "-smp", "2"])
            .args(["-nodefaults", "-display", "none"])
            .args(["-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"])
            .arg("-drive")
            .arg(format!("if=pflash,format=raw,unit=1,file={}", variables.display()))
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,cache=unsafe,file={}", disk.display()))
            .args(["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"])
            .args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { qemu, console }
    }

    pub async fn within<T, E: std::fmt::Debug>(
        &self,
        limit: Duration,
        what: &str,
        wait: impl Future<Output = Result<T, E>>,
    ) -> T {
        if let Ok(result) = tokio::time::timeout(limit, wait).await {
            return result.unwrap();
        }
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<_> = console.lines().rev().take(40).collect();
        let last: Vec<_> = lines.into_iter().rev().collect();
        panic!("no {what} within {} s; the console ends with\n{}", limit.as_secs(), last.join("\n"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
