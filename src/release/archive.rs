//! The documents of all releases in one archive, for networks without Internet access: the archive that the EKS Anywhere
//! tool makes by `download manifests` and takes by `--manifest-tarball`.
//!
//! It holds `eks-a-manifest.yaml`, `eks-a-bundles-<version>.yaml` for each release, and `eks-d-<channel>.yaml` for the
//! newest EKS Distro release of each channel. Ours has the older ones too, as `eks-d-<channel>-<number>.yaml`, so that
//! older releases are built of what they name.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt, stream};
use reqwest::Client;
use sha2::{Digest, Sha256};
use url::Url;

use super::{
    LARGEST_DOCUMENT, ReleaseError,
    documents::{Bundles, DistroRelease, Document, Releases},
    rewrite::Rewrite,
};
use crate::fetch::{Patience, TransportError, document, shown};

/// Documents that are fetched at the same time.
const PARALLEL: usize = 8;
const RELEASES: &str = "eks-a-manifest.yaml";
const BUNDLES_PREFIX: &str = "eks-a-bundles-";
const DISTRO_PREFIX: &str = "eks-d-";

/// A document on its way into the archive.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its name in the archive.
    pub name: String,
    /// Where it is until then.
    pub path: PathBuf,
}

/// Fetches the documents of all releases.
#[derive(Debug)]
pub struct Collector {
    client: Client,
    /// Documents by the digest of their URL. Those that never change are fetched once, however often it takes.
    store: PathBuf,
    patience: Patience,
}

