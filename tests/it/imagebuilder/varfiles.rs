//! The var-files are those of the EKS Anywhere tool: its four worked examples, key by key.

use std::collections::BTreeSet;

use node_image_builder::{
    contract::{BuildRequest, Classified, ResolvedRelease},
    imagebuilder::{
        recipe::Recipe,
        varfiles::{Known, VarFile, generate},
    },
};
use rstest::rstest;
use serde_json::{Value, json};

use super::{request, settings};

fn known() -> Known {
    Known {
        host_device_sha256: "7".repeat(64),
        username: "builder@vsphere.local".into(),
        password: "canary".into(),
        ..Known::default()
    }
}

fn files(request: &BuildRequest) -> Vec<VarFile> {
    generate(request, settings(request), &known()).unwrap()
}

/// What Packer sees in the end: later files win.
fn merged(files: &[VarFile]) -> Value {
    let mut all = serde_json::Map::new();
    for file in files {
        all.extend(file.vars.as_object().unwrap().clone());
    }
    Value::Object(all)
}

fn names(files: &[VarFile]) -> Vec<&str> {
    files.iter().map(|file| file.name).collect()
}

/// The four files that are the same for every image.
fn common() -> [Value; 4] {
    let distro = "https://distro.eks.amazonaws.com/kubernetes-1-31/releases/47/artifacts";
    let bundle = "https://anywhere-assets.eks.amazonaws.com/releases/bundles/112/artifacts";
    [
        json!({
            "containerd_sha256": "5".repeat(64),
            "containerd_url": format!("{bundle}/1-31/containerd/v1.7.28/containerd-linux-amd64.tar.gz"),
            "crictl_source_type": "http",
            "crictl_url": format!("{bundle}/cri-tools/v1.36.0/cri-tools-linux-amd64.tar.gz"),
            "crictl_sha256": "6".repeat(64),
            "kubernetes_container_registry": "public.ecr.aws/eks-distro",
            "kubernetes_http_source": format!("{distro}/kubernetes"),
            "kubernetes_load_additional_imgs": "true",
            "kubernetes_semver": "v1.31.14",
            "kubernetes_full_version": "v1.31.14-eks-1-31-47",
            "kubernetes_series": "v1.31",
            "kubernetes_source_type": "http",
            "etcd_http_source": format!("{distro}/etcd/v3.5.21/etcd-linux-amd64-v3.5.21.tar.gz"),
            "etcd_version": "v3.5.21",
            "etcd_sha256": "3".repeat(64),
            "etcdadm_http_source": format!("{bundle}/etcdadm/v0.1.5/etcdadm-linux-amd64.tar.gz"),
            "etcdadm_version": "v0.1.5",
        }),
        json!({
            "pause_image": "public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47",
            "extra_debs": "nfs-common xfsprogs",
            "http_proxy": "", "https_proxy": "", "no_proxy": "",
        }),
        json!({
            "kubernetes_cni_deb_version": "",
            "kubernetes_cni_rpm_version": "",
            "kubernetes_cni_http_checksum": format!("sha256:{}", "2".repeat(64)),
            "kubernetes_cni_http_source": format!("{distro}/plugins"),
            "kubernetes_cni_semver": "v1.7.1",
            "kubernetes_cni_source_type": "http",
            "kubernetes_cni_host_device_sha256": "7".repeat(64),
        }),
        json!({
            "additional_url_images": "true",
            "additional_url_images_list": format!("{distro}/kubernetes/v1.31.14/bin/linux/amd64/pause.tar"),
            "load_additional_components": "true",
        }),
    ]
}

fn values(files: &[VarFile]) -> Vec<Value> {
    files.iter().map(|file| file.vars.clone()).collect()
}

#[test]
fn example_a_is_ubuntu_for_bare_metal() {
    let request = request(("ubuntu", "22.04"), "baremetal", "efi", json!({}));
    let files = files(&request);
    assert_eq!(names(&files), ["kubernetes", "common", "cni", "additional_components", "baremetal"]);
    let own = json!({"disk_size": "6656", "rhel_username": "", "rhel_password": ""});
    assert_eq!(values(&files), common().into_iter().chain([own]).collect::<Vec<_>>());

    let recipe = Recipe::of(&request, false).unwrap();
    let config = |name: &str| format!("packer/config/{name}.json");
    let common = [
        "kubernetes",
        "cni",
        "containerd",
        "wasm-shims",
        "ansible-args",
        "goss-args",
        "common",
        "additional_components",
        "ecr_credential_provider",
    ];
    let expected: Vec<_> =
        common.map(config).into_iter().chain(["packer/raw/raw-ubuntu-2204-efi.json".to_owned()]).collect();
    assert_eq!((recipe.var_files, recipe.template), (expected, "packer/raw/packer.json"));
}

#[test]
fn example_b_is_ubuntu_for_vsphere() {
    let request = request(("ubuntu", "22.04"), "vsphere", "bios", json!({}));
    let files = files(&request);
    let order = ["kubernetes", "common", "cni", "additional_components", "vsphere-library", "vsphere"];
    assert_eq!(names(&files), order);
    let own = json!({
        "vcenter_server": "vcenter.example.com", "username": "builder@vsphere.local", "password": "canary",
        "datacenter": "dc1", "cluster": "cluster1", "datastore": "datastore1", "folder": "/dc1/vm/templates",
        "network": "VM Network", "resource_pool": "pool1", "insecure_connection": "false",
        "convert_to_template": "false", "create_snapshot": "false", "linked_clone": "false", "template": "",
        "vmx_version": "15", "rhel_username": "", "rhel_password": "",
    });
    let expected = common().into_iter().chain([json!({"output_dir": "./output"}), own]).collect::<Vec<_>>();
    assert_eq!(values(&files), expected);
    let recipe = Recipe::of(&request, false).unwrap();
    let own = ["packer/ova/packer-common.json", "packer/ova/ubuntu-2204.json", "packer/ova/vsphere.json"];
    assert_eq!(recipe.var_files[9..], own);
    assert_eq!((recipe.template, recipe.builder), ("packer/ova/packer-node.json", "vsphere"));
    assert_eq!(Recipe::of(&request, true).unwrap().builder, "vsphere-clone");
}

