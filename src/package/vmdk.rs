//! A sparse raw disk as a streamOptimized VMDK, in one pass on all cores: the form in which vSphere imports disks.
//!
//! Layout ("Virtual Disk Format 5.0" of the makers of vSphere), in sectors of 512 bytes: header, descriptor, then for every 512 grains of
//! 64 KiB those that hold data, each a zlib stream behind a marker, and the table of where they are; at the end the
//! directory of the tables and a second header that tells where it is. Grains of zeros are left out and holes are not
//! read. The bytes depend on the disk's contents only, not on the number of cores or on where its holes are.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use flate2::{Compress, Compression, FlushCompress, Status};

use super::{
    gzip::{LEVEL, ZEROS},
    ordered::in_order,
    sparse::{self, Extent},
};

const SECTOR: usize = 512;
/// What the header begins with.
pub(super) const MAGIC: [u8; 4] = *b"KDMV";
/// Bytes of the disk that are compressed on their own.
const GRAIN: usize = 64 << 10;
const GRAIN_SECTORS: u64 = (GRAIN / SECTOR) as u64;
/// Grains in one table.
const TABLE: usize = TABLE_ENTRIES as usize;
const TABLE_ENTRIES: u32 = 512;
/// Grains that one worker handles at once. Divides [`TABLE`], so that a piece never spans two tables.
const PIECE_GRAINS: usize = 16;
pub(super) const PIECE: u64 = (PIECE_GRAINS * GRAIN) as u64;
const DESCRIPTOR: usize = 20 * SECTOR;
/// Bytes before the first grain: header, descriptor, padding.
const OVERHEAD: usize = 128 * SECTOR;
/// Line ends are checked, grains are compressed, markers stand before everything.
const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;
/// The directory's place is in the second header.
pub(super) const DIRECTORY_AT_END: u64 = u64::MAX;
/// Kinds of markers before metadata.
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
const MARKER_FOOTER: u32 = 3;

/// Writes `disk` as a VMDK, which its descriptor calls `name`, into `put`; blocks its thread. `position` follows the
/// disk's bytes that are done.
pub(super) fn write(
    disk: &File,
    name: &str,
    position: &AtomicU64,
    mut put: impl FnMut(Bytes) -> io::Result<()> + Send,
) -> io::Result<()> {
    let size = disk.metadata()?.len();
    // Before the first byte leaves: from then on a disk that shrinks is noticed.
    let pieces = Pieces::new(size, sparse::data_extents(disk)?);
    let capacity = size.div_ceil(SECTOR as u64);
    put(head(capacity, name)?)?;
    let mut layout = Layout::new(size.div_ceil(GRAIN as u64));
    in_order(
        pieces,
        || (Deflater(Compress::new(Compression::new(LEVEL), true)), vec![0; GRAIN]),
        |(deflater, buffer), &offset| deflate(disk, size, offset, deflater, buffer),
        |offset, part| {
            layout.append(part, &mut put)?;
            position.store((offset + PIECE).min(size), Ordering::Relaxed);
            Ok(())
        },
    )?;
    position.store(size, Ordering::Relaxed);
    layout.finish(capacity, &mut put)
}

/// The pieces that hold data; everything between is holes.
pub(super) struct Pieces {
    size: u64,
    position: u64,
    extents: std::iter::Peekable<std::vec::IntoIter<Extent>>,
}

impl Pieces {
    pub(super) fn new(size: u64, extents: Vec<Extent>) -> Self {
        Self { size, position: 0, extents: extents.into_iter().peekable() }
    }
}

impl Iterator for Pieces {
    /// Offset of the piece, a multiple of [`PIECE`].
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        while self.extents.next_if(|extent| extent.end() <= self.position).is_some() {}
        let offset = self.extents.peek()?.offset.max(self.position) / PIECE * PIECE;
        self.position = offset + PIECE;
        (offset < self.size).then_some(offset)
    }
}

/// The grains of one piece that hold data, as they stand in the file.
struct Part {
    bytes: Vec<u8>,
    /// Number of each grain on the disk, and the sector in `bytes` where its marker is.
    grains: Vec<(u64, u64)>,
}

fn deflate(disk: &File, size: u64, offset: u64, deflater: &mut Deflater, buffer: &mut [u8]) -> io::Result<Part> {
    let mut part = Part { bytes: vec![], grains: vec![] };
    for start in (offset..size.min(offset + PIECE)).step_by(GRAIN) {
        // The last grain may end behind the disk.
        let len = usize::try_from(size - start).unwrap_or(GRAIN).min(GRAIN);
        let (data, rest) = buffer.split_at_mut(len);
        disk.read_exact_at(data, start)?;
        rest.fill(0);
        if buffer.chunks(ZEROS.len()).all(|chunk| chunk == ZEROS) {
            continue;
        }
        part.grains.push((start / GRAIN as u64, (part.bytes.len() / SECTOR) as u64));
        part.bytes.extend((start / SECTOR as u64).to_le_bytes());
        deflater.grain(buffer, &mut part.bytes)?;
        pad(&mut part.bytes);
    }
    Ok(part)
}

struct Deflater(Compress);

