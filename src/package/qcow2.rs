//! A sparse raw disk as qcow2, version 3, with compressed clusters: what Prism Central and QEMU read.
//!
//! | host clusters | hold |
//! |---|---|
//! | 0 | the header |
//! | 1 | the refcount table |
//! | 2 and on | the L1 table |
//! | then | the disk's clusters in their order, after those of each 512 MiB their L2 table |
//! | last | the refcount blocks |
//!
//! The tables in front say where everything behind them is, which is known only when all is compressed: no layout of
//! qcow2 can be sent while it is made. So the file is made first, in one pass over the disk, in an unnamed file beside
//! it that the kernel removes however the process ends, and sent from there, as often as it is asked for. That also
//! gives the size and the digest before the first byte is sent, which Prism Central wants. The other way, to compress
//! twice and throw the first result away, costs the slowest part of the work a second time.
//!
//! A cluster of zeros takes no room. One that does not compress stands there as it is. The others are raw deflate
//! streams in a window of 4 KiB, as QEMU writes them and as the format's readers may expect, one behind the other
//! without gaps. The bytes depend on the disk's contents only, not on the number of cores or on where its holes are.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use flate2::{Compress, Compression, FlushCompress, Status};
use tokio::sync::mpsc::Sender;

use super::{
    Summary,
    gzip::ZEROS,
    ordered::{Output, in_order, nobody_listens},
    sparse,
    vmdk::{PIECE, Pieces},
};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// [`CLUSTER`] bytes in memory.
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
/// Entries of a table that fills one cluster.
const TABLE: u64 = CLUSTER / 8;
/// Bytes of the disk that one L2 table maps.
const L2_RANGE: u64 = TABLE * CLUSTER;
/// Host clusters that one refcount block counts, with two bytes for each.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The refcount table has one cluster, which is enough for 16 TiB of file.
const REFCOUNT_TABLE: u64 = CLUSTER;
const L1_TABLE: u64 = 2 * CLUSTER;
/// Disks are whole sectors.
const SECTOR: u64 = 512;
/// The only reference to a table or a cluster is this one.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Where an entry of a compressed cluster has the number of its further sectors.
const SECTORS_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);
/// zlib-rs level, measured on 190 MiB of `/usr/lib`: 3 to 5 take 1.4 to 2 times as long and save 1 to 2 %; 1 panics where
/// its output has little room (zlib-rs 0.6.8).
const LEVEL: u32 = 2;
const WINDOW_BITS: u8 = 12;
/// Bytes of the file that are written or sent at once.
const CHUNK: usize = 1 << 20;
static EMPTY: [u8; CLUSTER_BYTES] = [0; CLUSTER_BYTES];

/// What is wrong with the packed file, while the disk is well.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct WriteError(pub(super) io::Error);

fn write_error(error: io::Error) -> io::Error {
    io::Error::other(WriteError(error))
}

/// The file of a disk, once it was made. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Packed(Arc<Mutex<Option<Arc<PackedFile>>>>);

#[derive(Debug)]
struct PackedFile {
    file: File,
    size: u64,
    virtual_size: u64,
}

