//! The specification of a `NodeImageBuild`, the rules between its fields, and the defaults that depend on them.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{
    bare_metal::BareMetal,
    build::{Build, DeletionPolicy, Engine, History, ImageBuilder, Rebuild, Retention, Verify},
    contents::{Base, File, Os, Packages, Source, Subscription},
    nutanix::Nutanix,
    publish::{ArtifactServer, Publish},
    references::TrustBundle,
    schema,
    status::NodeImageBuildStatus,
    vsphere::Vsphere,
};
use crate::contract::{Firmware, OsName, Provider, Proxy};

/// The node image to build.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "nodeimagebuild.dev",
    version = "v1alpha1",
    kind = "NodeImageBuild",
    plural = "nodeimagebuilds",
    shortname = "nib",
    category = "all",
    namespaced,
    status = "NodeImageBuildStatus",
    derive = "PartialEq",
    doc = "A node image for EKS Anywhere: what it contains, which machines it is for and where it is published.",
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("write a name of at most 63 characters: it becomes a label of the build's Job and pod"),
    printcolumn(name = "OS", type_ = "string", json_path = ".status.os"),
    printcolumn(name = "CHANNEL", type_ = "string", json_path = ".spec.releaseChannel"),
    printcolumn(name = "PROVIDER", type_ = "string", json_path = ".status.provider"),
    printcolumn(name = "PHASE", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "READY", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "IMAGE-URL", type_ = "string", json_path = ".status.imageURL", priority = 1),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.baremetal), has(self.vsphere), has(self.nutanix)].filter(given, given).size() == 1")
        .message("write exactly one of baremetal, vsphere and nutanix; for bare metal without settings baremetal: {}"),
    validation = Rule::new("self.os.name == 'ubuntu' || has(self.base) || (has(self.vsphere) && has(self.vsphere.template)) || \
         (has(self.nutanix) && has(self.nutanix.sourceImageName))")
        .message("write base with url and a checksum: only ubuntu has a default base"),
    validation = Rule::new("!has(self.base) || !has(self.nutanix) || !has(self.nutanix.sourceImageName)")
        .message("write base or nutanix.sourceImageName, not both: the image starts from one of them")
        .field_path(".base"),
    validation = Rule::new("!has(self.base) || !has(self.vsphere) || !has(self.vsphere.template)")
        .message("write base or vsphere.template, not both: the image starts from one of them")
        .field_path(".base"),
    validation = Rule::new("!has(self.firmware) || self.firmware != 'efi' || !has(self.nutanix)")
        .message("nutanix images start by bios: write bios, or leave firmware out")
        .field_path(".firmware"),
    validation = Rule::new("!has(self.firmware) || self.firmware != 'efi' || self.os.name != 'redhat' || self.os.version != '8'")
        .message("redhat 8 images start by bios: write bios, or leave firmware out")
        .field_path(".firmware"),
    validation = Rule::new("!has(self.firmware) || self.firmware != 'bios' || !has(self.baremetal) || \
         (self.os.name == 'redhat' && self.os.version == '8')")
        .message("baremetal images start by efi, but for redhat 8: write efi, or leave firmware out")
        .field_path(".firmware"),
    validation = Rule::new("self.engine != 'ImageBuilder' || self.os.name != 'debian'")
        .message("engine ImageBuilder knows ubuntu and redhat only: write Native, or leave engine out")
        .field_path(".engine"),
    validation = Rule::new("self.engine == 'ImageBuilder' || !has(self.imageBuilder)")
        .message("imageBuilder holds settings of the engine ImageBuilder: write engine: ImageBuilder, or leave imageBuilder out")
        .field_path(".imageBuilder"),
    validation = Rule::new("self.engine == 'ImageBuilder' || !has(self.vsphere) || !has(self.vsphere.template)")
        .message("only the engine ImageBuilder builds in a clone of vsphere.template: write engine: ImageBuilder, or base instead")
        .field_path(".vsphere"),
    validation = Rule::new("self.engine != 'ImageBuilder' || !has(self.vsphere) || !has(self.vsphere.thumbprint)")
        .message("the engine ImageBuilder runs Packer, which knows no vsphere.thumbprint: write vCenter's authority as trustBundle, or insecure: true")
        .field_path(".vsphere"),
    validation = Rule::new("self.engine != 'ImageBuilder' || !has(self.nutanix) || has(self.nutanix.subnet)")
        .message("the engine ImageBuilder builds in a machine in Prism Central: write nutanix.subnet, where the machine goes")
        .field_path(".nutanix"),
    validation = Rule::new("self.os.name == 'redhat' || !has(self.subscription)")
        .message("only redhat has a subscription: leave it out")
        .field_path(".subscription"),
    validation = Rule::new("self.os.name == 'redhat' || !has(self.packages.epel)")
        .message("only redhat has packages.epel: leave it out")
        .field_path(".packages"),
    validation = Rule::new("self.os.name != 'redhat' || !has(self.proxy) || !has(self.proxy.http) || self.proxy.http.matches(':[0-9]+/?$')")
        .message("write proxy.http with its port for redhat, e.g. http://proxy.example.com:3128: the subscription service needs it")
        .field_path(".proxy"),
    validation = Rule::new("!has(self.nutanix) || !has(self.nutanix.imageName) || \
         self.nutanix.imageName.replace('-', '').replace('.', '').replace('_', '').contains(self.releaseChannel.replace('-', ''))")
        .message("nutanix.imageName must contain the Kubernetes version of releaseChannel, or EKS Anywhere refuses the image: write e.g. ubuntu-2204-kube-1-31")
        .field_path(".nutanix"),
    validation = Rule::new("!has(self.eksaRelease) || !has(self.rebuild) || !self.rebuild.onNewRelease")
        .message("a fixed eksaRelease never has a new release: leave eksaRelease or rebuild.onNewRelease out")
        .field_path(".rebuild"),
    validation = Rule::new("!has(self.publish) || self.publish.filter(target, has(target.artifactServer)).size() <= 1")
        .message("write artifactServer once: there is one")
        .field_path(".publish"),
)]
pub struct NodeImageBuildSpec {
    /// Operating system of the image, e.g. `{name: ubuntu, version: "22.04"}`.
    pub os: Os,
    /// Kubernetes release channel of EKS Distro with a dash, e.g. `1-31` for Kubernetes 1.31.
    #[schemars(schema_with = "schema::release_channel")]
    pub release_channel: String,
    /// EKS Anywhere release whose artifacts the image is made of, e.g. `v0.26.1`. Default is the latest one when the
    /// build starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::eksa_release")]
    pub eksa_release: Option<String>,
    /// What makes the image: `Native` (assembles it from a root file system, in minutes) or `ImageBuilder` (runs the
    /// upstream kubernetes-sigs/image-builder with Packer and Ansible). Default `Native`.
    #[serde(default)]
    pub engine: Engine,
    /// How machines start the image: `bios` or `efi`. Default `efi` for baremetal (`bios` for redhat 8), `bios` for
    /// vsphere and nutanix, as EKS Anywhere does. `efi` is possible for baremetal and vsphere, but not for redhat 8;
    /// `bios` for all but baremetal, where only redhat 8 has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// What the image starts from. Default for ubuntu is Canonical's root file system of the version, verified by its
    /// `SHA256SUMS`; needed for redhat and debian.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// Size of the disk with its unit, a whole number of `Mi`, `Gi` or `Ti` from 4Gi to 2Ti, e.g. `20Gi`. Nodes grow
    /// the root file system to their real disk when they start. Default `6656Mi` for baremetal, `20Gi` for vsphere,
    /// `10Gi` for nutanix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::disk_size")]
    pub disk_size: Option<String>,
    /// Packages beyond those that every node image has.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub packages: Packages,
    /// Files to put into the image, after everything is installed; at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["path".into()]))]
    pub files: Vec<File>,
    /// Proxy for everything the build downloads. It is not left behind in the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("has(self.http) || has(self.https)")
            .message("write proxy.http, proxy.https or both, or leave proxy out"),
        validation = Rule::new(r"[has(self.http) ? self.http : '', has(self.https) ? self.https : ''].all(url, url == '' || (isURL(url) && url.matches('^https?://[^/?#@\\s]+/?$')))")
            .message("write a proxy as http://host:port, without path, user name and password"),
    )]
    pub proxy: Option<Proxy>,
    /// Certificate authorities that the build trusts in addition, for mirrors, proxies, stores, vCenter and Prism Central.
    /// They are not left behind in the image; add them with `files` where nodes need them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_bundle: Option<TrustBundle>,
    /// Where the release documents and artifacts come from, for mirrors and networks without Internet access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Red Hat subscription while building; only for redhat. Without it, `packages.repositories` must have everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscription: Option<Subscription>,
    /// Makes a compressed raw disk for Tinkerbell. Write `baremetal: {}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baremetal: Option<BareMetal>,
    /// Makes a template in vCenter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsphere: Option<Vsphere>,
    /// Makes an image in Prism Central.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nutanix: Option<Nutanix>,
    /// Where the finished file is put, at most 8 places; `status.imageURL` is that of the first. Default for baremetal is
    /// the built-in artifact server. For vsphere and nutanix, where the image is put into vCenter or Prism Central
    /// anyway, default is no further place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub publish: Vec<Publish>,
    /// The pod that builds.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub build: Build,
    /// How the finished image is checked before it is published.
    #[serde(default)]
    pub verify: Verify,
    /// When the image is built again though this specification did not change. Default never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild: Option<Rebuild>,
    /// Settings that only the engine `ImageBuilder` knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_builder: Option<ImageBuilder>,
    /// Whether no build is started; a running one is cancelled. The published image stays. Default `false`.
    #[serde(default)]
    pub suspend: bool,
    /// How many finished builds stay in `status.history`.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub history: History,
    /// Removes older images from the artifact server, vCenter and Prism Central, e.g. `{keep: 3}`. Default all images stay.
    /// With it, a successful build stays in `status.history` as long as its image does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// What becomes of published images when this resource is deleted: `Retain` (they stay) or `Delete`. Default
    /// `Retain`, because clusters go on to install nodes from them.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// A specification that the API server would have refused, for instance one that was stored under older rules.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field} is {found}: {expected}")]
