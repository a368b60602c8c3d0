//! Why an image did not get into Prism Central, and who has to act.

use std::{error::Error, io, path::PathBuf, time::Duration};

use crate::{
    contract::{Classified, FailureClass},
    http::HttpError,
    package::PackageError,
    publish::PublishError,
    secret::SecretError,
};

/// Why Prism Central has no new image, or gave none. Unless the message says otherwise nothing of the build is left there.
#[derive(Debug, thiserror::Error)]
pub enum NutanixError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("`{endpoint}` is not an address of a Prism Central; write spec.nutanix.endpoint as a host name or address")]
    InvalidEndpoint { endpoint: String },
    #[error(
        "the certificate of {server} is not trusted; write its authority as spec.trustBundle, or insecure: true where \
         nobody can be in between"
    )]
    Untrusted { server: String, source: reqwest::Error },
    #[error(
        "{server} does not accept user name and password; check the Secret that spec.nutanix.credentialsSecretRef names"
    )]
    CredentialsRefused { server: String },
    #[error("the user may not {action} on {server} ({answer}); have the right added to the user's role")]
    Forbidden { server: String, action: String, answer: String },
    #[error(
        "{server} does not answer as a Prism Central does ({answer}); check spec.nutanix.endpoint and spec.nutanix.port"
    )]
    NotPrism { server: String, answer: String },
    #[error(
        "{server} was away for {} s; check spec.nutanix.endpoint and the network if it stays so", .waited.as_secs()
    )]
    Unavailable {
        server: String,
        waited: Duration,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{server} does not have what spec.nutanix names: {}", .problems.join("; "))]
    NotFound { server: String, problems: Vec<String> },
    #[error("the cluster `{cluster}` is not available to {server} now; see its state there")]
    ClusterAway { server: String, cluster: String },
    #[error(
        "{server} already has the image `{name}` ({uuid}); write another spec.nutanix.imageName, or replaceExisting: true \
         to have it replaced"
    )]
    NameTaken { server: String, name: String, uuid: String },
    #[error(
        "{server} has several images `{name}` ({}); delete those that are not used there, or write another \
         spec.nutanix.imageName", .uuids.join(", ")
    )]
    Ambiguous { server: String, name: String, uuids: Vec<String> },
    #[error("{server} refuses to {action} ({answer})")]
    Refused { server: String, action: String, answer: String },
    #[error("the cluster has no room for the image, says {server} ({answer}); make room, or write another cluster")]
    Full { server: String, answer: String },
    #[error("{server} could not {action}: {message}")]
    Failed { server: String, action: String, message: String },
    #[error("the image did not arrive whole at {server} ({answer})")]
    Corrupted { server: String, answer: String },
    #[error("the old image `{name}` ({uuid}) can not be removed from {server}, so the new one was: {answer}")]
    OldImageStays { server: String, name: String, uuid: String, answer: String },
    #[error("the image is packaged as {format}, and Prism Central gets a qcow2")]
    NotQcow2 { format: &'static str },
    #[error(
        "the source image `{name}` did not come whole from {server} ({answer}); if it stays so, upload that image there anew"
    )]
    SourceCorrupted { server: String, name: String, answer: String },
    #[error(
        "spec.base leads to no disk: with engine: ImageBuilder a machine in Prism Central starts from it, so write the URL \
         of a qcow2 or of a raw disk, as vendors publish them for clouds"
    )]
    NotADisk,
    #[error(
        "the build has neither spec.base nor spec.nutanix.sourceImageName, and its machine starts from one of them"
    )]
    NoBase,
    #[error(
        "the disk that the machine starts from has {size} MiB, and the image gets {wanted} MiB; write spec.diskSize: \
         {size}Mi, or more"
    )]
    DiskTooSmall { size: u64, wanted: u64 },
    #[error("{what} may be left on {server}")]
    LeftBehind {
        server: String,
        what: String,
        #[source]
        cause: Box<NutanixError>,
    },
    #[error("can not read or write {}, the disk of an image", .path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("the work with Prism Central was cancelled")]
    Cancelled,
}

impl Classified for NutanixError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Package(error) => error.class(),
            Self::Secret(error) => error.class(),
            Self::Http(error) => error.class(),
            Self::LeftBehind { cause, .. } => cause.class(),
            Self::InvalidEndpoint { .. }
            | Self::Untrusted { .. }
            | Self::CredentialsRefused { .. }
            | Self::Forbidden { .. }
            | Self::NotPrism { .. }
            | Self::NotFound { .. }
            | Self::NameTaken { .. }
            | Self::Ambiguous { .. }
            | Self::Refused { .. }
            | Self::OldImageStays { .. }
            | Self::NotADisk
            | Self::NoBase
            | Self::DiskTooSmall { .. } => FailureClass::BadInput,
            Self::Full { .. } | Self::Disk { .. } => FailureClass::Environment,
            Self::Unavailable { .. }
            | Self::ClusterAway { .. }
            | Self::Failed { .. }
            | Self::Corrupted { .. }
            | Self::SourceCorrupted { .. } => FailureClass::Transient,
            Self::NotQcow2 { .. } => FailureClass::Internal,
            Self::Cancelled => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Package(error) => error.reason(),
            Self::Secret(error) => error.reason(),
            Self::Http(error) => error.reason(),
            Self::InvalidEndpoint { .. } => "InvalidPrismAddress",
            Self::Untrusted { .. } => "PrismUntrusted",
            Self::CredentialsRefused { .. } => "PrismCredentialsRefused",
            Self::Forbidden { .. } => "PrismAccessDenied",
            Self::NotPrism { .. } => "NotAPrismCentral",
            Self::Unavailable { .. } => "PrismUnavailable",
            Self::NotFound { .. } => "PrismObjectNotFound",
            Self::ClusterAway { .. } => "PrismClusterUnavailable",
            Self::NameTaken { .. } => "ImageNameTaken",
            Self::Ambiguous { .. } => "ImageNameAmbiguous",
            Self::Refused { .. } => "PrismRefused",
            Self::Full { .. } => "PrismClusterFull",
            Self::Failed { .. } => "PrismTaskFailed",
            Self::Corrupted { .. } => "UploadCorrupted",
            Self::OldImageStays { .. } => "OldImageNotRemoved",
            Self::SourceCorrupted { .. } => "SourceImageCorrupted",
            Self::NotADisk => "SourceImageUnsupported",
            Self::NoBase => "InvalidSpec",
            Self::DiskTooSmall { .. } => "DiskTooSmall",
            Self::LeftBehind { .. } => "LeftBehind",
            Self::Disk { source, .. } if source.kind() == io::ErrorKind::StorageFull => "DiskFull",
            Self::Disk { .. } => "WorkDirectoryUnusable",
            Self::NotQcow2 { .. } => "NotAQcow2",
            Self::Cancelled => "Cancelled",
        }
    }
}

/// Waiting ends as everywhere where images are published.
impl From<PublishError> for NutanixError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Unavailable { target, waited, source } => {
                Self::Unavailable { server: target, waited, source }
            }
            PublishError::Package(error) => Self::Package(error),
            PublishError::Secret(error) => Self::Secret(error),
            PublishError::Cancelled => Self::Cancelled,
            other => {
                Self::Unavailable { server: "Prism Central".to_owned(), waited: Duration::ZERO, source: other.into() }
            }
        }
    }
}
