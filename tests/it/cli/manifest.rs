//! `manifest`: what it prints is what an API server takes, and passwords stand in Secrets alone.

use std::{env, fs, os::unix::fs::PermissionsExt, path::Path};

use node_image_builder::api::v1alpha1::NodeImageBuild;
use serde_json::{Value, json};
use tokio::process::Command;

use super::{image_builder, run, text};
use crate::support::apiserver;

fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The command line of a sample (see `samples.json`), whose files are written into `dir`.
fn arguments(sample: &Value, dir: &Path) -> Vec<String> {
    let at = |text: &str| text.replace("@DIR@", dir.to_str().unwrap());
    private(&dir.join("Example_tools.list"), "deb [trusted=yes] https://mirror.example.com/tools ./\n");
    fs::write(dir.join("tool"), [0, 159, 146, 150]).unwrap();
    fs::write(dir.join("motd"), "# welcome: 'all'\n\ttwo lines\n").unwrap();
    let entry = |name: &str| json!({ "src": at("@DIR@/") + name, "dest": format!("/opt/{name}"), "mode": 755 });
    fs::write(dir.join("files.json"), json!({ "additional_files_list": [entry("motd"), entry("tool")] }).to_string())
        .unwrap();
    let mut line = at(sample["arguments"].as_str().unwrap());
    if let Some(config) = sample.get("config") {
        private(&dir.join("config.json"), &at(&config.to_string()));
        let hypervisor = line.split("--hypervisor ").nth(1).unwrap().split(' ').next().unwrap();
        line = format!("{line} --{hypervisor}-config config.json");
    }
    ["manifest"].into_iter().chain(line.split_whitespace()).map(ToOwned::to_owned).collect()
}

fn samples() -> Vec<Value> {
    serde_json::from_str(include_str!("samples.json")).unwrap()
}

#[tokio::test]
async fn an_api_server_takes_every_manifest_without_a_warning() {
    let client = apiserver::client().await;
    let kubectl = Path::new(&env::var_os("KUBEBUILDER_ASSETS").unwrap()).join("kubectl");
    let config = apiserver::kubeconfig().await;
    for sample in samples() {
        let dir = tempfile::tempdir().unwrap();
        let output = image_builder(dir.path()).args(arguments(&sample, dir.path())).output().await.unwrap();
        assert!(output.status.success(), "{sample}: {}", text(&output.stderr));
        let manifest = dir.path().join("manifest.yaml");
        fs::write(&manifest, &output.stdout).unwrap();
        let applied = Command::new(&kubectl)
            .args(["apply", "--server-side", "--validate=strict", "--output=json", "--filename"])
            .arg(&manifest)
            .args(["--namespace", &apiserver::namespace(&client, "manifest").await])
            .env("KUBECONFIG", &config)
            .output()
            .await
            .unwrap();
        let said = text(&applied.stderr);
        assert!(applied.status.success() && said.is_empty(), "{sample}: {said}\n{}", text(&output.stdout));
    }
}

#[tokio::test]
async fn sealed_manifests_hold_no_value_and_name_the_keys() {
    for sample in samples() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = image_builder(dir.path());
        let output = command.args(arguments(&sample, dir.path())).arg("--sealed").output().await.unwrap();
        let shown = text(&output.stdout);
        let build: NodeImageBuild = serde_saphyr::from_str(&shown).expect("one document");
        assert!(!shown.contains("kind: Secret"), "{shown}");
        let spec = serde_json::to_string(&build.spec).unwrap();
        for (role, keys) in [("vsphere", "username=FILE --from-file=password=FILE"), ("rhsm", "=FILE --from-file=")] {
            if spec.contains(&format!("-{role}\"")) {
                assert!(shown.contains(keys), "{shown}");
            }
        }
        let secrets = ["password", "rhel_password", "nutanix_password", "rhsm_activation_key", "rhsm_org_id"];
        for secret in secrets.iter().filter_map(|key| sample["config"][key].as_str()).filter(|value| !value.is_empty())
        {
            assert!(!shown.contains(secret) && !text(&output.stderr).contains(secret), "{shown}");
        }
    }
}

/// The values of the printed Secret.
async fn secret(dir: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Value, String> {
    let line = ["manifest", "--os=ubuntu", "--hypervisor=vsphere", "--vsphere-config=config.json"];
    let mut command = image_builder(dir);
    let output = command.args(line).args(arguments).envs(environment.iter().copied()).output().await.unwrap();
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(65));
        return Err(text(&output.stderr));
    }
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text(&output.stdout)).unwrap();
    Ok(documents[1]["stringData"].clone())
}

