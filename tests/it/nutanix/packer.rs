//! Builds by Packer: what Prism Central has before it starts and after it ends. `imagebuilder::prism_central` runs Packer.

use std::{fs, os::unix::fs::FileExt, path::PathBuf, process::Command};

use axum::http::Method;
use node_image_builder::{
    contract::{Archive, Base, BaseChecksum, Engine, FailureClass, PrismSource},
    publish::nutanix::{NutanixError, PackerPlace},
};
use rstest::rstest;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    Lab, MIB, WORKING_NAME,
    prism::{CLUSTER_UUID, Fault},
    told,
};

const SOURCE_NAME: &str = "node-image-build-0123456789-source";

impl Lab {
    /// A lab whose build is one by Packer from a disk that is downloaded.
    async fn by_packer() -> Self {
        let mut lab = Self::new().await;
        lab.request.engine = serde_json::from_value(json!({"imageBuilder": {"timeoutSeconds": 60}})).unwrap();
        assert_ne!(lab.request.engine, Engine::Native);
        let url = "https://mirror.example.com/cloud.img".parse().unwrap();
        lab.request.base = Base::Archive(Archive { url, checksum: BaseChecksum::Sha256("0".repeat(64)) });
        lab.request.disk_size_mib = 1024;
        lab
    }

    async fn prepared(&self, base: Option<&PathBuf>) -> Result<PackerPlace, NutanixError> {
        self.nutanix().packer_place(&self.request, base.map(PathBuf::as_path)).await
    }

    fn fetched(&self) -> PathBuf {
        self.disk().with_file_name("fetched")
    }

    async fn fetch_made(&self) -> Result<(), NutanixError> {
        self.nutanix().fetch_made(&self.request, &self.fetched()).await
    }

    async fn clean(&self) -> Result<(), NutanixError> {
        self.nutanix().clean(&self.request).await
    }

    /// The lab's disk as vendors publish them.
    fn published(&self, format: &str) -> PathBuf {
        let path = self.disk().with_file_name("cloud.img");
        let done = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", format])
            .args([&self.disk(), &path])
            .status()
            .unwrap();
        assert!(done.success());
        if format == "raw" {
            fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[0x55, 0xaa], 510).unwrap();
        }
        path
    }
}

fn digest(path: &PathBuf) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

#[rstest]
#[case::qcow2("qcow2")]
#[case::raw("raw")]
#[tokio::test]
async fn the_disk_that_a_machine_starts_from_is_put_there_as_it_was_published(#[case] format: &str) {
    let lab = Lab::by_packer().await;
    let disk = lab.published(format);
    let place = lab.prepared(Some(&disk)).await.unwrap();
    assert_eq!((place.name.as_str(), place.cluster.as_str()), (WORKING_NAME, CLUSTER_UUID));
    assert_eq!(lab.prism.images(), [(SOURCE_NAME.to_owned(), place.source.clone())]);
    assert_eq!(lab.prism.image(&place.source)["status"]["resources"]["size_bytes"], 64 * MIB);
    assert_eq!(digest(&lab.prism.file(&place.source)), digest(&disk));
    // Another attempt makes it anew.
    let again = lab.prepared(Some(&disk)).await.unwrap();
    assert_ne!(again.source, place.source);
    assert_eq!(lab.prism.names(), [SOURCE_NAME]);
    lab.clean().await.unwrap();
    assert_eq!(lab.prism.names(), [""; 0]);
}

#[tokio::test]
async fn an_image_that_is_there_already_is_started_from_and_stays() {
    let mut lab = Lab::by_packer().await;
    lab.request.base = Base::PrismImage(PrismSource { prism_image: "cloud".into() });
    let uuid = lab.prism.add_disk("cloud", &lab.published("qcow2"));
    assert_eq!(lab.prepared(None).await.unwrap().source, uuid);
    lab.clean().await.unwrap();
    assert_eq!(lab.prism.names(), ["cloud"]);
}

