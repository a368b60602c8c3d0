//! What becomes of builds that ended: by class of failure, and after their Jobs are gone.

use std::time::Duration;

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Secret},
};
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use node_image_builder::{
    api::v1alpha1::{BuildResult, Phase, REBUILD_ANNOTATION},
    contract::{BuildReport, FailureClass, FailureReport, Stage},
    controller::context::{Lifecycle, Settings},
};
use serde_json::json;

use super::harness::{Harness, condition, message};

/// An operator that removes Jobs as soon as their results are recorded.
async fn forgetful(prefix: &str) -> Harness {
    let mut harness = Harness::without_operator(prefix).await;
    let lifecycle = Lifecycle { finished_job_ttl: Duration::ZERO, ..Lifecycle::default() };
    let settings = Settings { lifecycle, ..harness.settings() };
    harness.start_operator_with(harness.operator_client.clone(), settings);
    harness
}

fn report(class: FailureClass, reason: &str) -> FailureReport {
    FailureReport { stage: Stage::Fetch, class, reason: reason.to_owned(), message: format!("{reason} happened") }
}

#[tokio::test]
async fn a_job_that_ended_goes_after_its_time_and_its_result_stays() {
    let harness = forgetful("ttl").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let outcome = harness.succeed(&job).await;
    harness.until_gone::<Job>(&job.name_any()).await;
    harness.until_gone::<Secret>(&job.name_any()).await;
    let ready = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(ready.image.as_ref().unwrap().sha256, outcome.image.sha256);

    // Neither a setting that does not change the image nor taking the annotation away builds again.
    harness.patch("image", json!({ "spec": { "history": { "successful": 5 }, "build": { "retries": 7 } } })).await;
    let later = harness.until("image", "ready", |s| s.observed_generation > ready.observed_generation).await;
    assert_eq!((later.phase, &later.build_id, &later.image), (Some(Phase::Ready), &ready.build_id, &ready.image));
    assert_eq!(harness.jobs().await, []);

    // Nothing on the artifact server was touched: it has the image.
    assert!(harness.mirror.deleted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_failure_is_remembered_without_its_job_and_not_tried_again() {
    let mut harness = forgetful("ttl-failed").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    harness.fail(&job, report(FailureClass::BadInput, "ChecksumMismatch")).await;
    harness.until_gone::<Job>(&job.name_any()).await;
    harness.remove_pods().await;
    // What it uploaded goes with its Secret.
    harness.until_gone::<Secret>(&job.name_any()).await;
    assert_eq!(harness.mirror.deleted.lock().unwrap().len(), 1);
    harness.stop_operator().await;
    harness.start_operator();
    harness.patch("image", json!({ "spec": { "history": { "failed": 7 } } })).await;
    let status = harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "ChecksumMismatch")));
    assert_eq!(harness.jobs().await, []);

    // Another way to run it is another attempt.
    harness.patch("image", json!({ "spec": { "build": { "retries": 0 } } })).await;
    let status = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_ne!(status.job_name, Some(job.name_any()));
}

#[tokio::test]
async fn kubernetes_is_told_what_to_try_again_how_often_and_for_how_long() {
    let harness = Harness::start("policy").await;
    harness.create("image", json!({ "build": { "retries": 4, "timeout": "1h30m" } })).await;
    let spec = harness.job("image").await.spec.unwrap();
    assert_eq!((spec.backoff_limit, spec.active_deadline_seconds), (Some(4), Some(5400)));
    // The API server's default with a failure policy: never two pods of one build.
    assert_eq!(spec.pod_replacement_policy.as_deref(), Some("Failed"));
    let rules = spec.pod_failure_policy.unwrap().rules;
    let codes: Vec<_> = rules
        .iter()
        .map(|rule| (rule.action.as_str(), rule.on_exit_codes.as_ref().map(|codes| codes.values.clone())))
        .collect();
    assert_eq!(codes, [("Ignore", None), ("FailJob", Some(vec![65, 69]))]);
}

