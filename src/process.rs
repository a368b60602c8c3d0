//! Runs programs: no shell, a clean environment, output through the redactor into the log, and the whole process group
//! ended on cancellation or time-out.

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsString,
    path::PathBuf,
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    process::{Child, Command},
};
use tokio_util::sync::CancellationToken;

use crate::{
    contract::{Classified, FailureClass},
    secret::Redactor,
};

/// Lines of output kept for the error message.
const KEPT_LINES: usize = 15;
/// Time between asking a process group to stop and killing it.
const GRACE: Duration = Duration::from_secs(3);

/// A program run, as plain data.
#[derive(Clone, Debug)]
pub struct CommandSpec {
    pub program: OsString,
    pub args: Vec<OsString>,
    /// The child's whole environment beside `PATH` and `LC_ALL=C.UTF-8`.
    pub env: Vec<(OsString, OsString)>,
    pub current_dir: Option<PathBuf>,
    /// Bytes for standard input; the way to hand over a secret.
    pub stdin: Option<Vec<u8>>,
    /// `None` waits for ever.
    pub timeout: Option<Duration>,
    pub stop: Stop,
}

/// How a program is asked to stop before it is killed.
#[derive(Clone, Copy, Debug)]
pub struct Stop {
    pub signal: Signal,
    /// Time that it has to clean up.
    pub grace: Duration,
}

impl Default for Stop {
    fn default() -> Self {
        Self { signal: Signal::SIGTERM, grace: GRACE }
    }
}

impl CommandSpec {
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: vec![],
            env: vec![],
            current_dir: None,
            stdin: None,
            timeout: None,
            stop: Stop::default(),
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    #[must_use]
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    #[must_use]
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    #[must_use]
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.current_dir = Some(dir.into());
        self
    }

    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Asks it by another signal, with more time to clean up.
    #[must_use]
    pub fn stop(mut self, stop: Stop) -> Self {
        self.stop = stop;
        self
    }

    fn name(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("can not start `{program}`; is it installed?")]
    Start { program: String, source: std::io::Error },
    #[error("can not talk to `{program}`")]
    Pipe { program: String, source: std::io::Error },
    /// It ended with a status other than 0.
    #[error("`{program}` failed ({status}): {output}")]
    Failed {
        program: String,
        status: String,
        /// Its exit code, if it was not ended by a signal.
        code: Option<i32>,
        /// The last lines of its output, redacted.
        output: String,
    },
    #[error("`{program}` did not end within {} s and was stopped; its last output: {output}", .timeout.as_secs())]
    TimedOut { program: String, timeout: Duration, output: String },
    #[error("`{program}` was stopped because the build was cancelled")]
    Cancelled { program: String },
}

impl ProcessError {
    /// The same failure under the name of the program that matters, where another one only started it.
    #[must_use]
    pub fn on_behalf_of(mut self, name: &str) -> Self {
        match &mut self {
            Self::Failed { program, .. } | Self::TimedOut { program, .. } | Self::Cancelled { program } => {
                name.clone_into(program);
            }
            Self::Start { .. } | Self::Pipe { .. } => {}
        }
        self
    }
}

impl Classified for ProcessError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Start { .. } => FailureClass::Environment,
            Self::Pipe { .. } | Self::Failed { .. } => FailureClass::Internal,
            Self::TimedOut { .. } => FailureClass::Transient,
            Self::Cancelled { .. } => FailureClass::Cancelled,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Start { .. } => "ToolMissing",
            Self::Pipe { .. } | Self::Failed { .. } => "ToolFailed",
            Self::TimedOut { .. } => "ToolTimedOut",
            Self::Cancelled { .. } => "Cancelled",
        }
    }
}

/// What a successful program printed on standard output (complete, not redacted).
#[derive(Debug)]
pub struct Output {
    pub stdout: String,
}

/// Starts programs for one build.
#[derive(Clone, Debug)]
pub struct Runner {
    redactor: Redactor,
    cancel: CancellationToken,
}

impl Runner {
    pub fn new(redactor: Redactor, cancel: CancellationToken) -> Self {
        Self { redactor, cancel }
    }

    /// The same, for what has to be done even when the build is cancelled; give it a time-out.
    #[must_use]
    pub fn uncancelled(&self) -> Self {
        Self { redactor: self.redactor.clone(), cancel: CancellationToken::new() }
    }

