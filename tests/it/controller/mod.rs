//! The operator against a real API server.

mod author;
mod cleanup;
mod faults;
pub mod harness;
mod leader;
mod lifecycle;
mod queue;
mod rebuild;
mod retention;
mod rights;
mod user_namespaces;

use std::sync::atomic::Ordering;

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Event, ObjectReference, Pod, Secret},
};
use kube::{
    Resource, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use node_image_builder::{
    api::v1alpha1::{BuildResult, FINALIZER, NAME_LABEL, NodeImageBuild, Phase, REBUILD_ANNOTATION},
    contract::{BuildReport, FailureClass, FailureReport, PublishTarget, Stage},
};
use serde_json::{Value, json};

use self::harness::{Harness, Traffic, condition, message};

fn checksum_mismatch() -> FailureReport {
    FailureReport {
        stage: Stage::Fetch,
        class: FailureClass::BadInput,
        reason: "ChecksumMismatch".to_owned(),
        message: "kubelet has the digest aa, the manifest says bb; mend the mirror".to_owned(),
    }
}

#[tokio::test]
async fn builds_an_image_and_reports_its_url() {
    let harness = Harness::start("happy").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;

    let pod = &job.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    assert_eq!(pod.automount_service_account_token, Some(false));
    assert_eq!(pod.containers[0].args.as_ref().unwrap()[..], ["run", "--build", "/etc/image-builder/build/build.json"]);
    let document = harness.document(&job).await;
    assert_eq!(document.release.kubernetes_version, "v1.31.14");
    let [PublishTarget::Server { directory, .. }] = &document.publish[..] else { panic!("{:?}", document.publish) };
    assert_eq!(*directory, format!("{}/image/{}", harness.namespace, document.identity.build_id));
    let secret: Secret = harness.api().get(&job.name_any()).await.unwrap();
    let token = String::from_utf8(secret.data.unwrap()["artifact-token"].0.clone()).unwrap();
    assert_eq!(harness.key.verify(&token, &format!("{directory}/file"), jiff::Timestamp::now()), Ok(()));

    let status = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!(condition(&status, "Ready"), Some(("False", "Building")));
    assert_eq!(condition(&status, "Reconciling"), Some(("True", "Building")));
    assert_eq!(status.build_id.as_ref(), Some(&document.identity.build_id));

    let outcome = harness.succeed(&job).await;
    let status = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(condition(&status, "Ready"), Some(("True", "ImagePublished")));
    assert_eq!((condition(&status, "Reconciling"), condition(&status, "Stalled")), (None, None));
    assert_eq!(status.image_url.as_deref(), outcome.image.url.as_ref().map(url::Url::as_str));
    let image = status.image.unwrap();
    assert_eq!((image.sha256, image.virtual_size), (outcome.image.sha256, 6_979_321_856));
    assert_eq!(status.release.unwrap().eksd_release, "kubernetes-1-31-eks-47");
    assert!(status.start_time.is_some() && status.completion_time.is_some());
    assert!(harness.event("image", "BuildStarted").await.contains("v1.31.14"));
    assert!(harness.event("image", "BuildSucceeded").await.contains("http://images.example.com/"));
}

#[tokio::test]
async fn unknown_channel_stalls_with_the_channels_there_are_until_it_is_corrected() {
    let harness = Harness::start("channel").await;
    harness.create("image", json!({ "releaseChannel": "1-99" })).await;
    let status = harness.until("image", "stalled", |s| condition(s, "Stalled").is_some()).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "UnknownChannel")));
    assert!(message(&status, "Stalled").contains("1-31"), "{status:?}");
    assert_eq!(status.phase, Some(Phase::Failed));
    assert_eq!(status.job_name, None);
    assert!(harness.event("image", "UnknownChannel").await.contains("1-99"));

    harness.patch("image", json!({ "spec": { "releaseChannel": "1-31" } })).await;
    harness.job("image").await;
}

