//! The device plugin under a real kubelet.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, LogParams, PostParams},
};
use node_image_builder::{
    device_plugin::{DEVICES, LABEL, RESOURCE},
    native::accelerator::{self, KVM_DEVICE},
    process::Runner,
    secret::Redactor,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::{ChartValues, SYSTEM, TestNamespace, kubectl, status, until},
    mirror::spec,
};

const LIMIT: Duration = Duration::from_secs(180);
/// Longest time for a whole build on a busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);
const DAEMON_SET: &str = "node-image-builder-kvm";
const COMPONENT: &str = "app.kubernetes.io/component=kvm-device-plugin";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn wait_for_rollout() {
    kubectl(&["-n", SYSTEM, "rollout", "status", "daemonset", DAEMON_SET, "--timeout=120s"]);
}

async fn node(client: &Client) -> Node {
    Api::<Node>::all(client.clone()).list(&ListParams::default()).await.unwrap().items.remove(0)
}

/// Waits until the node's label says whether guests run, and as many devices are there and may be given to pods.
async fn until_node_shows(client: &Client, runs: bool, capacity: usize, allocatable: usize) {
    let what = format!("the node has the label {runs} and {allocatable} of {capacity} devices");
    until(LIMIT, &what, async || {
        let node = node(client).await;
        let label = node.labels().get(LABEL) == Some(&runs.to_string());
        let status = node.status.unwrap();
        let count = |resources: Option<BTreeMap<String, Quantity>>| Some(resources?.get(RESOURCE)?.0.clone());
        label
            && count(status.capacity) == Some(capacity.to_string())
            && count(status.allocatable) == Some(allocatable.to_string())
    })
    .await;
}

/// The plugin's pod: how often it was started, and how often it registered.
async fn plugin(client: &Client) -> Option<(i32, usize)> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), SYSTEM);
    let pod = pods.list(&ListParams::default().labels(COMPONENT)).await.unwrap().items.pop()?;
    let log = pods.logs(&pod.name_any(), &LogParams::default()).await.ok()?;
    let restarts = pod.status?.container_statuses?.first()?.restart_count;
    Some((restarts, log.matches("registered at kubelet").count()))
}

