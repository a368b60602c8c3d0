//! The stage driver: runs a build document from the first check to the published image, times every stage, and turns
//! whatever ends it into one report.

mod documents;
mod provenance;
mod provider;
mod sbom;
mod workspace;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use url::Url;

use self::{
    documents::Documents,
    provider::{Provided, Provider},
    workspace::{Workspace, WorkspaceError},
};
use crate::{
    contract::{
        Base, BootVerification, BuildOutcome, BuildReport, BuildRequest, Classified, Engine, FailureClass,
        FailureReport, ImageReport, PublishTarget, Stage,
    },
    error::Chain,
    fetch::{FetchError, Fetcher},
    http::{self, HttpError},
    imagebuilder::{self, ImageBuilder, ImageBuilderError, Machine},
    native::{
        self, Assembled, Fetched, Native, NativeError,
        accelerator::{self, AcceleratorError, Virtualization},
    },
    package::{Format, ImageSource},
    process::Runner,
    progress::Reporter,
    publish::{
        self, PublishError, Published, Publisher,
        nutanix::{NutanixError, SourceDisk},
        vsphere::VsphereError,
    },
    secret::{Credentials, Redactor},
};

/// Time to remove what Packer has left elsewhere after it failed. With what Packer has itself it is less than a pod has to
/// end.
const SHORT_CLEAN_UP: Duration = Duration::from_secs(45);
/// The same where a disk came of it, which is worth a wait.
const LONG_CLEAN_UP: Duration = Duration::from_secs(240);
/// This program's own file. Its path would not do: in a pod this process has left the only mount namespace in which the
/// volume that the file may be on is a part of the tree.
const PROGRAM: &str = "/proc/self/exe";

/// What a build runs in.
#[derive(Debug)]
pub struct Environment {
    /// Directory for everything the build writes.
    pub work_dir: PathBuf,
    /// The directory of kubernetes-sigs/image-builder, for builds of the engine `ImageBuilder`.
    pub upstream: PathBuf,
    pub reporter: Reporter,
    pub redactor: Redactor,
    pub credentials: Credentials,
    /// Whether the image is put into the provider that the document names; else it is only packaged as that one wants it.
    pub import: bool,
    /// Stops the build, which then cleans up.
    pub cancel: CancellationToken,
}

/// What ended a build early.
#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Native(#[from] NativeError),
    #[error(transparent)]
    ImageBuilder(#[from] ImageBuilderError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Vsphere(#[from] VsphereError),
    #[error(transparent)]
    Nutanix(#[from] NutanixError),
    #[error("can not read the trust bundle {}", .path.display())]
    TrustBundle { path: PathBuf, source: std::io::Error },
    #[error("the build was cancelled")]
    Cancelled,
    #[error("{}; and what Packer had made there may be left: {}", Chain(.cause.as_ref()), Chain(.left.as_ref()))]
    LeftBehind { cause: Box<BuildError>, left: Box<BuildError> },
    #[error("what Packer made for the build {build_id} was not removed within {} s; delete it there", .limit.as_secs())]
    StillCleaning { build_id: String, limit: Duration },
    #[error("nothing was fetched or published where something should have been; this is a defect of image-builder")]
    Inconsistent,
}

impl BuildError {
    fn inner(&self) -> Option<&dyn Classified> {
        Some(match self {
            Self::Workspace(error) => error,
            Self::Http(error) => error,
            Self::Accelerator(error) => error,
            Self::Fetch(error) => error,
            Self::Native(error) => error,
            Self::ImageBuilder(error) => error,
            Self::Publish(error) => error,
            Self::Vsphere(error) => error,
            Self::Nutanix(error) => error,
            Self::LeftBehind { cause, .. } => cause.as_ref(),
            Self::TrustBundle { .. } | Self::Cancelled | Self::StillCleaning { .. } | Self::Inconsistent => {
                return None;
            }
        })
    }
}

impl Classified for BuildError {
    fn class(&self) -> FailureClass {
        match (self, self.inner()) {
            (_, Some(inner)) => inner.class(),
            (Self::TrustBundle { .. }, _) => FailureClass::BadInput,
            (Self::Cancelled, _) => FailureClass::Cancelled,
            (Self::StillCleaning { .. }, _) => FailureClass::Transient,
            (_, None) => FailureClass::Internal,
        }
    }

    fn reason(&self) -> &'static str {
        match (self, self.inner()) {
            (_, Some(inner)) => inner.reason(),
            (Self::TrustBundle { .. }, _) => "InvalidTrustBundle",
            (Self::Cancelled, _) => "Cancelled",
            (Self::StillCleaning { .. }, _) => "LeftBehind",
            (_, None) => "Inconsistent",
        }
    }
}

