//! The engine `Native`: assembles an image from a root file system. No installer, no SSH, no virtual machine to build in.
//!
//! [`Native`] is one build's engine; its methods are the stages, in their order. What each stage does is in a module of
//! its own: the base (`rootfs`, or a disk image: `source`), its `packages` (those of Red Hat with a `subscription`), the
//! release's `artifacts` and container `images`, the
//! `settings` of the image contract, the resource's `files`, `seal`ing, the `bootloader` and the `disk`; then
//! the [`image_contract`] is checked in the tree and in a booted [`guest`].

pub mod accelerator;
mod artifacts;
pub(crate) mod bolt;
mod bootloader;
mod chroot;
mod disk;
mod dnf;
mod epoch;
mod error;
mod ext4;
mod files;
pub mod guest;
pub mod image_contract;
mod images;
mod packages;
mod rootfs;
#[cfg(test)]
pub(crate) mod sample;
mod seal;
mod settings;
pub(crate) mod source;
mod subscription;
pub mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

pub use artifacts::Fetched;
pub use error::NativeError;
pub(crate) use image_contract::sha256;
pub use packages::InstalledPackage;
pub(crate) use packages::installed;

use self::{
    accelerator::Virtualization,
    chroot::Chroot,
    disk::{Contents, DiskIds, Layout},
    guest::{Booted, Guest, GuestError},
    image_contract::{Expected, Level, Subject},
    settings::Unit,
    subscription::Registration,
    tree::within,
};
use crate::{
    contract::{Accelerator, BuildRequest, Firmware, OsName, Provider, Stage},
    error::Chain,
    process::Runner,
    progress::Reporter,
    secret::Credentials,
};

/// The build's name servers: those of its machine.
const HOST_RESOLVER: &str = "/etc/resolv.conf";

/// One build.
#[derive(Debug)]
pub struct Native<'b> {
    request: &'b BuildRequest,
    runner: Runner,
    reporter: Reporter,
    credentials: Credentials,
    /// A directory that the build has for itself.
    dir: PathBuf,
    ids: DiskIds,
}

/// What an image starts from, where it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Base {
    /// The archive of a root file system.
    Archive(PathBuf),
    /// A disk image with a system in it. It is used up.
    Disk(PathBuf),
}

/// A tree that everything is installed in.
#[derive(Debug)]
pub struct Installed {
    images: Vec<String>,
    packages: Vec<InstalledPackage>,
    /// When the build began to write it.
    begin: SystemTime,
}

/// A tree that is ready to become a disk.
#[derive(Debug)]
pub struct Sealed {
    expected: Expected,
    packages: Vec<InstalledPackage>,
    epoch: u32,
}

/// A disk that is ready to be published.
#[derive(Debug)]
pub struct Assembled {
    pub disk: PathBuf,
    /// Everything its package manager knows, sorted by name.
    pub packages: Vec<InstalledPackage>,
    expected: Expected,
}

impl Assembled {
    /// A disk that another engine made.
    pub fn new(disk: PathBuf, packages: Vec<InstalledPackage>, expected: Expected) -> Self {
        Self { disk, packages, expected }
    }

    /// Names of the container images in it.
    pub fn images(&self) -> &[String] {
        &self.expected.images
    }
}

impl<'b> Native<'b> {
    /// An engine that works in `dir`.
    pub fn new(
        request: &'b BuildRequest,
        dir: &Path,
        runner: Runner,
        reporter: Reporter,
        credentials: Credentials,
    ) -> Self {
        Self { request, runner, reporter, credentials, dir: dir.to_owned(), ids: DiskIds::new(request) }
    }

