//! The engine `ImageBuilder`: upstream's kubernetes-sigs/image-builder, for images that must be exactly what its recipe
//! makes.
//!
//! The build runs in upstream's own container image. A working copy of upstream's directory (`upstream`) and the
//! [`varfiles`] of the build are given to Packer; [`packer`] follows what it says and [`diagnosis`] judges a failure. What
//! comes out is a raw disk, as from the other engine, wherever the machine was that it was made in.

pub mod diagnosis;
pub mod packer;
mod post;
pub mod recipe;
mod secrets;
pub(crate) mod upstream;
pub mod varfiles;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use flate2::read::MultiGzDecoder;
use nix::sys::signal::Signal;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

pub use self::{
    diagnosis::Diagnosis, post::ResultError, secrets::SecretDirError, upstream::UpstreamError, varfiles::VarFileError,
};
use self::{
    packer::Watch,
    recipe::{NoRecipe, Recipe},
    secrets::SecretDir,
    upstream::{Edits, ROLE_POST, ROLE_PRE, SshPassword, WorkingCopy},
    varfiles::Known,
};
use crate::{
    contract::{
        BuildRequest, Classified, CredentialSlot, FailureClass, FileContent, ImageBuilderSettings, Provider,
        ProviderTarget, SSH_PASSWORD, Stage,
    },
    native::{Assembled, accelerator::Virtualization, image_contract::Expected},
    process::{CommandSpec, ProcessError, Runner, Stop},
    progress::Reporter,
    secret::{Credentials, Redactor, SecretError},
};

/// Where upstream's image has its directory.
pub const UPSTREAM_DIR: &str = "/home/imagebuilder";
/// Time for Packer to remove what it made, after it is asked to stop.
const CLEAN_UP: Duration = Duration::from_secs(240);
/// `ssh` from this version on copies by another protocol than upstream's Ansible expects.
const SSH_WITHOUT_SCP: u32 = 9;
/// Ansible speaks to Packer on this machine, which has older keys than such an `ssh` takes.
const PACKERS_KEYS: &str = "-o HostKeyAlgorithms=+ssh-rsa -o PubkeyAcceptedAlgorithms=+ssh-rsa";

/// Why the engine could not make a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageBuilderError {
    #[error(transparent)]
    Recipe(#[from] NoRecipe),
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    VarFile(#[from] VarFileError),
    #[error(transparent)]
    SecretDir(#[from] SecretDirError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Result(#[from] ResultError),
    #[error("can not use {}", .path.display())]
    Work { path: PathBuf, source: io::Error },
    #[error("the archive of CNI plugins holds no host-device; the release is not like other releases")]
    HostDevice { source: Option<io::Error> },
    #[error("Packer failed while it was at {stage}: {}: {text}", .diagnosis.advice)]
    Packer { stage: Stage, diagnosis: Diagnosis, text: String },
    #[error("Packer did not end within {} s and was stopped while it was at {stage}; raise spec.build.timeout", .limit.as_secs())]
    TimedOut { stage: Stage, limit: Duration },
}

impl ImageBuilderError {
    /// The part of the build that failed, where Packer tells it.
    pub fn stage(&self) -> Option<Stage> {
        match self {
            Self::Packer { stage, .. } | Self::TimedOut { stage, .. } => Some(*stage),
            _ => None,
        }
    }
}

impl Classified for ImageBuilderError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Recipe(error) => error.class(),
            Self::Upstream(error) => error.class(),
            Self::VarFile(error) => error.class(),
            Self::SecretDir(error) => error.class(),
            Self::Secret(error) => error.class(),
            Self::Process(error) => error.class(),
            Self::Result(error) => error.class(),
            Self::Work { .. } => FailureClass::Environment,
            Self::HostDevice { .. } => FailureClass::BadInput,
            Self::Packer { diagnosis, .. } => diagnosis.class,
            Self::TimedOut { .. } => FailureClass::Transient,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Recipe(error) => error.reason(),
            Self::Upstream(error) => error.reason(),
            Self::VarFile(error) => error.reason(),
            Self::SecretDir(error) => error.reason(),
            Self::Secret(error) => error.reason(),
            Self::Process(error) => error.reason(),
            Self::Result(error) => error.reason(),
            Self::Work { .. } => "WorkDirectoryUnusable",
            Self::HostDevice { .. } => "ArtifactUnusable",
            Self::Packer { diagnosis, .. } => diagnosis.reason,
            Self::TimedOut { .. } => "PackerTimedOut",
        }
    }
}

