//! `image-builder manifest`: the flags and JSON files of `build` as a `NodeImageBuild` and its Secrets, in YAML.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{self, Write},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};

use super::{
    dropin::{
        UsageError,
        flags::BuildFlags,
        load::load,
        spec::{Secret, Translation, names_its_place, translate},
    },
    failure::{Failure, ProcessError},
};
use crate::{
    api::v1alpha1::{File, KeyReference, NodeImageBuild, NodeImageBuildSpec},
    controller::validate,
};

/// Longest text that stands in the resource itself, in characters.
const LONGEST_TEXT: usize = 131_072;
/// Kubernetes takes Secrets up to this size, in bytes; base64 makes them larger only on the way.
const LARGEST_SECRET: usize = 1024 * 1024;

pub(super) const EXAMPLES: &str = "\
Examples:
  image-builder manifest --os ubuntu --hypervisor baremetal --release-channel 1-31 | kubectl apply -n node-images -f -
  image-builder manifest --os ubuntu --os-version 24.04 --hypervisor vsphere --vsphere-config vsphere.json --sealed";

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    flags: BuildFlags,
    /// Name of the resource. Default from operating system, release channel and hypervisor.
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Leave the Secrets out and say which keys they need, for repositories that keep secrets in another way.
    #[arg(long)]
    sealed: bool,
}

/// Prints the documents on standard output.
pub(super) fn run(options: &Options) -> Result<(), Failure> {
    let (text, warnings) = documents(options)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    io::stdout().write_all(text.as_bytes()).map_err(|source| ProcessError::Output { source })?;
    Ok(())
}

/// The YAML, and what has no effect.
fn documents(options: &Options) -> Result<(String, Vec<String>), UsageError> {
    let (wanted, mut warnings) = load(&options.flags)?;
    let name = if options.name.is_empty() { wanted.default_name() } else { options.name.clone() };
    let Translation { mut spec, mut secrets, files, ending: _ } = translate(wanted, &name, &mut warnings)?;
    let mut contents = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        let bytes = fs::read(&file.source).map_err(|source| UsageError::Read { path: file.source.clone(), source })?;
        let text = String::from_utf8(bytes).map_err(std::string::FromUtf8Error::into_bytes);
        let (content, secret_key_ref) = match text {
            Ok(text) if text.chars().count() <= LONGEST_TEXT => (Some(text), None),
            text => {
                let key = format!("file-{index}");
                contents.insert(key.clone(), text.map_or_else(|bytes| bytes, String::into_bytes));
                (None, Some(KeyReference { name: format!("{name}-files"), key }))
            }
        };
        let (path, owner, group, mode) = (file.path.clone(), file.owner.clone(), file.group.clone(), file.mode.clone());
        spec.files.push(File { path, owner, group, mode, content, secret_key_ref, config_map_key_ref: None });
    }
    complete(&spec)?;
    if let Err(refusal) = validate::supported(&spec) {
        warnings.push(format!("this version's operator will refuse it: {}", refusal.message));
    }

    let mut text = yaml(&resource(&name, &spec));
    for secret in &mut secrets {
        if options.sealed {
            text.push_str(&needed(&secret.name, &secret.needed));
            continue;
        }
        if let Some(key) = secret.needed.iter().find(|key| !secret.values.contains_key(*key)) {
            return Err(UsageError::flags(
                format!("the value of `{key}` for the Secret `{}` is not known", secret.name),
                "write it into the settings, --credentials-file or the environment, or write --sealed",
            ));
        }
        text.push_str("---\n");
        text.push_str(&yaml(&with_values(secret)));
    }
    if !contents.is_empty() {
        let secret = format!("{name}-files");
        let keys: Vec<&str> = contents.keys().map(String::as_str).collect();
        if options.sealed {
            text.push_str(&needed(&secret, &keys));
        } else if contents.values().map(Vec::len).sum::<usize>() > LARGEST_SECRET {
            return Err(UsageError::flags(
                "the files of --files-config are too large for a Secret (1 MiB)",
                "put them into a package, and name it in extra_debs or extra_rpms",
            ));
        } else {
            let data: Map<_, _> =
                contents.iter().map(|(key, bytes)| (key.clone(), STANDARD.encode(bytes).into())).collect();
            text.push_str("---\n");
            text.push_str(&yaml(&object("data", &secret, &data)));
        }
    }
    Ok((text, warnings))
}