impl Collector {
    /// A collector that keeps documents in `store`, a directory that exists.
    pub fn new(client: Client, store: impl Into<PathBuf>) -> Self {
        Self { client, store: store.into(), patience: Patience::default() }
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// The documents that the release manifest at `manifest_url` leads to, in the order of their names. `on_progress` is
    /// told how many are there, and how many there are as far as that is known.
    pub async fn collect(
        &self,
        manifest_url: &str,
        on_progress: impl Fn(usize, usize) + Sync,
    ) -> Result<Vec<Entry>, ReleaseError> {
        let url = Rewrite::new(&[]).apply(manifest_url)?;
        let (releases, path) = self.fetch::<Releases>(&url, false).await?;
        let mut entries = vec![Entry { name: RELEASES.to_owned(), path }];
        let latest = releases.spec.latest_version.as_str();
        let mut known = 1 + releases.spec.releases.len();
        on_progress(1, known);

        // Every EKS Distro release by its URL, and whether the latest EKS Anywhere release is made of it.
        let mut distros: BTreeMap<Url, bool> = BTreeMap::new();
        let fetches = releases.spec.releases.iter().map(|release| async move {
            let url = Rewrite::new(&[]).apply(&release.bundle_manifest_url)?;
            let found = self.fetch::<Bundles>(&url, true).await;
            Ok::<_, ReleaseError>((release, unless_lost(found, release.version == latest)?))
        });
        let mut fetches = stream::iter(fetches).buffer_unordered(PARALLEL);
        let mut done = 1;
        while let Some((release, found)) = fetches.try_next().await? {
            done += 1;
            on_progress(done, known);
            let Some((bundles, path)) = found else { continue };
            entries.push(Entry { name: bundles_name(&release.version, &url)?, path });
            for bundle in &bundles.spec.versions_bundles {
                let url = Rewrite::new(&[]).entry(&bundle.eks_d.manifest_url, &bundle.eks_d.name, &url)?;
                *distros.entry(url).or_default() |= release.version == latest;
            }
        }
        drop(fetches);
        known = done + distros.len();
        on_progress(done, known);

        let fetches = distros
            .iter()
            .map(|(url, needed)| async move { unless_lost(self.fetch::<DistroRelease>(url, true).await, *needed) });
        let mut fetches = stream::iter(fetches).buffer_unordered(PARALLEL);
        let mut found = vec![];
        while let Some(distro) = fetches.try_next().await? {
            done += 1;
            on_progress(done, known);
            found.extend(distro.map(|(distro, path)| (distro.spec.channel, distro.spec.number, path)));
        }
        entries.extend(name_distros(found));
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The document at `url`. One that never changes and is there already is not fetched again.
    async fn fetch<D: Document>(&self, url: &Url, constant: bool) -> Result<(D, PathBuf), ReleaseError> {
        let path = self.store.join(hex::encode(Sha256::digest(url.as_str())));
        if constant
            && let Ok(bytes) = fs::read(&path)
            && let Ok((document, _)) = parse::<D>(bytes, url).await
        {
            return Ok((document, path));
        }
        let answer = document(&self.client, url, None, LARGEST_DOCUMENT, &self.patience).await?;
        let bytes = answer.map(|answer| answer.bytes).unwrap_or_default();
        let (document, bytes) = parse::<D>(bytes, url).await?;
        write(&path, &bytes)?;
        Ok((document, path))
    }
}

/// Reads a document on a thread that may be busy for long, and hands its bytes back.
async fn parse<D: Document>(bytes: Vec<u8>, url: &Url) -> Result<(D, Vec<u8>), ReleaseError> {
    let parsed = tokio::task::spawn_blocking(move || D::read(&bytes).map(|document| (document, bytes))).await;
    let parsed = parsed.unwrap_or_else(|_| Err("it can not be parsed".to_owned()));
    parsed.map_err(|problem| ReleaseError::InvalidDocument { url: shown(url), expected: D::EXPECTED, problem })
}

/// Documents of releases long gone may be gone too; without those of the latest one the archive is of no use.
fn unless_lost<T>(found: Result<T, ReleaseError>, needed: bool) -> Result<Option<T>, ReleaseError> {
    match found {
        Err(ReleaseError::Download(error @ TransportError::NotFound { .. })) if !needed => {
            tracing::warn!(%error, "the archive goes without this document");
            Ok(None)
        }
        found => found.map(Some),
    }
}

fn bundles_name(version: &str, source: &Url) -> Result<String, ReleaseError> {
    if version.contains('/') || version.contains('\0') {
        let problem = format!("the version `{version}` can not be part of a file name");
        return Err(ReleaseError::InvalidDocument { url: shown(source), expected: Releases::EXPECTED, problem });
    }
    Ok(format!("{BUNDLES_PREFIX}{version}.yaml"))
}

/// Names EKS Distro releases, given as channel, number and file: the newest of a channel by its channel alone.
fn name_distros(mut found: Vec<(String, u64, PathBuf)>) -> Vec<Entry> {
    found.sort_by(|a, b| (&a.0, b.1).cmp(&(&b.0, a.1)));
    found.dedup_by(|a, b| (&a.0, a.1) == (&b.0, b.1));
    let mut channels = BTreeSet::new();
    let name = |(channel, number, path): (String, u64, PathBuf)| {
        let name = if channels.insert(channel.clone()) {
            format!("{DISTRO_PREFIX}{channel}.yaml")
        } else {
            format!("{DISTRO_PREFIX}{channel}-{number}.yaml")
        };
        Entry { name, path }
    };
    found.into_iter().filter(|(channel, ..)| !channel.contains('/')).map(name).collect()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReleaseError> {
    let written = (|| {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|error| error.error)
    })();
    written.map(drop).map_err(|source| ReleaseError::WriteFile { path: path.to_owned(), source: Arc::new(source) })
}

/// Writes an archive of `entries` to `path`, where it appears when it is whole. The same documents give the same bytes.
pub fn pack(entries: &[Entry], path: &Path) -> Result<(), ReleaseError> {
    let failed = |source: io::Error| ReleaseError::WriteFile { path: path.to_owned(), source: Arc::new(source) };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().permissions(readable()).tempfile_in(directory).map_err(failed)?;
    let mut archive = tar::Builder::new(file);
    for Entry { name, path } in entries {
        let bytes =
            fs::read(path).map_err(|source| ReleaseError::ReadFile { path: path.clone(), source: Arc::new(source) })?;
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).map_err(failed)?;
    }
    archive.into_inner().and_then(|file| file.persist(path).map_err(|error| error.error)).map_err(failed)?;
    Ok(())
}

/// A temporary file is its owner's alone unless told otherwise.
fn readable() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(0o644)
}

