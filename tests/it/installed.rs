//! The chart on a real API server: every combination of values is accepted as it is, upgrades and rollbacks keep what is
//! there, and a tool that applies from Git and the operator do not fight.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{PersistentVolumeClaim, Secret},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::GroupVersion,
};
use kube_runtime::wait::{await_condition, conditions::is_crd_established};
use node_image_builder::api::v1alpha1::{FINALIZER, NodeImageBuild, Phase};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    chart::values_files,
    controller::harness::{Harness, SOON, condition, until},
    support::{
        apiserver::{self, ApiServer},
        chart::{chart, render},
    },
};

/// Group of the Prometheus operator's kinds, which are not built into Kubernetes.
const MONITORING: &str = "monitoring.coreos.com";

fn resource(object: &Value) -> ApiResource {
    let version: GroupVersion = object["apiVersion"].as_str().unwrap().parse().unwrap();
    ApiResource::from_gvk(&version.with_kind(object["kind"].as_str().unwrap()))
}

/// What the API server says to the object, every field of which must be known, without making it.
async fn admit(client: &Client, object: &Value) -> kube::Result<DynamicObject> {
    let resource = resource(object);
    let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let params = PatchParams::apply("installer").dry_run().validation_strict();
    api.patch(object["metadata"]["name"].as_str().unwrap(), &params, &Patch::Apply(object)).await
}

#[tokio::test]
async fn api_server_takes_every_object_of_every_combination_of_values() {
    let client = apiserver::client().await;
    let namespace = apiserver::namespace(&client, "combination").await;
    let watched = "node-images";
    apiserver::create_namespace(&client, watched).await;
    for values in values_files() {
        let name = values.display();
        let objects = render("release", &namespace, &values, &[]).unwrap();
        let mut seen = 0;
        for object in objects.iter().filter(|object| !object["apiVersion"].as_str().unwrap().starts_with(MONITORING)) {
            let answer = admit(&client, object).await;
            answer.unwrap_or_else(|error| panic!("{name}: {} {}: {error}", object["kind"], object["metadata"]["name"]));
            seen += 1;
        }
        assert!(seen > 5, "{name}");
    }
    // It does tell what it does not know.
    let unknown = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "x", "namespace": namespace }, "datas": {},
    });
    assert!(admit(&client, &unknown).await.unwrap_err().to_string().contains("datas"));
}

