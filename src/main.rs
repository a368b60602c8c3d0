//! The `image-builder` binary: crypto provider, arguments, command.

use std::process::ExitCode;

use node_image_builder::cli;

fn main() -> ExitCode {
    // kube, reqwest and object_store all use rustls with the process's provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    cli::run(cli::Cli::from_process())
}
