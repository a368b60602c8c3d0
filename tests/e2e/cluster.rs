//! What every test needs of the cluster: a namespace of its own, builds in it, waiting for what their status says.

use std::{
    env,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Event, Namespace, Pod, Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams},
};
use kube_runtime::{WatchStreamExt, watcher};
use node_image_builder::api::v1alpha1::NodeImageBuild;
use serde_json::{Value, json};

/// Where the chart is installed.
pub const SYSTEM: &str = "node-image-builder";

/// What the status says of an image for bare metal that is published at one place, whatever made it.
pub const IMAGE_FIELDS: [&str; 7] = ["format", "name", "provenanceURL", "sbomURL", "sha256", "size", "virtualSize"];

/// A value that `dev/e2e` hands over.
pub fn setting(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the end-to-end tests by `make e2e`"))
}

/// Values that the chart is installed with beside those of the development cluster, until this is dropped.
pub struct ChartValues;

impl ChartValues {
    pub fn set(values: &[&str]) -> Self {
        upgrade(values);
        Self
    }
}

impl Drop for ChartValues {
    fn drop(&mut self) {
        upgrade(&[]);
    }
}

fn upgrade(values: &[&str]) {
    let output = Command::new("helm")
        .args(["upgrade", "node-image-builder", "charts/node-image-builder", "--namespace", SYSTEM])
        .args(["--values", "dev/values.yaml", "--set", &values.join(","), "--wait", "--timeout", "3m"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A namespace that may run build pods; deleted with everything in it by [`TestNamespace::delete`].
pub struct TestNamespace {
    pub client: Client,
    pub name: String,
}

impl TestNamespace {
    pub async fn create(purpose: &str) -> Self {
        Self::create_with_level(purpose, "privileged").await
    }

    /// A namespace with a Pod Security level.
    pub async fn create_with_level(purpose: &str, level: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::try_default().await.unwrap();
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let namespace = serde_json::from_value(json!({"metadata": {
            "generateName": format!("e2e-{purpose}-"),
            "labels": {"pod-security.kubernetes.io/enforce": level},
        }}))
        .unwrap();
        let name = namespaces.create(&PostParams::default(), &namespace).await.unwrap().name_any();
        Self { client, name }
    }

    pub fn builds(&self) -> Api<NodeImageBuild> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Applies a build; `spec` as JSON, so that a test reads like a manifest.
    pub async fn apply(&self, name: &str, spec: Value) -> NodeImageBuild {
        let build = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1",
            "kind": "NodeImageBuild",
            "metadata": {"name": name},
            "spec": spec,
        });
        self.builds().patch(name, &PatchParams::apply("e2e").force(), &Patch::Apply(build)).await.unwrap()
    }

    pub async fn apply_secret(&self, name: &str, values: Value) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.name);
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values});
        secrets.patch(name, &PatchParams::apply("e2e").force(), &Patch::Apply(secret)).await.unwrap();
    }

    /// Follows the build until `wanted` answers for a state that belongs to the build's current generation. `seen` gets
    /// every state on the way.
    pub async fn wait<T>(
        &self,
        name: &str,
        limit: Duration,
        what: &str,
        mut wanted: impl FnMut(&NodeImageBuild) -> Option<T>,
    ) -> T {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut states = watcher(self.builds(), config).default_backoff().applied_objects().boxed();
        let mut last = None;
        let search = async {
            while let Some(build) = states.try_next().await.unwrap_or_default() {
                let answer = wanted(&build);
                last = Some(build);
                if let Some(answer) = answer {
                    return answer;
                }
            }
            panic!("the watch on {name} ended");
        };
        let Ok(answer) = tokio::time::timeout(limit, search).await else {
            let status = last.map(|build| serde_json::to_string_pretty(&build.status).unwrap()).unwrap_or_default();
            panic!("{name} was not {what} within {} s; its last status: {status}", limit.as_secs());
        };
        answer
    }

    pub async fn wait_ready(&self, name: &str, limit: Duration) -> NodeImageBuild {
        self.wait(name, limit, "Ready", |build| {
            if let Some(stalled) = condition(build, "Stalled").filter(|stalled| stalled["status"] == "True") {
                panic!("{name} stalled: {stalled}");
            }
            (is_current(build) && is(build, "Ready")).then(|| build.clone())
        })
        .await
    }

    /// The build's failure once it is final.
    pub async fn wait_stalled(&self, name: &str, limit: Duration) -> NodeImageBuild {
        self.wait(name, limit, "Stalled", |build| (is_current(build) && is(build, "Stalled")).then(|| build.clone()))
            .await
    }

    pub async fn pods(&self) -> Vec<Pod> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.name);
        pods.list(&ListParams::default()).await.unwrap().items
    }

    /// Deletes a build and waits until it and all that belonged to it are gone.
    pub async fn delete_build(&self, name: &str) {
        self.builds().delete(name, &DeleteParams::default()).await.unwrap();
        until(Duration::from_secs(120), "the build and all its objects are gone", async || {
            let gone = self.builds().get_opt(name).await.unwrap().is_none();
            gone && self.pods().await.is_empty() && self.leftovers().await.is_empty()
        })
        .await;
    }

    /// Jobs and Secrets of builds that are still there.
    pub async fn leftovers(&self) -> Vec<String> {
        let params = ListParams::default().labels("nodeimagebuild.dev/name");
        let jobs: Api<k8s_openapi::api::batch::v1::Job> = Api::namespaced(self.client.clone(), &self.name);
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.name);
        let jobs = jobs.list(&params).await.unwrap().items.into_iter().map(|job| format!("job/{}", job.name_any()));
        let secrets = secrets.list(&params).await.unwrap().items;
        jobs.chain(secrets.into_iter().map(|secret| format!("secret/{}", secret.name_any()))).collect()
    }

    /// Events about the build: `reason: note`.
    pub async fn events(&self, name: &str) -> Vec<String> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.name);
        let params = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let events = events.list(&params).await.unwrap().items;
        events
            .into_iter()
            .map(|event| format!("{}: {}", event.reason.unwrap_or_default(), event.message.unwrap_or_default()))
            .collect()
    }

    /// Everything a reader of this namespace and of the operator's can see, Secrets apart.
    pub async fn everything_readable(&self) -> String {
        let mut text = String::new();
        for namespace in [self.name.as_str(), SYSTEM] {
            let kinds = "nodeimagebuilds,jobs,pods,events,configmaps,deployments,services";
            text += &kubectl(&["get", kinds, "-n", namespace, "-o", "yaml"]);
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            for pod in pods.list(&ListParams::default()).await.unwrap() {
                if let Ok(log) = pods.logs(&pod.name_any(), &LogParams::default()).await {
                    let _ = writeln!(text, "{log}");
                }
            }
        }
        text
    }

    pub async fn delete(self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.delete(&self.name, &DeleteParams::default()).await.unwrap();
        until(Duration::from_secs(120), "the namespace is gone", async || {
            namespaces.get_opt(&self.name).await.unwrap().is_none()
        })
        .await;
    }
}

