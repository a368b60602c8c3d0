//! What is found out before anything is built.

use std::time::{Duration, Instant};

use node_image_builder::{
    contract::{Classified, FailureClass},
    publish::vsphere::VsphereError,
};
use rstest::rstest;

use super::Lab;

#[tokio::test]
async fn wrong_password_is_the_users_to_mend() {
    let lab = Lab::new(&[]).await;
    lab.set_password("something else");
    let error = lab.preflight().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "VcenterCredentialsRefused"));
    assert!(!error.to_string().contains("something else"), "{error}");
    assert!(error.to_string().contains("spec.vsphere.credentialsSecretRef"), "{error}");
}

#[tokio::test]
async fn certificate_that_is_not_trusted_is_shown() {
    let mut lab = Lab::new(&[]).await;
    lab.trust_bundle = None;
    let error = lab.preflight().await.unwrap_err();
    assert_eq!(error.class(), FailureClass::BadInput);
    let VsphereError::Untrusted { thumbprint, .. } = error else { panic!("{error}") };

    // What the message says to write is accepted, and nothing else.
    lab.target.thumbprint = Some(thumbprint.to_lowercase());
    lab.preflight().await.unwrap();
    lab.publish().await.unwrap();
    lab.target.thumbprint = Some(thumbprint.replace(&thumbprint[..2], "xx"));
    lab.trust_bundle = Some(lab.vcenter.authority());
    assert!(matches!(lab.preflight().await.unwrap_err(), VsphereError::Untrusted { .. }));

    lab.target.thumbprint = None;
    lab.preflight().await.unwrap();
    (lab.target.insecure, lab.trust_bundle) = (true, None);
    lab.preflight().await.unwrap();
}

#[rstest]
#[case::unknown_host("no-such-host.invalid", "VcenterUnavailable", FailureClass::Transient)]
#[case::nobody_listens("127.0.0.1:1", "VcenterUnavailable", FailureClass::Transient)]
#[case::no_host("a b", "InvalidVcenterAddress", FailureClass::BadInput)]
#[case::url("vcenter.example.com/sdk", "InvalidVcenterAddress", FailureClass::BadInput)]
#[tokio::test]
async fn server_that_is_not_there_is_told_soon(
    #[case] server: &str,
    #[case] reason: &str,
    #[case] class: FailureClass,
) {
    let mut lab = Lab::new(&[]).await;
    lab.target.server = server.to_owned();
    lab.patience = Duration::from_secs(1);
    let began = Instant::now();
    let error = lab.preflight().await.unwrap_err();
    assert_eq!((error.reason(), error.class()), (reason, class));
    assert!(error.to_string().contains(server) && error.to_string().contains("spec.vsphere.server"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[tokio::test]
async fn absent_objects_are_told_all_at_once_with_near_names() {
    let mut lab = Lab::new(&[]).await;
    lab.target.cluster = Some("DC0_C1".into());
    lab.target.datastore = "LocalDS_1".into();
    lab.target.network = "VM Netwrok".into();
    lab.target.folder = Some("template".into());
    let error = lab.preflight().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "VcenterObjectNotFound"));
    let server = &lab.target.server;
    // The simulator numbers this one by chance.
    let text =
        regex_lite::Regex::new("DVUplinks-[0-9]+").unwrap().replace(&error.to_string(), "DVUplinks-N").into_owned();
    assert_eq!(
        text,
        format!(
            "{server} does not have what spec.vsphere names: \
             cluster `DC0_C1`: datacenter `DC0` has `/DC0/host/DC0_C0`, `/DC0/host/DC0_H0`; \
             datastore `LocalDS_1`: datacenter `DC0` has `/DC0/datastore/LocalDS_0`; \
             network `VM Netwrok`: datacenter `DC0` has `/DC0/network/VM Network`, `/DC0/network/DC0_DVPG0`, \
             `/DC0/network/DVS0-DVUplinks-N`; \
             folder `template`: datacenter `DC0` has `/DC0/vm/templates`"
        )
    );
}

#[tokio::test]
async fn missing_privileges_are_told_all_at_once() {
    let lab =
        Lab::new(&["-deny", "VApp.Import,Datastore.AllocateSpace,InventoryService.Tagging.AttachTag,Other"]).await;
    let error = lab.preflight().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "VcenterPrivilegeMissing"));
    assert_eq!(
        error.to_string(),
        format!(
            "the user in the Secret that spec.vsphere.credentialsSecretRef names lacks privileges on {}: VApp.Import on the resource pool; \
             Datastore.AllocateSpace on the datastore `LocalDS_0`; InventoryService.Tagging.AttachTag on the vCenter; \
             have them added to the user's role",
            lab.target.server
        )
    );
}

#[tokio::test]
async fn only_privileges_that_are_used_are_asked_for() {
    let mut lab = Lab::new(&["-deny", "VirtualMachine.State.CreateSnapshot,ContentLibrary.AddLibraryItem"]).await;
    lab.preflight().await.unwrap();
    lab.target.create_snapshot = true;
    assert!(lab.preflight().await.unwrap_err().to_string().contains("VirtualMachine.State.CreateSnapshot"));
    lab.target.content_library = Some("library".into());
    let error = lab.preflight().await.unwrap_err().to_string();
    assert!(error.contains("ContentLibrary.AddLibraryItem") && !error.contains("CreateSnapshot"), "{error}");
}

#[tokio::test]
async fn datastore_without_room_is_told_with_numbers() {
    let mut lab = Lab::new(&["-free", "1073741824"]).await;
    lab.preflight().await.unwrap();
    lab.request.disk_size_mib = 20 * 1024;
    let error = lab.preflight().await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "DatastoreFull"));
    assert!(error.to_string().contains("1.0 GiB free") && error.to_string().contains("20.0 GiB"), "{error}");
}

#[tokio::test]
async fn sessions_are_closed() {
    let lab = Lab::new(&[]).await;
    lab.preflight().await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    assert_eq!((inventory.sessions, inventory.tokens), (0, 0));
    assert_eq!(inventory.calls["Logout"], 1);
}
