//! The release's artifacts: where each of them goes in the image (eksa-facts 6.1).

use std::{
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use tar::{Archive, EntryType};

use super::tree::{Tree, TreeError};
use crate::contract::{Artifact, Classified, FailureClass, ResolvedRelease};

/// Why an artifact could not be put into the image. It had the right digest: the release itself is not as expected.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("can not open the fetched {name}")]
    Open { name: &'static str, source: io::Error },
    #[error("can not unpack {name}; the release names an archive that is not like those of other releases")]
    Unpack { name: &'static str, source: io::Error },
    #[error("the archive of {name} holds no {missing}; the release is not like other releases")]
    Missing { name: &'static str, missing: &'static str },
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for ArtifactError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Open { .. } => FailureClass::Environment,
            Self::Unpack { source, .. } if source.kind() == io::ErrorKind::StorageFull => FailureClass::Environment,
            Self::Unpack { .. } | Self::Missing { .. } => FailureClass::BadInput,
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Unpack { source, .. } if source.kind() == io::ErrorKind::StorageFull => "DiskFull",
            Self::Open { .. } | Self::Unpack { .. } | Self::Missing { .. } => "ArtifactUnusable",
            Self::Tree(error) => error.reason(),
        }
    }
}

/// Fetched files of a release.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub kubelet: PathBuf,
    pub kubeadm: PathBuf,
    pub kubectl: PathBuf,
    pub cni_plugins: PathBuf,
    pub etcd: PathBuf,
    pub etcdadm: PathBuf,
    pub containerd: PathBuf,
    pub crictl: PathBuf,
    /// Archives of container images.
    pub images: Vec<PathBuf>,
}

impl Fetched {
    /// The release's artifacts in the order that [`new`](Self::new) takes their files.
    pub fn wanted(release: &ResolvedRelease) -> Vec<Artifact> {
        let mut wanted = vec![
            release.kubelet.clone(),
            release.kubeadm.clone(),
            release.kubectl.clone(),
            release.cni_plugins.artifact.clone(),
            release.etcd.artifact.clone(),
            release.etcdadm.artifact.clone(),
            release.containerd.artifact.clone(),
            release.crictl.artifact.clone(),
        ];
        wanted.extend(release.images.iter().cloned());
        wanted
    }

    /// From the files of [`wanted`](Self::wanted); `None` when there are fewer.
    pub fn new(files: Vec<PathBuf>) -> Option<Self> {
        let mut files = files.into_iter();
        Some(Self {
            kubelet: files.next()?,
            kubeadm: files.next()?,
            kubectl: files.next()?,
            cni_plugins: files.next()?,
            etcd: files.next()?,
            etcdadm: files.next()?,
            containerd: files.next()?,
            crictl: files.next()?,
            images: files.collect(),
        })
    }

    /// Opens what goes into the image as files, while this process still sees them.
    pub fn open(&self) -> Result<OpenArtifacts, ArtifactError> {
        let open = |name, path: &Path| File::open(path).map_err(|source| ArtifactError::Open { name, source });
        Ok(OpenArtifacts {
            binaries: [
                ("/usr/bin/kubelet", open("kubelet", &self.kubelet)?),
                ("/usr/bin/kubeadm", open("kubeadm", &self.kubeadm)?),
                ("/usr/bin/kubectl", open("kubectl", &self.kubectl)?),
            ],
            cni_plugins: open("cni-plugins", &self.cni_plugins)?,
            etcd: open("etcd", &self.etcd)?,
            etcdadm: open("etcdadm", &self.etcdadm)?,
            containerd: open("containerd", &self.containerd)?,
            crictl: open("cri-tools", &self.crictl)?,
        })
    }
}

