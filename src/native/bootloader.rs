//! What starts the kernel: the distribution's GRUB, for UEFI behind its signed shim, and GRUB's configuration.
//!
//! Under UEFI the signed GRUB reads `grub.cfg` in its directory of the EFI system partition, which leads to
//! `/boot/grub/grub.cfg` of the root file system. Both are written here: `grub-mkconfig` asks which disk the running
//! system is on, and there is none yet. A later `update-grub` on a node writes the same from `/etc/default/grub.d`, a later
//! `grub2-mkconfig` from the entries of the Boot Loader Specification, which Red Hat's systems have as well.
//!
//! Under BIOS the first sector of the disk leads to GRUB's core in a partition of its own, and the core to
//! `/boot/grub`. `grub-install` would write both, but only to a disk that the kernel knows.

use std::{cmp::Ordering, fmt::Write};

use uuid::Uuid;

use super::{
    chroot::Chroot,
    disk,
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{Classified, FailureClass, Firmware, OsName},
    process::ProcessError,
};

/// Kernel arguments beside the root file system, as in `/etc/default/grub.d` and `/etc/default/grub`.
const fn arguments(os: OsName) -> &'static str {
    match os {
        OsName::Ubuntu | OsName::Debian => "ro console=tty1 console=ttyS0",
        OsName::Redhat => "ro console=tty1 console=ttyS0 transparent_hugepage=madvise",
    }
}

/// GRUB's directory.
pub(super) const fn grub_dir(os: OsName) -> &'static str {
    match os {
        OsName::Ubuntu | OsName::Debian => "/boot/grub",
        OsName::Redhat => "/boot/grub2",
    }
}

/// Entries of the Boot Loader Specification.
pub(super) const ENTRIES: &str = "/boot/loader/entries";
/// The mount point of the EFI system partition, into which Red Hat's packages put their boot loaders.
const ESP: &str = "/boot/efi";
/// What marks the kernel that Red Hat's installer keeps for the machine that it ran on.
const RESCUE: &str = "0-rescue-";

