//! Which published images of a resource go because there are newer ones. Pure.
//!
//! With `spec.retention`, a successful build stays in the history as long as its image does: what is to be removed has to
//! be known. What a cluster installs nodes from is never removed, however old it is.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::Value;

use super::{
    cleanup::{CleanUp, Scope},
    events::Note,
    plan::{Observed, Plan},
    status::raise,
    validate::directory,
};
use crate::api::v1alpha1::{
    BuildResult, HistoryEntry, NodeImageBuild, NodeImageBuildSpec, NodeImageBuildStatus,
    conditions::{CLEAN_UP_FAILED, RETENTION_BLOCKED},
};

/// API group and version of EKS Anywhere's resources.
pub const GROUP: &str = "anywhere.eks.amazonaws.com";
pub const VERSION: &str = "v1alpha1";
/// Wait before it is looked again whether an image is still in use: nothing tells when a cluster stops using one.
const RESYNC: Duration = Duration::from_secs(600);

/// A kind of EKS Anywhere that names an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Kind {
    pub kind: &'static str,
    pub plural: &'static str,
    /// Paths of the fields that name one, as JSON pointers.
    fields: &'static [&'static str],
}

/// All of them, with the fields of their version `v1alpha1`.
pub const KINDS: [Kind; 4] = [
    Kind { kind: "TinkerbellDatacenterConfig", plural: "tinkerbelldatacenterconfigs", fields: &["/spec/osImageURL"] },
    Kind { kind: "TinkerbellMachineConfig", plural: "tinkerbellmachineconfigs", fields: &["/spec/osImageURL"] },
    Kind { kind: "VSphereMachineConfig", plural: "vspheremachineconfigs", fields: &["/spec/template"] },
    Kind {
        kind: "NutanixMachineConfig",
        plural: "nutanixmachineconfigs",
        fields: &["/spec/image/name", "/spec/image/uuid"],
    },
];

/// What the clusters' resources name: URLs of images, names and inventory paths of templates, names and UUIDs of images.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Named(BTreeSet<String>);

impl Named {
    /// Takes over what a resource names.
    pub fn add(&mut self, kind: &Kind, resource: &Value) {
        let named = kind.fields.iter().filter_map(|field| resource.pointer(field)?.as_str());
        self.0.extend(named.filter(|name| !name.is_empty()).map(ToOwned::to_owned));
    }

    /// Whether anything that is named may be the image of this build. `replaced` says that a newer image has its name.
    fn has(&self, build: &NodeImageBuild, entry: &HistoryEntry, replaced: bool) -> bool {
        // Machines may know the artifact server by another name than the status does.
        let directory = directory(&build.namespace().unwrap_or_default(), &build.name_any(), &entry.build_id);
        let directory = format!("/{directory}/");
        let is = |wanted: &Option<String>, found: &str| wanted.as_deref() == Some(found);
        self.0.iter().any(|named| {
            let last = named.rsplit('/').next().unwrap_or_default();
            named.contains(&directory)
                || is(&entry.image_url, named)
                || entry.image_uuid.as_ref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(named))
                || (!replaced && (is(&entry.image_name, named) || is(&entry.image_name, last)))
        })
    }
}

/// What is known about what the clusters use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Usage {
    /// No image is to go, so nobody looked.
    NotNeeded,
    Known(Named),
    /// It can not be seen; why.
    Hidden(String),
}

/// Builds whose images are beyond those that are kept, the oldest last.
pub fn surplus(spec: &NodeImageBuildSpec, status: &NodeImageBuildStatus) -> Vec<HistoryEntry> {
    let Some(retention) = spec.retention else { return vec![] };
    let keep = usize::try_from(retention.keep.max(1)).unwrap_or(usize::MAX);
    let succeeded = status.history.iter().filter(|entry| entry.result == BuildResult::Succeeded);
    succeeded.skip(keep).filter(|entry| status.build_id.as_ref() != Some(&entry.build_id)).cloned().collect()
}

