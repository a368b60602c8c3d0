//! Makes a raw disk of a qcow2 (QEMU's `docs/interop/qcow2.txt`). One that leads to further files is refused: they would be
//! files of the machine that builds.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use flate2::read::DeflateDecoder;

const MAGIC: &[u8] = b"QFI\xfb";
/// Bits of an entry that say where a cluster is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Largest disk that is believed: 16 TiB.
const LARGEST: u64 = 16 << 40;

/// Features that change how the rest is read.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const OTHER_COMPRESSION: u64 = 1 << 3;
const KNOWN: u64 = 1 | CORRUPT | EXTERNAL_DATA | OTHER_COMPRESSION;

/// Why no raw disk can be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum Qcow2Error {
    #[error("it can not be read: {0}")]
    Read(io::Error),
    #[error("the raw disk can not be written: {0}")]
    Write(io::Error),
    #[error("its {0} is damaged")]
    Damaged(&'static str),
    #[error("it {0}")]
    Unsupported(&'static str),
    #[error("it was stopped")]
    Stopped,
}

/// Whether the file is a qcow2.
pub(super) fn is_qcow2(file: &File) -> io::Result<bool> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[derive(Debug)]
struct Header {
    cluster_bits: u32,
    size: u64,
    tables: u64,
    tables_offset: u64,
    zstd: bool,
}

impl Header {
    fn read(file: &File) -> Result<Self, Qcow2Error> {
        let mut bytes = [0; 112];
        file.read_exact_at(&mut bytes, 0).map_err(Qcow2Error::Read)?;
        let (version, incompatible) = (u32_at(&bytes, 4), u64_at(&bytes, 72));
        let newer = version == 3;
        if !newer && version != 2 {
            return Err(Qcow2Error::Unsupported("is of another version than 2 and 3"));
        }
        let refused = [
            (u64_at(&bytes, 8) != 0, "has a backing file"),
            (u32_at(&bytes, 32) != 0, "is encrypted"),
            (newer && incompatible & EXTERNAL_DATA != 0, "has its data in another file"),
            (newer && incompatible & !KNOWN != 0, "uses a newer feature of qcow2"),
        ];
        if let Some((_, why)) = refused.into_iter().find(|(is, _)| *is) {
            return Err(Qcow2Error::Unsupported(why));
        }
        let other = newer && incompatible & OTHER_COMPRESSION != 0;
        if other && bytes[104] > 1 {
            return Err(Qcow2Error::Unsupported("is compressed in an unknown way"));
        }
        let header = Self {
            cluster_bits: u32_at(&bytes, 20),
            size: u64_at(&bytes, 24),
            tables: u32_at(&bytes, 36).into(),
            tables_offset: u64_at(&bytes, 40),
            zstd: other && bytes[104] == 1,
        };
        let right = (9..=21).contains(&header.cluster_bits)
            && header.size <= LARGEST
            && header.size.div_ceil(header.per_table()) <= header.tables
            && header.tables_offset & !OFFSET == 0
            && (!newer || incompatible & CORRUPT == 0);
        if right { Ok(header) } else { Err(Qcow2Error::Damaged("header")) }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one table of clusters is about.
    fn per_table(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }
}

/// Writes the disk in `file` to the new file `raw`, which gets holes where the disk has zeros. Ends early when `stopped`
/// says so.
pub(super) fn unpack(file: &File, raw: &File, stopped: impl Fn() -> bool) -> Result<(), Qcow2Error> {
    let header = Header::read(file)?;
    raw.set_len(header.size).map_err(Qcow2Error::Write)?;
    let (mut table, mut cluster) = (vec![0; header.cluster()], vec![0; header.cluster()]);
    for index in 0..header.size.div_ceil(header.per_table()) {
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, header.tables_offset + index * 8).map_err(Qcow2Error::Read)?;
        let place = u64::from_be_bytes(entry) & OFFSET;
        if place == 0 {
            continue;
        }
        file.read_exact_at(&mut table, place).map_err(Qcow2Error::Read)?;
        for (number, entry) in (0..).zip(table.chunks_exact(8)) {
            let position = index * header.per_table() + number * header.cluster() as u64;
            if position >= header.size {
                break;
            }
            if stopped() {
                return Err(Qcow2Error::Stopped);
            }
            if read_cluster(file, &header, u64_at(entry, 0), &mut cluster)? && cluster.iter().any(|byte| *byte != 0) {
                let length = usize::try_from(header.size - position).unwrap_or(usize::MAX).min(cluster.len());
                raw.write_all_at(&cluster[..length], position).map_err(Qcow2Error::Write)?;
            }
        }
    }
    Ok(())
}

/// Reads the cluster of an entry; `false` where it is all zeros.
fn read_cluster(file: &File, header: &Header, entry: u64, cluster: &mut [u8]) -> Result<bool, Qcow2Error> {
    const ZERO: u64 = 1;
    if entry & COMPRESSED == 0 {
        let place = entry & OFFSET;
        if place == 0 || entry & ZERO != 0 {
            return Ok(false);
        }
        return file.read_exact_at(cluster, place).map(|()| true).map_err(Qcow2Error::Read);
    }
    let bits = 62 - (header.cluster_bits - 8);
    let place = entry & ((1 << bits) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> bits;
    let length = (sectors + 1) * 512 - place % 512;
    // The last one may end before its sector does.
    let mut compressed = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    Part { file, place, end: place + length }.read_to_end(&mut compressed).map_err(Qcow2Error::Read)?;
    let damaged = |_| Qcow2Error::Damaged("compressed cluster");
    if header.zstd {
        let mut decoder = zstd::Decoder::new(compressed.as_slice()).map_err(Qcow2Error::Read)?;
        decoder.read_exact(cluster).map_err(damaged)?;
    } else {
        DeflateDecoder::new(compressed.as_slice()).read_exact(cluster).map_err(damaged)?;
    }
    Ok(true)
}

/// A part of a file.
struct Part<'f> {
    file: &'f File,
    place: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.place).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..left], self.place)?;
        self.place += read as u64;
        Ok(read)
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.iter().skip(offset).take(4).fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) << 32 | u64::from(u32_at(bytes, offset + 4))
}

