//! What a build by Packer elsewhere needs beside the place where its machine is: a machine that answers, a mirror with what is
//! installed there, and a directory like upstream's.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
};

use flate2::{Compression, write::GzEncoder};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::contract::{BuildReport, BuildRequest, FailureReport, ProviderTarget, VERSION};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::guest::Guest;
use crate::support::bad_server::{Answer, BadServer};

/// Where upstream's recipe looks for them.
const CNI_PLUGINS: &str = "/plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz";
/// A file that nothing starts from.
pub const MEDIUM: &str = "/installer.iso";
/// Name of the machine of the build.
pub const MACHINE: &str = "node-image-build-0123456789";

/// What Packer and its plugins have in a home directory.
const PACKERS: [&str; 2] = [".local", ".config"];

/// Another Packer than Debian's: a home directory with `.local/bin/packer` and with plugins where that looks for them.
pub fn packer_home() -> Option<PathBuf> {
    std::env::var_os("NIB_PACKER").map(PathBuf::from)
}

/// A gzipped tar archive of one program.
pub fn archive(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(vec![], Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(name.len() as u64);
    header.set_mode(0o755);
    tar.append_data(&mut header, name, name.as_bytes()).unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A machine, a mirror, and where the build is.
pub struct Site {
    pub guest: Guest,
    pub mirror: BadServer,
    pub directory: tempfile::TempDir,
}

impl Site {
    pub async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let seed = directory.path().join("guest/seed");
        let put = |path: &str, content: &str, mode: u32| {
            let path = seed.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        // What upstream's roles install, and ours look at.
        for program in ["kubelet", "kubeadm", "kubectl"] {
            put(&format!("usr/bin/{program}"), program, 0o755);
        }
        put("usr/local/bin/ctr", "#!/bin/sh\necho registry.example.com/pause:3\n", 0o755);
        put("usr/bin/cloud-init", "#!/bin/sh\n", 0o755);
        put("usr/sbin/shutdown", "#!/bin/sh\ntouch /etc/halted\n", 0o755);
        put("etc/containerd/config.toml", "version = 2\n", 0o644);
        let guest = Guest::start(&directory.path().join("guest"));
        let files = [
            (CNI_PLUGINS, "host-device"),
            ("/etcdadm.tar.gz", "etcdadm"),
            ("/etcd.tar.gz", "etcd"),
            (MEDIUM, "installer"),
        ];
        let files = Arc::new(files.map(|(path, name)| (path, archive(name))));
        let mirror = BadServer::start(move |request, _| {
            let found = files.iter().find(|(path, _)| *path == request.target);
            found.map_or_else(|| Answer::status(404), |(_, bytes)| Answer::body(bytes.clone()))
        })
        .await;
        Self { guest, mirror, directory }
    }

    /// A build; `more` replaces fields of its document.
    pub fn document(&self, request: &BuildRequest, target: ProviderTarget, authority: &[u8], more: Value) -> Value {
        let mut document = serde_json::to_value(request).unwrap();
        let bundle = self.directory.path().join("authority.pem");
        fs::write(&bundle, authority).unwrap();
        for (key, value) in [
            ("version", json!(VERSION)),
            ("firmware", json!("bios")),
            ("release", super::release()),
            ("trustBundle", json!(bundle)),
            ("providerTarget", serde_json::to_value(target).unwrap()),
            ("publish", json!([{"directory": {"path": self.directory.path().join("out")}}])),
            (
                "files",
                json!([{
                    "path": "/etc/of-the-specification", "owner": "root", "group": "root", "mode": "0600",
                    "content": {"inline": "it is there\n"},
                }]),
            ),
        ] {
            document[key] = value;
        }
        let release = &mut document["release"];
        for program in ["kubelet", "kubeadm", "kubectl"] {
            release[program]["sha256"] = json!(sha256(program.as_bytes()));
        }
        for (key, name) in [("etcdadm", "etcdadm"), ("etcd", "etcd")] {
            let artifact = &mut release[key]["artifact"];
            artifact["url"] = json!(self.mirror.url(&format!("/{name}.tar.gz")));
            artifact["sha256"] = json!(sha256(&archive(name)));
        }
        let plugins = &mut release["cniPlugins"]["artifact"];
        plugins["url"] = json!(self.mirror.url(CNI_PLUGINS));
        plugins["sha256"] = json!(sha256(&archive("host-device")));
        if let (Some(document), Value::Object(more)) = (document.as_object_mut(), more) {
            document.extend(more);
        }
        document
    }

    pub fn upstream(&self) -> PathBuf {
        self.directory.path().join("upstream")
    }

    /// A directory like upstream's. `vars` is its file that says where the machine answers.
    fn prepare(&self, vars: &str) {
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imagebuilder/upstream");
        let upstream = self.upstream();
        if upstream.exists() {
            return;
        }
        fs::create_dir(self.directory.path().join("out")).unwrap();
        assert!(Command::new("cp").arg("-r").args([&ours, &upstream]).status().unwrap().success());
        if let Some(home) = packer_home() {
            for part in PACKERS {
                symlink(home.join(part), upstream.join(part)).unwrap();
            }
        }
        // The machine has it all; what answers by SSH is this machine's root, in which nothing is to be installed.
        fs::copy(ours.with_file_name("installed.yml"), upstream.join("ansible/node.yml")).unwrap();
        let vars = upstream.join(vars);
        let text = fs::read_to_string(&vars).unwrap();
        fs::write(vars, text.replace("\"22\"", &format!("\"{}\"", self.guest.port))).unwrap();
    }

    /// A run of the program.
    pub fn run(&self, document: &Value, vars: &str) -> Run {
        self.prepare(vars);
        let dir = self.directory.path();
        fs::write(dir.join("build.json"), document.to_string()).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_image-builder"))
            .arg("run")
            .arg("--build")
            .arg(dir.join("build.json"))
            .arg("--work-dir")
            .arg(dir.join("work"))
            .arg("--report")
            .arg(dir.join("report"))
            .arg("--upstream")
            .arg(self.upstream())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        Run { process, report: dir.join("report") }
    }

    /// What a Job does when a pod is gone.
    pub fn clean_up(&self) -> Output {
        let dir = self.directory.path();
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("clean-up").arg("--build").arg(dir.join("build.json")).arg("--report").arg(dir.join("report"));
        command.output().unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Ansible did in the machine what the roles say, from where the release says.
    pub fn assert_installed(&self) {
        assert_eq!(self.guest.read("/etc/of-the-specification"), "it is there\n");
        let asked = "v1.31.14 public.ecr.aws/eks-distro/kubernetes/pause:";
        assert!(self.guest.read("/etc/image-builder-test").starts_with(asked));
        assert_eq!(self.guest.read("/usr/bin/etcdadm"), "etcdadm");
        for path in ["/etcdadm.tar.gz", "/etcd.tar.gz"] {
            assert_eq!(self.mirror.count(path), 1, "{path}");
        }
        assert!(!self.directory.path().join("work/build").exists());
    }
}

pub struct Run {
    process: Child,
    report: PathBuf,
}

impl Run {
    /// Reads progress until `wanted` is said, or to the end; gives the stages.
    pub fn follow(&mut self, wanted: Option<&str>) -> Vec<String> {
        let mut stages: Vec<String> = vec![];
        for line in BufReader::new(self.process.stdout.as_mut().unwrap()).lines() {
            let line: Value = serde_json::from_str(&line.unwrap()).unwrap_or_default();
            let Some(stage) = line["progress"]["stage"].as_str() else { continue };
            if stages.last().is_none_or(|last| last != stage) {
                stages.push(stage.to_owned());
            }
            if wanted.is_some_and(|wanted| line["progress"]["message"].as_str().unwrap_or_default().contains(wanted)) {
                break;
            }
        }
        stages
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().try_into().unwrap())
    }

    pub fn end(&mut self) -> (Option<i32>, BuildReport) {
        self.follow(None);
        let code = self.process.wait().unwrap().code();
        (code, serde_json::from_str(&fs::read_to_string(&self.report).unwrap()).unwrap())
    }
}

impl Run {
    /// What happens when a pod is told to stop: the build ends as one that was cancelled. Gives its message.
    pub fn stop(&mut self) -> String {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let (code, report) = self.end();
        assert_eq!(code, Some(130), "{report:?}");
        let BuildReport::Failed(FailureReport { reason, message, .. }) = report else { panic!("{report:?}") };
        assert_eq!(reason, "Cancelled");
        message
    }

    /// What happens when a pod is killed: Packer goes with it.
    pub fn kill(&mut self) {
        let children = |of: Pid| {
            let path = format!("/proc/{of}/task/{of}/children");
            let listed = fs::read_to_string(path).unwrap();
            listed.split_whitespace().map(|id| Pid::from_raw(id.parse().unwrap())).collect::<Vec<_>>()
        };
        let mut all = vec![self.pid()];
        let mut next = 0;
        while next < all.len() {
            all.extend(children(all[next]));
            next += 1;
        }
        for process in all {
            // One that its parent took with it is gone.
            let _ = kill(process, Signal::SIGKILL);
        }
        self.process.wait().unwrap();
    }
}

/// Command lines and environments of processes that speak of `text`.
pub fn processes(text: &str) -> Vec<String> {
    let read = |entry: &fs::DirEntry, file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
    let entries: Vec<_> = fs::read_dir("/proc").unwrap().filter_map(Result::ok).collect();
    let both = entries.iter().map(|entry| [read(entry, "cmdline"), read(entry, "environ")].concat());
    let shown = both.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    shown.filter(|line| line.contains(text)).collect()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
