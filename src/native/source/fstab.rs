//! What a system mounts beside its root (fstab(5)).

use std::path::PathBuf;

/// What is not of this disk, or is made anew for the image: its EFI system partition.
const ELSEWHERE: [&str; 16] = [
    "9p", "cifs", "debugfs", "devpts", "efivarfs", "iso9660", "msdos", "nfs", "nfs4", "none", "overlay", "proc",
    "swap", "sysfs", "tmpfs", "vfat",
];

/// A file system that belongs to the system.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Mount {
    pub(super) device: String,
    pub(super) place: PathBuf,
    /// Whether the system starts without it.
    pub(super) may_be_missing: bool,
}

/// Everything but the root itself, the outer ones first.
pub(super) fn mounts(text: &str) -> Vec<Mount> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mut mounts: Vec<_> = lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(unescape);
            let (device, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
            let options = fields.next().unwrap_or_default();
            let has = |wanted: &str| options.split(',').any(|option| option == wanted);
            let place = PathBuf::from(place);
            let is_place = place.is_absolute()
                && place.parent().is_some()
                && place.components().all(|part| !matches!(part, std::path::Component::ParentDir));
            let of_the_system =
                is_place && !ELSEWHERE.contains(&kind.as_str()) && !has("noauto") && !has("bind") && !has("rbind");
            of_the_system.then(|| Mount { device, place, may_be_missing: has("nofail") })
        })
        .collect();
    mounts.sort_by_key(|mount| mount.place.components().count());
    mounts
}

/// A field may hold blanks as octal numbers.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\134", "\\")]
        .into_iter()
        .fold(field.to_owned(), |field, (code, meaning)| field.replace(code, meaning))
}

/// Every place is one below the root, and outer ones come first.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mounts = mounts(&String::from_utf8_lossy(bytes));
    let depth = |mount: &Mount| mount.place.components().count();
    assert!(mounts.is_sorted_by_key(depth), "an inner one comes first");
    for Mount { place, .. } in &mounts {
        let mut parts = place.components();
        assert_eq!(parts.next(), Some(std::path::Component::RootDir), "{} is relative", place.display());
        let normal = |part| matches!(part, std::path::Component::Normal(_));
        assert!(place.parent().is_some() && parts.all(normal), "{} is the root or leads out of it", place.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_belongs_to_the_system_is_mounted() {
        let text = "# <file system> <place>\n\
            LABEL=cloudimg-rootfs\t/\text4\tdiscard,commit=30,errors=remount-ro\t0 1\n\
            LABEL=BOOT\t/boot\text4\tdefaults\t0 2\n\
            LABEL=UEFI /boot/efi vfat umask=0077 0 1\n\
            /dev/vda5 none swap sw 0 0\n\
            UUID=1 /srv/my\\040data ext4 nofail 0 2\n\
            tmpfs /tmp tmpfs defaults 0 0\n\
            /dev/vdb1 /mnt auto noauto 0 0\n\
            /opt /srv/opt none bind 0 0\n\
            LABEL=X /../etc ext4 defaults 0 0\n\
            broken\n";
        let found = mounts(text);
        let expected = [("LABEL=BOOT", "/boot", false), ("UUID=1", "/srv/my data", true)];
        let expected = expected.map(|(device, place, may_be_missing)| Mount {
            device: device.into(),
            place: place.into(),
            may_be_missing,
        });
        assert_eq!(found, expected);
    }
}
