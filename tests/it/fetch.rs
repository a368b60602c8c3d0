//! Downloads from servers that misbehave.

use std::{
    fs,
    io::Write,
    path::Path,
    process::Command,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use node_image_builder::{
    contract::{Archive, Artifact, BaseChecksum, Classified, FailureClass, ProgressLine, Proxy},
    error::Chain,
    fetch::{FetchError, Fetcher, Patience, TransportError},
    http,
    progress::{Reporter, Style},
};
use reqwest::Client;
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::support::{
    bad_server::{Answer, BadServer, Step},
    install_crypto,
};

/// What is downloaded: no part of it is like another.
fn content() -> Vec<u8> {
    static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| (0..100_000_u32).flat_map(u32::to_be_bytes).collect());
    CONTENT.clone()
}

const HALF: usize = 200_000;

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn artifact(url: Url) -> Artifact {
    Artifact { name: "kubelet".into(), url, sha256: Some(sha256(&content())) }
}

/// Retries without waiting for long.
fn patience() -> Patience {
    Patience { first_delay: Duration::from_millis(1), longest_delay: Duration::from_millis(2), ..Patience::default() }
}

fn client() -> Client {
    install_crypto();
    http::client(&Proxy::default(), None).unwrap()
}

/// A client that does not wait for long.
fn hasty_client() -> Client {
    install_crypto();
    Client::builder().no_proxy().read_timeout(Duration::from_millis(300)).build().unwrap()
}

fn fetcher(client: Client, dir: &TempDir) -> Fetcher {
    Fetcher::new(client, dir.path(), CancellationToken::new()).unwrap().with_patience(patience())
}

fn quiet(_: u64, _: Option<u64>) {}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names.into_iter().map(|name| name.into_string().unwrap()).collect()
}

/// Fetches the content from `server`, which must succeed, and checks that nothing else is left.
async fn succeed_with(client: Client, server: &BadServer) {
    let dir = TempDir::new().unwrap();
    let path = fetcher(client, &dir).fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), content());
    assert_eq!(listing(dir.path()), [format!("sha256-{}", sha256(&content()))]);
    assert_eq!(path.parent().unwrap(), dir.path());
}

async fn succeed(server: &BadServer) {
    succeed_with(client(), server).await;
}

/// Fetches the content from `server`, which must fail, and checks that nothing is left.
async fn fail_with(client: Client, patience: Patience, server: &BadServer) -> FetchError {
    let dir = TempDir::new().unwrap();
    let fetcher = fetcher(client, &dir).with_patience(patience);
    let error = fetcher.fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap_err();
    assert_eq!(listing(dir.path()), [""; 0]);
    error
}

async fn fail(server: &BadServer) -> FetchError {
    fail_with(client(), patience(), server).await
}

#[tokio::test]
async fn file_is_fetched_once_and_tells_its_progress() {
    let server = BadServer::start(|_, _| Answer::body(content())).await;
    let dir = TempDir::new().unwrap();
    let fetcher = fetcher(client(), &dir);
    let reached = Mutex::new(vec![]);
    let progress = |done, total| reached.lock().unwrap().push((done, total));
    let first = fetcher.fetch(&artifact(server.url("/kubelet")), progress).await.unwrap();
    let second = fetcher.fetch(&artifact(server.url("/kubelet")), progress).await.unwrap();
    assert_eq!((&first, server.count("/kubelet")), (&second, 1));
    let whole = content().len() as u64;
    let reached = reached.into_inner().unwrap();
    assert_eq!((reached[0], *reached.last().unwrap()), ((0, Some(whole)), (whole, Some(whole))));
    assert!(reached.is_sorted(), "{reached:?}");
}

#[tokio::test]
async fn damaged_file_in_the_cache_is_fetched_again() {
    let server = BadServer::start(|_, _| Answer::body(content())).await;
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join(format!("sha256-{}", sha256(&content()))), "poison").unwrap();
    let path = fetcher(client(), &dir).fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap();
    assert_eq!((fs::read(path).unwrap(), server.count("/kubelet")), (content(), 1));
}

