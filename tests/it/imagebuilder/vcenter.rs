//! Packer in vCenter: Debian's Packer 1.6 clones a template in the simulator, Ansible works in the machine that answers at the
//! clone's address, and the disk comes back and is published as every image is. Stopped or killed on the way, nothing is left.

use std::{fs, path::Path};

use node_image_builder::contract::{BuildReport, ProviderTarget};
use serde_json::{Value, json};

use super::{
    guest,
    site::{self, MACHINE, MEDIUM, Run, archive, is_root, processes, sha256},
};
use crate::vsphere::{Lab, NAME, peer};

const TEMPLATE: &str = "golden";
/// Says where the machine answers.
const VARS: &str = "packer/ova/ubuntu-2204.json";

/// A vCenter with a template, and the machine that a clone of it is.
struct Surroundings {
    lab: Lab,
    site: site::Site,
}

impl Surroundings {
    async fn new() -> Self {
        let mut lab = Lab::new(&[]).await;
        lab.target.template_name = TEMPLATE.into();
        lab.request = lab.another_build("aaaaaaaaaa");
        lab.publish().await.unwrap();
        lab.target.template_name = NAME.into();
        lab.request = lab.another_build("0123456789");
        fs::write(Path::new(&lab.target.slot.0).join("sshPassword"), guest::PASSWORD).unwrap();
        Self { lab, site: site::Site::new().await }
    }

    fn document(&self) -> Value {
        let template = format!("templates/{TEMPLATE}");
        let more = json!({
            "engine": {"imageBuilder": {"timeoutSeconds": 300, "template": template}},
            "base": null,
        });
        let target = ProviderTarget::Vsphere(self.lab.target.clone());
        self.site.document(&self.lab.request, target, &self.lab.vcenter.authority(), more)
    }

    /// A build in a clone of the template.
    fn start(&self) -> Run {
        self.site.run(&self.document(), VARS)
    }

    /// Names of machines, the template's left out.
    async fn machines(&self) -> Vec<String> {
        let machines = self.lab.vcenter.inventory().await.machines.unwrap();
        let names = machines.into_iter().map(|machine| machine.path.rsplit_once('/').unwrap().1.to_owned());
        names.filter(|name| name != TEMPLATE).collect()
    }
}

/// Needs root, as a build does; `make test` has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_of_a_template_becomes_the_same_kind_of_template_as_by_the_other_engine() {
    if !is_root() {
        return;
    }
    let site = Surroundings::new().await;
    let mut run = site.start();
    let mut stages = run.follow(Some("List the packages"));
    assert_eq!(site.machines().await, [MACHINE]);
    for secret in [peer::PASSWORD, guest::PASSWORD] {
        let is_simulator = |line: &String| line.split(' ').next().is_some_and(|program| program.ends_with("vcsim"));
        let speaking: Vec<_> = processes(secret).into_iter().filter(|line| !is_simulator(line)).collect();
        assert_eq!(speaking, [""; 0]);
    }
    stages.extend(run.follow(None));
    stages.dedup();
    let (code, report) = run.end();
    let BuildReport::Succeeded(outcome) = report else { panic!("{code:?} {report:?}\n{}", site.site.log()) };
    assert_eq!(stages, ["Prepare", "Fetch", "Install", "Seal", "Assemble", "Publish"]);
    assert_eq!(outcome.image.name, NAME);

    let inventory = site.lab.vcenter.inventory().await;
    let machine = inventory.machine(&format!("/DC0/vm/templates/{NAME}"));
    assert!(machine.template);
    assert_eq!(machine.tags, ["eksdRelease/eksdRelease:kubernetes-1-31-eks-47", "os/os:ubuntu"]);
    assert_eq!(machine.properties["NODE_IMAGE_BUILD"], "images/ubuntu/0123456789");
    assert_eq!(site.machines().await, [NAME], "Packer's machine is left");
    let vmdk = site.lab.vcenter.disk(&machine.moref);
    assert!(crate::ova::unpack_vmdk(&vmdk) == fs::read(site.lab.disk()).unwrap(), "another disk arrived");
    let ova = fs::read(site.site.directory.path().join(format!("out/{NAME}.ova"))).unwrap();
    assert_eq!(outcome.image.sha256, sha256(&ova));
    assert_eq!(outcome.image.vsphere.unwrap().moref, machine.moref);
    site.site.assert_installed();
}

/// Nothing is installed in the simulator, so the machine never has an address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_medium_is_in_the_datastore_under_the_builds_name_while_its_machine_is_there() {
    if !is_root() {
        return;
    }
    let site = Surroundings::new().await;
    let mut document = site.document();
    document["engine"] = json!({"imageBuilder": {"timeoutSeconds": 300}});
    let checksum = json!({"sha256": sha256(&archive("installer"))});
    document["base"] = json!({"url": site.site.mirror.url(MEDIUM), "checksum": checksum});
    let mut run = site.site.run(&document, VARS);
    run.follow(Some("Waiting for IP"));
    let medium = format!("packer_cache/{MACHINE}.iso");
    let log = || site.site.log();
    assert_eq!(site.machines().await, [MACHINE], "{}", log());
    assert!(site.lab.vcenter.has_file(&medium).await, "{}", log());
    run.stop();
    assert_eq!(site.machines().await, [""; 0]);
    assert!(!site.lab.vcenter.has_file(&medium).await, "the medium is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_is_stopped_or_killed_leaves_no_machine() {
    if !is_root() {
        return;
    }
    let site = Surroundings::new().await;
    let mut stopped = site.start();
    stopped.follow(Some("Waiting for SSH"));
    assert_eq!(site.machines().await, [MACHINE]);
    stopped.stop();
    assert_eq!(site.machines().await, [""; 0]);

    let mut killed = site.start();
    killed.follow(Some("Waiting for SSH"));
    killed.kill();
    assert_eq!(site.machines().await, [MACHINE], "nothing was left to clean up");
    let medium = format!("packer_cache/{MACHINE}.iso");
    site.lab.vcenter.put_file(&medium).await;
    let output = site.site.clean_up();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(site.machines().await, [""; 0]);
    assert!(!site.lab.vcenter.has_file(&medium).await, "the medium is left");

    // What nobody can remove is named.
    site.lab.vcenter.fault("Destroy_Task", "NoPermission", 0).await;
    let mut stuck = site.start();
    stuck.follow(Some("Waiting for SSH"));
    let message = stuck.stop();
    let left = format!("what Packer had made there may be left: /DC0/vm/templates/{MACHINE} may be left on");
    assert!(message.contains(&left), "{message}");
    let output = site.site.clean_up();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(MACHINE), "{output:?}");
}
