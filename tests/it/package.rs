//! Packaging: what comes out unpacks to the disk that went in, whatever its layout, in bounded memory.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use futures::StreamExt;
use node_image_builder::{
    contract::{Classified, FailureClass},
    package::{Format, ImageSource, PackageError, Summary},
};
use proptest::prelude::*;
use rstest::rstest;
use sha2::{Digest, Sha256};

const MIB: u64 = 1 << 20;
/// The same as a length in memory.
const MIB_LEN: usize = 1 << 20;

pub fn source(disk: &Path) -> ImageSource {
    ImageSource::new(disk, "image", Format::RawGz)
}

fn source_as(format: Format, disk: &Path) -> ImageSource {
    ImageSource::new(disk, "image", format)
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(len: usize, mut state: u64) -> Vec<u8> {
    state |= 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(len)
    .collect()
}

/// A sparse disk of `size` bytes with noise at the given places.
pub fn sparse_disk(path: &Path, size: u64, data: &[(u64, usize)]) {
    let disk = File::create(path).unwrap();
    disk.set_len(size).unwrap();
    for &(offset, len) in data {
        disk.write_all_at(&noise(len, offset + 1), offset).unwrap();
    }
}

async fn package(disk: &Path) -> (Vec<u8>, Summary) {
    package_source(&source(disk)).await
}

async fn package_source(source: &ImageSource) -> (Vec<u8>, Summary) {
    let (mut bytes, _, summary) = source.open().unwrap().split();
    let mut packed = Vec::new();
    while let Some(piece) = bytes.next().await {
        packed.extend_from_slice(&piece.unwrap());
    }
    (packed, summary.get().await.unwrap())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn zcat(packed: &[u8]) -> Vec<u8> {
    let mut zcat =
        Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip is there");
    let mut stdin = zcat.stdin.take().unwrap();
    let packed = packed.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&packed));
    let output = zcat.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "gzip refuses what we wrote: {}", output.status);
    output.stdout
}

