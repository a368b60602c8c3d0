//! `image-builder download`: what networks without Internet access need, laid out as the EKS Anywhere CLI does.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::{
    dropin::{
        flags::{SignaturePolicy, boolean},
        rules::channel,
    },
    failure::{Failure, ProcessError},
    terminal::{Count, Download, cancel_on_signal, say},
};
use crate::{
    contract::{Artifact, Proxy, ResolvedRelease},
    fetch::{FetchError, Fetcher},
    http,
    release::{
        PRODUCTION_MANIFEST_URL, ReleaseQuery, Resolver,
        archive::{Collector, pack},
    },
};

/// The archive of manifests.
const ARCHIVE: &str = "eks-a-manifests.tar";
/// Manifests that are there, until the archive is.
const MANIFESTS: &str = ".eks-a-manifests.partial";
/// Directories of the artifacts, by who publishes them.
const EKSA: &str = "eks-a-artifacts";
const EKSD: &str = "eks-d-artifacts";
/// Beginnings of artifacts.
const ARTIFACTS: &str = ".eks-artifacts.partial";
/// Downloads that run at the same time.
const PARALLEL: usize = 4;

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Download the manifests of all releases into ./eks-a-manifests.tar.
    ///
    /// `build --air-gapped --manifest-tarball eks-a-manifests.tar` then reads no manifest from anywhere else. A download
    /// that was stopped goes on where it was.
    #[command(after_help = "Example:\n  image-builder download manifests")]
    Manifests(Manifests),
    /// Download what images of one release are made of into ./eks-a-artifacts and ./eks-d-artifacts.
    ///
    /// Both directories hold the paths of the public servers, so that a web server for them is the private mirror that
    /// `private_artifacts_eksa_fqdn` and `private_artifacts_eksd_fqdn` name. Every file is verified by its checksum and
    /// has a .sha256 file beside it. What is there already is not downloaded again.
    #[command(
        after_help = "Example:\n  image-builder download artifacts --release-channel 1-31 --eksa-release v0.26.1"
    )]
    Artifacts(Artifacts),
}

#[derive(Debug, Args)]
struct Manifests {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Artifacts {
    /// Kubernetes release channel of EKS Distro: 1-31 or 1.31 for Kubernetes 1.31.
    #[arg(long, default_value = "1-31", value_name = "CHANNEL")]
    release_channel: String,
    /// EKS Anywhere release, e.g. v0.26.1.
    #[arg(long, value_name = "VERSION")]
    eksa_release: String,
    /// What release documents without a valid signature of AWS mean: require (they are refused), warn or off.
    #[arg(long, value_enum, ignore_case = true, default_value = "warn", value_name = "POLICY")]
    signatures: SignaturePolicy,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Remove what an earlier download left, and begin anew.
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "false",
        hide_default_value = true, default_missing_value = "true", value_name = "BOOL", value_parser = boolean)]
    force: bool,
    /// URL of the EKS Anywhere release manifest.
    #[arg(long, default_value = PRODUCTION_MANIFEST_URL, value_name = "URL", env = "EKSA_RELEASE_MANIFEST_URL")]
    release_manifest_url: String,
}

pub(super) fn run(options: Options) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| ProcessError::Threads { source })?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        let watch = tokio::spawn(cancel_on_signal(cancel.clone()));
        let result = match options.what {
            What::Manifests(Manifests { common }) => manifests(&common, &cancel).await,
            What::Artifacts(options) => artifacts(&options, &cancel).await,
        };
        watch.abort();
        result
    })
}

async fn manifests(common: &Common, cancel: &CancellationToken) -> Result<(), Failure> {
    let store = Path::new(MANIFESTS);
    if common.force {
        remove(store)?;
    }
    create(store)?;
    let collector = Collector::new(http::client(&Proxy::default(), None)?, store);
    let count = Count::new("manifests");
    let work = collector.collect(&common.release_manifest_url, |done, total| count.reached(done, total));
    let entries = cancel.run_until_cancelled(work).await.ok_or(FetchError::Cancelled)??;
    count.finished();
    pack(&entries, Path::new(ARCHIVE))?;
    remove(store)?;
    say(&format!("{ARCHIVE} holds {} manifests", entries.len()));
    Ok(())
}

async fn artifacts(options: &Artifacts, cancel: &CancellationToken) -> Result<(), Failure> {
    let Artifacts { release_channel, eksa_release, signatures, common } = options;
    let query = ReleaseQuery {
        manifest_url: common.release_manifest_url.clone(),
        eksa_release: Some(eksa_release.clone()),
        signatures: (*signatures).into(),
        ..ReleaseQuery::new(channel(release_channel)?)
    };
    let client = http::client(&Proxy::default(), None)?;
    let resolver = Resolver::new(client.clone());
    let work = resolver.resolve(&query);
    let release = cancel.run_until_cancelled(work).await.ok_or(FetchError::Cancelled)??;
    if common.force {
        for dir in [EKSA, EKSD, ARTIFACTS] {
            remove(Path::new(dir))?;
        }
    }
    let fetcher = Fetcher::new(client, ARTIFACTS, cancel.clone())?.keep_beginnings();
    let files = places(&release);
    let count = files.len();
    let downloads = files.into_iter().map(|(artifact, path)| {
        let fetcher = &fetcher;
        async move {
            let download = Download::new(&artifact.name);
            fetcher.fetch_to(artifact, &path, |done, total| download.reached(done, total)).await?;
            write_sum(artifact, &path)?;
            download.finished();
            Ok::<_, Failure>(())
        }
    });
    stream::iter(downloads).buffer_unordered(PARALLEL).try_collect::<()>().await?;
    remove(Path::new(ARTIFACTS))?;
    say(&format!("{EKSA} and {EKSD} hold {count} artifacts of {} and {}", release.eksa_version, release.eksd_name));
    Ok(())
}

/// Where each artifact goes: below its publisher's directory, at the path of its URL.
fn places(release: &ResolvedRelease) -> Vec<(&Artifact, PathBuf)> {
    let ResolvedRelease { kubelet, kubeadm, kubectl, images, cni_plugins, etcd, etcdadm, containerd, crictl, .. } =
        release;
    let eksa = [containerd, crictl, etcdadm].map(|tool| &tool.artifact);
    let eksd = [&cni_plugins.artifact, &etcd.artifact, kubeadm, kubelet, kubectl].into_iter().chain(images);
    let place = |dir: &str, artifact: &Artifact| Path::new(dir).join(artifact.url.path().trim_start_matches('/'));
    let eksa = eksa.into_iter().map(|artifact| (artifact, place(EKSA, artifact)));
    eksa.chain(eksd.map(|artifact| (artifact, place(EKSD, artifact)))).collect()
}

/// The checksum file that EKS Distro publishes beside each of its files; some files are listed nowhere else.
fn write_sum(artifact: &Artifact, path: &Path) -> Result<(), ProcessError> {
    let Some(digest) = &artifact.sha256 else { return Ok(()) };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let sum = path.with_file_name(format!("{name}.sha256"));
    fs::write(&sum, format!("{digest}  {name}\n")).map_err(|source| ProcessError::Directory { path: sum, source })
}

fn create(dir: &Path) -> Result<(), ProcessError> {
    fs::create_dir_all(dir).map_err(|source| ProcessError::Directory { path: dir.to_owned(), source })
}

fn remove(dir: &Path) -> Result<(), ProcessError> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ProcessError::Directory { path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}
