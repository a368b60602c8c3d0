//! Several operators: one works, another one takes over.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use k8s_openapi::api::coordination::v1::Lease;
use node_image_builder::{api::v1alpha1::Phase, controller::lease::LeaseSettings};
use serde_json::json;
use tokio::time::timeout;

use super::harness::{Harness, Running, SOON, Traffic, until};

/// The goal for the time until another operator works.
const FAIL_OVER: Duration = Duration::from_secs(15);
const LEASE: &str = "node-image-builder";

async fn start(harness: &Harness, identity: &str, traffic: &Traffic) -> Running {
    let lease =
        LeaseSettings { namespace: harness.namespace.clone(), name: LEASE.to_owned(), identity: identity.to_owned() };
    // The chart's lease is another one.
    harness.one_more_operator(traffic.client_as(None).await, harness.settings(), Some(lease))
}

async fn until_leading(operator: &Running) {
    let leading = until(|| async { operator.metrics.is_leading().then_some(()) });
    timeout(SOON, leading).await.expect("the operator does not lead");
}

async fn until_ready(operator: &Running) {
    let ready = until(|| async { operator.ready.load(Ordering::Acquire).then_some(()) });
    timeout(SOON, ready).await.expect("the operator is not ready");
}

/// Who holds the lease, and how often it changed hands.
async fn holder(harness: &Harness) -> (String, i32) {
    let spec = harness.api::<Lease>().get(LEASE).await.unwrap().spec.unwrap();
    (spec.holder_identity.unwrap_or_default(), spec.lease_transitions.unwrap_or_default())
}

#[tokio::test]
async fn another_operator_takes_over_when_the_leader_dies_and_finishes_its_builds() {
    let harness = Harness::without_operator("failover").await;
    let (of_a, of_b) = (Traffic::default(), Traffic::default());
    let a = start(&harness, "a", &of_a).await;
    until_leading(&a).await;
    let b = start(&harness, "b", &of_b).await;
    until_ready(&b).await;
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    assert!(!b.metrics.is_leading());
    assert_eq!(of_b.writes(), [""; 0], "who stands by writes nothing");

    a.kill().await;
    let died = Instant::now();
    let outcome = harness.succeed(&job).await;
    let ready = harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert!(died.elapsed() < FAIL_OVER, "{:?}", died.elapsed());
    assert_eq!(ready.image.unwrap().sha256, outcome.image.sha256);
    assert_eq!(holder(&harness).await, ("b".to_owned(), 1));
    assert_eq!(harness.jobs().await.len(), 1);
    b.stop().await;
}

#[tokio::test]
async fn an_operator_that_stops_gives_the_lease_back_at_once() {
    let harness = Harness::without_operator("handover").await;
    let traffic = Traffic::default();
    let a = start(&harness, "a", &traffic).await;
    until_leading(&a).await;
    let b = start(&harness, "b", &traffic).await;
    until_ready(&b).await;
    let began = Instant::now();
    a.stop().await;
    until_leading(&b).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    b.stop().await;
    assert_eq!(holder(&harness).await.0, "");
}

#[tokio::test]
async fn a_leader_that_can_not_reach_the_api_server_stops_before_another_one_starts() {
    let harness = Harness::without_operator("partition").await;
    let (of_a, of_b) = (Traffic::default(), Traffic::default());
    let a = start(&harness, "a", &of_a).await;
    until_leading(&a).await;
    let b = start(&harness, "b", &of_b).await;
    until_ready(&b).await;
    of_a.cut();
    let cut = Instant::now();
    let stopped = until(|| async { (!a.metrics.is_leading()).then(Instant::now) });
    let leading = async {
        until_leading(&b).await;
        Instant::now()
    };
    let (stopped, leading) = tokio::join!(async { timeout(SOON, stopped).await.unwrap() }, leading);
    assert!(stopped < leading, "both worked for {:?}", stopped - leading);
    assert!(leading - cut < FAIL_OVER, "{:?}", leading - cut);
    // It is there again when the network is, and stands by.
    of_a.mend();
    harness.create("image", json!({})).await;
    harness.job("image").await;
    assert!(!a.metrics.is_leading());
    b.stop().await;
    until_leading(&a).await;
    a.stop().await;
}

#[tokio::test]
async fn of_many_that_start_together_one_leads() {
    let harness = Harness::without_operator("many").await;
    let traffic = Traffic::default();
    let mut operators = vec![];
    for name in ["a", "b", "c", "d", "e"] {
        operators.push(start(&harness, name, &traffic).await);
    }
    for operator in &operators {
        until_ready(operator).await;
    }
    for left in (1..=operators.len()).rev() {
        let leaders = until(|| async {
            let leaders: Vec<_> = (0..operators.len()).filter(|one| operators[*one].metrics.is_leading()).collect();
            (!leaders.is_empty()).then_some(leaders)
        });
        let leaders = timeout(SOON, leaders).await.expect("nobody leads");
        assert_eq!(leaders.len(), 1, "of {left}");
        operators.swap_remove(leaders[0]).stop().await;
    }
}
