//! A build whose surroundings fail one after the other and that succeeds all the same.

use std::{collections::BTreeSet, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::json;

use crate::{
    cluster::{SYSTEM, TestNamespace, is, is_current, kubectl, served_files, status, until},
    mirror::spec,
};

const LIMIT: Duration = Duration::from_secs(25 * 60);

/// Kills the operator's pod as a node failure would.
async fn kill_operator(namespace: &TestNamespace) {
    let pods: Api<Pod> = Api::namespaced(namespace.client.clone(), SYSTEM);
    let selector = ListParams::default().labels("app.kubernetes.io/component=operator");
    let names: Vec<_> = pods.list(&selector).await.unwrap().into_iter().map(|pod| pod.name_any()).collect();
    assert!(!names.is_empty(), "no operator pod");
    for name in &names {
        pods.delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }
}

/// Starts or stops the artifact server and waits until it is so.
fn scale_artifact_server(replicas: u8) {
    let deployment = kubectl(&[
        "get",
        "deployment",
        "-n",
        SYSTEM,
        "-l",
        "app.kubernetes.io/component=artifact-server",
        "-o",
        "name",
    ]);
    let deployment = deployment.trim();
    kubectl(&["scale", "-n", SYSTEM, deployment, &format!("--replicas={replicas}")]);
    kubectl(&["rollout", "status", "-n", SYSTEM, deployment, "--timeout=120s"]);
}

#[tokio::test]
async fn survives_operator_kills_a_lost_pod_and_an_artifact_server_outage() {
    let namespace = TestNamespace::create("lifecycle").await;
    let mut spec = spec();
    spec["verify"] = json!({"boot": "Never"});
    namespace.apply("survivor", spec).await;

    let mut killed_at = BTreeSet::new();
    let mut lost_pod = None;
    let mut outage = false;
    let stage = |build: &_| status(build)["progress"]["stage"].as_str().map(str::to_owned);
    let ready = loop {
        let next = namespace
            .wait("survivor", LIMIT, "at its next stage", |build| {
                let fresh = stage(build).filter(|stage| !killed_at.contains(stage));
                (is(build, "Ready") && is_current(build) || fresh.is_some()).then(|| (build.clone(), fresh))
            })
            .await;
        let (build, Some(stage)) = next else { break next.0 };
        eprintln!("  {stage}: the operator is killed");
        kill_operator(&namespace).await;
        if stage == "Install" && lost_pod.is_none() {
            let pods: Api<Pod> = Api::namespaced(namespace.client.clone(), &namespace.name);
            let name = namespace.pods().await[0].name_any();
            eprintln!("  {stage}: the build pod is killed");
            pods.delete(&name, &DeleteParams::default().grace_period(0)).await.unwrap();
            lost_pod = Some(name);
        }
        if stage == "Publish" {
            eprintln!("  {stage}: the artifact server goes away");
            scale_artifact_server(0);
            // The upload notices, before the server comes back.
            let pod = namespace.pods().await.into_iter().find(|pod| Some(pod.name_any()) != lost_pod).unwrap();
            until(Duration::from_secs(300), "the upload retries", async || {
                kubectl(&["logs", "-n", &namespace.name, &pod.name_any()]).contains("will try again")
            })
            .await;
            scale_artifact_server(1);
            outage = true;
        }
        assert!(status(&build)["failure"].is_null(), "{}", status(&build));
        killed_at.insert(stage);
    };
    assert!(lost_pod.is_some() && outage, "the build was over before everything had failed: {killed_at:?}");

    let status = status(&ready);
    let url = status["imageURL"].as_str().unwrap();
    let answer = reqwest::Client::new().head(url).send().await.unwrap();
    let length: u64 = answer.headers()["content-length"].to_str().unwrap().parse().unwrap();
    assert_eq!(json!(length), status["image"]["size"]);
    assert_eq!(namespace.leftovers().await.iter().filter(|name| name.starts_with("job/")).count(), 1);

    // A new request builds again and keeps the old image until then. What befell the first build left no trace in it: the
    // same inputs give the same bytes.
    let rebuild = async |value: &str| {
        kubectl(&[
            "annotate",
            "--overwrite",
            "-n",
            &namespace.name,
            "nib/survivor",
            &format!("nodeimagebuild.dev/rebuild={value}"),
        ]);
        let building = namespace
            .wait("survivor", LIMIT, "building again", |build| {
                let status = crate::cluster::status(build);
                (status["phase"] == "Building" && status["progress"].is_object()).then_some(status)
            })
            .await;
        assert!(building["imageURL"].is_string(), "the good image stays until there is a new one");
        building
    };
    let old = url.to_owned();
    assert_eq!(rebuild("again").await["imageURL"], json!(old));
    let again = namespace
        .wait("survivor", LIMIT, "Ready again", |build| {
            let status = crate::cluster::status(build);
            (is(build, "Ready") && is_current(build) && status["imageURL"] != json!(old)).then_some(status)
        })
        .await;
    assert_eq!(again["image"]["sha256"], status["image"]["sha256"]);

    // Taking a build back stops it.
    rebuild("once more").await;
    let files = served_files().len();
    namespace.delete_build("survivor").await;
    assert_eq!(served_files().len(), files, "deletion keeps finished images and leaves no part of an unfinished one");
    namespace.delete().await;
}
