//! The service `DevicePlugin`, as kubelet calls it.

use std::{
    convert::Infallible,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use axum::http;
use futures::{Stream, StreamExt, stream};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tonic::{Request, Response, Status, body::Body, server::Grpc, transport::Server};
use tonic_prost::ProstCodec;

use super::{
    Kvm,
    messages::{
        ALLOCATE, AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerAllocateResponse, Device,
        DevicePluginOptions, DeviceSpec, Empty, HEALTHY, LIST_AND_WATCH, ListAndWatchResponse, OPTIONS, UNHEALTHY,
    },
};
use crate::native::accelerator::KVM_DEVICE;

/// How many containers may have KVM at a time: any number can, so more than a node runs pods.
pub const DEVICES: usize = 256;

/// Mode of a device that everybody may open; Fedora's for KVM (commit 5a664ca10f of systemd).
const OPEN: u32 = 0o666;

/// What containers are given.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub(super) kvm: watch::Receiver<Kvm>,
    /// The device that everybody on the node may open once a container has it.
    pub(super) opened: Option<PathBuf>,
}

/// Answers on a socket until that fails.
pub(super) async fn serve(listener: UnixListener, given: Given) -> Result<(), tonic::transport::Error> {
    let service = tower::service_fn(move |request| {
        let given = given.clone();
        async move { Ok::<_, Infallible>(answer(request, given).await) }
    });
    Server::builder().serve_with_incoming(service, connections(listener)).await
}

fn connections(listener: UnixListener) -> impl Stream<Item = std::io::Result<UnixStream>> {
    stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    })
}

/// `GetPreferredAllocation` and `PreStartContainer` are optional: [`DevicePluginOptions`] says that they are not needed.
async fn answer(request: http::Request<Body>, given: Given) -> http::Response<Body> {
    match request.uri().path() {
        OPTIONS => {
            let options = async |_: Request<Empty>| Ok(Response::new(DevicePluginOptions::default()));
            Grpc::new(ProstCodec::default()).unary(tower::service_fn(options), request).await
        }
        LIST_AND_WATCH => {
            let list = move |_: Request<Empty>| {
                let kvm = given.kvm.clone();
                async move { Ok(Response::new(lists(kvm).map(Ok::<_, Status>))) }
            };
            Grpc::new(ProstCodec::default()).server_streaming(tower::service_fn(list), request).await
        }
        ALLOCATE => {
            let allocate = move |request: Request<AllocateRequest>| {
                let answer = allocate(&request.into_inner(), &given);
                async move { answer.map(Response::new) }
            };
            Grpc::new(ProstCodec::default()).unary(tower::service_fn(allocate), request).await
        }
        other => Status::unimplemented(format!("this plugin has no method {other}")).into_http(),
    }
}

/// What there is now, and then whenever it changes.
fn lists(kvm: watch::Receiver<Kvm>) -> impl Stream<Item = ListAndWatchResponse> {
    stream::unfold((kvm, true), |(mut kvm, first)| async move {
        if !first {
            kvm.changed().await.ok()?;
        }
        let list = ListAndWatchResponse { devices: devices(*kvm.borrow_and_update()) };
        Some((list, (kvm, false)))
    })
}

fn devices(kvm: Kvm) -> Vec<Device> {
    let health = match kvm {
        Kvm::Absent => return vec![],
        Kvm::RunsNoGuest => UNHEALTHY,
        Kvm::RunsGuests => HEALTHY,
    };
    (0..DEVICES).map(|index| Device { id: format!("kvm-{index}"), health: health.to_owned() }).collect()
}

/// The device for each container that asks for one, however many it asks for.
fn allocate(request: &AllocateRequest, given: &Given) -> Result<AllocateResponse, Status> {
    let kvm = *given.kvm.borrow();
    if kvm != Kvm::RunsGuests {
        return Err(Status::failed_precondition("KVM runs no guest on this node (any more)"));
    }
    let known = devices(kvm);
    let container = |asked: &ContainerAllocateRequest| {
        if let Some(id) = asked.devices_ids.iter().find(|id| !known.iter().any(|device| device.id == **id)) {
            return Err(Status::invalid_argument(format!("this plugin has no device {id}")));
        }
        let device = DeviceSpec {
            container_path: KVM_DEVICE.to_owned(),
            host_path: KVM_DEVICE.to_owned(),
            permissions: "rw".to_owned(),
        };
        Ok(ContainerAllocateResponse { devices: vec![device] })
    };
    let container_responses = request.container_requests.iter().map(container).collect::<Result<_, _>>()?;
    if let Some(device) = &given.opened {
        open(device)?;
    }
    Ok(AllocateResponse { container_responses })
}

/// Lets everybody on the node open the device. It is done for each container, since the node's own rules may have undone it.
fn open(device: &Path) -> Result<(), Status> {
    fs::set_permissions(device, Permissions::from_mode(OPEN)).map_err(|error| {
        let device = device.display();
        Status::internal(format!("{device} can not be opened to containers with a user namespace: {error}"))
    })
}
