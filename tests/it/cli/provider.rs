//! Builds for vSphere and Nutanix: the provider is asked only where the image is to go there, by credentials that stay in
//! memory.

use std::{fs, path::Path};

use node_image_builder::contract::{FailureClass, Stage};
use serde_json::{Value, json};

use super::{
    build::{air_gapped_for, build, failure, mirror},
    text,
};
use crate::{
    support::bad_server::{Answer, BadServer},
    vsphere::peer::{PASSWORD, USERNAME, Vcenter},
};

/// Settings of a vCenter that the simulator is.
fn settings(server: &str) -> Value {
    json!({
        "vcenter_server": server,
        "insecure_connection": "true",
        "datacenter": "DC0",
        "cluster": "DC0_C0",
        "datastore": "LocalDS_0",
        "network": "VM Network",
        "folder": "templates",
        "username": USERNAME,
    })
}

/// All files below `dir`, as text.
fn contents(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .flat_map(|path| match fs::read(&path) {
            Ok(bytes) => vec![String::from_utf8_lossy(&bytes).into_owned()],
            Err(_) => contents(&path),
        })
        .collect()
}

#[tokio::test]
async fn an_ova_is_made_without_asking_vcenter() {
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let vcenter = BadServer::start_tls(|_, _| Answer::status(500)).await;
    let address = vcenter.base().rsplit_once('/').unwrap().1.to_owned();
    // No password: none is needed.
    let flags = air_gapped_for("vsphere", &settings(&address), dir.path(), &mirror);
    let output = build(dir.path()).args(flags).output().await.unwrap();
    let failure = failure(&output);
    assert_eq!((failure.stage, failure.reason.as_str()), (Stage::Install, "NotARootFileSystem"), "{failure:?}");
    assert_eq!(vcenter.requests().len(), 0);
}

#[tokio::test]
async fn a_template_is_looked_after_in_vcenter_first_with_a_password_that_is_written_nowhere() {
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let vcenter = Vcenter::start(&[]).await;
    let mut wanted = settings(&vcenter.server);
    wanted["convert_to_template"] = json!("true");
    let flags = air_gapped_for("vsphere", &wanted, dir.path(), &mirror);

    let output = build(dir.path()).args(&flags).output().await.unwrap();
    let unknown = failure(&output);
    assert_eq!((unknown.class, unknown.reason.as_str()), (FailureClass::BadInput, "InvalidFlags"), "{unknown:?}");
    assert!(unknown.message.contains("password") && unknown.message.contains("--credentials-file"), "{unknown:?}");

    let mut command = build(dir.path());
    let output = command.args(&flags).env("EKSA_VSPHERE_PASSWORD", "not-the-password").output().await.unwrap();
    let refused = failure(&output);
    assert_eq!((refused.stage, refused.reason.as_str()), (Stage::Prepare, "VcenterCredentialsRefused"), "{refused:?}");

    let mut command = build(dir.path());
    let output = command.args(&flags).env("EKSA_VSPHERE_PASSWORD", PASSWORD).output().await.unwrap();
    let failure = failure(&output);
    assert_eq!((failure.stage, failure.reason.as_str()), (Stage::Install, "NotARootFileSystem"), "{failure:?}");
    let said = [text(&output.stdout), text(&output.stderr)];
    assert!(contents(dir.path()).iter().chain(&said).all(|text| !text.contains(PASSWORD)));
}
