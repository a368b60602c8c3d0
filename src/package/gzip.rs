//! A sparse raw disk as one gzip member, in one pass on all cores.
//!
//! The disk is cut into blocks of [`BLOCK`] bytes that are compressed independently and end byte-aligned (a deflate
//! sync flush), as pigz does; put together they are one ordinary deflate stream, which every gunzip reads. A block of
//! zeros is compressed once and repeated, and holes are not read at all. The bytes depend on the disk's contents only,
//! not on the number of cores or on where its holes are.
//!
//! The crate `gzp` was considered: it has no notion of holes, panics when it is dropped after an error, and can not be
//! stopped.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use tokio::sync::mpsc::Sender;

use super::{
    Summary,
    ordered::{Output, in_order},
    sparse::{self, Extent},
};

/// Bytes of the disk that are compressed on their own.
const BLOCK: usize = 1 << 20;
/// Blocks of zeros that are sent as one piece.
const MAX_ZERO_BLOCKS: u64 = 64;
/// zlib-rs level, measured on 190 MiB of `/usr/lib`: 1 is a third faster than 2 and 11 % larger; 3 to 6 take 1.2 to 2
/// times as long and save 1 to 3 %. Level 2 has the size of `gzip -1`.
pub(super) const LEVEL: u32 = 2;
/// Magic number, deflate, no flags, no time, no hint, unknown system: nothing that differs between runs.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
/// An empty last block.
const END_OF_DEFLATE: [u8; 2] = [3, 0];
pub(super) const ZEROS: [u8; 4096] = [0; 4096];

/// Compresses `disk` into `out`; blocks its thread until all is taken or the receiver is gone. `position` follows the
/// disk's bytes that are done.
pub(super) fn compress(disk: &File, out: &Sender<io::Result<Bytes>>, position: &AtomicU64) -> io::Result<Summary> {
    let size = disk.metadata()?.len();
    // Before the first byte leaves: from then on a disk that shrinks is noticed.
    let pieces = Pieces::new(size, sparse::data_extents(disk)?);
    let zero_block = Deflater::new().block(&vec![0; BLOCK])?;
    let mut sink = Sink { output: Output::new(out), crc: Crc::new(), zero_block };
    sink.output.send(Bytes::from_static(&HEADER))?;
    in_order(
        pieces,
        || (Deflater::new(), Vec::new()),
        |(deflater, buffer), piece| deflate(disk, *piece, deflater, buffer),
        |piece, part| {
            sink.append(piece, part)?;
            position.store(piece.end(), Ordering::Relaxed);
            Ok(())
        },
    )?;
    sink.finish(size)
}

/// `None` stands for blocks of zeros.
fn deflate(disk: &File, piece: Piece, deflater: &mut Deflater, buffer: &mut Vec<u8>) -> io::Result<Option<Deflated>> {
    let Piece::Block { offset, len } = piece else { return Ok(None) };
    buffer.resize(len, 0);
    disk.read_exact_at(buffer, offset)?;
    if len == BLOCK && buffer.chunks(ZEROS.len()).all(|chunk| chunk == ZEROS) {
        return Ok(None);
    }
    deflater.block(buffer).map(Some)
}

/// The compressed stream, in order.
struct Sink<'p> {
    output: Output<'p>,
    crc: Crc,
    zero_block: Deflated,
}

impl Sink<'_> {
    fn append(&mut self, piece: Piece, part: Option<Deflated>) -> io::Result<()> {
        if let Some(part) = part {
            self.crc.combine(&part.crc);
            return self.output.send(part.bytes);
        }
        let blocks = match piece {
            Piece::Zeros { blocks, .. } => usize::try_from(blocks).unwrap_or(usize::MAX),
            Piece::Block { .. } => 1,
        };
        for _ in 0..blocks {
            self.crc.combine(&self.zero_block.crc);
        }
        self.output.send(Bytes::from(self.zero_block.bytes.repeat(blocks)))
    }

    fn finish(mut self, virtual_size: u64) -> io::Result<Summary> {
        // The trailer holds the size modulo 2^32.
        #[expect(clippy::cast_possible_truncation, reason = "RFC 1952")]
        let size_field = (virtual_size as u32).to_le_bytes();
        let trailer = [&END_OF_DEFLATE[..], &self.crc.sum().to_le_bytes(), &size_field].concat();
        self.output.send(Bytes::from(trailer))?;
        Ok(self.output.finish(virtual_size))
    }
}

