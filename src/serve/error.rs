//! Answers other than success: a status and a line of plain text that says what to do.

use std::io;

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::path::PathError;
use crate::contract::upload::UPLOAD_OFFSET;

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    Unauthorized(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("there is no complete image at this path")]
    NotFound,
    #[error("there is no such upload: it was finished or removed; begin a new one")]
    NoUpload,
    #[error("a newer upload of the same path, or the removal of its directory, ended this one")]
    Superseded,
    #[error("the server has {has} bytes of this upload; send from there")]
    Offset { has: u64 },
    #[error("{0}")]
    Conflict(String),
    #[error("the body ended or stalled after {has} bytes; send from there")]
    Interrupted { has: u64 },
    #[error("the server is stopping and has {has} bytes; send the rest when it is back")]
    Stopping { has: u64 },
    #[error("what was sent has the SHA-256 {actual}, not {expected}; the upload was removed: begin a new one")]
    WrongDigest { expected: String, actual: String },
    #[error("what was sent has {actual} bytes, not {expected}")]
    WrongSize { expected: u64, actual: u64 },
    #[error("the range is not in this image of {size} bytes")]
    Range { size: u64 },
    #[error("the disk is full; delete images that no machine needs, or give the server a larger volume")]
    DiskFull,
    #[error("the server can not work with its disk: {0}")]
    Disk(#[source] io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Disk(error),
        }
    }
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Path(_) | Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound | Self::NoUpload => StatusCode::NOT_FOUND,
            Self::Superseded => StatusCode::GONE,
            Self::Offset { .. } | Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Interrupted { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Stopping { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::WrongDigest { .. } | Self::WrongSize { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
            Self::Disk(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Unauthorized(_) => Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            Self::Offset { has } | Self::Interrupted { has } | Self::Stopping { has } => {
                Some((HeaderName::from_static(UPLOAD_OFFSET), HeaderValue::from(*has)))
            }
            Self::Range { size } => {
                HeaderValue::try_from(format!("bytes */{size}")).ok().map(|value| (header::CONTENT_RANGE, value))
            }
            _ => None,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::error!(status = status.as_u16(), "{self}");
        }
        let mut response = (status, format!("{self}\n")).into_response();
        if let Some((name, value)) = self.header() {
            response.headers_mut().insert(name, value);
        }
        response
    }
}
