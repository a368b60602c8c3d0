//! The bill of materials of an image: CycloneDX 1.5 JSON, which vulnerability scanners read.
//!
//! It depends on the image alone, so that the same image has the same document.

use packageurl::PackageUrl;
use serde::Serialize;
use uuid::Uuid;

use super::provenance::shown;
use crate::{
    contract::{Artifact, BuildRequest, OsName, VERSION},
    native::InstalledPackage,
};

/// Media type of the document.
pub(super) const MEDIA_TYPE: &str = "application/vnd.cyclonedx+json";
/// What stands between the image's file name and `.json` in the document's.
pub(super) const SUFFIX: &str = "cdx";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_field_names, reason = "the format's names")]
struct Bom {
    bom_format: &'static str,
    spec_version: &'static str,
    serial_number: String,
    version: u32,
    metadata: Metadata,
    components: Vec<Component>,
}

#[derive(Serialize)]
struct Metadata {
    tools: Tools,
    component: Component,
}

#[derive(Serialize)]
struct Tools {
    components: Vec<Component>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Component {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "bom-ref", skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hashes: Vec<Hash>,
    #[serde(skip_serializing_if = "Option::is_none")]
    purl: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    external_references: Vec<ExternalReference>,
}

#[derive(Serialize)]
struct Hash {
    alg: &'static str,
    content: String,
}

impl Hash {
    fn sha256(digest: &str) -> Self {
        Self { alg: "SHA-256", content: digest.to_owned() }
    }
}

#[derive(Serialize)]
struct ExternalReference {
    #[serde(rename = "type")]
    kind: &'static str,
    url: String,
}

/// The document of an image whose file is called `file_name` and has this SHA-256.
pub(super) fn document(
    request: &BuildRequest,
    packages: &[InstalledPackage],
    images: &[String],
    file_name: &str,
    sha256: &str,
) -> Vec<u8> {
    let id = Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("nodeimagebuild.dev/sbom/{sha256}").as_bytes());
    let mut components = vec![Component {
        kind: "operating-system",
        reference: Some("operating-system".to_owned()),
        name: request.os.name.to_string(),
        version: Some(request.os.version.clone()),
        ..Component::default()
    }];
    components.extend(packages.iter().map(|package| of_package(request, package)));
    components.extend(artifacts(request).map(|(artifact, version)| of_artifact(artifact, version)));
    components.extend(images.iter().map(|image| of_image(image)));
    let bom = Bom {
        bom_format: "CycloneDX",
        spec_version: "1.5",
        serial_number: format!("urn:uuid:{id}"),
        version: 1,
        metadata: Metadata {
            tools: Tools {
                components: vec![Component {
                    kind: "application",
                    name: "image-builder".to_owned(),
                    version: Some(VERSION.to_owned()),
                    ..Component::default()
                }],
            },
            component: Component {
                kind: "platform",
                reference: Some("image".to_owned()),
                name: file_name.to_owned(),
                version: Some(request.release.full_version.clone()),
                hashes: vec![Hash::sha256(sha256)],
                ..Component::default()
            },
        },
        components,
    };
    serde_json::to_vec_pretty(&bom).unwrap_or_default()
}

/// What the image takes from the release, with versions.
fn artifacts(request: &BuildRequest) -> impl Iterator<Item = (&Artifact, &str)> {
    let release = &request.release;
    let kubernetes = [&release.kubelet, &release.kubeadm, &release.kubectl]
        .into_iter()
        .chain(&release.images)
        .map(|artifact| (artifact, release.full_version.as_str()));
    let others = [&release.cni_plugins, &release.etcd, &release.etcdadm, &release.containerd, &release.crictl];
    kubernetes.chain(others.map(|other| (&other.artifact, other.version.as_str())))
}

fn of_artifact(artifact: &Artifact, version: &str) -> Component {
    Component {
        kind: "file",
        reference: Some(format!("artifact:{}", artifact.name)),
        name: artifact.name.clone(),
        version: (!version.is_empty()).then(|| version.to_owned()),
        hashes: artifact.sha256.as_deref().map(Hash::sha256).into_iter().collect(),
        external_references: vec![ExternalReference { kind: "distribution", url: shown(&artifact.url) }],
        ..Component::default()
    }
}

fn of_package(request: &BuildRequest, package: &InstalledPackage) -> Component {
    let purl = purl(request, package);
    Component {
        kind: "library",
        reference: Some(format!("package:{}:{}", package.name, package.architecture)),
        name: package.name.clone(),
        version: Some(package.version.clone()),
        purl,
        ..Component::default()
    }
}

