//! `image-builder kvm-device-plugin`: offers KVM to the containers of a node.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::service::{client, cluster, told_to_stop};
use crate::{
    device_plugin::DevicePlugin,
    native::accelerator::{self, KVM_DEVICE},
    process::Runner,
    secret::Redactor,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Name of the node that this runs on, which is labelled.
    #[arg(long, env = "IMAGE_BUILDER_NODE_NAME", value_name = "NAME")]
    node_name: String,
    /// Kubelet's directory of device plugins.
    #[arg(
        long,
        env = "IMAGE_BUILDER_DEVICE_PLUGINS_DIR",
        value_name = "DIR",
        default_value = "/var/lib/kubelet/device-plugins"
    )]
    device_plugins_dir: PathBuf,
    /// Lets everybody on the node open KVM's device (mode 0666) once a container was given it; containers with a user namespace
    /// can not else.
    #[arg(long, env = "IMAGE_BUILDER_OPEN_DEVICE")]
    open_device: bool,
}

/// Runs until SIGTERM or SIGINT.
pub(super) fn run(options: Options) -> anyhow::Result<()> {
    let Options { node_name: node, device_plugins_dir: dir, open_device: open_to_everybody } = options;
    let scratch = tempfile::tempdir().context("can not make a directory for the probe guest")?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let stop = told_to_stop()?;
        let client = client(cluster().await?)?;
        let runner = Runner::new(Redactor::default(), CancellationToken::new());
        let probe = async || accelerator::kvm_failure(scratch.path(), &runner).await;
        let plugin = DevicePlugin { dir, device: KVM_DEVICE.into(), open_to_everybody, node, client };
        tokio::select! {
            ended = plugin.run(probe) => match ended? {},
            () = stop => Ok(()),
        }
    })
}
