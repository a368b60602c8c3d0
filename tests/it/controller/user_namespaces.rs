//! Builds in user namespaces, where the administrator wants them.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Event, ObjectReference, Pod, PodSpec},
};
use kube::{
    Resource, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, Phase},
    controller::context::{Placement, Settings},
};
use serde_json::json;

use super::harness::{Harness, condition, message};

async fn harness(prefix: &str) -> Harness {
    let mut harness = Harness::without_operator(prefix).await;
    let placement = Placement { user_namespaces: true, ..Placement::default() };
    harness.start_operator_with(harness.operator_client.clone(), Settings { placement, ..harness.settings() });
    harness
}

fn spec(job: &Job) -> PodSpec {
    job.spec.clone().unwrap().template.spec.unwrap()
}

#[tokio::test]
async fn builds_are_not_privileged_and_need_the_privileged_level_all_the_same() {
    let harness = harness("users").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let rights = spec(&job).containers[0].security_context.clone().unwrap();
    assert_eq!((spec(&job).host_users, rights.privileged), (Some(false), None));
    let template = serde_json::to_value(&job.spec.as_ref().unwrap().template).unwrap();
    for level in ["restricted", "baseline"] {
        harness.enforce(level).await;
        let refusal = harness.admit(&template).await.unwrap_err();
        // Mounting takes each of these, and `baseline` forbids each.
        for field in ["SYS_ADMIN", "procMount", "AppArmor"] {
            assert!(refusal.contains(field), "{level}: {refusal}");
        }
        assert!(!refusal.contains("privileged=true"), "{level}: {refusal}");
    }
    harness.enforce("privileged").await;
    harness.admit(&template).await.unwrap();
    // The API server keeps all of it.
    let pod = harness.create_pod(&job, 0).await.unwrap().spec.unwrap();
    let kept = pod.containers[0].security_context.clone().unwrap();
    assert_eq!((pod.host_users, kept), (Some(false), rights));
}

/// A build whose pod kubelet gives no user namespace, and what kubelet says.
async fn waits_for_a_user_namespace(harness: &Harness) -> (Pod, &'static str) {
    harness.create("image", json!({})).await;
    let pod = harness.create_pod(&harness.job("image").await, 0).await.unwrap();
    // As kubelet 1.34 says it with containerd 1.6.
    let refusal = "can't set `spec.hostUsers: false`, runtime does not support user namespaces";
    let event = Event {
        metadata: ObjectMeta { generate_name: Some("event-".to_owned()), ..ObjectMeta::default() },
        involved_object: ObjectReference { namespace: pod.namespace(), ..pod.object_ref(&()) },
        reason: Some("FailedCreatePodSandBox".to_owned()),
        message: Some(format!("Failed to create pod sandbox: {refusal}")),
        ..Event::default()
    };
    harness.api::<Event>().create(&PostParams::default(), &event).await.unwrap();
    (pod, refusal)
}

#[tokio::test]
async fn a_node_that_has_no_user_namespaces_is_told_while_the_pod_waits() {
    let harness = harness("nousers").await;
    let (pod, refusal) = waits_for_a_user_namespace(&harness).await;
    let expected = Some(("True", "UserNamespacesUnsupported"));
    let status = harness.until("image", "explained", |s| condition(s, "Reconciling") == expected).await;
    assert_eq!((status.phase, condition(&status, "Stalled")), (Some(Phase::Pending), None));
    let told = message(&status, "Reconciling");
    for part in [refusal, "containerd 2.0", "builds.userNamespaces"] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    // It heals when the node is another one.
    harness.run_pod(&pod).await;
    let status = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!(condition(&status, "Reconciling"), Some(("True", "Building")));
}

#[tokio::test]
async fn a_build_that_waits_for_its_user_namespace_starts_anew_when_none_is_wanted_any_more() {
    let mut harness = harness("lessusers").await;
    waits_for_a_user_namespace(&harness).await;
    let expected = Some(("True", "UserNamespacesUnsupported"));
    harness.until("image", "explained", |s| condition(s, "Reconciling") == expected).await;
    harness.stop_operator().await;
    harness.start_operator();
    harness.until("image", "replaced", |s| condition(s, "Reconciling") == Some(("True", "Replacing"))).await;
    // As the garbage collector does.
    harness.remove_pods().await;
    harness.until("image", "building", |s| condition(s, "Reconciling") == Some(("True", "Building"))).await;
    let job = spec(&harness.job("image").await);
    let privileged = job.containers[0].security_context.as_ref().unwrap().privileged;
    assert_eq!((job.host_users, privileged), (None, Some(true)));
}

#[tokio::test]
async fn the_other_engine_is_refused() {
    let harness = harness("otherengine").await;
    let spec = json!({ "engine": "ImageBuilder", "os": { "name": "ubuntu", "version": "22.04" }, "base": null });
    harness.create("image", spec).await;
    let status = harness.until("image", "stalled", |s| condition(s, "Stalled").is_some()).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "NotSupported")));
    assert!(message(&status, "Stalled").contains("builds.userNamespaces"), "{}", message(&status, "Stalled"));
    assert_eq!(harness.api::<NodeImageBuild>().get("image").await.unwrap().metadata.generation, Some(1));
    assert!(harness.jobs().await.is_empty());
}
