//! Builds as text for a person. Pure.

use std::fmt::Write;

use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::Value;

use crate::api::v1alpha1::{
    NodeImageBuild, NodeImageBuildStatus, Phase,
    conditions::{READY, STALLED},
};

/// A table with one line a build.
pub(super) fn table(builds: &[NodeImageBuild], with_namespace: bool, now: Timestamp) -> String {
    let mut rows = vec![["NAMESPACE", "NAME", "OS", "CHANNEL", "PHASE", "DONE", "AGE", "IMAGE"].map(str::to_owned)];
    rows.extend(builds.iter().map(|build| {
        let status = build.status.clone().unwrap_or_default();
        let created = build.metadata.creation_timestamp.as_ref().map(|time| time.0);
        [
            build.namespace().unwrap_or_default(),
            build.name_any(),
            format!("{} {}", build.spec.os.name, build.spec.os.version),
            build.spec.release_channel.clone(),
            phase(&status),
            status.progress.as_ref().map_or(String::new(), |progress| format!("{} %", progress.percent)),
            created.map_or(String::new(), |created| age(created, now)),
            status.image_url.or(status.image.map(|image| image.name)).unwrap_or_default(),
        ]
    }));
    let skipped = usize::from(!with_namespace);
    let widths: Vec<usize> =
        (0..8).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).skip(skipped).map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn phase(status: &NodeImageBuildStatus) -> String {
    status.phase.map_or("Pending".to_owned(), |phase| format!("{phase:?}"))
}

/// Everything that is worth knowing about one build.
pub(super) fn summary(build: &NodeImageBuild, now: Timestamp) -> String {
    let status = build.status.clone().unwrap_or_default();
    let mut lines =
        vec![("", format!("{}/{}: {}", build.namespace().unwrap_or_default(), build.name_any(), phase(&status)))];
    let provider = status.provider.map_or(String::new(), |provider| format!(" for {provider}"));
    lines.push(("system", format!("{} {}{provider}", build.spec.os.name, build.spec.os.version)));
    if let Some(release) = &status.release {
        let text = format!(
            "{} of EKS Anywhere {} ({})",
            release.kubernetes_version, release.eksa_release, release.eksd_release
        );
        lines.push(("Kubernetes", text));
    }
    if let Some(id) = &status.build_id {
        let since =
            status.start_time.as_ref().map_or(String::new(), |time| format!(", started {} ago", age(time.0, now)));
        let trigger = status.trigger.as_ref().map_or(String::new(), |trigger| format!(", because of: {trigger}"));
        lines.push(("build", format!("{id}, attempt {}{since}{trigger}", status.attempts.unwrap_or(1))));
    }
    if let Some(progress) = &status.progress {
        lines.push(("progress", format!("{} % {}: {}", progress.percent, progress.stage, progress.message)));
    }
    if let Some(image) = status.image_url.as_ref().or(status.image.as_ref().map(|image| &image.name)) {
        lines.push(("image", image.clone()));
    }
    if let Some(image) = &status.image {
        lines.push(("sha256", image.sha256.clone()));
    }
    if let Some(verification) = &status.verification {
        lines.push(("verified", verification.clone()));
    }
    if let Some(next) = &status.next_scheduled_time {
        lines.push(("next build", next.0.to_string()));
    }
    for condition in &status.conditions {
        // What is said of an image that is there stands above.
        if condition.type_ != READY || status.phase != Some(Phase::Ready) {
            lines.push((
                "",
                format!("{}={} {}: {}", condition.type_, condition.status, condition.reason, condition.message),
            ));
        }
    }
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a string can not fail.
        let _ = if name.is_empty() { writeln!(text, "{value}") } else { writeln!(text, "  {name:10}  {value}") };
        text
    })
}

/// How a build ended, if the status speaks of what the resource asks for now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum End {
    Ready,
    Suspended,
    /// Somebody has to act; the exit code of the failure's class.
    Stalled(u8),
}

/// Whether nothing more happens.
pub(super) fn end(build: &NodeImageBuild) -> Option<End> {
    let status = build.status.as_ref()?;
    let token = build.annotations().get(crate::api::v1alpha1::REBUILD_ANNOTATION);
    let answered = token.is_none() || token == status.last_rebuild_token.as_ref();
    if status.observed_generation != build.metadata.generation {
        return None;
    }
    let is = |kind: &str| status.conditions.iter().any(|one| one.type_ == kind && one.status == "True");
    if status.phase == Some(Phase::Suspended) {
        return Some(End::Suspended);
    }
    if is(STALLED) {
        // A failure before a build starts answers every wish.
        let code = status.failure.as_ref().map_or(1, |failure| failure.class.exit_code());
        return (answered || status.build_id.is_none()).then_some(End::Stalled(code));
    }
    (answered && is(READY)).then_some(End::Ready)
}