#[tokio::test]
async fn missing_secret_stalls_and_heals_when_it_appears() {
    let harness = Harness::start("secret").await;
    let target =
        json!({ "s3": { "bucket": "images", "region": "eu-central-1", "credentialsSecretRef": { "name": "s3" } } });
    harness.create("image", json!({ "publish": [target] })).await;
    let status = harness.until("image", "stalled", |s| condition(s, "Stalled").is_some()).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "SecretNotFound")));
    let told = message(&status, "Stalled");
    for part in
        ["`s3`", &harness.namespace, "`accessKeyID` and `secretAccessKey`", "spec.publish[0].s3.credentialsSecretRef"]
    {
        assert!(told.contains(part), "{part} is not in: {told}");
    }
    assert!(harness.event("image", "SecretNotFound").await.contains("s3"));

    let metadata = ObjectMeta { name: Some("s3".to_owned()), ..ObjectMeta::default() };
    let keys = |keys: &[&str]| Some(keys.iter().map(|key| (key.to_string(), "value-1234".to_owned())).collect());
    let half = Secret { metadata: metadata.clone(), string_data: keys(&["accessKeyID"]), ..Secret::default() };
    harness.api::<Secret>().create(&PostParams::default(), &half).await.unwrap();
    let status = harness
        .until("image", "without a key", |s| condition(s, "Stalled") == Some(("True", "SecretKeyMissing")))
        .await;
    assert!(message(&status, "Stalled").contains("`secretAccessKey`"));

    let whole = json!({ "stringData": { "secretAccessKey": "value-1234" } });
    harness.api::<Secret>().patch("s3", &PatchParams::default(), &Patch::Merge(whole)).await.unwrap();
    let job = harness.job("image").await;
    let pod = job.spec.as_ref().unwrap().template.spec.clone().unwrap();
    let volume = pod.volumes.unwrap().into_iter().find(|volume| volume.name == "slot-publish-0").unwrap();
    let secret = volume.secret.unwrap();
    assert_eq!(
        (secret.secret_name.as_deref(), secret.optional, secret.default_mode),
        (Some("s3"), Some(false), Some(0o400))
    );
    let document = serde_json::to_string(&harness.document(&job).await).unwrap();
    let status = serde_json::to_string(&harness.api::<NodeImageBuild>().get("image").await.unwrap()).unwrap();
    assert!(!document.contains("value-1234") && !status.contains("value-1234"), "a credential got out of its Secret");
}

#[tokio::test]
async fn changed_spec_supersedes_the_build_and_keeps_the_old_url_until_the_new_image() {
    let harness = Harness::start("change").await;
    harness.create("image", json!({})).await;
    let first = harness.job("image").await;
    harness.succeed(&first).await;
    let old = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;

    harness.patch("image", json!({ "spec": { "packages": { "install": ["jq"] } } })).await;
    let superseded = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!((&superseded.image_url, &superseded.image), (&old.image_url, &old.image));
    assert_ne!(superseded.build_id, old.build_id);
    let second: Job = harness.api().get(superseded.job_name.as_deref().unwrap()).await.unwrap();
    assert_eq!(harness.document(&second).await.packages.install, ["jq"]);

    // The one that runs is cancelled by yet another change.
    harness.patch("image", json!({ "spec": { "packages": { "install": ["jq", "vim"] } } })).await;
    harness.until_gone::<Job>(&second.name_any()).await;
    assert!(harness.event("image", "Superseded").await.contains(superseded.build_id.as_deref().unwrap()));
    // The status names the cancelled Job until the next one is there.
    let cancelled = second.name_any();
    let status =
        harness.until("image", "building again", |s| s.job_name.as_ref().is_some_and(|n| *n != cancelled)).await;
    let third: Job = harness.api().get(status.job_name.as_deref().unwrap()).await.unwrap();
    let outcome = harness.succeed(&third).await;
    let new = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(new.image_url.as_deref(), outcome.image.url.as_ref().map(url::Url::as_str));
    let results: Vec<_> = new.history.iter().map(|entry| entry.result).collect();
    assert_eq!(results, [BuildResult::Succeeded, BuildResult::Cancelled, BuildResult::Succeeded]);
    // What the cancelled build uploaded is removed, and so is its Secret.
    harness.until_gone::<Secret>(&second.name_any()).await;
    let uploaded = format!("{}/image/{}", harness.namespace, superseded.build_id.unwrap());
    assert!(harness.mirror.deleted.lock().unwrap().iter().any(|(path, _)| *path == uploaded));
}

