//! Digests: what is expected, and what was read.

use std::fmt;

use sha2::{Digest, Sha256, Sha512};

use super::FetchError;

/// The digest that a file must have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Expected {
    Sha256([u8; 32]),
    Sha512([u8; 64]),
}

impl Expected {
    /// From hexadecimal; `name` is the file's, for the message.
    pub(super) fn sha256(hex: &str, name: &str) -> Result<Self, FetchError> {
        bytes(hex, name).map(Self::Sha256)
    }

    /// From hexadecimal; `name` is the file's, for the message.
    pub(super) fn sha512(hex: &str, name: &str) -> Result<Self, FetchError> {
        bytes(hex, name).map(Self::Sha512)
    }

    /// Name of the file in the cache.
    pub(super) fn file_name(&self) -> String {
        self.to_string().replace(':', "-")
    }

    pub(super) fn hasher(&self) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::Sha512(_) => Hasher::Sha512(Sha512::new()),
        }
    }
}

impl fmt::Display for Expected {
    /// `sha256:…`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digest) => write!(f, "sha256:{}", hex::encode(digest)),
            Self::Sha512(digest) => write!(f, "sha512:{}", hex::encode(digest)),
        }
    }
}

fn bytes<const N: usize>(text: &str, name: &str) -> Result<[u8; N], FetchError> {
    let mut digest = [0; N];
    match hex::decode_to_slice(text, &mut digest) {
        Ok(()) => Ok(digest),
        Err(_) => Err(FetchError::InvalidDigest { name: name.to_owned(), digest: text.to_owned(), digits: N * 2 }),
    }
}

/// Computes a digest of the expected kind.
#[derive(Clone, Debug)]
pub(super) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(super) fn finish(self) -> Expected {
        match self {
            Self::Sha256(hasher) => Expected::Sha256(hasher.finalize().into()),
            Self::Sha512(hasher) => Expected::Sha512(hasher.finalize().into()),
        }
    }
}
