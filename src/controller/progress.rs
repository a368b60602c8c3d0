//! Follows the logs of running build pods for their progress lines. One task a running pod; a new line is kept here and
//! the build is reconciled, at most once in [`INTERVAL`], which writes it to the status.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{AsyncBufRead, AsyncBufReadExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, api::LogParams};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use super::BuildRef;
use crate::contract::{BUILD_CONTAINER, Progress, ProgressLine, shorten};

/// Shortest time between two reconciliations for one build's progress.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// Lines to read again when a log is opened: the last progress is among them in all but odd cases.
const TAIL_LINES: i64 = 200;
/// Wait before a broken log stream is opened again.
const REOPEN: Duration = Duration::from_secs(5);
/// Longer lines are not progress; they are skipped without being held in memory.
const MAX_LINE: usize = 8 * 1024;
/// Longest progress message that goes into a status, in bytes.
const MAX_MESSAGE: usize = 512;

/// All log followers of this process. Dropping it ends them.
pub struct Followers {
    client: Client,
    wake: mpsc::UnboundedSender<BuildRef>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    tasks: JoinSet<()>,
    /// By the uid of the build.
    followed: HashMap<String, Followed>,
}

#[derive(Debug)]
struct Followed {
    pod: String,
    task: AbortHandle,
    latest: Arc<Mutex<Option<Progress>>>,
}

impl std::fmt::Debug for Followers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followers").finish_non_exhaustive()
    }
}

impl Followers {
    /// `wake` gets the builds that have news.
    pub fn new(client: Client, wake: mpsc::UnboundedSender<BuildRef>) -> Self {
        Self { client, wake, inner: Mutex::default() }
    }

    /// Follows `pod` on behalf of a build; does nothing when it already does.
    pub fn follow(&self, uid: &str, build: &BuildRef, pod: &str) {
        let mut inner = lock(&self.inner);
        while inner.tasks.try_join_next().is_some() {}
        if inner.followed.get(uid).is_some_and(|followed| followed.pod == pod) {
            return;
        }
        if let Some(old) = inner.followed.remove(uid) {
            old.task.abort();
        }
        let latest = Arc::default();
        let task = inner.tasks.spawn(follow(
            Api::namespaced(self.client.clone(), &build.namespace),
            pod.to_owned(),
            Arc::clone(&latest),
            self.wake.clone(),
            build.clone(),
        ));
        inner.followed.insert(uid.to_owned(), Followed { pod: pod.to_owned(), task, latest });
    }

    /// Ends following for a build whose pod does not run.
    pub fn stop(&self, uid: &str) {
        if let Some(old) = lock(&self.inner).followed.remove(uid) {
            old.task.abort();
        }
    }

    /// The last progress that the pod reported, as far as this process has read.
    pub fn latest(&self, uid: &str, pod: &str) -> Option<Progress> {
        let inner = lock(&self.inner);
        let followed = inner.followed.get(uid).filter(|followed| followed.pod == pod)?;
        lock(&followed.latest).clone()
    }
}

/// Nothing panics while it holds these locks; were it to happen, the data would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow(
    pods: Api<Pod>,
    pod: String,
    latest: Arc<Mutex<Option<Progress>>>,
    wake: mpsc::UnboundedSender<BuildRef>,
    build: BuildRef,
) {
    let params = LogParams {
        container: Some(BUILD_CONTAINER.to_owned()),
        follow: true,
        tail_lines: Some(TAIL_LINES),
        ..LogParams::default()
    };
    // The reconciler ends this task when the pod stops running; until then an ended stream is a broken one.
    loop {
        match pods.log_stream(&pod, &params).await {
            Ok(log) => read(log, &latest, || wake.send(build.clone()).is_ok()).await,
            Err(error) => tracing::debug!(%build, pod, %error, "can not read the build's log"),
        }
        if wake.is_closed() {
            return;
        }
        sleep(REOPEN).await;
    }
}

