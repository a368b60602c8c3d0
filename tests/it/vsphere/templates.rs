//! What a published image is in vCenter.

use node_image_builder::contract::VsphereImage;
use rstest::rstest;

use super::{Lab, NAME};

#[tokio::test]
async fn image_becomes_a_tagged_template_with_its_disk() {
    let lab = Lab::new(&[]).await;
    lab.preflight().await.unwrap();
    let imported = lab.publish().await.unwrap();
    let path = format!("/DC0/vm/templates/{NAME}");

    let inventory = lab.vcenter.inventory().await;
    let machine = inventory.machine(&path);
    assert!(machine.template);
    assert_eq!((machine.version.as_str(), machine.guest.as_str()), ("vmx-15", "ubuntu64Guest"));
    assert_eq!(machine.tags, ["eksdRelease/eksdRelease:kubernetes-1-31-eks-47", "os/os:ubuntu"]);
    assert_eq!(machine.disk_kb.as_deref(), Some(&[64 * 1024][..]));
    assert_eq!(machine.controllers.as_deref(), Some(&["pvscsi".to_owned()][..]));
    assert_eq!(machine.adapters.as_deref(), Some(&["vmxnet3".to_owned()][..]));
    assert_eq!(machine.datastores, ["/DC0/datastore/LocalDS_0"]);
    assert_eq!(machine.networks, ["/DC0/network/VM Network"]);
    assert_eq!(machine.snapshots, [""; 0]);
    assert_eq!(machine.properties["EKS_DISTRO_VERSION"], "kubernetes-1-31-eks-47");
    assert_eq!(machine.properties["NODE_IMAGE_BUILD"], "images/ubuntu/0123456789");

    let vmdk = lab.vcenter.disk(&machine.moref);
    assert_eq!(machine.uploaded.as_ref().unwrap().values().copied().collect::<Vec<_>>(), [imported.summary.size]);
    assert!(crate::ova::unpack_vmdk(&vmdk) == std::fs::read(lab.disk()).unwrap(), "another disk arrived");
    assert_eq!(imported.name, NAME);
    let template = imported.template.unwrap();
    let expected = VsphereImage {
        inventory_path: path,
        moref: machine.moref.clone(),
        instance_uuid: machine.instance_uuid.clone(),
    };
    assert_eq!(template, expected);
    assert!(!template.instance_uuid.is_empty());
    for category in inventory.categories.as_deref().unwrap() {
        assert_eq!(
            (category.cardinality.as_str(), &category.types[..]),
            ("MULTIPLE", &["VirtualMachine".to_owned()][..])
        );
    }
    assert_eq!((inventory.sessions, inventory.tokens, inventory.leases), (0, 0, 0), "a session or lease is left");
}

#[rstest]
#[case::pool_by_path(None, Some("/DC0/host/DC0_C0/Resources/DC0_C0_RP1"), None, "/DC0/vm")]
#[case::pool_within_the_cluster(Some("DC0_C0"), Some("DC0_C0_RP1"), Some("/DC0/vm/templates"), "/DC0/vm/templates")]
#[case::host_alone(Some("DC0_H0"), None, None, "/DC0/vm")]
#[case::host_of_a_cluster(Some("DC0_C0_H1"), None, None, "/DC0/vm")]
#[tokio::test]
async fn image_goes_where_the_target_says(
    #[case] cluster: Option<&str>,
    #[case] pool: Option<&str>,
    #[case] folder: Option<&str>,
    #[case] expected: &str,
) {
    let mut lab = Lab::new(&[]).await;
    lab.target.cluster = cluster.map(str::to_owned);
    lab.target.resource_pool = pool.map(str::to_owned);
    lab.target.folder = folder.map(str::to_owned);
    lab.target.network = "DC0_DVPG0".into();
    let imported = lab.publish().await.unwrap();
    let path = format!("{expected}/{NAME}");
    assert_eq!(imported.template.unwrap().inventory_path, path);
    let inventory = lab.vcenter.inventory().await;
    assert_eq!(inventory.machine(&path).networks, ["/DC0/network/DC0_DVPG0"]);
}

#[tokio::test]
async fn machine_with_a_snapshot_instead_of_a_template() {
    let mut lab = Lab::new(&[]).await;
    (lab.target.convert_to_template, lab.target.create_snapshot) = (false, true);
    let imported = lab.publish().await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    let machine = inventory.machine(&imported.template.unwrap().inventory_path);
    assert_eq!((machine.template, &machine.snapshots[..]), (false, &["root".to_owned()][..]));
}

