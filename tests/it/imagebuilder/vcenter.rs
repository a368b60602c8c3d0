//! Packer in vCenter: Debian's Packer 1.6 clones a template in the simulator, Ansible works in the machine that answers at the
//! clone's address, and the disk comes back and is published as every image is. Stopped or killed on the way, nothing is left.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
};

use flate2::{Compression, write::GzEncoder};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node_image_builder::contract::{BuildReport, FailureReport, ProviderTarget};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::guest::{self, Guest};
use crate::{
    support::bad_server::{Answer, BadServer},
    vsphere::{Lab, NAME, peer},
};

const TEMPLATE: &str = "golden";
/// Where upstream's recipe looks for them.
const CNI_PLUGINS: &str = "/plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz";
/// No medium, but nothing starts from it either.
const MEDIUM: &str = "/installer.iso";
const MACHINE: &str = "node-image-build-0123456789";

/// A gzipped tar archive of one program.
fn archive(name: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(vec![], Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(name.len() as u64);
    header.set_mode(0o755);
    tar.append_data(&mut header, name, name.as_bytes()).unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A vCenter with a template, the machine that a clone of it is, and a mirror with what is installed there.
struct Site {
    lab: Lab,
    guest: Guest,
    mirror: BadServer,
    directory: tempfile::TempDir,
}

impl Site {
    async fn new() -> Self {
        let mut lab = Lab::new(&[]).await;
        lab.target.template_name = TEMPLATE.into();
        lab.request = lab.another_build("aaaaaaaaaa");
        lab.publish().await.unwrap();
        lab.target.template_name = NAME.into();
        lab.request = lab.another_build("0123456789");
        fs::write(Path::new(&lab.target.slot.0).join("sshPassword"), guest::PASSWORD).unwrap();

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
        Self { lab, guest, mirror, directory }
    }

    fn document(&self) -> Value {
        let mut document = serde_json::to_value(&self.lab.request).unwrap();
        let target = serde_json::to_value(ProviderTarget::Vsphere(self.lab.target.clone())).unwrap();
        let release = super::release();
        let bundle = self.directory.path().join("authority.pem");
        fs::write(&bundle, self.lab.vcenter.authority()).unwrap();
        for (key, value) in [
            ("version", json!(node_image_builder::contract::VERSION)),
            ("firmware", json!("bios")),
            ("release", release),
            ("engine", json!({"imageBuilder": {"timeoutSeconds": 300, "template": format!("templates/{TEMPLATE}")}})),
            ("base", Value::Null),
            ("trustBundle", json!(bundle)),
            ("providerTarget", target),
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
        document
    }

    /// A build in a clone of the template.
    fn start(&self) -> Run {
        self.run(&self.document())
    }

    /// A run of the program.
    fn run(&self, document: &Value) -> Run {
        let dir = self.directory.path();
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imagebuilder/upstream");
        let upstream = dir.join("upstream");
        if !upstream.exists() {
            fs::create_dir(dir.join("out")).unwrap();
            assert!(Command::new("cp").arg("-r").args([&ours, &upstream]).status().unwrap().success());
            // The machine has it all; what answers by SSH is this machine's root, in which nothing is to be installed.
            fs::copy(ours.with_file_name("installed.yml"), upstream.join("ansible/node.yml")).unwrap();
            let vars = upstream.join("packer/ova/ubuntu-2204.json");
            let text = fs::read_to_string(&vars).unwrap();
            fs::write(vars, text.replace("\"22\"", &format!("\"{}\"", self.guest.port))).unwrap();
        }
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
            .arg(&upstream)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        Run { process, report: dir.join("report") }
    }

    /// What a Job does when a pod is gone.
    fn clean_up(&self) -> Output {
        let dir = self.directory.path();
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("clean-up").arg("--build").arg(dir.join("build.json")).arg("--report").arg(dir.join("report"));
        command.output().unwrap()
    }

    /// Names of machines, the template's left out.
    async fn machines(&self) -> Vec<String> {
        let machines = self.lab.vcenter.inventory().await.machines.unwrap();
        let names = machines.into_iter().map(|machine| machine.path.rsplit_once('/').unwrap().1.to_owned());
        names.filter(|name| name != TEMPLATE).collect()
    }
}

struct Run {
    process: Child,
    report: PathBuf,
}

impl Run {
    /// Reads progress until `wanted` is said, or to the end; gives the stages.
    fn follow(&mut self, wanted: Option<&str>) -> Vec<String> {
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

    fn end(&mut self) -> (Option<i32>, BuildReport) {
        self.follow(None);
        let code = self.process.wait().unwrap().code();
        (code, serde_json::from_str(&fs::read_to_string(&self.report).unwrap()).unwrap())
    }
}

/// Command lines and environments of processes that speak of `text`.
fn processes(text: &str) -> Vec<String> {
    let read = |entry: &fs::DirEntry, file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
    let entries: Vec<_> = fs::read_dir("/proc").unwrap().filter_map(Result::ok).collect();
    let both = entries.iter().map(|entry| [read(entry, "cmdline"), read(entry, "environ")].concat());
    let shown = both.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    shown.filter(|line| line.contains(text)).collect()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Needs root, as a build does; `make test` has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_of_a_template_becomes_the_same_kind_of_template_as_by_the_other_engine() {
    if !is_root() {
        return;
    }
    let site = Site::new().await;
    let mut run = site.start();
    let mut stages = run.follow(Some("List the packages"));
    assert_eq!(site.machines().await, [MACHINE]);
    for secret in [peer::PASSWORD, guest::PASSWORD] {
        let is_simulator = |line: &String| line.split(' ').next().is_some_and(|program| program.ends_with("vcsim"));
        let speaking: Vec<_> = processes(secret).into_iter().filter(|line| !is_simulator(line)).collect();
        assert_eq!(speaking, [""; 0]);
    }
    stages.extend(run.follow(None));
    stages.dedup();
    let (code, report) = run.end();
    let BuildReport::Succeeded(outcome) = report else {
        panic!("{code:?} {report:?}\n{}", fs::read_to_string(site.directory.path().join("log")).unwrap())
    };
    assert_eq!(stages, ["Prepare", "Fetch", "Install", "Seal", "Assemble", "Publish"]);
    assert_eq!(outcome.image.name, NAME);

    let inventory = site.lab.vcenter.inventory().await;
    let machine = inventory.machine(&format!("/DC0/vm/templates/{NAME}"));
    assert!(machine.template);
    assert_eq!(machine.tags, ["eksdRelease/eksdRelease:kubernetes-1-31-eks-47", "os/os:ubuntu"]);
    assert_eq!(machine.properties["NODE_IMAGE_BUILD"], "images/ubuntu/0123456789");
    assert_eq!(site.machines().await, [NAME], "Packer's machine is left");
    let vmdk = site.lab.vcenter.disk(&machine.moref);
    assert!(crate::ova::unpack_vmdk(&vmdk) == fs::read(site.lab.disk()).unwrap(), "another disk arrived");
    let ova = fs::read(site.directory.path().join(format!("out/{NAME}.ova"))).unwrap();
    assert_eq!(outcome.image.sha256, sha256(&ova));
    assert_eq!(outcome.image.vsphere.unwrap().moref, machine.moref);
    // Ansible did in the machine what the roles say, from where the release says.
    assert_eq!(site.guest.read("/etc/of-the-specification"), "it is there\n");
    assert!(
        site.guest.read("/etc/image-builder-test").starts_with("v1.31.14 public.ecr.aws/eks-distro/kubernetes/pause:")
    );
    assert_eq!(site.guest.read("/usr/bin/etcdadm"), "etcdadm");
    for path in ["/etcdadm.tar.gz", "/etcd.tar.gz"] {
        assert_eq!(site.mirror.count(path), 1, "{path}");
    }
    assert!(!site.directory.path().join("work/build").exists());
}

/// Nothing is installed in the simulator, so the machine never has an address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_medium_is_in_the_datastore_under_the_builds_name_while_its_machine_is_there() {
    if !is_root() {
        return;
    }
    let site = Site::new().await;
    let mut document = site.document();
    document["engine"] = json!({"imageBuilder": {"timeoutSeconds": 300}});
    let checksum = json!({"sha256": sha256(&archive("installer"))});
    document["base"] = json!({"url": site.mirror.url(MEDIUM), "checksum": checksum});
    let mut run = site.run(&document);
    run.follow(Some("Waiting for IP"));
    let medium = format!("packer_cache/{MACHINE}.iso");
    let log = || fs::read_to_string(site.directory.path().join("log")).unwrap();
    assert_eq!(site.machines().await, [MACHINE], "{}", log());
    assert!(site.lab.vcenter.has_file(&medium).await, "{}", log());
    kill(run.pid(), Signal::SIGTERM).unwrap();
    let (code, report) = run.end();
    assert_eq!(code, Some(130), "{report:?}");
    assert_eq!(site.machines().await, [""; 0]);
    assert!(!site.lab.vcenter.has_file(&medium).await, "the medium is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_is_stopped_or_killed_leaves_no_machine() {
    if !is_root() {
        return;
    }
    let site = Site::new().await;
    let mut stopped = site.start();
    stopped.follow(Some("Waiting for SSH"));
    assert_eq!(site.machines().await, [MACHINE]);
    kill(stopped.pid(), Signal::SIGTERM).unwrap();
    let (code, report) = stopped.end();
    assert_eq!(code, Some(130));
    assert!(
        matches!(report, BuildReport::Failed(FailureReport { ref reason, .. }) if reason == "Cancelled"),
        "{report:?}"
    );
    assert_eq!(site.machines().await, [""; 0]);

    // A pod that is killed takes Packer with it.
    let mut killed = site.start();
    killed.follow(Some("Waiting for SSH"));
    let children = |of: Pid| {
        let path = format!("/proc/{of}/task/{of}/children");
        fs::read_to_string(path)
            .unwrap()
            .split_whitespace()
            .map(|id| Pid::from_raw(id.parse().unwrap()))
            .collect::<Vec<_>>()
    };
    let mut all = vec![killed.pid()];
    let mut next = 0;
    while next < all.len() {
        all.extend(children(all[next]));
        next += 1;
    }
    for process in all {
        // One that its parent took with it is gone.
        let _ = kill(process, Signal::SIGKILL);
    }
    killed.process.wait().unwrap();
    assert_eq!(site.machines().await, [MACHINE], "nothing was left to clean up");
    let medium = format!("packer_cache/{MACHINE}.iso");
    site.lab.vcenter.put_file(&medium).await;
    let output = site.clean_up();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(site.machines().await, [""; 0]);
    assert!(!site.lab.vcenter.has_file(&medium).await, "the medium is left");

    // What nobody can remove is named.
    site.lab.vcenter.fault("Destroy_Task", "NoPermission", 0).await;
    let mut stuck = site.start();
    stuck.follow(Some("Waiting for SSH"));
    kill(stuck.pid(), Signal::SIGTERM).unwrap();
    let (code, report) = stuck.end();
    assert_eq!(code, Some(130));
    let BuildReport::Failed(FailureReport { reason, message, .. }) = report else { panic!("{report:?}") };
    assert_eq!(reason, "Cancelled");
    let left = format!("what Packer had made there may be left: /DC0/vm/templates/{MACHINE} may be left on");
    assert!(message.contains(&left), "{message}");
    let output = site.clean_up();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(MACHINE), "{output:?}");
}
