//! The development cluster's release mirror, as it is or with faults: a small server between the build and the mirror.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::cluster::setting;

/// Channel of the release that the mirror holds.
pub const CHANNEL: &str = "1-34";

/// Spec of the build that succeeds: what the demo builds.
pub fn spec() -> Value {
    let mirror = setting("NIB_MIRROR_URL");
    json!({
        "os": {"name": "debian", "version": "12"},
        "releaseChannel": CHANNEL,
        "base": base(&mirror),
        "baremetal": {},
        // The development machine is smaller than a real one.
        "build": {"resources": {"requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "8Gi"}}},
    })
}

/// The mirror's base root file system.
pub fn base(mirror: &str) -> Value {
    let dir = std::path::PathBuf::from(setting("NIB_MIRROR_DIR")).join("base");
    let sums = std::fs::read_to_string(dir.join("SHA256SUMS")).unwrap();
    let name = sums.lines().find_map(|line| line.split_whitespace().nth(1)).unwrap().trim_start_matches('*').to_owned();
    json!({"url": format!("{mirror}/base/{name}"), "sha256SumsURL": format!("{mirror}/base/SHA256SUMS")})
}

/// What the faulty server does to a request whose path contains a text.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Status(u16),
    /// Sends half of the file, then closes the connection; always.
    ShortBody,
    /// Flips the file's last byte.
    Corrupt,
}

/// A server that passes the mirror on, with faults, and takes uploads by `PUT`.
pub struct Server {
    pub url: String,
    pub received: Arc<Mutex<Vec<(String, usize)>>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone)]
struct Shared {
    client: reqwest::Client,
    mirror: String,
    own: String,
    fault: Option<(&'static str, Fault)>,
    /// User and password that uploads must have.
    upload_login: Option<(&'static str, &'static str)>,
    received: Arc<Mutex<Vec<(String, usize)>>>,
}

impl Server {
    pub async fn start(
        fault: Option<(&'static str, Fault)>,
        upload_login: Option<(&'static str, &'static str)>,
    ) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address: SocketAddr = format!("{}:0", setting("NIB_HOST_IP")).parse().unwrap();
        let listener = TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(vec![]));
        let shared = Shared {
            client: reqwest::Client::new(),
            mirror: setting("NIB_MIRROR_URL"),
            own: url.clone(),
            fault,
            upload_login,
            received: received.clone(),
        };
        let router = Router::new().fallback(answer).with_state(shared);
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, received, task }
    }

    /// Where the faulty mirror's releases begin.
    pub fn manifest_url(&self) -> String {
        format!("{}/releases/eks-a/manifest.yaml", self.url)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(shared): State<Shared>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    if request.method() == "PUT" {
        return take(&shared, path, request).await;
    }
    let fault = shared.fault.filter(|(text, _)| path.contains(text)).map(|(_, fault)| fault);
    if let Some(Fault::Status(code)) = fault {
        return StatusCode::from_u16(code).unwrap().into_response();
    }
    let answer = shared.client.get(format!("{}{path}", shared.mirror)).send().await.unwrap();
    let status = answer.status();
    let mut body = answer.bytes().await.unwrap().to_vec();
    if path.ends_with(".yaml") {
        // The documents lead to this server, not around it.
        body = String::from_utf8(body).unwrap().replace(&shared.mirror, &shared.own).into_bytes();
    }
    match fault {
        Some(Fault::Corrupt) => {
            if let Some(last) = body.last_mut() {
                *last ^= 1;
            }
        }
        Some(Fault::ShortBody) => {
            let length = body.len();
            body.truncate(length / 2);
            let stream = futures::stream::iter([
                Ok(bytes::Bytes::from(body)),
                Err(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "cut")),
            ]);
            return ([(header::CONTENT_LENGTH, length.to_string())], Body::from_stream(stream)).into_response();
        }
        Some(Fault::Status(_)) | None => {}
    }
    (status, body).into_response()
}

async fn take(shared: &Shared, path: String, request: Request) -> Response {
    use futures::StreamExt;
    if let Some((user, password)) = shared.upload_login {
        let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        if request.headers().get(header::AUTHORIZATION).is_none_or(|given| given != wanted.as_str()) {
            return StatusCode::UNAUTHORIZED.into_response();
        }
    }
    let mut length = 0;
    let mut stream = request.into_body().into_data_stream();
    while let Ok(Some(Ok(bytes))) = tokio::time::timeout(Duration::from_secs(120), stream.next()).await {
        length += bytes.len();
    }
    shared.received.lock().unwrap().push((path, length));
    StatusCode::CREATED.into_response()
}
