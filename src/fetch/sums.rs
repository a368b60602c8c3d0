//! `SHA256SUMS` files, as coreutils writes them.

use url::Url;

use super::digest::Expected;

/// Entries that the error about a missing one names.
const NAMED_ENTRIES: usize = 3;

/// The file is not listed.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct NotListed {
    /// The listed names that are most like it.
    pub(super) nearest: Vec<String>,
}

/// The file name at the end of a URL.
pub(super) fn file_name(url: &Url) -> String {
    url.path().rsplit('/').next().unwrap_or_default().to_owned()
}

/// The digest listed for `file`.
pub(super) fn find(sums: &str, file: &str) -> Result<Expected, NotListed> {
    let mut names = vec![];
    for (digest, name) in sums.lines().filter_map(entry) {
        if name == file {
            return Ok(digest);
        }
        names.push(name);
    }
    let likeness = |name: &str| name.bytes().zip(file.bytes()).take_while(|(a, b)| a == b).count();
    names.sort_by_key(|name| std::cmp::Reverse(likeness(name)));
    Err(NotListed { nearest: names.into_iter().take(NAMED_ENTRIES).map(ToOwned::to_owned).collect() })
}

/// `<digest>  <name>`, or `<digest> *<name>` for a file read as binary.
fn entry(line: &str) -> Option<(Expected, &str)> {
    let (digest, name) = line.trim_end().split_once(' ')?;
    let name = name.strip_prefix([' ', '*'])?;
    Some((Expected::sha256(digest, name).ok()?, name.strip_prefix("./").unwrap_or(name)))
}

/// A digest is one that stands in the list, and few names are told where there is none.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let sums = String::from_utf8_lossy(bytes);
    match find(&sums, "disk.img") {
        Ok(digest) => {
            let digest = digest.to_string();
            let digits = digest.trim_start_matches("sha256:");
            assert!(digits.len() == 64 && sums.to_ascii_lowercase().contains(digits), "{digest} is not listed");
        }
        Err(NotListed { nearest }) => assert!(nearest.len() <= NAMED_ENTRIES),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SUMS: &str = "\
1111111111111111111111111111111111111111111111111111111111111111 *jammy-server-cloudimg-amd64-root.tar.xz\r
2222222222222222222222222222222222222222222222222222222222222222  jammy-server-cloudimg-amd64.img
3333333333333333333333333333333333333333333333333333333333333333  ./jammy server.tar

-----BEGIN PGP SIGNATURE-----
";

    #[test]
    fn finds_names_in_text_and_binary_form() {
        let found = |name| find(SUMS, name).map(|digest| digest.to_string()[7..8].to_owned());
        assert_eq!(found("jammy-server-cloudimg-amd64-root.tar.xz").as_deref(), Ok("1"));
        assert_eq!(found("jammy-server-cloudimg-amd64.img").as_deref(), Ok("2"));
        assert_eq!(found("jammy server.tar").as_deref(), Ok("3"));
    }

    #[test]
    fn names_the_nearest_entries_for_a_file_that_is_not_listed() {
        let missing = find(SUMS, "jammy-server-cloudimg-arm64-root.tar.xz").unwrap_err();
        assert_eq!(missing.nearest[2], "jammy server.tar");
        assert_eq!(missing.nearest.len(), 3);
    }

    proptest! {
        #[test]
        fn finds_what_is_listed_whatever_stands_around_it(
            noise in any::<String>(), digest in "[0-9a-fA-F]{64}", name in "[a-z][a-z0-9._-]{0,40}", binary: bool,
        ) {
            let mark = if binary { '*' } else { ' ' };
            let sums = format!("{noise}\n{digest} {mark}{name}\n{noise}");
            prop_assert_eq!(find(&sums, &name).unwrap().to_string(), format!("sha256:{}", digest.to_lowercase()));
        }

        #[test]
        fn lists_nothing_that_is_not_there(sums in any::<String>()) {
            prop_assert!(find(&sums, "jammy-server-cloudimg-amd64-root.tar.xz").is_err());
        }
    }
}
