//! The operator's own HTTP server: is it alive, does it work, what did it count.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::metrics::Metrics;

/// What the server shows.
#[derive(Clone, Debug)]
pub struct Admin {
    pub metrics: Arc<Metrics>,
    /// Set once the resource's definition is there and has been listed, and the operator works or stands by.
    pub ready: Arc<AtomicBool>,
}

/// `/healthz`: the process runs. `/readyz`: it watches `NodeImageBuilds`, or stands by to do so. `/metrics`: for Prometheus.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(admin)
}

async fn readyz(State(admin): State<Admin>) -> Response {
    if admin.ready.load(Ordering::Acquire) {
        "ok\n".into_response()
    } else {
        let text = "the CustomResourceDefinition nodeimagebuilds.nodeimagebuild.dev is not served yet or can not be listed, or the lease \
             can not be read\n";
        (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    match admin.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