/// What the operator needs and a build on this machine does not.
fn complete(spec: &NodeImageBuildSpec) -> Result<(), UsageError> {
    names_its_place(spec, "the operator puts the image there")?;
    let proxies = spec.proxy.iter().flat_map(|proxy| [&proxy.http, &proxy.https]).flatten();
    if proxies
        .filter_map(|proxy| proxy.parse::<url::Url>().ok())
        .any(|url| !url.username().is_empty() || url.password().is_some())
    {
        return Err(UsageError::flags(
            "http_proxy or https_proxy holds a user name and password",
            "write a proxy without: everybody who may read the resource would see them",
        ));
    }
    Ok(())
}

/// The resource without what the API server fills in by itself.
fn resource(name: &str, spec: &NodeImageBuildSpec) -> Value {
    let mut fields = serde_json::to_value(spec).unwrap_or_default();
    let whole = fields.clone();
    let says_the_same =
        |fields: &Value| serde_json::from_value::<NodeImageBuildSpec>(fields.clone()).is_ok_and(|other| other == *spec);
    for pointer in pointers(&whole, "") {
        let without = removed(&fields, &pointer);
        if says_the_same(&without) {
            fields = without;
        }
    }
    let kind = NodeImageBuild::new(name, spec.clone());
    let mut resource = serde_json::to_value(&kind).unwrap_or_default();
    resource["metadata"] = json!({ "name": name });
    resource["spec"] = fields;
    resource
}

/// Places of all fields in objects, outer ones first.
fn pointers(value: &Value, at: &str) -> Vec<String> {
    let Some(fields) = value.as_object() else { return vec![] };
    fields
        .iter()
        .flat_map(|(key, value)| {
            let here = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
            let inner = pointers(value, &here);
            std::iter::once(here).chain(inner)
        })
        .collect()
}

/// `value` without the field at `pointer`, if it is there.
fn removed(value: &Value, pointer: &str) -> Value {
    let mut value = value.clone();
    if let Some((parent, key)) = pointer.rsplit_once('/')
        && let Some(fields) = value.pointer_mut(parent).and_then(Value::as_object_mut)
    {
        fields.remove(&key.replace("~1", "/").replace("~0", "~"));
    }
    value
}

fn with_values(secret: &Secret) -> Value {
    let exposed = |value: &SecretString| Value::from(value.expose_secret());
    let values = secret.values.iter().map(|(key, value)| ((*key).to_owned(), exposed(value)));
    object("stringData", &secret.name, &values.collect())
}

fn object(field: &str, name: &str, values: &Map<String, Value>) -> Value {
    json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name }, "type": "Opaque", field: values })
}

/// What to do where the Secret is left out.
fn needed(secret: &str, keys: &[&str]) -> String {
    let mut text = format!("# Needs the Secret `{secret}` in the same namespace, for instance by\n");
    let _ = write!(text, "#   kubectl create secret generic {secret}");
    for key in keys {
        let _ = write!(text, " --from-file={key}=FILE");
    }
    text.push('\n');
    text
}

