//! Alerts and dashboard of the chart: Prometheus itself reads the operator's metrics and evaluates them.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use node_image_builder::{
    contract::{FailureClass, Stage},
    controller::{
        admin::{self, Admin},
        metrics::Metrics,
    },
};
use regex_lite::Regex;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    controller::harness::{self, SOON, until},
    support::chart::chart,
};

/// Metrics of an operator that has seen everything.
fn metrics() -> Metrics {
    let metrics = Metrics::default();
    metrics.leading(true);
    metrics.build_started();
    let mut outcome = harness::outcome(&crate::ova::request());
    outcome.stage_seconds.insert(Stage::Fetch, 1.0);
    metrics.build_succeeded(&outcome);
    metrics.build_failed(FailureClass::BadInput, "ChecksumMismatch");
    metrics.reconcile_failed("ApiRefused");
    metrics.reconciled(Duration::from_millis(1));
    metrics
}

fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string(chart().join("files/dashboard.json")).unwrap()).unwrap()
}

/// Everything that the dashboard asks.
fn queries() -> Vec<String> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are_and_leave_none_out() {
    let text = metrics().render().unwrap();
    let name = Regex::new(r"node_image_builder_[a-z_]+").unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let exported: Vec<&str> = samples.filter_map(|line| Some(name.find(line)?.as_str())).collect();
    for file in ["files/alerts.yaml", "files/dashboard.json"] {
        let asked = fs::read_to_string(chart().join(file)).unwrap();
        let asked: Vec<&str> = name.find_iter(&asked).map(|found| found.as_str()).collect();
        assert!(asked.len() >= 4, "{file}");
        let unknown: Vec<_> = asked.iter().filter(|metric| !exported.contains(metric)).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}, the operator exports {exported:?}");
    }
    let shown = dashboard().to_string();
    let hidden = |metric: &&&str| !metric.ends_with("_sum") && !metric.ends_with("_count") && !shown.contains(**metric);
    let hidden: Vec<_> = exported.iter().filter(hidden).collect();
    assert!(hidden.is_empty(), "the dashboard does not show {hidden:?}");
}

/// A program of Debian's package `prometheus`.
fn program(name: &str, arguments: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(name);
    command.args(arguments).current_dir(dir);
    command
}

fn start(mut command: Command) -> Child {
    command.spawn().unwrap_or_else(|error| panic!("{error}: run dev/deps, which installs prometheus"))
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn prometheus_reads_the_metrics_and_answers_all_that_the_dashboard_asks() {
    crate::support::install_crypto();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap();
    let router = admin::router(Admin { metrics: Arc::new(metrics()), ready: Arc::default() });
    tokio::spawn(async move { axum::serve(listener, router).await });

    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
        "rule_files": [chart().join("files/alerts.yaml")],
        "scrape_configs": [{ "job_name": "operator", "static_configs": [{ "targets": [target.to_string()] }] }],
    });
    fs::write(dir.path().join("prometheus.yaml"), config.to_string()).unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listen = format!("--web.listen-address={address}");
    let arguments = ["--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--log.level=warn", &listen];
    let _prometheus = Running(start(program("prometheus", &arguments, dir.path())));

    let http = reqwest::Client::new();
    let ask = async |path: &str, query: &str| -> Option<Value> {
        let url = url::Url::parse_with_params(&format!("http://{address}/api/v1/{path}"), [("query", query)]).unwrap();
        let answer = http.get(url).send().await.ok()?.text().await.ok()?;
        let answer: Value = serde_json::from_str(&answer).ok()?;
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        Some(answer["data"].clone())
    };
    for query in queries() {
        let answered = until(|| async {
            let data = ask("query", &query).await?;
            (!data["result"].as_array()?.is_empty()).then_some(())
        });
        timeout(2 * SOON, answered).await.unwrap_or_else(|_| panic!("no answer to {query}"));
    }
    let groups = ask("rules", "").await.unwrap();
    let rules = groups["groups"][0]["rules"].as_array().unwrap();
    assert!(rules.iter().all(|rule| rule["lastError"].is_null()), "{rules:#?}");
    assert_eq!(rules.len(), alerts().len());
}

/// Name, labels and annotations of each alert.
fn alerts() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(&fs::read_to_string(chart().join("files/alerts.yaml")).unwrap()).unwrap();
    file["groups"][0]["rules"].as_array().unwrap().clone()
}

/// An expectation of promtool: the alert fires with these labels, or does not.
fn expect(alert: &Value, minutes: u32, labels: Option<Value>) -> Value {
    let fires = labels.map(|labels| {
        let mut all = alert["labels"].clone();
        all.as_object_mut().unwrap().extend(labels.as_object().unwrap().clone());
        let summary = alert["annotations"]["summary"].as_str().unwrap();
        let summary = summary.replace("{{ $labels.reason }}", labels["reason"].as_str().unwrap_or_default());
        let annotations = json!({ "summary": summary, "description": alert["annotations"]["description"] });
        json!({ "exp_labels": all, "exp_annotations": annotations })
    });
    let fires: Vec<_> = fires.into_iter().collect();
    json!({ "eval_time": format!("{minutes}m"), "alertname": alert["alert"], "exp_alerts": fires })
}

#[test]
fn each_alert_fires_for_what_it_is_about_and_not_otherwise() {
    let series =
        |series: &str, values: &str| json!({ "series": format!("node_image_builder_{series}"), "values": values });
    let well = [
        series("leader{instance=\"a\"}", "1x180"),
        series("builds_waiting{instance=\"a\"}", "1x60 0x120"),
        series("reconcile_errors_total{reason=\"Conflict\"}", "0+60x180"),
        series("builds_finished_total{result=\"Failed\",class=\"BadInput\"}", "0x60 1x120"),
        series("builds_finished_total{result=\"Succeeded\",class=\"\"}", "0+1x180"),
    ];
    let ill = [
        series("leader{instance=\"a\"}", "0x180"),
        series("leader{instance=\"b\"}", "0x180"),
        series("reconcile_errors_total{reason=\"ApiRefused\"}", "0+6x180"),
        series("builds_finished_total{result=\"Failed\",class=\"BadInput\"}", "0+1x180"),
    ];
    let full = [series("leader{instance=\"a\"}", "1x180"), series("builds_waiting{instance=\"a\"}", "3x180")];
    let alerts = alerts();
    let named = |name: &str| alerts.iter().find(|alert| alert["alert"] == name).unwrap();
    let quiet: Vec<_> = alerts.iter().map(|alert| expect(alert, 170, None)).collect();
    let loud = [
        expect(named("NodeImageBuilderNotWorking"), 170, Some(json!({}))),
        expect(named("NodeImageBuilderNotWorking"), 4, None),
        expect(named("NodeImageBuilderErrors"), 170, Some(json!({ "reason": "ApiRefused" }))),
        expect(named("NodeImageBuildsFail"), 170, Some(json!({}))),
    ];
    let waits = [expect(named("NodeImageBuildsWait"), 170, Some(json!({ "instance": "a" })))];
    let tests = json!({
        "rule_files": [chart().join("files/alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            { "interval": "1m", "input_series": well, "alert_rule_test": quiet },
            { "interval": "1m", "input_series": ill, "alert_rule_test": loud },
            { "interval": "1m", "input_series": full, "alert_rule_test": waits },
        ],
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tests.yaml"), tests.to_string()).unwrap();
    let mut promtool = program("promtool", &["test", "rules", "tests.yaml"], dir.path());
    promtool.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = start(promtool).wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
