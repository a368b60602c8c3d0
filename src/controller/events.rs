//! Kubernetes Events about `NodeImageBuilds`, through one recorder that folds repeated ones.

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Client, Resource};
use kube_runtime::events::{Event, EventType, Recorder, Reporter};

use super::CONTROLLER;
use crate::contract::shorten;

/// The API server refuses longer notes, in bytes.
const MAX_NOTE: usize = 1024;

/// Something worth telling a person, decided by the plan.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Note {
    pub warning: bool,
    /// `PascalCase`, one of `docs/failures.md`.
    pub reason: String,
    /// What the controller did or could not do: `Build`, `Cancel`, `Validate`.
    pub action: &'static str,
    pub message: String,
}

impl Note {
    pub fn normal(reason: &str, action: &'static str, message: impl Into<String>) -> Self {
        Self { warning: false, reason: reason.to_owned(), action, message: message.into() }
    }

    pub fn warning(reason: &str, action: &'static str, message: impl Into<String>) -> Self {
        Self { warning: true, reason: reason.to_owned(), action, message: message.into() }
    }
}

/// The recorder remembers each event for minutes to fold repeated ones; what is repeated is so within a few passes.
const MOST_REMEMBERED: usize = 256;

/// Publishes notes. Clones share the memory that folds repeated events.
#[derive(Clone)]
pub struct Events {
    client: Client,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    recorder: Recorder,
    published: usize,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    pub fn new(client: Client) -> Self {
        let recorder = Recorder::new(client.clone(), Reporter::from(CONTROLLER));
        Self { client, inner: Arc::new(Mutex::new(Inner { recorder, published: 0 })) }
    }

    /// The recorder, which is a new one after so many events: thousands of builds must not fill the memory with them.
    fn recorder(&self) -> Recorder {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.published == MOST_REMEMBERED {
            let recorder = Recorder::new(self.client.clone(), Reporter::from(CONTROLLER));
            *inner = Inner { recorder, published: 0 };
        }
        inner.published += 1;
        inner.recorder.clone()
    }

    /// Publishes the note about `object`. An Event that can not be written is logged, nothing more: it must not stop a
    /// build.
    pub async fn publish<K: Resource<DynamicType = ()>>(&self, object: &K, note: &Note) {
        // With the version in it, only a note about the same version of the object is folded into an earlier one; the
        // recorder would keep the earlier one's text otherwise.
        let regarding =
            ObjectReference { resource_version: object.meta().resource_version.clone(), ..object.object_ref(&()) };
        let event = Event {
            type_: if note.warning { EventType::Warning } else { EventType::Normal },
            reason: shorten(&note.reason, 128),
            note: Some(shorten(&note.message, MAX_NOTE)),
            action: note.action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder().publish(&event, &regarding).await {
            tracing::warn!(reason = note.reason, %error, "can not publish an event");
        }
    }
}
