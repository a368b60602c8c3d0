//! From the documents to everything an image takes from a release. No I/O.

use url::Url;

use super::{
    PRODUCTION_MANIFEST_URL, ReleaseError,
    documents::{Archive, Asset, Bundles, Component, DistroRelease, EksD, Release, Releases, sha256},
    rewrite::Rewrite,
};
use crate::{
    contract::{Artifact, ResolvedRelease, Signatures, VersionedArtifact},
    fetch::shown,
};

/// Releases that the error about an unknown one names.
const NAMED_RELEASES: usize = 5;
/// Where EKS Distro's Kubernetes component keeps what a node runs. Only amd64 images are built.
const BINARIES: &str = "bin/linux/amd64";
/// Archives of the images that a node has loaded before it joins a cluster.
const IMAGES: [&str; 7] = [
    "coredns.tar",
    "etcd.tar",
    "kube-apiserver.tar",
    "kube-controller-manager.tar",
    "kube-proxy.tar",
    "kube-scheduler.tar",
    "pause.tar",
];

/// Which release is wanted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReleaseQuery {
    /// URL of the EKS Anywhere release manifest.
    pub manifest_url: String,
    /// EKS Anywhere version, e.g. `v0.26.1`; `None` is the latest.
    pub eksa_release: Option<String>,
    /// Release channel with a dash, e.g. `1-31`.
    pub channel: String,
    /// Prefixes of URLs and what stands in their place, for private mirrors: `https://distro.eks.amazonaws.com` ->
    /// `https://mirror.example.com/eks-d`. The longest one that fits counts.
    pub rewrite: Vec<(String, String)>,
    /// What a document without a valid signature means.
    pub signatures: Signatures,
}

impl ReleaseQuery {
    /// The latest production release.
    pub fn new(channel: impl Into<String>) -> Self {
        Self {
            manifest_url: PRODUCTION_MANIFEST_URL.to_owned(),
            eksa_release: None,
            channel: channel.into(),
            rewrite: vec![],
            signatures: Signatures::default(),
        }
    }
}

/// The release `wanted`, or the latest. Part of a version is enough for a development build (`v0.0.0-dev+build.42`).
pub(super) fn choose_release<'d>(
    releases: &'d Releases,
    wanted: Option<&str>,
    source: &Url,
) -> Result<&'d Release, ReleaseError> {
    let all = &releases.spec.releases;
    let wanted = wanted.unwrap_or(&releases.spec.latest_version);
    let exact = all.iter().find(|release| release.version == wanted);
    let development = || all.iter().find(|release| wanted.contains("-dev") && release.version.contains(wanted));
    exact.or_else(development).ok_or_else(|| {
        let mut newest: Vec<_> = all.iter().collect();
        newest.sort_by_key(|release| std::cmp::Reverse(release.number));
        ReleaseError::UnknownRelease {
            url: shown(source),
            wanted: wanted.to_owned(),
            newest: newest.iter().take(NAMED_RELEASES).map(|release| release.version.clone()).collect(),
        }
    })
}

/// The part of the bundle for `channel`. `version` is the EKS Anywhere version, for messages.
pub(super) fn choose_bundle<'d>(
    bundles: &'d Bundles,
    channel: &str,
    version: &str,
    source: &Url,
) -> Result<&'d EksD, ReleaseError> {
    let channel_of = |kube_version: &str| kube_version.replace('.', "-");
    let all = &bundles.spec.versions_bundles;
    let found = all.iter().find(|bundle| channel_of(&bundle.kube_version) == channel);
    found.map(|bundle| &bundle.eks_d).ok_or_else(|| ReleaseError::UnknownChannel {
        url: shown(source),
        version: version.to_owned(),
        channel: channel.to_owned(),
        available: all.iter().map(|bundle| channel_of(&bundle.kube_version)).collect(),
    })
}

/// All artifacts of a release.
pub(super) fn artifacts_mut(release: &mut ResolvedRelease) -> impl Iterator<Item = &mut Artifact> {
    let versioned = [
        &mut release.cni_plugins,
        &mut release.etcd,
        &mut release.etcdadm,
        &mut release.containerd,
        &mut release.crictl,
    ];
    [&mut release.kubelet, &mut release.kubeadm, &mut release.kubectl]
        .into_iter()
        .chain(versioned.into_iter().map(|versioned| &mut versioned.artifact))
        .chain(&mut release.images)
}

/// The documents of one release and channel.
#[derive(Debug)]
pub(super) struct Parts<'d> {
    pub(super) release: &'d Release,
    pub(super) bundles: &'d Bundles,
    pub(super) bundle: &'d EksD,
    pub(super) bundles_url: &'d Url,
    pub(super) distro: &'d DistroRelease,
    pub(super) distro_url: &'d Url,
    pub(super) rewrite: &'d Rewrite<'d>,
}