impl Deflater {
    /// Appends the length of the compressed grain and the grain itself.
    fn grain(&mut self, data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let length_at = out.len();
        out.extend([0; 4]);
        self.0.reset();
        loop {
            out.reserve(GRAIN / 2);
            let taken = usize::try_from(self.0.total_in()).unwrap_or(usize::MAX);
            let rest = data.get(taken..).unwrap_or_default();
            let status = self.0.compress_vec(rest, out, FlushCompress::Finish).map_err(io::Error::other)?;
            if status == Status::StreamEnd {
                break;
            }
        }
        let length = u32::try_from(self.0.total_out()).map_err(io::Error::other)?;
        out[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
        Ok(())
    }
}

/// Where everything is in the file.
struct Layout {
    /// The sector at which the next byte goes.
    sector: u64,
    /// Sectors of the tables, 0 for those that have no grain.
    directory: Vec<u32>,
    /// Sectors of the grains of the table that is being filled.
    table: Vec<u32>,
    number: usize,
}

impl Layout {
    fn new(grains: u64) -> Self {
        let tables = usize::try_from(grains.div_ceil(TABLE as u64)).unwrap_or(usize::MAX);
        Self { sector: (OVERHEAD / SECTOR) as u64, directory: vec![0; tables], table: vec![0; TABLE], number: 0 }
    }

    fn append(&mut self, part: Part, put: &mut impl FnMut(Bytes) -> io::Result<()>) -> io::Result<()> {
        for (grain, at) in &part.grains {
            let grain = usize::try_from(*grain).map_err(io::Error::other)?;
            if grain / TABLE != self.number {
                self.flush_table(put)?;
                self.number = grain / TABLE;
            }
            self.table[grain % TABLE] = sector_number(self.sector + at)?;
        }
        self.sector += (part.bytes.len() / SECTOR) as u64;
        if part.bytes.is_empty() { Ok(()) } else { put(Bytes::from(part.bytes)) }
    }

    fn flush_table(&mut self, put: &mut impl FnMut(Bytes) -> io::Result<()>) -> io::Result<()> {
        if self.table.iter().all(|sector| *sector == 0) {
            return Ok(());
        }
        let bytes = metadata(MARKER_TABLE, &words(&self.table));
        self.directory[self.number] = sector_number(self.sector + 1)?;
        self.sector += (bytes.len() / SECTOR) as u64;
        self.table.fill(0);
        put(Bytes::from(bytes))
    }

    fn finish(mut self, capacity: u64, put: &mut impl FnMut(Bytes) -> io::Result<()>) -> io::Result<()> {
        self.flush_table(put)?;
        let mut bytes = metadata(MARKER_DIRECTORY, &words(&self.directory));
        bytes.extend(metadata(MARKER_FOOTER, &header(capacity, self.sector + 1)));
        // The end of the stream is a marker of zeros.
        bytes.extend([0; SECTOR]);
        put(Bytes::from(bytes))
    }
}

fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A marker and the sectors behind it.
fn metadata(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SECTOR * 2 + data.len());
    bytes.extend((data.len().div_ceil(SECTOR) as u64).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    pad(&mut bytes);
    bytes.extend(data);
    pad(&mut bytes);
    bytes
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
}

/// The format numbers sectors in 32 bits: 2 TiB of compressed data.
fn sector_number(sector: u64) -> io::Result<u32> {
    u32::try_from(sector)
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "the VMDK would be larger than 2 TiB"))
}

/// The sparse extent header.
fn header(capacity: u64, directory: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SECTOR);
    bytes.extend(MAGIC);
    // Version 3 is that of compressed disks with markers.
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend(FLAGS.to_le_bytes());
    for number in [capacity, GRAIN_SECTORS, 1, (DESCRIPTOR / SECTOR) as u64] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(TABLE_ENTRIES.to_le_bytes());
    // There is no redundant directory.
    for number in [0, directory, (OVERHEAD / SECTOR) as u64] {
        bytes.extend(number.to_le_bytes());
    }
    // Shut down cleanly, and characters that show when a transfer has changed line ends.
    bytes.extend([0, b'\n', b' ', b'\r', b'\n']);
    // Deflate.
    bytes.extend(1_u16.to_le_bytes());
    pad(&mut bytes);
    bytes
}

/// Header and descriptor. The content identifier is the one of a disk that was never written to by a machine: one made
/// by chance would make the bytes differ between runs.
fn head(capacity: u64, name: &str) -> io::Result<Bytes> {
    let cylinders = (capacity / (255 * 63)).min(65535);
    let descriptor = format!(
        "# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType=\"streamOptimized\"

# Extent description
RDONLY {capacity} SPARSE \"{name}\"

# The Disk Data Base
#DDB
ddb.adapterType = \"lsilogic\"
ddb.geometry.cylinders = \"{cylinders}\"
ddb.geometry.heads = \"255\"
ddb.geometry.sectors = \"63\"
ddb.virtualHWVersion = \"15\"
"
    );
    if descriptor.len() > DESCRIPTOR {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the image's name is too long for a VMDK"));
    }
    let mut bytes = header(capacity, DIRECTORY_AT_END);
    bytes.extend(descriptor.as_bytes());
    bytes.resize(OVERHEAD, 0);
    Ok(Bytes::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(size: u64, extents: &[(u64, u64)]) -> Vec<u64> {
        Pieces::new(size, extents.iter().map(|&(offset, len)| Extent { offset, len }).collect()).collect()
    }

    #[test]
    fn only_pieces_with_data_are_read_and_each_once() {
        assert_eq!(pieces(0, &[]), [0; 0]);
        assert_eq!(pieces(9 * PIECE, &[]), [0; 0]);
        assert_eq!(pieces(9 * PIECE, &[(5, 1), (PIECE - 1, 2), (7 * PIECE, PIECE)]), [0, PIECE, 7 * PIECE]);
        assert_eq!(pieces(2 * PIECE + 1, &[(0, 2 * PIECE + 1)]), [0, PIECE, 2 * PIECE]);
    }

    #[test]
    fn pieces_never_span_two_tables() {
        assert_eq!(TABLE % PIECE_GRAINS, 0);
    }
}