fn yaml(value: &Value) -> String {
    serde_saphyr::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, path::Path};

    use clap::Parser;
    use serde::Deserialize;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: Options,
    }

    /// Settings as people have them; also applied to an API server in the integration tests.
    #[derive(Deserialize)]
    struct Sample {
        name: String,
        arguments: String,
        config: Option<Value>,
    }

    fn samples() -> Vec<Sample> {
        serde_json::from_str(include_str!("../../tests/it/cli/samples.json")).unwrap()
    }

    fn private(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// The command line of a sample, whose files are written into `dir`.
    fn options(sample: &Sample, dir: &Path) -> Options {
        private(&dir.join("Example_tools.list"), "deb [trusted=yes] https://mirror.example.com/tools ./\n");
        fs::write(dir.join("motd"), "# welcome: 'all'\n\ttwo lines\n").unwrap();
        fs::write(dir.join("binary"), [0, 159, 146, 150]).unwrap();
        let at = |text: &str| text.replace("@DIR@", dir.to_str().unwrap());
        let files = json!({ "additional_files_list": [
            { "src": at("@DIR@/motd"), "dest": "/etc/motd", "owner": "root", "group": "adm", "mode": 640 },
            { "src": at("@DIR@/binary"), "dest": "/opt/tool", "owner": "root", "group": "root", "mode": 755 },
        ] });
        fs::write(dir.join("files.json"), files.to_string()).unwrap();
        let mut arguments = at(&sample.arguments);
        if let Some(config) = &sample.config {
            private(&dir.join("config.json"), &at(&config.to_string()));
            let hypervisor = arguments.split("--hypervisor ").nth(1).unwrap().split(' ').next().unwrap();
            arguments = format!("{arguments} --{hypervisor}-config {}", dir.join("config.json").display());
        }
        Program::try_parse_from(["manifest"].into_iter().chain(arguments.split_whitespace())).unwrap().options
    }

    #[test]
    fn every_sample_comes_back_from_its_manifest_as_it_went_in() {
        for sample in samples() {
            let dir = tempfile::tempdir().unwrap();
            let options = options(&sample, dir.path());
            let (text, warnings) = documents(&options).unwrap();
            let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
            let build: NodeImageBuild = serde_json::from_value(documents[0].clone()).unwrap();

            let (wanted, _) = load(&options.flags).unwrap();
            let name = wanted.default_name();
            let mut expected = translate(wanted, &name, &mut vec![]).unwrap();
            for (file, local) in build.spec.files.iter().zip(&expected.files) {
                let bytes = match (&file.content, &file.secret_key_ref) {
                    (Some(text), None) => text.clone().into_bytes(),
                    (None, Some(reference)) => {
                        let secret = documents.iter().find(|one| one["metadata"]["name"] == reference.name).unwrap();
                        STANDARD.decode(secret["data"][&reference.key].as_str().unwrap()).unwrap()
                    }
                    other => panic!("{}: {other:?}", sample.name),
                };
                assert_eq!(bytes, fs::read(&local.source).unwrap());
            }
            assert_eq!(build.spec.files.len(), expected.files.len());
            expected.spec.files.clone_from(&build.spec.files);
            assert_eq!(build.spec, expected.spec, "{}", sample.name);
            assert_eq!(build.metadata.name.as_ref(), Some(&name));
            for secret in &expected.secrets {
                let printed = documents.iter().find(|one| one["metadata"]["name"] == secret.name).unwrap();
                for key in &secret.needed {
                    assert_eq!(printed["stringData"][key], secret.values[key].expose_secret(), "{}", sample.name);
                }
            }
            // Nothing that is in a Secret stands anywhere else.
            for value in expected.secrets.iter().flat_map(|secret| secret.values.values()) {
                let resource = text.split("\n---\n").next().unwrap();
                assert!(!resource.contains(value.expose_secret()), "{}", sample.name);
                assert!(warnings.iter().all(|warning| !warning.contains(value.expose_secret())));
            }
        }
    }

    #[test]
    fn the_resource_says_nothing_that_the_definition_fills_in() {
        let sample =
            Sample { name: String::new(), arguments: "--os ubuntu --hypervisor baremetal".into(), config: None };
        let dir = tempfile::tempdir().unwrap();
        let (text, _) = documents(&options(&sample, dir.path())).unwrap();
        let expected = json!({
            "apiVersion": "nodeimagebuild.dev/v1alpha1",
            "kind": "NodeImageBuild",
            "metadata": { "name": "ubuntu-2204-1-31-baremetal" },
            "spec": { "os": { "name": "ubuntu", "version": "22.04" }, "releaseChannel": "1-31", "baremetal": {} },
        });
        let document: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(document, expected, "{text}");
    }
}
