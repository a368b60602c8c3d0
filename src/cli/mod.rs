//! The command tree; one file a subcommand.

mod build;
mod clean_up;
mod copy_program;
mod crd;
mod doctor;
mod documents;
mod download;
pub(crate) mod dropin;
mod duration;
mod failure;
mod guest_checks;
mod kvm_device_plugin;
mod manifest;
mod nodeimage;
mod operator;
mod run;
mod serve;
mod service;
mod terminal;
mod user_namespace;
mod verify;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Parser, Subcommand};

use self::failure::Failure;
use crate::{
    error::Chain,
    native::image_contract,
    telemetry::{self, LogFormat, Traces},
};

/// Builds node images for EKS Anywhere.
#[derive(Debug, Parser)]
#[command(name = "image-builder", version, propagate_version = true)]
pub struct Cli {
    /// How log lines look.
    #[arg(long, global = true, env = "IMAGE_BUILDER_LOG_FORMAT", value_enum, default_value = "auto")]
    log_format: LogFormat,
    /// How much is logged: from 1 on, every detail. `RUST_LOG` says it more precisely.
    #[arg(short, long, global = true, value_name = "LEVEL", default_value_t = 0, hide_default_value = true)]
    verbosity: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build one node image on this machine: the `build` of the EKS Anywhere CLI.
    #[command(after_help = build::EXAMPLES)]
    Build(Box<build::Options>),
    /// Print the `NodeImageBuild` and the Secrets that ask an operator for the same image as `build`.
    #[command(after_help = manifest::EXAMPLES)]
    Manifest(Box<manifest::Options>),
    /// Download what networks without Internet access need.
    Download(download::Options),
    /// Tell how far a build in a cluster is.
    Status(nodeimage::StatusOptions),
    /// See what the builds in a cluster do, and tell them what to do; also `kubectl nodeimage`.
    Nodeimage(nodeimage::Options),
    /// Say whether this machine can build, and what to do where it can not.
    Doctor(doctor::Options),
    /// Print the version.
    Version,
    /// Print a script that lets a shell complete the command line.
    #[command(after_help = "Example:\n  image-builder completion bash > /etc/bash_completion.d/image-builder")]
    Completion(documents::CompletionOptions),
    /// Write the manual pages into a directory.
    #[command(after_help = "Example:\n  image-builder man /usr/local/share/man/man1")]
    Man(documents::ManOptions),
    /// Print the definition of the kind `NodeImageBuild` (what `crds/` holds).
    Crd,
    /// Run the controller: watch `NodeImageBuilds`, run a Job for each, report in their status.
    Operator(Box<operator::OperatorArgs>),
    /// Run one build from a build document; what the operator's Jobs do.
    Run(run::RunArgs),
    /// Remove what a build has left in vCenter or Prism Central; what the operator's clean-up Jobs do.
    CleanUp(clean_up::CleanUpArgs),
    /// Host finished images for machines, and take them from builds.
    Serve(serve::Options),
    /// Offer KVM to the containers of a node that runs guests under it: a device plugin for kubelet.
    KvmDevicePlugin(kvm_device_plugin::Options),
    /// Boot an image in QEMU and check the image contract in it.
    Verify(verify::VerifyArgs),
    /// Check the image contract in the system that this runs in; `verify` and builds call it in the booted image.
    #[command(hide = true)]
    GuestChecks(guest_checks::GuestChecksArgs),
    /// Copy this program into a directory that containers share.
    #[command(hide = true)]
    CopyProgram(copy_program::CopyProgramArgs),
    /// Print the image contract (what `docs/image-contract.md` holds).
    #[command(hide = true)]
    ImageContract,
}

impl Cli {
    /// The process's command line; under the name `kubectl-nodeimage` it is kubectl's plug-in.
    pub fn from_process() -> Self {
        Self::parse_from(nodeimage::arguments(std::env::args_os()))
    }
}

/// Runs the command and gives the process's exit code.
pub fn run(cli: Cli) -> ExitCode {
    let format = match (cli.log_format, &cli.command) {
        // The services' log is for machines, that of everything else for a person.
        (
            LogFormat::Auto,
            Command::Operator(_)
            | Command::Run(_)
            | Command::CleanUp(_)
            | Command::Serve(_)
            | Command::KvmDevicePlugin(_),
        ) => LogFormat::Auto,
        (LogFormat::Auto, _) => LogFormat::Text,
        (given, _) => given,
    };
    let filter = match (cli.verbosity, &cli.command) {
        // A person is told by the progress what the log would say.
        (0, Command::Build(_) | Command::Status(_) | Command::Nodeimage(_)) => "warn",
        (0, _) => "info",
        (_, _) => "debug",
    };
    let traces = match &cli.command {
        Command::Operator(_) => Traces::from_env("node-image-builder"),
        _ => Ok(None),
    };
    telemetry::init(format, filter, || terminal::Stderr, traces.as_ref().ok().and_then(Option::as_ref));
    let _traces = match traces {
        Ok(traces) => traces,
        Err(error) => return ended(Err(error.into())),
    };
    let result = match cli.command {
        Command::Build(options) => return build::run(&options),
        Command::Manifest(options) => return exit_code(manifest::run(&options)),
        Command::Download(options) => return exit_code(download::run(options)),
        Command::Doctor(options) => return doctor::run(&options).unwrap_or_else(|failure| failure.report()),
        Command::Status(options) => return ended(nodeimage::status(options)),
        Command::Nodeimage(options) => return ended(nodeimage::run(options)),
        Command::Version => return exit_code(documents::version()),
        Command::Completion(options) => return exit_code(documents::completion(&options)),
        Command::Man(options) => return exit_code(documents::man(&options)),
        Command::Crd => crd::run(),
        Command::Operator(args) => operator::run(*args),
        Command::Run(args) => return run::run(&args),
        Command::CleanUp(args) => return clean_up::run(&args),
        Command::Serve(options) => serve::run(options),
        Command::KvmDevicePlugin(options) => kvm_device_plugin::run(options),
        Command::Verify(args) => verify::run(&args),
        Command::GuestChecks(args) => guest_checks::run(&args),
        Command::CopyProgram(args) => copy_program::run(&args),
        Command::ImageContract => {
            io::stdout().write_all(image_contract::document().as_bytes()).context("can not write to standard output")
        }
    };
    ended(result.map(|()| ExitCode::SUCCESS))
}

fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{}", Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// The exit code of a command whose errors say who has to act.
fn exit_code(result: Result<(), Failure>) -> ExitCode {
    result.map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS)
}
