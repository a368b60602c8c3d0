//! The disk: partitions and file systems, written straight into a sparse file. No loop device and no mount.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use gpt::{GptConfig, disk::LogicalBlockSize, mbr::ProtectiveMBR, partition_types};
use uuid::Uuid;

use super::{
    bootloader::{BootLoaderError, BootParts, EspFile},
    epoch, ext4,
};
use crate::{
    contract::{BuildRequest, Classified, FailureClass, Firmware, OsName},
    package::sparse::data_extents,
    process::{CommandSpec, ProcessError, Runner},
};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Size of the EFI system partition (eksa-facts 6.6).
const ESP_SIZE: u64 = 512 * MIB;
/// Size of the partition that holds GRUB's core, as distributions make it.
const BIOS_BOOT_SIZE: u64 = MIB;
/// What stays free at both ends, for the partition tables and for alignment.
const EDGE: u64 = MIB;
/// Of a file system's size, this share at most is left for files: the rest is inode tables, journal and reserve.
const USABLE_PERCENT: u64 = 88;

/// Why no disk could be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error(
        "the image's files need {needed_mib} MiB and the disk of {disk_mib} MiB has room for {room_mib} MiB; write at least \
         {enough_mib}Mi for spec.diskSize"
    )]
    TooSmall { needed_mib: u64, room_mib: u64, disk_mib: u64, enough_mib: u64 },
    #[error("can not write the disk {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("can not write the partition table of {}", .path.display())]
    Table { path: PathBuf, source: gpt::GptError },
    #[error(transparent)]
    BootLoader(#[from] BootLoaderError),
    #[error("can not make the {what}")]
    Tool { what: &'static str, source: ProcessError },
}

impl Classified for DiskError {
    fn class(&self) -> FailureClass {
        match self {
            Self::TooSmall { .. } => FailureClass::BadInput,
            Self::Write { .. } | Self::Table { .. } => FailureClass::Environment,
            Self::BootLoader(error) => error.class(),
            Self::Tool { source, .. } => source.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::TooSmall { .. } => "DiskTooSmall",
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => "DiskFull",
            Self::Write { .. } | Self::Table { .. } | Self::Tool { source: ProcessError::Failed { .. }, .. } => {
                "AssembleFailed"
            }
            Self::BootLoader(error) => error.reason(),
            Self::Tool { source, .. } => source.reason(),
        }
    }
}

/// What identifies the parts of a disk: the same inputs give the same, others give others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct DiskIds {
    pub disk: Uuid,
    pub boot_partition: Uuid,
    pub root_partition: Uuid,
    /// Of the ext4 file system.
    pub root: Uuid,
    /// Of the FAT file system: its volume serial number.
    pub esp: u32,
}

impl DiskIds {
    pub(super) fn new(request: &BuildRequest) -> Self {
        let BuildRequest { os, provider, firmware, release, base, disk_size_mib, packages, files, .. } = request;
        let inputs = serde_json::json!([os, provider, firmware, release, base, disk_size_mib, packages, files]);
        let disk = Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("nodeimagebuild.dev/disk/{inputs}").as_bytes());
        let id = |part: &str| Uuid::new_v5(&disk, part.as_bytes());
        let esp = u32::from_be_bytes(id("esp").into_bytes().first_chunk().copied().unwrap_or_default());
        Self { disk, boot_partition: id("boot-partition"), root_partition: id("root-partition"), root: id("root"), esp }
    }

    /// The serial number as `/etc/fstab` and blkid write it.
    pub(super) fn esp_label(&self) -> String {
        format!("{:04X}-{:04X}", self.esp >> 16, self.esp & 0xffff)
    }
}

/// Where a partition is, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub offset: u64,
    pub size: u64,
}

/// Number of the partition that holds the root file system: Tinkerbell's templates of EKS Anywhere mount it by this number
/// (eksa-facts 6.6).
pub(super) const fn root_number(os: OsName) -> u32 {
    match os {
        OsName::Ubuntu | OsName::Debian => 2,
        OsName::Redhat => 1,
    }
}

