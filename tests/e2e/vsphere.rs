//! A template in vCenter: from `kubectl apply` to a tagged template whose disk boots by BIOS and that goes with its
//! resource, and a wrong name that is told before anything is built. vCenter is govmomi's simulator.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    cluster::{TestNamespace, boot, condition, setting, status},
    mirror::spec,
};

const LIMIT: Duration = Duration::from_secs(25 * 60);
pub const USERNAME: &str = "builder@vsphere.local";
/// The user's password, which must be found nowhere.
pub const PASSWORD: &str = "canary-51d0e7aa93";

/// A running vCenter; it ends with this.
pub struct Vcenter {
    process: Child,
    stdin: Option<ChildStdin>,
    pub server: String,
    disks: tempfile::TempDir,
}

impl Vcenter {
    /// One at this address of the machine.
    pub fn start_at(address: &str) -> Self {
        let disks = tempfile::tempdir().unwrap();
        let mut process = Command::new(setting("NIB_VCSIM"))
            .args(["-username", USERNAME, "-password", PASSWORD])
            .args(["-listen", &format!("{address}:0")])
            .arg("-disks")
            .arg(disks.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.split_whitespace().find(|word| word.starts_with("https://")).unwrap().to_owned();
        let server =
            url.trim_start_matches("https://").split('/').next().unwrap().rsplit('@').next().unwrap().to_owned();
        Self { process, stdin, server, disks }
    }
}

impl Vcenter {
    /// The machines that are there, as govmomi's own client sees them.
    pub async fn machines(&self) -> Vec<Value> {
        // Its certificate is made anew at each start.
        let client = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).build().unwrap();
        let answer = client.get(format!("https://{}/vcsim/inventory", self.server)).send().await.unwrap();
        let inventory: Value = answer.json().await.unwrap();
        inventory["machines"].as_array().cloned().unwrap_or_default()
    }

    /// The disk of a machine, as it was uploaded.
    fn disk(&self, moref: &str) -> PathBuf {
        let mut disks = std::fs::read_dir(self.disks.path()).unwrap().map(|entry| entry.unwrap().path());
        let of_machine = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{moref}-")))
        };
        disks.find(of_machine).unwrap_or_else(|| panic!("no disk of {moref} arrived"))
    }
}

impl Drop for Vcenter {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.process.wait();
    }
}

fn vsphere_spec(vcenter: &Vcenter) -> Value {
    let mut spec = spec();
    spec.as_object_mut().unwrap().remove("baremetal");
    spec["vsphere"] = json!({
        "server": vcenter.server,
        "credentialsSecretRef": {"name": "vcenter"},
        "insecure": true,
        "datacenter": "DC0",
        "cluster": "DC0_C0",
        "datastore": "LocalDS_0",
        "network": "VM Network",
        "folder": "templates",
        "createSnapshot": true,
    });
    // A software BIOS guest of a small disk, to end in time; the disk that vCenter has is booted, so the build does not.
    spec["diskSize"] = json!("6656Mi");
    spec["verify"] = json!({"boot": "Never"});
    spec["deletionPolicy"] = json!("Delete");
    spec
}

#[tokio::test]
async fn a_template_is_built_imported_tagged_booted_and_removed() {
    let vcenter = Vcenter::start_at(&setting("NIB_HOST_IP"));
    let namespace = TestNamespace::create("vsphere").await;
    namespace.apply_secret("vcenter", json!({"username": USERNAME, "password": PASSWORD})).await;

    // A name that vCenter does not know is told at once, with those that are like it.
    let mut wrong = vsphere_spec(&vcenter);
    wrong["vsphere"]["datastore"] = json!("LocalDS_9");
    namespace.apply("wrong-datastore", wrong).await;
    let build = namespace.wait_stalled("wrong-datastore", Duration::from_secs(120)).await;
    let message = condition(&build, "Stalled").unwrap()["message"].as_str().unwrap().to_owned();
    eprintln!("  wrong-datastore: {message}");
    assert!(message.contains("LocalDS_9") && message.contains("LocalDS_0"), "{message}");
    assert_eq!(status(&build)["failure"]["stage"], "Prepare");
    namespace.delete_build("wrong-datastore").await;

    namespace.apply("template", vsphere_spec(&vcenter)).await;
    let build = namespace.wait_ready("template", LIMIT).await;
    let status = status(&build);
    let name = status["image"]["name"].as_str().unwrap();
    assert!(name.starts_with("debian-12-kube-1-34-"), "{name}");
    assert!(status["image"]["inventoryPath"].as_str().unwrap().ends_with(name));
    assert!(status["image"]["moref"].is_string() && status["image"]["instanceUUID"].is_string());
    let machines = vcenter.machines().await;
    let [machine] = &machines[..] else { panic!("{machines:?}") };
    eprintln!("  the template in vCenter: {}", serde_json::to_string_pretty(machine).unwrap());
    assert_eq!(machine["path"], status["image"]["inventoryPath"]);
    assert_eq!(machine["template"], true);
    let tags: Vec<_> = machine["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap()).collect();
    assert!(matches!(tags[..], [eksd, "os/os:debian"] if eksd.starts_with("eksdRelease/eksdRelease:")), "{tags:?}");
    let readable = namespace.everything_readable().await;
    assert!(!readable.contains(PASSWORD), "the password can be read in the cluster");
    boot(&vcenter.disk(status["image"]["moref"].as_str().unwrap()), "vsphere");

    namespace.delete_build("template").await;
    assert_eq!(vcenter.machines().await, Vec::<Value>::new(), "a template stays that should go with its resource");
    namespace.delete().await;
}
