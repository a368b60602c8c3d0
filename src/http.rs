//! The HTTP client that everything shares: rustls, the build's proxy and certificate authorities, and bounded waiting.

use std::{path::PathBuf, time::Duration};

use reqwest::{Certificate, Client, ClientBuilder, NoProxy, Proxy as ClientProxy};

use crate::{
    contract::{Classified, FailureClass, Proxy},
    reach::{Forbidden, Reach},
};

/// Time to establish a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest silence of a server in the middle of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("the proxy `{url}` is not a URL such as http://proxy.example.com:3128")]
    Proxy { url: String, source: reqwest::Error },
    #[error("the proxy `{url}` may not be used from here: {source}; write another one, or leave it out")]
    ProxyForbidden { url: String, source: Forbidden },
    #[error("can not read the trust bundle {}", .path.display())]
    ReadTrustBundle { path: PathBuf, source: std::io::Error },
    #[error("the trust bundle holds no readable PEM certificate")]
    TrustBundle { source: reqwest::Error },
    #[error("can not set up TLS")]
    Build { source: reqwest::Error },
}

impl Classified for HttpError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Proxy { .. }
            | Self::ProxyForbidden { .. }
            | Self::ReadTrustBundle { .. }
            | Self::TrustBundle { .. } => FailureClass::BadInput,
            Self::Build { .. } => FailureClass::Environment,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Proxy { .. } => "InvalidProxy",
            Self::ProxyForbidden { .. } => "AddressForbidden",
            Self::ReadTrustBundle { .. } | Self::TrustBundle { .. } => "InvalidTrustBundle",
            Self::Build { .. } => "TlsUnavailable",
        }
    }
}

/// Makes a proxy for one scheme from its URL.
type Scheme = fn(&str) -> reqwest::Result<ClientProxy>;

/// A client with the proxy and the additional certificate authorities (PEM). An empty `proxy` takes the process's own
/// `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.
pub fn client(proxy: &Proxy, trust_bundle: Option<&[u8]>) -> Result<Client, HttpError> {
    client_with(proxy, trust_bundle, |builder| builder)
}

/// The same for URLs that somebody else writes.
pub fn client_reaching(proxy: &Proxy, trust_bundle: Option<&[u8]>, reach: Reach) -> Result<Client, HttpError> {
    for text in [&proxy.http, &proxy.https].into_iter().flatten() {
        let Ok(url) = text.parse() else { continue };
        reach.check(&url).map_err(|source| HttpError::ProxyForbidden { url: text.clone(), source })?;
    }
    client_with(proxy, trust_bundle, |builder| reach.limit(builder))
}

/// The same with more settings.
pub(crate) fn client_with(
    proxy: &Proxy,
    trust_bundle: Option<&[u8]>,
    set: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> Result<Client, HttpError> {
    let mut builder = builder(proxy)?;
    if let Some(pem) = trust_bundle {
        let authorities = Certificate::from_pem_bundle(pem).map_err(|source| HttpError::TrustBundle { source })?;
        builder = builder.tls_certs_merge(authorities);
    }
    set(builder).build().map_err(|source| HttpError::Build { source })
}

/// What all clients have in common; how they judge certificates is left to the caller.
pub(crate) fn builder(proxy: &Proxy) -> Result<ClientBuilder, HttpError> {
    let mut builder = Client::builder()
        .user_agent(concat!("image-builder/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT);
    let exceptions = NoProxy::from_string(&proxy.no_proxy.join(","));
    let schemes: [(&Option<String>, Scheme); 2] =
        [(&proxy.http, |url| ClientProxy::http(url)), (&proxy.https, |url| ClientProxy::https(url))];
    for (url, scheme) in schemes {
        if let Some(url) = url {
            let proxy = scheme(url).map_err(|source| HttpError::Proxy { url: url.clone(), source })?;
            builder = builder.proxy(proxy.no_proxy(exceptions.clone()));
        }
    }
    Ok(builder)
}
