//! Putting an image to a target that is a plain server.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Method, Request, StatusCode},
};
use futures::StreamExt;
use node_image_builder::{
    contract::{CredentialSlot, Proxy, PublishTarget, token::SigningKey},
    package::{Format, ImageSource},
    progress::{Reporter, Style},
    publish::{PublishError, Publisher, upload_client},
    secret::{Credentials, Redactor},
    serve,
};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, sync::Notify};
use tokio_util::sync::CancellationToken;

use crate::package::sparse_disk;

const MIB: u64 = 1 << 20;

/// Paths and contents of files, in the order of their arrival.
type Received = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A server that takes files by `PUT`.
pub struct Files {
    pub url: String,
    pub received: Received,
    /// Every file has arrived but is not answered yet.
    pub arrived: Arc<Notify>,
    /// Lets the server answer.
    pub answer: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Manner {
    Prompt,
    /// Answers when it is told to.
    Late,
    /// Reads nothing of a file.
    Deaf,
}

#[derive(Clone)]
struct Shared {
    manner: Manner,
    received: Received,
    arrived: Arc<Notify>,
    answer: Arc<Notify>,
}

async fn take(State(shared): State<Shared>, request: Request<Body>) -> StatusCode {
    if request.method() != Method::PUT {
        std::future::pending::<()>().await;
    }
    let path = request.uri().path().to_owned();
    if shared.manner == Manner::Deaf {
        let _kept = request;
        std::future::pending::<()>().await;
        return StatusCode::OK;
    }
    let mut bytes = vec![];
    let mut body = request.into_body().into_data_stream();
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece.unwrap());
    }
    if shared.manner == Manner::Late {
        shared.arrived.notify_one();
        shared.answer.notified().await;
    }
    shared.received.lock().unwrap().push((path, bytes));
    StatusCode::CREATED
}

