//! One HTTP request, with every way it can fail told apart: what another attempt may cure, what it can not, what to do.

use std::{
    error::Error,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use backon::{ExponentialBuilder, Retryable};
use jiff::{Timestamp, fmt::rfc2822};
use reqwest::{
    Client, RequestBuilder, Response, StatusCode,
    header::{ACCEPT_ENCODING, ETAG, HeaderMap, IF_NONE_MATCH, RETRY_AFTER},
};
use url::Url;

use crate::{
    contract::{Classified, FailureClass},
    reach::{Forbidden, forbidden},
};

/// A server that asks for more time than this is asked again after it all the same.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(120);

/// Why a request brought nothing. URLs are shown without credentials and query.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TransportError {
    #[error("{url} does not exist (HTTP status {status}): check the URL, and that a private mirror holds this file")]
    NotFound { url: String, status: u16 },
    #[error("{url} may not be read (HTTP status {status}): let the build download it, or name a mirror that does")]
    Refused { url: String, status: u16 },
    #[error("the proxy refuses to fetch {url} (HTTP status 407): put its user name and password into the proxy URL")]
    ProxyAuthentication { url: String },
    #[error("{url} answers with HTTP status {status}, which is not a file: check the URL")]
    UnexpectedStatus { url: String, status: u16 },
    #[error("{url} redirects without end: check the URL")]
    TooManyRedirects { url: String, source: Arc<reqwest::Error> },
    #[error("the certificate of {url} is not trusted: add its authority to the trust bundle")]
    Untrusted { url: String, source: Arc<reqwest::Error> },
    #[error("{url} is not asked: {source}; write the URL of a server that others reach too")]
    AddressForbidden { url: String, source: Forbidden },
    #[error("{url} is larger than {limit} bytes, which no such document is: check the URL")]
    TooLarge { url: String, limit: u64 },
    #[error("{url} can not be downloaded: only http and https are supported")]
    UnsupportedScheme { url: String },
    #[error("the server of {url} failed (HTTP status {status})")]
    ServerError { url: String, status: u16, retry_after: Option<Duration> },
    #[error("can not reach the server of {url}: check the name, the network and the proxy")]
    Unreachable { url: String, source: Arc<reqwest::Error> },
    #[error("the server of {url} stopped answering")]
    Timeout { url: String, source: Arc<reqwest::Error> },
    #[error("the server of {url} sent only {bytes} bytes in {seconds} s")]
    TooSlow { url: String, bytes: u64, seconds: u64 },
    #[error("the connection broke while {url} was downloaded")]
    Broken { url: String, source: Arc<reqwest::Error> },
}

impl Classified for TransportError {
    fn class(&self) -> FailureClass {
        match self {
            Self::NotFound { .. }
            | Self::Refused { .. }
            | Self::ProxyAuthentication { .. }
            | Self::UnexpectedStatus { .. }
            | Self::TooManyRedirects { .. }
            | Self::Untrusted { .. }
            | Self::AddressForbidden { .. }
            | Self::TooLarge { .. }
            | Self::UnsupportedScheme { .. } => FailureClass::BadInput,
            Self::ServerError { .. }
            | Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::TooSlow { .. }
            | Self::Broken { .. } => FailureClass::Transient,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "NotFound",
            Self::Refused { .. } => "AccessDenied",
            Self::ProxyAuthentication { .. } => "ProxyAuthenticationRequired",
            Self::UnexpectedStatus { .. } => "UnexpectedStatus",
            Self::TooManyRedirects { .. } => "TooManyRedirects",
            Self::Untrusted { .. } => "UntrustedCertificate",
            Self::AddressForbidden { .. } => "AddressForbidden",
            Self::TooLarge { .. } => "DocumentTooLarge",
            Self::UnsupportedScheme { .. } => "UnsupportedScheme",
            Self::ServerError { .. } => "ServerError",
            Self::Unreachable { .. } => "ServerUnreachable",
            Self::Timeout { .. } => "ServerTimeout",
            Self::TooSlow { .. } => "ServerTooSlow",
            Self::Broken { .. } => "ConnectionBroken",
        }
    }
}

impl TransportError {
    /// What the client's error means for a request of `url`.
    pub(crate) fn from_client(error: reqwest::Error, url: &Url) -> Self {
        // The client's own text would show the URL with its credentials.
        let source = Arc::new(error.without_url());
        let url = shown(url);
        if let Some(forbidden) = forbidden(&source) {
            Self::AddressForbidden { url, source: forbidden.clone() }
        } else if distrusts_certificate(&source) {
            Self::Untrusted { url, source }
        } else if source.is_redirect() {
            Self::TooManyRedirects { url, source }
        } else if source.is_connect() {
            Self::Unreachable { url, source }
        } else if source.is_timeout() {
            Self::Timeout { url, source }
        } else {
            Self::Broken { url, source }
        }
    }

