//! Logging and traces. The log is text on a terminal and JSON in a cluster; its filter comes from `RUST_LOG`. It is always on
//! standard error, because standard output carries progress and results. Traces go where OpenTelemetry's own variables say
//! (specification 1.x, "OpenTelemetry Protocol Exporter").

use std::{env, io::IsTerminal};

use clap::ValueEnum;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithHttpConfig};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::{Level, Metadata, level_filters::LevelFilter};
use tracing_subscriber::{EnvFilter, filter::FilterFn, fmt, fmt::MakeWriter, prelude::*};

/// The variables that name a collector: the base URL, and the URL of traces.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// How log lines look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    Text,
    Json,
}

/// Why there can be no traces.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("can not set up the client that sends traces")]
    Client { source: reqwest::Error },
    #[error("can not send traces where the variables OTEL_EXPORTER_OTLP_* of the environment say")]
    Exporter { source: ExporterBuildError },
}

/// Sends spans to a collector, by a thread of its own and some at a time; the last ones when it is dropped.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Those of the service `name`, if the environment names a collector. Not for code inside an asynchronous runtime: the
    /// client blocks.
    pub fn from_env(name: &'static str) -> Result<Option<Self>, TraceError> {
        let is_set = |variable: &str| env::var_os(variable).is_some_and(|value| !value.is_empty());
        if !ENDPOINTS.into_iter().any(is_set) {
            return Ok(None);
        }
        let client = reqwest::blocking::Client::builder().build().map_err(|source| TraceError::Client { source })?;
        let exporter = SpanExporter::builder().with_http().with_http_client(client).build();
        let exporter = exporter.map_err(|source| TraceError::Exporter { source })?;
        let resource = Resource::builder();
        let resource = if is_set("OTEL_SERVICE_NAME") { resource } else { resource.with_service_name(name) };
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build());
        Ok(Some(Self(provider.build())))
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// Whether traces have it: what our log has, and the Kubernetes client's requests.
fn is_traced(metadata: &Metadata<'_>) -> bool {
    let is_of = |name: &str| metadata.target().starts_with(name);
    (is_of(env!("CARGO_CRATE_NAME")) && *metadata.level() <= Level::INFO)
        || (is_of("kube_client::client") && metadata.is_span())
}

/// Sets the process's subscriber, which writes to `writer`. Call once, first.
pub fn init<W>(format: LogFormat, default_filter: &str, writer: W, traces: Option<&Traces>)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let json = match format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let traces = traces.map(|Traces(provider)| {
        let filter = FilterFn::new(is_traced as fn(&Metadata<'_>) -> bool).with_max_level_hint(LevelFilter::DEBUG);
        tracing_opentelemetry::layer().with_tracer(provider.tracer(env!("CARGO_PKG_NAME"))).with_filter(filter)
    });
    let registry = tracing_subscriber::registry().with(traces);
    if json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(writer).with_filter(filter)).init();
    } else {
        let ansi = std::io::stderr().is_terminal();
        registry.with(fmt::layer().with_target(false).with_ansi(ansi).with_writer(writer).with_filter(filter)).init();
    }
}
