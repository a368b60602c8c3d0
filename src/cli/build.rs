//! `image-builder build`: one build on this machine, from the flags and JSON files of the EKS Anywhere CLI. Its stages
//! are those of the build pod.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use indicatif::HumanBytes;
use nix::fcntl::{Flock, FlockArg};
use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{
    doctor::{self, Level},
    dropin::{
        UsageError,
        files::LocalFile,
        flags::BuildFlags,
        load::load,
        spec::{Secret, Translation, names_its_place, translate},
    },
    failure::{Failure, ProcessError},
    run::enter_mount_namespace,
    terminal::{self, cancel_on_signal, say},
    user_namespace::{self, Privileges},
};
use crate::{
    api::v1alpha1::Engine,
    build::{self, Environment},
    contract::{
        Archive, Base, BaseChecksum, BuildIdentity, BuildOutcome, BuildReport, BuildRequest, Classified, ExtraFile,
        FailureClass, FileContent, ProviderTarget, Proxy, PublishTarget, ResolvedRelease,
    },
    controller::{
        references::{NUTANIX_SLOT, VSPHERE_SLOT},
        validate,
    },
    fetch::FetchError,
    http, imagebuilder,
    release::{PRODUCTION_MANIFEST_URL, ReleaseQuery, Resolver, archive},
    secret::{Credentials, Redactor},
};

pub(super) const EXAMPLES: &str = "\
Examples:
  sudo image-builder build --os ubuntu --hypervisor baremetal --release-channel 1-31
  sudo image-builder build --os ubuntu --os-version 24.04 --hypervisor baremetal --baremetal-config baremetal.json
  image-builder build --os ubuntu --hypervisor vsphere --vsphere-config vsphere.json --signatures require
  sudo image-builder build --os ubuntu --hypervisor baremetal --baremetal-config mirrors.json --air-gapped \\
      --manifest-tarball eks-a-manifests.tar

The image is put into the current directory as <os>-<version>-kube-<channel>.<extension>, e.g.
ubuntu-2204-kube-1-31.gz, with a .sha256 file beside it. vCenter is asked only for settings with
\"convert_to_template\": \"true\"; an image for nutanix goes to Prism Central and becomes a file for settings with
\"image_export\": \"true\".

User names and passwords may stand in the settings, in --credentials-file, or in the environment: EKSA_VSPHERE_USERNAME,
EKSA_VSPHERE_PASSWORD, SSH_PASSWORD, EKSA_NUTANIX_USERNAME, EKSA_NUTANIX_PASSWORD, RHSM_USERNAME, RHSM_PASSWORD,
RHSM_ACTIVATION_KEY, RHSM_ORG_ID.

Exit codes: 0 the image is there; 2 the flags are no flags; 65 flags, settings or credentials are wrong; 69 this machine
lacks something; 70 a defect; 75 try again; 130 stopped.";

/// Where builds work unless they are told. Removed when the image is there.
const WORK_DIR: &str = ".image-builder";
/// Held by the build that works in a directory.
const LOCK: &str = "lock";

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    flags: BuildFlags,
    /// Directory for everything that the build writes but the image. One that is named keeps its downloads, so that the
    /// next build has them. Default ./.image-builder, which is removed when the image is there.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// What is printed on standard output at the end.
    #[arg(long, value_enum, default_value = "text")]
    output: Format,
}

/// What is printed on standard output at the end.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    /// The path of the image.
    Text,
    /// The build's report: the image, or why there is none.
    Json,
}

/// Why this machine is not built on.
#[derive(Debug, thiserror::Error)]
enum MachineError {
    #[error("can not make a mount namespace: run it as root, outside of containers that forbid it")]
    MountNamespace { source: nix::Error },
    #[error("can not make a user namespace: run it as root, or see what `image-builder doctor` says")]
    UserNamespace { source: io::Error },
    #[error("this machine lacks what builds need, see above")]
    Unfit,
    #[error("another build works in {}: wait for it, or name another directory with --work-dir", .path.display())]
    Busy { path: PathBuf },
}

impl Classified for MachineError {
    fn class(&self) -> FailureClass {
        FailureClass::Environment
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::MountNamespace { .. } => "MountNamespaceRefused",
            Self::UserNamespace { .. } => "UserNamespaceRefused",
            Self::Unfit => "MachineUnfit",
            Self::Busy { .. } => "WorkDirectoryBusy",
        }
    }
}

