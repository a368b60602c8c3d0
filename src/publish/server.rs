//! The built-in artifact server: resumable, so that neither a broken connection nor a restart of the server costs more
//! than one chunk. The chunk that is not acknowledged yet is all that is kept in memory.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt;
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{PublishError, Step, below, patience::Patience, shown};
use crate::{
    contract::upload::{BeginUpload, CompleteUpload, UPLOAD_OFFSET, UPLOADS_PATH},
    package::{ImageSource, PackagedBytes, Summary},
};

/// Bytes sent in one request.
const CHUNK: usize = 8 << 20;
/// How often the whole upload is begun anew when the server has lost it.
const BEGINNINGS: usize = 3;
/// Time to remove what a failed upload left.
const CLEANING_TIMEOUT: Duration = Duration::from_secs(5);

/// An artifact server and the right to change a directory there.
pub(super) struct ArtifactServer<'p> {
    pub(super) client: &'p Client,
    pub(super) base: &'p Url,
    pub(super) token: &'p SecretString,
    pub(super) cancel: &'p CancellationToken,
    pub(super) patience: Duration,
    pub(super) step: Step,
}

/// What the server says to a request, as far as an upload goes on with it.
enum Answer {
    Done(Response),
    /// It has this many bytes.
    Offset(u64),
    /// It does not know the upload.
    Lost,
    /// It is away or busy.
    Away(Box<dyn std::error::Error + Send + Sync>),
}

/// How one attempt at the whole upload ended.
enum Attempt {
    Complete(Summary),
    Lost,
}