#[tokio::test]
async fn each_class_of_failure_ends_as_its_class_says() {
    let harness = Harness::start("classes").await;
    let cases = [
        (FailureClass::BadInput, 65, "PodFailurePolicy", "ChecksumMismatch"),
        (FailureClass::Environment, 69, "PodFailurePolicy", "DiskFull"),
        (FailureClass::Transient, 75, "BackoffLimitExceeded", "ServerTimeout"),
        (FailureClass::Internal, 70, "BackoffLimitExceeded", "ToolFailed"),
        (FailureClass::Transient, 75, "DeadlineExceeded", "DeadlineExceeded"),
    ];
    for (index, (class, code, why, reason)) in cases.into_iter().enumerate() {
        let name = format!("image-{index}");
        harness.create(&name, json!({})).await;
        let job = harness.job(&name).await;
        let pod = harness.create_pod(&job, 0).await.unwrap();
        harness.run_pod(&pod).await;
        assert_eq!(i32::from(class.exit_code()), code);
        harness.end_pod(&pod, code, &BuildReport::Failed(report(class, reason)).to_termination_message()).await;
        harness.end_job(&job, false, why).await;
        let status = harness.until(&name, "failed", |s| s.phase == Some(Phase::Failed)).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", reason)), "{why}");
        assert_eq!((status.history.len(), status.history[0].result), (1, BuildResult::Failed));
        let failure = status.failure.as_ref().unwrap();
        let expected = if why == "DeadlineExceeded" { FailureClass::Environment } else { class };
        assert_eq!((failure.class, failure.reason.as_str()), (expected, reason));
        if why == "DeadlineExceeded" {
            let told = message(&status, "Stalled");
            assert!(told.contains("spec.build.timeout (7200 s") && told.contains("happened"), "{told}");
        }
    }
    // A pass over all of them later, nothing was started again.
    harness.patch("image-0", json!({ "metadata": { "labels": { "touched": "yes" } } })).await;
    harness.create("last", json!({})).await;
    harness.job("last").await;
    assert_eq!(harness.jobs().await.len(), cases.len() + 1);
}

#[tokio::test]
async fn taking_the_annotation_away_builds_nothing() {
    let harness = Harness::start("annotation").await;
    harness.ready("image", json!({})).await;
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "1" } } })).await;
    let building = harness.until("image", "building again", |s| s.phase == Some(Phase::Building)).await;
    let job: Job = harness.api().get(building.job_name.as_deref().unwrap()).await.unwrap();
    harness.succeed(&job).await;
    let ready = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: null } } })).await;
    harness.patch("image", json!({ "spec": { "history": { "successful": 7 } } })).await;
    let later = harness.until("image", "ready", |s| s.observed_generation > ready.observed_generation).await;
    assert_eq!((later.phase, later.build_id), (Some(Phase::Ready), ready.build_id));
    assert_eq!(harness.jobs().await.len(), 2);
}

#[tokio::test]
async fn a_specification_that_leads_to_the_same_inputs_builds_nothing() {
    let harness = Harness::start("same-inputs").await;
    let ready = harness.ready("image", json!({})).await;
    // The latest release, by its name.
    harness.patch("image", json!({ "spec": { "eksaRelease": "v0.26.1" } })).await;
    let later = harness.until("image", "ready", |s| s.observed_generation > ready.observed_generation).await;
    assert_eq!((later.phase, &later.build_id), (Some(Phase::Ready), &ready.build_id));
    assert_ne!(later.spec_digest, ready.spec_digest);
    assert_eq!(harness.jobs().await.len(), 1);

    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "now" } } })).await;
    let forced = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!(forced.inputs_digest, ready.inputs_digest);
}

#[tokio::test]
async fn a_job_whose_start_was_not_written_down_is_found_again() {
    let mut harness = Harness::start("unwritten").await;
    let ready = harness.ready("image", json!({})).await;
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "1" } } })).await;
    let building = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    harness.kill_operator().await;
    // As if it had died before it wrote the status.
    let before = json!({ "status": {
        "phase": "Ready", "buildID": ready.build_id, "jobName": ready.job_name, "completionTime": ready.completion_time,
        "lastRebuildToken": null,
    }});
    harness
        .api::<node_image_builder::api::v1alpha1::NodeImageBuild>()
        .patch_status("image", &PatchParams::default(), &Patch::Merge(before))
        .await
        .unwrap();
    harness.start_operator();
    let again = harness.until("image", "building", |s| s.build_id == building.build_id).await;
    assert_eq!(again.phase, Some(Phase::Building));
    assert_eq!(harness.jobs().await.len(), 2);
    assert!(harness.api::<Pod>().list(&kube::api::ListParams::default()).await.unwrap().items.len() <= 1);
}

#[tokio::test]
async fn status_that_a_backup_tool_restored_does_not_show_through_the_next_builds() {
    let mut harness = Harness::start("restored").await;
    let ready = harness.ready("image", json!({})).await;
    harness.stop_operator().await;
    // Every field of it now is the tool's, so server-side apply alone would leave those that the operator does not set.
    let api = harness.api::<node_image_builder::api::v1alpha1::NodeImageBuild>();
    let tool = PatchParams { field_manager: Some("backup".to_owned()), ..PatchParams::default() };
    for status in [json!(null), json!(ready)] {
        api.patch_status("image", &tool, &Patch::Merge(json!({ "status": status }))).await.unwrap();
    }
    harness.start_operator();
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "1" } } })).await;
    let building = harness.until("image", "building", |s| s.build_id != ready.build_id).await;
    assert_eq!((building.phase, building.completion_time), (Some(Phase::Building), None));
    harness.succeed(&harness.job("image").await).await;
    let again = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(again.build_id, building.build_id);
    assert_eq!(again.history.len(), 2);
}
