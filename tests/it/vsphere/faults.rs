//! What goes wrong on the way leaves vCenter as it was.

use std::time::{Duration, Instant};

use node_image_builder::{
    contract::{Classified, FailureClass},
    publish::vsphere::VsphereError,
};
use serde_json::json;

use super::{Lab, NAME};

/// Longest time until something that must happen has happened.
const SOON: Duration = Duration::from_secs(30);

/// Waits until the import is in the middle of its upload.
async fn until_uploading(lab: &Lab) {
    let began = Instant::now();
    while lab.vcenter.inventory().await.leases == 0 {
        assert!(began.elapsed() < SOON, "the upload does not begin");
    }
}

#[tokio::test]
async fn slow_upload_keeps_its_lease() {
    // The upload takes about four times as long as vCenter waits for a sign of life.
    let lab = Lab::new(&["-lease-timeout", "1"]).await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 250_000})).await;
    let imported = lab.publish().await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    inventory.machine(&imported.template.unwrap().inventory_path);
    assert!(inventory.calls["HttpNfcLeaseProgress"] >= 4, "{:?}", inventory.calls);
    assert_eq!(inventory.calls["ImportVApp"], 1);
}

#[tokio::test]
async fn lease_that_times_out_ends_the_build_after_some_attempts() {
    let lab = Lab::new(&["-lease-timeout", "1"]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 100_000})).await;
    lab.vcenter.fault("HttpNfcLeaseProgress", "Timedout", 0).await;
    let error = lab.publish().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "VcenterLeaseLost"));
    let after = lab.vcenter.inventory().await;
    assert_eq!(after.contents(), before.contents());
    assert_eq!((after.sessions, after.tokens, after.leases), (0, 0, 0));
    assert_eq!(after.calls["ImportVApp"], 3);
}

#[tokio::test]
async fn connection_that_breaks_once_costs_one_more_upload() {
    let lab = Lab::new(&[]).await;
    lab.vcenter.control("cut", json!({"after": 300_000, "times": 1})).await;
    let imported = lab.publish().await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    let machine = inventory.machine(&imported.template.unwrap().inventory_path);
    assert!(crate::ova::unpack_vmdk(&lab.vcenter.disk(&machine.moref)) == std::fs::read(lab.disk()).unwrap());
    assert_eq!(inventory.machines.as_ref().unwrap().len(), 1);
    assert_eq!((inventory.calls["ImportVApp"], inventory.calls["HttpNfcLeaseAbort"]), (2, 1));
}

#[tokio::test]
async fn connection_that_keeps_breaking_leaves_nothing() {
    let lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.control("cut", json!({"after": 300_000, "times": 100})).await;
    let error = lab.publish().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "VcenterUploadFailed"));
    let after = lab.vcenter.inventory().await;
    assert_eq!(after.contents(), before.contents());
    assert_eq!((after.sessions, after.tokens, after.leases), (0, 0, 0));
}

#[tokio::test]
async fn full_datastore_is_the_administrators_to_mend() {
    let lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.fault("ImportVApp", "NoDiskSpace", 0).await;
    let error = lab.publish().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "DatastoreFull"));
    assert!(error.to_string().contains("LocalDS_0"), "{error}");
    assert_eq!(lab.vcenter.inventory().await.contents(), before.contents());
}

#[tokio::test]
async fn refused_privilege_is_named() {
    let lab = Lab::new(&[]).await;
    lab.vcenter.fault("ImportVApp", "NoPermission", 0).await;
    let error = lab.publish().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "VcenterPrivilegeMissing"));
    assert!(error.to_string().contains("VApp.Import"), "{error}");
}

#[tokio::test]
async fn failure_after_the_upload_leaves_nothing() {
    for method in ["MarkAsTemplate", "Rename_Task"] {
        let lab = Lab::new(&[]).await;
        let before = lab.vcenter.inventory().await;
        lab.vcenter.fault(method, "SystemError", 0).await;
        let error = lab.publish().await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "VcenterFailed"), "{method}");
        assert!(error.to_string().contains("vpxd is tired"), "{error}");
        assert_eq!(lab.vcenter.inventory().await.contents(), before.contents(), "{method}");
    }
}

