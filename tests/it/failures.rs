//! `docs/failures.md` has every reason that the code can give, and no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use regex_lite::Regex;

use crate::support::sources;

/// Where a reason stands in the code: after one of these, as a literal.
const PLACES: &[&str] = &[
    // A refusal, an event, a condition.
    r"Refusal::new\(\s*",
    r"\bSelf::new\(\s*",
    r"Note::(?:normal|warning)\(\s*",
    r"Verdict::\w+,\s*",
    // A failure: in a struct, or an argument after its class.
    r"\breason:\s*",
    r"FailureClass::\w+,\s*",
    r#"\bfailure\([^";]*,\s*"#,
    r"\bcancel\(\w+,\s*",
    // The reason for an object that is not there, by its kind.
    r"ObjectKind::\w+ => ",
    // A Secret that builds get nothing of.
    r"Lookup::Guarded\(what\)\) => Some\(\(\s*",
];

/// The body of each `fn reason`, which gives an error's.
fn bodies(text: &str) -> Vec<&str> {
    let mut bodies = vec![];
    for (start, _) in text.match_indices("fn reason(") {
        let mut depth = 0;
        let end = text[start..].find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == '}' && depth == 0
        });
        bodies.push(&text[start..start + end.unwrap()]);
    }
    bodies
}

/// Reasons of the code, each with a file that gives it. Tests in it do not count.
fn reasons_in_code() -> BTreeMap<String, String> {
    const LITERAL: &str = r#""([A-Z][a-z]+(?:[A-Z]+[a-z]*)*)""#;
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let placed: Vec<_> = PLACES.iter().map(|place| Regex::new(&format!("{place}{LITERAL}")).unwrap()).collect();
    let any = Regex::new(LITERAL).unwrap();
    let mut found = BTreeMap::new();
    for file in sources::rust(&src) {
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let placed = placed.iter().flat_map(|place| place.captures_iter(text));
        let given = bodies(text).into_iter().flat_map(|body| any.captures_iter(body));
        for reason in placed.chain(given) {
            found.insert(reason[1].to_owned(), file.strip_prefix(&src).unwrap().display().to_string());
        }
    }
    found
}

/// Reasons of the document, in their order.
fn rows() -> Vec<Vec<String>> {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/failures.md");
    let text = fs::read_to_string(document).unwrap();
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

#[test]
fn every_reason_is_documented_and_nothing_else() {
    let code = reasons_in_code();
    assert!(code.contains_key("ChecksumMismatch") && code.contains_key("Building"), "the search finds nothing");
    let documented: BTreeSet<String> = rows().iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    let missing: Vec<_> = code.iter().filter(|(reason, _)| !documented.contains(*reason)).collect();
    assert!(missing.is_empty(), "add rows to docs/failures.md for {missing:?}");
    let stale: Vec<_> = documented.iter().filter(|reason| !code.contains_key(*reason)).collect();
    assert!(stale.is_empty(), "docs/failures.md explains {stale:?}, which no code gives");
}

#[test]
fn every_reason_is_explained_once_and_says_what_to_do() {
    let mut seen = BTreeSet::new();
    for row in rows() {
        assert!(row.len() == 3 && row.iter().all(|cell| !cell.is_empty()), "not reason, meaning and advice: {row:?}");
        assert!(seen.insert(row[0].clone()), "{} is explained twice", row[0]);
    }
}
