//! A machine to build in that is none: this machine's own root below a layer in memory, with Debian's sshd in it (`dev/guest`).
//! What is done to it stays in it.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Password of the account `builder`.
pub const PASSWORD: &str = "guest's-own-password";

/// Everything in namespaces of its own: it is gone with its first process.
const SCRIPT: &str = r#"
set -e
cd "$1"
mount -t tmpfs -o size=256m tmpfs memory
mkdir memory/upper memory/work memory/root
# Layers may not be parts of each other.
cp -a "$2" memory/layer
mount -t overlay overlay -o lowerdir=memory/layer:/,upperdir=memory/upper,workdir=memory/work memory/root
cp -R --remove-destination seed/. memory/root/
mount --rbind /dev memory/root/dev
mount -t proc proc memory/root/proc
inside() { chroot memory/root "$@"; }
inside useradd --system --home-dir /run/sshd --shell /usr/sbin/nologin sshd 2>/dev/null || true
inside useradd --create-home --shell /bin/bash builder
inside chpasswd <account
echo 'builder ALL=(ALL) NOPASSWD:ALL' >memory/root/etc/sudoers.d/90-builder
# What the programs of this machine have there is theirs.
mount -t tmpfs -o mode=1777 tmp memory/root/tmp
mkdir -p memory/root/run/sshd memory/root/etc/keys
inside ssh-keygen -q -t ed25519 -N '' -f /etc/keys/host
exec chroot memory/root /usr/sbin/sshd -D -e -f /dev/null -h /etc/keys/host -p "$3" \
    -o ListenAddress=127.0.0.1 -o UsePAM=no -o PasswordAuthentication=yes
"#;

pub struct Guest {
    process: Child,
    pub port: u16,
}

impl Guest {
    /// `directory` is for it alone; its `seed`, if there is one, is copied over its root.
    pub fn start(directory: &Path) -> Self {
        for needed in ["memory", "seed"] {
            fs::create_dir_all(directory.join(needed)).unwrap();
        }
        fs::write(directory.join("account"), format!("builder:{PASSWORD}\n")).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut process = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--", "bash", "-c", SCRIPT, "guest"])
            .args([directory, &layer()])
            .arg(port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.join("log")).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let said = || fs::read_to_string(directory.join("log")).unwrap();
            assert!(process.try_wait().unwrap().is_none(), "the guest has ended: {}", said());
            assert!(Instant::now() < deadline, "no sshd: {}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { process, port }
    }
}

impl Guest {
    /// Its root directory, seen from here.
    pub fn root(&self) -> PathBuf {
        let id = self.process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        PathBuf::from(format!("/proc/{}/root", children.trim()))
    }

    /// A file of the machine.
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path.trim_start_matches('/'))).unwrap()
    }

    /// What cloud-init does in a machine that is told so.
    pub fn set_password(&self, password: &str) {
        let mut chpasswd =
            Command::new("chroot").arg(self.root()).arg("chpasswd").stdin(Stdio::piped()).spawn().unwrap();
        chpasswd.stdin.take().unwrap().write_all(format!("builder:{password}\n").as_bytes()).unwrap();
        assert!(chpasswd.wait().unwrap().success());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn layer() -> PathBuf {
    match std::env::var_os("NIB_GUEST") {
        Some(path) => path.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/node-image-builder/guest"),
    }
}
