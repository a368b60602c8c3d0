//! Why an image was not published, and who has to act.

use std::{path::PathBuf, time::Duration};

use crate::{
    contract::{Classified, FailureClass},
    package::PackageError,
    secret::SecretError,
};

/// Why an image was not published. Unless the message says otherwise nothing of it is left at the target.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{target} can not take a path; use a URL such as https://images.example.com/dir")]
    InvalidTarget { target: String },
    #[error("{target} refused the credentials ({answer}); check the Secret that `spec.publish` names")]
    CredentialsRefused { target: String, answer: String },
    #[error("{target} refused the image ({answer})")]
    Refused { target: String, answer: String },
    #[error("{target} has no space left ({answer})")]
    Full { target: String, answer: String },
    #[error("{target} was away for {} s; the build can be tried again when it is back", .waited.as_secs())]
    Unavailable {
        target: String,
        waited: Duration,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{target} failed; see its own message, and try the build again when it is well")]
    StoreFailed { target: String, source: Box<object_store::Error> },
    #[error("another upload of the same image to {target} has taken over")]
    Superseded { target: String },
    #[error("the image did not arrive whole at {target} ({answer})")]
    Corrupted { target: String, answer: String },
    #[error("can not write {}", .path.display())]
    Unwritable { path: PathBuf, source: std::io::Error },
    #[error("publishing was cancelled")]
    Cancelled,
}

impl Classified for PublishError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Package(error) => error.class(),
            Self::Secret(error) => error.class(),
            Self::InvalidTarget { .. } | Self::CredentialsRefused { .. } | Self::Refused { .. } => {
                FailureClass::BadInput
            }
            Self::Full { .. } | Self::Unwritable { .. } => FailureClass::Environment,
            Self::Unavailable { .. } | Self::StoreFailed { .. } | Self::Superseded { .. } | Self::Corrupted { .. } => {
                FailureClass::Transient
            }
            Self::Cancelled => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Package(error) => error.reason(),
            Self::Secret(error) => error.reason(),
            Self::InvalidTarget { .. } => "InvalidPublishTarget",
            Self::CredentialsRefused { .. } => "PublishCredentialsRefused",
            Self::Refused { .. } => "PublishRefused",
            Self::Full { .. } => "ArtifactServerFull",
            Self::Unavailable { .. } => "ArtifactServerUnavailable",
            Self::StoreFailed { .. } => "ObjectStoreFailed",
            Self::Superseded { .. } => "UploadSuperseded",
            Self::Corrupted { .. } => "UploadCorrupted",
            Self::Unwritable { .. } => "OutputUnwritable",
            Self::Cancelled => "Cancelled",
        }
    }
}
