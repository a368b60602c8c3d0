//! The operator with thousands of builds that end at once, beside a Go operator on controller-runtime that does the same
//! transitions (`benches/peer-go`). Each is a process of its own with the rights that the chart gives, on a real etcd and
//! API server of its own; this program plays Job controller and kubelet. Run it by `dev/bench-scale`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark"
)]
#![allow(unreachable_pub, reason = "nothing outside uses a benchmark")]

#[path = "../../tests/it/support/apiserver.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod apiserver;
mod audit;
#[path = "../../tests/it/support/chart.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod chart;
mod cluster;
mod mirror;
#[path = "../../tests/it/support/outcome.rs"]
mod outcome;
mod process;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Parser;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, PostParams},
};
use node_image_builder::api::v1alpha1::{NAME_LABEL, NodeImageBuild};
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use self::{audit::Requests, cluster::Cluster, process::Program};

/// Longest time for anything that takes longer with more builds.
const LONG: Duration = Duration::from_secs(1800);
/// Longest time for the rest.
const SHORT: Duration = Duration::from_secs(60);
/// Resources that are created at the same time while the crowd is made.
const CONCURRENCY: usize = 16;

#[derive(Parser)]
struct Options {
    /// Builds that are there when the rest is measured.
    #[arg(long, default_value_t = 5000)]
    builds: usize,
    /// Builds that are applied at once.
    #[arg(long, default_value_t = 500)]
    burst: usize,
    /// Namespaces that they are in, evenly.
    #[arg(long, default_value_t = 50)]
    namespaces: usize,
    /// How long an idle operator is looked at.
    #[arg(long, default_value_t = 60)]
    idle_seconds: u64,
    /// The release binary.
    #[arg(long)]
    operator: PathBuf,
    /// The other operator; without it only ours is measured.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Both sides' operators.
enum Side<'p> {
    Ours,
    /// Makes its Jobs and Secrets like these of ours.
    Peer {
        templates: &'p Path,
    },
}

/// What was measured of one side.
struct Figures {
    /// From the first apply until the last build is Ready.
    crowd: Duration,
    most_memory: f64,
    idle_memory: f64,
    requests: Requests,
    idle_load: f64,
    /// From apply until the Job is there, sorted.
    burst: Vec<Duration>,
    /// From the API server's answer to apply until the Job is there, sorted.
    burst_from_answer: Vec<Duration>,
    /// From apply until the API server's answer, sorted.
    answers: Vec<Duration>,
    restart_ready: Duration,
    restart_job: Duration,
    /// Until it has looked at all builds after the restart.
    restart_quiet: Duration,
    restart_memory: f64,
}

#[tokio::main]
async fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let options = Options::parse();
    let templates = tempfile::tempdir().unwrap();
    let ours = measure(&options.operator, &Side::Ours, &options, templates.path()).await;
    let peer = match &options.peer {
        Some(peer) => {
            let side = Side::Peer { templates: templates.path() };
            Some(measure(peer, &side, &options, templates.path()).await)
        }
        None => None,
    };
    print(&options, &ours, peer.as_ref());
}

async fn measure(path: &Path, side: &Side<'_>, options: &Options, templates: &Path) -> Figures {
    let server = apiserver::own().await;
    let client = server.client().await;
    for index in 0..options.namespaces {
        apiserver::create_namespace(&client, &namespace(index)).await;
    }
    let work = tempfile::tempdir().unwrap();
    let mirror = mirror::start().await;
    let program = program(path, side, &server, &mirror, work.path()).await;
    let cluster = Cluster::start(&client);
    let mut process = program.start();
    program.ready(&mut process, SHORT).await;
    let told = |what: &str| eprintln!("{}: {what}", path.file_name().unwrap_or_default().display());

    told("the crowd");
    let (audited, begin) = (server.audited(), Instant::now());
    let applied = stream::iter((0..options.builds).map(|index| apply(&client, options, &mirror, "image", index)));
    applied.buffer_unordered(CONCURRENCY).for_each(|_| std::future::ready(())).await;
    cluster.until_ready(options.builds, LONG).await;
    let crowd = begin.elapsed();
    process.until_quiet(LONG).await;
    let requests = Requests::read(&server.audit_log(), audited);
    let most_memory = process.most_memory();
    if matches!(side, Side::Ours) {
        keep_templates(&client, templates).await;
    }

    told("idle");
    let (idle_memory, idle_load) = (process.memory(), process.load(Duration::from_secs(options.idle_seconds)).await);

    told("the burst");
    cluster.work(false);
    let audited = server.audited();
    let applied = stream::iter((0..options.burst).map(|index| apply(&client, options, &mirror, "burst", index)));
    let applied: Vec<_> = applied.buffer_unordered(options.burst.max(1)).collect().await;
    cluster.until_jobs(options.builds + options.burst, LONG).await;
    let created = Requests::read(&server.audit_log(), audited).jobs;
    let (burst, burst_from_answer, answers) = latencies(&applied, &created);
    cluster.work(true);
    cluster.until_ready(options.builds + options.burst, LONG).await;
    process.until_quiet(LONG).await;

    told("the restart");
    process.stop(SHORT).await;
    let mut process = program.start();
    let restart_ready = program.ready(&mut process, SHORT).await;
    apply(&client, options, &mirror, "late", 0).await;
    cluster.until_jobs(options.builds + options.burst + 1, LONG).await;
    let restart_job = process.started.elapsed();
    let since = restart_job + process.until_quiet(LONG).await;
    let restart_memory = process.most_memory();
    cluster.until_ready(options.builds + options.burst + 1, LONG).await;
    process.stop(SHORT).await;
    Figures {
        crowd,
        most_memory,
        idle_memory,
        requests,
        idle_load,
        burst,
        burst_from_answer,
        answers,
        restart_ready,
        restart_job,
        restart_quiet: since,
        restart_memory,
    }
}

