//! `image-builder operator`: the controller and its own HTTP server.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::net::TcpListener;
use url::Url;

use super::{
    duration,
    service::{client, cluster, told_to_stop},
};
use crate::{
    contract::token::SigningKey,
    controller::{
        Operator,
        admin::{self, Admin},
        context::{ArtifactServerSettings, Lifecycle, Placement, Settings},
        lease::LeaseSettings,
        metrics::Metrics,
        queue::Limits,
    },
    reach::Reach,
    release::PRODUCTION_MANIFEST_URL,
};

/// Upstream's own image, of the version that EKS Anywhere's tool builds with.
const IMAGE_BUILDER_IMAGE: &str = "registry.k8s.io/scl-image-builder/cluster-node-image-builder-amd64:v0.1.48";

/// More looks at a release manifest find nothing sooner: new releases come weekly at most.
const SHORTEST_POLL_INTERVAL: Duration = Duration::from_secs(60);

/// Watches `NodeImageBuilds` and runs a Job for each.
#[derive(Debug, Args)]
pub(super) struct OperatorArgs {
    /// Namespace to look at; all namespaces if not given.
    #[arg(long, env = "IMAGE_BUILDER_NAMESPACE")]
    namespace: Option<String>,
    /// Image of the build pods: this program with QEMU and the file system tools.
    #[arg(long, env = "IMAGE_BUILDER_BUILDER_IMAGE")]
    builder_image: String,
    /// Image of the build pods of the engine `ImageBuilder`: that of kubernetes-sigs/image-builder. This program is put
    /// into it when a build starts.
    #[arg(long, env = "IMAGE_BUILDER_IMAGE_BUILDER_IMAGE", default_value = IMAGE_BUILDER_IMAGE)]
    image_builder_image: String,
    /// EKS Anywhere release manifest of resources that name none in spec.source.releaseManifestURL.
    #[arg(long, env = "IMAGE_BUILDER_RELEASE_MANIFEST_URL", default_value = PRODUCTION_MANIFEST_URL)]
    release_manifest_url: Url,
    /// Service account of the build pods. They never get its token; it may carry pull secrets.
    #[arg(long, env = "IMAGE_BUILDER_BUILDER_SERVICE_ACCOUNT")]
    builder_service_account: Option<String>,
    #[command(flatten)]
    placement: PlacementArgs,
    #[command(flatten)]
    artifact_server: ArtifactServerArgs,
    #[command(flatten)]
    lifecycle: LifecycleArgs,
    /// Namespace of the Lease that lets one of several operators work. Without it there must be only one.
    #[arg(long, env = "IMAGE_BUILDER_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of that Lease: the same for all operators of one installation.
    #[arg(long, env = "IMAGE_BUILDER_LEASE_NAME", default_value = "node-image-builder", requires = "lease_namespace")]
    lease_name: String,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "IMAGE_BUILDER_ADMIN_ADDRESS", default_value = "0.0.0.0:8080")]
    admin_address: SocketAddr,
}

/// Which nodes build pods may run on.
#[derive(Debug, Args)]
struct PlacementArgs {
    /// Labels that the nodes of build pods must have, whatever the resources say, e.g. builds=yes,zone=a.
    #[arg(
        long = "builder-node-selector",
        env = "IMAGE_BUILDER_BUILDER_NODE_SELECTOR",
        value_name = "LABEL=VALUE",
        value_delimiter = ',',
        value_parser = label
    )]
    node_selector: Vec<(String, String)>,
    /// Let resources tolerate the taint of control plane nodes. Where build pods are privileged, who may write a `NodeImageBuild`
    /// can then become root there.
    #[arg(long, env = "IMAGE_BUILDER_ALLOW_CONTROL_PLANE")]
    allow_control_plane: bool,
    /// Resource of nodes with KVM that a device plugin offers, e.g. nodeimagebuild.dev/kvm: builds whose specification
    /// demands KVM ask for one, so that they wait for such a node rather than fail on another.
    #[arg(long, env = "IMAGE_BUILDER_KVM_RESOURCE", value_name = "NAME")]
    kvm_resource: Option<String>,
    /// Give build pods a user namespace of their own instead of privileges. The nodes need Kubernetes 1.33, containerd 2.0,
    /// runc 1.2 and Linux 6.3, or later ones.
    #[arg(long = "builder-user-namespaces", env = "IMAGE_BUILDER_BUILDER_USER_NAMESPACES")]
    user_namespaces: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write LABEL=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// How long finished builds are kept, how often releases are looked for, how many builds run.
#[derive(Debug, Args)]
struct LifecycleArgs {
    /// How long the Job of a finished build stays, with its pod and log, e.g. 24h. The result stays in the status.
    #[arg(long, env = "IMAGE_BUILDER_FINISHED_JOB_TTL", default_value = "24h", value_parser = duration::parse)]
    finished_job_ttl: Duration,
    /// Time between two looks at a release manifest for builds with rebuild.onNewRelease, at least 1m.
    #[arg(long, env = "IMAGE_BUILDER_RELEASE_POLL_INTERVAL", default_value = "15m", value_parser = duration::parse)]
    release_poll_interval: Duration,
    /// How many builds may run at the same time; without it, any number.
    #[arg(long, env = "IMAGE_BUILDER_MAX_BUILDS")]
    max_builds: Option<NonZeroUsize>,
    /// How many builds may run at the same time in one namespace.
    #[arg(long, env = "IMAGE_BUILDER_MAX_BUILDS_PER_NAMESPACE")]
    max_builds_per_namespace: Option<NonZeroUsize>,
    /// How many builds for one vCenter or Prism Central may run at the same time.
    #[arg(long, env = "IMAGE_BUILDER_MAX_BUILDS_PER_SERVER")]
    max_builds_per_server: Option<NonZeroUsize>,
}