/// Layouts up to 6 MiB: sizes and places around block boundaries, holes, data of zeros.
fn layouts() -> impl Strategy<Value = (u64, Vec<(u64, usize, bool)>)> {
    let near =
        |limit: u64| (0..=limit / MIB, -3_i64..=3).prop_map(|(block, off)| (block * MIB).saturating_add_signed(off));
    (
        prop_oneof![near(6 * MIB), 0..6 * MIB],
        prop::collection::vec((near(6 * MIB), 0..MIB_LEN * 3 / 2, any::<bool>()), 0..5),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_layout_unpacks_to_itself((size, parts) in layouts()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let disk = File::create(&path).unwrap();
        for (offset, len, zeros) in parts {
            let data = if zeros { vec![0; len] } else { noise(len, offset + 1) };
            disk.write_all_at(&data, offset).unwrap();
        }
        disk.set_len(size).unwrap();
        let contents = std::fs::read(&path).unwrap();

        let (packed, summary) = block_on(package(&path));
        let mut unpacked = Vec::new();
        flate2::read::MultiGzDecoder::new(&packed[..]).read_to_end(&mut unpacked).unwrap();
        prop_assert!(unpacked == contents, "unpacks to something else");
        prop_assert!(zcat(&packed) == contents, "gzip unpacks it to something else");
        prop_assert_eq!(summary.size, packed.len() as u64);
        prop_assert_eq!(summary.virtual_size, size);
        prop_assert_eq!(summary.sha256, hex::encode(Sha256::digest(&packed)));
        prop_assert_eq!(&packed[4..8], &[0; 4], "a time stamp makes the bytes differ between runs");
    }
}

fn qemu_img(arguments: &[&str], files: &[&Path]) -> String {
    let output = Command::new("qemu-img").args(arguments).args(files).output().expect("qemu-img is there");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// The packed disk, which `qemu-img` finds no fault with, in a file beside the raw one.
fn packed_qcow2(disk: &Path) -> (PathBuf, Summary) {
    let (packed, summary) = block_on(package_source(&source_as(Format::Qcow2, disk)));
    assert_eq!(summary.size, packed.len() as u64);
    assert_eq!(summary.sha256, hex::encode(Sha256::digest(&packed)));
    let path = disk.with_extension("qcow2");
    std::fs::write(&path, packed).unwrap();
    let check = qemu_img(&["check", "-f", "qcow2"], &[&path]);
    assert!(check.contains("No errors were found"), "{check}");
    (path, summary)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_layout_becomes_a_clean_qcow2_of_itself((size, parts) in layouts()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let disk = File::create(&path).unwrap();
        for (offset, len, zeros) in parts {
            let data = if zeros { vec![0; len] } else { noise(len, offset + 1) };
            disk.write_all_at(&data, offset).unwrap();
            // Noise does not compress; this does.
            disk.write_all_at(&b"compressible ".repeat(len / 40), offset + len as u64 / 3).unwrap();
        }
        disk.set_len(size).unwrap();
        let mut contents = std::fs::read(&path).unwrap();

        let (qcow2, summary) = packed_qcow2(&path);
        // Disks are whole sectors.
        contents.resize(contents.len().next_multiple_of(512), 0);
        prop_assert_eq!(summary.virtual_size, contents.len() as u64);
        let back = dir.path().join("back.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&qcow2, &back]);
        prop_assert!(std::fs::read(&back).unwrap() == contents, "unpacks to something else");
    }
}

#[test]
fn qcow2_keeps_what_lies_at_the_borders_of_its_tables() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    // A table maps 512 MiB. The second has nothing, the last one half.
    let places = [(511 * MIB, 3), (512 * MIB - 70_000, 70_000), (1024 * MIB - 1, 2), (1800 * MIB - 5, 5)];
    sparse_disk(&disk, 1800 * MIB, &places);
    File::options().write(true).open(&disk).unwrap().write_all_at(&b"text ".repeat(30_000), 1400 * MIB).unwrap();
    let (qcow2, summary) = packed_qcow2(&disk);
    assert_eq!(summary.virtual_size, 1800 * MIB);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&disk, &qcow2]);
    let check = qemu_img(&["check", "-f", "qcow2"], &[&qcow2]);
    assert!(check.contains("% compressed") && !check.contains(" 0.00% compressed"), "nothing is compressed: {check}");
    assert!(summary.size < 2 * MIB, "holes take room: {} bytes", summary.size);
}

#[test]
fn qcow2_is_made_once_and_leaves_nothing_beside_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 3 * MIB, &[(MIB, 100_000)]);
    let source = source_as(Format::Qcow2, &disk);
    let first = block_on(package_source(&source));
    // Were it made anew, it would be another one.
    sparse_disk(&disk, 3 * MIB, &[(MIB, 100)]);
    assert!(first == block_on(package_source(&source.clone())));
    assert_eq!(block_on(source.summary(|_| {})).unwrap(), first.1);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn qcow2_without_room_for_it_is_an_error_of_the_environment() {
    // No file can be made beside this one.
    let error = source_as(Format::Qcow2, Path::new("/proc/version")).summary(|_| {}).await.unwrap_err();
    assert!(error.to_string().contains("can not write the packaged image in /proc"), "{error}");
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "WorkDirectoryUnusable"));
}

#[tokio::test]
async fn bytes_do_not_depend_on_where_the_holes_are() {
    let dir = tempfile::tempdir().unwrap();
    let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
    sparse_disk(&sparse, 20 * MIB + 5, &[(3 * MIB + 9, 700_000), (17 * MIB, 10)]);
    std::fs::write(&full, std::fs::read(&sparse).unwrap()).unwrap();
    let blocks = |path: &PathBuf| std::fs::metadata(path).unwrap().blocks();
    assert!(blocks(&sparse) < blocks(&full), "the file system keeps no holes, so this proves nothing");
    for format in [Format::RawGz, Format::Qcow2] {
        let package = |disk| {
            let source = source_as(format.clone(), disk);
            async move { package_source(&source).await }
        };
        let first = package(&sparse).await;
        assert!(first == package(&full).await && first == package(&sparse).await, "{format:?}");
    }
}

