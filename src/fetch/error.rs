//! Why a file could not be fetched.

use std::path::PathBuf;

use super::TransportError;
use crate::contract::{Classified, FailureClass};

/// A file that came whole and is another one.
#[derive(Debug, thiserror::Error)]
#[error(
    "{name} from {url} is not the file it should be: {size} bytes with the digest {got}, expected {expected}{hint}. \
     Put the right file there, or correct the digest"
)]
pub struct ChecksumMismatch {
    pub name: String,
    pub url: String,
    pub expected: String,
    pub got: String,
    /// Bytes that came.
    pub size: u64,
    /// What may explain it, with a leading space.
    pub hint: String,
}

/// Why a file could not be fetched. URLs are shown without credentials and query.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("can not fetch {name}")]
    Download { name: String, source: TransportError },
    #[error(transparent)]
    Sums(#[from] TransportError),
    #[error(transparent)]
    ChecksumMismatch(Box<ChecksumMismatch>),
    #[error("{name} has no digest: give one, {url} is never used unchecked")]
    NoDigest { name: String, url: String },
    #[error("the digest `{digest}` of {name} is not {digits} hexadecimal digits: correct it")]
    InvalidDigest { name: String, digest: String, digits: usize },
    #[error("{sums} does not list {file}{}: correct the URL of the file or of the list", but_lists(.nearest))]
    NotListed { sums: String, file: String, nearest: Vec<String> },
    #[error("no space for {name} in {}: {} and {free} bytes are free. Give the build more disk", .dir.display(), size(*.needed))]
    DiskFull { name: String, dir: PathBuf, needed: Option<u64>, free: u64 },
    #[error("can not use the cache {}", .path.display())]
    Cache { path: PathBuf, source: std::io::Error },
    #[error("the download was cancelled")]
    Cancelled,
}

fn but_lists(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(" (but {})", names.join(", ")) }
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "its size is unknown".into(), |bytes| format!("it has {bytes} bytes"))
}

impl Classified for FetchError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Download { source, .. } | Self::Sums(source) => source.class(),
            Self::ChecksumMismatch(_) | Self::NoDigest { .. } | Self::InvalidDigest { .. } | Self::NotListed { .. } => {
                FailureClass::BadInput
            }
            Self::DiskFull { .. } | Self::Cache { .. } => FailureClass::Environment,
            Self::Cancelled => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Download { source, .. } | Self::Sums(source) => source.reason(),
            Self::ChecksumMismatch(_) => "ChecksumMismatch",
            Self::NoDigest { .. } => "NoChecksum",
            Self::InvalidDigest { .. } => "InvalidChecksum",
            Self::NotListed { .. } => "ChecksumNotListed",
            Self::DiskFull { .. } => "DiskFull",
            Self::Cache { .. } => "CacheUnusable",
            Self::Cancelled => "Cancelled",
        }
    }
}
