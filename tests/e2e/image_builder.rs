//! The engine `ImageBuilder` in the cluster: the Job runs in a container image that is laid out like upstream's, in which
//! Debian's Packer and Ansible install the mirror's release on the mirror's disk, in a machine. The result is booted and
//! published as every image is.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use node_image_builder::{contract::Stage, package};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{IMAGE_FIELDS, TestNamespace, condition, is, is_current, setting, status, until},
    mirror::{CHANNEL, spec},
};

/// Longest time for a whole build, in machines that are software.
const LIMIT: Duration = Duration::from_secs(40 * 60);
const NAME: &str = "ubuntu-2204";
/// What a machine's command line says of its disk, as the pod sees it.
const OUTPUT: &str = "file=/work/build/output";

/// The disk that the machine starts from: URL and digest.
fn disk() -> (String, String) {
    let sums = PathBuf::from(setting("NIB_MIRROR_DIR")).join("base/debian-12.qcow2.sha256");
    let sums = fs::read_to_string(sums).unwrap();
    let (digest, name) = sums.trim().split_once("  ").unwrap();
    (format!("{}/base/{name}", setting("NIB_MIRROR_URL")), digest.to_owned())
}

fn packer_spec(suspend: bool) -> Value {
    let (url, sha256) = disk();
    let mut spec = spec();
    spec["engine"] = json!("ImageBuilder");
    spec["os"] = json!({"name": "ubuntu", "version": "22.04"});
    spec["base"] = json!({"url": url, "sha256": sha256});
    spec["files"] = json!([{"path": "/etc/motd", "content": "built by Packer\n"}]);
    spec["verify"] = json!({"timeoutSeconds": 1800});
    spec["build"]["retries"] = json!(0);
    spec["suspend"] = json!(suspend);
    spec
}

/// Command lines of processes, those of pods among them, that speak of `text`.
fn processes(text: &str) -> Vec<String> {
    let read = |entry: std::io::Result<fs::DirEntry>| fs::read(entry.ok()?.path().join("cmdline")).ok();
    let lines = fs::read_dir("/proc").unwrap().filter_map(read);
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(text)).collect()
}

/// The log of a pod, from now on to its end.
fn follow_log(namespace: &TestNamespace, pod: &Pod) -> Child {
    let name = pod.metadata.name.as_deref().unwrap();
    let kubectl = Command::new("kubectl")
        .args(["logs", "--follow", "--container", "build", "-n", &namespace.name, name])
        .stdout(Stdio::piped())
        .spawn();
    kubectl.unwrap()
}

