//! Why a release could not be resolved.

use std::{path::PathBuf, sync::Arc};

use crate::{
    contract::{Classified, FailureClass},
    fetch::TransportError,
};

/// Why a release could not be resolved. Cloned for all who wait for the same document.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReleaseError {
    #[error(transparent)]
    Download(#[from] TransportError),
    #[error("EKS Anywhere has no release {wanted} in {url}: write one of its releases; the newest are {}", list(.newest))]
    UnknownRelease { url: String, wanted: String, newest: Vec<String> },
    #[error(
        "EKS Anywhere {version} has no release channel {channel}: write one of {} ({url})",
        list(.available)
    )]
    UnknownChannel { url: String, version: String, channel: String, available: Vec<String> },
    #[error("{url} is not {expected}: {problem}")]
    InvalidDocument { url: String, expected: &'static str, problem: String },
    #[error("{url} names no {component}, which an image needs: use another release, or mend the mirror's manifest")]
    MissingComponent { url: String, component: String },
    #[error("{url} names the URL `{found}` for {component}, which is none: mend the manifest")]
    InvalidUrl { url: String, component: String, found: String },
    #[error("`{url}` is not a URL: write one such as {}", super::PRODUCTION_MANIFEST_URL)]
    InvalidManifestUrl { url: String },
    #[error(
        "no digest is published for {name} ({url} is missing): put that file on the mirror, it is never used unchecked"
    )]
    NoChecksum { name: String, url: String },
    #[error(
        "{url} is not signed, and only signed documents are wanted: use a release that is, take the document from where \
         AWS publishes it, or write Warn for spec.verify.signatures (--signatures)"
    )]
    Unsigned { url: String },
    #[error(
        "the signature of {url} is not valid: {problem}. Take the document from where AWS publishes it; a mirror must keep \
         it as it is"
    )]
    InvalidSignature { url: String, problem: String },
    #[error("{url} does not list {file} (but {}): correct spec.base", list(.nearest))]
    NotListed { url: String, file: String, nearest: Vec<String> },
    #[error("{url} is a local file, which only the command line may read: write an http or https URL")]
    LocalFile { url: String },
    #[error("can not read {}", .path.display())]
    ReadFile { path: PathBuf, source: Arc<std::io::Error> },
    #[error("can not write {}", .path.display())]
    WriteFile { path: PathBuf, source: Arc<std::io::Error> },
    #[error("{} is no archive of manifests: {problem}", .path.display())]
    InvalidArchive { path: PathBuf, problem: String },
}

/// `a, b and c` for messages.
fn list(items: &[String]) -> String {
    match items {
        [] => "none".into(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

impl ReleaseError {
    /// How it is told where it does not end the build.
    pub(super) fn as_warning(&self) -> String {
        match self {
            Self::Unsigned { url } => format!("{url} is not signed; it is used all the same"),
            Self::InvalidSignature { url, problem } => {
                format!("the signature of {url} is not valid: {problem}; it is used all the same")
            }
            other => other.to_string(),
        }
    }

    /// Says whose digest is missing if that is what happened.
    pub(super) fn about_checksum(self, name: &str) -> Self {
        match self {
            Self::Download(TransportError::NotFound { url, .. }) => Self::NoChecksum { name: name.to_owned(), url },
            other => other,
        }
    }
}

impl Classified for ReleaseError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Download(error) => error.class(),
            Self::WriteFile { .. } => FailureClass::Environment,
            _ => FailureClass::BadInput,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Download(error) => error.reason(),
            Self::UnknownRelease { .. } => "UnknownRelease",
            Self::UnknownChannel { .. } => "UnknownChannel",
            Self::InvalidDocument { .. } => "InvalidManifest",
            Self::MissingComponent { .. } => "MissingComponent",
            Self::InvalidUrl { .. } => "InvalidManifestEntry",
            Self::InvalidManifestUrl { .. } => "InvalidManifestURL",
            Self::NoChecksum { .. } => "NoChecksum",
            Self::Unsigned { .. } => "SignatureMissing",
            Self::InvalidSignature { .. } => "SignatureInvalid",
            Self::NotListed { .. } => "ChecksumNotListed",
            Self::LocalFile { .. } => "LocalFileRefused",
            Self::ReadFile { .. } => "UnreadableManifest",
            Self::WriteFile { .. } => "WorkDirectoryUnusable",
            Self::InvalidArchive { .. } => "InvalidManifestArchive",
        }
    }
}