#[test]
fn example_c_is_ubuntu_for_nutanix() {
    let request = request(("ubuntu", "22.04"), "nutanix", "bios", json!({}));
    let files = files(&request);
    assert_eq!(names(&files), ["kubernetes", "common", "cni", "additional_components", "nutanix"]);
    let own = json!({
        "nutanix_endpoint": "prism.example.com", "nutanix_port": "9440", "nutanix_insecure": "false",
        "nutanix_cluster_name": "pe1", "nutanix_subnet_name": "vm-network",
        "nutanix_username": "builder@vsphere.local", "nutanix_password": "canary",
        "image_name": "ubuntu-2204-kube-1-31", "image_export": "true", "rhel_username": "", "rhel_password": "",
    });
    assert_eq!(files[4].vars, own);
    let recipe = Recipe::of(&request, false).unwrap();
    assert_eq!(recipe.var_files[9..], ["packer/nutanix/nutanix.json", "packer/nutanix/ubuntu-2204.json"]);
}

#[test]
fn example_d_is_red_hat_for_vsphere_with_a_medium_and_a_subscription() {
    let more = json!({
        "base": {"url": "https://mirror.example.com/rhel-9.4.iso", "checksum": {"sha512": "8".repeat(128)}},
        "packages": {"install": ["jq", "tmux"]},
        "proxy": {"http": "http://proxy.example.com:3128", "noProxy": ["10.0.0.0/8"]},
        "subscription": {
            "slot": "rhsm", "server": "satellite.example.com", "proxy": ["proxy.example.com", 3128],
        },
        "engine": {"imageBuilder": {
            "timeoutSeconds": 6900, "nodeRolesPost": ["/roles/own"], "sshTimeoutSeconds": 3600,
        }},
    });
    let request = request(("redhat", "9"), "vsphere", "bios", more);
    let own = files(&request).pop().unwrap().vars;
    for (key, value) in [
        ("vmx_version", "18"),
        ("iso_url", "https://mirror.example.com/rhel-9.4.iso"),
        ("iso_checksum", "8".repeat(128).as_str()),
        ("iso_checksum_type", "sha512"),
        ("extra_rpms", "jq tmux"),
        ("redhat_epel_rpm", ""),
        ("rhsm_server_hostname", "satellite.example.com"),
        ("rhsm_server_proxy_hostname", "proxy.example.com"),
        ("rhsm_server_proxy_port", "3128"),
        ("http_proxy", "http://proxy.example.com:3128"),
        ("no_proxy", "10.0.0.0/8"),
        ("node_custom_roles_post", "/roles/own"),
        ("ssh_timeout", "3600s"),
    ] {
        assert_eq!(own[key], value, "{key}");
    }
    assert_eq!(own.get("extra_debs"), None);
    assert_eq!(Recipe::of(&request, false).unwrap().var_files[10], "packer/ova/rhel-9.json");
}

#[test]
fn packages_of_the_user_come_in_addition_to_those_of_every_node() {
    let request = request(("ubuntu", "24.04"), "baremetal", "efi", json!({"packages": {"install": ["jq"]}}));
    assert_eq!(merged(&files(&request))["extra_debs"], "nfs-common xfsprogs jq");
}

#[test]
fn every_value_is_a_text() {
    for (os, provider, firmware) in super::MATRIX {
        let request = request(*os, provider, firmware, json!({}));
        Recipe::of(&request, false).unwrap();
        let files = files(&request);
        let all = merged(&files);
        let others: BTreeSet<_> =
            all.as_object().unwrap().iter().filter(|(_, value)| !value.is_string()).map(|(key, _)| key).collect();
        assert!(others.is_empty(), "{others:?}");
    }
}

#[rstest]
#[case::another_layout("kubelet", |release: &mut ResolvedRelease| release.kubelet.url = "https://mirror.example.com/kubelet".parse().unwrap())]
#[case::no_digest("containerd", |release: &mut ResolvedRelease| release.containerd.artifact.sha256 = None)]
#[case::no_pause_image("pause.tar", |release: &mut ResolvedRelease| release.images.clear())]
fn a_release_that_upstreams_roles_can_not_install_is_told(
    #[case] name: &str,
    #[case] change: fn(&mut ResolvedRelease),
) {
    let mut request = request(("ubuntu", "22.04"), "baremetal", "efi", json!({}));
    change(&mut request.release);
    let error = generate(&request, settings(&request), &known()).unwrap_err();
    assert_eq!(error.reason(), "ReleaseUnsuitable");
    assert!(error.to_string().contains(name) && error.to_string().contains("mirror"), "{error}");
}

#[rstest]
#[case(("debian", "12"), "baremetal", "efi")]
#[case(("redhat", "8"), "baremetal", "efi")]
#[case(("ubuntu", "22.04"), "nutanix", "efi")]
fn what_no_recipe_makes_is_refused(#[case] os: (&str, &str), #[case] provider: &str, #[case] firmware: &str) {
    let error = Recipe::of(&request(os, provider, firmware, json!({})), false).unwrap_err();
    assert_eq!(error.reason(), "NotSupported");
    assert!(error.to_string().contains("docs/engines.md"), "{error}");
}
