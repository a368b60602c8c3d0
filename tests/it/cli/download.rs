//! `download manifests` and `download artifacts` against a mirror.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, time::timeout};

use super::{image_builder, names, run, text};
use crate::support::bad_server::{Answer, BadServer, Request, Step};

const RELEASES: &str = include_str!("../documents/eks-a-release.yaml");
const BUNDLES: &str = include_str!("../documents/bundles.yaml");
const DISTRO: &str = include_str!("../documents/kubernetes-1-31-eks-47.yaml");
const MANIFEST: &str = "/releases/eks-a/manifest.yaml";
const KUBELET: &str = "/kubernetes-1-31/releases/47/artifacts/kubernetes/v1.31.14/bin/linux/amd64/kubelet";

/// A mirror of both public hosts, whose documents name it: two EKS Anywhere releases, the older of which is made of an
/// older EKS Distro; the bundles of all others are gone.
fn mirror(request: &Request) -> Answer {
    let base = format!("http://{}", request.header("host").unwrap());
    let named = |document: String| {
        let document = document.replace("https://anywhere-assets.eks.amazonaws.com", &base);
        Answer::body(document.replace("https://distro.eks.amazonaws.com", &base))
    };
    let distro = |channel: &str, number: &str| {
        let document = DISTRO.replace("number: 47", &format!("number: {number}"));
        named(document.replace("channel: 1-31", &format!("channel: {channel}")))
    };
    match request.target.as_str() {
        MANIFEST => named(RELEASES.to_owned()),
        "/releases/bundles/112/manifest.yaml" => named(BUNDLES.to_owned()),
        "/releases/bundles/110/manifest.yaml" => {
            named(BUNDLES.replace("number: 112", "number: 110").replace("1-31-eks-47", "1-31-eks-46"))
        }
        "/kubernetes-1-30/kubernetes-1-30-eks-58.yaml" => distro("1-30", "58"),
        "/kubernetes-1-31/kubernetes-1-31-eks-46.yaml" => distro("1-31", "46"),
        "/kubernetes-1-31/kubernetes-1-31-eks-47.yaml" => distro("1-31", "47"),
        "/kubernetes-1-32/kubernetes-1-32-eks-40.yaml" => distro("1-32", "40"),
        path => artifact(path),
    }
}

/// The documents' digests are those of the files' paths below `artifacts/`, so that is what the files hold.
fn artifact(path: &str) -> Answer {
    match path.split_once("/artifacts/") {
        Some((_, file)) => match file.strip_suffix(".sha256") {
            Some(file) => Answer::body(format!("{}  {file}\n", hex::encode(Sha256::digest(file)))),
            None => Answer::body(file),
        },
        None => Answer::status(404),
    }
}

async fn download(dir: &Path, server: &BadServer, arguments: &[&str]) -> Output {
    let url = format!("{}{MANIFEST}", server.base());
    run(dir, &[&["download"], arguments, &["--release-manifest-url", &url]].concat()).await
}

const ARTIFACTS: [&str; 3] = ["artifacts", "--release-channel=1.31", "--eksa-release=v0.26.1"];

/// All files below `dir`, and what is in them.
fn tree(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let below = tree(&path).into_iter().map(|(file, text)| (path.join(file), text));
            files.extend(below.map(|(file, text)| (file.strip_prefix(dir).unwrap().to_owned(), text)));
        } else {
            files.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read_to_string(&path).unwrap());
        }
    }
    files
}

