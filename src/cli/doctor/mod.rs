//! `image-builder doctor`: whether this machine can build, and what to do where it can not.

mod machine;
mod verdict;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use url::Url;

pub(super) use self::{
    machine::examine,
    verdict::{Finding, Level, judge},
};
use super::failure::{Failure, ProcessError};
use crate::{contract::FailureClass, release::PRODUCTION_MANIFEST_URL};

/// What a build of ubuntu without mirrors downloads from.
const PUBLIC: [&str; 5] = [
    PRODUCTION_MANIFEST_URL,
    "https://distro.eks.amazonaws.com",
    "https://cloud-images.ubuntu.com",
    "http://archive.ubuntu.com",
    "http://security.ubuntu.com",
];

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Directory that builds would work in.
    #[arg(long, value_name = "DIR", default_value = ".")]
    work_dir: PathBuf,
}

/// Prints all findings. The exit code says whether a build can run.
pub(super) fn run(options: &Options) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| ProcessError::Threads { source })?;
    let endpoints: Vec<Url> = PUBLIC.iter().filter_map(|url| url.parse().ok()).collect();
    let findings = judge(&runtime.block_on(examine(&options.work_dir, endpoints)));
    let mut out = io::stdout().lock();
    for finding in &findings {
        writeln!(out, "{finding}").map_err(|source| ProcessError::Output { source })?;
    }
    Ok(exit_code(&findings))
}

/// Whether a build can run at all.
fn exit_code(findings: &[Finding]) -> ExitCode {
    if findings.iter().any(|finding| finding.level == Level::Needed) {
        ExitCode::from(FailureClass::Environment.exit_code())
    } else {
        ExitCode::SUCCESS
    }
}
