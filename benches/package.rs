//! Packaging a sparse disk against `gzip -1 FILE | sha256sum` on the same file, as a ratio.
//!
//! `cargo bench --bench package -- [RAW DISK]`; without a disk it makes one of 6656 MiB that holds this machine's
//! `/usr/lib` (at most 800 MiB of it).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use node_image_builder::package::{Format, ImageSource, Summary};

const MIB: u64 = 1 << 20;

fn main() {
    let dir = tempfile::tempdir().unwrap();
    // cargo adds `--bench`.
    let given = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let disk = given.map_or_else(|| sample_disk(dir.path()), PathBuf::from);

    let (ours, summary) = package(&disk);
    let (theirs, size) = gzip(&disk);
    let virtual_mib = f64::from(u32::try_from(summary.virtual_size / MIB).unwrap());
    let per_second = |time: Duration| virtual_mib / time.as_secs_f64();
    println!(
        "package:             {:6.2} s  {:5.0} MiB/s  {:4} MiB",
        ours.as_secs_f64(),
        per_second(ours),
        summary.size / MIB
    );
    println!(
        "gzip -1 | sha256sum: {:6.2} s  {:5.0} MiB/s  {:4} MiB",
        theirs.as_secs_f64(),
        per_second(theirs),
        size / MIB
    );
    println!("time ratio:          {:6.2}", theirs.as_secs_f64() / ours.as_secs_f64());
    println!("peak memory:         {}", peak_memory());
}

fn package(disk: &Path) -> (Duration, Summary) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = Instant::now();
    let summary = runtime.block_on(async {
        let (bytes, _, summary) = ImageSource::new(disk, "image", Format::RawGz).open().unwrap().split();
        bytes.try_for_each(|_| std::future::ready(Ok(()))).await.unwrap();
        summary.get().await.unwrap()
    });
    (start.elapsed(), summary)
}

fn gzip(disk: &Path) -> (Duration, u64) {
    let packed = disk.with_extension("bench.gz");
    let start = Instant::now();
    let script = r#"gzip -1 -c "$1" | tee "$2" | sha256sum"#;
    let status = Command::new("sh").args(["-c", script, "sh"]).arg(disk).arg(&packed).status().unwrap();
    let time = start.elapsed();
    assert!(status.success());
    let size = std::fs::metadata(&packed).unwrap().len();
    std::fs::remove_file(packed).unwrap();
    (time, size)
}

/// Files of `/usr/lib` with holes after every 32 MiB, as a file system leaves them.
fn sample_disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    let disk = File::create(&path).unwrap();
    disk.set_len(6656 * MIB).unwrap();
    let mut tar = Command::new("tar")
        .args(["-C", "/usr", "-cf", "-", "lib"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut data = tar.stdout.take().unwrap();
    let mut buffer = vec![0; 32 << 20];
    for part in 0..25 {
        data.read_exact(&mut buffer).unwrap();
        disk.write_all_at(&buffer, part * 256 * MIB).unwrap();
    }
    drop(data);
    tar.wait().unwrap();
    disk.sync_all().unwrap();
    std::io::stdout().flush().unwrap();
    path
}

fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown").trim().to_owned()
}
