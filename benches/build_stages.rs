//! A whole Native build, stage by stage, against the plain shell sequence that does the same: tar, apt in a chroot,
//! containerd, mke2fs, gzip, sha256sum, curl. Both take the same files from the same mirror and upload to the same
//! server; nothing is booted.
//!
//! Needs root and the development cluster's release mirror, served on this machine: see `dev/bench-build`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a benchmark")]
#![allow(unreachable_pub, reason = "nothing outside uses a benchmark")]

mod common;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use node_image_builder::{
    build::{self, Environment},
    contract::{Base, BuildOutcome, BuildReport, BuildRequest, ResolvedRelease},
    progress::{Reporter, Style},
    secret::{Credentials, Redactor},
};
use tokio_util::sync::CancellationToken;

use common::{Bench, DISK_SIZE_MIB, print_stages};

fn main() {
    unshare(CloneFlags::CLONE_NEWNS).expect("needs root");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let bench = Bench::start("dev/bench-build");
    let request = bench.request();
    let begin = Instant::now();
    let outcome = bench.runtime.block_on(native(&request, &bench.work.path().join("native")));
    let ours = begin.elapsed();
    let begin = Instant::now();
    let steps = shell(&request, &bench.uploads, &bench.work.path().join("shell"));
    let theirs = begin.elapsed();

    println!("\n{}; {} bytes", outcome.verification, outcome.image.size);
    print_stages("Native", &outcome.stage_seconds);
    println!("shell, seconds a step:");
    for (step, time) in steps {
        println!("  {step:<10} {:>7.1}", time.as_secs_f64());
    }
    println!("Native {:.1} s, shell {:.1} s", ours.as_secs_f64(), theirs.as_secs_f64());
    println!("Native takes {:.2} times as long as the shell", ours.as_secs_f64() / theirs.as_secs_f64());
}

async fn native(request: &BuildRequest, work: &Path) -> BuildOutcome {
    let environment = Environment {
        work_dir: work.to_owned(),
        reporter: Reporter::new(Style::Plain, Box::new(std::io::stdout())),
        redactor: Redactor::default(),
        credentials: Credentials::new(Redactor::default()),
        import: true,
        upstream: PathBuf::new(),
        cancel: CancellationToken::new(),
    };
    match build::run(request, environment).await {
        BuildReport::Succeeded(outcome) => *outcome,
        BuildReport::Failed(failure) => panic!("{failure:?}"),
    }
}

/// The same by hand. What costs no time, such as settings, is left out.
fn shell(request: &BuildRequest, uploads: &str, work: &Path) -> Vec<(&'static str, Duration)> {
    fs::create_dir_all(work).unwrap();
    let ResolvedRelease { kubelet, kubeadm, kubectl, cni_plugins, etcd, etcdadm, containerd, crictl, images, .. } =
        &request.release;
    let mut files = vec![kubelet, kubeadm, kubectl];
    files.extend([&cni_plugins.artifact, &etcd.artifact, &etcdadm.artifact, &containerd.artifact, &crictl.artifact]);
    files.extend(images);
    let mut list = fs::File::create(work.join("files")).unwrap();
    for file in files {
        writeln!(list, "{} {} {}", file.url, file.name.replace('/', "-"), file.sha256.as_deref().unwrap_or_default())
            .unwrap();
    }
    let images: Vec<_> = images.iter().map(|image| format!("/mnt/{}", image.name.replace('/', "-"))).collect();
    let Base::Archive(base) = &request.base else { panic!("the base is an archive") };
    let steps: [(&str, String); 6] = [
        (
            "fetch",
            format!(
                "curl -fsS -o base {} && while read -r url name sha256; do curl -fsS -o \"f-$name\" \"$url\" && \
                 echo \"$sha256  f-$name\" | sha256sum --check --quiet; mv \"f-$name\" \"$name\"; done <files && sha256sum base",
                base.url
            ),
        ),
        (
            "unpack",
            "mkdir root && tar --numeric-owner --xattrs --xattrs-include='*' -xf base -C root --exclude='./dev/*'"
                .into(),
        ),
        (
            "packages",
            "mount --rbind /dev root/dev && mount -t proc proc root/proc && mount -t tmpfs tmpfs root/run && \
             rm -f root/etc/resolv.conf && cp /etc/resolv.conf root/etc/resolv.conf && \
             export DEBIAN_FRONTEND=noninteractive && chroot root apt-get -q update && \
             chroot root apt-get -qy dist-upgrade && \
             chroot root apt-get -qy install --no-install-recommends cloud-init chrony conntrack socat nfs-common \
             auditd jq linux-image-amd64 shim-signed grub-efi-amd64-signed sudo && chroot root apt-get clean"
                .into(),
        ),
        (
            "install",
            format!(
                "tar -xzf containerd -C root && install -m 755 kubelet kubeadm kubectl root/usr/bin && \
                 mkdir -p root/opt/cni/bin && tar -xzf cni-plugins -C root/opt/cni/bin && \
                 tar -xzf etcdadm -C root/usr/bin && tar -xzf crictl -C root/usr/local/bin && \
                 mkdir -p root/mnt && mount --bind . root/mnt && chroot root sh -c '\
                 containerd >/dev/null 2>&1 & daemon=$!; until ctr version >/dev/null 2>&1; do sleep 0.1; done; \
                 for image in {}; do ctr -n k8s.io images import $image || exit 1; done; kill $daemon; wait $daemon' && \
                 umount root/mnt && umount root/run root/proc && umount -l root/dev && rm -rf root/var/lib/apt/lists/*",
                images.join(" ")
            ),
        ),
        (
            "disk",
            format!(
                "truncate -s {DISK_SIZE_MIB}M disk && printf 'label: gpt\\nsize=512M, type=U\\ntype=L\\n' | sfdisk -q disk && \
                 mke2fs -q -F -t ext4 -d root -E offset=$((513 << 20)) disk $(({DISK_SIZE_MIB} - 514))M && \
                 mkfs.vfat -F 32 --offset=2048 disk 524288 >/dev/null && mmd -i disk@@1M ::/EFI"
            ),
        ),
        ("publish", format!("gzip -1 <disk >disk.gz && sha256sum disk.gz && curl -fsS -T disk.gz {uploads}/disk.gz")),
    ];
    steps
        .into_iter()
        .map(|(step, script)| {
            let begin = Instant::now();
            let log: PathBuf = work.join(format!("{step}.log"));
            let out = fs::File::create(&log).unwrap();
            let status = Command::new("bash")
                .args(["-euc", &script])
                .current_dir(work)
                .stdout(out.try_clone().unwrap())
                .stderr(out)
                .status()
                .unwrap();
            assert!(status.success(), "{step}: {}", fs::read_to_string(log).unwrap_or_default());
            (step, begin.elapsed())
        })
        .collect()
}
