//! OVA: other programs read what we write, and get the disk that went in.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use futures::StreamExt;
use jiff::Timestamp;
use node_image_builder::{
    contract::{BuildRequest, Firmware},
    package::{Format, ImageSource, Machine, PackageError, Packaging, Summary},
};
use proptest::prelude::*;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::package::{noise, sparse_disk};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A build request for vSphere, as the controller writes it.
pub fn request() -> BuildRequest {
    let artifact = |name: &str| json!({"name": name, "url": format!("https://artifacts.example.com/{name}")});
    let versioned = |name: &str, version: &str| json!({"version": version, "artifact": artifact(name)});
    serde_json::from_value(json!({
        "version": "0.1.0",
        "identity": {"namespace": "images", "name": "ubuntu", "buildId": "0123456789"},
        "os": {"name": "ubuntu", "version": "22.04"},
        "provider": "vsphere",
        "firmware": "efi",
        "release": {
            "eksaVersion": "v0.26.1", "bundleNumber": 112, "channel": "1-31", "eksdName": "kubernetes-1-31-eks-47",
            "kubernetesVersion": "v1.31.14", "fullVersion": "v1.31.14-eks-1-31-47",
            "imageRepository": "public.ecr.aws/eks-distro",
            "pauseImage": "public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47",
            "kubelet": artifact("kubelet"), "kubeadm": artifact("kubeadm"), "kubectl": artifact("kubectl"), "images": [],
            "cniPlugins": versioned("cni-plugins", "v1.7.1"), "etcd": versioned("etcd", "v3.5.21"),
            "etcdadm": versioned("etcdadm", "v0.1.5"), "containerd": versioned("containerd", "v1.7.28"),
            "crictl": versioned("crictl", "v1.36.0"),
        },
        "base": {"url": "https://base.example.com/root.tar.xz", "checksum": {"sha256": "00"}},
        "diskSizeMib": 20480,
        "verify": {"boot": "Never", "accelerator": "Any", "timeoutSeconds": 60},
        "publish": [],
    }))
    .unwrap()
}

fn source(disk: &Path, stem: &str) -> ImageSource {
    source_of(disk, stem, &request())
}

pub fn source_of(disk: &Path, stem: &str, request: &BuildRequest) -> ImageSource {
    let built = Timestamp::from_second(1_700_000_000).unwrap();
    ImageSource::new(disk, stem, Format::Ova(Arc::new(Machine::new(request, 15, built))))
}

async fn drain(packaging: Packaging) -> (Vec<u8>, Summary) {
    let (mut bytes, _, summary) = packaging.split();
    let mut packed = Vec::new();
    while let Some(piece) = bytes.next().await {
        packed.extend_from_slice(&piece.unwrap());
    }
    (packed, summary.get().await.unwrap())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is there");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stdout));
}

/// What QEMU unpacks a VMDK to, once it found nothing wrong with it.
pub fn unpack_vmdk(vmdk: &Path) -> Vec<u8> {
    let raw = vmdk.with_extension("unpacked");
    let (from, to) = (vmdk.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["check", "-f", "vmdk", from]);
    qemu_img(&["convert", "-f", "vmdk", "-O", "raw", from, to]);
    std::fs::read(raw).unwrap()
}

