//! The JSON file of `--files-config`: files of this machine that go into the image. Pure, but for reading.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::{UsageError, keys::Keys};

/// One file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct LocalFile {
    /// On this machine.
    pub(crate) source: PathBuf,
    /// In the image.
    pub(crate) path: String,
    pub(crate) owner: String,
    pub(crate) group: String,
    /// Octal digits, e.g. `0644`.
    pub(crate) mode: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    src: String,
    #[serde(default)]
    dest: String,
    #[serde(default)]
    owner: String,
    #[serde(default)]
    group: String,
    mode: Option<Value>,
}

/// The files that `keys` lists. Remarks about the keys are added to `warnings`.
pub(super) fn take(mut keys: Keys, warnings: &mut Vec<String>) -> Result<Vec<LocalFile>, UsageError> {
    const LIST: &str = "additional_files_list";
    let entries = match keys.value(LIST) {
        None | Some(Value::Null) => vec![],
        Some(list) => serde_json::from_value::<Vec<Entry>>(list).map_err(|error| {
            keys.invalid(LIST, &format!("write a list of {{src, dest, owner, group, mode}} ({error})"))
        })?,
    };
    // The original sets these by itself, whatever stands there.
    for key in ["additional_files", "custom_role", "ansible_extra_vars", "custom_role_names"] {
        keys.value(key);
    }
    let files = entries.into_iter().enumerate().map(|(index, entry)| file(&keys, index, entry));
    let files = files.collect::<Result<_, _>>()?;
    warnings.extend(keys.finish());
    Ok(files)
}

fn file(keys: &Keys, index: usize, entry: Entry) -> Result<LocalFile, UsageError> {
    let at = |field: &str| format!("additional_files_list[{index}].{field}");
    if entry.src.is_empty() {
        return Err(keys.missing(&at("src"), "write the path of the file on this machine"));
    }
    if !entry.dest.starts_with('/') {
        return Err(keys.invalid(&at("dest"), "write the absolute path of the file in the image"));
    }
    let root = |name: String| if name.is_empty() { "root".to_owned() } else { name };
    // A number's digits are read as octal, as Ansible does: 744 is rwxr--r--.
    let mode = match entry.mode {
        None => "0644".to_owned(),
        Some(mode) => {
            let digits = mode.as_str().map_or_else(|| mode.to_string(), ToOwned::to_owned);
            let valid = (3..=4).contains(&digits.len()) && digits.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
            if !valid {
                return Err(keys.invalid(&at("mode"), "write three or four octal digits, e.g. 644"));
            }
            format!("{digits:0>4}")
        }
    };
    Ok(LocalFile {
        source: PathBuf::from(entry.src),
        path: entry.dest,
        owner: root(entry.owner),
        group: root(entry.group),
        mode,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rstest::rstest;

    use super::*;

    fn files(text: &str) -> Result<(Vec<LocalFile>, Vec<String>), UsageError> {
        let mut warnings = vec![];
        let files = take(Keys::parse(Path::new("files.json"), text)?, &mut warnings)?;
        Ok((files, warnings))
    }

    #[test]
    fn modes_are_octal_digits_in_a_number_or_a_text() {
        let text = r#"{"additional_files_list": [
            {"src": "a", "dest": "/a", "owner": "x", "group": "y", "mode": 744},
            {"src": "b", "dest": "/b", "mode": "0600"},
            {"src": "c", "dest": "/c"}
        ], "additional_file": "true"}"#;
        let (files, warnings) = files(text).unwrap();
        let shown: Vec<_> = files.iter().map(|f| format!("{} {} {}", f.owner, f.group, f.mode)).collect();
        assert_eq!(shown, ["x y 0744", "root root 0600", "root root 0644"]);
        assert!(warnings[0].contains("did you mean additional_files?"), "{warnings:?}");
    }

    #[rstest]
    #[case::no_source(r#"{"dest": "/a"}"#, "additional_files_list[0].src is missing")]
    #[case::relative(r#"{"src": "a", "dest": "a"}"#, "additional_files_list[0].dest is not valid")]
    #[case::decimal(r#"{"src": "a", "dest": "/a", "mode": 896}"#, "additional_files_list[0].mode is not valid")]
    #[case::no_object(r#""a""#, "additional_files_list is not valid")]
    fn refuses_entries_that_name_no_file(#[case] entry: &str, #[case] message: &str) {
        let error = files(&format!(r#"{{"additional_files_list": [{entry}]}}"#)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
