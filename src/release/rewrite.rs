//! Private mirrors: the public host of a URL is replaced, its path is kept.

use url::Url;

use super::ReleaseError;
use crate::fetch::shown;

/// Replaces prefixes of URLs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rewrite<'q>(&'q [(String, String)]);

impl<'q> Rewrite<'q> {
    pub(super) fn new(prefixes: &'q [(String, String)]) -> Self {
        Self(prefixes)
    }

    /// `url` with the longest prefix that fits replaced. A prefix ends at a `/` of the URL or at its end, so that
    /// `https://example.com` is no prefix of `https://example.com.evil.test`.
    pub(super) fn text(self, url: &str) -> String {
        let fitting = self.0.iter().filter_map(|(from, to)| {
            let rest = url.strip_prefix(from.trim_end_matches('/'))?;
            (rest.is_empty() || rest.starts_with('/')).then_some((from.trim_end_matches('/').len(), to, rest))
        });
        match fitting.max_by_key(|(length, ..)| *length) {
            Some((_, to, rest)) => format!("{}{rest}", to.trim_end_matches('/')),
            None => url.to_owned(),
        }
    }

    /// The URL that the user asks for or the release manifest leads to.
    pub(super) fn apply(self, url: &str) -> Result<Url, ReleaseError> {
        let text = self.text(url);
        // Not shown whole: what is no URL can still hold a password.
        text.parse().map_err(|_| ReleaseError::InvalidManifestUrl {
            url: text.split_once('@').map_or(text.as_str(), |(_, rest)| rest).to_owned(),
        })
    }

    /// The URL that the document at `source` gives for `component`.
    pub(super) fn entry(self, url: &str, component: &str, source: &Url) -> Result<Url, ReleaseError> {
        self.text(url).parse().map_err(|_| ReleaseError::InvalidUrl {
            url: shown(source),
            component: component.to_owned(),
            found: url.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_longest_prefix_that_ends_at_a_slash() {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let prefixes = [
            pair("https://distro.eks.amazonaws.com", "http://mirror.test/d/"),
            pair("https://distro.eks.amazonaws.com/kubernetes-1-31/", "https://other.test"),
        ];
        let rewrite = Rewrite::new(&prefixes);
        for (from, to) in [
            ("https://distro.eks.amazonaws.com/a/b?c=d", "http://mirror.test/d/a/b?c=d"),
            ("https://distro.eks.amazonaws.com", "http://mirror.test/d"),
            ("https://distro.eks.amazonaws.com/kubernetes-1-31/x.yaml", "https://other.test/x.yaml"),
            (
                "https://distro.eks.amazonaws.com/kubernetes-1-311/x.yaml",
                "http://mirror.test/d/kubernetes-1-311/x.yaml",
            ),
            ("https://distro.eks.amazonaws.com.evil.test/a", "https://distro.eks.amazonaws.com.evil.test/a"),
            ("https://elsewhere.test/a", "https://elsewhere.test/a"),
        ] {
            assert_eq!(rewrite.text(from), to);
        }
    }
}
