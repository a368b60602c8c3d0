//! Red Hat Enterprise Linux, as far as it goes without one: the whole recipe on a tree of Debian's programs that says it is
//! rhel 9 (`dev/mirror/redhat`), with packages by dnf from a subscription whose service is here. docs/redhat.md says what
//! that proves.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use gpt::{GptConfig, partition_types};
use node_image_builder::{
    contract::{BuildOutcome, BuildReport},
    package,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, process::Command, sync::watch};

use crate::{cluster::setting, mirror::CHANNEL};

/// The settings of the base's subscription-manager lead here.
const ADDRESS: &str = "127.0.0.1:18481";
/// What the system is at the subscription service.
const ID: &str = "8f0c0a34";
const PASSWORD: &str = "correct horse battery staple";

/// What the subscription service was asked, in its order: path and body.
type Asked = Arc<watch::Sender<Vec<(String, Value)>>>;

/// The subscription service, and a mirror of the release, of the base and of the packages.
#[derive(Clone)]
struct Service {
    asked: Asked,
    roots: Arc<Vec<PathBuf>>,
    /// Whether the subscription's packages are never sent.
    stalled: bool,
}

impl Service {
    async fn start(dir: &Path, stalled: bool) -> (Self, tokio::task::JoinHandle<()>) {
        let (documents, mirror) = (dir.join("documents"), PathBuf::from(setting("NIB_MIRROR_DIR")));
        let written = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/mirror/documents"))
            .args([&mirror, &documents])
            .arg(format!("http://{ADDRESS}"))
            .status()
            .await
            .unwrap();
        assert!(written.success());
        let service = Self { asked: Asked::default(), roots: Arc::new(vec![documents, mirror]), stalled };
        let router = Router::new()
            .route("/subscription/register", post(register))
            .route("/subscription/unregister", post(unregister))
            .fallback(file)
            .with_state(service.clone());
        // The tests run one after another.
        let listener = TcpListener::bind(ADDRESS).await.unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (service, task)
    }

    fn paths(&self) -> Vec<String> {
        self.asked.borrow().iter().map(|(path, _)| path.clone()).collect()
    }
}

async fn register(State(service): State<Service>, Json(body): Json<Value>) -> Response {
    let refused = body["wish"]["password"] != PASSWORD;
    service.asked.send_modify(|asked| asked.push(("register".to_owned(), body)));
    if refused {
        return (StatusCode::UNAUTHORIZED, "Invalid username or password.").into_response();
    }
    let packages = if service.stalled { "stalled" } else { "redhat/packages" };
    Json(json!({"id": ID, "baseurl": format!("http://{ADDRESS}/{packages}")})).into_response()
}

async fn unregister(State(service): State<Service>, Json(body): Json<Value>) -> Response {
    service.asked.send_modify(|asked| asked.push(("unregister".to_owned(), body)));
    Json(json!({})).into_response()
}

async fn file(State(service): State<Service>, request: Request) -> Response {
    let path = request.uri().path().trim_start_matches('/').to_owned();
    if path.starts_with("stalled/") {
        service.asked.send_modify(|asked| asked.push(("packages".to_owned(), Value::Null)));
        return std::future::pending().await;
    }
    let Some(file) = service.roots.iter().map(|root| root.join(&path)).find(|file| file.is_file()) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let file = tokio::fs::File::open(file).await.unwrap();
    Body::from_stream(tokio_util::io::ReaderStream::new(file)).into_response()
}