/// A disk, where what it was made from came from, and the digest of that, where they are known.
type MadeDisk = (Assembled, Option<Url>, Option<String>);

/// Runs the whole build. Nothing of it but the download cache is left in the work directory, however it ends.
pub async fn run(request: &BuildRequest, environment: Environment) -> BuildReport {
    let redactor = environment.redactor.clone();
    let mut build = Build { request, environment, stage: Stage::Prepare, stage_seconds: BTreeMap::new() };
    match build.run().await {
        Ok(outcome) => BuildReport::Succeeded(Box::new(outcome)),
        Err(error) => {
            // Whatever failed because it was stopped, it was stopped.
            let error = match error {
                error if !build.environment.cancel.is_cancelled() => error,
                BuildError::LeftBehind { left, .. } => {
                    BuildError::LeftBehind { cause: Box::new(BuildError::Cancelled), left }
                }
                _ => BuildError::Cancelled,
            };
            BuildReport::Failed(FailureReport {
                stage: build.stage,
                class: error.class(),
                reason: error.reason().to_owned(),
                message: redactor.redact(&Chain(&error).to_string()).into_owned(),
            })
        }
    }
}

/// Removes what the attempts of a build have left half-made at its provider, which is where they may leave anything when
/// they are killed; with `finished_too` also the image that the build made there. A second time finds nothing to do.
pub async fn clean_up(
    request: &BuildRequest,
    finished_too: bool,
    reporter: Reporter,
    redactor: Redactor,
    cancel: CancellationToken,
) -> Result<(), FailureReport> {
    let work = async {
        let Some(target) = &request.provider_target else { return Ok(()) };
        let credentials = Credentials::new(redactor.clone());
        let bundle = trust_bundle(request)?;
        let provider = Provider::new(target, request, bundle, credentials, reporter, cancel.clone());
        cancel.run_until_cancelled(provider.clean_up(request, finished_too)).await.unwrap_or(Err(BuildError::Cancelled))
    };
    work.await.map_err(|error| FailureReport {
        stage: Stage::Publish,
        class: error.class(),
        reason: error.reason().to_owned(),
        message: redactor.redact(&Chain(&error).to_string()).into_owned(),
    })
}

/// The additional certificate authorities (PEM).
fn trust_bundle(request: &BuildRequest) -> Result<Option<Vec<u8>>, BuildError> {
    let Some(path) = &request.trust_bundle else { return Ok(None) };
    fs::read(path).map(Some).map_err(|source| BuildError::TrustBundle { path: path.clone(), source })
}

/// Where the machine of the engine `ImageBuilder` is.
enum Place<'p> {
    /// On this node, run by this.
    Here(Virtualization),
    At(&'p Provider),
}

struct Build<'b> {
    request: &'b BuildRequest,
    environment: Environment,
    stage: Stage,
    stage_seconds: BTreeMap<Stage, f64>,
}