fn namespace(index: usize) -> String {
    format!("team-{index}")
}

/// An apply: its namespace and name, when it was sent and when it was answered.
type Applied = (String, String, Timestamp, Timestamp);

async fn apply(client: &Client, options: &Options, mirror: &str, prefix: &str, index: usize) -> Applied {
    let (namespace, name) = (namespace(index % options.namespaces), format!("{prefix}-{index}"));
    let build = json!({
        "apiVersion": "nodeimagebuild.dev/v1alpha1",
        "kind": "NodeImageBuild",
        "metadata": { "name": name },
        "spec": {
            "os": { "name": "ubuntu", "version": "22.04" },
            "releaseChannel": "1-31",
            "baremetal": {},
            "source": {
                "releaseManifestURL": format!("{mirror}/releases/eks-a/manifest.yaml"),
                "eksaBaseURL": mirror,
                "eksdBaseURL": mirror,
            },
        },
    });
    let build: NodeImageBuild = serde_json::from_value(build).unwrap();
    let api: Api<NodeImageBuild> = Api::namespaced(client.clone(), &namespace);
    let sent = Timestamp::now();
    api.create(&PostParams::default(), &build).await.unwrap();
    (namespace, name, sent, Timestamp::now())
}

/// Times from apply and from its answer until the Job was there, and the times of the answers.
fn latencies(
    applied: &[Applied],
    created: &BTreeMap<(String, String), Timestamp>,
) -> (Vec<Duration>, Vec<Duration>, Vec<Duration>) {
    // A Job has the name of its build and the build's id.
    let created: BTreeMap<(&str, &str), Timestamp> = created
        .iter()
        .map(|((namespace, job), at)| ((namespace.as_str(), job.rsplit_once('-').unwrap().0), *at))
        .collect();
    let since = |begin: Timestamp, end: Timestamp| Duration::try_from(end.duration_since(begin)).unwrap_or_default();
    let collect = |time: &dyn Fn(&Applied) -> Duration| {
        let mut times: Vec<_> = applied.iter().map(time).collect();
        times.sort();
        times
    };
    let job = |(namespace, name, ..): &Applied| created[&(namespace.as_str(), name.as_str())];
    (
        collect(&|one| since(one.2, job(one))),
        collect(&|one| since(one.3, job(one))),
        collect(&|one| since(one.2, one.3)),
    )
}

/// The smallest time that this share of all does not exceed.
fn percentile(sorted: &[Duration], share: f64) -> Duration {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index"
    )]
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// A Job and a build document of ours, as whoever creates them writes them.
async fn keep_templates(client: &Client, directory: &Path) {
    let ours = ListParams::default().labels(NAME_LABEL).limit(1);
    let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace(0));
    let mut job = jobs.list(&ours).await.unwrap().items.remove(0);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace(0));
    let secret = secrets.get(&job.name_any()).await.unwrap();
    job.status = None;
    // What the API server added.
    let spec = job.spec.as_mut().unwrap();
    spec.selector = None;
    let template = spec.template.metadata.as_mut().unwrap();
    template.labels.as_mut().unwrap().retain(|key, _| !key.contains("controller-uid") && !key.contains("job-name"));
    let (labels, annotations) = (job.metadata.labels.take(), job.metadata.annotations.take());
    let job = json!({ "metadata": { "labels": labels, "annotations": annotations }, "spec": job.spec });
    fs::write(directory.join("job.json"), job.to_string()).unwrap();
    let data = secret.data.unwrap();
    let data: BTreeMap<_, _> = data.iter().map(|(key, value)| (key, String::from_utf8_lossy(&value.0))).collect();
    fs::write(directory.join("secret.json"), json!(data).to_string()).unwrap();
}