impl Parts<'_> {
    /// What an image takes from the release. Files that no document lists lack their digest.
    pub(super) fn assemble(&self) -> Result<ResolvedRelease, ReleaseError> {
        let kubernetes = self.component("kubernetes")?;
        let version = self.tag(kubernetes)?;
        let apiserver = self.image(kubernetes, "kube-apiserver-image")?;
        let (repository, _) = apiserver
            .split_once("/kubernetes/kube-apiserver")
            .ok_or_else(|| self.missing("image repository in the asset kube-apiserver-image"))?;
        let binary = |name: &str| self.binary(kubernetes, name);
        Ok(ResolvedRelease {
            eksa_version: self.release.version.clone(),
            bundle_number: self.bundles.spec.number,
            channel: self.distro.spec.channel.clone(),
            eksd_name: self.bundle.name.clone(),
            kubernetes_version: version.to_owned(),
            full_version: format!("{version}-eks-{}-{}", self.distro.spec.channel, self.distro.spec.number),
            image_repository: repository.to_owned(),
            pause_image: self.image(kubernetes, "pause-image")?.to_owned(),
            kubelet: binary("kubelet")?,
            kubeadm: binary("kubeadm")?,
            kubectl: binary("kubectl")?,
            images: IMAGES.into_iter().map(binary).collect::<Result<_, _>>()?,
            cni_plugins: self.tarball("cni-plugins")?,
            etcd: self.tarball("etcd")?,
            etcdadm: self.tool("etcdadm", "etcdadm", self.bundle.etcdadm.as_ref())?,
            containerd: self.tool("containerd", "containerd", self.bundle.containerd.as_ref())?,
            crictl: self.tool("crictl", "cri-tools", self.bundle.crictl.as_ref())?,
        })
    }

    /// A file of the Kubernetes component. The manifest lists the programs and the images of the control plane;
    /// kube-proxy is a component of its own since 2026. The tars of pause, `CoreDNS` and etcd are published beside them
    /// without being listed.
    fn binary(&self, kubernetes: &Component, name: &str) -> Result<Artifact, ReleaseError> {
        let path = format!("{BINARIES}/{name}");
        let listed = |path: &str| {
            let components = &self.distro.status.components;
            components.iter().flat_map(|component| &component.assets).find(|asset| asset.name == path)
        };
        if let Some(archive) = listed(&path).and_then(|asset| asset.archive.as_ref()) {
            return self.artifact(name, archive, self.distro_url);
        }
        let beside = kubernetes.assets.iter().find_map(|asset| {
            let base = asset.archive.as_ref()?.uri.strip_suffix(asset.name.as_str())?;
            asset.name.starts_with(BINARIES).then_some(base)
        });
        let base = beside.ok_or_else(|| self.missing(&path))?;
        self.artifact(name, &Archive { uri: format!("{base}{path}"), sha256: None }, self.distro_url)
    }

    /// A component that is one tar archive.
    fn tarball(&self, name: &str) -> Result<VersionedArtifact, ReleaseError> {
        let component = self.component(name)?;
        let for_node = |asset: &&Asset| asset.os == "linux" && asset.arch.iter().any(|arch| arch == "amd64");
        let archive = component.assets.iter().filter(for_node).find_map(|asset| asset.archive.as_ref());
        let archive = archive.ok_or_else(|| self.missing(&format!("archive for linux/amd64 of {name}")))?;
        Ok(VersionedArtifact {
            version: self.tag(component)?.to_owned(),
            artifact: self.artifact(name, archive, self.distro_url)?,
        })
    }

    /// A tool that the bundle names. Its version stands only in its URL: `…/<directory>/<version>/<file>`.
    fn tool(&self, name: &str, directory: &str, archive: Option<&Archive>) -> Result<VersionedArtifact, ReleaseError> {
        let archive = archive.ok_or_else(|| ReleaseError::MissingComponent {
            url: shown(self.bundles_url),
            component: format!("{name} for {}", self.bundle.name),
        })?;
        let artifact = self.artifact(name, archive, self.bundles_url)?;
        let mut segments = artifact.url.path().rsplit('/').skip(1);
        let version = segments.next().filter(|_| segments.next() == Some(directory)).unwrap_or_default().to_owned();
        Ok(VersionedArtifact { version, artifact })
    }

    fn artifact(&self, name: &str, archive: &Archive, source: &Url) -> Result<Artifact, ReleaseError> {
        let digest = match &archive.sha256 {
            None => None,
            Some(text) => Some(sha256(text).ok_or_else(|| ReleaseError::InvalidDocument {
                url: shown(source),
                expected: "usable",
                problem: format!("the SHA-256 of {name} is `{text}`, not 64 hexadecimal digits"),
            })?),
        };
        Ok(Artifact { name: name.to_owned(), url: self.rewrite.entry(&archive.uri, name, source)?, sha256: digest })
    }

    fn component(&self, name: &str) -> Result<&Component, ReleaseError> {
        let found = self.distro.status.components.iter().find(|component| component.name == name);
        found.ok_or_else(|| self.missing(&format!("component {name}")))
    }

    fn tag<'c>(&self, component: &'c Component) -> Result<&'c str, ReleaseError> {
        let tag = component.git_tag.as_str();
        if tag.is_empty() { Err(self.missing(&format!("version of {}", component.name))) } else { Ok(tag) }
    }

    fn image<'c>(&self, component: &'c Component, name: &str) -> Result<&'c str, ReleaseError> {
        let asset = component.assets.iter().find(|asset| asset.name == name);
        let image = asset.and_then(|asset| asset.image.as_ref());
        image.map(|image| image.uri.as_str()).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, what: &str) -> ReleaseError {
        ReleaseError::MissingComponent { url: shown(self.distro_url), component: what.to_owned() }
    }
}

