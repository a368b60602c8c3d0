//! `image-builder clean-up`: removes what a build has left outside the cluster, in the pod of a Job.

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::run::{cancel_on_signal, failure, read_request};
use crate::{
    build,
    contract::{self, BuildReport, FailureClass, FailureReport},
    progress::{Reporter, Style},
    secret::Redactor,
};

/// Removes what a build has left in vCenter or Prism Central. A second time finds nothing to do.
#[derive(Debug, Args)]
pub(super) struct CleanUpArgs {
    /// The build document, as the operator writes it.
    #[arg(long, value_name = "FILE", default_value = contract::BUILD_FILE)]
    build: PathBuf,
    /// Also remove the finished image that the build made.
    #[arg(long)]
    finished_too: bool,
    /// File for the reason of a failure, which Kubernetes shows as the pod's termination message.
    #[arg(long, value_name = "FILE", default_value = contract::TERMINATION_LOG)]
    report: PathBuf,
}

pub(super) fn run(args: &CleanUpArgs) -> ExitCode {
    let Err(failure) = clean_up(args) else { return ExitCode::SUCCESS };
    tracing::error!(reason = failure.reason, "{}", failure.message);
    let code = ExitCode::from(failure.class.exit_code());
    if let Err(error) = fs::write(&args.report, BuildReport::Failed(failure).to_termination_message()) {
        tracing::error!("can not write the report to {}: {error}", args.report.display());
    }
    code
}

fn clean_up(args: &CleanUpArgs) -> Result<(), FailureReport> {
    let request = read_request(&args.build)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        failure(FailureClass::Environment, "RuntimeUnavailable", format!("can not start threads: {error}"))
    })?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        let watch = tokio::spawn(cancel_on_signal(cancel.clone()));
        let reporter = Reporter::new(Style::Json, Box::new(io::stdout()));
        let result = build::clean_up(&request, args.finished_too, reporter, Redactor::default(), cancel).await;
        watch.abort();
        if result.is_ok() {
            tracing::info!(build = %request.identity, finished_too = args.finished_too, "nothing is left");
        }
        result
    })
}
