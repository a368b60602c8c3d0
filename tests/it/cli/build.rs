//! `build` up to where a whole root file system is needed; the end-to-end tests go on from there.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::contract::{BuildReport, FailureClass, FailureReport, Stage};
use rstest::rstest;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{process::Command, time::timeout};

use super::{image_builder, names, text};
use crate::support::bad_server::{Answer, BadServer, Request, Step};

/// Nothing listens here.
const NOWHERE: &str = "http://127.0.0.1:9";

/// The program, on a machine whose only way out is a proxy that is not there. Loopback is near.
pub fn build(dir: &Path) -> Command {
    let mut command = image_builder(dir);
    command.arg("build").envs([("HTTP_PROXY", NOWHERE), ("HTTPS_PROXY", NOWHERE), ("NO_PROXY", "127.0.0.1")]);
    command
}

/// The report of a failed build, from its standard output.
pub fn failure(output: &Output) -> FailureReport {
    let report = serde_json::from_slice(&output.stdout);
    match report.unwrap_or_else(|error| panic!("{error}: {}\n{}", text(&output.stdout), text(&output.stderr))) {
        BuildReport::Failed(failure) => {
            assert_eq!(output.status.code(), Some(i32::from(failure.class.exit_code())));
            failure
        }
        BuildReport::Succeeded(outcome) => panic!("{outcome:?}"),
    }
}

#[tokio::test]
async fn a_machine_that_lacks_tools_is_told_what_is_missing_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = build(dir.path());
    command.args(["--os=ubuntu", "--hypervisor=baremetal", "--output=json"]).env("PATH", "/nonexistent");
    let output = command.output().await.unwrap();
    let (failure, said) = (failure(&output), text(&output.stderr));
    assert_eq!((failure.class, failure.reason.as_str()), (FailureClass::Environment, "MachineUnfit"));
    assert!(
        said.contains("MISSING") && said.contains("apt-get install dosfstools") && !said.contains("ok  "),
        "{said}"
    );
    assert!(said.contains("anywhere-assets.eks.amazonaws.com") && said.contains("does not answer"), "{said}");
    assert_eq!(names(dir.path()), [""; 0]);
}

#[rstest]
#[case::flag("--os=centos --hypervisor=baremetal", "InvalidFlags", "write ubuntu, redhat or debian")]
#[case::file("--os=ubuntu --hypervisor=baremetal --baremetal-config=gone.json", "ConfigUnreadable", "gone.json")]
#[case::hypervisor("--os=ubuntu --hypervisor=ami", "NotSupported", "write baremetal, vsphere or nutanix")]
#[case::installer("--os=ubuntu --hypervisor=baremetal --baremetal-config=iso.json", "NotSupported", "ImageBuilder")]
#[tokio::test]
async fn what_can_not_be_built_is_refused_before_anything_begins(
    #[case] line: &str,
    #[case] reason: &str,
    #[case] message: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let iso =
        json!({ "iso_url": "https://a.test/x.iso", "iso_checksum": "ab".repeat(32), "iso_checksum_type": "sha256" });
    fs::write(dir.path().join("iso.json"), iso.to_string()).unwrap();
    let output = build(dir.path()).args(line.split(' ')).arg("--output=json").output().await.unwrap();
    let failure = failure(&output);
    assert_eq!((failure.class, failure.reason.as_str()), (FailureClass::BadInput, reason));
    assert!(failure.message.contains(message) && text(&output.stderr).contains(message), "{failure:?}");
    assert_eq!(names(dir.path()), ["iso.json"]);
}

/// A private mirror that keeps the paths of the public hosts below `/eks-a` and `/eks-d`. A base is on it, too, which is
/// an archive and no system.
pub fn mirror(request: &Request) -> Answer {
    match request.target.split_once("/artifacts/") {
        Some((_, file)) => match file.strip_suffix(".sha256") {
            Some(file) => Answer::body(format!("{}  {file}\n", hex::encode(Sha256::digest(file)))),
            None => Answer::body(file),
        },
        None if request.target == "/base.tar" => Answer::body(base()),
        None => Answer::status(404),
    }
}

fn base() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(vec![]);
    archive.append_data(&mut header, "hello", b"hello".as_slice()).unwrap();
    archive.into_inner().unwrap()
}