impl Packed {
    pub(super) fn is_known(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Sends the file, which is made first in `directory` where that was not done before. Blocks its thread; stops when
    /// nobody listens to `out` any more. `position` follows the disk's bytes that are done, once for each of the two.
    pub(super) fn write(
        &self,
        disk: &File,
        directory: &Path,
        out: &Sender<io::Result<Bytes>>,
        position: &AtomicU64,
    ) -> io::Result<Summary> {
        let packed = {
            // One that fails leaves nothing behind.
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(packed) = &*known {
                Arc::clone(packed)
            } else {
                Arc::clone(known.insert(Arc::new(PackedFile::make(disk, directory, out, position)?)))
            }
        };
        packed.send(out, position)
    }
}

impl PackedFile {
    fn make(disk: &File, directory: &Path, out: &Sender<io::Result<Bytes>>, position: &AtomicU64) -> io::Result<Self> {
        let size = disk.metadata()?.len();
        let pieces = Pieces::new(size, sparse::data_extents(disk)?);
        let virtual_size = size.next_multiple_of(SECTOR);
        let file = tempfile::tempfile_in(directory).map_err(write_error)?;
        let mut writer = Writer::new(&file, virtual_size).map_err(write_error)?;
        in_order(
            pieces,
            || (deflater(), vec![0; CLUSTER_BYTES]),
            |(deflater, buffer), &offset| encode(disk, size, offset, deflater, buffer),
            |offset, clusters| {
                if out.is_closed() {
                    return Err(nobody_listens());
                }
                position.store((offset + PIECE).min(size), Ordering::Relaxed);
                writer.append(clusters).map_err(write_error)
            },
        )?;
        position.store(size, Ordering::Relaxed);
        let size = writer.finish().map_err(write_error)?;
        Ok(Self { file, size, virtual_size })
    }

    fn send(&self, out: &Sender<io::Result<Bytes>>, position: &AtomicU64) -> io::Result<Summary> {
        let mut output = Output::new(out);
        let (before, mut sent) = (position.load(Ordering::Relaxed), 0);
        while sent < self.size {
            let len = usize::try_from(self.size - sent).unwrap_or(CHUNK).min(CHUNK);
            let mut chunk = BytesMut::zeroed(len);
            self.file.read_exact_at(&mut chunk, sent).map_err(write_error)?;
            output.send(chunk.freeze())?;
            sent += len as u64;
            let share = u128::from(self.virtual_size) * u128::from(sent) / u128::from(self.size);
            position.store(before + u64::try_from(share).unwrap_or(self.virtual_size), Ordering::Relaxed);
        }
        Ok(output.finish(self.virtual_size))
    }
}

/// What a cluster of the disk becomes.
enum Cluster {
    Deflated(Vec<u8>),
    /// It does not compress.
    Plain(Vec<u8>),
}

fn deflater() -> Compress {
    Compress::new_with_window_bits(Compression::new(LEVEL), false, WINDOW_BITS)
}

/// The clusters of the piece at `offset` that are not zeros, with their numbers.
fn encode(
    disk: &File,
    size: u64,
    offset: u64,
    deflater: &mut Compress,
    buffer: &mut [u8],
) -> io::Result<Vec<(u64, Cluster)>> {
    let mut clusters = vec![];
    for start in (offset..size.min(offset + PIECE)).step_by(CLUSTER_BYTES) {
        // The last cluster may end behind the disk.
        let len = usize::try_from(size - start).unwrap_or(CLUSTER_BYTES).min(CLUSTER_BYTES);
        let (data, rest) = buffer.split_at_mut(len);
        disk.read_exact_at(data, start)?;
        rest.fill(0);
        if buffer.chunks(ZEROS.len()).any(|chunk| chunk != ZEROS) {
            clusters.push((start / CLUSTER, deflate(deflater, buffer)?));
        }
    }
    Ok(clusters)
}

fn deflate(deflater: &mut Compress, data: &[u8]) -> io::Result<Cluster> {
    deflater.reset();
    let mut deflated = Vec::with_capacity(CLUSTER_BYTES + CLUSTER_BYTES / 8);
    let status = deflater.compress_vec(data, &mut deflated, FlushCompress::Finish).map_err(io::Error::other)?;
    if status == Status::StreamEnd && deflated.len() < CLUSTER_BYTES {
        deflated.shrink_to_fit();
        return Ok(Cluster::Deflated(deflated));
    }
    Ok(Cluster::Plain(data.to_vec()))
}

/// The file while it is made.
struct Writer<'w> {
    file: &'w File,
    out: BufWriter<&'w File>,
    /// Where the next byte goes.
    position: u64,
    virtual_size: u64,
    /// Where the finished L2 tables are; 0 where there is none.
    l1: Vec<u64>,
    /// The table that comes after those, empty while nothing is in it.
    l2: Vec<u64>,
    /// How many things are in each host cluster.
    refcounts: Vec<u16>,
}

