//! The command line without a cluster: what a person downloads where the Internet is becomes an image where it is not, and a
//! template in the vCenter there.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
};

use axum::{Router, body::Body, extract::Request, http::StatusCode, response::IntoResponse};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use node_image_builder::contract::{BuildOutcome, BuildReport};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, process::Command};

use crate::{
    cluster::setting,
    mirror::{CHANNEL, base},
    vsphere::{self, Vcenter},
};

/// Variables that would lead the way out.
const PROXIES: [&str; 6] = ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"];

fn image_builder(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    command.current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    for name in PROXIES {
        command.env_remove(name);
    }
    command
}

/// Serves the files below `roots`, the first one that has it.
async fn serve(listener: TcpListener, roots: Vec<PathBuf>) {
    let answer = move |request: Request| {
        let path = request.uri().path().trim_start_matches('/').to_owned();
        let file = roots.iter().map(|root| root.join(&path)).find(|file| file.is_file());
        async move {
            let Some(file) = file else { return StatusCode::NOT_FOUND.into_response() };
            let file = tokio::fs::File::open(file).await.unwrap();
            Body::from_stream(tokio_util::io::ReaderStream::new(file)).into_response()
        }
    };
    axum::serve(listener, Router::new().fallback(answer)).await.unwrap();
}

/// Runs `work` on a thread whose network is a loopback and nothing else; its children have the same.
fn without_network<T: Send + 'static>(work: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("end-to-end tests run as root");
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work())
    });
    thread.join().unwrap()
}

/// An ordinary user of this thread and what it starts, who has subordinate ids.
const USER: u32 = 54_321;

/// Makes [`USER`] known to this thread and what it starts.
fn add_user(scratch: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).expect("end-to-end tests run as root");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let passwd = fs::read_to_string("/etc/passwd").unwrap() + &format!("ordinary:x:{USER}:{USER}::/:/bin/sh\n");
    let ids = "ordinary:3000000:65536\n";
    for (name, content) in [("passwd", passwd.as_str()), ("subuid", ids), ("subgid", ids)] {
        let file = scratch.join(name);
        fs::write(&file, content).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        mount(Some(&file), &Path::new("/etc").join(name), none, MsFlags::MS_BIND, none).unwrap();
    }
}

/// The program as [`USER`], to whom `dir` is given. It may use KVM where there is one.
fn as_user(dir: &Path, scratch: &Path) -> Command {
    let given = std::process::Command::new("chown").args(["-Rh", &USER.to_string()]).arg(dir).status().unwrap();
    assert!(given.success());
    for dir in [dir, scratch] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let program = scratch.join("image-builder");
    fs::copy(env!("CARGO_BIN_EXE_image-builder"), &program).unwrap();
    let groups = fs::metadata("/dev/kvm").map_or(USER, |device| device.gid());
    let mut command = Command::new("setpriv");
    for name in PROXIES {
        command.env_remove(name);
    }
    let id = USER.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--groups", &groups.to_string(), "--"]).arg(program);
    command.current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Downloads everything from a mirror of the release, and gives its address.
async fn download(dir: &Path) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let documents = dir.join("documents");
    let mirror = PathBuf::from(setting("NIB_MIRROR_DIR"));
    let written = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/mirror/documents"))
        .args([&mirror, &documents])
        .arg(format!("http://{address}"))
        .status()
        .await
        .unwrap();
    assert!(written.success());
    let internet = tokio::spawn(serve(listener, vec![documents, mirror]));
    let manifest = format!("http://{address}/releases/eks-a/manifest.yaml");
    for arguments in [&["manifests"][..], &["artifacts", "--release-channel", CHANNEL, "--eksa-release", "v0.26.1"]] {
        let mut command = image_builder(dir);
        command.arg("download").args(arguments).args(["--release-manifest-url", &manifest]);
        assert!(command.status().await.unwrap().success(), "{arguments:?}");
    }
    internet.abort();
    address
}

