//! Plain HTTP `PUT`, as a `WebDAV` server or a repository manager takes it. Such a server can not resume: when the
//! connection breaks the image is packaged and sent again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use reqwest::{Body, Client, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{PublishError, Step, checksum_line, checksum_name, content_type, patience::Patience, shown};
use crate::{
    contract::{CredentialSlot, shorten},
    package::{ImageSource, PackageError, Summary},
    secret::{Credentials, SecretError},
};

/// How the publisher proves who it is.
pub(super) enum Login {
    Anonymous,
    Token(SecretString),
    Password { username: SecretString, password: SecretString },
}

impl Login {
    pub(super) fn read(credentials: &Credentials, slot: Option<&CredentialSlot>) -> Result<Self, SecretError> {
        let Some(slot) = slot else { return Ok(Self::Anonymous) };
        if let Some(token) = credentials.optional(slot, "token")? {
            return Ok(Self::Token(token));
        }
        Ok(match credentials.optional(slot, "username")? {
            Some(username) => Self::Password { username, password: credentials.require(slot, "password")? },
            None => Self::Anonymous,
        })
    }

    fn add(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Anonymous => request,
            Self::Token(token) => request.bearer_auth(token.expose_secret()),
            Self::Password { username, password } => {
                request.basic_auth(username.expose_secret(), Some(password.expose_secret()))
            }
        }
    }
}

/// How often it is looked whether an upload moves.
const LOOK: Duration = Duration::from_secs(1);

/// What a server took of one attempt.
#[derive(Default)]
struct Sent {
    bytes: Arc<AtomicU64>,
    /// All of it; the server may take its time to answer.
    whole: Arc<AtomicBool>,
}

impl Sent {
    /// Returns when not all is sent and nothing moves for so long.
    async fn stalled(&self, limit: Duration) {
        let (mut before, mut since) = (0, tokio::time::Instant::now());
        loop {
            tokio::time::sleep(LOOK.min(limit)).await;
            let now = self.bytes.load(Ordering::Relaxed);
            if now != before || self.whole.load(Ordering::Relaxed) {
                (before, since) = (now, tokio::time::Instant::now());
            } else if since.elapsed() >= limit {
                return;
            }
        }
    }
}

/// One image on its way to its URL.
pub(super) struct Upload<'p> {
    pub(super) client: &'p Client,
    /// The image's own URL.
    pub(super) url: Url,
    pub(super) login: Login,
    pub(super) cancel: &'p CancellationToken,
    pub(super) patience: Duration,
    pub(super) step: Step,
}

impl Upload<'_> {
    pub(super) async fn run(&self, source: &ImageSource) -> Result<Summary, PublishError> {
        let work = async {
            let summary = self.put_image(source).await?;
            self.put_checksum(source, &summary).await?;
            Ok(summary)
        };
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(PublishError::Cancelled))
    }

    async fn put_image(&self, source: &ImageSource) -> Result<Summary, PublishError> {
        let mut patience = self.patience();
        loop {
            let (bytes, done, summary) = source.open()?.split();
            let (step, sent) = (self.step.clone(), Sent::default());
            let (pieces, end) = (Arc::clone(&sent.bytes), Arc::clone(&sent.whole));
            let bytes = bytes.inspect_ok(move |piece| {
                pieces.fetch_add(piece.len() as u64, Ordering::Relaxed);
                step.report(&done);
            });
            let bytes = bytes.chain(stream::poll_fn(move |_| {
                end.store(true, Ordering::Relaxed);
                Poll::Ready(None)
            }));
            let request = self
                .client
                .put(self.url.clone())
                .header(header::CONTENT_TYPE, content_type(source))
                .body(Body::wrap_stream(bytes));
            let sent = tokio::select! {
                sent = self.send(request) => sent,
                // The connection holds on to the bytes until the kernel gives it up; nobody waits for that.
                () = sent.stalled(self.patience) => {
                    patience.wait(format!("it took no byte for {} s", self.patience.as_secs())).await?;
                    continue;
                }
            };
            let summary = summary.get().await;
            match (sent?, summary) {
                (None, Ok(summary)) => return Ok(summary),
                // The server answered before it had everything, so it can not hold the image.
                (None, Err(PackageError::Stopped)) => patience.wait("it answered before it had the image").await?,
                (_, Err(error @ (PackageError::Read { .. } | PackageError::Write { .. }))) => return Err(error.into()),
                (Some(cause), _) => patience.wait(cause).await?,
            }
        }
    }

    async fn put_checksum(&self, source: &ImageSource, summary: &Summary) -> Result<(), PublishError> {
        let mut url = self.url.clone();
        url.set_path(&checksum_name(self.url.path()));
        let mut patience = self.patience();
        loop {
            let line = checksum_line(summary, source.file_name());
            let request = self.client.put(url.clone()).header(header::CONTENT_TYPE, "text/plain").body(line);
            match self.send(request).await? {
                None => return Ok(()),
                Some(cause) => patience.wait(cause).await?,
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience::new(shown(&self.url), self.patience)
    }

    /// Nothing when the server took it; a reason to try again when it is away.
    async fn send(
        &self,
        request: RequestBuilder,
    ) -> Result<Option<Box<dyn std::error::Error + Send + Sync>>, PublishError> {
        let response = match self.login.add(request).send().await {
            Ok(response) => response,
            Err(error) => return Ok(Some(error.without_url().into())),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(None);
        }
        let target = shown(&self.url);
        let answer = answer(response).await;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(PublishError::CredentialsRefused { target, answer })
            }
            StatusCode::INSUFFICIENT_STORAGE => Err(PublishError::Full { target, answer }),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Ok(Some(answer.into())),
            _ if status.is_server_error() => Ok(Some(answer.into())),
            _ => Err(PublishError::Refused { target, answer }),
        }
    }
}

/// Status and text of an answer, as far as a person wants to read it.
async fn answer(response: Response) -> String {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    format!("{status}: {}", shorten(text.trim(), 500))
}
