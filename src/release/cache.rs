//! Reads documents, keeps the few that were read last, and reads each only once at a time.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use reqwest::Client;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use url::Url;

use super::{LARGEST_DOCUMENT, ReleaseError, documents::Document};
use crate::{
    fetch::{Patience, TransportError, document, shown},
    reach::Reach,
};

/// A release is three manifests and a few checksum files; this is enough for some ten releases in use.
const MOST_DOCUMENTS: usize = 64;

/// Tells the content of one document from another's: its SHA-256.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Version([u8; 32]);

/// Documents by URL.
#[derive(Debug)]
pub(super) struct Cache {
    client: Client,
    pub(super) patience: Patience,
    pub(super) fresh: Duration,
    pub(super) local_files: bool,
    pub(super) reach: Reach,
    slots: Mutex<HashMap<Url, Entry>>,
}

#[derive(Debug)]
struct Entry {
    slot: Arc<Slot>,
    used: Instant,
}

/// One document. Who reads it holds the lock, so that the others wait for the result.
type Slot = tokio::sync::Mutex<State>;

/// A document that may still be what the server has, and its entity tag.
type Kept<D> = (Arc<D>, Version, String);

#[derive(Debug, Default)]
enum State {
    #[default]
    Empty,
    Read {
        document: Arc<dyn Any + Send + Sync>,
        version: Version,
        etag: Option<String>,
        checked: Instant,
    },
    /// Kept for those who waited while it failed; whoever comes later tries again.
    Failed {
        error: ReleaseError,
        at: Instant,
    },
}

impl Cache {
    pub(super) fn new(client: Client, fresh: Duration) -> Self {
        Self {
            client,
            patience: Patience::default(),
            fresh,
            local_files: false,
            reach: Reach::Anywhere,
            slots: Mutex::default(),
        }
    }

    /// The document at `url`, as it is now or was less than [`Self::fresh`] ago.
    pub(super) async fn get<D: Document>(&self, url: &Url) -> Result<Arc<D>, ReleaseError> {
        if url.scheme() == "file" {
            return self.read_file(url).await;
        }
        self.get_version(url).await.map(|(document, _)| document)
    }

    /// The same, of an `http` or `https` URL, with what tells it from an earlier one.
    pub(super) async fn get_version<D: Document>(&self, url: &Url) -> Result<(Arc<D>, Version), ReleaseError> {
        let asked = Instant::now();
        let slot = self.slot(url);
        let mut state = slot.lock().await;
        let mut kept: Option<Kept<D>> = None;
        match &*state {
            State::Read { document, version, etag, checked } => {
                if let Ok(document) = Arc::clone(document).downcast::<D>() {
                    if *checked >= asked || checked.elapsed() < self.fresh {
                        return Ok((document, *version));
                    }
                    kept = etag.clone().map(|etag| (document, *version, etag));
                }
            }
            State::Failed { error, at } if *at >= asked => return Err(error.clone()),
            State::Failed { .. } | State::Empty => {}
        }
        let read = self.download(url, kept).await;
        *state = match &read {
            Ok((document, version, etag)) => State::Read {
                document: document.clone(),
                version: *version,
                etag: etag.clone(),
                checked: Instant::now(),
            },
            Err(error) => State::Failed { error: error.clone(), at: Instant::now() },
        };
        read.map(|(document, version, _)| (document, version))
    }

    fn slot(&self, url: &Url) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MOST_DOCUMENTS && !slots.contains_key(url) {
            let idle = slots.iter().filter(|(_, entry)| Arc::strong_count(&entry.slot) == 1);
            if let Some(oldest) = idle.min_by_key(|(_, entry)| entry.used).map(|(url, _)| url.clone()) {
                slots.remove(&oldest);
            }
        }
        let now = Instant::now();
        let entry = slots.entry(url.clone()).or_insert_with(|| Entry { slot: Arc::default(), used: now });
        entry.used = now;
        Arc::clone(&entry.slot)
    }

    async fn download<D: Document>(
        &self,
        url: &Url,
        kept: Option<Kept<D>>,
    ) -> Result<(Arc<D>, Version, Option<String>), ReleaseError> {
        self.reach.check(url).map_err(|source| TransportError::AddressForbidden { url: shown(url), source })?;
        let etag = kept.as_ref().map(|(_, _, etag)| etag.as_str());
        let answer = document(&self.client, url, etag, LARGEST_DOCUMENT, &self.patience).await?;
        match (answer, kept) {
            (Some(answer), _) => {
                let version = Version(Sha256::digest(&answer.bytes).into());
                Ok((parse(answer.bytes, url).await?, version, answer.etag))
            }
            (None, Some((document, version, etag))) => Ok((document, version, Some(etag))),
            // Nothing kept means no condition was sent, and then there is always a body.
            (None, None) => Err(invalid::<D>(url, "it is empty".into())),
        }
    }

    async fn read_file<D: Document>(&self, url: &Url) -> Result<Arc<D>, ReleaseError> {
        let Some(path) = self.local_files.then(|| url.to_file_path().ok()).flatten() else {
            return Err(ReleaseError::LocalFile { url: shown(url) });
        };
        let read = async {
            let mut bytes = Vec::new();
            let file = tokio::fs::File::open(&path).await?;
            file.take(LARGEST_DOCUMENT + 1).read_to_end(&mut bytes).await?;
            Ok(bytes)
        };
        let bytes: Vec<u8> =
            read.await.map_err(|error| ReleaseError::ReadFile { path: path.clone(), source: Arc::new(error) })?;
        if bytes.len() as u64 > LARGEST_DOCUMENT {
            return Err(TransportError::TooLarge { url: shown(url), limit: LARGEST_DOCUMENT }.into());
        }
        parse(bytes, url).await
    }
}

/// Reads a document on a thread that may be busy for long.
async fn parse<D: Document>(bytes: Vec<u8>, url: &Url) -> Result<Arc<D>, ReleaseError> {
    match tokio::task::spawn_blocking(move || D::read(&bytes)).await {
        Ok(Ok(document)) => Ok(Arc::new(document)),
        Ok(Err(problem)) => Err(invalid::<D>(url, problem)),
        Err(_) => Err(invalid::<D>(url, "it can not be parsed".into())),
    }
}

fn invalid<D: Document>(url: &Url, problem: String) -> ReleaseError {
    ReleaseError::InvalidDocument { url: shown(url), expected: D::EXPECTED, problem }
}
