//! What happens to an API server: restarts, forgotten history, other writers, overload, a network that is cut.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Secret},
    flowcontrol::v1::{FlowSchema, PriorityLevelConfiguration},
    rbac::v1::ClusterRoleBinding,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    config::Kubeconfig,
};
use node_image_builder::{
    api::v1alpha1::{NodeImageBuild, Phase},
    controller::metrics::Metrics,
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::harness::{Harness, SOON, Traffic, until};
use crate::support::apiserver;

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// How many reconciliations failed for this reason.
fn failed(metrics: &Metrics, reason: &str) -> u64 {
    let text = metrics.render().unwrap();
    let name = format!("node_image_builder_reconcile_errors_total{{reason=\"{reason}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or_default()
}

/// Whether the server says that it does not know any more what happened since `version`.
async fn is_forgotten(api: &Api<NodeImageBuild>, version: &str) -> bool {
    let Ok(stream) = api.watch(&WatchParams::default().timeout(5), version).await else { return false };
    match stream.boxed().try_next().await {
        Ok(Some(WatchEvent::Error(error))) => error.code == 410,
        Err(kube::Error::Api(status)) => status.code == 410,
        Ok(_) | Err(_) => false,
    }
}

#[tokio::test]
async fn operator_goes_on_after_a_restart_of_the_api_server_that_forgot_its_history() {
    let server = Arc::new(apiserver::own().await);
    let mut harness = Harness::on(Arc::clone(&server), "restart").await;
    harness.start_operator();
    harness.create("running", json!({})).await;
    let running = harness.job("running").await;
    let pod = harness.create_pod(&running, 0).await.unwrap();
    harness.run_pod(&pod).await;
    let builds = harness.api::<NodeImageBuild>();
    // The operator's watch of builds has seen this version, and nothing later.
    let version = builds.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    for n in 0..5 {
        let map: ConfigMap = object(json!({ "metadata": { "name": format!("later-{n}") } }));
        harness.api().create(&PostParams::default(), &map).await.unwrap();
    }
    server.take_down().await;
    server.bring_back().await;
    let forgotten = until(|| async { is_forgotten(&builds, &version).await.then_some(()) });
    timeout(SOON, forgotten).await.expect("the API server knows its history");

    harness.finish(&running).await;
    harness.until("running", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.ready("later", json!({})).await;
    // A Secret that a build waits for is seen too.
    let target = json!({ "s3": { "bucket": "images", "region": "r-1", "credentialsSecretRef": { "name": "s3" } } });
    harness.create("waiting", json!({ "publish": [target] })).await;
    harness.until("waiting", "stalled", |s| s.phase == Some(Phase::Failed)).await;
    let keys = json!({ "accessKeyID": "a", "secretAccessKey": "b" });
    let secret: Secret = object(json!({ "metadata": { "name": "s3" }, "stringData": keys }));
    harness.api().create(&PostParams::default(), &secret).await.unwrap();
    harness.job("waiting").await;
    harness.stop_operator().await;
}

#[tokio::test]
async fn build_that_ended_while_the_network_was_cut_is_picked_up_when_it_is_back() {
    let mut harness = Harness::without_operator("cut").await;
    let traffic = Traffic::default();
    harness.start_operator_with(traffic.client().await, harness.settings());
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;
    harness.until("image", "building", |s| s.phase == Some(Phase::Building)).await;
    traffic.cut();
    harness.succeed(&job).await;
    harness.create("new", json!({})).await;
    let refused = until(|| async { (traffic.refused() > 3).then_some(()) });
    timeout(SOON, refused).await.expect("the operator tries nothing");
    traffic.mend();
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    harness.job("new").await;
    assert_eq!(harness.jobs().await.len(), 2);
}

#[tokio::test]
async fn other_writers_conflict_with_the_operator_and_nothing_is_lost() {
    let harness = Harness::without_operator("conflict").await;
    let operator = harness.one_more_operator(harness.operator_client.clone(), harness.settings(), None);
    let mut builds = 0;
    let conflict = async {
        while failed(&operator.metrics, "Conflict") == 0 {
            let name = format!("image-{builds}");
            builds += 1;
            let api = harness.api::<NodeImageBuild>();
            harness.create(&name, json!({})).await;
            // Somebody who does not stop writing before they have met, as a GitOps tool with labels of its own.
            let writing = async {
                for n in 0.. {
                    if failed(&operator.metrics, "Conflict") > 0 {
                        std::future::pending::<()>().await;
                    }
                    let patch = json!({ "metadata": { "labels": { "theirs": format!("{n}") } } });
                    api.patch(&name, &PatchParams::apply("theirs"), &Patch::Merge(patch)).await.unwrap();
                }
            };
            let building = async { harness.succeed(&harness.job(&name).await).await };
            tokio::select! {
                () = writing => {}
                _ = building => {}
            }
            let status = harness.until(&name, "ready", |s| s.phase == Some(Phase::Ready)).await;
            assert_eq!(status.history.len(), 1);
            let labels = api.get(&name).await.unwrap().labels().clone();
            assert!(labels.contains_key("theirs"), "{labels:?}");
        }
    };
    timeout(4 * SOON, conflict).await.expect("nothing ever conflicted");
    assert_eq!(harness.jobs().await.len(), builds);
    operator.stop().await;
}

/// Lets the API server answer all requests of `user` but one at a time by 429.
async fn throttle(client: &Client, user: &str) {
    let level: PriorityLevelConfiguration = object(json!({
        "metadata": { "name": user },
        "spec": { "type": "Limited", "limited": {
            "nominalConcurrencyShares": 0, "lendablePercent": 0, "borrowingLimitPercent": 0,
            "limitResponse": { "type": "Reject" },
        }},
    }));
    let subject = json!({ "kind": "User", "user": { "name": user } });
    let rule =
        json!({ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true });
    let schema: FlowSchema = object(json!({
        "metadata": { "name": user },
        "spec": {
            "priorityLevelConfiguration": { "name": user }, "matchingPrecedence": 2,
            "rules": [{ "subjects": [subject], "resourceRules": [rule] }],
        },
    }));
    Api::all(client.clone()).create(&PostParams::default(), &level).await.unwrap();
    Api::all(client.clone()).create(&PostParams::default(), &schema).await.unwrap();
}

/// A request of `user` whose body never comes to its end, so that the API server is occupied with it.
async fn occupy(user: &str, namespace: &str) {
    let config = Kubeconfig::read_from(apiserver::kubeconfig().await).unwrap();
    let server = config.clusters[0].cluster.as_ref().unwrap().server.as_ref().unwrap();
    let token = config.auth_infos[0].auth_info.as_ref().unwrap().token.as_ref().unwrap().expose_secret();
    let client = reqwest::Client::builder().danger_accept_invalid_certs(true).build().unwrap();
    let request = || {
        client
            .post(format!("{server}/api/v1/namespaces/{namespace}/configmaps"))
            .bearer_auth(token)
            .header("Impersonate-User", user)
            .header("Content-Type", "application/json")
            .body(reqwest::Body::wrap_stream(stream::pending::<Result<String, Infallible>>()))
    };
    // The operator's own request may be the one that is served just now.
    loop {
        match request().send().await {
            Ok(answer) if answer.status() == reqwest::StatusCode::TOO_MANY_REQUESTS => {}
            other => panic!("the request came to its end: {other:?}"),
        }
    }
}

#[tokio::test]
async fn overloaded_api_server_is_waited_for() {
    const USER: &str = "throttled";
    let harness = Harness::without_operator("overload").await;
    let binding: ClusterRoleBinding = object(json!({
        "metadata": { "name": USER },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER }],
    }));
    Api::all(harness.client.clone()).create(&PostParams::default(), &binding).await.unwrap();
    let client = Traffic::default().client_as(Some(USER)).await;
    let operator = harness.one_more_operator(client.clone(), harness.settings(), None);
    harness.create("image", json!({})).await;
    let job = harness.job("image").await;

    throttle(&harness.client, USER).await;
    let jobs: Api<Job> = Api::namespaced(client, &harness.namespace);
    // The one that is served.
    let namespace = harness.namespace.clone();
    let occupant = tokio::spawn(async move { occupy(USER, &namespace).await });
    let throttled = until(|| async {
        let answer = jobs.list(&ListParams::default()).await;
        matches!(answer, Err(kube::Error::Api(status)) if status.code == 429).then_some(())
    });
    timeout(SOON, throttled).await.expect("nothing is throttled");
    harness.succeed(&job).await;
    let refused = until(|| async { (failed(&operator.metrics, "ApiRefused") > 0).then_some(()) });
    timeout(SOON, refused).await.expect("the operator was refused nothing");

    occupant.abort();
    let schemas: Api<FlowSchema> = Api::all(harness.client.clone());
    schemas.delete(USER, &DeleteParams::default()).await.unwrap();
    harness.until("image", "ready", |s| s.phase == Some(Phase::Ready)).await;
    assert_eq!(harness.jobs().await.len(), 1);
    operator.stop().await;
}

/// Numbers from a seed, so that a run can be repeated.
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: u64) -> u64 {
        // Marsaglia's xorshift.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Ends the pods of builds well, in the way of Job controller and kubelet, as far as each has come.
async fn move_on(harness: &Harness, dice: &mut Dice) -> kube::Result<()> {
    for job in harness.api::<Job>().list(&ListParams::default()).await?.items {
        if job.metadata.deletion_timestamp.is_some() || dice.below(3) > 0 {
            continue;
        }
        let pod = harness.api::<Pod>().get_opt(&format!("{}-0", job.name_any())).await?;
        match pod {
            None => harness.run_pod(&harness.create_pod(&job, 0).await?).await,
            Some(_) if job.status.as_ref().is_none_or(|status| status.completion_time.is_none()) => {
                harness.finish(&job).await;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Deletes the pods that have not ended, as a node that goes does.
async fn lose_pods(harness: &Harness) {
    let pods = harness.api::<Pod>();
    for pod in pods.list(&ListParams::default()).await.unwrap() {
        if pod.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Succeeded") {
            pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn builds_end_ready_whatever_is_killed_meanwhile_and_leave_nothing_behind() {
    const BUILDS: usize = 50;
    const SEED: u64 = 0x6e69_625f_6c69_6665;
    let server = Arc::new(apiserver::own().await);
    let mut harness = Harness::on(Arc::clone(&server), "random").await;
    harness.start_operator();
    for n in 0..BUILDS {
        harness.create(&format!("image-{n:02}"), json!({})).await;
    }
    let mut dice = Dice(SEED);
    for round in 0..24 {
        match dice.below(5) {
            0 => {
                harness.kill_operator().await;
                harness.start_operator();
            }
            1 if round % 3 == 0 => {
                server.take_down().await;
                server.bring_back().await;
            }
            2 => lose_pods(&harness).await,
            _ => {}
        }
        Box::pin(move_on(&harness, &mut dice)).await.unwrap();
    }
    server.take_down().await;
    server.bring_back().await;
    // From here on nothing is killed.
    let api = harness.api::<NodeImageBuild>();
    let mut left = BUILDS;
    let ending = async {
        while left > 0 {
            Box::pin(move_on(&harness, &mut dice)).await.unwrap();
            let builds = api.list(&ListParams::default()).await.unwrap();
            let ended = |build: &&NodeImageBuild| {
                let phase = build.status.as_ref().and_then(|status| status.phase);
                matches!(phase, Some(Phase::Ready | Phase::Failed))
            };
            left = BUILDS - builds.iter().filter(ended).count();
        }
    };
    timeout(4 * SOON, Box::pin(ending)).await.unwrap_or_else(|_| panic!("seed {SEED:#x}: {left} builds did not end"));
    let builds = api.list(&ListParams::default()).await.unwrap();
    let jobs = harness.jobs().await;
    assert_eq!(jobs.len(), BUILDS, "seed {SEED:#x}: one Job a build");
    for build in &builds {
        let status = build.status.clone().unwrap();
        assert_eq!(status.history.len(), 1, "seed {SEED:#x}: {:?}", status.history);
        assert_eq!((status.phase, status.failure), (Some(Phase::Ready), None), "seed {SEED:#x}");
        let url = status.image_url.unwrap();
        assert!(url.contains(&format!("/{}/", status.build_id.unwrap())), "seed {SEED:#x}: {url}");
    }
    for build in builds {
        api.delete(&build.name_any(), &DeleteParams::default()).await.unwrap();
    }
    let left = Mutex::new(vec![]);
    let gone = until(|| async {
        let builds = api.list_metadata(&ListParams::default()).await.unwrap().items;
        *left.lock().unwrap() = builds.iter().map(ResourceExt::name_any).collect();
        left.lock().unwrap().is_empty().then_some(())
    });
    timeout(4 * SOON, gone).await.unwrap_or_else(|_| panic!("seed {SEED:#x}: {left:?} is left"));
    // Nobody collects garbage here: Jobs go with the resource that owns them, Secrets and pods with their Jobs.
    for job in harness.jobs().await {
        let owners = job.metadata.owner_references.clone().unwrap_or_default();
        assert!(owners.iter().any(|owner| owner.kind == "NodeImageBuild"), "nobody owns {}", job.name_any());
    }
    harness.stop_operator().await;
}
