//! Why an image did not become a template, and who has to act.

use std::{error::Error, fmt, time::Duration};

use crate::{
    contract::{Classified, FailureClass},
    http::HttpError,
    package::PackageError,
    publish::PublishError,
    secret::SecretError,
};

/// Why vCenter has no new template. Unless the message says otherwise nothing of the import is left there.
#[derive(Debug, thiserror::Error)]
pub enum VsphereError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("can not set up TLS")]
    Tls { source: rustls::Error },
    #[error("the trust bundle holds no readable PEM certificate ({answer})")]
    TrustBundle { answer: String },
    #[error("`{server}` is not an address of a vCenter; write spec.vsphere.server as host or host:port")]
    InvalidServer { server: String },
    #[error(
        "the certificate of {server} is not trusted; where it is the right one, write its SHA-256 thumbprint {thumbprint} \
         as spec.vsphere.thumbprint, or its authority as spec.trustBundle"
    )]
    Untrusted { server: String, thumbprint: String, source: Box<dyn Error + Send + Sync> },
    #[error(
        "{server} does not accept user name and password; check the Secret that spec.vsphere.credentialsSecretRef names"
    )]
    LoginRefused { server: String },
    #[error("{server} does not answer as a vCenter does ({answer}); check spec.vsphere.server")]
    NotVcenter { server: String, answer: String },
    #[error("{server} was away for {} s; check spec.vsphere.server and the network if it stays so", .waited.as_secs())]
    Unavailable {
        server: String,
        waited: Duration,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{server} does not have what spec.vsphere names: {}", .problems.join("; "))]
    NotFound { server: String, problems: Vec<String> },
    #[error(
        "the user in the Secret that spec.vsphere.credentialsSecretRef names lacks privileges on {server}: {}; have them \
         added to the user's role",
        .missing.join("; ")
    )]
    NoPrivilege { server: String, missing: Vec<String> },
    #[error(
        "{place} already has `{name}`; write another spec.vsphere.templateName, or replaceExisting: true to have it \
         replaced"
    )]
    NameTaken { name: String, place: String },
    #[error("the datastore `{datastore}` has {} free and the image's disk needs up to {}; make room, or write another spec.vsphere.datastore", Size(*.free), Size(*.needed))]
    NoSpace { datastore: String, needed: u64, free: u64 },
    #[error("{server} can not import the image: {}", .problems.join("; "))]
    NotImportable { server: String, problems: Vec<String> },
    #[error("{server} can not {action}: {message} ({kind})")]
    Fault { server: String, action: String, kind: String, message: String },
    #[error("the upload of the disk to {host} failed ({answer})")]
    Upload { host: String, answer: String },
    #[error("{server} ended the import while the disk was uploaded: {message}")]
    LeaseLost { server: String, message: String },
    #[error("{what} may be left on {server}, because it could not be removed in time; delete it there")]
    LeftBehind {
        server: String,
        what: String,
        #[source]
        cause: Box<VsphereError>,
    },
    #[error("the image is packaged as {format}, and vCenter takes an OVA")]
    NotAnOva { format: &'static str },
    #[error("publishing was cancelled")]
    Cancelled,
}

const NO_PERMISSION: &str = "NoPermission";
/// Faults that say that the specification or the user's rights are wrong. Another attempt meets them again.
const HOPELESS: &[&str] = &[
    // Of the REST API.
    "invalid_argument",
    "unauthorized",
    "InvalidArgument",
    "InvalidName",
    NO_PERMISSION,
    "NotSupported",
    "RestrictedVersion",
    "UnsupportedVmxLocation",
    "VirtualHardwareVersionNotSupported",
];
/// Faults that say that a resource of vCenter's is used up.
const EXHAUSTED: &[&str] = &["FileTooLarge", "InsufficientResourcesFault", "InsufficientStorageSpace", "NoDiskSpace"];

impl Classified for VsphereError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Package(error) => error.class(),
            Self::Secret(error) => error.class(),
            Self::Http(error) => error.class(),
            Self::LeftBehind { cause, .. } => cause.class(),
            Self::Fault { kind, .. } if HOPELESS.contains(&kind.as_str()) => FailureClass::BadInput,
            Self::Fault { kind, .. } if EXHAUSTED.contains(&kind.as_str()) => FailureClass::Environment,
            Self::TrustBundle { .. }
            | Self::InvalidServer { .. }
            | Self::Untrusted { .. }
            | Self::LoginRefused { .. }
            | Self::NotVcenter { .. }
            | Self::NotFound { .. }
            | Self::NoPrivilege { .. }
            | Self::NameTaken { .. }
            | Self::NotImportable { .. } => FailureClass::BadInput,
            Self::Tls { .. } | Self::NoSpace { .. } => FailureClass::Environment,
            Self::Unavailable { .. } | Self::Fault { .. } | Self::Upload { .. } | Self::LeaseLost { .. } => {
                FailureClass::Transient
            }
            Self::NotAnOva { .. } => FailureClass::Internal,
            Self::Cancelled => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Package(error) => error.reason(),
            Self::Secret(error) => error.reason(),
            Self::Http(error) => error.reason(),
            Self::Tls { .. } => "TlsUnavailable",
            Self::TrustBundle { .. } => "InvalidTrustBundle",
            Self::InvalidServer { .. } => "InvalidVcenterAddress",
            Self::Untrusted { .. } => "VcenterUntrusted",
            Self::LoginRefused { .. } => "VcenterCredentialsRefused",
            Self::NotVcenter { .. } => "NotAVcenter",
            Self::Unavailable { .. } => "VcenterUnavailable",
            Self::NotFound { .. } => "VcenterObjectNotFound",
            Self::NoPrivilege { .. } => "VcenterPrivilegeMissing",
            Self::NameTaken { .. } => "TemplateNameTaken",
            Self::NoSpace { .. } => "DatastoreFull",
            Self::NotImportable { .. } => "OvfRefused",
            Self::Fault { kind, .. } if kind == NO_PERMISSION => "VcenterPrivilegeMissing",
            Self::Fault { kind, .. } if EXHAUSTED.contains(&kind.as_str()) => "DatastoreFull",
            Self::Fault { kind, .. } if HOPELESS.contains(&kind.as_str()) => "VcenterRefused",
            Self::Fault { .. } => "VcenterFailed",
            Self::Upload { .. } => "VcenterUploadFailed",
            Self::LeaseLost { .. } => "VcenterLeaseLost",
            Self::LeftBehind { cause, .. } => cause.reason(),
            Self::NotAnOva { .. } => "NotAnOva",
            Self::Cancelled => "Cancelled",
        }
    }
}

/// Waiting ends as everywhere where images are published.
impl From<PublishError> for VsphereError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Unavailable { target, waited, source } => {
                Self::Unavailable { server: target, waited, source }
            }
            PublishError::Package(error) => Self::Package(error),
            PublishError::Secret(error) => Self::Secret(error),
            PublishError::Cancelled => Self::Cancelled,
            other => Self::Unavailable { server: "vCenter".to_owned(), waited: Duration::ZERO, source: other.into() },
        }
    }
}

/// Bytes, for people.
struct Size(u64);

impl fmt::Display for Size {
    #[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} GiB", self.0 as f64 / f64::from(1 << 30))
    }
}
