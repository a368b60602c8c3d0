//! The definition of `NodeImageBuild`: generated, checked in and, on a real API server, enforced.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::{DynamicObject, GroupVersionKind},
    discovery::ApiResource,
};
use node_image_builder::{
    api::v1alpha1::{
        self, BuildResult, FailureStatus, HistoryEntry, ImageStatus, NodeImageBuild, NodeImageBuildSpec,
        NodeImageBuildStatus, Phase, ReleaseStatus, conditions,
    },
    contract::{FailureClass, Progress, Provider, Stage},
};
use serde_json::{Value, json};

use crate::support::apiserver;

#[test]
fn checked_in_definition_is_what_the_types_generate() {
    let output = Command::new(env!("CARGO_BIN_EXE_image-builder")).arg("crd").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let generated = String::from_utf8(output.stdout).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds/nodeimagebuilds.nodeimagebuild.dev.yaml");
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == generated, "{} is stale: run `make crds` and look at the difference", path.display());
}

/// A rule about one value: what it accepts and what it refuses, wherever it stands.
struct ValueRule {
    message: &'static str,
    accepts: &'static [&'static str],
    refuses: &'static [&'static str],
}

const VALUE_RULES: &[ValueRule] = &[
    ValueRule {
        message: "write the release channel with a dash, as EKS Anywhere does: 1-31 for Kubernetes 1.31",
        accepts: &["1-30", "1-36", "1-100"],
        refuses: &["1.31", "v1-31", "1-31-eks", "2-1", ""],
    },
    ValueRule {
        message: "write the EKS Anywhere version with its leading v, e.g. v0.26.1",
        accepts: &["v0.26.1", "v0.0.0-dev+build.12345"],
        refuses: &["0.26.1", "latest", "v0.26"],
    },
    ValueRule {
        message: "write an http:// or https:// URL with a host and without user name and password; credentials go into a Secret",
        accepts: &["http://10.0.0.1:8080/a%20b?c=d", "https://[fd00::1]/x", "https://mirror.example.com"],
        refuses: &[
            "mirror.example.com/x",
            "ftp://mirror.example.com",
            "https://",
            "https://user:secret@example.com/x",
            "https://a b/",
        ],
    },
    ValueRule {
        message: "write the SHA-256 as 64 lower-case hexadecimal digits",
        accepts: &["0000000000000000000000000000000000000000000000000000000000abcdef"],
        refuses: &["abcdef", "0000000000000000000000000000000000000000000000000000000000ABCDEF", "sha256:00"],
    },
    ValueRule {
        message: "write the SHA-512 as 128 lower-case hexadecimal digits",
        accepts: &["0000000000000000000000000000000000000000000000000000000000000000\
                    00000000000000000000000000000000000000000000000000000000000000ab"],
        refuses: &["0000000000000000000000000000000000000000000000000000000000abcdef"],
    },
    ValueRule {
        message: "write a whole number from 4Gi to 2Ti with the unit Mi, Gi or Ti, e.g. 20Gi",
        accepts: &["4096Mi", "20Gi", "2Ti"],
        refuses: &["20", "20G", "1.5Gi", "4095Mi", "3Ti", "-20Gi", "99999999Ti"],
    },
    ValueRule {
        message: "write a duration from 5m to 24h in hours, minutes and seconds, e.g. 2h or 1h30m",
        accepts: &["5m", "300s", "1h30m", "24h"],
        refuses: &["", "2", "2 hours", "4m59s", "24h1s", "-2h", "1d"],
    },
    ValueRule {
        message: "write a quantity as in a Pod, e.g. 2, 500m or 8Gi",
        accepts: &["4", "500m", "8Gi"],
        refuses: &["much", "8GiB", "-1"],
    },
    ValueRule {
        message: "write the name of an object in the namespace of the NodeImageBuild: lower-case letters, digits, - and .",
        accepts: &["a", "vcenter.credentials-1"],
        refuses: &["", "Vcenter", "other-namespace/vcenter", "-a", "a..b"],
    },
    ValueRule {
        message: "write a key of the object's data: letters, digits, -, _ and .",
        accepts: &["ca.crt", ".dockerconfigjson", "CA_1"],
        refuses: &["", "a/b", "a key"],
    },
    ValueRule {
        message: "write one package name an item, optionally with =version, e.g. jq or nginx=1.22.*",
        accepts: &["libstdc++6", "nginx=1.22.*", "bash:amd64", "tzdata=2024a-0+deb12u1"],
        refuses: &["", "jq curl", "--allow-downgrades", "-y", "jq=", "$(reboot)", "a;b"],
    },
    ValueRule {
        message: "write a file name without extension: lower-case letters, digits, - and _",
        accepts: &["example-tools", "9_x"],
        refuses: &["", "Example", "a.list", "../a"],
    },
    ValueRule {
        message: "write the absolute path of a file without . and .. parts, e.g. /etc/motd",
        accepts: &["/motd", "/etc/a b/..c", "/var/lib/x.y/z"],
        refuses: &["", "/", "etc/motd", "/etc/", "/etc//motd", "/etc/../motd", "/etc/./motd", "/etc/..", "/a\nb"],
    },
    ValueRule {
        message: "write the name or number of an account that exists in the image, e.g. root or 1000",
        accepts: &["_apt", "systemd-network", "0", "1000"],
        refuses: &["", "root:root", "Root", "12345678901", "-1"],
    },
    ValueRule {
        message: "write the mode as three or four octal digits in quotes, e.g. \"0644\"",
        accepts: &["644", "0755", "4711"],
        refuses: &["", "rw-r--r--", "0o644", "0988", "00644"],
    },
    ValueRule {
        message: "write a host name or address, optionally with :port, without https:// and without a path",
        accepts: &["vcenter.example.com", "10.0.0.1:8443", "[fd00::1]:443", "vc"],
        refuses: &["", "https://vcenter.example.com", "vcenter.example.com/sdk", "user@vcenter", "fd00::1", "vcenter:"],
    },
    ValueRule {
        message: "write a host name or address without https://, port and path; the port has a field of its own",
        accepts: &["prism.example.com", "10.0.0.1", "[fd00::1]"],
        refuses: &["", "https://prism.example.com", "prism.example.com:9440", "prism.example.com/x", "fd00::1"],
    },
    ValueRule {
        message: "write the certificate's SHA-256 (or SHA-1) digest as pairs of hexadecimal digits with colons between, e.g. A1:B2:...",
        accepts: &[
            "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33",
            "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff",
        ],
        refuses: &["", "A1:B2", "00112233445566778899AABBCCDDEEFF00112233", "sha256:00"],
    },
    ValueRule {
        message: "write a name of at most 80 letters, digits, -, _ and ., e.g. ubuntu-2204-kube-1-31",
        accepts: &["ubuntu-22.04_kube-v1.31"],
        refuses: &["-kube-1-31", "a/kube-1-31", "ubuntu kube-1-31", "ubuntu%2fkube-1-31"],
    },
    ValueRule {
        message: "write a UUID, e.g. 0005b6f1-8f43-4a8c-9d1f-000000000001",
        accepts: &["0005B6F1-8f43-4a8c-9d1f-000000000001"],
        refuses: &["", "pe-cluster-1", "0005b6f18f434a8c9d1f000000000001"],
    },
    ValueRule {
        message: "write a bucket name: 3 to 63 lower-case letters, digits, - and .",
        accepts: &["abc", "node.images-1"],
        refuses: &["", "ab", "Node-Images", "-images", "s3://images"],
    },
    ValueRule {
        message: "write the prefix without / at its ends, from letters, digits, -, _, . and /, e.g. images/production",
        accepts: &["images", "a/b/C_1.2"],
        refuses: &["", "/images", "images/", "a//b", "a b"],
    },
    ValueRule {
        message: "write a region, e.g. eu-central-1",
        accepts: &["eu-central-1", "garage"],
        refuses: &["", "eu central", "EU"],
    },
    ValueRule {
        message: "write five cron fields (minute, hour, day of month, month, day of week), e.g. 0 3 * * 1, or @daily",
        accepts: &["*/5 0-3 1,15 JAN MON#2", "@weekly", "0 3 L * ?"],
        refuses: &["", "0 3 * *", "0 0 3 * * 1", "@reboot", "every day"],
    },
    ValueRule {
        message: "write a name of the time zone database, e.g. Europe/Berlin",
        accepts: &["UTC", "America/Argentina/Buenos_Aires", "Etc/GMT+5"],
        refuses: &["", "+01:00", "Europe/", "/Berlin", "Europe Berlin"],
    },
    ValueRule {
        message: "write the name of an Ansible role or its path in the builder image, one an item",
        accepts: &["hardening", "/home/imagebuilder/roles/hardening", "./roles/x"],
        refuses: &["", "a b", "-e@x", "a;b"],
    },
];

