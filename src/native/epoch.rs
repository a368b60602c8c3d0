//! The time that everything has which a build makes, such that the same inputs give the same bytes.
//!
//! What comes out of archives is older than the build and keeps its times; what the build makes is as old as the newest of
//! it. That depends on the inputs alone, as the build's own time does not.

use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

/// No time is earlier: 1980, where those of FAT begin.
const EARLIEST: u32 = 315_532_800;

/// The newest time of modification in a tree that is earlier than `begin`, in seconds since 1970.
pub(super) fn newest(root: &Path, begin: SystemTime) -> io::Result<u32> {
    let mut newest = SystemTime::UNIX_EPOCH;
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let found = entry.metadata()?;
            let modified = found.modified()?;
            if modified < begin {
                newest = newest.max(modified);
            }
            if found.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    let seconds = newest.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(u32::try_from(seconds).unwrap_or(u32::MAX).max(EARLIEST))
}

/// An epoch as the clock has it.
pub(super) fn time(epoch: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(epoch.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_build_makes_is_as_old_as_the_newest_of_its_inputs() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest(dir.path(), SystemTime::now()).unwrap(), EARLIEST);
        fs::create_dir_all(dir.path().join("usr/share")).unwrap();
        for (path, seconds) in [("usr/old", 1_000_000_000), ("usr/share/newer", 1_500_000_000), ("made", 1_700_000_000)]
        {
            fs::File::create(dir.path().join(path)).unwrap().set_modified(time(seconds)).unwrap();
        }
        // The directories are younger, too.
        assert_eq!(newest(dir.path(), time(1_600_000_000)).unwrap(), 1_500_000_000);
    }
}
