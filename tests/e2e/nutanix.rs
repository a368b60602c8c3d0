//! An image in Prism Central: from `kubectl apply` to an uploaded qcow2 that boots by BIOS and goes with its resource, and is
//! what the command line starts another one from.
//! Prism Central is the test server of `tests/it/nutanix`.

use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use axum::http::Method;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::contract::BuildReport;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::{
    cluster::{TestNamespace, boot, condition, setting, status},
    mirror::{CHANNEL, spec},
    prism::{CLUSTER, Fault, PASSWORD, Prism, USERNAME},
};

const LIMIT: Duration = Duration::from_secs(25 * 60);

#[tokio::test]
async fn an_image_is_built_uploaded_booted_and_removed() {
    let prism = Prism::start_at(&setting("NIB_HOST_IP")).await;
    let namespace = TestNamespace::create("nutanix").await;
    namespace.apply_secret("prism", json!({"username": USERNAME, "password": PASSWORD})).await;
    let mut spec = spec();
    spec.as_object_mut().unwrap().remove("baremetal");
    spec["nutanix"] = json!({
        "endpoint": setting("NIB_HOST_IP"),
        "port": prism.port,
        "credentialsSecretRef": {"name": "prism"},
        "insecure": true,
        "cluster": {"name": CLUSTER},
        "subnet": "vm-network",
        "categories": {"Environment": "Staging"},
    });
    // The disk that Prism Central has is booted below.
    spec["verify"] = json!({"boot": "Never"});
    spec["deletionPolicy"] = json!("Delete");

    // A name that Prism Central does not know is told at once, with those that are like it.
    let mut wrong = spec.clone();
    wrong["nutanix"]["cluster"] = json!({"name": "pe-cluster-9"});
    namespace.apply("wrong-cluster", wrong).await;
    let build = namespace.wait_stalled("wrong-cluster", Duration::from_secs(120)).await;
    let message = condition(&build, "Stalled").unwrap()["message"].as_str().unwrap().to_owned();
    eprintln!("  wrong-cluster: {message}");
    assert!(message.contains("pe-cluster-9") && message.contains(CLUSTER), "{message}");
    namespace.delete_build("wrong-cluster").await;

    namespace.apply("image", spec).await;
    let build = namespace.wait_ready("image", LIMIT).await;
    let image = status(&build)["image"].clone();
    let (name, uuid) = (image["name"].as_str().unwrap(), image["uuid"].as_str().unwrap());
    assert!(name.starts_with("debian-12-kube-1-34-") && image["format"] == "qcow2", "{image}");
    assert_eq!(prism.images(), [(name.to_owned(), uuid.to_owned())]);
    let document = serde_json::to_string_pretty(&prism.image(uuid)).unwrap();
    eprintln!("  the image in Prism Central: {document}");
    let readable = namespace.everything_readable().await;
    assert!(!readable.contains(PASSWORD), "the password can be read in the cluster");
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("exported.qcow2");
    std::fs::copy(prism.file(uuid), &disk).unwrap();
    boot(&disk, "nutanix");

    from_it(&prism, (name.to_owned(), uuid.to_owned()), &disk.with_extension("exported")).await;

    namespace.delete_build("image").await;
    assert_eq!(prism.names(), [SECOND], "an image stays that should go with its resource");
    namespace.delete().await;
}

/// Builds another image from one that Prism Central has, by the command line; `raw` is its disk. The first time it is stopped
/// in the middle of the upload.
pub async fn from_it(prism: &Prism, source: (String, String), raw: &Path) {
    let (name, uuid) = source.clone();
    let here = tempfile::tempdir().unwrap();
    let flags = flags(here.path(), prism, &name);
    prism.arm(Method::PUT, "/file", 1, Fault::StallAfter(1 << 20));
    let mut stopped = image_builder(here.path()).args(&flags).stdout(Stdio::piped()).spawn().unwrap();
    tokio::time::timeout(LIMIT, prism.stalled()).await.expect("the upload does not begin");
    let begin = Instant::now();
    kill(Pid::from_raw(i32::try_from(stopped.id().unwrap()).unwrap()), Signal::SIGINT).unwrap();
    let status = stopped.wait().await.unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(begin.elapsed() < Duration::from_secs(5), "stopping took {:?}", begin.elapsed());
    assert_eq!(prism.images(), std::slice::from_ref(&source), "a build that was stopped leaves something behind");

    let output = image_builder(here.path()).args(&flags).output().await.unwrap();
    let report: BuildReport = serde_json::from_slice(&output.stdout).unwrap();
    let BuildReport::Succeeded(outcome) = report else { panic!("{report:?}") };
    eprintln!("  from the first image: {outcome:?}");
    assert!(outcome.verification.contains("booted"), "{}", outcome.verification);
    let mut expected = [source, (SECOND.to_owned(), outcome.image.uuid.unwrap())];
    let mut images = prism.images();
    expected.sort();
    images.sort();
    assert_eq!(images, expected);
    let digest = Command::new("sha256sum").arg(raw).output().await.unwrap();
    let digest = String::from_utf8(digest.stdout).unwrap();
    let digest = digest.split_whitespace().next().unwrap();
    assert_eq!(outcome.image.base_digest, Some(format!("sha256:{digest}")));
    let provenance = outcome.image.provenance.unwrap().to_file_path().unwrap();
    let provenance: Value = serde_json::from_slice(&std::fs::read(provenance).unwrap()).unwrap();
    let base = &provenance["predicate"]["buildDefinition"]["resolvedDependencies"][0];
    assert_eq!((&base["name"], &base["digest"]["sha256"]), (&json!("base"), &json!(digest)), "{base}");
    assert!(base["uri"].as_str().unwrap().ends_with(&format!("/images/{uuid}/file")), "{base}");
}

/// Name of the image that is built from the first one.
const SECOND: &str = "from-the-first-kube-1-34";

fn image_builder(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    command.current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Flags of a build from an image in Prism Central, whose settings are written into `dir`.
fn flags(dir: &Path, prism: &Prism, source: &str) -> Vec<String> {
    let settings = json!({
        "nutanix_endpoint": setting("NIB_HOST_IP"),
        "nutanix_port": prism.port.to_string(),
        "nutanix_insecure": "true",
        "nutanix_cluster_name": CLUSTER,
        "nutanix_subnet_name": "vm-network",
        "nutanix_username": USERNAME,
        "nutanix_password": PASSWORD,
        "image_name": SECOND,
        "source_image_name": source,
        "image_export": "true",
    });
    let file = dir.join("nutanix-connection.json");
    std::fs::write(&file, settings.to_string()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let manifest = format!("{}/releases/eks-a/manifest.yaml", setting("NIB_MIRROR_URL"));
    let line = format!(
        "build --os debian --hypervisor nutanix --nutanix-config nutanix-connection.json --release-channel {CHANNEL} \
         --release-manifest-url {manifest} --work-dir work --output json"
    );
    line.split_whitespace().map(ToOwned::to_owned).collect()
}
