//! What a person sees while something runs: bars on a terminal, a line for each thing that is done otherwise. All of it,
//! and the log, goes to standard error.

use std::{
    io::{self, IsTerminal, Write},
    sync::LazyLock,
    time::Duration,
};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    contract::{FailureClass, Progress, ProgressLine},
    process,
    progress::{Reporter, Style},
};

/// All bars of this process; nothing is drawn where standard error is no terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Standard error, with the bars out of the way while something else is written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// One file on its way.
#[derive(Debug)]
pub(super) struct Download {
    name: String,
    bar: ProgressBar,
}

impl Download {
    pub(super) fn new(name: &str) -> Self {
        let bar = BARS.add(ProgressBar::no_length().with_message(name.to_owned()));
        bar.set_style(style("{msg:28} {bytes:>10} of {total_bytes:10} {wide_bar}"));
        Self { name: name.to_owned(), bar }
    }

    /// `done` bytes of `total` are there.
    pub(super) fn reached(&self, done: u64, total: Option<u64>) {
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    /// The file is there.
    pub(super) fn finished(self) {
        self.bar.finish_and_clear();
        say(&format!("{} ({})", self.name, HumanBytes(self.bar.position())));
    }
}

/// Many small things, of which only the number is told.
#[derive(Debug)]
pub(super) struct Count(ProgressBar);

impl Count {
    pub(super) fn new(what: &str) -> Self {
        let bar = BARS.add(ProgressBar::no_length().with_message(what.to_owned()));
        bar.set_style(style("{msg:28} {pos:>10} of {len:10} {wide_bar}"));
        Self(bar)
    }

    pub(super) fn reached(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }

    pub(super) fn finished(self) {
        self.0.finish_and_clear();
    }
}

/// How far a build is: one bar on a terminal, a line for each step otherwise.
#[derive(Debug)]
pub(super) struct Stages(Option<ProgressBar>);

impl Stages {
    pub(super) fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = BARS.add(ProgressBar::new(100));
        bar.set_style(style("{elapsed_precise} {percent:>3} % {prefix:8} {wide_bar} {msg}"));
        bar.enable_steady_tick(Duration::from_secs(1));
        Self(Some(bar))
    }

    /// What the build reports to.
    pub(super) fn reporter(&self) -> Reporter {
        match &self.0 {
            Some(bar) => Reporter::new(Style::Json, Box::new(Lines { bar: bar.clone(), partial: vec![] })),
            None => Reporter::new(Style::Plain, Box::new(io::stderr())),
        }
    }

    /// Shows how far a build in a cluster is.
    pub(super) fn show(&self, progress: &Progress) {
        match &self.0 {
            Some(bar) => set(bar, progress.clone()),
            None => say(&format!("{:3} % {}: {}", progress.percent, progress.stage, progress.message)),
        }
    }

    pub(super) fn finish(self) {
        self.0.iter().for_each(ProgressBar::finish_and_clear);
    }
}

/// Shows the progress that the reporter writes line by line.
#[derive(Debug)]
struct Lines {
    bar: ProgressBar,
    partial: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            if let Ok(ProgressLine { progress }) = serde_json::from_slice(&line) {
                set(&self.bar, progress);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn set(bar: &ProgressBar, progress: Progress) {
    bar.set_prefix(progress.stage.as_str());
    bar.set_message(progress.message);
    bar.set_position(u64::from(progress.percent));
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A line for a person.
pub(super) fn say(line: &str) {
    // Nobody reads any more: the work itself is not harmed.
    let _ = BARS.suspend(|| writeln!(io::stderr(), "{line}"));
}

/// Cancels `cancel` at the first SIGINT or SIGTERM, and ends the process at the second.
pub(super) async fn cancel_on_signal(cancel: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("can not listen for signals; this can only be killed");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if cancel.is_cancelled() {
            process::kill_all();
            std::process::exit(i32::from(FailureClass::Cancelled.exit_code()));
        }
        say("stopping; once more stops at once");
        cancel.cancel();
    }
}
