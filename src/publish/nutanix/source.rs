//! The image that a build starts from: found by its name, looked at, downloaded.
//!
//! Prism Central keeps disks raw and gives them raw, whatever they were uploaded as. Its checksum is of the file that was
//! uploaded, so it tells about the bytes that come only where they are that file.

use std::{
    error::Error,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::StreamExt;
use reqwest::Response;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use url::Url;

use super::{
    NutanixError,
    documents::{COMPLETE, Checksum, Entity},
    images,
    place::near,
    prism::{Answer, Prism},
};

/// How often a download is begun that breaks off in the middle.
const DOWNLOADS: usize = 3;
/// Pieces on their way from the network to the disk.
const QUEUE: usize = 16;
/// So many zeros become a hole.
const HOLE: usize = 64 * 1024;
const QCOW2: &[u8] = b"QFI\xfb";
/// Where a qcow2 says how large its disk is (QEMU's `docs/interop/qcow2.txt`).
const QCOW2_SIZE: std::ops::Range<usize> = 24..32;
/// Where a disk that starts a machine by its BIOS is signed.
const SIGNATURE: std::ops::Range<usize> = 510..512;

/// A disk that came from Prism Central.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SourceDisk {
    /// Where it came from.
    pub url: Url,
    /// Of its bytes, as `sha256:…`.
    pub digest: String,
    /// Whether it is a qcow2, and not raw.
    pub is_qcow2: bool,
}

/// The one image of the name that a build can start from, or what is wrong with the name.
pub(super) async fn find(prism: &Prism, name: &str) -> Result<Result<Entity, String>, NutanixError> {
    let named = images::named(prism, name).await?;
    Ok(match &named[..] {
        [image] => match problem(image) {
            None => Ok(image.clone()),
            Some(problem) => Err(format!("sourceImageName `{name}`: {problem}")),
        },
        [] => {
            let all = prism.list("image", None).await?.into_iter().map(|image| image.status.name);
            Err(format!("sourceImageName `{name}`: {}", near(name, all.collect())))
        }
        several => {
            let uuids: Vec<_> = several.iter().map(|image| image.metadata.uuid.as_str()).collect();
            Err(format!("sourceImageName `{name}`: there are several, give one another name: {}", uuids.join(", ")))
        }
    })
}

/// Why nothing can start from an image.
fn problem(image: &Entity) -> Option<String> {
    let status = &image.status;
    if status.resources.image_type != "DISK_IMAGE" {
        let kind = if status.resources.image_type.is_empty() { "no disk" } else { &status.resources.image_type };
        return Some(format!("it is {kind}, name a DISK_IMAGE"));
    }
    if status.state != COMPLETE {
        return Some(format!("its state is {}, wait until it is {COMPLETE}, or name another one", status.state));
    }
    status.resources.size_bytes.is_none().then(|| "it has no contents, name another one".to_owned())
}

/// Bytes of the disk in a file that vendors publish for machines: a qcow2 or a raw disk.
pub(super) fn disk_size(path: &Path) -> Result<u64, NutanixError> {
    let failed = |source| NutanixError::Disk { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mut header = [0; 512];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(failed(error)),
        // A file that is shorter has zeros there, for this purpose.
        Ok(()) | Err(_) => {}
    }
    if header.starts_with(QCOW2) {
        let size = header[QCOW2_SIZE].iter().fold(0, |size, byte| size << 8 | u64::from(*byte));
        return Ok(size);
    }
    if header[SIGNATURE] != [0x55, 0xaa] {
        return Err(NutanixError::NotADisk);
    }
    file.metadata().map(|metadata| metadata.len()).map_err(failed)
}

/// Downloads an image to the new file `path`, with holes where it has zeros. `tell` is told the share that is there.
pub(super) async fn download(
    prism: &Prism,
    image: &Entity,
    path: &Path,
    tell: impl Fn(f64),
) -> Result<SourceDisk, NutanixError> {
    let (uuid, resources) = (&image.metadata.uuid, &image.status.resources);
    let size = resources.size_bytes.unwrap_or_default();
    let corrupted = |answer: String| NutanixError::SourceCorrupted {
        server: prism.server.clone(),
        name: image.status.name.clone(),
        answer,
    };
    let (mut patience, mut broken) = (prism.patience(), 0);
    loop {
        let (cause, pause) = match prism.file(uuid).await? {
            Answer::Done(response) => match receive(response, path, resources.checksum.as_ref(), size, &tell).await? {
                Ok(received) if received.is_qcow2 || received.size == size => {
                    return received.judge(prism, image, resources.checksum.as_ref());
                }
                Ok(received) => {
                    broken += 1;
                    (format!("{} bytes came, and the disk has {size}", received.size).into(), None)
                }
                Err(cause) => {
                    broken += 1;
                    (cause, None)
                }
            },
            Answer::Missing => return Err(corrupted(format!("somebody has removed the image {uuid}"))),
            Answer::Away { cause, pause } => (cause, Some(pause)),
        };
        if broken == DOWNLOADS {
            let answer = format!("the download broke off {DOWNLOADS} times, the last time because: {cause}");
            return Err(corrupted(answer));
        }
        if pause.is_none() {
            patience.renew();
        }
        patience.wait_at_least(pause.unwrap_or_default(), cause).await?;
    }
}

