//! The image contract: every promise that a node image makes to EKS Anywhere, as a table, and how each is checked.
//!
//! Promises about files are checked in the assembled tree, before it becomes a disk. Promises about a running system are
//! checked by this same program inside the booted image. `docs/image-contract.md` is made from the table.

mod guest;
mod tree;

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

pub(crate) use self::tree::sha256;
use super::tree::Tree;
use crate::contract::{Firmware, Os, OsName, Provider, ResolvedRelease};

/// What stands before the report on the guest's serial port.
const REPORT_MARK: &str = "image-builder-report: ";

/// What an image must be like.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expected {
    pub os: Os,
    pub provider: Provider,
    pub firmware: Firmware,
    /// Absent for an image whose release is not known; promises about versions are then not checked.
    pub release: Option<ResolvedRelease>,
    /// Names of the container images that were loaded.
    pub images: Vec<String>,
    /// Packages that must be installed.
    pub packages: Vec<String>,
    /// Whether upstream's recipe made it, see `UPSTREAM`.
    #[serde(default)]
    pub upstream: bool,
}

/// The promises that images of the engine `ImageBuilder` make: what EKS Anywhere needs of a running system. The others say
/// how this program's own recipe does it.
const UPSTREAM: &[&str] = &[
    "firmware",
    "bios",
    "kubernetes-programs",
    "containerd-program",
    "crictl-program",
    "etcdadm-program",
    "cni-programs",
    "preloaded-images",
    "containerd-pods",
    "containerd-append",
    "kubelet-waits",
    "modules",
    "swap-off",
    "cloud-init-done",
];

/// Where a promise can be checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Level {
    /// In the tree, before it becomes a disk.
    Tree,
    /// In the booted image.
    Guest,
}

/// A system that is being checked.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'s> {
    pub tree: &'s Tree,
    pub expected: &'s Expected,
}

/// `Err` says what is there instead.
type Check = fn(&Subject<'_>) -> Result<(), String>;

/// One promise.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// Stands in reports and in the documentation.
    pub id: &'static str,
    pub what: &'static str,
    pub applies_to: Applies,
    pub level: Level,
    /// How it is checked, for the documentation.
    pub how: &'static str,
    check: Check,
}

/// Which images make a promise.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Applies {
    Always,
    /// Needs to know the release.
    KnownRelease,
    Provider(Provider),
    Firmware(Firmware),
    /// Ubuntu and Debian.
    Debian,
    Redhat,
}

impl Applies {
    fn to(self, expected: &Expected) -> bool {
        let redhat = expected.os.name == OsName::Redhat;
        match self {
            Self::Debian => !redhat,
            Self::Redhat => redhat,
            Self::Always => true,
            Self::KnownRelease => expected.release.is_some(),
            Self::Provider(provider) => expected.provider == provider,
            Self::Firmware(firmware) => expected.firmware == firmware,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Always | Self::KnownRelease => "all".to_owned(),
            Self::Provider(provider) => provider.to_string(),
            Self::Firmware(Firmware::Efi) => "firmware efi".to_owned(),
            Self::Firmware(Firmware::Bios) => "firmware bios".to_owned(),
            Self::Debian => "ubuntu, debian".to_owned(),
            Self::Redhat => "redhat".to_owned(),
        }
    }
}

/// All promises, those about files first.
pub fn promises() -> impl Iterator<Item = &'static Promise> {
    tree::PROMISES.iter().chain(guest::PROMISES)
}

/// How one promise turned out.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct CheckResult {
    pub id: String,
    /// What is there instead; absent when the promise is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Checks every promise of a level that applies, or only the one called `only`.
pub fn check(subject: &Subject<'_>, level: Level, only: Option<&str>) -> Vec<CheckResult> {
    promises()
        .filter(|promise| promise.level == level && promise.applies_to.to(subject.expected))
        .filter(|promise| !subject.expected.upstream || UPSTREAM.contains(&promise.id))
        .filter(|promise| only.is_none_or(|only| only == promise.id))
        .map(|promise| CheckResult { id: promise.id.to_owned(), failure: (promise.check)(subject).err() })
        .collect()
}

/// What the booted image says of itself.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestReport {
    /// `uname -r`
    pub kernel: String,
    /// `containerd --version`
    pub containerd: String,
    /// `kubelet --version`
    pub kubelet: String,
    pub results: Vec<CheckResult>,
}

impl GuestReport {
    /// Checks the system that this process runs in.
    pub fn make(expected: &Expected, only: Option<&str>) -> Self {
        let tree = Tree::at("/");
        let subject = Subject { tree: &tree, expected };
        let first_line = |program: &str, args: &[&str]| {
            guest::output(program, args).unwrap_or_else(|error| error).lines().next().unwrap_or_default().to_owned()
        };
        Self {
            kernel: first_line("uname", &["-r"]),
            containerd: first_line("containerd", &["--version"]),
            kubelet: first_line("kubelet", &["--version"]),
            results: check(&subject, Level::Guest, only),
        }
    }

    /// As it goes over a serial line.
    pub fn to_line(&self) -> String {
        format!("{REPORT_MARK}{}\n", serde_json::to_string(self).unwrap_or_default())
    }

    /// Finds the report in what came over the line.
    pub fn find(text: &str) -> Option<Self> {
        let line = text.lines().rev().find_map(|line| line.trim().strip_prefix(REPORT_MARK))?;
        serde_json::from_str(line).ok()
    }

    /// Promises that are not kept, and what is there instead.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.results.iter().filter_map(|result| Some((result.id.as_str(), result.failure.as_deref()?)))
    }
}

/// The table for `docs/image-contract.md`.
pub fn document() -> String {
    let mut text = String::from(
        "# The image contract\n\nWhat every image promises, and how each build checks it before the image is published. Made from the table in\n\
         `src/native/image_contract` by `image-builder image-contract`; a test keeps the two equal.\n\n\
         Promises checked in the *tree* are about files and need no start. Promises checked in the *guest* are checked inside\n\
         the booted image, by the same program, and its report goes over a serial line. `spec.verify` says when images are\n\
         booted.\n\n\
         | promise | images | checked in | how |\n|---|---|---|---|\n",
    );
    for promise in promises() {
        let level = if promise.level == Level::Tree { "tree" } else { "guest" };
        let Promise { id, what, applies_to, how, .. } = promise;
        let _ = writeln!(text, "| `{id}`: {what} | {} | {level} | {how} |", applies_to.text());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique() {
        let mut ids: Vec<_> = promises().map(|promise| promise.id).collect();
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all);
    }

    #[test]
    fn promises_of_upstreams_images_are_promises() {
        let unknown: Vec<_> = UPSTREAM.iter().filter(|id| !promises().any(|promise| promise.id == **id)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn a_report_is_found_among_other_lines() {
        let report = GuestReport {
            kernel: "6.1".into(),
            containerd: "containerd".into(),
            kubelet: "Kubernetes v1".into(),
            results: vec![
                CheckResult { id: "a".into(), failure: None },
                CheckResult { id: "b".into(), failure: Some("it is \"c\"".into()) },
            ],
        };
        let text = format!("noise\r\n{}\r\nmore", report.to_line().trim_end());
        assert_eq!(GuestReport::find(&text), Some(report.clone()));
        assert_eq!(report.failures().collect::<Vec<_>>(), [("b", "it is \"c\"")]);
        assert_eq!(GuestReport::find("image-builder-report: {\"cut"), None);
    }
}
