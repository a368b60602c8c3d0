//! govmomi's vCenter simulator (`dev/vcsim`), one process a test.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
};

use serde::Deserialize;
use serde_json::{Value, json};

/// What the simulator accepts.
pub const USERNAME: &str = "builder@vsphere.local";
pub const PASSWORD: &str = "vcsim-password";

/// A running vCenter; it ends with this.
pub struct Vcenter {
    process: Child,
    /// The process ends when this closes.
    stdin: Option<ChildStdin>,
    /// `127.0.0.1:<port>`.
    pub server: String,
    client: reqwest::Client,
    directory: tempfile::TempDir,
}

/// Everything that is there, as govmomi's own client sees it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Inventory {
    pub objects: Vec<Object>,
    pub machines: Option<Vec<Machine>>,
    pub categories: Option<Vec<Category>>,
    pub libraries: Option<Vec<Library>>,
    pub sessions: usize,
    pub tokens: usize,
    pub leases: usize,
    pub calls: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Object {
    pub r#type: String,
    pub path: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    pub path: String,
    pub moref: String,
    #[serde(rename = "instanceUUID")]
    pub instance_uuid: String,
    pub template: bool,
    pub version: String,
    pub guest: String,
    pub snapshots: Vec<String>,
    pub tags: Vec<String>,
    #[serde(rename = "diskKB")]
    pub disk_kb: Option<Vec<u64>>,
    pub thin: bool,
    pub controllers: Option<Vec<String>>,
    pub adapters: Option<Vec<String>>,
    pub networks: Vec<String>,
    pub datastores: Vec<String>,
    pub properties: BTreeMap<String, String>,
    pub uploaded: Option<BTreeMap<String, u64>>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Category {
    pub name: String,
    pub cardinality: String,
    pub types: Vec<String>,
    pub tags: Vec<String>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Library {
    pub name: String,
    pub items: Vec<Item>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Item {
    pub name: String,
    pub r#type: String,
    pub description: String,
    pub files: BTreeMap<String, u64>,
}

impl Vcenter {
    pub async fn start(options: &[&str]) -> Self {
        crate::support::install_crypto();
        let directory = tempfile::tempdir().unwrap();
        let (authority, disks) = (directory.path().join("authority.pem"), directory.path().join("disks"));
        std::fs::create_dir(&disks).unwrap();
        let mut process = Command::new(program())
            .args(["-username", USERNAME, "-password", PASSWORD])
            .arg("-authority")
            .arg(&authority)
            .arg("-disks")
            .arg(&disks)
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("vcsim is built by dev/programs");
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().unwrap();
        let url = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            line
        });
        let url = url.await.unwrap();
        let server = url.trim().strip_prefix("https://").expect("vcsim prints its URL").to_owned();
        let authority = reqwest::Certificate::from_pem(&std::fs::read(&authority).unwrap()).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([authority]).build().unwrap();
        Self { process, stdin, server, client, directory }
    }

    pub fn authority(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("authority.pem")).unwrap()
    }

    /// The disk that was uploaded for a machine.
    pub fn disk(&self, machine: &str) -> PathBuf {
        let disks: Vec<_> =
            std::fs::read_dir(self.directory.path().join("disks")).unwrap().map(|e| e.unwrap()).collect();
        let of_machine = |name: &Path| name.to_string_lossy().starts_with(&format!("{machine}-"));
        let found: Vec<_> = disks.iter().filter(|disk| of_machine(Path::new(&disk.file_name()))).collect();
        assert_eq!(found.len(), 1, "disks of {machine} among {disks:?}");
        found[0].path()
    }

    pub async fn inventory(&self) -> Inventory {
        let response = self.client.get(format!("https://{}/vcsim/inventory", self.server)).send().await.unwrap();
        let text = response.text().await.unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    fn file_url(&self, file: &str) -> String {
        format!("https://{}/folder/{file}?dcPath=DC0&dsName=LocalDS_0", self.server)
    }

    /// Puts a file into the datastore `LocalDS_0`.
    pub async fn put_file(&self, file: &str) {
        let response = self.client.put(self.file_url(file)).body("contents").send().await.unwrap();
        assert!(response.status().is_success(), "{}", response.status());
    }

    pub async fn has_file(&self, file: &str) -> bool {
        self.client.get(self.file_url(file)).send().await.unwrap().status().is_success()
    }

    /// How often each method was called.
    pub async fn calls(&self) -> BTreeMap<String, usize> {
        let response = self.client.get(format!("https://{}/vcsim/calls", self.server)).send().await.unwrap();
        response.json().await.unwrap()
    }

    pub async fn control(&self, what: &str, body: Value) {
        let url = format!("https://{}/vcsim/{what}", self.server);
        let response = self.client.post(url).json(&body).send().await.unwrap();
        let status = response.status();
        assert!(status.is_success(), "{status}: {}", response.text().await.unwrap());
    }

    /// Calls of `method` fail `count` times (0: always).
    pub async fn fault(&self, method: &str, fault: &str, count: u32) {
        self.control("fault", json!({"method": method, "fault": fault, "count": count})).await;
    }
}

impl Drop for Vcenter {
    fn drop(&mut self) {
        // It removes its datastores when its input ends.
        drop(self.stdin.take());
        let _ = self.process.wait();
    }
}

impl Inventory {
    /// Everything that an image could leave behind.
    pub fn contents(&self) -> (Vec<Object>, Vec<Machine>, Vec<Library>) {
        let (machines, libraries) = (self.machines.clone(), self.libraries.clone());
        (self.objects.clone(), machines.unwrap_or_default(), libraries.unwrap_or_default())
    }

    pub fn machine(&self, path: &str) -> &Machine {
        let machines = self.machines.as_deref().unwrap_or_default();
        machines.iter().find(|machine| machine.path == path).unwrap_or_else(|| panic!("no {path} among {machines:?}"))
    }
}

fn program() -> PathBuf {
    match std::env::var_os("NIB_VCSIM") {
        Some(path) => path.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/node-image-builder/bin/vcsim"),
    }
}
