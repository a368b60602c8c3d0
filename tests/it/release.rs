//! Resolving releases from documents in the shape that is published.

use std::time::Duration;

use futures::future::join_all;
use node_image_builder::{
    contract::{Artifact, Classified, FailureClass, Proxy, ResolvedRelease, Signatures, VersionedArtifact},
    fetch::{Patience, TransportError},
    http,
    release::{ReleaseError, ReleaseQuery, Resolver},
};
use sha2::{Digest, Sha256};

use crate::support::bad_server::{Answer, BadServer, Request, Step};

const RELEASES: &str = include_str!("documents/eks-a-release.yaml");
const BUNDLES: &str = include_str!("documents/bundles.yaml");
const DISTRO: &str = include_str!("documents/kubernetes-1-31-eks-47.yaml");

const RELEASES_PATH: &str = "/eks-a/releases/eks-a/manifest.yaml";
const BUNDLES_PATH: &str = "/eks-a/releases/bundles/112/manifest.yaml";
const DISTRO_PATH: &str = "/eks-d/kubernetes-1-31/kubernetes-1-31-eks-47.yaml";

/// The documents' digests are those of the files' paths below `artifacts/`.
fn digest(path: &str) -> String {
    hex::encode(Sha256::digest(path))
}

/// Retries without waiting for long.
fn patience() -> Patience {
    Patience { first_delay: Duration::from_millis(1), longest_delay: Duration::from_millis(2), ..Patience::default() }
}

fn resolver() -> Resolver {
    crate::support::install_crypto();
    Resolver::new(http::client(&Proxy::default(), None).unwrap()).with_patience(patience())
}

/// A query that finds both public hosts on `server`.
fn query(server: &BadServer) -> ReleaseQuery {
    ReleaseQuery {
        rewrite: vec![
            ("https://anywhere-assets.eks.amazonaws.com".into(), format!("{}/eks-a/", server.base())),
            ("https://distro.eks.amazonaws.com/".into(), format!("{}/eks-d", server.base())),
        ],
        ..ReleaseQuery::new("1-31")
    }
}

/// A mirror that holds the documents.
fn mirror(request: &Request) -> Answer {
    match request.target.as_str() {
        RELEASES_PATH => Answer::body(RELEASES),
        BUNDLES_PATH => Answer::body(BUNDLES),
        DISTRO_PATH => Answer::body(DISTRO),
        sum if sum.ends_with(".sha256") => {
            let path = sum.trim_end_matches(".sha256").rsplit_once("/artifacts/").unwrap().1;
            Answer::body(format!("{}  {path}\n", digest(path)))
        }
        _ => Answer::status(404),
    }
}

/// The mirror, with another document at one path.
async fn mirror_with(path: &'static str, document: String) -> BadServer {
    BadServer::start(
        move |request, _| {
            if request.target == path { Answer::body(document.clone()) } else { mirror(request) }
        },
    )
    .await
}

async fn refusal(query: &ReleaseQuery) -> ReleaseError {
    resolver().resolve(query).await.unwrap_err()
}

