//! Boots a finished disk in QEMU and lets it check itself.
//!
//! The disk is opened as a throw-away snapshot: what is published was never written to. A second, small disk with a
//! `NoCloud` seed brings this program and the expectations in; cloud-init of the image starts it, as it would start a
//! node's own user data, and it writes its report to the second serial port.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use super::{
    accelerator::{QEMU, Virtualization},
    image_contract::{Expected, GuestReport},
};
use crate::{
    contract::{Classified, FailureClass, Firmware},
    process::{CommandSpec, ProcessError, Runner},
};

/// Console lines that a failure shows.
const SHOWN_LINES: usize = 12;
/// How systemd marks what failed on the console.
const FAILED: [&str; 4] = ["[FAILED]", "[ TIME ]", "[DEPEND]", "Timed out waiting for"];
/// A kernel says something within this time, also in software; one that does not never will.
const SIGN_OF_LIFE: Duration = Duration::from_secs(180);
/// Memory of the guest in MiB, as of upstream's build machine.
const MEMORY_MIB: &str = "2048";
/// What the seed disk is called; cloud-init looks for this name.
const SEED_LABEL: [u8; 11] = *b"CIDATA     ";
/// UEFI firmware and its variables, as distributions place them.
const FIRMWARE: &[(&str, &str)] = &[
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];

/// What the guest's cloud-init is told. The checks run beside its last stage, not in it: they wait for the end of the
/// start, which waits for that stage.
const USER_DATA: &str = "#cloud-config\nruncmd:\n  - [systemd-run, --no-block, --unit=image-builder-checks, /bin/sh, -c, \
    \"mkdir -p /run/image-builder && mount -o ro /dev/disk/by-label/CIDATA /run/image-builder && exec \
    /run/image-builder/image-builder guest-checks --expected /run/image-builder/expected.json --report /dev/ttyS1\"]\n";
const META_DATA: &str = "instance-id: image-builder-verification\nlocal-hostname: verification\n";

/// Why an image did not pass.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("can not write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("there is no UEFI firmware for QEMU here (looked for {looked}); install the package ovmf")]
    NoFirmware { looked: String },
    #[error("the emulator did not run the image")]
    Emulator { source: ProcessError },
    #[error("the image's kernel panicked while it started: {console}")]
    Panic { console: String },
    #[error("the image ended in an emergency shell while it started: {console}")]
    Emergency { console: String },
    #[error("the image's kernel gave no sign of life in {} s: {console}", .waited.as_secs())]
    Silent { waited: Duration, console: String },
    #[error(
        "the image did not start within {} s; raise spec.verify.timeoutSeconds if the node is only slow. Its console ends \
         with: {console}", .limit.as_secs()
    )]
    TimedOut { limit: Duration, console: String },
    #[error("the image started and stopped without a report of its checks; its console ends with: {console}")]
    NoReport { console: String },
    #[error("the started image does not keep {count} of its promises: {failed}")]
    Checks { count: usize, failed: String },
}

impl Classified for GuestError {
    fn class(&self) -> FailureClass {
        match self {
            Self::Write { .. } | Self::NoFirmware { .. } => FailureClass::Environment,
            Self::Emulator { source } => source.class(),
            // Another attempt makes the same image.
            Self::Panic { .. } | Self::Emergency { .. } | Self::NoReport { .. } | Self::Checks { .. } => {
                FailureClass::BadInput
            }
            Self::Silent { .. } | Self::TimedOut { .. } => FailureClass::Transient,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Write { .. } => "WorkDirectoryUnusable",
            Self::NoFirmware { .. } => "ToolMissing",
            Self::Emulator { source } => source.reason(),
            Self::Panic { .. } => "KernelPanic",
            Self::Emergency { .. } => "EmergencyShell",
            Self::Silent { .. } | Self::NoReport { .. } => "BootFailed",
            Self::TimedOut { .. } => "BootTimedOut",
            Self::Checks { .. } => "ChecksFailed",
        }
    }
}

/// A guest to be run.
#[derive(Debug)]
pub struct Guest<'g> {
    /// The raw disk.
    pub disk: &'g Path,
    /// A directory for the seed, firmware variables and the snapshot; what is written there stays until it is removed.
    pub scratch: &'g Path,
    /// This program, as it runs in the guest.
    pub program: &'g Path,
    pub expected: &'g Expected,
    pub virtualization: Virtualization,
    pub limit: Duration,
}

/// An image that started and kept its promises.
#[derive(Clone, Debug)]
pub struct Booted {
    pub virtualization: Virtualization,
    pub took: Duration,
    pub report: GuestReport,
}

impl Booted {
    /// For the status.
    pub fn summary(&self) -> String {
        let Self { virtualization, took, report } = self;
        format!("booted with {} in {} s; {} checks passed", virtualization.name(), took.as_secs(), report.results.len())
    }
}

