//! The engine `ImageBuilder`: its var-files.

mod guest;
mod prism_central;
mod site;
mod varfiles;
mod vcenter;

use node_image_builder::contract::{BuildRequest, Engine, ImageBuilderSettings, VERSION};
use serde_json::{Value, json};

/// Channel 1-31 of EKS Distro, release 47.
fn release() -> Value {
    let distro = "https://distro.eks.amazonaws.com/kubernetes-1-31/releases/47/artifacts";
    let bundle = "https://anywhere-assets.eks.amazonaws.com/releases/bundles/112/artifacts";
    let artifact = |name: &str, url: String, digit: char| json!({"name": name, "url": url, "sha256": digit.to_string().repeat(64)});
    let program = |name: &str| artifact(name, format!("{distro}/kubernetes/v1.31.14/bin/linux/amd64/{name}"), '1');
    let versioned = |version: &str, artifact: Value| json!({"version": version, "artifact": artifact});
    let containerd = format!("{bundle}/1-31/containerd/v1.7.28/containerd-linux-amd64.tar.gz");
    json!({
        "eksaVersion": "v0.26.1", "bundleNumber": 112, "channel": "1-31", "eksdName": "kubernetes-1-31-eks-47",
        "kubernetesVersion": "v1.31.14", "fullVersion": "v1.31.14-eks-1-31-47",
        "imageRepository": "public.ecr.aws/eks-distro",
        "pauseImage": "public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47",
        "kubelet": program("kubelet"), "kubeadm": program("kubeadm"), "kubectl": program("kubectl"),
        "images": [program("kube-proxy.tar"), program("pause.tar")],
        "cniPlugins": versioned("v1.7.1", artifact(
            "cni-plugins", format!("{distro}/plugins/v1.7.1/cni-plugins-linux-amd64-v1.7.1.tar.gz"), '2')),
        "etcd": versioned("v3.5.21", artifact("etcd", format!("{distro}/etcd/v3.5.21/etcd-linux-amd64-v3.5.21.tar.gz"), '3')),
        "etcdadm": versioned("v0.1.5", artifact("etcdadm", format!("{bundle}/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz"), '4')),
        "containerd": versioned("v1.7.28", artifact("containerd", containerd, '5')),
        "crictl": versioned("v1.36.0", artifact(
            "cri-tools", format!("{bundle}/cri-tools/v1.36.0/cri-tools-linux-amd64.tar.gz"), '6')),
    })
}

/// Every image that upstream's recipes make (docs/engines.md).
const MATRIX: &[((&str, &str), &str, &str)] = &[
    (("ubuntu", "22.04"), "baremetal", "efi"),
    (("ubuntu", "24.04"), "baremetal", "efi"),
    (("redhat", "8"), "baremetal", "bios"),
    (("redhat", "9"), "baremetal", "efi"),
    (("ubuntu", "22.04"), "vsphere", "bios"),
    (("ubuntu", "22.04"), "vsphere", "efi"),
    (("ubuntu", "24.04"), "vsphere", "bios"),
    (("ubuntu", "24.04"), "vsphere", "efi"),
    (("redhat", "8"), "vsphere", "bios"),
    (("redhat", "9"), "vsphere", "bios"),
    (("redhat", "9"), "vsphere", "efi"),
    (("ubuntu", "22.04"), "nutanix", "bios"),
    (("ubuntu", "24.04"), "nutanix", "bios"),
    (("redhat", "8"), "nutanix", "bios"),
    (("redhat", "9"), "nutanix", "bios"),
];

/// A build; `more` replaces fields of its document.
fn request(os: (&str, &str), provider: &str, firmware: &str, more: Value) -> BuildRequest {
    let target = match provider {
        "vsphere" => json!({"vsphere": {
            "server": "vcenter.example.com", "slot": "vsphere", "datacenter": "dc1", "cluster": "cluster1",
            "datastore": "datastore1", "network": "VM Network", "folder": "/dc1/vm/templates", "resourcePool": "pool1",
            "templateName": "golden", "vmxVersion": if os == ("redhat", "9") { 18 } else { 15 },
            "convertToTemplate": false,
        }}),
        "nutanix" => json!({"nutanix": {
            "endpoint": "prism.example.com", "port": 9440, "slot": "nutanix", "cluster": {"name": "pe1"},
            "subnet": "vm-network", "imageName": "ubuntu-2204-kube-1-31",
        }}),
        _ => Value::Null,
    };
    let mut document = json!({
        "version": VERSION, "identity": {"namespace": "ns", "name": "n", "buildId": "0123456789"},
        "os": {"name": os.0, "version": os.1}, "provider": provider, "firmware": firmware, "release": release(),
        "engine": {"imageBuilder": {"timeoutSeconds": 6900}}, "base": null, "diskSizeMib": 6656,
        "verify": {"boot": "Never", "accelerator": "Any", "timeoutSeconds": 900}, "publish": [],
        "providerTarget": target,
    });
    if let (Some(document), Value::Object(more)) = (document.as_object_mut(), more) {
        document.extend(more);
    }
    serde_json::from_value(document).unwrap()
}

fn settings(request: &BuildRequest) -> &ImageBuilderSettings {
    match &request.engine {
        Engine::ImageBuilder(settings) => settings,
        Engine::Native => panic!("a build of the other engine"),
    }
}
