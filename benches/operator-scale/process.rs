//! An operator as a process of its own: what it takes of the machine, and whether it is ready.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::{MissedTickBehavior, interval, timeout},
};

/// Unit of the processor time in `/proc/PID/stat`: `USER_HZ` is 100 on every architecture that Rust has.
const TICK: Duration = Duration::from_millis(10);
/// A process that takes less than this share of a core does nothing but what it always does.
const QUIET: f64 = 0.02;
/// For so many seconds one after another.
const QUIET_SECONDS: usize = 5;

/// A program and all it has to be told.
pub struct Program {
    pub path: PathBuf,
    pub arguments: Vec<String>,
    pub kubeconfig: PathBuf,
    /// Where it serves `/readyz`.
    pub admin: SocketAddr,
    pub log: PathBuf,
}

pub struct Process {
    child: Child,
    pid: u32,
    pub started: Instant,
}

impl Program {
    pub fn start(&self) -> Process {
        let log = fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let started = Instant::now();
        let child = Command::new(&self.path)
            .args(&self.arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("can not start {}: {error}", self.path.display()));
        Process { pid: child.id().unwrap(), child, started }
    }

    /// Waits until it says that it is ready, and gives the time since it was started.
    pub async fn ready(&self, process: &mut Process, limit: Duration) -> Duration {
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(1)).build().unwrap();
        let url = format!("http://{}/readyz", self.admin);
        let mut again = interval(Duration::from_millis(2));
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let asked = async {
            loop {
                again.tick().await;
                if let Some(status) = process.child.try_wait().unwrap() {
                    panic!("{} ended with {status}: see {}", self.path.display(), self.log.display());
                }
                if http.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
                    return process.started.elapsed();
                }
            }
        };
        timeout(limit, asked)
            .await
            .unwrap_or_else(|_| panic!("{} is not ready: see {}", self.path.display(), self.log.display()))
    }
}

impl Process {
    /// A line of `/proc/PID/status`, in MiB.
    fn status(&self, field: &str) -> f64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("the process ended");
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        let kib: f64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap();
        kib / 1024.0
    }

    /// Resident memory now, in MiB.
    pub fn memory(&self) -> f64 {
        self.status("VmRSS")
    }

    /// The most resident memory it ever had, in MiB.
    pub fn most_memory(&self) -> f64 {
        self.status("VmHWM")
    }

    /// Processor time of all its threads, also of those that ended.
    pub fn cpu(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("the process ended");
        // The name of the program, in parentheses, may hold spaces.
        let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks = |index: usize| fields[index].parse::<u32>().unwrap();
        TICK * (ticks(11) + ticks(12))
    }

    /// The share of a core that it takes over a time.
    pub async fn load(&self, time: Duration) -> f64 {
        let (begin, before) = (Instant::now(), self.cpu());
        tokio::time::sleep(time).await;
        self.cpu().saturating_sub(before).as_secs_f64() / begin.elapsed().as_secs_f64()
    }

    /// Waits until it has nothing to do, and gives the time from now until that began.
    pub async fn until_quiet(&self, limit: Duration) -> Duration {
        let begin = Instant::now();
        let mut quiet = vec![];
        while quiet.len() < QUIET_SECONDS {
            assert!(begin.elapsed() < limit, "the process is not quiet after {limit:?}");
            let second = Instant::now();
            if self.load(Duration::from_secs(1)).await < QUIET {
                quiet.push(second);
            } else {
                quiet.clear();
            }
        }
        quiet[0].duration_since(begin)
    }

    /// Ends it as Kubernetes does.
    pub async fn stop(mut self, limit: Duration) {
        kill(Pid::from_raw(self.pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
        timeout(limit, self.child.wait()).await.expect("it does not end").unwrap();
    }
}