/// A file of an ext4 file system that begins somewhere in a disk.
fn read_file(disk: &Path, offset: u64, path: &str) -> String {
    let device = format!("{}?offset={offset}", disk.display());
    let output = Command::new("debugfs").args(["-R", &format!("cat {path}"), &device]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn packer_and_ansible_build_an_image_in_the_cluster_and_a_stopped_build_leaves_nothing() {
    let namespace = TestNamespace::create("packer").await;

    // Stopped while the machine runs, Packer ends it and removes its disk before the pod goes.
    namespace.apply(NAME, packer_spec(false)).await;
    namespace
        .wait(NAME, LIMIT, "in its machine", |build| {
            assert!(!is(build, "Stalled"), "{}", status(build));
            let message = status(build)["progress"]["message"].as_str().unwrap_or_default().to_owned();
            message.contains("Waiting for SSH").then_some(())
        })
        .await;
    assert!(!processes(OUTPUT).is_empty(), "no machine runs");
    let [pod] = &namespace.pods().await[..] else { panic!("not one pod") };
    let images = |containers: &[k8s_openapi::api::core::v1::Container]| -> Vec<_> {
        containers.iter().map(|container| container.image.clone().unwrap()).collect()
    };
    let of_pod = pod.spec.as_ref().unwrap();
    assert_eq!(images(of_pod.init_containers.as_ref().unwrap()), ["localhost/node-image-builder/builder:dev"]);
    assert_eq!(images(&of_pod.containers), [setting("NIB_UPSTREAM_IMAGE")]);
    let mut log = follow_log(&namespace, pod);
    namespace.apply(NAME, packer_spec(true)).await;
    until(Duration::from_secs(300), "nothing is left of the build that was stopped", async || {
        let gone = namespace.pods().await.is_empty() && namespace.leftovers().await.is_empty();
        gone && processes(OUTPUT).is_empty()
    })
    .await;
    let mut said = String::new();
    log.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    log.wait().unwrap();
    assert!(said.contains("\"reason\":\"Cancelled\""), "it was killed: {said}");

    // Wanted again, it is built.
    namespace.apply(NAME, packer_spec(false)).await;
    let mut stages: Vec<String> = vec![];
    let ready = namespace
        .wait(NAME, LIMIT, "Ready", |build| {
            let now = status(build);
            if let Some(stage) =
                now["progress"]["stage"].as_str().filter(|stage| stages.last().is_none_or(|last| last != stage))
            {
                eprintln!("  {}% {stage}", now["progress"]["percent"]);
                stages.push(stage.to_owned());
            }
            assert!(!is(build, "Stalled"), "{:?}", condition(build, "Stalled"));
            (is_current(build) && is(build, "Ready")).then_some(now)
        })
        .await;
    assert!(stages.is_sorted_by_key(|stage| Stage::ALL.iter().position(|one| one.as_str() == stage)), "{stages:?}");
    // The short ones pass between two looks at the status.
    let stages = Stage::ALL.map(Stage::as_str).into_iter();
    let ended: Vec<_> = stages.filter(|stage| ready["stageSeconds"][stage].is_number()).collect();
    assert_eq!(ended, ["Prepare", "Fetch", "Install", "Seal", "Assemble", "Verify", "Publish"], "{ready}");
    eprintln!("  {}; stages {}", ready["verification"], ready["stageSeconds"]);

    // The status is what it is with the other engine.
    let url = ready["imageURL"].as_str().unwrap();
    assert!(url.ends_with(&format!("/ubuntu-2204-kube-{CHANNEL}.gz")), "{url}");
    assert_eq!(ready["phase"], "Ready");
    assert_eq!(ready["release"]["kubernetesVersion"], "v1.34.4");
    let fields: Vec<_> = ready["image"].as_object().unwrap().keys().collect();
    assert_eq!(fields, IMAGE_FIELDS);
    assert_eq!(ready["image"]["virtualSize"], json!(6656_u64 << 20));
    let provenance: Value =
        reqwest::get(ready["image"]["provenanceURL"].as_str().unwrap()).await.unwrap().json().await.unwrap();
    let base = &provenance["predicate"]["buildDefinition"]["resolvedDependencies"][0];
    assert_eq!((&base["name"], &base["digest"]["sha256"]), (&json!("base"), &json!(disk().1)));

    // So is the image: a gzip of a disk whose second partition is the root file system, and the file of the spec is in it.
    let image = reqwest::get(url).await.unwrap().error_for_status().unwrap().bytes().await.unwrap();
    assert_eq!(ready["image"]["sha256"], json!(hex::encode(Sha256::digest(&image))));
    let dir = tempfile::tempdir_in(setting("NIB_MIRROR_DIR")).unwrap();
    let (file, raw) = (dir.path().join("image.gz"), dir.path().join("image.raw"));
    fs::write(&file, &image).unwrap();
    package::unpack(&file, &raw).unwrap();
    let table = Command::new("sfdisk").arg("--json").arg(&raw).output().unwrap();
    let table: Value = serde_json::from_slice(&table.stdout).unwrap();
    let partitions = &table["partitiontable"]["partitions"];
    assert_eq!(partitions[0]["type"], "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "{table}");
    assert_eq!(partitions[0]["size"], json!((512_u64 << 20) / 512), "{table}");
    let root = partitions[1]["start"].as_u64().unwrap() * 512;
    assert_eq!(read_file(&raw, root, "/etc/motd"), "built by Packer\n");

    // Deleted, the record and its objects go; the image stays.
    namespace.delete_build(NAME).await;
    assert_eq!(reqwest::get(url).await.unwrap().status(), 200);
    namespace.delete().await;
}