#[tokio::test]
async fn failed_replacement_keeps_the_old_template() {
    let mut lab = Lab::new(&[]).await;
    lab.publish().await.unwrap();
    let before = lab.vcenter.inventory().await;
    lab.request = lab.another_build("abcdefabcd");
    lab.target.replace_existing = true;
    lab.vcenter.fault("MarkAsTemplate", "SystemError", 0).await;
    lab.publish().await.unwrap_err();
    assert_eq!(lab.vcenter.inventory().await.contents(), before.contents());
}

#[tokio::test]
async fn cancelled_upload_leaves_nothing() {
    let lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 100_000})).await;
    let cancel = async {
        until_uploading(&lab).await;
        lab.cancel.cancel();
    };
    let (result, ()) = tokio::join!(lab.publish(), cancel);
    assert!(matches!(result.unwrap_err(), VsphereError::Cancelled));
    let after = lab.vcenter.inventory().await;
    assert_eq!(after.contents(), before.contents());
    assert_eq!((after.sessions, after.tokens, after.leases), (0, 0, 0));
}

#[tokio::test]
async fn cancelled_library_upload_leaves_nothing_but_the_library() {
    let mut lab = Lab::new(&[]).await;
    lab.target.content_library = Some("library".into());
    lab.publish().await.unwrap();
    let before = lab.vcenter.inventory().await;
    lab.request = lab.another_build("abcdefabcd");
    lab.target.replace_existing = true;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 200_000})).await;
    let puts = |calls: &std::collections::BTreeMap<String, usize>| {
        calls.iter().filter(|(call, _)| call.starts_with("PUT ")).map(|(_, count)| count).sum::<usize>()
    };
    let cancel = async {
        let began = Instant::now();
        // Descriptor and manifest are there, the disk is on its way.
        while puts(&lab.vcenter.calls().await) < puts(&before.calls) + 3 {
            assert!(began.elapsed() < SOON, "the upload does not begin");
        }
        lab.cancel.cancel();
    };
    let (result, ()) = tokio::join!(lab.publish(), cancel);
    assert!(matches!(result.unwrap_err(), VsphereError::Cancelled));
    let after = lab.vcenter.inventory().await;
    assert_eq!(after.contents(), before.contents());
    assert_eq!((after.sessions, after.tokens), (0, 0));
}

#[tokio::test]
async fn what_a_killed_build_left_is_removed() {
    let lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 100_000})).await;
    tokio::select! {
        result = lab.publish() => panic!("it ended by itself: {result:?}"),
        () = until_uploading(&lab) => {}
    }
    let killed = lab.vcenter.inventory().await;
    assert_ne!(killed.contents(), before.contents(), "there is nothing to remove, so this proves nothing");
    lab.vsphere().clean(&lab.request).await.unwrap();
    assert_eq!(lab.vcenter.inventory().await.contents(), before.contents());
    // Nor is anything of another build touched.
    lab.publish().await.unwrap();
    let published = lab.vcenter.inventory().await.contents();
    lab.vsphere().clean(&lab.another_build("abcdefabcd")).await.unwrap();
    lab.vsphere().clean(&lab.request).await.unwrap();
    assert_eq!(lab.vcenter.inventory().await.contents(), published);
}

#[tokio::test]
async fn removal_takes_everything_of_the_build_and_nothing_else() {
    let mut lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.publish().await.unwrap();
    let published = lab.vcenter.inventory().await.contents();
    // Another build's, and the same name in the hands of another build, stay.
    lab.vsphere().remove(&lab.another_build("abcdefabcd")).await.unwrap();
    assert_eq!(lab.vcenter.inventory().await.contents(), published);
    lab.vsphere().remove(&lab.request).await.unwrap();
    let after = lab.vcenter.inventory().await;
    assert_eq!(after.contents(), before.contents());
    assert_eq!((after.sessions, after.tokens, after.leases), (0, 0, 0));
    lab.vsphere().remove(&lab.request).await.unwrap();

    lab.target.content_library = Some("library".into());
    lab.publish().await.unwrap();
    let items = async || lab.vcenter.inventory().await.libraries.unwrap()[0].items.len();
    lab.vsphere().remove(&lab.another_build("abcdefabcd")).await.unwrap();
    assert_eq!(items().await, 1);
    lab.vsphere().remove(&lab.request).await.unwrap();
    assert_eq!(items().await, 0);
}

