//! Pieces of the status: conditions with kstatus's meaning, records of finished builds. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::job_state::Failure;
use crate::{
    api::v1alpha1::{
        BuildResult, FailureStatus, History, HistoryEntry, ImageStatus, NodeImageBuildStatus, Phase, ReleaseStatus,
        conditions::{READY, RECONCILING, STALLED},
    },
    contract::{BuildOutcome, ResolvedRelease, shorten},
};

/// The API server takes longer messages, but nobody reads them.
const MAX_MESSAGE: usize = 4096;

/// What the conditions say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// The image is there.
    Ready,
    /// On the way.
    Reconciling,
    /// Somebody has to act.
    Stalled,
    /// Nothing is wanted.
    Idle,
}

/// Sets phase and conditions. `lastTransitionTime` changes only where a condition's status does.
pub(super) fn judge(
    status: &mut NodeImageBuildStatus,
    phase: Phase,
    verdict: Verdict,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let old = std::mem::take(&mut status.conditions);
    let message = shorten(message, MAX_MESSAGE);
    let condition = |kind: &str, value: &str| {
        let before = old.iter().find(|condition| condition.type_ == kind && condition.status == value);
        Condition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.to_owned(),
            message: message.clone(),
            observed_generation: status.observed_generation,
            last_transition_time: before.map_or(time(now), |before| before.last_transition_time.clone()),
        }
    };
    let ready = condition(READY, if verdict == Verdict::Ready { "True" } else { "False" });
    status.conditions = match verdict {
        Verdict::Ready | Verdict::Idle => vec![ready],
        Verdict::Reconciling => vec![ready, condition(RECONCILING, "True")],
        Verdict::Stalled => vec![ready, condition(STALLED, "True")],
    };
    status.phase = Some(phase);
}

/// A time as the API server keeps it: whole seconds.
pub(super) fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The condition of this type.
pub(super) fn condition<'s>(status: &'s NodeImageBuildStatus, kind: &str) -> Option<&'s Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind)
}

/// Adds a condition that is there for as long as something is wrong; whether it says what it did not say before.
pub(super) fn raise(
    before: &NodeImageBuildStatus,
    status: &mut NodeImageBuildStatus,
    (kind, reason): (&str, &str),
    message: &str,
    now: Timestamp,
) -> bool {
    let old = condition(before, kind);
    status.conditions.push(Condition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: status.observed_generation,
        last_transition_time: old.map_or(time(now), |old| old.last_transition_time.clone()),
    });
    old.is_none_or(|old| old.message != message)
}

pub(super) fn failure_status(failure: &Failure) -> FailureStatus {
    FailureStatus {
        stage: failure.stage,
        class: failure.class,
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        pod: failure.pod.clone(),
        container: failure.container.clone(),
    }
}

pub(super) fn release_status(release: &ResolvedRelease) -> ReleaseStatus {
    ReleaseStatus {
        eksa_release: release.eksa_version.clone(),
        bundle_number: release.bundle_number,
        eksd_release: release.eksd_name.clone(),
        kubernetes_version: release.kubernetes_version.clone(),
    }
}

/// Takes over a published image as the newest one.
pub(super) fn set_image(status: &mut NodeImageBuildStatus, outcome: &BuildOutcome) {
    let image = &outcome.image;
    status.image_url = image.url.as_ref().map(ToString::to_string);
    status.image = Some(ImageStatus {
        name: image.name.clone(),
        format: image.format.clone(),
        size: image.size,
        virtual_size: image.virtual_size,
        sha256: image.sha256.clone(),
        inventory_path: image.vsphere.as_ref().map(|template| template.inventory_path.clone()),
        moref: image.vsphere.as_ref().map(|template| template.moref.clone()),
        instance_uuid: image.vsphere.as_ref().map(|template| template.instance_uuid.clone()),
        uuid: image.uuid.clone(),
        additional_urls: image.additional_urls.iter().map(ToString::to_string).collect(),
        sbom_url: image.sbom.as_ref().map(ToString::to_string),
        provenance_url: image.provenance.as_ref().map(ToString::to_string),
    });
    status.base_digest.clone_from(&image.base_digest);
    status.verification = Some(outcome.verification.clone());
    status.stage_seconds.clone_from(&outcome.stage_seconds);
}

/// Puts a finished build into the history, in place of an earlier record of the same build.
pub(super) fn record(history: &mut Vec<HistoryEntry>, entry: HistoryEntry) {
    history.retain(|other| other.build_id != entry.build_id);
    // In front: of builds that ended in the same second the one that is recorded last is the newest.
    history.insert(0, entry);
    history.sort_by_key(|entry| std::cmp::Reverse(entry.completion_time.as_ref().map(|time| time.0)));
}

/// Drops the oldest records beyond the limits. With `all_images`, every build that has one stays.
pub(super) fn trim(history: &mut Vec<HistoryEntry>, limits: History, all_images: bool) {
    let (mut successful, mut failed) = (if all_images { u32::MAX } else { limits.successful }, limits.failed);
    history.retain(|entry| {
        let left = match entry.result {
            BuildResult::Succeeded => &mut successful,
            BuildResult::Failed | BuildResult::Cancelled => &mut failed,
        };
        let keep = *left > 0;
        *left = left.saturating_sub(1);
        keep
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{ImageReport, Stage};

    #[test]
    fn image_in_prism_central_has_no_url_and_is_found_by_name_and_uuid() {
        let image = ImageReport {
            name: "ubuntu-2204-kube-1-31".into(),
            format: "qcow2".into(),
            url: None,
            additional_urls: vec![],
            size: 1,
            virtual_size: 2,
            sha256: "00".into(),
            vsphere: None,
            uuid: Some("3cd498a2-99da-49a2-bbdf-14c349036019".into()),
            base_digest: Some("sha256:00".into()),
            sbom: None,
            provenance: None,
        };
        let outcome = BuildOutcome { image, verification: String::new(), stage_seconds: [(Stage::Fetch, 1.5)].into() };
        // As the pod writes it and the operator reads it.
        let outcome: BuildOutcome = serde_json::from_str(&serde_json::to_string(&outcome).unwrap()).unwrap();
        let mut status =
            NodeImageBuildStatus { image_url: Some("https://old".into()), ..NodeImageBuildStatus::default() };
        set_image(&mut status, &outcome);
        assert_eq!(status.image_url, None);
        assert_eq!(status.stage_seconds, [(Stage::Fetch, 1.5)].into());
        let image = serde_json::to_value(status.image.unwrap()).unwrap();
        assert_eq!(image["name"], "ubuntu-2204-kube-1-31");
        assert_eq!(image["uuid"], "3cd498a2-99da-49a2-bbdf-14c349036019");
    }
}