/// An archive that was unpacked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Unpacked {
    /// `file` URL of the release manifest.
    pub manifest_url: String,
    /// For [`super::ReleaseQuery::rewrite`]: URLs of documents, and those of the files that hold them.
    pub rewrite: Vec<(String, String)>,
}

/// Unpacks the documents of the archive at `path` into the empty directory `into`. Everything else in it is passed over.
pub fn unpack(path: &Path, into: &Path) -> Result<Unpacked, ReleaseError> {
    let invalid = |problem: String| ReleaseError::InvalidArchive { path: path.to_owned(), problem };
    let unreadable = |source| ReleaseError::ReadFile { path: path.to_owned(), source: Arc::new(source) };
    let mut archive = tar::Archive::new(fs::File::open(path).map_err(unreadable)?);
    let entries = archive.entries().map_err(|error| invalid(error.to_string()))?;
    let (mut releases, mut bundles, mut distros) = (None, BTreeMap::new(), BTreeMap::new());
    for entry in entries {
        let mut entry = entry.map_err(|error| invalid(error.to_string()))?;
        let name = entry.path().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
        let Some(name) = name.filter(|name| is_document(name) && entry.header().entry_type().is_file()) else {
            continue;
        };
        let mut bytes = vec![];
        entry
            .by_ref()
            .take(LARGEST_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| invalid(format!("{name} can not be read: {error}")))?;
        if bytes.len() as u64 > LARGEST_DOCUMENT {
            return Err(invalid(format!("{name} is larger than any such document")));
        }
        let broken = |problem| invalid(format!("{name}: {problem}"));
        let file = into.join(&name);
        let url = Url::from_file_path(std::path::absolute(&file).map_err(unreadable)?)
            .map_err(|()| invalid(format!("{name} has no URL")))?
            .to_string();
        if name == RELEASES {
            releases = Some((Releases::read(&bytes).map_err(broken)?, url));
        } else if let Some(version) = name.strip_prefix(BUNDLES_PREFIX).and_then(|rest| rest.strip_suffix(".yaml")) {
            let document = Bundles::read(&bytes).map_err(broken)?;
            bundles.insert(version.to_owned(), (document, url));
        } else {
            let DistroRelease { spec, .. } = DistroRelease::read(&bytes).map_err(broken)?;
            distros.insert(format!("kubernetes-{}-eks-{}", spec.channel, spec.number), url);
        }
        write(&file, &bytes)?;
    }
    let Some((releases, manifest_url)) = releases else {
        return Err(invalid(format!("it holds no {RELEASES}: make it by `image-builder download manifests`")));
    };
    let mut rewrite = BTreeMap::new();
    for release in &releases.spec.releases {
        let Some((document, url)) = bundles.get(&release.version) else { continue };
        rewrite.insert(release.bundle_manifest_url.clone(), url.clone());
        for bundle in &document.spec.versions_bundles {
            if let Some(url) = distros.get(&bundle.eks_d.name) {
                rewrite.insert(bundle.eks_d.manifest_url.clone(), url.clone());
            }
        }
    }
    Ok(Unpacked { manifest_url, rewrite: rewrite.into_iter().collect() })
}

fn is_document(name: &str) -> bool {
    let one_of_many = |stem: &str| stem.starts_with(BUNDLES_PREFIX) || stem.starts_with(DISTRO_PREFIX);
    name == RELEASES || name.strip_suffix(".yaml").is_some_and(one_of_many)
}

