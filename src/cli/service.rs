//! What the commands that run in a cluster until they are stopped have in common.

use std::io;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// Ends when the process is told to stop, from this call on: Kubernetes does that by SIGTERM, a person by SIGINT.
pub(super) fn told_to_stop() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// The cluster that the process belongs to.
pub(super) async fn cluster() -> anyhow::Result<kube::Config> {
    kube::Config::infer().await.context("no cluster is configured: set KUBECONFIG, or run in a pod")
}

/// Its client.
pub(super) fn client(config: kube::Config) -> anyhow::Result<kube::Client> {
    kube::Client::try_from(config).context("can not set up the Kubernetes client")
}