/// Why the image can not start.
#[derive(Debug, thiserror::Error)]
pub enum BootLoaderError {
    #[error("the image has no kernel in /boot; name a base with one, or package sources that have {package}")]
    NoKernel { package: &'static str },
    #[error("the kernel {version} has no initramfs; the base's initramfs-tools, or dracut, makes none")]
    NoInitramfs { version: String },
    #[error("the image has no {path}: the package {package} is not what it should be")]
    NoLoader { path: &'static str, package: &'static str },
    #[error("GRUB's {part} is not of the form that GRUB 2 has had so far")]
    UnknownForm { part: &'static str },
    #[error("can not make GRUB's core")]
    Core { source: ProcessError },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for BootLoaderError {
    fn class(&self) -> FailureClass {
        match self {
            Self::NoKernel { .. } | Self::NoInitramfs { .. } | Self::NoLoader { .. } | Self::UnknownForm { .. } => {
                FailureClass::BadInput
            }
            Self::Core { source } => source.class(),
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::NoKernel { .. }
            | Self::NoInitramfs { .. }
            | Self::NoLoader { .. }
            | Self::UnknownForm { .. }
            | Self::Core { source: ProcessError::Failed { .. } } => "NotBootable",
            Self::Core { source } => source.reason(),
            Self::Tree(error) => error.reason(),
        }
    }
}

/// A file of the EFI system partition and where the image has its contents.
#[derive(Clone, Copy, Debug)]
struct Loader {
    place: &'static str,
    source: &'static str,
    package: &'static str,
}

/// What firmware starts: from the removable-media path, so that no machine needs a boot entry.
const LOADERS: &[Loader] = &[
    Loader { place: "EFI/BOOT/BOOTX64.EFI", source: "/usr/lib/shim/shimx64.efi.signed", package: "shim-signed" },
    Loader {
        place: "EFI/BOOT/grubx64.efi",
        source: "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        package: "grub-efi-amd64-signed",
    },
    Loader { place: "EFI/BOOT/mmx64.efi", source: "/usr/lib/shim/mmx64.efi", package: "shim-signed" },
];

/// The same of Red Hat, and under the names that boot entries of its systems have. Its fallback loader is left out: it would
/// make such an entry and start again.
const REDHAT_LOADERS: &[Loader] = &[
    Loader { place: "EFI/BOOT/BOOTX64.EFI", source: "/boot/efi/EFI/redhat/shimx64.efi", package: "shim-x64" },
    Loader { place: "EFI/BOOT/grubx64.efi", source: "/boot/efi/EFI/redhat/grubx64.efi", package: "grub2-efi-x64" },
    Loader { place: "EFI/BOOT/mmx64.efi", source: "/boot/efi/EFI/redhat/mmx64.efi", package: "shim-x64" },
    Loader { place: "EFI/redhat/shimx64.efi", source: "/boot/efi/EFI/redhat/shimx64.efi", package: "shim-x64" },
    Loader { place: "EFI/redhat/grubx64.efi", source: "/boot/efi/EFI/redhat/grubx64.efi", package: "grub2-efi-x64" },
    Loader { place: "EFI/redhat/mmx64.efi", source: "/boot/efi/EFI/redhat/mmx64.efi", package: "shim-x64" },
];

const fn loaders(os: OsName) -> &'static [Loader] {
    match os {
        OsName::Ubuntu | OsName::Debian => LOADERS,
        OsName::Redhat => REDHAT_LOADERS,
    }
}

/// The signed files that the image has to hold.
pub(super) fn signed_files(os: OsName) -> Vec<&'static str> {
    let signed = loaders(os).iter().map(|loader| loader.source).filter(|source| !source.contains("mmx64"));
    let mut files: Vec<_> = signed.collect();
    files.sort_unstable();
    files.dedup();
    files
}

/// Where the signed GRUB looks for its first configuration: the directory is compiled into it. Red Hat's looks beside
/// itself first.
fn first_configuration_dirs(os: OsName) -> &'static [&'static str] {
    match os {
        OsName::Ubuntu => &["EFI/ubuntu"],
        OsName::Debian => &["EFI/debian"],
        OsName::Redhat => &["EFI/redhat", "EFI/BOOT"],
    }
}

/// GRUB's first configuration: finds the root file system and goes on there.
fn first_configuration(os: OsName, root: Uuid) -> String {
    let directory = grub_dir(os);
    format!("search.fs_uuid {root} root\nset prefix=($root)'{directory}'\nconfigfile $prefix/grub.cfg\n")
}

/// A file for the EFI system partition.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct EspFile {
    pub place: String,
    pub bytes: Vec<u8>,
}

/// Everything the EFI system partition holds.
fn esp_files(tree: &Tree, os: OsName, root: Uuid) -> Result<Vec<EspFile>, BootLoaderError> {
    let mut files = vec![];
    for &Loader { place, source, package } in loaders(os) {
        // Ubuntu and Debian sign the MOK manager under different names.
        let names = [format!("{source}.signed"), source.to_owned()];
        let Some(name) = names.iter().find(|name| tree.path(name).exists()) else {
            return Err(BootLoaderError::NoLoader { path: source, package });
        };
        files.push(EspFile { place: place.to_owned(), bytes: tree.read_bytes(name)? });
    }
    for directory in first_configuration_dirs(os) {
        let place = format!("{directory}/grub.cfg");
        files.push(EspFile { place, bytes: first_configuration(os, root).into_bytes() });
    }
    Ok(files)
}

/// What a disk starts with, beside its root file system.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum BootParts {
    Efi(Vec<EspFile>),
    Bios(BiosLoader),
}

/// GRUB for BIOS: the code of the disk's first sector, and what it loads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct BiosLoader {
    first_sector: Vec<u8>,
    core: Vec<u8>,
}

