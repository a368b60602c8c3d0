//! One file: from the first byte to its place in the cache, through broken connections.

use std::{
    io::{self, Seek, Write},
    path::PathBuf,
    time::Duration,
};

use backon::BackoffBuilder;
use bytes::Bytes;
use reqwest::{
    Client, Response, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, IF_RANGE, RANGE},
};
use tokio::sync::mpsc;

use super::{
    ChecksumMismatch, FetchError, Patience, TransportError, Wanted,
    cache::{Cache, Part},
    digest::Hasher,
    transport::{SpeedWatch, send, shown, successful},
};
use crate::contract::{Classified, FailureClass};

/// Chunks on their way from the network to the disk.
const QUEUE: usize = 16;
/// So many new bytes show that a server works: the count of failures begins anew.
const RENEWING: u64 = 1024 * 1024;

/// A download under way.
pub(super) struct Download<'d, P> {
    client: &'d Client,
    cache: &'d Cache,
    patience: &'d Patience,
    wanted: &'d Wanted<'d>,
    on_progress: &'d P,
    /// What the last answer said about the file.
    told: Told,
    /// An earlier process began the file, and no answer was about it yet.
    found: bool,
}

#[derive(Debug, Default)]
struct Told {
    /// A strong entity tag: whether a later answer is about the same bytes.
    etag: Option<String>,
    content_type: String,
    content_encoding: String,
    /// Size of the whole file.
    total: Option<u64>,
}

impl<'d, P: Fn(u64, Option<u64>)> Download<'d, P> {
    pub(super) fn new(
        client: &'d Client,
        cache: &'d Cache,
        patience: &'d Patience,
        wanted: &'d Wanted<'d>,
        on_progress: &'d P,
    ) -> Self {
        Self { client, cache, patience, wanted, on_progress, told: Told::default(), found: false }
    }

    /// Brings the file into the cache.
    pub(super) async fn run(mut self) -> Result<PathBuf, FetchError> {
        // The path stays here: it goes at once when this is dropped, whatever the writer is about.
        let (mut part, path) = self.cache.begin(&self.wanted.digest).await?;
        self.found = part.written > 0;
        let (mut waits, mut farthest) = (self.patience.backoff().build(), 0);
        loop {
            let (back, result) = self.transfer(part).await?;
            part = back;
            let Err(error) = result else { break };
            if part.written >= farthest + RENEWING {
                waits = self.patience.backoff().build();
                farthest = part.written;
            }
            let wait = waits.next().filter(|_| error.class() == FailureClass::Transient);
            let Some(wait) = wait else {
                return Err(FetchError::Download { name: self.wanted.name.to_owned(), source: error });
            };
            let wait = wait.max(error.retry_after().unwrap_or_default());
            self.announce_retry(&error, part.written, wait);
            tokio::time::sleep(wait).await;
        }
        let got = part.hasher.finish();
        if got != self.wanted.digest {
            path.discard().map_err(|error| self.cache.unusable(error))?;
            return Err(FetchError::ChecksumMismatch(Box::new(ChecksumMismatch {
                name: self.wanted.name.to_owned(),
                url: shown(self.wanted.url),
                expected: self.wanted.digest.to_string(),
                got: got.to_string(),
                size: part.written,
                hint: self.told.hint(),
            })));
        }
        self.cache.keep(path, &self.wanted.digest)
    }

    fn announce_retry(&self, error: &TransportError, written: u64, wait: Duration) {
        tracing::warn!(name = self.wanted.name, %error, written, ?wait, "the download failed; it is tried again");
    }

