//! What somebody may and may not do who can write `NodeImageBuilds`, and nothing else.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use axum::{Router, http::header::LOCATION, routing::get};
use k8s_openapi::api::{batch::v1::Job, core::v1::Secret};
use kube::{
    Api, CustomResourceExt, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, Phase},
    controller::context::{Placement, Settings},
    reach::Reach,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::harness::{Harness, condition, message};

/// The properties that a schema has anywhere, each with those below it.
fn properties<'s>(schema: &'s Value, path: &str, found: &mut Vec<(String, BTreeSet<&'s str>)>) {
    if let Some(fields) = schema["properties"].as_object() {
        found.push((path.to_owned(), fields.keys().map(String::as_str).collect()));
        for (name, field) in fields {
            properties(field, &format!("{path}.{name}"), found);
        }
    }
    if schema["items"].is_object() {
        properties(&schema["items"], &format!("{path}[]"), found);
    }
}

#[test]
fn references_have_no_namespace_and_nobody_chooses_the_pods_image_or_account() {
    let definition = serde_json::to_value(NodeImageBuild::crd()).unwrap();
    let spec = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut found = vec![];
    properties(spec, "spec", &mut found);
    let mut references = 0;
    for (path, fields) in &found {
        if path.ends_with("Ref") {
            references += 1;
            let expected: &[&str] = if path.ends_with("KeyRef") { &["key", "name"] } else { &["name"] };
            assert!(fields.iter().eq(expected), "{path} has {fields:?}");
        }
        for name in
            ["namespace", "serviceAccount", "serviceAccountName", "command", "args", "env", "hostPath", "volumes"]
        {
            assert!(!fields.contains(name), "{path}.{name}");
        }
    }
    assert!(references >= 8, "{references}");
    let build = found.iter().find(|(path, _)| path == "spec.build").unwrap();
    let expected = ["nodeSelector", "resources", "retries", "timeout", "tolerations"];
    assert!(build.1.iter().eq(&expected), "think about what {:?} lets an author do", build.1);
}

#[tokio::test]
async fn the_pod_is_the_administrators_whatever_the_resource_says() {
    let harness = Harness::start("pod").await;
    let api = harness.api::<NodeImageBuild>();
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let wanted = json!({ "spec": { "build": { "image": "evil:1", "serviceAccountName": "admin" } } });
    // The API server drops what the definition does not have, or refuses it where the client wants that.
    let strict =
        PatchParams { field_validation: Some(kube::api::ValidationDirective::Strict), ..PatchParams::default() };
    let error = api.patch("image", &strict, &Patch::Merge(&wanted)).await.unwrap_err();
    assert!(error.to_string().contains("unknown field"), "{error}");
    harness.patch("image", wanted).await;
    let pod = job.spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.containers[0].image.as_deref(), Some("registry.example.com/builder:1"));
    assert_eq!((pod.service_account_name, pod.automount_service_account_token), (None, Some(false)));
    assert!(pod.host_network.is_none() && pod.host_pid.is_none() && pod.host_ipc.is_none());
    assert!(pod.volumes.unwrap().iter().all(|volume| volume.host_path.is_none()));
    assert_eq!(harness.jobs().await.len(), 1);
}

#[tokio::test]
async fn secrets_that_are_keys_to_what_others_do_are_given_to_no_build() {
    let harness = Harness::start("guarded").await;
    harness.create("other", json!({})).await;
    let other = harness.job("other").await;
    let create = async |secret: Value| {
        let secret: Secret = serde_json::from_value(secret).unwrap();
        harness.api::<Secret>().create(&PostParams::default(), &secret).await.unwrap();
    };
    let data = json!({ "text": "value" });
    create(json!({ "metadata": { "name": "release" }, "type": "helm.sh/release.v1", "stringData": data })).await;
    let account = json!({ "kubernetes.io/service-account.name": "default" });
    let metadata = json!({ "name": "account", "annotations": account });
    create(json!({ "metadata": metadata, "type": "kubernetes.io/service-account-token", "stringData": data })).await;
    let labels =
        json!({ "app.kubernetes.io/name": "node-image-builder", "app.kubernetes.io/component": "artifact-server" });
    create(json!({ "metadata": { "name": "signing", "labels": labels }, "stringData": data })).await;
    create(json!({ "metadata": { "name": "own" }, "stringData": data })).await;
    for (index, secret) in ["release", "account", "signing", &other.name_any()].into_iter().enumerate() {
        let name = format!("image-{index}");
        let file = json!({ "path": "/etc/stolen", "secretKeyRef": { "name": secret, "key": "text" } });
        harness.create(&name, json!({ "files": [file] })).await;
        let status = harness.until(&name, "stalled", |s| condition(s, "Stalled").is_some()).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", "SecretForbidden")), "{secret}");
        assert!(message(&status, "Stalled").contains("spec.files[0].secretKeyRef"), "{status:?}");
    }
    let file = json!({ "path": "/etc/mine", "secretKeyRef": { "name": "own", "key": "text" } });
    harness.create("mine", json!({ "files": [file] })).await;
    harness.job("mine").await;
    assert_eq!(harness.jobs().await.len(), 2);
}