#[tokio::test]
async fn beginnings_that_a_killed_process_left_are_removed() {
    let dir = TempDir::new().unwrap();
    for (name, age) in [(".part-old", 2 * 60 * 60), (".part-young", 60)] {
        let file = fs::File::create(dir.path().join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    fetcher(client(), &dir);
    assert_eq!(listing(dir.path()), [".part-young"]);
}

#[tokio::test]
async fn missing_and_forbidden_files_are_asked_for_once() {
    for (status, reason) in [
        (404, "NotFound"),
        (410, "NotFound"),
        (403, "AccessDenied"),
        (407, "ProxyAuthenticationRequired"),
        (204, "UnexpectedStatus"),
    ] {
        let server = BadServer::start(move |_, _| Answer::status(status)).await;
        let error = fail(&server).await;
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, reason));
        assert_eq!(server.requests().len(), 1);
        let text = Chain(&error).to_string();
        assert!(text.contains("kubelet") && text.contains(server.url("/kubelet").as_str()), "{text}");
    }
}

#[tokio::test]
async fn failing_server_is_asked_again_and_then_given_up() {
    let server = BadServer::start(|_, number| match number {
        0 => Answer::status(500),
        1 => Answer::status(503),
        _ => Answer::body(content()),
    })
    .await;
    succeed(&server).await;
    assert_eq!(server.requests().len(), 3);

    let server = BadServer::start(|_, _| Answer::status(500)).await;
    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "ServerError"));
    assert_eq!(server.requests().len(), 1 + patience().retries);
}

#[tokio::test]
async fn server_may_say_how_long_to_wait() {
    let server = BadServer::start(|_, number| match number {
        0 => Answer::status(429).header("Retry-After", "1"),
        _ => Answer::body(content()),
    })
    .await;
    let begin = Instant::now();
    succeed(&server).await;
    assert!(begin.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn connection_refused_is_transient() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = TempDir::new().unwrap();
    let url = format!("http://{address}/kubelet").parse().unwrap();
    let error = fetcher(client(), &dir).fetch(&artifact(url), quiet).await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "ServerUnreachable"));
    assert_eq!(listing(dir.path()), [""; 0]);
}

/// Sends the first half with `etag` and then does `breaking`; after that, answers with `then`.
async fn breaks_in_the_middle(
    etag: &'static str,
    breaking: Option<Step>,
    then: impl Fn(Option<usize>) -> Answer + Send + Sync + 'static,
) -> BadServer {
    BadServer::start(move |request, number| {
        if number > 0 {
            return then(request.range_start());
        }
        let steps = [Step::Send(content()[..HALF].to_vec())].into_iter().chain(breaking.clone());
        Answer::promise(content().len(), steps.collect()).header("ETag", etag)
    })
    .await
}

fn range_of_second(server: &BadServer) -> Option<usize> {
    server.requests()[1].range_start()
}

