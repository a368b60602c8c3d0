//! A disk image as the base: the files of its root file system become the tree, read without mounting it (decision 12).
//!
//! The disk is the build's own copy: its file systems are checked first, which also brings their journals to an end.

pub(crate) mod ext4;
pub(crate) mod fstab;
pub(crate) mod partitions;
pub(crate) mod qcow2;
mod unpack;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use self::{
    ext4::{Ext4Error, FileSystem, Kind, ROOT},
    fstab::Mount,
    partitions::{Content, Partition},
    qcow2::Qcow2Error,
    unpack::Unpacking,
};
use super::tree::{TreeError, within};
use crate::{
    contract::{Classified, FailureClass},
    package::sparse::data_extents,
    process::{CommandSpec, ProcessError, Runner},
};

/// Files by which a root file system is known (os-release(5)).
const OS_RELEASE: [&str; 2] = ["etc/os-release", "usr/lib/os-release"];
const FSTAB: &str = "/etc/fstab";

/// Why a disk image is no base.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(
        "the source image can not be the base: {what}. The engine Native reads the files of ext4 file systems in \
         partitions of one disk; {instead}, or write the system as a tar archive and name that as spec.base"
    )]
    Unsupported { what: String, instead: String },
    #[error(
        "the source image is damaged ({place}: {why}); shut its machine down before the image is made, and make the \
         image anew"
    )]
    Damaged { place: String, why: String },
    #[error("can not read the source image {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("can not write {} of the source image", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the check of the source image's file system did not end")]
    Check(#[source] ProcessError),
    #[error("reading the source image was stopped")]
    Stopped,
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl SourceError {
    fn unsupported(what: &str, instead: &str) -> Self {
        Self::Unsupported { what: what.to_owned(), instead: instead.to_owned() }
    }
}

impl Classified for SourceError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Unsupported { .. } | Self::Damaged { .. } => FailureClass::BadInput,
            Self::Read { .. } | Self::Write { .. } => FailureClass::Environment,
            Self::Check(error) => error.class(),
            Self::Stopped => FailureClass::Cancelled,
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Unsupported { .. } => "SourceImageUnsupported",
            Self::Damaged { .. } => "SourceImageDamaged",
            Self::Write { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                "DiskFull"
            }
            Self::Read { .. } | Self::Write { .. } => "WorkDirectoryUnusable",
            Self::Check(error) => error.reason(),
            Self::Stopped => "Cancelled",
            Self::Tree(error) => error.reason(),
        }
    }
}

/// Unpacks the system in the disk image `image`, raw or qcow2, into the new directory `root`. The image is used up.
pub(super) async fn unpack(image: &Path, root: &Path, runner: &Runner) -> Result<(), SourceError> {
    fs::create_dir_all(root).map_err(|source| SourceError::Write { path: root.to_owned(), source })?;
    let (image, stopped) = (image.to_owned(), runner.clone());
    let raw = blocking(move || raw_disk(&image, &stopped)).await?;
    let disk = open(&raw)?;
    let partitions = partitions::find(&disk).map_err(|source| unreadable(&raw, source))?;
    let system = find_root(&disk, &partitions)?;
    unpack_one(&raw, system, "/", root, runner).await?;
    let table = within(root, |tree| tree.read(FSTAB))??.unwrap_or_default();
    for mount in fstab::mounts(&table) {
        let Some(partition) = find_mounted(&disk, &partitions, &mount)? else { continue };
        let place = mount.place.to_string_lossy().into_owned();
        // What the mount would hide.
        within(root, |tree| tree.clear(&place))??;
        unpack_one(&raw, partition, &place, root, runner).await?;
    }
    fs::remove_file(&raw).map_err(|source| SourceError::Write { path: raw, source })
}

/// What takes long without waiting for anything gets a thread that nothing else waits for.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(SourceError::Stopped))
}

fn unreadable(path: &Path, source: io::Error) -> SourceError {
    SourceError::Read { path: path.to_owned(), source }
}

fn open(path: &Path) -> Result<File, SourceError> {
    File::open(path).map_err(|source| unreadable(path, source))
}

