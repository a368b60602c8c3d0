//! How much of several files is there.

use std::sync::{Mutex, PoisonError};

use crate::{contract::Stage, progress::Reporter};

/// The share of each file that is there. Each counts the same: their sizes are not known before they begin.
#[derive(Debug)]
pub(super) struct Shares<'r> {
    state: Mutex<State>,
    reporter: &'r Reporter,
}

#[derive(Debug)]
struct State {
    shares: Vec<f64>,
    finished: usize,
}

impl<'r> Shares<'r> {
    pub(super) fn new(files: usize, reporter: &'r Reporter) -> Self {
        Self { state: Mutex::new(State { shares: vec![0.0; files], finished: 0 }), reporter }
    }

    /// `done` bytes of the file `index` are there.
    #[expect(clippy::cast_precision_loss, reason = "shown as whole percents")]
    pub(super) fn reached(&self, index: usize, done: u64, total: Option<u64>) {
        if let Some(total) = total.filter(|total| *total > 0) {
            self.report(index, done as f64 / total as f64, 0);
        }
    }

    /// The file `index` is there and verified.
    pub(super) fn finished(&self, index: usize) {
        self.report(index, 1.0, 1);
    }

    #[expect(clippy::cast_precision_loss, reason = "shown as whole percents")]
    fn report(&self, index: usize, share: f64, finished: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.shares[index] = share;
        state.finished += finished;
        let files = state.shares.len();
        let done = state.shares.iter().sum::<f64>() / files as f64;
        self.reporter.report(Stage::Fetch, done, format!("{} of {files} files", state.finished));
    }
}
