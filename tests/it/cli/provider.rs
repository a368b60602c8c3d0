//! Builds for vSphere and Nutanix: the provider is asked only where the image is to go there, by credentials that stay in
//! memory.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use node_image_builder::contract::{FailureClass, Stage};
use serde_json::{Value, json};

use super::{
    build::{air_gapped_for, build, failure, mirror},
    text,
};
use crate::{
    nutanix::prism::{self, CLUSTER, Prism},
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

/// A disk with a system that is not the one that is built.
fn other_system(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("tree");
    for directory in ["bin", "etc", "sbin", "usr/bin", "usr/lib"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    for program in ["bin/sh", "usr/bin/dpkg", "sbin/init"] {
        fs::write(tree.join(program), "").unwrap();
    }
    fs::write(tree.join("usr/lib/os-release"), "ID=debian\nVERSION_ID=\"12\"\n").unwrap();
    symlink("../usr/lib/os-release", tree.join("etc/os-release")).unwrap();
    let disk = dir.join("disk");
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &disk]).arg("32M").status().unwrap();
    assert!(made.success());
    disk
}

/// Needs root, as a build does; `make test` has it.
#[tokio::test]
async fn an_image_in_prism_central_is_downloaded_and_must_be_the_system_that_is_built() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let scratch = tempfile::tempdir().unwrap();
    let prism = Prism::start().await;
    let settings = json!({
        "nutanix_endpoint": "127.0.0.1",
        "nutanix_port": prism.port.to_string(),
        "nutanix_insecure": "true",
        "nutanix_cluster_name": CLUSTER,
        "nutanix_subnet_name": "vm-network",
        "nutanix_username": prism::USERNAME,
        "nutanix_password": prism::PASSWORD,
        "image_name": "ubuntu-2204-kube-1-31",
        "source_image_name": "golden",
    });
    let flags = air_gapped_for("nutanix", &settings, dir.path(), &mirror);
    let output = build(dir.path()).args(&flags).output().await.unwrap();
    let missing = failure(&output);
    assert_eq!((missing.stage, missing.reason.as_str()), (Stage::Prepare, "PrismObjectNotFound"), "{missing:?}");
    assert!(missing.message.contains("sourceImageName `golden`"), "{missing:?}");

    let uuid = prism.add_disk("golden", &other_system(scratch.path()));
    let output = build(dir.path()).args(&flags).output().await.unwrap();
    let failure = failure(&output);
    assert_eq!((failure.stage, failure.reason.as_str()), (Stage::Install, "BaseIsAnotherSystem"), "{failure:?}");
    assert!(failure.message.contains("the base is debian 12 and spec.os is ubuntu 22.04"), "{failure:?}");
    assert!(text(&output.stderr).contains("downloading golden from 127.0.0.1"), "{}", text(&output.stderr));
    assert_eq!(mirror.count("/base.tar"), 0);
    assert_eq!(prism.images(), [("golden".to_owned(), uuid)]);
}
