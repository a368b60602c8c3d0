//! Reads an ext4 file system in a file, without mounting it: every file with its owner, mode, times, attributes and the
//! names that it has. Structures and offsets are those of Linux's `fs/ext4/ext4.h`, `ext4_extents.h` and `xattr.h`.

use std::{fs::File, io, os::unix::fs::FileExt};

use uuid::Uuid;

const SUPERBLOCK: u64 = 1024;
pub(super) const MAGIC: u16 = 0xEF53;
/// The inode of the top directory.
pub(super) const ROOT: u32 = 2;
/// Largest directory, and largest value of an attribute, that is believed.
const LARGEST_DIRECTORY: u64 = 256 << 20;
const LARGEST_ATTRIBUTE: u64 = 1 << 20;
/// Levels of an extent tree.
const DEEPEST: u16 = 5;
/// Bytes of an inode without its later fields.
const OLD_INODE: usize = 128;
const INODE_EXTENTS: u32 = 0x8_0000;

/// Features without which the file system can not be read right, by their names in `tune2fs -l`. Those that are marked are
/// known here.
const FEATURES: [(u32, &str, bool); 16] = [
    (0x1, "compression", false),
    (0x2, "filetype", true),
    // The journal holds what is not in its place yet.
    (RECOVERY, "a journal that is not carried out", false),
    (0x8, "journal_dev", false),
    (0x10, "meta_bg", false),
    (0x40, "extent", true),
    (0x80, "64bit", true),
    (0x100, "mmp", true),
    (0x200, "flex_bg", true),
    (0x400, "ea_inode", true),
    (0x1000, "dirdata", false),
    (0x2000, "metadata_csum_seed", true),
    (0x4000, "large_dir", true),
    (0x8000, "inline_data", false),
    // Told for each file that is encrypted.
    (0x1_0000, "encrypt", true),
    (0x2_0000, "casefold", false),
];
const RECOVERY: u32 = 0x4;
const EXTENT_FEATURE: u32 = 0x40;
const WIDE_FEATURE: u32 = 0x80;

/// Why a file system can not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ext4Error {
    #[error("it can not be read: {0}")]
    Read(#[from] io::Error),
    #[error("its {0} is damaged")]
    Damaged(&'static str),
    #[error("it uses {0}")]
    Unsupported(String),
}

type Result<T> = std::result::Result<T, Ext4Error>;

/// Bytes from the disk, which may say anything.
struct Bytes<'b>(&'b [u8], &'static str);

impl<'b> Bytes<'b> {
    fn get(&self, offset: usize, length: usize) -> Result<&'b [u8]> {
        let end = offset.checked_add(length).ok_or(Ext4Error::Damaged(self.1))?;
        self.0.get(offset..end).ok_or(Ext4Error::Damaged(self.1))
    }

    fn u8(&self, offset: usize) -> Result<u8> {
        Ok(self.get(offset, 1)?[0])
    }

    fn u16(&self, offset: usize) -> Result<u16> {
        let bytes = self.get(offset, 2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&self, offset: usize) -> Result<u32> {
        Ok(u32::from(self.u16(offset)?) | u32::from(self.u16(offset + 2)?) << 16)
    }

    /// A number in two parts.
    fn split(&self, low: usize, high: u64) -> Result<u64> {
        Ok(high << 32 | u64::from(self.u32(low)?))
    }
}

/// A file system at a place in a disk.
#[derive(Debug)]
pub(super) struct FileSystem<'d> {
    disk: &'d File,
    offset: u64,
    block_size: u64,
    blocks: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: usize,
    descriptor_size: u64,
    first_block: u64,
    pub(super) uuid: Uuid,
    pub(super) label: String,
    /// Its journal holds what is not in its place yet.
    pub(super) needs_recovery: bool,
}

/// A file, whatever its names are.
#[derive(Debug)]
pub(super) struct Inode {
    number: u32,
    bytes: Vec<u8>,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Regular,
    Directory,
    Link,
    CharacterDevice,
    BlockDevice,
    Pipe,
    Socket,
}

/// A name in a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) inode: u32,
    pub(super) name: Vec<u8>,
}

