//! The Helm chart: it lints, renders valid objects for every values file in `ci/`, and says what a user must still set.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use node_image_builder::{api::v1alpha1::NodeImageBuild, device_plugin::RESOURCE};
use serde_json::{Value, json};

use crate::support::chart::{KUBERNETES, chart, helm, of_kind, template};

/// Every combination of values that is tested.
pub fn values_files() -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(chart().join("ci")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/values.yaml"));
    assert!(files.len() > 3);
    files
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

/// The keys of the values.
fn keys(values: &Value, path: &str, found: &mut Vec<String>) {
    for (key, value) in values.as_object().into_iter().flatten() {
        let path = format!("{path}.{key}");
        keys(value, &path, found);
        found.push(path);
    }
}

/// The keys that the schema knows.
fn schema_keys(schema: &Value, path: &str, found: &mut Vec<String>) {
    if !schema["properties"].is_object() {
        return;
    }
    assert_eq!(schema["additionalProperties"], false, "{path} lets misspelt keys pass");
    for (key, schema) in schema["properties"].as_object().unwrap() {
        let path = format!("{path}.{key}");
        let kind = ["type", "enum"].iter().any(|word| !schema[word].is_null());
        assert!(kind, "the schema does not say what {path} is");
        schema_keys(schema, &path, found);
        found.push(path);
    }
}

#[test]
fn schema_and_values_have_the_same_keys() {
    let read =
        |file: &str| -> Value { serde_saphyr::from_str(&fs::read_to_string(chart().join(file)).unwrap()).unwrap() };
    let (mut of_values, mut of_schema) = (vec![], vec![]);
    schema_keys(&read("values.schema.json"), "", &mut of_schema);
    keys(&read("values.yaml"), "", &mut of_values);
    // Below these stands whatever Kubernetes takes there. `global` is helm's own.
    let free = |path: &&String| {
        let parent = path.rsplit_once('.').unwrap().0;
        !["requests", "limits", "labels", "nodeSelector", "annotations"].iter().any(|name| parent.ends_with(name))
            && *path != ".global"
    };
    let mut of_values: Vec<_> = of_values.iter().filter(free).collect();
    let mut of_schema: Vec<_> = of_schema.iter().filter(free).collect();
    of_values.sort();
    of_schema.sort();
    assert_eq!(of_values, of_schema);
}

#[test]
fn what_is_extra_is_off_by_default() {
    let objects = template(&chart().join("ci/minimal.yaml")).unwrap();
    let everything = template(&chart().join("ci/everything.yaml")).unwrap();
    for kind in ["NetworkPolicy", "ServiceMonitor", "PrometheusRule", "ConfigMap", "ResourceQuota", "PodMonitor"] {
        assert!(of_kind(&objects, kind).is_empty(), "{kind}");
        assert_eq!(of_kind(&everything, kind).is_empty(), kind == "PodMonitor", "{kind}");
    }
    let spread = &operator(&everything)["spec"]["template"]["spec"]["topologySpreadConstraints"];
    assert_eq!(spread[0]["topologyKey"], "topology.kubernetes.io/zone");
    let image = &environment(&everything)["IMAGE_BUILDER_BUILDER_IMAGE"];
    assert!(image.ends_with(&format!("builder@sha256:{}", "1".repeat(64))), "{image}");
}

#[test]
fn a_namespaced_operator_gets_no_cluster_role() {
    let objects = template(&chart().join("ci/one-namespace.yaml")).unwrap();
    assert!(of_kind(&objects, "ClusterRole").is_empty() && of_kind(&objects, "ClusterRoleBinding").is_empty());
    let gitops = template(&chart().join("ci/gitops.yaml")).unwrap();
    let [clusters] = &of_kind(&gitops, "ClusterRole")[..] else { panic!("{gitops:#?}") };
    assert_eq!(clusters["rules"].as_array().unwrap().len(), 1, "readClusters gives nothing but that");
    assert_eq!(clusters["rules"][0]["verbs"], json!(["list"]));
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
fn the_device_plugin_may_label_nodes_and_builds_ask_for_its_device() {
    let without = template(&chart().join("ci/minimal.yaml")).unwrap();
    assert!(of_kind(&without, "DaemonSet").is_empty());
    assert!(!environment(&without).contains_key("IMAGE_BUILDER_KVM_RESOURCE"));
    let elsewhere = template(&chart().join("ci/one-namespace.yaml")).unwrap();
    assert_eq!(environment(&elsewhere)["IMAGE_BUILDER_KVM_RESOURCE"], "devices.kubevirt.io/kvm");

    let with = template(&chart().join("ci/everything.yaml")).unwrap();
    assert_eq!(environment(&with)["IMAGE_BUILDER_KVM_RESOURCE"], RESOURCE);
    for (objects, wanted) in [(&without, None), (&with, Some("true"))] {
        let set = environment(objects).get("IMAGE_BUILDER_BUILDER_USER_NAMESPACES").cloned();
        assert_eq!(set.as_deref(), wanted);
    }
    let [plugin] = &of_kind(&with, "DaemonSet")[..] else { panic!("{with:#?}") };
    let pod = &plugin["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], environment(&with)["IMAGE_BUILDER_BUILDER_IMAGE"], "the image with QEMU");
    assert_eq!(pod["volumes"][0]["hostPath"]["path"], "/data/kubelet/device-plugins");
    let account = pod["serviceAccountName"].as_str().unwrap();
    let bindings = of_kind(&with, "ClusterRoleBinding");
    let bound = |binding: &&&Value| binding["subjects"][0]["name"] == account;
    let binding = bindings.iter().find(bound).unwrap();
    let roles = of_kind(&with, "ClusterRole");
    let role = roles.iter().find(|role| role["metadata"]["name"] == binding["roleRef"]["name"]).unwrap();
    assert_eq!(role["rules"], json!([{ "apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"] }]));
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