#[rstest]
#[case::archive("root.tar", "spec.base leads to no disk")]
#[case::large("large", "write spec.diskSize: 2049Mi, or more")]
#[case::far("far-network", "it is a subnet of another cluster")]
#[case::unknown("vm-netwrok", "there is vm-network")]
#[tokio::test]
async fn what_no_machine_can_be_made_of_is_told_before_anything_is_put_there(
    #[case] what: &str,
    #[case] expected: &str,
) {
    let mut lab = Lab::by_packer().await;
    let disk = lab.published("raw");
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    match what {
        "root.tar" => file.write_all_at(&[0; 2], 510).unwrap(),
        "large" => file.set_len(2049 * MIB).unwrap(),
        subnet => lab.target.subnet = Some(subnet.into()),
    }
    let (class, _, message) = told(&lab.prepared(Some(&disk)).await.unwrap_err());
    assert_eq!(class, FailureClass::BadInput);
    assert!(message.contains(expected), "{message}");
    assert_eq!(lab.prism.names(), [""; 0]);
}

#[tokio::test]
async fn an_upload_that_is_cancelled_leaves_nothing() {
    let lab = Lab::by_packer().await;
    lab.prism.arm(Method::PUT, "/file", 1, Fault::StallAfter(1 << 16));
    let disk = lab.published("raw");
    let (placed, ()) = tokio::join!(lab.prepared(Some(&disk)), async {
        lab.prism.stalled().await;
        lab.cancel.cancel();
    });
    assert_eq!(told(&placed.unwrap_err()).0, FailureClass::Cancelled);
    assert_eq!(lab.prism.names(), [""; 0]);
}

#[tokio::test]
async fn the_disk_of_the_machine_comes_back() {
    let lab = Lab::by_packer().await;
    let (class, reason, message) = told(&lab.fetch_made().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismTaskFailed"), "{message}");
    lab.prism.add_disk(WORKING_NAME, &lab.disk());
    lab.fetch_made().await.unwrap();
    assert_eq!(digest(&lab.fetched()), digest(&lab.disk()));
}

#[tokio::test]
async fn a_disk_that_comes_back_in_another_format_is_told() {
    let lab = Lab::by_packer().await;
    lab.prism.give_uploads();
    lab.prism.add_disk(WORKING_NAME, &lab.published("qcow2"));
    let (_, reason, message) = told(&lab.fetch_made().await.unwrap_err());
    assert_eq!(reason, "SourceImageCorrupted");
    assert!(message.contains("it came as a qcow2"), "{message}");
}

#[tokio::test]
async fn machine_and_images_of_the_build_are_removed_and_those_of_others_stay() {
    let lab = Lab::by_packer().await;
    for name in [WORKING_NAME, "somebody-elses", WORKING_NAME] {
        lab.prism.add_machine(name, &lab.disk());
    }
    for name in [WORKING_NAME, SOURCE_NAME, "somebody-elses"] {
        lab.prism.add_disk(name, &lab.disk());
    }
    lab.clean().await.unwrap();
    assert_eq!(
        (lab.prism.machines(), lab.prism.names()),
        (vec!["somebody-elses".into()], vec!["somebody-elses".into()])
    );
    // A second time finds nothing to do.
    lab.clean().await.unwrap();
}

#[tokio::test]
async fn a_machine_that_can_not_be_removed_is_named() {
    let lab = Lab::by_packer().await;
    let uuid = lab.prism.add_machine(WORKING_NAME, &lab.disk());
    lab.prism.arm(Method::DELETE, "/vms/", 1, Fault::error(403, "ACCESS_DENIED", "no right"));
    let (class, reason, message) = told(&lab.clean().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "LeftBehind"));
    assert!(message.contains(&format!("the machine {WORKING_NAME} ({uuid}) may be left on")), "{message}");
    assert!(message.contains("the user may not delete a machine"), "{message}");

    lab.prism.arm(Method::DELETE, "/vms/", 1, Fault::FailTask { code: "INTERNAL_ERROR", detail: "it is locked" });
    assert!(told(&lab.clean().await.unwrap_err()).2.contains("it is locked"));
    lab.clean().await.unwrap();
    assert_eq!(lab.prism.machines(), [""; 0]);
}

/// Machines of people cost nothing where no machine is made.
#[tokio::test]
async fn the_other_engine_asks_for_no_machines() {
    let lab = Lab::new().await;
    lab.clean().await.unwrap();
    assert_eq!(lab.prism.count(&Method::POST, "/vms/list"), 0);
}
