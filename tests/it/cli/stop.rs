//! Ctrl-C, and what a person sees on a terminal.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use node_image_builder::contract::{FailureClass, Stage};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use super::{
    build::{air_gapped, build, failure, mirror},
    names, text,
};
use crate::support::bad_server::{Answer, BadServer, Step};

/// A file that never comes whole.
const HELD: &str = "/eks-a/releases/bundles/112/artifacts/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz";

async fn until(what: &str, condition: impl Fn() -> bool) {
    let met = async {
        let mut again = tokio::time::interval(Duration::from_millis(20));
        while !condition() {
            again.tick().await;
        }
    };
    timeout(Duration::from_secs(120), met).await.unwrap_or_else(|_| panic!("{what} does not happen"));
}

#[tokio::test]
async fn a_terminal_shows_a_bar_for_the_stage_and_ctrl_c_stops_the_build() {
    let mirror = BadServer::start(|request, _| {
        if request.target == HELD { Answer::promise(100, vec![Step::Stall]) } else { mirror(request) }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let flags = air_gapped(dir.path(), &mirror);
    // script(1) is the terminal; its own size is none.
    let line = format!("stty cols 120 rows 40; exec {} build {}", env!("CARGO_BIN_EXE_image-builder"), flags.join(" "));
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]).current_dir(dir.path());
    terminal.env("TERM", "xterm").env("NO_PROXY", "127.0.0.1").kill_on_drop(true);
    let mut shown = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    until("the download", || mirror.count(HELD) > 0).await;

    // Until then the bar is there: it names the stage and what is done in it.
    let (mut screen, mut bytes) = (String::new(), vec![0; 4096]);
    let output = shown.stdout.as_mut().unwrap();
    while !(screen.contains("Fetch") && screen.contains(" of 15 files")) {
        let read = timeout(Duration::from_secs(60), output.read(&mut bytes)).await.expect("no bar is drawn").unwrap();
        assert!(read > 0, "{screen}");
        screen.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    assert!(screen.contains('\u{1b}') && screen.contains(" % Fetch"), "{screen:?}");

    shown.stdin.as_mut().unwrap().write_all(b"\x03").await.unwrap();
    let mut rest = vec![];
    timeout(Duration::from_secs(5), output.read_to_end(&mut rest)).await.expect("it does not stop").unwrap();
    // It may begin in the middle of a character of the bar.
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("stopping; once more stops at once"), "{rest}");
    assert!(rest.contains("\"Cancelled\""), "{rest}");
    let status = shown.wait().await.unwrap();
    assert_eq!(status.code(), Some(i32::from(FailureClass::Cancelled.exit_code())));
    assert!(!dir.path().join(".image-builder/build").exists());
}

/// A program in place of tar that goes on when it is asked to stop, and only notes it in the file `asked`. Its process is in
/// the file `pid`.
fn stubborn_tar(dir: &Path) -> std::path::PathBuf {
    let here = dir.display();
    let script = format!(
        "#!/bin/sh\nexec >/dev/null 2>&1\ntrap 'echo >{here}/asked' TERM\necho $$ >{here}/pid\nwhile :; do sleep 1; done\n"
    );
    let path = dir.join("tar");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Runs a build where `tar` is another program, and stops it `times` times. Gives what it said, and how long it took to
/// end from the last time on.
async fn stopped(dir: &Path, flags: Vec<String>, times: usize) -> (Output, Duration) {
    let scripts = tempfile::tempdir().unwrap();
    let (tar, pid) = (stubborn_tar(scripts.path()), scripts.path().join("pid"));
    let mut command = build(dir);
    command.args(flags).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = command.into_std();
    // The other program is there for this thread and what it starts.
    let spawn = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some(&tar), "/usr/bin/tar", none, MsFlags::MS_BIND, none).unwrap();
        command.spawn().unwrap()
    });
    let child = tokio::task::spawn_blocking(move || spawn.join().unwrap()).await.unwrap();
    let process = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let wait = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    until("unpacking", || fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n'))).await;
    let tar = Pid::from_raw(fs::read_to_string(&pid).unwrap().trim().parse().unwrap());

    for time in 0..times {
        if time > 0 {
            // What the first one does is under way.
            until("the first stop", || scripts.path().join("asked").exists()).await;
        }
        kill(process, Signal::SIGINT).unwrap();
    }
    let begin = Instant::now();
    let output = timeout(Duration::from_secs(20), wait).await.expect("it does not stop").unwrap();
    let took = begin.elapsed();
    until("the end of tar", || kill(tar, None).is_err()).await;
    (output, took)
}

/// Needs root, which mounts; `make test` has it.
#[rstest]
#[case::once(1, Duration::from_secs(5))]
#[case::twice(2, Duration::from_secs(1))]
#[tokio::test]
async fn ctrl_c_ends_even_a_program_that_takes_no_notice(#[case] times: usize, #[case] limit: Duration) {
    if !geteuid().is_root() {
        return;
    }
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let flags = air_gapped(dir.path(), &mirror);
    let (output, took) = stopped(dir.path(), flags, times).await;
    assert!(took < limit, "it took {took:?}");
    assert_eq!(output.status.code(), Some(i32::from(FailureClass::Cancelled.exit_code())), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("stopping; once more stops at once"));
    if times == 1 {
        let failure = failure(&output);
        assert_eq!((failure.class, failure.stage), (FailureClass::Cancelled, Stage::Install));
        assert_eq!(names(&dir.path().join(".image-builder")), ["cache", "lock", "manifests"]);
    }
}