/// helm against a server.
fn helm(server: &ApiServer, args: &[&str]) -> String {
    let output = Command::new("helm")
        .args(args)
        .args(["--namespace", "nib"])
        .env("KUBECONFIG", server.kubeconfig())
        .env("HELM_CACHE_HOME", env::temp_dir())
        .output()
        .unwrap();
    assert!(output.status.success(), "helm {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A chart of an earlier version: without a field that this one has, and with one that it has not any more.
fn earlier_chart(scratch: &Path) -> PathBuf {
    let copied = Command::new("cp").arg("-R").arg(chart()).arg(scratch).status().unwrap();
    assert!(copied.success());
    let earlier = scratch.join("node-image-builder");
    let edit = |file: &str, edit: &dyn Fn(&mut Value)| {
        let path = earlier.join(file);
        let mut value: Value = serde_saphyr::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut value);
        fs::write(&path, value.to_string()).unwrap();
    };
    edit("Chart.yaml", &|chart| {
        chart["version"] = json!("0.0.9");
        chart["appVersion"] = json!("0.0.9");
    });
    edit("files/nodeimagebuilds.nodeimagebuild.dev.yaml", &|definition| {
        let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let spec = schema["properties"]["spec"]["properties"].as_object_mut().unwrap();
        assert!(spec.remove("retention").is_some());
        spec.insert("formerly".into(), json!({ "type": "string" }));
    });
    earlier
}

async fn definition_has(client: &Client, field: &str) -> bool {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = definitions.get("nodeimagebuilds.nodeimagebuild.dev").await.unwrap();
    let schema = definition.spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
    schema.properties.unwrap()["spec"].properties.as_ref().unwrap().contains_key(field)
}

/// A build that says how many images are kept, if the installed definition knows that.
fn keeping(name: &str) -> NodeImageBuild {
    let build = json!({
        "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild", "metadata": { "name": name },
        "spec": {
            "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {},
            "retention": { "keep": 3 },
        },
    });
    serde_json::from_value(build).unwrap()
}

#[tokio::test]
async fn upgrade_and_rollback_change_definition_and_operator_and_keep_everything_else() {
    let server = apiserver::bare().await;
    let client = server.client().await;
    let scratch = tempfile::tempdir().unwrap();
    let (earlier, current) = (earlier_chart(scratch.path()), chart());
    let values = chart().join("ci/minimal.yaml");
    let values = &["--values", values.to_str().unwrap()][..];
    let install = [&["install", "nib", earlier.to_str().unwrap(), "--create-namespace"], values].concat();
    helm(&server, &install);
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let established = await_condition(definitions.clone(), "nodeimagebuilds.nodeimagebuild.dev", is_crd_established());
    timeout(SOON, established).await.unwrap().unwrap();
    let builds: Api<NodeImageBuild> = Api::namespaced(client.clone(), "nib");
    let served = until(|| async { builds.list(&ListParams::default()).await.ok() });
    timeout(SOON, served).await.unwrap();
    builds.create(&PostParams::default(), &keeping("before")).await.unwrap();
    assert_eq!(builds.get("before").await.unwrap().spec.retention, None, "an old definition knows nothing of it");
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "nib");
    let key = async || secrets.get("nib-node-image-builder-signing-key").await.unwrap().data;
    let (signing_key, uid) = (key().await, builds.get("before").await.unwrap().uid());
    let image = async || {
        let api: Api<k8s_openapi::api::apps::v1::Deployment> = Api::namespaced(client.clone(), "nib");
        let operator = api.get("nib-node-image-builder").await.unwrap();
        operator.spec.unwrap().template.spec.unwrap().containers[0].image.clone().unwrap()
    };
    assert!(image().await.ends_with(":0.0.9"));

    let upgrade = [&["upgrade", "nib", current.to_str().unwrap()], values].concat();
    helm(&server, &upgrade);
    assert!(definition_has(&client, "retention").await && !definition_has(&client, "formerly").await);
    assert!(image().await.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))));
    let taken = until(|| async {
        builds.create(&PostParams::default(), &keeping("after")).await.ok();
        let after = builds.get("after").await.ok()?;
        if after.spec.retention.is_none() {
            // The API server has not seen the new definition yet.
            builds.delete("after", &kube::api::DeleteParams::default()).await.unwrap();
        }
        after.spec.retention.map(|retention| retention.keep)
    });
    assert_eq!(timeout(SOON, taken).await.unwrap(), 3);
    assert_eq!((key().await, builds.get("before").await.unwrap().uid()), (signing_key.clone(), uid.clone()));

    helm(&server, &["rollback", "nib", "1"]);
    assert!(definition_has(&client, "formerly").await && !definition_has(&client, "retention").await);
    assert!(image().await.ends_with(":0.0.9"));
    assert_eq!((key().await, builds.get("before").await.unwrap().uid()), (signing_key, uid.clone()));

    // What nodes are installed from, and what everybody declared, outlives the release; it is taken over again.
    helm(&server, &["uninstall", "nib"]);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), "nib");
    assert!(claims.get("nib-node-image-builder-artifacts").await.unwrap().metadata.deletion_timestamp.is_none());
    assert_eq!(builds.get("before").await.unwrap().uid(), uid);
    helm(&server, &[&["install", "nib", current.to_str().unwrap()], values].concat());
    assert!(definition_has(&client, "retention").await);
    assert_eq!(builds.get("before").await.unwrap().uid(), uid);
}

