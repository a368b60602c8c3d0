//! The words of the artifact server's resumable uploads, shared by the server and the publisher.
//!
//! | request | answer |
//! |---|---|
//! | `POST /_uploads` with [`BeginUpload`] | 201, `Location` of the upload |
//! | `HEAD` on it | 200, [`UPLOAD_OFFSET`]: bytes the server has |
//! | `PATCH` on it with [`UPLOAD_OFFSET`] | 204; 409 with the server's offset where the two differ |
//! | `POST` on it `/complete` with [`CompleteUpload`] | 201: the image is published; 200: it already was |
//! | `DELETE` on it | 204: nothing of it is left |

use serde::{Deserialize, Serialize};

/// Where uploads are begun.
pub const UPLOADS_PATH: &str = "/_uploads";
/// Header with the number of bytes the server holds.
pub const UPLOAD_OFFSET: &str = "upload-offset";
/// Header with the bytes of the disk that an image unpacks to.
pub const UNCOMPRESSED_SIZE: &str = "x-uncompressed-size";
/// What follows an image's name in the name of its checksum file, which marks the image complete.
pub const CHECKSUM_SUFFIX: &str = ".sha256";

/// Begins an upload. An unfinished upload of the same path ends.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BeginUpload {
    /// `<directory>/<file>` under the server's root.
    pub path: String,
    /// Whether a complete image of other contents may be replaced.
    #[serde(default)]
    pub replace: bool,
}

/// Ends an upload: the server verifies the digest and publishes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CompleteUpload {
    /// Bytes of the whole file.
    pub size: u64,
    /// Lower-case hexadecimal SHA-256 of the whole file.
    pub sha256: String,
    /// Bytes of the disk it unpacks to.
    pub uncompressed_size: u64,
}