#[tokio::test]
async fn resolves_channel_1_31_of_eks_distro_47() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    let resolved = resolver().resolve(&query(&server)).await.unwrap();

    let distro = format!("{}/eks-d/kubernetes-1-31/releases/47/artifacts", server.base());
    let bundle = format!("{}/eks-a/releases/bundles/112/artifacts", server.base());
    let artifact = |name: &str, base: &str, path: &str| Artifact {
        name: name.into(),
        url: format!("{base}/{path}").parse().unwrap(),
        sha256: Some(digest(path)),
    };
    let binary = |name: &str| artifact(name, &distro, &format!("kubernetes/v1.31.14/bin/linux/amd64/{name}"));
    let versioned = |version: &str, artifact| VersionedArtifact { version: version.into(), artifact };
    let expected = ResolvedRelease {
        eksa_version: "v0.26.1".into(),
        bundle_number: 112,
        channel: "1-31".into(),
        eksd_name: "kubernetes-1-31-eks-47".into(),
        kubernetes_version: "v1.31.14".into(),
        full_version: "v1.31.14-eks-1-31-47".into(),
        image_repository: "public.ecr.aws/eks-distro".into(),
        pause_image: "public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47".into(),
        kubelet: binary("kubelet"),
        kubeadm: binary("kubeadm"),
        kubectl: binary("kubectl"),
        images: [
            "coredns.tar",
            "etcd.tar",
            "kube-apiserver.tar",
            "kube-controller-manager.tar",
            "kube-proxy.tar",
            "kube-scheduler.tar",
            "pause.tar",
        ]
        .map(binary)
        .to_vec(),
        cni_plugins: versioned(
            "v1.7.1",
            artifact("cni-plugins", &distro, "plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz"),
        ),
        etcd: versioned("v3.5.22", artifact("etcd", &distro, "etcd/v3.5.22/etcd-linux-amd64-v3.5.22.tar.gz")),
        etcdadm: versioned("v0.1.5", artifact("etcdadm", &bundle, "etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz")),
        containerd: versioned(
            "v1.7.28",
            artifact("containerd", &bundle, "1-31/containerd/v1.7.28/containerd-linux-amd64.tar.gz"),
        ),
        crictl: versioned("v1.36.0", artifact("crictl", &bundle, "cri-tools/v1.36.0/cri-tools-linux-amd64.tar.gz")),
    };
    assert_eq!(resolved, expected);
}

#[tokio::test]
async fn takes_the_release_that_is_asked_for_and_a_development_build_by_part_of_its_version() {
    let development = "v0.0.0-dev+build.4711";
    let releases = RELEASES.replace("version: v0.24.0\n", &format!("version: {development}\n")).replace(
        "https://anywhere-assets.eks.amazonaws.com/releases/bundles/98/",
        "https://anywhere-assets.eks.amazonaws.com/releases/bundles/112/",
    );
    assert!(releases.contains(development));
    let server = mirror_with(RELEASES_PATH, releases).await;
    for wanted in [development, "v0.0.0-dev+build"] {
        let query = ReleaseQuery { eksa_release: Some(wanted.into()), ..query(&server) };
        assert_eq!(resolver().resolve(&query).await.unwrap().eksa_version, development, "{wanted}");
    }
    // Part of an ordinary version is a typing error, not a choice.
    let query = ReleaseQuery { eksa_release: Some("v0.26".into()), ..query(&server) };
    assert!(matches!(refusal(&query).await, ReleaseError::UnknownRelease { .. }));
}

#[tokio::test]
async fn refuses_channel_missing_from_bundle_and_names_those_it_has() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    let error = refusal(&ReleaseQuery { channel: "1-99".into(), ..query(&server) }).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "UnknownChannel"));
    let text = error.to_string();
    assert!(text.contains("v0.26.1 has no release channel 1-99: write one of 1-30, 1-31 and 1-32"), "{text}");
}

#[tokio::test]
async fn refuses_unknown_release_and_names_the_newest() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    let error = refusal(&ReleaseQuery { eksa_release: Some("v9.9.9".into()), ..query(&server) }).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "UnknownRelease"));
    let text = error.to_string();
    assert!(text.contains("no release v9.9.9"), "{text}");
    assert!(text.contains("newest are v0.26.1, v0.26.0, v0.25.1, v0.25.0 and v0.24.1"), "{text}");
}

#[tokio::test]
async fn refuses_manifest_that_does_not_exist_and_asks_only_once() {
    let server = BadServer::start(|_, _| Answer::status(404)).await;
    let error = refusal(&query(&server)).await;
    assert!(matches!(error, ReleaseError::Download(TransportError::NotFound { status: 404, .. })), "{error:?}");
    assert!(error.to_string().contains(&server.url(RELEASES_PATH).to_string()), "{error}");
    assert_eq!((error.class(), server.count(RELEASES_PATH)), (FailureClass::BadInput, 1));
}

