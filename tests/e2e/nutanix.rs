//! An image in Prism Central: from `kubectl apply` to an uploaded qcow2 that boots by BIOS and goes with its resource.
//! Prism Central is the test server of `tests/it/nutanix`.

use std::time::Duration;

use serde_json::json;

use crate::{
    cluster::{TestNamespace, boot, condition, setting, status},
    mirror::spec,
    prism::{CLUSTER, PASSWORD, Prism, USERNAME},
};

const LIMIT: Duration = Duration::from_secs(25 * 60);

#[tokio::test]
async fn an_image_is_built_uploaded_booted_and_removed() {
    let prism = Prism::start_at(&setting("NIB_HOST_IP")).await;
    let namespace = TestNamespace::create("nutanix").await;
    namespace.apply_secret("prism", json!({"username": USERNAME, "password": PASSWORD})).await;
    let mut spec = spec();
    spec.as_object_mut().unwrap().remove("baremetal");
    spec["nutanix"] = json!({
        "endpoint": setting("NIB_HOST_IP"),
        "port": prism.port,
        "credentialsSecretRef": {"name": "prism"},
        "insecure": true,
        "cluster": {"name": CLUSTER},
        "subnet": "vm-network",
        "categories": {"Environment": "Staging"},
    });
    // The disk that Prism Central has is booted below.
    spec["verify"] = json!({"boot": "Never"});
    spec["deletionPolicy"] = json!("Delete");

    // A name that Prism Central does not know is told at once, with those that are like it.
    let mut wrong = spec.clone();
    wrong["nutanix"]["cluster"] = json!({"name": "pe-cluster-9"});
    namespace.apply("wrong-cluster", wrong).await;
    let build = namespace.wait_stalled("wrong-cluster", Duration::from_secs(120)).await;
    let message = condition(&build, "Stalled").unwrap()["message"].as_str().unwrap().to_owned();
    eprintln!("  wrong-cluster: {message}");
    assert!(message.contains("pe-cluster-9") && message.contains(CLUSTER), "{message}");
    namespace.delete_build("wrong-cluster").await;

    namespace.apply("image", spec).await;
    let build = namespace.wait_ready("image", LIMIT).await;
    let image = status(&build)["image"].clone();
    let (name, uuid) = (image["name"].as_str().unwrap(), image["uuid"].as_str().unwrap());
    assert!(name.starts_with("debian-12-kube-1-34-") && image["format"] == "qcow2", "{image}");
    assert_eq!(prism.images(), [(name.to_owned(), uuid.to_owned())]);
    let document = serde_json::to_string_pretty(&prism.image(uuid)).unwrap();
    eprintln!("  the image in Prism Central: {document}");
    let readable = namespace.everything_readable().await;
    assert!(!readable.contains(PASSWORD), "the password can be read in the cluster");
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("exported.qcow2");
    std::fs::copy(prism.file(uuid), &disk).unwrap();
    boot(&disk, "nutanix");

    namespace.delete_build("image").await;
    assert_eq!(prism.images(), [], "an image stays that should go with its resource");
    namespace.delete().await;
}
