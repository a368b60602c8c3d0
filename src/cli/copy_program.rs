//! `image-builder copy-program`: puts this program where a container of another image finds it.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::Context;
use clap::Args;

/// Copies this program; what the operator's Jobs do before a build in upstream's image.
#[derive(Debug, Args)]
pub(super) struct CopyProgramArgs {
    /// The copy's path.
    to: PathBuf,
}

pub(super) fn run(args: &CopyProgramArgs) -> anyhow::Result<()> {
    let to = &args.to;
    let own = std::env::current_exe().context("can not find this program's own file")?;
    fs::copy(&own, to).with_context(|| format!("can not copy {} to {}", own.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("can not make {} a program", to.display()))
}