impl<'w> Writer<'w> {
    fn new(file: &'w File, virtual_size: u64) -> io::Result<Self> {
        let mut writer = Self {
            file,
            out: BufWriter::with_capacity(CHUNK, file),
            position: 0,
            virtual_size,
            l1: Vec::new(),
            l2: Vec::new(),
            refcounts: Vec::new(),
        };
        // The header and the tables in front have no contents yet.
        let l1_clusters = virtual_size.div_ceil(L2_RANGE).div_ceil(TABLE);
        for _ in 0..L1_TABLE / CLUSTER + l1_clusters {
            writer.write_cluster(&EMPTY)?;
        }
        Ok(writer)
    }

    /// Adds clusters, each with its number, in ascending order.
    fn append(&mut self, clusters: Vec<(u64, Cluster)>) -> io::Result<()> {
        for (number, cluster) in clusters {
            self.reach_table(number / TABLE)?;
            let entry = match cluster {
                Cluster::Deflated(bytes) => {
                    let host = self.write(&bytes)?;
                    let further_sectors = (self.position - 1) / SECTOR - host / SECTOR;
                    COMPRESSED | further_sectors << SECTORS_SHIFT | host
                }
                Cluster::Plain(bytes) => COPIED | self.write_cluster(&bytes)?,
            };
            self.l2.resize(index(number % TABLE), 0);
            self.l2.push(entry);
        }
        Ok(())
    }

    /// Ends L2 tables until `table` is the one that entries are added to.
    fn reach_table(&mut self, table: u64) -> io::Result<()> {
        while (self.l1.len() as u64) < table {
            let entry = if self.l2.is_empty() {
                0
            } else {
                let table = std::mem::take(&mut self.l2);
                COPIED | self.write_cluster(&big_endian(&table))?
            };
            self.l1.push(entry);
        }
        Ok(())
    }

    /// Completes the file and gives its size.
    fn finish(mut self) -> io::Result<u64> {
        let l1_size = self.virtual_size.div_ceil(L2_RANGE);
        self.reach_table(l1_size)?;
        self.align()?;
        // Each block counts itself too.
        let blocks = (self.position / CLUSTER).div_ceil(REFCOUNTS - 1);
        let first = self.position;
        let offsets: Vec<u64> = (0..blocks).map(|block| first + block * CLUSTER).collect();
        if blocks > TABLE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the packaged image is larger than 16 TiB"));
        }
        self.count(first, blocks * CLUSTER);
        for block in std::mem::take(&mut self.refcounts).chunks(index(REFCOUNTS)) {
            let block: Vec<u8> = block.iter().flat_map(|count| count.to_be_bytes()).collect();
            self.put(&block)?;
            self.align()?;
        }
        self.out.flush()?;
        self.file.write_all_at(&header(self.virtual_size, l1_size), 0)?;
        self.file.write_all_at(&big_endian(&offsets), REFCOUNT_TABLE)?;
        self.file.write_all_at(&big_endian(&self.l1), L1_TABLE)?;
        Ok(self.position)
    }

    /// Writes at the next byte and counts; gives the place.
    fn write(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let place = self.position;
        self.put(bytes)?;
        self.count(place, bytes.len() as u64);
        Ok(place)
    }

    /// Writes at the next host cluster and counts; gives the place.
    fn write_cluster(&mut self, bytes: &[u8]) -> io::Result<u64> {
        self.align()?;
        let place = self.write(bytes)?;
        self.align()?;
        Ok(place)
    }

    /// Fills up the host cluster.
    fn align(&mut self) -> io::Result<()> {
        let missing = self.position.next_multiple_of(CLUSTER) - self.position;
        self.put(&EMPTY[..index(missing)])
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Counts one more thing in the host clusters that hold these bytes.
    fn count(&mut self, place: u64, len: u64) {
        let (first, end) = (index(place / CLUSTER), index((place + len).div_ceil(CLUSTER)));
        if self.refcounts.len() < end {
            self.refcounts.resize(end, 0);
        }
        for count in &mut self.refcounts[first..end] {
            *count += 1;
        }
    }
}