/// What `download manifests` makes where the Internet is: documents that name the public hosts.
fn write_manifests(path: &Path) {
    let mut archive = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, document) in [
        ("eks-a-bundles-v0.26.1.yaml", include_str!("../documents/bundles.yaml")),
        ("eks-a-manifest.yaml", include_str!("../documents/eks-a-release.yaml")),
        ("eks-d-1-31.yaml", include_str!("../documents/kubernetes-1-31-eks-47.yaml")),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(document.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, document.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap();
}

/// Flags of an air-gapped build, whose files are written into `dir`.
pub fn air_gapped(dir: &Path, mirror: &BadServer) -> Vec<String> {
    air_gapped_for("baremetal", &json!({}), dir, mirror)
}

/// The same for any hypervisor, with further settings.
pub fn air_gapped_for(hypervisor: &str, more: &Value, dir: &Path, mirror: &BadServer) -> Vec<String> {
    write_manifests(&dir.join("eks-a-manifests.tar"));
    let repository = dir.join("mirror.list");
    fs::write(&repository, "deb [trusted=yes] http://127.0.0.1:9/debian ./\n").unwrap();
    let mut config = json!({
        "iso_url": mirror.url("/base.tar"),
        "iso_checksum": hex::encode(Sha256::digest(base())),
        "iso_checksum_type": "sha256",
        "eksa_build_tooling_repo_url": "https://git.test/a.git",
        "image_builder_repo_url": "https://git.test/b.git",
        "private_artifacts_eksa_fqdn": mirror.url("/eks-a"),
        "private_artifacts_eksd_fqdn": mirror.url("/eks-d"),
        "extra_repos": repository,
        "disable_public_repos": "true",
        "no_proxy": "127.0.0.1",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let path = dir.join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let line = format!(
        "--os=ubuntu --hypervisor={hypervisor} --{hypervisor}-config=config.json --air-gapped \
         --manifest-tarball=eks-a-manifests.tar --output=json"
    );
    line.split_whitespace().map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn an_air_gapped_build_reaches_its_base_by_the_mirrors_alone() {
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let output = build(dir.path()).args(air_gapped(dir.path(), &mirror)).output().await.unwrap();
    let (failure, said) = (failure(&output), text(&output.stderr));
    assert_eq!((failure.stage, failure.reason.as_str()), (Stage::Install, "NotARootFileSystem"), "{failure:?}");
    assert!(said.contains("building for Kubernetes v1.31.14 (kubernetes-1-31-eks-47, v0.26.1)"), "{said}");
    assert!(said.contains("[ 12%] Install: unpacking the base"), "{said}");
    for path in ["/eks-a/releases/bundles/112/artifacts/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz", "/base.tar"] {
        let gets = mirror.requests().into_iter().filter(|request| request.target == path && request.method == "GET");
        assert_eq!(gets.count(), 1, "{path}");
    }
    // What was fetched stays for the next attempt.
    assert_eq!(names(&dir.path().join(".image-builder")), ["cache", "lock", "manifests"]);
}

#[tokio::test]
async fn a_directory_is_one_builds_alone_and_ctrl_c_leaves_nothing_half_made() {
    let held = "/eks-a/releases/bundles/112/artifacts/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz";
    let mirror = BadServer::start(move |request, _| {
        if request.target == held { Answer::promise(100, vec![Step::Stall]) } else { mirror(request) }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let flags = air_gapped(dir.path(), &mirror);
    let mut command = build(dir.path());
    let mut first = command.args(&flags).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let begun = async {
        let mut again = tokio::time::interval(Duration::from_millis(20));
        while mirror.count(held) == 0 {
            again.tick().await;
        }
    };
    timeout(Duration::from_secs(120), begun).await.expect("the build does not begin");

    let output = build(dir.path()).args(&flags).output().await.unwrap();
    assert_eq!(failure(&output).reason, "WorkDirectoryBusy");

    kill(Pid::from_raw(i32::try_from(first.id().unwrap()).unwrap()), Signal::SIGINT).unwrap();
    timeout(Duration::from_secs(5), first.wait()).await.expect("it does not stop").unwrap();
    let failure = failure(&first.wait_with_output().await.unwrap());
    assert_eq!((failure.class, failure.stage), (FailureClass::Cancelled, Stage::Fetch));
    assert!(!dir.path().join(".image-builder/build").exists());
}

#[tokio::test]
async fn documents_that_nobody_signed_are_told_and_refused_on_demand() {
    let (dir, mirror) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let flags = air_gapped(dir.path(), &mirror);
    let output = build(dir.path()).args(&flags).output().await.unwrap();
    assert_eq!(failure(&output).stage, Stage::Install);
    assert!(text(&output.stderr).contains("the signature of file:///"), "{}", text(&output.stderr));

    let output = build(dir.path()).args(&flags).arg("--signatures=Require").output().await.unwrap();
    let failure = failure(&output);
    assert_eq!((failure.class, failure.reason.as_str()), (FailureClass::BadInput, "SignatureInvalid"), "{failure:?}");
    assert!(failure.message.contains("eks-a-bundles-v0.26.1.yaml"), "{failure:?}");
}
