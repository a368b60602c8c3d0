//! What starts another build of the same specification: a schedule, a new release.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use kube::api::{Patch, PatchParams};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, NodeImageBuildStatus, Phase},
    contract::{FailureClass, FailureReport, Stage},
    controller::context::{Lifecycle, Settings},
};
use serde_json::json;

use super::harness::{Harness, condition, message};

async fn polling(prefix: &str, interval: Duration) -> Harness {
    let mut harness = Harness::without_operator(prefix).await;
    let lifecycle = Lifecycle { release_poll_interval: interval, ..Lifecycle::default() };
    let settings = Settings { lifecycle, ..harness.settings() };
    harness.start_operator_with(harness.operator_client.clone(), settings);
    harness
}

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

fn next(status: &NodeImageBuildStatus) -> Option<Timestamp> {
    status.next_scheduled_time.as_ref().map(|time| time.0)
}

#[tokio::test]
async fn a_scheduled_time_builds_when_the_base_changed_and_at_that_time() {
    let mut harness = Harness::start("schedule").await;
    let schedule =
        json!({ "base": harness.base(), "rebuild": { "schedule": "0 3 1 1 *", "timeZone": "Europe/Berlin" } });
    let ready = harness.ready("image", schedule).await;
    let promised = next(&ready).unwrap();
    let local = promised.to_zoned(jiff::tz::TimeZone::get("Europe/Berlin").unwrap());
    assert_eq!((local.month(), local.day(), local.hour()), (1, 1, 3));
    assert!(local.minute() < 5 && promised > Timestamp::now());

    // Same release, same base: nothing to build, and the next time is promised.
    harness.set_due("image", in_seconds(-1)).await;
    assert!(harness.event("image", "Unchanged").await.contains("nothing is built"));
    let unchanged = harness.until("image", "promising", |s| next(s) == Some(promised)).await;
    assert_eq!((unchanged.phase, &unchanged.build_id), (Some(Phase::Ready), &ready.build_id));
    assert_eq!(harness.jobs().await.len(), 1);

    *harness.mirror.base.lock().unwrap() = "b".repeat(64);
    harness.mirror_is_forgotten().await;
    let due = Timestamp::from_second(in_seconds(4).as_second()).unwrap();
    harness.set_due("image", due).await;
    let building = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert!(Timestamp::now() >= due && Timestamp::now().duration_since(due).as_secs() < 10);
    assert_eq!(building.trigger, Some(format!("schedule {due}")));
    assert_eq!((next(&building), &building.image_url), (Some(promised), &ready.image_url));
    assert!(harness.event("image", "BuildStarted").await.contains("Kubernetes"));
}

#[tokio::test]
async fn a_forced_schedule_builds_the_same_again_and_one_time_that_was_missed() {
    let mut harness = Harness::start("force").await;
    let more = json!({ "base": harness.base(), "rebuild": { "schedule": "0 3 1 1 *", "force": true } });
    let ready = harness.ready("image", more).await;
    harness.stop_operator().await;
    // Due an hour ago, while nobody was there.
    harness.set_due("image", in_seconds(-3600)).await;
    harness.start_operator();
    let building = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    assert_eq!(building.inputs_digest, ready.inputs_digest);
    assert_ne!(building.build_id, ready.build_id);
    let job: Job = harness.api().get(building.job_name.as_deref().unwrap()).await.unwrap();
    harness.succeed(&job).await;
    let again = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!((again.trigger, again.build_id), (building.trigger, building.build_id));
    assert!(again.next_scheduled_time.unwrap().0 > Timestamp::now());
    assert_eq!(harness.jobs().await.len(), 2);
}

#[tokio::test]
async fn a_schedule_does_nothing_while_suspended_or_while_a_build_runs() {
    let harness = Harness::start("quiet").await;
    let more = json!({ "base": harness.base(), "rebuild": { "schedule": "0 3 1 1 *", "force": true } });
    harness.create("image", more).await;
    let job = harness.job("image").await;
    let building = harness.until("image", "building", |s| s.next_scheduled_time.is_some()).await;
    harness.set_due("image", in_seconds(-1)).await;
    // The build that runs covers it.
    harness.until("image", "promising", |s| next(s) == next(&building)).await;
    harness.succeed(&job).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.patch("image", json!({ "spec": { "suspend": true } })).await;
    let suspended = harness.until("image", "suspended", |s| s.next_scheduled_time.is_none()).await;
    assert_eq!(suspended.phase, Some(Phase::Ready));
    assert_eq!(harness.jobs().await.len(), 1);
}

#[tokio::test]
async fn a_schedule_that_means_nothing_is_told() {
    let harness = Harness::start("nonsense").await;
    let ready = harness.ready("image", json!({})).await;
    for (schedule, zone, told) in [("99 3 * * *", "UTC", "99 3 * * *"), ("0 3 * * *", "Mars/Olympus", "Mars/Olympus")] {
        harness.patch("image", json!({ "spec": { "rebuild": { "schedule": schedule, "timeZone": zone } } })).await;
        let status = harness.until("image", "stalled", |s| message(s, "Stalled").contains(told)).await;
        assert_eq!(condition(&status, "Stalled"), Some(("True", "InvalidSpec")));
    }
    harness.patch("image", json!({ "spec": { "rebuild": null } })).await;
    let status = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(status.build_id, ready.build_id);
}