#[tokio::test]
async fn settings_that_do_not_change_the_image_build_nothing() {
    let harness = Harness::start("settings").await;
    harness.create("image", json!({})).await;
    harness.succeed(&harness.job("image").await).await;
    let old = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    let more = json!({ "history": { "successful": 5 }, "suspend": true, "build": { "retries": 5 }, "deletionPolicy": "Delete" });
    harness.patch("image", json!({ "spec": more })).await;
    let new = harness.until("image", "ready", |s| s.observed_generation > old.observed_generation).await;
    assert_eq!((new.phase, new.build_id, new.image_url), (Some(Phase::Ready), old.build_id, old.image_url));
    assert_eq!(harness.api::<Job>().list(&ListParams::default()).await.unwrap().items.len(), 1);
}

#[tokio::test]
async fn rebuild_annotation_builds_again() {
    let harness = Harness::start("rebuild").await;
    harness.create("image", json!({})).await;
    harness.succeed(&harness.job("image").await).await;
    let old = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "1" } } })).await;
    let new = harness.until("image", "building again", |s| s.phase == Some(Phase::Building)).await;
    assert_ne!(new.build_id, old.build_id);
    assert_eq!(new.inputs_digest, old.inputs_digest);
    assert_eq!((new.last_rebuild_token.as_deref(), &new.image_url), (Some("1"), &old.image_url));
}

#[tokio::test]
async fn result_of_a_job_that_ended_while_the_operator_was_away_is_picked_up() {
    let mut harness = Harness::start("away").await;
    harness.create("good", json!({})).await;
    harness.create("bad", json!({})).await;
    let (good, bad) = (harness.job("good").await, harness.job("bad").await);
    harness.stop_operator().await;
    let outcome = harness.succeed(&good).await;
    harness.fail(&bad, checksum_mismatch()).await;
    harness.start_operator();
    let status = harness.until("good", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(status.image.unwrap().sha256, outcome.image.sha256);
    let status = harness.until("bad", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!(status.failure.unwrap().reason, "ChecksumMismatch");
}

#[tokio::test]
async fn failure_reaches_status_and_event_with_what_to_do() {
    let harness = Harness::start("failure").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let report = checksum_mismatch();
    harness.fail(&job, report.clone()).await;
    let status = harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "ChecksumMismatch")));
    assert_eq!(condition(&status, "Ready"), Some(("False", "ChecksumMismatch")));
    assert_eq!(message(&status, "Stalled"), report.message);
    let failure = status.failure.unwrap();
    assert_eq!((failure.stage, failure.class), (Some(Stage::Fetch), FailureClass::BadInput));
    assert_eq!(failure.pod, Some(format!("{}-0", job.name_any())));
    assert_eq!(failure.container.as_deref(), Some("build"));
    assert_eq!((status.image_url, status.history[0].result), (None, BuildResult::Failed));
    let note = harness.event("image", "BuildFailed").await;
    assert!(note.contains("Fetch") && note.contains(&report.message), "{note}");

    // Another way to run it is another attempt.
    harness.patch("image", json!({ "spec": { "build": { "resources": { "limits": { "memory": "16Gi" } } } } })).await;
    let again = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_ne!(again.job_name, Some(job.name_any()));
    assert_eq!(again.failure, None);
}

#[tokio::test]
async fn failed_attempt_is_not_reported_as_the_builds_failure() {
    let harness = Harness::start("retry").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let pod = harness.create_pod(&job, 0).await.unwrap();
    harness.run_pod(&pod).await;
    let report = FailureReport {
        stage: Stage::Fetch,
        class: FailureClass::Transient,
        reason: "ServerUnavailable".to_owned(),
        message: "the mirror answered 503".to_owned(),
    };
    harness.end_pod(&pod, 75, &BuildReport::Failed(report).to_termination_message()).await;
    let failed_once = json!({ "status": { "failed": 1, "active": 1, "startTime": jiff::Timestamp::now() } });
    harness
        .api::<Job>()
        .patch_status(&job.name_any(), &PatchParams::default(), &Patch::Merge(failed_once))
        .await
        .unwrap();
    let second = harness.create_pod(&job, 1).await.unwrap();
    let status = harness.until("image", "in its second attempt", |s| s.attempts == Some(2)).await;
    assert_eq!((status.phase, &status.failure), (Some(Phase::Building), &None));
    assert_eq!((condition(&status, "Reconciling"), condition(&status, "Stalled")), (Some(("True", "Building")), None));
    let told = message(&status, "Reconciling");
    assert!(told.contains("attempt 2 of 3") && told.contains("the mirror answered 503"), "{told}");
    assert!(harness.event("image", "AttemptFailed").await.contains("503"));
    assert!(!harness.events("image").await.iter().any(|(reason, _)| reason == "BuildFailed"));

    let outcome = harness::outcome(&harness.document(&job).await);
    harness.end_pod(&second, 0, &BuildReport::Succeeded(Box::new(outcome)).to_termination_message()).await;
    harness.end_job(&job, true, "CompletionsReached").await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready) && s.failure.is_none()).await;
}

