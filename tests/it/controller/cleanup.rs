//! What builds leave in vCenter: the Jobs that remove it, and what becomes of the resource meanwhile.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{Namespace, Pod, Secret},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use node_image_builder::{
    api::v1alpha1::{DeletionPolicy, FINALIZER, NodeImageBuild, Phase},
    contract::{BuildReport, FailureClass, FailureReport, Stage},
    controller::{
        cleanup::{CleanUp, Outside, Scope},
        context::Lifecycle,
        plan::{Inputs, Observed, Plan, plan},
        queue::Admission,
        retention::Usage,
        validate,
    },
};
use serde_json::{Value, json};

use super::harness::{Harness, SOON, condition, message, until};

/// A build for vCenter, whose credentials are there.
async fn create(harness: &Harness, more: &Value) {
    let secret = json!({"metadata": {"name": "vcenter"}, "stringData": {"username": "u", "password": "p"}});
    harness.api::<Secret>().create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    let mut spec = json!({
        "baremetal": null,
        "vsphere": {
            "server": "vcenter.example.com", "credentialsSecretRef": {"name": "vcenter"}, "datacenter": "dc1",
            "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network",
        },
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    harness.create("image", spec).await;
}

/// The whole life of a pod that is killed: it says nothing, and Kubernetes tries no more.
async fn die(harness: &Harness, job: &Job) {
    let pod = harness.create_pod(job, 0).await.unwrap();
    harness.run_pod(&pod).await;
    harness.end_pod(&pod, 137, "").await;
    harness.end_job(job, false, "BackoffLimitExceeded").await;
}

async fn clean_ups(harness: &Harness) -> Vec<Job> {
    harness.api::<Job>().list(&ListParams::default().labels("nodeimagebuild.dev/clean-up-of")).await.unwrap().items
}

/// Waits for the only clean-up.
async fn clean_up(harness: &Harness) -> Job {
    let found = until(|| async {
        let mut found = clean_ups(harness).await;
        assert!(found.len() <= 1, "{found:#?}");
        found.pop()
    });
    tokio::time::timeout(SOON, found).await.expect("nothing cleans up")
}

/// What the clean-up of a build says that can not log in.
fn refused() -> FailureReport {
    FailureReport {
        stage: Stage::Publish,
        class: FailureClass::BadInput,
        reason: "VcenterLoginRefused".to_owned(),
        message: "vcenter.example.com does not accept user name and password".to_owned(),
    }
}

#[tokio::test]
async fn build_that_died_is_cleaned_up_after_with_its_own_document_and_secrets() {
    let harness = Harness::start("died").await;
    create(&harness, &json!({"build": {"nodeSelector": {"builds": "yes"}}})).await;
    let job = harness.job("image").await;
    assert!(clean_ups(&harness).await.is_empty());
    die(&harness, &job).await;
    let clean = clean_up(&harness).await;
    let id = harness.document(&job).await.identity.build_id;
    assert_eq!(clean.labels()["nodeimagebuild.dev/clean-up-of"], id);
    assert_eq!(clean.labels().get("nodeimagebuild.dev/build-id"), None, "it would pass for the build");
    let pod = clean.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    let container = &pod.containers[0];
    let document = "/etc/image-builder/build/build.json";
    assert_eq!(container.args.as_ref().unwrap()[..], ["clean-up", "--build", document]);
    let secrets: Vec<_> = pod.volumes.iter().flatten().map(|volume| volume.secret.clone().unwrap()).collect();
    let names: Vec<_> = secrets.iter().map(|secret| secret.secret_name.clone().unwrap()).collect();
    assert_eq!(names, [job.name_any(), "vcenter".to_owned()]);
    assert!(secrets.iter().all(|secret| secret.optional == Some(true)), "a Secret that is gone would keep it waiting");
    assert_eq!(container.security_context.as_ref().unwrap().privileged, None);
    assert_eq!(pod.security_context.as_ref().unwrap().run_as_non_root, Some(true));
    assert_eq!(pod.automount_service_account_token, Some(false));
    assert_eq!(pod.node_selector.as_ref().unwrap()["builds"], "yes");
    let status = harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!(condition(&status, "CleanUpFailed"), None);
    harness.end_job(&clean, true, "CompletionsReached").await;

    // Nothing is left to do when it goes.
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
}

#[tokio::test]
async fn build_that_failed_before_it_published_leaves_nothing_to_clean_up() {
    let harness = Harness::start("early").await;
    create(&harness, &json!({"deletionPolicy": "Delete"})).await;
    let job = harness.job("image").await;
    harness.fail(&job, FailureReport { stage: Stage::Prepare, ..refused() }).await;
    harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    // It would wait for a clean-up, which would not find the way in either.
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
    assert!(clean_ups(&harness).await.is_empty());
}

#[tokio::test]
async fn clean_up_that_fails_is_told_and_tried_again_when_its_job_is_deleted() {
    let harness = Harness::start("refused").await;
    create(&harness, &json!({})).await;
    die(&harness, &harness.job("image").await).await;
    let clean = clean_up(&harness).await;
    harness.fail(&clean, refused()).await;
    let status = harness.until("image", "told", |s| condition(s, "CleanUpFailed").is_some()).await;
    let told = message(&status, "CleanUpFailed");
    let hint = format!("kubectl delete job -n {} {}", harness.namespace, clean.name_any());
    assert!(told.contains("user name and password") && told.contains(&hint), "{told}");
    assert_eq!(harness.event("image", "CleanUpFailed").await, told);
    assert_eq!(status.phase, Some(Phase::Failed), "what was wrong with the build itself is still told");

    harness.remove_pods().await;
    harness.api::<Job>().delete(&clean.name_any(), &DeleteParams::background()).await.unwrap();
    harness.until("image", "mended", |s| condition(s, "CleanUpFailed").is_none()).await;
    let again = clean_up(&harness).await;
    assert_ne!(again.uid(), clean.uid());
}

#[tokio::test]
async fn resource_goes_when_the_build_that_was_killed_with_it_is_cleaned_up_after() {
    let harness = Harness::start("gone").await;
    create(&harness, &json!({})).await;
    let job = harness.job("image").await;
    harness.run_pod(&harness.create_pod(&job, 0).await.unwrap()).await;
    let api = harness.api::<NodeImageBuild>();
    api.delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<Job>(&job.name_any()).await;
    assert!(clean_ups(&harness).await.is_empty(), "the pod may still work");
    harness.remove_pods().await;
    let clean = clean_up(&harness).await;
    let pod = harness.create_pod(&clean, 0).await.unwrap();
    harness.run_pod(&pod).await;
    assert!(api.get_opt("image").await.unwrap().is_some());
    harness.end_pod(&pod, 0, "").await;
    harness.end_job(&clean, true, "CompletionsReached").await;
    harness.until_gone::<NodeImageBuild>("image").await;
}

#[tokio::test]
async fn cancelled_build_is_cleaned_up_after_before_its_secret_goes() {
    let harness = Harness::start("cancelled").await;
    create(&harness, &json!({})).await;
    let job = harness.job("image").await;
    harness.run_pod(&harness.create_pod(&job, 0).await.unwrap()).await;
    harness.patch("image", json!({"spec": {"suspend": true}})).await;
    harness.until_gone::<Job>(&job.name_any()).await;
    harness.remove_pods().await;
    let clean = clean_up(&harness).await;
    assert!(harness.api::<Secret>().get_opt(&job.name_any()).await.unwrap().is_some());
    harness.end_job(&clean, true, "CompletionsReached").await;
    harness.until_gone::<Secret>(&job.name_any()).await;
    harness.until_gone::<Job>(&clean.name_any()).await;
}

#[tokio::test]
async fn finished_template_goes_with_the_resource_only_when_the_policy_says_so() {
    let harness = Harness::start("retain").await;
    create(&harness, &json!({})).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
    assert!(clean_ups(&harness).await.is_empty());

    let harness = Harness::start("removal").await;
    create(&harness, &json!({"deletionPolicy": "Delete"})).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    let clean = clean_up(&harness).await;
    let arguments = clean.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].args.clone().unwrap();
    assert_eq!(arguments.last().unwrap(), "--finished-too");
    harness.end_job(&clean, true, "CompletionsReached").await;
    harness.until_gone::<NodeImageBuild>("image").await;
    assert!(!harness.events("image").await.iter().any(|(reason, _)| reason == "ImagesLeft"));
}

#[tokio::test]
async fn namespace_that_is_deleted_does_not_hang_for_a_clean_up_that_can_not_run() {
    let harness = Harness::start("terminating").await;
    create(&harness, &json!({"deletionPolicy": "Delete"})).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    let namespaces: Api<Namespace> = Api::all(harness.client.clone());
    namespaces.delete(&harness.namespace, &DeleteParams::default()).await.unwrap();
    // What the namespace controller does then.
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
}

/// A resource that was deleted some time ago, with a clean-up in this state.
fn deleted(ago: Duration, state: CleanUp, now: Timestamp) -> Observed {
    let mut build: NodeImageBuild = serde_json::from_value(json!({
        "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
        "metadata": {"name": "image", "namespace": "images", "uid": "6f1d", "finalizers": [FINALIZER]},
        "spec": {
            "os": {"name": "ubuntu", "version": "22.04"}, "releaseChannel": "1-31",
            "nutanix": {
                "endpoint": "prism.example.com", "credentialsSecretRef": {"name": "prism"}, "cluster": {"name": "pe"},
            },
        },
    }))
    .unwrap();
    build.metadata.deletion_timestamp = Some(Time(now - ago));
    build.spec.deletion_policy = DeletionPolicy::Retain;
    let id = "0123456789".to_owned();
    Observed {
        wish: validate::wish(&build),
        build: Arc::new(build),
        jobs: vec![],
        secrets: [id.clone()].into(),
        live_pods: [].into(),
        pod_refusals: [].into(),
        progress: None,
        manifest_changed: false,
        usage: Usage::NotNeeded,
        outside: Outside {
            builds: [(id.clone(), vec![])].into(),
            clean_ups: [((id, Scope::HalfMade), state)].into(),
            ..Outside::default()
        },
    }
}

fn planned(observed: &Observed, now: Timestamp) -> Plan {
    plan(observed, &Inputs::NotNeeded, Admission::Go, Lifecycle::FINISHED_JOB_TTL, now)
}

#[test]
fn resource_is_let_go_after_an_hour_with_a_word_about_what_stays() {
    let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let failed = || CleanUp::Failed { message: "the key `password` is missing".to_owned() };
    let (minute, day) = (Duration::from_secs(60), Duration::from_secs(86_400));

    let early = planned(&deleted(minute, failed(), now), now);
    assert_eq!(early.farewell, None);
    let told = &early.status.unwrap().conditions[0].message;
    assert!(told.contains("the key `password` is missing") && told.contains("finalizers"), "{told}");

    let late = planned(&deleted(day, failed(), now), now);
    assert!(late.farewell.is_some());
    let [note] = &late.notes[..] else { panic!("{:?}", late.notes) };
    assert_eq!((note.warning, note.reason.as_str()), (true, "ImagesLeft"));
    assert!(note.message.contains("Prism Central") && note.message.contains("node-image-build-0123456789"), "{note:?}");

    for (state, goes) in [(CleanUp::Done, true), (CleanUp::Active, false)] {
        let found = planned(&deleted(minute, state.clone(), now), now);
        assert_eq!(found.farewell.is_some(), goes, "{state:?}");
    }
}

#[tokio::test]
async fn build_of_the_same_inputs_waits_until_the_clean_up_after_the_former_one_is_gone() {
    let harness = Harness::start("again").await;
    create(&harness, &json!({})).await;
    let first = harness.job("image").await;
    die(&harness, &first).await;
    let clean = clean_up(&harness).await;
    let pod = harness.create_pod(&clean, 0).await.unwrap();
    harness.run_pod(&pod).await;
    // The default in so many words: the same id, so the clean-up would take the new build's half-made template away.
    harness.patch("image", json!({"spec": {"diskSize": "20Gi"}})).await;
    harness.until_gone::<Job>(&clean.name_any()).await;
    let waiting = harness.until("image", "waiting", |s| s.phase == Some(Phase::Pending)).await;
    assert_eq!(condition(&waiting, "Reconciling"), Some(("True", "Replacing")));
    harness.remove_pods().await;
    let again = harness.until("image", "building", |s| s.job_name == Some(first.name_any())).await;
    assert_eq!(again.phase, Some(Phase::Building));
}

#[tokio::test]
async fn report_of_a_clean_up_is_not_taken_for_one_of_a_build() {
    let harness = Harness::start("report").await;
    create(&harness, &json!({})).await;
    let job = harness.job("image").await;
    die(&harness, &job).await;
    let clean = clean_up(&harness).await;
    let pod = harness.create_pod(&clean, 0).await.unwrap();
    harness.end_pod(&pod, 75, &BuildReport::Failed(refused()).to_termination_message()).await;
    harness.end_job(&clean, true, "CompletionsReached").await;
    harness.api::<Pod>().get(&pod.name_any()).await.unwrap();
    let status = harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!(status.failure.unwrap().reason, "BuildCrashed");
    assert_eq!(status.history.len(), 1);
}
