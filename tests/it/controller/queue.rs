//! How many builds run at the same time, and who is next.

use k8s_openapi::api::batch::v1::Job;
use kube::{ResourceExt, api::DeleteParams};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, Phase},
    controller::{
        context::{Lifecycle, Placement, Settings},
        queue::Limits,
    },
};
use serde_json::json;

use super::harness::{Harness, Traffic, condition, message, until};

fn limited(harness: &Harness, limits: Limits) -> Settings {
    Settings { lifecycle: Lifecycle { limits, ..Lifecycle::default() }, ..harness.settings() }
}

/// An operator that runs one build at a time.
async fn one_at_a_time(prefix: &str) -> Harness {
    let mut harness = Harness::without_operator(prefix).await;
    restart(&mut harness);
    harness
}

fn restart(harness: &mut Harness) {
    let settings = limited(harness, Limits { total: Some(1), ..Limits::default() });
    harness.start_operator_with(harness.operator_client.clone(), settings);
}

#[tokio::test]
async fn builds_beyond_the_limit_wait_in_order_and_say_so() {
    let mut harness = one_at_a_time("queue").await;
    harness.create("first", json!({})).await;
    let first = harness.job("first").await;
    for (name, place) in [("second", "1st of 1 waiting"), ("third", "2nd of 2 waiting"), ("fourth", "3rd of 3 waiting")]
    {
        harness.create(name, json!({})).await;
        let queued = harness.until(name, "queued", |s| s.phase == Some(Phase::Queued)).await;
        assert_eq!(condition(&queued, "Reconciling"), Some(("True", "Queued")));
        assert!(message(&queued, "Ready").starts_with(place), "{}", message(&queued, "Ready"));
        assert_eq!((&queued.build_id, &queued.failure), (&None, &None));
        // Since when it waits is known to the second.
        let since = queued.conditions[0].last_transition_time.0.as_second();
        until(|| async { (jiff::Timestamp::now().as_second() > since).then_some(()) }).await;
    }
    // Whoever takes over knows who runs and who has waited for how long.
    harness.kill_operator().await;
    restart(&mut harness);
    harness.create("late", json!({})).await;
    let late = harness.until("late", "queued", |s| s.phase == Some(Phase::Queued)).await;
    assert!(message(&late, "Ready").starts_with("4th of 4 waiting"), "{}", message(&late, "Ready"));
    assert_eq!(harness.jobs().await.len(), 1);

    harness.succeed(&first).await;
    let second = harness.job("second").await;
    harness.until("first", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(harness.jobs().await.len(), 2);

    // Who goes makes room for the one behind.
    harness.api::<NodeImageBuild>().delete("third", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("third").await;
    harness.patch("second", json!({ "spec": { "suspend": true } })).await;
    harness.until_gone::<Job>(&second.name_any()).await;
    let fourth = harness.job("fourth").await;
    let waiting = harness.api::<NodeImageBuild>().get("late").await.unwrap().status.unwrap();
    assert_eq!(waiting.phase, Some(Phase::Queued));
    harness.succeed(&fourth).await;
    harness.job("late").await;
}

#[tokio::test]
async fn a_build_that_is_superseded_keeps_its_slot() {
    let harness = one_at_a_time("slot").await;
    harness.create("first", json!({})).await;
    let old = harness.job("first").await;
    harness.create("second", json!({})).await;
    harness.until("second", "queued", |s| s.phase == Some(Phase::Queued)).await;
    harness.patch("first", json!({ "spec": { "packages": { "install": ["jq"] } } })).await;
    harness.until_gone::<Job>(&old.name_any()).await;
    let new =
        harness.until("first", "building", |s| s.job_name.as_ref().is_some_and(|name| *name != old.name_any())).await;
    assert_eq!(new.phase, Some(Phase::Building));
    let second = harness.api::<NodeImageBuild>().get("second").await.unwrap().status.unwrap();
    assert_eq!(second.phase, Some(Phase::Queued));
}

#[tokio::test]
async fn a_build_that_can_not_start_does_not_hold_up_those_behind_it() {
    let harness = one_at_a_time("blocked").await;
    harness.create("first", json!({})).await;
    let first = harness.job("first").await;
    harness.create("second", json!({})).await;
    harness.until("second", "queued", |s| s.phase == Some(Phase::Queued)).await;
    harness.create("third", json!({})).await;
    harness.until("third", "queued", |s| s.phase == Some(Phase::Queued)).await;
    harness.patch("second", json!({ "spec": { "releaseChannel": "1-99" } })).await;
    harness.until("second", "stalled", |s| condition(s, "Stalled").is_some()).await;
    harness.succeed(&first).await;
    harness.job("third").await;
}

#[tokio::test]
async fn servers_and_namespaces_have_limits_of_their_own() {
    let mut harness = Harness::without_operator("server").await;
    let settings = limited(&harness, Limits { total: None, per_namespace: Some(3), per_server: Some(1) });
    harness.start_operator_with(harness.operator_client.clone(), settings);
    let secret = json!({ "stringData": { "username": "u", "password": "p" }, "metadata": { "name": "vcenter" } });
    let secrets = harness.api::<k8s_openapi::api::core::v1::Secret>();
    secrets.create(&kube::api::PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    let vsphere = |server: &str| {
        json!({ "baremetal": null, "vsphere": {
            "server": server, "credentialsSecretRef": { "name": "vcenter" }, "datacenter": "dc1", "cluster": "c1",
            "datastore": "d1", "network": "n1",
        }})
    };
    harness.create("a", vsphere("vcenter1.example.com")).await;
    let a = harness.job("a").await;
    harness.create("b", vsphere("VCENTER1.example.com")).await;
    harness.until("b", "queued", |s| s.phase == Some(Phase::Queued)).await;
    harness.create("c", vsphere("vcenter2.example.com")).await;
    harness.job("c").await;
    harness.create("d", json!({})).await;
    harness.job("d").await;
    // Three run in this namespace.
    harness.create("e", json!({})).await;
    harness.until("e", "queued", |s| s.phase == Some(Phase::Queued)).await;
    harness.succeed(&a).await;
    harness.job("b").await;
}

#[tokio::test]
async fn waiting_costs_few_writes() {
    const WAITING: usize = 30;
    let mut harness = Harness::without_operator("storm").await;
    let traffic = Traffic::default();
    let settings = limited(&harness, Limits { total: Some(1), ..Limits::default() });
    harness.start_operator_with(traffic.client().await, settings);
    harness.create("first", json!({})).await;
    let first = harness.job("first").await;
    for n in 0..WAITING {
        harness.create(&format!("waiting-{n:02}"), json!({})).await;
    }
    for n in 0..WAITING {
        harness.until(&format!("waiting-{n:02}"), "queued", |s| s.phase == Some(Phase::Queued)).await;
    }
    let before = traffic.writes().len();
    assert!(before <= 4 + WAITING, "{before} writes: {:#?}", traffic.writes());
    harness.succeed(&first).await;
    harness.job("waiting-00").await;
    harness.until("first", "ready", |s| s.phase == Some(Phase::Ready)).await;
    // One build ends and one begins: the others' positions are told later, and not all at once.
    let after = traffic.writes().len() - before;
    assert!(after <= 8, "{after} writes: {:#?}", &traffic.writes()[before..]);
}

#[tokio::test]
async fn only_builds_that_demand_kvm_ask_for_the_device() {
    let mut harness = Harness::without_operator("kvm").await;
    let placement = Placement { kvm_resource: Some("example.com/kvm".into()), ..Placement::default() };
    let settings = Settings { placement, ..harness.settings() };
    harness.start_operator_with(harness.operator_client.clone(), settings);
    let asked = async |name: &str| {
        let pod = harness.job(name).await.spec.unwrap().template.spec.unwrap();
        pod.containers[0].resources.clone().unwrap().limits.unwrap_or_default().contains_key("example.com/kvm")
    };
    harness.create("demands", json!({ "verify": { "accelerator": "KVM" } })).await;
    harness.create("takes-any", json!({})).await;
    assert_eq!((asked("demands").await, asked("takes-any").await), (true, false));
}
