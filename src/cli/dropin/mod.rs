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

/// The settings for each hypervisor, and a list of files. A specification that comes of them is the same when it was
/// written and read. The first character says which flags are given.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    use std::path::Path;

    const LINES: [&str; 10] = [
        "--os ubuntu --hypervisor baremetal",
        "--os redhat --hypervisor baremetal",
        "--os redhat --os-version 9 --hypervisor baremetal",
        "--os ubuntu --hypervisor vsphere",
        "--os redhat --hypervisor vsphere --builder clone",
        "--os ubuntu --hypervisor nutanix",
        "--os redhat --hypervisor nutanix",
        "--os redhat --hypervisor cloudstack",
        "--os ubuntu --hypervisor ami",
        "--os ubuntu --hypervisor baremetal --air-gapped --manifest-tarball t",
    ];
    let Some((line, text)) = bytes.split_first() else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    let parse = |name: &str| keys::Keys::parse(Path::new(name), text);
    let mut warnings = vec![];
    if let Ok(keys) = parse("files.json") {
        for file in files::take(keys, &mut warnings).unwrap_or_default() {
            assert!(u32::from_str_radix(&file.mode, 8).is_ok_and(|mode| mode <= 0o7777), "{file:?}");
        }
    }
    let configs = "--vsphere-config c --baremetal-config c --nutanix-config c --cloudstack-config c --ami-config c";
    let line = format!("{} {configs}", LINES[usize::from(line.wrapping_sub(b'0')) % LINES.len()]);
    let Ok((choice, _)) = testing::try_flags(&line).map_err(drop).and_then(|flags| rules::choose(&flags).map_err(drop))
    else {
        panic!("these flags are refused: {line}");
    };
    let (Ok(settings), mut private) = (parse("config.json"), keys::Keys::none()) else { return };
    let mut logins = groups::Logins { file: &mut private, environment: &|_| None };
    let Ok(config) = config::Config::take(settings, &mut logins, &choice, &mut warnings) else { return };
    let wanted = load::Wanted { choice, config, files: vec![], repositories: vec![] };
    let Ok(spec::Translation { spec, .. }) = spec::translate(wanted, "name", &mut warnings) else { return };
    let _ = (spec::names_its_place(&spec, ""), crate::controller::validate::supported(&spec));
    let read = serde_json::to_string(&spec).and_then(|text| serde_json::from_str(&text));
    assert!(read.is_ok_and(|read: crate::api::v1alpha1::NodeImageBuildSpec| read == spec), "{spec:?} is another one");
}

#[cfg(any(test, feature = "fuzzing"))]
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

    #[cfg(test)]
    pub(super) fn flags(line: &str) -> BuildFlags {
        try_flags(line).unwrap()
    }
}
