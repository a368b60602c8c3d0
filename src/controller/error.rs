//! What can go wrong while the controller talks to the API server. Nothing here is the user's fault: it is tried again.

use std::time::Duration;

use kube::core::Status;

/// Why a reconciliation did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can not {operation}")]
    Api { operation: String, source: Box<kube::Error> },
    #[error("the {kind} `{name}` exists and belongs to something else; delete or rename it")]
    Foreign { kind: &'static str, name: String },
    #[error("can not write the build document")]
    Document { source: serde_json::Error },
    #[error("the artifact server did not delete {url}: {answer}")]
    Cleanup { url: String, answer: String },
    #[error("can not reach the artifact server to delete {url}")]
    CleanupTransport { url: String, source: reqwest::Error },
    #[error("the reconciliation took longer than {} s", .limit.as_secs())]
    Timeout { limit: Duration },
}

impl Error {
    /// Names the operation that failed: "create the Job `x`".
    pub fn api(operation: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Api { operation, source: Box::new(source) }
    }

    /// For metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.is_conflict() => "Conflict",
                kube::Error::Api(status) if status.is_forbidden() => "Forbidden",
                kube::Error::Api(_) => "ApiRefused",
                _ => "ApiUnreachable",
            },
            Self::Foreign { .. } => "ForeignObject",
            Self::Document { .. } => "Document",
            Self::Cleanup { .. } | Self::CleanupTransport { .. } => "Cleanup",
            Self::Timeout { .. } => "Timeout",
        }
    }

    /// Whether the API server creates nothing because the namespace is being deleted.
    pub fn is_namespace_terminating(&self) -> bool {
        let Self::Api { source, .. } = self else { return false };
        let causes = api_status(source).and_then(|status| status.details.as_ref()).map(|details| &details.causes);
        causes.into_iter().flatten().any(|cause| cause.reason == "NamespaceTerminating")
    }

    /// Whether somebody else changed the object first, which is normal.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source, .. } if api_status(source).is_some_and(Status::is_conflict))
    }
}

/// The API server's answer, if that is what the error is.
pub fn api_status(error: &kube::Error) -> Option<&Status> {
    match error {
        kube::Error::Api(status) => Some(status),
        _ => None,
    }
}
