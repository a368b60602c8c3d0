//! The OVF descriptor: the virtual machine that vSphere makes from a disk (DMTF DSP0243, with the extensions of vSphere).

use std::io;

use jiff::{Timestamp, tz::TimeZone};
use quick_xml::{
    Writer,
    events::{BytesDecl, Event},
};

use crate::contract::{BuildRequest, Firmware, Os, OsName};

const OVF: &str = "http://schemas.dmtf.org/ovf/envelope/1";
const RASD: &str = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData";
const VSSD: &str = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData";
const VMW: &str = "http://www.vmware.com/schema/ovf";
const STREAM_OPTIMIZED: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
const MIB: u64 = 1 << 20;
/// The property by which a machine in vCenter tells which build it is of: `<namespace>/<name>/<build id>`.
pub const BUILD_PROPERTY: &str = "NODE_IMAGE_BUILD";

/// The only network that the descriptor names; an import maps it to a real one.
pub const NETWORK: &str = "nic0";

/// A virtual machine, as far as it does not depend on the disk's bytes. Processors, memory and disk size are those of the
/// EKS Anywhere tool's OVAs; clones get their own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Machine {
    os: Os,
    firmware: Firmware,
    vmx_version: u32,
    product: Product,
    /// What is in the image; names and values as the EKS Anywhere tool's OVAs have them.
    properties: Vec<(&'static str, String)>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Product {
    name: String,
    version: String,
}

impl Machine {
    /// The machine for an image. `built` is the time that its properties tell, the only thing in an OVA that differs
    /// between two builds of the same contents.
    pub fn new(request: &BuildRequest, vmx_version: u32, built: Timestamp) -> Self {
        let (os, release) = (&request.os, &request.release);
        let date = built.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S").to_string();
        let properties = vec![
            ("BUILD_TIMESTAMP", built.as_second().to_string()),
            ("BUILD_DATE", date),
            ("DISTRO_NAME", os.name.to_string()),
            ("DISTRO_VERSION", os.version.clone()),
            ("DISTRO_ARCH", "amd64".to_owned()),
            ("CNI_VERSION", release.cni_plugins.version.clone()),
            ("CONTAINERD_VERSION", release.containerd.version.clone()),
            ("KUBERNETES_SEMVER", release.kubernetes_version.clone()),
            ("KUBERNETES_SOURCE_TYPE", "http".to_owned()),
            ("EKS_DISTRO_VERSION", release.eksd_name.clone()),
            (BUILD_PROPERTY, request.identity.to_string()),
        ];
        let product = Product {
            name: format!("{} {} and Kubernetes {}", os.name, os.version, release.kubernetes_version),
            version: release.eksd_name.clone(),
        };
        Self { os: os.clone(), firmware: request.firmware, vmx_version, product, properties }
    }

    /// CIM's number and vSphere's name of the operating system. Debian's is the newest that hardware version 15 knows.
    fn guest(&self) -> (&'static str, &'static str) {
        match (self.os.name, self.os.version.as_str()) {
            (OsName::Ubuntu, _) => ("94", "ubuntu64Guest"),
            (OsName::Debian, _) => ("96", "debian10_64Guest"),
            (OsName::Redhat, "8") => ("80", "rhel8_64Guest"),
            (OsName::Redhat, _) => ("80", "rhel9_64Guest"),
        }
    }
}

/// The disk that a descriptor refers to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk<'d> {
    /// Name of the VMDK.
    pub(super) file: &'d str,
    /// Bytes of the VMDK.
    pub(super) size: u64,
    /// Bytes of the disk.
    pub(super) capacity: u64,
}

/// The descriptor of the machine `name` with its one disk.
pub(super) fn descriptor(name: &str, machine: &Machine, disk: Disk<'_>) -> io::Result<String> {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    writer
        .create_element("Envelope")
        .with_attributes([
            ("xmlns", OVF),
            ("xmlns:ovf", OVF),
            ("xmlns:rasd", RASD),
            ("xmlns:vssd", VSSD),
            ("xmlns:vmw", VMW),
        ])
        .write_inner_content(|writer| {
            references(writer, disk)?;
            network(writer)?;
            virtual_system(writer, name, machine)
        })?;
    String::from_utf8(writer.into_inner()).map_err(io::Error::other)
}

type Xml = Writer<Vec<u8>>;

fn text(writer: &mut Xml, element: &str, text: &str) -> io::Result<()> {
    writer.create_element(element).write_text_content(quick_xml::events::BytesText::new(text))?;
    Ok(())
}

