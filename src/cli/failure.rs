//! How a command of a person ends when it does not succeed: one line that says what to do, and an exit code that says
//! who has to.

use std::{fmt, io, process::ExitCode};

use crate::{
    contract::{BuildReport, Classified, FailureClass, FailureReport, Stage},
    error::Chain,
};

/// Any classified error.
pub(super) struct Failure(Box<dyn Classified>);

impl<E: Classified + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Chain(self.0.as_ref()), f)
    }
}

impl Failure {
    /// The same as the report of a build that never began.
    pub(super) fn to_report(&self) -> BuildReport {
        BuildReport::Failed(FailureReport {
            stage: Stage::Prepare,
            class: self.0.class(),
            reason: self.0.reason().to_owned(),
            message: self.to_string(),
        })
    }

    /// Tells it, and gives the code of its class.
    pub(super) fn report(&self) -> ExitCode {
        tracing::error!(reason = self.0.reason(), "{self}");
        ExitCode::from(self.0.class().exit_code())
    }
}

/// What keeps a command from running on this machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProcessError {
    #[error("can not start threads: raise the limit of processes")]
    Threads { source: io::Error },
    #[error("can not write to standard output")]
    Output { source: io::Error },
    #[error("can not use {}: make it writable, or work in another directory", .path.display())]
    Directory { path: std::path::PathBuf, source: io::Error },
}

impl Classified for ProcessError {
    fn class(&self) -> FailureClass {
        FailureClass::Environment
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Threads { .. } => "RuntimeUnavailable",
            Self::Output { .. } => "OutputUnwritable",
            Self::Directory { .. } => "WorkDirectoryUnusable",
        }
    }
}
