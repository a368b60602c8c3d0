//! Builds in Prism Central by Packer: what its machine starts from, where it goes, what comes back of it, and the removal of
//! what it leaves there.
//!
//! The machine and the image that Packer makes of its disk have the name of everything else that a build makes until it is
//! whole; the image that the machine starts from has one that is made of it. So all are found by whoever looks for them.

use std::path::Path;

use reqwest::Method;
use tokio_util::sync::CancellationToken;

use super::{
    NutanixError, Progress, images,
    place::{self, not_found},
    prism::Prism,
    source,
    upload::{Upload, working_name},
};
use crate::{
    contract::{Base, BuildRequest, NutanixTarget},
    package::{Format, ImageSource},
};

const MIB: u64 = 1 << 20;

/// What Packer is told of where it makes its machine. All but the name are UUIDs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PackerPlace {
    /// Of the machine, and of the image of its disk.
    pub name: String,
    pub cluster: String,
    pub subnet: String,
    /// The image that the machine's disk starts as.
    pub source: String,
}

/// Name of the machine, and of the image of its disk.
fn machine_name(build_id: &str) -> String {
    working_name(build_id)
}

/// Name of the image that the machine's disk starts as, where the build itself puts it there.
fn source_name(build_id: &str) -> String {
    format!("{}-source", working_name(build_id))
}

/// Finds where the machine goes, and has there what it starts from: an image that is there already, or the disk `base`,
/// which is put there.
pub(super) async fn place(
    prism: &Prism,
    target: &NutanixTarget,
    request: &BuildRequest,
    base: Option<&Path>,
    cancel: &CancellationToken,
    progress: Progress,
) -> Result<PackerPlace, NutanixError> {
    let build_id = &request.identity.build_id;
    let look = async {
        clean(prism, build_id).await?;
        let (cluster, subnet) = place::of_machine(prism, target).await?;
        Ok((cluster, subnet, start(prism, request, base).await?))
    };
    let looked = cancel.run_until_cancelled(look).await.unwrap_or(Err(NutanixError::Cancelled));
    let (cluster, subnet, (start, size)) = looked?;
    let wanted = request.disk_size_mib.div_ceil(1024) * 1024;
    if size > wanted * MIB {
        return Err(NutanixError::DiskTooSmall { size: size.div_ceil(MIB), wanted });
    }
    let source = match start {
        Start::There(uuid) => uuid,
        Start::Here(disk) => {
            let source = ImageSource::new(disk, "source", Format::Raw);
            let name = source_name(build_id);
            Upload::new(prism, target, request, name, &source, cancel, progress).put_source(&cluster, size).await?
        }
    };
    Ok(PackerPlace { name: machine_name(build_id), cluster: cluster.uuid, subnet, source })
}

/// Where the disk is that the machine starts from.
enum Start<'d> {
    /// It is the image of this UUID.
    There(String),
    Here(&'d Path),
}

/// The disk that the machine starts from, and its bytes.
async fn start<'d>(
    prism: &Prism,
    request: &BuildRequest,
    base: Option<&'d Path>,
) -> Result<(Start<'d>, u64), NutanixError> {
    match (&request.base, base) {
        (Base::PrismImage(image), _) => {
            let image = source::find(prism, &image.prism_image).await?;
            let image = image.map_err(|problem| not_found(prism, vec![problem]))?;
            Ok((Start::There(image.metadata.uuid), image.status.resources.size_bytes.unwrap_or_default()))
        }
        (Base::Archive(_) | Base::Recipe, Some(disk)) => Ok((Start::Here(disk), source::disk_size(disk)?)),
        (Base::Archive(_) | Base::Recipe, None) => Err(NutanixError::NoBase),
    }
}

/// Downloads the image that Packer has made of the machine's disk, to the new file `path`.
pub(super) async fn fetch_made(
    prism: &Prism,
    build_id: &str,
    path: &Path,
    tell: impl Fn(f64),
) -> Result<(), NutanixError> {
    let name = machine_name(build_id);
    let image = source::find(prism, &name).await?.map_err(|problem| NutanixError::Failed {
        server: prism.server.clone(),
        action: "give the image that Packer made".to_owned(),
        message: problem,
    })?;
    if source::download(prism, &image, path, tell).await?.is_qcow2 {
        let answer = "it came as a qcow2, and an image of a machine's disk is raw".to_owned();
        return Err(NutanixError::SourceCorrupted { server: prism.server.clone(), name, answer });
    }
    Ok(())
}

/// Removes the machine, which may run, and what it started from if that is the build's.
pub(super) async fn clean(prism: &Prism, build_id: &str) -> Result<(), NutanixError> {
    let name = machine_name(build_id);
    let left = |what: String, cause: NutanixError| match cause {
        NutanixError::Cancelled => NutanixError::Cancelled,
        cause => NutanixError::LeftBehind { server: prism.server.clone(), what, cause: Box::new(cause) },
    };
    let mut machines = prism.list("vm", Some(format!("vm_name=={name}"))).await?;
    machines.retain(|machine| machine.status.name == name);
    for machine in machines {
        let uuid = &machine.metadata.uuid;
        let removed = async {
            let action = "delete a machine";
            match prism.begin(action, Method::DELETE, &["vms", uuid], None::<&()>).await? {
                Some(accepted) => prism.finish(action, &accepted).await,
                // It went by itself.
                None => Ok(()),
            }
        };
        removed.await.map_err(|cause| left(format!("the machine {name} ({uuid})"), cause))?;
        tracing::info!("the machine {name} was left by Packer and is removed");
    }
    let source = source_name(build_id);
    images::remove_named(prism, &source).await.map_err(|cause| left(format!("the image {source}"), cause))
}
