//! From `spec.nutanix` to the build document.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use node_image_builder::{
    api::v1alpha1::{DeletionPolicy, FINALIZER, NodeImageBuild, NodeImageBuildSpec},
    contract::{
        Base, ClusterReference, CredentialSlot, Firmware, NutanixTarget, PrismSource, Provider, ProviderTarget,
        PublishTarget,
    },
    controller::{
        cleanup::Outside,
        context::{Lifecycle, Placement, Settings},
        plan::{Inputs, Observed, plan},
        queue::Admission,
        references::{Use, references},
        retention::Usage,
        validate::{self, Prepared, Refusal},
    },
    reach::Reach,
};
use rstest::rstest;
use serde_json::{Value, json};

fn build(nutanix: &Value) -> NodeImageBuild {
    let mut settings = json!({
        "endpoint": "prism.example.com",
        "credentialsSecretRef": {"name": "prism"},
        "cluster": {"name": "pe-cluster-1"},
    });
    settings.as_object_mut().unwrap().extend(nutanix.as_object().unwrap().clone());
    let spec: NodeImageBuildSpec = serde_json::from_value(json!({
        "os": {"name": "ubuntu", "version": "22.04"},
        "releaseChannel": "1-31",
        "nutanix": settings,
    }))
    .unwrap();
    let mut build = NodeImageBuild::new("ubuntu", spec);
    build.metadata.namespace = Some("images".into());
    build.metadata.uid = Some("11111111-2222-3333-4444-555555555555".into());
    build
}

fn prepare(nutanix: &Value) -> Result<Prepared, Refusal> {
    let build = build(nutanix);
    let settings = Settings {
        builder_image: "builder".into(),
        image_builder_image: "upstream".into(),
        release_manifest_url: "http://mirror/manifest.yaml".parse().unwrap(),
        builder_service_account: None,
        artifact_server: None,
        lifecycle: Lifecycle::default(),
        reach: Reach::default(),
        placement: Placement::default(),
    };
    validate::prepare(&build, &validate::wish(&build), crate::ova::request().release, None, &settings)
}

fn target(prepared: &Prepared) -> &NutanixTarget {
    let Some(ProviderTarget::Nutanix(target)) = &prepared.request.provider_target else {
        panic!("{:?}", prepared.request.provider_target)
    };
    target
}

#[test]
fn every_setting_reaches_the_build_document() {
    let prepared = prepare(&json!({
        "port": 443,
        "insecure": true,
        "cluster": {"uuid": "0005B0F1-8f43-a0f2-02b7-3cecef193712"},
        "subnet": "vm-network",
        "imageName": "golden_1.31.4",
        "replaceExisting": true,
        "categories": {"Environment": "Production"},
    }))
    .unwrap();
    let expected = NutanixTarget {
        endpoint: "prism.example.com".into(),
        port: 443,
        slot: CredentialSlot("nutanix".into()),
        insecure: true,
        cluster: ClusterReference::Uuid("0005b0f1-8f43-a0f2-02b7-3cecef193712".into()),
        subnet: Some("vm-network".into()),
        image_name: "golden_1.31.4".into(),
        replace_existing: true,
        categories: [("Environment".to_owned(), "Production".to_owned())].into(),
    };
    assert_eq!(*target(&prepared), expected);
    let request = &prepared.request;
    assert_eq!((request.provider, request.firmware, request.disk_size_mib), (Provider::Nutanix, Firmware::Bios, 10240));
    assert!(request.publish.is_empty(), "Prism Central is place enough");
    let document = serde_json::to_string(request).unwrap();
    assert_eq!(serde_json::from_str::<node_image_builder::contract::BuildRequest>(&document).unwrap(), *request);
}

#[test]
fn image_without_a_name_is_named_after_its_build() {
    let prepared = prepare(&json!({})).unwrap();
    let id = &prepared.request.identity.build_id;
    assert_eq!(target(&prepared).image_name, format!("ubuntu-2204-kube-1-31-{id}"));
    assert_eq!(target(&prepared).port, 9440);
    assert_eq!(target(&prepared).cluster, ClusterReference::Name("pe-cluster-1".into()));
}

#[test]
fn another_place_is_another_build() {
    let id = |nutanix: Value| prepare(&nutanix).unwrap().request.identity.build_id;
    assert_eq!(id(json!({})), id(json!({})));
    assert_ne!(id(json!({})), id(json!({"cluster": {"name": "pe-cluster-2"}})));
}

