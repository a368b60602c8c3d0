//! Makes a raw disk of a streamOptimized VMDK, the form in which vCenter gives disks away ("Virtual Disk Format 5.0" of the
//! makers of vSphere). Other VMDKs are refused: they may lead to further files, which would be those of this machine.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use flate2::read::ZlibDecoder;

use super::vmdk::{DIRECTORY_AT_END, MAGIC};

const SECTOR_SIZE: usize = 512;
const SECTOR: u64 = SECTOR_SIZE as u64;
/// Flags of the header: grains are compressed, and markers stand before everything.
const STREAM: u32 = 1 << 16 | 1 << 17;
/// Largest grain that is believed: 1 MiB.
const LARGEST_GRAIN: u64 = 2048;
/// Largest disk that is believed: 16 TiB.
const LARGEST: u64 = 16 << 40;
/// Bytes of a marker before the data of a grain: where on the disk it is, and how long it is.
const MARKER: usize = 12;

#[derive(Debug)]
struct Header {
    /// Bytes of the disk.
    size: u64,
    /// Bytes of a grain, which is what is compressed on its own.
    grain: u64,
    /// Bytes before the first marker.
    overhead: u64,
    /// Whether a marker says that there is no more, as vCenter's do. Those of QEMU just end.
    has_end: bool,
}

impl Header {
    fn read(bytes: &[u8]) -> io::Result<Self> {
        if bytes[..4] != MAGIC || u32_at(bytes, 8) & STREAM != STREAM {
            return Err(damaged("is no streamOptimized VMDK"));
        }
        let (size, grain, overhead) = (u64_at(bytes, 12), u64_at(bytes, 20), u64_at(bytes, 64));
        let right =
            size <= LARGEST / SECTOR && (1..=LARGEST_GRAIN).contains(&grain) && (1..1 << 32).contains(&overhead);
        if !right {
            return Err(damaged("has a damaged header"));
        }
        let has_end = u64_at(bytes, 56) == DIRECTORY_AT_END;
        Ok(Self { size: size * SECTOR, grain: grain * SECTOR, overhead: overhead * SECTOR, has_end })
    }
}

