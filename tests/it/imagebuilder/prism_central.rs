//! Packer in Prism Central: a present Packer with Nutanix's own plugin makes a machine of a disk there, Ansible works in the
//! machine that answers at its address, and the disk comes back and is published as every image is.
//!
//! Debian's Packer 1.6 can not run that plugin, and nothing else can be had from package registries. With `NIB_PACKER`, a home
//! directory with `.local/bin/packer` and the plugins `nutanix` and `ansible` where Packer looks for them, these tests run;
//! without it they say that they are left out, and `nutanix::packer` has what is checked without Packer.

use std::{fs, path::PathBuf, process::Command};

use node_image_builder::contract::{BuildReport, ProviderTarget};
use serde_json::{Value, json};

use super::site::{self, MACHINE, Run, is_root, processes, sha256};
use crate::nutanix::{Lab, NAME, prism};

/// Says where the machine answers.
const VARS: &str = "packer/nutanix/ubuntu-2204.json";
const GIB: u64 = 1 << 30;

/// A Prism Central, and the machine that answers for those in it.
struct Surroundings {
    lab: Lab,
    site: site::Site,
}

impl Surroundings {
    async fn new() -> Option<Self> {
        if site::packer_home().is_none() || !is_root() {
            tracing::info!("skipped: NIB_PACKER names no home of a Packer with Nutanix's plugin, or this is not root");
            return None;
        }
        let (lab, site) = (Lab::new().await, site::Site::new().await);
        lab.prism.set_guest("127.0.0.1", site.guest.root().join("etc/halted"));
        Some(Self { lab, site })
    }

    fn disk(&self) -> PathBuf {
        self.site.directory.path().join("cloud.img")
    }

    fn document(&self) -> Value {
        let disk = self.disk();
        let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
        assert!(Command::new("qemu-img").args(arguments).args([&self.lab.disk(), &disk]).status().unwrap().success());
        let more = json!({
            "engine": {"imageBuilder": {"timeoutSeconds": 300}},
            "base": {"prismImage": "cloud"},
        });
        self.lab.prism.add_disk("cloud", &disk);
        let target = ProviderTarget::Nutanix(self.lab.target.clone());
        self.site.document(&self.lab.request, target, self.lab.prism.authority.as_bytes(), more)
    }

    fn start(&self, document: &Value) -> Run {
        self.site.run(document, VARS)
    }

    /// The password that cloud-init gives the account in the machine.
    fn password(&self) -> String {
        let [told] = &self.lab.prism.user_data()[..] else {
            panic!("not one machine: {:?}", self.lab.prism.machines())
        };
        told.lines().find_map(|line| line.trim().strip_prefix("builder:")).unwrap().to_owned()
    }

    /// Names of images that the build made.
    fn images(&self) -> Vec<String> {
        self.lab.prism.names().into_iter().filter(|name| name != "cloud").collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_of_a_cloud_image_becomes_the_same_kind_of_image_as_by_the_other_engine() {
    let Some(site) = Surroundings::new().await else { return };
    let document = site.document();
    let mut run = site.start(&document);
    let mut stages = run.follow(Some("Waiting for SSH"));
    assert_eq!(site.lab.prism.machines(), [MACHINE], "{}", site.site.log());
    let password = site.password();
    site.site.guest.set_password(&password);
    stages.extend(run.follow(Some("List the packages")));
    for secret in [prism::PASSWORD, &password] {
        assert_eq!(processes(secret), [""; 0]);
    }
    stages.extend(run.follow(None));
    stages.dedup();
    let (code, report) = run.end();
    let BuildReport::Succeeded(outcome) = report else { panic!("{code:?} {report:?}\n{}", site.site.log()) };
    assert_eq!(stages, ["Prepare", "Fetch", "Install", "Seal", "Assemble", "Publish"]);

    assert_eq!(site.lab.prism.machines(), [""; 0], "Packer's machine is left");
    assert_eq!(site.images(), [NAME]);
    assert_eq!(outcome.image.name, NAME);
    let uuid = outcome.image.uuid.unwrap();
    let image = site.lab.prism.image(&uuid);
    assert_eq!(image["metadata"]["categories"], json!({"Environment": "Production"}));
    assert_eq!(image["status"]["resources"]["size_bytes"], GIB);
    // The machine's disk is what it was made from, extended; nothing wrote to it.
    let raw = site.site.directory.path().join("raw");
    let convert = ["convert", "-O", "raw"];
    let file = site.lab.prism.file(&uuid);
    assert!(Command::new("qemu-img").args(convert).args([&file, &raw]).status().unwrap().success());
    let (arrived, mut began) = (fs::read(raw).unwrap(), fs::read(site.lab.disk()).unwrap());
    began.resize(arrived.len(), 0);
    assert!(sha256(&arrived) == sha256(&began), "another disk arrived");
    site.site.assert_installed();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_is_stopped_or_killed_leaves_no_machine_and_no_image() {
    let Some(site) = Surroundings::new().await else { return };
    let document = site.document();
    let mut stopped = site.start(&document);
    stopped.follow(Some("Waiting for SSH"));
    assert_eq!(site.lab.prism.machines(), [MACHINE]);
    stopped.stop();
    assert_eq!((site.lab.prism.machines().len(), site.images().len()), (0, 0));

    let mut killed = site.start(&document);
    killed.follow(Some("Waiting for SSH"));
    killed.kill();
    assert_eq!(site.lab.prism.machines(), [MACHINE], "nothing was left to clean up");
    let output = site.site.clean_up();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((site.lab.prism.machines().len(), site.images().len()), (0, 0));
}
