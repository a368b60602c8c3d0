//! KVM as a resource of nodes: kubelet's device plugin that offers `/dev/kvm` to containers without privileges, where a
//! guest really runs under it, and labels its node with what it found.
//!
//! The plugin listens on a socket in kubelet's directory and registers itself at kubelet's own socket there. A kubelet that
//! starts empties the directory and makes its socket anew; then everything is done again.

pub mod messages;
mod node;
mod service;
mod watch;

use std::{
    convert::Infallible,
    error::Error,
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use axum::http::uri::PathAndQuery;
use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::{net::UnixListener, sync::watch as state};
use tonic::{Request, Status, client::Grpc, transport::Endpoint};
use tonic_prost::ProstCodec;

pub use self::service::DEVICES;
use self::{
    messages::{DevicePluginOptions, Empty, KUBELET_SOCKET, REGISTER, RegisterRequest, VERSION},
    service::Given,
    watch::Directory,
};
use crate::{error::Chain, native::accelerator::AcceleratorError};

/// Name of the resource that containers ask for.
pub const RESOURCE: &str = "nodeimagebuild.dev/kvm";
/// Label of nodes: `true` where a guest runs under KVM, `false` where it does not.
pub const LABEL: &str = "nodeimagebuild.dev/kvm";
/// The plugin's socket, beside kubelet's.
pub const SOCKET: &str = "nodeimagebuild-kvm.sock";

/// Kubelet connects to the plugin before it answers, for which it takes up to 10 s.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(15);
/// Until a guest that did not run is tried again: the node may have been too busy for it.
const AGAIN: Duration = Duration::from_secs(10 * 60);
/// Time between two attempts at what depends on others, at first and at most.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What KVM does on the node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kvm {
    /// There is no device.
    Absent,
    RunsNoGuest,
    RunsGuests,
}

/// Where the plugin works.
#[derive(Clone)]
pub struct DevicePlugin {
    /// Kubelet's directory of device plugins.
    pub dir: PathBuf,
    /// KVM's device, whose coming and going is followed.
    pub device: PathBuf,
    /// Whether everybody on the node may open the device once a container was given it. A container with a user namespace
    /// can not open one that belongs to the node's root.
    pub open_to_everybody: bool,
    /// Name of the node that is labelled.
    pub node: String,
    /// Access to the API server, for the label.
    pub client: kube::Client,
}

impl fmt::Debug for DevicePlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dir, device, open_to_everybody, node, client: _ } = self;
        f.debug_struct("DevicePlugin")
            .field("dir", dir)
            .field("device", device)
            .field("open_to_everybody", open_to_everybody)
            .field("node", node)
            .finish_non_exhaustive()
    }
}

/// Why the plugin can not go on.
#[derive(Debug, thiserror::Error)]
pub enum DevicePluginError {
    #[error("can not watch the directory {}; is it the node's, mounted into this container?", dir.display())]
    Watch { dir: PathBuf, source: io::Error },
    #[error("the directory {} was removed; it has to be mounted anew", dir.display())]
    Gone { dir: PathBuf },
    #[error("{} is no path of a device", device.display())]
    NoDevicePath { device: PathBuf },
    #[error("can not listen on {}", socket.display())]
    Listen { socket: PathBuf, source: io::Error },
    #[error("can not answer kubelet any more")]
    Serve { source: tonic::transport::Error },
    #[error("can not find out whether KVM runs a guest")]
    Probe { source: AcceleratorError },
}

/// Why kubelet does not know the plugin.
#[derive(Debug, thiserror::Error)]
enum RegisterError {
    #[error("can not reach kubelet at {}", socket.display())]
    Connect { socket: PathBuf, source: tonic::transport::Error },
    #[error("kubelet refuses the plugin")]
    Refused { source: Status },
}

impl DevicePlugin {
    /// Runs until it fails. `probe` runs a guest and says why it did not, if it did not.
    pub async fn run(
        self,
        probe: impl AsyncFn() -> Result<Option<String>, AcceleratorError>,
    ) -> Result<Infallible, DevicePluginError> {
        let (Some(parent), Some(name)) = (self.device.parent(), self.device.file_name().and_then(|name| name.to_str()))
        else {
            return Err(DevicePluginError::NoDevicePath { device: self.device });
        };
        let mut devices = Directory::watch(parent)?;
        let (kvm, follower) = state::channel(look(&self.device, &probe).await?);
        let follow = async {
            loop {
                let changed = devices.changed(name);
                if *kvm.borrow() == Kvm::RunsNoGuest {
                    // Without a change it is looked again too.
                    tokio::time::timeout(AGAIN, changed).await.unwrap_or(Ok(()))?;
                } else {
                    changed.await?;
                }
                let found = look(&self.device, &probe).await?;
                kvm.send_if_modified(|known| std::mem::replace(known, found) != found);
            }
        };
        tokio::select! {
            ended = follow => ended,
            ended = self.offer(&follower) => ended,
        }
    }