/// The image as a raw disk; of a qcow2 a new one is made, and it goes.
fn raw_disk(image: &Path, runner: &Runner) -> Result<PathBuf, SourceError> {
    let file = open(image)?;
    if !qcow2::is_qcow2(&file).map_err(|source| unreadable(image, source))? {
        return Ok(image.to_owned());
    }
    let path = image.with_extension("raw");
    let written = |source| SourceError::Write { path: path.clone(), source };
    let raw = File::create(&path).map_err(written)?;
    qcow2::unpack(&file, &raw, || runner.is_cancelled()).map_err(|error| match error {
        Qcow2Error::Read(source) if source.kind() != io::ErrorKind::UnexpectedEof => unreadable(image, source),
        Qcow2Error::Write(source) => written(source),
        Qcow2Error::Stopped => SourceError::Stopped,
        Qcow2Error::Unsupported(why) => {
            SourceError::unsupported(&format!("it is a qcow2 that {why}"), "convert it with qemu-img convert")
        }
        other => SourceError::Damaged { place: "qcow2".to_owned(), why: other.to_string() },
    })?;
    fs::remove_file(image).map_err(written)?;
    Ok(path)
}

/// Checks one file system, and unpacks it at `place` of the tree.
async fn unpack_one(
    raw: &Path,
    partition: &Partition,
    place: &str,
    root: &Path,
    runner: &Runner,
) -> Result<(), SourceError> {
    let (name, disk, offset) = (partition.to_string(), raw.to_owned(), partition.offset);
    let part = name.clone();
    let (path, offset) = blocking(move || to_be_checked(disk, offset, &part)).await?;
    check(&path, offset, &name, runner).await?;
    let (place, root, stopped) = (PathBuf::from(place), root.to_owned(), runner.clone());
    let file_system = path.clone();
    blocking(move || {
        let disk = &open(&file_system)?;
        let files = &FileSystem::open(disk, offset).map_err(|error| why_not(&name, &error))?;
        let stopped = &|| stopped.is_cancelled();
        let unpacking = Unpacking { name: &name, disk, files, place: &place, stopped };
        within(&root, |_| unpacking.run())?
    })
    .await?;
    if path == raw {
        return Ok(());
    }
    fs::remove_file(&path).map_err(|source| SourceError::Write { path, source })
}

/// The file in which the file system at `offset` of the disk can be checked, and where in it. One with a journal to be
/// carried out is copied to a file of its own: e2fsck forgets the offset when it has done that (e2fsprogs 1.47.0).
fn to_be_checked(raw: PathBuf, offset: u64, name: &str) -> Result<(PathBuf, u64), SourceError> {
    let disk = open(&raw)?;
    let looked = FileSystem::look(&disk, offset).map_err(|error| why_not(name, &error))?;
    if !looked.needs_recovery || offset == 0 {
        return Ok((raw, offset));
    }
    let path = raw.with_extension("partition");
    match take_out(&disk, offset, looked.size(), &path) {
        Ok(()) => Ok((path, 0)),
        Err(source) => Err(SourceError::Write { path, source }),
    }
}

/// Copies a part of the disk to the new file `path`, but for its holes.
fn take_out(disk: &File, offset: u64, size: u64, path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    let mut piece = vec![0; 1 << 20];
    for extent in data_extents(disk)? {
        let (mut position, end) = (extent.offset.max(offset), extent.end().min(offset.saturating_add(size)));
        while position < end {
            let length = usize::try_from(end - position).unwrap_or(usize::MAX).min(piece.len());
            disk.read_exact_at(&mut piece[..length], position)?;
            file.write_all_at(&piece[..length], position - offset)?;
            position += length as u64;
        }
    }
    Ok(())
}

/// Lets e2fsck carry the journal out, and mend what can be mended without a decision.
async fn check(raw: &Path, offset: u64, name: &str, runner: &Runner) -> Result<(), SourceError> {
    let mut device = raw.as_os_str().to_owned();
    if offset > 0 {
        device.push(format!("?offset={offset}"));
    }
    match runner.run(CommandSpec::new("e2fsck").args(["-f", "-p"]).arg(device)).await {
        // 1 and 2: something was mended.
        Ok(_) | Err(ProcessError::Failed { code: Some(1 | 2), .. }) => Ok(()),
        Err(ProcessError::Failed { output, .. }) => Err(SourceError::Damaged { place: name.to_owned(), why: output }),
        Err(error) => Err(SourceError::Check(error)),
    }
}

fn why_not(place: &str, error: &Ext4Error) -> SourceError {
    match error {
        Ext4Error::Unsupported(what) => SourceError::unsupported(
            &format!("the file system in {place} uses {what}"),
            "start from an image without that",
        ),
        other => SourceError::Damaged { place: place.to_owned(), why: other.to_string() },
    }
}

