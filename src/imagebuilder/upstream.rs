//! A working copy of upstream's directory, made ready for one build: what upstream's `make` would render is rendered, and
//! what keeps its roles from installing a release of EKS Distro is changed (docs/engines.md).

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use super::{InPrism, InVcenter, Machine, recipe::Recipe};
use crate::{
    contract::{Classified, FailureClass, Firmware, ImageBuilderSettings},
    native::accelerator::Virtualization,
};

/// What Packer and Ansible need of upstream's directory. The second two are not in every version.
const PARTS: [&str; 5] = ["packer", "ansible", "hack", "cloudinit", "ansible.cfg"];
/// Our own roles: name, and tasks.
const ROLES: [(&str, &str); 2] = [
    (ROLE_PRE, include_str!("roles/eksa_pre/tasks/main.yml")),
    (ROLE_POST, include_str!("roles/eksa_post/tasks/main.yml")),
];
/// Runs before upstream's roles.
pub(super) const ROLE_PRE: &str = "eksa_pre";
/// Runs after upstream's roles, before its sysprep.
pub(super) const ROLE_POST: &str = "eksa_post";

/// A line of upstream's tasks that is replaced where it is there: file below `ansible`, beginning of the line without its
/// indentation, what takes its place. Images with the patches of EKS Anywhere's own tool have other lines, and keep them.
const EDITS: [(&str, &str, &str); 3] = [
    // EKS Distro's archives end with .tar.gz; the digest stands in the var-file, but upstream asks for a file beside it.
    (
        "roles/kubernetes/tasks/url.yml",
        "url: \"{{ kubernetes_cni_http_source }}/{{ kubernetes_cni_semver }}/",
        "url: \"{{ eksa_cni_url }}\"",
    ),
    (
        "roles/kubernetes/tasks/crictl-url.yml",
        "checksum: sha256:{{ crictl_url }}.sha256",
        "checksum: sha256:{{ crictl_sha256 }}",
    ),
    (
        "roles/containerd/tasks/main.yml",
        "checksum: sha256:{{ containerd_url }}.sha256sum",
        "checksum: sha256:{{ containerd_sha256 }}",
    ),
];

/// Why upstream's directory can not be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error(
        "{} has no {missing}, which this image is made by; use an image of kubernetes-sigs/image-builder that has it \
         (operator.imageBuilderImage of the chart, see docs/engines.md)", .directory.display()
    )]
    Missing { directory: PathBuf, missing: String },
    #[error("the template {} has no builder `{builder}`; use the version of the image that docs/engines.md names", .path.display())]
    NoBuilder { path: PathBuf, builder: &'static str },
    #[error("can not read the template {}", .path.display())]
    Template { path: PathBuf, source: serde_json::Error },
    #[error("upstream's recipe for this system makes machines that start by {found}; write spec.firmware: {found}")]
    Firmware { found: String },
    #[error("can not copy {} for the build", .path.display())]
    Copy { path: PathBuf, source: io::Error },
}

impl Classified for UpstreamError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Firmware { .. } => FailureClass::BadInput,
            Self::Missing { .. } | Self::NoBuilder { .. } | Self::Template { .. } | Self::Copy { .. } => {
                FailureClass::Environment
            }
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Firmware { .. } => "NotSupported",
            Self::Copy { .. } => "WorkDirectoryUnusable",
            Self::Missing { .. } | Self::NoBuilder { .. } | Self::Template { .. } => "RecipeUnusable",
        }
    }
}

/// The password of the account that is built with. The account is deleted when the machine is shut down.
pub(super) struct SshPassword {
    pub(super) plain: String,
    /// As in `/etc/shadow`.
    pub(super) hashed: String,
}

/// What is changed in the template.
pub(super) struct Edits<'e> {
    pub(super) recipe: &'e Recipe,
    pub(super) settings: &'e ImageBuilderSettings,
    /// The machine that is built in.
    pub(super) machine: &'e Machine,
    /// Where its disk is put.
    pub(super) output: &'e Path,
}

