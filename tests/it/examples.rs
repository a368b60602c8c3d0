//! Every file in `examples/` is accepted as a user applies it.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use node_image_builder::api::v1alpha1::NodeImageBuild;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::apiserver;

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn kubectl_applies_each_example_without_a_warning() {
    let client = apiserver::client().await;
    let kubectl = Path::new(&env::var_os("KUBEBUILDER_ASSETS").unwrap()).join("kubectl");
    let kubeconfig: Value = serde_json::from_slice(&fs::read(apiserver::kubeconfig().await).unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut files = files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"));
    files.sort();
    assert!(!files.is_empty(), "there are no examples");
    for file in files {
        // The context's namespace is for objects that name none.
        let mut kubeconfig = kubeconfig.clone();
        kubeconfig["contexts"][0]["context"]["namespace"] = json!(apiserver::namespace(&client, "example").await);
        let config = scratch.path().join("kubeconfig");
        fs::write(&config, kubeconfig.to_string()).unwrap();
        let output = Command::new(&kubectl)
            .args(["apply", "--server-side", "--validate=strict", "--output=json", "--filename"])
            .arg(&file)
            .env("KUBECONFIG", config)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", file.display());

        let applied: Value = serde_json::from_slice(&output.stdout).unwrap();
        let objects = applied["items"].as_array().cloned().unwrap_or_else(|| vec![applied]);
        let builds: Vec<_> = objects.iter().filter(|object| object["kind"] == "NodeImageBuild").collect();
        assert!(!builds.is_empty(), "{} has no NodeImageBuild", file.display());
        for build in builds {
            // The controller can read it, and the Secrets it names are there.
            let typed: NodeImageBuild = serde_json::from_value(build.clone()).unwrap();
            let secrets: Api<Secret> = Api::namespaced(client.clone(), &typed.metadata.namespace.unwrap());
            for name in secret_names(&build["spec"]) {
                let secret = secrets.get_opt(&name).await.unwrap();
                assert!(secret.is_some(), "{} names the Secret {name} and does not hold it", file.display());
            }
        }
    }
}

fn secret_names(value: &Value) -> Vec<String> {
    let Some(fields) = value.as_object() else {
        return value.as_array().into_iter().flatten().flat_map(secret_names).collect();
    };
    fields
        .iter()
        .flat_map(|(key, value)| match (key.to_lowercase().contains("secret"), value["name"].as_str()) {
            (true, Some(name)) => vec![name.to_owned()],
            _ => secret_names(value),
        })
        .collect()
}