/// Bytes of a file that are on the disk one after another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Extent {
    /// Where in the file they begin.
    pub(super) position: u64,
    /// Where in the disk they are.
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl<'d> FileSystem<'d> {
    /// A file system that was checked.
    pub(super) fn open(disk: &'d File, offset: u64) -> Result<Self> {
        Self::read(disk, offset, 0)
    }

    /// One whose journal may hold what is not in its place yet.
    pub(super) fn look(disk: &'d File, offset: u64) -> Result<Self> {
        Self::read(disk, offset, RECOVERY)
    }

    fn read(disk: &'d File, offset: u64, forgiven: u32) -> Result<Self> {
        let mut block = [0; 1024];
        disk.read_exact_at(&mut block, offset.saturating_add(SUPERBLOCK))?;
        let block = Bytes(&block, "superblock");
        if block.u16(0x38)? != MAGIC {
            return Err(Ext4Error::Damaged(block.1));
        }
        let needed = block.u32(0x60)? & !forgiven;
        let unknown: Vec<_> = FEATURES
            .iter()
            .filter(|(bit, _, known)| needed & bit != 0 && !known)
            .map(|(_, name, _)| (*name).to_owned())
            .collect();
        let named = FEATURES.iter().fold(0, |all, (bit, _, _)| all | bit);
        if !unknown.is_empty() || needed & !named != 0 {
            let newer = (needed & !named != 0).then(|| format!("the features {:#x}", needed & !named));
            let all: Vec<_> = unknown.into_iter().chain(newer).collect();
            return Err(Ext4Error::Unsupported(all.join(", ")));
        }
        if needed & EXTENT_FEATURE == 0 {
            return Err(Ext4Error::Unsupported("block maps, as ext2 and ext3 do".to_owned()));
        }
        let wide = needed & WIDE_FEATURE != 0;
        let shift = block.u32(0x18)?;
        let inode_size = usize::from(block.u16(0x58)?);
        let inodes_per_group = block.u32(0x28)?;
        let descriptor_size = if wide { u64::from(block.u16(0xfe)?) } else { 32 };
        let block_size = 1024_u64 << shift.min(6);
        let blocks = block.split(0x4, if wide { u64::from(block.u32(0x150)?) } else { 0 })?;
        let end = blocks.checked_mul(block_size).and_then(|size| size.checked_add(offset));
        let right = shift <= 6
            // As far as a file can go: places in it need no further look.
            && end.is_some_and(|end| i64::try_from(end).is_ok())
            && (OLD_INODE..=65_536).contains(&inode_size)
            && inodes_per_group > 0
            && (32..=1024).contains(&descriptor_size);
        if !right {
            return Err(Ext4Error::Damaged(block.1));
        }
        let label = block.get(0x78, 16)?;
        let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
        let uuid = Uuid::from_slice(block.get(0x68, 16)?).map_err(|_| Ext4Error::Damaged(block.1))?;
        Ok(Self {
            disk,
            offset,
            block_size,
            blocks,
            inodes: block.u32(0x0)?,
            inodes_per_group,
            inode_size,
            descriptor_size,
            first_block: u64::from(block.u32(0x14)?),
            uuid,
            label: String::from_utf8_lossy(label).into_owned(),
            needs_recovery: block.u32(0x60)? & RECOVERY != 0,
        })
    }

    /// Bytes of the disk that belong to it.
    pub(super) fn size(&self) -> u64 {
        self.blocks * self.block_size
    }

    /// Where a block is in the disk.
    fn place(&self, block: u64, what: &'static str) -> Result<u64> {
        let place = block.checked_mul(self.block_size).and_then(|place| place.checked_add(self.offset));
        place.filter(|_| block < self.blocks).ok_or(Ext4Error::Damaged(what))
    }

    fn block(&self, block: u64, what: &'static str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.block_size).unwrap_or_default()];
        self.disk.read_exact_at(&mut bytes, self.place(block, what)?)?;
        Ok(bytes)
    }

    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.inodes {
            return Err(Ext4Error::Damaged("list of inodes"));
        }
        let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let descriptors = self.place(self.first_block + 1, "group descriptors")?;
        let mut descriptor = vec![0; usize::try_from(self.descriptor_size).unwrap_or_default()];
        self.disk.read_exact_at(&mut descriptor, descriptors + u64::from(group) * self.descriptor_size)?;
        let descriptor = Bytes(&descriptor, "group descriptors");
        let high = if self.descriptor_size >= 64 { u64::from(descriptor.u32(0x28)?) } else { 0 };
        let table = self.place(descriptor.split(0x8, high)?, descriptor.1)?;
        let mut bytes = vec![0; self.inode_size];
        self.disk.read_exact_at(&mut bytes, table + u64::from(index) * self.inode_size as u64)?;
        Ok(Inode { number, bytes })
    }

    /// The names in a directory, `.` and `..` among them.
    pub(super) fn entries(&self, directory: &Inode) -> Result<Vec<Entry>> {
        const WHAT: &str = "directory";
        let bytes = self.contents(directory, LARGEST_DIRECTORY, WHAT)?;
        let mut entries = vec![];
        // Names are in lists of a block; where there is an index, its own parts are lists of nothing.
        for block in bytes.chunks(usize::try_from(self.block_size).unwrap_or(1)) {
            let block = Bytes(block, WHAT);
            let mut offset = 0;
            while offset < block.0.len() {
                let (inode, step) = (block.u32(offset)?, usize::from(block.u16(offset + 4)?));
                // The length of a block of 64 KiB does not fit.
                let step = if step == 0 || step == 65_535 { block.0.len() } else { step };
                if step < 8 {
                    return Err(Ext4Error::Damaged(WHAT));
                }
                let name = block.get(offset + 8, usize::from(block.u8(offset + 6)?))?;
                if inode != 0 {
                    entries.push(Entry { inode, name: name.to_vec() });
                }
                offset += step;
            }
        }
        Ok(entries)
    }

    /// The file of this name in a directory.
    pub(super) fn find(&self, directory: &Inode, name: &str) -> Result<Option<Inode>> {
        if directory.kind()? != Kind::Directory {
            return Ok(None);
        }
        let found = self.entries(directory)?.into_iter().find(|entry| entry.name == name.as_bytes());
        found.map(|entry| self.inode(entry.inode)).transpose()
    }

    /// All bytes of a file that has not many.
    pub(super) fn contents(&self, file: &Inode, most: u64, what: &'static str) -> Result<Vec<u8>> {
        let size = file.size()?;
        if size > most {
            return Err(Ext4Error::Damaged(what));
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| Ext4Error::Damaged(what))?];
        for extent in self.extents(file)? {
            let begin = usize::try_from(extent.position).map_err(|_| Ext4Error::Damaged(what))?;
            let length = usize::try_from(extent.length).map_err(|_| Ext4Error::Damaged(what))?;
            let part = bytes.get_mut(begin..begin + length).ok_or(Ext4Error::Damaged(what))?;
            self.disk.read_exact_at(part, extent.offset)?;
        }
        Ok(bytes)
    }

    /// Where a file's bytes are, but for its holes. Nothing of them is behind the file's end.
    pub(super) fn extents(&self, file: &Inode) -> Result<Vec<Extent>> {
        let (flags, size) = (file.bytes().u32(0x20)?, file.size()?);
        if flags & INODE_EXTENTS == 0 {
            return if size == 0 {
                Ok(vec![])
            } else {
                Err(Ext4Error::Unsupported("block maps, as ext2 and ext3 do".to_owned()))
            };
        }
        let mut extents = vec![];
        self.tree(&Bytes(file.bytes().get(0x28, 60)?, "extent tree"), DEEPEST, size, &mut 0, &mut extents)?;
        Ok(extents)
    }

    /// Reads what is below a node. `next` is the first block of the file that its entries may be about: each is about later
    /// ones than the entry before it. So nothing is read twice, wherever the entries lead.
    fn tree(&self, node: &Bytes<'_>, deepest: u16, size: u64, next: &mut u64, extents: &mut Vec<Extent>) -> Result<()> {
        const WRITTEN: u16 = 32_768;
        let (magic, count, depth) = (node.u16(0)?, node.u16(2)?, node.u16(6)?);
        if magic != 0xF30A || depth > deepest {
            return Err(Ext4Error::Damaged(node.1));
        }
        for entry in 1..=usize::from(count) {
            let entry = Bytes(node.get(entry * 12, 12)?, node.1);
            let first = u64::from(entry.u32(0)?);
            if first < *next {
                return Err(Ext4Error::Damaged(node.1));
            }
            if depth > 0 {
                *next = first;
                let block = entry.split(4, u64::from(entry.u16(8)?))?;
                let below = self.block(block, node.1)?;
                self.tree(&Bytes(&below, node.1), depth - 1, size, next, extents)?;
                *next = (first + 1).max(*next);
                continue;
            }
            let length = entry.u16(4)?;
            let blocks = if length > WRITTEN { length - WRITTEN } else { length };
            *next = first + u64::from(blocks.max(1));
            if length > WRITTEN {
                // It has its place and was never written: zeros.
                continue;
            }
            let position = first * self.block_size;
            let length = (u64::from(length) * self.block_size).min(size.saturating_sub(position));
            if length > 0 {
                let block = entry.split(8, u64::from(entry.u16(6)?))?;
                self.place(block + (length - 1) / self.block_size, node.1)?;
                extents.push(Extent { position, offset: self.place(block, node.1)?, length });
            }
        }
        Ok(())
    }

    /// Where a symbolic link leads.
    pub(super) fn target(&self, link: &Inode) -> Result<Vec<u8>> {
        const WHAT: &str = "symbolic link";
        let length = usize::try_from(link.size()?).map_err(|_| Ext4Error::Damaged(WHAT))?;
        if link.bytes().u32(0x20)? & INODE_EXTENTS == 0 {
            // A short one stands in the inode.
            return Ok(Bytes(link.bytes().get(0x28, 60)?, WHAT).get(0, length)?.to_vec());
        }
        self.contents(link, self.block_size, WHAT)
    }

    /// The extended attributes of a file, access lists among them, as setxattr(2) takes them.
    pub(super) fn attributes(&self, file: &Inode) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        const MARK: u32 = 0xEA02_0000;
        const WHAT: &str = "list of attributes";
        let mut attributes = vec![];
        let inode = file.bytes();
        if file.bytes.len() > OLD_INODE {
            let begin = OLD_INODE + usize::from(inode.u16(0x80)?);
            let inside = Bytes(inode.0.get(begin..).unwrap_or_default(), WHAT);
            if inside.0.len() >= 4 && inside.u32(0)? == MARK {
                let entries = inside.get(4, inside.0.len() - 4)?;
                self.list(&Bytes(entries, WHAT), 0, &mut attributes)?;
            }
        }
        let block = inode.split(0x68, u64::from(inode.u16(0x76)?))?;
        if block != 0 {
            let block = self.block(block, WHAT)?;
            let block = Bytes(&block, WHAT);
            if block.u32(0)? != MARK {
                return Err(Ext4Error::Damaged(WHAT));
            }
            self.list(&block, 32, &mut attributes)?;
        }
        Ok(attributes)
    }

    /// Reads the attributes from `offset` on; values are counted from the beginning of `bytes`.
    fn list(&self, bytes: &Bytes<'_>, mut offset: usize, attributes: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<()> {
        while bytes.0.len() >= offset + 4 && bytes.u32(offset)? != 0 {
            let (length, kind) = (usize::from(bytes.u8(offset)?), bytes.u8(offset + 1)?);
            let (value, inode) = (usize::from(bytes.u16(offset + 2)?), bytes.u32(offset + 4)?);
            let size = bytes.u32(offset + 8)?;
            let name = bytes.get(offset + 16, length)?;
            let value = if inode == 0 {
                bytes.get(value, size as usize)?.to_vec()
            } else {
                self.contents(&self.inode(inode)?, LARGEST_ATTRIBUTE, bytes.1)?
            };
            let whole = |prefix: &str| [prefix.as_bytes(), name].concat();
            attributes.push(match kind {
                1 => (whole("user."), value),
                2 => (b"system.posix_acl_access".to_vec(), access_list(&value)?),
                3 => (b"system.posix_acl_default".to_vec(), access_list(&value)?),
                4 => (whole("trusted."), value),
                6 => (whole("security."), value),
                _ => return Err(Ext4Error::Unsupported(format!("attributes of the kind {kind}"))),
            });
            offset += (16 + length).next_multiple_of(4);
        }
        Ok(())
    }
}

