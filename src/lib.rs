//! Node images for EKS Anywhere, from a Kubernetes resource or the command line.
//!
//! A [`NodeImageBuild`](api::v1alpha1::NodeImageBuild) is observed by the [`controller`], which resolves the EKS
//! Anywhere [`release`], writes a [`BuildRequest`](contract::BuildRequest) and starts one Job. In its pod the [`build`]
//! driver runs the stages: [`fetch`] artifacts, let an engine ([`native`]) make the disk, [`package`] it while it is
//! [`publish`]ed, for instance to the artifact server ([`serve`]). The pod reports back through its output and
//! termination message only, in the words of the [`contract`]. On nodes, a [`device_plugin`] offers KVM.
//!
//! Dependencies point one way: `contract` <- `api`, `release`, `fetch`, `package` <- `native` <- `imagebuilder`, `publish` <-
//! `build` <- `cli`; `device_plugin` uses `native`; `controller` uses `api`, `contract` and `release`, never `build`.

pub mod api;
pub mod build;
pub mod cli;
pub mod contract;
pub mod controller;
pub mod device_plugin;
pub mod error;
pub mod fetch;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod http;
pub mod imagebuilder;
pub mod native;
pub mod package;
pub mod process;
pub mod progress;
pub mod publish;
pub mod reach;
pub mod release;
pub mod secret;
pub mod serve;
pub mod telemetry;