    /// Serves and registers, anew for each kubelet.
    async fn offer(&self, kvm: &state::Receiver<Kvm>) -> Result<Infallible, DevicePluginError> {
        let mut plugins = Directory::watch(&self.dir)?;
        loop {
            let (listener, _file) = bind(self.dir.join(SOCKET))?;
            let introduce = async {
                self.register().await;
                node::follow(&self.client, &self.node, kvm.clone()).await
            };
            tokio::select! {
                ended = service::serve(listener, self.given(kvm)) => {
                    ended.map_err(|source| DevicePluginError::Serve { source })?;
                }
                never = introduce => match never {},
                appeared = plugins.appeared(KUBELET_SOCKET) => {
                    appeared?;
                    tracing::info!("kubelet started anew");
                }
            }
        }
    }

    /// What containers are given.
    fn given(&self, kvm: &state::Receiver<Kvm>) -> Given {
        Given { kvm: kvm.clone(), opened: self.open_to_everybody.then(|| self.device.clone()) }
    }

    /// Registers the plugin, however long that takes.
    async fn register(&self) {
        persistently(async || register(self.dir.join(KUBELET_SOCKET)).await, "kubelet does not know the plugin yet")
            .await;
        tracing::info!(resource = RESOURCE, "registered at kubelet");
    }
}

/// Tries again until it succeeds, less and less often.
async fn persistently<E: Error + 'static>(work: impl AsyncFn() -> Result<(), E>, trouble: &str) {
    let patience = ExponentialBuilder::default().with_min_delay(SHORTEST_WAIT).with_max_delay(LONGEST_WAIT);
    let mut delays = patience.without_max_times().build();
    while let Err(error) = work().await {
        tracing::warn!("{trouble}: {}", Chain(&error));
        tokio::time::sleep(delays.next().unwrap_or(LONGEST_WAIT)).await;
    }
}

async fn register(socket: PathBuf) -> Result<(), RegisterError> {
    let connect = async || {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        endpoint.connect_timeout(REGISTER_TIMEOUT).timeout(REGISTER_TIMEOUT).connect().await
    };
    let channel = match connect().await {
        Ok(channel) => channel,
        Err(source) => return Err(RegisterError::Connect { socket, source }),
    };
    let mut kubelet = Grpc::new(channel);
    if let Err(source) = kubelet.ready().await {
        return Err(RegisterError::Connect { socket, source });
    }
    let request = RegisterRequest {
        version: VERSION.to_owned(),
        endpoint: SOCKET.to_owned(),
        resource_name: RESOURCE.to_owned(),
        options: Some(DevicePluginOptions::default()),
    };
    let codec = ProstCodec::<RegisterRequest, Empty>::default();
    let answer = kubelet.unary(Request::new(request), PathAndQuery::from_static(REGISTER), codec).await;
    answer.map(drop).map_err(|source| RegisterError::Refused { source })
}

/// What KVM does now.
async fn look(
    device: &Path,
    probe: &impl AsyncFn() -> Result<Option<String>, AcceleratorError>,
) -> Result<Kvm, DevicePluginError> {
    if !device.exists() {
        tracing::info!(device = %device.display(), "there is no KVM on this node");
        return Ok(Kvm::Absent);
    }
    match probe().await.map_err(|source| DevicePluginError::Probe { source })? {
        None => {
            tracing::info!("KVM runs guests on this node");
            Ok(Kvm::RunsGuests)
        }
        Some(why) => {
            tracing::warn!(why, "KVM runs no guest on this node");
            Ok(Kvm::RunsNoGuest)
        }
    }
}

/// The file of the plugin's socket; it goes with the plugin.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Kubelet may have removed it, and looks away from a socket that nobody listens on.
        let _ = fs::remove_file(&self.0);
    }
}

fn bind(socket: PathBuf) -> Result<(UnixListener, SocketFile), DevicePluginError> {
    let left_over = match fs::remove_file(&socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    match left_over.and_then(|()| UnixListener::bind(&socket)) {
        Ok(listener) => Ok((listener, SocketFile(socket))),
        Err(source) => Err(DevicePluginError::Listen { socket, source }),
    }
}
