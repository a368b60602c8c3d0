//! Integration tests: one crate, one module an area, so that everything is linked once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]
#![allow(unreachable_pub, reason = "nothing outside uses a test crate")]

mod architecture;
mod chart;
mod cli;
mod controller;
mod crd;
mod device_plugin;
mod examples;
mod failures;
mod fetch;
mod image_contract;
mod imagebuilder;
mod installed;
mod monitoring;
mod nutanix;
mod ova;
mod package;
mod publish;
mod release;
mod support;
mod traces;
mod vsphere;
