//! What the operator may do: exactly what the chart's role says, of which it needs every rule. All other tests run it
//! under that role too, see [`super::harness`].

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use k8s_openapi::api::{
    batch::v1::Job,
    coordination::v1::Lease,
    core::v1::{ConfigMap, Secret},
    events::v1::Event,
    rbac::v1::Role,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, Phase, REBUILD_ANNOTATION},
    controller::{
        context::{Lifecycle, Settings},
        lease::LeaseSettings,
        queue::Limits,
    },
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::harness::{Harness, Running, SOON, condition, until};
use crate::support::{
    apiserver::{self, RELEASE},
    chart::{chart, of_kind, render},
};

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// A verb on a resource of a group: `batch/jobs:create`.
type Right = String;

fn right(group: &str, resource: &str, verb: &str) -> Right {
    format!("{group}/{resource}:{verb}")
}

/// What the chart's roles allow.
fn allowed(objects: &[Value]) -> BTreeSet<Right> {
    let strings = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut found = BTreeSet::new();
    for role in of_kind(objects, "ClusterRole").into_iter().chain(of_kind(objects, "Role")) {
        for rule in role["rules"].as_array().unwrap() {
            for group in strings(&rule["apiGroups"]) {
                for resource in strings(&rule["resources"]) {
                    found.extend(strings(&rule["verbs"]).iter().map(|verb| right(&group, &resource, verb)));
                }
            }
        }
    }
    found
}

/// What an entry of the audit log asked for.
fn asked(entry: &Value) -> Option<Right> {
    let object = entry["objectRef"].as_object()?;
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let resource = match text("subresource") {
        "" => text("resource").to_owned(),
        subresource => format!("{}/{subresource}", text("resource")),
    };
    Some(right(text("apiGroup"), &resource, entry["verb"].as_str()?))
}

async fn until_leading(operator: &Running) {
    let leading = until(|| async { operator.metrics.is_leading().then_some(()) });
    timeout(SOON, leading).await.expect("the operator does not lead");
}

/// An operator for all namespaces, with the chart's lease and a limit.
fn everywhere(harness: &Harness) -> Running {
    let limits = Limits { total: Some(100), ..Limits::default() };
    let lifecycle = Lifecycle { limits, ..Lifecycle::default() };
    let lease = LeaseSettings { namespace: RELEASE.to_owned(), name: RELEASE.to_owned(), identity: "a".to_owned() };
    let settings = Settings { lifecycle, ..harness.settings() };
    Harness::run_operator(harness.operator_client.clone(), None, settings, Some(lease))
}

/// Builds of all kinds through all of their life.
async fn live_through_everything(harness: &Harness) {
    // A build that names objects which come later, runs, and goes with its files while their server is away.
    let target = json!({ "s3": { "bucket": "images", "region": "r-1", "credentialsSecretRef": { "name": "s3" } } });
    let file = json!({ "path": "/etc/motd", "configMapKeyRef": { "name": "motd", "key": "text" } });
    let spec = json!({
        "publish": [{ "artifactServer": {} }, target], "files": [file], "deletionPolicy": "Delete",
        "rebuild": { "onNewRelease": true },
    });
    harness.create("whole", spec).await;
    harness.until("whole", "stalled", |s| condition(s, "Stalled") == Some(("True", "SecretNotFound"))).await;
    let keys = json!({ "accessKeyID": "a", "secretAccessKey": "b" });
    let secret: Secret = object(json!({ "metadata": { "name": "s3" }, "stringData": keys }));
    harness.api().create(&PostParams::default(), &secret).await.unwrap();
    harness.until("whole", "stalled", |s| condition(s, "Stalled") == Some(("True", "ConfigMapNotFound"))).await;
    let map: ConfigMap = object(json!({ "metadata": { "name": "motd" }, "data": { "text": "hello" } }));
    harness.api().create(&PostParams::default(), &map).await.unwrap();
    harness.succeed(&harness.job("whole").await).await;
    harness.until("whole", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.mirror.down.store(true, Ordering::Relaxed);
    harness.api::<NodeImageBuild>().delete("whole", &DeleteParams::default()).await.unwrap();
    let told_again = until(|| async {
        let events = harness.api::<Event>().list(&ListParams::default()).await.unwrap();
        events.iter().any(|event| event.series.is_some()).then_some(())
    });
    timeout(SOON, told_again).await.expect("nothing is told twice");
    harness.mirror.down.store(false, Ordering::Relaxed);
    harness.until_gone::<NodeImageBuild>("whole").await;

    // Images of which one is too many.
    harness.ready("kept", json!({ "retention": { "keep": 1 } })).await;
    harness.patch("kept", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "2" } } })).await;
    let building = harness.until("kept", "building again", |s| s.phase == Some(Phase::Building)).await;
    harness.succeed(&harness.api().get(&building.job_name.unwrap()).await.unwrap()).await;
    harness.event("kept", "ImageRemoved").await;

    // A build that is cancelled.
    harness.create("cancelled", json!({})).await;
    let job = harness.job("cancelled").await;
    // Its pod is late, and the operator asks why.
    let asks = until(|| async {
        harness
            .audit()
            .iter()
            .any(|entry| entry["objectRef"]["resource"] == "events" && entry["verb"] == "list")
            .then_some(())
    });
    timeout(SOON, asks).await.expect("nobody asks why there is no pod");
    harness.run_pod(&harness.create_pod(&job, 0).await.unwrap()).await;
    harness.until("cancelled", "building", |s| s.phase == Some(Phase::Building)).await;
    harness.patch("cancelled", json!({ "spec": { "suspend": true } })).await;
    harness.until_gone::<Job>(&job.name_any()).await;
    harness.remove_pods().await;
    harness.until_gone::<Secret>(&job.name_any()).await;
}