#[tokio::test]
async fn artifacts_keep_the_paths_of_the_public_servers_and_have_checksum_files() {
    let (dir, server) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let output = download(dir.path(), &server, &ARTIFACTS).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(names(dir.path()), ["eks-a-artifacts", "eks-d-artifacts"]);

    let (eksa, eksd) = (tree(&dir.path().join("eks-a-artifacts")), tree(&dir.path().join("eks-d-artifacts")));
    let mut paths: Vec<_> = eksa.keys().chain(eksd.keys()).map(|path| path.to_str().unwrap()).collect();
    paths.retain(|path| !path.ends_with(".sha256"));
    let bundle = "releases/bundles/112/artifacts";
    let distro = "kubernetes-1-31/releases/47/artifacts";
    let mut expected = vec![
        format!("{bundle}/1-31/containerd/v1.7.28/containerd-linux-amd64.tar.gz"),
        format!("{bundle}/cri-tools/v1.36.0/cri-tools-linux-amd64.tar.gz"),
        format!("{bundle}/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz"),
        format!("{distro}/etcd/v3.5.22/etcd-linux-amd64-v3.5.22.tar.gz"),
    ];
    let binaries = ["coredns.tar", "etcd.tar", "kube-apiserver.tar", "kube-controller-manager.tar", "kube-proxy.tar"];
    let more = ["kube-scheduler.tar", "kubeadm", "kubectl", "kubelet", "pause.tar"];
    let binary = |name: &&str| format!("{distro}/kubernetes/v1.31.14/bin/linux/amd64/{name}");
    expected.extend(binaries.iter().chain(&more).map(binary));
    expected.push(format!("{distro}/plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz"));
    assert_eq!(paths, expected);

    // A web server for the directories is a mirror: `sha256sum -c` and the resolver find what they look for.
    for (file, contents) in eksa.iter().chain(&eksd).filter(|(file, _)| file.extension().is_none_or(|e| e != "sha256"))
    {
        let sum = PathBuf::from(format!("{}.sha256", file.display()));
        let (digest, name) = eksa.get(&sum).or(eksd.get(&sum)).unwrap().trim_end().split_once("  ").unwrap();
        assert_eq!(digest, hex::encode(Sha256::digest(contents)), "{}", file.display());
        assert_eq!(name, file.file_name().unwrap());
    }
}

#[tokio::test]
async fn artifacts_that_are_there_are_verified_and_not_fetched_again() {
    let (dir, server) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    assert!(download(dir.path(), &server, &ARTIFACTS).await.status.success());
    let kubelet = dir.path().join("eks-d-artifacts").join(KUBELET.trim_start_matches('/'));
    fs::write(&kubelet, "damaged").unwrap();
    assert!(download(dir.path(), &server, &ARTIFACTS).await.status.success());
    let twice: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|request| request.target.contains("/artifacts/") && !request.target.ends_with(".sha256"))
        .map(|request| request.target)
        .fold(BTreeMap::<String, usize>::new(), |mut counts, target| {
            *counts.entry(target).or_default() += 1;
            counts
        })
        .into_iter()
        .filter(|(_, count)| *count > 1)
        .collect();
    assert_eq!(twice, [(KUBELET.to_owned(), 2)]);
    assert_eq!(fs::read_to_string(kubelet).unwrap(), KUBELET.split_once("/artifacts/").unwrap().1);

    assert!(download(dir.path(), &server, &[&ARTIFACTS[..], &["--force"]].concat()).await.status.success());
    assert_eq!(server.count(KUBELET), 3);
}

#[tokio::test]
async fn artifact_that_is_another_one_is_refused_and_not_kept() {
    let server =
        BadServer::start(|request, _| if request.target == KUBELET { Answer::body("evil") } else { mirror(request) })
            .await;
    let dir = tempfile::tempdir().unwrap();
    let output = download(dir.path(), &server, &ARTIFACTS).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(said.contains("kubelet") && said.contains("ChecksumMismatch"), "{said}");
    assert!(!dir.path().join("eks-d-artifacts").join(KUBELET.trim_start_matches('/')).exists());
}

#[tokio::test]
async fn a_stopped_download_keeps_what_is_whole_and_goes_on_with_the_rest() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server = BadServer::start(move |request, number| {
        if request.target == KUBELET && number == 0 {
            return Answer::promise(100, vec![Step::Gate(Arc::clone(&held)), Step::Stall]);
        }
        mirror(request)
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let url = format!("{}{MANIFEST}", server.base());
    let mut child = image_builder(dir.path())
        .arg("download")
        .args(ARTIFACTS)
        .args(["--release-manifest-url", &url])
        .spawn()
        .unwrap();
    let containerd = "/releases/bundles/112/artifacts/1-31/containerd/v1.7.28/containerd-linux-amd64.tar.gz";
    let whole = dir.path().join("eks-a-artifacts").join(containerd.trim_start_matches('/'));
    let ready = async {
        let mut again = tokio::time::interval(Duration::from_millis(20));
        while server.count(KUBELET) == 0 || !whole.exists() {
            again.tick().await;
        }
    };
    timeout(Duration::from_secs(60), ready).await.expect("the download does not begin");
    kill(Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()), Signal::SIGINT).unwrap();
    let status = timeout(Duration::from_secs(5), child.wait()).await.expect("it does not stop").unwrap();
    assert_eq!(status.code(), Some(130));

    let output = download(dir.path(), &server, &ARTIFACTS).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!((server.count(containerd), server.count(KUBELET)), (1, 2));
    assert_eq!(names(dir.path()), ["eks-a-artifacts", "eks-d-artifacts"]);
}

