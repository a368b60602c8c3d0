//! vCenter's REST API, which has what SOAP lacks: tags and content libraries. The paths under `/rest` are those that every
//! vCenter from 6.5 on answers.

use std::sync::RwLock;

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use url::Url;

use super::{VsphereError, vim::Vim};
use crate::contract::shorten;

/// Header that carries a session.
pub(super) const SESSION_HEADER: &str = "vmware-api-session-id";
const SESSION: &str = "cis/session";

/// A session with the REST API, opened when it is first needed.
#[derive(Debug)]
pub(super) struct Rest<'v> {
    pub(super) client: Client,
    base: Url,
    /// Knows the server, the login and how long to wait.
    vim: &'v Vim,
    token: RwLock<Option<SecretString>>,
}

/// A result, in the form that all have.
#[derive(Deserialize)]
struct Success<T> {
    value: T,
}

/// What is wrong, as far as vCenter says it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Failure {
    /// e.g. `com.vmware.vapi.std.errors.already_exists`.
    r#type: String,
    value: FailureValue,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FailureValue {
    messages: Vec<Message>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Message {
    default_message: String,
}

impl<'v> Rest<'v> {
    /// `base` is vCenter's own URL.
    pub(super) fn new(client: Client, base: &Url, vim: &'v Vim) -> Self {
        Self { client, base: base.clone(), vim, token: RwLock::new(None) }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, action: &str, path: &str) -> Result<T, VsphereError> {
        self.value(action, &self.call(action, Method::GET, path, None).await?)
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        action: &str,
        path: &str,
        body: Value,
    ) -> Result<T, VsphereError> {
        self.value(action, &self.call(action, Method::POST, path, Some(body)).await?)
    }

    /// A request without a result.
    pub(super) async fn send(
        &self,
        action: &str,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(), VsphereError> {
        self.call(action, method, path, body).await.map(drop)
    }

    fn value<T: DeserializeOwned>(&self, action: &str, text: &str) -> Result<T, VsphereError> {
        // An empty list is left out.
        let text = if text.trim().is_empty() || text.trim() == "{}" { r#"{"value": null}"# } else { text };
        serde_json::from_str::<Success<T>>(text).map(|success| success.value).map_err(|error| {
            VsphereError::NotVcenter {
                server: self.vim.server.clone(),
                answer: format!("the answer to \"{action}\" is not understood: {error}"),
            }
        })
    }

    /// Makes a request until there is an answer.
    async fn call(
        &self,
        action: &str,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<String, VsphereError> {
        let mut waiting = self.vim.patience();
        let mut renewed = false;
        loop {
            let token = match self.token() {
                Some(token) => token,
                None => self.log_in().await?,
            };
            let mut request = self.request(method.clone(), path).header(SESSION_HEADER, token.expose_secret());
            if let Some(body) = &body {
                request = request.json(body);
            }
            match answer(request).await {
                Ok((status, text)) if status.is_success() => return Ok(text),
                Ok((StatusCode::UNAUTHORIZED, _)) if !renewed => {
                    self.set_token(None);
                    renewed = true;
                }
                Ok((status, text)) if is_away(status) => {
                    waiting.wait(format!("{status}: {}", shorten(text.trim(), 200))).await?;
                }
                Ok((status, text)) => return Err(self.failure(action, status, &text)),
                Err(error) => waiting.wait(error.without_url()).await?,
            }
        }
    }

    fn failure(&self, action: &str, status: StatusCode, text: &str) -> VsphereError {
        let failure = serde_json::from_str::<Failure>(text).unwrap_or_default();
        let kind = failure.r#type.rsplit('.').next().filter(|kind| !kind.is_empty());
        let messages: Vec<_> = failure.value.messages.into_iter().map(|message| message.default_message).collect();
        VsphereError::Fault {
            server: self.vim.server.clone(),
            action: action.to_owned(),
            kind: kind.map_or_else(|| status.to_string(), str::to_owned),
            message: if messages.is_empty() { shorten(text.trim(), 200) } else { messages.join(", ") },
        }
    }

    async fn log_in(&self) -> Result<SecretString, VsphereError> {
        let action = "log in to the REST API";
        let mut waiting = self.vim.patience();
        loop {
            let login = &self.vim.login;
            let request = self
                .request(Method::POST, SESSION)
                .basic_auth(login.username.expose_secret(), Some(login.password.expose_secret()));
            match answer(request).await {
                Ok((status, text)) if status.is_success() => {
                    let token = SecretString::from(self.value::<String>(action, &text)?);
                    self.set_token(Some(token.clone()));
                    return Ok(token);
                }
                Ok((StatusCode::UNAUTHORIZED, _)) => {
                    return Err(VsphereError::LoginRefused { server: self.vim.server.clone() });
                }
                Ok((status, _)) if is_away(status) => waiting.wait(status.to_string()).await?,
                Ok((status, text)) => return Err(self.failure(action, status, &text)),
                Err(error) => waiting.wait(error.without_url()).await?,
            }
        }
    }

    /// Ends the session, if there is one. What fails is not worth a word: vCenter ends it after some time.
    pub(super) async fn log_out(&self) {
        if let Some(token) = self.token() {
            let request = self.request(Method::DELETE, SESSION).header(SESSION_HEADER, token.expose_secret());
            let _ = request.send().await;
            self.set_token(None);
        }
    }

    fn token(&self) -> Option<SecretString> {
        self.token.read().ok().and_then(|token| token.clone())
    }

    fn set_token(&self, token: Option<SecretString>) {
        if let Ok(mut known) = self.token.write() {
            *known = token;
        }
    }

    /// `path` is below the API's root and may have a query.
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        let mut url = self.base.clone();
        url.set_path(&format!("/rest/com/vmware/{path}"));
        url.set_query(query);
        self.client.request(method, url)
    }
}

async fn answer(request: RequestBuilder) -> reqwest::Result<(StatusCode, String)> {
    let response = request.send().await?;
    let status = response.status();
    Ok((status, response.text().await?))
}

fn is_away(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}