/// Flags of the build, whose files are written into `dir`.
fn flags(dir: &Path, address: &str, vcenter: &str) -> Vec<String> {
    // The base has the packages of the recipe; the private package source has no newer ones.
    fs::create_dir_all(dir.join("mirror/debian")).unwrap();
    fs::write(dir.join("mirror/debian/Packages"), "").unwrap();
    fs::write(dir.join("private.list"), format!("deb [trusted=yes] http://{address}/debian ./\n")).unwrap();
    let base = base(&format!("http://{address}"));
    let file = base["url"].as_str().unwrap().rsplit_once("/base/").unwrap().1.to_owned();
    let source = PathBuf::from(setting("NIB_MIRROR_DIR")).join("base").join(file);
    fs::write(dir.join("motd"), "built without a network\n").unwrap();
    let files = json!({ "additional_files_list": [{ "src": "motd", "dest": "/etc/motd", "mode": 644 }] });
    fs::write(dir.join("files.json"), files.to_string()).unwrap();
    let config = json!({
        "vcenter_server": vcenter,
        "insecure_connection": "true",
        "datacenter": "DC0",
        "cluster": "DC0_C0",
        "datastore": "LocalDS_0",
        "network": "VM Network",
        "folder": "templates",
        "convert_to_template": "true",
        "username": vsphere::USERNAME,
        "iso_url": base["url"],
        "iso_checksum": hex::encode(Sha256::digest(fs::read(source).unwrap())),
        "iso_checksum_type": "sha256",
        "eksa_build_tooling_repo_url": "https://git.example.com/eks-anywhere-build-tooling.git",
        "image_builder_repo_url": "https://git.example.com/image-builder.git",
        "private_artifacts_eksa_fqdn": format!("http://{address}"),
        "private_artifacts_eksd_fqdn": format!("http://{address}"),
        "extra_repos": dir.join("private.list"),
        "disable_public_repos": "true",
    });
    fs::write(dir.join("vsphere.json"), config.to_string()).unwrap();
    fs::set_permissions(dir.join("vsphere.json"), fs::Permissions::from_mode(0o600)).unwrap();
    let line = format!(
        "build --os debian --hypervisor vsphere --firmware efi --release-channel {CHANNEL} --eksa-release v0.26.1 \
         --vsphere-config vsphere.json --files-config files.json --air-gapped \
         --manifest-tarball eks-a-manifests.tar --output json"
    );
    line.split_whitespace().map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn an_ordinary_user_builds_a_template_in_a_network_that_has_only_the_private_mirror_and_vcenter() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    // The private mirror has the same address, in a network of its own.
    let address = download(dir.path()).await;
    let here = dir.path().to_owned();
    let scratch = tempfile::tempdir().unwrap();
    let users = scratch.path().to_owned();
    let (output, machines) = tokio::task::spawn_blocking(move || {
        without_network(async move || {
            let vcenter = Vcenter::start_at("127.0.0.1");
            let flags = flags(&here, &address, &vcenter.server);
            // No documents here: those are in the archive alone.
            let roots = ["eks-a-artifacts", "eks-d-artifacts", "mirror"].map(|name| here.join(name));
            let base = PathBuf::from(setting("NIB_MIRROR_DIR")).join("base");
            std::os::unix::fs::symlink(base, here.join("mirror/base")).unwrap();
            let listener = TcpListener::bind(&address).await.unwrap();
            let mirror = tokio::spawn(serve(listener, roots.to_vec()));
            add_user(&users);
            let mut build = as_user(&here, &users);
            let output = build.args(flags).env("EKSA_VSPHERE_PASSWORD", vsphere::PASSWORD).output().await.unwrap();
            mirror.abort();
            (output, vcenter.machines().await)
        })
    })
    .await
    .unwrap();

    let report: BuildReport = serde_json::from_slice(&output.stdout).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let BuildReport::Succeeded(outcome) = report else { panic!("{report:?}\n{said}") };
    let BuildOutcome { image, verification, .. } = *outcome;
    let path = dir.path().join(format!("debian-12-kube-{CHANNEL}.ova"));
    assert_eq!(image.url.unwrap().to_file_path().unwrap(), path);
    assert!(verification.contains("booted"), "{verification}");
    let checked = Command::new("sha256sum")
        .args(["--check", "--quiet"])
        .arg(format!("{}.sha256", path.display()))
        .current_dir(dir.path())
        .status()
        .await
        .unwrap();
    assert!(checked.success());
    let [template] = &machines[..] else { panic!("{machines:?}") };
    let place = image.vsphere.map(|image| image.inventory_path);
    assert_eq!((template["path"].as_str(), &template["template"]), (place.as_deref(), &json!(true)), "{template}");
    let tags: Vec<_> = template["tags"].as_array().unwrap().iter().filter_map(|tag| tag.as_str()).collect();
    assert!(matches!(tags[..], [eksd, "os/os:debian"] if eksd.starts_with("eksdRelease/eksdRelease:")), "{tags:?}");
    assert!(!said.contains(vsphere::PASSWORD), "the password is printed");
    // Nothing but the image and its checksum is new.
    assert!(!dir.path().join(".image-builder").exists());
}