impl LifecycleArgs {
    fn settings(self) -> anyhow::Result<Lifecycle> {
        let Self {
            finished_job_ttl,
            release_poll_interval,
            max_builds,
            max_builds_per_namespace,
            max_builds_per_server,
        } = self;
        if release_poll_interval < SHORTEST_POLL_INTERVAL {
            bail!(
                "--release-poll-interval is {release_poll_interval:?}: write at least {SHORTEST_POLL_INTERVAL:?}, e.g. 15m"
            );
        }
        let limits = Limits {
            total: max_builds.map(NonZeroUsize::get),
            per_namespace: max_builds_per_namespace.map(NonZeroUsize::get),
            per_server: max_builds_per_server.map(NonZeroUsize::get),
        };
        Ok(Lifecycle { finished_job_ttl, release_poll_interval, limits })
    }
}

/// The built-in artifact server; all three or none.
#[derive(Debug, Args)]
#[expect(clippy::struct_field_names, reason = "the names of the flags")]
struct ArtifactServerArgs {
    /// URL of the built-in artifact server as build pods reach it.
    #[arg(
        long,
        env = "IMAGE_BUILDER_ARTIFACT_SERVER_UPLOAD_URL",
        requires_all = ["artifact_server_public_url", "artifact_server_key_file"]
    )]
    artifact_server_upload_url: Option<Url>,
    /// URL of the built-in artifact server as machines reach it: the beginning of status.imageURL.
    #[arg(long, env = "IMAGE_BUILDER_ARTIFACT_SERVER_PUBLIC_URL", requires = "artifact_server_upload_url")]
    artifact_server_public_url: Option<Url>,
    /// File with the key that signs upload tokens, at least 32 bytes; the artifact server has the same.
    #[arg(long, env = "IMAGE_BUILDER_ARTIFACT_SERVER_KEY_FILE", requires = "artifact_server_upload_url")]
    artifact_server_key_file: Option<PathBuf>,
}

impl ArtifactServerArgs {
    fn settings(self) -> anyhow::Result<Option<ArtifactServerSettings>> {
        let Self { artifact_server_upload_url, artifact_server_public_url, artifact_server_key_file } = self;
        let (Some(upload_url), Some(public_url), Some(file)) =
            (artifact_server_upload_url, artifact_server_public_url, artifact_server_key_file)
        else {
            return Ok(None);
        };
        for (url, flag) in [(&upload_url, "upload"), (&public_url, "public")] {
            if !matches!(url.scheme(), "http" | "https") {
                bail!("--artifact-server-{flag}-url is {url}: write an http:// or https:// URL");
            }
        }
        let bytes = std::fs::read(&file)
            .with_context(|| format!("can not read the artifact server's key {}", file.display()))?;
        let key = SigningKey::new(&bytes).with_context(|| format!("can not use the key {}", file.display()))?;
        Ok(Some(ArtifactServerSettings { upload_url, public_url, key }))
    }
}

/// Runs until SIGTERM or SIGINT.
pub(super) fn run(args: OperatorArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can not start threads")?;
    runtime.block_on(serve(args))
}

async fn serve(args: OperatorArgs) -> anyhow::Result<()> {
    let OperatorArgs {
        namespace,
        builder_image,
        image_builder_image,
        release_manifest_url,
        builder_service_account,
        placement: PlacementArgs { node_selector, allow_control_plane, kvm_resource, user_namespaces },
        artifact_server,
        lifecycle,
        lease_namespace,
        lease_name,
        admin_address,
    } = args;
    // The name of the pod is in the environment of every container; the rest tells this process from the one before it.
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "operator".to_owned());
    let identity = format!("{host}_{}", uuid::Uuid::new_v4());
    let lease = lease_namespace.map(|namespace| LeaseSettings { namespace, name: lease_name, identity });
    let artifact_server = artifact_server.settings()?;
    let lifecycle = lifecycle.settings()?;
    let settings = Settings {
        builder_image,
        image_builder_image,
        release_manifest_url,
        builder_service_account,
        artifact_server,
        lifecycle,
        reach: Reach::OtherMachines,
        placement: Placement {
            node_selector: node_selector.into_iter().collect(),
            control_plane: allow_control_plane,
            kvm_resource,
            user_namespaces,
        },
    };
    let mut config = cluster().await?;
    // Whole reconciliations are tried again; a call that waits by itself would only hide it.
    config.default_retry = false;
    let client = client(config)?;

    let metrics = Arc::new(Metrics::default());
    let ready = Arc::default();
    let router = admin::router(Admin { metrics: Arc::clone(&metrics), ready: Arc::clone(&ready) });
    let listener = TcpListener::bind(admin_address)
        .await
        .with_context(|| format!("can not listen on --admin-address {admin_address}"))?;
    let operator = Operator { client, namespace, settings, lease, metrics, ready };
    let shutdown = told_to_stop()?;
    tokio::select! {
        result = operator.run(shutdown) => result.context("can not reach the artifact server"),
        result = axum::serve(listener, router) => result.context("the admin server ended"),
    }
}
