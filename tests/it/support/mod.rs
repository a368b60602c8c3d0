//! What the integration tests share.

pub mod apiserver;
pub mod bad_server;
pub mod chart;
pub mod outcome;
pub mod sources;
pub mod tls;

/// TLS needs to know its provider, as the program tells it first thing.
pub fn install_crypto() {
    // Fails where another test was first.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