#[tokio::test]
async fn waits_out_a_server_that_fails_for_a_moment() {
    let server = BadServer::start(|request, number| match number {
        0 => Answer::status(500),
        1 => Answer::status(429).header("Retry-After", &0),
        2 => Answer::promise(100, vec![Step::Send(b"api".to_vec())]),
        _ => mirror(request),
    })
    .await;
    resolver().resolve(&query(&server)).await.unwrap();
    assert_eq!(server.count(RELEASES_PATH), 4);
}

#[tokio::test]
async fn gives_up_on_a_server_that_keeps_failing() {
    let server = BadServer::start(|_, _| Answer::status(503)).await;
    let error = refusal(&query(&server)).await;
    assert!(matches!(error, ReleaseError::Download(TransportError::ServerError { status: 503, .. })), "{error:?}");
    assert_eq!((error.class(), server.count(RELEASES_PATH)), (FailureClass::Transient, 1 + patience().retries));
}

#[tokio::test]
async fn server_that_is_not_there_is_a_transient_fault() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    let query = query(&server);
    drop(server);
    let error = resolver().resolve(&query).await.unwrap_err();
    // The listener may still take a connection it never serves.
    assert_eq!(error.class(), FailureClass::Transient, "{error:?}");
}

#[tokio::test]
async fn refuses_page_that_is_no_manifest() {
    let page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Who are you?</body></html>\n";
    let server = mirror_with(BUNDLES_PATH, page.into()).await;
    let error = refusal(&query(&server)).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "InvalidManifest"));
    let text = error.to_string();
    assert!(text.contains(BUNDLES_PATH) && text.contains("is not an EKS Anywhere bundle manifest"), "{text}");
}

#[tokio::test]
async fn refuses_another_kind_of_document_and_says_which_it_is() {
    let server = mirror_with(BUNDLES_PATH, RELEASES.into()).await;
    let text = refusal(&query(&server)).await.to_string();
    assert!(text.contains("it holds a Release of anywhere.eks.amazonaws.com/v1alpha1, not a Bundles"), "{text}");
}

#[tokio::test]
async fn refuses_manifest_that_lacks_what_an_image_needs() {
    for (path, document, from, to, missing) in [
        (DISTRO_PATH, DISTRO, "name: cni-plugins\n", "name: other\n", "component cni-plugins"),
        (DISTRO_PATH, DISTRO, "name: pause-image\n", "name: other\n", "pause-image"),
        (DISTRO_PATH, DISTRO, "name: kubernetes\n", "name: other\n", "component kubernetes"),
        (BUNDLES_PATH, BUNDLES, "      etcdadm:\n", "      other:\n", "etcdadm for kubernetes-1-31-eks-47"),
    ] {
        assert!(document.contains(from), "{from}");
        let server = mirror_with(path, document.replace(from, to)).await;
        let error = refusal(&query(&server)).await;
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "MissingComponent"), "{error}");
        assert!(error.to_string().contains(&format!("names no {missing}")), "{error}");
    }
}

#[tokio::test]
async fn refuses_file_without_published_digest() {
    let server = BadServer::start(|request, _| match request.target.as_str() {
        path if path.ends_with("/coredns.tar.sha256") => Answer::status(404),
        _ => mirror(request),
    })
    .await;
    let error = refusal(&query(&server)).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "NoChecksum"));
    assert!(error.to_string().contains("no digest is published for coredns.tar"), "{error}");
}

#[tokio::test]
async fn refuses_digest_that_is_none() {
    let kubelet = digest("kubernetes/v1.31.14/bin/linux/amd64/kubelet");
    let server = mirror_with(DISTRO_PATH, DISTRO.replace(&kubelet, "unknown")).await;
    let text = refusal(&query(&server)).await.to_string();
    assert!(text.contains("the SHA-256 of kubelet is `unknown`"), "{text}");
}

#[tokio::test]
async fn refuses_document_of_endless_size() {
    let server = BadServer::start(|_, _| Answer::promise(usize::MAX / 2, vec![Step::Stall])).await;
    let error = refusal(&query(&server)).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "DocumentTooLarge"));
}

