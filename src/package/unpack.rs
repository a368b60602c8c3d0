//! The way back from a published file to a raw disk.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    path::Path,
};

use flate2::read::MultiGzDecoder;

use super::{unvmdk, vmdk};

/// What every gzip file begins with (RFC 1952).
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// Bytes that become a hole when they are all zero.
const BLOCK: usize = 64 << 10;

/// Writes the raw disk in `image`, which is one itself, its gzip or its streamOptimized VMDK, to the new, sparse file
/// `disk`.
pub fn unpack(image: &Path, disk: &Path) -> io::Result<()> {
    let mut image = File::open(image)?;
    let mut magic = [0; 4];
    let known = image.read_exact(&mut magic).is_ok();
    let compressed = known && magic[..2] == GZIP;
    image.rewind()?;
    if known && magic == vmdk::MAGIC {
        let disk = File::create_new(disk)?;
        unvmdk::unpack(BufReader::with_capacity(BLOCK, image), &disk)?;
        return disk.sync_all();
    }
    let mut reader: Box<dyn Read> = if compressed { Box::new(MultiGzDecoder::new(image)) } else { Box::new(image) };
    let mut disk = File::create_new(disk)?;
    let mut block = vec![0; BLOCK];
    let mut size = 0;
    loop {
        let read = fill(&mut reader, &mut block)?;
        if read == 0 {
            break;
        }
        size += read as u64;
        if block[..read].iter().all(|byte| *byte == 0) {
            disk.seek(SeekFrom::Start(size))?;
        } else {
            disk.write_all(&block[..read])?;
        }
    }
    disk.set_len(size)?;
    disk.sync_all()
}

/// Reads until the block is full or nothing is left.
fn fill(reader: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match reader.read(&mut block[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    #[test]
    fn gzip_and_raw_become_the_same_sparse_disk() {
        let dir = tempfile::tempdir().unwrap();
        let mut raw = vec![0; 5 * BLOCK + 17];
        raw[3 * BLOCK + 5] = 7;
        let plain = dir.path().join("plain");
        std::fs::write(&plain, &raw).unwrap();
        let packed = dir.path().join("packed");
        let mut encoder = GzEncoder::new(File::create(&packed).unwrap(), Compression::fast());
        encoder.write_all(&raw).unwrap();
        encoder.finish().unwrap();
        for image in [plain, packed] {
            let disk = image.with_extension("raw");
            unpack(&image, &disk).unwrap();
            assert!(std::fs::read(&disk).unwrap() == raw);
            assert!(disk.metadata().unwrap().blocks() * 512 <= 2 * BLOCK as u64, "holes were written");
        }
    }
}
