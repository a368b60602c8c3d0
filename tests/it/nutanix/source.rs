//! An image in Prism Central that a build starts from.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use axum::http::Method;
use node_image_builder::{
    contract::{Base, FailureClass, PrismSource},
    publish::nutanix::{NutanixError, SourceDisk},
};
use rstest::rstest;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::{Lab, prism::Fault, told};

const SOURCE: &str = "ubuntu-22.04-server";

impl Lab {
    fn start_from(&mut self, name: &str) {
        self.request.base = Base::PrismImage(PrismSource { prism_image: name.into() });
    }

    fn place(&self) -> PathBuf {
        self.disk().with_file_name("source")
    }

    async fn fetch(&self) -> Result<SourceDisk, NutanixError> {
        self.nutanix().fetch_source(&PrismSource { prism_image: SOURCE.into() }, &self.place()).await
    }
}

fn digest(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).unwrap()))
}

fn packed(lab: &Lab) -> PathBuf {
    let path = lab.disk().with_file_name("packed");
    let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
    let done = Command::new("qemu-img").args(arguments).args([&lab.disk(), &path]).status().unwrap();
    assert!(done.success());
    path
}

#[tokio::test]
async fn image_to_start_from_is_looked_at_before_the_build() {
    let mut lab = Lab::new().await;
    lab.start_from(SOURCE);
    lab.prism.add_disk("ubuntu-22.04-servre", &lab.disk());
    lab.target.subnet = Some("vm-netwrok".into());
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismObjectNotFound"));
    assert!(message.contains("sourceImageName `ubuntu-22.04-server`: there is ubuntu-22.04-servre"), "{message}");
    assert!(message.contains("subnet `vm-netwrok`"), "not all is told at once: {message}");

    lab.target.subnet = None;
    let first = lab.prism.add_disk(SOURCE, &lab.disk());
    lab.preflight().await.unwrap();
    let second = lab.prism.add_disk(SOURCE, &lab.disk());
    let message = told(&lab.preflight().await.unwrap_err()).2;
    assert!(
        message.contains("there are several") && message.contains(&first) && message.contains(&second),
        "{message}"
    );
    assert_eq!(lab.prism.count(&Method::GET, "/file"), 0);
}

#[rstest]
#[case::disc("ISO_IMAGE", "COMPLETE", "it is ISO_IMAGE, name a DISK_IMAGE")]
#[case::half("DISK_IMAGE", "PENDING", "its state is PENDING")]
#[case::failed("DISK_IMAGE", "ERROR", "its state is ERROR")]
#[tokio::test]
async fn only_a_whole_disk_can_be_started_from(#[case] kind: &str, #[case] state: &'static str, #[case] problem: &str) {
    let mut lab = Lab::new().await;
    lab.start_from(SOURCE);
    let uuid = lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.set_image_type(&uuid, kind);
    lab.prism.set_state(&uuid, state);
    for error in [lab.preflight().await.unwrap_err(), lab.fetch().await.map(drop).unwrap_err()] {
        let (class, reason, message) = told(&error);
        assert_eq!((class, reason), (FailureClass::BadInput, "PrismObjectNotFound"));
        assert!(message.contains(problem) && message.contains(SOURCE), "{message}");
    }
}

#[tokio::test]
async fn disk_comes_raw_with_its_holes_and_its_digest() {
    let lab = Lab::new().await;
    // Its checksum is of this file, and not of the disk that comes.
    let uuid = lab.prism.add_disk(SOURCE, &packed(&lab));
    let SourceDisk { url, digest: named, is_qcow2 } = lab.fetch().await.unwrap();
    assert!(!is_qcow2);
    assert_eq!(named, format!("sha256:{}", digest(&lab.disk())));
    assert_eq!(url.path(), format!("/api/nutanix/v3/images/{uuid}/file"));
    assert_eq!(digest(&lab.place()), digest(&lab.disk()));
    assert!(fs::metadata(lab.place()).unwrap().blocks() * 512 < 8 << 20, "the disk has no holes");
}

