//! The Helm chart as `helm` renders it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

pub const KUBERNETES: &str = "1.34.4";

/// The chart's directory.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/node-image-builder")
}

pub fn helm(args: &[&str]) -> Output {
    Command::new("helm")
        .args(args)
        .output()
        .expect("helm is not in PATH: run the tests by `make unit`, which builds it")
}

/// The objects of the release `release` in the namespace `ns`, with the values of a file.
pub fn template(values: &Path) -> Result<Vec<Value>, String> {
    render("release", "ns", values, &[])
}

/// The objects of a release. `more` are further arguments of helm.
pub fn render(release: &str, namespace: &str, values: &Path, more: &[&str]) -> Result<Vec<Value>, String> {
    let (chart, values) = (chart(), values.to_str().unwrap());
    let chart = chart.to_str().unwrap();
    let args = ["template", release, chart, "--namespace", namespace, "--kube-version", KUBERNETES, "-f", values];
    let output = helm(&[&args, more].concat());
    if !output.status.success() {
        return Err(String::from_utf8(output.stderr).unwrap());
    }
    Ok(documents(&String::from_utf8(output.stdout).unwrap()))
}

/// The documents of a YAML stream that helm wrote.
pub fn documents(text: &str) -> Vec<Value> {
    let documents =
        text.split("\n---").filter(|part| part.lines().any(|line| !line.starts_with('#') && !line.trim().is_empty()));
    documents.map(|document| serde_saphyr::from_str(document.trim_start_matches("---")).unwrap()).collect()
}

pub fn of_kind<'v>(objects: &'v [Value], kind: &str) -> Vec<&'v Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}
