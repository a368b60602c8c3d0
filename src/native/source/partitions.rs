//! Which parts a disk has, and what is in them.

use std::{fmt, fs::File, io, os::unix::fs::FileExt};

use crc::{CRC_32_ISO_HDLC, Crc};
use uuid::Uuid;

use super::ext4;

const SECTOR: u64 = 512;
/// Bytes of a GPT's header that its checksum covers.
const HEADER: usize = 92;
/// Fewest bytes of an entry of a GPT, and the most of all of them that are believed.
const LEAST_ENTRY: usize = 128;
const LARGEST_TABLE: usize = 1 << 16;
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// What a part of a disk holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    Lvm,
    Luks,
    Raid,
    Xfs,
    Btrfs,
    Swap,
    Fat,
    Other,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Lvm => "LVM",
            Self::Luks => "encrypted by LUKS",
            Self::Raid => "a part of a RAID",
            Self::Xfs => "XFS",
            Self::Btrfs => "btrfs",
            Self::Swap => "swap",
            Self::Fat => "FAT",
            Self::Other => "unknown",
        })
    }
}

/// A part of a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Partition {
    /// `None`: it is the whole disk.
    pub(super) number: Option<u32>,
    pub(super) offset: u64,
    /// What a GPT names it by.
    pub(super) id: Option<Uuid>,
    pub(super) name: String,
    pub(super) content: Content,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "partition {number}"),
            None => f.write_str("the whole disk"),
        }
    }
}

/// The partitions of a disk: of a GPT, else the four of an MBR, else the disk itself is one.
pub(super) fn find(disk: &File) -> io::Result<Vec<Partition>> {
    let mut found = match gpt(disk)? {
        Some(found) => found,
        None => mbr(disk)?,
    };
    let whole = Partition { number: None, offset: 0, id: None, name: String::new(), content: look(disk, 0)? };
    // The boot sector of a file system may look like a table.
    if found.is_empty() || whole.content != Content::Other {
        return Ok(vec![whole]);
    }
    for partition in &mut found {
        partition.content = look(disk, partition.offset)?;
    }
    Ok(found)
}

fn mbr(disk: &File) -> io::Result<Vec<Partition>> {
    let mut sector = [0; 512];
    read(disk, 0, &mut sector)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(vec![]);
    }
    let partition = |(number, entry): (u32, &[u8])| {
        let (kind, first, count) = (entry[4], little(entry, 8), little(entry, 12));
        // One that contains others has no file system itself.
        let container = matches!(kind, 0x05 | 0x0f | 0x85);
        (kind != 0 && count > 0 && !container).then(|| Partition {
            number: Some(number),
            offset: u64::from(first) * SECTOR,
            id: None,
            name: String::new(),
            content: Content::Other,
        })
    };
    Ok((1..).zip(sector[446..510].chunks_exact(16)).filter_map(partition).collect())
}

/// The second table of a GPT counts where the first one is damaged.
fn gpt(disk: &File) -> io::Result<Option<Vec<Partition>>> {
    let last = (disk.metadata()?.len() / SECTOR).saturating_sub(1);
    match table(disk, SECTOR)? {
        Some(found) => Ok(Some(found)),
        None => table(disk, last * SECTOR),
    }
}

/// The partitions of a GPT whose header is at `offset` (UEFI specification, 5.3). The crate `gpt`, which writes those of
/// images, ends the program where entries are not of its size, and holds as many as a header says.
fn table(disk: &File, offset: u64) -> io::Result<Option<Vec<Partition>>> {
    let mut header = [0; HEADER];
    read(disk, offset, &mut header)?;
    let (count, size) = (little(&header, 80) as usize, little(&header, 84) as usize);
    let length = count.saturating_mul(size);
    if !header.starts_with(b"EFI PART") || header_checksum(header) != little(&header, 16) {
        return Ok(None);
    }
    if size < LEAST_ENTRY || length > LARGEST_TABLE {
        return Ok(None);
    }
    let mut entries = vec![0; length];
    read(disk, long(&header, 72).saturating_mul(SECTOR), &mut entries)?;
    if CRC.checksum(&entries) != little(&header, 88) {
        return Ok(None);
    }
    let partition = |(number, entry): (u32, &[u8])| {
        let used = entry[..16].iter().any(|byte| *byte != 0);
        let name = entry[56..LEAST_ENTRY].chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let name: Vec<_> = name.take_while(|unit| *unit != 0).collect();
        used.then(|| Partition {
            number: Some(number),
            offset: long(entry, 32).saturating_mul(SECTOR),
            id: entry[16..].first_chunk().map(|id| Uuid::from_bytes_le(*id)),
            name: String::from_utf16_lossy(&name),
            content: Content::Other,
        })
    };
    Ok(Some((1..).zip(entries.chunks_exact(size)).filter_map(partition).collect()))
}

