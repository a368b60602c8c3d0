//! One JSON file of settings: an object whose values are texts. Whoever asks for a key makes it known; what nobody asked
//! for is named at the end, with the known key that is most like it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use serde_json::{Map, Value};

use super::UsageError;

/// From this likeness on (1 is equal) a key is offered in place of an unknown one.
const LIKE: f64 = 0.7;

/// The keys of one file.
#[derive(Debug)]
pub(super) struct Keys {
    path: PathBuf,
    values: Map<String, Value>,
    known: Vec<&'static str>,
    warnings: Vec<String>,
}

impl Keys {
    pub(super) fn read(path: &Path) -> Result<Self, UsageError> {
        Self::parse(path, &text(path)?)
    }

    /// Reads a file that holds passwords, which nobody else may read.
    pub(super) fn read_private(path: &Path) -> Result<Self, UsageError> {
        match exposed(path)? {
            Some(mode) => Err(UsageError::Exposed { path: path.to_owned(), mode }),
            None => Self::read(path),
        }
    }

    /// No file: every key is absent.
    pub(super) fn none() -> Self {
        Self { path: PathBuf::new(), values: Map::new(), known: vec![], warnings: vec![] }
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, UsageError> {
        let problem = |problem: String| UsageError::Config { path: path.to_owned(), problem };
        // The parser's message names a place, never a value.
        let value: Value = serde_json::from_str(text).map_err(|error| problem(format!("this is no JSON: {error}")))?;
        let Value::Object(values) = value else {
            return Err(problem("this is no JSON object: write {\"key\": \"value\", …}".to_owned()));
        };
        Ok(Self { path: path.to_owned(), values, known: vec![], warnings: vec![] })
    }

    /// The value of `key`, which may be empty. As in the EKS Anywhere CLI the case of keys does not matter.
    pub(super) fn present(&mut self, key: &'static str) -> Result<Option<String>, UsageError> {
        match self.value(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(_) | Value::Bool(_)) => Err(self.invalid(key, "write the value in quotes")),
            Some(Value::Array(_) | Value::Object(_)) => Err(self.invalid(key, "write a text in quotes")),
        }
    }

    /// The value of `key`, unless it is empty.
    pub(super) fn text(&mut self, key: &'static str) -> Result<Option<String>, UsageError> {
        Ok(self.present(key)?.filter(|text| !text.is_empty()))
    }

    /// The value of `key`, which is never shown.
    pub(super) fn secret(&mut self, key: &'static str) -> Result<Option<SecretString>, UsageError> {
        Ok(self.text(key)?.map(SecretString::from))
    }

    /// `"true"` or `"false"`.
    pub(super) fn truth(&mut self, key: &'static str) -> Result<Option<bool>, UsageError> {
        match self.text(key)?.as_deref() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => Err(self.invalid(key, "write \"true\" or \"false\"")),
        }
    }

    /// A number in quotes, at least `least`.
    pub(super) fn number(&mut self, key: &'static str, least: u32) -> Result<Option<u32>, UsageError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let number = text.trim().parse().ok().filter(|number| *number >= least);
        number
            .map(Some)
            .ok_or_else(|| self.invalid(key, &format!("write a whole number in quotes, at least \"{least}\"")))
    }

    /// A port in quotes.
    pub(super) fn port(&mut self, key: &'static str) -> Result<Option<u16>, UsageError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let port = text.trim().parse().ok().filter(|port| *port > 0);
        port.map(Some).ok_or_else(|| self.invalid(key, "write a port in quotes, from \"1\" to \"65535\""))
    }

    /// Names, separated by spaces.
    pub(super) fn list(&mut self, key: &'static str) -> Result<Vec<String>, UsageError> {
        Ok(self.text(key)?.unwrap_or_default().split_whitespace().map(ToOwned::to_owned).collect())
    }

    /// The value of `key` whatever its type.
    pub(super) fn value(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        let name = self.values.keys().find(|name| name.eq_ignore_ascii_case(key))?.clone();
        self.values.remove(&name)
    }

    /// A key that meant something to earlier versions of the EKS Anywhere CLI.
    pub(super) fn obsolete(&mut self, key: &'static str, because: &str) {
        if self.value(key).is_some() {
            self.warn(&format!("{key} has no effect: {because}"));
        }
    }

    /// Says something about the file without ending.
    pub(super) fn warn(&mut self, remark: &str) {
        self.warnings.push(format!("{}: {remark}", self.path.display()));
    }

    /// Whether a password stands in the file.
    pub(super) fn holds_passwords(&self) -> bool {
        let secret = |key: &str| key.to_ascii_lowercase().ends_with("password");
        self.values.iter().any(|(key, value)| secret(key) && value.as_str().is_some_and(|text| !text.is_empty()))
    }

    /// A value that can not be.
    pub(super) fn invalid(&self, key: &str, expected: &str) -> UsageError {
        self.problem(format!("{key} is not valid: {expected}"))
    }

    /// A key without which nothing can be built.
    pub(super) fn missing(&self, key: &str, because: &str) -> UsageError {
        self.problem(format!("{key} is missing: {because}"))
    }

    fn problem(&self, problem: String) -> UsageError {
        UsageError::Config { path: self.path.clone(), problem }
    }

    /// All remarks, with the keys that nobody asked for in the order of their names.
    pub(super) fn finish(self) -> Vec<String> {
        let Self { path, values, known, mut warnings } = self;
        let mut unknown: Vec<_> = values.keys().collect();
        unknown.sort_unstable();
        for key in unknown {
            let hint = nearest(key, &known).map_or(String::new(), |near| format!("; did you mean {near}?"));
            warnings.push(format!("{}: the key {key} is unknown and has no effect{hint}", path.display()));
        }
        warnings
    }
}