/// Targets whose files nobody but a person can remove.
pub(super) fn places_of_persons(spec: &NodeImageBuildSpec) -> impl Iterator<Item = &'static str> {
    let places = [
        (spec.publish.iter().any(|target| target.s3.is_some()), "the s3 targets of spec.publish"),
        (spec.publish.iter().any(|target| target.http.is_some()), "the http targets of spec.publish"),
    ];
    places.into_iter().filter_map(|(there, place)| there.then_some(place))
}

/// The status without what is added to it after this module has had its turn.
fn core(status: &NodeImageBuildStatus) -> NodeImageBuildStatus {
    let mut status = status.clone();
    status.conditions.retain(|one| one.type_ != CLEAN_UP_FAILED && one.type_ != RETENTION_BLOCKED);
    status
}

/// Completes the plan: removes images that are one too many and that nobody uses.
pub(super) fn plan(
    observed: &Observed,
    before: &NodeImageBuildStatus,
    status: &mut NodeImageBuildStatus,
    plan: &mut Plan,
    now: Timestamp,
) {
    status.conditions.retain(|one| one.type_ != RETENTION_BLOCKED);
    let spec = &observed.build.spec;
    let surplus = surplus(spec, status);
    if surplus.is_empty() {
        return;
    }
    let named = match &observed.usage {
        // The history has just grown: the next pass looks.
        Usage::NotNeeded => return,
        Usage::Hidden(why) => {
            block(before, status, plan, why, now);
            plan.look_again(RESYNC);
            return;
        }
        Usage::Known(named) => named,
    };
    // An artifact server that is away must not keep anything else from being told.
    if plan.start.is_some() || core(before) != core(status) {
        return;
    }
    for entry in surplus {
        let newer = status.history.iter().take_while(|other| other.build_id != entry.build_id);
        let replaced = newer
            .filter(|other| other.result == BuildResult::Succeeded)
            .any(|other| entry.image_name.is_some() && other.image_name == entry.image_name);
        if named.has(&observed.build, &entry, replaced) {
            plan.look_again(RESYNC);
        } else {
            retire(observed, &entry, status, plan);
        }
    }
}

/// Removes the image of a build, or has it removed; then its record.
fn retire(observed: &Observed, entry: &HistoryEntry, status: &mut NodeImageBuildStatus, plan: &mut Plan) {
    let (outside, id) = (&observed.outside, &entry.build_id);
    let mut left: Vec<&str> = places_of_persons(&observed.build.spec).collect();
    if outside.builds.contains_key(id) {
        if outside.clean_ups.get(&(id.clone(), Scope::Everything)) != Some(&CleanUp::Done) {
            plan.removals.insert(id.clone());
            return;
        }
    } else if entry.image_url.is_none() {
        // Its Secret went before there was a retention: nobody knows where it is.
        left.push("vCenter or Prism Central");
    }
    status.history.retain(|other| other.build_id != *id);
    plan.prune.insert(id.clone());
    if observed.jobs.iter().any(|job| job.build_id == *id && !job.deleting) {
        plan.delete_jobs.insert(id.clone());
    }
    if observed.secrets.contains(id) {
        plan.delete_secrets.insert(id.clone());
    }
    let image = entry.image_url.as_ref().or(entry.image_name.as_ref()).map_or("its image", String::as_str);
    plan.notes.push(if left.is_empty() {
        Note::normal(
            "ImageRemoved",
            "Retain",
            format!("the image of the build {id} is removed, nobody uses it: {image}"),
        )
    } else {
        let message =
            format!("the image of the build {id} in {} is not deleted; delete it there: {image}", left.join(", "));
        Note::warning("ImagesLeft", "Retain", message)
    });
}