/// Builds, prints the result, and gives the exit code of its class.
pub(super) fn run(options: &Options) -> ExitCode {
    let report = match prepare(options) {
        Ok(plan) => build(options, plan),
        Err(failure) => Err(failure),
    };
    match report {
        Ok(report) => finish(options, &report),
        Err(failure) => {
            if options.output == Format::Json {
                print(&failure.to_report());
            }
            failure.report()
        }
    }
}

/// What was asked for, as far as this machine alone can tell.
struct Plan {
    translation: Translation,
    work_dir: PathBuf,
    redactor: Redactor,
}

/// Reads everything, and enters its namespaces while there is only one thread.
fn prepare(options: &Options) -> Result<Plan, Failure> {
    let (wanted, mut warnings) = load(&options.flags)?;
    let name = wanted.default_name();
    let mut translation = translate(wanted, &name, &mut warnings)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    validate::supported(&translation.spec).map_err(UsageError::Refused)?;
    if translation.spec.engine == Engine::ImageBuilder {
        let what = "an installation medium or Ansible roles, so engine: ImageBuilder, on this machine";
        let instead = "that engine runs in upstream's own container image; `image-builder manifest` with the same flags prints \
                       the NodeImageBuild that asks an operator for it, or name a root file system archive in iso_url";
        return Err(UsageError::not_supported(what, instead).into());
    }
    if translation.ending.import {
        can_import(&translation)?;
    }
    if translation.spec.proxy.is_none() {
        translation.spec.proxy = proxy_of(|name| env::var(name).ok());
    }
    let redactor = Redactor::default();
    for value in translation.secrets.iter().flat_map(|secret| secret.values.values()) {
        redactor.add(value.expose_secret());
    }
    let proxies = translation.spec.proxy.iter().flat_map(|proxy| [&proxy.http, &proxy.https]).flatten();
    for password in proxies.filter_map(|proxy| proxy.parse::<Url>().ok()?.password().map(ToOwned::to_owned)) {
        redactor.add(&password);
    }
    let mounts = || enter_mount_namespace().map_err(|source| MachineError::MountNamespace { source });
    match user_namespace::look() {
        Privileges::Root => mounts()?,
        Privileges::Namespace(ids) => {
            user_namespace::enter(ids).map_err(|source| MachineError::UserNamespace { source })?;
            mounts()?;
        }
        // A machine that lacks privileges is told so with everything else that it lacks.
        Privileges::Lacking(_) => {}
    }
    let work_dir = options.work_dir.clone().unwrap_or_else(|| PathBuf::from(WORK_DIR));
    Ok(Plan { translation, work_dir, redactor })
}

/// Whether the settings and credentials are enough to put the image into its provider.
fn can_import(translation: &Translation) -> Result<(), UsageError> {
    names_its_place(&translation.spec, "the image is put there")?;
    let known = |secret: &&Secret| secret.needed.iter().all(|key| secret.values.contains_key(key));
    let provider = [VSPHERE_SLOT, NUTANIX_SLOT];
    let mut secrets = translation.secrets.iter().filter(|secret| provider.contains(&secret.slot.0.as_str()));
    match secrets.find(|secret| !known(secret)) {
        None => Ok(()),
        Some(secret) => Err(UsageError::flags(
            format!("user name and password for {} are not known", secret.slot.0),
            "write them into --credentials-file, the environment or the settings",
        )),
    }
}

/// The proxy that the environment names. The build's own requests know it anyway; programs in the image do not.
fn proxy_of(environment: impl Fn(&str) -> Option<String>) -> Option<Proxy> {
    let either =
        |name: &str| environment(&name.to_lowercase()).or_else(|| environment(name)).filter(|url| !url.is_empty());
    let (http, https) = (either("HTTP_PROXY"), either("HTTPS_PROXY"));
    let exceptions = either("NO_PROXY").unwrap_or_default();
    let no_proxy = exceptions.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).collect();
    (http.is_some() || https.is_some()).then_some(Proxy { http, https, no_proxy })
}

fn build(options: &Options, plan: Plan) -> Result<BuildReport, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| ProcessError::Threads { source })?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        let watch = tokio::spawn(cancel_on_signal(cancel.clone()));
        let work = Box::pin(build_here(options, plan, &cancel)).await;
        watch.abort();
        work
    })
}