/// The working copy.
#[derive(Debug)]
pub(super) struct WorkingCopy {
    pub(super) dir: PathBuf,
}

/// Whether `upstream` has what `recipe` needs.
pub(super) fn check(upstream: &Path, recipe: &Recipe) -> Result<(), UpstreamError> {
    let template = [recipe.template.to_owned(), format!("{}.tmpl", recipe.template)];
    let has = |path: &str| upstream.join(path).exists();
    let rendered = |path: &String| has(path) || has(&format!("{path}.tmpl"));
    let missing =
        |missing: &str| UpstreamError::Missing { directory: upstream.to_owned(), missing: missing.to_owned() };
    if !template.iter().any(|path| has(path)) {
        return Err(missing(recipe.template));
    }
    // Which of the common ones there are depends on upstream's version.
    let own = recipe.var_files.iter().filter(|path| !path.starts_with("packer/config/"));
    match own.into_iter().find(|path| !rendered(path)) {
        Some(path) => Err(missing(path)),
        None => Ok(()),
    }
}

/// The recipe by the files that `upstream` has: where a system starts by EFI only, no file is named after that.
pub(super) fn settle(upstream: &Path, mut recipe: Recipe) -> Recipe {
    for file in &mut recipe.var_files {
        let plain = file.replace("-efi.json", ".json");
        if file.starts_with("packer/ova/") && !upstream.join(&*file).exists() && upstream.join(&plain).exists() {
            *file = plain;
        }
    }
    recipe
}

/// Refuses a recipe for vCenter whose machines start in another way than the image will.
pub(super) fn check_firmware(upstream: &Path, recipe: &Recipe, wanted: Firmware) -> Result<(), UpstreamError> {
    let read = |file: &str| fs::read_to_string(upstream.join(file)).ok();
    let value = |file: &String| {
        let text = read(file).or_else(|| read(&format!("{file}.tmpl")))?;
        let vars: Value = serde_json::from_str(&text).ok()?;
        Some(vars.get("firmware")?.as_str()?.to_owned())
    };
    let found = recipe.var_files.iter().rev().find_map(value);
    let name = match wanted {
        Firmware::Bios => "bios",
        Firmware::Efi => "efi",
    };
    match found {
        Some(found) if found != name => Err(UpstreamError::Firmware { found }),
        Some(_) | None => Ok(()),
    }
}

impl WorkingCopy {
    /// Copies `upstream` to `dir`, which only this user may read, and makes it ready.
    pub(super) fn make(
        upstream: &Path,
        dir: PathBuf,
        password: &SshPassword,
        edits: &Edits<'_>,
    ) -> Result<Self, UpstreamError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| UpstreamError::Copy { path, source }
        };
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(failed(&dir))?;
        for part in PARTS {
            let from = upstream.join(part);
            if from.exists() {
                copy(&from, &dir.join(part)).map_err(failed(&from))?;
            }
        }
        let copy = Self { dir };
        render(&copy.dir.join("packer"), password).map_err(failed(&copy.dir))?;
        for (name, tasks) in ROLES {
            let role = copy.dir.join("ansible/roles").join(name).join("tasks");
            fs::create_dir_all(&role).and_then(|()| fs::write(role.join("main.yml"), tasks)).map_err(failed(&role))?;
        }
        for (file, line, instead) in EDITS {
            let path = copy.dir.join("ansible").join(file);
            replace_line(&path, line, instead).map_err(failed(&path))?;
        }
        let template = copy.dir.join(edits.recipe.template);
        let text = fs::read_to_string(&template).map_err(failed(&template))?;
        let unreadable = |source| UpstreamError::Template { path: template.clone(), source };
        let mut document: Value = serde_json::from_str(&text).map_err(unreadable)?;
        let no_builder = || UpstreamError::NoBuilder { path: template.clone(), builder: edits.recipe.builder };
        edit(&mut document, edits).ok_or_else(no_builder)?;
        fs::write(&template, document.to_string()).map_err(failed(&template))?;
        Ok(copy)
    }

    /// What upstream's `make` writes of its file for cloud-init into a variable. The first versions have it there.
    pub(super) fn user_data(&self, recipe: &Recipe) -> Result<Option<String>, UpstreamError> {
        let Some(path) = recipe.user_data.as_ref().map(|path| self.dir.join(path)) else { return Ok(None) };
        match fs::read(&path) {
            Ok(text) => Ok(Some(STANDARD.encode(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(UpstreamError::Copy { path, source }),
        }
    }

    /// Values of a var-file of upstream's, if it is there and one.
    pub(super) fn vars(&self, path: &str) -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(self.dir.join(path)).ok()?).ok()
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(from)?, to);
    }
    if !kind.is_dir() {
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Writes each `x.tmpl` below `dir` as `x`, with the password.
fn render(dir: &Path, password: &SshPassword) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
        if kind?.is_dir() {
            render(&path, password)?;
        } else if path.extension().is_some_and(|extension| extension == "tmpl") {
            let text = fs::read_to_string(&path)?;
            let text = text.replace("$ENCRYPTED_SSH_PASSWORD", &password.hashed);
            fs::write(path.with_extension(""), text.replace("$SSH_PASSWORD", &password.plain))?;
        }
    }
    Ok(())
}

