//! Files that the resource puts into the image.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, lchown},
};

use super::tree::{Tree, TreeError};
use crate::contract::{Classified, ExtraFile, FailureClass, FileContent};

/// Why a file of the resource could not be put into the image.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("can not read the contents of spec.files' {path} from {source_path}")]
    Read { path: String, source_path: String, source: io::Error },
    #[error(
        "spec.files' {path}: the image knows no {kind} {name}; write a name that a package of the image makes, or a number"
    )]
    UnknownAccount { path: String, kind: &'static str, name: String },
    #[error("spec.files' {path}: {mode} is no mode; write octal digits such as \"0644\"")]
    Mode { path: String, mode: String },
    #[error("spec.files' {path}: can not set owner and mode")]
    Own { path: String, source: io::Error },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for FileError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Read { .. } | Self::UnknownAccount { .. } | Self::Mode { .. } => FailureClass::BadInput,
            Self::Own { .. } => FailureClass::Environment,
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Tree(error) => error.reason(),
            _ => "FileUnusable",
        }
    }
}

/// A file with its bytes.
#[derive(Debug)]
pub(super) struct LoadedFile<'f> {
    file: &'f ExtraFile,
    bytes: Vec<u8>,
}

/// Reads the contents of all files, while this process still sees where they are.
pub(super) fn load(files: &[ExtraFile]) -> Result<Vec<LoadedFile<'_>>, FileError> {
    let load = |file: &'_ ExtraFile| match &file.content {
        FileContent::Inline(text) => Ok(text.clone().into_bytes()),
        FileContent::Path(path) => fs::read(path).map_err(|source| FileError::Read {
            path: file.path.clone(),
            source_path: path.display().to_string(),
            source,
        }),
    };
    files.iter().map(|file| Ok(LoadedFile { file, bytes: load(file)? })).collect()
}

/// Writes them, in their order.
pub(super) fn install(tree: &Tree, files: &[LoadedFile<'_>]) -> Result<(), FileError> {
    for LoadedFile { file, bytes } in files {
        let path = &file.path;
        let mode = u32::from_str_radix(&file.mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| FileError::Mode { path: path.clone(), mode: file.mode.clone() })?;
        let owner = account(tree, path, "user", "/etc/passwd", &file.owner)?;
        let group = account(tree, path, "group", "/etc/group", &file.group)?;
        // Nobody else reads it before it has its owner.
        tree.write(path, bytes, 0o600)?;
        let own = || {
            lchown(tree.path(path), Some(owner), Some(group))?;
            fs::set_permissions(tree.path(path), fs::Permissions::from_mode(mode))
        };
        own().map_err(|source| FileError::Own { path: path.clone(), source })?;
    }
    Ok(())
}

/// The number of a user or group of the image.
fn account(tree: &Tree, path: &str, kind: &'static str, table: &str, name: &str) -> Result<u32, FileError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let table = tree.read(table)?.unwrap_or_default();
    let number = table.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    });
    number.ok_or_else(|| FileError::UnknownAccount { path: path.to_owned(), kind, name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, owner: &str, mode: &str) -> ExtraFile {
        ExtraFile {
            path: path.into(),
            owner: owner.into(),
            group: nix::unistd::getegid().to_string(),
            mode: mode.into(),
            content: FileContent::Inline("text".into()),
        }
    }

    fn tree() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        let line = format!("root:x:0:0::/:/bin/sh\nme:x:{}:0::/:/bin/sh\n", nix::unistd::geteuid());
        tree.write("/etc/passwd", line, 0o644).unwrap();
        (dir, tree)
    }

    #[test]
    fn owners_are_those_of_the_image_and_modes_are_exact() {
        let (_dir, tree) = tree();
        let files = [file("/etc/agent/token", "me", "4750")];
        install(&tree, &load(&files).unwrap()).unwrap();
        assert_eq!(tree.mode("/etc/agent/token"), Some(0o4750));
        assert_eq!(tree.read("/etc/agent/token").unwrap().as_deref(), Some("text"));
    }

    #[test]
    fn names_what_is_wrong_with_a_file() {
        let (_dir, tree) = tree();
        for (file, part) in [
            (file("/a", "nobody-here", "0644"), "no user nobody-here"),
            (file("/a", "0", "0999"), "0999 is no mode"),
            (ExtraFile { content: FileContent::Path("/nowhere/x".into()), ..file("/a", "0", "0644") }, "/nowhere/x"),
        ] {
            let files = [file];
            let error = load(&files).and_then(|loaded| install(&tree, &loaded)).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert_eq!(error.class(), FailureClass::BadInput);
        }
    }
}
