//! The base: unpacks its archive and looks whether it is the system that was asked for.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::tree::{Tree, TreeError, within};
use crate::{
    contract::{Classified, FailureClass, Os},
    process::{CommandSpec, ProcessError, Runner},
};

/// Where the system says what it is (os-release(5)), in the order of its reading.
const OS_RELEASE: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];
/// Directories whose contents exist only in a running system.
pub(super) const RUNTIME_DIRS: [&str; 4] = ["dev", "proc", "run", "sys"];

/// Why a base is not used.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("can not make the directory {}", .path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "the base can not be unpacked; it must be a tar archive, plain or compressed by gzip, xz or zstd: correct spec.base"
    )]
    Unreadable { source: ProcessError },
    #[error("unpacking the base was stopped")]
    Interrupted { source: ProcessError },
    #[error("there is no space for the unpacked base; give the build more disk (spec.build.resources)")]
    NoSpace { source: ProcessError },
    #[error("the base is not a root file system: it has no {missing}. Name the archive of a whole system in spec.base")]
    NotARoot { missing: &'static str },
    #[error("the base is {found} and spec.os is {wanted}: correct one of them")]
    OtherSystem { found: String, wanted: String },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for BaseError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Unreadable { .. } | Self::NotARoot { .. } | Self::OtherSystem { .. } => FailureClass::BadInput,
            Self::Directory { .. } | Self::NoSpace { .. } => FailureClass::Environment,
            Self::Interrupted { source } => source.class(),
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "BaseUnreadable",
            Self::NotARoot { .. } => "NotARootFileSystem",
            Self::OtherSystem { .. } => "BaseIsAnotherSystem",
            Self::Directory { .. } => "WorkDirectoryUnusable",
            Self::NoSpace { .. } => "DiskFull",
            Self::Interrupted { source } => source.reason(),
            Self::Tree(error) => error.reason(),
        }
    }
}

/// Unpacks `archive` into the new directory `root`, with owners, permissions and extended attributes.
///
/// GNU tar does it: it knows everything an archive of a root file system may hold (device nodes, attributes, sparse
/// files), recognises the compression by itself, and lets no entry lead outside of the directory.
pub(super) async fn unpack(archive: &Path, root: &Path, runner: &Runner) -> Result<(), BaseError> {
    fs::create_dir_all(root).map_err(|source| BaseError::Directory { path: root.to_owned(), source })?;
    let mut tar = CommandSpec::new("tar")
        .arg("--extract")
        .args(["--same-owner", "--numeric-owner", "--same-permissions", "--xattrs", "--xattrs-include=*"])
        .arg("--anchored")
        // xz on all cores.
        .env("XZ_DEFAULTS", "-T0");
    for directory in RUNTIME_DIRS {
        tar = tar.args([format!("--exclude={directory}/*"), format!("--exclude=./{directory}/*")]);
    }
    let tar = tar.arg("--directory").arg(root).arg("--file").arg(archive);
    runner.run(tar).await.map(drop).map_err(|source| match &source {
        ProcessError::Failed { output, .. } if output.contains("No space left on device") => {
            BaseError::NoSpace { source }
        }
        ProcessError::Failed { .. } => BaseError::Unreadable { source },
        _ => BaseError::Interrupted { source },
    })
}

/// Looks whether what was unpacked is the wanted system.
pub(super) fn check(root: &Path, wanted: &Os) -> Result<(), BaseError> {
    within(root, |tree| look(tree, wanted))?
}

fn look(tree: &Tree, wanted: &Os) -> Result<(), BaseError> {
    let mut text = None;
    for path in OS_RELEASE {
        text = text.or(tree.read(path)?);
    }
    let text = text.ok_or(BaseError::NotARoot { missing: "/etc/os-release" })?;
    for (path, missing) in [("/bin/sh", "/bin/sh"), ("/usr/bin/dpkg", "/usr/bin/dpkg"), ("/sbin/init", "/sbin/init")] {
        // The links of a whole system lead somewhere.
        if !tree.path(path).exists() {
            return Err(BaseError::NotARoot { missing });
        }
    }
    let found = |key| value(&text, key).unwrap_or_default();
    let (name, version) = (found("ID"), found("VERSION_ID"));
    if name != wanted.name.to_string() || version != wanted.version {
        let found = format!("{name} {version}").trim().to_owned();
        let found = if found.is_empty() { "a system that does not say what it is".to_owned() } else { found };
        return Err(BaseError::OtherSystem { found, wanted: format!("{} {}", wanted.name, wanted.version) });
    }
    for directory in RUNTIME_DIRS.iter().chain(&["tmp"]) {
        let mode = if *directory == "tmp" { 0o1777 } else { 0o755 };
        tree.make_dir(&format!("/{directory}"), mode)?;
    }
    Ok(())
}

/// The value of a key in os-release(5) format.
fn value(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::contract::OsName;

    fn debian() -> Os {
        Os { name: OsName::Debian, version: "12".into() }
    }

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        for (path, content) in files {
            tree.write(path, content, 0o755).unwrap();
        }
        (dir, tree)
    }

    const PROGRAMS: [(&str, &str); 3] = [("/bin/sh", ""), ("/usr/bin/dpkg", ""), ("/sbin/init", "")];

    #[rstest]
    #[case::quoted("ID=debian\nVERSION_ID=\"12\"\n", None)]
    #[case::plain("VERSION_ID=12\nID=debian\n", None)]
    #[case::another_version("ID=debian\nVERSION_ID=\"11\"\n", Some("the base is debian 11 and spec.os is debian 12"))]
    #[case::another_system("ID=ubuntu\nVERSION_ID=\"22.04\"\n", Some("the base is ubuntu 22.04"))]
    #[case::derivative("ID_LIKE=debian\nID=pureos\nVERSION_ID=12", Some("the base is pureos 12"))]
    #[case::silent("PRETTY_NAME=x\n", Some("does not say what it is"))]
    fn the_base_must_be_the_system_asked_for(#[case] text: &str, #[case] refused: Option<&str>) {
        let (_dir, tree) = tree(&PROGRAMS);
        tree.write("/usr/lib/os-release", text, 0o644).unwrap();
        tree.link("/etc/os-release", "../usr/lib/os-release").unwrap();
        match (look(&tree, &debian()), refused) {
            (Ok(()), None) => assert_eq!(tree.mode("/tmp"), Some(0o1777)),
            (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{error}"),
            (result, _) => panic!("{result:?}"),
        }
    }

    #[test]
    fn names_what_a_directory_lacks_to_be_a_system() {
        let (_dir, empty) = tree(&[]);
        assert!(look(&empty, &debian()).unwrap_err().to_string().contains("/etc/os-release"));
        let (_dir, half) = tree(&[("/etc/os-release", "ID=debian\nVERSION_ID=12\n"), ("/bin/sh", "")]);
        let error = look(&half, &debian()).unwrap_err();
        assert!(error.to_string().contains("/usr/bin/dpkg"), "{error}");
        assert_eq!(error.reason(), "NotARootFileSystem");
    }
}
