//! What stands in Prism Central after a build.

use std::{process::Command, sync::Arc};

use axum::http::Method;
use node_image_builder::{
    contract::ClusterReference,
    progress::{Reporter, Style},
    publish::nutanix::NutanixError,
};
use serde_json::json;

use super::{
    Lab, NAME, WORKING_NAME,
    prism::{CLUSTER_UUID, Fault},
    told,
};

#[tokio::test]
async fn disk_becomes_an_image_with_its_name_place_and_categories() {
    let lab = Lab::new().await;
    let image = lab.publish().await.unwrap();
    assert_eq!((image.name.as_str(), lab.prism.names()), (NAME, vec![NAME.to_owned()]));
    let there = lab.prism.image(&image.uuid);
    assert_eq!(there["status"]["state"], "COMPLETE");
    assert_eq!(there["status"]["resources"]["size_bytes"], image.summary.virtual_size);
    assert_eq!(there["spec"]["resources"]["image_type"], "DISK_IMAGE");
    let placed = json!([{"kind": "cluster", "uuid": CLUSTER_UUID}]);
    assert_eq!(there["spec"]["resources"]["initial_placement_ref_list"], placed);
    assert_eq!(there["metadata"]["categories"], json!({"Environment": "Production"}));
    assert_eq!(
        there["spec"]["description"],
        "ubuntu 22.04 with Kubernetes v1.31.14 (kubernetes-1-31-eks-47), made by the NodeImageBuild \
         images/ubuntu/0123456789"
    );

    let file = lab.prism.file(&image.uuid);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), image.summary.size);
    let same =
        Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(lab.disk()).arg(file).output();
    let same = same.unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
}

#[tokio::test]
async fn upload_tells_length_and_digest_before_the_first_byte() {
    let lab = Lab::new().await;
    let image = lab.publish().await.unwrap();
    let seen = lab.prism.seen();
    let upload = seen.iter().find(|seen| seen.path.ends_with("/file")).unwrap();
    let header = |name: &str| upload.headers.get(name).unwrap().to_str().unwrap().to_owned();
    assert_eq!(header("content-length"), image.summary.size.to_string());
    assert_eq!(header("x-nutanix-checksum-type"), "SHA_256");
    assert_eq!(header("x-nutanix-checksum-bytes"), image.summary.sha256);
}

#[tokio::test]
async fn cluster_is_taken_by_uuid_too() {
    let mut lab = Lab::new().await;
    lab.target.cluster = ClusterReference::Uuid(CLUSTER_UUID.to_uppercase());
    lab.publish().await.unwrap();
}

#[tokio::test]
async fn image_has_its_own_name_only_when_it_is_whole() {
    let lab = Arc::new(Lab::new().await);
    lab.prism.arm(Method::PUT, "/file", 1, Fault::HoldAnswer);
    let publishing = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { lab.publish().await }
    });
    lab.prism.held().await;
    assert_eq!(lab.prism.names(), [WORKING_NAME]);
    lab.prism.release();
    publishing.await.unwrap().unwrap();
    assert_eq!(lab.prism.names(), [NAME]);
}

#[tokio::test]
async fn image_of_the_same_name_is_kept_and_the_build_fails() {
    let lab = Lab::new().await;
    let old = lab.prism.add_image(NAME, "by hand");
    let error = lab.publish().await.unwrap_err();
    let (_, reason, message) = told(&error);
    assert_eq!(reason, "ImageNameTaken");
    assert!(message.contains(NAME) && message.contains(&old) && message.contains("replaceExisting"), "{message}");
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), old)]);
}

#[tokio::test]
async fn image_is_replaced_where_the_target_says_so() {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = true;
    let old = lab.prism.add_image(NAME, "of last month");
    let other = lab.prism.add_image(&format!("{NAME}-other"), "another name");
    let image = lab.publish().await.unwrap();
    let mut left = lab.prism.images();
    left.sort();
    assert_eq!(left, [(NAME.to_owned(), image.uuid.clone()), (format!("{NAME}-other"), other)]);
    assert_ne!(image.uuid, old);
}

#[tokio::test]
async fn old_image_goes_only_after_the_new_one_has_its_name() {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = true;
    let old = lab.prism.add_image(NAME, "of last month");
    let image = lab.publish().await.unwrap();
    let seen = lab.prism.seen();
    let at = |method: &str, uuid: &str| {
        seen.iter().position(|seen| seen.method == method && seen.path.ends_with(&format!("/images/{uuid}"))).unwrap()
    };
    assert!(at("PUT", &image.uuid) < at("DELETE", &old));
}

#[tokio::test]
async fn old_image_that_can_not_go_stays_alone() {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = true;
    let old = lab.prism.add_image(NAME, "of last month");
    let failure = Fault::FailTask { code: "ENTITY_DELETION_FAILED", detail: "a machine uses the image" };
    lab.prism.arm(Method::DELETE, "/images/", 1, failure);
    let error = lab.publish().await.unwrap_err();
    let (_, reason, message) = told(&error);
    assert_eq!(reason, "OldImageNotRemoved");
    assert!(message.contains("a machine uses the image") && message.contains(&old), "{message}");
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), old)]);
}