    /// Whether programs are stopped, and work between them should be.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Runs to the end. Every line of output is logged at debug level; a failure carries the last ones.
    pub async fn run(&self, spec: CommandSpec) -> Result<Output, ProcessError> {
        self.run_watched(spec, |_| {}).await
    }

    /// As [`run`](Self::run); `on_line` gets every line of output, redacted, as it comes. Dropping the future ends the
    /// program.
    pub async fn run_watched(&self, spec: CommandSpec, on_line: impl Fn(&str)) -> Result<Output, ProcessError> {
        let program = spec.name();
        if self.cancel.is_cancelled() {
            return Err(ProcessError::Cancelled { program });
        }
        let mut child = start(&spec)?;
        let _running = Running::new(&child);
        let pipe = |source| ProcessError::Pipe { program: spec.name(), source };
        let stdin = child.stdin.take();
        let write = async {
            if let (Some(mut stdin), Some(bytes)) = (stdin, &spec.stdin) {
                // A program that ends without reading its input says so by its exit code.
                if let Err(error) = stdin.write_all(bytes).await
                    && error.kind() != std::io::ErrorKind::BrokenPipe
                {
                    return Err(error);
                }
            }
            Ok(())
        };
        let tail = Mutex::new(VecDeque::with_capacity(KEPT_LINES));
        let group = group_of(&child);
        let finished = {
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            let read = async {
                tokio::try_join!(
                    self.read_lines(stdout, &program, &tail, &on_line, true),
                    self.read_lines(stderr, &program, &tail, &on_line, false),
                    write
                )
            };
            let mut end = std::pin::pin!(async {
                let (stdout, _, ()) = read.await.map_err(pipe)?;
                let status = child.wait().await.map_err(pipe)?;
                Ok::<_, ProcessError>((status, stdout))
            });
            let limit = spec.timeout.unwrap_or(Duration::MAX);
            let finished = tokio::select! {
                result = &mut end => Some(result?),
                () = tokio::time::sleep(limit) => None,
                () = self.cancel.cancelled() => None,
            };
            if finished.is_none() {
                signal(group, spec.stop.signal);
                // What it says while it cleans up is read: a program that is not listened to may end by that.
                let _ = tokio::time::timeout(spec.stop.grace, end).await;
            }
            finished
        };
        let output = join(&tail);
        match finished {
            Some((status, stdout)) if status.success() => Ok(Output { stdout }),
            Some((status, _)) => {
                Err(ProcessError::Failed { program, status: status.to_string(), code: status.code(), output })
            }
            None => {
                // Also what it has started: the group outlives a program that has ended.
                signal(group, Signal::SIGKILL);
                let _ = child.wait().await;
                match spec.timeout {
                    Some(timeout) if !self.cancel.is_cancelled() => {
                        Err(ProcessError::TimedOut { program, timeout, output })
                    }
                    _ => Err(ProcessError::Cancelled { program }),
                }
            }
        }
    }

    async fn read_lines(
        &self,
        stream: Option<impl AsyncRead + Unpin>,
        program: &str,
        tail: &Mutex<VecDeque<String>>,
        on_line: &impl Fn(&str),
        keep_all: bool,
    ) -> std::io::Result<String> {
        let mut all = String::new();
        let Some(stream) = stream else { return Ok(all) };
        let mut reader = BufReader::new(stream);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).await? > 0 {
            let line = String::from_utf8_lossy(&bytes);
            if keep_all {
                all.push_str(&line);
            }
            let shown = self.redactor.redact(line.trim_end()).into_owned();
            tracing::debug!(target: "output", program, "{shown}");
            on_line(&shown);
            if let Ok(mut tail) = tail.lock()
                && !shown.is_empty()
            {
                if tail.len() == KEPT_LINES {
                    tail.pop_front();
                }
                tail.push_back(shown);
            }
            bytes.clear();
        }
        Ok(all)
    }
}

/// Process groups of the programs that run now.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A program while it runs.
struct Running(Option<i32>);

impl Running {
    fn new(child: &Child) -> Self {
        let group = group_of(child).map(Pid::as_raw);
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).extend(group);
        Self(group)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&group);
        }
    }
}

