//! The privileges that an import needs, by the object on which it needs them.
//!
//! They are those of EKS Anywhere's list for building in vCenter that an import uses, and those that the vSphere Web
//! Services API reference demands for the methods called here. A build by Packer needs the rest of that list, too.

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
const PACKER_FOLDER: &[&str] = &[
    "VApp.Export",
    "VirtualMachine.Config.Annotation",
    "VirtualMachine.Interact.ConsoleInteract",
    "VirtualMachine.Interact.DeviceConnection",
    "VirtualMachine.Interact.PowerOff",
    "VirtualMachine.Interact.PowerOn",
    "VirtualMachine.Interact.PutUsbScanCodes",
    "VirtualMachine.Interact.SetCDMedia",
    "VirtualMachine.Interact.SetFloppyMedia",
];
const PACKER_DATASTORE: &[&str] = &["Datastore.Browse", "Datastore.FileManagement"];
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

/// Checks all privileges, and tells all that are missing. `by_packer` is said of a build in a machine in vCenter.
pub(super) async fn check(
    vim: &Vim,
    target: &VsphereTarget,
    place: &Place,
    root: &Moref,
    by_packer: bool,
) -> Result<(), VsphereError> {
    let mut missing = vec![];
    for (what, object, privileges) in needed(target, place, root, by_packer) {
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
    by_packer: bool,
) -> Vec<(String, &'p Moref, Vec<&'static str>)> {
    let mut on_datastore = DATASTORE.to_vec();
    let mut folder = FOLDER.to_vec();
    if by_packer {
        on_datastore.extend(PACKER_DATASTORE);
        folder.extend(PACKER_FOLDER);
    }
    let datastore = (format!("the datastore `{}`", target.datastore), &place.datastore, on_datastore);
    if target.content_library.is_some() && !by_packer {
        // Libraries have no place in the inventory: their privileges are global.
        return vec![datastore, ("the vCenter".to_owned(), root, [LIBRARY, NEW_LIBRARY].concat())];
    }
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
        (
            "the vCenter".to_owned(),
            root,
            if target.content_library.is_some() { [LIBRARY, NEW_LIBRARY].concat() } else { TAGS.to_vec() },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_privilege_is_documented_and_no_other() {
        let document = include_str!("../../../docs/vsphere.md");
        let by_packer = [PACKER_FOLDER, PACKER_DATASTORE].concat();
        let all =
            [FOLDER, TEMPLATE, SNAPSHOT, POOL, DATASTORE, NETWORK, TAGS, LIBRARY, NEW_LIBRARY, &by_packer].concat();
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
