//! Which of upstream's files make which image (eksa-facts 1.3, 4.2 and 4.6). Pure.

use crate::contract::{BuildRequest, Classified, FailureClass, Firmware, Os, OsName, Provider};

/// Upstream's own var-files for every image, in their order.
const COMMON: [&str; 9] = [
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

/// An image that upstream's recipes do not make.
#[derive(Debug, thiserror::Error)]
#[error(
    "the engine ImageBuilder does not make {os} {version} images for {provider} that start by {firmware:?}; docs/engines.md \
     lists those that it makes"
)]
pub struct NoRecipe {
    os: OsName,
    version: String,
    provider: Provider,
    firmware: Firmware,
}

impl NoRecipe {
    pub(super) fn of(request: &BuildRequest) -> Self {
        let BuildRequest { os: Os { name, version }, provider, firmware, .. } = request;
        Self { os: *name, version: version.clone(), provider: *provider, firmware: *firmware }
    }
}

impl Classified for NoRecipe {
    fn class(&self) -> FailureClass {
        FailureClass::BadInput
    }

    fn reason(&self) -> &'static str {
        "NotSupported"
    }
}

/// Upstream's files of one image; paths are below upstream's directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Recipe {
    /// Var-files, in their order.
    pub var_files: Vec<String>,
    /// The template that Packer gets.
    pub template: &'static str,
    /// Name or type of its builder that is run.
    pub builder: &'static str,
    /// What cloud-init is told in a machine that starts from a disk.
    pub user_data: Option<String>,
}

impl Recipe {
    /// The recipe of an image; `clone` builds in a clone of a template in vCenter.
    pub fn of(request: &BuildRequest, clone: bool) -> Result<Self, NoRecipe> {
        let BuildRequest { os: Os { name, version }, provider, firmware, .. } = request;
        let refused = || NoRecipe::of(request);
        let (os, efi_too) = match (name, version.as_str()) {
            (OsName::Ubuntu, "22.04" | "24.04") => ("ubuntu", true),
            (OsName::Redhat, "8") => ("rhel", false),
            (OsName::Redhat, "9") => ("rhel", true),
            (OsName::Ubuntu | OsName::Redhat | OsName::Debian, _) => return Err(refused()),
        };
        let fits = match provider {
            // Bare metal has one kind of firmware a system.
            Provider::Baremetal => efi_too == (*firmware == Firmware::Efi),
            Provider::Vsphere => efi_too || *firmware == Firmware::Bios,
            Provider::Nutanix => *firmware == Firmware::Bios,
        };
        if !fits || (clone && *provider != Provider::Vsphere) {
            return Err(refused());
        }
        let slug = format!("{os}-{}", request.os.version_without_dots());
        let suffix = if *firmware == Firmware::Efi { "-efi" } else { "" };
        let (own, template, builder): (Vec<String>, _, _) = match provider {
            Provider::Baremetal => {
                (vec![format!("packer/raw/raw-{slug}{suffix}.json")], "packer/raw/packer.json", "qemu")
            }
            Provider::Vsphere => (
                vec![
                    "packer/ova/packer-common.json".to_owned(),
                    format!("packer/ova/{slug}{suffix}.json"),
                    "packer/ova/vsphere.json".to_owned(),
                ],
                "packer/ova/packer-node.json",
                if clone { "vsphere-clone" } else { "vsphere" },
            ),
            Provider::Nutanix => (
                vec!["packer/nutanix/nutanix.json".to_owned(), format!("packer/nutanix/{slug}.json")],
                "packer/nutanix/packer.json",
                "nutanix",
            ),
        };
        let common = COMMON.iter().map(|name| format!("packer/config/{name}.json"));
        let user_data = (*provider == Provider::Nutanix)
            .then(|| format!("packer/nutanix/linux/cloud-init/{os}/{version}/user-data"));
        Ok(Self { var_files: common.chain(own).collect(), template, builder, user_data })
    }
}