/// What came.
struct Received {
    size: u64,
    is_qcow2: bool,
    sha256: String,
    /// In the algorithm of the checksum that Prism Central has.
    checksum: Option<String>,
}

impl Received {
    fn judge(self, prism: &Prism, image: &Entity, told: Option<&Checksum>) -> Result<SourceDisk, NutanixError> {
        let name = &image.status.name;
        match (&self.checksum, told) {
            (Some(got), Some(Checksum { checksum_value: told, .. })) if !got.eq_ignore_ascii_case(told) => {
                if self.is_qcow2 {
                    return Err(NutanixError::SourceCorrupted {
                        server: prism.server.clone(),
                        name: name.clone(),
                        answer: format!("its checksum is {told} and that of what came is {got}"),
                    });
                }
                tracing::warn!(
                    "the checksum that {} has of `{name}` ({told}) is not that of its disk ({got}): it is of the file \
                     that the image was made from, if that was not a raw disk",
                    prism.server
                );
            }
            _ => {}
        }
        Ok(SourceDisk {
            url: prism.file_url(&image.metadata.uuid),
            digest: format!("sha256:{}", self.sha256),
            is_qcow2: self.is_qcow2,
        })
    }
}

type Cause = Box<dyn Error + Send + Sync>;

/// Writes a whole answer. The inner error is about the network.
async fn receive(
    response: Response,
    path: &Path,
    checksum: Option<&Checksum>,
    size: u64,
    tell: &impl Fn(f64),
) -> Result<Result<Received, Cause>, NutanixError> {
    let failed = |source| NutanixError::Disk { path: path.to_owned(), source };
    let (pieces, queue) = mpsc::channel(QUEUE);
    let (place, algorithm) = (path.to_owned(), checksum.map(|checksum| checksum.checksum_algorithm.clone()));
    let writer = tokio::task::spawn_blocking(move || write(&place, algorithm.as_deref(), queue));
    let (mut stream, mut done, mut cut) = (response.bytes_stream(), 0_u64, None);
    while let Some(piece) = stream.next().await {
        match piece {
            Ok(piece) => {
                done += piece.len() as u64;
                tell(super::upload::share(done, size));
                // A writer that has ended says why.
                if pieces.send(piece).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                cut = Some(error.without_url().into());
                break;
            }
        }
    }
    drop(pieces);
    let written = writer.await.map_err(|error| failed(io::Error::other(error)))?;
    let received = written.map_err(failed)?;
    Ok(cut.map_or(Ok(received), Err))
}

fn write(path: &PathBuf, algorithm: Option<&str>, mut queue: mpsc::Receiver<Bytes>) -> io::Result<Received> {
    let file = File::create(path)?;
    let (mut sha256, mut sha1) = (Sha256::new(), (algorithm == Some("SHA_1")).then(Sha1::new));
    let (mut size, mut beginning) = (0_u64, Vec::<u8>::new());
    while let Some(bytes) = queue.blocking_recv() {
        sha256.update(&bytes);
        if let Some(sha1) = &mut sha1 {
            sha1.update(&bytes);
        }
        beginning.extend(bytes.iter().take(QCOW2.len() - beginning.len()));
        for piece in bytes.chunks(HOLE) {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, size)?;
            }
            size += piece.len() as u64;
        }
    }
    file.set_len(size)?;
    let sha256 = hex::encode(sha256.finalize());
    let checksum = match algorithm {
        Some("SHA_256") => Some(sha256.clone()),
        _ => sha1.map(|sha1| hex::encode(sha1.finalize())),
    };
    Ok(Received { size, is_qcow2: beginning == QCOW2, sha256, checksum })
}
