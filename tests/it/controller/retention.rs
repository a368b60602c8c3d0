//! Which older images go, and which stay because a cluster uses them.

use std::sync::Arc;

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{Pod, Secret},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams},
};
use kube_runtime::wait::{await_condition, conditions::is_crd_established};
use node_image_builder::{
    api::v1alpha1::{BuildResult, NodeImageBuildStatus, Phase, REBUILD_ANNOTATION},
    controller::retention::{GROUP, KINDS, Kind, VERSION},
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    harness::{Harness, SOON, condition, message, until},
    rights::confined,
};
use crate::support::apiserver;

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// Builds once more, and gives the status when the image is there.
async fn rebuild(harness: &Harness, name: &str, token: &str) -> NodeImageBuildStatus {
    harness.patch(name, json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: token } } })).await;
    let building = harness
        .until(name, "building again", |s| {
            s.phase == Some(Phase::Building) && s.last_rebuild_token.as_deref() == Some(token)
        })
        .await;
    let job: Job = harness.api().get(&building.job_name.unwrap()).await.unwrap();
    harness.succeed(&job).await;
    harness.until(name, "ready again", |s| s.phase == Some(Phase::Ready) && s.build_id == building.build_id).await
}

/// The builds whose images are there, the newest first.
fn kept(status: &NodeImageBuildStatus) -> Vec<&str> {
    let succeeded = status.history.iter().filter(|entry| entry.result == BuildResult::Succeeded);
    succeeded.map(|entry| entry.build_id.as_str()).collect()
}

fn id(status: &NodeImageBuildStatus) -> String {
    status.build_id.clone().unwrap()
}

/// Directories that were deleted on the artifact server, in order. One that is asked for twice, because a status lost a race,
/// counts once.
fn deleted(harness: &Harness) -> Vec<String> {
    let mut paths: Vec<_> = harness.mirror.deleted.lock().unwrap().iter().map(|(path, _)| path.clone()).collect();
    paths.dedup();
    paths
}

/// Lets the operator look at the resource.
async fn touch(harness: &Harness, name: &str) {
    let now = jiff::Timestamp::now().as_nanosecond().to_string();
    harness.patch(name, json!({ "metadata": { "labels": { "touched": now } } })).await;
}

/// EKS Anywhere's kinds, as far as they name images.
async fn install_eks_anywhere(client: &Client) {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for Kind { kind, plural, .. } in KINDS {
        let text = json!({ "type": "string" });
        let image = json!({ "type": "object", "properties": { "type": text, "name": text, "uuid": text } });
        let spec = json!({ "type": "object", "properties": { "osImageURL": text, "template": text, "image": image } });
        let schema = json!({ "type": "object", "properties": { "spec": spec } });
        let name = format!("{plural}.{GROUP}");
        let definition = json!({
            "metadata": { "name": name },
            "spec": {
                "group": GROUP, "scope": "Namespaced", "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase() },
                "versions": [{
                    "name": VERSION, "served": true, "storage": true, "schema": { "openAPIV3Schema": schema },
                }],
            },
        });
        definitions.create(&PostParams::default(), &object(definition)).await.unwrap();
        timeout(SOON, await_condition(definitions.clone(), &name, is_crd_established())).await.unwrap().unwrap();
        let served = until(|| async { api(client, kind).list(&ListParams::default()).await.ok() });
        timeout(SOON, served).await.unwrap();
    }
}

fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let Kind { kind, plural, .. } = KINDS.into_iter().find(|one| one.kind == kind).unwrap();
    let resource = ApiResource {
        group: GROUP.to_owned(),
        version: VERSION.to_owned(),
        api_version: format!("{GROUP}/{VERSION}"),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    };
    Api::namespaced_with(client.clone(), "default", &resource)
}

/// A resource of a cluster, in another namespace than the images are built in.
async fn uses(harness: &Harness, kind: &str, spec: Value) -> String {
    let config = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": kind, "metadata": { "generateName": "cluster-" }, "spec": spec,
    });
    api(&harness.client, kind).create(&PostParams::default(), &object(config)).await.unwrap().name_any()
}