/// Valid specifications that together hold every value a rule speaks about.
fn specimens() -> Vec<Value> {
    vec![
        json!({
            "os": {"name": "debian", "version": "12"},
            "releaseChannel": "1-31",
            "eksaRelease": "v0.26.1",
            "base": {
                "url": "https://mirror.example.com/root.tar.xz",
                "sha256": "3f5a1c0e9b7d24680f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778",
            },
            "diskSize": "20Gi",
            "packages": {
                "install": ["jq"],
                "repositories": [{"name": "tools", "content": "deb https://tools.example.com ./"}],
            },
            "files": [
                {"path": "/etc/a", "content": "", "owner": "root", "group": "root", "mode": "0644"},
                {"path": "/etc/b", "secretKeyRef": {"name": "files", "key": "b"}},
                {"path": "/etc/c", "configMapKeyRef": {"name": "files", "key": "c"}},
            ],
            "trustBundle": {"configMapKeyRef": {"name": "ca", "key": "ca.crt"}},
            "source": {
                "releaseManifestURL": "https://mirror.example.com/manifest.yaml",
                "eksaBaseURL": "https://mirror.example.com/eks-a",
                "eksdBaseURL": "https://mirror.example.com/eks-d",
            },
            "baremetal": {},
            "publish": [
                {"artifactServer": {}},
                {"s3": {
                    "bucket": "images", "prefix": "a/b", "region": "eu-central-1", "endpoint": "https://s3.example.com",
                    "publicURL": "https://images.example.com", "credentialsSecretRef": {"name": "bucket"},
                }},
                {"http": {
                    "url": "https://files.example.com/in", "publicURL": "https://files.example.com/out",
                    "credentialsSecretRef": {"name": "files"},
                }},
            ],
            "build": {"resources": {"requests": {"cpu": 4}, "limits": {"cpu": "8"}}, "timeout": "3600s"},
        }),
        json!({
            "os": {"name": "redhat", "version": "8"},
            "releaseChannel": "1-31",
            "engine": "ImageBuilder",
            "base": {"url": "https://mirror.example.com/rhel.iso", "sha512": "0".repeat(128)},
            "packages": {"epel": {
                "releaseURL": "https://mirror.example.com/epel.rpm", "gpgKeyURL": "https://mirror.example.com/epel.key",
            }},
            "subscription": {
                "credentialsSecretRef": {"name": "subscription"}, "serverHostname": "satellite.example.com",
                "serverReleaseVersion": "8.10", "proxyHostname": "proxy.example.com", "proxyPort": 3128,
            },
            "trustBundle": {"secretKeyRef": {"name": "ca", "key": "ca.crt"}},
            "baremetal": {},
            "imageBuilder": {
                "firstBootRolesPre": ["a"], "firstBootRolesPost": ["b"], "nodeRolesPre": ["c"], "nodeRolesPost": ["d"],
            },
            "rebuild": {"schedule": "0 3 * * 1", "timeZone": "Europe/Berlin", "force": true},
        }),
        json!({
            "os": {"name": "ubuntu", "version": "22.04"},
            "releaseChannel": "1-31",
            "vsphere": vsphere(json!({
                "thumbprint": "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33",
                "templateName": "ubuntu-kube-1-31",
            })),
        }),
        json!({
            "os": {"name": "ubuntu", "version": "24.04"},
            "releaseChannel": "1-31",
            "base": {
                "url": "https://mirror.example.com/root.tar.xz",
                "sha256SumsURL": "https://mirror.example.com/SHA256SUMS",
            },
            "nutanix": nutanix(json!({
                "cluster": {"uuid": "0005b6f1-8f43-4a8c-9d1f-000000000001"}, "imageName": "ubuntu-kube-1-31",
            })),
        }),
    ]
}

