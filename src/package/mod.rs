//! Turns a finished raw disk into the file that is published, as a stream. Where the format allows it, nothing is written
//! to disk in between.

mod gzip;
mod ordered;
mod ova;
mod ovf;
mod qcow2;
mod raw;
pub mod sparse;
mod unpack;
pub(crate) mod unvmdk;
mod vmdk;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::{
    sync::mpsc::{Receiver, Sender, channel},
    task::JoinHandle,
};

use self::{
    ordered::Output,
    ova::{Measured, Names},
    qcow2::{Packed, WriteError},
};
pub use self::{
    ovf::{BUILD_PROPERTY, Machine, NETWORK as OVF_NETWORK},
    unpack::unpack,
};
use crate::contract::{Classified, FailureClass};

/// Pieces that wait for the consumer; with the compressor's own bound this keeps a pass below 64 MiB.
const WAITING_PIECES: usize = 4;

/// Why an image could not be packaged.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("can not read the finished disk {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("can not write the packaged image in {}; give the build more disk", .directory.display())]
    Write { directory: PathBuf, source: io::Error },
    #[error("packaging the image was stopped")]
    Stopped,
}

impl Classified for PackageError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Read { .. } | Self::Write { .. } => FailureClass::Environment,
            Self::Stopped => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "DiskUnreadable",
            Self::Write { .. } => "WorkDirectoryUnusable",
            Self::Stopped => "Cancelled",
        }
    }
}

/// What a packaged image is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Summary {
    /// Bytes of the published file.
    pub size: u64,
    /// Bytes of the disk it unpacks to.
    pub virtual_size: u64,
    /// Lower-case hexadecimal SHA-256 of the published file.
    pub sha256: String,
}

/// How a disk is packaged.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Format {
    /// gzip of the raw disk, what Tinkerbell writes to machines.
    RawGz,
    /// A streamOptimized VMDK and the description of a virtual machine for it, what vSphere imports.
    Ova(Arc<Machine>),
    /// qcow2 with compressed clusters, what Prism Central takes.
    Qcow2,
    /// The disk as it is, what the EKS Anywhere tool exports from Prism Central.
    Raw,
    /// No disk but a document about one, as it is.
    Json { media_type: &'static str },
}

impl Format {
    /// The name in status and reports.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::RawGz => "raw.gz",
            Self::Ova(_) => "ova",
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Json { .. } => "json",
        }
    }

    /// What stands between the image's stem and the end of its file name.
    pub const fn extension(&self) -> &'static str {
        match self {
            Self::RawGz => "gz",
            Self::Ova(_) => "ova",
            Self::Qcow2 => "qcow2",
            Self::Raw => "img",
            Self::Json { .. } => "json",
        }
    }

    pub const fn content_type(&self) -> &'static str {
        match self {
            Self::RawGz => "application/gzip",
            Self::Ova(_) => "application/ovf",
            // None is registered.
            Self::Qcow2 | Self::Raw => "application/octet-stream",
            Self::Json { media_type } => media_type,
        }
    }
}

/// A finished disk, and the file it becomes. It can be opened any number of times: the bytes are always the same.
#[derive(Clone, Debug)]
pub struct ImageSource {
    disk: PathBuf,
    stem: String,
    file_name: String,
    format: Format,
    vmdk: Measured,
    qcow2: Packed,
}

impl ImageSource {
    /// `disk` is a raw, possibly sparse file that no one writes to any more; `stem` names the image without extension.
    pub fn new(disk: impl Into<PathBuf>, stem: &str, format: Format) -> Self {
        Self {
            disk: disk.into(),
            stem: stem.to_owned(),
            file_name: format!("{stem}.{}", format.extension()),
            format,
            vmdk: Measured::default(),
            qcow2: Packed::default(),
        }
    }

    pub fn disk(&self) -> &Path {
        &self.disk
    }