/// The first partition on the disk is what firmware starts: the EFI system partition, or GRUB's core for BIOS. Behind it is
/// the root file system, whichever number it has, so that it can grow with the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Layout {
    firmware: Firmware,
    root_number: u32,
    size: u64,
    boot: Place,
    root: Place,
}

impl Layout {
    pub(super) fn new(disk_size_mib: u64, firmware: Firmware, os: OsName) -> Self {
        let size = disk_size_mib.saturating_mul(MIB);
        let boot_size = match firmware {
            Firmware::Efi => ESP_SIZE,
            Firmware::Bios => BIOS_BOOT_SIZE,
        };
        let boot = Place { offset: EDGE, size: boot_size };
        let offset = boot.offset + boot.size;
        let root = Place { offset, size: size.saturating_sub(offset + EDGE) };
        Self { firmware, root_number: root_number(os), size, boot, root }
    }

    /// Refuses a disk that the tree does not fit into, with the size that would do.
    fn check(&self, needed: u64) -> Result<(), DiskError> {
        let room = self.root.size / 100 * USABLE_PERCENT;
        if needed <= room {
            return Ok(());
        }
        let enough = needed / USABLE_PERCENT * 100 + self.root.offset + EDGE;
        Err(DiskError::TooSmall {
            needed_mib: needed.div_ceil(MIB),
            room_mib: room / MIB,
            disk_mib: self.size / MIB,
            // A whole number of 256 MiB above it.
            enough_mib: enough.div_ceil(256 * MIB) * 256,
        })
    }
}

/// What a disk is made from.
#[derive(Debug)]
pub(super) struct Contents<'d> {
    /// The sealed tree.
    pub root: &'d Path,
    pub boot: BootParts,
    pub ids: DiskIds,
    /// The time of everything that the build made, see [`epoch`].
    pub epoch: u32,
}

/// Makes the disk at `disk`. `scratch` is a directory for what is copied into the EFI system partition.
pub(super) async fn assemble(
    contents: &Contents<'_>,
    disk: &Path,
    scratch: &Path,
    layout: &Layout,
    runner: &Runner,
) -> Result<(), DiskError> {
    let Contents { root, boot, ids, epoch } = contents;
    let failed = |source| DiskError::Write { path: disk.to_owned(), source };
    layout.check(size_of(root).map_err(failed)?)?;
    let file = File::create(disk).map_err(failed)?;
    file.set_len(layout.size).map_err(failed)?;
    drop(file);
    write_table(disk, layout, ids)?;
    run(runner, "root file system", root_file_system(root, disk, layout, ids, *epoch)).await?;
    let open = || OpenOptions::new().read(true).write(true).open(disk);
    open().and_then(|file| ext4::settle_times(&file, layout.root.offset, *epoch)).map_err(failed)?;
    match boot {
        BootParts::Efi(files) => {
            // In a file of its own: mtools can not read a FAT in a disk of 16 GiB and more.
            let esp = scratch.join("esp.img");
            File::create(&esp).and_then(|file| file.set_len(layout.boot.size)).map_err(failed)?;
            run(runner, "EFI system partition", esp_file_system(&esp, ids)).await?;
            let tree = esp_tree(scratch, files, *epoch).map_err(failed)?;
            run(runner, "files of the EFI system partition", esp_files(&esp, &tree, *epoch)).await?;
            open().and_then(|disk| insert(&File::open(&esp)?, &disk, layout.boot.offset)).map_err(failed)?;
            fs::remove_file(&esp).map_err(failed)?;
        }
        BootParts::Bios(loader) => {
            let (code, core) = loader.at(layout.boot.offset / SECTOR)?;
            let file = open().map_err(failed)?;
            file.write_all_at(&code, 0).and_then(|()| file.write_all_at(&core, layout.boot.offset)).map_err(failed)?;
        }
    }
    run(runner, "check of the root file system", root_check(disk, layout)).await?;
    File::open(disk).and_then(|file| file.sync_all()).map_err(failed)
}

