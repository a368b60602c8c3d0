//! The artifact server: hosts finished images for machines, takes them from builds.
//!
//! Anyone may read; a complete image has its checksum beside it, `<file>.sha256`, in the format of `sha256sum -c`, and
//! an image without it is not served. Changing something needs a token for the directory (see
//! [`token`](crate::contract::token)) or the administrator's token. Builds upload as [`upload`](crate::contract::upload)
//! says; a person may use
//!
//! ```sh
//! curl -T image.gz -H "Authorization: Bearer $TOKEN" \
//!   -H "Repr-Digest: sha-256=:$(openssl dgst -sha256 -binary image.gz | base64):" http://host/directory/image.gz
//! curl -X DELETE -H "Authorization: Bearer $TOKEN" http://host/directory
//! ```
//!
//! A `PUT` of the contents that are there already changes nothing (200). Other contents are refused (409) unless
//! `If-Match` names the SHA-256 that is to be replaced, or `*`.

mod auth;
pub(crate) mod download;
mod error;
pub(crate) mod path;
mod store;
mod upload;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, head, post},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::StreamExt;
use http_body::Body as _;
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::{
    auth::Authority,
    error::Refusal,
    path::{ImagePath, StorePath},
    store::{Published, Replace, Store},
    upload::{Kept, Upload, Uploads, Writer},
};
use crate::contract::{
    token::SigningKey,
    upload::{BeginUpload, CompleteUpload, UNCOMPRESSED_SIZE, UPLOAD_OFFSET, UPLOADS_PATH},
};

/// Bytes of a body that are written at once.
const BATCH: usize = 1 << 20;
/// Longest silence in the middle of a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Time that downloads have to end when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time between two looks for what is too old.
const CLEANING_INTERVAL: Duration = Duration::from_secs(3600);

/// How the server runs.
#[derive(Debug)]
pub struct Config {
    /// Directory of images and unfinished uploads, on one file system.
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    /// The key that the controller signs upload tokens with.
    pub key: SigningKey,
    /// A token that allows changing everything.
    pub admin_token: Option<SecretString>,
    /// Uploads are refused when less space than this would stay free.
    pub min_free_bytes: u64,
    /// Unfinished uploads that nobody went on with for this long are removed.
    pub upload_max_age: Duration,
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("can not use the data directory {}", .path.display())]
    DataDirectory { path: PathBuf, source: io::Error },
    #[error("can not listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the server failed")]
    Serve { source: io::Error },
}

/// An artifact server that listens already.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    state: Arc<Shared>,
    upload_max_age: Duration,
}

#[derive(Debug)]
struct Shared {
    authority: Authority,
    store: Arc<Store>,
    uploads: Uploads,
    stopping: CancellationToken,
}

impl Server {
    /// Takes up what is in the data directory and listens.
    pub async fn bind(config: Config) -> Result<Self, ServeError> {
        let Config { data_dir, listen, key, admin_token, min_free_bytes, upload_max_age } = config;
        let unusable = |source| ServeError::DataDirectory { path: data_dir.clone(), source };
        let store = Arc::new(Store::open(&data_dir, min_free_bytes).map_err(unusable)?);
        let uploads = Uploads::resume(Arc::clone(&store)).map_err(unusable)?;
        let listener =
            TcpListener::bind(listen).await.map_err(|source| ServeError::Listen { address: listen, source })?;
        let authority = Authority::new(key, admin_token);
        let state = Arc::new(Shared { authority, store, uploads, stopping: CancellationToken::new() });
        Ok(Self { listener, state, upload_max_age })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> Result<SocketAddr, ServeError> {
        self.listener.local_addr().map_err(|source| ServeError::Serve { source })
    }

    /// Serves until `cancel`; then uploads stop where they are, to go on later, and downloads have a little time to end.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), ServeError> {
        let Self { listener, state, upload_max_age } = self;
        let stopping = state.stopping.clone();
        let cleaning = clean(Arc::clone(&state), upload_max_age);
        let serving = axum::serve(listener, router(state)).with_graceful_shutdown(stopping.clone().cancelled_owned());
        let stop = async {
            cancel.cancelled().await;
            stopping.cancel();
            tokio::time::sleep(STOP_TIMEOUT).await;
        };
        tokio::select! {
            result = serving => result.map_err(|source| ServeError::Serve { source }),
            () = cleaning => Ok(()),
            () = stop => Ok(()),
        }
    }
}

