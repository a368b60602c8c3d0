//! Upload tokens of the artifact server: the controller mints one for each build, the server verifies it.
//!
//! A token allows writing and deleting below one directory until a time. It is signed with a key that only the
//! controller and the server hold, so a build can touch no other build's images.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Shortest key, in bytes, that [`SigningKey::new`] takes.
pub const MIN_KEY_BYTES: usize = 32;

/// The key shared by controller and artifact server.
#[derive(Clone)]
pub struct SigningKey(Vec<u8>);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey(…)")
    }
}

/// What a token allows.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
struct Claims {
    /// Directory below which files may be written and deleted.
    directory: String,
    /// Unix time in seconds after which the token is refused.
    expires: i64,
}

/// Why a token was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TokenError {
    #[error("the signing key has fewer than {MIN_KEY_BYTES} bytes")]
    KeyTooShort,
    #[error("the token is malformed or was signed with another key")]
    Invalid,
    #[error("the token has expired")]
    Expired,
    #[error("the token is for another directory")]
    OtherDirectory,
}

impl SigningKey {
    /// A key from the bytes of a Secret; surrounding white space is not part of it.
    pub fn new(bytes: &[u8]) -> Result<Self, TokenError> {
        let key = bytes.trim_ascii();
        if key.len() < MIN_KEY_BYTES {
            return Err(TokenError::KeyTooShort);
        }
        Ok(Self(key.to_vec()))
    }

    /// A token for everything below `directory` until `expires`.
    pub fn mint(&self, directory: &str, expires: Timestamp) -> String {
        let claims = Claims { directory: directory.to_owned(), expires: expires.as_second() };
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims).unwrap_or_default());
        let signature = URL_SAFE_NO_PAD.encode(self.mac(&payload).finalize().into_bytes());
        format!("{payload}.{signature}")
    }

    /// Whether `token` allows changing `path` at `now`.
    pub fn verify(&self, token: &str, path: &str, now: Timestamp) -> Result<(), TokenError> {
        let (payload, signature) = token.split_once('.').ok_or(TokenError::Invalid)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Invalid)?;
        self.mac(payload).verify_slice(&signature).map_err(|_| TokenError::Invalid)?;
        let claims: Claims = URL_SAFE_NO_PAD
            .decode(payload)
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .ok_or(TokenError::Invalid)?;
        if claims.expires < now.as_second() {
            return Err(TokenError::Expired);
        }
        let below = path.strip_prefix(&claims.directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if below { Ok(()) } else { Err(TokenError::OtherDirectory) }
    }

    fn mac(&self, payload: &str) -> Hmac<Sha256> {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(payload.as_bytes());
        mac
    }
}

/// A token opens its directory and what is in it, and nothing else is a token. The bytes are a directory and a path in a
/// line each.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (directory, path) = text.split_once('\n').unwrap_or((&text, ""));
    let (Ok(key), now) = (SigningKey::new(&[1; MIN_KEY_BYTES]), Timestamp::UNIX_EPOCH) else { return };
    let below = path == directory || path.starts_with(&format!("{directory}/"));
    assert_eq!(key.verify(&key.mint(directory, now), path, now).is_ok(), below, "{directory} and {path}");
    assert!(key.verify(&text, path, now).is_err(), "{text} is a token");
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan;

    use super::*;

    fn key(byte: u8) -> SigningKey {
        SigningKey::new(&[byte; 32]).unwrap()
    }

    #[test]
    fn token_opens_its_directory_and_nothing_else() {
        let now = Timestamp::UNIX_EPOCH;
        let token = key(1).mint("ns/name/id", now + 1.hour());
        assert_eq!(key(1).verify(&token, "ns/name/id/file.gz", now), Ok(()));
        assert_eq!(key(1).verify(&token, "ns/name/id", now), Ok(()));
        for other in ["ns/name/id2/file.gz", "ns/name", "other/ns/name/id/file.gz", ""] {
            assert_eq!(key(1).verify(&token, other, now), Err(TokenError::OtherDirectory), "{other}");
        }
    }

    #[test]
    fn refuses_expired_forged_and_malformed_tokens() {
        let now = Timestamp::UNIX_EPOCH;
        let token = key(1).mint("a", now + 1.hour());
        assert_eq!(key(1).verify(&token, "a", now + 2.hours()), Err(TokenError::Expired));
        assert_eq!(key(2).verify(&token, "a", now), Err(TokenError::Invalid));
        let (payload, signature) = token.split_once('.').unwrap();
        let other = key(1).mint("b", now + 1.hour());
        for bad in ["", ".", "a.b", payload, signature, &format!("{}.{signature}", other.split_once('.').unwrap().0)] {
            assert_eq!(key(1).verify(bad, "a", now), Err(TokenError::Invalid), "{bad}");
        }
        assert!(matches!(SigningKey::new(b"short"), Err(TokenError::KeyTooShort)));
    }
}
