//! Every promise of a started image is broken in a running machine, and its check must see it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use axum::{
    Router,
    routing::{get, post},
};
use node_image_builder::{
    contract::{Firmware, Os, OsName, Provider, Proxy},
    http,
    native::image_contract::{self, Expected, GuestReport, Level},
    release::{ReleaseQuery, Resolver},
};
use tokio::sync::mpsc;

use crate::{
    cluster::{TestNamespace, setting},
    machine::{HOST_IN_GUEST, LIMIT, Machine, image, provision, serve},
    mirror::CHANNEL,
};

/// A promise and shell commands that break it and mend it again.
struct Breakage {
    promise: &'static str,
    /// What comes first, where the machine does not make the promise as it is.
    before: &'static str,
    breaking: &'static str,
    mending: &'static str,
}

const fn breakage(promise: &'static str, breaking: &'static str, mending: &'static str) -> Breakage {
    Breakage { promise, before: "", breaking, mending }
}

impl Breakage {
    const fn after(self, before: &'static str) -> Self {
        Self { before, ..self }
    }
}

/// In an order in which none needs what another one leaves behind.
const BREAKAGES: &[Breakage] = &[
    breakage(
        "started",
        "systemd-run --quiet --wait --unit=broken /bin/false || true",
        "systemctl reset-failed broken.service",
    ),
    breakage("firmware", "mount -t tmpfs none /sys/firmware", "umount /sys/firmware"),
    breakage("bios", "umount /sys/firmware", "mount -t tmpfs none /sys/firmware")
        .after("mount -t tmpfs none /sys/firmware; expected=bios.json"),
    // Without its head and the copy of it at the end of the disk it is no GPT any more.
    breakage(
        "root-partition",
        "dd if=$disk of=head bs=512 skip=1 count=1; dd if=$disk of=tail bs=512 skip=$last count=1
         dd if=/dev/zero of=$disk bs=512 seek=1 count=1 conv=notrunc,fsync
         dd if=/dev/zero of=$disk bs=512 seek=$last count=1 conv=notrunc,fsync",
        "dd if=head of=$disk bs=512 seek=1 conv=notrunc,fsync; dd if=tail of=$disk bs=512 seek=$last conv=notrunc,fsync",
    )
    .after("umount /sys/firmware; expected=expected.json"),
    breakage("esp", "umount /boot/efi", "mount /boot/efi"),
    breakage("kubernetes-programs", "replace kubelet 'echo Kubernetes v1.2.3'", "restore kubelet"),
    breakage("containerd-program", "replace runc 'exit 1'", "restore runc"),
    breakage("crictl-program", "replace crictl 'echo crictl version 1.2.3'", "restore crictl"),
    breakage("etcdadm-program", "replace etcdadm 'echo v1.2.3'", "restore etcdadm"),
    breakage(
        "cni-programs",
        "replace /opt/cni/bin/host-device 'echo CNI host-device plugin v1.2.3 >&2'",
        "restore /opt/cni/bin/host-device",
    ),
    breakage(
        "preloaded-images",
        "ctr -n k8s.io images tag $pause host/kept:1; ctr -n k8s.io images remove --sync $pause
         until ! crictl images -o json | grep -qF \"\\\"$pause\\\"\"; do sleep 1; done",
        "ctr -n k8s.io images tag host/kept:1 $pause; ctr -n k8s.io images remove --sync host/kept:1
         until crictl images -o json | grep -qF \"\\\"$pause\\\"\"; do sleep 1; done",
    ),
    breakage("containerd-pods", "systemctl stop containerd", "systemctl start containerd"),
    // A table that EKS Anywhere's own would be the second of. Each check restarts containerd twice, and systemd refuses
    // the sixth start in ten seconds: its count begins anew before each.
    breakage(
        "containerd-append",
        "systemctl reset-failed containerd; cp -a /etc/containerd/config.toml kept.toml
         printf '\\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\\n' >> /etc/containerd/config.toml",
        "cp -a kept.toml /etc/containerd/config.toml; systemctl reset-failed containerd; systemctl restart containerd",
    ),
    breakage(
        "containerd-limits",
        "drop_in containerd.service '[Service]' OOMScoreAdjust=0",
        "rm -r /run/systemd/system/containerd.service.d; systemctl daemon-reload",
    ),
    breakage("kubelet-waits", "systemctl disable kubelet", "systemctl enable kubelet"),
    breakage("services", "systemctl disable auditd", "systemctl enable auditd"),
    breakage("services-run", "systemctl stop chrony", "systemctl start chrony"),
    breakage("modules", "rmmod br_netfilter", "modprobe br_netfilter"),
    breakage(
        "kernel-parameters",
        "sysctl -w net.ipv4.ip_forward=0",
        "sysctl -w net.ipv4.ip_forward=1; systemctl restart systemd-sysctl",
    ),
    breakage(
        "swap-off",
        "dd if=/dev/zero of=swap bs=1M count=8; chmod 600 swap; mkswap swap; swapon swap",
        "swapoff swap",
    ),
    breakage(
        "cloud-init-order",
        "mv /etc/systemd/system/cloud-final.service.d order.d; systemctl daemon-reload",
        "mv order.d /etc/systemd/system/cloud-final.service.d; systemctl daemon-reload",
    ),
    breakage("cloud-init-done", "mv /run/cloud-init/result.json .", "mv result.json /run/cloud-init/"),
    breakage(
        "cloud-init-switch",
        "cp -a $features features.py; echo 'ERROR_ON_USER_DATA_FAILURE = True' >> $features",
        "cp -a features.py $features",
    ),
    breakage("own-identity", "mkdir keys; mv /etc/ssh/ssh_host_* keys/", "mv keys/* /etc/ssh/"),
    breakage("address", "wrap='unshare --net'", "wrap="),
];