async fn build_here(options: &Options, plan: Plan, cancel: &CancellationToken) -> Result<BuildReport, Failure> {
    let Plan { translation, work_dir, redactor } = plan;
    let interrupted = || Failure::from(FetchError::Cancelled);
    let tarball = options.flags.manifest_tarball();
    let endpoints = endpoints(&translation, tarball.is_some())?;
    let looked = cancel.run_until_cancelled(doctor::examine(&work_dir, endpoints)).await.ok_or_else(interrupted)?;
    let findings = doctor::judge(&looked);
    for finding in findings.iter().filter(|finding| finding.level != Level::Fine) {
        say(&finding.to_string());
    }
    if findings.iter().any(|finding| finding.level == Level::Needed) {
        return Err(MachineError::Unfit.into());
    }
    let lock = lock(&work_dir)?;
    let resolving = resolve(&translation, tarball, &work_dir);
    let release = cancel.run_until_cancelled(resolving).await.ok_or_else(interrupted)??;
    say(&format!(
        "building for Kubernetes {} ({}, {})",
        release.kubernetes_version, release.eksd_name, release.eksa_version
    ));
    let request = request(&translation, release)?;
    let display = terminal::Stages::new();
    let environment = Environment {
        work_dir: work_dir.clone(),
        upstream: imagebuilder::UPSTREAM_DIR.into(),
        reporter: display.reporter(),
        credentials: credentials(&translation, &redactor),
        redactor,
        import: translation.ending.import,
        cancel: cancel.clone(),
    };
    let report = build::run(&request, environment).await;
    display.finish();
    if matches!(report, BuildReport::Succeeded(_)) && options.work_dir.is_none() {
        let removed = fs::remove_dir_all(&work_dir);
        removed.map_err(|source| ProcessError::Directory { path: work_dir, source })?;
    }
    drop(lock);
    Ok(report)
}

/// The credentials stay in this process.
fn credentials(translation: &Translation, redactor: &Redactor) -> Credentials {
    let values = translation.secrets.iter().flat_map(|secret| {
        secret.values.iter().map(|(key, value)| (secret.slot.clone(), (*key).to_owned(), value.clone()))
    });
    Credentials::given(redactor.clone(), values)
}

/// Makes the work directory this build's alone.
fn lock(work_dir: &Path) -> Result<Flock<fs::File>, Failure> {
    let path = work_dir.join(LOCK);
    let unusable = |source| ProcessError::Directory { path: work_dir.to_owned(), source };
    fs::create_dir_all(work_dir).map_err(unusable)?;
    let file = fs::File::create(&path).map_err(unusable)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::Error::EWOULDBLOCK => MachineError::Busy { path: work_dir.to_owned() }.into(),
        error => unusable(error.into()).into(),
    })
}

/// The servers that the build asks first.
fn endpoints(translation: &Translation, has_tarball: bool) -> Result<Vec<Url>, Failure> {
    let spec = &translation.spec;
    let source = spec.source.clone().unwrap_or_default();
    let base = validate::base(spec).map_err(UsageError::Refused)?;
    let base = match base {
        Base::Archive(Archive { checksum: BaseChecksum::Sha256Sums(sums), .. }) => Some(sums),
        Base::Archive(Archive { url, checksum: BaseChecksum::Sha256(_) | BaseChecksum::Sha512(_) }) => Some(url),
        // The build's first stage looks for it, with credentials.
        Base::PrismImage(_) | Base::Recipe => None,
    };
    let manifest = source.release_manifest_url.as_deref().unwrap_or(PRODUCTION_MANIFEST_URL);
    let first = match (&source.eksa_base_url, has_tarball) {
        (Some(mirror), _) => Some(mirror.as_str()),
        (None, true) => None,
        (None, false) => Some(manifest),
    };
    let distro = source.eksd_base_url.as_deref();
    let named = first.into_iter().chain(distro).filter_map(|url| url.parse().ok());
    Ok(named.chain(base).collect())
}

