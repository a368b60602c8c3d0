//! Dependencies between the crate's modules point one way; see `src/lib.rs`. The crate of the fuzz targets is in step.

use std::{collections::BTreeSet, fs, path::Path};

use crate::support::sources;

/// A module and the modules of this crate that it must not name.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "contract",
        &[
            "api",
            "release",
            "fetch",
            "package",
            "native",
            "imagebuilder",
            "publish",
            "build",
            "cli",
            "controller",
            "serve",
        ],
    ),
    ("api", &["release", "fetch", "package", "native", "publish", "build", "cli", "controller", "serve"]),
    ("release", &["api", "package", "native", "publish", "build", "cli", "controller", "serve"]),
    ("fetch", &["api", "release", "package", "native", "publish", "build", "cli", "controller", "serve"]),
    ("package", &["api", "release", "fetch", "native", "publish", "build", "cli", "controller", "serve"]),
    ("native", &["api", "release", "imagebuilder", "publish", "build", "cli", "controller", "serve"]),
    ("imagebuilder", &["api", "release", "fetch", "publish", "build", "cli", "controller", "serve"]),
    ("publish", &["api", "release", "native", "imagebuilder", "build", "cli", "controller", "serve"]),
    ("serve", &["api", "release", "fetch", "native", "publish", "build", "cli", "controller"]),
    ("build", &["api", "cli", "controller", "serve"]),
    (
        "device_plugin",
        &[
            "api",
            "contract",
            "release",
            "fetch",
            "package",
            "imagebuilder",
            "publish",
            "build",
            "cli",
            "controller",
            "serve",
        ],
    ),
    (
        "controller",
        &["device_plugin", "fetch", "package", "native", "imagebuilder", "publish", "build", "cli", "serve"],
    ),
];

#[test]
fn modules_depend_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = vec![];
    for (module, forbidden) in FORBIDDEN {
        let files = sources::rust(&src.join(module));
        assert!(!files.is_empty(), "the module {module} is gone: mend this table");
        for file in files {
            let text: String = fs::read_to_string(&file).unwrap().split_whitespace().collect();
            for other in *forbidden {
                // `crate::x`, and `use crate::{a, x::…}` in one level of braces.
                let grouped = text.split("crate::{").skip(1).any(|group| {
                    let group = group.split(';').next().unwrap_or_default();
                    let mut depth = 0;
                    group.split_inclusive(['{', '}', ',']).any(|part| {
                        let top = depth == 0;
                        depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
                        top && part.trim_end_matches(['{', '}', ',']).split("::").next() == Some(other)
                    })
                });
                if text.contains(&format!("crate::{other}::")) || grouped {
                    wrong.push(format!("{} uses crate::{other}", file.strip_prefix(&src).unwrap().display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// They are compiled by `dev/fuzz` alone; what they call is compiled and linted with the crate.
#[test]
fn each_parser_has_a_fuzz_target_and_each_target_a_parser() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let parsers = text("src/fuzzing.rs");
    let parsers = parsers.split("parsers! {").nth(1).unwrap().split("\n}").next().unwrap().lines().map(str::trim);
    let parsers = parsers.filter(|line| !line.starts_with("///")).filter_map(|line| line.split_once(": "));
    let parsers: BTreeSet<_> = parsers.map(|(name, _)| name.to_owned()).collect();
    let manifest: toml::Table = text("fuzz/Cargo.toml").parse().unwrap();
    let targets: BTreeSet<_> =
        manifest["bin"].as_array().unwrap().iter().map(|target| target["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(targets, parsers);
    for name in targets {
        assert!(text(&format!("fuzz/fuzz_targets/{name}.rs")).contains(&format!("fuzzing::{name}(bytes)")), "{name}");
    }
}