/// What kstatus makes of an object.
fn kstatus(object: &NodeImageBuild) -> String {
    let program =
        env::var_os("NIB_KSTATUS").expect("NIB_KSTATUS is not set: run the tests by `make unit`, which builds it");
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    serde_json::to_writer(child.stdin.take().unwrap(), object).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn kstatus_judges_a_build_right_in_all_its_life() {
    let server = Arc::new(apiserver::own().await);
    let mut harness = Harness::on(server, "kstatus").await;
    let api = harness.api::<NodeImageBuild>();
    let judged = async || kstatus(&api.get("image").await.unwrap());
    harness.start_operator();
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    assert_eq!(judged().await, "InProgress", "it builds");
    harness.succeed(&job).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(judged().await, "Current", "the image is there");
    harness.stop_operator().await;
    harness.patch("image", json!({ "spec": { "packages": { "install": ["jq"] } } })).await;
    assert_eq!(judged().await, "InProgress", "the change was not seen yet");
    harness.start_operator();
    harness.patch("image", json!({ "spec": { "releaseChannel": "1-99" } })).await;
    harness.until("image", "stalled", |s| condition(s, "Stalled").is_some()).await;
    assert_eq!(judged().await, "Failed", "somebody has to act");
    harness.patch("image", json!({ "spec": { "releaseChannel": "1-31" } })).await;
    harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    api.delete("image", &kube::api::DeleteParams::default()).await.unwrap();
    assert_eq!(judged().await, "Terminating");
    harness.stop_operator().await;
}

#[tokio::test]
async fn a_gitops_tool_and_the_operator_write_different_fields() {
    let harness = Harness::start("gitops").await;
    let api = harness.api::<NodeImageBuild>();
    let declared = |packages: &[&str]| {
        json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
            "metadata": { "name": "image", "labels": { "kustomize.toolkit.fluxcd.io/name": "images" } },
            "spec": {
                "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {},
                "source": harness.source(), "packages": { "install": packages },
            },
        })
    };
    // As Flux and Argo CD do it: server-side apply, without force.
    let apply = async |packages: &[&str]| {
        let params = PatchParams::apply("kustomize-controller").validation_strict();
        api.patch("image", &params, &Patch::Apply(declared(packages))).await.unwrap()
    };
    apply(&["jq"]).await;
    harness.succeed(&harness.job("image").await).await;
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    let before = api.get("image").await.unwrap();
    let again = apply(&["jq"]).await;
    assert_eq!(again.resource_version(), before.resource_version(), "applied again, nothing changes");
    assert!(again.finalizers().iter().any(|finalizer| finalizer == FINALIZER), "the operator's finalizer stays");
    assert_eq!(again.status, before.status);

    apply(&["jq", "vim"]).await;
    let status = harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    let job: Job = harness.api().get(&status.job_name.unwrap()).await.unwrap();
    assert_eq!(harness.document(&job).await.packages.install, ["jq", "vim"]);

    let owned = |manager: &str| -> Vec<Value> {
        let fields = again.metadata.managed_fields.iter().flatten();
        let of_manager = fields.filter(|entry| entry.manager.as_deref() == Some(manager));
        of_manager.map(|entry| entry.fields_v1.clone().unwrap().0).collect()
    };
    let [theirs] = &owned("kustomize-controller")[..] else { panic!("{again:#?}") };
    assert!(
        theirs["f:spec"].is_object() && theirs["f:status"].is_null() && theirs["f:metadata"]["f:finalizers"].is_null()
    );
    let ours = owned("node-image-builder");
    assert!(!ours.is_empty() && ours.iter().all(|fields| fields["f:spec"].is_null()), "{ours:#?}");
    let labels = ours.iter().map(|fields| &fields["f:metadata"]["f:labels"]);
    assert!(labels.into_iter().all(Value::is_null), "{ours:#?}");
}