#[tokio::test]
async fn broken_connection_is_resumed_where_it_broke() {
    let server = breaks_in_the_middle("\"v1\"", None, |start| Answer::rest(&content(), start.unwrap())).await;
    succeed(&server).await;
    assert_eq!(range_of_second(&server), Some(HALF));
    assert_eq!(server.requests()[1].header("if-range"), Some("\"v1\""));
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn silent_server_is_left_and_the_download_resumed() {
    let server =
        breaks_in_the_middle("\"v1\"", Some(Step::Stall), |start| Answer::rest(&content(), start.unwrap())).await;
    succeed_with(hasty_client(), &server).await;
    assert_eq!(range_of_second(&server), Some(HALF));
}

#[tokio::test]
async fn always_silent_server_is_a_transient_fault() {
    let server = BadServer::start(|_, _| Answer::promise(content().len(), vec![Step::Stall])).await;
    let error = fail_with(hasty_client(), Patience { retries: 1, ..patience() }, &server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "ServerTimeout"));
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn download_begins_anew_where_it_can_not_be_resumed() {
    // The server says nothing by which the rest could be known to belong to the beginning.
    for etag in ["", "W/\"weak\""] {
        let server = breaks_in_the_middle(etag, None, |_| Answer::body(content())).await;
        succeed(&server).await;
        assert_eq!(range_of_second(&server), None, "{etag}");
    }
    // It knows no ranges, or the file has changed.
    let server = breaks_in_the_middle("\"v1\"", None, |_| Answer::body(content()).header("ETag", "\"v2\"")).await;
    succeed(&server).await;
    assert_eq!((range_of_second(&server), server.requests().len()), (Some(HALF), 2));
    // It sends another part than was asked for, or says there is none.
    for wrong in [Answer::rest(&content(), 10), Answer::status(416), Answer::status(206)] {
        let server = breaks_in_the_middle("\"v1\"", None, move |start| match start {
            Some(_) => wrong.clone(),
            None => Answer::body(content()),
        })
        .await;
        succeed(&server).await;
        assert_eq!((range_of_second(&server), server.requests().len()), (Some(HALF), 3));
    }
}

#[tokio::test]
async fn changed_file_is_never_glued_to_the_old_beginning() {
    // The first half is of another file, and the server wrongly continues with the right one.
    let server = BadServer::start(|request, number| match (number, request.range_start()) {
        (0, _) => Answer::promise(content().len(), vec![Step::Send(vec![7; HALF])]).header("ETag", "\"v1\""),
        (_, Some(start)) => Answer::rest(&content(), start),
        (_, None) => Answer::body(content()),
    })
    .await;
    succeed(&server).await;
    assert_eq!(server.requests().len(), 3, "the mixture is thrown away and the file fetched as a whole");
}

/// Fetches half of the content and is stopped there, as by Ctrl-C. The server goes on with `rest` the next time.
async fn stopped_in_the_middle(
    half: Vec<u8>,
    rest: impl Fn(Option<usize>) -> Answer + Send + Sync + 'static,
) -> (BadServer, TempDir) {
    let server = BadServer::start(move |request, number| match number {
        0 => Answer::promise(content().len(), vec![Step::Send(half.clone()), Step::Stall]).header("ETag", "\"v1\""),
        _ => rest(request.range_start()),
    })
    .await;
    let (dir, cancel) = (TempDir::new().unwrap(), CancellationToken::new());
    let fetcher = Fetcher::new(client(), dir.path(), cancel.clone()).unwrap().keep_beginnings();
    let stop = |done, _| {
        if done == HALF as u64 {
            cancel.cancel();
        }
    };
    let error = fetcher.fetch(&artifact(server.url("/kubelet")), stop).await.unwrap_err();
    assert!(matches!(error, FetchError::Cancelled), "{error}");
    // Its last write may be under way; a process that ended would hold no lock.
    fs::File::open(dir.path().join(format!(".begun-sha256-{}", sha256(&content())))).unwrap().lock().unwrap();
    (server, dir)
}

#[tokio::test]
async fn another_process_goes_on_with_a_beginning() {
    // What the first one has on its way to the disk may be lost.
    let (server, dir) = stopped_in_the_middle(content()[..HALF].to_vec(), |start| match start {
        Some(start) => Answer::rest(&content(), start).header("ETag", "\"v1\""),
        None => Answer::body(content()),
    })
    .await;
    assert_eq!(listing(dir.path()), [format!(".begun-sha256-{}", sha256(&content()))]);
    let begun = dir.path().join(format!(".begun-sha256-{}", sha256(&content())));
    fs::write(&begun, &content()[..HALF]).unwrap();
    let path = fetcher(client(), &dir).keep_beginnings().fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    assert_eq!((range_of_second(&server), server.requests().len()), (Some(HALF), 2));
    assert_eq!(listing(dir.path()), [format!("sha256-{}", sha256(&content()))]);
}

#[tokio::test]
async fn a_beginning_of_another_file_is_thrown_away() {
    for knows_ranges in [true, false] {
        let (server, dir) = stopped_in_the_middle(vec![7; HALF], move |start| match start {
            Some(start) if knows_ranges => Answer::rest(&content(), start),
            _ => Answer::body(content()),
        })
        .await;
        let begun = dir.path().join(format!(".begun-sha256-{}", sha256(&content())));
        fs::write(begun, vec![7; HALF]).unwrap();
        let fetcher = fetcher(client(), &dir).keep_beginnings();
        let path = fetcher.fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap();
        assert_eq!(fs::read(path).unwrap(), content());
        assert_eq!(server.requests().len(), if knows_ranges { 3 } else { 2 });
        assert_eq!(listing(dir.path()), [format!("sha256-{}", sha256(&content()))]);
    }
}

#[tokio::test]
async fn two_processes_do_not_write_the_same_beginning() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server = BadServer::start(move |_, number| {
        let (first, second) = (content()[..HALF].to_vec(), content()[HALF..].to_vec());
        match number {
            0 => Answer::promise(
                content().len(),
                vec![Step::Send(first), Step::Gate(Arc::clone(&held)), Step::Send(second)],
            ),
            _ => Answer::body(content()),
        }
    })
    .await;
    let dir = TempDir::new().unwrap();
    let (slow, fast) = (fetcher(client(), &dir).keep_beginnings(), fetcher(client(), &dir).keep_beginnings());
    let artifact = artifact(server.url("/kubelet"));
    let begun = Semaphore::new(0);
    let told = |done, _| {
        if done > 0 {
            begun.add_permits(1);
        }
    };
    let (first, second) = tokio::join!(slow.fetch(&artifact, told), async {
        begun.acquire().await.unwrap().forget();
        let second = fast.fetch(&artifact, quiet).await;
        gate.add_permits(1);
        second
    });
    assert_eq!((fs::read(first.unwrap()).unwrap(), fs::read(second.unwrap()).unwrap()), (content(), content()));
    assert_eq!(listing(dir.path()), [format!("sha256-{}", sha256(&content()))]);
}

