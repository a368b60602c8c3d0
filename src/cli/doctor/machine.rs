//! Looks at this machine. All looking is here; nothing is judged.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use nix::sys::statvfs::statvfs;
use url::Url;

use crate::{
    cli::user_namespace::{self, Privileges},
    contract::Proxy,
    error::Chain,
    fetch::{TransportError, shown},
    http,
    native::accelerator,
};

/// Longest time for one server to answer.
const ANSWER: Duration = Duration::from_secs(15);

/// A program that builds call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Tool {
    pub(super) program: &'static str,
    /// Its package on Debian and Ubuntu.
    pub(super) package: &'static str,
}

pub(super) const TOOLS: [Tool; 9] = [
    Tool { program: "e2fsck", package: "e2fsprogs" },
    Tool { program: "mke2fs", package: "e2fsprogs" },
    Tool { program: "mkfs.vfat", package: "dosfstools" },
    Tool { program: "mcopy", package: "mtools" },
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" },
    Tool { program: "tar", package: "tar" },
    Tool { program: "unshare", package: "util-linux" },
    Tool { program: "xz", package: "xz-utils" },
    Tool { program: "zstd", package: "zstd" },
];

/// Firmware for machines that start by EFI: the same file in other distributions' places.
const OVMF: [&str; 3] =
    ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_CODE.fd"];
/// The package of [`OVMF`] on Debian and Ubuntu.
pub(super) const OVMF_PACKAGE: &str = "ovmf";

/// The device of the kernel's virtual machines.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kvm {
    Usable,
    Refused,
    Absent,
}

/// A proxy that the environment sets.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct ProxyVariable {
    pub(super) name: String,
    /// Without user name and password; nothing where it is no URL.
    pub(super) shown: Option<String>,
}

/// What was seen.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(super) work_dir: PathBuf,
    pub(super) free_bytes: Option<u64>,
    pub(super) cpus: usize,
    pub(super) memory_bytes: Option<u64>,
    pub(super) privileges: Privileges,
    pub(super) missing_tools: Vec<Tool>,
    pub(super) firmware: bool,
    pub(super) kvm: Kvm,
    pub(super) proxies: Vec<ProxyVariable>,
    /// Servers, and why they can not be reached.
    pub(super) endpoints: Vec<(String, Result<(), String>)>,
}

/// Looks at everything; asks each of `endpoints` once.
pub(crate) async fn examine(work_dir: &Path, endpoints: Vec<Url>) -> Machine {
    Machine {
        work_dir: work_dir.to_owned(),
        free_bytes: free(work_dir),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        memory_bytes: fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory(&text)),
        privileges: user_namespace::look(),
        missing_tools: missing(&env::var_os("PATH").unwrap_or_default()),
        firmware: OVMF.iter().any(|file| Path::new(file).exists()),
        kvm: match accelerator::open_kvm() {
            Ok(_) => Kvm::Usable,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kvm::Absent,
            Err(_) => Kvm::Refused,
        },
        proxies: proxies(env::vars()),
        endpoints: reach(endpoints).await,
    }
}

/// Bytes that can be written below `dir`, or below the nearest directory above that exists.
fn free(dir: &Path) -> Option<u64> {
    let absolute = std::path::absolute(dir).ok()?;
    let stat = absolute.ancestors().find_map(|dir| statvfs(dir).ok())?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

/// Bytes of the machine's memory.
fn memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The tools that are in none of the directories of `path`.
fn missing(path: &std::ffi::OsStr) -> Vec<Tool> {
    let directories: Vec<PathBuf> = env::split_paths(path).collect();
    TOOLS
        .into_iter()
        .filter(|tool| !directories.iter().any(|directory| directory.join(tool.program).is_file()))
        .collect()
}

fn proxies(environment: impl Iterator<Item = (String, String)>) -> Vec<ProxyVariable> {
    let named = ["http_proxy", "https_proxy", "all_proxy"];
    let mut found: Vec<_> = environment
        .filter(|(name, value)| !value.is_empty() && named.contains(&name.to_ascii_lowercase().as_str()))
        .map(|(name, value)| {
            let url = value.parse::<Url>().ok().filter(Url::has_host);
            ProxyVariable { name, shown: url.map(|url| shown(&url)) }
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

async fn reach(endpoints: Vec<Url>) -> Vec<(String, Result<(), String>)> {
    let client = match http::client(&Proxy::default(), None) {
        Ok(client) => client,
        Err(error) => {
            let error = Chain(&error).to_string();
            return endpoints.iter().map(|url| (shown(url), Err(error.clone()))).collect();
        }
    };
    join_all(endpoints.into_iter().map(|url| {
        let client = &client;
        async move {
            // Any answer will do: the top of a mirror often may not be listed.
            let answer = client.head(url.clone()).timeout(ANSWER).send().await;
            let refused = |status| format!("the proxy answers with HTTP status {status}");
            let result = match answer {
                Ok(answer) if answer.status().as_u16() == 407 => Err(refused(answer.status())),
                Ok(_) => Ok(()),
                Err(error) => Err(Chain(&TransportError::from_client(error, &url)).to_string()),
            };
            (shown(&url), result)
        }
    }))
    .await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn tools_are_those_of_the_builder_image() {
        let image = include_str!("../../../images/builder/packages");
        // Certificate authorities are compiled in or come from the system; nothing is run.
        let image: BTreeSet<_> = image.lines().filter(|package| *package != "ca-certificates").collect();
        let ours = TOOLS.iter().map(|tool| tool.package).chain([OVMF_PACKAGE]).collect();
        assert_eq!(image, ours);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(memory("MemFree: 1 kB\nMemTotal:       16384 kB\n"), Some(16 << 20));
        assert_eq!(memory("nothing"), None);
    }

    #[test]
    fn proxies_are_shown_without_passwords() {
        let variables = [("HTTPS_PROXY", "http://user:word@proxy:3128"), ("http_proxy", "proxy"), ("no_proxy", "a")];
        let found = proxies(variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
        let shown: Vec<_> = found.iter().map(|proxy| (proxy.name.as_str(), proxy.shown.as_deref())).collect();
        assert_eq!(shown, [("HTTPS_PROXY", Some("http://proxy:3128/")), ("http_proxy", None)]);
    }

    #[test]
    fn tools_are_looked_for_in_every_directory() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(second.path().join("mcopy"), "").unwrap();
        let path = env::join_paths([first.path(), second.path()]).unwrap();
        let missing = missing(&path);
        assert!(missing.len() == TOOLS.len() - 1 && missing.iter().all(|tool| tool.program != "mcopy"));
    }
}