#[tokio::test]
async fn suspending_cancels_and_continuing_builds() {
    let harness = Harness::start("suspend").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    harness.patch("image", json!({ "spec": { "suspend": true } })).await;
    harness.until_gone::<Job>(&job.name_any()).await;
    let status = harness.until("image", "suspended", |s| s.phase == Some(Phase::Suspended)).await;
    assert_eq!(condition(&status, "Ready"), Some(("False", "Suspended")));
    assert_eq!((condition(&status, "Reconciling"), status.history[0].result), (None, BuildResult::Cancelled));
    harness.event("image", "Cancelled").await;

    harness.patch("image", json!({ "spec": { "suspend": false } })).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
}

#[tokio::test]
async fn deletion_cancels_the_build_and_removes_its_uploads() {
    let harness = Harness::start("delete").await;
    let build = harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let pod = harness.create_pod(&job, 0).await.unwrap();
    harness.run_pod(&pod).await;
    let id = harness.document(&job).await.identity.build_id;
    let api = harness.api::<NodeImageBuild>();
    assert!(api.get("image").await.unwrap().finalizers().iter().any(|finalizer| finalizer == FINALIZER));
    api.delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<Job>(&job.name_any()).await;
    // The pod may still write: nothing is cleaned up behind its back.
    assert!(api.get_opt("image").await.unwrap().is_some());
    assert!(harness.mirror.deleted.lock().unwrap().is_empty());
    harness.remove_pods().await;
    harness.until_gone::<NodeImageBuild>("image").await;
    let deleted = harness.mirror.deleted.lock().unwrap().clone();
    let directory = format!("{}/image/{id}", build.namespace().unwrap());
    assert_eq!(deleted.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), [directory.as_str()]);
    assert_eq!(harness.key.verify(&deleted[0].1, &directory, jiff::Timestamp::now()), Ok(()));
}

#[tokio::test]
async fn finished_images_stay_unless_the_deletion_policy_says_otherwise() {
    for (policy, files) in [("Retain", 0), ("Delete", 1)] {
        let harness = Harness::start("policy").await;
        harness.create("image", json!({ "deletionPolicy": policy })).await;
        harness.succeed(&harness.job("image").await).await;
        harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
        harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
        harness.until_gone::<NodeImageBuild>("image").await;
        assert_eq!(harness.mirror.deleted.lock().unwrap().len(), files, "{policy}");
    }
}

#[tokio::test]
async fn unreachable_mirror_is_waited_for() {
    let harness = Harness::start("mirror").await;
    harness.mirror.down.store(true, Ordering::Relaxed);
    harness.create("image", json!({})).await;
    let status = harness.until("image", "waiting", |s| condition(s, "Reconciling").is_some()).await;
    assert_eq!((status.phase, condition(&status, "Stalled")), (Some(Phase::Pending), None));
    assert!(message(&status, "Reconciling").contains("503"), "{status:?}");
    harness.mirror.down.store(false, Ordering::Relaxed);
    harness.job("image").await;
}

#[tokio::test]
async fn namespace_that_forbids_privileged_pods_is_named_with_what_to_do() {
    let harness = Harness::start("restricted").await;
    harness.enforce("restricted").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;

    // What the Job controller does when the API server refuses its pod.
    let refusal = harness.create_pod(&job, 0).await.unwrap_err();
    let kube::Error::Api(refusal) = refusal else { panic!("{refusal}") };
    let event = Event {
        metadata: ObjectMeta { generate_name: Some("event-".to_owned()), ..ObjectMeta::default() },
        involved_object: ObjectReference { namespace: job.namespace(), ..job.object_ref(&()) },
        reason: Some("FailedCreate".to_owned()),
        message: Some(format!("Error creating: {}", refusal.message)),
        ..Event::default()
    };
    harness.api::<Event>().create(&PostParams::default(), &event).await.unwrap();

    let status = harness.until("image", "stalled", |s| condition(s, "Stalled").is_some()).await;
    assert_eq!(condition(&status, "Stalled"), Some(("True", "PodForbidden")));
    let told = message(&status, "Stalled");
    assert!(
        told.contains("pod-security.kubernetes.io/enforce=privileged") && told.contains("violates PodSecurity"),
        "{told}"
    );
    harness.event("image", "PodForbidden").await;

    harness.enforce("privileged").await;
    harness.create_pod(&job, 1).await.unwrap();
    let status = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!(condition(&status, "Stalled"), None);
}

