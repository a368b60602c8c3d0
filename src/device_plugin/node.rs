//! The label of the node.

use std::{convert::Infallible, future::pending};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::sync::watch;

use super::{Kvm, LABEL, persistently};

/// Keeps the label at what is known of KVM.
pub(super) async fn follow(client: &Client, node: &str, mut kvm: watch::Receiver<Kvm>) -> Infallible {
    let nodes: Api<Node> = Api::all(client.clone());
    loop {
        kvm.mark_unchanged();
        let label = async || {
            // Each attempt says what is known then.
            let value = (*kvm.borrow() == Kvm::RunsGuests).to_string();
            let patch = Patch::Merge(json!({ "metadata": { "labels": { LABEL: value } } }));
            nodes.patch_metadata(node, &PatchParams::default(), &patch).await?;
            tracing::info!(node, "labelled the node {LABEL}={value}");
            Ok::<_, kube::Error>(())
        };
        persistently(label, "can not label the node").await;
        if kvm.changed().await.is_err() {
            // Nothing more will be known: the plugin ends.
            pending::<Infallible>().await;
        }
    }
}
