//! Which addresses a process may be sent to by URLs that somebody else writes.
//!
//! The operator reads release documents from URLs of the resources' authors. From its place in the network it reaches
//! what they may not: its own ports, and the node's metadata service, which gives cloud credentials to whoever asks.

use std::{
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use reqwest::{
    ClientBuilder,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};
use url::{Host, Url};

/// Redirects that are followed; more are a loop.
const MOST_REDIRECTS: usize = 10;
/// Metadata services outside the link-local range: AWS by IPv6, Azure, Oracle, Alibaba.
const METADATA: [IpAddr; 4] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
];

/// Where URLs may lead.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Reach {
    /// Anywhere: for whoever writes the URLs and runs the process is the same person.
    Anywhere,
    /// Not to the process's own machine, and not to what only that machine may ask.
    #[default]
    OtherMachines,
}

/// A URL that leads where it must not.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{host} is an address of the machine itself or of its metadata service")]
pub struct Forbidden {
    host: String,
}

impl Reach {
    /// Whether the URL may be asked, as far as that can be said without resolving its name.
    pub fn check(self, url: &Url) -> Result<(), Forbidden> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self == Self::OtherMachines && is_own(address) {
            return Err(Forbidden { host: address.to_string() });
        }
        Ok(())
    }

    /// Lets the client refuse names and redirects that lead elsewhere. Addresses in URLs are not resolved: they need
    /// [`Self::check`] too.
    pub(crate) fn limit(self, builder: ClientBuilder) -> ClientBuilder {
        match self {
            Self::Anywhere => builder,
            Self::OtherMachines => {
                let redirects = Policy::custom(move |attempt| match self.check(attempt.url()) {
                    Err(forbidden) => attempt.error(forbidden),
                    Ok(()) if attempt.previous().len() > MOST_REDIRECTS => attempt.error("too many redirects"),
                    Ok(()) => attempt.follow(),
                });
                builder.dns_resolver(Arc::new(OtherMachines)).redirect(redirects)
            }
        }
    }
}

/// The address that a request was not sent to, if that is why it failed.
pub(crate) fn forbidden<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Forbidden> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(forbidden) = error.downcast_ref() {
            return Some(forbidden);
        }
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Resolves names, but for addresses that are not to be reached. What is resolved is what is connected to: a name can not
/// mean another address a moment later.
#[derive(Debug)]
struct OtherMachines;

impl Resolve for OtherMachines {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| !is_own(address.ip())).collect();
            if allowed.is_empty() {
                return Err(Forbidden { host: name.as_str().to_owned() }.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

fn is_own(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let by_range = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified(),
    };
    by_range || address.is_multicast() || METADATA.contains(&address)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("http://127.0.0.1/", false)]
    #[case("http://127.8.9.1:8080/metrics", false)]
    // Other ways to write the same addresses.
    #[case("http://2130706433/", false)]
    #[case("http://0x7f.1/", false)]
    #[case("http://[::1]/", false)]
    #[case("http://[::ffff:169.254.169.254]/latest/meta-data", false)]
    #[case("http://169.254.169.254/latest/meta-data", false)]
    #[case("http://169.254.170.2/v2/credentials", false)]
    #[case("http://[fd00:ec2::254]/latest/meta-data", false)]
    #[case("http://[fe80::1]/", false)]
    #[case("http://0.0.0.0/", false)]
    #[case("http://168.63.129.16/", false)]
    #[case("http://10.0.0.7/manifest.yaml", true)]
    #[case("http://192.168.1.7/manifest.yaml", true)]
    #[case("http://[fd00::7]/manifest.yaml", true)]
    #[case("https://mirror.example.com/manifest.yaml", true)]
    fn addresses_of_the_machine_itself_are_told_from_others(#[case] url: &str, #[case] allowed: bool) {
        let url: Url = url.parse().unwrap();
        assert_eq!(Reach::OtherMachines.check(&url).is_ok(), allowed);
        assert!(Reach::Anywhere.check(&url).is_ok());
    }

    #[tokio::test]
    async fn a_name_that_means_the_machine_itself_is_refused() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Reach::OtherMachines.limit(crate::http::builder(&crate::contract::Proxy::default()).unwrap());
        let error = client.build().unwrap().get("http://localhost:1/").send().await.unwrap_err();
        assert_eq!(forbidden(&error), Some(&Forbidden { host: "localhost".to_owned() }));
    }

    #[tokio::test]
    async fn a_redirect_to_the_metadata_service_is_not_followed() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = || async {
            let to = [(axum::http::header::LOCATION, "http://169.254.169.254/latest/meta-data/")];
            (axum::http::StatusCode::FOUND, to)
        };
        let router = axum::Router::new().fallback(answer);
        tokio::spawn(async move { axum::serve(listener, router).await });
        let builder = crate::http::builder(&crate::contract::Proxy::default()).unwrap();
        // As if the server were another machine.
        let client = Reach::OtherMachines.limit(builder).resolve("mirror.example.com", address).build().unwrap();
        let url = format!("http://mirror.example.com:{}/", address.port());
        let error = client.get(url).send().await.unwrap_err();
        assert_eq!(forbidden(&error), Some(&Forbidden { host: "169.254.169.254".to_owned() }));
    }
}
