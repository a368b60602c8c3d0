//! Which parts a disk has, and what is in them.

use std::{fmt, fs::File, io, os::unix::fs::FileExt, path::Path};

use gpt::GptConfig;
use uuid::Uuid;

use super::ext4;

const SECTOR: u64 = 512;

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
pub(super) fn find(path: &Path, disk: &File) -> io::Result<Vec<Partition>> {
    let mut found = vec![];
    if let Ok(table) = GptConfig::new().writable(false).open(path) {
        for (number, partition) in table.partitions() {
            found.push(Partition {
                number: Some(*number),
                offset: partition.first_lba.saturating_mul(SECTOR),
                id: Some(partition.part_guid),
                name: partition.name.clone(),
                content: Content::Other,
            });
        }
    } else {
        let mut sector = [0; 512];
        read(disk, 0, &mut sector)?;
        for (number, entry) in (1..).zip(sector[446..510].chunks_exact(16)) {
            let (kind, first, count) = (entry[4], little(entry, 8), little(entry, 12));
            // One that contains others has no file system itself.
            let container = matches!(kind, 0x05 | 0x0f | 0x85);
            if sector[510..] == [0x55, 0xaa] && kind != 0 && count > 0 && !container {
                found.push(Partition {
                    number: Some(number),
                    offset: u64::from(first) * SECTOR,
                    id: None,
                    name: String::new(),
                    content: Content::Other,
                });
            }
        }
    }
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
        match disk.read_at(bytes, offset) {
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