#[tokio::test]
async fn a_large_hole_costs_no_memory_and_little_output() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    // More than 4 GiB, so that the trailer's size field wraps.
    sparse_disk(&disk, 5 * 1024 * MIB, &[(4097 * MIB, 1000)]);
    let (packed, summary) = package(&disk).await;
    assert!(summary.size < 8 * MIB, "{} bytes for 5 GiB of zeros", summary.size);
    assert_eq!(packed[packed.len() - 4..], (1_u32 << 30).to_le_bytes(), "the size field is not modulo 2^32");
}

#[rstest]
#[case::raw_gz("raw.gz")]
#[case::qcow2("qcow2")]
#[tokio::test]
async fn memory_stays_below_64_mib_when_the_consumer_is_slow(#[case] format: &str) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 128 * MIB, &(0..128).map(|block| (block * MIB, MIB_LEN)).collect::<Vec<_>>());
    // In a process of its own: other tests use memory too.
    let peak = |disk: &Path| -> u64 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "package::packages_for_another_test", "--ignored", "--nocapture"])
            .env("PACKAGE_DISK", disk)
            .env("PACKAGE_FORMAT", format)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split_once("peak KiB: ")).expect("the child tells its memory").1;
        line.trim().parse::<u64>().unwrap() / 1024
    };
    let small = dir.path().join("small.raw");
    sparse_disk(&small, 1, &[(0, 1)]);
    let (full, base) = (peak(&disk), peak(&small));
    assert!(full - base < 64, "packaging took {full} MiB, {base} MiB of them before it began");
}

/// Not a test of its own: the body of the process that measures memory.
#[tokio::test]
#[ignore = "run by memory_stays_below_64_mib_when_the_consumer_is_slow"]
async fn packages_for_another_test() {
    let disk = PathBuf::from(std::env::var_os("PACKAGE_DISK").unwrap());
    let format = std::env::var("PACKAGE_FORMAT").unwrap();
    let format = [Format::RawGz, Format::Qcow2].into_iter().find(|known| known.as_str() == format).unwrap();
    let (mut bytes, _, summary) = source_as(format.clone(), &disk).open().unwrap().split();
    while let Some(piece) = bytes.next().await {
        // Let the compressor run as far ahead as it can.
        tokio::task::yield_now().await;
        piece.unwrap();
    }
    summary.get().await.unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak KiB: {}", peak.trim().trim_end_matches(" kB"));
}

#[tokio::test]
async fn dropping_the_stream_stops_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 64 * MIB, &(0..64).map(|block| (block * MIB, MIB_LEN)).collect::<Vec<_>>());
    for format in [Format::RawGz, Format::Qcow2] {
        let (mut bytes, done, summary) = source_as(format.clone(), &disk).open().unwrap().split();
        if format == Format::RawGz {
            bytes.next().await.unwrap().unwrap();
        }
        drop(bytes);
        let error = summary.get().await.unwrap_err();
        assert!(matches!(error, PackageError::Stopped), "{format:?}: {error}");
        assert!(done.share() < 1.0);
    }
}

#[tokio::test]
async fn a_disk_that_shrinks_is_an_error_and_never_a_short_image() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    sparse_disk(&disk, 64 * MIB, &(0..64).map(|block| (block * MIB, MIB_LEN)).collect::<Vec<_>>());
    let (mut bytes, _, summary) = source(&disk).open().unwrap().split();
    bytes.next().await.unwrap().unwrap();
    File::options().write(true).open(&disk).unwrap().set_len(40 * MIB).unwrap();
    let mut failed = false;
    while let Some(piece) = bytes.next().await {
        failed |= piece.is_err();
    }
    assert!(failed, "the stream ended as if it were whole");
    let error = summary.get().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "DiskUnreadable"));
}

#[tokio::test]
async fn absent_disk_is_named() {
    let error = source(Path::new("/nonexistent/disk.raw")).open().unwrap_err();
    assert!(error.to_string().contains("/nonexistent/disk.raw"), "{error}");
}