async fn resolve(
    translation: &Translation,
    tarball: Option<&PathBuf>,
    work_dir: &Path,
) -> Result<ResolvedRelease, Failure> {
    let spec = &translation.spec;
    let (manifest_url, mut rewrite) = validate::source(spec);
    let mut manifest_url = manifest_url.unwrap_or_else(|| PRODUCTION_MANIFEST_URL.to_owned());
    if let Some(tarball) = tarball {
        let dir = work_dir.join("manifests");
        let unusable = |source| ProcessError::Directory { path: dir.clone(), source };
        match fs::remove_dir_all(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(unusable(source).into()),
            _ => fs::create_dir_all(&dir).map_err(unusable)?,
        }
        let unpacked = archive::unpack(tarball, &dir)?;
        manifest_url = unpacked.manifest_url;
        rewrite.extend(unpacked.rewrite);
    }
    let query = ReleaseQuery {
        manifest_url,
        eksa_release: spec.eksa_release.clone(),
        channel: spec.release_channel.clone(),
        rewrite,
        signatures: spec.verify.signatures,
    };
    let client = http::client(&spec.proxy.clone().unwrap_or_default(), None)?;
    Ok(Resolver::new(client).allow_local_files().resolve(&query).await?)
}

/// The build document: the image goes into the current directory if it becomes a file, files come from where they are.
fn request(translation: &Translation, release: ResolvedRelease) -> Result<BuildRequest, Failure> {
    let here = env::current_dir().map_err(|source| ProcessError::Directory { path: ".".into(), source })?;
    let build_id = uuid::Uuid::new_v4().simple().to_string().chars().take(10).collect();
    let identity = BuildIdentity { namespace: "local".into(), name: "build".into(), build_id };
    let mut request = validate::request(&translation.spec, release, identity).map_err(UsageError::Refused)?;
    let default_name = format!("{}-{}", request.image_stem(), request.identity.build_id);
    match &mut request.provider_target {
        Some(ProviderTarget::Vsphere(target)) if target.template_name.is_empty() => target.template_name = default_name,
        Some(ProviderTarget::Nutanix(target)) if target.image_name.is_empty() => target.image_name = default_name,
        Some(ProviderTarget::Vsphere(_) | ProviderTarget::Nutanix(_)) | None => {}
    }
    request.files = translation.files.iter().map(|file| extra_file(file, &here)).collect();
    if translation.ending.file {
        request.publish = vec![PublishTarget::Directory { path: here }];
    }
    Ok(request)
}

fn extra_file(file: &LocalFile, here: &Path) -> ExtraFile {
    let LocalFile { source, path, owner, group, mode } = file.clone();
    ExtraFile { path, owner, group, mode, content: FileContent::Path(here.join(source)) }
}

fn finish(options: &Options, report: &BuildReport) -> ExitCode {
    match options.output {
        Format::Json => print(report),
        Format::Text => {
            if let BuildReport::Succeeded(outcome) = report {
                let BuildOutcome { image, verification, stage_seconds } = outcome.as_ref();
                let seconds: f64 = stage_seconds.values().sum();
                say(&format!("{} in {seconds:.0} s, {verification}", HumanBytes(image.size)));
                if let Some(template) = &image.vsphere {
                    say(&format!("it is {} in vCenter", template.inventory_path));
                }
                let path = image.url.as_ref().and_then(|url| url.to_file_path().ok());
                let path = path.map_or_else(|| image.name.clone(), |path| path.display().to_string());
                // The exit code tells it as well.
                let _ = writeln!(io::stdout(), "{path}");
            }
        }
    }
    match report {
        BuildReport::Succeeded(_) => ExitCode::SUCCESS,
        BuildReport::Failed(failure) => {
            tracing::error!(stage = %failure.stage, reason = failure.reason, "{}", failure.message);
            ExitCode::from(failure.class.exit_code())
        }
    }
}

fn print(report: &BuildReport) {
    // The exit code tells it as well.
    let _ = writeln!(io::stdout(), "{}", serde_json::to_string_pretty(report).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environments_proxy_is_the_builds() {
        let variables = |name: &str| match name {
            "HTTPS_PROXY" => Some("http://proxy.test:3128".to_owned()),
            "no_proxy" => Some("10.0.0.0/8, .test".to_owned()),
            "http_proxy" => Some(String::new()),
            _ => None,
        };
        let proxy = proxy_of(variables).unwrap();
        assert_eq!((proxy.http, proxy.https.as_deref()), (None, Some("http://proxy.test:3128")));
        assert_eq!(proxy.no_proxy, ["10.0.0.0/8", ".test"]);
        assert_eq!(proxy_of(|_| None), None);
    }

    #[test]
    fn a_work_directory_is_one_builds_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let message = lock(dir.path()).map(drop).unwrap_err().to_string();
        assert!(message.contains("another build works in") && message.contains("--work-dir"), "{message}");
        drop(first);
        lock(dir.path()).unwrap();
    }
}
