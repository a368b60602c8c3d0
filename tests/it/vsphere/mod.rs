//! vCenter: images become templates and library items, and what goes wrong leaves nothing behind.

mod faults;
pub mod peer;
mod preflight;
mod templates;

use std::{path::PathBuf, time::Duration};

use node_image_builder::{
    contract::{BuildRequest, CredentialSlot, ProviderTarget, VsphereTarget},
    package::ImageSource,
    progress::{Reporter, Style},
    publish::vsphere::{Imported, Vsphere, VsphereError},
    secret::{Credentials, Redactor},
};
use tokio_util::sync::CancellationToken;

use self::peer::{PASSWORD, USERNAME, Vcenter};
use crate::package::sparse_disk;

const MIB: u64 = 1 << 20;
pub const NAME: &str = "ubuntu-2204-kube-1-31";

/// A vCenter, a disk, and the way from one to the other.
pub struct Lab {
    pub vcenter: Vcenter,
    pub target: VsphereTarget,
    pub request: BuildRequest,
    pub cancel: CancellationToken,
    pub patience: Duration,
    pub trust_bundle: Option<Vec<u8>>,
    directory: tempfile::TempDir,
}

impl Lab {
    pub async fn new(options: &[&str]) -> Self {
        let vcenter = Vcenter::start(options).await;
        let directory = tempfile::tempdir().unwrap();
        for (key, value) in [("username", USERNAME), ("password", PASSWORD)] {
            std::fs::write(directory.path().join(key), value).unwrap();
        }
        sparse_disk(&directory.path().join("disk.raw"), 64 * MIB, &[(MIB, 900_000), (40 * MIB + 7, 99_999)]);
        let target = VsphereTarget {
            server: vcenter.server.clone(),
            slot: CredentialSlot(directory.path().to_str().unwrap().to_owned()),
            insecure: false,
            thumbprint: None,
            datacenter: "DC0".into(),
            cluster: Some("DC0_C0".into()),
            resource_pool: None,
            datastore: "LocalDS_0".into(),
            network: "VM Network".into(),
            folder: Some("templates".into()),
            template_name: NAME.into(),
            replace_existing: false,
            vmx_version: 15,
            convert_to_template: true,
            create_snapshot: false,
            content_library: None,
        };
        let mut request = crate::ova::request();
        request.disk_size_mib = 64;
        request.provider_target = Some(ProviderTarget::Vsphere(target.clone()));
        let (cancel, patience) = (CancellationToken::new(), Duration::from_secs(5));
        let trust_bundle = Some(vcenter.authority());
        Self { vcenter, target, request, cancel, patience, trust_bundle, directory }
    }

    pub fn set_password(&self, password: &str) {
        std::fs::write(self.directory.path().join("password"), password).unwrap();
    }

    pub fn disk(&self) -> PathBuf {
        self.directory.path().join("disk.raw")
    }

    /// The image of a build.
    pub fn source_of(&self, request: &BuildRequest) -> ImageSource {
        crate::ova::source_of(&self.disk(), NAME, request)
    }

    pub fn vsphere(&self) -> Vsphere {
        Vsphere {
            target: self.target.clone(),
            proxy: node_image_builder::contract::Proxy::default(),
            trust_bundle: self.trust_bundle.clone(),
            credentials: Credentials::new(Redactor::default()),
            reporter: Reporter::new(Style::Json, Box::new(std::io::sink())),
            cancel: self.cancel.clone(),
            patience: self.patience,
        }
    }

    pub async fn publish(&self) -> Result<Imported, VsphereError> {
        self.vsphere().publish(&self.request, &self.source_of(&self.request)).await
    }

    pub async fn preflight(&self) -> Result<(), VsphereError> {
        self.vsphere().preflight(&self.request).await
    }

    /// The same build as another one.
    pub fn another_build(&self, build_id: &str) -> BuildRequest {
        let mut request = self.request.clone();
        build_id.clone_into(&mut request.identity.build_id);
        request
    }
}