/// An access list, which ext4 keeps in a shorter form than setxattr(2) takes.
fn access_list(stored: &[u8]) -> Result<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let stored = Bytes(stored, "access list");
    if stored.u32(0)? != 1 {
        return Err(Ext4Error::Damaged(stored.1));
    }
    let mut list = 2_u32.to_le_bytes().to_vec();
    let mut offset = 4;
    while offset < stored.0.len() {
        let tag = stored.u16(offset)?;
        list.extend(stored.get(offset, 4)?);
        offset += 4;
        if tag == USER || tag == GROUP {
            list.extend(stored.get(offset, 4)?);
            offset += 4;
        } else {
            list.extend(u32::MAX.to_le_bytes());
        }
    }
    Ok(list)
}

impl Inode {
    fn bytes(&self) -> Bytes<'_> {
        Bytes(&self.bytes, "inode")
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn kind(&self) -> Result<Kind> {
        Ok(match self.bytes().u16(0)? >> 12 {
            0x1 => Kind::Pipe,
            0x2 => Kind::CharacterDevice,
            0x4 => Kind::Directory,
            0x6 => Kind::BlockDevice,
            0x8 => Kind::Regular,
            0xa => Kind::Link,
            0xc => Kind::Socket,
            _ => return Err(Ext4Error::Damaged("inode")),
        })
    }