#[tokio::test]
async fn a_scheduled_build_that_can_not_start_leaves_the_image_ready_and_starts_later() {
    let mut harness = Harness::start("obstacle").await;
    let more = json!({ "base": harness.base(), "rebuild": { "schedule": "0 3 1 1 *", "force": true } });
    let ready = harness.ready("image", more).await;
    harness.mirror.down.store(true, Ordering::Relaxed);
    harness.mirror_is_forgotten().await;
    harness.set_due("image", in_seconds(-1)).await;
    let waiting = harness.until("image", "waiting", |s| message(s, "Ready").contains("503")).await;
    assert_eq!((waiting.phase, &waiting.image_url), (Some(Phase::Ready), &ready.image_url));
    harness.mirror.down.store(false, Ordering::Relaxed);
    harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
}

#[tokio::test]
async fn a_scheduled_build_that_fails_is_not_repeated_before_the_next_time() {
    let harness = Harness::start("failing").await;
    let more = json!({ "base": harness.base(), "rebuild": { "schedule": "0 3 1 1 *", "force": true } });
    let ready = harness.ready("image", more).await;
    harness.set_due("image", in_seconds(-60)).await;
    let building = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    let job: Job = harness.api().get(building.job_name.as_deref().unwrap()).await.unwrap();
    let class = FailureClass::BadInput;
    let report = FailureReport { stage: Stage::Fetch, class, reason: "DiskFull".into(), message: "full".into() };
    harness.fail(&job, report).await;
    let failed = harness.until("image", "failed", |s| s.phase == Some(Phase::Failed)).await;
    assert_eq!((&failed.image_url, next(&failed)), (&ready.image_url, next(&ready)));
    harness.patch("image", json!({ "spec": { "history": { "failed": 9 } } })).await;
    let later = harness.until("image", "failed", |s| s.observed_generation > failed.observed_generation).await;
    assert_eq!((later.phase, harness.jobs().await.len()), (Some(Phase::Failed), 2));
    // The next time tries again.
    harness.set_due("image", in_seconds(-1)).await;
    harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
}

#[tokio::test]
async fn a_new_release_builds_all_that_follow_it_with_one_poll_for_all() {
    const FOLLOWERS: usize = 10;
    const INTERVAL: Duration = Duration::from_secs(1);
    let mut harness = polling("release", INTERVAL).await;
    for n in 0..FOLLOWERS {
        harness.ready(&format!("image-{n}"), json!({ "rebuild": { "onNewRelease": true } })).await;
    }
    harness.ready("other", json!({})).await;
    // After a start every follower is compared once, whatever happened meanwhile.
    harness.stop_operator().await;
    let (asked, began) = (harness.mirror.manifest_requests.load(Ordering::Relaxed), Instant::now());
    let lifecycle = Lifecycle { release_poll_interval: INTERVAL, ..Lifecycle::default() };
    let settings = Settings { lifecycle, ..harness.settings() };
    harness.start_operator_with(harness.operator_client.clone(), settings);
    let unchanged = harness.mirror.manifest_unchanged.load(Ordering::Relaxed);
    harness.mirror_is_polled(3).await;
    let asked = harness.mirror.manifest_requests.load(Ordering::Relaxed) - asked;
    let most = 3 + usize::try_from(began.elapsed().as_millis() / 500).unwrap();
    assert!(asked <= most, "{asked} requests in {:?}", began.elapsed());
    assert!(harness.mirror.manifest_unchanged.load(Ordering::Relaxed) > unchanged, "no request had an ETag");
    assert_eq!(harness.jobs().await.len(), FOLLOWERS + 1);

    *harness.mirror.latest.lock().unwrap() = "v0.26.0".to_owned();
    for n in 0..FOLLOWERS {
        let name = format!("image-{n}");
        let building = harness.until(&name, "building", |s| s.phase == Some(Phase::Building)).await;
        assert_eq!(building.trigger.as_deref(), Some("release v0.26.0 kubernetes-1-31-eks-47"));
        let job: Job = harness.api().get(building.job_name.as_deref().unwrap()).await.unwrap();
        harness.succeed(&job).await;
        harness.until(&name, "ready", |s| s.phase == Some(Phase::Ready)).await;
    }
    harness.mirror_is_polled(2).await;
    assert_eq!(harness.jobs().await.len(), 2 * FOLLOWERS + 1, "each follower once, and no other");
}

#[tokio::test]
async fn a_resource_that_no_longer_follows_a_release_is_left_alone() {
    let harness = polling("unfollow", Duration::from_secs(1)).await;
    harness.ready("image", json!({ "rebuild": { "onNewRelease": true } })).await;
    harness.ready("still", json!({ "rebuild": { "onNewRelease": true } })).await;
    let patch = Patch::Merge(json!({ "spec": { "rebuild": null } }));
    let api = harness.api::<NodeImageBuild>();
    let patched = api.patch("image", &PatchParams::default(), &patch).await.unwrap();
    harness.until("image", "ready", |s| s.observed_generation == patched.metadata.generation).await;
    *harness.mirror.latest.lock().unwrap() = "v0.26.0".to_owned();
    harness.until("still", "building", |s| s.phase == Some(Phase::Building)).await;
    let status = api.get("image").await.unwrap().status.unwrap();
    assert_eq!((status.phase, harness.jobs().await.len()), (Some(Phase::Ready), 3));
}
