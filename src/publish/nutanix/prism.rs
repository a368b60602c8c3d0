//! Requests to Prism Central's v3 API, with every answer told apart: what another attempt may cure, what it can not.

use std::{
    error::Error,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use jiff::Timestamp;
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde::{Serialize, de::DeserializeOwned};
use url::Url;

use super::{
    NutanixError,
    documents::{Accepted, Entity, ErrorDocument, List, ListRequest, Message, SUCCEEDED, Task},
};
use crate::{
    contract::{NutanixTarget, shorten},
    fetch::{distrusts_certificate, retry_after},
    package::Summary,
    publish::patience::Patience,
};

/// Entities in one part of a list. Prism Central gives 20 where nobody says, and at most 500.
const PAGE: u64 = 100;
/// What the user is told of an answer.
const MAX_ANSWER: usize = 500;
/// How often an upload is looked at whether it moves.
const LOOK: Duration = Duration::from_millis(500);

/// Reason of an answer and code of a task when a cluster has no room.
const SHORTAGE: &str = "RESOURCE_SHORTAGE";
/// Longest pause between two looks at a task.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The way to one Prism Central.
#[derive(Debug)]
pub(super) struct Prism {
    /// `host:port`, for people.
    pub(super) server: String,
    client: Client,
    /// Waits for an answer as long as an upload takes.
    uploads: Client,
    base: Url,
    username: SecretString,
    password: SecretString,
    patience: Duration,
}

/// Who asks.
#[derive(Debug)]
pub(super) struct Login {
    pub(super) username: SecretString,
    pub(super) password: SecretString,
}

/// What Prism Central says to a request, as far as the work goes on with it.
pub(super) enum Answer {
    Done(Response),
    /// There is no such entity.
    Missing,
    /// It is away, busy, or works on the same entity.
    Away {
        cause: Box<dyn Error + Send + Sync>,
        pause: Duration,
    },
}

/// How an upload ended that is not hopeless.
pub(super) enum Sent {
    Whole,
    /// It can be begun anew, with a new image.
    Cut {
        cause: Box<dyn Error + Send + Sync>,
        pause: Duration,
    },
}

impl Prism {
    pub(super) fn new(
        target: &NutanixTarget,
        client: Client,
        uploads: Client,
        login: Login,
        patience: Duration,
    ) -> Result<Self, NutanixError> {
        let server = format!("{}:{}", target.endpoint, target.port);
        let base = Url::parse(&format!("https://{server}/api/nutanix/v3"))
            .ok()
            .filter(|url| url.path() == "/api/nutanix/v3" && url.username().is_empty())
            .ok_or_else(|| NutanixError::InvalidEndpoint { endpoint: target.endpoint.clone() })?;
        let Login { username, password } = login;
        Ok(Self { server, client, uploads, base, username, password, patience })
    }

    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.server.clone(), self.patience)
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.extend(path);
        }
        url
    }

    /// All entities of a kind, or those that a filter lets through.
    pub(super) async fn list(&self, kind: &str, filter: Option<String>) -> Result<Vec<Entity>, NutanixError> {
        let action = format!("list {kind}s");
        let path = format!("{kind}s");
        let mut entities = vec![];
        loop {
            let request = ListRequest { kind, offset: entities.len() as u64, length: PAGE, filter: filter.clone() };
            let page: Option<List<Entity>> = self.ask(&action, Method::POST, &[&path, "list"], Some(&request)).await?;
            let page = page.ok_or_else(|| self.not_prism(format!("{} to \"{action}\"", StatusCode::NOT_FOUND)))?;
            let last = page.entities.is_empty();
            entities.extend(page.entities);
            if last || entities.len() as u64 >= page.metadata.total_matches {
                return Ok(entities);
            }
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        action: &str,
        path: &[&str],
    ) -> Result<Option<T>, NutanixError> {
        self.ask(action, Method::GET, path, None::<&()>).await
    }

    /// Asks for a change. `None`: there is no such entity.
    pub(super) async fn begin(
        &self,
        action: &str,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<Option<Accepted>, NutanixError> {
        self.ask(action, method, path, body).await
    }

    /// Waits for the tasks of a change.
    pub(super) async fn finish(&self, action: &str, accepted: &Accepted) -> Result<(), NutanixError> {
        for task in accepted.status.execution_context.tasks() {
            self.wait_for_task(action, task, |_| {}).await?;
        }
        Ok(())
    }

    /// Waits until a task ends. `tell` is told what it does.
    pub(super) async fn wait_for_task(
        &self,
        action: &str,
        task: &str,
        tell: impl Fn(&str),
    ) -> Result<(), NutanixError> {
        let mut pauses = pauses();
        loop {
            let state: Option<Task> = self.get("read a task", &["tasks", task]).await?;
            let state = state.unwrap_or_else(|| Task {
                status: "FAILED".to_owned(),
                error_detail: format!("the task {task} is not known"),
                ..Task::default()
            });
            match state.status.as_str() {
                SUCCEEDED => return Ok(()),
                "FAILED" | "ABORTED" => return Err(self.failed_task(action, &state)),
                // It is queued, runs or is suspended.
                _ => tell(&state.progress_message),
            }
            tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    fn failed_task(&self, action: &str, task: &Task) -> NutanixError {
        let texts = [&task.error_detail, &task.progress_message, &task.error_code, &task.status];
        let mut told: Vec<&str> = vec![];
        for text in texts {
            if !text.is_empty() && !told.contains(&text.as_str()) {
                told.push(text);
            }
        }
        let message = shorten(&told.join(", "), MAX_ANSWER);
        if task.error_code == SHORTAGE {
            return NutanixError::Full { server: self.server.clone(), answer: message };
        }
        NutanixError::Failed { server: self.server.clone(), action: action.to_owned(), message }
    }

    /// Asks for the bytes of an image.
    pub(super) async fn file(&self, uuid: &str) -> Result<Answer, NutanixError> {
        self.send("read the image's bytes", self.client.get(self.file_url(uuid))).await
    }

    pub(super) fn file_url(&self, uuid: &str) -> Url {
        self.url(&["images", uuid, "file"])
    }

    /// Sends the bytes of an image, which are what `summary` says.
    pub(super) async fn upload(
        &self,
        uuid: &str,
        summary: &Summary,
        body: Body,
        sent: &AtomicU64,
    ) -> Result<Sent, NutanixError> {
        let request = self
            .uploads
            .put(self.file_url(uuid))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, summary.size)
            .header("X-Nutanix-Checksum-Type", "SHA_256")
            .header("X-Nutanix-Checksum-Bytes", &summary.sha256)
            .body(body);
        let answer = tokio::select! {
            answer = self.send("take the image's bytes", request) => answer?,
            () = self.stalled(sent, summary.size) => {
                let cause = format!("it took no byte for {} s", self.patience.as_secs());
                Answer::Away { cause: cause.into(), pause: Duration::ZERO }
            }
        };
        Ok(match answer {
            Answer::Done(_) => Sent::Whole,
            Answer::Missing => Sent::Cut { cause: "the image was removed there".into(), pause: Duration::ZERO },
            Answer::Away { cause, pause } => Sent::Cut { cause, pause },
        })
    }

    /// Returns when not all is sent and nothing moves.
    async fn stalled(&self, sent: &AtomicU64, size: u64) {
        let (mut before, mut since) = (0, tokio::time::Instant::now());
        loop {
            tokio::time::sleep(LOOK).await;
            let now = sent.load(Ordering::Relaxed);
            if now != before || now >= size {
                (before, since) = (now, tokio::time::Instant::now());
            } else if since.elapsed() >= self.patience {
                return;
            }
        }
    }

    /// The document that answers a request, through times when Prism Central is away. `None`: there is no such entity.
    async fn ask<T: DeserializeOwned>(
        &self,
        action: &str,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<Option<T>, NutanixError> {
        let mut patience = self.patience();
        loop {
            let mut request = self.client.request(method.clone(), self.url(path));
            if let Some(body) = body {
                request = request.json(body);
            }
            let (cause, pause) = match self.send(action, request).await? {
                Answer::Done(response) => match response.bytes().await {
                    Ok(bytes) => {
                        return serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                            self.not_prism(format!("the answer to \"{action}\" is not understood: {error}"))
                        });
                    }
                    Err(error) => (error.without_url().into(), Duration::ZERO),
                },
                Answer::Missing => return Ok(None),
                Answer::Away { cause, pause } => (cause, pause),
            };
            patience.wait_at_least(pause, cause).await?;
        }
    }

    async fn send(&self, action: &str, request: RequestBuilder) -> Result<Answer, NutanixError> {
        let login = request.basic_auth(self.username.expose_secret(), Some(self.password.expose_secret()));
        let response = match login.header(header::ACCEPT, "application/json").send().await {
            Ok(response) => response,
            Err(error) => {
                let source = error.without_url();
                if distrusts_certificate(&source) {
                    return Err(NutanixError::Untrusted { server: self.server.clone(), source });
                }
                return Ok(Answer::Away { cause: source.into(), pause: Duration::ZERO });
            }
        };
        let status = response.status();
        if status.is_success() {
            return Ok(Answer::Done(response));
        }
        let pause = retry_after(response.headers(), Timestamp::now()).unwrap_or_default();
        let (answer, reasons) = explain(status, &response.text().await.unwrap_or_default());
        let has = |reason: &str| reasons.iter().any(|given| given == reason);
        let (server, action) = (self.server.clone(), action.to_owned());
        match status {
            StatusCode::UNAUTHORIZED => Err(NutanixError::CredentialsRefused { server }),
            StatusCode::FORBIDDEN => Err(NutanixError::Forbidden { server, action, answer }),
            StatusCode::NOT_FOUND => Ok(Answer::Missing),
            _ if has("ENTITY_NOT_FOUND") || has("CATEGORY_NAME_VALUE_MISMATCH") => Ok(Answer::Missing),
            _ if has(SHORTAGE) => Err(NutanixError::Full { server, answer }),
            StatusCode::CONFLICT if has("ENTITY_ALREADY_EXISTS") => {
                Err(NutanixError::Refused { server, action, answer })
            }
            StatusCode::CONFLICT | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                Ok(Answer::Away { cause: answer.into(), pause })
            }
            _ if status.is_server_error() => Ok(Answer::Away { cause: answer.into(), pause }),
            _ if reasons.is_empty() => Err(self.not_prism(format!("{answer} to \"{action}\""))),
            _ => Err(NutanixError::Refused { server, action, answer }),
        }
    }

    pub(super) fn not_prism(&self, answer: String) -> NutanixError {
        NutanixError::NotPrism { server: self.server.clone(), answer }
    }
}

/// Pauses between two looks at something that is under way.
pub(super) fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build()
}

/// The messages of an answer in one line, and their reasons.
fn explain(status: StatusCode, text: &str) -> (String, Vec<String>) {
    let messages = serde_json::from_str::<ErrorDocument>(text).unwrap_or_default().message_list;
    let told = if messages.is_empty() { text.trim().to_owned() } else { joined(&messages) };
    let answer = if told.is_empty() { status.to_string() } else { format!("{status}: {}", shorten(&told, MAX_ANSWER)) };
    (answer, messages.into_iter().map(|message| message.reason).collect())
}

/// Messages in one line.
pub(super) fn joined(messages: &[Message]) -> String {
    let lines: Vec<_> =
        messages.iter().map(|message| format!("{} ({})", message.message.trim(), message.reason)).collect();
    lines.join("; ")
}