/// Files that are read while the root directory is the image's.
#[derive(Debug)]
pub struct OpenArtifacts {
    binaries: [(&'static str, File); 3],
    cni_plugins: File,
    etcd: File,
    etcdadm: File,
    containerd: File,
    crictl: File,
}

/// Where the CNI plugins are.
pub(super) const CNI_DIR: &str = "/opt/cni/bin";

/// Where EKS Anywhere's etcdadm looks for the archive of etcd, so that a node of an etcd cluster needs no download.
pub(super) fn etcd_archive(version: &str) -> String {
    format!("/var/cache/etcdadm/etcd/{version}/etcd-{version}-linux-amd64.tar.gz")
}

/// Puts everything in its place.
pub(super) fn install(tree: &Tree, artifacts: OpenArtifacts, release: &ResolvedRelease) -> Result<(), ArtifactError> {
    let OpenArtifacts { binaries, cni_plugins, mut etcd, etcdadm, containerd, crictl } = artifacts;
    for (path, mut file) in binaries {
        tree.copy(path, &mut file, 0o755)?;
    }
    unpack(tree, "containerd", containerd, |path| Some(path.to_owned()))?;
    unpack(tree, "cni-plugins", cni_plugins, |path| Some(Path::new(CNI_DIR).join(path)))?;
    // These hold one program each, and the licences of its parts.
    unpack(tree, "etcdadm", etcdadm, |path| program(path, &["etcdadm"], "/usr/bin"))?;
    unpack(tree, "cri-tools", crictl, |path| program(path, &["crictl", "critest"], "/usr/local/bin"))?;
    tree.copy(&etcd_archive(&release.etcd.version), &mut etcd, 0o644)?;
    for (name, path) in [
        ("containerd", "/usr/local/bin/containerd"),
        ("containerd", "/usr/local/bin/ctr"),
        ("containerd", "/usr/local/bin/containerd-shim-runc-v2"),
        ("containerd", "/usr/local/sbin/runc"),
        ("cni-plugins", "/opt/cni/bin/host-device"),
        ("etcdadm", "/usr/bin/etcdadm"),
        ("cri-tools", "/usr/local/bin/crictl"),
    ] {
        if !tree.is_executable(path) {
            return Err(ArtifactError::Missing { name, missing: path });
        }
    }
    let unit = "/etc/systemd/system/containerd.service";
    if !tree.exists(unit) {
        return Err(ArtifactError::Missing { name: "containerd", missing: unit });
    }
    for name in ["ctr", "crictl", "critest"] {
        if tree.exists(&format!("/usr/local/bin/{name}")) {
            tree.link(&format!("/usr/bin/{name}"), &format!("/usr/local/bin/{name}"))?;
        }
    }
    Ok(())
}

/// Where a program of an archive goes, if it is one of `names`.
fn program(path: &Path, names: &[&str], directory: &str) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    names.contains(&name).then(|| Path::new(directory).join(name))
}

/// Unpacks the files of a gzip-compressed archive, each where `place` puts it. Everything belongs to root; directories
/// that are there keep their permissions.
fn unpack(
    tree: &Tree,
    name: &'static str,
    archive: impl Read,
    place: impl Fn(&Path) -> Option<PathBuf>,
) -> Result<(), ArtifactError> {
    let unpack = || {
        let mut archive = Archive::new(MultiGzDecoder::new(archive));
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = inside(&entry.path()?)?;
            let Some(target) = place(&path) else { continue };
            let target = tree.path(&target.to_string_lossy());
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    if let Some(parent) = target.parent() {
                        std::fs::create_dir_all(parent)?;
                    }
                    entry.unpack(&target)?;
                }
                EntryType::Symlink => {
                    let link = entry.link_name()?.unwrap_or_default().into_owned();
                    if let Some(parent) = target.parent() {
                        std::fs::create_dir_all(parent)?;
                    }
                    if target.symlink_metadata().is_ok() {
                        std::fs::remove_file(&target)?;
                    }
                    std::os::unix::fs::symlink(link, &target)?;
                }
                EntryType::Link => {
                    let link = inside(&entry.link_name()?.unwrap_or_default())?;
                    if let Some(original) = place(&link) {
                        if target.symlink_metadata().is_ok() {
                            std::fs::remove_file(&target)?;
                        }
                        std::fs::hard_link(tree.path(&original.to_string_lossy()), &target)?;
                    }
                }
                EntryType::Directory => {}
                kind => return Err(io::Error::other(format!("{} is a {kind:?}", path.display()))),
            }
        }
        Ok(())
    };
    unpack().map_err(|source| ArtifactError::Unpack { name, source })
}

/// The path of an entry below the directory that it is unpacked in.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::other(format!("the path {} leads outside", path.display())));
            }
        }
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder};
    use tar::{Builder, Header};

    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(vec![], Compression::fast()));
        for (path, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(if kind.is_dir() { 0o700 } else { 0o755 });
            header.set_uid(1000);
            let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
            header.set_size(if is_link { 0 } else { content.len() as u64 });
            // Set by hand: the library does not write paths that lead outside.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            if is_link {
                header.set_link_name(content).unwrap();
            }
            header.set_cksum();
            builder.append(&header, if is_link { &[][..] } else { content.as_bytes() }).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn unpacked(entries: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, Tree, Result<(), ArtifactError>) {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        tree.make_dir("/usr", 0o755).unwrap();
        let result = unpack(&tree, "x", &archive(entries)[..], |path| Some(path.to_owned()));
        (dir, tree, result)
    }

    #[test]
    fn an_archive_does_not_change_directories_that_are_there() {
        let (_dir, tree, result) =
            unpacked(&[("./usr/", EntryType::Directory, ""), ("./usr/local/bin/ctr", EntryType::Regular, "program")]);
        result.unwrap();
        assert_eq!(tree.mode("/usr"), Some(0o755));
        assert!(tree.is_executable("/usr/local/bin/ctr"));
    }

    #[test]
    fn links_are_kept() {
        let (_dir, tree, result) = unpacked(&[
            ("bin/one", EntryType::Regular, "program"),
            ("bin/soft", EntryType::Symlink, "one"),
            ("bin/hard", EntryType::Link, "bin/one"),
        ]);
        result.unwrap();
        for name in ["soft", "hard"] {
            assert_eq!(tree.read(&format!("/bin/{name}")).unwrap().as_deref(), Some("program"));
        }
    }

    #[test]
    fn refuses_paths_that_lead_outside_and_devices() {
        for entry in [("../evil", EntryType::Regular, "x"), ("dev/x", EntryType::Char, "")] {
            let (_dir, _tree, result) = unpacked(&[entry]);
            let error = result.unwrap_err();
            assert_eq!(error.reason(), "ArtifactUnusable", "{error}");
        }
    }

    #[test]
    fn takes_the_program_out_of_an_archive_with_licences() {
        assert_eq!(program(Path::new("a/b/etcdadm"), &["etcdadm"], "/usr/bin"), Some("/usr/bin/etcdadm".into()));
        assert_eq!(program(Path::new("LICENSES/etcdadm/LICENSE"), &["etcdadm"], "/usr/bin"), None);
    }
}
