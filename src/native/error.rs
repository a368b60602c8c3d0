//! Why the engine could not make an image.

use std::{io, path::PathBuf};

use super::{
    accelerator::AcceleratorError, artifacts::ArtifactError, bootloader::BootLoaderError, chroot::MountError,
    disk::DiskError, files::FileError, guest::GuestError, images::ImportError, packages::PackageError,
    rootfs::BaseError, source::SourceError, tree::TreeError,
};
use crate::{
    contract::{Classified, FailureClass, Firmware, OsName, Provider},
    process::ProcessError,
};

/// Why the engine could not make an image.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    #[error("the engine Native does not make {os} images for {provider} that start by {firmware:?}")]
    Unsupported { os: OsName, provider: Provider, firmware: Firmware },
    #[error("can not read the trust bundle {}", .path.display())]
    TrustBundle { path: PathBuf, source: io::Error },
    #[error("can not {action} {}", .path.display())]
    Scratch { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the image does not keep {count} of its promises: {failed}")]
    Contract { count: usize, failed: String },
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    BootLoader(#[from] BootLoaderError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl NativeError {
    fn inner(&self) -> Option<&dyn Classified> {
        Some(match self {
            Self::Unsupported { .. } | Self::TrustBundle { .. } | Self::Scratch { .. } | Self::Contract { .. } => {
                return None;
            }
            Self::Accelerator(error) => error,
            Self::Artifact(error) => error,
            Self::Base(error) => error,
            Self::BootLoader(error) => error,
            Self::Disk(error) => error,
            Self::File(error) => error,
            Self::Guest(error) => error,
            Self::Import(error) => error,
            Self::Mount(error) => error,
            Self::Package(error) => error,
            Self::Process(error) => error,
            Self::Source(error) => error,
            Self::Tree(error) => error,
        })
    }
}

impl Classified for NativeError {
    fn class(&self) -> FailureClass {
        match (self, self.inner()) {
            (_, Some(inner)) => inner.class(),
            (Self::Scratch { .. }, _) => FailureClass::Environment,
            (_, None) => FailureClass::BadInput,
        }
    }

    fn reason(&self) -> &'static str {
        match (self, self.inner()) {
            (_, Some(inner)) => inner.reason(),
            (Self::Unsupported { .. }, _) => "UnsupportedTarget",
            (Self::TrustBundle { .. }, _) => "InvalidTrustBundle",
            (Self::Scratch { .. }, _) => "WorkDirectoryUnusable",
            (_, None) => "ChecksFailed",
        }
    }
}