/// The status as JSON, the way a script reads it.
pub fn status(build: &NodeImageBuild) -> Value {
    serde_json::to_value(&build.status).unwrap()
}

pub fn condition(build: &NodeImageBuild, kind: &str) -> Option<Value> {
    let conditions = status(build)["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == kind)
}

pub fn is(build: &NodeImageBuild, kind: &str) -> bool {
    condition(build, kind).is_some_and(|condition| condition["status"] == "True")
}

/// Whether the status speaks of the spec as it is.
pub fn is_current(build: &NodeImageBuild) -> bool {
    status(build)["observedGeneration"] == json!(build.metadata.generation)
}

/// Asks until the answer is yes; fails after `limit`.
pub async fn until(limit: Duration, what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !ask().await {
        assert!(begin.elapsed() < limit, "not within {} s: {what}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Runs kubectl and gives its output.
pub fn kubectl(args: &[&str]) -> String {
    let output = Command::new("kubectl").args(args).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "kubectl {args:?}: {}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Boots a disk that was fetched back from where it was published, and has the image contract checked in it.
pub fn boot(disk: &Path, provider: &str) {
    let (raw, dir) = (disk.with_extension("exported"), disk.parent().unwrap());
    let converted = Command::new("qemu-img").args(["convert", "-O", "raw"]).args([disk, &raw]).status().unwrap();
    assert!(converted.success(), "qemu-img convert {}", disk.display());
    let booted = Command::new(setting("NIB_BINARY"))
        .args(["verify", "--os", "debian", "--os-version", "12", "--provider", provider, "--work-dir"])
        .args([dir, &raw])
        .status()
        .unwrap();
    assert!(booted.success(), "the image does not boot or does not keep its promises: {booted}");
}

/// Where the artifact server's volume is on this machine.
pub fn served_files() -> Vec<PathBuf> {
    let name = kubectl(&["get", "pvc", "-n", SYSTEM, "-o", "jsonpath={.items[0].spec.volumeName}"]);
    let volume: Value = serde_json::from_str(&kubectl(&["get", "pv", &name, "-o", "json"])).unwrap();
    let path = ["hostPath", "local"].iter().find_map(|kind| volume["spec"][kind]["path"].as_str()).unwrap();
    let mut files = vec![];
    let mut dirs = vec![PathBuf::from(path)];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { files.push(path) }
        }
    }
    files
}