fn vsphere(more: Value) -> Value {
    let settings = json!({
        "server": "vcenter.example.com", "credentialsSecretRef": {"name": "vcenter"}, "datacenter": "dc1",
        "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network",
    });
    merged(settings, more)
}

fn nutanix(more: Value) -> Value {
    merged(json!({"endpoint": "prism.example.com", "credentialsSecretRef": {"name": "prism"}}), more)
}

/// A rule between fields: a specification of which one change makes it refused.
struct FieldRule {
    message: &'static str,
    accepted: Value,
    refused: Value,
}

/// `accepted` and `refused` are merged into a minimal specification: ubuntu 22.04, channel 1-31, no provider.
#[expect(clippy::too_many_lines, reason = "a table")]
fn field_rules() -> Vec<FieldRule> {
    let rule = |message, accepted, refused| FieldRule { message, accepted, refused };
    let metal = |more| merged(json!({"baremetal": {}}), more);
    let base = json!({"url": "https://mirror.example.com/x", "sha256": "0".repeat(64)});
    let redhat =
        |version: &str, more| merged(metal(json!({"os": {"name": "redhat", "version": version}, "base": base})), more);
    let satellite = |more| {
        let subscription = merged(json!({"credentialsSecretRef": {"name": "subscription"}}), more);
        redhat("9", json!({"subscription": subscription}))
    };
    let cloned = |more| json!({"engine": "ImageBuilder", "vsphere": vsphere(merged(json!({"template": "t"}), more))});
    let on_vsphere = |more| json!({"vsphere": vsphere(more)});
    let redhat_on_vsphere = |version: &str| {
        merged(
            on_vsphere(json!({})),
            json!({"os": {"name": "redhat", "version": version}, "base": base, "firmware": "efi"}),
        )
    };
    let on_nutanix = |more| json!({"nutanix": nutanix(merged(json!({"cluster": {"name": "pe1"}}), more))});
    let publish = |target| metal(json!({"publish": [target]}));
    let file = |more| metal(json!({"files": [merged(json!({"path": "/etc/motd"}), more)]}));
    let reference = json!({"name": "a", "key": "b"});
    vec![
        rule(
            "write exactly one of baremetal, vsphere and nutanix; for bare metal without settings baremetal: {}",
            metal(json!({})),
            json!({}),
        ),
        rule(
            "write exactly one of baremetal, vsphere and nutanix; for bare metal without settings baremetal: {}",
            on_vsphere(json!({})),
            metal(on_vsphere(json!({}))),
        ),
        rule(
            "ubuntu is built in the versions \"22.04\" and \"24.04\": write one of them in quotes",
            metal(json!({"os": {"version": "24.04"}})),
            metal(json!({"os": {"version": "20.04"}})),
        ),
        rule(
            "redhat is built in the versions \"8\" and \"9\": write one of them in quotes",
            redhat("8", json!({})),
            redhat("7", json!({})),
        ),
        rule(
            "debian is built in the version \"12\": write it in quotes",
            redhat("12", json!({"os": {"name": "debian"}})),
            redhat("13", json!({"os": {"name": "debian"}})),
        ),
        rule(
            "write base with url and a checksum: only ubuntu has a default base",
            redhat("9", json!({})),
            redhat("9", json!({"base": null})),
        ),
        rule(
            "write base with url and a checksum: only ubuntu has a default base",
            merged(cloned(json!({})), json!({"os": {"name": "redhat", "version": "9"}})),
            merged(on_vsphere(json!({})), json!({"os": {"name": "redhat", "version": "9"}})),
        ),
        rule(
            "write base with url and a checksum: only ubuntu has a default base",
            merged(on_nutanix(json!({"sourceImageName": "rhel"})), json!({"os": {"name": "redhat", "version": "9"}})),
            merged(on_nutanix(json!({})), json!({"os": {"name": "redhat", "version": "9"}})),
        ),
        rule(
            "write exactly one of sha256, sha512 and sha256SumsURL: a base is never used unverified",
            metal(json!({"base": base})),
            metal(json!({"base": {"url": "https://mirror.example.com/x"}})),
        ),
        rule(
            "write exactly one of sha256, sha512 and sha256SumsURL: a base is never used unverified",
            metal(json!({"base": base})),
            metal(json!({"base": merged(base.clone(), json!({"sha512": "0".repeat(128)}))})),
        ),
        rule(
            "write base or nutanix.sourceImageName, not both: the image starts from one of them",
            on_nutanix(json!({"sourceImageName": "ubuntu"})),
            merged(on_nutanix(json!({"sourceImageName": "ubuntu"})), json!({"base": base})),
        ),
        rule(
            "write base or vsphere.template, not both: the image starts from one of them",
            cloned(json!({})),
            merged(cloned(json!({})), json!({"base": base})),
        ),
        rule(
            "nutanix images start by bios: write bios, or leave firmware out",
            merged(on_nutanix(json!({})), json!({"firmware": "bios"})),
            merged(on_nutanix(json!({})), json!({"firmware": "efi"})),
        ),
        rule(
            "redhat 8 images start by bios: write bios, or leave firmware out",
            redhat("8", json!({"firmware": "bios"})),
            redhat("8", json!({"firmware": "efi"})),
        ),
        rule(
            "redhat 8 images start by bios: write bios, or leave firmware out",
            redhat_on_vsphere("9"),
            redhat_on_vsphere("8"),
        ),
        rule(
            "baremetal images start by efi, but for redhat 8: write efi, or leave firmware out",
            metal(json!({"firmware": "efi"})),
            metal(json!({"firmware": "bios"})),
        ),
        rule(
            "baremetal images start by efi, but for redhat 8: write efi, or leave firmware out",
            merged(on_vsphere(json!({})), json!({"firmware": "bios"})),
            redhat("9", json!({"firmware": "bios"})),
        ),
        rule(
            "engine ImageBuilder knows ubuntu and redhat only: write Native, or leave engine out",
            metal(json!({"engine": "ImageBuilder"})),
            redhat("12", json!({"os": {"name": "debian"}, "engine": "ImageBuilder"})),
        ),
        rule(
            "imageBuilder holds settings of the engine ImageBuilder: write engine: ImageBuilder, or leave imageBuilder out",
            metal(json!({"engine": "ImageBuilder", "imageBuilder": {"ansibleVerbosity": 3}})),
            metal(json!({"imageBuilder": {"ansibleVerbosity": 3}})),
        ),
        rule(
            "only the engine ImageBuilder builds in a clone of vsphere.template: write engine: ImageBuilder, or base instead",
            cloned(json!({"linkedClone": true})),
            merged(cloned(json!({"linkedClone": true})), json!({"engine": "Native"})),
        ),
        rule(
            "the engine ImageBuilder runs Packer, which knows no vsphere.thumbprint: write vCenter's authority as trustBundle, or insecure: true",
            merged(on_vsphere(json!({})), json!({"engine": "ImageBuilder"})),
            merged(
                on_vsphere(json!({"thumbprint": "00".to_owned() + &":00".repeat(19)})),
                json!({"engine": "ImageBuilder"}),
            ),
        ),
        rule(
            "the engine ImageBuilder builds in a machine in Prism Central: write nutanix.subnet, where the machine goes",
            merged(on_nutanix(json!({"subnet": "vm-network"})), json!({"engine": "ImageBuilder"})),
            merged(on_nutanix(json!({})), json!({"engine": "ImageBuilder"})),
        ),
        rule(
            "only redhat has a subscription: leave it out",
            satellite(json!({})),
            metal(json!({"subscription": {"credentialsSecretRef": {"name": "subscription"}}})),
        ),
        rule(
            "only redhat has packages.epel: leave it out",
            redhat("9", json!({"packages": {"epel": {"enabled": false}}})),
            metal(json!({"packages": {"epel": {"enabled": false}}})),
        ),
        rule(
            "leave releaseURL and gpgKeyURL out where epel.enabled is false",
            redhat("9", json!({"packages": {"epel": {"releaseURL": "https://mirror.example.com/epel.rpm"}}})),
            redhat(
                "9",
                json!({"packages": {"epel": {
                    "enabled": false, "releaseURL": "https://mirror.example.com/epel.rpm",
                }}}),
            ),
        ),
        rule(
            "write serverReleaseVersion too: a Satellite server needs the release to subscribe to, e.g. \"9.4\"",
            satellite(json!({"serverHostname": "satellite.example.com", "serverReleaseVersion": "9.4"})),
            satellite(json!({"serverHostname": "satellite.example.com"})),
        ),
        rule(
            "write proxyHostname and proxyPort together, or neither",
            satellite(json!({"proxyHostname": "proxy.example.com", "proxyPort": 3128})),
            satellite(json!({"proxyHostname": "proxy.example.com"})),
        ),
        rule(
            "write proxy.http with its port for redhat, e.g. http://proxy.example.com:3128: the subscription service needs it",
            redhat("9", json!({"proxy": {"http": "http://proxy.example.com:3128"}})),
            redhat("9", json!({"proxy": {"http": "http://proxy.example.com"}})),
        ),
        rule(
            "write proxy.http, proxy.https or both, or leave proxy out",
            metal(json!({"proxy": {"https": "http://proxy.example.com:3128", "noProxy": [".svc"]}})),
            metal(json!({"proxy": {"noProxy": [".svc"]}})),
        ),
        rule(
            "write a proxy as http://host:port, without path, user name and password",
            metal(json!({"proxy": {"http": "http://10.0.0.1:3128/", "https": "https://[fd00::1]:3128"}})),
            metal(json!({"proxy": {"http": "http://user:secret@proxy.example.com:3128"}})),
        ),
        rule(
            "write a proxy as http://host:port, without path, user name and password",
            metal(json!({"proxy": {"https": "http://proxy.example.com"}})),
            metal(json!({"proxy": {"https": "proxy.example.com:3128"}})),
        ),
        rule(
            "write exactly one of configMapKeyRef and secretKeyRef",
            metal(json!({"trustBundle": {"secretKeyRef": reference}})),
            metal(json!({"trustBundle": {"secretKeyRef": reference, "configMapKeyRef": reference}})),
        ),
        rule(
            "write exactly one of content, secretKeyRef and configMapKeyRef",
            file(json!({"content": "hello"})),
            file(json!({})),
        ),
        rule(
            "write exactly one of content, secretKeyRef and configMapKeyRef",
            file(json!({"secretKeyRef": reference})),
            file(json!({"secretKeyRef": reference, "configMapKeyRef": reference})),
        ),
        rule(
            "write exactly one of artifactServer, s3 and http in each item of publish",
            publish(json!({"http": {"url": "https://files.example.com"}})),
            publish(json!({"http": {"url": "https://files.example.com"}, "artifactServer": {}})),
        ),
        rule(
            "write exactly one of artifactServer, s3 and http in each item of publish",
            publish(json!({"artifactServer": {}})),
            publish(json!({})),
        ),
        rule(
            "write artifactServer once: there is one",
            metal(json!({"publish": [{"artifactServer": {}}, {"http": {"url": "https://files.example.com"}}]})),
            metal(json!({"publish": [{"artifactServer": {}}, {"artifactServer": {}}]})),
        ),
        rule(
            "write region (for Amazon S3) or endpoint (for another store)",
            publish(json!({"s3": {"bucket": "images", "region": "eu-central-1"}})),
            publish(json!({"s3": {"bucket": "images"}})),
        ),
        rule(
            "leave accelerator out where boot is Never: nothing is booted",
            metal(json!({"verify": {"boot": "Never"}})),
            metal(json!({"verify": {"boot": "Never", "accelerator": "KVM"}})),
        ),
        rule(
            "timeZone is that of schedule: write schedule too, or leave timeZone out",
            metal(json!({"rebuild": {"timeZone": "UTC", "schedule": "@daily"}})),
            metal(json!({"rebuild": {"timeZone": "UTC", "onNewRelease": true}})),
        ),
        rule(
            "force is about the times of schedule: write schedule too, or leave force out",
            metal(json!({"rebuild": {"force": true, "schedule": "@daily"}})),
            metal(json!({"rebuild": {"force": true, "onNewRelease": true}})),
        ),
        rule(
            "write schedule or onNewRelease: true, or leave rebuild out",
            metal(json!({"rebuild": {"onNewRelease": true}})),
            metal(json!({"rebuild": {}})),
        ),
        rule(
            "a fixed eksaRelease never has a new release: leave eksaRelease or rebuild.onNewRelease out",
            metal(json!({"eksaRelease": "v0.26.1", "rebuild": {"schedule": "@daily"}})),
            metal(json!({"eksaRelease": "v0.26.1", "rebuild": {"onNewRelease": true}})),
        ),
        rule(
            "write cluster or resourcePool: vCenter needs a place to import to",
            on_vsphere(json!({"cluster": null, "resourcePool": "pool"})),
            on_vsphere(json!({"cluster": null})),
        ),
        rule(
            "write thumbprint or insecure: true, not both: a thumbprint makes the connection safe",
            on_vsphere(json!({"insecure": true})),
            on_vsphere(json!({"insecure": true, "thumbprint": "00".to_owned() + &":00".repeat(19)})),
        ),
        rule(
            "linkedClone says how template is cloned: write template too, or leave linkedClone out",
            cloned(json!({"linkedClone": false})),
            on_vsphere(json!({"linkedClone": false})),
        ),
        rule(
            "convertToTemplate is for images in the inventory: leave it out where contentLibrary is set",
            on_vsphere(json!({"convertToTemplate": false})),
            on_vsphere(json!({"convertToTemplate": false, "contentLibrary": "library"})),
        ),
        rule(
            "createSnapshot is for images in the inventory: leave it out where contentLibrary is set",
            on_vsphere(json!({"contentLibrary": "library"})),
            on_vsphere(json!({"createSnapshot": true, "contentLibrary": "library"})),
        ),
        rule(
            "write exactly one of name and uuid",
            on_nutanix(json!({})),
            on_nutanix(json!({"cluster": {"uuid": "0005b6f1-8f43-4a8c-9d1f-000000000001"}})),
        ),
        rule(
            "nutanix.imageName must contain the Kubernetes version of releaseChannel, or EKS Anywhere refuses the image: \
             write e.g. ubuntu-2204-kube-1-31",
            on_nutanix(json!({"imageName": "ubuntu-kube-v1.31.4"})),
            on_nutanix(json!({"imageName": "ubuntu-kube-1-30"})),
        ),
    ]
}

