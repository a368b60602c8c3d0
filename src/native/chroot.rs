//! Runs programs of the image in the image: below its own root, with its own processes, and with what they need of
//! `/dev`, `/proc`, `/run` and `/sys` mounted for as long as the [`Chroot`] lives.
//!
//! The mounts are made in the mount namespace of the build's process, see decision 3: nobody else sees them, and they
//! go with the process however it ends.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::{FsFlags, statvfs},
};

use crate::{
    contract::{Classified, FailureClass, Proxy},
    process::{CommandSpec, Output, ProcessError, Runner},
};

/// Longest time for one program, so that a package script that waits for an answer does not hold a build for ever.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(45 * 60);
/// Device nodes that programs expect; they are the host's own, bound one by one.
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];
/// Where the build puts what only the build needs; a memory file system, so nothing of it can stay.
pub(super) const BUILD_DIR: &str = "/run/image-builder";
/// Where programs of the image find the files that were fetched.
pub(super) const FETCHED_DIR: &str = "/run/image-builder/fetched";

/// Why the image's root can not be entered.
#[derive(Debug, thiserror::Error)]
#[error("can not mount {} for the image; build as root, or in a privileged pod", .path.display())]
pub struct MountError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl Classified for MountError {
    fn class(&self) -> FailureClass {
        FailureClass::Environment
    }

    fn reason(&self) -> &'static str {
        "MountRefused"
    }
}

/// An image's root file system, ready to run its own programs. Dropping it takes the mounts away.
#[derive(Debug)]
pub(super) struct Chroot {
    root: PathBuf,
    runner: Runner,
    environment: Vec<(OsString, OsString)>,
    mounted: Vec<PathBuf>,
}

impl Chroot {
    /// Mounts what programs need. `fetched` is shown read-only at [`FETCHED_DIR`]; its files are named by digest.
    pub(super) fn enter(
        root: &Path,
        fetched: &Path,
        proxy: &Proxy,
        epoch: u32,
        runner: Runner,
    ) -> Result<Self, MountError> {
        let mut environment = vec![
            ("DEBIAN_FRONTEND".into(), "noninteractive".into()),
            ("HOME".into(), "/root".into()),
            // What programs write for the present time (reproducible-builds.org/specs/source-date-epoch).
            ("SOURCE_DATE_EPOCH".into(), epoch.to_string().into()),
            ("TMPDIR".into(), "/tmp".into()),
        ];
        environment.extend(proxy.environment());
        let mut chroot = Self { root: root.to_owned(), runner, environment, mounted: vec![] };
        chroot.mount_all(fetched)?;
        Ok(chroot)
    }

    fn mount_all(&mut self, fetched: &Path) -> Result<(), MountError> {
        let none = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        match self.mount("sysfs", "sys", Some("sysfs"), none | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY, None) {
            // Root of a user namespace may show what is mounted, and can not write there either.
            Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => {
                self.mount("/sys", "sys", None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
            }
            mounted => mounted?,
        }
        self.mount("tmpfs", "run", Some("tmpfs"), none, Some("mode=0755"))?;
        self.mount("tmpfs", "tmp", Some("tmpfs"), none, Some("mode=1777"))?;
        self.mount("tmpfs", "dev", Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=0755"))?;
        for device in DEVICES.iter().filter(|device| Path::new("/dev").join(device).exists()) {
            let node = self.root.join("dev").join(device);
            File::create(&node).map_err(|source| MountError { path: node.clone(), source })?;
            self.mount(&format!("/dev/{device}"), &format!("dev/{device}"), None, MsFlags::MS_BIND, None)?;
        }
        for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
            let link = self.root.join("dev").join(link);
            std::os::unix::fs::symlink(target, &link).map_err(|source| MountError { path: link, source })?;
        }
        let noexec = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        self.mount("devpts", "dev/pts", Some("devpts"), noexec, Some("newinstance,ptmxmode=0666,mode=0620"))?;
        self.mount("tmpfs", "dev/shm", Some("tmpfs"), none, Some("mode=1777"))?;
        let fetched = fetched.to_string_lossy().into_owned();
        let inside = FETCHED_DIR.trim_start_matches('/');
        self.mount(&fetched, inside, None, MsFlags::MS_BIND, None)?;
        self.remount_read_only(inside)
    }

    fn mount(
        &mut self,
        source: &str,
        inside: &str,
        kind: Option<&str>,
        flags: MsFlags,
        data: Option<&str>,
    ) -> Result<(), MountError> {
        let path = self.root.join(inside);
        let failed = |source: io::Error| MountError { path: path.clone(), source };
        if !path.exists() {
            fs::create_dir_all(&path).map_err(failed)?;
        }
        mount(Some(source), &path, kind, flags, data).map_err(|errno| failed(errno.into()))?;
        self.mounted.push(path);
        Ok(())
    }

    fn remount_read_only(&self, inside: &str) -> Result<(), MountError> {
        let path = self.root.join(inside);
        let remount = || {
            // What the file system is restricted by can not be taken away in a user namespace.
            let restrictions = statvfs(&path)?.flags();
            let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            for (restriction, flag) in [
                (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
                (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
                (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            ] {
                flags.set(flag, restrictions.contains(restriction));
            }
            mount(None::<&str>, &path, None::<&str>, flags, None::<&str>)
        };
        remount().map_err(|errno| MountError { path: path.clone(), source: errno.into() })
    }

    /// The root directory as this process sees it.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Runs a program of the image as process 1 of its own process namespace: whatever it starts ends with it.
    pub(super) async fn run(&self, program: &str, args: &[&str]) -> Result<Output, ProcessError> {
        self.start(&self.runner, self.command(program, args), program).await
    }

    /// As [`run`](Self::run), to the end also when the build is cancelled, for at most `limit`. `input` comes over standard
    /// input: no other process sees it.
    pub(super) async fn run_uncancelled(
        &self,
        program: &str,
        args: &[&str],
        input: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Output, ProcessError> {
        let mut spec = self.command(program, args).timeout(limit);
        spec.stdin = input;
        self.start(&self.runner.uncancelled(), spec, program).await
    }

    async fn start(&self, runner: &Runner, spec: CommandSpec, program: &str) -> Result<Output, ProcessError> {
        // What failed is the program, not what runs it.
        runner.run(spec).await.map_err(|error| error.on_behalf_of(program))
    }

    fn command(&self, program: &str, args: &[&str]) -> CommandSpec {
        let mut spec = CommandSpec::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc=/proc"])
            .arg("--root")
            .arg(&self.root)
            .arg("--")
            .arg(program)
            .args(args)
            .timeout(COMMAND_TIMEOUT);
        spec.env.clone_from(&self.environment);
        spec
    }

    /// Takes the mounts away. Only then may the tree be read as the image's content.
    pub(super) fn leave(mut self) -> Result<(), MountError> {
        self.unmount()
    }

    fn unmount(&mut self) -> Result<(), MountError> {
        while let Some(path) = self.mounted.pop() {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|errno| MountError { path, source: errno.into() })?;
        }
        Ok(())
    }
}

impl Drop for Chroot {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!("can not take a mount away: {}", crate::error::Chain(&error));
        }
    }
}