#[tokio::test]
async fn pod_that_can_not_start_is_explained_while_it_waits() {
    let harness = Harness::start("blocked").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let pod = harness.create_pod(&job, 0).await.unwrap();
    let waiting =
        json!({ "waiting": { "reason": "ImagePullBackOff", "message": "Back-off pulling image \"builder:1\"" } });
    harness.set_pod(&pod, "Pending", waiting).await;
    let status =
        harness.until("image", "blocked", |s| condition(s, "Reconciling") == Some(("True", "ImagePullFailed"))).await;
    assert!(message(&status, "Reconciling").contains("builder:1"));
    assert_eq!((&status.failure, condition(&status, "Stalled")), (&None, None));
    harness.run_pod(&pod).await;
    harness.until("image", "building", |s| condition(s, "Reconciling") == Some(("True", "Building"))).await;
}

#[tokio::test]
async fn other_objects_of_the_same_name_are_left_alone() {
    let harness = Harness::start("foreign").await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    let other = harness.create("other", json!({})).await;
    let theirs = harness.job("other").await;
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
    harness.until_gone::<Job>(&job.name_any()).await;
    let theirs: Job = harness.api().get(&theirs.name_any()).await.unwrap();
    assert_eq!(theirs.owner_references()[0].uid, other.uid().unwrap());
}

#[tokio::test]
async fn nothing_is_looked_for_before_there_can_be_anything() {
    let harness = Harness::start("new").await;
    harness.create("image", json!({})).await;
    harness.job("image").await;
    let audit = harness.audit();
    let place = |fits: &dyn Fn(&Value) -> bool| {
        let ours = |entry: &Value| entry["objectRef"]["namespace"] == *harness.namespace && fits(entry);
        audit.iter().position(ours)
    };
    let created = place(&|entry| entry["verb"] == "create" && entry["objectRef"]["resource"] == "jobs").unwrap();
    let named = format!("{NAME_LABEL}%3Dimage").replace('/', "%2F");
    let looked = place(&|entry| entry["verb"] == "list" && entry["requestURI"].as_str().unwrap().contains(&named));
    assert!(looked.is_none_or(|looked| created < looked), "{audit:#?}");
}

#[tokio::test]
async fn a_whole_build_takes_at_most_six_writes() {
    let mut harness = Harness::without_operator("writes").await;
    let traffic = Traffic::default();
    let client = traffic.client().await;
    harness.start_operator_with(client, harness.settings());
    harness.create("image", json!({})).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.stop_operator().await;
    let writes = traffic.writes();
    assert!((4..=6).contains(&writes.len()), "{} writes: {writes:#?}", writes.len());
}

#[tokio::test]
async fn operator_killed_after_any_write_leaves_one_build_that_ends_well() {
    for last in 1..=5 {
        let mut harness = Harness::without_operator("killed").await;
        let traffic = Traffic::dying_after(last);
        harness.start_operator_with(traffic.client().await, harness.settings());
        harness.create("image", json!({})).await;
        let whole_life = async {
            let job = harness.job("image").await;
            harness.succeed(&job).await;
            harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
        };
        // It dies on the way, or with the last write when all is done.
        tokio::select! {
            () = traffic.died() => {}
            () = whole_life => {}
        }
        harness.kill_operator().await;
        harness.start_operator();
        let job = harness.job("image").await;
        if harness.api::<Pod>().list(&ListParams::default()).await.unwrap().items.is_empty() {
            harness.succeed(&job).await;
        } else {
            harness.finish(&job).await;
        }
        let status = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
        assert_eq!(
            harness.api::<Job>().list(&ListParams::default()).await.unwrap().items.len(),
            1,
            "after write {last}"
        );
        assert_eq!(status.history.len(), 1, "after write {last}: {:?}", status.history);
    }
}