/// Layouts up to 70 MiB, more than two grain tables: places around the boundaries of grains, pieces and tables.
fn layouts() -> impl Strategy<Value = (u64, Vec<(u64, usize, bool)>)> {
    let near = |unit: u64, limit: u64| {
        (0..=limit / unit, -3_i64..=3).prop_map(move |(number, off)| (number * unit).saturating_add_signed(off))
    };
    let place = move || prop_oneof![near(65536, 70 * MIB), near(MIB, 70 * MIB), near(32 * MIB, 70 * MIB)];
    (
        (1..=70 * MIB / SECTOR).prop_map(|sectors| sectors * SECTOR),
        prop::collection::vec((place(), 0..200_000_usize, any::<bool>()), 0..6),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_vmdk_converts_back_to_its_disk((size, parts) in layouts()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let disk = File::create(&path).unwrap();
        for (offset, len, zeros) in parts {
            let data = if zeros { vec![0; len] } else { noise(len, offset + 1) };
            disk.write_all_at(&data, offset).unwrap();
        }
        disk.set_len(size).unwrap();

        let source = source(&path, "image");
        let (vmdk, summary) = block_on(async { drain(source.ova().unwrap().open_vmdk().unwrap()).await });
        prop_assert_eq!(summary.size, vmdk.len() as u64);
        prop_assert_eq!(summary.virtual_size, size);
        prop_assert_eq!(summary.sha256, hex::encode(Sha256::digest(&vmdk)));
        let file = dir.path().join("image.vmdk");
        std::fs::write(&file, &vmdk).unwrap();
        prop_assert!(unpack_vmdk(&file) == std::fs::read(&path).unwrap(), "converts back to something else");
    }
}

#[tokio::test]
async fn vmdk_bytes_do_not_depend_on_where_the_holes_are() {
    let dir = tempfile::tempdir().unwrap();
    let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
    sparse_disk(&sparse, 40 * MIB, &[(3 * MIB + 9, 700_000), (33 * MIB, 10)]);
    std::fs::write(&full, std::fs::read(&sparse).unwrap()).unwrap();
    let vmdk = async |path: &PathBuf| drain(source(path, "image").ova().unwrap().open_vmdk().unwrap()).await;
    let first = vmdk(&sparse).await;
    assert!(first == vmdk(&full).await && first == vmdk(&sparse).await);
}

#[tokio::test]
async fn a_large_hole_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 2048 * 1024 * MIB, &[(4097 * MIB, 1000)]);
    let (vmdk, _) = drain(source(&disk, "image").ova().unwrap().open_vmdk().unwrap()).await;
    assert!(vmdk.len() < 512 * 1024, "{} bytes for 2 TiB of zeros", vmdk.len());
}

#[tokio::test]
async fn ova_holds_descriptor_manifest_and_disk_in_this_order() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 64 * MIB, &[(MIB, 300_000), (40 * MIB + 7, 99_999)]);
    let source = source(&disk, "ubuntu-2204-kube-1-31");
    assert_eq!(source.file_name(), "ubuntu-2204-kube-1-31.ova");
    let (ova, summary) = drain(source.open().unwrap()).await;
    assert_eq!((summary.size, summary.virtual_size), (ova.len() as u64, 64 * MIB));
    assert_eq!(summary.sha256, hex::encode(Sha256::digest(&ova)));

    let path = dir.path().join("image.ova");
    std::fs::write(&path, &ova).unwrap();
    let tar = |arguments: &[&str]| {
        let output = Command::new("tar").current_dir(&dir).args(arguments).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "tar refuses what we wrote: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let names = tar(&["-tf", "image.ova"]);
    let stem = "ubuntu-2204-kube-1-31";
    assert_eq!(names, format!("{stem}.ovf\n{stem}.mf\n{stem}.vmdk\n"));
    assert_eq!(&ova[257..265], b"ustar\x0000");
    tar(&["-xf", "image.ova"]);
    let manifest = std::fs::read_to_string(dir.path().join(format!("{stem}.mf"))).unwrap();
    let lines: Vec<_> = manifest.lines().collect();
    let digest = |name: &str| hex::encode(Sha256::digest(std::fs::read(dir.path().join(name)).unwrap()));
    let expected =
        [format!("{stem}.ovf"), format!("{stem}.vmdk")].map(|name| format!("SHA256({name})= {}", digest(&name)));
    assert_eq!(lines, expected);
    assert!(unpack_vmdk(&dir.path().join(format!("{stem}.vmdk"))) == std::fs::read(&disk).unwrap());
}

#[tokio::test]
async fn ova_bytes_are_the_same_every_time_and_only_the_first_pass_measures() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 16 * MIB, &[(MIB, 3_000_000)]);
    let source = source(&disk, "image");
    let first = drain(source.open().unwrap()).await;
    // From here on a pass that measures would read another disk.
    let texts = source.ova().unwrap().texts().await.unwrap();
    assert_eq!(first, drain(source.open().unwrap()).await);
    assert_eq!(first, drain(self::source(&disk, "image").open().unwrap()).await);
    let end = first.0.len() as u64 - texts.vmdk.size.next_multiple_of(512) - 1024;
    let vmdk = &first.0[usize::try_from(end).unwrap()..][..usize::try_from(texts.vmdk.size).unwrap()];
    assert_eq!(hex::encode(Sha256::digest(vmdk)), texts.vmdk.sha256);
}