impl Build<'_> {
    async fn run(&mut self) -> Result<BuildOutcome, BuildError> {
        let workspace = Workspace::create(&self.environment.work_dir)?;
        // On the heap: the stages hold much between them.
        let result = Box::pin(self.stages(&workspace)).await;
        if let Err(error) = workspace.remove() {
            tracing::warn!("{}", Chain(&error));
        }
        result
    }

    /// Runs one stage and notes how long it took.
    async fn stage<T, E: Into<BuildError>>(
        &mut self,
        stage: Stage,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, BuildError> {
        self.stage = stage;
        if self.environment.cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let begin = Instant::now();
        let result = work.await.map_err(Into::into);
        let seconds = begin.elapsed().as_secs_f64();
        self.stage_seconds.insert(stage, (seconds * 10.0).round() / 10.0);
        tracing::info!(%stage, seconds, succeeded = result.is_ok(), "stage ended");
        result
    }

    async fn stages(&mut self, workspace: &Workspace) -> Result<BuildOutcome, BuildError> {
        let started = Timestamp::now();
        let request = self.request;
        let Environment { reporter, redactor, credentials, cancel, import, .. } = &self.environment;
        let (reporter, credentials, cancel, import) = (reporter.clone(), credentials.clone(), cancel.clone(), *import);
        let runner = Runner::new(redactor.clone(), cancel.clone());
        let native = Native::new(request, workspace.dir(), runner.clone(), reporter.clone(), credentials.clone());
        let upstream = self.environment.upstream.clone();
        let image_builder = match &request.engine {
            Engine::Native => None,
            Engine::ImageBuilder(settings) => Some(ImageBuilder {
                request,
                settings: settings.as_ref(),
                upstream: &upstream,
                dir: workspace.dir(),
                cache: workspace.cache(),
                runner: runner.clone(),
                redactor: redactor.clone(),
                credentials: credentials.clone(),
                reporter: reporter.clone(),
            }),
        };

        let prepare = async {
            reporter.report(Stage::Prepare, 0.0, "looking at the node");
            match &image_builder {
                None => native.check()?,
                Some(image_builder) => image_builder.check()?,
            }
            let trust_bundle = trust_bundle(request)?;
            let client = http::client(&request.proxy, trust_bundle.as_deref())?;
            let uploads = publish::upload_client(&request.proxy, trust_bundle.as_deref())?;
            let provider = request.provider_target.as_ref().map(|target| {
                Provider::new(target, request, trust_bundle, credentials.clone(), reporter.clone(), cancel.clone())
            });
            if let Some(provider) = provider.as_ref().filter(|_| import) {
                provider.preflight(request).await?;
            }
            let builds_here = image_builder.is_some() && provider.is_none();
            let virtualization = match request.verify.boot {
                BootVerification::Never if !builds_here => None,
                BootVerification::Never | BootVerification::Required | BootVerification::WhenAccelerated => {
                    Some(accelerator::probe(request.verify.accelerator, workspace.dir(), &runner).await?)
                }
            };
            Ok::<_, BuildError>((client, uploads, provider, virtualization))
        };
        let (client, uploads, provider, virtualization) = self.stage(Stage::Prepare, prepare).await?;

        let fetcher = Fetcher::new(client.clone(), workspace.cache(), cancel.clone())?;
        let (assembled, base_url, base_digest) = match &image_builder {
            None => Box::pin(self.assemble(&native, &fetcher, provider.as_ref(), &reporter, workspace)).await?,
            Some(image_builder) => {
                let place = match (&provider, virtualization) {
                    (Some(provider), _) => Place::At(provider),
                    (None, Some(virtualization)) => Place::Here(virtualization),
                    (None, None) => return Err(BuildError::Inconsistent),
                };
                Box::pin(self.run_packer(image_builder, &fetcher, &reporter, &place)).await?
            }
        };

        let verify = async {
            let program = Path::new(PROGRAM);
            Ok::<_, BuildError>(match (virtualization, request.verify.boot) {
                (None, _) | (_, BootVerification::Never) => "not booted, because spec.verify.boot is Never".to_owned(),
                (Some(Virtualization::Software), BootVerification::WhenAccelerated) => {
                    "not booted, because KVM runs no guest on the node".to_owned()
                }
                (Some(virtualization), _) => native.verify(&assembled, virtualization, program).await?.summary(),
            })
        };
        let verification = self.stage(Stage::Verify, verify).await?;

        let format = provider.as_ref().map_or(Format::RawGz, |provider| provider.format(request));
        let source = ImageSource::new(&assembled.disk, &request.image_stem(), format);
        let file = exported(&source, request);
        let publisher = Publisher::new(client, uploads, credentials, reporter.clone(), cancel);
        reporter.report(Stage::Publish, 0.0, "packaging and uploading the image");
        let publish = async {
            let provided = match provider.as_ref().filter(|_| import) {
                Some(provider) => Some(provider.publish(request, &source).await?),
                None => None,
            };
            let published = publisher.publish_all(&request.publish, &file).await?;
            let image =
                image_report(&source, &file, provided, published, base_digest).ok_or(BuildError::Inconsistent)?;
            let about = (file.file_name(), &image);
            let Documents { sbom, provenance } =
                documents::publish(&publisher, request, workspace, &assembled, base_url.as_ref(), about, started)
                    .await?;
            Ok::<_, BuildError>(ImageReport { sbom, provenance, ..image })
        };
        let image = self.stage(Stage::Publish, publish).await?;
        reporter.report(Stage::Publish, 1.0, "published");
        Ok(BuildOutcome { image, verification, stage_seconds: self.stage_seconds.clone() })
    }

    /// The stages of the engine `Native` between the first look and the finished disk.
    async fn assemble(
        &mut self,
        native: &Native<'_>,
        fetcher: &Fetcher,
        provider: Option<&Provider>,
        reporter: &Reporter,
        workspace: &Workspace,
    ) -> Result<MadeDisk, BuildError> {
        let request = self.request;
        let fetch = async {
            reporter.report(Stage::Fetch, 0.0, "downloading");
            let wanted = Fetched::wanted(&request.release);
            let files = async { Ok::<_, BuildError>(fetcher.fetch_all(&wanted, reporter).await?) };
            let (base, files) = match &request.base {
                Base::Archive(archive) => {
                    let base = async {
                        let (file, digest) = fetcher.fetch_base(archive, |_, _| {}).await?;
                        Ok((native::Base::Archive(file), archive.url.clone(), digest))
                    };
                    tokio::try_join!(base, files)?
                }
                Base::PrismImage(source) => {
                    let provider = provider.ok_or(BuildError::Inconsistent)?;
                    let disk = workspace.dir().join("source.disk");
                    let SourceDisk { url, digest, .. } = provider.fetch_source(source, &disk).await?;
                    ((native::Base::Disk(disk), url, digest), files.await?)
                }
                Base::Recipe => return Err(BuildError::Inconsistent),
            };
            Ok::<_, BuildError>((base, Fetched::new(files).ok_or(BuildError::Inconsistent)?))
        };
        let ((base, base_url, base_digest), fetched) = self.stage(Stage::Fetch, Box::pin(fetch)).await?;
        let cache = workspace.cache();
        let installed = self.stage(Stage::Install, native.install(&base, &fetched, &cache)).await?;
        let expected = self.stage(Stage::Seal, async { native.seal(installed) }).await?;
        Ok((self.stage(Stage::Assemble, native.assemble(expected)).await?, Some(base_url), Some(base_digest)))
    }

    /// The same of the engine `ImageBuilder`. Packer tells when its stages begin.
    async fn run_packer(
        &mut self,
        engine: &ImageBuilder<'_>,
        fetcher: &Fetcher,
        reporter: &Reporter,
        place: &Place<'_>,
    ) -> Result<MadeDisk, BuildError> {
        let request = self.request;
        let fetch = async {
            reporter.report(Stage::Fetch, 0.0, "downloading");
            let medium = async {
                match &request.base {
                    Base::Archive(archive) => fetcher.fetch_base(archive, |_, _| {}).await.map(Some),
                    Base::Recipe | Base::PrismImage(_) => Ok(None),
                }
            };
            let plugins = &request.release.cni_plugins.artifact;
            let (medium, cni_plugins) = tokio::try_join!(medium, fetcher.fetch(plugins, |_, _| {}))?;
            let machine = match place {
                Place::Here(virtualization) => Machine::Here(*virtualization),
                Place::At(provider) => {
                    provider.machine(request, medium.as_ref().map(|(path, _)| path.as_path())).await?
                }
            };
            Ok::<_, BuildError>((imagebuilder::Fetched { medium, cni_plugins }, machine))
        };
        let (fetched, machine) = self.stage(Stage::Fetch, Box::pin(fetch)).await?;
        let make = async {
            let made = engine.make(&fetched, &machine).await?;
            if let Place::At(provider) = place {
                provider.fetch_made(request, &made.assembled.disk).await?;
            }
            Ok::<_, BuildError>(made)
        };
        let made = self.stage(Stage::Install, Box::pin(make)).await;
        let made = made.inspect_err(|error| {
            if let BuildError::ImageBuilder(error) = error {
                self.stage = error.stage().unwrap_or(self.stage);
            }
        });
        // However Packer ended: the machine is of no use any more, and may have been left.
        let made = match place {
            Place::At(provider) => without_leftovers(request, provider, made).await?,
            Place::Here(_) => made?,
        };
        self.stage_seconds.remove(&Stage::Install);
        for (stage, took) in made.took {
            *self.stage_seconds.entry(stage).or_default() += (took.as_secs_f64() * 10.0).round() / 10.0;
        }
        let url = match &request.base {
            Base::Archive(archive) => Some(archive.url.clone()),
            Base::Recipe | Base::PrismImage(_) => None,
        };
        Ok((made.assembled, url, made.base_digest))
    }
}

