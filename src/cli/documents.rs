//! `image-builder version`, `completion` and `man`: what the program says about itself.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{
    Cli,
    failure::{Failure, ProcessError},
};

#[derive(Debug, Args)]
pub(super) struct CompletionOptions {
    /// Shell that completes the command line.
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManOptions {
    /// Directory for the pages, e.g. /usr/local/share/man/man1.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Prints a script for the shell.
pub(super) fn completion(options: &CompletionOptions) -> Result<(), Failure> {
    let mut script = vec![];
    clap_complete::generate(options.shell, &mut Cli::command(), "image-builder", &mut script);
    print(&script)
}

/// Prints the version alone, with the leading `v` that scripts expect.
pub(super) fn version() -> Result<(), Failure> {
    print(concat!("v", env!("CARGO_PKG_VERSION"), "\n").as_bytes())
}

fn print(text: &[u8]) -> Result<(), Failure> {
    io::stdout().write_all(text).map_err(|source| ProcessError::Output { source })?;
    Ok(())
}

/// Writes one page a command.
pub(super) fn man(options: &ManOptions) -> Result<(), Failure> {
    let failed = |dir: &Path, source| ProcessError::Directory { path: dir.to_owned(), source };
    fs::create_dir_all(&options.dir).map_err(|source| failed(&options.dir, source))?;
    clap_mangen::generate_to(Cli::command(), &options.dir).map_err(|source| failed(&options.dir, source))?;
    Ok(())
}
