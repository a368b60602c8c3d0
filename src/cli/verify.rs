//! `image-builder verify`: boots an image, wherever it came from, and prints what it says of itself.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;

use crate::{
    contract::{Accelerator, Firmware, Os, OsName, Provider},
    native::{
        accelerator,
        guest::Guest,
        image_contract::{Expected, GuestReport},
    },
    package,
    process::Runner,
    secret::Redactor,
};

/// Boots an image in QEMU and prints what is in it and which promises of the image contract it keeps.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The image: a raw disk, plain or compressed by gzip. It is not changed.
    image: PathBuf,
    /// Operating system of the image.
    #[arg(long, value_enum)]
    os: OsArg,
    /// Its version, e.g. 22.04.
    #[arg(long)]
    os_version: String,
    /// What the image is for.
    #[arg(long, value_enum, default_value = "baremetal")]
    provider: ProviderArg,
    /// How it is started; default is `efi` for bare metal and `bios` for vSphere and Nutanix.
    #[arg(long, value_enum)]
    firmware: Option<FirmwareArg>,
    /// Take KVM only, and fail where it runs no guest.
    #[arg(long)]
    require_kvm: bool,
    /// Longest time the image may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// Directory for the unpacked disk; needs room for its data.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    work_dir: PathBuf,
}

/// [`OsName`] as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OsArg {
    Ubuntu,
    Debian,
}

impl From<OsArg> for OsName {
    fn from(os: OsArg) -> Self {
        match os {
            OsArg::Ubuntu => Self::Ubuntu,
            OsArg::Debian => Self::Debian,
        }
    }
}

/// [`Provider`] as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProviderArg {
    Baremetal,
    Vsphere,
    Nutanix,
}

impl From<ProviderArg> for Provider {
    fn from(provider: ProviderArg) -> Self {
        match provider {
            ProviderArg::Baremetal => Self::Baremetal,
            ProviderArg::Vsphere => Self::Vsphere,
            ProviderArg::Nutanix => Self::Nutanix,
        }
    }
}

/// [`Firmware`] as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum FirmwareArg {
    Bios,
    Efi,
}

impl From<FirmwareArg> for Firmware {
    fn from(firmware: FirmwareArg) -> Self {
        match firmware {
            FirmwareArg::Bios => Self::Bios,
            FirmwareArg::Efi => Self::Efi,
        }
    }
}

pub(super) fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let work = tempfile::Builder::new()
        .prefix("image-builder-verify-")
        .tempdir_in(&args.work_dir)
        .with_context(|| format!("can not make a directory in {}", args.work_dir.display()))?;
    let disk = work.path().join("disk.raw");
    package::unpack(&args.image, &disk).with_context(|| format!("can not unpack {}", args.image.display()))?;
    let program = std::env::current_exe().context("can not find this program's own file")?;
    let expected = Expected {
        os: Os { name: args.os.into(), version: args.os_version.clone() },
        provider: args.provider.into(),
        firmware: args.firmware.map_or_else(
            || if matches!(args.provider, ProviderArg::Baremetal) { Firmware::Efi } else { Firmware::Bios },
            Firmware::from,
        ),
        release: None,
        images: vec![],
        packages: vec![],
        upstream: false,
    };
    let runner = Runner::new(Redactor::default(), CancellationToken::new());
    let accelerator = if args.require_kvm { Accelerator::Kvm } else { Accelerator::Any };
    let booted = tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let virtualization = accelerator::probe(accelerator, work.path(), &runner).await?;
        let guest = Guest {
            disk: &disk,
            scratch: &work.path().join("guest"),
            program: &program,
            expected: &expected,
            virtualization,
            limit: Duration::from_secs(args.timeout),
        };
        anyhow::Ok(guest.boot(&runner).await?)
    })?;
    let GuestReport { kernel, containerd, kubelet, results } = &booted.report;
    let mut out = io::stdout().lock();
    writeln!(out, "kernel      {kernel}\ncontainerd  {containerd}\nkubelet     {kubelet}")?;
    for result in results {
        match &result.failure {
            None => writeln!(out, "ok          {}", result.id)?,
            Some(failure) => writeln!(out, "FAILED      {}: {failure}", result.id)?,
        }
    }
    writeln!(out, "{}", booted.summary())?;
    let failed = booted.report.failures().count();
    if failed > 0 {
        bail!("the image does not keep {failed} of {} promises", results.len());
    }
    Ok(())
}