#[tokio::test]
async fn tags_of_another_build_are_used_again() {
    let mut lab = Lab::new(&[]).await;
    lab.publish().await.unwrap();
    (lab.target.template_name, lab.request) = ("another".into(), lab.another_build("abcdefabcd"));
    lab.publish().await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    let categories = inventory.categories.as_ref().unwrap();
    let tags: Vec<_> = categories.iter().map(|category| (category.name.as_str(), category.tags.len())).collect();
    assert_eq!(tags, [("eksdRelease", 1), ("os", 1)]);
    assert_eq!(inventory.machine("/DC0/vm/templates/another").tags.len(), 2);
}

#[tokio::test]
async fn template_of_the_same_name_is_replaced_only_if_asked_for() {
    let mut lab = Lab::new(&[]).await;
    lab.publish().await.unwrap();
    let before = lab.vcenter.inventory().await.contents();
    lab.request = lab.another_build("abcdefabcd");
    for error in [lab.preflight().await.unwrap_err(), lab.publish().await.unwrap_err()] {
        assert_eq!(
            error.to_string(),
            format!(
                "the folder `/DC0/vm/templates` already has `{NAME}`; write another spec.vsphere.templateName, or \
                 replaceExisting: true to have it replaced"
            )
        );
    }
    assert_eq!(lab.vcenter.inventory().await.contents(), before);

    lab.target.replace_existing = true;
    lab.preflight().await.unwrap();
    lab.publish().await.unwrap();
    let after = lab.vcenter.inventory().await;
    let machine = after.machine(&format!("/DC0/vm/templates/{NAME}"));
    assert_eq!(machine.properties["NODE_IMAGE_BUILD"], "images/ubuntu/abcdefabcd");
    assert_eq!(after.machines.as_ref().unwrap().len(), 1, "the old one is left");
    assert_eq!(after.contents().0, before.0);
}

#[tokio::test]
async fn second_attempt_of_the_same_build_takes_the_place_of_the_first() {
    let lab = Lab::new(&[]).await;
    let first = lab.publish().await.unwrap().template.unwrap();
    lab.preflight().await.unwrap();
    let second = lab.publish().await.unwrap().template.unwrap();
    assert_ne!(first.moref, second.moref);
    assert_eq!(lab.vcenter.inventory().await.machines.unwrap().len(), 1);
}

#[tokio::test]
async fn image_becomes_an_item_of_a_library_that_is_made() {
    let mut lab = Lab::new(&[]).await;
    lab.target.content_library = Some("eks-a-templates".into());
    lab.preflight().await.unwrap();
    let imported = lab.publish().await.unwrap();
    assert_eq!((imported.name.as_str(), imported.template), (NAME, None));
    let inventory = lab.vcenter.inventory().await;
    let libraries = inventory.libraries.clone().unwrap();
    assert_eq!((libraries.len(), libraries[0].name.as_str()), (1, "eks-a-templates"));
    let [item] = &libraries[0].items[..] else { panic!("{libraries:?}") };
    assert_eq!((item.name.as_str(), item.r#type.as_str()), (NAME, "ovf"));
    assert!(item.description.contains("kubernetes-1-31-eks-47"), "{}", item.description);
    let files: Vec<_> = item.files.keys().map(|name| name.rsplit_once('.').unwrap().1).collect();
    assert_eq!(files, ["mf", "ovf", "vmdk"]);
    assert_eq!((inventory.sessions, inventory.tokens), (0, 0), "a session is left");

    // Another build does not replace it unless asked to.
    lab.request = lab.another_build("abcdefabcd");
    for error in [lab.preflight().await.unwrap_err(), lab.publish().await.unwrap_err()] {
        assert!(error.to_string().starts_with("the content library `eks-a-templates` already has"), "{error}");
    }
    assert_eq!(lab.vcenter.inventory().await.contents(), inventory.contents());
    lab.target.replace_existing = true;
    lab.publish().await.unwrap();
    let libraries = lab.vcenter.inventory().await.libraries.unwrap();
    let [item] = &libraries[0].items[..] else { panic!("{libraries:?}") };
    assert!(item.description.ends_with("build images/ubuntu/abcdefabcd"), "{}", item.description);
    assert_eq!(item.name, NAME);
}

#[tokio::test]
async fn machine_of_newer_hardware_and_efi() {
    let lab = Lab::new(&[]).await;
    let source = node_image_builder::package::ImageSource::new(
        lab.disk(),
        NAME,
        node_image_builder::package::Format::Ova(std::sync::Arc::new(node_image_builder::package::Machine::new(
            &lab.request,
            18,
            jiff::Timestamp::UNIX_EPOCH,
        ))),
    );
    let imported = lab.vsphere().publish(&lab.request, &source).await.unwrap();
    let inventory = lab.vcenter.inventory().await;
    assert_eq!(inventory.machine(&imported.template.unwrap().inventory_path).version, "vmx-18");
}