fn replace_line(path: &Path, line: &str, instead: &str) -> io::Result<()> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    let mut changed = String::with_capacity(text.len());
    for old in text.split_inclusive('\n') {
        let content = old.trim_start();
        if content.starts_with(line) {
            let indentation = &old[..old.len() - content.len()];
            changed.extend([indentation, instead, "\n"]);
        } else {
            changed.push_str(old);
        }
    }
    if changed == text { Ok(()) } else { fs::write(path, changed) }
}

/// Whether a provisioner is for this builder. It then names no builders any more: the others are gone.
fn runs_in(provisioner: &mut Value, builder: &str) -> bool {
    let Some(keys) = provisioner.as_object_mut() else { return true };
    let mut named = |key: &str| {
        let names = keys.remove(key)?;
        Some(names.as_array()?.iter().any(|name| name.as_str() == Some(builder)))
    };
    let (except, only) = (named("except"), named("only"));
    !except.unwrap_or(false) && only.unwrap_or(true)
}

/// The machine in vCenter is only where the disk is made: it comes here, and what becomes of it is this program's to do.
fn edit_in_vcenter(keys: &mut Map<String, Value>, remote: &InVcenter, output: &Path) {
    keys.insert("vm_name".to_owned(), json!(remote.machine));
    keys.insert("export".to_owned(), json!({"force": true, "manifest": "none", "output_directory": output}));
    for key in ["convert_to_template", "create_snapshot"] {
        keys.remove(key);
    }
    if keys.contains_key("destroy") {
        keys.insert("destroy".to_owned(), json!(true));
    }
    if keys.contains_key("iso_checksum") {
        // Of a medium that Packer downloads itself.
        let medium = output.with_file_name(&remote.medium);
        keys.insert("iso_target_path".to_owned(), json!(medium));
    }
}

/// The same in Prism Central, where all that Packer makes has the build's name, and nothing is taken away that has not.
fn edit_in_prism(keys: &mut Map<String, Value>, remote: &InPrism) {
    let InPrism { name, cluster, subnet, source } = remote;
    for key in ["vm_name", "image_name"] {
        keys.insert(key.to_owned(), json!(name));
    }
    for (key, value) in
        [("force_deregister", true), ("image_delete", false), ("image_export", false), ("vm_force_delete", true)]
    {
        keys.insert(key.to_owned(), json!(value));
    }
    keys.remove("cluster_name");
    keys.insert("cluster_uuid".to_owned(), json!(cluster));
    let size = keys.get("vm_disks").and_then(|disks| disks.get("disk_size_gb")).cloned();
    let mut disk = json!({"image_type": "DISK_IMAGE", "source_image_uuid": source});
    if let Some(size) = size {
        disk["disk_size_gb"] = size;
    }
    keys.insert("vm_disks".to_owned(), json!([disk]));
    keys.insert("vm_nics".to_owned(), json!([{"subnet_uuid": subnet}]));
}