#[tokio::test]
async fn the_base_is_never_asked_for_by_the_operator() {
    let harness = Harness::start("base").await;
    let url = format!("{}/base/root.tar.xz", harness.mirror.url);
    let asked = async |name: &str, base: Value| {
        let before = harness.mirror.requests.load(Ordering::Relaxed);
        harness.ready(name, json!({ "base": base })).await;
        harness.mirror.requests.load(Ordering::Relaxed) - before
    };
    asked("first", json!({ "url": url, "sha256": "a".repeat(64) })).await;
    // All release documents are known by now.
    assert_eq!(asked("second", json!({ "url": url, "sha256": "b".repeat(64) })).await, 0);
    assert_eq!(asked("third", harness.base()).await, 0, "the checksum list is the pod's business too");
}

/// A server of the author's that sends who asks somewhere else.
async fn redirecting(to: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = move || async move { (axum::http::StatusCode::FOUND, [(LOCATION, to)]) };
    let router = Router::new().route("/manifest.yaml", get(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/manifest.yaml")
}

#[tokio::test]
async fn the_operator_is_not_sent_to_its_own_machine_or_the_metadata_service() {
    let mut harness = Harness::without_operator("reach").await;
    let settings = Settings { reach: Reach::OtherMachines, ..harness.settings() };
    harness.start_operator_with(harness.operator_client.clone(), settings);
    let own = format!("{}/releases/eks-a/manifest.yaml", harness.mirror.url);
    let local = own.replace("127.0.0.1", "localhost");
    let sources = [
        ("address", json!({ "source": { "releaseManifestURL": own } })),
        ("name", json!({ "source": { "releaseManifestURL": local } })),
        ("metadata", json!({ "source": { "releaseManifestURL": "http://169.254.169.254/latest/meta-data/" } })),
        ("proxy", json!({ "proxy": { "http": own.replace("/releases/eks-a/manifest.yaml", "") } })),
    ];
    for (name, spec) in sources {
        harness.create(name, spec).await;
        let status = harness.until(name, "stalled", |s| condition(s, "Stalled").is_some()).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", "AddressForbidden")), "{name}: {status:?}");
    }
    assert_eq!(harness.mirror.requests.load(Ordering::Relaxed), 0, "the mirror, which is on this machine, was asked");
}

#[tokio::test]
async fn what_a_url_leads_to_is_not_told() {
    const SECRET: &str = "/releases/bundles/";
    let harness = Harness::start("told").await;
    // What is there is no release manifest: a bundle manifest, and a text that is no YAML of any kind.
    for (name, path) in [("other", SECRET), ("text", "/base/SHA256SUMS")] {
        let url = format!("{}{path}", harness.mirror.url);
        harness.create(name, json!({ "source": { "releaseManifestURL": url } })).await;
        let status = harness.until(name, "stalled", |s| s.phase == Some(Phase::Failed)).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", "InvalidManifest")), "{name}");
        let text = serde_json::to_string(&status).unwrap();
        let base = harness.mirror.base.lock().unwrap().clone();
        assert!(!text.contains(&base) && !text.contains("root.tar.xz"), "{text}");
    }
    // A redirect is followed, and is no way around it.
    let url = redirecting("/nowhere").await;
    harness.create("redirected", json!({ "source": { "releaseManifestURL": url } })).await;
    harness.until("redirected", "stalled", |s| condition(s, "Stalled") == Some(("True", "NotFound"))).await;
}

#[tokio::test]
async fn builds_run_on_the_nodes_that_the_administrator_chose() {
    let mut harness = Harness::without_operator("nodes").await;
    let node_selector = [("builds".to_owned(), "yes".to_owned())].into();
    let placement = Placement { node_selector, ..Placement::default() };
    harness.start_operator_with(harness.operator_client.clone(), Settings { placement, ..harness.settings() });
    harness.create("image", json!({ "build": { "nodeSelector": { "zone": "a" } } })).await;
    let selector = harness.job("image").await.spec.unwrap().template.spec.unwrap().node_selector.unwrap();
    assert_eq!(selector, [("builds", "yes"), ("zone", "a")].map(|(k, v)| (k.to_owned(), v.to_owned())).into());

    let anything = json!({ "operator": "Exists" });
    let control_plane = json!({ "key": "node-role.kubernetes.io/control-plane", "operator": "Exists" });
    for (name, build) in [
        ("elsewhere", json!({ "nodeSelector": { "builds": "no" } })),
        ("anywhere", json!({ "tolerations": [anything] })),
        ("control-plane", json!({ "tolerations": [{ "key": "x", "value": "y" }, control_plane] })),
    ] {
        harness.create(name, json!({ "build": build })).await;
        let status = harness.until(name, "stalled", |s| condition(s, "Stalled").is_some()).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", "PlacementForbidden")), "{name}");
    }
    harness
        .create("tolerant", json!({ "build": { "tolerations": [{ "key": "builds", "operator": "Exists" }] } }))
        .await;
    harness.job("tolerant").await;
    let jobs: Api<Job> = harness.api();
    assert_eq!(jobs.list(&ListParams::default()).await.unwrap().items.len(), 2);
}