/// Reads until the stream ends, or until `wake` says that nobody listens.
async fn read(log: impl AsyncBufRead, latest: &Mutex<Option<Progress>>, wake: impl Fn() -> bool) {
    let mut log = std::pin::pin!(log);
    let mut line = Vec::new();
    let mut next_wake = Instant::now();
    let mut news = false;
    loop {
        tokio::select! {
            () = sleep_until(next_wake), if news => {
                news = false;
                next_wake = Instant::now() + INTERVAL;
                if !wake() {
                    return;
                }
            }
            whole = read_line(log.as_mut(), &mut line) => {
                if !whole {
                    break;
                }
                if let Some(progress) = parse(&line) {
                    let mut latest = lock(latest);
                    news |= latest.as_ref() != Some(&progress);
                    *latest = Some(progress);
                }
                line.clear();
            }
        }
    }
    if news {
        wake();
    }
}

/// Reads up to a line break and says whether there was one. Of a long line only the beginning is kept. When it is
/// dropped half-way, `line` has what was read and another call goes on.
async fn read_line(mut log: Pin<&mut impl AsyncBufRead>, line: &mut Vec<u8>) -> bool {
    loop {
        let Ok(chunk) = log.fill_buf().await else { return false };
        if chunk.is_empty() {
            return false;
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        let room = (MAX_LINE + 1).saturating_sub(line.len());
        line.extend_from_slice(&part[..part.len().min(room)]);
        let read = part.len() + usize::from(end.is_some());
        log.as_mut().consume(read);
        if end.is_some() {
            return true;
        }
    }
}

/// A line of the build's output as progress, if it is that.
fn parse(line: &[u8]) -> Option<Progress> {
    if line.len() > MAX_LINE || !line.starts_with(b"{") {
        return None;
    }
    let ProgressLine { progress } = serde_json::from_slice(line).ok()?;
    Some(Progress { percent: progress.percent.min(100), message: shorten(&progress.message, MAX_MESSAGE), ..progress })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures::TryStreamExt;

    use super::*;
    use crate::contract::Stage;

    fn line(percent: u8) -> String {
        let progress = Progress { stage: Stage::Install, percent, message: "packages".into() };
        serde_json::to_string(&ProgressLine { progress }).unwrap() + "\n"
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_last_progress_and_skips_other_lines() {
        let text = format!("plain words\n{}{{\"level\":\"info\"}}\n{}\n{}", line(1), "x".repeat(100_000), line(7));
        let latest = Mutex::new(None);
        read(text.as_bytes(), &latest, || true).await;
        assert_eq!(lock(&latest).as_ref().map(|progress| progress.percent), Some(7));
    }

    #[tokio::test(start_paused = true)]
    async fn wakes_at_once_and_then_once_in_an_interval() {
        let (mut writer, reader) = tokio::io::duplex(1024);
        let log = tokio_util::io::ReaderStream::new(reader).into_async_read();
        let (latest, wakes, began) = (Mutex::new(None), Cell::new(0), Instant::now());
        let reading = read(log, &latest, || {
            wakes.set(wakes.get() + 1);
            true
        });
        let writing = async {
            for percent in 0..30 {
                tokio::io::AsyncWriteExt::write_all(&mut writer, line(percent).as_bytes()).await.unwrap();
                sleep(Duration::from_secs(1)).await;
            }
            drop(writer);
        };
        tokio::join!(reading, writing);
        assert_eq!(began.elapsed().as_secs(), 30);
        assert_eq!(wakes.get(), 4, "at 0 s, 10 s, 20 s and the end");
    }

    #[test]
    fn progress_from_a_pod_is_bounded() {
        let progress = Progress { stage: Stage::Fetch, percent: 255, message: "m".repeat(4000) };
        let text = serde_json::to_string(&ProgressLine { progress }).unwrap();
        let progress = parse(text.as_bytes()).unwrap();
        assert_eq!(progress.percent, 100);
        assert!(progress.message.len() <= MAX_MESSAGE);
    }
}