#[tokio::test]
async fn passwords_come_from_a_private_file_the_settings_or_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json!({ "vcenter_server": "vcenter.example.com", "datacenter": "dc1", "cluster": "c",
        "datastore": "d", "network": "n", "username": "of-the-settings" });
    let write = |config: &Value| private(&dir.path().join("config.json"), &config.to_string());
    write(&config);
    let environment =
        [("EKSA_VSPHERE_USERNAME", "of-the-environment"), ("EKSA_VSPHERE_PASSWORD", "word-of-environment")];
    let values = secret(dir.path(), &environment, &[]).await.unwrap();
    assert_eq!(values, json!({ "username": "of-the-settings", "password": "word-of-environment" }));

    private(&dir.path().join("logins.json"), &json!({ "password": "word-of-the-file" }).to_string());
    let values = secret(dir.path(), &environment, &["--credentials-file=logins.json"]).await.unwrap();
    assert_eq!(values, json!({ "username": "of-the-settings", "password": "word-of-the-file" }));

    let said = secret(dir.path(), &[], &[]).await.unwrap_err();
    assert!(said.contains("the value of `password`") && said.contains("--credentials-file"), "{said}");

    // The group may read it.
    fs::set_permissions(dir.path().join("logins.json"), fs::Permissions::from_mode(0o640)).unwrap();
    let said = secret(dir.path(), &[], &["--credentials-file=logins.json"]).await.unwrap_err();
    assert!(said.contains("mode 0640") && said.contains("chmod 600 logins.json"), "{said}");
    assert!(!said.contains("word-of-the-file"), "{said}");

    // Settings with a password that others may read are told, as scripts have them.
    config["password"] = json!("word-of-the-settings");
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::set_permissions(dir.path().join("config.json"), fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = image_builder(dir.path());
    command.args(["manifest", "--os=ubuntu", "--hypervisor=vsphere", "--vsphere-config=config.json"]);
    let said = text(&command.output().await.unwrap().stderr);
    assert!(said.contains("chmod 600 config.json") && !said.contains("word-of"), "{said}");
}

#[tokio::test]
async fn unknown_keys_and_settings_without_effect_are_told_on_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    private(&dir.path().join("c.json"), r#"{"disksize": "8192", "extra_rpms": "jq", "ssh_timeout": "40m"}"#);
    let line = ["manifest", "--os=ubuntu", "--hypervisor=baremetal", "--baremetal-config=c.json", "--builder=clone"];
    let output = run(dir.path(), &line).await;
    let said = text(&output.stderr);
    assert!(output.status.success());
    for expected in [
        "c.json: the key disksize is unknown and has no effect; did you mean disk_size?",
        "extra_rpms has no effect: it is for redhat",
        "ssh_timeout has no effect: this image is made without SSH",
        "--builder clone has no effect: it is for --hypervisor vsphere",
    ] {
        assert!(said.contains(expected), "{expected} is not in {said}");
    }
}

#[tokio::test]
async fn what_the_resource_can_not_say_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    private(&dir.path().join("c.json"), r#"{"http_proxy": "http://user:hunter2@proxy:3128"}"#);
    private(&dir.path().join("v.json"), r#"{"username": "u", "password": "p", "cluster": "c", "network": "n"}"#);
    private(&dir.path().join("a.json"), "{}");
    for (line, message) in [
        ("--hypervisor=baremetal --baremetal-config=c.json", "holds a user name and password"),
        ("--hypervisor=vsphere --vsphere-config=v.json", "the settings lack vcenter_server, datacenter, datastore"),
        ("--hypervisor=ami --ami-config=a.json", "--hypervisor ami is not supported"),
        ("--hypervisor=baremetal --os-version=20.04 --dev", "--os-version 20.04 is not supported"),
        ("--hypervisor=baremetal --baremetal-config=gone.json", "can not read gone.json"),
    ] {
        let arguments: Vec<_> = ["manifest", "--os=ubuntu"].into_iter().chain(line.split(' ')).collect();
        let output = run(dir.path(), &arguments).await;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(65), "{line}: {said}");
        assert!(said.contains(message) && !said.contains("hunter2"), "{line}: {said}");
        assert!(output.stdout.is_empty());
    }
}