fn header_checksum(mut header: [u8; HEADER]) -> u32 {
    header[16..20].fill(0);
    CRC.checksum(&header)
}

/// Gives a disk whose GPT was changed the right checksums again.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn settle_checksums(disk: &mut [u8]) {
    let Some(header) = disk.get(512..).and_then(|rest| rest.first_chunk::<HEADER>()).copied() else { return };
    let place = usize::try_from(long(&header, 72).saturating_mul(SECTOR)).unwrap_or(usize::MAX);
    let length = (little(&header, 80) as usize).saturating_mul(little(&header, 84) as usize);
    if length <= LARGEST_TABLE {
        let mut entries: Vec<u8> = disk.iter().skip(place).take(length).copied().collect();
        entries.resize(length, 0);
        disk[512 + 88..512 + 92].copy_from_slice(&CRC.checksum(&entries).to_le_bytes());
    }
    if let Some(header) = disk[512..].first_chunk().copied() {
        disk[512 + 16..512 + 20].copy_from_slice(&header_checksum(header).to_le_bytes());
    }
}

/// What begins at `offset`, by the marks that blkid knows it by.
fn look(disk: &File, offset: u64) -> io::Result<Content> {
    const MARKS: [(u64, &[u8], Content); 9] = [
        (0, b"LUKS\xba\xbe", Content::Luks),
        (0, b"XFSB", Content::Xfs),
        (512, b"LABELONE", Content::Lvm),
        (4096, b"\xfc\x4e\x2b\xa9", Content::Raid),
        (0x1_0040, b"_BHRfS_M", Content::Btrfs),
        (4086, b"SWAPSPACE2", Content::Swap),
        (54, b"FAT", Content::Fat),
        (82, b"FAT32", Content::Fat),
        (1024 + 0x38, &ext4::MAGIC.to_le_bytes(), Content::Ext),
    ];
    for (place, mark, content) in MARKS {
        let mut bytes = vec![0; mark.len()];
        read(disk, offset.saturating_add(place), &mut bytes)?;
        if bytes == mark {
            return Ok(content);
        }
    }
    Ok(Content::Other)
}

/// As far as the disk goes; the rest is zeros.
fn read(disk: &File, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // No file goes further than that.
        let known = i64::try_from(offset).is_ok();
        match if known { disk.read_at(bytes, offset) } else { Ok(0) } {
            Ok(0) => break,
            Ok(read) => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn little(bytes: &[u8], offset: usize) -> u32 {
    bytes.iter().skip(offset).take(4).rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    u64::from(little(bytes, offset + 4)) << 32 | u64::from(little(bytes, offset))
}

#[cfg(test)]
mod tests {
    use gpt::{GptConfig, partition_types};

    use super::*;

    /// A disk of 1 MiB with a GPT of one partition.
    fn disk() -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut table = GptConfig::new().writable(true).create_from_device(file.reopen().unwrap(), None).unwrap();
        table.add_partition_at("root", 1, 64, 64, partition_types::LINUX_FS, 0).unwrap();
        table.write().unwrap();
        std::fs::read(file.path()).unwrap()
    }

    fn found(disk: &[u8]) -> Vec<Partition> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(disk, 0).unwrap();
        find(&file).unwrap()
    }

    #[test]
    fn a_table_is_read_from_its_end_where_its_beginning_is_damaged() {
        let mut disk = disk();
        let whole = found(&disk);
        assert_eq!((whole[0].number, whole[0].offset, whole[0].name.as_str()), (Some(1), 64 * SECTOR, "root"));
        disk[512 + 60] ^= 1;
        assert_eq!(found(&disk), whole);
    }

    #[test]
    fn tables_of_any_size_are_read_or_not_without_harm() {
        for (place, value) in [(80, u32::MAX), (84, 0), (84, 127), (84, u32::MAX), (76, u32::MAX)] {
            let mut disk = disk();
            let end = disk.len() - 512;
            disk[end..].fill(0);
            disk[512 + place..512 + place + 4].copy_from_slice(&value.to_le_bytes());
            settle_checksums(&mut disk);
            // What is left is the MBR that stands before a GPT, or nothing.
            assert!(found(&disk).iter().all(|partition| partition.id.is_none()), "{place}: {value}");
        }
    }

    #[test]
    fn a_partition_behind_the_end_of_everything_holds_nothing() {
        let mut disk = disk();
        disk[1024 + 32..1024 + 40].fill(0xff);
        settle_checksums(&mut disk);
        let found = found(&disk);
        assert_eq!((found[0].number, found[0].content), (Some(1), Content::Other));
    }
}
