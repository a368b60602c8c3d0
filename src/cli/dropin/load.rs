//! Reads the files that the flags name. What comes of it depends on nothing else on this machine.

use std::{env, fs, path::Path};

use super::{
    UsageError,
    config::Config,
    files::{self, LocalFile},
    flags::{BuildFlags, given},
    groups::Logins,
    keys::{Keys, exposed, text},
    rules::{Choice, choose},
};
use crate::api::v1alpha1::Repository;

/// Longest file with package sources that a resource takes, in characters.
const LONGEST_REPOSITORY: usize = 16_384;

/// Everything that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(super) choice: Choice,
    pub(super) config: Config,
    pub(super) files: Vec<LocalFile>,
    /// Contents of the files that `extra_repos` names.
    pub(super) repositories: Vec<Repository>,
}

impl Wanted {
    /// A name for the resource that says what it is: `ubuntu-2204-1-31-vsphere`.
    pub(crate) fn default_name(&self) -> String {
        let Choice { os, os_version, channel, hypervisor, .. } = &self.choice;
        format!("{os}-{}-{channel}-{hypervisor}", os_version.replace('.', ""))
    }
}

/// Reads and judges everything. What has no effect is said in the second part.
pub(crate) fn load(flags: &BuildFlags) -> Result<(Wanted, Vec<String>), UsageError> {
    let (choice, mut warnings) = choose(flags)?;
    let keys = match flags.config(choice.hypervisor) {
        None => Keys::none(),
        Some(path) => {
            let mut keys = Keys::read(path)?;
            if let Some(mode) = exposed(path)?.filter(|_| keys.holds_passwords()) {
                let path = path.display();
                keys.warn(&format!(
                    "it holds passwords and others may read it (mode {mode:04o}): run `chmod 600 {path}`"
                ));
            }
            keys
        }
    };
    let mut private = match given(flags.credentials_file.as_ref()) {
        None => Keys::none(),
        Some(path) => Keys::read_private(path)?,
    };
    let environment = |name: &str| env::var(name).ok();
    let mut logins = Logins { file: &mut private, environment: &environment };
    let config = Config::take(keys, &mut logins, &choice, &mut warnings)?;
    warnings.extend(private.finish());
    let files = match given(flags.files_config.as_ref()) {
        None => vec![],
        Some(path) => files::take(Keys::read(path)?, &mut warnings)?,
    };
    for file in &files {
        // Told now and not after half an hour.
        let readable = fs::File::open(&file.source).and_then(|opened| opened.metadata());
        let metadata = readable.map_err(|source| UsageError::Read { path: file.source.clone(), source })?;
        if !metadata.is_file() {
            let problem = "this is no file: additional_files_list takes files only".to_owned();
            return Err(UsageError::Config { path: file.source.clone(), problem });
        }
    }
    let repositories = config.packages.repos.iter().map(|path| repository(path)).collect::<Result<_, _>>()?;
    Ok((Wanted { choice, config, files, repositories }, warnings))
}

/// A file with package sources, named as it is on this machine.
fn repository(path: &Path) -> Result<Repository, UsageError> {
    let content = text(path)?;
    let problem = |problem: &str| UsageError::Config { path: path.to_owned(), problem: problem.to_owned() };
    if content.is_empty() || content.chars().count() > LONGEST_REPOSITORY {
        return Err(problem("a file with package sources has 1 to 16384 characters"));
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let name: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).take(63).collect();
    let name = name.trim_start_matches(['-', '_']);
    if name.is_empty() {
        return Err(problem("name the file with letters or digits, e.g. example-tools.list"));
    }
    Ok(Repository { name: name.to_owned(), content })
}
