//! A whole build by the engine `Native` against one by the engine `ImageBuilder`, which has Packer start a machine and Ansible do
//! the equivalent in it, by the roles in `tests/imagebuilder/upstream`. Both start from the same Debian, which the one gets
//! as an archive and the other as a disk, install the same release and upload to the same server; the result is booted by
//! neither.
//!
//! Needs root, the release binary, which does both builds, and the development cluster's release mirror, served where a
//! machine on this one reaches it: see `dev/bench-engines`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a benchmark")]
#![allow(unreachable_pub, reason = "nothing outside uses a benchmark")]

mod common;

use std::{
    env, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use node_image_builder::{
    contract::{Accelerator, Archive, Base, BaseChecksum, BuildOutcome, BuildReport, BuildRequest, Engine, Os, OsName},
    native::accelerator,
    process::Runner,
    secret::Redactor,
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use common::{Bench, print_stages};

fn main() {
    let bench = Bench::start("dev/bench-engines");
    let native = bench.request();
    let image_builder = image_builder(&bench, &native);
    let runner = Runner::new(Redactor::default(), CancellationToken::new());
    let probe = accelerator::probe(Accelerator::Any, bench.work.path(), &runner);
    let virtualization = bench.runtime.block_on(probe).unwrap();

    let (ours, our_time) = run(&native, &bench.work.path().join("native"));
    let (theirs, their_time) = run(&image_builder, &bench.work.path().join("packer"));

    println!("\nmachines run with {}", virtualization.name());
    print_stages("Native", &ours.stage_seconds);
    print_stages("Packer and Ansible", &theirs.stage_seconds);
    println!("Native {:.1} s, Packer and Ansible {:.1} s", our_time.as_secs_f64(), their_time.as_secs_f64());
    println!("image of Native {} bytes, of Packer and Ansible {} bytes", ours.image.size, theirs.image.size);
    println!(
        "Native takes {:.2} times as long as Packer and Ansible",
        our_time.as_secs_f64() / their_time.as_secs_f64()
    );
}

/// Runs a build by the release binary, as a pod does; also says how long it took.
fn run(request: &BuildRequest, work: &Path) -> (BuildOutcome, Duration) {
    fs::create_dir(work).unwrap();
    let (document, report) = (work.join("build.json"), work.join("report"));
    fs::write(&document, serde_json::to_vec(request).unwrap()).unwrap();
    // It is the home of Packer and Ansible, which write there.
    let upstream = work.join("upstream");
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imagebuilder/upstream");
    assert!(Command::new("cp").arg("-r").args([&ours, &upstream]).status().unwrap().success(), "cp {}", ours.display());
    let begin = Instant::now();
    let ended = Command::new(env::var_os("NIB_BINARY").expect("set NIB_BINARY, or run dev/bench-engines"))
        .arg("run")
        .args([Path::new("--build"), &document])
        .args([Path::new("--work-dir"), &work.join("work")])
        .args([Path::new("--report"), &report])
        .args([Path::new("--upstream"), &upstream])
        .status()
        .unwrap();
    let took = begin.elapsed();
    match serde_json::from_slice(&fs::read(&report).unwrap()).unwrap() {
        BuildReport::Succeeded(outcome) => (*outcome, took),
        BuildReport::Failed(failure) => panic!("{ended}: {failure:?}"),
    }
}

/// The same build by Packer and Ansible, which have no recipe of Debian's name.
fn image_builder(bench: &Bench, native: &BuildRequest) -> BuildRequest {
    let url = format!("{}/base/debian-12.qcow2", bench.mirror);
    BuildRequest {
        os: Os { name: OsName::Ubuntu, version: "22.04".into() },
        engine: serde_json::from_value::<Engine>(json!({"imageBuilder": {"timeoutSeconds": 2 * 60 * 60}})).unwrap(),
        base: Base::Archive(Archive {
            checksum: BaseChecksum::Sha256Sums(format!("{url}.sha256").parse().unwrap()),
            url: url.parse().unwrap(),
        }),
        ..native.clone()
    }
}
