//! A release mirror: the documents of the integration tests, at the paths of the public hosts.

use std::net::{IpAddr, UdpSocket};

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

const RELEASES: &str = include_str!("../../tests/it/documents/eks-a-release.yaml");
const BUNDLES: &str = include_str!("../../tests/it/documents/bundles.yaml");
const DISTRO: &str = include_str!("../../tests/it/documents/kubernetes-1-31-eks-47.yaml");

/// Starts one and gives its URL.
pub async fn start() -> String {
    let listener = TcpListener::bind((address(), 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

/// The operator reads nothing from loopback addresses.
fn address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Sends nothing: it only asks which address would be used.
    socket.connect("192.0.2.1:9").expect("the machine has no route, so no address but loopback");
    socket.local_addr().unwrap().ip()
}

async fn answer(request: Request) -> Response {
    let text = match request.uri().path() {
        "/releases/eks-a/manifest.yaml" => RELEASES.to_owned(),
        path if path.starts_with("/releases/bundles/") => BUNDLES.to_owned(),
        path if path.ends_with("kubernetes-1-31-eks-47.yaml") => DISTRO.to_owned(),
        path if path.ends_with(".sha256") => format!("{}  file\n", hex::encode(Sha256::digest(path))),
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    text.into_response()
}