/// What the machine runs when its start is done. Every promise is checked before it is broken, after, and mended.
fn script(port: u16, pause: &str) -> String {
    let mut script = format!(
        "mkdir -p /root/promises; cd /root/promises\n\
         for file in image-builder expected.json; do curl -fsS -O http://{HOST_IN_GUEST}:{port}/$file; done\n\
         chmod +x image-builder; touch results\n\
         systemctl is-system-running --wait\n\
         wrap=; expected=expected.json; pause={pause}\n\
         sed 's/\"firmware\":\"efi\"/\"firmware\":\"bios\"/' expected.json > bios.json\n\
         disk=/dev/$(lsblk -ndo PKNAME $(findmnt -no SOURCE /)); last=$(($(blockdev --getsz $disk) - 1))\n\
         features=$(python3 -c 'import cloudinit.features as f; print(f.__file__)')\n\
         check() {{\n\t: > report\n\
         \t$wrap ./image-builder guest-checks --expected $expected --only $1 --report report\n\
         \tprintf '%s %s %s\\n' $1 $2 \"$(cat report)\" >> results\n}}\n\
         replace() {{\n\tprintf '#!/bin/sh\\n%s\\n' \"$2\" > program; chmod +x program\n\
         \tmount --bind program \"$(readlink -f $(command -v $1))\"\n}}\n\
         restore() {{ umount \"$(readlink -f $(command -v $1))\"; }}\n\
         drop_in() {{\n\tmkdir -p /run/systemd/system/$1.d\n\
         \tprintf '%s\\n' $2 $3 > /run/systemd/system/$1.d/zz.conf; systemctl daemon-reload\n}}\n"
    );
    for Breakage { promise, before, breaking, mending } in BREAKAGES {
        let _ = write!(
            script,
            "{before}\ncheck {promise} whole\n{breaking}\ncheck {promise} broken\n{mending}\ncheck {promise} mended\n"
        );
    }
    let _ = writeln!(script, "curl -fsS --data-binary @results http://{HOST_IN_GUEST}:{port}/results");
    script
}

#[tokio::test]
async fn every_broken_promise_of_a_started_image_is_seen() {
    let namespace = TestNamespace::create("promises").await;
    let image = image(&namespace).await;
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    node_image_builder::package::unpack(&image, &disk).unwrap();

    let client = http::client(&Proxy::default(), None).unwrap();
    let query = ReleaseQuery {
        manifest_url: format!("{}/releases/eks-a/manifest.yaml", setting("NIB_MIRROR_URL")),
        ..ReleaseQuery::new(CHANNEL)
    };
    let release = Resolver::new(client).resolve(&query).await.unwrap();
    let pause = release.pause_image.clone();
    let expected = Expected {
        os: Os { name: OsName::Debian, version: "12".into() },
        provider: Provider::Baremetal,
        firmware: Firmware::Efi,
        images: vec![pause.clone()],
        release: Some(release),
        packages: vec![],
        upstream: false,
    };
    let checked: Vec<_> =
        image_contract::promises().filter(|promise| promise.level == Level::Guest).map(|promise| promise.id).collect();
    let broken: Vec<_> = BREAKAGES.iter().map(|breakage| breakage.promise).collect();
    assert_eq!(broken, checked, "every promise has to be broken, in the order of the table");

    let results = check_in_machine(&disk, dir.path(), &expected, &pause).await;
    let mut wrong = vec![];
    for id in &broken {
        for (state, kept) in [("whole", true), ("broken", false), ("mended", true)] {
            let report = results.get(&format!("{id} {state}"));
            match report.and_then(|report| report.results.first()) {
                Some(result) if result.failure.is_none() == kept => {
                    if let Some(failure) = &result.failure {
                        eprintln!("  {id}: {failure}");
                    }
                }
                found => wrong.push(format!("{id} {state}: {found:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    namespace.delete().await;
}

/// Boots the disk and gives what the checks said, by promise and state.
async fn check_in_machine(disk: &Path, dir: &Path, expected: &Expected, pause: &str) -> BTreeMap<String, GuestReport> {
    let (sender, mut receiver) = mpsc::channel(1);
    let program = PathBuf::from(setting("NIB_BINARY"));
    let expected = serde_json::to_string(expected).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = script(port, pause);
    let router = Router::new()
        .route("/image-builder", get(async move || tokio::fs::read(program).await.unwrap()))
        .route("/expected.json", get(async move || expected))
        .route("/script", get(async move || script))
        .route(
            "/results",
            post(async move |results: String| {
                sender.send(results).await.unwrap();
            }),
        );
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

    let command = format!("curl -fsS http://{HOST_IN_GUEST}:{port}/script | sh -x > /dev/ttyS0 2>&1");
    let cloud_config =
        serde_json::json!({"runcmd": [["systemd-run", "--no-block", "--unit=promises", "/bin/sh", "-c", command]]});
    let metadata = serve(&format!("#cloud-config\n{cloud_config}\n"), Router::new()).await;
    provision(disk, dir, metadata);
    let machine = Machine::start(disk, dir);
    let results = machine.within(LIMIT, "results", async { receiver.recv().await.ok_or("the server ended") }).await;
    results
        .lines()
        .map(|line| {
            let (id, rest) = line.split_once(' ').unwrap();
            let (state, report) = rest.split_once(' ').unwrap_or((rest, ""));
            let report = GuestReport::find(report).unwrap_or_else(|| panic!("no report in: {line}"));
            (format!("{id} {state}"), report)
        })
        .collect()
}
