//! Values for tests of this module.

use serde_json::json;
use sha2::{Digest, Sha256};

use super::{image_contract::Expected, packages};
use crate::contract::{BuildRequest, Firmware, Provider};

/// Contents of etcd's archive in [`request`].
pub(super) const ETCD: &str = "the archive of etcd";

pub(crate) fn request() -> BuildRequest {
    let artifact = |name: &str| json!({"name": name, "url": format!("http://mirror/{name}"), "sha256": "0".repeat(64)});
    let versioned = |name: &str, version: &str| json!({"version": version, "artifact": artifact(name)});
    let mut etcd = versioned("etcd", "v3.5.21");
    etcd["artifact"]["sha256"] = json!(hex::encode(Sha256::digest(ETCD)));
    serde_json::from_value(json!({
        "version": crate::contract::VERSION,
        "identity": {"namespace": "ns", "name": "n", "buildId": "0123456789"},
        "os": {"name": "debian", "version": "12"},
        "provider": "baremetal",
        "firmware": "efi",
        "release": {
            "eksaVersion": "v0.26.1", "bundleNumber": 101, "channel": "1-34", "eksdName": "kubernetes-1-34-eks-2",
            "kubernetesVersion": "v1.34.4", "fullVersion": "v1.34.4-eks-1-34-2",
            "imageRepository": "public.ecr.aws/eks-distro",
            "pauseImage": "public.ecr.aws/eks-distro/kubernetes/pause:v1.34.4-eks-1-34-2",
            "kubelet": artifact("kubelet"), "kubeadm": artifact("kubeadm"), "kubectl": artifact("kubectl"),
            "images": [artifact("pause.tar")],
            "cniPlugins": versioned("cni-plugins", "v1.7.1"), "etcd": etcd, "etcdadm": versioned("etcdadm", "v0.1.5"),
            "containerd": versioned("containerd", "v2.1.4"), "crictl": versioned("cri-tools", "v1.34.0"),
        },
        "base": {"url": "http://mirror/base", "checksum": {"sha256": "0".repeat(64)}},
        "diskSizeMib": 6656,
        "verify": {"boot": "Never", "accelerator": "Any", "timeoutSeconds": 600},
        "publish": [],
    }))
    .unwrap()
}

pub(super) fn expected(provider: Provider) -> Expected {
    let request = request();
    let packages = packages::recipe(&request.os, provider, Firmware::Efi).into_iter().map(str::to_owned).collect();
    Expected {
        os: request.os,
        provider,
        firmware: request.firmware,
        images: vec![request.release.pause_image.clone()],
        release: Some(request.release),
        packages,
        upstream: false,
    }
}
