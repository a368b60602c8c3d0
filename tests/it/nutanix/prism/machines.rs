//! Machines of the test's Prism Central: what packer-plugin-nutanix 0.8.1 and a clean-up need.
//!
//! Nothing runs in them. A machine answers at the address that [`Prism::set_guest`] gave, and is off when the file that was
//! given there says so; its disk is that of the image that it was made from, extended.
//!
//! | what it does | known from |
//! |---|---|
//! | required fields, references, `guest_customization.cloud_init.user_data` in base64 | the v3 description, `vm_resources`; packer-plugin-nutanix 0.8.1, `driver.go` |
//! | `nic_list[].ip_endpoint_list` is empty until the machine has an address; `power_state`; disks have a `uuid` and `disk_size_bytes` in `spec` and `status` | recorded answers in prism-go-client, `v3/mocks`; the plugin reads both |
//! | machines are filtered by `vm_name==…` | openshift/release, the step `upi-conf-nutanix` |
//! | several machines may have one name; one that runs can be deleted | terraform-provider-nutanix, `resource_nutanix_virtual_machine.go` |

use std::{fs, path::PathBuf, sync::Arc};

use axum::{
    extract::{Path, Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Effect, Inner, Intent, Prism, Reference, Refused, Shared, accepted, deletion, disk_size, error, failure, invalid,
    list, raw, read_json,
};

const MIB: u64 = 1 << 20;

/// What a machine answers as.
#[derive(Clone)]
pub(super) struct Guest {
    address: String,
    /// Where this file is, the machine is off.
    off: PathBuf,
}

pub(super) struct Machine {
    /// `None` until its creation has ended.
    pub(super) created: bool,
    spec: Value,
    uuid: String,
    disk_uuid: String,
    pub(super) disk: PathBuf,
    tasks: Vec<String>,
}

impl Prism {
    /// Every machine has this address from now on, and is off where the file `off` is.
    pub fn set_guest(&self, address: &str, off: PathBuf) {
        self.inner(|inner| inner.guest = Some(Guest { address: address.to_owned(), off }));
    }

    /// Names of all machines, also of those that are only begun.
    pub fn machines(&self) -> Vec<String> {
        self.inner(|inner| inner.machines.iter().map(Machine::name).collect())
    }

    /// What cloud-init is told in the machines.
    pub fn user_data(&self) -> Vec<String> {
        let text = |machine: &Machine| {
            let data = machine.spec["resources"]["guest_customization"]["cloud_init"]["user_data"].as_str().unwrap();
            String::from_utf8(STANDARD.decode(data).unwrap()).unwrap()
        };
        self.inner(|inner| inner.machines.iter().map(text).collect())
    }

    /// A machine that somebody else has made, with a disk that is this file.
    pub fn add_machine(&self, name: &str, disk: &std::path::Path) -> String {
        let uuid = Uuid::new_v4().to_string();
        let copy = self.shared.directory.path().join(&uuid);
        fs::copy(disk, &copy).unwrap();
        let spec = json!({"name": name, "resources": {"power_state": "ON", "nic_list": [], "disk_list": [{}]}});
        let mut machine = Machine::new(spec, uuid.clone(), copy);
        machine.created = true;
        self.inner(|inner| inner.machines.push(machine));
        uuid
    }
}

impl Machine {
    fn new(spec: Value, uuid: String, disk: PathBuf) -> Self {
        Self { created: false, spec, uuid, disk_uuid: Uuid::new_v4().to_string(), disk, tasks: vec![] }
    }

    fn name(&self) -> String {
        self.spec["name"].as_str().unwrap().to_owned()
    }

    fn document(&self, guest: Option<&Guest>) -> Value {
        let mut spec = self.spec.clone();
        if self.created {
            let size = disk_size(&self.disk);
            let disk = &mut spec["resources"]["disk_list"][0];
            disk["uuid"] = json!(self.disk_uuid);
            (disk["disk_size_bytes"], disk["disk_size_mib"]) = (json!(size), json!(size / MIB));
        }
        let mut resources = spec["resources"].clone();
        if guest.is_some_and(|guest| guest.off.exists()) {
            resources["power_state"] = json!("OFF");
        }
        for nic in resources["nic_list"].as_array_mut().unwrap() {
            let address = guest.filter(|_| self.created).map(|guest| json!({"ip": guest.address, "type": "LEARNED"}));
            nic["ip_endpoint_list"] = address.into_iter().collect();
        }
        json!({
            "api_version": "3.1",
            "metadata": {"kind": "vm", "uuid": self.uuid, "spec_version": 0, "categories": {}},
            "spec": spec,
            "status": {
                "name": spec["name"],
                "state": if self.created { "COMPLETE" } else { "PENDING" },
                "resources": resources,
                "cluster_reference": spec["cluster_reference"],
                "execution_context": {"task_uuid": self.tasks},
            },
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    name: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    cluster_reference: Reference,
    resources: Resources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    num_sockets: u32,
    memory_size_mib: u64,
    power_state: String,
    disk_list: [Disk; 1],
    nic_list: Vec<Nic>,
    guest_customization: Customization,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    device_properties: Value,
    data_source_reference: Reference,
    #[serde(rename = "disk_size_mib")]
    size_mib: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nic {
    subnet_reference: Reference,
    #[serde(rename = "is_connected")]
    _is_connected: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Customization {
    cloud_init: CloudInit,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CloudInit {
    user_data: String,
}

#[expect(clippy::unnecessary_box_returns, reason = "it is an error, which is kept small")]
fn no_reference(reference: &Reference) -> Refused {
    let message = format!("the {} {} does not exist", reference.kind, reference.uuid);
    Box::new(error(StatusCode::UNPROCESSABLE_ENTITY, "REFERENCE_ERROR", &message))
}

impl Intent<Spec> {
    /// What is stored of it, and the image that its disk is made from.
    fn check(&self, inner: &Inner) -> Result<(Value, PathBuf, u64), Refused> {
        let Spec { name, cluster_reference, resources, .. } = &self.spec;
        let Resources { num_sockets, memory_size_mib, power_state, disk_list, nic_list, guest_customization } =
            resources;
        if self.metadata.kind != "vm" || name.is_empty() || name.len() > 80 {
            return Err(invalid("metadata.kind is not vm, or spec.name has not 1 to 80 characters"));
        }
        if *num_sockets == 0 || *memory_size_mib == 0 || !["ON", "OFF"].contains(&power_state.as_str()) {
            return Err(invalid("a machine has sockets, memory, and a power_state of ON or OFF"));
        }
        let is = |entity: &&Value, kind: &str, reference: &Reference| {
            reference.kind == kind && entity["metadata"]["uuid"] == reference.uuid.as_str()
        };
        if !inner.clusters.iter().any(|cluster| is(&cluster, "cluster", cluster_reference)) {
            return Err(no_reference(cluster_reference));
        }
        for nic in nic_list {
            let reference = &nic.subnet_reference;
            let subnet = inner.subnets.iter().find(|subnet| is(subnet, "subnet", reference));
            let of = &subnet.ok_or_else(|| no_reference(reference))?["status"]["cluster_reference"]["uuid"];
            if !of.is_null() && *of != cluster_reference.uuid.as_str() {
                return Err(invalid("the subnet is one of another cluster"));
            }
        }
        let [Disk { device_properties, data_source_reference, size_mib }] = disk_list;
        let address = json!({"device_type": "DISK", "disk_address": {"adapter_type": "SCSI", "device_index": 0}});
        if *device_properties != address {
            return Err(invalid("the first disk is SCSI 0"));
        }
        let image = inner.images.get(&data_source_reference.uuid).filter(|_| data_source_reference.kind == "image");
        let image = image.filter(|image| image.created).ok_or_else(|| no_reference(data_source_reference))?;
        if image.size.is_none_or(|size| size > size_mib * MIB) {
            return Err(invalid("the disk is smaller than the image that it is made from, or that has no contents"));
        }
        let data = STANDARD.decode(&guest_customization.cloud_init.user_data).unwrap_or_default();
        if !data.starts_with(b"#cloud-config") {
            return Err(invalid("user_data is not what cloud-init reads, in base64"));
        }
        let stored = json!({
            "name": name,
            "cluster_reference": {"kind": "cluster", "uuid": cluster_reference.uuid},
            "resources": {
                "num_sockets": num_sockets,
                "memory_size_mib": memory_size_mib,
                "power_state": power_state,
                "disk_list": [{"device_properties": device_properties}],
                "nic_list": nic_list.iter()
                    .map(|nic| json!({"subnet_reference": {"kind": "subnet", "uuid": nic.subnet_reference.uuid}}))
                    .collect::<Vec<_>>(),
                "guest_customization": {"cloud_init": {"user_data": guest_customization.cloud_init.user_data}},
            },
        });
        Ok((stored, image.file.clone(), size_mib * MIB))
    }
}

pub(super) async fn create(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (intent, planned): (Intent<Spec>, _) = match read_json(request).await {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    let checked = shared.with(|inner| intent.check(inner));
    let (spec, image, size) = match checked {
        Ok(checked) => checked,
        Err(refused) => return *refused,
    };
    let uuid = Uuid::new_v4().to_string();
    let disk = shared.directory.path().join(&uuid);
    let copy = disk.clone();
    let copied = move || {
        fs::copy(raw(&image), &copy).unwrap();
        fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(size).unwrap();
    };
    tokio::task::spawn_blocking(copied).await.unwrap();
    shared.with(|inner| {
        let task = inner.begin("create_vm_intentful", Effect::CreateMachine(uuid.clone()), failure(&planned));
        let mut machine = Machine::new(spec, uuid, disk);
        machine.tasks.push(task.clone());
        let mut document = machine.document(None);
        inner.machines.push(machine);
        document["status"]["execution_context"]["task_uuid"] = json!(task);
        accepted(document)
    })
}

fn no_machine() -> Response {
    error(StatusCode::NOT_FOUND, "ENTITY_NOT_FOUND", "the machine does not exist")
}

pub(super) async fn read(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>) -> Response {
    shared.with(|inner| match inner.machines.iter().find(|machine| machine.uuid == uuid) {
        Some(machine) => axum::Json(machine.document(inner.guest.as_ref())).into_response(),
        None => no_machine(),
    })
}

pub(super) async fn list_all(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let all = |inner: &mut Inner| inner.machines.iter().map(|machine| machine.document(inner.guest.as_ref())).collect();
    list(shared, request, "vm", all).await
}

pub(super) async fn delete(State(shared): State<Arc<Shared>>, Path(uuid): Path<String>, request: Request) -> Response {
    let planned = request.extensions().get::<super::Planned>().unwrap().clone();
    shared.with(|inner| {
        if !inner.machines.iter().any(|machine| machine.uuid == uuid) {
            return no_machine();
        }
        let task = inner.begin("delete_vm_intentful", Effect::DeleteMachine(uuid), failure(&planned));
        deletion("vm", &task)
    })
}

impl Inner {
    pub(super) fn machine(&mut self, uuid: &str) -> Option<&mut Machine> {
        self.machines.iter_mut().find(|machine| machine.uuid == uuid)
    }

    pub(super) fn remove_machine(&mut self, uuid: &str) {
        self.machines.retain(|machine| machine.uuid != uuid);
    }

    /// The disk of this UUID.
    pub(super) fn disk(&self, uuid: &str) -> Option<PathBuf> {
        let machine = self.machines.iter().find(|machine| machine.created && machine.disk_uuid == uuid);
        machine.map(|machine| machine.disk.clone())
    }
}