/// Bytes of the first sector before the table of partitions.
const BOOT_CODE: usize = 440;
const SECTOR: usize = 512;
/// Where the boot sector names the sector of the core (GRUB's `GRUB_BOOT_MACHINE_KERNEL_SECTOR`).
const CORE_SECTOR: usize = 0x5c;
/// Where it looks at the drive number that the BIOS gives; two instructions that `grub-install` takes out for hard disks,
/// because some BIOSes give a wrong one (`GRUB_BOOT_MACHINE_DRIVE_CHECK`).
const DRIVE_CHECK: usize = 0x66;
const NO_OPERATION: u8 = 0x90;
/// Where the core's first sector names the sector of the rest: the last list of blocks, at its end.
const REST_SECTOR: usize = SECTOR - 12;

impl BiosLoader {
    /// The boot code and the core as they stand on a disk whose core begins at `sector`.
    pub(super) fn at(&self, sector: u64) -> Result<(Vec<u8>, Vec<u8>), BootLoaderError> {
        let (mut code, mut core) = (self.first_sector.clone(), self.core.clone());
        let put = |bytes: &mut [u8], offset: usize, value: u64, part| match bytes.get_mut(offset..offset + 8) {
            Some(place) => {
                place.copy_from_slice(&value.to_le_bytes());
                Ok(())
            }
            None => Err(BootLoaderError::UnknownForm { part }),
        };
        code.truncate(BOOT_CODE);
        put(&mut code, CORE_SECTOR, sector, "boot sector")?;
        code[DRIVE_CHECK..DRIVE_CHECK + 2].fill(NO_OPERATION);
        put(&mut core, REST_SECTOR, sector + 1, "core")?;
        Ok((code, core))
    }
}

/// GRUB's modules for BIOS, and where it looks for them.
const BIOS_MODULES: &str = "/usr/lib/grub/i386-pc";

fn bios_target(os: OsName) -> String {
    format!("{}/i386-pc", grub_dir(os))
}

/// Puts GRUB's modules for BIOS where it looks for them, and makes its core, which finds them on the root partition.
pub(super) async fn install_bios(chroot: &Chroot, os: OsName) -> Result<(), BootLoaderError> {
    let target = bios_target(os);
    within(chroot.root(), |tree| {
        for name in tree.list(BIOS_MODULES)? {
            if matches!(name.rsplit_once('.'), Some((_, "mod" | "lst"))) || name == "boot.img" {
                let bytes = tree.read_bytes(&format!("{BIOS_MODULES}/{name}"))?;
                tree.write(&format!("{target}/{name}"), bytes, 0o644)?;
            }
        }
        if tree.exists(&format!("{target}/boot.img")) {
            return Ok(());
        }
        let package = if os == OsName::Redhat { "grub2-pc-modules" } else { "grub-pc-bin" };
        Err(BootLoaderError::NoLoader { path: "/usr/lib/grub/i386-pc/boot.img", package })
    })??;
    let program = if os == OsName::Redhat { "grub2-mkimage" } else { "grub-mkimage" };
    let prefix = format!("--prefix=(,gpt{}){}", disk::root_number(os), grub_dir(os));
    let core = format!("{target}/core.img");
    let core = ["--format=i386-pc", "--output", &core, &prefix, "biosdisk", "part_gpt", "ext2"];
    chroot.run(program, &core).await.map_err(|source| BootLoaderError::Core { source })?;
    Ok(())
}

/// Takes what the disk starts with from the finished tree.
pub(super) fn boot_parts(
    tree: &Tree,
    os: OsName,
    firmware: Firmware,
    root: Uuid,
) -> Result<BootParts, BootLoaderError> {
    match firmware {
        Firmware::Efi => {
            let files = esp_files(tree, os, root)?;
            // What packages put there is on the partition now, below which nobody would see it.
            tree.clear(ESP)?;
            Ok(BootParts::Efi(files))
        }
        Firmware::Bios => {
            let target = bios_target(os);
            let first_sector = tree.read_bytes(&format!("{target}/boot.img"))?;
            let core = tree.read_bytes(&format!("{target}/core.img"))?;
            if first_sector.len() != SECTOR || core.len() <= SECTOR {
                return Err(BootLoaderError::UnknownForm { part: "boot sector or core" });
            }
            Ok(BootParts::Bios(BiosLoader { first_sector, core }))
        }
    }
}