/// What is written is as long as the header says, or nothing.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    const MOST: u32 = 32;
    let (Some(file), Some(raw)) = (crate::fuzzing::file(bytes), crate::fuzzing::file(&[])) else { return };
    let clusters = std::cell::Cell::new(0);
    let stopped = || clusters.replace(clusters.get() + 1) == MOST;
    let done = unpack(&file, &raw, stopped);
    let length = raw.metadata().map_or(0, |raw| raw.len());
    let whole = Header::read(&file).map_or(0, |header| header.size);
    assert!(length == whole || length == 0 && done.is_err(), "{length} bytes of {whole}");
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, process::Command};

    use rstest::rstest;

    use super::*;

    /// A disk with data at its beginning, in the middle and at its end, which is no multiple of a cluster.
    fn disk(path: &Path) {
        let file = File::create(path).unwrap();
        file.set_len((8 << 20) + 512).unwrap();
        let noise: Vec<u8> = (0..200_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        file.write_all_at(&noise, 0).unwrap();
        file.write_all_at(&vec![7; 100_000], 5_000_001).unwrap();
        file.write_all_at(b"end", (8 << 20) + 509).unwrap();
    }

    fn qemu_img(args: &[&str]) {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[rstest]
    #[case::plain(&[])]
    #[case::old(&["-o", "compat=0.10"])]
    #[case::deflate(&["-c"])]
    #[case::zstd(&["-c", "-o", "compression_type=zstd"])]
    #[case::small_clusters(&["-c", "-o", "cluster_size=4096"])]
    fn gives_back_the_bytes_of_the_disk(#[case] options: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let [raw, packed, back] = ["raw", "qcow2", "back"].map(|name| dir.path().join(name));
        disk(&raw);
        let files = [raw.to_str().unwrap(), packed.to_str().unwrap()];
        qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2"][..], options, &files].concat());
        let file = File::open(&packed).unwrap();
        assert!(is_qcow2(&file).unwrap());
        unpack(&file, &File::create(&back).unwrap(), || false).unwrap();
        assert!(fs::read(raw).unwrap() == fs::read(&back).unwrap(), "the disks differ");
        assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(back).unwrap()) * 512 < 1 << 20, "no holes");
        assert!(matches!(unpack(&file, &tempfile::tempfile().unwrap(), || true), Err(Qcow2Error::Stopped)));
    }

    #[test]
    fn files_of_the_machine_do_not_get_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-u", "-b", "/etc/passwd", name, "1M"]);
        let error = unpack(&File::open(&path).unwrap(), &tempfile::tempfile().unwrap(), || false).unwrap_err();
        assert!(error.to_string().contains("backing file"), "{error}");
        let data = format!("data_file={}/data", dir.path().display());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, name, "1M"]);
        let error = unpack(&File::open(&path).unwrap(), &tempfile::tempfile().unwrap(), || false).unwrap_err();
        assert!(error.to_string().contains("another file"), "{error}");
    }

    #[test]
    fn damage_is_told_and_no_panic() {
        let dir = tempfile::tempdir().unwrap();
        let [raw, packed] = ["raw", "qcow2"].map(|name| dir.path().join(name));
        disk(&raw);
        let files = [raw.to_str().unwrap(), packed.to_str().unwrap()];
        qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2", "-c"][..], &files].concat());
        let bytes = fs::read(packed).unwrap();
        for (offset, value) in [(20, 0xff), (24, 0xff), (36, 0xff), (40, 0xff), (5, 9)] {
            let file = tempfile::tempfile().unwrap();
            let mut damaged = bytes.clone();
            damaged[offset] = value;
            file.write_all_at(&damaged, 0).unwrap();
            let result = unpack(&file, &tempfile::tempfile().unwrap(), || false);
            // What stands in the file is never taken for a fault of the machine.
            let of_the_machine = |error: &io::Error| error.kind() != io::ErrorKind::UnexpectedEof;
            assert!(!matches!(&result, Err(Qcow2Error::Read(error)) if of_the_machine(error)), "{offset}: {result:?}");
        }
        let short = tempfile::tempfile().unwrap();
        short.write_all_at(&bytes[..3000], 0).unwrap();
        assert!(unpack(&short, &tempfile::tempfile().unwrap(), || false).is_err());
    }
}
