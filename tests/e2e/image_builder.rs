//! The engine `ImageBuilder`: Debian's Packer and Ansible build on a disk that the other engine made, in a directory that is
//! laid out like upstream's, and the result is booted and published as every image is. The program runs on the host as it
//! runs in a pod; its artifacts come from the mirror.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::{
    contract::{BuildReport, FailureReport, ResolvedRelease, VERSION},
    package,
    release::{ReleaseQuery, Resolver},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{TestNamespace, served_files, setting},
    mirror::{CHANNEL, spec},
};

/// Longest time for the build of the disk to start from.
const BASE_LIMIT: Duration = Duration::from_secs(25 * 60);
const BUILD_ID: &str = "0123456789";

/// A disk in the mirror; it goes with this.
struct Base {
    path: PathBuf,
    sha256: String,
}

impl Base {
    /// From an image that the artifact server has, else from one that is built now.
    async fn make(work: &Path) -> Self {
        let find = || served_files().into_iter().find(|file| file.extension().is_some_and(|found| found == "gz"));
        if find().is_none() {
            let namespace = TestNamespace::create("disk").await;
            namespace.apply("disk", spec()).await;
            namespace.wait_ready("disk", BASE_LIMIT).await;
            namespace.delete().await;
        }
        let image = find().expect("the image stays when its resource is deleted");
        let raw = work.join("base.raw");
        package::unpack(&image, &raw).unwrap();
        let path = PathBuf::from(setting("NIB_MIRROR_DIR")).join("base/image-builder-test.qcow2");
        let converted = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([&raw, &path]).status().unwrap();
        assert!(converted.success(), "qemu-img convert");
        fs::remove_file(raw).unwrap();
        let mut hash = Sha256::new();
        let mut file = BufReader::with_capacity(1 << 20, fs::File::open(&path).unwrap());
        loop {
            let block = file.fill_buf().unwrap();
            if block.is_empty() {
                break;
            }
            hash.update(block);
            let count = block.len();
            file.consume(count);
        }
        Self { path, sha256: hex::encode(hash.finalize()) }
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn release() -> ResolvedRelease {
    let query = ReleaseQuery {
        manifest_url: format!("{}/releases/eks-a/manifest.yaml", setting("NIB_MIRROR_URL")),
        eksa_release: None,
        channel: CHANNEL.to_owned(),
        rewrite: vec![],
        signatures: node_image_builder::contract::Signatures::Off,
    };
    Resolver::new(reqwest::Client::new()).resolve(&query).await.unwrap()
}

fn document(release: &ResolvedRelease, base: &Base, out: &Path) -> Value {
    let url = format!("{}/base/{}", setting("NIB_MIRROR_URL"), base.path.file_name().unwrap().display());
    json!({
        "version": VERSION,
        "identity": {"namespace": "local", "name": "packer", "buildId": BUILD_ID},
        "os": {"name": "ubuntu", "version": "22.04"},
        "provider": "baremetal",
        "firmware": "efi",
        "release": release,
        "engine": {"imageBuilder": {"timeoutSeconds": 1500}},
        "base": {"url": url, "checksum": {"sha256": base.sha256}},
        "diskSizeMib": 6656,
        "files": [{
            "path": "/etc/motd", "owner": "root", "group": "root", "mode": "0644",
            "content": {"inline": "built by Packer\n"},
        }],
        "verify": {"boot": "Required", "accelerator": "Any", "timeoutSeconds": 1200},
        "publish": [{"directory": {"path": out}}],
    })
}

/// A run of the program in `work`.
fn start(work: &Path, document: &Value) -> Child {
    fs::write(work.join("build.json"), document.to_string()).unwrap();
    let upstream = work.join("upstream");
    if !upstream.exists() {
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imagebuilder/upstream");
        let copied = Command::new("cp").arg("-r").args([&ours, &upstream]).status().unwrap();
        assert!(copied.success(), "cp -r {}", ours.display());
    }
    Command::new(setting("NIB_BINARY"))
        .arg("run")
        .arg("--build")
        .arg(work.join("build.json"))
        .arg("--work-dir")
        .arg(work.join("work"))
        .arg("--report")
        .arg(work.join("report"))
        .arg("--upstream")
        .arg(&upstream)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Reads progress until `wanted` is said, or to the end; gives the stages.
fn follow(child: &mut Child, wanted: Option<&str>) -> Vec<String> {
    let mut stages: Vec<String> = vec![];
    // Lines after `wanted` have a reader as well: the program goes on to write them.
    for line in BufReader::new(child.stdout.as_mut().unwrap()).lines() {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap_or_default();
        let Some(stage) = line["progress"]["stage"].as_str() else { continue };
        if stages.last().is_none_or(|last| last != stage) {
            eprintln!("  {}% {stage}", line["progress"]["percent"]);
            stages.push(stage.to_owned());
        }
        if wanted.is_some_and(|wanted| line["progress"]["message"].as_str().unwrap_or_default().contains(wanted)) {
            break;
        }
    }
    stages
}

fn report(work: &Path) -> BuildReport {
    serde_json::from_str(&fs::read_to_string(work.join("report")).unwrap()).unwrap()
}

/// Command lines of processes that speak of `text`.
fn processes(text: &str) -> Vec<String> {
    let read = |entry: std::io::Result<fs::DirEntry>| fs::read(entry.ok()?.path().join("cmdline")).ok();
    let lines = fs::read_dir("/proc").unwrap().filter_map(read);
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(text)).collect()
}

#[tokio::test]
async fn packer_builds_an_image_that_boots_and_cleans_up_when_it_is_stopped() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let work = tempfile::tempdir_in(setting("NIB_MIRROR_DIR")).unwrap();
    let work = work.path();
    let out = work.join("out");
    fs::create_dir(&out).unwrap();
    let base = Base::make(work).await;
    let document = document(&release().await, &base, &out);

    // Stopped while the machine runs, Packer ends it and removes its disk.
    let mut stopped = start(work, &document);
    follow(&mut stopped, Some("Waiting for SSH"));
    let machines = work.join("work/build/output").display().to_string();
    assert!(!processes(&machines).is_empty(), "no machine runs");
    kill(Pid::from_raw(stopped.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    follow(&mut stopped, None);
    assert_eq!(stopped.wait().unwrap().code(), Some(130));
    assert!(matches!(report(work), BuildReport::Failed(FailureReport { ref reason, .. }) if reason == "Cancelled"));
    assert_eq!(processes(&machines), [""; 0]);
    assert!(!work.join("work/build").exists(), "something is left of the build that was stopped");

    let mut built = start(work, &document);
    let stages = follow(&mut built, None);
    let code = built.wait().unwrap().code();
    let BuildReport::Succeeded(outcome) = report(work) else { panic!("{code:?}: {:?}", report(work)) };
    assert_eq!(stages, ["Prepare", "Fetch", "Install", "Seal", "Assemble", "Verify", "Publish"]);
    assert!(outcome.verification.starts_with("booted with "), "{}", outcome.verification);
    assert_eq!(outcome.image.base_digest, Some(format!("sha256:{}", base.sha256)));
    assert_eq!(outcome.image.virtual_size, 6656 << 20);
    let image = fs::read(out.join("ubuntu-2204-kube-1-34.gz")).unwrap();
    assert_eq!(outcome.image.sha256, hex::encode(Sha256::digest(&image)));
    eprintln!("  {}; stages {:?}", outcome.verification, outcome.stage_seconds);
    assert!(!work.join("work/build").exists());
}