/// Nothing is written but documents, into the directory, and every URL leads there.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(dir) = tempfile::tempdir() else { return };
    let (path, into) = (dir.path().join("archive.tar"), dir.path().join("into"));
    if fs::create_dir(&into).and_then(|()| fs::write(&path, with_checksums(bytes))).is_err() {
        return;
    }
    if let Ok(Unpacked { manifest_url, rewrite }) = unpack(&path, &into) {
        let inside = format!("file://{}/", into.display());
        for url in rewrite.iter().map(|(_, to)| to).chain([&manifest_url]) {
            assert!(url.starts_with(&inside), "{url} leads elsewhere");
        }
    }
    let names =
        |directory: &Path| fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
    assert_eq!(names(dir.path()).count(), 2, "something is beside the directory");
    for name in names(&into) {
        assert!(is_document(&name.to_string_lossy()), "{} is no document", name.display());
        assert!(into.join(&name).symlink_metadata().is_ok_and(|file| file.is_file()), "{} is no file", name.display());
    }
}

/// The archive with the checksum that each of its headers should have.
#[cfg(feature = "fuzzing")]
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 512;
    let mut archive = bytes.to_vec();
    let mut rest = archive.as_mut_slice();
    while let Some((block, behind)) = std::mem::take(&mut rest).split_first_chunk_mut::<BLOCK>() {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        if block.iter().any(|byte| *byte != 0) {
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
        let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok()).unwrap_or_default();
        let size = size.checked_next_multiple_of(BLOCK).unwrap_or(usize::MAX).min(behind.len());
        rest = &mut behind[size..];
    }
    archive
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_newest_release_of_a_channel_has_the_name_of_the_original() {
        let found = [("1-31", 46), ("1-30", 58), ("1-31", 47), ("1-31", 9), ("1-31", 47)];
        let found = found.map(|(channel, number)| (channel.to_owned(), number, PathBuf::from(number.to_string())));
        let names: Vec<_> = name_distros(found.to_vec()).into_iter().map(|entry| (entry.name, entry.path)).collect();
        let expected = [("1-30.yaml", "58"), ("1-31.yaml", "47"), ("1-31-46.yaml", "46"), ("1-31-9.yaml", "9")];
        assert_eq!(names, expected.map(|(name, path)| (format!("eks-d-{name}"), PathBuf::from(path))));
    }

    /// An archive with one entry of this name, as it stands in the header.
    fn archive(dir: &Path, name: &[u8], contents: &[u8]) -> PathBuf {
        let mut header = tar::Header::new_old();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_size(contents.len() as u64);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        let path = dir.join("archive.tar");
        let mut builder = tar::Builder::new(fs::File::create(&path).unwrap());
        builder.append(&header, contents).unwrap();
        builder.into_inner().unwrap();
        path
    }

    #[test]
    fn entries_that_lead_out_of_the_directory_stay_in_it() {
        let releases = include_bytes!("../../tests/it/documents/eks-a-release.yaml");
        let (dir, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = archive(dir.path(), b"../../eks-a-manifest.yaml", releases);
        let unpacked = unpack(&path, into.path()).unwrap();
        assert!(unpacked.manifest_url.ends_with("/eks-a-manifest.yaml") && into.path().join(RELEASES).exists());
        assert_eq!(fs::read_dir(into.path()).unwrap().count(), 1);
        assert!(!dir.path().join("../eks-a-manifest.yaml").exists());
    }

    #[test]
    fn archive_without_releases_says_how_to_make_one() {
        let (dir, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = archive(dir.path(), b"README", b"hello");
        let error = unpack(&path, into.path()).unwrap_err().to_string();
        assert!(error.contains("archive.tar") && error.contains("image-builder download manifests"), "{error}");
        assert_eq!(fs::read_dir(into.path()).unwrap().count(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_are_refused(bytes in any::<Vec<u8>>()) {
            let (dir, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let path = dir.path().join("archive.tar");
            fs::write(&path, bytes).unwrap();
            prop_assert!(unpack(&path, into.path()).is_err());
        }
    }
}
