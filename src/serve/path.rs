//! Paths that the server accepts: plain names between single slashes, so that none can leave the data directory.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::contract::upload::CHECKSUM_SUFFIX;

/// Longest path, in bytes.
const MAX_PATH: usize = 1024;
/// Longest name; leaves room for what the server appends to it.
const MAX_NAME: usize = 240;
/// Deepest path.
const MAX_NAMES: usize = 16;

/// Why a path is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum PathError {
    #[error(
        "a path is made of names of letters, digits, `.`, `_` and `-` that begin with a letter or digit, with one `/` \
         between two names"
    )]
    Malformed,
    #[error("the path has more than {MAX_PATH} bytes, {MAX_NAMES} names or {MAX_NAME} bytes in a name")]
    TooLong,
    #[error("an image is in a directory: use /<directory>/<file>")]
    NoDirectory,
    #[error("names that end in `{CHECKSUM_SUFFIX}` are the server's own: it writes them when an image is complete")]
    Reserved,
}

/// Names between slashes, without a slash at either end.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub(super) struct StorePath(String);

impl StorePath {
    /// Takes the path of a URL as it was sent: an escaped character is refused, so nothing is decoded twice.
    pub(super) fn parse(path: &str) -> Result<Self, PathError> {
        let path = path.strip_prefix('/').unwrap_or(path);
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.len() > MAX_PATH || path.split('/').count() > MAX_NAMES {
            return Err(PathError::TooLong);
        }
        for name in path.split('/') {
            let first = name.bytes().next().ok_or(PathError::Malformed)?;
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if !first.is_ascii_alphanumeric() || !name.bytes().all(allowed) {
                return Err(PathError::Malformed);
            }
            if name.len() > MAX_NAME {
                return Err(PathError::TooLong);
            }
        }
        Ok(Self(path.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn below(&self, root: &Path) -> PathBuf {
        root.join(&self.0)
    }

    /// Whether `self` is `directory` or in it.
    pub(super) fn is_in(&self, directory: &Self) -> bool {
        self.0.strip_prefix(&directory.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The path of an image.
#[derive(Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub(super) struct ImagePath(StorePath);

impl ImagePath {
    pub(super) fn parse(path: &str) -> Result<Self, PathError> {
        let parsed = StorePath::parse(path)?;
        if path.ends_with('/') || !parsed.0.contains('/') {
            return Err(PathError::NoDirectory);
        }
        if parsed.0.ends_with(CHECKSUM_SUFFIX) {
            return Err(PathError::Reserved);
        }
        Ok(Self(parsed))
    }

    pub(super) fn path(&self) -> &StorePath {
        &self.0
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0.0
    }

    /// The file's name without its directory.
    pub(super) fn file_name(&self) -> &str {
        self.0.0.rsplit('/').next().unwrap_or_default()
    }

    pub(super) fn below(&self, root: &Path) -> PathBuf {
        self.0.below(root)
    }
}

impl fmt::Display for ImagePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A path that is accepted is one below the root, and is what is shown of it.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(path) = StorePath::parse(&text) else {
        assert!(ImagePath::parse(&text).is_err(), "{text} is a path of an image and no path");
        return;
    };
    let root = Path::new("/data");
    let full = path.below(root);
    let below = full.strip_prefix(root).is_ok_and(|rest| {
        rest.components().count() > 0 && rest.components().all(|part| matches!(part, std::path::Component::Normal(_)))
    });
    assert!(below, "{text} leads to {}", full.display());
    assert_eq!(StorePath::parse(path.as_str()).as_ref(), Ok(&path));
    assert!(path.is_in(&path));
    if let Ok(image) = ImagePath::parse(&text) {
        assert!(image.path() == &path && !image.file_name().ends_with(CHECKSUM_SUFFIX), "{text} is no image");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn accepts_what_the_controller_and_people_use() {
        for path in ["/node-images/ubuntu-2204/0123456789/ubuntu-2204-kube-1-31.gz", "a/b", "/A_1/b.raw.gz"] {
            assert!(ImagePath::parse(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn refuses_traversal_hidden_escaped_and_reserved_names() {
        for path in [
            "/../b",
            "a/../b",
            "a/./b",
            "a//b",
            "/",
            "",
            "a/.b",
            ".a/b",
            "a/%2e%2e/b",
            "a/b%00",
            "a\\b/c",
            "a/é",
            "//a/b",
        ] {
            assert_eq!(ImagePath::parse(path), Err(PathError::Malformed), "{path}");
        }
        assert_eq!(ImagePath::parse("/file.gz"), Err(PathError::NoDirectory));
        assert_eq!(ImagePath::parse("/a/b/"), Err(PathError::NoDirectory));
        assert_eq!(ImagePath::parse("/a/b.sha256"), Err(PathError::Reserved));
        assert_eq!(ImagePath::parse(&format!("/a/{}", "b".repeat(241))), Err(PathError::TooLong));
        assert_eq!(ImagePath::parse(&"a/".repeat(17)), Err(PathError::TooLong));
    }

    #[test]
    fn directory_holds_its_own_paths_only() {
        let directory = StorePath::parse("ns/name").unwrap();
        assert!(StorePath::parse("ns/name/id/file.gz").unwrap().is_in(&directory));
        assert!(!StorePath::parse("ns/name2/id/file.gz").unwrap().is_in(&directory));
    }

    proptest! {
        #[test]
        fn an_accepted_path_stays_below_the_root(path in "[a./%_~ -]{0,24}") {
            if let Ok(parsed) = StorePath::parse(&path) {
                let full = parsed.below(Path::new("/data"));
                prop_assert!(full.components().all(|part| part != std::path::Component::ParentDir));
                prop_assert!(full.starts_with("/data") && full != Path::new("/data"));
            }
        }
    }
}
