//! Builds and `doctor` as somebody who is not root.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Output,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use node_image_builder::contract::{FailureClass, Stage};

use super::{
    build::{air_gapped, build, failure, mirror},
    names, text,
};
use crate::support::bad_server::BadServer;

/// A user of no machine.
const USER: u32 = 54_321;

/// The program where everybody may run it.
fn program(dir: &Path) -> PathBuf {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let path = dir.join("image-builder");
    fs::copy(env!("CARGO_BIN_EXE_image-builder"), &path).unwrap();
    path
}

/// Runs the command line of `like` as [`USER`], whom the machine gives these subordinate ids.
async fn as_user(like: tokio::process::Command, program: &Path, ids: &str) -> Output {
    let like = like.into_std();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups", "--"]);
    command.arg(program).args(like.get_args()).current_dir(like.get_current_dir().unwrap()).env_clear();
    command.envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let files = tempfile::tempdir().unwrap();
    fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let ids = ids.to_owned();
    let run = move || {
        // The ids are there for this thread and what it starts.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let passwd = format!("{passwd}ordinary:x:{USER}:{USER}::/:/bin/sh\n");
        for (name, content) in [("passwd", &passwd), ("subuid", &ids), ("subgid", &ids)] {
            let file = files.path().join(name);
            fs::write(&file, content).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
            mount(Some(&file), &Path::new("/etc").join(name), none, MsFlags::MS_BIND, none).unwrap();
        }
        command.output().unwrap()
    };
    tokio::task::spawn_blocking(move || std::thread::spawn(run).join().unwrap()).await.unwrap()
}

/// Needs root to become somebody else; `make test` has it.
#[tokio::test]
async fn a_user_without_subordinate_ids_is_told_how_to_get_them() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path());
    let mut command = build(dir.path());
    command.args(["--os=ubuntu", "--hypervisor=baremetal", "--output=json"]);
    let output = as_user(command, &program, "somebody:100000:65536\n").await;
    let (failure, said) = (failure(&output), text(&output.stderr));
    assert_eq!((failure.class, failure.reason.as_str()), (FailureClass::Environment, "MachineUnfit"));
    for expected in ["/etc/subuid gives ordinary no 65535 ids", "/etc/subgid gives ordinary", "usermod --add-subuids"] {
        assert!(said.contains(expected), "{expected} is not in {said}");
    }
    assert_eq!(names(dir.path()), ["image-builder"]);
}

/// Needs root to become somebody else; `make test` has it. The end-to-end tests go on from there.
#[tokio::test]
async fn a_user_with_subordinate_ids_builds_in_a_user_namespace() {
    if !geteuid().is_root() {
        return;
    }
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let (scripts, here) = (tempfile::tempdir().unwrap(), dir.path().join("here"));
    let program = program(scripts.path());
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(&here).unwrap();
    let mut command = build(&here);
    command.args(air_gapped(&here, &mirror));
    for path in fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().path()).chain([here.clone()]) {
        chown(&path, Some(USER), Some(USER)).unwrap();
    }
    let output = as_user(command, &program, "ordinary:3000000:65536\n").await;
    let failure = failure(&output);
    assert_eq!((failure.stage, failure.reason.as_str()), (Stage::Install, "NotARootFileSystem"), "{failure:?}");
    // All that it left belongs to the user.
    assert_eq!(names(&here.join(".image-builder")), ["cache", "lock", "manifests"]);
}