#[tokio::test]
async fn several_images_of_the_name_are_never_chosen_from() {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = true;
    let mut old = [lab.prism.add_image(NAME, "one"), lab.prism.add_image(NAME, "another")];
    old.sort();
    let error = lab.publish().await.unwrap_err();
    let (_, reason, message) = told(&error);
    assert_eq!(reason, "ImageNameAmbiguous");
    assert!(old.iter().all(|uuid| message.contains(uuid)), "{message}");
    assert_eq!(lab.prism.images(), old.map(|uuid| (NAME.to_owned(), uuid)));
}

#[tokio::test]
async fn what_a_killed_attempt_left_is_removed_by_the_next_one() {
    let lab = Lab::new().await;
    lab.prism.add_image(WORKING_NAME, "half");
    // This one had its name already when the pod was lost.
    lab.prism.add_image(NAME, "made by the NodeImageBuild images/ubuntu/0123456789");
    let other_build = lab.prism.add_image("node-image-build-9876543210", "half, of another build");
    let image = lab.publish().await.unwrap();
    let mut left = lab.prism.images();
    left.sort();
    assert_eq!(left, [("node-image-build-9876543210".to_owned(), other_build), (NAME.to_owned(), image.uuid)]);
}

#[tokio::test]
async fn cleaning_removes_the_unfinished_and_keeps_the_whole() {
    let lab = Lab::new().await;
    lab.prism.add_image(WORKING_NAME, "half");
    let whole = lab.prism.add_image(NAME, "made by the NodeImageBuild images/ubuntu/0123456789");
    lab.nutanix().clean(&lab.request).await.unwrap();
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), whole)]);
}

#[tokio::test]
async fn removal_takes_everything_of_the_build_and_nothing_else() {
    let lab = Lab::new().await;
    lab.prism.add_image(WORKING_NAME, "half");
    let others = [
        lab.prism.add_image(NAME, "made by the NodeImageBuild images/ubuntu/9876543210"),
        lab.prism.add_image(NAME, "made by hand, after the NodeImageBuild images/ubuntu/0123456789 of last week"),
    ];
    lab.prism.add_image(NAME, "Ubuntu; made by the NodeImageBuild images/ubuntu/0123456789");
    lab.nutanix().remove(&lab.request).await.unwrap();
    let mut expected = others.map(|uuid| (NAME.to_owned(), uuid));
    expected.sort();
    let mut left = lab.prism.images();
    left.sort();
    assert_eq!(left, expected);
    // Once more: there is nothing to do.
    lab.nutanix().remove(&lab.request).await.unwrap();
    assert_eq!(lab.prism.images().len(), 2);
}

#[tokio::test]
async fn program_removes_what_a_killed_build_left_and_says_what_it_lacks() {
    let mut lab = Lab::new().await;
    let half = lab.prism.add_image(WORKING_NAME, "half");
    let dir = tempfile::tempdir().unwrap();
    let authority = dir.path().join("ca.crt");
    std::fs::write(&authority, &lab.prism.authority).unwrap();
    lab.request.trust_bundle = Some(authority);
    let document = dir.path().join("build.json");
    std::fs::write(&document, serde_json::to_string(&lab.request).unwrap()).unwrap();
    let arguments = ["clean-up", "--build", "build.json", "--report", "report"];

    // The Secret is gone.
    lab.remove_password();
    let failed = crate::cli::run(dir.path(), &arguments).await;
    assert_eq!(failed.status.code(), Some(65));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.path().join("report")).unwrap()).unwrap();
    assert!(report.to_string().contains("SecretKeyMissing"), "{report}");
    assert_eq!(lab.prism.images(), [(WORKING_NAME.to_owned(), half)]);

    lab.set_password(super::PASSWORD);
    let done = crate::cli::run(dir.path(), &arguments).await;
    assert!(done.status.success(), "{}", crate::cli::text(&done.stderr));
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn progress_names_packaging_uploading_and_what_prism_central_does() {
    let lab = Lab::new().await;
    let lines = Lines::default();
    let mut nutanix = lab.nutanix();
    nutanix.reporter = Reporter::new(Style::Plain, Box::new(lines.clone()));
    nutanix.publish(&lab.request, &lab.source()).await.unwrap();
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    for expected in ["packaging ubuntu", "uploading ubuntu-2204-kube-1-31 to localhost", "upload_image_contents runs"] {
        assert!(text.contains(expected), "no {expected} in {text}");
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn only_a_qcow2_is_taken() {
    let lab = Lab::new().await;
    let source = crate::package::source(&lab.disk());
    let error = lab.nutanix().publish(&lab.request, &source).await.unwrap_err();
    assert!(matches!(error, NutanixError::NotQcow2 { format: "raw.gz" }), "{error}");
}