/// A number of things in memory.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn big_endian(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// Without backing file, encryption, snapshots, features and extensions.
fn header(virtual_size: u64, l1_size: u64) -> Vec<u8> {
    const VERSION: u32 = 3;
    const LENGTH: u32 = 104;
    /// Refcounts have two bytes.
    const REFCOUNT_ORDER: u32 = 4;
    let l1_size = u32::try_from(l1_size).unwrap_or(u32::MAX);
    let fields: [&[u8]; 19] = [
        b"QFI\xfb",
        &VERSION.to_be_bytes(),
        // Backing file: offset and length of the name.
        &[0; 8],
        &[0; 4],
        &CLUSTER_BITS.to_be_bytes(),
        &virtual_size.to_be_bytes(),
        // Encryption.
        &[0; 4],
        &l1_size.to_be_bytes(),
        &L1_TABLE.to_be_bytes(),
        &REFCOUNT_TABLE.to_be_bytes(),
        // Clusters of the refcount table.
        &1_u32.to_be_bytes(),
        // Snapshots: number and offset.
        &[0; 4],
        &[0; 8],
        // Incompatible, compatible and autoclear features.
        &[0; 8],
        &[0; 8],
        &[0; 8],
        &REFCOUNT_ORDER.to_be_bytes(),
        &LENGTH.to_be_bytes(),
        // The end of the extensions.
        &[0; 8],
    ];
    fields.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_clusters_need_a_window_of_4_kib_only() {
        let mut state = 1_u32;
        let part: Vec<u8> = (0..8192)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_le_bytes()[3] & 0x7f
            })
            .collect();
        // Nothing repeats but at a distance of 8 KiB.
        let cluster = part.repeat(8);
        let deflated = |mut deflater: Compress| {
            let Cluster::Deflated(bytes) = deflate(&mut deflater, &cluster).unwrap() else { panic!("it compresses") };
            bytes.len()
        };
        assert!(deflated(deflater()) > CLUSTER_BYTES * 3 / 4, "it found what is farther away");
        assert!(deflated(Compress::new(Compression::new(LEVEL), false)) < CLUSTER_BYTES / 4, "so this proves nothing");
    }

    #[test]
    fn every_host_cluster_is_counted_whatever_the_size_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        for clusters in [0, 1, REFCOUNTS - 6, REFCOUNTS - 5, REFCOUNTS - 4, REFCOUNTS - 3] {
            let file = tempfile::tempfile_in(directory.path()).unwrap();
            let mut writer = Writer::new(&file, 0).unwrap();
            // As if so many clusters had been written.
            let place = writer.position;
            writer.count(place, clusters * CLUSTER);
            writer.position += clusters * CLUSTER;
            let mut expected = writer.refcounts.clone();
            let skipped = writer.position;
            writer.file.set_len(skipped).unwrap();
            writer.out.flush().unwrap();
            std::io::Seek::seek(&mut &file, std::io::SeekFrom::Start(skipped)).unwrap();
            let size = writer.finish().unwrap();

            let mut table = [0; 16];
            file.read_exact_at(&mut table, REFCOUNT_TABLE).unwrap();
            let mut counts = Vec::new();
            for entry in table.chunks(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap())) {
                if entry != 0 {
                    let mut block = vec![0; CLUSTER_BYTES];
                    file.read_exact_at(&mut block, entry).unwrap();
                    counts.extend(block.chunks(2).map(|count| u16::from_be_bytes(count.try_into().unwrap())));
                }
            }
            expected.resize(index(size / CLUSTER), 1);
            expected.resize(counts.len(), 0);
            assert!(counts == expected, "{clusters} clusters");
        }
    }
}
