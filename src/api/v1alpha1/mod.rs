//! `nodeimagebuild.dev/v1alpha1`: the kind [`NodeImageBuild`], one file a concept.
//!
//! The doc comments of fields are the user's documentation: they become descriptions in the definition that
//! [`definition`] makes, which is also checked in under `crds/`.

#![expect(unreachable_pub, reason = "kube's schema derive repeats public structs inside a function")]
#![warn(missing_docs)]

mod bare_metal;
mod build;
pub mod conditions;
mod contents;
mod nutanix;
mod publish;
mod references;
mod schema;
mod spec;
mod status;
mod vsphere;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

pub use self::{
    bare_metal::BareMetal,
    build::{Build, DeletionPolicy, Engine, History, ImageBuilder, Rebuild, Resources, Retention, Verify},
    contents::{Base, Epel, File, Os, Packages, Repository, Source, Subscription},
    nutanix::{Nutanix, NutanixCluster},
    publish::{ArtifactServer, Http, Publish, S3},
    references::{KeyReference, SecretReference, TrustBundle},
    spec::{InvalidField, NodeImageBuild, NodeImageBuildSpec},
    status::{BuildResult, FailureStatus, HistoryEntry, ImageStatus, NodeImageBuildStatus, Phase, ReleaseStatus},
    vsphere::Vsphere,
};

/// API group of the kind, and prefix of every annotation and label of ours.
pub const GROUP: &str = "nodeimagebuild.dev";
/// Annotation of a `NodeImageBuild`: each new value asks for one build, whether or not anything changed.
pub const REBUILD_ANNOTATION: &str = "nodeimagebuild.dev/rebuild";
/// Label of everything made for a build: name of its `NodeImageBuild`.
pub const NAME_LABEL: &str = "nodeimagebuild.dev/name";
/// Label of everything made for a build: its identity, as in `status.buildID`.
pub const BUILD_ID_LABEL: &str = "nodeimagebuild.dev/build-id";
/// Finalizer of a `NodeImageBuild`: cancels its build and cleans up what stands outside the cluster.
pub const FINALIZER: &str = "nodeimagebuild.dev/cleanup";

/// The definition of the kind, ready to be installed. Use this and not `NodeImageBuild::crd()`, whose schema lets `null`
/// pass for a value.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = NodeImageBuild::crd();
    schema::tidy(&mut definition);
    definition
}
