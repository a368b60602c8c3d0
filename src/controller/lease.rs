//! Leader election by a `coordination.k8s.io/v1` Lease, in the way of client-go: one of several operators works, the
//! others stand by.
//!
//! Who stands by never compares its clock with the holder's: a lease has expired when it was not renewed for its whole
//! duration on this machine's own clock. The holder stops working well before, counted from the moment at which it sent
//! the last renewal that succeeded.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams, core::Status};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{CONTROLLER, error::api_status};

/// A holder that is silent for this long has lost the lease. client-go's 15 s would make a fail-over that lasts longer.
const DURATION: Duration = Duration::from_secs(10);
/// A holder that could not renew for this long stops working.
const RENEW_WITHIN: Duration = Duration::from_secs(7);
/// Time between two looks at the lease, or two renewals.
const RETRY: Duration = Duration::from_secs(2);

/// Which lease, and under which name this process holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LeaseSettings {
    pub namespace: String,
    pub name: String,
    /// Different for every process, also for one that was restarted.
    pub identity: String,
}

/// This process's part in the election.
pub(super) struct Election {
    api: Api<Lease>,
    settings: LeaseSettings,
    /// What was last seen of the lease, and when it was seen for the first time.
    seen: Option<(Record, Instant)>,
    /// When the last renewal that succeeded was sent.
    renewed: Option<Instant>,
}

/// What changes with every renewal.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Record {
    holder: Option<String>,
    renewed: Option<Timestamp>,
    transitions: i32,
}

impl Record {
    fn of(spec: &LeaseSpec) -> Self {
        Self {
            holder: spec.holder_identity.clone().filter(|holder| !holder.is_empty()),
            renewed: spec.renew_time.as_ref().map(|time| time.0),
            transitions: spec.lease_transitions.unwrap_or_default(),
        }
    }
}

/// What came of one attempt to get or renew the lease.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Attempt {
    Held,
    /// Another one holds it; it expires after this time unless it is renewed.
    HeldBy {
        holder: String,
        left: Duration,
    },
    /// Another one was faster.
    Lost,
}

impl Election {
    pub(super) fn new(client: Client, settings: LeaseSettings) -> Self {
        let api = Api::namespaced(client, &settings.namespace);
        Self { api, settings, seen: None, renewed: None }
    }

    /// Waits until this process holds the lease. `standing_by` is called each time the lease could be looked at.
    pub(super) async fn acquire(&mut self, standing_by: impl Fn()) {
        let mut told: Option<String> = None;
        loop {
            let wait = match timeout(RENEW_WITHIN, self.attempt()).await {
                Ok(Ok(Attempt::Held)) => {
                    standing_by();
                    tracing::info!(lease = %self.settings.name, identity = %self.settings.identity, "leading");
                    return;
                }
                Ok(Ok(Attempt::HeldBy { holder, left })) => {
                    standing_by();
                    if told.as_ref() != Some(&holder) {
                        tracing::info!(lease = %self.settings.name, %holder, "standing by");
                        told = Some(holder);
                    }
                    left.clamp(Duration::from_millis(10), RETRY)
                }
                Ok(Err(error)) => {
                    tracing::warn!(lease = %self.settings.name, %error, "can not get the lease; it is tried again");
                    RETRY
                }
                Ok(Ok(Attempt::Lost)) | Err(_) => RETRY,
            };
            sleep(wait).await;
        }
    }

    /// Renews the lease. Ends when it is lost, or could not be renewed in time.
    pub(super) async fn hold(&mut self) {
        loop {
            sleep(RETRY).await;
            let Some(deadline) = self.renewed.map(|renewed| renewed + RENEW_WITHIN) else { return };
            match timeout_at(deadline, self.attempt()).await {
                Ok(Ok(Attempt::Held | Attempt::Lost)) => {}
                Ok(Ok(Attempt::HeldBy { holder, .. })) => {
                    tracing::error!(lease = %self.settings.name, %holder, "the lease was taken");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(lease = %self.settings.name, %error, "can not renew the lease; it is tried again");
                }
                Err(_) => {
                    tracing::error!(lease = %self.settings.name, "the lease could not be renewed in time");
                    return;
                }
            }
        }
    }

    /// Gives the lease back, so that the next one need not wait. That it can not be is no harm: it expires.
    pub(super) async fn release(&mut self) {
        let give_back = async {
            let Some(mut lease) = self.api.get_opt(&self.settings.name).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_ref() != Some(&self.settings.identity) {
                return Ok(());
            }
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            self.api.replace(&self.settings.name, &params(), &lease).await.map(drop)
        };
        match timeout(RETRY, give_back).await {
            Ok(Ok(())) => tracing::info!(lease = %self.settings.name, "gave the lease back"),
            Ok(Err(error)) => tracing::warn!(lease = %self.settings.name, %error, "can not give the lease back"),
            Err(_) => tracing::warn!(lease = %self.settings.name, "can not give the lease back in time"),
        }
        self.renewed = None;
    }

    /// Gets or renews the lease, if it is free, expired or ours.
    async fn attempt(&mut self) -> kube::Result<Attempt> {
        let began = Instant::now();
        let Some(mut lease) = self.api.get_opt(&self.settings.name).await? else {
            let metadata = ObjectMeta { name: Some(self.settings.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.claim(&LeaseSpec::default())) };
            let created = self.api.create(&params(), &lease).await;
            return self.written(created, began, Status::is_already_exists);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let record = Record::of(&spec);
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != record) {
            self.seen = Some((record.clone(), Instant::now()));
        }
        if let (Some(holder), Some((_, since))) = (&record.holder, &self.seen)
            && *holder != self.settings.identity
        {
            let duration = u64::try_from(spec.lease_duration_seconds.unwrap_or_default()).unwrap_or_default();
            let left = Duration::from_secs(duration).saturating_sub(since.elapsed());
            if !left.is_zero() {
                return Ok(Attempt::HeldBy { holder: holder.clone(), left });
            }
        }
        lease.spec = Some(self.claim(&spec));
        // It carries the version that was read: of two who try, one wins.
        let replaced = self.api.replace(&self.settings.name, &params(), &lease).await;
        self.written(replaced, began, Status::is_conflict)
    }

    /// The lease as ours.
    fn claim(&self, before: &LeaseSpec) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let record = Record::of(before);
        let ours = record.holder.as_ref() == Some(&self.settings.identity);
        LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: before.acquire_time.clone().filter(|_| ours).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(record.transitions.saturating_add(i32::from(!ours && before.renew_time.is_some()))),
            ..before.clone()
        }
    }

    fn written(
        &mut self,
        result: kube::Result<Lease>,
        began: Instant,
        beaten: fn(&Status) -> bool,
    ) -> kube::Result<Attempt> {
        match result {
            Ok(lease) => {
                self.renewed = Some(began);
                self.seen = Some((Record::of(&lease.spec.unwrap_or_default()), began));
                Ok(Attempt::Held)
            }
            Err(error) if api_status(&error).is_some_and(beaten) => Ok(Attempt::Lost),
            Err(error) => Err(error),
        }
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() }
}
