//! Tells how far a build is: JSON lines for the operator, plain lines for a person.

use std::{
    fmt,
    io::Write,
    sync::{Arc, Mutex},
};

use crate::contract::{Progress, ProgressLine, Stage};

/// How progress is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Style {
    /// One [`ProgressLine`] a line, which the operator reads from the pod's log.
    Json,
    /// `[ 42%] Install: …`
    Plain,
}

/// Receives progress from all parts of a build. Clones share their state.
#[derive(Clone)]
pub struct Reporter(Arc<Inner>);

struct Inner {
    style: Style,
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    last: Option<Progress>,
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter").field("style", &self.0.style).finish_non_exhaustive()
    }
}

/// Share of the whole build at which each stage begins, in percent. Measured on the development cluster; see
/// `docs/architecture.md`.
const fn begin(stage: Stage) -> u8 {
    match stage {
        Stage::Prepare => 0,
        Stage::Fetch => 2,
        Stage::Install => 12,
        Stage::Seal => 48,
        Stage::Assemble => 50,
        Stage::Verify => 60,
        Stage::Publish => 80,
    }
}

const fn end(stage: Stage) -> u8 {
    match stage {
        Stage::Prepare => begin(Stage::Fetch),
        Stage::Fetch => begin(Stage::Install),
        Stage::Install => begin(Stage::Seal),
        Stage::Seal => begin(Stage::Assemble),
        Stage::Assemble => begin(Stage::Verify),
        Stage::Verify => begin(Stage::Publish),
        Stage::Publish => 100,
    }
}

impl Reporter {
    pub fn new(style: Style, out: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Inner { style, state: Mutex::new(State { out, last: None }) }))
    }

    /// A stage begins or does something new. `done` is the share of the stage that is finished, 0.0 to 1.0. A call that
    /// changes neither the whole percentage nor the message writes nothing; the percentage never goes back.
    pub fn report(&self, stage: Stage, done: f64, message: impl Into<String>) {
        let (from, to) = (f64::from(begin(stage)), f64::from(end(stage)));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 100")]
        let reached = (from + (to - from) * done.clamp(0.0, 1.0)) as u8;
        let Ok(mut state) = self.0.state.lock() else { return };
        let percent = reached.max(state.last.as_ref().map_or(0, |last| last.percent));
        let progress = Progress { stage, percent, message: message.into() };
        if state.last.as_ref() == Some(&progress) {
            return;
        }
        let line = match self.0.style {
            Style::Json => serde_json::to_string(&ProgressLine { progress: progress.clone() }).unwrap_or_default(),
            Style::Plain => format!("[{percent:3}%] {stage}: {}", progress.message),
        };
        // Nobody reads any more: the build itself is not harmed.
        let _ = writeln!(state.out, "{line}").and_then(|()| state.out.flush());
        state.last = Some(progress);
    }

    /// The stage that runs now.
    pub fn stage(&self) -> Stage {
        self.0.state.lock().ok().and_then(|state| state.last.as_ref().map(|last| last.stage)).unwrap_or(Stage::Prepare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn percentage_never_goes_back_and_equal_reports_are_written_once() {
        let sink = Sink::default();
        let reporter = Reporter::new(Style::Json, Box::new(sink.clone()));
        reporter.report(Stage::Install, 0.5, "packages");
        reporter.report(Stage::Install, 0.5, "packages");
        reporter.report(Stage::Fetch, 0.0, "late");
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<ProgressLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].progress.percent, 30);
        assert_eq!(lines[1].progress.percent, 30);
        assert_eq!(reporter.stage(), Stage::Fetch);
    }
}
