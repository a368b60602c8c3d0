//! Where a sparse file holds data, so that its holes need not be read.

use std::{fs::File, io};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

/// A run of bytes that may differ from zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

impl Extent {
    /// The offset behind the last byte.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// The data of `file` in ascending order; everything between is holes, which read as zeros. A file system without
/// holes gives one extent. Moves the file's position.
pub fn data_extents(file: &File) -> io::Result<Vec<Extent>> {
    let size = file.metadata()?.len();
    let mut extents = Vec::new();
    let mut position = 0;
    while position < size {
        let offset = match seek(file, position, Whence::SeekData) {
            Ok(offset) => offset,
            // Only a hole is left.
            Err(Errno::ENXIO) => break,
            // The file system can not tell.
            Err(Errno::EINVAL) => position,
            Err(error) => return Err(error.into()),
        };
        let end = match seek(file, offset, Whence::SeekHole) {
            Ok(end) => end.min(size),
            Err(Errno::EINVAL) => size,
            Err(error) => return Err(error.into()),
        };
        extents.push(Extent { offset, len: end - offset });
        position = end;
    }
    Ok(extents)
}

fn seek(file: &File, offset: u64, whence: Whence) -> Result<u64, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    lseek(file, offset, whence).map(i64::unsigned_abs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn finds_data_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&[1; 4096], 3 * MIB).unwrap();
        file.write_all_at(&[1; 4096], 64 * MIB - 4096).unwrap();
        let extents = data_extents(&file).unwrap();
        for offset in [3 * MIB, 64 * MIB - 1] {
            assert!(extents.iter().any(|e| e.offset <= offset && offset < e.end()), "{offset} not in {extents:?}");
        }
        let data: u64 = extents.iter().map(|e| e.len).sum();
        assert!(data < MIB, "holes were taken for data: {extents:?}");
    }

    #[test]
    fn file_without_data_has_no_extent() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(data_extents(&file).unwrap(), []);
        file.set_len(MIB).unwrap();
        assert_eq!(data_extents(&file).unwrap(), []);
    }
}