async fn program(path: &Path, side: &Side<'_>, server: &apiserver::ApiServer, mirror: &str, work: &Path) -> Program {
    // A token of the operator's service account in place of the administrator's.
    let config = server.config_of(apiserver::RELEASE, apiserver::RELEASE).await;
    let mut kubeconfig: Value = serde_json::from_slice(&fs::read(server.kubeconfig()).unwrap()).unwrap();
    kubeconfig["users"][0]["user"]["token"] = json!(config.auth_info.token.unwrap().expose_secret());
    let (file, key) = (work.join("kubeconfig"), work.join("key"));
    fs::write(&file, kubeconfig.to_string()).unwrap();
    fs::write(&key, [7; 32]).unwrap();
    // The whole network 127.0.0.0/8 is this machine: an address that nobody else has.
    let [.., high, low] = std::process::id().to_be_bytes();
    let admin = format!("127.77.{high}.{low}:8080");
    let more: Vec<String> = match side {
        Side::Ours => [
            "operator",
            "--builder-image=registry.example.com/node-image-builder/builder:1",
            &format!("--artifact-server-upload-url={mirror}"),
            "--artifact-server-public-url=http://images.example.com",
            &format!("--artifact-server-key-file={}", key.display()),
        ]
        .map(ToOwned::to_owned)
        .into(),
        Side::Peer { templates } => vec![format!("--templates={}", templates.display())],
    };
    let common = [
        format!("--lease-namespace={}", apiserver::RELEASE),
        format!("--lease-name={}", apiserver::RELEASE),
        format!("--admin-address={admin}"),
    ];
    let log = std::env::temp_dir().join(match side {
        Side::Ours => "operator-scale.log",
        Side::Peer { .. } => "operator-scale-peer.log",
    });
    fs::write(&log, "").unwrap();
    Program {
        path: path.to_owned(),
        arguments: more.into_iter().chain(common).collect(),
        kubeconfig: file,
        admin: admin.parse().unwrap(),
        log,
    }
}

/// What a line shows, the aim if there is one, and the figure.
type Row<'r> = (&'r str, &'r str, &'r dyn Fn(&Figures) -> f64);

fn print(options: &Options, ours: &Figures, peer: Option<&Figures>) {
    let Options { builds, burst, namespaces, idle_seconds, .. } = options;
    println!("{builds} NodeImageBuilds in {namespaces} namespaces; {burst} applied at once beside them\n");
    let seconds = |time: Duration| time.as_secs_f64();
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    let each = |count: usize| count as f64 / *builds as f64;
    let rows: [Row; 17] = [
        ("first apply to all Ready, s", "", &|f| seconds(f.crowd)),
        ("resident memory, highest until then, MiB", "40", &|f| f.most_memory),
        ("resident memory, idle, MiB", "40", &|f| f.idle_memory),
        ("resident memory, highest after a restart, MiB", "40", &|f| f.restart_memory),
        ("API writes a build", "6", &|f| each(f.requests.writes())),
        ("Events a build", "", &|f| each(f.requests.events())),
        ("API reads a build", "", &|f| each(f.requests.reads())),
        ("processor when idle, % of a core", "0.2", &|f| f.idle_load * 100.0),
        ("burst: apply to Job, median, ms", "", &|f| millis(percentile(&f.burst, 0.5))),
        ("burst: apply to Job, p99, ms", "200", &|f| millis(percentile(&f.burst, 0.99))),
        ("burst: answer to Job, median, ms", "", &|f| millis(percentile(&f.burst_from_answer, 0.5))),
        ("burst: answer to Job, p99, ms", "", &|f| millis(percentile(&f.burst_from_answer, 0.99))),
        ("burst: the API server's answer to apply, median, ms", "", &|f| millis(percentile(&f.answers, 0.5))),
        ("burst: the API server's answer to apply, p99, ms", "", &|f| millis(percentile(&f.answers, 0.99))),
        ("restart: process start to ready, s", "2", &|f| seconds(f.restart_ready)),
        ("restart: process start to a new build's Job, s", "", &|f| seconds(f.restart_job)),
        ("restart: process start to all looked at, s", "", &|f| seconds(f.restart_quiet)),
    ];
    println!("{:<52} {:>6} {:>10} {:>10} {:>8}", "", "aim", "operator", "peer", "ratio");
    for (what, aim, figure) in rows {
        let ours = figure(ours);
        let (peer, ratio) = peer.map_or((String::new(), String::new()), |peer| {
            (format!("{:.2}", figure(peer)), format!("{:.2}", ours / figure(peer)))
        });
        println!("{what:<52} {aim:>6} {ours:>10.2} {peer:>10} {ratio:>8}");
    }
    println!("\nidle: over {idle_seconds} s, the lease's renewals with it");
    for (name, figures) in [("operator", Some(ours)), ("peer", peer)] {
        if let Some(figures) = figures {
            println!("\nrequests of the {name} until all were Ready, for each build:");
            for (request, count) in &figures.requests.counts {
                println!("  {request:<40} {:>8.3}", each(*count));
            }
        }
    }
}
