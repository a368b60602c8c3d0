//! The privileges that an import needs, by the object on which it needs them.
//!
//! They are those of EKS Anywhere's list for building in vCenter that an import uses, and those that the vSphere Web
//! Services API reference demands for the methods called here.

use super::{VsphereError, inventory::Place, soap::Moref, vim::Vim};
use crate::contract::VsphereTarget;

const FOLDER: &[&str] = &[
    "VirtualMachine.Config.AddNewDisk",
    "VirtualMachine.Config.AddRemoveDevice",
    "VirtualMachine.Config.AdvancedConfig",
    "VirtualMachine.Config.CPUCount",
    "VirtualMachine.Config.Memory",
    "VirtualMachine.Config.Rename",
    "VirtualMachine.Config.Resource",
    "VirtualMachine.Config.Settings",
    "VirtualMachine.Inventory.Create",
    "VirtualMachine.Inventory.Delete",
];
const TEMPLATE: &[&str] = &["VirtualMachine.Provisioning.MarkAsTemplate"];
const SNAPSHOT: &[&str] = &["VirtualMachine.State.CreateSnapshot"];
const POOL: &[&str] = &["Resource.AssignVMToPool", "VApp.Import"];
const DATASTORE: &[&str] = &["Datastore.AllocateSpace"];
const NETWORK: &[&str] = &["Network.Assign"];
const TAGS: &[&str] = &[
    "InventoryService.Tagging.AttachTag",
    "InventoryService.Tagging.CreateCategory",
    "InventoryService.Tagging.CreateTag",
];
const LIBRARY: &[&str] =
    &["ContentLibrary.AddLibraryItem", "ContentLibrary.DeleteLibraryItem", "ContentLibrary.UpdateLibraryItem"];
const NEW_LIBRARY: &[&str] = &["ContentLibrary.CreateLocalLibrary"];

/// Checks all privileges, and tells all that are missing.
pub(super) async fn check(vim: &Vim, target: &VsphereTarget, place: &Place, root: &Moref) -> Result<(), VsphereError> {
    let mut missing = vec![];
    for (what, object, privileges) in needed(target, place, root) {
        let lacking = vim.missing_privileges(object, &privileges).await?;
        if !lacking.is_empty() {
            missing.push(format!("{} on {what}", lacking.join(", ")));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(VsphereError::NoPrivilege { server: vim.server.clone(), missing })
}

fn needed<'p>(
    target: &VsphereTarget,
    place: &'p Place,
    root: &'p Moref,
) -> Vec<(String, &'p Moref, Vec<&'static str>)> {
    let datastore = (format!("the datastore `{}`", target.datastore), &place.datastore, DATASTORE.to_vec());
    if target.content_library.is_some() {
        // Libraries have no place in the inventory: their privileges are global.
        return vec![datastore, ("the vCenter".to_owned(), root, [LIBRARY, NEW_LIBRARY].concat())];
    }
    let mut folder = FOLDER.to_vec();
    if target.convert_to_template {
        folder.extend(TEMPLATE);
    }
    if target.create_snapshot {
        folder.extend(SNAPSHOT);
    }
    vec![
        (format!("the folder `{}`", place.folder_path), &place.folder, folder),
        ("the resource pool".to_owned(), &place.pool, POOL.to_vec()),
        datastore,
        (format!("the network `{}`", target.network), &place.network, NETWORK.to_vec()),
        ("the vCenter".to_owned(), root, TAGS.to_vec()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_privilege_is_documented_and_no_other() {
        let document = include_str!("../../../docs/vsphere.md");
        let all = [FOLDER, TEMPLATE, SNAPSHOT, POOL, DATASTORE, NETWORK, TAGS, LIBRARY, NEW_LIBRARY].concat();
        let mut documented: Vec<_> = document
            .split('`')
            .filter(|text| text.contains('.') && !text.contains(".spec."))
            .filter(|text| text.split('.').all(|part| part.starts_with(|c: char| c.is_ascii_uppercase())))
            .collect();
        documented.sort_unstable();
        let mut needed = all.clone();
        needed.sort_unstable();
        assert_eq!(documented, needed);
    }
}