/// A build of the command line, with more settings.
fn build(dir: &Path, more: &Value) -> Command {
    let base = PathBuf::from(setting("NIB_MIRROR_DIR")).join("redhat/rhel-9-rootfs.tar.zst");
    let mut settings = json!({
        "iso_url": format!("http://{ADDRESS}/redhat/rhel-9-rootfs.tar.zst"),
        "iso_checksum": hex::encode(Sha256::digest(fs::read(base).unwrap())),
        "iso_checksum_type": "sha256",
        "rhel_username": "someone",
        "rhel_password": PASSWORD,
        // Fedora's is not here.
        "redhat_epel_rpm": "",
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let file = dir.join("baremetal.json");
    fs::write(&file, settings.to_string()).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    let line = format!(
        "build --os redhat --os-version 9 --hypervisor baremetal --release-channel {CHANNEL} --eksa-release v0.26.1 \
         --release-manifest-url http://{ADDRESS}/releases/eks-a/manifest.yaml --baremetal-config baremetal.json --output json"
    );
    command.args(line.split_whitespace()).current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command
}

fn report(output: &Output) -> BuildReport {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains(PASSWORD), "the password is in the log");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{said}"))
}

/// What `debugfs` says about a file of the image.
async fn in_image(disk: &Path, offset: u64, request: &str) -> String {
    let device = format!("{}?offset={offset}", disk.display());
    let output = Command::new("debugfs").args(["-R", request, &device]).output().await.unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn an_image_is_built_with_a_subscription_boots_from_partition_1_and_keeps_its_promises() {
    let dir = tempfile::tempdir().unwrap();
    let (service, task) = Service::start(dir.path(), false).await;
    let output = build(dir.path(), &json!({"extra_rpms": "lsscsi"})).output().await.unwrap();
    task.abort();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let BuildReport::Succeeded(outcome) = report(&output) else { panic!("{said}") };
    let BuildOutcome { image, verification, .. } = *outcome;
    assert!(verification.contains("booted"), "{verification}");
    println!("{verification}");

    // Registered once and given back, and nobody else could read the password meanwhile.
    assert_eq!(service.paths(), ["register", "unregister"]);
    assert_eq!(service.asked.borrow()[1].1["id"], ID, "another machine was given back");
    let wish = service.asked.borrow()[0].1.clone();
    assert_eq!(
        (wish["wish"]["username"].as_str(), wish["wish"]["password"].as_str()),
        (Some("someone"), Some(PASSWORD))
    );
    let visible = wish["visible"].as_array().unwrap();
    assert!(visible.iter().any(|text| text.as_str().unwrap().contains("json.load(sys.stdin)")));
    assert!(!visible.iter().any(|text| text.as_str().unwrap().contains(PASSWORD)), "other processes see the password");

    let file = dir.path().join(format!("redhat-9-kube-{CHANNEL}.gz"));
    assert_eq!(image.url.unwrap().to_file_path().unwrap(), file);
    let disk = dir.path().join("disk.raw");
    package::unpack(&file, &disk).unwrap();
    let table = GptConfig::new().open(&disk).unwrap();
    let parts = table.partitions();
    assert_eq!(parts[&1].part_type_guid, partition_types::LINUX_FS);
    assert_eq!(parts[&2].part_type_guid, partition_types::EFI);
    assert!(parts[&1].first_lba > parts[&2].last_lba, "the root file system can not grow");
    let root = parts[&1].first_lba * 512;
    for directory in ["/etc/pki/consumer", "/etc/pki/entitlement", "/var/cache/dnf", "/boot/efi"] {
        let names: BTreeSet<_> = in_image(&disk, root, &format!("ls -p {directory}"))
            .await
            .lines()
            .filter_map(|line| line.split('/').nth(5).map(ToOwned::to_owned))
            .collect();
        assert!(names.iter().all(|name| matches!(name.as_str(), "." | ".." | "")), "{directory} holds {names:?}");
    }
    let settings = in_image(&disk, root, "cat /etc/rhsm/rhsm.conf").await;
    assert!(settings.contains(ADDRESS) && !settings.contains("proxy"), "{settings}");
    let held = in_image(&disk, root, "cat /etc/dnf/dnf.conf").await;
    assert!(held.contains(" lsscsi "), "{held}");
}

#[tokio::test]
async fn a_build_that_fails_gives_its_system_back() {
    let dir = tempfile::tempdir().unwrap();
    let (service, task) = Service::start(dir.path(), false).await;
    let output = build(dir.path(), &json!({"extra_rpms": "no-such-package"})).output().await.unwrap();
    assert_eq!(service.paths(), ["register", "unregister"]);
    let BuildReport::Failed(failure) = report(&output) else { panic!("a package that does not exist was installed") };
    assert_eq!((failure.reason.as_str(), output.status.code()), ("PackagesRefused", Some(65)));
    assert!(failure.message.contains("no-such-package"), "{}", failure.message);

    // Refused credentials are told as such, and there is nothing to give back.
    let wrong = json!({"rhel_password": "not the one"});
    let output = build(dir.path(), &wrong).output().await.unwrap();
    assert_eq!(service.paths(), ["register", "unregister", "register"]);
    let BuildReport::Failed(failure) = report(&output) else { panic!("wrong credentials were taken") };
    assert_eq!(failure.reason, "SubscriptionRefused", "{}", failure.message);
    assert!(!failure.message.contains("not the one"), "{}", failure.message);
    task.abort();
}

#[tokio::test]
async fn a_build_that_is_cancelled_gives_its_system_back() {
    let dir = tempfile::tempdir().unwrap();
    let (service, task) = Service::start(dir.path(), true).await;
    let mut child = build(dir.path(), &json!({})).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // dnf waits for the package lists.
    let mut asked = service.asked.subscribe();
    let waits = asked.wait_for(|asked| asked.iter().any(|(path, _)| path == "packages"));
    tokio::time::timeout(Duration::from_secs(600), waits).await.expect("dnf asks for packages").unwrap();
    let id = nix::unistd::Pid::from_raw(child.id().unwrap().try_into().unwrap());
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status: ExitStatus =
        tokio::time::timeout(Duration::from_secs(60), child.wait()).await.expect("the build stops").unwrap();
    assert_eq!(status.code(), Some(130));
    let paths = service.paths();
    assert_eq!(
        (paths.first().map(String::as_str), paths.last().map(String::as_str)),
        (Some("register"), Some("unregister"))
    );
    task.abort();
}