/// The known key that is most like `key`, if one is.
fn nearest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    let likeness = |known: &str| strsim::normalized_damerau_levenshtein(&key.to_ascii_lowercase(), known);
    let scored = known.iter().map(|known| (likeness(known), *known)).filter(|(score, _)| *score >= LIKE);
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}

pub(super) fn text(path: &Path) -> Result<String, UsageError> {
    fs::read_to_string(path).map_err(|source| UsageError::Read { path: path.to_owned(), source })
}

/// The mode of a file that others than its owner may read.
pub(super) fn exposed(path: &Path) -> Result<Option<u32>, UsageError> {
    let metadata = fs::metadata(path).map_err(|source| UsageError::Read { path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o7777;
    Ok(Some(mode).filter(|mode| mode & 0o077 != 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn keys(text: &str) -> Keys {
        Keys::parse(Path::new("vsphere.json"), text).unwrap()
    }

    #[test]
    fn unknown_keys_are_named_with_the_nearest_known_one() {
        let mut keys = keys(r#"{"datastor": "a", "zzz": "b", "Cluster": "c"}"#);
        keys.text("datastore").unwrap();
        keys.text("datacenter").unwrap();
        assert_eq!(keys.text("cluster").unwrap().as_deref(), Some("c"));
        let warnings = keys.finish();
        assert_eq!(
            warnings,
            [
                "vsphere.json: the key datastor is unknown and has no effect; did you mean datastore?",
                "vsphere.json: the key zzz is unknown and has no effect"
            ]
        );
    }

    #[rstest]
    #[case::null("null")]
    #[case::list("[]")]
    #[case::cut(r#"{"password": "secret-word"#)]
    fn refuses_what_is_no_object_without_showing_it(#[case] text: &str) {
        let error = Keys::parse(Path::new("x.json"), text).unwrap_err().to_string();
        assert!(error.starts_with("x.json: this is no JSON") && !error.contains("secret-word"), "{error}");
    }

    #[test]
    fn numbers_and_truth_values_are_texts_as_in_the_original() {
        assert_eq!(keys(r#"{"a": "15"}"#).number("a", 15).unwrap(), Some(15));
        assert!(keys(r#"{"a": "14"}"#).number("a", 15).is_err());
        assert!(keys(r#"{"a": 15}"#).number("a", 15).unwrap_err().to_string().contains("in quotes"));
        assert_eq!(keys(r#"{"a": "true"}"#).truth("a").unwrap(), Some(true));
        assert!(keys(r#"{"a": "yes"}"#).truth("a").is_err());
        assert_eq!(keys(r#"{"a": null, "b": ""}"#).present("a").unwrap(), None);
        assert_eq!(keys(r#"{"a": null, "b": ""}"#).present("b").unwrap().as_deref(), Some(""));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in any::<String>()) {
            let _ = Keys::parse(Path::new("x.json"), &text);
        }
    }
}
