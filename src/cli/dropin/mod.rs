//! The command line of the EKS Anywhere `image-builder`: its flags, its rules, its JSON files, and what they mean as a
//! `NodeImageBuild`. Whoever has scripts around that tool runs them unchanged.
//!
//! [`rules::choose`] judges the flags, [`config::Config`] the JSON file of the hypervisor, [`files`] the list of files;
//! [`spec::translate`] makes a specification of them, from which the manifest and the build on this machine follow.

pub(super) mod config;
mod error;
pub(super) mod files;
pub(super) mod flags;
mod groups;
mod keys;
pub(super) mod load;
pub(super) mod rules;
pub(super) mod spec;

pub(super) use error::UsageError;

#[cfg(test)]
mod testing {
    use clap::Parser;

    use super::flags::BuildFlags;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        flags: BuildFlags,
    }

    /// The flags of a command line, without the program's name.
    pub(super) fn try_flags(line: &str) -> Result<BuildFlags, clap::Error> {
        Program::try_parse_from(["build"].into_iter().chain(line.split_whitespace())).map(|program| program.flags)
    }

    pub(super) fn flags(line: &str) -> BuildFlags {
        try_flags(line).unwrap()
    }
}
