//! The device plugin, spoken to as kubelet does it, with a real API server for the label. The end-to-end tests have a real
//! kubelet.

use std::{
    convert::Infallible,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::http::{Request as HttpRequest, uri::PathAndQuery};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use node_image_builder::device_plugin::{
    DEVICES, DevicePlugin, LABEL, RESOURCE,
    messages::{
        ALLOCATE, AllocateRequest, AllocateResponse, ContainerAllocateRequest, Device, DevicePluginOptions, DeviceSpec,
        Empty, LIST_AND_WATCH, ListAndWatchResponse, OPTIONS, REGISTER, RegisterRequest,
    },
};
use serde_json::json;
use tokio::{net::UnixListener, sync::mpsc, task::JoinHandle, time::timeout};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    transport::{Channel, Endpoint, Server},
};
use tonic_prost::ProstCodec;

use crate::{
    controller::harness::{SOON, until},
    support::{
        apiserver,
        chart::{chart, of_kind, render},
    },
};

/// A plugin as kubelet holds it.
struct Connected {
    channel: Channel,
    lists: Streaming<ListAndWatchResponse>,
}

impl Connected {
    /// As kubelet does it while the plugin waits for the answer to its registration.
    async fn to(socket: &Path) -> Self {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let mut connected = Grpc::new(channel.clone());
        connected.ready().await.unwrap();
        let path = PathAndQuery::from_static(LIST_AND_WATCH);
        let codec = ProstCodec::<Empty, ListAndWatchResponse>::default();
        let lists = connected.server_streaming(Request::new(Empty {}), path, codec).await.unwrap().into_inner();
        Self { channel, lists }
    }

    async fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut connected = Grpc::new(self.channel.clone());
        connected.ready().await.unwrap();
        let codec = ProstCodec::<Q, A>::default();
        let answer = connected.unary(Request::new(request), PathAndQuery::from_static(method), codec).await;
        answer.map(Response::into_inner)
    }

    async fn allocate(&self, ids: &[&str]) -> Result<AllocateResponse, Status> {
        let asked = ContainerAllocateRequest { devices_ids: ids.iter().map(|&id| id.to_owned()).collect() };
        self.call(ALLOCATE, AllocateRequest { container_requests: vec![asked] }).await
    }

    /// The next list: how many devices are healthy, of how many.
    async fn next_list(&mut self) -> (usize, usize) {
        let list = timeout(SOON, self.lists.message()).await.expect("no list comes").unwrap().unwrap();
        let healthy = |device: &&Device| match device.health.as_str() {
            "Healthy" => true,
            "Unhealthy" => false,
            other => panic!("kubelet does not know the health {other}"),
        };
        (list.devices.iter().filter(healthy).count(), list.devices.len())
    }
}

/// Kubelet's side of registering: its socket, and what it does when a plugin comes.
struct Kubelet {
    server: JoinHandle<()>,
    plugins: mpsc::UnboundedReceiver<Connected>,
}

