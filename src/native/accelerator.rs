//! What runs a guest: KVM where it really does, else software emulation.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    time::Duration,
};

use crate::{
    contract::{Accelerator, Classified, FailureClass},
    process::{CommandSpec, ProcessError, Runner},
};

/// The emulator; Debian's name for it.
pub const QEMU: &str = "qemu-system-x86_64";
/// KVM's device on a node.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// A guest of a few instructions needs no longer, on a machine that does much else.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// What the probe guest writes to the debug port; QEMU ends with twice this plus one.
const PROBE_VALUE: u8 = 0x10;
const PROBE_EXIT: i32 = PROBE_VALUE as i32 * 2 + 1;

/// How a guest is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Virtualization {
    Kvm,
    Software,
}

impl Virtualization {
    /// Arguments for QEMU.
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Software => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Software => "software emulation",
        }
    }
}

/// Why no guest can be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum AcceleratorError {
    #[error(
        "no guest runs under KVM on this node ({why}); use a node with KVM (spec.build.nodeSelector), or write Any for \
         spec.verify.accelerator"
    )]
    NoKvm { why: String },
    #[error("can not write the probe guest")]
    Probe { source: io::Error },
    #[error("can not run the emulator")]
    Emulator { source: ProcessError },
}

impl Classified for AcceleratorError {
    fn class(&self) -> FailureClass {
        match self {
            Self::NoKvm { .. } | Self::Probe { .. } => FailureClass::Environment,
            Self::Emulator { source } => source.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::NoKvm { .. } => "KvmUnavailable",
            Self::Probe { .. } => "WorkDirectoryUnusable",
            Self::Emulator { source } => source.reason(),
        }
    }
}

/// Finds out what runs a guest here. A device node says nothing: on machines that are virtual themselves KVM may be
/// there and start no guest. So a guest is run, in `scratch`.
pub async fn probe(wanted: Accelerator, scratch: &Path, runner: &Runner) -> Result<Virtualization, AcceleratorError> {
    let Some(why) = kvm_failure(scratch, runner).await? else { return Ok(Virtualization::Kvm) };
    match wanted {
        Accelerator::Any => {
            tracing::info!(why, "KVM runs no guest here; the image is booted in software, which is slower");
            Ok(Virtualization::Software)
        }
        Accelerator::Kvm => Err(AcceleratorError::NoKvm { why }),
    }
}

/// Why KVM runs no guest, if it does not; found out by running one, in `scratch`.
pub async fn kvm_failure(scratch: &Path, runner: &Runner) -> Result<Option<String>, AcceleratorError> {
    if let Err(error) = open_kvm() {
        return Ok(Some(not_opened(&error)));
    }
    let mut firmware = tempfile::Builder::new()
        .prefix("probe-")
        .tempfile_in(scratch)
        .map_err(|source| AcceleratorError::Probe { source })?;
    firmware.write_all(&probe_firmware()).map_err(|source| AcceleratorError::Probe { source })?;
    let spec = CommandSpec::new(QEMU)
        .args(["-machine", "pc", "-m", "16", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(Virtualization::Kvm.arguments())
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(firmware.path())
        .timeout(PROBE_TIMEOUT);
    match runner.run(spec).await {
        Err(ProcessError::Failed { code: Some(PROBE_EXIT), .. }) => Ok(None),
        Err(ProcessError::Failed { output, status, .. }) => {
            let last = output.lines().last().unwrap_or_default().trim();
            Ok(Some(if last.is_empty() { status } else { last.to_owned() }))
        }
        Err(ProcessError::TimedOut { .. }) => Ok(Some("the probe guest hung".to_owned())),
        Err(source) => Err(AcceleratorError::Emulator { source }),
        Ok(_) => Ok(Some("the probe guest ended without an answer".to_owned())),
    }
}

/// Opens KVM's device as QEMU does.
pub fn open_kvm() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(KVM_DEVICE)
}

/// Why there is no use in a guest.
fn not_opened(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("there is no {KVM_DEVICE}"),
        io::ErrorKind::PermissionDenied => format!(
            "{KVM_DEVICE} can not be opened: {error}; for pods that have a user namespace it has to be open to everybody on \
             the node, mode 0666"
        ),
        _ => format!("{KVM_DEVICE} can not be opened: {error}"),
    }
}

/// A firmware of 64 KiB that starts at the reset vector, writes [`PROBE_VALUE`] to the debug port and halts.
fn probe_firmware() -> Vec<u8> {
    const HALT: u8 = 0xf4;
    // mov dx, 0xf4; mov al, PROBE_VALUE; out dx, al; hlt
    let code = [0xba, 0xf4, 0x00, 0xb0, PROBE_VALUE, 0xee, HALT];
    // jmp f000:0000
    let reset = [0xea, 0x00, 0x00, 0x00, 0xf0];
    let mut firmware = vec![HALT; 0x10000];
    firmware[..code.len()].copy_from_slice(&code);
    firmware[0xfff0..0xfff0 + reset.len()].copy_from_slice(&reset);
    firmware
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::secret::Redactor;

    /// The probe guest itself works: software runs it everywhere.
    #[tokio::test]
    async fn the_probe_guest_answers() {
        let mut firmware = tempfile::NamedTempFile::new().unwrap();
        firmware.write_all(&probe_firmware()).unwrap();
        let spec = CommandSpec::new(QEMU)
            .args(["-machine", "pc", "-m", "16", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(Virtualization::Software.arguments())
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
            .arg(firmware.path())
            .timeout(PROBE_TIMEOUT);
        let runner = Runner::new(Redactor::default(), CancellationToken::new());
        let error = runner.run(spec).await.unwrap_err();
        assert!(matches!(error, ProcessError::Failed { code: Some(PROBE_EXIT), .. }), "{error}");
    }

    #[test]
    fn says_why_the_device_can_not_be_opened() {
        for (kind, said) in [
            (io::ErrorKind::NotFound, "there is no /dev/kvm"),
            (io::ErrorKind::PermissionDenied, "mode 0666"),
            (io::ErrorKind::ResourceBusy, "/dev/kvm can not be opened: resource busy"),
        ] {
            let told = not_opened(&kind.into());
            assert!(told.contains(said), "{told}");
        }
    }

    #[tokio::test]
    async fn without_kvm_software_is_used_or_the_build_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runner = Runner::new(Redactor::default(), CancellationToken::new());
        let kvm_runs = kvm_failure(dir.path(), &runner).await.unwrap().is_none();
        let any = probe(Accelerator::Any, dir.path(), &runner).await.unwrap();
        assert_eq!(any == Virtualization::Kvm, kvm_runs);
        match probe(Accelerator::Kvm, dir.path(), &runner).await {
            Ok(found) => assert_eq!(found, Virtualization::Kvm),
            Err(error) => {
                assert!(!kvm_runs && error.reason() == "KvmUnavailable", "{error}");
                assert!(error.to_string().contains("accelerator"), "{error}");
            }
        }
    }
}
