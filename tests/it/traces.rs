//! Traces of the operator, as the OpenTelemetry Collector takes them.

use std::{
    env, fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use kube::{Api, Client, api::PostParams};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::api::v1alpha1::NodeImageBuild;
use serde_json::json;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::{
    controller::harness::{SOON, until},
    support::apiserver,
};

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The collector; what it takes stands in the file.
fn collector(dir: &Path, address: SocketAddr) -> (Child, PathBuf) {
    let program = env::var_os("NIB_COLLECTOR").expect("NIB_COLLECTOR is not set: run the tests by `make unit`");
    let pipeline = json!({ "receivers": ["otlp"], "exporters": ["debug"] });
    let config = json!({
        "receivers": { "otlp": { "protocols": { "http": { "endpoint": address.to_string() } } } },
        "exporters": { "debug": { "verbosity": "detailed" } },
        "service": { "pipelines": { "traces": pipeline }, "telemetry": { "metrics": { "level": "none" } } },
    });
    fs::write(dir.join("collector.yaml"), config.to_string()).unwrap();
    let log = dir.join("collector.log");
    let mut command = Command::new(program);
    command.arg("--config=collector.yaml").current_dir(dir).kill_on_drop(true);
    (command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap(), log)
}

/// The operator of one namespace, as an administrator.
async fn operator(namespace: &str, endpoint: &str) -> Child {
    let mut operator = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    operator
        .args(["operator", "--namespace", namespace, "--builder-image", "builder", "--admin-address", "127.0.0.1:0"])
        .env("KUBECONFIG", apiserver::kubeconfig().await)
        .env("NO_PROXY", "127.0.0.1")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        // It sends after this many milliseconds at the latest.
        .env("OTEL_BSP_SCHEDULE_DELAY", "100");
    operator.kill_on_drop(true).stderr(Stdio::piped()).spawn().unwrap()
}

async fn stop(operator: Child) -> Output {
    kill(Pid::from_raw(operator.id().unwrap().try_into().unwrap()), Signal::SIGTERM).unwrap();
    timeout(2 * SOON, operator.wait_with_output()).await.expect("the operator does not end").unwrap()
}

/// One that names what is not there, and so never reads a release.
async fn create(client: &Client, namespace: &str, name: &str) {
    let build = json!({
        "apiVersion": "nodeimagebuild.dev/v1alpha1",
        "kind": "NodeImageBuild",
        "metadata": { "name": name },
        "spec": {
            "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {},
            "trustBundle": { "configMapKeyRef": { "name": "missing", "key": "ca.crt" } },
            "publish": [{ "http": { "url": "http://images.example.com/" } }],
        },
    });
    let api: Api<NodeImageBuild> = Api::namespaced(client.clone(), namespace);
    api.create(&PostParams::default(), &serde_json::from_value(build).unwrap()).await.unwrap();
}

async fn is_judged(client: &Client, namespace: &str, name: &str) {
    let api: Api<NodeImageBuild> = Api::namespaced(client.clone(), namespace);
    let judged = until(|| async { api.get(name).await.unwrap().status.map(drop) });
    timeout(SOON, judged).await.expect("the operator does nothing");
}

#[tokio::test]
async fn collector_is_told_of_each_reconciliation_and_of_the_requests_in_it() {
    let client = apiserver::client().await;
    let namespace = apiserver::namespace(&client, "traces").await;
    let dir = tempfile::tempdir().unwrap();
    let address = free_address();
    let (_collector, log) = collector(dir.path(), address);
    let listens = until(|| async { std::net::TcpStream::connect(address).ok() });
    timeout(SOON, listens).await.expect("the collector does not listen");
    let operator = operator(&namespace, &format!("http://{address}")).await;
    create(&client, &namespace, "traced").await;
    is_judged(&client, &namespace, "traced").await;
    let output = stop(operator).await;
    assert!(output.status.success(), "{output:?}");
    // The operator sent the last of it before it ended.
    let written = until(|| async {
        let text = fs::read_to_string(&log).unwrap();
        let all = [
            "service.name: Str(node-image-builder)",
            "Name           : reconcile",
            &format!("namespace: Str({namespace})"),
            "name: Str(traced)",
            // The Kubernetes client's names of its requests.
            "Name           : list",
            "Name           : patch_status",
        ];
        all.into_iter().all(|expected| text.contains(expected)).then_some(text)
    });
    let text = timeout(SOON, written)
        .await
        .unwrap_or_else(|_| panic!("not all was told:\n{}", fs::read_to_string(&log).unwrap()));
    // Requests are parts of the reconciliation that sends them.
    let field = |block: &str, name: &str| {
        let line = block.lines().find(|line| line.trim_start().starts_with(name))?;
        Some(line.split_once(": ")?.1.trim().to_owned())
    };
    let spans: Vec<&str> = text.split("Span #").skip(1).collect();
    let named =
        |name: &'static str| spans.iter().filter(move |span| field(span, "Name ").as_deref() == Some(name)).copied();
    let reconciliations: Vec<_> = named("reconcile").filter_map(|span| field(span, "ID ")).collect();
    let parent = named("patch_status").find_map(|span| field(span, "Parent ID")).unwrap();
    assert!(reconciliations.contains(&parent), "{parent} is none of {reconciliations:?}");
}

#[tokio::test]
async fn operator_works_where_its_collector_is_away() {
    let client = apiserver::client().await;
    let namespace = apiserver::namespace(&client, "untraced").await;
    let operator = operator(&namespace, &format!("http://{}", free_address())).await;
    create(&client, &namespace, "image").await;
    is_judged(&client, &namespace, "image").await;
    let output = stop(operator).await;
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn endpoint_that_is_no_url_is_named() {
    let mut operator = operator("default", "collector:nowhere").await;
    let status = timeout(Duration::from_secs(60), operator.wait()).await.expect("it goes on").unwrap();
    let output = operator.wait_with_output().await.unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!status.success());
    assert!(log.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && log.contains("collector:nowhere"), "{log}");
}