/// `patch` over `value`, as in a JSON merge patch (RFC 7386).
fn merged(value: Value, patch: Value) -> Value {
    match (value, patch) {
        (Value::Object(mut fields), Value::Object(patch)) => {
            for (key, patch) in patch {
                match patch {
                    Value::Null => drop(fields.remove(&key)),
                    patch => {
                        let old = fields.remove(&key).unwrap_or(Value::Null);
                        fields.insert(key, merged(old, patch));
                    }
                }
            }
            Value::Object(fields)
        }
        (_, patch) => patch,
    }
}

/// The rules of the definition: message -> the fields it is reported at, with `[*]` for every item and key.
fn rules_of_definition() -> BTreeMap<String, BTreeSet<String>> {
    fn walk(schema: &Value, path: &str, rules: &mut BTreeMap<String, BTreeSet<String>>) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let message = rule["message"].as_str().expect("each rule has a message");
            let field = path.to_owned() + rule["fieldPath"].as_str().unwrap_or_default();
            rules.entry(message.to_owned()).or_default().insert(field);
        }
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            walk(schema, &if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, rules);
        }
        for items in [schema.get("items"), schema.get("additionalProperties")].into_iter().flatten() {
            walk(items, &format!("{path}[*]"), rules);
        }
    }
    let definition = serde_json::to_value(v1alpha1::definition()).unwrap();
    let mut rules = BTreeMap::new();
    walk(&definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "", &mut rules);
    rules
}

