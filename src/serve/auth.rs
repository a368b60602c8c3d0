//! Who may change what: a token minted for one directory, or the administrator's token for all.

use axum::http::{HeaderMap, header::AUTHORIZATION};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

use super::{error::Refusal, path::StorePath};
use crate::contract::token::{SigningKey, TokenError};

/// Verifies the tokens of requests.
#[derive(Debug)]
pub(super) struct Authority {
    key: SigningKey,
    admin: Option<SecretString>,
}

impl Authority {
    pub(super) fn new(key: SigningKey, admin: Option<SecretString>) -> Self {
        Self { key, admin }
    }

    /// Whether the bearer token of a request allows changing `path`.
    pub(super) fn check(&self, headers: &HeaderMap, path: &StorePath) -> Result<(), Refusal> {
        let token = bearer(headers).ok_or_else(|| {
            Refusal::Unauthorized("this needs a token: send it as `Authorization: Bearer <token>`".into())
        })?;
        if self.admin.as_ref().is_some_and(|admin| bool::from(admin.expose_secret().as_bytes().ct_eq(token.as_bytes())))
        {
            return Ok(());
        }
        self.key.verify(token, path.as_str(), Timestamp::now()).map_err(|error| match error {
            TokenError::OtherDirectory => Refusal::Forbidden(format!("{error}, not for /{path}")),
            TokenError::Invalid | TokenError::Expired | TokenError::KeyTooShort => {
                Refusal::Unauthorized(error.to_string())
            }
        })
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