async fn run(runner: &Runner, what: &'static str, spec: CommandSpec) -> Result<(), DiskError> {
    runner.run(spec).await.map(drop).map_err(|source| DiskError::Tool { what, source })
}

fn write_table(disk: &Path, layout: &Layout, ids: &DiskIds) -> Result<(), DiskError> {
    let (name, kind) = match layout.firmware {
        Firmware::Efi => ("EFI system", partition_types::EFI),
        Firmware::Bios => ("BIOS boot", partition_types::BIOS),
    };
    let write = || {
        let mut file = OpenOptions::new().read(true).write(true).open(disk)?;
        let sectors = u32::try_from(layout.size / SECTOR - 1).unwrap_or(u32::MAX);
        ProtectiveMBR::with_lb_size(sectors)
            .overwrite_lba0(&mut file)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let mut table = GptConfig::new()
            .writable(true)
            .logical_block_size(LogicalBlockSize::Lb512)
            .create_from_device(file, Some(ids.disk))?;
        let parts = [
            (3 - layout.root_number, name, layout.boot, kind, ids.boot_partition),
            (layout.root_number, "root", layout.root, partition_types::LINUX_FS, ids.root_partition),
        ];
        for (number, name, place, kind, _) in &parts {
            table.add_partition_at(name, *number, place.offset / SECTOR, place.size / SECTOR, kind.clone(), 0)?;
        }
        let mut partitions = table.take_partitions();
        for (number, _, _, _, id) in parts {
            if let Some(partition) = partitions.get_mut(&number) {
                partition.part_guid = id;
            }
        }
        table.update_partitions(partitions)?;
        table.write().map(drop)
    };
    write().map_err(|source| DiskError::Table { path: disk.to_owned(), source })
}

/// ext4 with the tree's contents, written at the partition's place.
fn root_file_system(root: &Path, disk: &Path, layout: &Layout, ids: &DiskIds, epoch: u32) -> CommandSpec {
    CommandSpec::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", "root"])
        .args(["-U", &ids.root.to_string()])
        .arg("-E")
        .arg(format!(
            "offset={},hash_seed={},root_owner=0:0,lazy_itable_init=1,nodiscard",
            layout.root.offset, ids.root
        ))
        .arg("-d")
        .arg(root)
        .arg(disk)
        .arg(format!("{}", layout.root.size / 4096))
        // The file system's own times.
        .env("E2FSPROGS_FAKE_TIME", epoch.to_string())
}

fn root_check(disk: &Path, layout: &Layout) -> CommandSpec {
    let mut device = disk.as_os_str().to_owned();
    device.push(format!("?offset={}", layout.root.offset));
    CommandSpec::new("e2fsck").args(["-f", "-n"]).arg(device)
}

fn esp_file_system(esp: &Path, ids: &DiskIds) -> CommandSpec {
    CommandSpec::new("mkfs.vfat")
        .args(["-F", "32", "-n", "ESP", "--invariant"])
        .args(["-i", &format!("{:08x}", ids.esp)])
        .arg(esp)
}

/// Writes what `part` holds into `disk` at `offset`, but for its holes.
fn insert(part: &File, disk: &File, offset: u64) -> io::Result<()> {
    let mut piece = vec![0; 1 << 20];
    for extent in data_extents(part)? {
        let mut position = extent.offset;
        while position < extent.end() {
            let len = usize::try_from(extent.end() - position).unwrap_or(usize::MAX).min(piece.len());
            part.read_exact_at(&mut piece[..len], position)?;
            disk.write_all_at(&piece[..len], offset + position)?;
            position += len as u64;
        }
    }
    Ok(())
}