/// The engine of one build.
#[derive(Debug)]
pub struct ImageBuilder<'b> {
    pub request: &'b BuildRequest,
    pub settings: &'b ImageBuilderSettings,
    /// Upstream's directory.
    pub upstream: &'b Path,
    /// A directory that the build has for itself.
    pub dir: &'b Path,
    /// A directory that attempts share.
    pub cache: PathBuf,
    pub runner: Runner,
    pub redactor: Redactor,
    pub credentials: Credentials,
    pub reporter: Reporter,
}

/// What Packer is told of a machine in vCenter.
#[derive(Clone, Debug)]
pub struct InVcenter {
    /// Name of the machine.
    pub machine: String,
    /// Name of the installation medium while it is there.
    pub medium: String,
    /// Where it goes, as variables of upstream's templates.
    pub place: BTreeMap<&'static str, String>,
}

/// What Packer is told of a machine in Prism Central.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InPrism {
    /// Name of the machine, and of the image that Packer makes of its disk.
    pub name: String,
    /// UUID of the cluster that it runs in.
    pub cluster: String,
    /// UUID of its subnet.
    pub subnet: String,
    /// UUID of the image that its disk starts as.
    pub source: String,
}

/// Where the machine is that is built in.
#[derive(Clone, Debug)]
pub enum Machine {
    /// On this node, run by this.
    Here(Virtualization),
    /// Its disk comes back with Packer's export.
    InVcenter(InVcenter),
    /// Its disk stays there as an image, for whoever fetches it.
    InPrism(InPrism),
}

/// What was fetched before Packer starts.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The installation medium and its digest, `sha256:…` or `sha512:…`.
    pub medium: Option<(PathBuf, String)>,
    /// The archive of CNI plugins.
    pub cni_plugins: PathBuf,
}

/// What Packer made.
#[derive(Debug)]
pub struct Made {
    pub assembled: Assembled,
    /// How long the parts of Packer's run took.
    pub took: Vec<(Stage, Duration)>,
    /// Of what the image started from, where that is known.
    pub base_digest: Option<String>,
}