/// Ends every program that any [`Runner`] of this process runs, for a process that ends at once.
pub fn kill_all() {
    for group in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        // Errors mean that the group is gone already.
        let _ = killpg(Pid::from_raw(*group), Signal::SIGKILL);
    }
}

fn start(spec: &CommandSpec) -> Result<Child, ProcessError> {
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .envs(spec.env.iter().map(|(key, value)| (key, value)))
        .stdin(if spec.stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(dir) = &spec.current_dir {
        command.current_dir(dir);
    }
    tracing::debug!(target: "output", program = %spec.name(), args = ?spec.args, "start");
    command.spawn().map_err(|source| ProcessError::Start { program: spec.name(), source })
}

/// The process group that a child leads.
fn group_of(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw)
}

fn signal(group: Option<Pid>, signal: Signal) {
    if let Some(group) = group {
        // Errors mean that the group is gone already.
        let _ = killpg(group, signal);
    }
}

fn join(tail: &Mutex<VecDeque<String>>) -> String {
    tail.lock().map(|mut lines| lines.make_contiguous().join("\n")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runner() -> Runner {
        Runner::new(Redactor::default(), CancellationToken::new())
    }

    fn shell(script: &str) -> CommandSpec {
        CommandSpec::new("sh").args(["-c", script])
    }

    #[tokio::test]
    async fn failure_carries_exit_code_and_last_lines() {
        let error = runner().run(shell("echo first; echo why >&2; exit 3")).await.unwrap_err();
        let ProcessError::Failed { code, output, .. } = &error else { panic!("{error}") };
        assert_eq!(*code, Some(3));
        assert!(output.contains("why"), "{output}");
    }

    #[tokio::test]
    async fn child_sees_only_the_given_environment() {
        let out = runner().run(CommandSpec::new("env").env("GIVEN", "1")).await.unwrap();
        let mut names: Vec<_> = out.stdout.lines().filter_map(|l| l.split('=').next()).collect();
        names.sort_unstable();
        assert_eq!(names, ["GIVEN", "LC_ALL", "PATH"]);
    }

    #[tokio::test]
    async fn time_out_ends_the_whole_process_group() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let spec = shell("sleep 600 & echo $! >pid; wait").current_dir(dir.path()).timeout(Duration::from_millis(500));
        let error = runner().run(spec).await.unwrap_err();
        assert!(matches!(error, ProcessError::TimedOut { .. }), "{error}");
        let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        let gone = async {
            // A zombie waits for whoever adopted it; it runs no more.
            while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), gone).await.expect("the grandchild is still running");
    }

    #[tokio::test]
    async fn cancellation_stops_the_program() {
        let cancel = CancellationToken::new();
        let runner = Runner::new(Redactor::default(), cancel.clone());
        let task = tokio::spawn(async move { runner.run(CommandSpec::new("sleep").arg("600")).await });
        cancel.cancel();
        assert!(matches!(task.await.unwrap(), Err(ProcessError::Cancelled { .. })));
    }

    #[tokio::test]
    async fn a_program_that_is_stopped_is_listened_to_while_it_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        // Not SIGINT: a shell in the background of a script ignores that, and so do those that it starts.
        let script = "trap 'seq 20000; echo clean >done; exit 1' USR1; echo ready; while :; do sleep 0.1; done";
        let cancel = CancellationToken::new();
        let runner = Runner::new(Redactor::default(), cancel.clone());
        let stop = Stop { signal: Signal::SIGUSR1, grace: Duration::from_secs(20) };
        let spec = shell(script).current_dir(dir.path()).stop(stop);
        let error = runner
            .run_watched(spec, |line| {
                if line == "ready" {
                    cancel.cancel();
                }
            })
            .await
            .unwrap_err();
        assert!(matches!(error, ProcessError::Cancelled { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join("done")).unwrap(), "clean\n");
    }

    #[tokio::test]
    async fn secrets_are_redacted_in_errors() {
        let redactor = Redactor::default();
        redactor.add("hunter2-long");
        let runner = Runner::new(redactor, CancellationToken::new());
        let error = runner.run(shell("echo password hunter2-long; exit 1")).await.unwrap_err();
        assert!(!error.to_string().contains("hunter2-long"));
    }
}