impl Files {
    pub async fn start(manner: Manner) -> Self {
        crate::support::install_crypto();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/files", listener.local_addr().unwrap());
        let (received, arrived, answer) = (Arc::default(), Arc::default(), Arc::default());
        let shared = Shared {
            manner,
            received: Arc::clone(&received),
            arrived: Arc::clone(&arrived),
            answer: Arc::clone(&answer),
        };
        let router = Router::new().fallback(take).with_state(shared);
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, received, arrived, answer, task }
    }

    pub fn target(&self) -> PublishTarget {
        PublishTarget::Http { url: self.url.parse().unwrap(), public_url: None, slot: None }
    }

    pub fn names(&self) -> Vec<String> {
        self.received.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }

    pub fn file(&self, name: &str) -> Vec<u8> {
        let received = self.received.lock().unwrap();
        let found = received.iter().find(|(path, _)| path == &format!("/files/{name}"));
        found.unwrap_or_else(|| panic!("no {name}")).1.clone()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Gives up a server that is silent for `silence`, but for uploads.
pub fn publisher(silence: Duration) -> Publisher {
    let client = reqwest::Client::builder().read_timeout(silence).build().unwrap();
    let uploads = upload_client(&Proxy::default(), None).unwrap();
    let reporter = Reporter::new(Style::Json, Box::new(std::io::sink()));
    Publisher::new(client, uploads, Credentials::new(Redactor::default()), reporter, CancellationToken::new())
}

fn disk(dir: &tempfile::TempDir) -> ImageSource {
    let path = dir.path().join("disk.raw");
    sparse_disk(&path, 64 * MIB, &[(MIB, 8_000_000)]);
    crate::package::source(&path)
}

#[tokio::test]
async fn server_may_take_its_time_to_answer_when_it_has_the_whole_image() {
    let (files, dir) = (Files::start(Manner::Late).await, tempfile::tempdir().unwrap());
    let silence = Duration::from_millis(100);
    let (publisher, target, source) = (publisher(silence), files.target(), disk(&dir));
    let late = async {
        files.arrived.notified().await;
        // Whoever waits for this server no longer than usual has given it up by then.
        let client = reqwest::Client::builder().read_timeout(silence).build().unwrap();
        assert!(client.get(&files.url).send().await.unwrap_err().is_timeout());
        assert_eq!(files.names(), Vec::<String>::new());
        files.answer.notify_one();
        // The checksum file.
        files.arrived.notified().await;
        files.answer.notify_one();
    };
    let (published, ()) = tokio::join!(publisher.publish(&target, &source), late);
    let published = published.unwrap();
    assert_eq!(files.names(), ["/files/image.gz", "/files/image.gz.sha256"]);
    assert_eq!(files.file("image.gz").len() as u64, published.summary.size);
}

#[tokio::test]
async fn server_that_takes_nothing_is_given_up() {
    let (files, dir) = (Files::start(Manner::Deaf).await, tempfile::tempdir().unwrap());
    let publisher = publisher(Duration::from_secs(60)).with_patience(Duration::from_millis(300));
    let error = publisher.publish(&files.target(), &disk(&dir)).await.unwrap_err();
    assert!(matches!(error, PublishError::Unavailable { .. }), "{error}");
}

/// An artifact server, and a token for a directory there.
struct Artifacts {
    target: PublishTarget,
    _data: tempfile::TempDir,
    _slot: tempfile::TempDir,
    stop: CancellationToken,
}

impl Artifacts {
    async fn start() -> Self {
        let (data, slot) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = || SigningKey::new(&[7; 32]).unwrap();
        let config = serve::Config {
            data_dir: data.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            key: key(),
            admin_token: None,
            min_free_bytes: 0,
            upload_max_age: Duration::from_secs(3600),
        };
        let server = serve::Server::bind(config).await.unwrap();
        let url: url::Url = format!("http://{}", server.local_addr().unwrap()).parse().unwrap();
        let directory = "images/ubuntu/0123456789".to_owned();
        let token = key().mint(&directory, jiff::Timestamp::now() + Duration::from_secs(600));
        std::fs::write(slot.path().join("token"), token).unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(server.run(stop.clone()));
        let target = PublishTarget::Server {
            upload_url: url.clone(),
            public_url: url,
            directory,
            slot: CredentialSlot(slot.path().to_str().unwrap().to_owned()),
        };
        Self { target, _data: data, _slot: slot, stop }
    }
}

impl Drop for Artifacts {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn download(url: &url::Url, suffix: &str) -> Vec<u8> {
    reqwest::get(format!("{url}{suffix}")).await.unwrap().error_for_status().unwrap().bytes().await.unwrap().to_vec()
}

#[tokio::test]
async fn image_of_a_provider_also_goes_to_any_target_as_the_very_same_file() {
    let (files, artifacts) = (Files::start(Manner::Prompt).await, Artifacts::start().await);
    let dir = tempfile::tempdir().unwrap();
    let disk_path = dir.path().join("disk.raw");
    sparse_disk(&disk_path, 64 * MIB, &[(MIB, 900_000), (40 * MIB + 7, 99_999)]);
    let here = dir.path().join("here");
    std::fs::create_dir(&here).unwrap();
    let targets = [files.target(), PublishTarget::Directory { path: here.clone() }, artifacts.target.clone()];
    for (source, name) in [
        (crate::ova::source_of(&disk_path, "image", &crate::ova::request()), "image.ova"),
        (ImageSource::new(&disk_path, "image", Format::Qcow2), "image.qcow2"),
    ] {
        let published = publisher(Duration::from_secs(60)).publish_all(&targets, &source).await.unwrap();
        let summary = &published[0].summary;
        assert!(published.iter().all(|one| one.summary == *summary && one.url.path().ends_with(name)), "{published:?}");
        assert_eq!(summary.virtual_size, 64 * MIB);
        let read = |dir: &std::path::Path, name: &str| std::fs::read(dir.join(name)).unwrap();
        let sum = format!("{name}.sha256");
        for (place, file, sum) in [
            ("http", files.file(name), files.file(&sum)),
            ("directory", read(&here, name), read(&here, &sum)),
            ("artifact server", download(&published[2].url, "").await, download(&published[2].url, ".sha256").await),
        ] {
            assert_eq!(hex::encode(Sha256::digest(&file)), summary.sha256, "{name} at the {place}");
            assert_eq!(
                String::from_utf8(sum).unwrap(),
                format!("{}  {name}\n", summary.sha256),
                "{name} at the {place}"
            );
        }
        // It is the disk.
        let unpacked = if name.ends_with("ova") {
            let mut archive = tar::Archive::new(std::fs::File::open(here.join(name)).unwrap());
            archive.unpack(&here).unwrap();
            let mut entries = std::fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().path());
            crate::ova::unpack_vmdk(&entries.find(|path| path.extension().is_some_and(|end| end == "vmdk")).unwrap())
        } else {
            let (from, to) = (here.join(name), here.join("unpacked"));
            let done =
                std::process::Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&from, &to]).status();
            assert!(done.unwrap().success());
            std::fs::read(to).unwrap()
        };
        assert!(unpacked == std::fs::read(&disk_path).unwrap(), "{name} holds another disk");
    }
}
