//! Builds that must fail, each with a reason that a person can act on, and with nothing left behind.

use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{TestNamespace, condition, served_files, status},
    mirror::{Fault, Server, spec},
};

const LIMIT: Duration = Duration::from_secs(300);

/// Applies the build, waits until it is given up, and checks that the reason stands everywhere it should.
async fn fails(
    namespace: &TestNamespace,
    name: &str,
    spec: Value,
    stage: Option<&str>,
    class: &str,
    reason: &str,
) -> String {
    namespace.apply(name, spec).await;
    let build = namespace.wait_stalled(name, LIMIT).await;
    let stalled = condition(&build, "Stalled").unwrap();
    let status = status(&build);
    eprintln!("  {name}: {}", stalled["message"]);
    assert_eq!(stalled["reason"], reason, "{stalled}");
    assert_eq!(condition(&build, "Ready").unwrap()["status"], "False");
    if let Some(stage) = stage {
        assert_eq!(status["failure"]["stage"], stage, "{status}");
        assert_eq!(status["failure"]["class"], class, "{status}");
        assert_eq!(status["failure"]["container"], "build", "{status}");
        assert!(status["failure"]["pod"].is_string(), "{status}");
    }
    assert!(status["imageURL"].is_null(), "a failed build has no image: {status}");
    let events = namespace.events(name).await;
    assert!(
        events.iter().any(|event| event.contains(reason) || event.contains(stalled["message"].as_str().unwrap())),
        "{events:?}"
    );
    let message = stalled["message"].as_str().unwrap().to_owned();
    namespace.delete_build(name).await;
    message
}

#[tokio::test]
async fn wrong_inputs_are_reported_and_not_retried() {
    let before = served_files();
    let namespace = TestNamespace::create("inputs").await;

    let mut unknown = spec();
    unknown["releaseChannel"] = json!("1-99");
    let message = fails(&namespace, "unknown-channel", unknown, None, "BadInput", "UnknownChannel").await;
    assert!(message.contains("1-99") && message.contains("1-34"), "names the channels there are: {message}");

    let mut checksum = spec();
    checksum["base"] = json!({"url": checksum["base"]["url"], "sha256": "0".repeat(64)});
    let message = fails(&namespace, "wrong-digest", checksum, Some("Fetch"), "BadInput", "ChecksumMismatch").await;
    assert!(message.contains(&"0".repeat(64)), "names what was expected: {message}");

    // An archive that is no root file system, served by its right digest.
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(vec![], flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    archive.append_data(&mut header, "hello.txt", &b"hello"[..]).unwrap();
    let bytes = archive.into_inner().unwrap().finish().unwrap();
    let files = Files::serve(&[("/not-a-root.tar.gz", &bytes)]).await;
    let mut not_a_root = spec();
    not_a_root["base"] =
        json!({"url": format!("{}/not-a-root.tar.gz", files.url), "sha256": hex::encode(Sha256::digest(&bytes))});
    fails(&namespace, "not-a-root", not_a_root, Some("Install"), "BadInput", "NotARootFileSystem").await;

    let server = Server::start(Some(("kubelet", Fault::Status(404))), None).await;
    let mut missing = spec();
    missing["source"] = json!({"releaseManifestURL": server.manifest_url()});
    let message = fails(&namespace, "artifact-404", missing, Some("Fetch"), "BadInput", "NotFound").await;
    assert!(message.contains("kubelet") && message.contains("404"), "{message}");

    let server = Server::start(Some(("kubelet", Fault::Corrupt)), None).await;
    let mut corrupt = spec();
    corrupt["source"] = json!({"releaseManifestURL": server.manifest_url()});
    fails(&namespace, "artifact-corrupt", corrupt, Some("Fetch"), "BadInput", "ChecksumMismatch").await;

    assert_eq!(served_files(), before, "a failed build left something on the artifact server");
    namespace.delete().await;
}

#[tokio::test]
async fn network_faults_are_retried_and_then_reported() {
    let namespace = TestNamespace::create("network").await;
    let faults =
        [("artifact-500", Fault::Status(500), "ServerError"), ("artifact-short", Fault::ShortBody, "ConnectionBroken")];
    for (name, fault, reason) in faults {
        let server = Server::start(Some(("kubelet", fault)), None).await;
        let mut spec = spec();
        spec["source"] = json!({"releaseManifestURL": server.manifest_url()});
        spec["build"]["retries"] = json!(0);
        let message = fails(&namespace, name, spec, Some("Fetch"), "Transient", reason).await;
        assert!(message.contains("kubelet"), "{message}");
    }
    namespace.delete().await;
}

#[tokio::test]
async fn what_the_node_lacks_is_reported() {
    let namespace = TestNamespace::create("node").await;

    let mut full = spec();
    full["build"]["resources"] = json!({
        "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "100Mi"},
        "limits": {"ephemeral-storage": "300Mi"},
    });
    full["build"]["retries"] = json!(0);
    namespace.apply("disk-full", full).await;
    let build = namespace.wait_stalled("disk-full", LIMIT).await;
    let message = condition(&build, "Stalled").unwrap()["message"].to_string();
    eprintln!("  disk-full: {message}");
    assert!(message.contains("ephemeral"), "names what was too small: {message}");
    namespace.delete_build("disk-full").await;

    // No guest boots under this machine's KVM, if it has one at all.
    let mut kvm = spec();
    kvm["verify"] = json!({"boot": "Required", "accelerator": "KVM"});
    let message = fails(&namespace, "no-kvm", kvm, Some("Prepare"), "Environment", "KvmUnavailable").await;
    assert!(message.contains("accelerator"), "says which field to change: {message}");
    namespace.delete().await;

    let restricted = TestNamespace::create_with_level("restricted", "restricted").await;
    restricted.apply("forbidden", spec()).await;
    let build = restricted
        .wait("forbidden", LIMIT, "refused", |build| {
            let text = serde_json::to_string(&status(build)["conditions"]).unwrap();
            text.contains("pod-security.kubernetes.io/enforce").then_some(text)
        })
        .await;
    eprintln!("  forbidden: {build}");
    restricted.delete_build("forbidden").await;
    restricted.delete().await;
}

/// A server for a few files on the host's end of the cluster's network.
struct Files {
    url: String,
    task: tokio::task::JoinHandle<()>,
}

impl Files {
    async fn serve(files: &[(&str, &[u8])]) -> Self {
        let mut router = axum::Router::new();
        for (path, bytes) in files {
            let bytes = bytes.to_vec();
            router = router.route(path, axum::routing::get(move || async move { bytes }));
        }
        let listener =
            tokio::net::TcpListener::bind(format!("{}:0", crate::cluster::setting("NIB_HOST_IP"))).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, task }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.task.abort();
    }
}