fn references(writer: &mut Xml, disk: Disk<'_>) -> io::Result<()> {
    let size = disk.size.to_string();
    writer.create_element("References").write_inner_content(|writer| {
        let attributes = [("ovf:href", disk.file), ("ovf:id", "file1"), ("ovf:size", &size)];
        writer.create_element("File").with_attributes(attributes).write_empty()?;
        Ok(())
    })?;
    let (capacity, unit) = match disk.capacity {
        bytes if bytes % MIB == 0 => ((bytes / MIB).to_string(), "byte * 2^20"),
        bytes => (bytes.to_string(), "byte"),
    };
    writer.create_element("DiskSection").write_inner_content(|writer| {
        text(writer, "Info", "The disk")?;
        writer
            .create_element("Disk")
            .with_attributes([
                ("ovf:capacity", capacity.as_str()),
                ("ovf:capacityAllocationUnits", unit),
                ("ovf:diskId", "vmdisk1"),
                ("ovf:fileRef", "file1"),
                ("ovf:format", STREAM_OPTIMIZED),
            ])
            .write_empty()?;
        Ok(())
    })?;
    Ok(())
}

fn network(writer: &mut Xml) -> io::Result<()> {
    writer.create_element("NetworkSection").write_inner_content(|writer| {
        text(writer, "Info", "The network")?;
        writer
            .create_element("Network")
            .with_attribute(("ovf:name", NETWORK))
            .write_inner_content(|writer| text(writer, "Description", "The network of the node"))?;
        Ok(())
    })?;
    Ok(())
}

fn virtual_system(writer: &mut Xml, name: &str, machine: &Machine) -> io::Result<()> {
    writer.create_element("VirtualSystem").with_attribute(("ovf:id", name)).write_inner_content(|writer| {
        text(writer, "Info", "A node image for EKS Anywhere")?;
        text(writer, "Name", name)?;
        let (id, guest) = machine.guest();
        writer
            .create_element("OperatingSystemSection")
            .with_attributes([("ovf:id", id), ("vmw:osType", guest)])
            .write_inner_content(|writer| text(writer, "Info", "The operating system"))?;
        hardware(writer, name, machine)?;
        product(writer, machine)
    })?;
    Ok(())
}

fn hardware(writer: &mut Xml, name: &str, machine: &Machine) -> io::Result<()> {
    writer.create_element("VirtualHardwareSection").write_inner_content(|writer| {
        text(writer, "Info", "The virtual hardware")?;
        writer.create_element("System").write_inner_content(|writer| {
            text(writer, "vssd:ElementName", "Virtual Hardware Family")?;
            text(writer, "vssd:InstanceID", "0")?;
            text(writer, "vssd:VirtualSystemIdentifier", name)?;
            text(writer, "vssd:VirtualSystemType", &format!("vmx-{}", machine.vmx_version))
        })?;
        for item in ITEMS {
            writer.create_element("Item").write_inner_content(|writer| {
                item.iter().try_for_each(|(element, value)| text(writer, &format!("rasd:{element}"), value))
            })?;
        }
        let firmware = match machine.firmware {
            Firmware::Bios => "bios",
            Firmware::Efi => "efi",
        };
        writer
            .create_element("vmw:Config")
            .with_attributes([("ovf:required", "false"), ("vmw:key", "firmware"), ("vmw:value", firmware)])
            .write_empty()?;
        Ok(())
    })?;
    Ok(())
}

/// Processors, memory, controller, disk, adapter. The schema wants the settings of each in alphabetical order.
const ITEMS: [&[(&str, &str)]; 5] = [
    &[
        ("AllocationUnits", "hertz * 10^6"),
        ("ElementName", "2 virtual CPUs"),
        ("InstanceID", "1"),
        ("ResourceType", "3"),
        ("VirtualQuantity", "2"),
    ],
    &[
        ("AllocationUnits", "byte * 2^20"),
        ("ElementName", "2048 MB of memory"),
        ("InstanceID", "2"),
        ("ResourceType", "4"),
        ("VirtualQuantity", "2048"),
    ],
    &[
        ("Address", "0"),
        ("ElementName", "SCSI controller 0"),
        ("InstanceID", "3"),
        // vSphere's name for pvscsi.
        ("ResourceSubType", "VirtualSCSI"),
        ("ResourceType", "6"),
    ],
    &[
        ("AddressOnParent", "0"),
        ("ElementName", "Hard disk 1"),
        ("HostResource", "ovf:/disk/vmdisk1"),
        ("InstanceID", "4"),
        ("Parent", "3"),
        ("ResourceType", "17"),
    ],
    &[
        ("AddressOnParent", "7"),
        ("AutomaticAllocation", "true"),
        ("Connection", NETWORK),
        ("ElementName", "Network adapter 1"),
        ("InstanceID", "5"),
        ("ResourceSubType", "VmxNet3"),
        ("ResourceType", "10"),
    ],
];

fn product(writer: &mut Xml, machine: &Machine) -> io::Result<()> {
    writer.create_element("ProductSection").write_inner_content(|writer| {
        text(writer, "Info", "What is in the image")?;
        text(writer, "Product", &machine.product.name)?;
        text(writer, "Version", &machine.product.version)?;
        for (key, value) in &machine.properties {
            writer
                .create_element("Property")
                .with_attributes([
                    ("ovf:key", *key),
                    ("ovf:type", "string"),
                    ("ovf:userConfigurable", "false"),
                    ("ovf:value", value),
                ])
                .write_empty()?;
        }
        Ok(())
    })?;
    Ok(())
}