/// Documents that belong together, and what is made of them or of others like them.
#[cfg(any(test, feature = "fuzzing"))]
mod sample {
    use super::{
        Bundles, DistroRelease, Parts, ReleaseError, Releases, ResolvedRelease, Rewrite, artifacts_mut, choose_bundle,
        choose_release, sha256,
    };

    pub(super) const RELEASES: &str = include_str!("../../tests/it/documents/eks-a-release.yaml");
    pub(super) const BUNDLES: &str = include_str!("../../tests/it/documents/bundles.yaml");
    pub(super) const DISTRO: &str = include_str!("../../tests/it/documents/kubernetes-1-31-eks-47.yaml");

    pub(super) fn resolve(
        releases: &Releases,
        bundles: &Bundles,
        distro: &DistroRelease,
    ) -> Result<ResolvedRelease, ReleaseError> {
        let rewrite = Rewrite::new(&[]);
        let url = rewrite.apply("https://mirror.test/manifest.yaml")?;
        let release = choose_release(releases, None, &url)?;
        rewrite.apply(&release.bundle_manifest_url)?;
        let bundle = choose_bundle(bundles, "1-31", &release.version, &url)?;
        rewrite.apply(&bundle.manifest_url)?;
        Parts { release, bundles, bundle, bundles_url: &url, distro, distro_url: &url, rewrite: &rewrite }.assemble()
    }

    /// Whether everything that was resolved can be fetched and verified.
    pub(super) fn is_usable(mut release: ResolvedRelease) -> bool {
        !release.kubernetes_version.is_empty()
            && artifacts_mut(&mut release)
                .all(|artifact| artifact.sha256.as_ref().is_none_or(|digest| sha256(digest).is_some()))
    }
}

