//! Follows a build: its status, its progress, the log of its pod.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures::{AsyncBufReadExt, StreamExt, stream::BoxStream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt,
    api::{ListParams, LogParams},
};
use kube_runtime::{WatchStreamExt, watcher};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Place,
    show::{self, End},
};
use crate::{
    api::v1alpha1::{BUILD_ID_LABEL, NodeImageBuild, Phase, conditions::READY},
    cli::terminal::{Stages, say},
    contract::{BUILD_CONTAINER, Progress, ProgressLine},
};

/// Time between two looks for the pod of a build whose log is not open.
const LOOK: Duration = Duration::from_secs(2);
/// Lines of a log that was there before somebody looked.
const TAIL: i64 = 10;

type Lines = BoxStream<'static, io::Result<String>>;

/// What is known and shown of one build.
struct View {
    stages: Stages,
    build: Option<NodeImageBuild>,
    /// What was told last of why it does not go on.
    told: String,
    progress: Option<Progress>,
    log: Option<Lines>,
    /// The pod whose log is open, or was.
    pod: Option<String>,
}

/// Until nothing more happens. The exit code is that of the build.
pub(super) async fn watch(place: &Place, name: &str) -> anyhow::Result<ExitCode> {
    place.get(name).await?;
    let mut changes = std::pin::pin!(watcher::watch_object(place.builds.clone(), name).default_backoff());
    let mut view =
        View { stages: Stages::new(), build: None, told: String::new(), progress: None, log: None, pod: None };
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(Some(build))) => {
                    view.tell(&build);
                    let end = show::end(&build);
                    view.build = Some(build);
                    if let Some(end) = end {
                        break end;
                    }
                }
                Some(Ok(None)) => bail!("the NodeImageBuild {name} was deleted"),
                Some(Err(error)) => say(&format!("can not watch {name}, it is tried again: {error}")),
                None => bail!("the API server ended the watch of {name}"),
            },
            line = next(&mut view.log) => view.read(line),
            _ = look.tick(), if view.log.is_none() => view.open(place).await,
        }
    };
    view.stages.finish();
    let Some(build) = view.build else { bail!("nothing is known of {name}") };
    io::stdout().write_all(show::summary(&build, Timestamp::now()).as_bytes())?;
    Ok(match end {
        End::Ready => ExitCode::SUCCESS,
        End::Suspended => ExitCode::FAILURE,
        End::Stalled(code) => ExitCode::from(code),
    })
}

async fn next(log: &mut Option<Lines>) -> Option<io::Result<String>> {
    match log {
        Some(lines) => lines.next().await,
        None => std::future::pending().await,
    }
}

impl View {
    fn tell(&mut self, build: &NodeImageBuild) {
        let Some(status) = &build.status else { return };
        if let Some(progress) = &status.progress {
            self.show(progress);
        }
        let ready = status.conditions.iter().find(|condition| condition.type_ == READY);
        let Some(ready) = ready.filter(|ready| ready.status != "True" && ready.message != self.told) else { return };
        self.told.clone_from(&ready.message);
        say(&format!("{}: {}", ready.reason, ready.message));
    }

    /// A line of the log, or its end.
    fn read(&mut self, line: Option<io::Result<String>>) {
        match line {
            Some(Ok(line)) => match serde_json::from_str(&line) {
                Ok(ProgressLine { progress }) => self.show(&progress),
                Err(_) => say(&show::log_line(&line)),
            },
            Some(Err(error)) => {
                say(&format!("the log broke off: {error}"));
                (self.log, self.pod) = (None, None);
            }
            None => self.log = None,
        }
    }

    fn show(&mut self, progress: &Progress) {
        // The status lags behind the log, and a new attempt starts anew.
        let stale = self.log.is_some() && self.progress.as_ref().is_some_and(|known| known.percent > progress.percent);
        if !stale && self.progress.as_ref() != Some(progress) {
            self.stages.show(progress);
            self.progress = Some(progress.clone());
        }
    }

    /// Opens the log of the pod that builds, if there is one that was not read yet.
    async fn open(&mut self, place: &Place) {
        let status = self.build.as_ref().and_then(|build| build.status.as_ref());
        let Some(status) = status.filter(|status| status.phase == Some(Phase::Building)) else { return };
        let Ok(Some(pod)) = newest_pod(place, status.build_id.as_deref()).await else { return };
        if !started(&pod) || self.pod.as_ref() == Some(&pod.name_any()) {
            return;
        }
        let params = LogParams { follow: true, tail_lines: Some(TAIL), ..of_container() };
        match place.pods.log_stream(&pod.name_any(), &params).await {
            Ok(log) => {
                self.progress = None;
                self.log = Some(log.lines().boxed());
            }
            Err(error) => say(&format!("can not read the log of the pod {}: {error}", pod.name_any())),
        }
        self.pod = Some(pod.name_any());
    }
}

fn of_container() -> LogParams {
    LogParams { container: Some(BUILD_CONTAINER.to_owned()), ..LogParams::default() }
}

/// Whether the build container runs or ran, so that there is a log.
fn started(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let states = containers.iter().filter(|one| one.name == BUILD_CONTAINER).filter_map(|one| one.state.as_ref());
    states.into_iter().any(|state| state.running.is_some() || state.terminated.is_some())
}

/// The pod of the newest attempt.
async fn newest_pod(place: &Place, build_id: Option<&str>) -> kube::Result<Option<Pod>> {
    let Some(id) = build_id else { return Ok(None) };
    let pods = place.pods.list(&ListParams::default().labels(&format!("{BUILD_ID_LABEL}={id}"))).await?;
    Ok(pods.items.into_iter().max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0)))
}

/// The log of the newest build, on standard output.
pub(super) async fn logs(place: &Place, name: &str, follow: bool) -> anyhow::Result<()> {
    let status = place.get(name).await?.status.unwrap_or_default();
    let pod = newest_pod(place, status.build_id.as_deref()).await.context("can not list the build's pods")?;
    let Some(pod) = pod.filter(started) else {
        bail!(
            "the newest build of {name} has no pod that runs or ran; its Job goes with its log some time after the build"
        )
    };
    let params = LogParams { follow, ..of_container() };
    let log = place.pods.log_stream(&pod.name_any(), &params).await;
    let mut lines = log.with_context(|| format!("can not read the log of the pod {}", pod.name_any()))?.lines();
    let mut output = io::stdout();
    while let Some(line) = lines.next().await {
        let line = line.context("the log broke off")?;
        let line = match serde_json::from_str(&line) {
            Ok(ProgressLine { progress }) => {
                format!("{:3} % {}: {}", progress.percent, progress.stage, progress.message)
            }
            Err(_) => show::log_line(&line),
        };
        writeln!(output, "{line}")?;
    }
    Ok(())
}
