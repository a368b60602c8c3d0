//! `image-builder run`: one build, in the pod of a Job.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::user_namespace;
use crate::{
    build::{self, Environment},
    contract::{self, BuildReport, BuildRequest, FailureClass, FailureReport, Stage},
    imagebuilder,
    progress::{Reporter, Style},
    secret::{Credentials, Redactor},
};

/// Runs one build from a build document; this is what the operator's Jobs run.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The build document, as the operator writes it.
    #[arg(long, value_name = "FILE", default_value = contract::BUILD_FILE)]
    build: PathBuf,
    /// Directory for everything the build writes; needs room for the base, the artifacts and the unpacked image.
    #[arg(long, value_name = "DIR", default_value = contract::WORK_DIR)]
    work_dir: PathBuf,
    /// File for the report, which Kubernetes shows as the pod's termination message.
    #[arg(long, value_name = "FILE", default_value = contract::TERMINATION_LOG)]
    report: PathBuf,
    /// Directory of kubernetes-sigs/image-builder, for builds of the engine `ImageBuilder`.
    #[arg(long, value_name = "DIR", default_value = imagebuilder::UPSTREAM_DIR)]
    upstream: PathBuf,
    /// Refuse to build outside of a user namespace. Older clusters take the wish for one and do not fulfil it.
    #[arg(long)]
    user_namespace: bool,
}

pub(super) fn run(args: &RunArgs) -> ExitCode {
    let redactor = Redactor::default();
    let report = match prepare(args) {
        Ok(request) => build_to_report(args, &request, redactor),
        Err(failure) => BuildReport::Failed(failure),
    };
    if let Err(error) = fs::write(&args.report, report.to_termination_message()) {
        tracing::error!("can not write the report to {}: {error}", args.report.display());
    }
    match report {
        BuildReport::Succeeded(_) => ExitCode::SUCCESS,
        BuildReport::Failed(failure) => {
            tracing::error!(stage = %failure.stage, reason = failure.reason, "{}", failure.message);
            ExitCode::from(failure.class.exit_code())
        }
    }
}

/// Reads the document and enters a mount namespace, while there is only one thread.
fn prepare(args: &RunArgs) -> Result<BuildRequest, FailureReport> {
    let request = read_request(&args.build)?;
    if args.user_namespace && !user_namespace::is_one() {
        return Err(failure(
            FailureClass::Environment,
            "UserNamespaceMissing",
            "the cluster did not give the build pod the user namespace that it was asked for, so its root is the node's: have \
             Kubernetes 1.33 or newer with the feature gate UserNamespacesSupport on, or the operator installed without \
             builds.userNamespaces"
                .to_owned(),
        ));
    }
    enter_mount_namespace().map_err(|error| {
        failure(
            FailureClass::Environment,
            "MountNamespaceRefused",
            format!(
                "can not make a mount namespace ({error}); the build pod must run privileged, or in a user namespace"
            ),
        )
    })?;
    Ok(request)
}

pub(super) fn read_request(path: &Path) -> Result<BuildRequest, FailureReport> {
    let invalid = |what: String| failure(FailureClass::Internal, "InvalidBuildDocument", what);
    let text = fs::read_to_string(path)
        .map_err(|error| invalid(format!("can not read the build document {}: {error}", path.display())))?;
    // The version first: a document of another version may have another shape.
    let version = serde_json::from_str::<serde_json::Value>(&text)
        .ok()
        .and_then(|document| document.get("version").and_then(|version| version.as_str().map(str::to_owned)));
    if version.as_deref().is_some_and(|version| version != contract::VERSION) {
        return Err(invalid(format!(
            "the build document was written by version {} and this is {}; use a builder image of the operator's version",
            version.unwrap_or_default(),
            contract::VERSION
        )));
    }
    serde_json::from_str(&text).map_err(|error| invalid(format!("the build document is not valid: {error}")))
}

pub(super) fn failure(class: FailureClass, reason: &str, message: String) -> FailureReport {
    FailureReport { stage: Stage::Prepare, class, reason: reason.to_owned(), message }
}

/// Mounts made from here on are seen by nobody else and go with the process.
pub(super) fn enter_mount_namespace() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

fn build_to_report(args: &RunArgs, request: &BuildRequest, redactor: Redactor) -> BuildReport {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return BuildReport::Failed(failure(
                FailureClass::Environment,
                "RuntimeUnavailable",
                format!("can not start threads: {error}"),
            ));
        }
    };
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        let watch = tokio::spawn(cancel_on_signal(cancel.clone()));
        let environment = Environment {
            work_dir: absolute(&args.work_dir),
            upstream: absolute(&args.upstream),
            reporter: Reporter::new(Style::Json, Box::new(io::stdout())),
            credentials: Credentials::new(redactor.clone()),
            redactor,
            import: true,
            cancel,
        };
        let report = build::run(request, environment).await;
        watch.abort();
        report
    })
}

/// Programs that the build calls run in other directories.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Kubernetes stops a pod by SIGTERM, a person by SIGINT.
pub(super) async fn cancel_on_signal(cancel: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("can not listen for signals; the build can only be killed");
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("asked to stop; cleaning up");
    cancel.cancel();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_the_one_that_jobs_have() {
        use clap::Parser as _;

        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            run: RunArgs,
        }
        assert!(Line::parse_from(["run", contract::USER_NAMESPACE_FLAG]).run.user_namespace);
        assert!(!Line::parse_from(["run"]).run.user_namespace);
    }

    #[test]
    fn refuses_a_document_of_another_version_and_says_what_to_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), r#"{"version": "0.0.0-other", "unknown": true}"#).unwrap();
        let failure = read_request(file.path()).unwrap_err();
        assert_eq!(failure.class, FailureClass::Internal);
        assert!(failure.message.contains("0.0.0-other") && failure.message.contains("builder image"), "{failure:?}");
    }
}