impl ArtifactServer<'_> {
    pub(super) async fn upload(&self, path: &str, source: &ImageSource) -> Result<Summary, PublishError> {
        for _ in 0..BEGINNINGS {
            let upload = self.interruptible(self.begin(path)).await?;
            let result = self.interruptible(self.attempt(&upload, path, source)).await;
            match result {
                Ok(Attempt::Complete(summary)) => return Ok(summary),
                Ok(Attempt::Lost) => tracing::warn!("the artifact server lost the upload; it begins anew"),
                Err(error) => {
                    let remove = self.request(Method::DELETE, upload).send();
                    // The server removes what is left after some time.
                    if tokio::time::timeout(CLEANING_TIMEOUT, remove).await.is_err() {
                        tracing::warn!("an unfinished upload remains at the artifact server for now");
                    }
                    return Err(error);
                }
            }
        }
        Err(PublishError::Unavailable {
            target: shown(self.base),
            waited: Duration::ZERO,
            source: format!("it lost the upload {BEGINNINGS} times").into(),
        })
    }

    async fn interruptible<T>(&self, work: impl Future<Output = Result<T, PublishError>>) -> Result<T, PublishError> {
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(PublishError::Cancelled))
    }

    /// Begins an upload and gives its URL. A build owns its directory, so what an earlier attempt left is replaced.
    async fn begin(&self, path: &str) -> Result<Url, PublishError> {
        let begin = BeginUpload { path: path.to_owned(), replace: true };
        let mut patience = self.patience();
        loop {
            let request = self.request(Method::POST, below(self.base, UPLOADS_PATH)?).json(&begin);
            match self.send(request).await? {
                Answer::Done(response) => {
                    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
                    return below(self.base, location.ok_or_else(|| self.no_server("no Location"))?);
                }
                Answer::Away(cause) => patience.wait(cause).await?,
                Answer::Lost => return Err(self.no_server("404 Not Found")),
                Answer::Offset(_) => return Err(self.no_server("409 Conflict")),
            }
        }
    }

    /// Something else listens there.
    fn no_server(&self, answer: &str) -> PublishError {
        PublishError::Refused {
            target: shown(self.base),
            answer: format!("{answer}: is this the address of an image-builder artifact server?"),
        }
    }

    async fn attempt(&self, upload: &Url, path: &str, source: &ImageSource) -> Result<Attempt, PublishError> {
        let (bytes, done, summary) = source.open()?.split();
        let mut bytes = pin!(bytes);
        let mut offset = 0;
        let cut = loop {
            let Ok(chunk) = Chunk::read(&mut bytes, offset).await else { break true };
            if chunk.is_empty() {
                break false;
            }
            offset = chunk.end();
            if !self.send_chunk(upload, chunk).await? {
                return Ok(Attempt::Lost);
            }
            self.step.report(&done);
        };
        // Where the bytes were cut this says why.
        let summary = summary.get().await?;
        if cut {
            return Err(crate::package::PackageError::Stopped.into());
        }
        self.complete(upload, path, summary).await
    }

    /// Sends a chunk until the server has all of it. False: the server can not go on with this upload.
    async fn send_chunk(&self, upload: &Url, mut chunk: Chunk) -> Result<bool, PublishError> {
        let mut patience = self.patience();
        loop {
            let request = self
                .request(Method::PATCH, upload.clone())
                .header(UPLOAD_OFFSET, chunk.offset)
                .header(header::CONTENT_LENGTH, chunk.len());
            let has = match self.send(request.body(chunk.body())).await? {
                Answer::Done(response) => offset_of(&response),
                Answer::Offset(has) => Some(has),
                Answer::Lost => return Ok(false),
                Answer::Away(cause) => {
                    patience.wait(cause).await?;
                    match self.send(self.request(Method::HEAD, upload.clone())).await? {
                        Answer::Done(response) => offset_of(&response),
                        Answer::Offset(has) => Some(has),
                        Answer::Lost => return Ok(false),
                        // The next attempt tells.
                        Answer::Away(_) => continue,
                    }
                }
            };
            let has = has.ok_or_else(|| self.no_server("no Upload-Offset"))?;
            if !(chunk.offset..=chunk.end()).contains(&has) {
                return Ok(false);
            }
            if has > chunk.offset {
                patience.renew();
            }
            chunk.advance(has);
            if chunk.is_empty() {
                return Ok(true);
            }
        }
    }

    async fn complete(&self, upload: &Url, path: &str, summary: Summary) -> Result<Attempt, PublishError> {
        let complete = CompleteUpload {
            size: summary.size,
            sha256: summary.sha256.clone(),
            uncompressed_size: summary.virtual_size,
        };
        let mut patience = self.patience();
        loop {
            let request = self.request(Method::POST, below(upload, "complete")?).json(&complete);
            match self.send(request).await? {
                Answer::Done(_) => return Ok(Attempt::Complete(summary)),
                Answer::Away(cause) => patience.wait(cause).await?,
                Answer::Offset(_) => return Ok(Attempt::Lost),
                // An earlier request may have completed it and its answer was lost.
                Answer::Lost => match self.send(self.request(Method::HEAD, below(self.base, path)?)).await? {
                    Answer::Done(image) => {
                        let tag = image.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok());
                        let same = tag.is_some_and(|tag| tag.trim_matches('"') == summary.sha256);
                        return Ok(if same { Attempt::Complete(summary) } else { Attempt::Lost });
                    }
                    Answer::Away(cause) => patience.wait(cause).await?,
                    Answer::Lost | Answer::Offset(_) => return Ok(Attempt::Lost),
                },
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience::new(shown(self.base), self.patience)
    }

    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        self.client.request(method, url).bearer_auth(self.token.expose_secret())
    }

    async fn send(&self, request: RequestBuilder) -> Result<Answer, PublishError> {
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Ok(Answer::Away(error.without_url().into())),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(Answer::Done(response));
        }
        if let Some(has) = offset_of(&response)
            && status == StatusCode::CONFLICT
        {
            return Ok(Answer::Offset(has));
        }
        let target = || shown(self.base);
        let text = response.text().await.unwrap_or_default();
        let answer = format!("{status}: {}", crate::contract::shorten(text.trim(), 500));
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(PublishError::CredentialsRefused { target: target(), answer })
            }
            StatusCode::NOT_FOUND => Ok(Answer::Lost),
            StatusCode::GONE => Err(PublishError::Superseded { target: target() }),
            StatusCode::UNPROCESSABLE_ENTITY => Err(PublishError::Corrupted { target: target(), answer }),
            StatusCode::INSUFFICIENT_STORAGE => Err(PublishError::Full { target: target(), answer }),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Ok(Answer::Away(answer.into())),
            _ if status.is_server_error() => Ok(Answer::Away(answer.into())),
            _ => Err(PublishError::Refused { target: target(), answer }),
        }
    }
}

fn offset_of(response: &Response) -> Option<u64> {
    response.headers().get(UPLOAD_OFFSET)?.to_str().ok()?.parse().ok()
}

/// Bytes that the server has not acknowledged.
struct Chunk {
    offset: u64,
    pieces: Vec<Bytes>,
}

impl Chunk {
    async fn read(bytes: &mut PackagedBytes, offset: u64) -> std::io::Result<Self> {
        let mut chunk = Self { offset, pieces: vec![] };
        while chunk.len() < CHUNK
            && let Some(piece) = bytes.try_next().await?
        {
            chunk.pieces.push(piece);
        }
        Ok(chunk)
    }

    fn len(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn end(&self) -> u64 {
        self.offset + self.len() as u64
    }

    /// Forgets what lies before `offset`.
    fn advance(&mut self, offset: u64) {
        let mut behind = usize::try_from(offset - self.offset).unwrap_or(usize::MAX);
        self.pieces.retain_mut(|piece| {
            let skipped = behind.min(piece.len());
            behind -= skipped;
            let _ = piece.split_to(skipped);
            !piece.is_empty()
        });
        self.offset = offset;
    }

    /// The bytes, shared and not copied.
    fn body(&self) -> Body {
        let pieces: Vec<std::io::Result<Bytes>> = self.pieces.iter().cloned().map(Ok).collect();
        Body::wrap_stream(futures::stream::iter(pieces))
    }
}