/// Removes what is too old, now and from time to time. Never ends.
async fn clean(state: Arc<Shared>, age: Duration) {
    let mut ticks = tokio::time::interval(CLEANING_INTERVAL.min(age).max(Duration::from_millis(10)));
    loop {
        ticks.tick().await;
        let state = Arc::clone(&state);
        let cleaned = blocking(move || {
            state.uploads.expire(age)?;
            Ok(state.store.remove_incomplete(age)?)
        });
        if let Err(error) = cleaned.await {
            tracing::error!("can not clean the data directory: {error}");
        }
    }
}

fn router(state: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(|| std::future::ready("ok\n")))
        .route("/readyz", get(ready))
        .route(UPLOADS_PATH, post(begin))
        .route(&format!("{UPLOADS_PATH}/{{id}}"), head(offset).patch(append).delete(discard))
        .route(&format!("{UPLOADS_PATH}/{{id}}/complete"), post(complete))
        .fallback(image)
        .with_state(state)
}

/// Ready as long as the disk answers; a full disk still serves images.
async fn ready(State(state): State<Arc<Shared>>) -> Result<&'static str, Refusal> {
    blocking(move || {
        std::fs::read_dir(state.store.uploads())?;
        Ok("ok\n")
    })
    .await
}

async fn begin(
    State(state): State<Arc<Shared>>,
    headers: HeaderMap,
    Json(BeginUpload { path, replace }): Json<BeginUpload>,
) -> Result<Response, Refusal> {
    let path = ImagePath::parse(&path)?;
    state.authority.check(&headers, path.path())?;
    let replace = if replace { Replace::Anything } else { Replace::Nothing };
    let upload = blocking(move || state.uploads.begin(path, replace, Kept::UntilComplete)).await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, format!("{UPLOADS_PATH}/{}", upload.id()))]).into_response())
}

/// The upload of a request that may change it.
fn allowed(state: &Shared, headers: &HeaderMap, id: &str) -> Result<Arc<Upload>, Refusal> {
    let upload = state.uploads.find(id)?;
    state.authority.check(headers, upload.path().path())?;
    Ok(upload)
}

async fn offset(
    State(state): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let upload = allowed(&state, &headers, &id)?;
    let has = blocking(move || upload.offset()).await?;
    Ok((StatusCode::OK, offset_header(has)).into_response())
}

async fn append(
    State(state): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let upload = allowed(&state, &headers, &id)?;
    let offset = number(&headers, UPLOAD_OFFSET)?
        .ok_or_else(|| Refusal::BadRequest(format!("`PATCH` needs the header `{UPLOAD_OFFSET}`")))?;
    let at = Arc::clone(&upload);
    let writer = blocking(move || at.writer(offset)).await?;
    let has = receive(&state, &upload, writer, body).await?;
    Ok((StatusCode::NO_CONTENT, offset_header(has)).into_response())
}

async fn complete(
    State(state): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
    Json(CompleteUpload { size, sha256, uncompressed_size }): Json<CompleteUpload>,
) -> Result<StatusCode, Refusal> {
    let upload = allowed(&state, &headers, &id)?;
    let path = upload.path().clone();
    let published = blocking(move || state.uploads.complete(&upload, size, &sha256, Some(uncompressed_size))).await?;
    tracing::info!(%path, size, "image complete");
    Ok(created(published))
}