pub struct InvalidField {
    /// Path of the field, e.g. `spec.diskSize`.
    pub field: &'static str,
    /// What stands there.
    pub found: String,
    /// What to write instead.
    pub expected: &'static str,
}

impl NodeImageBuildSpec {
    /// The kind of machine the image is for.
    pub fn provider(&self) -> Result<Provider, InvalidField> {
        match (&self.baremetal, &self.vsphere, &self.nutanix) {
            (Some(_), None, None) => Ok(Provider::Baremetal),
            (None, Some(_), None) => Ok(Provider::Vsphere),
            (None, None, Some(_)) => Ok(Provider::Nutanix),
            (baremetal, vsphere, nutanix) => Err(InvalidField {
                field: "spec",
                found: [baremetal.is_some(), vsphere.is_some(), nutanix.is_some()]
                    .into_iter()
                    .filter(|given| *given)
                    .count()
                    .to_string()
                    + " of baremetal, vsphere and nutanix",
                expected: "write exactly one of them",
            }),
        }
    }

    /// How machines start the image: as written, else as EKS Anywhere does for the provider and operating system.
    pub fn firmware(&self) -> Result<Firmware, InvalidField> {
        let default = match self.provider()? {
            Provider::Baremetal if self.os.name == OsName::Redhat && self.os.version == "8" => Firmware::Bios,
            Provider::Baremetal => Firmware::Efi,
            Provider::Vsphere | Provider::Nutanix => Firmware::Bios,
        };
        Ok(self.firmware.unwrap_or(default))
    }

