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
    Api, Client, Resource, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
    core::Request,
};
use node_image_builder::api::v1alpha1::{FINALIZER, NAME_LABEL, NodeImageBuild};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::{sync::Semaphore, time::interval};

use self::{
    audit::{Requests, Start, between},
    cluster::{Cluster, send},
    process::Program,
};

/// Longest time for anything that takes longer with more builds.
const LONG: Duration = Duration::from_secs(1800);
/// Longest time for the rest.
const SHORT: Duration = Duration::from_secs(60);
/// Resources that are created at the same time while the crowd is made.
const CONCURRENCY: usize = 8;
/// Builds that both operators start at the same time.
const STARTS: usize = 32;

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
    burst: Burst,
    restart_ready: Duration,
    restart_job: Duration,
    /// Until it has looked at all builds after the restart.
    restart_quiet: Duration,
    restart_memory: f64,
    /// From apply until the Job is there where nothing but the same requests is made, sorted.
    floor: Vec<Duration>,
}

/// Times of the builds that were applied at once, each sorted.
struct Burst {
    /// From apply until the Job is there.
    job: Vec<Duration>,
    /// From apply until the API server's answer.
    apply: Vec<Duration>,
    /// From that until the first request for the build comes.
    begin: Vec<Duration>,
    /// In the API server, with the requests up to the Job.
    answering: Vec<Duration>,
    /// Between them, in the operator.
    asking: Vec<Duration>,
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
    let burst = Burst::of(&applied, || Requests::read(&server.audit_log(), audited)).await;
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
    let floor = match side {
        Side::Ours => {
            told("the burst without it");
            cluster.work(false);
            let operator = Client::try_from(server.config_of(apiserver::RELEASE, apiserver::RELEASE).await).unwrap();
            floor(&client, &operator, options, &mirror, templates).await
        }
        Side::Peer { .. } => vec![],
    };
    Figures {
        crowd,
        most_memory,
        idle_memory,
        requests,
        idle_load,
        burst,
        restart_ready,
        restart_job,
        restart_quiet: since,
        restart_memory,
        floor,
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
    let request = Request::new(NodeImageBuild::url_path(&(), Some(&namespace)));
    let request = request.create(&PostParams::default(), build.to_string().into_bytes());
    let sent = Timestamp::now();
    send(client, request).await;
    (namespace, name, sent, Timestamp::now())
}

impl Burst {
    async fn of(applied: &[Applied], audit: impl Fn() -> Requests) -> Self {
        let mut again = interval(Duration::from_millis(100));
        // A watch may be faster than the audit log.
        let requests = loop {
            again.tick().await;
            let requests = audit();
            if applied.iter().all(|(namespace, name, ..)| requests.start(namespace, name).is_some()) {
                break requests;
            }
        };
        let sorted = |time: &dyn Fn(&Applied, &Start) -> Duration| {
            let start = |(namespace, name, ..): &Applied| requests.start(namespace, name).unwrap();
            sorted(applied.iter().map(|one| time(one, start(one))))
        };
        Self {
            job: sorted(&|(.., sent, _), start| between(*sent, start.end())),
            apply: sorted(&|(.., sent, answered), _| between(*sent, *answered)),
            begin: sorted(&|(.., answered), start| between(*answered, start.begin())),
            answering: sorted(&|_, start| start.answering()),
            asking: sorted(&|_, start| start.asking()),
        }
    }
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<Duration> {
    let mut times: Vec<_> = times.collect();
    times.sort();
    times
}

/// The burst without an operator: this program sends the requests that start a build itself, as many at a time, and does
/// nothing else. What is left is what the API server takes for them on this machine.
async fn floor(client: &Client, operator: &Client, options: &Options, mirror: &str, templates: &Path) -> Vec<Duration> {
    let template = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(templates.join(format!("{name}.json"))).unwrap()).unwrap()
    };
    let (job, secret) = (template("job"), json!({ "stringData": template("secret"), "immutable": true }));
    let turns = Semaphore::new(STARTS);
    let starts = (0..options.burst).map(|index| {
        let (turns, mut job, mut secret) = (&turns, job.clone(), secret.clone());
        async move {
            let (namespace, build, sent, _) = apply(client, options, mirror, "floor", index).await;
            let _turn = turns.acquire().await.unwrap();
            let finalizer = Patch::Merge(json!({ "metadata": { "finalizers": [FINALIZER] } }));
            let path = NodeImageBuild::url_path(&(), Some(&namespace));
            send(operator, Request::new(path).patch(&build, &PatchParams::default(), &finalizer)).await;
            for (path, object) in [
                (Secret::url_path(&(), Some(&namespace)), &mut secret),
                (Job::url_path(&(), Some(&namespace)), &mut job),
            ] {
                object["metadata"]["name"] = json!(format!("{build}-0123456789"));
                let body = object.to_string().into_bytes();
                send(operator, Request::new(path).create(&PostParams::default(), body)).await;
            }
            between(sent, Timestamp::now())
        }
    });
    let times: Vec<_> = stream::iter(starts).buffer_unordered(options.burst.max(1)).collect().await;
    sorted(times.into_iter())
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
    let share = |part: f64, of: fn(&Burst) -> &Vec<Duration>| {
        move |figures: &Figures| millis(percentile(of(&figures.burst), part))
    };
    let rows: [Row; 20] = [
        ("first apply to all Ready, s", "", &|f| seconds(f.crowd)),
        ("resident memory, highest until then, MiB", "40", &|f| f.most_memory),
        ("resident memory, idle, MiB", "40", &|f| f.idle_memory),
        ("resident memory, highest after a restart, MiB", "40", &|f| f.restart_memory),
        ("API writes a build", "6", &|f| each(f.requests.writes())),
        ("Events a build", "", &|f| each(f.requests.events())),
        ("API reads a build", "", &|f| each(f.requests.reads())),
        ("processor when idle, % of a core", "0.2", &|f| f.idle_load * 100.0),
        ("burst: apply to Job, median, ms", "", &share(0.5, |burst| &burst.job)),
        ("burst: apply to Job, p99, ms", "200", &share(0.99, |burst| &burst.job)),
        ("  apply to the API server's answer, median, ms", "", &share(0.5, |burst| &burst.apply)),
        ("  apply to the API server's answer, p99, ms", "", &share(0.99, |burst| &burst.apply)),
        ("  answer to the operator's first request, median, ms", "", &share(0.5, |burst| &burst.begin)),
        ("  in the API server until the Job, median, ms", "", &share(0.5, |burst| &burst.answering)),
        ("  in the API server until the Job, p99, ms", "", &share(0.99, |burst| &burst.answering)),
        ("  between the requests, median, ms", "", &share(0.5, |burst| &burst.asking)),
        ("  between the requests, p99, ms", "", &share(0.99, |burst| &burst.asking)),
        ("restart: process start to ready, s", "2", &|f| seconds(f.restart_ready)),
        ("restart: process start to a new build's Job, s", "", &|f| seconds(f.restart_job)),
        ("restart: process start to all looked at, s", "", &|f| seconds(f.restart_quiet)),
    ];
    println!("{:<54} {:>6} {:>10} {:>10} {:>8}", "", "aim", "operator", "peer", "ratio");
    for (what, aim, figure) in rows {
        let ours = figure(ours);
        let (peer, ratio) = peer.map_or((String::new(), String::new()), |peer| {
            (format!("{:.2}", figure(peer)), format!("{:.2}", ours / figure(peer)))
        });
        println!("{what:<54} {aim:>6} {ours:>10.2} {peer:>10} {ratio:>8}");
    }
    println!("\nidle: over {idle_seconds} s, the lease's renewals with it");
    println!(
        "burst without an operator, its requests up to the Job sent by this program: median {:.2} ms, p99 {:.2} ms",
        millis(percentile(&ours.floor, 0.5)),
        millis(percentile(&ours.floor, 0.99))
    );
    for (name, figures) in [("operator", Some(ours)), ("peer", peer)] {
        if let Some(figures) = figures {
            println!("\nrequests of the {name} until all were Ready, for each build:");
            for (request, count) in &figures.requests.counts {
                println!("  {request:<40} {:>8.3}", each(*count));
            }
        }
    }
}