#[tokio::test]
async fn server_that_breaks_again_and_again_is_given_up() {
    let server = BadServer::start(|_, _| Answer::promise(content().len(), vec![Step::Send(vec![1; 100])])).await;
    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "ConnectionBroken"));
    assert_eq!(server.requests().len(), 1 + patience().retries);
}

#[tokio::test]
async fn long_download_survives_more_breaks_than_retries() {
    const PART: usize = 1_200_000;
    let whole: Arc<Vec<u8>> = Arc::new(content().into_iter().cycle().take(5 * PART).collect());
    let file = Arc::clone(&whole);
    let server = BadServer::start(move |request, _| {
        let start = request.range_start().unwrap_or(0);
        let rest = &file[start..];
        let sent = rest[..rest.len().min(PART)].to_vec();
        let answer = Answer::promise(rest.len(), vec![Step::Send(sent)]).header("ETag", "\"v1\"");
        if start == 0 {
            return answer;
        }
        answer.with_status(206).header("Content-Range", &format!("bytes {start}-{}/{}", file.len() - 1, file.len()))
    })
    .await;
    let dir = TempDir::new().unwrap();
    let artifact = Artifact { sha256: Some(sha256(&whole)), ..artifact(server.url("/big")) };
    let few = Patience { retries: 1, ..patience() };
    let path = fetcher(client(), &dir).with_patience(few).fetch(&artifact, quiet).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), *whole);
    assert_eq!(server.requests().len(), 5);
}

#[tokio::test]
async fn trickle_is_given_up() {
    let drop = [Step::Send(vec![0]), Step::Pause(Duration::from_millis(50))];
    let steps: Vec<_> = drop.into_iter().cycle().take(400).collect();
    let server = BadServer::start(move |_, _| Answer::promise(content().len(), steps.clone())).await;
    let patience = Patience { retries: 1, slow_after: Duration::from_millis(300), slowest_bytes: 1000, ..patience() };
    let error = fail_with(client(), patience, &server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::Transient, "ServerTooSlow"));
}