#[tokio::test]
async fn refuses_url_that_is_none() {
    let query = ReleaseQuery { manifest_url: "user:secret@mirror/manifest.yaml".into(), ..ReleaseQuery::new("1-31") };
    let error = resolver().resolve(&query).await.unwrap_err();
    let text = error.to_string();
    assert!(!text.contains("secret"), "{text}");
    assert_eq!(error.class(), FailureClass::BadInput, "{text}");
}

#[tokio::test]
async fn reads_local_files_only_when_they_are_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let server = BadServer::start(|request, _| mirror(request)).await;
    let path = dir.path().join("eks-a-manifest.yaml");
    std::fs::write(&path, RELEASES).unwrap();
    let query = ReleaseQuery { manifest_url: format!("file://{}", path.display()), ..query(&server) };
    let error = resolver().resolve(&query).await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "LocalFileRefused"));
    let resolved = resolver().allow_local_files().resolve(&query).await.unwrap();
    assert_eq!(resolved.kubernetes_version, "v1.31.14");
    std::fs::remove_file(&path).unwrap();
    let error = resolver().allow_local_files().resolve(&query).await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "UnreadableManifest"));
}

#[tokio::test]
async fn hundred_builds_at_once_read_each_document_once() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    let (resolver, query) = (resolver(), query(&server));
    for resolved in join_all((0..100).map(|_| resolver.resolve(&query))).await {
        assert_eq!(resolved.unwrap().eksd_name, "kubernetes-1-31-eks-47");
    }
    let requests = server.requests();
    // Three manifests, and the digests of three files.
    assert_eq!(requests.len(), 6, "{requests:?}");
}

#[tokio::test]
async fn hundred_builds_at_once_fail_by_one_request() {
    let server = BadServer::start(|_, _| Answer::status(404)).await;
    let (resolver, query) = (resolver(), query(&server));
    for resolved in join_all((0..100).map(|_| resolver.resolve(&query))).await {
        assert_eq!(resolved.unwrap_err().reason(), "NotFound");
    }
    assert_eq!(server.count(RELEASES_PATH), 1);
}

#[tokio::test]
async fn known_documents_are_asked_for_by_their_etag_and_changed_ones_are_read() {
    let server = BadServer::start(|request, number| {
        let (etag, releases) = match number {
            0 | 1 => ("\"first\"", RELEASES.to_owned()),
            _ => ("\"second\"", RELEASES.replace("latestVersion: v0.26.1", "latestVersion: v0.0.1")),
        };
        match request.target.as_str() {
            RELEASES_PATH if request.header("if-none-match") == Some(etag) => Answer::status(304),
            RELEASES_PATH => Answer::body(releases).header("ETag", etag),
            _ => mirror(request),
        }
    })
    .await;
    let resolver = resolver().with_freshness(Duration::ZERO);
    let first = resolver.resolve(&query(&server)).await.unwrap();
    assert_eq!(first, resolver.resolve(&query(&server)).await.unwrap());
    assert_eq!(server.requests().iter().filter(|request| request.header("if-none-match").is_some()).count(), 1);
    assert_eq!(resolver.resolve(&query(&server)).await.unwrap_err().reason(), "UnknownRelease");
}

#[tokio::test]
async fn documents_that_aws_did_not_sign_are_refused_where_signatures_are_required() {
    let server = BadServer::start(|request, _| mirror(request)).await;
    // What stands in the bundle manifest is no signature of it.
    let required = ReleaseQuery { signatures: Signatures::Require, ..query(&server) };
    let error = refusal(&required).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "SignatureInvalid"), "{error}");
    assert!(error.to_string().contains(BUNDLES_PATH), "{error}");

    let unsigned = BUNDLES.replace("anywhere.eks.amazonaws.com/signature", "example.com/other");
    let server = mirror_with(BUNDLES_PATH, unsigned).await;
    let error = refusal(&ReleaseQuery { signatures: Signatures::Require, ..query(&server) }).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "SignatureMissing"), "{error}");
    assert!(error.to_string().contains("write Warn"), "{error}");

    for signatures in [Signatures::Warn, Signatures::Off] {
        resolver().resolve(&ReleaseQuery { signatures, ..query(&server) }).await.unwrap();
    }
}