    /// One request, for what is still missing. The outer error is about the disk and final.
    async fn transfer(&mut self, mut part: Part) -> Result<(Part, Result<(), TransportError>), FetchError> {
        let response = match self.request(&mut part).await? {
            Ok(response) => response,
            Err(error) => return Ok((part, Err(error))),
        };
        self.told.total = response.content_length().map(|length| part.written + length);
        let missing = self.told.total.map(|total| total - part.written);
        if let (Some(missing), Some(free)) = (missing, self.cache.free())
            && missing > free
        {
            return Err(self.disk_full(part.written));
        }

        let before = part.written;
        let (chunks, queue) = mpsc::channel(QUEUE);
        let writer = tokio::task::spawn_blocking(move || part.write_all(queue));
        let received = self.receive(response, before, chunks).await;
        let (part, written) = writer.await.map_err(|error| self.cache.unusable(io::Error::other(error)))?;
        match written {
            Ok(()) => Ok((part, received)),
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                Err(self.disk_full(part.written))
            }
            Err(error) => Err(self.cache.unusable(error)),
        }
    }

    /// An answer whose body follows what `part` holds, which is emptied if the server can not continue there.
    async fn request(&mut self, part: &mut Part) -> Result<Result<Response, TransportError>, FetchError> {
        let url = self.wanted.url;
        loop {
            let mut request = self.client.get(url.clone());
            // The digest tells in the end whether what was found on the disk is of the same file.
            let resuming = part.written > 0 && (self.found || self.told.etag.is_some());
            if resuming {
                request = request.header(RANGE, format!("bytes={}-", part.written));
                if let Some(etag) = &self.told.etag {
                    request = request.header(IF_RANGE, etag);
                }
            }
            let response = match send(request, url).await {
                Ok(response) => response,
                Err(error) => return Ok(Err(error)),
            };
            let partial = response.status() == StatusCode::PARTIAL_CONTENT;
            if resuming && partial && range_start(response.headers()) == Some(part.written) {
                if std::mem::take(&mut self.found) {
                    self.told = Told::of(&response);
                }
                return Ok(Ok(response));
            }
            if resuming && (partial || response.status() == StatusCode::RANGE_NOT_SATISFIABLE) {
                // Not what was asked for: the next request asks for the whole file.
                part.restart(self.wanted.digest.hasher()).map_err(|error| self.cache.unusable(error))?;
                (self.told, self.found) = (Told::default(), false);
                continue;
            }
            let response = match successful(response, url) {
                Ok(response) if response.status() == StatusCode::OK => response,
                Ok(response) => {
                    let status = response.status().as_u16();
                    return Ok(Err(TransportError::UnexpectedStatus { url: shown(url), status }));
                }
                Err(error) => return Ok(Err(error)),
            };
            part.restart(self.wanted.digest.hasher()).map_err(|error| self.cache.unusable(error))?;
            (self.told, self.found) = (Told::of(&response), false);
            return Ok(Ok(response));
        }
    }

    /// Hands the body on to the writer. A writer that is gone has its own error.
    async fn receive(
        &self,
        mut response: Response,
        before: u64,
        chunks: mpsc::Sender<Bytes>,
    ) -> Result<(), TransportError> {
        let (mut done, mut speed) = (before, SpeedWatch::new());
        (self.on_progress)(done, self.told.total);
        let broken = |error| TransportError::from_client(error, self.wanted.url);
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            let length = chunk.len() as u64;
            if chunks.send(chunk).await.is_err() {
                return Ok(());
            }
            done += length;
            (self.on_progress)(done, self.told.total);
            speed.count(length, self.patience, self.wanted.url)?;
        }
        Ok(())
    }

    /// `written` bytes will be free again when the beginning of the file is removed.
    fn disk_full(&self, written: u64) -> FetchError {
        FetchError::DiskFull {
            name: self.wanted.name.to_owned(),
            dir: self.cache.dir().to_owned(),
            needed: self.told.total,
            free: self.cache.free().unwrap_or_default() + written,
        }
    }
}

impl Told {
    fn of(response: &Response) -> Self {
        let text = |name: HeaderName| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().trim().to_owned()
        };
        let etag = text(ETAG);
        Self {
            etag: etag.starts_with('"').then_some(etag),
            content_type: text(CONTENT_TYPE),
            content_encoding: text(CONTENT_ENCODING),
            total: response.content_length(),
        }
    }

    /// What may explain a wrong digest.
    fn hint(&self) -> String {
        if !self.content_encoding.is_empty() && self.content_encoding != "identity" {
            return format!(" (the server sent it encoded as {}, which it must not)", self.content_encoding);
        }
        if self.content_type.starts_with("text/html") {
            return format!(" (the server sent {}: a page about an error or a login?)", self.content_type);
        }
        String::new()
    }
}

impl Part {
    fn restart(&mut self, hasher: Hasher) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.hasher = hasher;
        self.written = 0;
        Ok(())
    }

    /// Writes and hashes what comes, until there is no more or the disk refuses.
    fn write_all(mut self, mut chunks: mpsc::Receiver<Bytes>) -> (Self, io::Result<()>) {
        while let Some(chunk) = chunks.blocking_recv() {
            if let Err(error) = self.file.write_all(&chunk) {
                return (self, Err(error));
            }
            self.hasher.update(&chunk);
            self.written += chunk.len() as u64;
        }
        (self, Ok(()))
    }
}

/// First byte of a partial answer: `bytes 100-199/200` begins at 100.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
