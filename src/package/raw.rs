//! A disk as it is. Holes are not read; they are pieces of zeros for whoever takes the bytes.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use super::{
    Summary,
    ordered::Output,
    sparse::{self, Extent},
};

/// Longest piece, in bytes.
const PIECE: usize = 1 << 20;
static ZEROS: [u8; PIECE] = [0; PIECE];

/// Sends `disk` to `out`; blocks its thread until all is taken or the receiver is gone. `position` follows the bytes that
/// are done.
pub(super) fn write(disk: &File, out: &Sender<io::Result<Bytes>>, position: &AtomicU64) -> io::Result<Summary> {
    let size = disk.metadata()?.len();
    let mut output = Output::new(out);
    let mut done = 0;
    // The hole behind the last data ends with the disk.
    let end = Extent { offset: size, len: 0 };
    for extent in sparse::data_extents(disk)?.into_iter().chain([end]) {
        while done < extent.end() {
            let hole = done < extent.offset;
            let until = if hole { extent.offset } else { extent.end() };
            let len = usize::try_from(until - done).unwrap_or(PIECE).min(PIECE);
            output.send(if hole { Bytes::from_static(&ZEROS[..len]) } else { read(disk, done, len)? })?;
            done += len as u64;
            position.store(done, Ordering::Relaxed);
        }
    }
    Ok(output.finish(size))
}

fn read(disk: &File, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut bytes = vec![0; len];
    disk.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.into())
}
