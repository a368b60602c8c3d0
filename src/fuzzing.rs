//! What the fuzz targets in `fuzz/` call: one function for each parser of bytes that others write. Each takes anything and
//! panics where a promise of its parser is broken, which stands beside the parser.

use std::{fs::File, os::unix::fs::FileExt};

macro_rules! parsers {
    ($($(#[$doc:meta])* $name:ident: $($parser:path),+;)+) => {
        $($(#[$doc])* pub fn $name(bytes: &[u8]) {
            $($parser(bytes);)+
        })+
    };
}

parsers! {
    /// Manifests of releases, with what their signatures cover.
    documents: crate::release::resolve::fuzz, crate::release::signature::fuzz;
    /// The archive of all manifests.
    archive: crate::release::archive::fuzz;
    /// Lists of checksums, and `/etc/fstab` of a source image.
    lists: crate::fetch::sums::fuzz, crate::native::source::fstab::fuzz;
    /// Disks that vCenter gives away.
    vmdk: crate::package::unvmdk::fuzz;
    /// Source images as qcow2.
    qcow2: crate::native::source::qcow2::fuzz;
    /// Source images: partitions, and which of them holds the system.
    partitions: crate::native::source::fuzz;
    /// Source images: the files of a file system.
    ext4: crate::native::source::ext4::fuzz;
    /// containerd's databases.
    bolt: crate::native::bolt::fuzz;
    /// JSON files of the command line.
    settings: crate::cli::dropin::fuzz;
    /// Output of Packer and of what it runs.
    packer: crate::imagebuilder::packer::fuzz;
    /// Templates of upstream's.
    template: crate::imagebuilder::upstream::fuzz;
    /// Answers of vCenter.
    soap: crate::publish::vsphere::soap::fuzz;
    /// Paths, ranges and tokens in requests to the artifact server.
    requests: crate::serve::path::fuzz, crate::serve::download::fuzz, crate::contract::token::fuzz;
}

/// A file without a name that holds `bytes`; `None` where the machine has no room for it.
pub(crate) fn file(bytes: &[u8]) -> Option<File> {
    let file = tempfile::tempfile().ok()?;
    file.write_all_at(bytes, 0).ok()?;
    Some(file)
}