/// Where `pattern` (`publish[*].http.url`) leads in `value`: field as the API server names it, and JSON pointer.
fn places(value: &Value, pattern: &str) -> Vec<(String, String)> {
    let mut places = vec![("spec".to_owned(), String::new())];
    for part in pattern.replace("[*]", ".[*]").split('.') {
        let found = places.iter().flat_map(|(field, pointer)| match (part, value.pointer(pointer).unwrap()) {
            ("[*]", Value::Array(items)) => {
                (0..items.len()).map(|i| (format!("{field}[{i}]"), format!("{pointer}/{i}"))).collect()
            }
            ("[*]", Value::Object(fields)) => {
                fields.keys().map(|key| (format!("{field}[{key}]"), format!("{pointer}/{key}"))).collect()
            }
            (name, Value::Object(fields)) if fields.contains_key(name) => {
                vec![(format!("{field}.{name}"), format!("{pointer}/{name}"))]
            }
            _ => vec![],
        });
        places = found.collect();
    }
    places
}

/// Asks a real API server.
struct Server {
    builds: Api<DynamicObject>,
    resource: ApiResource,
}

impl Server {
    async fn new(client: Client) -> Self {
        let namespace = apiserver::namespace(&client, "crd").await;
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(v1alpha1::GROUP, "v1alpha1", "NodeImageBuild"));
        Self { builds: Api::namespaced_with(client, &namespace, &resource), resource }
    }

    /// `(field, message)` of each complaint about an object.
    async fn complaints(&self, name: &str, spec: &Value) -> Vec<(String, String)> {
        let mut object = DynamicObject::new(name, &self.resource);
        object.data = json!({ "spec": spec });
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        match self.builds.create(&dry_run, &object).await {
            Ok(_) => vec![],
            Err(kube::Error::Api(status)) => {
                let causes = status.details.map(|details| details.causes).unwrap_or_default();
                assert!(!causes.is_empty(), "refused without a cause: {}", status.message);
                causes.into_iter().map(|cause| (cause.field, cause.message)).collect()
            }
            Err(error) => panic!("{error}"),
        }
    }

    async fn accepts(&self, what: &str, spec: &Value, failures: &mut Vec<String>) {
        let complaints = self.complaints("accepted", spec).await;
        if !complaints.is_empty() {
            failures.push(format!("{what}: not accepted: {complaints:?}"));
        }
    }

    /// The only complaint is `message`, about one of `fields`.
    async fn refuses(&self, what: &str, spec: &Value, fields: &[&str], message: &str, failures: &mut Vec<String>) {
        let complaints = self.complaints("refused", spec).await;
        let expected = matches!(&complaints[..], [(field, text)]
            if fields.contains(&field.as_str()) && text.ends_with(&format!(": {message}")));
        if !expected {
            failures.push(format!("{what}: expected {message:?} at {fields:?}, not {complaints:?}"));
        }
    }
}

