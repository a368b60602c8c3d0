//! The times in a new ext4 file system.
//!
//! `mke2fs -d` takes the times of change and of access from the tree, where no program can set the former: they are those
//! of the build. Here all of them become such that the same tree gives the same bytes. Offsets are those of Linux's
//! `fs/ext4/ext4.h`; the check of the file system that follows reads everything again.

use std::{fs::File, io, os::unix::fs::FileExt};

use crc::{Algorithm, CRC_32_ISCSI, Crc};

/// The kernel's `ext4_chksum`: crc32c that is not inverted at its end.
const CHECKSUM: Crc<u32> = Crc::<u32>::new(&RAW_CRC32C);
const RAW_CRC32C: Algorithm<u32> = Algorithm { xorout: 0, ..CRC_32_ISCSI };
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xEF53;
/// Feature flags: inodes have checksums; block numbers have 64 bits.
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const INCOMPAT_64BIT: u32 = 0x80;
/// A group whose inode table was never written.
const INODE_UNINIT: u16 = 1;
/// Bytes of an inode without its later fields.
const OLD_INODE: usize = 128;

/// What of the superblock is needed.
struct Superblock {
    inodes: u32,
    inodes_per_group: u32,
    inode_size: usize,
    block_size: u64,
    first_block: u64,
    descriptor_size: usize,
    uuid: [u8; 16],
    checksums: bool,
}

impl Superblock {
    fn read(disk: &File, offset: u64) -> io::Result<Self> {
        let mut block = [0; 1024];
        disk.read_exact_at(&mut block, offset + SUPERBLOCK)?;
        if u16_at(&block, 0x38) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "there is no ext4 file system"));
        }
        let wide = u32_at(&block, 0x60) & INCOMPAT_64BIT != 0;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&block[0x68..0x78]);
        Ok(Self {
            inodes: u32_at(&block, 0x0),
            inodes_per_group: u32_at(&block, 0x28).max(1),
            inode_size: usize::from(u16_at(&block, 0x58)).max(OLD_INODE),
            block_size: 1024 << u32_at(&block, 0x18).min(6),
            first_block: u64::from(u32_at(&block, 0x14)),
            descriptor_size: if wide { usize::from(u16_at(&block, 0xfe)) } else { 32 },
            uuid,
            checksums: u32_at(&block, 0x64) & RO_COMPAT_METADATA_CSUM != 0,
        })
    }
}

/// Makes every time of the file system at `offset` of the disk `epoch` (seconds since 1970), but for times of modification
/// that are earlier.
pub(super) fn settle_times(disk: &File, offset: u64, epoch: u32) -> io::Result<()> {
    let superblock = Superblock::read(disk, offset)?;
    let Superblock { inodes, inodes_per_group, inode_size, block_size, first_block, descriptor_size, .. } = superblock;
    let groups = inodes.div_ceil(inodes_per_group) as usize;
    let mut descriptors = vec![0; groups * descriptor_size];
    disk.read_exact_at(&mut descriptors, offset + (first_block + 1) * block_size)?;
    for (group, descriptor) in (0..).zip(descriptors.chunks_exact(descriptor_size)) {
        if u16_at(descriptor, 0x12) & INODE_UNINIT != 0 {
            continue;
        }
        let place = |low, high| {
            let high = if descriptor_size >= 64 { u32_at(descriptor, high) } else { 0 };
            offset + (u64::from(high) << 32 | u64::from(u32_at(descriptor, low))) * block_size
        };
        let mut used = vec![0; inodes_per_group.div_ceil(8) as usize];
        disk.read_exact_at(&mut used, place(0x4, 0x24))?;
        // The table up to the last inode that is used.
        let Some(last) = (0..inodes_per_group).rev().find(|index| is_set(&used, *index)) else { continue };
        let table = place(0x8, 0x28);
        let mut inodes = vec![0; (last as usize + 1) * inode_size];
        disk.read_exact_at(&mut inodes, table)?;
        for (index, inode) in (0..).zip(inodes.chunks_exact_mut(inode_size)) {
            // Reserved inodes that hold nothing have no mode.
            if is_set(&used, index) && u16_at(inode, 0x0) != 0 {
                settle(inode, epoch);
                if superblock.checksums {
                    checksum(inode, group * inodes_per_group + index + 1, &superblock.uuid);
                }
            }
        }
        disk.write_all_at(&inodes, table)?;
    }
    Ok(())
}

