//! What a person wrote that can not be.

use std::{io, path::PathBuf};

use crate::{
    contract::{Classified, FailureClass},
    controller::validate::Refusal,
};

/// Why the flags or the files they name can not be used. The messages hold no value that may be secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsageError {
    /// `--os is `x`: write ubuntu or redhat`.
    #[error("{flag} is `{found}`: {expected}")]
    Flag { flag: &'static str, found: String, expected: String },
    /// Flags that do not go together, or one that is missing.
    #[error("{what}: {instead}")]
    Flags { what: String, instead: String },
    /// The keys of a JSON file.
    #[error("{}: {problem}", .path.display())]
    Config { path: PathBuf, problem: String },
    #[error("can not read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} holds passwords and others may read it (mode {mode:04o}): run `chmod 600 {}`", .path.display(), .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{what} is not supported by this version: {instead}")]
    NotSupported { what: String, instead: String },
    /// What the specification that follows can not be.
    #[error("{}", .0.message)]
    Refused(Refusal),
}

impl UsageError {
    pub(super) fn flag(flag: &'static str, found: &str, expected: impl Into<String>) -> Self {
        Self::Flag { flag, found: found.to_owned(), expected: expected.into() }
    }

    pub(crate) fn flags(what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self::Flags { what: what.into(), instead: instead.into() }
    }

    pub(crate) fn not_supported(what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self::NotSupported { what: what.into(), instead: instead.into() }
    }
}

impl Classified for UsageError {
    fn class(&self) -> FailureClass {
        FailureClass::BadInput
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Flag { .. } | Self::Flags { .. } => "InvalidFlags",
            Self::Config { .. } => "InvalidConfig",
            Self::Read { .. } => "ConfigUnreadable",
            Self::Exposed { .. } => "CredentialsExposed",
            Self::NotSupported { .. } => "NotSupported",
            Self::Refused(refusal) if refusal.reason == "NotSupported" => "NotSupported",
            Self::Refused(_) => "InvalidSpec",
        }
    }
}