#[tokio::test]
async fn wrong_file_is_fetched_twice_and_then_refused() {
    let server = BadServer::start(|_, _| Answer::body("another file")).await;
    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "ChecksumMismatch"));
    assert_eq!(server.requests().len(), 2);
    let text = error.to_string();
    for part in ["kubelet", server.url("/kubelet").as_str(), &sha256(&content()), &sha256(b"another file"), "12 bytes"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[tokio::test]
async fn file_that_is_right_the_second_time_is_taken() {
    let server = BadServer::start(|_, number| Answer::body(if number == 0 { vec![1] } else { content() })).await;
    succeed(&server).await;
}

#[tokio::test]
async fn page_with_status_200_is_named_as_such() {
    let page = || Answer::body("<html>Sign in</html>").header("Content-Type", "text/html; charset=utf-8");
    let server = BadServer::start(move |_, _| page()).await;
    let text = fail(&server).await.to_string();
    assert!(text.contains("the server sent text/html; charset=utf-8: a page about an error or a login?"), "{text}");
}

#[tokio::test]
async fn compressed_answer_that_nobody_asked_for_is_named_as_such() {
    let server = BadServer::start(|_, _| {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(&content()).unwrap();
        Answer::body(encoder.finish().unwrap()).header("Content-Encoding", "gzip")
    })
    .await;
    let text = fail(&server).await.to_string();
    assert!(text.contains("the server sent it encoded as gzip"), "{text}");
    assert_eq!(server.requests()[0].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn server_that_knows_only_get_is_enough() {
    let server = BadServer::start(|request, _| match request.method.as_str() {
        "GET" => Answer::body(content()),
        _ => Answer::status(405),
    })
    .await;
    succeed(&server).await;
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn redirects_are_followed_but_not_for_ever() {
    let target = BadServer::start(|_, _| Answer::body(content())).await;
    let location = target.url("/elsewhere");
    let server = BadServer::start(move |_, _| Answer::status(302).header("Location", &location)).await;
    succeed(&server).await;
    assert_eq!(target.count("/elsewhere"), 1);

    let server = BadServer::start(|_, _| Answer::status(302).header("Location", "/kubelet")).await;
    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "TooManyRedirects"));
}

#[tokio::test]
async fn requests_go_through_the_proxy() {
    install_crypto();
    let server = BadServer::start(|_, _| Answer::body(content())).await;
    let proxy = Proxy { http: Some(server.base()), ..Proxy::default() };
    let dir = TempDir::new().unwrap();
    // Nobody has this name, so that only the proxy can answer.
    let artifact = artifact("http://files.invalid/kubelet".parse().unwrap());
    fetcher(http::client(&proxy, None).unwrap(), &dir).fetch(&artifact, quiet).await.unwrap();
    assert_eq!(server.requests()[0].target, "http://files.invalid/kubelet");
}

#[tokio::test]
async fn private_authority_is_trusted_when_it_is_given_and_refused_otherwise() {
    install_crypto();
    let server = BadServer::start_tls(|_, _| Answer::body(content())).await;
    let authority = server.authority.clone().unwrap();
    succeed_with(http::client(&Proxy::default(), Some(authority.as_bytes())).unwrap(), &server).await;

    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, "UntrustedCertificate"));
    assert!(Chain(&error).to_string().contains("trust bundle"), "{}", Chain(&error));
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn errors_show_no_credentials() {
    let server = BadServer::start(|_, _| Answer::status(404)).await;
    let mut refused = server.url("/kubelet?X-Amz-Signature=s3cret");
    refused.set_username("me").unwrap();
    refused.set_password(Some("s3cret")).unwrap();
    let mut unreachable = refused.clone();
    unreachable.set_port(Some(1)).unwrap();
    for url in [refused, unreachable] {
        let dir = TempDir::new().unwrap();
        let error = fetcher(client(), &dir).fetch(&artifact(url), quiet).await.unwrap_err();
        assert!(!format!("{} {error:?}", Chain(&error)).contains("s3cret"), "{error:?}");
    }
}

#[tokio::test]
async fn cancelled_and_abandoned_downloads_leave_nothing() {
    let server = breaks_in_the_middle("\"v1\"", Some(Step::Stall), |_| Answer::status(500)).await;
    for cancelled in [true, false] {
        let (dir, token) = (TempDir::new().unwrap(), CancellationToken::new());
        let fetcher = Fetcher::new(client(), dir.path(), token.clone()).unwrap();
        let (begun, wait) = (Semaphore::new(0), artifact(server.url(&format!("/{cancelled}"))));
        let fetching = fetcher.fetch(&wait, |done, _| {
            if done == HALF as u64 {
                begun.add_permits(1);
            }
        });
        if cancelled {
            let (result, ()) = tokio::join!(fetching, async {
                begun.acquire().await.unwrap().forget();
                assert_eq!(listing(dir.path()).len(), 1);
                token.cancel();
            });
            assert!(matches!(result, Err(FetchError::Cancelled)), "{result:?}");
        } else {
            tokio::select! {
                result = fetching => panic!("it must not end: {result:?}"),
                permit = begun.acquire() => permit.unwrap().forget(),
            }
        }
        assert_eq!(listing(dir.path()), [""; 0]);
    }
}

#[tokio::test]
async fn file_without_digest_is_refused_without_asking() {
    let server = BadServer::start(|_, _| Answer::body(content())).await;
    let dir = TempDir::new().unwrap();
    for (digest, reason) in [(None, "NoChecksum"), (Some("abc".to_owned()), "InvalidChecksum")] {
        let artifact = Artifact { sha256: digest, ..artifact(server.url("/kubelet")) };
        let error = fetcher(client(), &dir).fetch(&artifact, quiet).await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, reason));
    }
    assert_eq!(server.requests().len(), 0);
}