/// The contents of the EFI system partition as files.
fn esp_tree(scratch: &Path, files: &[EspFile], epoch: u32) -> io::Result<PathBuf> {
    let tree = scratch.join("esp");
    for EspFile { place, bytes } in files {
        let place = tree.join(place);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(place, bytes)?;
    }
    let made = tree.join("EFI");
    set_times(&made, epoch::time(epoch))?;
    Ok(made)
}

/// Gives a directory and all it holds the same time.
fn set_times(directory: &Path, time: SystemTime) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            set_times(&entry.path(), time)?;
        } else {
            File::open(entry.path())?.set_modified(time)?;
        }
    }
    File::open(directory)?.set_modified(time)
}

fn esp_files(esp: &Path, tree: &Path, epoch: u32) -> CommandSpec {
    CommandSpec::new("mcopy")
        .args(["-s", "-Q", "-m", "-i"])
        .arg(esp)
        .arg(tree)
        .arg("::/")
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        // FAT has local times.
        .env("TZ", "UTC")
}

/// Bytes that the files below `directory` take, in blocks of ext4; a file with several names counts once.
fn size_of(directory: &Path) -> io::Result<u64> {
    const BLOCK: u64 = 4096;
    let mut total = 0;
    let mut seen = std::collections::HashSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        total += BLOCK;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let data = entry.metadata()?;
            if data.is_dir() {
                directories.push(entry.path());
            } else if data.nlink() == 1 || seen.insert((data.dev(), data.ino())) {
                // Holes are not written.
                total += data.len().min(data.blocks() * SECTOR).div_ceil(BLOCK) * BLOCK;
            }
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{native::sample, secret::Redactor};

    #[test]
    fn root_is_partition_2_behind_an_esp_of_512_mib() {
        let layout = Layout::new(6656, Firmware::Efi, OsName::Debian);
        assert_eq!(layout.boot, Place { offset: MIB, size: 512 * MIB });
        assert_eq!(layout.root, Place { offset: 513 * MIB, size: (6656 - 514) * MIB });
    }

    #[test]
    fn root_of_red_hat_has_number_1_and_still_the_end_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        let layout = Layout::new(6656, Firmware::Efi, OsName::Redhat);
        File::create(&disk).unwrap().set_len(layout.size).unwrap();
        write_table(&disk, &layout, &DiskIds::new(&sample::request())).unwrap();
        let table = GptConfig::new().open(&disk).unwrap();
        let kinds = |number| table.partitions()[&number].part_type_guid.clone();
        assert_eq!((kinds(1), kinds(2)), (partition_types::LINUX_FS, partition_types::EFI));
        assert_eq!(table.partitions()[&1].first_lba * SECTOR, layout.boot.offset + ESP_SIZE);
    }

    #[test]
    fn identities_are_those_of_the_inputs() {
        let first = DiskIds::new(&sample::request());
        let mut again = sample::request();
        again.identity.build_id = "another".into();
        again.verify.timeout_seconds += 1;
        let mut other = sample::request();
        other.packages.install.push("jq".into());
        let (again, other) = (DiskIds::new(&again), DiskIds::new(&other));
        assert_eq!(first, again);
        assert!(first.root != other.root && first.disk != other.disk && first.esp != other.esp);
        assert_eq!(DiskIds { esp: 0x12_34ab, ..first }.esp_label(), "0012-34AB");
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused_with_the_size_to_write() {
        let layout = Layout::new(4096, Firmware::Efi, OsName::Debian);
        layout.check(1024 * MIB).unwrap();
        let error = layout.check(3500 * MIB).unwrap_err();
        let DiskError::TooSmall { enough_mib, .. } = error else { panic!("{error}") };
        assert!(error.to_string().contains("spec.diskSize"), "{error}");
        Layout::new(enough_mib, Firmware::Efi, OsName::Debian).check(3500 * MIB).unwrap();
    }

    /// Needs mke2fs, mkfs.vfat and mcopy, as a build does.
    #[tokio::test]
    async fn the_same_tree_becomes_the_same_disk_with_both_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(1024, Firmware::Efi, OsName::Debian);
        let ids = DiskIds::new(&sample::request());
        let runner = Runner::new(Redactor::default(), CancellationToken::new());
        let make = async |name: &str| {
            let dir = dir.path().join(name);
            let root = dir.join("root");
            fs::create_dir_all(&root).unwrap();
            fs::write(root.join("hello"), "from the root").unwrap();
            let disk = dir.join("disk.raw");
            let file = EspFile { place: "EFI/debian/grub.cfg".into(), bytes: b"configfile".to_vec() };
            let contents = Contents { root: &root, boot: BootParts::Efi(vec![file]), ids, epoch: 1_600_000_000 };
            assemble(&contents, &disk, &dir, &layout, &runner).await.unwrap();
            disk
        };
        let disk = make("first").await;
        // FAT's times are even seconds: the second disk is made in another one than the first.
        let begin = std::time::Instant::now();
        let again = loop {
            let again = make("second").await;
            if begin.elapsed() > std::time::Duration::from_secs(2) {
                break again;
            }
            fs::remove_dir_all(dir.path().join("second")).unwrap();
        };
        assert!(fs::read(&disk).unwrap() == fs::read(again).unwrap(), "the disks differ");

        let table = GptConfig::new().open(&disk).unwrap();
        assert_eq!(*table.guid(), ids.disk);
        let parts: Vec<_> = table.partitions().values().map(|part| (part.first_lba * SECTOR, part.part_guid)).collect();
        assert_eq!(parts, [(layout.boot.offset, ids.boot_partition), (layout.root.offset, ids.root_partition)]);
        assert!(disk.metadata().unwrap().blocks() * SECTOR < 200 * MIB, "holes were written");

        let device = format!("{}?offset={}", disk.display(), layout.root.offset);
        let shown = runner.run(CommandSpec::new("debugfs").args(["-R", "cat /hello", &device])).await.unwrap();
        assert_eq!(shown.stdout, "from the root");
        let device = format!("{}@@{}", disk.display(), layout.boot.offset);
        let shown =
            runner.run(CommandSpec::new("mtype").args(["-i", &device, "::/EFI/debian/grub.cfg"])).await.unwrap();
        assert_eq!(shown.stdout, "configfile");
    }

    /// Needs mke2fs, mkfs.vfat and mcopy, as a build does.
    #[tokio::test]
    async fn a_disk_of_the_size_that_vsphere_has_gets_its_efi_files() {
        let dir = tempfile::tempdir().unwrap();
        let (root, disk) = (dir.path().join("root"), dir.path().join("disk.raw"));
        fs::create_dir(&root).unwrap();
        let layout = Layout::new(20_480, Firmware::Efi, OsName::Debian);
        let file = EspFile { place: "EFI/BOOT/BOOTX64.EFI".into(), bytes: vec![7; 3 << 20] };
        let ids = DiskIds::new(&sample::request());
        let contents = Contents { root: &root, boot: BootParts::Efi(vec![file]), ids, epoch: 1_600_000_000 };
        let runner = Runner::new(Redactor::default(), CancellationToken::new());
        assemble(&contents, &disk, dir.path(), &layout, &runner).await.unwrap();

        let esp = dir.path().join("esp.raw");
        let (mut bytes, from) = (vec![0; 64 << 20], File::open(&disk).unwrap());
        from.read_exact_at(&mut bytes, layout.boot.offset).unwrap();
        fs::write(&esp, bytes).unwrap();
        OpenOptions::new().write(true).open(&esp).unwrap().set_len(layout.boot.size).unwrap();
        let shown = runner.run(CommandSpec::new("mtype").arg("-i").arg(&esp).arg("::/EFI/BOOT/BOOTX64.EFI")).await;
        assert_eq!(shown.unwrap().stdout.len(), 3 << 20);
        assert!(!dir.path().join("esp.img").exists());
    }
}