    pub fn file_name(&self) -> &str {
        &self.file_name
    }

    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// The parts of an OVA, for places that take them one by one.
    pub fn ova(&self) -> Option<Ova<'_>> {
        match &self.format {
            Format::RawGz | Format::Qcow2 | Format::Raw | Format::Json { .. } => None,
            Format::Ova(machine) => Some(Ova { source: self, machine }),
        }
    }

    /// Starts packaging. Call it in a tokio runtime. Dropping the stream stops the work.
    pub fn open(&self) -> Result<Packaging, PackageError> {
        let (stem, format, vmdk) = (self.stem.clone(), self.format.clone(), self.vmdk.clone());
        let (qcow2, directory) = (self.qcow2.clone(), self.directory().to_owned());
        let passes = match format {
            // Measuring the disk is one more.
            Format::Ova(_) if !vmdk.is_known() => 2,
            // Sending the file is counted as one more.
            Format::Qcow2 if !qcow2.is_known() => 2,
            Format::RawGz | Format::Ova(_) | Format::Qcow2 | Format::Raw | Format::Json { .. } => 1,
        };
        self.start(passes, move |disk, sender, position| match &format {
            Format::RawGz => gzip::compress(disk, sender, position),
            Format::Ova(machine) => ova::write(disk, &stem, machine, &vmdk, sender, position),
            Format::Qcow2 => qcow2.write(disk, &directory, sender, position),
            Format::Raw | Format::Json { .. } => raw::write(disk, sender, position),
        })
    }

    /// What the file will be, before its first byte is wanted. It costs a whole pass over the disk.
    pub async fn summary(&self, on_progress: impl Fn(&Done)) -> Result<Summary, PackageError> {
        let (mut bytes, done, summary) = self.open()?.split();
        // Where the bytes are cut the summary says why.
        while let Some(Ok(_)) = bytes.next().await {
            on_progress(&done);
        }
        summary.get().await
    }

    /// Where the disk is; files that are made on the way are there too.
    fn directory(&self) -> &Path {
        self.disk.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    fn start(
        &self,
        passes: u64,
        work: impl FnOnce(&File, &Sender<io::Result<Bytes>>, &AtomicU64) -> io::Result<Summary> + Send + 'static,
    ) -> Result<Packaging, PackageError> {
        let unreadable = |source| PackageError::Read { path: self.disk.clone(), source };
        let disk = File::open(&self.disk).map_err(unreadable)?;
        let total = disk.metadata().map_err(unreadable)?.len() * passes;
        let done = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = channel(WAITING_PIECES);
        let (position, path, directory) = (Arc::clone(&done), self.disk.clone(), self.directory().to_owned());
        let work = tokio::task::spawn_blocking(move || {
            work(&disk, &sender, &position).map_err(|error| {
                // The consumer learns it too, so that it never takes a cut stream for a whole one.
                let _ = sender.blocking_send(Err(io::Error::new(error.kind(), error.to_string())));
                match error.kind() {
                    io::ErrorKind::BrokenPipe => PackageError::Stopped,
                    _ => match error.downcast() {
                        Ok(WriteError(source)) => PackageError::Write { directory, source },
                        Err(source) => PackageError::Read { path, source },
                    },
                }
            })
        });
        Ok(Packaging { bytes: PackagedBytes(receiver), summary: work, progress: Done { done, total } })
    }
}

/// The parts of an OVA.
#[derive(Clone, Copy, Debug)]
pub struct Ova<'s> {
    source: &'s ImageSource,
    machine: &'s Machine,
}

/// Descriptor and manifest of an OVA, and what they say about its disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OvaTexts {
    pub descriptor: String,
    pub manifest: String,
    /// Of the VMDK.
    pub vmdk: Summary,
}

impl Ova<'_> {
    /// Name of the descriptor's file.
    pub fn descriptor_name(&self) -> String {
        Names::new(&self.source.stem).descriptor
    }

    /// Name of the manifest's file.
    pub fn manifest_name(&self) -> String {
        Names::new(&self.source.stem).manifest
    }

    /// Name of the disk's file.
    pub fn vmdk_name(&self) -> String {
        Names::new(&self.source.stem).disk
    }

    /// Descriptor and manifest; makes a pass over the disk unless one was made before. Dropping the future stops it.
    pub async fn texts(&self) -> Result<OvaTexts, PackageError> {
        let (vmdk, name) = (self.source.vmdk.clone(), self.vmdk_name());
        let (bytes, _, summary) =
            self.source.start(1, move |disk, sender, position| vmdk.get(disk, &name, sender, position))?.split();
        let vmdk = summary.get().await?;
        drop(bytes);
        let (descriptor, manifest) = ova::texts(&self.source.stem, self.machine, &vmdk)
            .map_err(|source| PackageError::Read { path: self.source.disk.clone(), source })?;
        Ok(OvaTexts { descriptor, manifest, vmdk })
    }

    /// Starts packaging the disk alone. Call it in a tokio runtime. Dropping the stream stops the work.
    pub fn open_vmdk(&self) -> Result<Packaging, PackageError> {
        let name = self.vmdk_name();
        self.source.start(1, move |disk, sender, position| {
            let mut output = Output::new(sender);
            vmdk::write(disk, &name, position, |bytes| output.send(bytes))?;
            Ok(output.finish(disk.metadata()?.len()))
        })
    }
}

/// A running pass over a disk.
#[derive(Debug)]
pub struct Packaging {
    bytes: PackagedBytes,
    summary: JoinHandle<Result<Summary, PackageError>>,
    progress: Done,
}

impl Packaging {
    /// The file's bytes, which must be consumed; how far they are; and what they were in the end.
    pub fn split(self) -> (PackagedBytes, Done, PendingSummary) {
        (self.bytes, self.progress, PendingSummary(self.summary))
    }
}

/// Resolves once the bytes were consumed.
#[derive(Debug)]
pub struct PendingSummary(JoinHandle<Result<Summary, PackageError>>);

impl PendingSummary {
    /// The digest and sizes, or why the bytes ended early.
    pub async fn get(self) -> Result<Summary, PackageError> {
        self.0.await.unwrap_or(Err(PackageError::Stopped))
    }
}

/// How far a pass is.
#[derive(Clone, Debug)]
pub struct Done {
    done: Arc<AtomicU64>,
    /// Bytes of the disk, once for each pass.
    total: u64,
}

impl Done {
    /// Share of the work that is done, 0.0 to 1.0.
    #[expect(clippy::cast_precision_loss, reason = "shown as a percentage")]
    pub fn share(&self) -> f64 {
        match self.total {
            0 => 1.0,
            size => self.done.load(Ordering::Relaxed) as f64 / size as f64,
        }
    }
}

/// The packaged file. An error item means that the file is not whole.
#[derive(Debug)]
pub struct PackagedBytes(Receiver<io::Result<Bytes>>);

impl Stream for PackagedBytes {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
