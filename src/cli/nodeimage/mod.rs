//! `image-builder nodeimage` and `image-builder status`: the `NodeImageBuilds` of a cluster, for a person. Under the name
//! `kubectl-nodeimage` the program is a plug-in of kubectl.

mod follow;
mod show;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

use crate::api::v1alpha1::{NodeImageBuild, REBUILD_ANNOTATION};

/// The name by which kubectl finds the plug-in.
const PLUGIN: &str = "kubectl-nodeimage";

/// The arguments as the command tree knows them: called as kubectl's plug-in, the command is `nodeimage`.
pub(super) fn arguments(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.into_iter().collect();
    let is_plugin = arguments.first().and_then(|program| Path::new(program).file_stem()).is_some_and(|n| n == PLUGIN);
    if is_plugin {
        arguments.splice(..1, ["image-builder".into(), "nodeimage".into()]);
    }
    arguments
}

/// Which cluster, and where in it.
#[derive(Debug, Args)]
struct Cluster {
    /// Namespace of the builds; that of the context if not given.
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// Context of the kubeconfig; the current one if not given.
    #[arg(long, global = true)]
    context: Option<String>,
    /// Kubeconfig; `KUBECONFIG`, `~/.kube/config` or the pod's own access if not given.
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
}

/// See what builds do, and tell them what to do.
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    cluster: Cluster,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List builds.
    List {
        /// Those of all namespaces.
        #[arg(short = 'A', long)]
        all_namespaces: bool,
    },
    /// Tell all about a build.
    Status(Name),
    /// Follow a build, with its progress and log, until it has ended.
    Watch(Name),
    /// Print the log of the newest build.
    Logs {
        #[command(flatten)]
        name: Name,
        /// Go on until the pod ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Build again now, also what was cancelled.
    Rebuild(Name),
    /// Stop the running build, and start none until `rebuild`.
    Cancel(Name),
    /// Print where the newest image is: its URL, or its name in vCenter or Prism Central.
    Url(Name),
}

#[derive(Debug, Args)]
struct Name {
    /// Name of the `NodeImageBuild`.
    name: String,
}

/// `image-builder status`.
#[derive(Debug, Args)]
pub(super) struct StatusOptions {
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    name: Name,
    /// Follow it, with its progress and log, until it has ended.
    #[arg(short, long)]
    watch: bool,
}

/// `image-builder status NAME [--watch]`.
pub(super) fn status(options: StatusOptions) -> anyhow::Result<ExitCode> {
    let StatusOptions { cluster, name, watch } = options;
    run(Options { cluster, command: if watch { Command::Watch(name) } else { Command::Status(name) } })
}

/// Runs a command; the exit code says how a build that was followed ended.
pub(super) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("can not start threads")?;
    runtime.block_on(execute(options))
}

async fn execute(Options { cluster, command }: Options) -> anyhow::Result<ExitCode> {
    let (client, namespace) = cluster.connect().await?;
    let builds: Api<NodeImageBuild> = Api::namespaced(client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let place = Place { builds, pods, namespace };
    let mut output = io::stdout();
    match command {
        Command::List { all_namespaces } => {
            let api = if all_namespaces { Api::all(client) } else { place.builds };
            let found = api.list(&ListParams::default()).await.context("can not list NodeImageBuilds")?;
            output.write_all(show::table(&found.items, all_namespaces, Timestamp::now()).as_bytes())?;
        }
        Command::Status(Name { name }) => {
            output.write_all(show::summary(&place.get(&name).await?, Timestamp::now()).as_bytes())?;
        }
        Command::Watch(Name { name }) => return Box::pin(follow::watch(&place, &name)).await,
        Command::Logs { name: Name { name }, follow } => follow::logs(&place, &name, follow).await?,
        Command::Rebuild(Name { name }) => {
            let token = Timestamp::now().to_string();
            let patch =
                json!({ "metadata": { "annotations": { REBUILD_ANNOTATION: token } }, "spec": { "suspend": false } });
            place.patch(&name, &patch).await?;
            writeln!(
                output,
                "{name} is built again; `image-builder status -n {} {name} -w` follows it",
                place.namespace
            )?;
        }
        Command::Cancel(Name { name }) => {
            place.patch(&name, &json!({ "spec": { "suspend": true } })).await?;
            writeln!(
                output,
                "{name} is suspended: nothing is built until `kubectl nodeimage rebuild`, or spec.suspend: false"
            )?;
        }
        Command::Url(Name { name }) => {
            let status = place.get(&name).await?.status.unwrap_or_default();
            let image = status.image_url.or(status.image.map(|image| image.name));
            let image =
                image.ok_or_else(|| anyhow!("{name} has no image yet; `image-builder status {name}` says why"))?;
            writeln!(output, "{image}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A namespace of a cluster.
struct Place {
    builds: Api<NodeImageBuild>,
    pods: Api<Pod>,
    namespace: String,
}

impl Place {
    async fn get(&self, name: &str) -> anyhow::Result<NodeImageBuild> {
        match self.builds.get_opt(name).await {
            Ok(Some(build)) => Ok(build),
            Ok(None) => bail!("there is no NodeImageBuild {name} in the namespace {}", self.namespace),
            Err(error) => Err(error).with_context(|| format!("can not read the NodeImageBuild {name}")),
        }
    }

    async fn patch(&self, name: &str, patch: &serde_json::Value) -> anyhow::Result<()> {
        let current = self.get(name).await?;
        let params = PatchParams { field_manager: Some(PLUGIN.to_owned()), ..PatchParams::default() };
        let patched = self.builds.patch(&current.name_any(), &params, &Patch::Merge(patch)).await;
        patched.map(drop).with_context(|| format!("can not change the NodeImageBuild {name}"))
    }
}

impl Cluster {
    async fn connect(self) -> anyhow::Result<(Client, String)> {
        let Self { namespace, context, kubeconfig } = self;
        let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
        let config = match kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(&path).with_context(|| format!("can not read {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await.context("can not use the kubeconfig")?
            }
            None if options.context.is_some() => {
                Config::from_kubeconfig(&options).await.context("can not use the kubeconfig")?
            }
            None => Config::infer().await.context("no cluster is configured: set KUBECONFIG or --kubeconfig")?,
        };
        let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
        Ok((Client::try_from(config).context("can not set up the Kubernetes client")?, namespace))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn called_as_a_plug_in_the_command_goes_without_saying() {
        let called = |line: &str| -> Vec<String> {
            let words = arguments(line.split(' ').map(OsString::from));
            words.into_iter().map(|word| word.into_string().unwrap()).collect()
        };
        assert_eq!(called("/usr/local/bin/kubectl-nodeimage list -A"), ["image-builder", "nodeimage", "list", "-A"]);
        assert_eq!(called("./image-builder operator"), ["./image-builder", "operator"]);
    }
}
