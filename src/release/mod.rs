//! What a node image takes from EKS Anywhere: from a release manifest to every file's URL and digest.
//!
//! The release manifest names a bundle manifest for each EKS Anywhere version; the bundle names, for each Kubernetes
//! minor version, the EKS Distro release and the tools around it; the EKS Distro manifest names the binaries.

pub mod archive;
mod cache;
mod documents;
mod error;
pub(crate) mod resolve;
mod rewrite;
pub(crate) mod signature;

use std::time::Duration;

pub use cache::Version;
pub use error::ReleaseError;
use reqwest::Client;
pub use resolve::ReleaseQuery;
pub use signature::SignatureKeys;
use url::Url;

use self::{
    cache::Cache,
    documents::{Bundles, Checksum, DistroRelease, Releases, Sums},
    rewrite::Rewrite,
    signature::{Flaw, Signed},
};
use crate::{
    contract::{Artifact, ResolvedRelease, Signatures},
    fetch::{Patience, listed_digest, shown},
    reach::Reach,
};

/// The production release manifest (`EKS Anywhere`'s own default).
pub const PRODUCTION_MANIFEST_URL: &str = "https://anywhere-assets.eks.amazonaws.com/releases/eks-a/manifest.yaml";

/// Bundle manifests have about one megabyte.
const LARGEST_DOCUMENT: u64 = 64 * 1024 * 1024;
/// A document that was read this recently is used as it is; after that, the server is asked whether it changed.
pub const FRESH: Duration = Duration::from_secs(60);

/// Finds out what a release consists of. Keeps the documents it has read, and asks for each of them only once at a time,
/// however many builds are resolved.
#[derive(Debug)]
pub struct Resolver {
    documents: Cache,
    keys: SignatureKeys,
}

impl Resolver {
    /// A resolver for `http` and `https` URLs.
    pub fn new(client: Client) -> Self {
        Self { documents: Cache::new(client, FRESH), keys: SignatureKeys::published() }
    }

    /// Lets documents come from `file` URLs too: for a person's command line, never for a cluster's users.
    #[must_use]
    pub fn allow_local_files(mut self) -> Self {
        self.documents.local_files = true;
        self
    }

    /// Where the URLs may lead; its client must have the same limit.
    #[must_use]
    pub fn reaching(mut self, reach: Reach) -> Self {
        self.documents.reach = reach;
        self
    }

    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.documents.patience = patience;
        self
    }

    /// Reports a transient fault at once instead of waiting it out, for callers that come back by themselves.
    #[must_use]
    pub fn without_retries(mut self) -> Self {
        self.documents.patience.retries = 0;
        self
    }

    /// How long a document is used before the server is asked whether it changed; a minute unless set.
    #[must_use]
    pub fn with_freshness(mut self, fresh: Duration) -> Self {
        self.documents.fresh = fresh;
        self
    }

    /// Takes signatures of others than AWS.
    #[must_use]
    pub fn with_signature_keys(mut self, keys: SignatureKeys) -> Self {
        self.keys = keys;
        self
    }

    /// Everything that an image of `query`'s release takes from it. Every artifact has a digest.
    pub async fn resolve(&self, query: &ReleaseQuery) -> Result<ResolvedRelease, ReleaseError> {
        let rewrite = Rewrite::new(&query.rewrite);
        let releases_url = rewrite.apply(&query.manifest_url)?;
        let releases = self.documents.get::<Releases>(&releases_url).await?;
        let release = resolve::choose_release(&releases, query.eksa_release.as_deref(), &releases_url)?;

        let bundles_url = rewrite.apply(&release.bundle_manifest_url)?;
        let signed_bundles = self.documents.get::<Signed<Bundles>>(&bundles_url).await?;
        let signature = || signed_bundles.verify_bundles(&self.keys);
        judge(query.signatures, &bundles_url, signature, || signed_bundles.tell_once())?;
        let bundles = &signed_bundles.document;
        let bundle = resolve::choose_bundle(bundles, &query.channel, &release.version, &bundles_url)?;

        let distro_url = rewrite.apply(&bundle.manifest_url)?;
        let distro = self.documents.get::<Signed<DistroRelease>>(&distro_url).await?;
        let signature = || signed_bundles.verify_distro(&distro, &bundle.name, &self.keys);
        judge(query.signatures, &distro_url, signature, || distro.tell_once())?;

        let parts = resolve::Parts {
            release,
            bundles,
            bundle,
            bundles_url: &bundles_url,
            distro: &distro.document,
            distro_url: &distro_url,
            rewrite: &rewrite,
        };
        let mut resolved = parts.assemble()?;
        for artifact in resolve::artifacts_mut(&mut resolved) {
            self.complete(artifact).await?;
        }
        Ok(resolved)
    }

    /// What tells the release manifest of `query` from an earlier one. Asks the server only whether it changed.
    pub async fn manifest_version(&self, query: &ReleaseQuery) -> Result<Version, ReleaseError> {
        let url = Rewrite::new(&query.rewrite).apply(&query.manifest_url)?;
        self.documents.get_version::<Releases>(&url).await.map(|(_, version)| version)
    }

    /// The digest, `sha256:` and hexadecimal digits, that the checksum list at `sums` has for `file` now.
    pub async fn listed_digest(&self, sums: &Url, file: &Url) -> Result<String, ReleaseError> {
        let list = self.documents.get::<Sums>(sums).await?;
        listed_digest(&list.0, file).map_err(|nearest| ReleaseError::NotListed {
            url: shown(sums),
            file: shown(file),
            nearest,
        })
    }

    /// EKS Distro publishes a `.sha256` file beside every file, and some files (the tars of pause, `CoreDNS` and etcd) in
    /// no other way.
    async fn complete(&self, artifact: &mut Artifact) -> Result<(), ReleaseError> {
        if artifact.sha256.is_none() {
            let mut url: Url = artifact.url.clone();
            url.set_path(&format!("{}.sha256", artifact.url.path()));
            let checksum =
                self.documents.get::<Checksum>(&url).await.map_err(|error| error.about_checksum(&artifact.name))?;
            artifact.sha256 = Some(checksum.0.clone());
        }
        Ok(())
    }
}

/// What a flaw in a signature means. It is told once for each document that is read.
fn judge(
    policy: Signatures,
    url: &Url,
    signature: impl FnOnce() -> Result<(), Flaw>,
    tell_once: impl FnOnce() -> bool,
) -> Result<(), ReleaseError> {
    if policy == Signatures::Off {
        return Ok(());
    }
    let url = shown(url);
    let flaw = match signature() {
        Ok(()) => return Ok(()),
        Err(Flaw::Missing) => ReleaseError::Unsigned { url },
        Err(Flaw::Invalid(problem)) => ReleaseError::InvalidSignature { url, problem },
    };
    match policy {
        Signatures::Require => return Err(flaw),
        Signatures::Warn if tell_once() => tracing::warn!("{}", flaw.as_warning()),
        Signatures::Warn | Signatures::Off => {}
    }
    Ok(())
}