impl Guest<'_> {
    /// Boots the disk and judges the report.
    pub async fn verify(&self, runner: &Runner) -> Result<Booted, GuestError> {
        let booted = self.boot(runner).await?;
        let failed: Vec<_> = booted.report.failures().map(|(id, detail)| format!("{id} ({detail})")).collect();
        if failed.is_empty() {
            return Ok(booted);
        }
        Err(GuestError::Checks { count: failed.len(), failed: failed.join("; ") })
    }

    /// Boots the disk until it has reported.
    pub async fn boot(&self, runner: &Runner) -> Result<Booted, GuestError> {
        let write = |path: &Path, source| GuestError::Write { path: path.to_owned(), source };
        fs::create_dir_all(self.scratch).map_err(|source| write(self.scratch, source))?;
        let seed = self.seed()?;
        let report = self.scratch.join("report");
        let spec = self.command(&seed, &report)?;

        let console = Console::default();
        let begin = Instant::now();
        let run = runner.run_watched(spec, |line| console.see(line));
        let result = tokio::select! {
            result = run => result,
            event = console.fatal() => return Err(event),
            waited = console.silence() => return Err(GuestError::Silent { waited, console: console.last() }),
        };
        match result {
            Ok(_) => {}
            Err(ProcessError::TimedOut { .. }) => {
                return Err(GuestError::TimedOut { limit: self.limit, console: console.last() });
            }
            Err(source) => return Err(GuestError::Emulator { source }),
        }
        let text = fs::read_to_string(&report).map_err(|source| write(&report, source))?;
        let report = GuestReport::find(&text).ok_or_else(|| GuestError::NoReport { console: console.last() })?;
        Ok(Booted { virtualization: self.virtualization, took: begin.elapsed(), report })
    }

    /// A FAT file system with what cloud-init reads, this program and its expectations.
    fn seed(&self) -> Result<PathBuf, GuestError> {
        let seed = self.scratch.join("seed.img");
        let make = || {
            let size = (fs::metadata(self.program)?.len() + (8 << 20)).next_multiple_of(1 << 20);
            let mut image = fs::File::options().create(true).truncate(true).read(true).write(true).open(&seed)?;
            image.set_len(size)?;
            fatfs::format_volume(&mut image, FormatVolumeOptions::new().volume_label(SEED_LABEL))?;
            let volume = FileSystem::new(image, FsOptions::new())?;
            let root = volume.root_dir();
            root.create_file("user-data")?.write_all(USER_DATA.as_bytes())?;
            root.create_file("meta-data")?.write_all(META_DATA.as_bytes())?;
            root.create_file("expected.json")?.write_all(&serde_json::to_vec(self.expected)?)?;
            io::copy(&mut fs::File::open(self.program)?, &mut root.create_file("image-builder")?)?;
            drop(root);
            volume.unmount()
        };
        make().map_err(|source| GuestError::Write { path: seed.clone(), source })?;
        Ok(seed)
    }

    fn command(&self, seed: &Path, report: &Path) -> Result<CommandSpec, GuestError> {
        let drive = |file: &Path, rest: &str| format!("file={},{rest}", file.display().to_string().replace(',', ",,"));
        let processors = std::thread::available_parallelism().map_or(1, usize::from).min(4).to_string();
        let mut command = CommandSpec::new(QEMU)
            .args(["-machine", "q35", "-m", MEMORY_MIB, "-smp", &processors])
            .args(self.virtualization.arguments())
            .args(["-nodefaults", "-display", "none", "-no-reboot"]);
        // QEMU's own firmware is a BIOS.
        if self.expected.firmware == Firmware::Efi {
            let (code, variables) = self.firmware()?;
            command = command
                .arg("-drive")
                .arg(drive(&code, "if=pflash,format=raw,unit=0,readonly=on"))
                .arg("-drive")
                .arg(drive(&variables, "if=pflash,format=raw,unit=1"));
        }
        Ok(command
            .args(["-device", "virtio-scsi-pci"])
            .arg("-drive")
            .arg(drive(self.disk, "if=none,id=disk,format=raw,snapshot=on,cache=unsafe"))
            .args(["-device", "scsi-hd,drive=disk,bootindex=0"])
            .arg("-drive")
            .arg(drive(seed, "if=none,id=seed,format=raw,readonly=on"))
            .args(["-device", "scsi-hd,drive=seed"])
            // An address for the interface, and no way out.
            .args(["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"])
            .args(["-device", "virtio-rng-pci"])
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-serial"])
            .arg(format!("file:{}", report.display()))
            // The snapshot is a file there.
            .env("TMPDIR", self.scratch)
            .timeout(self.limit))
    }

    /// The firmware, and a copy of its variables that the guest may write.
    fn firmware(&self) -> Result<(PathBuf, PathBuf), GuestError> {
        let Some((code, variables)) = FIRMWARE.iter().find(|(code, _)| Path::new(code).exists()) else {
            let looked = FIRMWARE.iter().map(|(code, _)| *code).collect::<Vec<_>>().join(", ");
            return Err(GuestError::NoFirmware { looked });
        };
        let own = self.scratch.join("variables.fd");
        fs::copy(variables, &own).map_err(|source| GuestError::Write { path: own.clone(), source })?;
        Ok((PathBuf::from(code), own))
    }
}