#[tokio::test]
async fn a_disk_that_changes_after_it_was_measured_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 16 * MIB, &[(MIB, 3_000_000)]);
    let source = source(&disk, "image");
    source.ova().unwrap().texts().await.unwrap();
    File::options().write(true).open(&disk).unwrap().write_all_at(b"changed", 9 * MIB).unwrap();
    let (mut bytes, _, summary) = source.open().unwrap().split();
    let mut failed = false;
    while let Some(piece) = bytes.next().await {
        failed |= piece.is_err();
    }
    assert!(failed, "the stream ended as if it were whole");
    assert!(matches!(summary.get().await.unwrap_err(), PackageError::Read { .. }));
}

#[tokio::test]
async fn dropping_the_stream_stops_the_measuring_pass() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 64 * MIB, &(0..64).map(|block| (block * MIB, 1 << 20)).collect::<Vec<_>>());
    let (bytes, done, summary) = source(&disk, "image").open().unwrap().split();
    drop(bytes);
    assert!(matches!(summary.get().await.unwrap_err(), PackageError::Stopped));
    assert!(done.share() < 0.5);
}

#[tokio::test]
async fn descriptor_describes_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 64 * MIB, &[(MIB, 3)]);
    let machine = |request: &BuildRequest, vmx| {
        Format::Ova(Arc::new(Machine::new(request, vmx, Timestamp::from_second(1_700_000_000).unwrap())))
    };
    let efi = ImageSource::new(&disk, "ubuntu-2204-kube-1-31", machine(&request(), 15));
    insta::assert_snapshot!(efi.ova().unwrap().texts().await.unwrap().descriptor);

    let mut bios = request();
    bios.firmware = Firmware::Bios;
    bios.os.version = "<&\">".to_owned();
    let bios = ImageSource::new(&disk, "i", machine(&bios, 18)).ova().unwrap().texts().await.unwrap().descriptor;
    let document = roxmltree::Document::parse(&bios).unwrap();
    let attribute = |name: &str| {
        document.descendants().find_map(|node| {
            (node.attributes().any(|a| a.name() == "key" && a.value() == name))
                .then(|| node.attributes().find(|a| a.name() == "value").unwrap().value().to_owned())
        })
    };
    assert_eq!(attribute("firmware").as_deref(), Some("bios"));
    assert_eq!(attribute("DISTRO_VERSION").as_deref(), Some("<&\">"));
    assert!(bios.contains("<vssd:VirtualSystemType>vmx-18</vssd:VirtualSystemType>"));
}

#[tokio::test]
async fn memory_stays_below_64_mib() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 128 * MIB, &(0..128).map(|block| (block * MIB, 1 << 20)).collect::<Vec<_>>());
    let small = dir.path().join("small.raw");
    sparse_disk(&small, 512, &[(0, 1)]);
    // In a process of its own: other tests use memory too.
    let peak = |disk: &Path| -> u64 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "ova::packages_for_another_test", "--ignored", "--nocapture"])
            .env("PACKAGE_DISK", disk)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split_once("peak KiB: ")).expect("the child tells its memory").1;
        line.trim().parse::<u64>().unwrap() / 1024
    };
    let (full, base) = (peak(&disk), peak(&small));
    assert!(full - base < 64, "packaging took {full} MiB, {base} MiB of them before it began");
}

/// Not a test of its own: the body of the process that measures memory.
#[tokio::test]
#[ignore = "run by memory_stays_below_64_mib"]
async fn packages_for_another_test() {
    let disk = PathBuf::from(std::env::var_os("PACKAGE_DISK").unwrap());
    let (mut bytes, _, summary) = source(&disk, "image").open().unwrap().split();
    while let Some(piece) = bytes.next().await {
        piece.unwrap();
    }
    summary.get().await.unwrap();
    let mut status = String::new();
    File::open("/proc/self/status").unwrap().read_to_string(&mut status).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak KiB: {}", peak.trim().trim_end_matches(" kB"));
}
