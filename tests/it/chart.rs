//! The Helm chart: it lints, renders valid objects for every values file in `ci/`, and says what a user must still set.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use node_image_builder::api::v1alpha1::NodeImageBuild;
use serde_json::{Value, json};

const KUBERNETES: &str = "1.34.4";

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/node-image-builder")
}

fn helm(args: &[&str]) -> Output {
    Command::new("helm")
        .args(args)
        .output()
        .expect("helm is not in PATH: run the tests by `make unit`, which builds it")
}

fn values_files() -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(chart().join("ci")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/values.yaml"));
    assert!(files.len() > 3);
    files
}

fn template(values: &Path) -> Result<Vec<Value>, String> {
    let (chart, values) = (chart(), values.to_str().unwrap());
    let args = [
        "template",
        "release",
        chart.to_str().unwrap(),
        "--namespace",
        "ns",
        "--kube-version",
        KUBERNETES,
        "-f",
        values,
    ];
    let output = helm(&args);
    if !output.status.success() {
        return Err(String::from_utf8(output.stderr).unwrap());
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let documents =
        text.split("\n---").filter(|part| part.lines().any(|line| !line.starts_with('#') && !line.trim().is_empty()));
    Ok(documents.map(|document| serde_saphyr::from_str(document.trim_start_matches("---")).unwrap()).collect())
}

fn of_kind<'v>(objects: &'v [Value], kind: &str) -> Vec<&'v Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

#[test]
fn lints_and_renders_valid_objects_for_every_values_file() {
    for values in values_files() {
        let name = values.display();
        let chart = chart();
        let lint = helm(&[
            "lint",
            "--strict",
            "--kube-version",
            KUBERNETES,
            "-f",
            values.to_str().unwrap(),
            chart.to_str().unwrap(),
        ]);
        assert!(lint.status.success(), "{name}: {}", String::from_utf8_lossy(&lint.stdout));
        let objects = template(&values).unwrap();
        for object in &objects {
            for field in ["apiVersion", "kind"] {
                assert!(object[field].is_string(), "{name}: {object}");
            }
            assert!(object["metadata"]["name"].is_string(), "{name}: {object}");
        }
        assert!(!of_kind(&objects, "Deployment").is_empty(), "{name}");
    }
}

#[test]
fn says_which_images_must_be_set() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let error = template(empty.path()).unwrap_err();
    assert!(error.contains("image.builder.repository") || error.contains("image.operator.repository"), "{error}");
}

#[test]
fn refuses_misspelt_values() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "artifactServer: {publicUrl: http://images.example.com}").unwrap();
    let error = template(file.path()).unwrap_err();
    assert!(error.contains("publicUrl"), "{error}");
}

#[test]
fn a_namespaced_operator_gets_no_cluster_role() {
    let objects = template(&chart().join("ci/one-namespace.yaml")).unwrap();
    assert!(of_kind(&objects, "ClusterRole").is_empty() && of_kind(&objects, "ClusterRoleBinding").is_empty());
    let roles = of_kind(&objects, "Role").into_iter().map(|role| role["metadata"]["namespace"].as_str().unwrap());
    assert_eq!(roles.collect::<Vec<_>>(), ["node-images", "ns"], "its work, and its lease where it runs");
}

#[test]
fn several_operators_share_a_lease_and_are_kept_apart() {
    let one = template(&chart().join("ci/minimal.yaml")).unwrap();
    let two = template(&chart().join("ci/one-namespace.yaml")).unwrap();
    assert!(of_kind(&one, "PodDisruptionBudget").is_empty());
    assert_eq!(of_kind(&two, "PodDisruptionBudget")[0]["spec"]["maxUnavailable"], 1);
    for (objects, replicas) in [(&one, 1), (&two, 2)] {
        let operator = operator(objects);
        assert_eq!(operator["spec"]["replicas"], replicas);
        // Whoever is upgraded to stands by before the other one ends.
        assert_eq!(operator["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"], 0);
        let lease = &environment(objects)["IMAGE_BUILDER_LEASE_NAME"];
        let roles = of_kind(objects, "Role");
        let role = roles.iter().find(|role| role["rules"][0]["resources"][0] == "leases").unwrap();
        assert_eq!(role["metadata"]["namespace"], "ns");
        assert_eq!(role["rules"][0]["verbs"], json!(["create"]));
        assert_eq!(
            (&role["rules"][1]["resourceNames"], &role["rules"][1]["verbs"]),
            (&json!([lease]), &json!(["get", "update"]))
        );
    }
}

fn operator(objects: &[Value]) -> &Value {
    let named = |deployment: &&Value| deployment["spec"]["template"]["spec"]["containers"][0]["name"] == "operator";
    of_kind(objects, "Deployment").into_iter().find(named).unwrap()
}

/// Environment of the operator, of the variables with a plain value.
fn environment(objects: &[Value]) -> BTreeMap<String, String> {
    let variables = operator(objects)["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
    let plain = variables.iter().filter_map(|one| Some((one["name"].as_str()?, one["value"].as_str()?)));
    plain.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn limits_and_times_reach_the_operator_and_no_limit_is_none() {
    let limited = environment(&template(&chart().join("ci/one-namespace.yaml")).unwrap());
    assert_eq!(limited["IMAGE_BUILDER_MAX_BUILDS"], "10");
    assert_eq!(limited["IMAGE_BUILDER_MAX_BUILDS_PER_SERVER"], "2");
    assert_eq!(limited["IMAGE_BUILDER_FINISHED_JOB_TTL"], "1h30m");
    let unlimited = environment(&template(&chart().join("ci/minimal.yaml")).unwrap());
    assert!(!unlimited.keys().any(|name| name.contains("MAX_BUILDS")), "{unlimited:?}");
    assert_eq!(unlimited["IMAGE_BUILDER_RELEASE_POLL_INTERVAL"], "15m");
}

#[test]
fn installs_the_definition_of_the_rust_types_and_keeps_it() {
    let objects = template(&chart().join("ci/minimal.yaml")).unwrap();
    let installed = of_kind(&objects, "CustomResourceDefinition")[0];
    assert_eq!(installed["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    let generated = serde_json::to_value(<NodeImageBuild as kube::CustomResourceExt>::crd()).unwrap();
    assert_eq!(
        installed["spec"]["versions"].as_array().map(Vec::len),
        generated["spec"]["versions"].as_array().map(Vec::len)
    );
    let copy = fs::read_to_string(chart().join("files/nodeimagebuilds.nodeimagebuild.dev.yaml")).unwrap();
    let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds/nodeimagebuilds.nodeimagebuild.dev.yaml");
    assert!(copy == fs::read_to_string(original).unwrap(), "the chart's copy of the CRD is stale: run `make crds`");
    let objects = template(&chart().join("ci/no-artifact-server.yaml")).unwrap();
    assert!(of_kind(&objects, "CustomResourceDefinition").is_empty());
}

#[test]
fn chart_and_crate_have_one_version() {
    let chart: Value = serde_saphyr::from_str(&fs::read_to_string(chart().join("Chart.yaml")).unwrap()).unwrap();
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn pods_pass_the_restricted_level() {
    let objects = template(&chart().join("ci/minimal.yaml")).unwrap();
    let deployments = of_kind(&objects, "Deployment");
    assert_eq!(deployments.len(), 2);
    for deployment in deployments {
        let pod = &deployment["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for container in pod["containers"].as_array().unwrap() {
            assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
            assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            assert!(container["livenessProbe"].is_object() && container["readinessProbe"].is_object());
        }
    }
}