async fn no_longer(harness: &Harness, kind: &str, name: &str) {
    api(&harness.client, kind).delete(name, &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn older_images_go_from_the_artifact_server_and_all_stay_without_a_retention() {
    let harness = Harness::start("keep").await;
    let first = harness.ready("image", json!({ "history": { "successful": 1 }, "retention": { "keep": 2 } })).await;
    let second = rebuild(&harness, "image", "2").await;
    assert_eq!(kept(&second), [id(&second), id(&first)], "the history's limit does not forget an image that is there");
    assert_eq!(deleted(&harness), [""; 0]);
    let third = rebuild(&harness, "image", "3").await;
    let status = harness.until("image", "rid of the oldest", |s| kept(s).len() == 2).await;
    assert_eq!(kept(&status), [id(&third), id(&second)]);
    assert_eq!(deleted(&harness), [format!("{}/image/{}", harness.namespace, id(&first))]);
    assert_eq!((status.phase, &status.image_url), (Some(Phase::Ready), &third.image_url));
    assert!(harness.event("image", "ImageRemoved").await.contains(&id(&first)));

    let all = harness.ready("all", json!({ "history": { "successful": 1 } })).await;
    let newest = rebuild(&harness, "all", "2").await;
    assert_ne!(id(&newest), id(&all));
    assert_eq!(deleted(&harness).len(), 1);
}

#[tokio::test]
async fn an_artifact_server_that_is_away_delays_the_removal_and_nothing_else() {
    let harness = Harness::start("away").await;
    let first = harness.ready("image", json!({ "retention": { "keep": 1 } })).await;
    harness.patch("image", json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: "2" } } })).await;
    let building = harness.until("image", "building again", |s| s.phase == Some(Phase::Building)).await;
    harness.mirror.down.store(true, std::sync::atomic::Ordering::Relaxed);
    harness.succeed(&harness.api::<Job>().get(&building.job_name.clone().unwrap()).await.unwrap()).await;
    let ready =
        harness.until("image", "ready", |s| s.phase == Some(Phase::Ready) && s.build_id == building.build_id).await;
    assert_eq!(kept(&ready), [id(&building), id(&first)], "what is there is not forgotten");
    harness.mirror.down.store(false, std::sync::atomic::Ordering::Relaxed);
    harness.until("image", "rid of the older one", |s| kept(s) == [id(&building)]).await;
    assert_eq!(deleted(&harness), [format!("{}/image/{}", harness.namespace, id(&first))]);
}

#[tokio::test]
async fn images_that_a_cluster_names_stay_until_it_names_them_no_more() {
    let server = Arc::new(apiserver::own().await);
    let mut harness = Harness::on(Arc::clone(&server), "used").await;
    install_eks_anywhere(&harness.client).await;
    harness.start_operator();
    let first = harness.ready("image", json!({ "retention": { "keep": 1 } })).await;
    let url = first.image_url.clone().unwrap();
    let machines = uses(&harness, "TinkerbellMachineConfig", json!({ "osImageURL": url })).await;
    let second = rebuild(&harness, "image", "2").await;
    // Machines may know the server by another name.
    let other = second.image_url.clone().unwrap().replace("images.example.com", "10.0.0.7:8080");
    let center = uses(&harness, "TinkerbellDatacenterConfig", json!({ "osImageURL": other })).await;
    let third = rebuild(&harness, "image", "3").await;
    let fourth = rebuild(&harness, "image", "4").await;
    let status = harness.until("image", "rid of the unused one", |s| !kept(s).contains(&id(&third).as_str())).await;
    assert_eq!(kept(&status), [id(&fourth), id(&second), id(&first)]);
    let directory = |status: &NodeImageBuildStatus| format!("{}/image/{}", harness.namespace, id(status));
    assert_eq!(deleted(&harness), [directory(&third)]);

    no_longer(&harness, "TinkerbellMachineConfig", &machines).await;
    touch(&harness, "image").await;
    harness.until("image", "rid of the first one", |s| kept(s) == [id(&fourth), id(&second)]).await;
    no_longer(&harness, "TinkerbellDatacenterConfig", &center).await;
    touch(&harness, "image").await;
    harness.until("image", "rid of the second one", |s| kept(s) == [id(&fourth)]).await;
    assert_eq!(deleted(&harness), [directory(&third), directory(&first), directory(&second)]);
    harness.stop_operator().await;
}

/// A build for Prism Central or vCenter, whose images have names of their own.
async fn create(harness: &Harness, name: &str, provider: &str) -> NodeImageBuildStatus {
    let secret = json!({"metadata": {"name": name}, "stringData": {"username": "u", "password": "p"}});
    harness.api::<Secret>().create(&PostParams::default(), &object(secret)).await.unwrap();
    let settings = match provider {
        "vsphere" => json!({
            "server": "vcenter.example.com", "credentialsSecretRef": {"name": name}, "datacenter": "dc1",
            "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network",
        }),
        _ => json!({
            "endpoint": "prism.example.com", "credentialsSecretRef": {"name": name}, "cluster": {"name": "pe1"},
        }),
    };
    harness.ready(name, json!({ "baremetal": null, provider: settings, "retention": { "keep": 1 } })).await
}