    /// Size of the disk in MiB.
    pub fn disk_size_mib(&self) -> Result<u64, InvalidField> {
        let Some(text) = &self.disk_size else {
            return Ok(match self.provider()? {
                // What the EKS Anywhere tool makes for each of them.
                Provider::Baremetal => 6656,
                Provider::Vsphere => 20 * 1024,
                Provider::Nutanix => 10 * 1024,
            });
        };
        let units = [("Mi", 1), ("Gi", 1024), ("Ti", 1024 * 1024)];
        units
            .into_iter()
            .find_map(|(unit, mib)| text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(mib))
            .ok_or_else(|| InvalidField {
                field: "spec.diskSize",
                found: text.clone(),
                expected: "write a whole number with the unit Mi, Gi or Ti, e.g. 20Gi",
            })
    }

    /// Where the finished file is put, in this order.
    pub fn publish_targets(&self) -> Result<Vec<Publish>, InvalidField> {
        if self.publish.is_empty() && self.provider()? == Provider::Baremetal {
            return Ok(vec![Publish { artifact_server: Some(ArtifactServer {}), ..Publish::default() }]);
        }
        Ok(self.publish.clone())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn spec(os: (&str, &str), provider: &str, more: Value) -> NodeImageBuildSpec {
        let settings = match provider {
            "vsphere" => json!({
                "server": "vcenter.example.com", "credentialsSecretRef": {"name": "vcenter"}, "datacenter": "dc1",
                "cluster": "cluster1", "datastore": "datastore1", "network": "VM Network"
            }),
            "nutanix" => json!({
                "endpoint": "prism.example.com", "credentialsSecretRef": {"name": "prism"}, "cluster": {"name": "pe1"}
            }),
            _ => json!({}),
        };
        let mut spec = json!({"os": {"name": os.0, "version": os.1}, "releaseChannel": "1-31", provider: settings});
        let Value::Object(more) = more else { panic!("not an object") };
        spec.as_object_mut().unwrap().extend(more);
        serde_json::from_value(spec).unwrap()
    }

    #[rstest]
    #[case::bare_metal(("ubuntu", "22.04"), "baremetal", Firmware::Efi, 6656)]
    #[case::bare_metal_redhat_8(("redhat", "8"), "baremetal", Firmware::Bios, 6656)]
    #[case::bare_metal_redhat_9(("redhat", "9"), "baremetal", Firmware::Efi, 6656)]
    #[case::vsphere(("ubuntu", "24.04"), "vsphere", Firmware::Bios, 20480)]
    #[case::nutanix(("ubuntu", "22.04"), "nutanix", Firmware::Bios, 10240)]
    fn firmware_and_disk_default_as_the_eks_anywhere_tool_does(
        #[case] os: (&str, &str),
        #[case] provider: &str,
        #[case] firmware: Firmware,
        #[case] disk: u64,
    ) {
        let spec = spec(os, provider, json!({}));
        assert_eq!((spec.firmware(), spec.disk_size_mib()), (Ok(firmware), Ok(disk)));
    }

    #[rstest]
    #[case("6657Mi", Some(6657))]
    #[case("20Gi", Some(20480))]
    #[case("1Ti", Some(1_048_576))]
    #[case("20", None)]
    #[case("20G", None)]
    #[case("18446744073709551615Ti", None)]
    fn disk_size_is_a_whole_number_with_its_unit(#[case] text: &str, #[case] mib: Option<u64>) {
        let size = spec(("ubuntu", "22.04"), "baremetal", json!({"diskSize": text})).disk_size_mib();
        assert_eq!(size.as_ref().ok().copied(), mib);
        if let Err(error) = size {
            assert!(error.to_string().starts_with(&format!("spec.diskSize is {text}: write ")), "{error}");
        }
    }

    #[test]
    fn bare_metal_images_go_to_the_artifact_server_unless_told_otherwise() {
        let publish = |provider, more| spec(("ubuntu", "22.04"), provider, more).publish_targets().unwrap();
        assert!(matches!(publish("baremetal", json!({}))[..], [Publish { artifact_server: Some(_), .. }]));
        assert!(publish("vsphere", json!({})).is_empty());
        let http = json!({"publish": [{"http": {"url": "https://files.example.com"}}]});
        assert!(matches!(publish("baremetal", http)[..], [Publish { artifact_server: None, http: Some(_), .. }]));
    }

    #[test]
    fn two_providers_are_an_error() {
        let mut spec = spec(("ubuntu", "22.04"), "nutanix", json!({}));
        spec.baremetal = Some(BareMetal {});
        let message = "spec is 2 of baremetal, vsphere and nutanix: write exactly one of them";
        assert_eq!(spec.firmware().unwrap_err().to_string(), message);
    }
}