/// What the guest's console has said so far.
#[derive(Debug, Default)]
struct Console {
    state: Mutex<ConsoleState>,
    news: tokio::sync::Notify,
}

#[derive(Debug, Default)]
struct ConsoleState {
    lines: VecDeque<String>,
    /// The first lines that speak of a failure.
    failures: Vec<String>,
    kernel_started: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Panic,
    Emergency,
}

impl Console {
    fn see(&self, line: &str) {
        let line = printable(line);
        if line.is_empty() {
            return;
        }
        let Ok(mut state) = self.state.lock() else { return };
        state.kernel_started |= line.contains("Linux version ");
        if state.end.is_none() {
            state.end = end_of(&line);
        }
        if state.failures.len() < SHOWN_LINES && FAILED.iter().any(|text| line.contains(text)) {
            state.failures.push(line.clone());
        }
        if state.lines.len() == SHOWN_LINES {
            state.lines.pop_front();
        }
        state.lines.push_back(line);
        self.news.notify_one();
    }

    /// What failed, and the last lines.
    fn last(&self) -> String {
        let Ok(state) = self.state.lock() else { return String::new() };
        let failures = state.failures.iter().filter(|line| !state.lines.contains(line));
        failures.chain(&state.lines).cloned().collect::<Vec<_>>().join(" | ")
    }

    /// Resolves when the console tells that the guest will not get any further.
    async fn fatal(&self) -> GuestError {
        loop {
            self.news.notified().await;
            let end = self.state.lock().ok().and_then(|state| state.end);
            if let Some(end) = end {
                let console = self.last();
                return match end {
                    End::Panic => GuestError::Panic { console },
                    End::Emergency => GuestError::Emergency { console },
                };
            }
        }
    }

    /// Resolves when no kernel has started in time.
    async fn silence(&self) -> Duration {
        tokio::time::sleep(SIGN_OF_LIFE).await;
        if self.state.lock().is_ok_and(|state| state.kernel_started) {
            std::future::pending::<()>().await;
        }
        SIGN_OF_LIFE
    }
}

/// A line without what moves the cursor and colours text.
fn printable(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '\u{1b}' => {
                // Up to the letter that ends the sequence.
                if characters.next() == Some('[') {
                    characters.by_ref().find(char::is_ascii_alphabetic);
                }
            }
            character if character.is_control() => {}
            character => text.push(character),
        }
    }
    text.trim().to_owned()
}

/// What the line says about the guest's end.
fn end_of(line: &str) -> Option<End> {
    const EMERGENCY: &[&str] = &[
        "You are in emergency mode",
        "Entering emergency mode",
        "(initramfs)",
        "Dropping to a shell",
        "Cannot open access to console",
    ];
    if line.contains("Kernel panic - not syncing") {
        Some(End::Panic)
    } else if EMERGENCY.iter().any(|text| line.contains(text)) {
        Some(End::Emergency)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs", Some(End::Panic))]
    #[case("You are in emergency mode. After logging in, type \"journalctl -xb\"", Some(End::Emergency))]
    #[case("(initramfs) ", Some(End::Emergency))]
    #[case("[  OK  ] Reached target multi-user.target", None)]
    fn the_console_tells_how_a_guest_ended(#[case] line: &str, #[case] end: Option<End>) {
        assert_eq!(end_of(line), end);
    }

    #[test]
    fn console_lines_lose_colours_and_cursor_movements() {
        assert_eq!(printable("\u{1b}[0;32m  OK  \u{1b}[0m] Started \u{1b}[2J\u{1b}[01;01Hx\r"), "OK  ] Started x");
    }

    #[tokio::test]
    async fn an_end_is_noticed_at_once_and_told_with_the_last_lines() {
        let console = Console::default();
        console.see("[ TIME ] Timed out waiting for device x");
        for number in 0..20 {
            console.see(&format!("line {number}"));
        }
        console.see("Kernel panic - not syncing: x");
        assert!(console.last().starts_with("[ TIME ] Timed out waiting for device x | line 9 |"), "{}", console.last());
        let error = tokio::time::timeout(Duration::from_secs(5), console.fatal()).await.unwrap();
        assert_eq!(error.reason(), "KernelPanic");
        assert!(error.to_string().contains("line 19 | Kernel panic"), "{error}");
        assert!(!error.to_string().contains("line 3 "), "{error}");
    }
}
