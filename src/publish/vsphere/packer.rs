//! Builds in vCenter by Packer: what its builders call the objects of a place, and the removal of what they leave there.
//!
//! The machine has the name of everything else that a build makes until it is complete, so what is left of it is found by
//! whoever looks for that.

use std::collections::BTreeMap;

use super::{
    VsphereError,
    inventory::Place,
    soap::{Element, Moref},
    vim::Vim,
    working_name,
};
use crate::error::Chain;

/// Directory of a datastore that Packer puts media into.
const CACHE: &str = "packer_cache";

/// Name of the machine that a build is made in.
pub fn machine_name(build_id: &str) -> String {
    working_name(build_id)
}

/// Name of the installation medium while a build needs it in vCenter.
pub fn medium_name(build_id: &str) -> String {
    format!("{}.iso", working_name(build_id))
}

/// The variables of upstream's templates that say where the machine goes.
pub type PackerPlace = BTreeMap<&'static str, String>;

/// Removes the machine, which may run, and the media that were uploaded for it.
pub(super) async fn clean(vim: &Vim, place: &Place, build_id: &str) -> Result<(), VsphereError> {
    let datastore = vim.properties(&place.datastore, &["name"]).await?;
    let datastore = datastore.text("name").unwrap_or_default();
    let mut media = vec![format!("[{datastore}] {CACHE}/{}", medium_name(build_id))];
    let name = machine_name(build_id);
    let left = |what: String, cause: VsphereError| VsphereError::LeftBehind {
        server: vim.server.clone(),
        what,
        cause: Box::new(cause),
    };
    while let Some(machine) = vim.find_child(&place.folder, &name).await? {
        match remove(vim, &machine).await {
            Ok(used) => media.extend(used),
            // It went by itself.
            Err(error) if is(&error, &["ManagedObjectNotFound"]) => {}
            Err(error) => return Err(left(format!("{}/{name}", place.folder_path), error)),
        }
    }
    for medium in media {
        match vim.delete_file(&medium, &place.datacenter).await {
            Ok(()) => tracing::info!("{medium} was left by Packer and is removed"),
            Err(error) if is(&error, &["FileNotFound"]) => {}
            Err(error) => return Err(left(medium, error)),
        }
    }
    Ok(())
}

/// Removes a machine, and gives the media of Packer's that it had.
async fn remove(vim: &Vim, machine: &Moref) -> Result<Vec<String>, VsphereError> {
    let found = vim.properties(machine, &["runtime.powerState", "config.hardware.device"]).await?;
    let media = found.get("config.hardware.device").map(media).unwrap_or_default();
    if found.text("runtime.powerState").is_some_and(|state| state != "poweredOff")
        && let Err(error) = vim.power_off(machine).await
    {
        // It may have stopped by itself; else it can not be deleted either, which is told.
        tracing::debug!("the machine can not be stopped: {}", Chain(&error));
    }
    vim.destroy(machine).await?;
    Ok(media)
}

/// Files in Packer's directory that devices are about.
fn media(devices: &Element) -> Vec<String> {
    let of_packer = |file: &&str| file.contains(&format!("] {CACHE}/"));
    let files = devices.children.iter().filter_map(|device| device.child("backing")?.text_of("fileName"));
    // Packer writes two slashes.
    files.filter(of_packer).map(|file| file.replace("//", "/")).collect()
}

fn is(error: &VsphereError, kinds: &[&str]) -> bool {
    matches!(error, VsphereError::Fault { kind, .. } if kinds.contains(&kind.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_media_that_packer_uploaded_are_removed_with_the_machine() {
        let device =
            |file: &str| Element::new("VirtualDevice").with(Element::new("backing").with_text("fileName", file));
        let devices = Element::new("val")
            .with(Element::new("VirtualDevice").with_text("key", "200"))
            .with(device("[ds1] packer_cache//packer123.iso"))
            .with(device("[ds1] iso/packer_cache.iso"))
            .with(device("[ds1] node-image-build-0123456789/disk-0.vmdk"));
        assert_eq!(media(&devices), ["[ds1] packer_cache/packer123.iso"]);
    }
}