/// The partition that holds the system.
fn find_root<'p>(disk: &File, partitions: &'p [Partition]) -> Result<&'p Partition, SourceError> {
    let (mut roots, mut unread) = (vec![], vec![]);
    for partition in partitions.iter().filter(|partition| partition.content == Content::Ext) {
        match holds_system(disk, partition) {
            Ok(true) => roots.push(partition),
            Ok(false) => {}
            Err(error) => unread.push(why_not(&partition.to_string(), &error)),
        }
    }
    match roots[..] {
        [root] => Ok(root),
        [] => Err(unread.into_iter().next().unwrap_or_else(|| no_root(partitions))),
        _ => {
            let places: Vec<_> = roots.iter().map(ToString::to_string).collect();
            Err(SourceError::unsupported(
                &format!("it holds several systems, in {}", places.join(" and ")),
                "start from an image with one",
            ))
        }
    }
}

fn no_root(partitions: &[Partition]) -> SourceError {
    let parts: Vec<_> = partitions.iter().map(|partition| format!("{partition} is {}", partition.content)).collect();
    let what = format!("no ext4 file system in it holds a system with os-release ({})", parts.join(", "));
    SourceError::unsupported(&what, "start from an image whose root is one")
}

fn holds_system(disk: &File, partition: &Partition) -> Result<bool, Ext4Error> {
    // Before its journal is carried out it is good enough to see what it is.
    let files = FileSystem::look(disk, partition.offset)?;
    for path in OS_RELEASE {
        let mut found = Some(files.inode(ROOT)?);
        for part in path.split('/') {
            found = found.map(|directory| files.find(&directory, part)).transpose()?.flatten();
        }
        if let Some(file) = found
            && matches!(file.kind()?, Kind::Regular | Kind::Link)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The partition that the system mounts, if it is one that belongs to the image.
fn find_mounted<'p>(
    disk: &File,
    partitions: &'p [Partition],
    mount: &Mount,
) -> Result<Option<&'p Partition>, SourceError> {
    let Mount { device, place, may_be_missing } = mount;
    let found = partitions.iter().find(|partition| is_named(disk, partition, device));
    match found {
        Some(partition) if partition.content == Content::Ext => Ok(Some(partition)),
        None if *may_be_missing => Ok(None),
        Some(Partition { content, .. }) => Err(SourceError::unsupported(
            &format!("{FSTAB} in it mounts `{device}` at {}, which is {content}", place.display()),
            "start from an image that keeps these files in its root file system",
        )),
        None => Err(SourceError::unsupported(
            &format!("{FSTAB} in it mounts `{device}` at {}, which is no partition of its disk", place.display()),
            "start from an image that keeps these files in its root file system, or mark the line nofail",
        )),
    }
}

/// Whether a device in fstab(5) is this partition.
fn is_named(disk: &File, partition: &Partition, device: &str) -> bool {
    let label_and_id = || {
        let files = FileSystem::look(disk, partition.offset).ok()?;
        Some((files.label, files.uuid.to_string()))
    };
    let (kind, name) = match device.split_once('=') {
        Some((kind, name)) => (kind, name.trim_matches('"')),
        None => match device.strip_prefix("/dev/disk/by-").and_then(|rest| rest.split_once('/')) {
            Some((kind, name)) => (kind, name),
            None => ("device", device),
        },
    };
    match kind.to_lowercase().as_str() {
        "label" => label_and_id().is_some_and(|(label, _)| label == name),
        "uuid" => label_and_id().is_some_and(|(_, id)| id.eq_ignore_ascii_case(name)),
        "partuuid" => partition.id.is_some_and(|id| id.to_string().eq_ignore_ascii_case(name)),
        "partlabel" => !name.is_empty() && partition.name == name,
        "device" => {
            let rest = ["/dev/sda", "/dev/vda", "/dev/xvda", "/dev/nvme0n1p"]
                .into_iter()
                .find_map(|disk| name.strip_prefix(disk));
            rest.and_then(|number| number.parse().ok()).is_some_and(|number: u32| partition.number == Some(number))
        }
        _ => false,
    }
}