    /// What an answer with this status means, if it is not the file.
    fn from_status(status: StatusCode, headers: &HeaderMap, url: &Url) -> Self {
        let (url, code) = (shown(url), status.as_u16());
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Self::NotFound { url, status: code },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Self::Refused { url, status: code },
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Self::ProxyAuthentication { url },
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
                Self::ServerError { url, status: code, retry_after: retry_after(headers, Timestamp::now()) }
            }
            status if status.is_server_error() => {
                Self::ServerError { url, status: code, retry_after: retry_after(headers, Timestamp::now()) }
            }
            _ => Self::UnexpectedStatus { url, status: code },
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::ServerError { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// How a URL is shown to people: no user name, no password, and no query, which carries the signature of a presigned URL.
pub(crate) fn shown(url: &Url) -> String {
    if url.cannot_be_a_base() {
        // `user:password@host` is a URL too, of the scheme `user`.
        return format!("{}:…", url.scheme());
    }
    let mut url = url.clone();
    // Both fail only for URLs that can have no credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    if url.query().is_some() {
        url.set_query(Some("…"));
    }
    url.set_fragment(None);
    url.to_string().replace("%E2%80%A6", "…")
}

/// Whether a request failed because of the server's certificate.
pub(crate) fn distrusts_certificate(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if matches!(error.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

/// The header `Retry-After`, in seconds or as a date.
pub(crate) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if let Ok(seconds) = value.parse() {
        Duration::from_secs(seconds)
    } else {
        let date = rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
        Duration::try_from(date.duration_since(now)).unwrap_or_default()
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// How often and how long transient faults are waited out, and how slow a server may be.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts after the first one.
    pub retries: usize,
    /// Wait before the second attempt; it doubles from one to the next. Up to as much again is added at random.
    pub first_delay: Duration,
    /// Longest wait, before the random part.
    pub longest_delay: Duration,
    /// A server that sends less than [`Self::slowest_bytes`] in this time is given up.
    pub slow_after: Duration,
    /// Fewest bytes in [`Self::slow_after`].
    pub slowest_bytes: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            retries: 5,
            first_delay: Duration::from_millis(500),
            longest_delay: Duration::from_secs(15),
            slow_after: Duration::from_secs(60),
            slowest_bytes: 16 * 1024,
        }
    }
}

impl Patience {
    pub(crate) fn backoff(&self) -> ExponentialBuilder {
        ExponentialBuilder::new()
            .with_min_delay(self.first_delay)
            .with_max_delay(self.longest_delay)
            .with_max_times(self.retries)
            .with_jitter()
    }
}

/// Watches that a body keeps a minimum speed.
#[derive(Debug)]
pub(crate) struct SpeedWatch {
    since: Instant,
    bytes: u64,
}

impl SpeedWatch {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), bytes: 0 }
    }

    /// Counts `bytes` more.
    pub(crate) fn count(&mut self, bytes: u64, patience: &Patience, url: &Url) -> Result<(), TransportError> {
        self.bytes += bytes;
        let elapsed = self.since.elapsed();
        if elapsed < patience.slow_after {
            return Ok(());
        }
        if self.bytes < patience.slowest_bytes {
            return Err(TransportError::TooSlow { url: shown(url), bytes: self.bytes, seconds: elapsed.as_secs() });
        }
        *self = Self::new();
        Ok(())
    }
}

/// Sends a request for a file as it is: content encodings would change its digest. Any answer is handed on.
pub(crate) async fn send(request: RequestBuilder, url: &Url) -> Result<Response, TransportError> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(TransportError::UnsupportedScheme { url: shown(url) });
    }
    let answer = request.header(ACCEPT_ENCODING, "identity").send().await;
    answer.map_err(|error| TransportError::from_client(error, url))
}

/// The answer if its status is one of success.
pub(crate) fn successful(response: Response, url: &Url) -> Result<Response, TransportError> {
    if response.status().is_success() {
        Ok(response)
    } else {
        Err(TransportError::from_status(response.status(), response.headers(), url))
    }
}

/// A small file.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) bytes: Vec<u8>,
    pub(crate) etag: Option<String>,
}

/// Fetches a file of at most `limit` bytes into memory, through transient faults. `None`: it still has the `etag`.
pub(crate) async fn document(
    client: &Client,
    url: &Url,
    etag: Option<&str>,
    limit: u64,
    patience: &Patience,
) -> Result<Option<Document>, TransportError> {
    (|| document_once(client, url, etag, limit, patience))
        .retry(patience.backoff())
        .when(|error| error.class() == FailureClass::Transient)
        .adjust(|error, wait| Some(wait?.max(error.retry_after().unwrap_or_default())))
        .notify(|error, wait| tracing::warn!(%error, ?wait, "the download failed; it is tried again"))
        .await
}

async fn document_once(
    client: &Client,
    url: &Url,
    etag: Option<&str>,
    limit: u64,
    patience: &Patience,
) -> Result<Option<Document>, TransportError> {
    let mut request = client.get(url.clone());
    if let Some(etag) = etag {
        request = request.header(IF_NONE_MATCH, etag);
    }
    let response = send(request, url).await?;
    if etag.is_some() && response.status() == StatusCode::NOT_MODIFIED {
        return Ok(None);
    }
    let mut response = successful(response, url)?;
    let too_large = || TransportError::TooLarge { url: shown(url), limit };
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).map(ToOwned::to_owned);
    let (mut bytes, mut speed) = (Vec::new(), SpeedWatch::new());
    while let Some(chunk) = response.chunk().await.map_err(|error| TransportError::from_client(error, url))? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
        speed.count(chunk.len() as u64, patience, url)?;
    }
    Ok(Some(Document { bytes, etag }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_shown_without_credentials_and_signatures() {
        let url = Url::parse("https://user:secret@example.com/a%20b/c.tar?X-Amz-Signature=secret#part").unwrap();
        assert_eq!(shown(&url), "https://example.com/a%20b/c.tar?…");
        assert_eq!(shown(&Url::parse("user:secret@example.com").unwrap()), "user:…");
        assert_eq!(shown(&Url::parse("file:///etc/x.yaml").unwrap()), "file:///etc/x.yaml");
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_date_and_is_bounded() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let wait = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("Thu, 01 Jan 2026 00:00:09 GMT"), Some(Duration::from_secs(9)));
        assert_eq!(wait("Wed, 31 Dec 2025 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("86400"), Some(LONGEST_RETRY_AFTER));
        assert_eq!(wait("soon"), None);
    }
}