#[tokio::test]
async fn operator_lives_on_the_charts_role_and_needs_every_rule_of_it() {
    let server = Arc::new(apiserver::own().await);
    let harness = Harness::on(Arc::clone(&server), "rights").await;
    let operator = everywhere(&harness);
    until_leading(&operator).await;
    Box::pin(live_through_everything(&harness)).await;
    // It renews its lease.
    let leases: Api<Lease> = Api::namespaced(harness.client.clone(), RELEASE);
    let renewed = |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.renew_time.clone()).map(|time| time.0);
    let first = renewed(&leases.get(RELEASE).await.unwrap());
    let again = until(|| async { (renewed(&leases.get(RELEASE).await.unwrap()) > first).then_some(()) });
    timeout(SOON, again).await.expect("the lease is not renewed");
    operator.stop().await;

    let entries = harness.audit();
    let refused: Vec<_> =
        entries.iter().filter(|entry| entry["annotations"]["authorization.k8s.io/decision"] != "allow").collect();
    assert!(refused.is_empty(), "{refused:#?}");
    let asked: BTreeSet<Right> = entries.iter().filter_map(asked).collect();
    let allowed = allowed(&render(RELEASE, RELEASE, &chart().join("ci/minimal.yaml"), &[]).unwrap());
    let unused: Vec<_> = allowed.difference(&asked).collect();
    assert!(unused.is_empty(), "the chart allows what the operator does not do: {unused:#?}");
    let missing: Vec<_> = asked.difference(&allowed).collect();
    assert!(missing.is_empty(), "not in the chart: {missing:#?}");
}

/// The client of an operator that was installed for the test's namespace only, `more` being further arguments of helm.
pub(super) async fn confined(harness: &Harness, more: &[&str]) -> Client {
    let release = format!("{}-operator", harness.namespace);
    let server = apiserver::shared().await;
    apiserver::create_namespace(&harness.client, &release).await;
    let watched = format!("operator.watchNamespace={}", harness.namespace);
    let arguments = [&["--set", &watched, "--set", "artifactServer.enabled=false"], more].concat();
    let objects = render(RELEASE, &release, &chart().join("ci/minimal.yaml"), &arguments).unwrap();
    assert_eq!(of_kind(&objects, "ClusterRole").is_empty(), more.is_empty());
    apiserver::install_rights(&harness.client, &objects).await;
    Client::try_from(server.config_of(&release, RELEASE).await).unwrap()
}

#[tokio::test]
async fn confined_operator_works_in_its_namespace_and_can_not_look_into_others() {
    let mut harness = Harness::without_operator("confined").await;
    let client = confined(&harness, &[]).await;
    harness.start_operator_with(client.clone(), harness.settings());
    harness.ready("image", json!({})).await;
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    harness.until_gone::<NodeImageBuild>("image").await;
    harness.stop_operator().await;
    let elsewhere: Api<Secret> = Api::namespaced(client.clone(), RELEASE);
    let error = elsewhere.list(&ListParams::default()).await.unwrap_err();
    assert!(matches!(&error, kube::Error::Api(status) if status.is_forbidden()), "{error}");
    let error = Api::<Role>::all(client).list(&ListParams::default()).await.unwrap_err();
    assert!(matches!(&error, kube::Error::Api(status) if status.is_forbidden()), "{error}");
}

#[tokio::test]
async fn pods_of_the_chart_and_clean_ups_pass_the_restricted_level_and_builds_need_the_privileged_one() {
    let harness = Harness::start("levels").await;
    let secret = json!({"metadata": {"name": "vcenter"}, "stringData": {"username": "u", "password": "p"}});
    harness.api::<Secret>().create(&PostParams::default(), &object(secret)).await.unwrap();
    let vsphere = json!({
        "server": "vcenter.example.com", "credentialsSecretRef": {"name": "vcenter"}, "datacenter": "dc1",
        "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network",
    });
    harness.create("image", json!({ "baremetal": null, "vsphere": vsphere, "deletionPolicy": "Delete" })).await;
    let build = harness.job("image").await;
    harness.succeed(&build).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.api::<NodeImageBuild>().delete("image", &DeleteParams::default()).await.unwrap();
    let clean_up = until(|| async {
        let labelled = ListParams::default().labels("nodeimagebuild.dev/clean-up-of");
        harness.api::<Job>().list(&labelled).await.unwrap().items.pop()
    });
    let clean_up = timeout(SOON, clean_up).await.expect("nothing cleans up");
    let template = |job: &Job| serde_json::to_value(&job.spec.as_ref().unwrap().template).unwrap();

    harness.enforce("restricted").await;
    let mut admitted = 0;
    for values in ["ci/minimal.yaml", "ci/one-namespace.yaml"] {
        let objects = render(RELEASE, RELEASE, &chart().join(values), &[]).unwrap();
        for deployment in of_kind(&objects, "Deployment") {
            let mut template = deployment["spec"]["template"].clone();
            // The class is one of clusters with the plug-in that makes it.
            template["spec"].as_object_mut().unwrap().remove("priorityClassName");
            harness.admit(&template).await.unwrap();
            admitted += 1;
        }
    }
    assert_eq!(admitted, 4, "operator and artifact server of both");
    harness.admit(&template(&clean_up)).await.unwrap();
    for level in ["restricted", "baseline"] {
        harness.enforce(level).await;
        let refusal = harness.admit(&template(&build)).await.unwrap_err();
        assert!(refusal.contains("violates PodSecurity") && refusal.contains("privileged"), "{level}: {refusal}");
    }
    harness.enforce("privileged").await;
    harness.admit(&template(&build)).await.unwrap();
    harness.end_job(&clean_up, true, "CompletionsReached").await;
    harness.until_gone::<NodeImageBuild>("image").await;
}