/// `90s`, `5m`, `3h`, `2d`, as kubectl writes ages.
fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A line of a build's log: JSON as its message with its fields, everything else as it is.
pub(super) fn log_line(line: &str) -> String {
    let Ok(Value::Object(fields)) = serde_json::from_str(line) else { return line.to_owned() };
    let text = |key: &str| fields.get(key).and_then(Value::as_str);
    let (Some(level), Some(message)) = (text("level"), text("message")) else { return line.to_owned() };
    let others = fields.iter().filter(|(key, _)| !["level", "message", "timestamp", "target"].contains(&key.as_str()));
    others.fold(format!("{level:5} {message}"), |mut line, (key, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        // Writing to a string can not fail.
        let _ = write!(line, " {key}={value}");
        line
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn build(status: Value, more: Value) -> NodeImageBuild {
        let Value::Object(more) = more else { panic!("not an object") };
        let mut metadata = json!({
            "name": "golden", "namespace": "images", "generation": 2, "creationTimestamp": "2026-01-01T00:00:00Z",
        });
        metadata.as_object_mut().unwrap().extend(more);
        let mut build = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild", "metadata": metadata,
            "spec": { "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {} },
        });
        build["status"] = status;
        serde_json::from_value(build).unwrap()
    }

    fn now() -> Timestamp {
        "2026-01-01T03:00:00Z".parse().unwrap()
    }

    fn condition(kind: &str) -> Value {
        json!([{ "type": kind, "status": "True", "reason": "R", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z" }])
    }

    #[test]
    fn table_has_a_line_for_each_build_with_equal_columns() {
        let progress = json!({ "stage": "Install", "percent": 42, "message": "packages" });
        let builds = [
            build(json!({ "phase": "Building", "progress": progress }), json!({})),
            build(json!({ "phase": "Ready", "imageURL": "http://images/x.gz" }), json!({ "name": "a-longer-name" })),
        ];
        let expected = "\
NAME           OS            CHANNEL  PHASE     DONE  AGE  IMAGE
golden         ubuntu 22.04  1-31     Building  42 %  3h
a-longer-name  ubuntu 22.04  1-31     Ready           3h   http://images/x.gz
";
        assert_eq!(table(&builds, false, now()), expected);
        assert!(table(&builds, true, now()).starts_with("NAMESPACE  NAME "));
    }

    #[rstest]
    #[case::not_seen(json!({ "observedGeneration": 1, "conditions": condition("Ready") }), json!({}), None)]
    #[case::builds(json!({ "observedGeneration": 2, "conditions": condition("Reconciling") }), json!({}), None)]
    #[case::ready(json!({ "observedGeneration": 2, "conditions": condition("Ready") }), json!({}), Some(End::Ready))]
    #[case::asked_again(
        json!({ "observedGeneration": 2, "conditions": condition("Ready"), "lastRebuildToken": "1" }),
        json!({ "annotations": { "nodeimagebuild.dev/rebuild": "2" } }),
        None
    )]
    #[case::answered(
        json!({ "observedGeneration": 2, "conditions": condition("Ready"), "lastRebuildToken": "2" }),
        json!({ "annotations": { "nodeimagebuild.dev/rebuild": "2" } }),
        Some(End::Ready)
    )]
    #[case::stalled(
        json!({
            "observedGeneration": 2, "conditions": condition("Stalled"),
            "failure": { "class": "BadInput", "reason": "R", "message": "m" },
        }),
        json!({}),
        Some(End::Stalled(65))
    )]
    #[case::suspended(json!({ "observedGeneration": 2, "phase": "Suspended" }), json!({}), Some(End::Suspended))]
    fn end_is_that_of_what_the_resource_asks_for(
        #[case] status: Value,
        #[case] meta: Value,
        #[case] expected: Option<End>,
    ) {
        assert_eq!(end(&build(status, meta)), expected);
    }

    #[test]
    fn log_lines_are_read_by_people() {
        let json = r#"{"timestamp":"t","level":"WARN","message":"slow","target":"x","seconds":3,"url":"http://x"}"#;
        assert_eq!(log_line(json), "WARN  slow seconds=3 url=http://x");
        assert_eq!(log_line("Setting up jq"), "Setting up jq");
        assert_eq!(log_line(r#"{"other": 1}"#), r#"{"other": 1}"#);
    }
}