#[tokio::test]
async fn program_removes_the_template_that_a_killed_build_left_half_imported() {
    let mut lab = Lab::new(&[]).await;
    let before = lab.vcenter.inventory().await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 100_000})).await;
    tokio::select! {
        result = lab.publish() => panic!("it ended by itself: {result:?}"),
        () = until_uploading(&lab) => {}
    }
    assert_ne!(lab.vcenter.inventory().await.contents(), before.contents(), "there is nothing to remove");
    let dir = tempfile::tempdir().unwrap();
    let authority = dir.path().join("ca.crt");
    std::fs::write(&authority, lab.vcenter.authority()).unwrap();
    lab.request.trust_bundle = Some(authority);
    std::fs::write(dir.path().join("build.json"), serde_json::to_string(&lab.request).unwrap()).unwrap();
    let done = crate::cli::run(dir.path(), &["clean-up", "--build", "build.json", "--report", "report"]).await;
    assert!(done.status.success(), "{}", crate::cli::text(&done.stderr));
    assert_eq!(lab.vcenter.inventory().await.contents(), before.contents());
}

#[tokio::test]
async fn template_of_an_interrupted_replacement_gets_its_name_back() {
    let mut lab = Lab::new(&[]).await;
    // As it is when the build dies between the two renames.
    lab.target.template_name = "node-image-build-abcdefabcd-replaced".into();
    lab.publish().await.unwrap();
    lab.target.template_name = NAME.into();
    lab.vsphere().clean(&lab.another_build("abcdefabcd")).await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    inventory.machine(&format!("/DC0/vm/templates/{NAME}"));
    assert_eq!(inventory.machines.as_ref().unwrap().len(), 1);
}

#[tokio::test]
async fn two_builds_at_once_with_the_same_name() {
    let lab = Lab::new(&[]).await;
    let other = lab.another_build("abcdefabcd");
    let (source, vsphere) = (lab.source_of(&other), lab.vsphere());
    let (first, second) = tokio::join!(lab.publish(), vsphere.publish(&other, &source));
    let (won, lost) = match (first, second) {
        (Ok(won), Err(lost)) | (Err(lost), Ok(won)) => (won, lost),
        results => panic!("{results:?}"),
    };
    assert!(matches!(lost, VsphereError::NameTaken { .. }), "{lost}");
    let machines = lab.vcenter.inventory().await.machines.unwrap();
    let paths: Vec<_> = machines.iter().map(|machine| machine.path.as_str()).collect();
    assert_eq!(paths, [format!("/DC0/vm/templates/{NAME}")]);
    assert_eq!(machines[0].moref, won.template.unwrap().moref);
}

#[tokio::test]
async fn vcenter_that_restarts_is_waited_for() {
    let lab = Lab::new(&[]).await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 500_000})).await;
    let restart = async {
        until_uploading(&lab).await;
        lab.vcenter.control("away", json!({"requests": 4})).await;
    };
    let (result, ()) = tokio::join!(lab.publish(), restart);
    result.unwrap();
}

#[tokio::test]
async fn vcenter_that_stays_away_is_given_up() {
    let mut lab = Lab::new(&[]).await;
    lab.patience = Duration::from_secs(1);
    lab.vcenter.control("away", json!({"requests": 1_000_000})).await;
    let error = lab.publish().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "VcenterUnavailable"));
}

#[tokio::test]
async fn expired_session_is_opened_again() {
    // Leases belong to a session, so this costs one more upload.
    let lab = Lab::new(&["-lease-timeout", "2"]).await;
    lab.vcenter.control("slow", json!({"bytesPerSecond": 500_000})).await;
    let expire = async {
        until_uploading(&lab).await;
        lab.vcenter.control("expire", json!({})).await;
    };
    let (result, ()) = tokio::join!(lab.publish(), expire);
    result.unwrap();
    let inventory = lab.vcenter.inventory().await;
    assert!(inventory.calls["Login"] >= 2, "{:?}", inventory.calls);
    assert_eq!(inventory.machines.as_ref().unwrap().len(), 1);
    assert_eq!((inventory.sessions, inventory.tokens), (0, 0));
}
