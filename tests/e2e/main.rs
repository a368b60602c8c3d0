//! End-to-end tests in the development cluster that `dev/e2e` brings up: real API server, scheduler, kubelet, containerd,
//! artifact server, QEMU. Run them with `make e2e`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]
#![allow(clippy::case_sensitive_file_extension_comparisons, reason = "names are ours")]
#![allow(unreachable_pub, reason = "nothing outside uses a test crate")]

mod bare_metal;
mod cluster;
mod command_line;
mod faults;
mod image_builder;
mod kvm_device_plugin;
mod lifecycle;
mod machine;
mod mirror;
mod node;
mod nutanix;
/// The Prism Central of the other tests.
#[path = "../it/nutanix/prism.rs"]
#[allow(dead_code, reason = "faults are for the other tests")]
mod prism;
mod promises;
mod redhat;
#[path = "../it/support"]
mod support {
    pub mod tls;
}
mod user_namespaces;
mod vsphere;