async fn discard(
    State(state): State<Arc<Shared>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Refusal> {
    let upload = allowed(&state, &headers, &id)?;
    blocking(move || state.uploads.discard(&upload)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn image(State(state): State<Arc<Shared>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let (method, path, headers) = (parts.method, parts.uri.path(), parts.headers);
    match method {
        Method::GET | Method::HEAD => download::serve(Arc::clone(&state.store), &method, path, &headers).await,
        Method::PUT => put(state, ImagePath::parse(path)?, &headers, body).await,
        Method::DELETE => {
            let directory = StorePath::parse(path)?;
            state.authority.check(&headers, &directory)?;
            tracing::info!(%directory, "removing a directory");
            blocking(move || state.uploads.remove_directory(&directory)).await?;
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        _ => Ok((StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET, HEAD, PUT, DELETE")]).into_response()),
    }
}

async fn put(state: Arc<Shared>, path: ImagePath, headers: &HeaderMap, body: Body) -> Result<Response, Refusal> {
    state.authority.check(headers, path.path())?;
    let sha256 = digest(headers)?;
    let uncompressed_size = number(headers, UNCOMPRESSED_SIZE)?;
    let replace = match headers.get(header::IF_MATCH).map(HeaderValue::to_str) {
        None => Replace::Nothing,
        Some(Ok("*")) => Replace::Anything,
        Some(Ok(tag)) => Replace::Exactly(tag.trim_matches('"').to_owned()),
        Some(Err(_)) => return Err(Refusal::BadRequest("`If-Match` is not a quoted SHA-256".into())),
    };
    let opening = Arc::clone(&state);
    let upload = blocking(move || opening.uploads.begin(path, replace, Kept::ForOneRequest)).await?;
    // Also when the client goes away and this future is dropped.
    let upload = OneRequest { state: Arc::clone(&state), upload };
    let writer = upload.upload.writer(0)?;
    let size = receive(&state, &upload.upload, writer, body).await?;
    let path = upload.upload.path().clone();
    let published =
        blocking(move || upload.state.uploads.complete(&upload.upload, size, &sha256, uncompressed_size)).await?;
    tracing::info!(%path, size, "image complete");
    Ok(created(published).into_response())
}

/// An upload that ends with its request.
struct OneRequest {
    state: Arc<Shared>,
    upload: Arc<Upload>,
}

impl Drop for OneRequest {
    fn drop(&mut self) {
        if let Err(error) = self.state.uploads.discard(&self.upload) {
            tracing::error!("can not remove an unfinished upload: {error}");
        }
    }
}

/// Writes a body to its upload. What arrived before a fault is kept.
async fn receive(state: &Arc<Shared>, upload: &Arc<Upload>, writer: Writer, body: Body) -> Result<u64, Refusal> {
    if let Some(length) = body.size_hint().exact() {
        let state = Arc::clone(state);
        blocking(move || state.store.ensure_space(length)).await?;
    }
    let mut body = body.into_data_stream();
    let mut end = None;
    loop {
        let mut batch = Vec::new();
        let mut size = 0;
        while size < BATCH && end.is_none() {
            let next = tokio::select! {
                next = tokio::time::timeout(BODY_TIMEOUT, body.next()) => next,
                () = state.stopping.cancelled() => {
                    end = Some(End::Stopping);
                    break;
                }
            };
            match next {
                Ok(Some(Ok(piece))) => {
                    size += piece.len();
                    batch.push(piece);
                }
                Ok(None) => end = Some(End::Complete),
                Ok(Some(Err(_))) | Err(_) => end = Some(End::Interrupted),
            }
        }
        let has = write(state, upload, writer, batch).await?;
        match end {
            None => {}
            Some(End::Complete) => return Ok(has),
            Some(End::Interrupted) => return Err(Refusal::Interrupted { has }),
            Some(End::Stopping) => return Err(Refusal::Stopping { has }),
        }
    }
}

/// How a body ended.
enum End {
    Complete,
    Interrupted,
    Stopping,
}

async fn write(state: &Arc<Shared>, upload: &Arc<Upload>, writer: Writer, batch: Vec<Bytes>) -> Result<u64, Refusal> {
    let (state, upload) = (Arc::clone(state), Arc::clone(upload));
    blocking(move || state.uploads.append(&upload, writer, &batch)).await
}

/// Runs what blocks where it may. It goes on to its end even when the request ends.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Refusal::Disk(io::Error::other(error)))?
}

fn created(published: Published) -> StatusCode {
    match published {
        Published::New => StatusCode::CREATED,
        Published::Already => StatusCode::OK,
    }
}

fn offset_header(has: u64) -> [(HeaderName, HeaderValue); 1] {
    [(HeaderName::from_static(UPLOAD_OFFSET), HeaderValue::from(has))]
}

/// A header that holds a number, if it is there.
fn number(headers: &HeaderMap, name: &str) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or_else(|| Refusal::BadRequest(format!("the header `{name}` is not a number of bytes")))
}

/// The SHA-256 that RFC 9530 headers announce, in hexadecimal.
fn digest(headers: &HeaderMap) -> Result<String, Refusal> {
    headers
        .get_all("repr-digest")
        .iter()
        .chain(headers.get_all("content-digest"))
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|item| item.trim().strip_prefix("sha-256=:")?.strip_suffix(':'))
        .and_then(|encoded| STANDARD.decode(encoded).ok())
        .filter(|digest| digest.len() == 32)
        .map(hex::encode)
        .ok_or_else(|| {
            Refusal::BadRequest(
                "send the file's SHA-256 as `Repr-Digest: sha-256=:<base64>:`, so that it can be verified".into(),
            )
        })
}
