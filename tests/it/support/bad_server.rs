//! A web server that does what it is told, byte by byte: most of the ways a download can go wrong are not in any real
//! server's power.

use std::{
    collections::HashMap,
    fmt::Display,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
    sync::Semaphore,
    task::AbortHandle,
};
use url::Url;

use super::tls::TlsParts;

/// One request as it came in. Header names are in lower case.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Path and query; a whole URL when the client takes this server for a proxy.
    pub target: String,
    pub headers: HashMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// First byte asked for by `Range: bytes=N-`.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What the server does next on a connection. After the last step it closes it.
#[derive(Clone, Debug)]
pub enum Step {
    Send(Vec<u8>),
    /// Sends nothing for this long: what is tested is the client's waiting.
    Pause(Duration),
    /// Sends nothing until the client goes.
    Stall,
    /// Sends nothing until the test lets one more through.
    Gate(Arc<Semaphore>),
}

/// An answer: a status, headers, and what the body is made of.
#[derive(Clone, Debug)]
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    steps: Vec<Step>,
}

impl Answer {
    /// Only the status, with an empty body.
    pub fn status(status: u16) -> Self {
        Self { status, headers: vec![], steps: vec![] }.header("Content-Length", &0)
    }

    /// Status 200 and the whole body.
    pub fn body(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self { status: 200, headers: vec![], steps: vec![] }
            .header("Content-Length", &bytes.len())
            .then(Step::Send(bytes))
    }

    /// The rest of `bytes` from `start`, with status 206.
    pub fn rest(bytes: &[u8], start: usize) -> Self {
        let mut answer = Self::body(&bytes[start..]);
        answer.status = 206;
        answer.header("Content-Range", &format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()))
    }

    /// Promises `length` bytes and does `steps`.
    pub fn promise(length: usize, steps: Vec<Step>) -> Self {
        Self { status: 200, headers: vec![], steps }.header("Content-Length", &length)
    }

    /// Status 200 and a body that ends with the connection.
    pub fn unknown_length(steps: Vec<Step>) -> Self {
        Self { status: 200, headers: vec![], steps }
    }

    pub fn with_status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    pub fn header(mut self, name: &str, value: &(impl Display + ?Sized)) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }
}

type Handler = dyn Fn(&Request, usize) -> Answer + Send + Sync;

/// A server that runs until it is dropped.
pub struct BadServer {
    address: SocketAddr,
    scheme: &'static str,
    /// The authority to trust, in PEM, of a server with TLS.
    pub authority: Option<String>,
    requests: Arc<Mutex<Vec<Request>>>,
    accepting: AbortHandle,
}

impl Drop for BadServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl BadServer {
    /// A server that answers with what `handler` makes of a request and its number (from 0, for each target).
    pub async fn start(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        Self::listen(Arc::new(handler), None).await
    }

    /// The same over TLS, with a certificate for `localhost` of an authority of its own.
    pub async fn start_tls(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        Self::listen(Arc::new(handler), Some(TlsParts::new())).await
    }

    async fn listen(handler: Arc<Handler>, tls: Option<TlsParts>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, acceptor) = (Arc::clone(&requests), tls.as_ref().map(|tls| tls.acceptor.clone()));
        let accepting = tokio::spawn(async move {
            // Connections end with the server.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (handler, seen, acceptor) = (Arc::clone(&handler), Arc::clone(&seen), acceptor.clone());
                connections.spawn(async move {
                    match acceptor {
                        None => serve(stream, &*handler, &seen).await,
                        // A client that distrusts the certificate ends the handshake.
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, &*handler, &seen).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            scheme: if tls.is_some() { "https" } else { "http" },
            authority: tls.map(|tls| tls.authority),
            requests,
            accepting: accepting.abort_handle(),
        }
    }

    /// `http://127.0.0.1:port`, or `https://localhost:port`.
    pub fn base(&self) -> String {
        let host = if self.scheme == "https" { "localhost" } else { "127.0.0.1" };
        format!("{}://{host}:{}", self.scheme, self.address.port())
    }

    pub fn url(&self, path: &str) -> Url {
        format!("{}{path}", self.base()).parse().unwrap()
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How often `target` was asked for.
    pub fn count(&self, target: &str) -> usize {
        self.requests().iter().filter(|request| request.target == target).count()
    }
}

/// One request, one answer, and the end of the connection.
async fn serve(stream: impl AsyncRead + AsyncWrite, handler: &Handler, seen: &Mutex<Vec<Request>>) {
    let (read, mut write) = tokio::io::split(stream);
    let mut read = Box::pin(BufReader::new(read));
    let Some(request) = read_request(&mut read).await else { return };
    let number = {
        let mut seen = seen.lock().unwrap();
        let number = seen.iter().filter(|earlier| earlier.target == request.target).count();
        seen.push(request.clone());
        number
    };
    let answer = handler(&request, number);
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    head.push_str("\r\n");
    if write.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    for step in answer.steps {
        match step {
            Step::Send(bytes) if request.method != "HEAD" => {
                // The client may have gone: that is what some tests are about.
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Step::Send(_) => {}
            Step::Pause(time) => tokio::time::sleep(time).await,
            Step::Stall => {
                let _ = read.fill_buf().await;
            }
            Step::Gate(gate) => gate.acquire().await.unwrap().forget(),
        }
        if write.flush().await.is_err() {
            return;
        }
    }
    let _ = write.shutdown().await;
}

async fn read_request(read: &mut (impl AsyncBufReadExt + Unpin)) -> Option<Request> {
    let mut line = String::new();
    read.read_line(&mut line).await.ok()?;
    let mut words = line.split_whitespace().map(ToOwned::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        read.read_line(&mut line).await.ok()?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => return Some(Request { method, target, headers }),
        };
    }
}