/// Says why nothing is removed: a condition while it is so, an event when it begins.
fn block(before: &NodeImageBuildStatus, status: &mut NodeImageBuildStatus, plan: &mut Plan, why: &str, now: Timestamp) {
    let message = format!("no image is removed, because it can not be seen whether a cluster uses it: {why}");
    if raise(before, status, (RETENTION_BLOCKED, "RetentionBlocked"), &message, now) {
        plan.notes.push(Note::warning("RetentionBlocked", "Retain", message));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn build() -> NodeImageBuild {
        serde_json::from_value(json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild",
            "metadata": {"name": "golden", "namespace": "images"},
            "spec": {
                "os": {"name": "ubuntu", "version": "22.04"}, "releaseChannel": "1-31", "baremetal": {},
                "retention": {"keep": 2},
            },
        }))
        .unwrap()
    }

    fn entry(id: &str, more: &Value) -> HistoryEntry {
        let mut entry = json!({"buildID": id, "result": "Succeeded"});
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(entry).unwrap()
    }

    #[rstest]
    #[case::as_published("TinkerbellDatacenterConfig", json!({"osImageURL": "http://images/images/golden/a1/x-131.gz"}), true)]
    #[case::by_another_host("TinkerbellMachineConfig", json!({"osImageURL": "http://10.0.0.7/images/golden/a1/x-131.gz"}), true)]
    #[case::another_build("TinkerbellMachineConfig", json!({"osImageURL": "http://images/images/golden/a12/x.gz"}), false)]
    #[case::another_resource("TinkerbellMachineConfig", json!({"osImageURL": "http://images/images/old-golden/a1/x.gz"}), false)]
    #[case::template("VSphereMachineConfig", json!({"template": "ubuntu-a1"}), true)]
    #[case::template_by_path("VSphereMachineConfig", json!({"template": "/dc1/vm/Templates/ubuntu-a1"}), true)]
    #[case::another_template("VSphereMachineConfig", json!({"template": "ubuntu-a"}), false)]
    #[case::image("NutanixMachineConfig", json!({"image": {"type": "name", "name": "ubuntu-a1"}}), true)]
    #[case::image_by_uuid("NutanixMachineConfig", json!({"image": {"type": "uuid", "uuid": "3CD498A2"}}), true)]
    #[case::nothing("NutanixMachineConfig", json!({"image": {"type": "name", "name": ""}}), false)]
    fn images_are_recognised_however_they_are_named(#[case] kind: &str, #[case] spec: Value, #[case] expected: bool) {
        let image = json!({
            "imageURL": "http://images/images/golden/a1/x-131.gz", "imageName": "ubuntu-a1", "imageUUID": "3cd498a2",
        });
        let kind = KINDS.iter().find(|one| one.kind == kind).unwrap();
        let mut named = Named::default();
        let mut resource = json!({});
        resource["spec"] = spec;
        named.add(kind, &resource);
        assert_eq!(named.has(&build(), &entry("a1", &image), false), expected);
    }

    #[test]
    fn a_name_that_a_newer_image_has_taken_over_protects_that_one() {
        let mut named = Named::default();
        named.add(&KINDS[2], &json!({"spec": {"template": "golden"}}));
        let old = entry("a1", &json!({"imageName": "golden"}));
        assert!(named.has(&build(), &old, false) && !named.has(&build(), &old, true));
    }

    #[test]
    fn the_newest_images_and_those_of_failed_builds_are_never_surplus() {
        let mut status = NodeImageBuildStatus::default();
        let failed = json!({"result": "Failed"});
        status.history = [("d", json!({})), ("f", failed), ("c", json!({})), ("b", json!({})), ("a", json!({}))]
            .map(|(id, more)| entry(id, &more))
            .to_vec();
        let ids = |status: &NodeImageBuildStatus| -> Vec<String> {
            surplus(&build().spec, status).into_iter().map(|entry| entry.build_id).collect()
        };
        assert_eq!(ids(&status), ["b", "a"]);
        // A schedule that builds the same inputs again makes an old build the newest one.
        status.build_id = Some("a".into());
        assert_eq!(ids(&status), ["b"]);
    }
}