#[tokio::test]
async fn unknown_release_and_channel_are_refused_with_what_there_is() {
    let (dir, server) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    for (channel, release, message) in [
        ("1-31", "v9.9.9", "the newest are v0.26.1, v0.26.0"),
        ("1-29", "v0.26.1", "write one of 1-30, 1-31 and 1-32"),
        ("131", "v0.26.1", "write 1-31 or 1.31"),
    ] {
        let arguments = ["artifacts", "--release-channel", channel, "--eksa-release", release];
        let output = download(dir.path(), &server, &arguments).await;
        assert_eq!(output.status.code(), Some(65));
        assert!(text(&output.stderr).contains(message), "{}", text(&output.stderr));
    }
    assert!(names(dir.path()).is_empty());
}

/// Names and contents of an archive.
fn archive(path: &Path) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
    let read = |entry: std::io::Result<tar::Entry<'_, fs::File>>| {
        let mut entry = entry.unwrap();
        let mut contents = String::new();
        entry.read_to_string(&mut contents).unwrap();
        (entry.path().unwrap().to_str().unwrap().to_owned(), contents)
    };
    archive.entries().unwrap().map(read).collect()
}

#[tokio::test]
async fn manifests_have_the_names_of_the_original_and_older_ones_beside_them() {
    let (dir, server) = (tempfile::tempdir().unwrap(), BadServer::start(|request, _| mirror(request)).await);
    let output = download(dir.path(), &server, &["manifests"]).await;
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("/releases/bundles/98/manifest.yaml does not exist"), "{said}");
    assert_eq!(names(dir.path()), ["eks-a-manifests.tar"]);

    let path = dir.path().join("eks-a-manifests.tar");
    let entries = archive(&path);
    let listed: Vec<_> = entries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        listed,
        [
            "eks-a-bundles-v0.26.0.yaml",
            "eks-a-bundles-v0.26.1.yaml",
            "eks-a-manifest.yaml",
            "eks-d-1-30.yaml",
            "eks-d-1-31-46.yaml",
            "eks-d-1-31.yaml",
            "eks-d-1-32.yaml",
        ]
    );
    assert!(entries[5].1.contains("number: 47") && entries[4].1.contains("number: 46"));

    // The same again gives the same bytes, in place of the old archive.
    let first = fs::read(&path).unwrap();
    assert!(download(dir.path(), &server, &["manifests", "--force"]).await.status.success());
    assert!(first == fs::read(&path).unwrap());
}

#[tokio::test]
async fn manifests_of_the_latest_release_are_never_left_out() {
    let lost = "/kubernetes-1-32/kubernetes-1-32-eks-40.yaml";
    let server =
        BadServer::start(
            move |request, number| {
                if request.target == lost && number == 0 { Answer::status(404) } else { mirror(request) }
            },
        )
        .await;
    let dir = tempfile::tempdir().unwrap();
    let output = download(dir.path(), &server, &["manifests"]).await;
    assert_eq!(output.status.code(), Some(65));
    assert!(text(&output.stderr).contains(lost), "{}", text(&output.stderr));
    assert_eq!(names(dir.path()), [".eks-a-manifests.partial"]);

    // What is there is not asked for again when it goes on.
    assert!(download(dir.path(), &server, &["manifests"]).await.status.success());
    assert_eq!(server.count("/releases/bundles/112/manifest.yaml"), 1);
    assert_eq!(names(dir.path()), ["eks-a-manifests.tar"]);
}