#[tokio::test]
async fn file_larger_than_the_disk_is_refused_before_it_is_written() {
    let server = BadServer::start(|_, _| Answer::promise(1 << 55, vec![Step::Stall])).await;
    let error = fail(&server).await;
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "DiskFull"));
    assert!(error.to_string().contains(&(1_u64 << 55).to_string()), "{error}");
    assert_eq!(server.requests().len(), 1);
}

/// Set in the process that has a small disk mounted.
const SMALL_DISK: &str = "TEST_SMALL_DISK";

#[tokio::test]
async fn disk_that_fills_up_is_named_and_nothing_is_left() {
    let Ok(disk) = std::env::var(SMALL_DISK) else {
        return again_with_small_disk("fetch::disk_that_fills_up_is_named_and_nothing_is_left");
    };
    // No length is told, so that only writing shows that there is no room.
    let server = BadServer::start(|_, _| Answer::unknown_length(vec![Step::Send(content())])).await;
    let fetcher = Fetcher::new(client(), &disk, CancellationToken::new()).unwrap().with_patience(patience());
    let error = fetcher.fetch(&artifact(server.url("/kubelet")), quiet).await.unwrap_err();
    assert_eq!((error.class(), error.reason()), (FailureClass::Environment, "DiskFull"), "{error}");
    let FetchError::DiskFull { free, .. } = &error else { panic!("{error:?}") };
    // The disk was empty but for the file itself, whose space counts as free.
    assert!((200_000..=256 * 1024).contains(free), "{error}");
    assert_eq!(listing(Path::new(&disk)), [""; 0]);
    assert_eq!(server.requests().len(), 1);
}