/// Each kind of document, with the others as they are published. What is resolved can be used.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    use std::sync::LazyLock;

    use super::documents::{Checksum, Document, Sums};

    type Documents = (Releases, Bundles, DistroRelease);
    static PUBLISHED: LazyLock<Option<Documents>> = LazyLock::new(|| {
        let read = (Releases::read(sample::RELEASES.as_bytes()), Bundles::read(sample::BUNDLES.as_bytes()));
        Some((read.0.ok()?, read.1.ok()?, DistroRelease::read(sample::DISTRO.as_bytes()).ok()?))
    });
    let Some((releases, bundles, distro)) = &*PUBLISHED else { panic!("the samples are no documents") };
    let resolved = [
        Releases::read(bytes).ok().map(|releases| sample::resolve(&releases, bundles, distro)),
        Bundles::read(bytes).ok().map(|bundles| sample::resolve(releases, &bundles, distro)),
        DistroRelease::read(bytes).ok().map(|distro| sample::resolve(releases, bundles, &distro)),
    ];
    for release in resolved.into_iter().flatten().flatten() {
        assert!(sample::is_usable(release), "something that was resolved can not be used");
    }
    if let Ok(Checksum(digest)) = Checksum::read(bytes) {
        assert_eq!(sha256(&digest), Some(digest), "a checksum is none");
    }
    let _ = Sums::read(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::{prelude::*, sample::Index};

    use super::{
        super::documents::Document,
        sample::{BUNDLES, DISTRO, RELEASES, is_usable, resolve},
        *,
    };

    fn read<D: Document>(text: &str) -> D {
        D::read(text.as_bytes()).unwrap()
    }

    /// What may happen to a document on its way.
    #[derive(Clone, Debug)]
    enum Damage {
        Cut(Index),
        Byte(Index, u8),
        DropLine(Index),
        RepeatLine(Index),
        SwapLines(Index, Index),
        Value(Index, String),
    }

    impl Damage {
        fn any() -> impl Strategy<Value = Self> {
            let value = prop_oneof![
                "[ -~]{0,20}",
                Just("null".into()),
                Just("[]".into()),
                Just("{}".into()),
                Just("&a [*a]".into())
            ];
            prop_oneof![
                any::<Index>().prop_map(Self::Cut),
                (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Self::Byte(at, byte)),
                any::<Index>().prop_map(Self::DropLine),
                any::<Index>().prop_map(Self::RepeatLine),
                (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Self::SwapLines(a, b)),
                (any::<Index>(), value).prop_map(|(at, value)| Self::Value(at, value)),
            ]
        }

        fn apply(&self, document: &str) -> Vec<u8> {
            let mut bytes = document.as_bytes().to_vec();
            let mut lines: Vec<String> = document.lines().map(ToOwned::to_owned).collect();
            match self {
                Self::Cut(at) => bytes.truncate(at.index(document.len())),
                Self::Byte(at, byte) => bytes[at.index(document.len())] = *byte,
                _ => {
                    match self {
                        Self::DropLine(at) => drop(lines.remove(at.index(lines.len()))),
                        Self::RepeatLine(at) => lines.push(lines[at.index(lines.len())].clone()),
                        Self::SwapLines(a, b) => {
                            let count = lines.len();
                            lines.swap(a.index(count), b.index(count));
                        }
                        Self::Value(at, value) => {
                            let at = at.index(lines.len());
                            let key = lines[at].split(": ").next().unwrap_or_default();
                            lines[at] = format!("{key}: {value}");
                        }
                        Self::Cut(_) | Self::Byte(..) => {}
                    }
                    bytes = lines.join("\n").into_bytes();
                }
            }
            bytes
        }
    }

    proptest! {
        #[test]
        fn damaged_documents_are_refused_or_give_usable_artifacts(which in 0..3, damage in Damage::any()) {
            static WHOLE: LazyLock<(Releases, Bundles, DistroRelease)> =
                LazyLock::new(|| (read(RELEASES), read(BUNDLES), read(DISTRO)));
            let (releases, bundles, distro) = &*WHOLE;
            let result = match which {
                0 => Releases::read(&damage.apply(RELEASES)).map(|releases| resolve(&releases, bundles, distro)),
                1 => Bundles::read(&damage.apply(BUNDLES)).map(|bundles| resolve(releases, &bundles, distro)),
                _ => DistroRelease::read(&damage.apply(DISTRO)).map(|distro| resolve(releases, bundles, &distro)),
            };
            if let Ok(Ok(release)) = result {
                prop_assert!(is_usable(release));
            }
        }

        #[test]
        fn any_bytes_are_refused(bytes in any::<Vec<u8>>(), text in any::<String>()) {
            for bytes in [bytes.as_slice(), text.as_bytes()] {
                prop_assert!(Releases::read(bytes).is_err());
                prop_assert!(Bundles::read(bytes).is_err());
                prop_assert!(DistroRelease::read(bytes).is_err());
            }
        }
    }

    #[test]
    fn reads_bundle_of_the_largest_size_that_is_published() {
        let (head, entries) = BUNDLES.split_once("  versionsBundles:\n").unwrap();
        let image = "    image:\n      imageDigest: sha256:0123456789abcdef\n      name: manager\n      uri: public.ecr.aws/x\n";
        let more: String = (0..1500).map(|n| image.replace("image:\n", &format!("image{n}:\n"))).collect();
        // Only the first channel becomes larger; what is not used must not cost its neighbours anything.
        let (first, rest) = entries.split_once("    endOfStandardSupport").unwrap();
        let large = format!("{head}  versionsBundles:\n{first}{more}    endOfStandardSupport{rest}");
        let many = format!("{large}{}", entries.replace("1.3", "1.2").repeat(80));
        assert!(many.len() > 1_000_000, "{}", many.len());
        assert_eq!(resolve(&read(RELEASES), &read(&many), &read(DISTRO)).unwrap().bundle_number, 112);
    }

    #[test]
    fn refuses_document_that_grows_without_bounds() {
        let level = |n: usize| {
            let last = if n == 0 { "x".to_owned() } else { format!("*a{}", n - 1) };
            format!("a{n}: &a{n} [{}]", vec![last; 10].join(", "))
        };
        let bomb = ["kind: Bundles".to_owned()].into_iter().chain((0..30).map(level)).collect::<Vec<_>>().join("\n");
        assert!(Bundles::read(bomb.as_bytes()).is_err());
        assert!(Bundles::read("[".repeat(1_000_000).as_bytes()).is_err());
        assert!(Bundles::read("- ".repeat(100_000).as_bytes()).is_err());
    }
}