/// Writes what the root file system needs to start, once everything is installed. `esp` identifies the EFI system
/// partition, where there is one.
pub(super) fn configure(tree: &Tree, os: OsName, root: Uuid, esp: Option<&str>) -> Result<(), BootLoaderError> {
    let kernels = kernels(tree, os)?;
    tree.write(&format!("{}/grub.cfg", grub_dir(os)), configuration(os, root, &kernels), 0o600)?;
    if os == OsName::Redhat {
        write_entries(tree, root, &kernels)?;
    }
    let mut table = format!("UUID={root} / ext4 defaults,errors=remount-ro 0 1\n");
    if let Some(esp) = esp {
        tree.make_dir(ESP, 0o700)?;
        // A node works without it; a slow disk must not end the start in an emergency shell.
        let _ = writeln!(table, "UUID={esp} /boot/efi vfat umask=0077,nofail 0 1");
    }
    Ok(tree.write("/etc/fstab", table, 0o644)?)
}

/// The entries that Red Hat's tools know kernels by, in place of those that packages have made for the machine of the build.
fn write_entries(tree: &Tree, root: Uuid, kernels: &[String]) -> Result<(), TreeError> {
    let arguments = format!("root=UUID={root} {}", arguments(OsName::Redhat));
    tree.clear(ENTRIES)?;
    for name in tree.list("/boot")?.iter().filter(|name| name.contains(RESCUE)) {
        tree.remove(&format!("/boot/{name}"))?;
    }
    for version in kernels {
        let text = format!(
            "title Red Hat Enterprise Linux ({version})\nversion {version}\nlinux /boot/vmlinuz-{version}\n\
             initrd /boot/initramfs-{version}.img\noptions {arguments}\ngrub_users $grub_users\n\
             grub_arg --unrestricted\ngrub_class kernel\n"
        );
        tree.write(&format!("{ENTRIES}/image-{version}.conf"), text, 0o644)?;
    }
    // Arguments of kernels that are installed later.
    tree.write("/etc/kernel/cmdline", format!("{arguments}\n"), 0o644)?;
    let newest = kernels.first().map(String::as_str).unwrap_or_default();
    // GRUB overwrites this file in its place: its size is fixed.
    let environment = format!("# GRUB Environment Block\nsaved_entry=image-{newest}\n");
    tree.write(&format!("{}/grubenv", grub_dir(OsName::Redhat)), format!("{environment:#<1024}"), 0o644)
}

/// The name of a kernel's initial RAM disk.
fn initramfs(os: OsName, version: &str) -> String {
    match os {
        OsName::Ubuntu | OsName::Debian => format!("initrd.img-{version}"),
        OsName::Redhat => format!("initramfs-{version}.img"),
    }
}

/// The image's kernels with their initramfs, the newest first.
fn kernels(tree: &Tree, os: OsName) -> Result<Vec<String>, BootLoaderError> {
    let files = tree.list("/boot")?;
    let found = files.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
    let mut versions: Vec<_> = found.filter(|version| !version.starts_with(RESCUE)).map(str::to_owned).collect();
    versions.sort_by(|a, b| compare_versions(b, a));
    if versions.is_empty() {
        let package = match os {
            OsName::Ubuntu => "linux-image-generic",
            OsName::Debian => "linux-image-amd64",
            OsName::Redhat => "kernel",
        };
        return Err(BootLoaderError::NoKernel { package });
    }
    for version in &versions {
        if !files.contains(&initramfs(os, version)) {
            return Err(BootLoaderError::NoInitramfs { version: version.clone() });
        }
    }
    Ok(versions)
}