/// Waits for the removal of a build's image, and lets it end.
async fn removal(harness: &Harness, build: &str) {
    let labelled = ListParams::default().labels(&format!("nodeimagebuild.dev/clean-up-of={build}"));
    let found = until(|| async { harness.api::<Job>().list(&labelled).await.unwrap().items.pop() });
    let job = timeout(SOON, found).await.expect("nothing removes it");
    let arguments = job.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].args.clone().unwrap();
    assert_eq!(arguments.last().unwrap(), "--finished-too");
    harness.end_job(&job, true, "CompletionsReached").await;
    harness.until_gone::<Job>(&job.name_any()).await;
}

#[tokio::test]
async fn templates_and_images_go_by_a_job_unless_a_machine_config_names_them() {
    let server = Arc::new(apiserver::own().await);
    let mut harness = Harness::on(Arc::clone(&server), "outside").await;
    install_eks_anywhere(&harness.client).await;
    harness.start_operator();
    for (provider, kind) in [("vsphere", "VSphereMachineConfig"), ("nutanix", "NutanixMachineConfig")] {
        let first = create(&harness, provider, provider).await;
        let image = first.image.clone().unwrap().name;
        let spec = match provider {
            "vsphere" => json!({ "template": format!("/dc1/vm/Templates/{image}") }),
            _ => json!({ "image": { "type": "name", "name": image } }),
        };
        let config = uses(&harness, kind, spec).await;
        let second = rebuild(&harness, provider, "2").await;
        let third = rebuild(&harness, provider, "3").await;
        removal(&harness, &id(&second)).await;
        let status = harness.until(provider, "rid of the unused one", |s| kept(s).len() == 2).await;
        assert_eq!(kept(&status), [id(&third), id(&first)], "{provider}");
        let of_second = ListParams::default().labels(&format!("nodeimagebuild.dev/build-id={}", id(&second)));
        let secret =
            until(|| async { harness.api::<Secret>().list(&of_second).await.unwrap().items.is_empty().then_some(()) });
        timeout(SOON, secret).await.expect("its Secret stays");

        no_longer(&harness, kind, &config).await;
        touch(&harness, provider).await;
        removal(&harness, &id(&first)).await;
        harness.until(provider, "rid of the first one", |s| kept(s) == [id(&third)]).await;
    }
    let pods = harness.api::<Pod>().list(&ListParams::default()).await.unwrap();
    assert!(pods.items.len() <= 6);
    harness.stop_operator().await;
}

#[tokio::test]
async fn nothing_is_removed_where_the_clusters_can_not_be_seen() {
    let mut harness = Harness::without_operator("unseen").await;
    let client = confined(&harness, &[]).await;
    harness.start_operator_with(client, harness.settings());
    harness.ready("image", json!({ "retention": { "keep": 1 } })).await;
    rebuild(&harness, "image", "2").await;
    let status = harness.until("image", "blocked", |s| condition(s, "RetentionBlocked").is_some()).await;
    let told = message(&status, "RetentionBlocked");
    assert!(told.contains("tinkerbelldatacenterconfigs") && told.contains("operator.readClusters"), "{told}");
    assert_eq!((status.phase, kept(&status).len()), (Some(Phase::Ready), 2));
    assert_eq!(harness.event("image", "RetentionBlocked").await, told);
    assert_eq!(deleted(&harness), [""; 0]);
    harness.stop_operator().await;
}

#[tokio::test]
async fn a_confined_operator_removes_what_it_may_see_to_be_unused() {
    let mut harness = Harness::without_operator("seen").await;
    let client = confined(&harness, &["--set", "operator.readClusters=true"]).await;
    harness.start_operator_with(client, harness.settings());
    let first = harness.ready("image", json!({ "retention": { "keep": 1 } })).await;
    let second = rebuild(&harness, "image", "2").await;
    harness.until("image", "rid of the first one", |s| kept(s) == [id(&second)]).await;
    assert_eq!(deleted(&harness), [format!("{}/image/{}", harness.namespace, id(&first))]);
    harness.stop_operator().await;
}