/// Looks for the partitions, for the system in them and for what it may mount.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    partitions::settle_checksums(&mut bytes);
    let Some(disk) = crate::fuzzing::file(&bytes) else { return };
    let Ok(partitions) = partitions::find(&disk) else { panic!("a disk that can be read is not") };
    assert!(!partitions.is_empty(), "a disk has no part, not even itself");
    let _ = find_root(&disk, &partitions);
    for device in ["LABEL=root", "UUID=1", "PARTUUID=1", "PARTLABEL=root", "/dev/vda1", "/dev/disk/by-label/root"] {
        let mount = Mount { device: device.to_owned(), place: PathBuf::from("/boot"), may_be_missing: false };
        let _ = find_mounted(&disk, &partitions, &mount);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
        process::Command,
        time::{Duration, SystemTime},
    };

    use gpt::{GptConfig, partition_types};
    use rstest::rstest;
    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::secret::Redactor;

    const MIB: u64 = 1 << 20;
    /// `cap_net_raw=ep` as the kernel keeps it, version 2.
    const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    /// An access list as setxattr(2) takes it: the owner, user 1234, the group, the mask, others.
    const ACCESS_LIST: [u8; 44] = [
        2, 0, 0, 0, //
        1, 0, 6, 0, 255, 255, 255, 255, //
        2, 0, 4, 0, 210, 4, 0, 0, //
        4, 0, 4, 0, 255, 255, 255, 255, //
        16, 0, 4, 0, 255, 255, 255, 255, //
        32, 0, 0, 0, 255, 255, 255, 255,
    ];

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    fn run(program: &str, args: &[&str]) {
        let output = Command::new(program).args(args).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&said));
    }

    fn runner() -> Runner {
        Runner::new(Redactor::default(), CancellationToken::new())
    }

    /// Beginnings and lengths in MiB.
    const PARTITIONS: [(u64, u64); 3] = [(1, 32), (33, 32), (65, 30)];

    /// A disk of 96 MiB.
    struct Disk {
        dir: TempDir,
    }

    impl Disk {
        /// `label` is `gpt`, `dos` or nothing.
        fn new(label: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let disk = Self { dir };
            File::create(disk.path()).unwrap().set_len(96 * MIB).unwrap();
            match label {
                "gpt" => {
                    let file = File::options().read(true).write(true).open(disk.path()).unwrap();
                    let mut table = GptConfig::new().writable(true).create_from_device(file, None).unwrap();
                    for (number, (first, length)) in (1..).zip(PARTITIONS) {
                        let kind = partition_types::LINUX_FS;
                        table.add_partition_at("", number, first * 2048, length * 2048, kind, 0).unwrap();
                    }
                    table.write().unwrap();
                }
                "dos" => {
                    disk.mark(510, &[0x55, 0xaa]);
                    for (number, (first, length)) in (0..).zip(PARTITIONS) {
                        let [first, length] =
                            [first, length].map(|mib| u32::try_from(mib * 2048).unwrap().to_le_bytes());
                        disk.mark(446 + number * 16, &[&[0, 0, 0, 0, 0x83, 0, 0, 0], &first[..], &length].concat());
                    }
                }
                _ => {}
            }
            disk
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("disk")
        }

        /// A tree to be put into the disk.
        fn tree(&self, name: &str) -> PathBuf {
            let tree = self.dir.path().join(name);
            fs::create_dir_all(&tree).unwrap();
            tree
        }

        /// Makes a file system of `kib` KiB at `offset` MiB.
        fn format(&self, offset: u64, kib: u64, tree: &Path, options: &[&str]) {
            let extended = format!("offset={},root_owner=0:0", offset * MIB);
            let (disk, size) = (self.path(), format!("{kib}k"));
            let args = ["-q", "-F", "-E", &extended, "-d", tree.to_str().unwrap()];
            run("mke2fs", &[&args[..], options, &[disk.to_str().unwrap(), &size]].concat());
        }

        fn mark(&self, offset: u64, bytes: &[u8]) {
            File::options().write(true).open(self.path()).unwrap().write_all_at(bytes, offset).unwrap();
        }

        async fn unpack(&self) -> Result<PathBuf, SourceError> {
            let root = self.dir.path().join("root");
            unpack(&self.path(), &root, &runner()).await.map(|()| root)
        }
    }

    fn system(tree: &Path) {
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::create_dir_all(tree.join("usr/lib")).unwrap();
        fs::write(tree.join("usr/lib/os-release"), "ID=debian\n").unwrap();
        symlink("../usr/lib/os-release", tree.join("etc/os-release")).unwrap();
    }

    const EXT4: [&str; 2] = ["-t", "ext4"];

    /// Needs root, as a build does; `make test` has it.
    #[tokio::test]
    async fn every_file_comes_out_as_it_was() {
        if !is_root() {
            return;
        }
        let disk = Disk::new("gpt");
        let tree = disk.tree("tree");
        system(&tree);
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
        for directory in ["bin", "dev", "many", "run/lock", "secret"] {
            fs::create_dir_all(tree.join(directory)).unwrap();
        }
        fs::write(tree.join("bin/ping"), vec![1; 70_000]).unwrap();
        chown(tree.join("bin/ping"), Some(70_000), Some(5)).unwrap();
        fs::set_permissions(tree.join("bin/ping"), fs::Permissions::from_mode(0o4755)).unwrap();
        xattr::set(tree.join("bin/ping"), "security.capability", &CAPABILITY).unwrap();
        xattr::set(tree.join("bin/ping"), "user.note", &[7; 3000]).unwrap();
        xattr::set(tree.join("secret"), "system.posix_acl_access", &ACCESS_LIST).unwrap();
        xattr::set(tree.join("secret"), "system.posix_acl_default", &ACCESS_LIST).unwrap();
        fs::hard_link(tree.join("bin/ping"), tree.join("secret/ping")).unwrap();
        symlink("x".repeat(300), tree.join("long")).unwrap();
        symlink("/etc/passwd", tree.join("short")).unwrap();
        lchown(tree.join("short"), Some(3), Some(4)).unwrap();
        for (kind, name, device) in [("c", "null", &["1", "3"][..]), ("b", "big", &["259", "300"]), ("p", "pipe", &[])]
        {
            run("mknod", &[&[tree.join(name).to_str().unwrap(), kind][..], device].concat());
        }
        run("mknod", &[tree.join("dev/gone").to_str().unwrap(), "c", "1", "5"]);
        // An index of names, and a tree of extents.
        for number in 0..1500 {
            fs::write(tree.join(format!("many/a rather long name of a file {number}")), number.to_string()).unwrap();
        }
        let holes = File::create(tree.join("holes")).unwrap();
        holes.set_len(9 * MIB + 5).unwrap();
        for block in 0..600 {
            holes.write_all_at(&[3; 4096], block * 3 * 4096).unwrap();
        }
        File::options().write(true).open(tree.join("bin/ping")).unwrap().set_modified(time).unwrap();
        File::open(tree.join("many")).unwrap().set_modified(time).unwrap();
        disk.format(1, 32 * 1024, &disk.tree("nothing"), &EXT4);
        disk.format(33, 32 * 1024, &tree, &["-t", "ext4", "-b", "4096", "-N", "4000", "-m", "0"]);
        // A time after 2106 and its fraction, which mke2fs does not keep.
        let device = format!("{}?offset={}", disk.path().display(), 33 * MIB);
        run("debugfs", &["-w", "-R", &format!("sif /bin/ping mtime_extra {}", 123_456_789 << 2 | 1), &device]);

        let root = disk.unpack().await.unwrap();
        let special = ["gone", "lock", "lost+found", "pipe", "null", "big"].map(|name| format!("--exclude={name}"));
        let special = special.iter().map(String::as_str);
        let trees = [tree.to_str().unwrap(), root.to_str().unwrap()];
        run("diff", &["-r", "--no-dereference"].into_iter().chain(special).chain(trees).collect::<Vec<_>>());
        let ping = fs::metadata(root.join("bin/ping")).unwrap();
        assert_eq!((ping.uid(), ping.gid(), ping.mode() & 0o7777, ping.nlink()), (70_000, 5, 0o4755, 2));
        assert_eq!(ping.ino(), fs::metadata(root.join("secret/ping")).unwrap().ino());
        assert_eq!((ping.mtime(), ping.mtime_nsec()), ((1 << 32) + 1_600_000_000, 123_456_789));
        assert_eq!(fs::metadata(root.join("many")).unwrap().mtime(), 1_600_000_000);
        let attribute = |path: &str, name: &str| xattr::get(root.join(path), name).unwrap();
        assert_eq!(attribute("bin/ping", "security.capability").as_deref(), Some(&CAPABILITY[..]));
        assert_eq!(attribute("bin/ping", "user.note"), Some(vec![7; 3000]));
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            assert_eq!(attribute("secret", name).as_deref(), Some(&ACCESS_LIST[..]), "{name}");
        }
        let link = fs::symlink_metadata(root.join("short")).unwrap();
        assert_eq!((link.uid(), link.gid()), (3, 4));
        for name in ["null", "big"] {
            let [there, here] = [&tree, &root].map(|at| fs::metadata(at.join(name)).unwrap());
            assert_eq!((there.rdev(), there.mode()), (here.rdev(), here.mode()), "{name}");
        }
        assert!(fs::metadata(root.join("pipe")).unwrap().file_type().is_fifo());
        let (holes, before) = (fs::metadata(root.join("holes")).unwrap(), fs::metadata(tree.join("holes")).unwrap());
        assert!(holes.blocks() <= before.blocks() + 64, "{} and {} blocks", holes.blocks(), before.blocks());
        // What only a running system has, and what the file system itself keeps, stays behind.
        assert!(root.join("dev").is_dir() && !root.join("dev/gone").exists());
        assert!(root.join("run").is_dir() && !root.join("run/lock").exists());
        assert!(!root.join("lost+found").exists());
        assert!(!disk.path().exists(), "the image takes room twice");
    }

    #[rstest]
    #[case::gpt("gpt", 1)]
    #[case::dos("dos", 33)]
    #[case::no_table("", 0)]
    #[tokio::test]
    async fn the_system_is_found_wherever_it_is(#[case] label: &str, #[case] offset: u64) {
        if !is_root() {
            return;
        }
        let disk = Disk::new(label);
        let tree = disk.tree("tree");
        system(&tree);
        disk.format(offset, 16 * 1024, &tree, &["-t", "ext4", "-O", "^64bit,^metadata_csum", "-I", "128"]);
        let root = disk.unpack().await.unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/os-release")).unwrap(), "ID=debian\n");
    }

    #[tokio::test]
    async fn a_qcow2_is_taken_too() {
        if !is_root() {
            return;
        }
        let disk = Disk::new("gpt");
        let tree = disk.tree("tree");
        system(&tree);
        disk.format(33, 16 * 1024, &tree, &EXT4);
        let packed = disk.dir.path().join("packed");
        run(
            "qemu-img",
            &["convert", "-c", "-f", "raw", "-O", "qcow2", disk.path().to_str().unwrap(), packed.to_str().unwrap()],
        );
        fs::rename(packed, disk.path()).unwrap();
        assert!(disk.unpack().await.unwrap().join("etc/os-release").exists());
        assert!(!disk.path().exists() && !disk.path().with_extension("raw").exists());
    }

    #[tokio::test]
    async fn what_the_system_mounts_of_its_disk_is_there() {
        if !is_root() {
            return;
        }
        let disk = Disk::new("gpt");
        let (tree, boot) = (disk.tree("tree"), disk.tree("boot"));
        system(&tree);
        fs::create_dir_all(tree.join("boot")).unwrap();
        fs::write(tree.join("boot/hidden"), "by the mount").unwrap();
        let fstab = "LABEL=root / ext4 defaults 0 1\nLABEL=BOOT /boot ext4 defaults 0 2\nLABEL=UEFI /boot/efi vfat x 0 1\n\
                     UUID=11111111-2222-3333-4444-555555555555 /data ext4 nofail 0 2\n";
        fs::write(tree.join("etc/fstab"), fstab).unwrap();
        fs::write(boot.join("vmlinuz"), "kernel").unwrap();
        fs::set_permissions(&boot, fs::Permissions::from_mode(0o700)).unwrap();
        disk.format(1, 16 * 1024, &tree, &["-t", "ext4", "-L", "root"]);
        disk.format(65, 16 * 1024, &boot, &["-t", "ext4", "-L", "BOOT"]);
        let root = disk.unpack().await.unwrap();
        assert_eq!(fs::read_to_string(root.join("boot/vmlinuz")).unwrap(), "kernel");
        assert!(!root.join("boot/hidden").exists() && !root.join("boot/lost+found").exists());
    }

    #[rstest]
    #[case::xfs(MIB, b"XFSB", "partition 1 is XFS")]
    #[case::btrfs(MIB + 0x1_0040, b"_BHRfS_M", "partition 1 is btrfs")]
    #[case::lvm(33 * MIB + 512, b"LABELONE", "partition 2 is LVM")]
    #[case::luks(65 * MIB, b"LUKS\xba\xbe", "partition 3 is encrypted by LUKS")]
    #[case::raid(MIB + 4096, b"\xfc\x4e\x2b\xa9", "partition 1 is a part of a RAID")]
    #[case::nothing(0, b"", "partition 1 is unknown")]
    #[tokio::test]
    async fn a_root_that_can_not_be_read_is_told(#[case] offset: u64, #[case] mark: &[u8], #[case] expected: &str) {
        let disk = Disk::new("gpt");
        disk.mark(offset, mark);
        let error = disk.unpack().await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "SourceImageUnsupported"));
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("spec.base"), "{message}");
    }

    #[rstest]
    #[case::ext3(&["-t", "ext3"], "", "block maps")]
    #[case::inline_data(&["-t", "ext4", "-O", "inline_data"], "", "inline_data")]
    #[case::other_disk(&EXT4, "/dev/mapper/vg-home /home ext4 defaults 0 2", "`/dev/mapper/vg-home` at /home")]
    #[case::other_kind(&EXT4, "/dev/vda2 /var xfs defaults 0 2", "at /var, which is LVM")]
    #[tokio::test]
    async fn a_system_that_would_be_half_there_is_refused(
        #[case] options: &[&str],
        #[case] fstab: &str,
        #[case] expected: &str,
    ) {
        if !is_root() {
            return;
        }
        let disk = Disk::new("gpt");
        let tree = disk.tree("tree");
        system(&tree);
        fs::write(tree.join("etc/fstab"), fstab).unwrap();
        disk.format(1, 16 * 1024, &tree, options);
        disk.mark(33 * MIB + 512, b"LABELONE");
        let error = disk.unpack().await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "SourceImageUnsupported"));
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[tokio::test]
    async fn one_of_two_systems_is_never_guessed() {
        let disk = Disk::new("dos");
        let tree = disk.tree("tree");
        system(&tree);
        for offset in [1, 65] {
            disk.format(offset, 16 * 1024, &tree, &EXT4);
        }
        let error = disk.unpack().await.unwrap_err();
        assert!(error.to_string().contains("several systems, in partition 1 and partition 3"), "{error}");
    }

    #[tokio::test]
    async fn damage_is_told_and_no_panic() {
        let disk = Disk::new("gpt");
        let tree = disk.tree("tree");
        system(&tree);
        fs::write(tree.join("file"), vec![1; 100_000]).unwrap();
        disk.format(1, 16 * 1024, &tree, &["-t", "ext4", "-b", "4096"]);
        let path = disk.path();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let root = disk.dir.path().join("root");
        // The superblock, the descriptors, and what follows them.
        for offset in (1024_u64..400_000).step_by(1777) {
            let mut bytes = [0; 64];
            file.read_exact_at(&mut bytes, MIB + offset).unwrap();
            disk.mark(MIB + offset, &bytes.map(|byte| byte ^ 0xa5));
            partitions::find(&file).unwrap();
            // Without the check that mends it, so that everything is read as it is.
            if let (Ok(files), true) = (FileSystem::look(&file, MIB), is_root()) {
                let _ = fs::remove_dir_all(&root);
                fs::create_dir(&root).unwrap();
                let place = Path::new("/");
                let unpacking = Unpacking { name: "it", disk: &file, files: &files, place, stopped: &|| false };
                let _ = within(&root, |_| unpacking.run()).unwrap();
            }
            disk.mark(MIB + offset, &bytes);
        }
        disk.mark(MIB + 1024 + 0x20, &[0xff; 16]);
        let error = disk.unpack().await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "SourceImageDamaged"), "{error}");
    }

    #[tokio::test]
    async fn a_journal_that_was_not_carried_out_is() {
        if !is_root() {
            return;
        }
        let disk = Disk::new("gpt");
        let tree = disk.tree("tree");
        system(&tree);
        disk.format(1, 32 * 1024, &tree, &EXT4);
        // As a machine leaves it that is switched off: a journal that has begun.
        let device = format!("{}?offset={MIB}", disk.path().display());
        run("debugfs", &["-w", "-R", "feature needs_recovery", &device]);
        assert!(FileSystem::open(&File::open(disk.path()).unwrap(), MIB).is_err());
        assert!(disk.unpack().await.unwrap().join("etc/os-release").exists());
    }
}