#[rstest]
#[case::name(json!({"imageName": "ubuntu-2204-kube-1-30"}), "InvalidSpec", "ubuntu-2204-kube-1-31")]
#[case::no_cluster(json!({"cluster": {}}), "InvalidSpec", "spec.nutanix.cluster")]
#[case::two_clusters(json!({"cluster": {"name": "a", "uuid": "b"}}), "InvalidSpec", "spec.nutanix.cluster")]
fn what_can_not_be_is_refused_with_what_to_write(#[case] nutanix: Value, #[case] reason: &str, #[case] text: &str) {
    let refusal = prepare(&nutanix).unwrap_err();
    assert_eq!(refusal.reason, reason);
    assert!(refusal.message.contains(text), "{}", refusal.message);
}

#[test]
fn image_to_start_from_is_the_base_and_another_one_is_another_build() {
    assert!(validate::supported(&build(&json!({"sourceImageName": "golden"})).spec).is_ok());
    let golden = prepare(&json!({"sourceImageName": "golden"})).unwrap();
    let expected = Base::PrismImage(PrismSource { prism_image: "golden".into() });
    assert_eq!(golden.request.base, expected);
    let document = serde_json::to_string(&golden.request).unwrap();
    assert_eq!(serde_json::from_str::<node_image_builder::contract::BuildRequest>(&document).unwrap(), golden.request);
    let (none, silver) = (prepare(&json!({})).unwrap(), prepare(&json!({"sourceImageName": "silver"})).unwrap());
    assert!(matches!(none.request.base, Base::Archive(_)));
    assert_ne!(golden.inputs_digest, none.inputs_digest);
    assert_ne!(golden.inputs_digest, silver.inputs_digest);
}

#[test]
fn image_starts_from_an_archive_or_from_an_image() {
    let mut build = build(&json!({"sourceImageName": "golden"}));
    build.spec.base = serde_json::from_value(json!({"url": "https://base.test/a.tar", "sha256": "00"})).unwrap();
    let refusal = validate::base(&build.spec).unwrap_err();
    assert_eq!(refusal.reason, "InvalidSpec");
    assert!(refusal.message.contains("spec.base and spec.nutanix.sourceImageName"), "{}", refusal.message);
}

#[test]
fn image_is_exported_to_the_targets_too() {
    let mut build = build(&json!({}));
    build.spec.publish =
        serde_json::from_value(json!([{"http": {"url": "https://files.example.com/images"}}])).unwrap();
    let settings = Settings {
        builder_image: "builder".into(),
        image_builder_image: "upstream".into(),
        release_manifest_url: "http://mirror/manifest.yaml".parse().unwrap(),
        builder_service_account: None,
        artifact_server: None,
        lifecycle: Lifecycle::default(),
        reach: Reach::default(),
        placement: Placement::default(),
    };
    let wish = validate::wish(&build);
    let request = validate::prepare(&build, &wish, crate::ova::request().release, None, &settings).unwrap().request;
    assert!(matches!(request.provider_target, Some(ProviderTarget::Nutanix(_))));
    let [PublishTarget::Http { url, .. }] = &request.publish[..] else { panic!("{:?}", request.publish) };
    assert_eq!(url.as_str(), "https://files.example.com/images");
}

#[test]
fn image_that_stays_when_the_resource_goes_is_told() {
    let mut build = build(&json!({}));
    let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    build.spec.deletion_policy = DeletionPolicy::Delete;
    build.metadata.deletion_timestamp = Some(Time(now));
    build.metadata.finalizers = Some(vec![FINALIZER.into()]);
    build.status = serde_json::from_value(json!({
        "image": {"name": "ubuntu", "format": "qcow2", "size": 1, "virtualSize": 2, "sha256": "00", "uuid": "u"},
        // Its Secret, which says where it is, is gone.
        "history": [{"buildID": "0123456789", "result": "Succeeded"}],
    }))
    .unwrap();
    let observed = Observed {
        wish: validate::wish(&build),
        build: Arc::new(build),
        jobs: vec![],
        secrets: BTreeSet::new(),
        live_pods: BTreeSet::new(),
        pod_refusals: BTreeMap::new(),
        progress: None,
        manifest_changed: false,
        usage: Usage::NotNeeded,
        outside: Outside::default(),
    };
    let notes = plan(&observed, &Inputs::NotNeeded, Admission::Go, Lifecycle::FINISHED_JOB_TTL, now).notes;
    let [note] = &notes[..] else { panic!("{notes:?}") };
    assert_eq!(note.reason, "ImagesLeft");
    assert!(note.message.contains("Prism Central"), "{}", note.message);
}

#[test]
fn credentials_are_mounted_for_the_target() {
    let build = build(&json!({}));
    let found = references(&build.spec);
    let [reference] = &found[..] else { panic!("{found:?}") };
    assert_eq!(reference.used_as, Use::Credentials(CredentialSlot("nutanix".into())));
    assert_eq!((reference.name.as_str(), reference.field.as_str()), ("prism", "spec.nutanix.credentialsSecretRef"));
    assert_eq!(reference.keys, [["username", "password"]]);
}
