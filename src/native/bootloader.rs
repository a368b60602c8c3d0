//! What starts the kernel: the distribution's GRUB, for UEFI behind its signed shim, and GRUB's configuration.
//!
//! Under UEFI the signed GRUB reads `grub.cfg` in its directory of the EFI system partition, which leads to
//! `/boot/grub/grub.cfg` of the root file system. Both are written here: `grub-mkconfig` asks which disk the running
//! system is on, and there is none yet. A later `update-grub` on a node writes the same from `/etc/default/grub.d`.
//!
//! Under BIOS the first sector of the disk leads to GRUB's core in a partition of its own, and the core to
//! `/boot/grub`. `grub-install` would write both, but only to a disk that the kernel knows.

use std::{cmp::Ordering, fmt::Write};

use uuid::Uuid;

use super::{
    chroot::Chroot,
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{Classified, FailureClass, Firmware, OsName},
    process::ProcessError,
};

/// Kernel arguments beside the root file system, as in `/etc/default/grub.d`.
const ARGUMENTS: &str = "ro console=tty1 console=ttyS0";

/// Why the image can not start.
#[derive(Debug, thiserror::Error)]
pub enum BootLoaderError {
    #[error("the image has no kernel in /boot; name a base with one, or package sources that have {package}")]
    NoKernel { package: &'static str },
    #[error("the kernel {version} has no initramfs; the base's initramfs-tools does not make one")]
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
const LOADERS: [Loader; 3] = [
    Loader { place: "EFI/BOOT/BOOTX64.EFI", source: "/usr/lib/shim/shimx64.efi.signed", package: "shim-signed" },
    Loader {
        place: "EFI/BOOT/grubx64.efi",
        source: "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        package: "grub-efi-amd64-signed",
    },
    Loader { place: "EFI/BOOT/mmx64.efi", source: "/usr/lib/shim/mmx64.efi", package: "shim-signed" },
];

/// Where the signed GRUB looks for its first configuration: the directory is compiled into it.
fn first_configuration_dir(os: OsName) -> &'static str {
    match os {
        OsName::Ubuntu => "EFI/ubuntu",
        OsName::Debian => "EFI/debian",
        OsName::Redhat => "EFI/redhat",
    }
}

/// GRUB's first configuration: finds the root file system and goes on there.
fn first_configuration(root: Uuid) -> String {
    format!("search.fs_uuid {root} root\nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n")
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
    for Loader { place, source, package } in LOADERS {
        // Ubuntu and Debian sign the MOK manager under different names.
        let names = [format!("{source}.signed"), source.to_owned()];
        let Some(name) = names.iter().find(|name| tree.path(name).exists()) else {
            return Err(BootLoaderError::NoLoader { path: source, package });
        };
        files.push(EspFile { place: place.to_owned(), bytes: tree.read_bytes(name)? });
    }
    let place = format!("{}/grub.cfg", first_configuration_dir(os));
    files.push(EspFile { place, bytes: first_configuration(root).into_bytes() });
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

/// GRUB's directories and files for BIOS.
const BIOS_MODULES: &str = "/usr/lib/grub/i386-pc";
const BIOS_TARGET: &str = "/boot/grub/i386-pc";
const BIOS_CORE: &str = "/boot/grub/i386-pc/core.img";

/// Puts GRUB's modules for BIOS where it looks for them, and makes its core, which finds them on partition 2.
pub(super) async fn install_bios(chroot: &Chroot) -> Result<(), BootLoaderError> {
    within(chroot.root(), |tree| {
        for name in tree.list(BIOS_MODULES)? {
            if matches!(name.rsplit_once('.'), Some((_, "mod" | "lst"))) || name == "boot.img" {
                let bytes = tree.read_bytes(&format!("{BIOS_MODULES}/{name}"))?;
                tree.write(&format!("{BIOS_TARGET}/{name}"), bytes, 0o644)?;
            }
        }
        if tree.exists(&format!("{BIOS_TARGET}/boot.img")) {
            return Ok(());
        }
        Err(BootLoaderError::NoLoader { path: "/usr/lib/grub/i386-pc/boot.img", package: "grub-pc-bin" })
    })??;
    let prefix = "--prefix=(,gpt2)/boot/grub";
    let core = ["--format=i386-pc", "--output", BIOS_CORE, prefix, "biosdisk", "part_gpt", "ext2"];
    chroot.run("grub-mkimage", &core).await.map_err(|source| BootLoaderError::Core { source })?;
    Ok(())
}

/// Reads what the disk starts with from the finished tree.
pub(super) fn boot_parts(
    tree: &Tree,
    os: OsName,
    firmware: Firmware,
    root: Uuid,
) -> Result<BootParts, BootLoaderError> {
    match firmware {
        Firmware::Efi => Ok(BootParts::Efi(esp_files(tree, os, root)?)),
        Firmware::Bios => {
            let first_sector = tree.read_bytes(&format!("{BIOS_TARGET}/boot.img"))?;
            let core = tree.read_bytes(BIOS_CORE)?;
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
    tree.write("/boot/grub/grub.cfg", configuration(os, root, &kernels), 0o600)?;
    let mut table = format!("UUID={root} / ext4 defaults,errors=remount-ro 0 1\n");
    if let Some(esp) = esp {
        tree.make_dir("/boot/efi", 0o700)?;
        // A node works without it; a slow disk must not end the start in an emergency shell.
        let _ = writeln!(table, "UUID={esp} /boot/efi vfat umask=0077,nofail 0 1");
    }
    Ok(tree.write("/etc/fstab", table, 0o644)?)
}

/// The image's kernels with their initramfs, the newest first.
fn kernels(tree: &Tree, os: OsName) -> Result<Vec<String>, BootLoaderError> {
    let files = tree.list("/boot")?;
    let mut versions: Vec<_> =
        files.iter().filter_map(|name| name.strip_prefix("vmlinuz-")).map(str::to_owned).collect();
    versions.sort_by(|a, b| compare_versions(b, a));
    if versions.is_empty() {
        let package = if os == OsName::Debian { "linux-image-amd64" } else { "linux-image-generic" };
        return Err(BootLoaderError::NoKernel { package });
    }
    for version in &versions {
        if !files.contains(&format!("initrd.img-{version}")) {
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
        let _ = write!(
            entries,
            "menuentry '{name}, Linux {version}' {{\n\tsearch --no-floppy --fs-uuid --set=root {root}\n\
             \tlinux /boot/vmlinuz-{version} root=UUID={root} {ARGUMENTS}\n\
             \tinitrd /boot/initrd.img-{version}\n}}\n"
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
