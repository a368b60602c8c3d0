//! Builds of an ordinary user: a user namespace in which the user is root, with the subordinate ids that the machine
//! gives the user (subuid(5)) for everybody else in the image. Only what belongs to the user can be changed from there.

use std::{
    env, fs,
    io::{self, Write},
    process::{Command, Stdio},
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{Uid, User, getegid, geteuid, getpid},
};

/// Users and groups of a root file system, root aside: those up to `nobody` (65534) have to be there.
const IDS: u32 = 65_535;
/// Maps the ids of a process when a line comes. It is started outside of the namespace, where that is allowed.
const MAP: &str =
    "read -r _ && newuidmap \"$1\" 0 \"$2\" 1 1 \"$3\" \"$4\" && newgidmap \"$1\" 0 \"$5\" 1 1 \"$6\" \"$4\"";

/// What a process may do that is to build.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Privileges {
    Root,
    /// It can be root of a user namespace.
    Namespace(SubordinateIds),
    /// It can not, for these reasons.
    Lacking(Vec<Lack>),
}

/// First ids of [`IDS`] that belong to the user.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct SubordinateIds {
    uid: u32,
    gid: u32,
}

/// What keeps an ordinary user from building.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Lack {
    /// A program of the package `uidmap`.
    Program(&'static str),
    /// Ids in `/etc/subuid` or `/etc/subgid`.
    Ids { file: &'static str, user: String },
    /// The kernel makes no user namespace, or one without rights.
    Namespace,
}

impl Lack {
    /// What is missing, and what to do about it.
    pub(super) fn explain(&self) -> (String, String) {
        match self {
            Self::Program(name) => (
                format!("{name} is not installed"),
                "run `apt-get install uidmap` as root, or build with sudo".to_owned(),
            ),
            Self::Ids { file, user } => (
                format!("{file} gives {user} no {IDS} ids"),
                format!(
                    "run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}` as root (with ids that \
                     are free there), or build with sudo"
                ),
            ),
            Self::Namespace => (
                "the kernel gives ordinary users no user namespace that can mount".to_owned(),
                "see the settings user.max_user_namespaces, kernel.unprivileged_userns_clone and \
                 kernel.apparmor_restrict_unprivileged_userns of sysctl, leave the container, or build with sudo"
                    .to_owned(),
            ),
        }
    }
}

/// What this process may do. A namespace is tried, not guessed.
pub(super) fn look() -> Privileges {
    let uid = geteuid();
    if uid.is_root() {
        return Privileges::Root;
    }
    let user = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = |program: &str| env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let missing = ["newuidmap", "newgidmap"].into_iter().filter(|program| !installed(program));
    let mut lacks: Vec<_> = missing.map(Lack::Program).collect();
    let mut first = |file: &'static str| {
        let found = fs::read_to_string(file).ok().and_then(|text| subordinate(&text, &user, uid));
        if found.is_none() {
            lacks.push(Lack::Ids { file, user: user.clone() });
        }
        found
    };
    let ids = (first("/etc/subuid"), first("/etc/subgid"));
    // A machine without the program is told so elsewhere.
    if installed("unshare") && !namespace_can_be_made() {
        lacks.push(Lack::Namespace);
    }
    match ids {
        (Some(uid), Some(gid)) if lacks.is_empty() => Privileges::Namespace(SubordinateIds { uid, gid }),
        _ => Privileges::Lacking(lacks),
    }
}

/// The first of enough ids that a line gives to the user by name or number.
fn subordinate(text: &str, name: &str, uid: Uid) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut parts = line.trim().split(':');
        let (owner, first, count) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse::<u32>().ok()?);
        ((owner == name || owner == uid.to_string()) && count >= IDS).then_some(first)
    })
}

/// Whether a namespace can be made in which what builds mount can be mounted.
fn namespace_can_be_made() -> bool {
    let arguments = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--", "true"];
    let mut probe = Command::new("unshare");
    probe.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}

/// Whether this process is in a user namespace other than the machine's first one.
pub(super) fn is_one() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_of_the_machine(&map))
}

/// Whether the ids of a namespace (`uid_map` in `user_namespaces(7)`) are the machine's: all of them, each as itself.
fn is_of_the_machine(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Makes this process root of a new user namespace. It must have one thread only.
pub(super) fn enter(ids: SubordinateIds) -> io::Result<()> {
    let numbers = [getpid().as_raw().unsigned_abs(), geteuid().as_raw(), ids.uid, IDS, getegid().as_raw(), ids.gid];
    let mut helper = Command::new("/bin/sh")
        .args(["-c", MAP, "map"])
        .args(numbers.map(|number| number.to_string()))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    unshare(CloneFlags::CLONE_NEWUSER)?;
    if let Some(mut go) = helper.stdin.take() {
        go.write_all(b"go\n")?;
    }
    let mapped = helper.wait_with_output()?;
    if mapped.status.success() && geteuid().is_root() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&mapped.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::name("other:100000:65536\nme:165536:65536\n", Some(165_536))]
    #[case::number("1000:200000:65536", Some(200_000))]
    #[case::too_few("me:100000:1000\n", None)]
    #[case::a_second_range("me:100000:1000\nme:300000:65535\n", Some(300_000))]
    #[case::nobody("", None)]
    #[case::damaged("me:x:65536\nme\nme:1\n", None)]
    fn subordinate_ids_are_those_of_a_whole_system(#[case] text: &str, #[case] first: Option<u32>) {
        assert_eq!(subordinate(text, "me", Uid::from_raw(1000)), first);
    }

    #[rstest]
    #[case::machine("         0          0 4294967295\n", true)]
    #[case::pod("         0  131072  65536\n", false)]
    #[case::two_ranges("0 1000 1\n1 100000 65535\n", false)]
    fn the_machines_ids_are_told_from_a_namespaces(#[case] map: &str, #[case] machines: bool) {
        assert_eq!(is_of_the_machine(map), machines);
    }

    #[test]
    fn each_lack_says_what_to_do() {
        let ids = Lack::Ids { file: "/etc/subuid", user: "me".into() };
        for (lack, text) in [(Lack::Program("newuidmap"), "uidmap"), (ids, "usermod"), (Lack::Namespace, "sysctl")] {
            let (what, instead) = lack.explain();
            assert!(!what.is_empty() && instead.contains(text) && instead.contains("sudo"), "{what}: {instead}");
        }
    }
}
