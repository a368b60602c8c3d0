//! The main job: a bare metal image, from `kubectl apply` to a machine that boots it.

use std::{
    io::{BufReader, Read},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{IMAGE_FIELDS, TestNamespace, kubectl, served_files, setting, status},
    mirror::{Server, spec},
};

/// Longest time for a whole build on a busy machine without KVM.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);
/// A password that must be found nowhere.
const CANARY: &str = "canary-7f3b19c4e2";

#[tokio::test]
async fn builds_publishes_and_boots_a_bare_metal_image() {
    let uploads = Server::start(None, Some(("uploader", CANARY))).await;
    let namespace = TestNamespace::create("main").await;
    namespace.apply_secret("upload-login", json!({"username": "uploader", "password": CANARY})).await;
    let mut spec = spec();
    spec["publish"] = json!([
        {"artifactServer": {}},
        {"http": {"url": uploads.url, "credentialsSecretRef": {"name": "upload-login"}}},
    ]);
    spec["files"] = json!([{"path": "/etc/motd", "content": "built by the end-to-end test\n", "mode": "0644"}]);
    namespace.apply("debian-12-1-34", spec).await;

    // Progress is visible while it builds: more than one stage, never going back.
    let mut stages: Vec<String> = vec![];
    let mut percent = 0;
    namespace
        .wait("debian-12-1-34", BUILD_LIMIT, "Ready", |build| {
            let status = status(build);
            if let Some(stage) = status["progress"]["stage"].as_str() {
                let now = status["progress"]["percent"].as_u64().unwrap();
                assert!(now >= percent, "progress went back from {percent} to {now}");
                percent = now;
                if stages.last().is_none_or(|last| last != stage) {
                    eprintln!("  {percent}% {stage}");
                    stages.push(stage.to_owned());
                }
            }
            (crate::cluster::is(build, "Ready") || crate::cluster::is(build, "Stalled")).then_some(())
        })
        .await;
    let build = namespace.wait_ready("debian-12-1-34", Duration::from_secs(10)).await;
    assert!(stages.len() > 3, "progress showed only {stages:?}");

    let status = status(&build);
    let url = status["imageURL"].as_str().unwrap();
    assert!(url.ends_with("/debian-12-kube-1-34.gz"), "{url}");
    assert!(url.replace(['-', '.', '_'], "").contains("134"), "EKS Anywhere looks for the version in {url}");
    assert_eq!(status["release"]["kubernetesVersion"], "v1.34.4");
    assert_eq!(status["phase"], "Ready");
    assert!(status["completionTime"].is_string() && status["startTime"].is_string());

    let fields = status["image"].as_object().unwrap().keys().filter(|field| *field != "additionalURLs");
    assert_eq!(fields.collect::<Vec<_>>(), IMAGE_FIELDS);

    // What the status says of the file is true, and so is the file beside it.
    let image = reqwest::get(url).await.unwrap().error_for_status().unwrap().bytes().await.unwrap();
    let sha256 = hex::encode(Sha256::digest(&image));
    assert_eq!(status["image"]["sha256"], json!(sha256));
    assert_eq!(status["image"]["size"], json!(image.len()));
    let sidecar = reqwest::get(format!("{url}.sha256")).await.unwrap().text().await.unwrap();
    assert_eq!(sidecar, format!("{sha256}  debian-12-kube-1-34.gz\n"));
    let fetch = async |url: &Value| -> Value {
        reqwest::get(url.as_str().unwrap()).await.unwrap().error_for_status().unwrap().json().await.unwrap()
    };
    let provenance = fetch(&status["image"]["provenanceURL"]).await;
    assert_eq!(provenance["subject"][0]["digest"]["sha256"], json!(sha256));
    let sbom = fetch(&status["image"]["sbomURL"]).await;
    let components = sbom["components"].as_array().unwrap();
    for name in ["kubelet", "containerd", "systemd"] {
        assert!(components.iter().any(|component| component["name"] == name), "{name} is in the image");
    }
    let copies = uploads.received.lock().unwrap().clone();
    assert!(copies.iter().any(|(path, length)| path.ends_with(".gz") && *length == image.len()), "{copies:?}");

    // Unpacked it is a disk of the size that was asked for, and the canary is nowhere in it.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("debian-12-kube-1-34.gz");
    std::fs::write(&file, &image).unwrap();
    let (length, found) = search(flate2::read::MultiGzDecoder::new(image.as_ref()), CANARY.as_bytes());
    assert_eq!(length, 6656 << 20);
    assert_eq!(status["image"]["virtualSize"], json!(length));
    assert!(!found, "the upload password is in the image");
    let readable = namespace.everything_readable().await;
    for secret in [CANARY.to_owned(), signing_key()] {
        assert!(!readable.contains(&secret), "a secret can be read in the cluster");
    }

    // A machine boots it.
    let output = Command::new(setting("NIB_BINARY"))
        .args(["verify", "--os", "debian", "--os-version", "12"])
        .arg(&file)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("v1.34.4"), "{text}");

    // Deleted, the record and its objects go; images stay unless the spec says otherwise.
    namespace.delete_build("debian-12-1-34").await;
    assert_eq!(reqwest::get(url).await.unwrap().status(), 200);
    namespace.delete().await;
}

/// Length of a stream, and whether `needle` is in it.
fn search(stream: impl Read, needle: &[u8]) -> (u64, bool) {
    let mut reader = BufReader::with_capacity(1 << 20, stream);
    let mut window = vec![];
    let (mut length, mut found) = (0, false);
    let mut block = vec![0; 1 << 20];
    loop {
        let count = reader.read(&mut block).unwrap();
        if count == 0 {
            return (length, found);
        }
        length += count as u64;
        window.extend_from_slice(&block[..count]);
        found |= memchr::memmem::find(&window, needle).is_some();
        let keep = window.len().min(needle.len() - 1);
        window.drain(..window.len() - keep);
    }
}

/// The key that operator and artifact server share.
fn signing_key() -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let secrets: serde_json::Value =
        serde_json::from_str(&kubectl(&["get", "secrets", "-n", crate::cluster::SYSTEM, "-o", "json"])).unwrap();
    let key = secrets["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|secret| secret["type"] == "Opaque")
        .find_map(|secret| secret["data"].as_object().unwrap().values().next())
        .expect("the chart makes a Secret with the signing key");
    String::from_utf8(STANDARD.decode(key.as_str().unwrap()).unwrap()).unwrap()
}

#[tokio::test]
async fn nothing_unfinished_is_kept_by_the_artifact_server() {
    let unfinished: Vec<_> = served_files()
        .into_iter()
        // What belongs to an image: its checksum, and its sizes in a hidden file.
        .filter(|file| {
            let name = file.file_name().unwrap().to_string_lossy();
            let belongs = name.ends_with(".sha256") || (name.starts_with('.') && name.ends_with(".json"));
            !belongs
        })
        .filter(|file| !std::path::Path::new(&format!("{}.sha256", file.display())).exists())
        .collect();
    assert!(unfinished.is_empty(), "{unfinished:?}");
}
