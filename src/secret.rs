//! Secrets: reading them from files, and keeping them out of everything that is printed.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use secrecy::{ExposeSecret, SecretString};

use crate::contract::{Classified, CredentialSlot, FailureClass};

/// Shorter values are not replaced: they would blank out ordinary words.
const MIN_REDACTED: usize = 4;

/// Replaces every known secret in text that leaves the process. Clones share what they know.
#[derive(Clone, Default)]
pub struct Redactor(Arc<RwLock<Vec<String>>>);

impl std::fmt::Debug for Redactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Redactor(…)")
    }
}

impl Redactor {
    /// Learns a secret and the forms it takes in URLs and base64.
    pub fn add(&self, secret: &str) {
        use base64::{Engine, engine::general_purpose::STANDARD};
        if secret.len() < MIN_REDACTED {
            return;
        }
        let percent: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
        let forms = [secret.to_owned(), percent.replace('+', "%20"), percent, STANDARD.encode(secret)];
        if let Ok(mut known) = self.0.write() {
            known.extend(forms);
            known.sort_by_key(|form| std::cmp::Reverse(form.len()));
            known.dedup();
        }
    }

    /// `text` without any known secret.
    pub fn redact<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let Ok(known) = self.0.read() else { return Cow::Borrowed("[redacted]") };
        known.iter().fold(Cow::Borrowed(text), |text, secret| {
            if text.contains(secret.as_str()) { Cow::Owned(text.replace(secret.as_str(), "[redacted]")) } else { text }
        })
    }
}

/// Why a credential could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("the Secret for `{slot}` has no key `{key}`; add it")]
    MissingKey { slot: String, key: String },
    #[error("can not read the credential {}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
}

impl Classified for SecretError {
    fn class(&self) -> FailureClass {
        FailureClass::BadInput
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::MissingKey { .. } => "SecretKeyMissing",
            Self::Read { .. } => "SecretUnreadable",
        }
    }
}

/// Reads credentials of a build and teaches the redactor what it reads.
#[derive(Clone, Debug)]
pub struct Credentials {
    redactor: Redactor,
    /// By slot and key. Nothing where they are files.
    given: Option<Arc<BTreeMap<(String, String), SecretString>>>,
}

impl Credentials {
    /// Those that are mounted in this pod, see [`CredentialSlot::file`].
    pub fn new(redactor: Redactor) -> Self {
        Self { redactor, given: None }
    }

    /// Those that a person's command line read, by slot and key: they are in memory only, and no file is looked at.
    pub fn given(redactor: Redactor, values: impl IntoIterator<Item = (CredentialSlot, String, SecretString)>) -> Self {
        let keyed = values.into_iter().map(|(slot, key, value)| ((slot.0, key), value));
        Self { redactor, given: Some(Arc::new(keyed.collect())) }
    }

    /// The value of `key`, without a final line break.
    pub fn require(&self, slot: &CredentialSlot, key: &str) -> Result<SecretString, SecretError> {
        self.optional(slot, key)?.ok_or_else(|| SecretError::MissingKey { slot: slot.0.clone(), key: key.to_owned() })
    }

    /// The value of `key`, if the Secret has it.
    pub fn optional(&self, slot: &CredentialSlot, key: &str) -> Result<Option<SecretString>, SecretError> {
        match &self.given {
            None => self.read(&slot.file(key)),
            Some(values) => {
                let value = values.get(&(slot.0.clone(), key.to_owned())).cloned();
                if let Some(value) = &value {
                    self.redactor.add(value.expose_secret());
                }
                Ok(value)
            }
        }
    }

    fn read(&self, path: &Path) -> Result<Option<SecretString>, SecretError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SecretError::Read { path: path.to_owned(), source }),
        };
        let secret = SecretString::from(text.trim_end_matches(['\r', '\n']).to_owned());
        self.redactor.add(secret.expose_secret());
        Ok(Some(secret))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redacts_plain_url_and_base64_forms() {
        let redactor = Redactor::default();
        redactor.add("p@ss word!");
        for text in ["p@ss word!", "https://u:p%40ss%20word%21@host", "q=p%40ss+word%21", "cEBzcyB3b3JkIQ=="] {
            let shown = redactor.redact(text);
            assert!(shown.contains("[redacted]"), "{text} became {shown}");
        }
        assert_eq!(redactor.redact("nothing secret"), "nothing secret");
    }

    #[test]
    fn credentials_in_memory_are_found_by_slot_and_key_and_redacted() {
        let (redactor, slot) = (Redactor::default(), CredentialSlot("vsphere".into()));
        let value = (slot.clone(), "password".to_owned(), SecretString::from("hunter22"));
        let credentials = Credentials::given(redactor.clone(), [value]);
        assert_eq!(credentials.require(&slot, "password").unwrap().expose_secret(), "hunter22");
        assert_eq!(redactor.redact("it is hunter22"), "it is [redacted]");
        assert!(credentials.optional(&slot, "username").unwrap().is_none());
        assert!(credentials.require(&CredentialSlot("nutanix".into()), "password").is_err());
        assert!(!format!("{credentials:?}").contains("hunter22"));
    }

    #[test]
    fn leaves_words_alone_when_a_secret_is_very_short() {
        let redactor = Redactor::default();
        redactor.add("a");
        assert_eq!(redactor.redact("a banana"), "a banana");
    }
}