    /// Permission bits, with set-user-ID, set-group-ID and sticky.
    pub(super) fn mode(&self) -> Result<u32> {
        Ok(u32::from(self.bytes().u16(0)? & 0o7777))
    }

    /// User and group.
    pub(super) fn owner(&self) -> Result<(u32, u32)> {
        let inode = self.bytes();
        let id = |low, high| Ok::<_, Ext4Error>(u32::from(inode.u16(high)?) << 16 | u32::from(inode.u16(low)?));
        Ok((id(0x2, 0x78)?, id(0x18, 0x7a)?))
    }

    pub(super) fn size(&self) -> Result<u64> {
        let inode = self.bytes();
        inode.split(0x4, u64::from(inode.u32(0x6c)?))
    }

    pub(super) fn names(&self) -> Result<u16> {
        self.bytes().u16(0x1a)
    }

    pub(super) fn is_encrypted(&self) -> Result<bool> {
        Ok(self.bytes().u32(0x20)? & 0x800 != 0)
    }

    /// Time of modification: seconds since 1970, and nanoseconds.
    pub(super) fn modified(&self) -> Result<(i64, u32)> {
        let inode = self.bytes();
        let seconds = i64::from(inode.u32(0x10)?.cast_signed());
        if self.bytes.len() >= 0x8c && inode.u16(0x80)? >= 0x0c {
            let extra = inode.u32(0x88)?;
            return Ok((seconds + (i64::from(extra & 3) << 32), extra >> 2));
        }
        Ok((seconds, 0))
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u64, u64)> {
        let inode = self.bytes();
        let (old, new) = (u64::from(inode.u32(0x28)?), u64::from(inode.u32(0x2c)?));
        Ok(if old == 0 { (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00) } else { (old >> 8 & 0xff, old & 0xff) })
    }
}