/// A compressed block and the checksum of what it unpacks to.
struct Deflated {
    bytes: Bytes,
    crc: Crc,
}

struct Deflater(Compress);

impl Deflater {
    fn new() -> Self {
        Self(Compress::new(Compression::new(LEVEL), false))
    }

    fn block(&mut self, data: &[u8]) -> io::Result<Deflated> {
        let mut crc = Crc::new();
        crc.update(data);
        self.0.reset();
        let mut bytes = Vec::with_capacity(data.len() / 2 + 1024);
        loop {
            let taken = usize::try_from(self.0.total_in()).unwrap_or(usize::MAX);
            let rest = data.get(taken..).unwrap_or_default();
            let status = self.0.compress_vec(rest, &mut bytes, FlushCompress::Sync).map_err(io::Error::other)?;
            // All is out when the compressor had room to spare.
            if self.0.total_in() == data.len() as u64 && bytes.len() < bytes.capacity() {
                bytes.shrink_to_fit();
                return Ok(Deflated { bytes: Bytes::from(bytes), crc });
            }
            if status == Status::StreamEnd {
                return Err(io::Error::other("the compressor ended in the middle of a block"));
            }
            bytes.reserve(data.len() / 2 + 1024);
        }
    }
}

/// A part of the disk that one worker handles.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Piece {
    /// Whole blocks of holes.
    Zeros { offset: u64, blocks: u64 },
    /// At most [`BLOCK`] bytes.
    Block { offset: u64, len: usize },
}

impl Piece {
    fn end(self) -> u64 {
        match self {
            Self::Zeros { offset, blocks } => offset + blocks * BLOCK as u64,
            Self::Block { offset, len } => offset + len as u64,
        }
    }
}

/// Cuts a disk into pieces.
struct Pieces {
    size: u64,
    position: u64,
    extents: std::iter::Peekable<std::vec::IntoIter<Extent>>,
}

impl Pieces {
    fn new(size: u64, extents: Vec<Extent>) -> Self {
        Self { size, position: 0, extents: extents.into_iter().peekable() }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let offset = self.position;
        let left = self.size.checked_sub(offset).filter(|left| *left > 0)?;
        while self.extents.next_if(|extent| extent.end() <= offset).is_some() {}
        let hole = self.extents.peek().map_or(self.size, |next| next.offset).saturating_sub(offset);
        let blocks = (hole / BLOCK as u64).min(MAX_ZERO_BLOCKS);
        let piece = if blocks > 0 {
            Piece::Zeros { offset, blocks }
        } else {
            Piece::Block { offset, len: usize::try_from(left).unwrap_or(BLOCK).min(BLOCK) }
        };
        self.position = piece.end();
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: u64 = BLOCK as u64;

    fn pieces(size: u64, extents: &[(u64, u64)]) -> Vec<Piece> {
        Pieces::new(size, extents.iter().map(|&(offset, len)| Extent { offset, len }).collect()).collect()
    }

    #[test]
    fn holes_are_taken_in_large_pieces_and_data_in_blocks() {
        assert_eq!(pieces(0, &[]), []);
        assert_eq!(pieces(5, &[]), [Piece::Block { offset: 0, len: 5 }]);
        assert_eq!(
            pieces(100 * B + 1, &[(70 * B + 7, 1)]),
            [
                Piece::Zeros { offset: 0, blocks: 64 },
                Piece::Zeros { offset: 64 * B, blocks: 6 },
                Piece::Block { offset: 70 * B, len: BLOCK },
                Piece::Zeros { offset: 71 * B, blocks: 29 },
                Piece::Block { offset: 100 * B, len: 1 },
            ]
        );
    }

    #[test]
    fn incompressible_blocks_survive() {
        use std::io::Read;
        let mut state = 1_u64;
        let data: Vec<u8> = (0..BLOCK)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        let mut deflated = Deflater::new().block(&data).unwrap().bytes.to_vec();
        deflated.extend(END_OF_DEFLATE);
        let mut unpacked = Vec::new();
        flate2::read::DeflateDecoder::new(&deflated[..]).read_to_end(&mut unpacked).unwrap();
        assert!(unpacked == data);
    }
}
