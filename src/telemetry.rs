//! Logging: text on a terminal, JSON in a cluster; the filter comes from `RUST_LOG`. Always on standard error, because
//! standard output carries progress and results.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, fmt, fmt::MakeWriter, prelude::*};

/// How log lines look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    Text,
    Json,
}

/// Sets the process's subscriber, which writes to `writer`. Call once, first.
pub fn init<W>(format: LogFormat, default_filter: &str, writer: W)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let json = match format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let registry = tracing_subscriber::registry().with(filter);
    if json {
        registry.with(fmt::layer().json().flatten_event(true).with_writer(writer)).init();
    } else {
        registry
            .with(fmt::layer().with_target(false).with_ansi(std::io::stderr().is_terminal()).with_writer(writer))
            .init();
    }
}
