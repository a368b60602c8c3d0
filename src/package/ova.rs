//! OVA: one tar archive of descriptor, manifest and disk, in this order, so that a reader knows all about the disk before
//! its first byte.
//!
//! Descriptor and manifest tell the VMDK's size and digest, but stand before it. So the first use of a disk makes a pass
//! over it that only measures; its result serves everything that is made from the disk later. Compressing twice costs
//! some seconds of processor time, no room in the work directory, and nothing that has to be removed; the bytes are the
//! same both times, which is checked.

use std::{
    fs::File,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::Sender;

use super::{
    Summary,
    ordered::{Output, nobody_listens},
    ovf::{self, Machine},
    vmdk,
};

/// What is known about the VMDK of a disk once it was made. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured(Arc<Mutex<Option<Summary>>>);

impl Measured {
    pub(super) fn is_known(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Size and digest of the VMDK; makes it once, for nobody, where they are not known. Gives up when nobody listens
    /// to `out` any more.
    pub(super) fn get(
        &self,
        disk: &File,
        name: &str,
        out: &Sender<io::Result<Bytes>>,
        position: &AtomicU64,
    ) -> io::Result<Summary> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(summary) = &*known {
            return Ok(summary.clone());
        }
        let (mut size, mut sha256) = (0, Sha256::new());
        vmdk::write(disk, name, position, |bytes| {
            size += bytes.len() as u64;
            sha256.update(&bytes);
            if out.is_closed() { Err(nobody_listens()) } else { Ok(()) }
        })?;
        let virtual_size = disk.metadata()?.len();
        Ok(known.insert(Summary { size, virtual_size, sha256: hex::encode(sha256.finalize()) }).clone())
    }
}

/// Names of the files of an image.
pub(super) struct Names {
    pub(super) descriptor: String,
    pub(super) manifest: String,
    pub(super) disk: String,
}

impl Names {
    pub(super) fn new(stem: &str) -> Self {
        Self { descriptor: format!("{stem}.ovf"), manifest: format!("{stem}.mf"), disk: format!("{stem}.vmdk") }
    }
}

/// The descriptor and the manifest for a measured VMDK.
pub(super) fn texts(stem: &str, machine: &Machine, vmdk: &Summary) -> io::Result<(String, String)> {
    let names = Names::new(stem);
    let disk = ovf::Disk { file: &names.disk, size: vmdk.size, capacity: vmdk.virtual_size };
    let descriptor = ovf::descriptor(stem, machine, disk)?;
    let digest = hex::encode(Sha256::digest(&descriptor));
    let manifest = format!("SHA256({})= {digest}\nSHA256({})= {}\n", names.descriptor, names.disk, vmdk.sha256);
    Ok((descriptor, manifest))
}

/// Writes `disk` as an OVA into `out`; blocks its thread. `position` follows the disk's bytes that are done, once for
/// each pass.
pub(super) fn write(
    disk: &File,
    stem: &str,
    machine: &Machine,
    measured: &Measured,
    out: &Sender<io::Result<Bytes>>,
    position: &AtomicU64,
) -> io::Result<Summary> {
    let names = Names::new(stem);
    let vmdk = measured.get(disk, &names.disk, out, position)?;
    let (descriptor, manifest) = texts(stem, machine, &vmdk)?;
    let mut head = tar::Builder::new(Vec::new());
    for (name, text) in [(&names.descriptor, &descriptor), (&names.manifest, &manifest)] {
        head.append_data(&mut header(text.len() as u64), name, text.as_bytes())?;
    }
    let mut head = std::mem::take(head.get_mut());
    let mut entry = header(vmdk.size);
    entry.set_path(&names.disk)?;
    entry.set_cksum();
    head.extend(entry.as_bytes());
    let mut output = Output::new(out);
    output.send(Bytes::from(head))?;
    let start = position.load(Ordering::Relaxed);
    let pass = AtomicU64::new(0);
    let mut sha256 = Sha256::new();
    vmdk::write(disk, &names.disk, &pass, |bytes| {
        sha256.update(&bytes);
        position.store(start + pass.load(Ordering::Relaxed), Ordering::Relaxed);
        output.send(bytes)
    })?;
    if hex::encode(sha256.finalize()) != vmdk.sha256 {
        return Err(io::Error::other("the disk changed while it was packaged"));
    }
    let padding = vmdk.size.next_multiple_of(512) - vmdk.size;
    // Two blocks of zeros end an archive.
    output.send(Bytes::from(vec![0; usize::try_from(padding).unwrap_or(0) + 1024]))?;
    Ok(output.finish(vmdk.virtual_size))
}

/// A header in which nothing differs between runs.
fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header
}