#[rstest]
#[case::right_sha256(Some(true), false, true)]
#[case::wrong_sha256(Some(false), false, false)]
#[case::right_sha1(Some(true), true, true)]
#[case::wrong_sha1(Some(false), true, false)]
#[case::of_the_image_service(None, false, true)]
#[tokio::test]
async fn checksum_of_the_file_that_comes_is_verified(
    #[case] right: Option<bool>,
    #[case] sha1: bool,
    #[case] accepted: bool,
) {
    let lab = Lab::new().await;
    let file = packed(&lab);
    let uuid = lab.prism.add_disk(SOURCE, &file);
    lab.prism.give_uploads();
    if let Some(right) = right {
        let bytes = if right { fs::read(&file).unwrap() } else { vec![] };
        let value = if sha1 { hex::encode(Sha1::digest(bytes)) } else { hex::encode(Sha256::digest(bytes)) };
        lab.prism.set_checksum(&uuid, if sha1 { "SHA_1" } else { "SHA_256" }, &value.to_uppercase());
    }
    match lab.fetch().await {
        Ok(disk) => assert!(accepted && disk.digest == format!("sha256:{}", digest(&file)), "{disk:?}"),
        Err(error) => {
            let (class, reason, message) = told(&error);
            assert_eq!((accepted, class, reason), (false, FailureClass::Transient, "SourceImageCorrupted"));
            assert!(message.contains("checksum"), "{message}");
        }
    }
}

#[rstest]
#[case::cut_once(1, true)]
#[case::cut_always(9, false)]
#[tokio::test]
async fn download_that_breaks_off_is_begun_anew(#[case] times: usize, #[case] arrives: bool) {
    let lab = Lab::new().await;
    lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.arm(Method::GET, "/file", times, Fault::CutAfter(20 << 20));
    match lab.fetch().await {
        Ok(_) => assert!(arrives && digest(&lab.place()) == digest(&lab.disk())),
        Err(error) => {
            let (class, reason, message) = told(&error);
            assert_eq!((arrives, class, reason), (false, FailureClass::Transient, "SourceImageCorrupted"));
            assert!(message.contains("broke off 3 times"), "{message}");
        }
    }
    assert_eq!(lab.prism.count(&Method::GET, "/file"), if arrives { 2 } else { 3 });
}

#[tokio::test]
async fn disk_of_another_size_is_not_used() {
    let lab = Lab::new().await;
    let uuid = lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.set_size(&uuid, 65 << 20);
    let (_, reason, message) = told(&lab.fetch().await.unwrap_err());
    assert_eq!(reason, "SourceImageCorrupted");
    assert!(message.contains("67108864 bytes came, and the disk has 68157440"), "{message}");
}

#[tokio::test]
async fn busy_prism_central_is_waited_for() {
    let lab = Lab::new().await;
    lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.arm(Method::GET, "/file", 1, Fault::status(429).retry_after(1));
    lab.prism.arm(Method::GET, "/file", 1, Fault::status(503));
    lab.fetch().await.unwrap();
    let asked: Vec<_> = lab.prism.seen().into_iter().filter(|seen| seen.path.ends_with("/file")).collect();
    assert!(asked.len() == 3 && asked[1].at - asked[0].at >= Duration::from_secs(1), "{asked:?}");
}

#[tokio::test]
async fn user_without_the_right_to_download_is_told() {
    let lab = Lab::new().await;
    lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.arm(Method::GET, "/file", 1, Fault::error(403, "ACCESS_DENIED", "no permission to download"));
    let (class, reason, message) = told(&lab.fetch().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismAccessDenied"));
    assert!(message.contains("read the image's bytes"), "{message}");
}

#[tokio::test]
async fn cancelling_ends_a_download_that_does_not_move() {
    let lab = Lab::new().await;
    lab.prism.add_disk(SOURCE, &lab.disk());
    lab.prism.arm(Method::GET, "/file", 1, Fault::StallAfter(1 << 20));
    let stop = async {
        lab.prism.stalled().await;
        lab.cancel.cancel();
    };
    let (result, ()) = tokio::join!(lab.fetch(), stop);
    assert!(matches!(result, Err(NutanixError::Cancelled)), "{result:?}");
}