/// A pod without privileges that opens KVM's device, with one of the plugin's devices or without.
async fn opens_kvm(namespace: &TestNamespace, name: &str, limits: Value) -> Pod {
    let pods: Api<Pod> = Api::namespaced(namespace.client.clone(), &namespace.name);
    let pod = json!({
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "main", "image": "localhost/node-image-builder/builder:dev", "imagePullPolicy": "Never",
                "command": ["sh", "-c", "test -c /dev/kvm && exec 3<>/dev/kvm"], "resources": {"limits": limits},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let mut seen = None;
    until(LIMIT, "the pod ends or finds no node", async || {
        let pod = pods.get(name).await.unwrap();
        let status = pod.status.clone().unwrap();
        let phase = status.phase.unwrap_or_default();
        let refused = status.conditions.iter().flatten().any(|one| one.reason.as_deref() == Some("Unschedulable"));
        seen = Some(pod);
        phase == "Succeeded" || phase == "Failed" || refused
    })
    .await;
    seen.unwrap()
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().unwrap().phase.as_deref().unwrap()
}

#[tokio::test]
async fn kubelet_gives_kvm_to_pods_without_privileges_where_a_guest_runs() {
    // The level forbids privileged pods and the node's directories.
    let namespace = TestNamespace::create_with_level("kvm", "baseline").await;
    let client = namespace.client.clone();
    let scratch = tempfile::tempdir().unwrap();
    let runner = Runner::new(Redactor::default(), CancellationToken::new());
    let failure = accelerator::kvm_failure(scratch.path(), &runner).await.unwrap();
    let there = Path::new(KVM_DEVICE).exists();
    let capacity = if there { DEVICES } else { 0 };
    let really_runs = failure.is_none();
    eprintln!("  KVM on this machine: {}", failure.as_deref().unwrap_or("runs guests"));

    let chart = ChartValues::set(&["kvmDevicePlugin.enabled=true"]);
    let allocatable = if really_runs { DEVICES } else { 0 };
    until_node_shows(&client, really_runs, capacity, allocatable).await;
    if !really_runs {
        let pod = opens_kvm(&namespace, "waits", json!({RESOURCE: "1"})).await;
        let conditions = serde_json::to_string(&pod.status.as_ref().unwrap().conditions).unwrap();
        assert_eq!(phase(&pod), "Pending", "{conditions}");
        assert!(conditions.contains(&format!("Insufficient {RESOURCE}")), "{conditions}");
    }

    // The node forgets the devices of a plugin that does not come back to a kubelet that was started anew.
    assert_eq!(plugin(&client).await, Some((0, 1)));
    let killed = Command::new("dev/enter").args(["sh", "-c", "kill $(pidof kubelet)"]).current_dir(root()).status();
    assert!(killed.unwrap().success(), "the cluster has no kubelet");
    until(LIMIT, "the plugin registers again", async || plugin(&client).await == Some((0, 2))).await;
    until_node_shows(&client, really_runs, capacity, allocatable).await;

    if there && !really_runs {
        say_that_guests_run();
    }
    if there {
        until_node_shows(&client, true, DEVICES, DEVICES).await;
        let with = opens_kvm(&namespace, "with", json!({RESOURCE: "1"})).await;
        assert_eq!(phase(&with), "Succeeded", "{:?}", with.status);
        let without = opens_kvm(&namespace, "without", json!({})).await;
        assert_eq!(phase(&without), "Failed", "{:?}", without.status);
    }
    drop(chart);
    forget_label(&client).await;
    namespace.delete().await;
}

#[tokio::test]
async fn a_build_without_privileges_opens_the_device_that_only_the_nodes_root_may_open() {
    let namespace = TestNamespace::create("kvm-userns").await;
    if !Path::new(KVM_DEVICE).exists() {
        eprintln!("  left out: this machine has no {KVM_DEVICE}");
        return namespace.delete().await;
    }
    let scratch = tempfile::tempdir().unwrap();
    let runner = Runner::new(Redactor::default(), CancellationToken::new());
    let failure = accelerator::kvm_failure(scratch.path(), &runner).await.unwrap();
    let mut wanted = spec();
    wanted["verify"] = json!({"boot": "Required", "accelerator": "KVM"});

    let chart = ChartValues::set(&["builds.userNamespaces=true"]);
    namespace.apply("without-device", wanted.clone()).await;
    let message = stalls(&namespace, "without-device").await;
    assert!(message.contains("there is no /dev/kvm"), "{message}");
    drop(chart);

    let mode = Mode::set(KVM_DEVICE, 0o600);
    let chart = ChartValues::set(&["builds.userNamespaces=true", "kvmDevicePlugin.enabled=true"]);
    if failure.is_some() {
        say_that_guests_run();
    }
    until_node_shows(&namespace.client, true, DEVICES, DEVICES).await;
    namespace.apply("with-device", wanted).await;
    match failure {
        None => drop(namespace.wait_ready("with-device", BUILD_LIMIT).await),
        // The device was opened, and KVM did what it does on this machine.
        Some(why) => {
            let message = stalls(&namespace, "with-device").await;
            assert!(message.contains(&why), "{message}");
        }
    }
    drop((chart, mode));
    forget_label(&namespace.client).await;
    namespace.delete().await;
}

/// What is said of a build for which no guest runs.
async fn stalls(namespace: &TestNamespace, build: &str) -> String {
    let build = namespace.wait_stalled(build, LIMIT).await;
    let failure = &status(&build)["failure"];
    eprintln!("  {}: {}", build.name_any(), failure["message"]);
    assert_eq!(failure["reason"], "KvmUnavailable", "{failure}");
    failure["message"].as_str().unwrap().to_owned()
}

/// The plugin's emulator says of each guest that it ran.
fn say_that_guests_run() {
    kubectl(&["-n", SYSTEM, "create", "configmap", DAEMON_SET, "--from-literal=emulator=#!/bin/sh\nexit 33\n"]);
    let patch = json!({"spec": {"template": {"spec": {
        "containers": [{"name": "kvm-device-plugin", "volumeMounts": [{
            "name": "emulator", "mountPath": "/usr/local/bin/qemu-system-x86_64", "subPath": "emulator",
        }]}],
        "volumes": [{"name": "emulator", "configMap": {"name": DAEMON_SET, "defaultMode": 0o755}}],
    }}}});
    kubectl(&["-n", SYSTEM, "patch", "daemonset", DAEMON_SET, "-p", &patch.to_string()]);
    wait_for_rollout();
    kubectl(&["-n", SYSTEM, "delete", "configmap", DAEMON_SET]);
}

async fn forget_label(client: &Client) {
    kubectl(&["label", "node", &node(client).await.name_any(), &format!("{LABEL}-")]);
}

/// The mode of a file, until this is dropped.
struct Mode {
    path: &'static str,
    before: Permissions,
}

impl Mode {
    fn set(path: &'static str, mode: u32) -> Self {
        let before = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        Self { path, before }
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        fs::set_permissions(self.path, self.before.clone()).unwrap();
    }
}