fn settle(inode: &mut [u8], epoch: u32) {
    const ACCESS: usize = 0x8;
    const CHANGE: usize = 0xc;
    const MODIFICATION: usize = 0x10;
    let modified = u32_at(inode, MODIFICATION).min(epoch);
    for (field, time) in [(ACCESS, modified), (CHANGE, epoch), (MODIFICATION, modified)] {
        inode[field..field + 4].copy_from_slice(&time.to_le_bytes());
    }
    // Fractions of a second and the time of creation, in inodes that have them.
    if inode.len() >= 0xa0 && u16_at(inode, 0x80) >= 0x1c {
        inode[0x84..0x90].fill(0);
        inode[0x90..0x94].copy_from_slice(&epoch.to_le_bytes());
        inode[0x94..0x98].fill(0);
    }
}

/// Writes the inode's checksum: of the file system's UUID, the inode's number, its generation, and itself without it.
fn checksum(inode: &mut [u8], number: u32, uuid: &[u8; 16]) {
    const LOW: usize = 0x7c;
    const HIGH: usize = 0x82;
    let wide = inode.len() > OLD_INODE && u16_at(inode, 0x80) >= 4;
    inode[LOW..LOW + 2].fill(0);
    if wide {
        inode[HIGH..HIGH + 2].fill(0);
    }
    let mut digest = CHECKSUM.digest();
    digest.update(uuid);
    digest.update(&number.to_le_bytes());
    digest.update(&inode[0x64..0x68]);
    digest.update(inode);
    let [a, b, c, d] = digest.finalize().to_le_bytes();
    inode[LOW..LOW + 2].copy_from_slice(&[a, b]);
    if wide {
        inode[HIGH..HIGH + 2].copy_from_slice(&[c, d]);
    }
}

fn is_set(bitmap: &[u8], index: u32) -> bool {
    bitmap.get(index as usize / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::MetadataExt,
        path::Path,
        process::Command,
        time::{Duration, SystemTime},
    };

    use super::*;

    fn run(program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).env("E2FSPROGS_FAKE_TIME", "1000000").output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {said}");
        said
    }

    fn image(tree: &Path, file: &Path) {
        let args = ["-q", "-t", "ext4", "-E", "hash_seed=6ba7b810-9dad-11d1-80b4-00c04fd430c8", "-U"];
        let rest =
            ["6ba7b810-9dad-11d1-80b4-00c04fd430c8", "-d", tree.to_str().unwrap(), file.to_str().unwrap(), "64M"];
        run("mke2fs", &[&args[..], &rest].concat());
        settle_times(&fs::OpenOptions::new().read(true).write(true).open(file).unwrap(), 0, 1_600_000_000).unwrap();
        run("e2fsck", &["-f", "-n", file.to_str().unwrap()]);
    }

    #[test]
    fn trees_of_the_same_contents_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = vec![];
        for (number, seconds) in [(1, 1_500_000_000), (2, 1_900_000_000)] {
            let tree = dir.path().join(format!("tree-{number}"));
            fs::create_dir_all(tree.join("sub/directory")).unwrap();
            for name in ["b", "a", "sub/c"] {
                let file = fs::File::create(tree.join(name)).unwrap();
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_400_000_000);
                file.set_modified(time).unwrap();
            }
            // Later than the epoch in one of them, as everything is that a build makes.
            let late = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds + 200_000_000);
            fs::File::open(tree.join("sub")).unwrap().set_modified(late).unwrap();
            std::os::unix::fs::symlink("a", tree.join("link")).unwrap();
            assert!(fs::metadata(tree.join("a")).unwrap().ctime() > 1_600_000_000);
            let file = dir.path().join(format!("image-{number}"));
            image(&tree, &file);
            images.push(file);
        }
        let shown = run("debugfs", &["-R", "stat /a", images[0].to_str().unwrap()]);
        for (field, seconds) in [("mtime", 1_400_000_000), ("atime", 1_400_000_000), ("ctime", 1_600_000_000)] {
            assert!(shown.contains(&format!("{field}: {seconds:#010x}")), "{field} in {shown}");
        }
        let [first, second] = [&images[0], &images[1]].map(|file| fs::read(file).unwrap());
        assert!(first == second, "the file systems differ");
    }

    #[test]
    fn refuses_what_is_no_ext4_file_system() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(settle_times(&file, 0, 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