/// `None` where the builder is not there.
fn edit(template: &mut Value, edits: &Edits<'_>) -> Option<()> {
    let Edits { recipe, settings, machine, output } = edits;
    let is_it = |builder: &Value| {
        let name = builder.get("name").or_else(|| builder.get("type"));
        name.and_then(Value::as_str) == Some(recipe.builder)
    };
    let mut builder = template.get("builders")?.as_array()?.iter().find(|builder| is_it(builder))?.clone();
    let keys = builder.as_object_mut()?;
    if let Some(seconds) = settings.ssh_timeout_seconds {
        keys.insert("ssh_timeout".to_owned(), json!(format!("{seconds}s")));
    }
    if let Some(attempts) = settings.ssh_handshake_attempts {
        keys.insert("ssh_handshake_attempts".to_owned(), json!(attempts.to_string()));
    }
    match machine {
        Machine::Here(Virtualization::Software) if keys.contains_key("accelerator") => {
            keys.insert("accelerator".to_owned(), json!("tcg"));
            if keys.contains_key("cpu_model") {
                // `host` needs KVM.
                keys.insert("cpu_model".to_owned(), json!("max"));
            }
        }
        Machine::Here(_) => {}
        Machine::InVcenter(remote) => edit_in_vcenter(keys, remote, output),
        Machine::InPrism(remote) => edit_in_prism(keys, remote),
    }
    template["builders"] = json!([builder]);
    // The disk is packaged by this program.
    template.as_object_mut()?.remove("post-processors");
    let provisioners = template.get_mut("provisioners").and_then(Value::as_array_mut);
    if let Some(provisioners) = provisioners {
        provisioners.retain_mut(|provisioner| runs_in(provisioner, recipe.builder));
    }
    let verbosity = usize::from(settings.ansible_verbosity);
    for provisioner in template.get_mut("provisioners").and_then(Value::as_array_mut).into_iter().flatten() {
        let is_ansible = provisioner.get("type").and_then(Value::as_str) == Some("ansible");
        let arguments = provisioner.get_mut("extra_arguments").and_then(Value::as_array_mut);
        if let Some(arguments) = arguments.filter(|_| is_ansible && verbosity > 0) {
            arguments.push(json!(format!("-{}", "v".repeat(verbosity))));
        }
    }
    Some(())
}

