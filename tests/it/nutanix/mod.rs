//! Prism Central: disks become images there, and what goes wrong leaves nothing behind.

mod faults;
mod mapping;
mod packer;
mod preflight;
pub mod prism;
mod publish;
mod source;
mod strictness;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use node_image_builder::{
    contract::{
        BuildRequest, Classified, ClusterReference, CredentialSlot, FailureClass, Firmware, NutanixTarget, Provider,
        ProviderTarget, Proxy,
    },
    package::{Format, ImageSource},
    progress::{Reporter, Style},
    publish::nutanix::{Nutanix, NutanixError, PrismImage},
    secret::{Credentials, Redactor},
};
use tokio_util::sync::CancellationToken;

use self::prism::{CLUSTER, PASSWORD, Prism, USERNAME};
use crate::package::sparse_disk;

const MIB: u64 = 1 << 20;
pub const NAME: &str = "ubuntu-2204-kube-1-31";
/// Name of what the lab's build makes until it is whole.
pub const WORKING_NAME: &str = "node-image-build-0123456789";

/// A Prism Central, a disk, and the way from one to the other.
pub struct Lab {
    pub prism: Prism,
    pub target: NutanixTarget,
    pub request: BuildRequest,
    pub cancel: CancellationToken,
    pub patience: Duration,
    pub trust_bundle: Option<Vec<u8>>,
    directory: tempfile::TempDir,
}

impl Lab {
    pub async fn new() -> Self {
        crate::support::install_crypto();
        let prism = Prism::start().await;
        let directory = tempfile::tempdir().unwrap();
        for (key, value) in [("username", USERNAME), ("password", PASSWORD)] {
            std::fs::write(directory.path().join(key), value).unwrap();
        }
        sparse_disk(&directory.path().join("disk.raw"), 64 * MIB, &[(MIB, 900_000), (40 * MIB + 7, 2_000_000)]);
        let target = NutanixTarget {
            endpoint: "localhost".into(),
            port: prism.port,
            slot: CredentialSlot(directory.path().to_str().unwrap().to_owned()),
            insecure: false,
            cluster: ClusterReference::Name(CLUSTER.into()),
            subnet: Some("vm-network".into()),
            image_name: NAME.into(),
            replace_existing: false,
            categories: BTreeMap::from([("Environment".into(), "Production".into())]),
        };
        let mut request = crate::ova::request();
        (request.provider, request.firmware, request.disk_size_mib) = (Provider::Nutanix, Firmware::Bios, 64);
        request.provider_target = Some(ProviderTarget::Nutanix(target.clone()));
        let (cancel, patience) = (CancellationToken::new(), Duration::from_secs(10));
        let trust_bundle = Some(prism.authority.clone().into_bytes());
        Self { prism, target, request, cancel, patience, trust_bundle, directory }
    }

    pub fn set_password(&self, password: &str) {
        std::fs::write(self.directory.path().join("password"), password).unwrap();
    }

    pub fn remove_password(&self) {
        std::fs::remove_file(self.directory.path().join("password")).unwrap();
    }

    pub fn disk(&self) -> PathBuf {
        self.directory.path().join("disk.raw")
    }

    pub fn source(&self) -> ImageSource {
        ImageSource::new(self.disk(), NAME, Format::Qcow2)
    }

    pub fn nutanix(&self) -> Nutanix {
        Nutanix {
            target: self.target.clone(),
            proxy: Proxy::default(),
            trust_bundle: self.trust_bundle.clone(),
            credentials: Credentials::new(Redactor::default()),
            reporter: Reporter::new(Style::Json, Box::new(std::io::sink())),
            cancel: self.cancel.clone(),
            patience: self.patience,
        }
    }

    pub async fn publish(&self) -> Result<PrismImage, NutanixError> {
        self.nutanix().publish(&self.request, &self.source()).await
    }

    pub async fn preflight(&self) -> Result<(), NutanixError> {
        self.nutanix().preflight(&self.request).await
    }
}

/// Class, reason and the whole message of an error.
pub fn told(error: &NutanixError) -> (FailureClass, &'static str, String) {
    (error.class(), error.reason(), node_image_builder::error::Chain(error).to_string())
}
