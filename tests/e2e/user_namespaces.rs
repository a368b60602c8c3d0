//! Builds whose pods are not privileged: they have a user namespace of their own.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use serde_json::{Value, json};

use crate::{
    cluster::{ChartValues, TestNamespace, kubectl, status},
    mirror::spec,
};

/// Longest time for a whole build on a busy machine without KVM.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);

/// The pod of the build, once it runs.
async fn running_pod(namespace: &TestNamespace, build: &str) -> Pod {
    namespace.wait(build, BUILD_LIMIT, "building", |build| (status(build)["progress"].is_object()).then_some(())).await;
    namespace.pods().await.into_iter().find(|pod| pod.labels()["nodeimagebuild.dev/name"] == build).unwrap()
}

/// Waits for the image; gives the status.
async fn image(namespace: &TestNamespace, build: &str) -> Value {
    status(&namespace.wait_ready(build, BUILD_LIMIT).await)
}

/// Whether a namespace of this Pod Security level would take the pod.
async fn admitted(level: &str, pod: &Pod) -> Result<(), String> {
    let namespace = TestNamespace::create_with_level("level", level).await;
    let copy = Pod {
        metadata: ObjectMeta { generate_name: Some("copy-".to_owned()), ..ObjectMeta::default() },
        spec: pod.spec.clone(),
        status: None,
    };
    let pods: Api<Pod> = Api::namespaced(namespace.client.clone(), &namespace.name);
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let answer = pods.create(&params, &copy).await;
    namespace.delete().await;
    answer.map(drop).map_err(|error| error.to_string())
}

/// Seconds of all stages but the boot.
fn seconds(status: &Value) -> f64 {
    let stages = status["stageSeconds"].as_object().unwrap();
    stages.iter().filter(|(stage, _)| *stage != "Verify").filter_map(|(_, seconds)| seconds.as_f64()).sum()
}

#[tokio::test]
async fn a_pod_without_privileges_builds_the_same_image_in_a_user_namespace() {
    let namespace = TestNamespace::create("userns").await;
    let machines = std::fs::read_link("/proc/self/ns/user").unwrap();
    let user_namespace = |pod: &Pod| {
        let exec = ["exec", "-n", &namespace.name, &pod.name_any(), "--", "readlink", "/proc/self/ns/user"];
        kubectl(&exec).trim().to_owned()
    };
    // One of two images with the same bytes is booted.
    let mut unbooted = spec();
    unbooted["verify"] = json!({"boot": "Never"});
    namespace.apply("privileged", unbooted).await;
    let pod = running_pod(&namespace, "privileged").await;
    assert_eq!(user_namespace(&pod), machines.to_string_lossy());
    let with_privileges = image(&namespace, "privileged").await;

    let setting = ChartValues::set(&["builds.userNamespaces=true"]);
    namespace.apply("unprivileged", spec()).await;
    let pod = running_pod(&namespace, "unprivileged").await;
    let rights = serde_json::to_value(&pod.spec.as_ref().unwrap().containers[0].security_context).unwrap();
    assert_eq!((pod.spec.as_ref().unwrap().host_users, &rights["privileged"]), (Some(false), &json!(null)));
    assert_ne!(user_namespace(&pod), machines.to_string_lossy());
    // Root of the pod is nobody's id on the node.
    let ids = kubectl(&["exec", "-n", &namespace.name, &pod.name_any(), "--", "cat", "/proc/self/uid_map"]);
    let [first, outside, count] = ids.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{ids}") };
    assert!(first == "0" && count == "65536" && outside.parse::<u32>().unwrap() >= 65_536, "{ids}");
    for (level, taken) in [("restricted", false), ("baseline", false), ("privileged", true)] {
        let answer = admitted(level, &pod).await;
        assert_eq!(answer.is_ok(), taken, "{level}: {answer:?}");
    }
    let without = image(&namespace, "unprivileged").await;
    drop(setting);

    assert_eq!(without["image"]["sha256"], with_privileges["image"]["sha256"], "the same inputs give the same bytes");
    assert!(without["verification"].as_str().is_some_and(|told| told.contains("booted")), "{without}");
    let (own, privileged) = (seconds(&without), seconds(&with_privileges));
    eprintln!(
        "  but for the boot: {own:.0} s in a user namespace, {privileged:.0} s privileged, {:.2} times as long",
        own / privileged
    );
    namespace.delete().await;
}