/// What Packer made, once nothing else of it is at the provider. What can not be removed is told.
async fn without_leftovers<T>(
    request: &BuildRequest,
    provider: &Provider,
    made: Result<T, BuildError>,
) -> Result<T, BuildError> {
    let limit = if made.is_ok() { LONG_CLEAN_UP } else { SHORT_CLEAN_UP };
    let cleaned = tokio::time::timeout(limit, provider.clean_up(request, false)).await;
    let left = match cleaned {
        Ok(Ok(())) => return made,
        Ok(Err(error)) => error,
        Err(_) => BuildError::StillCleaning { build_id: request.identity.build_id.clone(), limit },
    };
    match made {
        Ok(_) => Err(left),
        Err(cause) => Err(BuildError::LeftBehind { cause: Box::new(cause), left: Box::new(left) }),
    }
}

/// The file for the targets. What goes into a person's directory is raw where Prism Central gets qcow2: as the EKS Anywhere
/// tool exports it.
fn exported(source: &ImageSource, request: &BuildRequest) -> ImageSource {
    let for_person = request.publish.iter().any(|target| matches!(target, PublishTarget::Directory { .. }));
    match source.format() {
        Format::Qcow2 if for_person => ImageSource::new(source.disk(), &request.image_stem(), Format::Raw),
        _ => source.clone(),
    }
}

/// What was published: in the provider, else at the first target.
fn image_report(
    source: &ImageSource,
    file: &ImageSource,
    provided: Option<Provided>,
    published: Vec<Published>,
    base_digest: Option<String>,
) -> Option<ImageReport> {
    let first = published.first().map(|one| one.summary.clone());
    let format = if first.is_some() { file.format() } else { source.format() };
    let (name, vsphere, uuid, summary) = match provided {
        // The file is that of a target where there is one, else what the provider got.
        Some(provided) => (provided.name, provided.vsphere, provided.uuid, first.unwrap_or(provided.summary)),
        None => (file.file_name().to_owned(), None, None, first?),
    };
    let mut urls = published.into_iter().map(|one| one.url);
    Some(ImageReport {
        name,
        format: format.as_str().to_owned(),
        url: urls.next(),
        additional_urls: urls.collect(),
        size: summary.size,
        virtual_size: summary.virtual_size,
        sha256: summary.sha256,
        vsphere,
        uuid,
        base_digest,
        sbom: None,
        provenance: None,
    })
}