/// A template is refused, or left with the one builder. The first character says where the machine is.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((place, text)) = bytes.split_first() else { return };
    let Ok(mut template) = serde_json::from_slice::<Value>(text) else { return };
    let recipe = Recipe { var_files: vec![], template: "", builder: "qemu", user_data: None };
    let settings = json!({"timeoutSeconds": 60, "ansibleVerbosity": 2, "sshTimeoutSeconds": 60});
    let Ok(settings) = serde_json::from_value(settings) else { panic!("the settings are none") };
    let text = str::to_owned;
    let machine = match place % 3 {
        0 => Machine::Here(Virtualization::Software),
        1 => Machine::InVcenter(InVcenter {
            machine: text("machine"),
            medium: text("medium"),
            place: std::collections::BTreeMap::new(),
        }),
        _ => Machine::InPrism(InPrism {
            name: text("name"),
            cluster: text("cluster"),
            subnet: text("subnet"),
            source: text("source"),
        }),
    };
    let edits = Edits { recipe: &recipe, settings: &settings, machine: &machine, output: Path::new("output") };
    if edit(&mut template, &edits).is_some() {
        assert!(template["builders"].as_array().is_some_and(|builders| builders.len() == 1), "{template}");
        assert_eq!(template.get("post-processors"), None);
        let provisioners = template.get("provisioners").and_then(Value::as_array).into_iter().flatten();
        for provisioner in provisioners {
            assert!(provisioner.get("only").is_none() && provisioner.get("except").is_none(), "{provisioner}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command};

    use proptest::{
        collection::{btree_map, vec},
        prelude::*,
    };
    use rstest::rstest;

    use super::*;
    use crate::{
        contract::{BuildRequest, Engine, Os, OsName, Provider},
        imagebuilder::varfiles::{Known, generate},
        native::sample,
    };

    /// JSON of any kind, in words that templates have.
    fn template() -> impl Strategy<Value = Value> {
        let words =
            "builders|provisioners|post-processors|type|name|qemu|ansible|extra_arguments|accelerator|cpu_model|.{0,8}";
        let leaf = prop_oneof![Just(Value::Null), any::<i32>().prop_map(Value::from), words.prop_map(Value::from)];
        leaf.prop_recursive(5, 48, 6, move |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Value::from),
                btree_map(words, inner, 0..6).prop_map(|keys| Value::from(serde_json::Map::from_iter(keys))),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_template_is_refused_or_left_with_the_one_builder(foreign in template(), other in template()) {
            let request = request(OsName::Ubuntu, "22.04", Firmware::Efi);
            let recipe = Recipe::of(&request, false).unwrap();
            let edits =
                Edits { recipe: &recipe, settings: settings(&request), machine: &Machine::Here(Virtualization::Software), output: Path::new("output") };
            let mut usable = if foreign.is_object() { foreign.clone() } else { json!({}) };
            usable["builders"] = json!([other, {"type": "qemu", "accelerator": "kvm"}]);
            for (mut template, refusable) in [(foreign, true), (usable, false)] {
                let edited = edit(&mut template, &edits).is_some();
                prop_assert!(edited || refusable, "{template}");
                if edited {
                    prop_assert_eq!(template["builders"].as_array().unwrap().len(), 1);
                    prop_assert_eq!(template.get("post-processors"), None);
                }
            }
        }
    }

    fn request(name: OsName, version: &str, firmware: Firmware) -> BuildRequest {
        let mut request = sample::request();
        request.os = Os { name, version: version.to_owned() };
        request.firmware = firmware;
        request.engine =
            serde_json::from_value(json!({"imageBuilder": {"timeoutSeconds": 60, "ansibleVerbosity": 2}})).unwrap();
        let url = |path: &str| format!("http://mirror/{path}").parse().unwrap();
        request.release.kubelet.url = url("kubernetes/v1.34.4/bin/linux/amd64/kubelet");
        request.release.cni_plugins.artifact.url = url("plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz");
        request.release.images[0].url = url("kubernetes/v1.34.4/bin/linux/amd64/pause.tar");
        request
    }

    fn settings(request: &BuildRequest) -> &ImageBuilderSettings {
        match &request.engine {
            Engine::ImageBuilder(settings) => settings,
            Engine::Native => panic!("a build of the other engine"),
        }
    }

    fn make(upstream: &Path, dir: &Path, request: &BuildRequest, machine: &Machine) -> WorkingCopy {
        let recipe = settle(upstream, Recipe::of(request, settings(request).template.is_some()).unwrap());
        check(upstream, &recipe).unwrap();
        let password = SshPassword { plain: "plain".into(), hashed: "$6$salt$hash".into() };
        let output = dir.join("output");
        let edits = Edits { recipe: &recipe, settings: settings(request), machine, output: &output };
        WorkingCopy::make(upstream, dir.join("upstream"), &password, &edits).unwrap()
    }

    fn ours() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imagebuilder/upstream")
    }

    #[test]
    fn templates_are_rendered_and_leave_the_disk_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let request = request(OsName::Ubuntu, "22.04", Firmware::Efi);
        let copy = make(&ours(), dir.path(), &request, &Machine::Here(Virtualization::Software));
        let text = fs::read_to_string(copy.dir.join("packer/raw/packer.json")).unwrap();
        let template: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(template["variables"]["ssh_password"], "plain");
        assert_eq!(template["builders"][0]["accelerator"], "tcg");
        assert_eq!(template.get("post-processors"), None);
        assert_eq!(template["provisioners"][0]["extra_arguments"].as_array().unwrap().last().unwrap(), "-vv");
        let seed = fs::read_to_string(copy.dir.join("packer/raw/http/user-data")).unwrap();
        assert!(seed.contains("passwd: $6$salt$hash\n"), "{seed}");
        assert!(copy.dir.join("ansible/roles/eksa_post/tasks/main.yml").exists());
    }

    fn remote() -> Machine {
        Machine::InVcenter(InVcenter {
            machine: "node-image-build-0123456789".into(),
            medium: "node-image-build-0123456789.iso".into(),
            place: std::collections::BTreeMap::new(),
        })
    }

    /// The same for vSphere.
    fn in_vcenter(mut request: BuildRequest, template: Option<&str>) -> BuildRequest {
        request.provider = Provider::Vsphere;
        request.provider_target = serde_json::from_value(json!({"vsphere": {
            "server": "vc", "slot": "vsphere", "datacenter": "dc1", "cluster": "c1", "datastore": "ds1", "network": "n",
            "templateName": "golden", "vmxVersion": 15, "convertToTemplate": true,
        }}))
        .unwrap();
        let Engine::ImageBuilder(settings) = &mut request.engine else { panic!("a build of the other engine") };
        settings.template = template.map(str::to_owned);
        request
    }

    #[rstest]
    #[case::medium("vsphere", None)]
    #[case::clone("vsphere-clone", Some("base"))]
    fn a_machine_in_vcenter_gets_our_name_and_gives_only_its_disk(#[case] name: &str, #[case] from: Option<&str>) {
        let dir = tempfile::tempdir().unwrap();
        let request = in_vcenter(request(OsName::Ubuntu, "22.04", Firmware::Bios), from);
        let copy = make(&ours(), dir.path(), &request, &remote());
        let text = fs::read_to_string(copy.dir.join("packer/ova/packer-node.json")).unwrap();
        let template: Value = serde_json::from_str(&text).unwrap();
        let [builder] = &template["builders"].as_array().unwrap()[..] else { panic!("{template}") };
        assert_eq!((&builder["name"], &builder["vm_name"]), (&json!(name), &json!("node-image-build-0123456789")));
        assert_eq!(builder["export"]["output_directory"], json!(dir.path().join("output")));
        assert_eq!((builder.get("convert_to_template"), builder.get("create_snapshot")), (None, None));
        let medium = dir.path().join("node-image-build-0123456789.iso");
        assert_eq!(builder.get("iso_target_path"), from.is_none().then(|| json!(medium)).as_ref());
        assert_eq!(template.get("post-processors"), None);
    }

    /// A build in Prism Central.
    fn in_prism(mut request: BuildRequest) -> (BuildRequest, Machine) {
        request.provider = Provider::Nutanix;
        request.provider_target = serde_json::from_value(json!({"nutanix": {
            "endpoint": "prism", "port": 9440, "slot": "nutanix", "cluster": {"name": "pe1"}, "subnet": "vm-network",
            "imageName": "golden",
        }}))
        .unwrap();
        let machine = InPrism {
            name: "node-image-build-0123456789".into(),
            cluster: "cluster-uuid".into(),
            subnet: "subnet-uuid".into(),
            source: "source-uuid".into(),
        };
        (request, Machine::InPrism(machine))
    }

    #[test]
    fn a_machine_in_prism_central_takes_nothing_away_and_starts_from_our_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (request, machine) = in_prism(request(OsName::Ubuntu, "22.04", Firmware::Bios));
        let copy = make(&ours(), dir.path(), &request, &machine);
        let text = fs::read_to_string(copy.dir.join("packer/nutanix/packer.json")).unwrap();
        let template: Value = serde_json::from_str(&text).unwrap();
        let [builder] = &template["builders"].as_array().unwrap()[..] else { panic!("{template}") };
        let name = json!("node-image-build-0123456789");
        assert_eq!((&builder["vm_name"], &builder["image_name"]), (&name, &name));
        assert_eq!((&builder["cluster_uuid"], builder.get("cluster_name")), (&json!("cluster-uuid"), None));
        let disk = json!({
            "image_type": "DISK_IMAGE", "source_image_uuid": "source-uuid", "disk_size_gb": "{{user `disk_size_gb`}}",
        });
        assert_eq!(builder["vm_disks"], json!([disk]));
        assert_eq!(builder["vm_nics"], json!([{"subnet_uuid": "subnet-uuid"}]));
        assert_eq!((&builder["image_export"], &builder["vm_force_delete"]), (&json!(false), &json!(true)));
        let recipe = Recipe::of(&request, false).unwrap();
        let user_data = STANDARD.decode(copy.user_data(&recipe).unwrap().unwrap()).unwrap();
        let user_data = String::from_utf8(user_data).unwrap();
        assert!(user_data.contains("    builder:plain\n"), "{user_data}");
        fs::remove_dir_all(copy.dir.join("packer/nutanix/linux")).unwrap();
        assert_eq!(copy.user_data(&recipe).unwrap(), None);
    }

    #[test]
    fn provisioners_for_other_builders_go() {
        let mut all =
            [json!({"except": ["other"]}), json!({"except": ["this"]}), json!({"only": ["other"]}), json!({"a": 1})];
        let kept: Vec<_> = all.iter_mut().map(|provisioner| runs_in(provisioner, "this")).collect();
        assert_eq!(kept, [true, false, false, true]);
        assert_eq!(all[0], json!({}));
    }

    #[test]
    fn a_system_that_starts_by_efi_only_has_no_file_for_it_and_no_other_way() {
        let dir = tempfile::tempdir().unwrap();
        let upstream = dir.path().join("upstream");
        assert!(Command::new("cp").arg("-r").args([&ours(), &upstream]).status().unwrap().success());
        fs::write(upstream.join("packer/ova/rhel-9.json"), r#"{"firmware": "efi"}"#).unwrap();
        for (firmware, reason) in [(Firmware::Efi, None), (Firmware::Bios, Some("NotSupported"))] {
            let request = in_vcenter(request(OsName::Redhat, "9", firmware), None);
            let recipe = settle(&upstream, Recipe::of(&request, false).unwrap());
            check(&upstream, &recipe).unwrap();
            let refused = check_firmware(&upstream, &recipe, firmware).err();
            assert_eq!(refused.map(|error| error.reason()), reason);
        }
    }

    #[test]
    fn a_recipe_that_upstreams_directory_lacks_is_told() {
        let recipe = Recipe::of(&request(OsName::Redhat, "9", Firmware::Efi), false).unwrap();
        let error = check(&ours(), &recipe).unwrap_err();
        assert_eq!(error.reason(), "RecipeUnusable");
        assert!(error.to_string().contains("packer/raw/raw-rhel-9-efi.json"), "{error}");
    }

    #[test]
    fn lines_are_replaced_with_their_indentation_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("main.yml");
        let tasks = "- get_url:\n    checksum: sha256:{{ containerd_url }}.sha256sum\n    dest: /tmp\n";
        fs::write(&path, tasks).unwrap();
        replace_line(&path, EDITS[2].1, EDITS[2].2).unwrap();
        let changed = fs::read_to_string(&path).unwrap();
        assert_eq!(changed, "- get_url:\n    checksum: sha256:{{ containerd_sha256 }}\n    dest: /tmp\n");
        replace_line(&dir.path().join("absent.yml"), "x", "y").unwrap();
    }

    /// With a checkout of kubernetes-sigs/image-builder: the path of its `images/capi` in `NIB_UPSTREAM`. Packer's plugins
    /// may be missing, so the template is checked as far as it goes without them. `NIB_PACKER` is the home of another Packer
    /// than Debian's, with Nutanix's plugin.
    #[test]
    fn true_recipes_take_these_var_files() {
        let Some(upstream) = env::var_os("NIB_UPSTREAM").map(PathBuf::from) else {
            tracing::info!("skipped: NIB_UPSTREAM names no checkout of upstream's images/capi");
            return;
        };
        let here = [
            (OsName::Ubuntu, "22.04", Firmware::Efi),
            (OsName::Ubuntu, "24.04", Firmware::Efi),
            (OsName::Redhat, "8", Firmware::Bios),
            (OsName::Redhat, "9", Firmware::Efi),
        ]
        .map(|(name, version, firmware)| request(name, version, firmware));
        let there = [
            (OsName::Ubuntu, "22.04", Firmware::Bios),
            (OsName::Ubuntu, "22.04", Firmware::Efi),
            (OsName::Ubuntu, "24.04", Firmware::Bios),
            (OsName::Ubuntu, "24.04", Firmware::Efi),
            (OsName::Redhat, "8", Firmware::Bios),
            (OsName::Redhat, "9", Firmware::Efi),
        ]
        .map(|(name, version, firmware)| {
            [None, Some("base")].map(|template| in_vcenter(request(name, version, firmware), template))
        });
        let all = here.map(|request| (request, Machine::Here(Virtualization::Software)));
        let all = all.into_iter().chain(there.into_iter().flatten().map(|request| (request, remote())));
        // Debian's Packer can not run Nutanix's plugin.
        let home = env::var_os("NIB_PACKER").map(PathBuf::from);
        let in_prism =
            [(OsName::Ubuntu, "22.04"), (OsName::Ubuntu, "24.04"), (OsName::Redhat, "8"), (OsName::Redhat, "9")]
                .map(|(name, version)| in_prism(request(name, version, Firmware::Bios)));
        let all = all.chain(in_prism.into_iter().filter(|_| home.is_some()));
        for (request, machine) in all {
            let dir = tempfile::tempdir().unwrap();
            let (name, version) = (request.os.name, request.os.version.as_str());
            let recipe = Recipe::of(&request, settings(&request).template.is_some()).unwrap();
            let recipe = settle(&upstream, recipe);
            if check(&upstream, &recipe).is_err() {
                // Newer versions have dropped older systems.
                continue;
            }
            let copy = make(&upstream, dir.path(), &request, &machine);
            for (file, _, instead) in EDITS {
                let text = fs::read_to_string(copy.dir.join("ansible").join(file)).unwrap();
                assert!(text.contains(instead), "{file} of this version is not changed");
            }
            // Neither Packer has Goss, and Debian's does not know these keys yet.
            let template = copy.dir.join(recipe.template);
            let mut document: Value = serde_json::from_str(&fs::read_to_string(&template).unwrap()).unwrap();
            document["provisioners"].as_array_mut().unwrap().retain(|provisioner| provisioner["type"] != "goss");
            let unknown: &[&str] = match machine {
                Machine::Here(_) if home.is_none() => &["cpu_model", "firmware"],
                Machine::InVcenter(_) if home.is_none() => &["destroy", "remote_cache_cleanup"],
                Machine::Here(_) | Machine::InVcenter(_) | Machine::InPrism(_) => &[],
            };
            for key in unknown {
                document["builders"][0].as_object_mut().unwrap().remove(*key);
            }
            fs::write(&template, document.to_string()).unwrap();
            let mut packer = Command::new(home.as_ref().map_or("packer".into(), |home| home.join(".local/bin/packer")));
            if let Some(home) = &home {
                packer.env("HOME", home);
            }
            packer.arg("validate").current_dir(&copy.dir).env("CHECKPOINT_DISABLE", "1");
            let mut files: Vec<_> =
                recipe.var_files.iter().map(|file| copy.dir.join(file)).filter(|path| path.exists()).collect();
            let known = Known { username: "user".into(), password: "password".into(), ..Known::default() };
            for file in generate(&request, settings(&request), &known).unwrap() {
                let path = dir.path().join(format!("{}.json", file.name));
                fs::write(&path, file.vars.to_string()).unwrap();
                files.push(path);
            }
            if let Some(user_data) = copy.user_data(&recipe).unwrap() {
                packer.arg(format!("-var=user_data={user_data}"));
            }
            for file in files {
                packer.arg(format!("-var-file={}", file.display()));
            }
            let output = packer.arg(recipe.template).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{name} {version}: {said}");
            for playbook in ["firstboot.yml", "node.yml"] {
                let mut ansible = Command::new("ansible-playbook");
                ansible.args(["--syntax-check", "-i", "localhost,"]).arg(format!("ansible/{playbook}"));
                let output = ansible.current_dir(&copy.dir).output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{name} {version}: {said}");
            }
        }
    }
}