/// Reads all files. What one consists of is in the file system, in order, and not behind the file's end.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    const MOST: usize = 64;
    let Some(disk) = crate::fuzzing::file(bytes) else { return };
    let Ok(files) = FileSystem::look(&disk, 0) else { return };
    let (mut numbers, mut seen) = (vec![ROOT], std::collections::HashSet::new());
    while let Some(number) = numbers.pop().filter(|_| seen.len() < MOST) {
        let Ok(inode) = files.inode(number) else { continue };
        if !seen.insert(number) {
            continue;
        }
        let _ = (inode.mode(), inode.owner(), inode.names(), inode.is_encrypted(), inode.modified(), inode.device());
        let _ = files.attributes(&inode);
        match inode.kind() {
            Ok(Kind::Directory) => {
                let entries = files.entries(&inode).unwrap_or_default();
                numbers.extend(entries.iter().take(MOST).map(|entry| entry.inode));
            }
            Ok(Kind::Link) => drop(files.target(&inode)),
            Ok(_) | Err(_) => {}
        }
        let mut end = 0;
        for Extent { position, offset, length } in files.extents(&inode).unwrap_or_default() {
            assert!(end <= position, "an extent is not behind the one before it");
            end = position + length;
            assert!(inode.size().is_ok_and(|size| end <= size), "an extent is behind the end of its file");
            assert!(offset + length <= files.size(), "an extent is behind the end of its file system");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 1024;

    /// A node of an extent tree: each entry is about the next block of the file, and leads to `block`.
    fn node(depth: u16, entries: u16, block: u32) -> Vec<u8> {
        let mut node = [0xF30A, entries, entries, depth, 0, 0].map(u16::to_le_bytes).concat();
        for number in 0..u32::from(entries) {
            let entry = if depth == 0 { [number, 1, block] } else { [number, block, 0] };
            node.extend(entry.map(u32::to_le_bytes).concat());
        }
        node
    }

    /// A file whose tree has these nodes, the first one in the inode and the others in the blocks from 10 on.
    fn extents(nodes: &[Vec<u8>]) -> Result<Vec<Extent>> {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(64 * BLOCK).unwrap();
        for (number, node) in (10..).zip(&nodes[1..]) {
            disk.write_all_at(node, number * BLOCK).unwrap();
        }
        let files = FileSystem {
            disk: &disk,
            offset: 0,
            block_size: BLOCK,
            blocks: 64,
            inodes: 16,
            inodes_per_group: 16,
            inode_size: OLD_INODE,
            descriptor_size: 32,
            first_block: 1,
            uuid: Uuid::nil(),
            label: String::new(),
            needs_recovery: false,
        };
        let mut bytes = vec![0; OLD_INODE];
        // 4 GiB.
        bytes[0x6c] = 1;
        bytes[0x20..0x24].copy_from_slice(&INODE_EXTENTS.to_le_bytes());
        bytes[0x28..0x28 + nodes[0].len()].copy_from_slice(&nodes[0]);
        files.extents(&Inode { number: 12, bytes })
    }

    #[test]
    fn a_tree_that_leads_to_the_same_blocks_again_and_again_is_damaged() {
        let trees = [
            // Read to the end these are 4 * 84^5 extents, and 4 * 84 empty leaves.
            vec![node(5, 4, 10), node(4, 84, 11), node(3, 84, 12), node(2, 84, 13), node(1, 84, 14), node(0, 84, 2)],
            vec![node(2, 4, 10), node(1, 84, 11), node(0, 0, 2)],
            vec![node(1, 2, 10), node(0, 3, 2)],
        ];
        for tree in trees {
            assert!(matches!(extents(&tree), Err(Ext4Error::Damaged("extent tree"))));
        }
        assert_eq!(extents(&[node(1, 1, 10), node(0, 84, 2)]).unwrap().len(), 84);
    }

    #[test]
    fn a_file_system_that_would_end_behind_every_file_is_damaged() {
        let disk = tempfile::tempfile().unwrap();
        let mut block = [0; 1024];
        for (place, value) in
            [(0x38, u32::from(MAGIC)), (0x60, EXTENT_FEATURE | WIDE_FEATURE), (0x28, 1), (0x58, 128), (0xfc, 64 << 16)]
        {
            block[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        disk.write_all_at(&block, SUPERBLOCK).unwrap();
        assert!(FileSystem::open(&disk, 0).is_ok());
        disk.write_all_at(&[0xff; 4], SUPERBLOCK + 0x150).unwrap();
        assert!(matches!(FileSystem::open(&disk, 0), Err(Ext4Error::Damaged("superblock"))));
        assert!(FileSystem::open(&disk, u64::MAX).is_err());
    }
}
