//! The provider that gets the image as an object of its own kind: a template in vCenter, an image in Prism Central.

use std::{path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::BuildError;
use crate::{
    contract::{BuildRequest, PrismSource, ProviderTarget, Stage, VsphereImage},
    imagebuilder::{self, InPrism, InVcenter},
    package::{Format, ImageSource, Machine, Summary},
    progress::Reporter,
    publish::{
        nutanix::{Nutanix, PackerPlace, SourceDisk},
        vsphere::{Vsphere, packer},
    },
    secret::Credentials,
};

/// How long a provider may be away before the build gives up.
const PATIENCE: Duration = Duration::from_secs(300);

/// The way to one provider.
pub(super) enum Provider {
    Vsphere(Vsphere),
    Nutanix(Nutanix),
}

/// An image at its provider.
pub(super) struct Provided {
    pub(super) name: String,
    /// Of the file that was sent.
    pub(super) summary: Summary,
    pub(super) vsphere: Option<VsphereImage>,
    pub(super) uuid: Option<String>,
}

impl Provider {
    pub(super) fn new(
        target: &ProviderTarget,
        request: &BuildRequest,
        trust_bundle: Option<Vec<u8>>,
        credentials: Credentials,
        reporter: Reporter,
        cancel: CancellationToken,
    ) -> Self {
        let (proxy, patience) = (request.proxy.clone(), PATIENCE);
        match target {
            ProviderTarget::Vsphere(target) => {
                let target = target.clone();
                Self::Vsphere(Vsphere { target, proxy, trust_bundle, credentials, reporter, cancel, patience })
            }
            ProviderTarget::Nutanix(target) => {
                let target = target.clone();
                Self::Nutanix(Nutanix { target, proxy, trust_bundle, credentials, reporter, cancel, patience })
            }
        }
    }

    /// Whatever the provider lacks is said before anything is built.
    pub(super) async fn preflight(&self, request: &BuildRequest) -> Result<(), BuildError> {
        match self {
            Self::Vsphere(vsphere) => {
                vsphere.reporter.report(Stage::Prepare, 0.3, "looking at vCenter");
                Box::pin(vsphere.preflight(request)).await?;
            }
            Self::Nutanix(nutanix) => {
                nutanix.reporter.report(Stage::Prepare, 0.3, "looking at Prism Central");
                Box::pin(nutanix.preflight(request)).await?;
            }
        }
        Ok(())
    }

    /// Downloads the image that the build starts from to the new file `disk`.
    pub(super) async fn fetch_source(&self, source: &PrismSource, disk: &Path) -> Result<SourceDisk, BuildError> {
        match self {
            Self::Nutanix(nutanix) => Ok(Box::pin(nutanix.fetch_source(source, disk)).await?),
            Self::Vsphere(_) => Err(BuildError::Inconsistent),
        }
    }

    /// Where Packer makes its machine at the provider; `base` is the file that the build starts from.
    pub(super) async fn machine(
        &self,
        request: &BuildRequest,
        base: Option<&Path>,
    ) -> Result<imagebuilder::Machine, BuildError> {
        Ok(match self {
            Self::Vsphere(vsphere) => imagebuilder::Machine::InVcenter(InVcenter {
                machine: packer::machine_name(&request.identity.build_id),
                medium: packer::medium_name(&request.identity.build_id),
                place: Box::pin(vsphere.packer_place()).await?,
            }),
            Self::Nutanix(nutanix) => {
                let PackerPlace { name, cluster, subnet, source } =
                    Box::pin(nutanix.packer_place(request, base)).await?;
                imagebuilder::Machine::InPrism(InPrism { name, cluster, subnet, source })
            }
        })
    }

    /// Brings the disk of Packer's machine to the new file `disk`, where Packer has left it at the provider.
    pub(super) async fn fetch_made(&self, request: &BuildRequest, disk: &Path) -> Result<(), BuildError> {
        match self {
            Self::Vsphere(_) => Ok(()),
            Self::Nutanix(nutanix) => Ok(Box::pin(nutanix.fetch_made(request, disk)).await?),
        }
    }

    /// How the provider wants the disk.
    pub(super) fn format(&self, request: &BuildRequest) -> Format {
        match self {
            Self::Vsphere(vsphere) => {
                Format::Ova(Arc::new(Machine::new(request, vsphere.target.vmx_version, Timestamp::now())))
            }
            Self::Nutanix(_) => Format::Qcow2,
        }
    }

    /// Removes what attempts of the build have left half-made; with `finished_too` also the image that it made.
    pub(super) async fn clean_up(&self, request: &BuildRequest, finished_too: bool) -> Result<(), BuildError> {
        match (self, finished_too) {
            (Self::Vsphere(vsphere), false) => Box::pin(vsphere.clean(request)).await?,
            (Self::Vsphere(vsphere), true) => Box::pin(vsphere.remove(request)).await?,
            (Self::Nutanix(nutanix), false) => Box::pin(nutanix.clean(request)).await?,
            (Self::Nutanix(nutanix), true) => Box::pin(nutanix.remove(request)).await?,
        }
        Ok(())
    }

    /// Puts the image there. The futures are large, so they are boxed.
    pub(super) async fn publish(&self, request: &BuildRequest, source: &ImageSource) -> Result<Provided, BuildError> {
        Ok(match self {
            Self::Vsphere(vsphere) => {
                let imported = Box::pin(vsphere.publish(request, source)).await?;
                Provided { name: imported.name, summary: imported.summary, vsphere: imported.template, uuid: None }
            }
            Self::Nutanix(nutanix) => {
                let image = Box::pin(nutanix.publish(request, source)).await?;
                Provided { name: image.name, summary: image.summary, vsphere: None, uuid: Some(image.uuid) }
            }
        })
    }
}
