//! A machine that was provisioned with a built image, as Tinkerbell does it, becomes a node of the cluster and runs a pod.

use std::{fs, path::Path, process::Command};

use axum::Router;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use kube_runtime::wait::await_condition;
use serde_json::json;

use crate::{
    cluster::{TestNamespace, setting},
    machine::{LIMIT, Machine, NODE, image, provision, serve},
};

/// The network of pods, which a cluster's network plugin would write.
const POD_NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "pods0", "isGateway": true,
    "ipMasq": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

/// The pause image of the mirror's latest release, which every image of it brings along.
const PAUSE_IMAGE: &str = "public.ecr.aws/eks-distro/kubernetes/pause:v1.34.4-eks-1-34-2";

#[tokio::test]
async fn a_provisioned_machine_becomes_a_node_and_runs_a_pod() {
    let namespace = TestNamespace::create("node").await;
    let image = image(&namespace).await;
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    node_image_builder::package::unpack(&image, &disk).unwrap();
    Box::pin(join(&disk, dir.path(), &namespace)).await;
    namespace.delete().await;
}

/// Boots the disk and waits until a pod runs on it.
async fn join(disk: &Path, dir: &Path, namespace: &TestNamespace) {
    let metadata = serve(&user_data(dir), Router::new()).await;
    provision(disk, dir, metadata);
    let machine = Machine::start(disk, dir);

    let nodes: Api<Node> = Api::all(namespace.client.clone());
    let is_ready = |node: Option<&Node>| {
        let conditions = node.and_then(|node| node.status.as_ref()?.conditions.clone()).unwrap_or_default();
        conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    machine.within(LIMIT, "a Ready node", await_condition(nodes.clone(), NODE, is_ready)).await;
    let node = nodes.get(NODE).await.unwrap();
    let info = node.status.unwrap().node_info.unwrap();
    eprintln!("  node {NODE}: {} on {}, {}", info.kubelet_version, info.kernel_version, info.container_runtime_version);
    assert_eq!(info.kubelet_version, "v1.34.4");

    let pods: Api<Pod> = Api::namespaced(namespace.client.clone(), &namespace.name);
    // The image came with the machine: it may not be pulled.
    let pod = serde_json::from_value(json!({
        "metadata": {"name": "on-the-node"},
        "spec": {
            "nodeName": NODE,
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "pause", "image": PAUSE_IMAGE, "imagePullPolicy": "Never"}],
        },
    }))
    .unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let runs = |pod: Option<&Pod>| {
        pod.and_then(|pod| pod.status.as_ref()?.container_statuses.clone())
            .is_some_and(|containers| containers.iter().all(|container| container.ready))
    };
    let running = Box::pin(await_condition(pods.clone(), "on-the-node", runs));
    machine.within(LIMIT, "a running pod", running).await;

    drop(machine);
    pods.delete("on-the-node", &DeleteParams::default().grace_period(0)).await.unwrap();
    nodes.delete(NODE, &DeleteParams::default()).await.unwrap();
}

/// What a bootstrap provider of Cluster API gives a worker.
fn user_data(dir: &Path) -> String {
    // The cluster keeps its certificates in a directory of this machine; a node has its own in the usual place.
    let settings = fs::read_to_string(Path::new(&setting("NIB_STATE")).join("etc/kubeadm.yaml")).unwrap();
    let settings: Vec<_> = settings.lines().filter(|line| !line.starts_with("certificatesDir:")).collect();
    let config = dir.join("kubeadm.yaml");
    fs::write(&config, settings.join("\n")).unwrap();
    let kubeconfig = std::env::var("KUBECONFIG").unwrap();
    let kubeadm = |args: &[&str]| {
        let output = Command::new("kubeadm").args(args).args(["--kubeconfig", &kubeconfig]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubeadm {args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    };
    // What `kubeadm init` leaves in a cluster for those who join.
    let config = config.to_str().unwrap();
    kubeadm(&["init", "phase", "upload-config", "all", "--config", config]);
    kubeadm(&["init", "phase", "bootstrap-token", "--config", config]);
    let join = kubeadm(&["token", "create", "--ttl", "1h", "--print-join-command"]);
    let cloud_config = json!({
        "hostname": NODE,
        "write_files": [{"path": "/etc/cni/net.d/10-pods.conflist", "content": POD_NETWORK}],
        "runcmd": [join.trim()],
    });
    // JSON is YAML.
    format!("#cloud-config\n{cloud_config}\n")
}