#[tokio::test]
async fn rule_about_a_value_accepts_and_refuses_wherever_it_stands() {
    let server = Server::new(apiserver::client().await).await;
    let rules = rules_of_definition();
    let mut failures = vec![];
    for (number, specimen) in specimens().iter().enumerate() {
        server.accepts(&format!("specimen {number}"), specimen, &mut failures).await;
    }
    for ValueRule { message, accepts, refuses } in VALUE_RULES {
        for field in rules.get(*message).unwrap_or_else(|| panic!("the definition has no rule {message:?}")) {
            let pattern = field.strip_prefix("spec.").unwrap();
            let found = specimens().into_iter().find_map(|specimen| {
                let (field, pointer) = places(&specimen, pattern).into_iter().next()?;
                Some((specimen, field, pointer))
            });
            let Some((mut specimen, field, pointer)) = found else {
                failures.push(format!("no specimen holds {field}"));
                continue;
            };
            for value in *accepts {
                *specimen.pointer_mut(&pointer).unwrap() = json!(value);
                server.accepts(&format!("{field} {value:?}"), &specimen, &mut failures).await;
            }
            for value in *refuses {
                *specimen.pointer_mut(&pointer).unwrap() = json!(value);
                server.refuses(&format!("{field} {value:?}"), &specimen, &[&field], message, &mut failures).await;
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[tokio::test]
async fn rule_between_fields_accepts_and_refuses() {
    let server = Server::new(apiserver::client().await).await;
    let rules = rules_of_definition();
    let minimal = json!({"os": {"name": "ubuntu", "version": "22.04"}, "releaseChannel": "1-31"});
    let mut failures = vec![];
    for FieldRule { message, accepted, refused } in field_rules() {
        let fields = rules.get(message).unwrap_or_else(|| panic!("the definition has no rule {message:?}"));
        let fields: Vec<_> = fields.iter().map(|field| field.replace("[*]", "[0]")).collect();
        let fields: Vec<_> = fields.iter().map(String::as_str).collect();
        server.accepts(message, &merged(minimal.clone(), accepted), &mut failures).await;
        server.refuses("refused", &merged(minimal.clone(), refused), &fields, message, &mut failures).await;
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

const NAME_RULE: &str = "write a name of at most 63 characters: it becomes a label of the build's Job and pod";

#[tokio::test]
async fn name_that_does_not_fit_a_label_is_refused() {
    let server = Server::new(apiserver::client().await).await;
    let spec = &specimens()[0];
    assert_eq!(server.complaints(&"a".repeat(63), spec).await, []);
    let complaints = server.complaints(&"a".repeat(64), spec).await;
    assert!(matches!(&complaints[..], [(_, message)] if message.ends_with(NAME_RULE)), "{complaints:?}");
}

#[tokio::test]
async fn every_field_of_the_status_is_stored_as_written() {
    let client = apiserver::client().await;
    let namespace = apiserver::namespace(&client, "status").await;
    let builds: Api<NodeImageBuild> = Api::namespaced(client, &namespace);
    let spec: NodeImageBuildSpec = serde_json::from_value(specimens()[0].clone()).unwrap();
    builds.create(&PostParams::default(), &NodeImageBuild::new("full", spec)).await.unwrap();

    let time: Time = serde_json::from_value(json!("2026-01-02T03:04:05Z")).unwrap();
    let release = ReleaseStatus {
        eksa_release: "v0.26.1".into(),
        bundle_number: 98,
        eksd_release: "kubernetes-1-31-eks-47".into(),
        kubernetes_version: "v1.31.14".into(),
    };
    // No `..`: a new field has to be written here too.
    let status = NodeImageBuildStatus {
        observed_generation: Some(1),
        phase: Some(Phase::Failed),
        conditions: vec![Condition {
            type_: conditions::READY.into(),
            status: "False".into(),
            reason: "ChecksumMismatch".into(),
            message: "say why".into(),
            observed_generation: Some(1),
            last_transition_time: time.clone(),
        }],
        os: Some("ubuntu 22.04".into()),
        provider: Some(Provider::Baremetal),
        image_url: Some("http://images.example.com/x.gz".into()),
        image: Some(ImageStatus {
            name: "x.gz".into(),
            format: "raw.gz".into(),
            size: 5_000_000_000,
            virtual_size: 2 << 40,
            sha256: "0".repeat(64),
            uuid: Some("3cd498a2-99da-49a2-bbdf-14c349036019".into()),
            inventory_path: Some("/dc1/vm/templates/x".into()),
            moref: Some("vm-42".into()),
            instance_uuid: Some("5003a1b2-0000-4000-8000-000000000001".into()),
            additional_urls: vec!["https://files.example.com/x.gz".into()],
            sbom_url: Some("https://files.example.com/x.gz.cdx.json".into()),
            provenance_url: Some("https://files.example.com/x.gz.intoto.json".into()),
        }),
        release: Some(release.clone()),
        base_digest: Some("sha256:00".into()),
        progress: Some(Progress { stage: Stage::Fetch, percent: 12, message: "fetch kubelet".into() }),
        job_name: Some("full-0123456789".into()),
        build_id: Some("0123456789".into()),
        inputs_digest: Some("sha256:00".into()),
        spec_digest: Some("00".into()),
        run_digest: Some("01".into()),
        attempts: Some(2),
        start_time: Some(time.clone()),
        completion_time: Some(time.clone()),
        stage_seconds: [(Stage::Fetch, 1.5)].into(),
        failure: Some(FailureStatus {
            stage: Some(Stage::Fetch),
            class: FailureClass::BadInput,
            reason: "ChecksumMismatch".into(),
            message: "say why".into(),
            pod: Some("full-0123456789-abcde".into()),
            container: Some("build".into()),
        }),
        verification: Some("booted with KVM in 21 s".into()),
        last_rebuild_token: Some("now".into()),
        trigger: Some("schedule 2026-11-30T03:02:11Z".into()),
        next_scheduled_time: Some(time.clone()),
        history: vec![HistoryEntry {
            build_id: "0123456788".into(),
            result: BuildResult::Succeeded,
            start_time: Some(time.clone()),
            completion_time: Some(time),
            image_url: Some("http://images.example.com/w.gz".into()),
            image_name: Some("image.gz".into()),
            image_uuid: None,
            sha256: Some("0".repeat(64)),
            release: Some(release),
            reason: Some("Published".into()),
        }],
    };
    let patch = json!({"apiVersion": "nodeimagebuild.dev/v1alpha1", "kind": "NodeImageBuild", "status": status});
    let params = PatchParams::apply("test").validation_strict();
    let stored = builds.patch_status("full", &params, &Patch::Apply(patch)).await.unwrap();
    assert_eq!(stored.status, Some(status));
}

/// Fields of `given` that `kept` has not, or has otherwise.
fn lost(field: &str, given: &Value, kept: &Value) -> Vec<String> {
    match (given, kept) {
        (Value::Object(given), Value::Object(_)) => {
            given.iter().flat_map(|(name, value)| lost(&format!("{field}.{name}"), value, &kept[name])).collect()
        }
        (Value::Array(given), Value::Array(kept)) if given.len() == kept.len() => {
            given.iter().zip(kept).flat_map(|(given, kept)| lost(&format!("{field}[]"), given, kept)).collect()
        }
        // A quantity may be written as a number; it is read as text.
        (Value::Number(number), Value::String(text)) if number.to_string() == *text => vec![],
        _ if given == kept => vec![],
        _ => vec![format!("{field}: {given} became {kept}")],
    }
}

#[test]
fn types_lose_nothing_that_the_definition_accepts() {
    for specimen in specimens() {
        let spec: NodeImageBuildSpec = serde_json::from_value(specimen.clone()).unwrap();
        assert_eq!(lost("spec", &specimen, &serde_json::to_value(spec).unwrap()), [""; 0]);
    }
}

#[test]
fn each_rule_of_the_definition_is_exercised() {
    let exercised: BTreeSet<_> = VALUE_RULES
        .iter()
        .map(|rule| rule.message)
        .chain(field_rules().iter().map(|rule| rule.message))
        .chain([NAME_RULE])
        .collect();
    let defined = rules_of_definition();
    let defined: BTreeSet<_> = defined.keys().map(String::as_str).collect();
    assert_eq!(exercised, defined);
}