/// The package's URL; `distro` and `upstream` are what scanners look vulnerabilities up by.
fn purl(request: &BuildRequest, package: &InstalledPackage) -> Option<String> {
    let kind = match request.os.name {
        OsName::Ubuntu | OsName::Debian => "deb",
        OsName::Redhat => "rpm",
    };
    let mut purl = PackageUrl::new(kind, package.name.as_str()).ok()?;
    purl.with_namespace(request.os.name.to_string()).ok()?;
    purl.add_qualifier("arch", package.architecture.as_str()).ok()?;
    if kind == "rpm" {
        // The type's own rules: the epoch is no part of the version. Scanners call the system as it calls itself.
        let (epoch, version) = package.version.split_once(':').unwrap_or(("0", &package.version));
        purl.with_version(version).ok()?;
        purl.add_qualifier("distro", format!("rhel-{}", request.os.version)).ok()?;
        if epoch != "0" {
            purl.add_qualifier("epoch", epoch).ok()?;
        }
        if !package.source.is_empty() {
            purl.add_qualifier("upstream", package.source.as_str()).ok()?;
        }
        return Some(purl.to_string());
    }
    purl.with_version(package.version.as_str()).ok()?;
    purl.add_qualifier("distro", format!("{}-{}", request.os.name, request.os.version)).ok()?;
    if package.source != package.name || package.source_version != package.version {
        purl.add_qualifier("upstream", format!("{}@{}", package.source, package.source_version)).ok()?;
    }
    Some(purl.to_string())
}

/// A container image, e.g. `public.ecr.aws/eks-distro/kubernetes/pause:v1.31.14-eks-1-31-47`.
fn of_image(image: &str) -> Component {
    let (name, version) = match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag.to_owned())),
        _ => (image, None),
    };
    Component {
        kind: "container",
        reference: Some(format!("image:{image}")),
        name: name.to_owned(),
        version,
        ..Component::default()
    }
}

#[cfg(test)]
mod tests {
    use cyclonedx_bom::{models::bom::Bom as Model, prelude::Validate};

    use super::*;
    use crate::native::sample;

    fn packages() -> Vec<InstalledPackage> {
        let package = |name: &str, version: &str, source: &str| InstalledPackage {
            name: name.into(),
            version: version.into(),
            architecture: "amd64".into(),
            source: source.into(),
            source_version: version.into(),
        };
        vec![package("libc6", "2.36-9+deb12u10", "glibc"), package("zlib1g", "1:1.2.13.dfsg-1", "zlib")]
    }

    #[test]
    fn packages_of_red_hat_have_epochs_and_the_files_of_their_sources() {
        let mut request = sample::request();
        request.os = crate::contract::Os { name: OsName::Redhat, version: "9".into() };
        let package = |name: &str, version: &str| InstalledPackage {
            name: name.into(),
            version: version.into(),
            architecture: "x86_64".into(),
            source: format!("{name}-3.0.7-27.el9.src.rpm"),
            source_version: String::new(),
        };
        let packages = [package("bash", "3.0.7-27.el9"), package("openssl", "1:3.0.7-27.el9")];
        let text = document(&request, &packages, &[], "redhat-9-kube-1-34.gz", &"a".repeat(64));
        assert!(Model::parse_from_json_v1_5(text.as_slice()).unwrap().validate().passed());
        let text = String::from_utf8(text).unwrap();
        for purl in [
            "pkg:rpm/redhat/bash@3.0.7-27.el9?arch=x86_64&distro=rhel-9&upstream=bash-3.0.7-27.el9.src.rpm\"",
            "pkg:rpm/redhat/openssl@3.0.7-27.el9?arch=x86_64&distro=rhel-9&epoch=1&upstream=openssl-3.0.7-27.el9.src.rpm\"",
        ] {
            assert!(text.contains(purl), "{text}");
        }
    }

    #[test]
    fn is_valid_and_names_packages_artifacts_and_images() {
        let request = sample::request();
        let images = ["public.ecr.aws/eks-distro/kubernetes/pause:v1".to_owned(), "host:5000/x".to_owned()];
        let text = document(&request, &packages(), &images, "debian-12-kube-1-34.gz", &"a".repeat(64));
        let model = Model::parse_from_json_v1_5(text.as_slice()).unwrap();
        assert!(model.validate().passed(), "{:?}", model.validate());

        let bom: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(bom["metadata"]["component"]["hashes"][0]["content"], "a".repeat(64));
        let component = |name: &str| {
            let all = bom["components"].as_array().unwrap();
            all.iter().find(|component| component["name"] == name).unwrap().clone()
        };
        assert_eq!(
            component("libc6")["purl"],
            "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12&upstream=glibc%402.36-9%2Bdeb12u10"
        );
        assert_eq!(component("kubelet")["hashes"][0]["content"], request.release.kubelet.sha256.clone().unwrap());
        assert_eq!(component("public.ecr.aws/eks-distro/kubernetes/pause")["version"], "v1");
        assert!(component("host:5000/x")["version"].is_null());
        assert_eq!(text, document(&request, &packages(), &images, "debian-12-kube-1-34.gz", &"a".repeat(64)));
    }
}