/// Runs one test in a mount namespace of its own, with a disk of 256 KiB.
fn again_with_small_disk(test: &str) {
    let dir = TempDir::new().unwrap();
    let mut unshare = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        unshare.arg("--map-root-user");
    }
    let script = "mount -t tmpfs -o size=256k small \"$TEST_SMALL_DISK\" && exec \"$0\" --exact \"$1\" --nocapture";
    unshare.args(["--mount", "sh", "-c", script]).arg(std::env::current_exe().unwrap()).arg(test);
    let output = unshare.env(SMALL_DISK, dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[tokio::test]
async fn many_files_are_fetched_in_parallel_and_told_as_one() {
    // The first four are answered when all of them have been asked for.
    let (gate, asked) = (Arc::new(Semaphore::new(0)), AtomicUsize::new(0));
    let server = BadServer::start(move |request, _| {
        match asked.fetch_add(1, Ordering::SeqCst) {
            3 => gate.add_permits(4),
            0..3 => {}
            _ => gate.add_permits(1),
        }
        let body = request.target.clone().into_bytes();
        Answer::promise(body.len(), vec![Step::Gate(Arc::clone(&gate)), Step::Send(body)])
    })
    .await;
    let artifacts: Vec<_> = (0..10)
        .map(|number| format!("/{number}"))
        .map(|path| Artifact { name: path.clone(), url: server.url(&path), sha256: Some(sha256(path.as_bytes())) })
        .collect();
    let (dir, sink) = (TempDir::new().unwrap(), Sink::default());
    let reporter = Reporter::new(Style::Json, Box::new(sink.clone()));
    let paths = fetcher(client(), &dir).fetch_all(&artifacts, &reporter).await.unwrap();
    for (number, path) in paths.iter().enumerate() {
        assert_eq!(fs::read_to_string(path).unwrap(), format!("/{number}"));
    }
    let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    let last: ProgressLine = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((last.progress.percent, last.progress.message.as_str()), (12, "10 of 10 files"));
}

#[tokio::test]
async fn first_failure_ends_all_downloads() {
    let server = BadServer::start(|request, _| match request.target.as_str() {
        "/2" => Answer::status(404),
        _ => Answer::promise(100, vec![Step::Send(vec![1]), Step::Stall]),
    })
    .await;
    let artifacts: Vec<_> = (0..10).map(|number| artifact(server.url(&format!("/{number}")))).collect();
    let dir = TempDir::new().unwrap();
    let reporter = Reporter::new(Style::Plain, Box::new(Sink::default()));
    let error = fetcher(client(), &dir).fetch_all(&artifacts, &reporter).await.unwrap_err();
    assert!(matches!(error, FetchError::Download { source: TransportError::NotFound { .. }, .. }), "{error:?}");
    assert_eq!(listing(dir.path()), [""; 0]);
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn base_is_verified_by_each_kind_of_digest() {
    let sums = format!("{}  other.tar.xz\n{} *root.tar.xz\n", "0".repeat(64), sha256(&content()));
    let server = BadServer::start(move |request, _| match request.target.as_str() {
        "/SHA256SUMS" => Answer::body(sums.clone()),
        "/release/root.tar.xz" => Answer::body(content()),
        _ => Answer::status(404),
    })
    .await;
    let url = server.url("/release/root.tar.xz");
    let sha512 = hex::encode(Sha512::digest(content()));
    for (checksum, digest) in [
        (BaseChecksum::Sha256(sha256(&content())), format!("sha256:{}", sha256(&content()))),
        (BaseChecksum::Sha512(sha512.clone()), format!("sha512:{sha512}")),
        (BaseChecksum::Sha256Sums(server.url("/SHA256SUMS")), format!("sha256:{}", sha256(&content()))),
    ] {
        let dir = TempDir::new().unwrap();
        let base = Archive { url: url.clone(), checksum };
        let (path, found) = fetcher(client(), &dir).fetch_base(&base, quiet).await.unwrap();
        assert_eq!((fs::read(path).unwrap(), found), (content(), digest));
    }
}

#[tokio::test]
async fn base_that_its_list_does_not_name_is_refused() {
    let sums = format!("{0}  noble-root.tar.xz\n{0} *jammy-server-root.tar.xz\n", "0".repeat(64));
    let server = BadServer::start(move |request, _| match request.target.as_str() {
        "/SHA256SUMS" => Answer::body(sums.clone()),
        _ => Answer::status(404),
    })
    .await;
    let dir = TempDir::new().unwrap();
    for (list, reason, part) in [
        (
            "/SHA256SUMS",
            "ChecksumNotListed",
            "does not list jammy-root.tar.xz (but jammy-server-root.tar.xz, noble-root.tar.xz)",
        ),
        ("/MD5SUMS", "NotFound", "/MD5SUMS"),
    ] {
        let base =
            Archive { url: server.url("/jammy-root.tar.xz"), checksum: BaseChecksum::Sha256Sums(server.url(list)) };
        let error = fetcher(client(), &dir).fetch_base(&base, quiet).await.unwrap_err();
        assert_eq!((error.class(), error.reason()), (FailureClass::BadInput, reason));
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(server.count("/jammy-root.tar.xz"), 0);
}