impl ImageBuilder<'_> {
    fn recipe(&self) -> Result<Recipe, NoRecipe> {
        match self.request.provider {
            Provider::Baremetal | Provider::Nutanix => Recipe::of(self.request, false),
            Provider::Vsphere => {
                let recipe = Recipe::of(self.request, self.settings.template.is_some())?;
                Ok(upstream::settle(self.upstream, recipe))
            }
        }
    }

    /// Refuses what this engine does not make, or upstream's directory does not have.
    pub fn check(&self) -> Result<(), ImageBuilderError> {
        let recipe = self.recipe()?;
        upstream::check(self.upstream, &recipe)?;
        if self.request.provider == Provider::Vsphere && self.settings.template.is_none() {
            upstream::check_firmware(self.upstream, &recipe, self.request.firmware)?;
        }
        Ok(())
    }

    /// Runs Packer and brings its result to where the other engine puts it; from Prism Central the caller does.
    pub async fn make(&self, fetched: &Fetched, machine: &Machine) -> Result<Made, ImageBuilderError> {
        let recipe = self.recipe()?;
        let secrets = SecretDir::mount(self.dir.join("secrets"))?;
        let mut known = self.known(fetched, &secrets)?;
        if let (Machine::InVcenter(remote), Some((path, _))) = (machine, &mut known.medium) {
            *path = self.name_medium(Path::new(path), remote)?.display().to_string();
        }
        let password = self.ssh_password().await?;
        let output = self.output();
        let edits = Edits { recipe: &recipe, settings: self.settings, machine, output: &output };
        let copy = WorkingCopy::make(self.upstream, self.dir.join("upstream"), &password, &edits)?;
        let mut var_files: Vec<_> =
            recipe.var_files.iter().map(|file| copy.dir.join(file)).filter(|path| path.exists()).collect();
        for file in varfiles::generate(self.request, self.settings, &known)? {
            var_files.push(secrets.write(&format!("{}.json", file.name), file.vars.to_string().as_bytes())?);
        }
        let ansible = secrets.write("ansible.json", self.ansible_vars(&secrets)?.to_string().as_bytes())?;
        let engine = self.engine_vars(&ansible, machine, copy.user_data(&recipe)?)?.to_string();
        var_files.push(secrets.write("engine.json", engine.as_bytes())?);
        let base_digest = match &fetched.medium {
            Some((_, digest)) => Some(digest.clone()),
            None if self.settings.template.is_some() => None,
            None => recipe.var_files.iter().rev().find_map(|file| medium(&copy.vars(file)?)),
        };

        let took = self.run_packer(&copy, &recipe, &var_files, &known).await?;
        let listing = secrets.path().join("contents");
        let listing =
            fs::read_to_string(&listing).map_err(|source| ImageBuilderError::Work { path: listing, source })?;
        drop(secrets);
        let disk = self.dir.join("disk.raw");
        match machine {
            Machine::Here(_) => post::bring(&output, &disk)?,
            Machine::InVcenter(_) => post::unpack(&output, &disk).await?,
            Machine::InPrism(_) => {}
        }
        let images = listing.lines().filter_map(|line| line.strip_prefix("image\t")).map(str::to_owned).collect();
        let expected = Expected {
            os: self.request.os.clone(),
            provider: self.request.provider,
            firmware: self.request.firmware,
            release: Some(self.request.release.clone()),
            images,
            packages: vec![],
            upstream: true,
        };
        Ok(Made { assembled: Assembled::new(disk, crate::native::installed(&listing), expected), took, base_digest })
    }

    /// Packer uploads a file of this machine under the name that it has here.
    fn name_medium(&self, medium: &Path, remote: &InVcenter) -> Result<PathBuf, ImageBuilderError> {
        let named = self.dir.join(&remote.medium);
        match fs::hard_link(medium, &named) {
            Ok(()) => Ok(named),
            Err(source) => Err(ImageBuilderError::Work { path: named, source }),
        }
    }

    fn output(&self) -> PathBuf {
        self.dir.join("output")
    }

    /// Everything that the var-files need beside the build document.
    fn known(&self, fetched: &Fetched, secrets: &SecretDir) -> Result<Known, ImageBuilderError> {
        let secret = |slot: &CredentialSlot, key: &str| {
            Ok::<_, SecretError>(self.credentials.optional(slot, key)?.map(|value| value.expose_secret().to_owned()))
        };
        let mut known = Known {
            host_device_sha256: host_device(&fetched.cni_plugins)?,
            medium: fetched.medium.as_ref().map(|(path, digest)| (path.display().to_string(), digest.clone())),
            ..Known::default()
        };
        let slot = match &self.request.provider_target {
            Some(ProviderTarget::Vsphere(target)) => Some(&target.slot),
            Some(ProviderTarget::Nutanix(target)) => Some(&target.slot),
            None => None,
        };
        if let Some(slot) = slot {
            known.username = secret(slot, "username")?.unwrap_or_default();
            known.password = secret(slot, "password")?.unwrap_or_default();
        }
        if let Some(subscription) = &self.request.subscription {
            let slot = &subscription.slot;
            known.rhel_username = secret(slot, "username")?.unwrap_or_default();
            known.rhel_password = secret(slot, "password")?.unwrap_or_default();
            known.rhsm_activation_key = secret(slot, "activationKey")?;
            known.rhsm_org_id = secret(slot, "orgID")?;
        }
        for (name, content) in &self.request.packages.repositories {
            let file = varfiles::repository_file(self.request.os.name, name, content);
            known.repositories.push(secrets.write(&file, content.as_bytes())?.display().to_string());
        }
        Ok(known)
    }

    /// A new one for every build.
    async fn ssh_password(&self) -> Result<SshPassword, ImageBuilderError> {
        let plain = uuid::Uuid::new_v4().simple().to_string();
        self.redactor.add(&plain);
        let hash = CommandSpec::new("openssl").args(["passwd", "-6", "-stdin"]).stdin(format!("{plain}\n"));
        let hashed = self.runner.run(hash).await?.stdout.trim().to_owned();
        self.redactor.add(&hashed);
        Ok(SshPassword { plain, hashed })
    }

    /// Variables of Ansible that count before all others: what upstream's roles read in other places than the var-files of
    /// the EKS Anywhere tool say, and what our own roles need.
    fn ansible_vars(&self, secrets: &SecretDir) -> Result<Value, ImageBuilderError> {
        let release = &self.request.release;
        let digest = |artifact| varfiles::digest(artifact, release);
        let mut programs = vec![];
        for (name, artifact) in
            [("kubelet", &release.kubelet), ("kubeadm", &release.kubeadm), ("kubectl", &release.kubectl)]
        {
            programs.push(json!({"name": name, "sha256": digest(artifact)?}));
        }
        let mut files = vec![];
        for (index, file) in self.request.files.iter().enumerate() {
            let source = match &file.content {
                FileContent::Inline(text) => secrets.write(&format!("file-{index}"), text.as_bytes())?,
                FileContent::Path(path) => path.clone(),
            };
            files.push(json!({
                "src": source, "dest": file.path, "owner": file.owner, "group": file.group, "mode": file.mode,
            }));
        }
        let pre: Vec<_> =
            [ROLE_PRE].into_iter().chain(self.settings.node_roles_pre.iter().map(String::as_str)).collect();
        Ok(json!({
            "containerd_url": release.containerd.artifact.url,
            "containerd_sha256": digest(&release.containerd.artifact)?,
            "containerd_prefix": "/",
            "crictl_url": release.crictl.artifact.url,
            "crictl_sha256": digest(&release.crictl.artifact)?,
            "kubernetes_cni_http_checksum": format!("sha256:{}", digest(&release.cni_plugins.artifact)?),
            "eksa_cni_url": release.cni_plugins.artifact.url,
            "eksa_programs": programs,
            "eksa_etcdadm": {
                "url": release.etcdadm.artifact.url, "sha256": digest(&release.etcdadm.artifact)?,
            },
            "eksa_etcd": {
                "version": release.etcd.version, "url": release.etcd.artifact.url,
                "sha256": digest(&release.etcd.artifact)?,
            },
            "eksa_files": files,
            "eksa_contents_file": secrets.path().join("contents"),
            "custom_role_names": ROLE_POST,
            "node_custom_roles_pre": pre.join(" "),
        }))
    }

    /// Variables of Packer that count before all others.
    fn engine_vars(
        &self,
        ansible: &Path,
        machine: &Machine,
        user_data: Option<String>,
    ) -> Result<Value, ImageBuilderError> {
        let mut vars = json!({
            "ansible_user_vars": format!("@{}", ansible.display()),
            "headless": "true",
            "output_directory": self.output(),
        });
        match machine {
            Machine::Here(_) => {}
            Machine::InVcenter(InVcenter { place, .. }) => {
                for (name, value) in place {
                    vars[*name] = json!(value);
                }
                vars["disk_size"] = json!(self.request.disk_size_mib.to_string());
            }
            Machine::InPrism(_) => {
                vars["disk_size_gb"] = json!(self.request.disk_size_mib.div_ceil(1024).to_string());
            }
        }
        if let Some(user_data) = user_data {
            // The password is in it.
            self.redactor.add(&user_data);
            vars["user_data"] = json!(user_data);
        }
        if let (Some(_), Some(ProviderTarget::Vsphere(target))) =
            (&self.settings.template, &self.request.provider_target)
        {
            // The account is in the template, and its password with it.
            vars["ssh_password"] = json!(self.credentials.require(&target.slot, SSH_PASSWORD)?.expose_secret());
        }
        Ok(vars)
    }

    async fn run_packer(
        &self,
        copy: &WorkingCopy,
        recipe: &Recipe,
        var_files: &[PathBuf],
        known: &Known,
    ) -> Result<Vec<(Stage, Duration)>, ImageBuilderError> {
        let temporary = self.dir.join("tmp");
        fs::create_dir_all(&temporary).map_err(|source| ImageBuilderError::Work { path: temporary.clone(), source })?;
        let limit = Duration::from_secs(self.settings.timeout_seconds);
        let home = self.upstream;
        let mut command = CommandSpec::new("packer")
            .args(["build", "-machine-readable", "-force", "-color=false"])
            .env("HOME", home)
            .env(
                "PATH",
                format!("{}/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", home.display()),
            )
            .env("TMPDIR", &temporary)
            .env("PACKER_CACHE_DIR", self.cache.join("packer"))
            .env("CHECKPOINT_DISABLE", "1")
            .env("ANSIBLE_NOCOLOR", "1")
            // A machine in software needs longer than Ansible's 10 s to answer.
            .env("ANSIBLE_TIMEOUT", "60")
            .env("RHSM_USER", &known.rhel_username)
            .env("RHSM_PASS", &known.rhel_password)
            .current_dir(&copy.dir)
            .timeout(limit)
            .stop(Stop { signal: Signal::SIGINT, grace: CLEAN_UP });
        for (name, value) in [("RHSM_ACTIVATION_KEY", &known.rhsm_activation_key), ("RHSM_ORG_ID", &known.rhsm_org_id)]
        {
            if let Some(value) = value {
                command = command.env(name, value);
            }
        }
        command.env.extend(self.request.proxy.environment());
        if let Some(bundle) = &self.request.trust_bundle {
            // In addition to the system's own, which are in a directory.
            command = command.env("SSL_CERT_FILE", bundle);
        }
        if self.ssh_version().await? >= SSH_WITHOUT_SCP {
            // With the quotes that upstream gives it: without them Ansible takes it for a flag of its own.
            command = command.env("ANSIBLE_SCP_EXTRA_ARGS", "\"-O\"").env("ANSIBLE_SSH_ARGS", PACKERS_KEYS);
        }
        for file in var_files {
            let mut argument = std::ffi::OsString::from("-var-file=");
            argument.push(file);
            command = command.arg(argument);
        }
        let watch = Watch::new(self.reporter.clone());
        let result = self.runner.run_watched(command.arg(recipe.template), |line| watch.see(line)).await;
        let stage = watch.stage();
        let (took, said) = watch.finish();
        match result {
            Ok(_) => Ok(took),
            Err(ProcessError::Failed { .. }) => {
                let (diagnosis, text) = diagnosis::diagnose(&said);
                Err(ImageBuilderError::Packer { stage, diagnosis, text })
            }
            Err(ProcessError::TimedOut { .. }) => Err(ImageBuilderError::TimedOut { stage, limit }),
            Err(error) => Err(error.into()),
        }
    }

    /// The major version of OpenSSH's client.
    async fn ssh_version(&self) -> Result<u32, ImageBuilderError> {
        let version = std::sync::Mutex::new(0);
        let see = |line: &str| {
            let digits = line.strip_prefix("OpenSSH_").and_then(|rest| rest.split(['.', 'p']).next());
            if let (Some(Ok(found)), Ok(mut version)) = (digits.map(str::parse), version.lock()) {
                *version = found;
            }
        };
        self.runner.run_watched(CommandSpec::new("ssh").arg("-V"), see).await?;
        Ok(version.into_inner().unwrap_or_default())
    }
}

/// The digest that a var-file of upstream's gives for its installation medium.
fn medium(vars: &Value) -> Option<String> {
    let text = |key: &str| vars.get(key)?.as_str();
    let kind = text("iso_checksum_type").filter(|kind| matches!(*kind, "sha256" | "sha512"))?;
    Some(format!("{kind}:{}", text("iso_checksum")?))
}

/// SHA-256 of the plugin `host-device` in the archive of CNI plugins.
fn host_device(archive: &Path) -> Result<String, ImageBuilderError> {
    let unreadable = |source| ImageBuilderError::HostDevice { source: Some(source) };
    let file = fs::File::open(archive).map_err(unreadable)?;
    let mut archive = tar::Archive::new(MultiGzDecoder::new(io::BufReader::new(file)));
    for entry in archive.entries().map_err(unreadable)? {
        let mut entry = entry.map_err(unreadable)?;
        if entry.path().is_ok_and(|path| path.file_name().is_some_and(|name| name == "host-device")) {
            return crate::native::sha256(&mut entry).map_err(unreadable);
        }
    }
    Err(ImageBuilderError::HostDevice { source: None })
}