    /// Refuses what this engine does not make.
    pub fn check(&self) -> Result<(), NativeError> {
        let BuildRequest { os, provider, firmware, .. } = self.request;
        // What EKS Anywhere makes (eksa-facts 1.3): Tinkerbell's machines start by UEFI, but for Red Hat 8, which does so
        // nowhere; those of Nutanix by BIOS; vSphere takes both.
        let redhat_8 = os.name == OsName::Redhat && os.version == "8";
        let firmware_fits = match (provider, firmware) {
            (Provider::Baremetal | Provider::Vsphere, Firmware::Efi) => !redhat_8,
            (Provider::Baremetal, Firmware::Bios) => redhat_8,
            (Provider::Vsphere | Provider::Nutanix, Firmware::Bios) => true,
            (Provider::Nutanix, Firmware::Efi) => false,
        };
        if firmware_fits {
            Ok(())
        } else {
            Err(NativeError::Unsupported { os: os.name, provider: *provider, firmware: *firmware })
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn install_progress(&self, share: f64, message: &str) {
        self.reporter.report(Stage::Install, share, message);
    }

    /// Installs everything in a tree. `fetched_dir` is the directory that holds all of `fetched`.
    pub async fn install(&self, base: &Base, fetched: &Fetched, fetched_dir: &Path) -> Result<Installed, NativeError> {
        let root = self.root();
        let begin = SystemTime::now();
        match base {
            Base::Archive(archive) => {
                self.install_progress(0.0, "unpacking the base");
                rootfs::unpack(archive, &root, &self.runner).await?;
            }
            Base::Disk(image) => {
                self.install_progress(0.0, "unpacking the source image");
                source::unpack(image, &root, &self.runner).await?;
            }
        }
        rootfs::check(&root, &self.request.os)?;

        let authorities = self.authorities()?;
        let resolver = fs::read_to_string(HOST_RESOLVER).unwrap_or_default();
        let epoch = self.newest(begin)?;
        let chroot = Chroot::enter(&root, fetched_dir, &self.request.proxy, epoch, self.runner.clone())?;
        within(&root, |tree| seal::lend_resolver(tree, &resolver))??;
        let os = self.request.os.name;
        packages::prepare(&root, os, &self.request.packages, authorities.as_deref())?;
        let mut registration = Registration::new(&self.request.identity);
        let installed = self.install_packages(&chroot, &mut registration, authorities.is_some()).await;
        let given_back = registration.give_back(&chroot).await;
        if let (Err(_), Err(error)) = (&installed, &given_back) {
            // The first failure is the one to be reported.
            tracing::error!("{}", Chain(error));
        }
        installed?;
        given_back?;

        self.install_progress(0.62, "installing Kubernetes, containerd and their tools");
        let artifacts = fetched.open()?;
        within(&root, |tree| artifacts::install(tree, artifacts, &self.request.release))??;
        self.install_progress(0.68, "loading container images");
        let images = images::preload(&chroot, &fetched.images, &self.request.release).await?;

        self.install_progress(0.9, "writing settings");
        within(&root, |tree| settings::write(tree, self.request))??;
        self.complete_shells(&chroot).await?;
        self.switch_units(&chroot).await?;
        let files = files::load(&self.request.files)?;
        within(&root, |tree| files::install(tree, &files))??;
        packages::finish(&chroot, os).await?;
        let packages = packages::list(&chroot, os).await?;
        let esp = match self.request.firmware {
            Firmware::Efi => Some(self.ids.esp_label()),
            Firmware::Bios => {
                bootloader::install_bios(&chroot, os).await?;
                None
            }
        };
        within(&root, |tree| bootloader::configure(tree, os, self.ids.root, esp.as_deref()))??;
        chroot.leave()?;
        Ok(Installed { images, packages, begin })
    }

    /// Installs updates, the recipe's packages and the resource's, with the subscription where there is one.
    async fn install_packages(
        &self,
        chroot: &Chroot,
        registration: &mut Registration,
        authorities: bool,
    ) -> Result<(), NativeError> {
        let BuildRequest { os, provider, firmware, packages, subscription, .. } = self.request;
        if let Some(subscription) = subscription {
            self.install_progress(0.08, "registering the system");
            registration.register(chroot, subscription, &self.credentials, authorities).await?;
        }
        if let Some(epel) = &packages.epel {
            self.install_progress(0.1, "setting Extra Packages for Enterprise Linux up");
            dnf::enable_epel(chroot, self.request, epel, authorities).await?;
        }
        let recipe = packages::recipe(os, *provider, *firmware);
        let wanted: Vec<_> = recipe.into_iter().chain(packages.install.iter().map(String::as_str)).collect();
        for (step, share) in packages::Step::ALL.into_iter().zip([0.12, 0.2, 0.3]) {
            self.install_progress(share, step.message());
            packages::run(chroot, self.request, step, &wanted, authorities).await?;
        }
        Ok(())
    }

    /// The newest time in the tree that is not the build's own, see [`epoch`].
    fn newest(&self, begin: SystemTime) -> Result<u32, NativeError> {
        let root = self.root();
        epoch::newest(&root, begin).map_err(|source| NativeError::Scratch { action: "read", path: root, source })
    }

    /// What the build trusts beside the system's own authorities.
    fn authorities(&self) -> Result<Option<String>, NativeError> {
        let Some(path) = &self.request.trust_bundle else { return Ok(None) };
        fs::read_to_string(path).map(Some).map_err(|source| NativeError::TrustBundle { path: path.clone(), source })
    }

    async fn complete_shells(&self, chroot: &Chroot) -> Result<(), NativeError> {
        for program in ["kubectl", "kubeadm", "crictl"] {
            let script = chroot.run(program, &["completion", "bash"]).await?.stdout;
            let path = format!("/usr/share/bash-completion/completions/{program}");
            within(chroot.root(), |tree| tree.write(&path, script, 0o644))??;
        }
        Ok(())
    }

    async fn switch_units(&self, chroot: &Chroot) -> Result<(), NativeError> {
        let (mut enable, mut mask) = (vec!["enable"], vec!["mask"]);
        for unit in settings::units(self.request.os.name, self.request.provider) {
            match unit {
                Unit::Enabled(names) => {
                    let there = within(chroot.root(), |tree| names.iter().find(|name| settings::has_unit(tree, name)))?;
                    enable.push(there.or(names.first()).copied().unwrap_or_default());
                }
                Unit::Masked(name) => mask.push(name),
            }
        }
        chroot.run("systemctl", &enable).await?;
        chroot.run("systemctl", &mask).await?;
        Ok(())
    }

    /// Takes out what belongs to the build, and checks the promises about files.
    pub fn seal(&self, installed: Installed) -> Result<Sealed, NativeError> {
        self.reporter.report(Stage::Seal, 0.0, "removing what belongs to the build");
        let root = self.root();
        within(&root, seal::seal)??;
        within(&root, images::forget_overlays)??;
        let epoch = self.newest(installed.begin)?;
        within(&root, |tree| images::settle(tree, epoch))??;
        let BuildRequest { os, provider, firmware, release, packages, .. } = self.request;
        let recipe = packages::recipe(os, *provider, *firmware).into_iter().map(str::to_owned);
        // `name=version` asks for a version; the name is what is installed. dnf takes what packages provide as well.
        let named = packages.install.iter().filter(|_| os.name != OsName::Redhat);
        let more = named.filter_map(|wish| wish.split(['=', '/']).next()).map(str::to_owned);
        let expected = Expected {
            os: os.clone(),
            provider: *provider,
            firmware: *firmware,
            release: Some(release.clone()),
            images: installed.images,
            packages: recipe.chain(more).collect(),
            upstream: false,
        };
        self.reporter.report(Stage::Seal, 0.5, "checking the image contract");
        let results =
            within(&root, |tree| image_contract::check(&Subject { tree, expected: &expected }, Level::Tree, None))?;
        let failed: Vec<_> =
            results.iter().filter_map(|result| Some(format!("{} ({})", result.id, result.failure.as_ref()?))).collect();
        if failed.is_empty() {
            return Ok(Sealed { expected, packages: installed.packages, epoch });
        }
        Err(NativeError::Contract { count: failed.len(), failed: failed.join("; ") })
    }

    /// Makes the disk.
    pub async fn assemble(&self, sealed: Sealed) -> Result<Assembled, NativeError> {
        self.reporter.report(Stage::Assemble, 0.0, "making the disk");
        let root = self.root();
        let (os, firmware, id) = (self.request.os.name, self.request.firmware, self.ids.root);
        let boot = within(&root, |tree| bootloader::boot_parts(tree, os, firmware, id))??;
        let disk = self.dir.join("disk.raw");
        let layout = Layout::new(self.request.disk_size_mib, firmware, os);
        let contents = Contents { root: &root, boot, ids: self.ids, epoch: sealed.epoch };
        disk::assemble(&contents, &disk, &self.dir, &layout, &self.runner).await?;
        // Room for the snapshot of the guest.
        fs::remove_dir_all(&root).map_err(|source| NativeError::Scratch { action: "remove", path: root, source })?;
        Ok(Assembled { disk, packages: sealed.packages, expected: sealed.expected })
    }

    /// Boots the disk and lets it check itself. `program` is this program.
    pub async fn verify(
        &self,
        assembled: &Assembled,
        virtualization: Virtualization,
        program: &Path,
    ) -> Result<Booted, NativeError> {
        let scratch = self.dir.join("guest");
        let mut guest = Guest {
            disk: &assembled.disk,
            scratch: &scratch,
            program,
            expected: &assembled.expected,
            virtualization,
            limit: Duration::from_secs(self.request.verify.timeout_seconds.into()),
        };
        let message = |virtualization: Virtualization| format!("booting the image with {}", virtualization.name());
        self.reporter.report(Stage::Verify, 0.0, message(virtualization));
        let mut booted = guest.verify(&self.runner).await;
        // The probe ran under KVM and this kernel did not: software decides whether the image or KVM is to blame.
        if matches!(booted, Err(GuestError::Silent { .. }))
            && virtualization == Virtualization::Kvm
            && self.request.verify.accelerator == Accelerator::Any
        {
            guest.virtualization = Virtualization::Software;
            self.reporter.report(Stage::Verify, 0.1, message(guest.virtualization));
            booted = guest.verify(&self.runner).await;
        }
        let booted = booted?;
        fs::remove_dir_all(&scratch).map_err(|source| NativeError::Scratch {
            action: "remove",
            path: scratch,
            source,
        })?;
        Ok(booted)
    }
}
