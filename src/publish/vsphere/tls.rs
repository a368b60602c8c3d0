//! Which certificates vCenter and its hosts may have, and what one that is refused looks like.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use reqwest::Client;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use rustls_platform_verifier::Verifier;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::VsphereError;
use crate::{contract::Proxy, http};

/// Certificates that are accepted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Trust {
    /// Those of the system's authorities and of these (PEM).
    Authorities(Vec<u8>),
    /// The one with this SHA-256 or SHA-1 digest, pairs of hexadecimal digits with colons.
    Thumbprint(String),
    /// Any.
    Everything,
}

/// The SHA-256 digest of a certificate that was refused.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused(Arc<Mutex<Option<String>>>);

impl Refused {
    /// The last one, once.
    pub(super) fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A client that accepts what `trust` says, and bears `silence` of a server between request and answer.
pub(super) fn client(proxy: &Proxy, trust: Trust, silence: Duration) -> Result<(Client, Refused), VsphereError> {
    let provider = Arc::new(ring::default_provider());
    let unavailable = |source: Error| VsphereError::Tls { source };
    let authorities = match &trust {
        Trust::Authorities(pem) => {
            let roots = CertificateDer::pem_slice_iter(pem)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| VsphereError::TrustBundle { answer: error.to_string() })?;
            Some(Verifier::new_with_extra_roots(roots, Arc::clone(&provider)).map_err(unavailable)?)
        }
        Trust::Thumbprint(_) | Trust::Everything => None,
    };
    let refused = Refused::default();
    let judge = Judge { trust, authorities, provider: Arc::clone(&provider), refused: refused.clone() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unavailable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(judge))
        .with_no_client_auth();
    let client = http::builder(proxy)?
        .read_timeout(silence)
        .tls_backend_preconfigured(config)
        .build()
        .map_err(|source| http::HttpError::Build { source })?;
    Ok((client, refused))
}

#[derive(Debug)]
struct Judge {
    trust: Trust,
    authorities: Option<Verifier>,
    provider: Arc<CryptoProvider>,
    refused: Refused,
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verdict = match (&self.trust, &self.authorities) {
            (Trust::Everything, _) => Ok(ServerCertVerified::assertion()),
            (Trust::Thumbprint(expected), _) if is_thumbprint_of(expected, certificate) => {
                Ok(ServerCertVerified::assertion())
            }
            (Trust::Authorities(_), Some(verifier)) => {
                verifier.verify_server_cert(certificate, intermediates, name, ocsp, now)
            }
            (Trust::Thumbprint(_) | Trust::Authorities(_), _) => {
                Err(Error::General("the certificate has another thumbprint".to_owned()))
            }
        };
        if verdict.is_err() {
            let mut refused = self.refused.0.lock().unwrap_or_else(PoisonError::into_inner);
            *refused = Some(with_colons(&Sha256::digest(certificate)));
        }
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn is_thumbprint_of(thumbprint: &str, certificate: &CertificateDer<'_>) -> bool {
    let is = |digest: &[u8]| with_colons(digest).eq_ignore_ascii_case(thumbprint);
    is(&Sha256::digest(certificate)) || is(&Sha1::digest(certificate))
}

fn with_colons(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thumbprints_are_sha256_or_sha1_in_any_case() {
        let certificate = CertificateDer::from(b"certificate".to_vec());
        let (sha256, sha1) = (with_colons(&Sha256::digest(b"certificate")), with_colons(&Sha1::digest(b"certificate")));
        assert_eq!((sha256.len(), sha1.len()), (95, 59));
        for thumbprint in [sha256.clone(), sha1, sha256.to_lowercase()] {
            assert!(is_thumbprint_of(&thumbprint, &certificate), "{thumbprint}");
        }
        assert!(!is_thumbprint_of(&sha256[3..], &certificate));
    }
}