/// Writes the disk that `vmdk` is the stream of to the new file `disk`, which gets holes where the disk has zeros.
pub(super) fn unpack(mut vmdk: impl Read, disk: &File) -> io::Result<()> {
    let mut sector = [0; SECTOR_SIZE];
    vmdk.read_exact(&mut sector)?;
    let header = Header::read(&sector)?;
    skip(&mut vmdk, header.overhead - SECTOR)?;
    disk.set_len(header.size)?;
    let (mut packed, mut grain) = (vec![], vec![]);
    loop {
        if let Err(error) = vmdk.read_exact(&mut sector) {
            let ended = error.kind() == io::ErrorKind::UnexpectedEof && !header.has_end;
            return if ended { Ok(()) } else { Err(error) };
        }
        let (value, length) = (u64_at(&sector, 0), u64::from(u32_at(&sector, 8)));
        match (value, length, u32_at(&sector, MARKER)) {
            // The end of the stream.
            (0, 0, 0) => return Ok(()),
            // Tables and directories, which say again where the grains are.
            (sectors, 0, _) => skip(&mut vmdk, sectors.checked_mul(SECTOR).ok_or_else(|| damaged("is damaged"))?)?,
            (place, length, _) => {
                let place = place.checked_mul(SECTOR).filter(|place| *place < header.size);
                let place = place.ok_or_else(|| damaged("has data behind its end"))?;
                // Deflate makes hardly anything longer.
                if length > 2 * header.grain + SECTOR {
                    return Err(damaged("has a damaged marker"));
                }
                let rest = (MARKER as u64 + length).next_multiple_of(SECTOR) - SECTOR;
                packed.clear();
                packed.extend_from_slice(&sector[MARKER..]);
                if (&mut vmdk).take(rest).read_to_end(&mut packed)? as u64 != rest {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                packed.truncate(usize::try_from(length).unwrap_or(usize::MAX));
                grain.clear();
                let room = header.grain.min(header.size - place);
                ZlibDecoder::new(packed.as_slice()).take(room).read_to_end(&mut grain)?;
                if grain.iter().any(|byte| *byte != 0) {
                    disk.write_all_at(&grain, place)?;
                }
            }
        }
    }
}

fn skip(from: &mut impl Read, bytes: u64) -> io::Result<()> {
    if io::copy(&mut from.take(bytes), &mut io::sink())? == bytes {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the VMDK {what}"))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.iter().skip(offset).take(4).rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset + 4)) << 32 | u64::from(u32_at(bytes, offset))
}

/// The disk is as long as the header says, or empty.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some(disk) = crate::fuzzing::file(&[]) else { return };
    let done = unpack(bytes, &disk);
    let length = disk.metadata().map_or(0, |disk| disk.len());
    let header = bytes.first_chunk::<SECTOR_SIZE>().and_then(|sector| Header::read(sector).ok());
    let whole = header.map_or(0, |header| header.size);
    assert!(length == whole || length == 0 && done.is_err(), "{length} bytes of {whole}");
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command, sync::atomic::AtomicU64};

    use bytes::Bytes;

    use super::{super::vmdk, *};

    const MIB: u64 = 1 << 20;

    /// A disk of 9 MiB and a bit, and its VMDK by QEMU and by this program.
    fn sample(dir: &Path) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let [raw, vmdk] = ["raw", "vmdk"].map(|name| dir.join(name));
        let file = File::create(&raw).unwrap();
        file.set_len(9 * MIB + SECTOR).unwrap();
        let noise: Vec<u8> = (0..200_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        file.write_all_at(&noise, 0).unwrap();
        file.write_all_at(&vec![7; 100_000], 5_000_001).unwrap();
        file.write_all_at(b"end", 9 * MIB + SECTOR - 3).unwrap();
        let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
        assert!(Command::new("qemu-img").args(convert).args([&raw, &vmdk]).status().unwrap().success());
        let mut ours = vec![];
        let put = |bytes: Bytes| {
            ours.extend(bytes);
            Ok(())
        };
        vmdk::write(&File::open(&raw).unwrap(), "disk", &AtomicU64::new(0), put).unwrap();
        (fs::read(raw).unwrap(), fs::read(vmdk).unwrap(), ours)
    }

    #[test]
    fn a_disk_comes_back_from_its_vmdk_with_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, qemus, ours) = sample(dir.path());
        for vmdk in [qemus, ours] {
            let back = dir.path().join("back");
            unpack(vmdk.as_slice(), &File::create(&back).unwrap()).unwrap();
            assert!(fs::read(&back).unwrap() == raw, "the disks differ");
            assert!(fs::metadata(back).unwrap().blocks() * SECTOR < MIB, "no holes");
        }
    }

    #[test]
    fn a_vmdk_that_is_cut_or_damaged_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (_, _, vmdk) = sample(dir.path());
        let unpack = |bytes: &[u8]| unpack(bytes, &tempfile::tempfile().unwrap());
        // The last sector says that there is no more.
        for length in [0, 100, 512, 4096, vmdk.len() / 2, vmdk.len() - 512] {
            assert_eq!(unpack(&vmdk[..length]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{length}");
        }
        for (offset, value) in [(0, b'x'), (10, 0), (18, 0xff), (24, 0xff), (70, 0xff)] {
            let mut changed = vmdk.clone();
            changed[offset] = value;
            assert_eq!(unpack(&changed).unwrap_err().kind(), io::ErrorKind::InvalidData, "{offset}");
        }
        // A grain that would be far behind the disk's end.
        let first = usize::try_from(Header::read(&vmdk).unwrap().overhead).unwrap();
        let mut changed = vmdk.clone();
        changed[first + 5] = 1;
        assert!(unpack(&changed).unwrap_err().to_string().contains("behind its end"));
    }
}