/// GRUB's configuration: starts the newest kernel at once; the others stand below it.
fn configuration(os: OsName, root: Uuid, kernels: &[String]) -> String {
    let name = match os {
        OsName::Ubuntu => "Ubuntu",
        OsName::Debian => "Debian",
        OsName::Redhat => "Red Hat Enterprise Linux",
    };
    let mut entries = String::new();
    for version in kernels {
        let (arguments, initramfs) = (arguments(os), initramfs(os, version));
        let _ = write!(
            entries,
            "menuentry '{name}, Linux {version}' {{\n\tsearch --no-floppy --fs-uuid --set=root {root}\n\
             \tlinux /boot/vmlinuz-{version} root=UUID={root} {arguments}\n\
             \tinitrd /boot/{initramfs}\n}}\n"
        );
    }
    format!(
        "# Written by image-builder; update-grub replaces it.\nset default=0\nset timeout=0\n\
         serial --speed=115200\nterminal_input console serial\nterminal_output console serial\n{entries}"
    )
}

/// Orders versions as people do: runs of digits by their value, the rest by its letters.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(String, u64)> {
        let mut parts = vec![];
        let mut rest = text;
        while !rest.is_empty() {
            let word = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let (word, tail) = rest.split_at(word);
            let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
            let (digits, tail) = tail.split_at(digits);
            parts.push((word.to_owned(), digits.parse().unwrap_or(0)));
            rest = tail;
        }
        parts
    };
    parts(a).cmp(&parts(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        for file in files {
            tree.write(file, "x", 0o644).unwrap();
        }
        (dir, tree)
    }

    const COMPLETE: [&str; 7] = [
        "/boot/vmlinuz-6.1.0-9-amd64",
        "/boot/initrd.img-6.1.0-9-amd64",
        "/boot/vmlinuz-6.1.0-41-amd64",
        "/boot/initrd.img-6.1.0-41-amd64",
        "/usr/lib/shim/shimx64.efi.signed",
        "/usr/lib/shim/mmx64.efi.signed",
        "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
    ];

    #[test]
    fn the_newest_kernel_starts() {
        let (_dir, tree) = tree(&COMPLETE);
        let root = Uuid::from_u128(7);
        configure(&tree, OsName::Debian, root, Some("1234-ABCD")).unwrap();
        let places: Vec<_> =
            esp_files(&tree, OsName::Debian, root).unwrap().into_iter().map(|file| file.place).collect();
        assert_eq!(
            places,
            ["EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/grubx64.efi", "EFI/BOOT/mmx64.efi", "EFI/debian/grub.cfg"]
        );
        let text = tree.read("/boot/grub/grub.cfg").unwrap().unwrap();
        let (new, old) = (text.find("vmlinuz-6.1.0-41").unwrap(), text.find("vmlinuz-6.1.0-9").unwrap());
        assert!(new < old, "{text}");
        assert!(text.contains(&format!("root=UUID={root} ro console=tty1 console=ttyS0")));
        assert!(tree.read("/etc/fstab").unwrap().unwrap().contains("UUID=1234-ABCD /boot/efi vfat"));
    }

    const COMPLETE_REDHAT: [&str; 8] = [
        "/boot/vmlinuz-5.14.0-427.el9.x86_64",
        "/boot/initramfs-5.14.0-427.el9.x86_64.img",
        "/boot/vmlinuz-0-rescue-0123456789abcdef0123456789abcdef",
        "/boot/initramfs-0-rescue-0123456789abcdef0123456789abcdef.img",
        "/boot/loader/entries/0123456789abcdef0123456789abcdef-5.14.0-427.el9.x86_64.conf",
        "/boot/efi/EFI/redhat/shimx64.efi",
        "/boot/efi/EFI/redhat/grubx64.efi",
        "/boot/efi/EFI/redhat/mmx64.efi",
    ];

    #[test]
    fn red_hat_starts_from_its_own_directories_and_without_what_the_builds_machine_got() {
        let (_dir, tree) = tree(&COMPLETE_REDHAT);
        let root = Uuid::from_u128(7);
        configure(&tree, OsName::Redhat, root, Some("1234-ABCD")).unwrap();
        let BootParts::Efi(files) = boot_parts(&tree, OsName::Redhat, Firmware::Efi, root).unwrap() else { panic!() };
        let stub = |place: &str| {
            let file = files.iter().find(|file| file.place == place).unwrap();
            String::from_utf8(file.bytes.clone()).unwrap()
        };
        assert!(stub("EFI/redhat/grub.cfg").contains("set prefix=($root)'/boot/grub2'"));
        assert_eq!(stub("EFI/redhat/grub.cfg"), stub("EFI/BOOT/grub.cfg"));
        assert_eq!(stub("EFI/BOOT/BOOTX64.EFI"), "x");
        assert_eq!(tree.list(ESP).unwrap(), Vec::<String>::new());

        let text = tree.read("/boot/grub2/grub.cfg").unwrap().unwrap();
        assert!(
            text.contains("initrd /boot/initramfs-5.14.0-427.el9.x86_64.img") && !text.contains("rescue"),
            "{text}"
        );
        assert_eq!(tree.list(ENTRIES).unwrap(), ["image-5.14.0-427.el9.x86_64.conf"]);
        let entry = tree.read(&format!("{ENTRIES}/image-5.14.0-427.el9.x86_64.conf")).unwrap().unwrap();
        assert!(entry.contains(&format!("options root=UUID={root} ro console=tty1 console=ttyS0 ")), "{entry}");
        assert_eq!(tree.read("/boot/grub2/grubenv").unwrap().unwrap().len(), 1024);
        assert!(!tree.list("/boot").unwrap().iter().any(|name| name.contains("rescue")));
    }

    #[test]
    fn says_what_is_missing_to_start() {
        for (missing, part) in [
            ("vmlinuz", "no kernel"),
            ("initrd.img-6.1.0-41", "6.1.0-41-amd64 has no initramfs"),
            ("shimx64", "shim-signed"),
            ("grubx64", "grub-efi-amd64-signed"),
        ] {
            let files: Vec<_> = COMPLETE.into_iter().filter(|file| !file.contains(missing)).collect();
            let (_dir, tree) = tree(&files);
            let files = esp_files(&tree, OsName::Debian, Uuid::nil()).map(drop);
            let error = configure(&tree, OsName::Debian, Uuid::nil(), Some("0-0")).and(files).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.reason(), "NotBootable");
        }
    }

    #[test]
    fn the_boot_sector_leads_to_the_core_and_the_core_to_its_rest() {
        let loader = BiosLoader { first_sector: vec![1; SECTOR], core: vec![2; 3 * SECTOR] };
        let (code, core) = loader.at(2048).unwrap();
        assert_eq!(code.len(), BOOT_CODE);
        assert_eq!(code[CORE_SECTOR..CORE_SECTOR + 8], 2048_u64.to_le_bytes());
        assert_eq!(code[DRIVE_CHECK..DRIVE_CHECK + 2], [NO_OPERATION; 2]);
        assert_eq!(core[REST_SECTOR..REST_SECTOR + 8], 2049_u64.to_le_bytes());
        assert_eq!(core.len(), 3 * SECTOR);
        let cut = BiosLoader { first_sector: vec![1; SECTOR], core: vec![2; 100] };
        assert_eq!(cut.at(2048).unwrap_err().reason(), "NotBootable");
    }

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        let mut versions = ["5.15.0-100-generic", "5.15.0-9-generic", "6.8.0-31-generic", "5.15.0-100-generic.old"];
        versions.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(versions, ["5.15.0-9-generic", "5.15.0-100-generic", "5.15.0-100-generic.old", "6.8.0-31-generic"]);
    }
}
