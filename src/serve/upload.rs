//! Unfinished uploads. They survive a restart of the server; the newest upload of a path ends the older ones.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    error::Refusal,
    path::{ImagePath, StorePath},
    store::{self, Details, Published, Replace, Store},
};

/// All unfinished uploads.
#[derive(Debug)]
pub(super) struct Uploads {
    store: Arc<Store>,
    known: Mutex<HashMap<String, Arc<Upload>>>,
}

/// One unfinished upload.
#[derive(Debug)]
pub(super) struct Upload {
    id: String,
    path: ImagePath,
    replace: Replace,
    part: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    len: u64,
    /// Of the first `len` bytes; absent after a restart, until it is needed.
    hasher: Option<Sha256>,
    /// The request that may append: a newer one shuts out an older one that lingers.
    writer: u64,
    ended: bool,
}

/// What is kept on disk beside the bytes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    path: String,
    replace: bool,
}

/// Whether an upload outlives the request that began it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kept {
    UntilComplete,
    ForOneRequest,
}

/// The right to append, until another request takes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writer(u64);

impl Uploads {
    /// Takes up the uploads that an earlier process left.
    pub(super) fn resume(store: Arc<Store>) -> io::Result<Self> {
        let mut known = HashMap::new();
        for entry in fs::read_dir(store.uploads())? {
            let path = entry?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {}
                Some("part") if path.with_extension("json").exists() => {}
                _ => {
                    fs::remove_file(&path)?;
                    continue;
                }
            }
            if path.extension().is_some_and(|extension| extension == "part") {
                continue;
            }
            match Upload::load(&path) {
                Ok(upload) => {
                    known.insert(upload.id.clone(), Arc::new(upload));
                }
                Err(error) => {
                    tracing::info!(path = %path.display(), "dropping an upload that can not go on: {error}");
                    fs::remove_file(&path)?;
                    remove_if_there(&path.with_extension("part"))?;
                }
            }
        }
        Ok(Self { store, known: Mutex::new(known) })
    }

    pub(super) fn find(&self, id: &str) -> Result<Arc<Upload>, Refusal> {
        self.known().get(id).cloned().ok_or(Refusal::NoUpload)
    }

    /// Begins an upload and ends all others of the same path.
    pub(super) fn begin(&self, path: ImagePath, replace: Replace, kept: Kept) -> Result<Arc<Upload>, Refusal> {
        self.store.ensure_space(0)?;
        self.store.check_replace(&path, &replace)?;
        self.end_all(|other| other.path == path)?;
        let id = Uuid::new_v4().simple().to_string();
        let part = self.store.uploads().join(format!("{id}.part"));
        let file = File::options().read(true).write(true).create_new(true).open(&part)?;
        if kept == Kept::UntilComplete {
            let record = Record { path: path.as_str().to_owned(), replace: replace == Replace::Anything };
            let json = serde_json::to_vec(&record).map_err(io::Error::other)?;
            if let Err(error) = fs::write(part.with_extension("json"), json) {
                remove_if_there(&part)?;
                remove_if_there(&part.with_extension("json"))?;
                return Err(error.into());
            }
        }
        let state = State { file, len: 0, hasher: Some(Sha256::new()), writer: 0, ended: false };
        let upload = Arc::new(Upload { id: id.clone(), path, replace, part, state: Mutex::new(state) });
        self.known().insert(id, Arc::clone(&upload));
        Ok(upload)
    }

    /// Appends to an upload; an upload that does not fit on the disk is removed.
    pub(super) fn append(&self, upload: &Upload, writer: Writer, pieces: &[Bytes]) -> Result<u64, Refusal> {
        let result = self.store.ensure_space(0).and_then(|()| upload.append(writer, pieces));
        if matches!(result, Err(Refusal::DiskFull)) {
            self.discard(upload)?;
        }
        result
    }

    /// Verifies a finished upload and publishes its image. A wrong digest removes the upload.
    pub(super) fn complete(
        &self,
        upload: &Upload,
        size: u64,
        sha256: &str,
        uncompressed_size: Option<u64>,
    ) -> Result<Published, Refusal> {
        let mut state = upload.state();
        if state.ended {
            return Err(Refusal::Superseded);
        }
        if state.len != size {
            return Err(Refusal::WrongSize { expected: size, actual: state.len });
        }
        // Whoever still appends is too late.
        state.writer += 1;
        let actual = hex::encode(state.hasher()?.clone().finalize());
        let result = if actual == sha256 {
            let details = Details { sha256: actual, uncompressed_size };
            self.store.publish(&upload.part, &upload.path, &details, &upload.replace)
        } else {
            Err(Refusal::WrongDigest { expected: sha256.to_owned(), actual })
        };
        // After a fault of the disk it may be tried again.
        if !matches!(result, Err(Refusal::Disk(_) | Refusal::DiskFull)) {
            state.ended = true;
            drop(state);
            self.forget(upload)?;
        }
        result
    }

    /// Ends an upload and removes what it left.
    pub(super) fn discard(&self, upload: &Upload) -> Result<(), Refusal> {
        upload.state().ended = true;
        Ok(self.forget(upload)?)
    }

    fn forget(&self, upload: &Upload) -> io::Result<()> {
        self.known().remove(&upload.id);
        upload.remove_files()
    }

    /// Removes a directory's images and unfinished uploads.
    pub(super) fn remove_directory(&self, directory: &StorePath) -> Result<(), Refusal> {
        self.end_all(|upload| upload.path.path().is_in(directory))?;
        self.store.remove(directory)
    }

    /// Removes uploads that nobody went on with for `age`.
    pub(super) fn expire(&self, age: Duration) -> io::Result<()> {
        let known: Vec<_> = self.known().values().cloned().collect();
        for upload in known {
            let idle = fs::metadata(&upload.part).is_ok_and(|part| store::is_older(&part, age));
            if idle || upload.state().ended {
                upload.state().ended = true;
                self.forget(&upload)?;
            }
        }
        Ok(())
    }

    /// Ended uploads stay known until the next [`Uploads::expire`], so that their clients learn what happened.
    fn end_all(&self, condition: impl Fn(&Upload) -> bool) -> io::Result<()> {
        let ending: Vec<_> = self.known().values().filter(|upload| condition(upload)).cloned().collect();
        for upload in ending {
            upload.state().ended = true;
            upload.remove_files()?;
        }
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Arc<Upload>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upload {
    fn load(record: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let Record { path, replace } = serde_json::from_slice(&fs::read(record)?)?;
        let id = record.file_stem().and_then(|stem| stem.to_str()).ok_or("no name")?.to_owned();
        let part = record.with_extension("part");
        let file = File::options().read(true).write(true).open(&part)?;
        let len = file.metadata()?.len();
        let state = State { file, len, hasher: None, writer: 0, ended: false };
        let replace = if replace { Replace::Anything } else { Replace::Nothing };
        Ok(Self { id, path: ImagePath::parse(&path)?, replace, part, state: Mutex::new(state) })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn path(&self) -> &ImagePath {
        &self.path
    }

    /// Bytes that are there.
    pub(super) fn offset(&self) -> Result<u64, Refusal> {
        let state = self.state();
        if state.ended { Err(Refusal::Superseded) } else { Ok(state.len) }
    }

    /// Takes the right to append at `offset`.
    pub(super) fn writer(&self, offset: u64) -> Result<Writer, Refusal> {
        let mut state = self.state();
        if state.ended {
            return Err(Refusal::Superseded);
        }
        if state.len != offset {
            return Err(Refusal::Offset { has: state.len });
        }
        state.writer += 1;
        Ok(Writer(state.writer))
    }

    fn append(&self, writer: Writer, pieces: &[Bytes]) -> Result<u64, Refusal> {
        let mut state = self.state();
        if state.ended {
            return Err(Refusal::Superseded);
        }
        if state.writer != writer.0 {
            return Err(Refusal::Offset { has: state.len });
        }
        state.hasher()?;
        for piece in pieces {
            // A part of the piece may be on disk when this fails; the next attempt overwrites it.
            state.file.write_all_at(piece, state.len)?;
            state.len += piece.len() as u64;
            if let Some(hasher) = &mut state.hasher {
                hasher.update(piece);
            }
        }
        Ok(state.len)
    }

    fn remove_files(&self) -> io::Result<()> {
        remove_if_there(&self.part.with_extension("json"))?;
        remove_if_there(&self.part)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The digest's state, from the file's bytes where it was lost.
    fn hasher(&mut self) -> io::Result<&mut Sha256> {
        if self.hasher.is_none() {
            // A fault while writing may have left bytes that no one was told of.
            self.file.set_len(self.len)?;
            let mut hasher = Sha256::new();
            let mut reader = PositionReader { file: &self.file, position: 0 };
            let mut buffer = vec![0; 1 << 20];
            loop {
                match reader.read(&mut buffer)? {
                    0 => break,
                    read => hasher.update(&buffer[..read]),
                }
            }
            self.hasher = Some(hasher);
        }
        self.hasher.as_mut().ok_or_else(|| io::Error::other("the digest was lost"))
    }
}

/// Reads from the start, whatever the file's own position is.
struct PositionReader<'f> {
    file: &'f File,
    position: u64,
}

impl Read for PositionReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
