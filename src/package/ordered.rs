//! Work on all cores, whose results leave in the order of the input, as one counted and hashed stream.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::Sender;

use super::Summary;

/// Bounds the memory: each worker holds one piece of the disk and its compressed form.
const MAX_WORKERS: usize = 12;

/// Does `work` for all `items`, each worker with a state of its own, and hands the results to `put` in the order of the
/// items. Blocks its thread. Ends early with the first error of either, in that order.
pub(super) fn in_order<W, I, O>(
    items: impl Iterator<Item = I> + Send,
    worker: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, &I) -> io::Result<O> + Sync,
    put: impl FnMut(I, O) -> io::Result<()> + Send,
) -> io::Result<()> {
    let items = Mutex::new(items.enumerate());
    let line = Mutex::new(Line { next: 0, end: None, put });
    let turn = Condvar::new();
    let run = || {
        let mut state = worker();
        loop {
            let Some((number, item)) = lock(&items).next() else { return };
            let result = work(&mut state, &item);
            let mut line = turn
                .wait_while(lock(&line), |line| line.next != number && line.end.is_none())
                .unwrap_or_else(PoisonError::into_inner);
            if line.end.is_some() {
                return;
            }
            if let Err(error) = result.and_then(|part| (line.put)(item, part)) {
                line.end = Some(error);
            }
            line.next += 1;
            turn.notify_all();
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from).saturating_mul(2).min(MAX_WORKERS);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(run);
        }
    });
    line.into_inner().unwrap_or_else(PoisonError::into_inner).end.map_or(Ok(()), Err)
}

/// Workers put their pieces out in the order of the disk.
struct Line<P> {
    next: usize,
    /// Why the pass ended early.
    end: Option<io::Error>,
    put: P,
}

/// A worker that panicked ends the process or the scope; what it held is not used further.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The packaged file on its way to its consumer.
pub(super) struct Output<'p> {
    out: &'p Sender<io::Result<Bytes>>,
    sha256: Sha256,
    size: u64,
}

impl<'p> Output<'p> {
    pub(super) fn new(out: &'p Sender<io::Result<Bytes>>) -> Self {
        Self { out, sha256: Sha256::new(), size: 0 }
    }

    /// Waits until the consumer has room.
    pub(super) fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        self.sha256.update(&bytes);
        self.size += bytes.len() as u64;
        self.out.blocking_send(Ok(bytes)).map_err(|_| nobody_listens())
    }

    pub(super) fn finish(self, virtual_size: u64) -> Summary {
        Summary { size: self.size, virtual_size, sha256: hex::encode(self.sha256.finalize()) }
    }
}

/// The consumer is gone, so the work is pointless.
pub(super) fn nobody_listens() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "nobody takes the packaged image any more")
}
