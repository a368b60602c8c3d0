//! `image-builder status` and `kubectl nodeimage` against a real API server, whose kubelet is a server of the test that
//! has one log.

use std::{
    os::unix::fs::symlink,
    path::Path,
    process::{Output, Stdio},
};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use node_image_builder::{
    api::v1alpha1::Phase,
    contract::{FailureClass, FailureReport, Progress, ProgressLine, Stage},
};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::Command,
    time::timeout,
};

use super::{image_builder, text};
use crate::{
    controller::harness::{Harness, SOON},
    support::{apiserver, tls::TlsParts},
};

/// The program's plug-in for kubectl, called by kubectl.
async fn kubectl(harness: &Harness, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_image-builder"), dir.path().join("kubectl-nodeimage")).unwrap();
    let kubectl = Path::new(&std::env::var_os("KUBEBUILDER_ASSETS").unwrap()).join("kubectl");
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(kubectl);
    command.arg("nodeimage").args(arguments).args(["-n", &harness.namespace]);
    command.env("KUBECONFIG", apiserver::kubeconfig().await).env("PATH", path).output().await.unwrap()
}

async fn said(harness: &Harness, arguments: &[&str]) -> String {
    let output = kubectl(harness, arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A kubelet that gives every pod this log, and a node with it.
async fn kubelet(harness: &Harness, name: &str, log: String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsParts::new().acceptor;
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, log) = (acceptor.clone(), log.clone());
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await.unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n";
                stream.write_all(format!("{head}{log}").as_bytes()).await.unwrap();
                let _ = stream.shutdown().await;
            });
        }
    });
    let nodes: Api<Node> = Api::all(harness.client.clone());
    let node: Node = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    let status = json!({ "status": {
        "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
        "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
    }});
    nodes.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
}

fn progress(percent: u8, message: &str) -> String {
    let progress = Progress { stage: Stage::Install, percent, message: message.to_owned() };
    serde_json::to_string(&ProgressLine { progress }).unwrap()
}

#[tokio::test]
async fn plug_in_lists_tells_cancels_rebuilds_and_gives_the_url() {
    let harness = Harness::start("plug-in").await;
    let ready = harness.ready("image", json!({})).await;
    let url = ready.image_url.clone().unwrap();
    assert_eq!(said(&harness, &["url", "image"]).await, format!("{url}\n"));
    let table = said(&harness, &["list"]).await;
    assert!(table.starts_with("NAME ") && table.contains("Ready") && table.contains(&url), "{table}");
    let summary = said(&harness, &["status", "image"]).await;
    for part in [&format!("{}/image: Ready", harness.namespace), "Kubernetes", &ready.build_id.clone().unwrap(), &url] {
        assert!(summary.contains(part), "{part} is not in {summary}");
    }
    assert_eq!(said(&harness, &["watch", "image"]).await, summary, "nothing is to be waited for");

    said(&harness, &["rebuild", "image"]).await;
    harness.until("image", "building again", |s| s.phase == Some(Phase::Building)).await;
    said(&harness, &["cancel", "image"]).await;
    harness.until("image", "cancelled", |s| s.phase == Some(Phase::Suspended)).await;
    let watched = kubectl(&harness, &["watch", "image"]).await;
    assert_eq!(watched.status.code(), Some(1));
    said(&harness, &["rebuild", "image"]).await;
    harness.until("image", "building again", |s| s.phase == Some(Phase::Building)).await;

    let missing = kubectl(&harness, &["url", "nothing"]).await;
    let told = text(&missing.stderr);
    assert!(!missing.status.success() && told.contains("there is no NodeImageBuild nothing"), "{told}");
    harness.create("new", json!({ "suspend": true })).await;
    let without = kubectl(&harness, &["url", "new"]).await;
    assert!(text(&without.stderr).contains("has no image yet"), "{}", text(&without.stderr));
}

#[tokio::test]
async fn status_follows_progress_and_log_until_the_build_ends() {
    let harness = Harness::start("follow").await;
    let log = [
        &progress(12, "unpacks the base"),
        "Setting up jq (1.6)",
        r#"{"timestamp":"t","level":"WARN","message":"the mirror is slow","seconds":3}"#,
        &progress(57, "installs packages"),
    ];
    kubelet(&harness, &harness.namespace, log.join("\n") + "\n").await;
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = apiserver::kubeconfig().await;
    let follow = |name: &str| {
        let mut command = image_builder(dir.path());
        command.args(["status", name, "-w", "-n", &harness.namespace]).env("KUBECONFIG", &kubeconfig);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    harness.create("image", json!({})).await;
    let mut following = follow("image");
    let job = harness.job("image").await;
    let mut placed = job.clone();
    placed.spec.as_mut().unwrap().template.spec.as_mut().unwrap().node_name = Some(harness.namespace.clone());
    let pod = harness.create_pod(&placed, 0).await.unwrap();
    harness.run_pod(&pod).await;
    let mut lines = BufReader::new(following.stderr.take().unwrap()).lines();
    let mut told = vec![];
    let log_is_told = async {
        // The status may have told how far it is before the log is read.
        let whole = |told: &[String]| {
            let mut of_log = told.iter().skip_while(|line| !line.contains("the mirror is slow"));
            of_log.any(|line| line.contains(" 57 % Install: installs packages"))
        };
        while !whole(&told) {
            told.push(lines.next_line().await.unwrap().expect("it ends early"));
        }
    };
    timeout(4 * SOON, log_is_told).await.unwrap_or_else(|_| panic!("{told:#?}"));
    let told = told.join("\n");
    for part in [
        "the Job `image-",
        " 12 % Install: unpacks the base",
        "Setting up jq (1.6)",
        "WARN  the mirror is slow seconds=3",
    ] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    let logs = said(&harness, &["logs", "image"]).await;
    assert!(
        logs.starts_with(" 12 % Install: unpacks the base\nSetting up jq (1.6)\nWARN  the mirror is slow"),
        "{logs}"
    );
    harness.finish(&job).await;
    let output = timeout(4 * SOON, following.wait_with_output()).await.expect("it does not end").unwrap();
    let summary = text(&output.stdout);
    assert!(output.status.success(), "{summary}");
    assert!(summary.contains("/image: Ready") && summary.contains("http://images.example.com/"), "{summary}");

    let report = FailureReport {
        stage: Stage::Fetch,
        class: FailureClass::BadInput,
        reason: "ChecksumMismatch".to_owned(),
        message: "kubelet has another digest".to_owned(),
    };
    harness.create("bad", json!({})).await;
    let following = follow("bad");
    harness.fail(&harness.job("bad").await, report).await;
    let output = timeout(4 * SOON, following.wait_with_output()).await.expect("it does not end").unwrap();
    let summary = text(&output.stdout);
    assert_eq!(output.status.code(), Some(65), "the class says who has to act");
    assert!(summary.contains("ChecksumMismatch: kubelet has another digest"), "{summary}");
}