impl Kubelet {
    /// Starts as kubelet does: with an empty directory.
    fn start(dir: &Path) -> Self {
        for entry in fs::read_dir(dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let listener = UnixListener::bind(dir.join("kubelet.sock")).unwrap();
        let (send, plugins) = mpsc::unbounded_channel();
        let dir = dir.to_owned();
        let service = tower::service_fn(move |request: HttpRequest<Body>| {
            let (dir, send) = (dir.clone(), send.clone());
            async move {
                assert_eq!(request.uri().path(), REGISTER);
                let register =
                    move |request: Request<RegisterRequest>| accept(request.into_inner(), dir.clone(), send.clone());
                let mut server = tonic::server::Grpc::new(ProstCodec::default());
                Ok::<_, Infallible>(server.unary(tower::service_fn(register), request).await)
            }
        });
        let connections = futures::stream::unfold(listener, |listener| async {
            let accepted: io::Result<_> = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        });
        let server = tokio::spawn(async { Server::builder().serve_with_incoming(service, connections).await.unwrap() });
        Self { server, plugins }
    }

    async fn plugin(&mut self) -> Connected {
        timeout(SOON, self.plugins.recv()).await.expect("no plugin registers").unwrap()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(
    request: RegisterRequest,
    dir: PathBuf,
    plugins: mpsc::UnboundedSender<Connected>,
) -> Result<Response<Empty>, Status> {
    if request.version != "v1beta1" || request.resource_name != "nodeimagebuild.dev/kvm" {
        return Err(Status::invalid_argument(format!("{request:?}")));
    }
    let connected = Connected::to(&dir.join(request.endpoint)).await;
    plugins.send(connected).map_err(|_| Status::unavailable("the test is over"))?;
    Ok(Response::new(Empty {}))
}

/// A plugin that runs, with a node of its own in the API server.
struct Running {
    dir: tempfile::TempDir,
    nodes: Api<Node>,
    name: String,
    /// What the probe guest does.
    guest_runs: Arc<AtomicBool>,
    open_to_everybody: bool,
    /// The client of the chart's service account for the plugin.
    client: Client,
}

impl Running {
    async fn prepare(name: &str) -> Self {
        let server = apiserver::shared().await;
        let admin = apiserver::client().await;
        let release = format!("{name}-release");
        apiserver::create_namespace(&admin, &release).await;
        let arguments = ["--set", "kvmDevicePlugin.enabled=true", "--show-only", "templates/kvm-device-plugin.yaml"];
        let objects = render(&release, &release, &chart().join("ci/minimal.yaml"), &arguments).unwrap();
        apiserver::install_rights(&admin, &objects).await;
        let account = of_kind(&objects, "DaemonSet")[0]["spec"]["template"]["spec"]["serviceAccountName"].clone();
        let client = Client::try_from(server.config_of(&release, account.as_str().unwrap()).await).unwrap();
        let nodes: Api<Node> = Api::all(admin);
        let node = json!({ "metadata": { "name": name, "labels": { "kept": "yes" } } });
        nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        for directory in ["plugins", "dev"] {
            fs::create_dir(dir.path().join(directory)).unwrap();
        }
        Self { dir, nodes, name: name.to_owned(), guest_runs: Arc::default(), open_to_everybody: false, client }
    }

    fn plugins(&self) -> PathBuf {
        self.dir.path().join("plugins")
    }

    fn device(&self) -> PathBuf {
        self.dir.path().join("dev/kvm")
    }

    /// Runs the plugin beside the test.
    async fn during(&self, test: impl Future<Output = ()>) {
        let plugin = DevicePlugin {
            dir: self.plugins(),
            device: self.device(),
            open_to_everybody: self.open_to_everybody,
            node: self.name.clone(),
            client: self.client.clone(),
        };
        let probe = async || {
            let runs = self.guest_runs.load(Ordering::SeqCst);
            Ok((!runs).then(|| "the test says so".to_owned()))
        };
        tokio::select! {
            ended = plugin.run(probe) => panic!("the plugin ended: {ended:?}"),
            () = test => {}
        }
    }

    async fn until_labelled(&self, value: &str) {
        let labelled = until(|| async {
            let labels = self.nodes.get(&self.name).await.unwrap().metadata.labels.unwrap();
            assert_eq!(labels["kept"], "yes");
            (labels.get(LABEL).map(String::as_str) == Some(value)).then_some(())
        });
        timeout(SOON, labelled).await.unwrap_or_else(|_| panic!("the node is not labelled {value}"));
    }
}

#[tokio::test]
async fn devices_and_label_follow_what_really_runs() {
    let running = Running::prepare("kvm-follows").await;
    fs::write(running.device(), "").unwrap();
    running.guest_runs.store(true, Ordering::SeqCst);
    let mut kubelet = Kubelet::start(&running.plugins());
    let test = async {
        let mut plugin = kubelet.plugin().await;
        let options: DevicePluginOptions = plugin.call(OPTIONS, Empty {}).await.unwrap();
        assert_eq!(options, DevicePluginOptions::default(), "it wants no further calls");
        assert_eq!(plugin.next_list().await, (DEVICES, DEVICES));
        running.until_labelled("true").await;

        let answer = plugin.allocate(&["kvm-0", "kvm-7"]).await.unwrap();
        let device =
            DeviceSpec { container_path: "/dev/kvm".into(), host_path: "/dev/kvm".into(), permissions: "rw".into() };
        assert_eq!(answer.container_responses[0].devices, [device]);
        let refused = plugin.allocate(&["kvm-9999"]).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let unknown = plugin.call::<_, Empty>("/v1beta1.DevicePlugin/PreStartContainer", Empty {}).await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unimplemented, "{unknown}");

        fs::remove_file(running.device()).unwrap();
        assert_eq!(plugin.next_list().await, (0, 0));
        running.until_labelled("false").await;
        let refused = plugin.allocate(&["kvm-0"]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

        running.guest_runs.store(false, Ordering::SeqCst);
        fs::write(running.device(), "").unwrap();
        assert_eq!(plugin.next_list().await, (0, DEVICES), "a device that runs no guest is offered to nobody");
        running.until_labelled("false").await;
    };
    Box::pin(running.during(test)).await;
}

#[tokio::test]
async fn everybody_may_open_a_given_device_where_pods_have_user_namespaces() {
    for (name, open_to_everybody, given) in [("kvm-kept", false, 0o600), ("kvm-opened", true, 0o666)] {
        let running = Running { open_to_everybody, ..Running::prepare(name).await };
        fs::write(running.device(), "").unwrap();
        fs::set_permissions(running.device(), Permissions::from_mode(0o600)).unwrap();
        running.guest_runs.store(true, Ordering::SeqCst);
        let mode = || fs::metadata(running.device()).unwrap().permissions().mode() & 0o777;
        let mut kubelet = Kubelet::start(&running.plugins());
        let test = async {
            let mut plugin = kubelet.plugin().await;
            assert_eq!(plugin.next_list().await, (DEVICES, DEVICES));
            plugin.allocate(&["kvm-9999"]).await.unwrap_err();
            assert_eq!(mode(), 0o600, "nobody was given one");
            plugin.allocate(&["kvm-0"]).await.unwrap();
            assert_eq!(mode(), given, "{name}");
        };
        Box::pin(running.during(test)).await;
    }
}

#[tokio::test]
async fn the_plugin_registers_at_every_kubelet() {
    let running = Running::prepare("kvm-registers").await;
    fs::write(running.device(), "").unwrap();
    let test = async {
        // The first kubelet comes later than the plugin; each one starts with an empty directory.
        for _ in 0..3 {
            let bound = until(|| async { running.plugins().join("nodeimagebuild-kvm.sock").exists().then_some(()) });
            timeout(SOON, bound).await.expect("the plugin does not listen");
            let mut kubelet = Kubelet::start(&running.plugins());
            assert_eq!(kubelet.plugin().await.next_list().await, (0, DEVICES));
            running.until_labelled("false").await;
        }
    };
    Box::pin(running.during(test)).await;
}

#[tokio::test]
async fn the_plugins_account_can_label_nodes_and_nothing_else() {
    let running = Running::prepare("kvm-rights").await;
    let nodes: Api<Node> = Api::all(running.client.clone());
    for refused in [nodes.get("kvm-rights").await.map(drop), nodes.list(&ListParams::default()).await.map(drop)] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, kube::Error::Api(status) if status.is_forbidden()), "{error}");
    }
    assert_eq!(RESOURCE, LABEL, "one name for both, in the documentation too");
}

#[tokio::test]
async fn without_kubelets_directory_the_plugin_says_so() {
    let running = Running::prepare("kvm-nowhere").await;
    fs::remove_dir(running.plugins()).unwrap();
    let plugin = DevicePlugin {
        dir: running.plugins(),
        device: running.device(),
        open_to_everybody: false,
        node: running.name.clone(),
        client: running.client.clone(),
    };
    let ended = timeout(Duration::from_secs(10), plugin.run(async || Ok(None))).await.expect("it goes on");
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("plugins") && error.contains("mounted"), "{error}");
}
