//! The test's Prism Central refuses what the original refuses. Were it milder, the other tests would prove little.

use std::process::Command;

use axum::http::Method;
use reqwest::{Client, Response};
use rstest::rstest;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::prism::{CLUSTER_UUID, PASSWORD, Prism, USERNAME};

/// A client that knows nothing of ours.
struct Peer {
    prism: Prism,
    client: Client,
}

impl Peer {
    async fn new() -> Self {
        crate::support::install_crypto();
        let prism = Prism::start().await;
        let authority = reqwest::Certificate::from_pem(prism.authority.as_bytes()).unwrap();
        let client = Client::builder().tls_certs_only([authority]).build().unwrap();
        Self { prism, client }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let url = format!("https://localhost:{}/api/nutanix/v3{path}", self.prism.port);
        self.client.request(method, url).basic_auth(USERNAME, Some(PASSWORD))
    }

    async fn send(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        answer(self.request(method, path).json(body).send().await.unwrap()).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        answer(self.request(Method::GET, path).send().await.unwrap()).await
    }

    /// Waits for the task of an answer and gives its end.
    async fn end_of(&self, accepted: &Value) -> Value {
        let task = accepted["status"]["execution_context"]["task_uuid"].as_str().unwrap();
        self.end_of_task(task).await
    }

    async fn end_of_task(&self, task: &str) -> Value {
        loop {
            let (status, task) = self.get(&format!("/tasks/{task}")).await;
            assert_eq!(status, 200);
            if !["QUEUED", "RUNNING"].contains(&task["status"].as_str().unwrap()) {
                return task;
            }
        }
    }

    /// An image that is created and has no contents.
    async fn create(&self, name: &str) -> String {
        let (status, accepted) = self.send(Method::POST, "/images", &intent(name)).await;
        assert_eq!(status, 202, "{accepted}");
        assert_eq!(self.end_of(&accepted).await["status"], "SUCCEEDED");
        accepted["metadata"]["uuid"].as_str().unwrap().to_owned()
    }

    async fn upload(&self, uuid: &str, bytes: &[u8], digest: &str) -> (u16, Value) {
        let request = self
            .request(Method::PUT, &format!("/images/{uuid}/file"))
            .header("content-type", "application/octet-stream")
            .header("x-nutanix-checksum-type", "SHA_256")
            .header("x-nutanix-checksum-bytes", digest)
            .body(bytes.to_vec());
        answer(request.send().await.unwrap()).await
    }
}

async fn answer(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&response.bytes().await.unwrap()).unwrap_or_default())
}

fn intent(name: &str) -> Value {
    json!({
        "metadata": {"kind": "image"},
        "spec": {"name": name, "resources": {"image_type": "DISK_IMAGE"}},
    })
}

fn reason(answer: &Value) -> &str {
    answer["message_list"][0]["reason"].as_str().unwrap()
}

#[tokio::test]
async fn refuses_who_does_not_say_who_he_is() {
    let peer = Peer::new().await;
    let url = format!("https://localhost:{}/api/nutanix/v3/clusters/list", peer.prism.port);
    for request in [
        peer.client.post(&url).json(&json!({})),
        peer.client.post(&url).json(&json!({})).basic_auth(USERNAME, Some("wrong")),
    ] {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 401);
        assert!(serde_json::from_str::<Value>(&response.text().await.unwrap()).is_err(), "401 has no JSON");
    }
}

/// A machine with a disk that is made from the image `image`.
fn machine(image: &str, subnet: &Value) -> Value {
    json!({
        "metadata": {"kind": "vm"},
        "spec": {
            "name": "machine",
            "cluster_reference": {"kind": "cluster", "uuid": CLUSTER_UUID},
            "resources": {
                "num_sockets": 1, "memory_size_mib": 2048, "power_state": "ON",
                "disk_list": [{
                    "device_properties": {
                        "device_type": "DISK", "disk_address": {"adapter_type": "SCSI", "device_index": 0},
                    },
                    "data_source_reference": {"kind": "image", "uuid": image},
                    "disk_size_mib": 2048,
                }],
                "nic_list": [{"is_connected": true, "subnet_reference": {"kind": "subnet", "uuid": subnet}}],
                "guest_customization": {"cloud_init": {"user_data": "I2Nsb3VkLWNvbmZpZwo="}},
            },
        },
    })
}

#[rstest]
#[case::nothing("", Value::Null, 202)]
#[case::another_kind("/metadata/kind", json!("image"), 422)]
#[case::no_such_cluster("/spec/cluster_reference/uuid", json!("1"), 422)]
#[case::no_such_subnet("/spec/resources/nic_list/0/subnet_reference/uuid", json!("1"), 422)]
#[case::no_such_image("/spec/resources/disk_list/0/data_source_reference/uuid", json!("1"), 422)]
#[case::smaller_than_its_image("/spec/resources/disk_list/0/disk_size_mib", json!(32), 422)]
#[case::user_data_that_is_not_encoded(
    "/spec/resources/guest_customization/cloud_init/user_data", json!("#cloud-config"), 422
)]
#[case::unknown_power_state("/spec/resources/power_state", json!("RUNNING"), 422)]
#[tokio::test]
async fn makes_machines_only_of_what_is_there(#[case] at: &str, #[case] value: Value, #[case] expected: u16) {
    let peer = Peer::new().await;
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(64 << 20).unwrap();
    let image = peer.prism.add_disk("disk", disk.path());
    let (_, subnets) = peer.send(Method::POST, "/subnets/list", &json!({"kind": "subnet"})).await;
    let mut wanted = machine(&image, &subnets["entities"][0]["metadata"]["uuid"]);
    if !at.is_empty() {
        *wanted.pointer_mut(at).unwrap() = value;
    }
    let (status, answer) = peer.send(Method::POST, "/vms", &wanted).await;
    assert_eq!(status, expected, "{answer}");
    if expected != 202 {
        assert_eq!(peer.prism.machines(), [""; 0]);
        return;
    }
    assert_eq!(peer.end_of(&answer).await["status"], "SUCCEEDED");
    let uuid = answer["metadata"]["uuid"].as_str().unwrap();
    let (_, read) = peer.get(&format!("/vms/{uuid}")).await;
    let disk = &read["spec"]["resources"]["disk_list"][0];
    assert_eq!(disk["disk_size_bytes"], 2_u64 << 30);

    // An image of its disk has all of that.
    let mut of_disk = intent("copy");
    of_disk["spec"]["resources"]["data_source_reference"] = json!({"kind": "vm_disk", "uuid": disk["uuid"]});
    let (status, answer) = peer.send(Method::POST, "/images", &of_disk).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(peer.end_of(&answer).await["status"], "SUCCEEDED");
    let copy = answer["metadata"]["uuid"].as_str().unwrap();
    assert_eq!(peer.prism.image(copy)["status"]["resources"]["size_bytes"], 2_u64 << 30);
    of_disk["spec"]["resources"]["data_source_reference"]["uuid"] = json!("1");
    assert_eq!(peer.send(Method::POST, "/images", &of_disk).await.0, 422);

    let (status, answer) = peer.send(Method::DELETE, &format!("/vms/{uuid}"), &Value::Null).await;
    assert_eq!(status, 202);
    assert_eq!(peer.end_of(&answer).await["status"], "SUCCEEDED");
    assert_eq!(peer.get(&format!("/vms/{uuid}")).await.0, 404);
}

#[tokio::test]
async fn refuses_other_content_types() {
    let peer = Peer::new().await;
    let list = peer.request(Method::POST, "/clusters/list").header("content-type", "text/plain").body("{}");
    let (status, document) = answer(list.send().await.unwrap()).await;
    assert_eq!((status, reason(&document)), (415, "UNSUPPORTED_MEDIA_TYPE_ERROR"));
    let uuid = peer.create("a").await;
    let upload = peer.request(Method::PUT, &format!("/images/{uuid}/file")).json(&json!({}));
    let (status, document) = answer(upload.send().await.unwrap()).await;
    assert_eq!((status, reason(&document)), (415, "UNSUPPORTED_MEDIA_TYPE_ERROR"));
}

#[rstest]
#[case::unknown_field("/spec/resources/sparse", json!(true), "INVALID_REQUEST")]
#[case::unknown_metadata("/metadata/colour", json!("red"), "INVALID_REQUEST")]
#[case::other_kind("/metadata/kind", json!("vm"), "INVALID_REQUEST")]
#[case::no_kind("/metadata/kind", Value::Null, "INVALID_REQUEST")]
#[case::no_name("/spec/name", json!(""), "INVALID_REQUEST")]
#[case::long_name("/spec/name", json!("n".repeat(257)), "INVALID_REQUEST")]
#[case::long_description("/spec/description", json!("d".repeat(1001)), "INVALID_REQUEST")]
#[case::other_type("/spec/resources/image_type", json!("QCOW2"), "INVALID_REQUEST")]
#[case::other_architecture("/spec/resources/architecture", json!("amd64"), "INVALID_REQUEST")]
#[case::no_such_cluster(
    "/spec/resources/initial_placement_ref_list",
    json!([{"kind": "cluster", "uuid": "00000000-0000-0000-0000-000000000000"}]),
    "REFERENCE_ERROR"
)]
#[case::reference_of_another_kind(
    "/spec/resources/initial_placement_ref_list",
    json!([{"kind": "host", "uuid": CLUSTER_UUID}]),
    "REFERENCE_ERROR"
)]
#[case::no_such_category("/metadata/categories", json!({"Colour": "Red"}), "CATEGORY_NAME_VALUE_MISMATCH")]
#[case::no_such_value("/metadata/categories", json!({"Environment": "Test"}), "CATEGORY_NAME_VALUE_MISMATCH")]
#[case::a_uuid_of_its_own("/metadata/uuid", json!(CLUSTER_UUID), "INVALID_REQUEST")]
#[tokio::test]
async fn refuses_images_that_are_not_as_described(#[case] field: &str, #[case] value: Value, #[case] expected: &str) {
    let peer = Peer::new().await;
    let mut body = intent("a");
    let (parent, name) = field.rsplit_once('/').unwrap();
    body.pointer_mut(parent).unwrap()[name] = value;
    let (status, document) = peer.send(Method::POST, "/images", &body).await;
    assert_eq!((status, reason(&document)), (422, expected), "{document}");
    assert_eq!((&document["state"], &document["code"]), (&json!("ERROR"), &json!(422)));
    assert_eq!(peer.prism.images(), []);
}

#[rstest]
#[case::other_kind(json!({"kind": "vm"}))]
#[case::no_length(json!({"length": 0}))]
#[case::too_long(json!({"length": 501}))]
#[case::negative_offset(json!({"offset": -1}))]
#[case::other_filter(json!({"filter": "size=gt=5"}))]
#[case::unknown_field(json!({"page": 1}))]
#[tokio::test]
async fn refuses_lists_that_are_not_as_described(#[case] body: Value) {
    let peer = Peer::new().await;
    let (status, document) = peer.send(Method::POST, "/images/list", &body).await;
    assert_eq!((status, reason(&document)), (422, "INVALID_REQUEST"));
}

#[tokio::test]
async fn lists_twenty_where_nobody_says_how_many() {
    let peer = Peer::new().await;
    for number in 0..30 {
        peer.prism.add_image(&format!("image-{number}"), "");
    }
    let (_, first) = peer.send(Method::POST, "/images/list", &json!({"kind": "image"})).await;
    assert_eq!((first["entities"].as_array().unwrap().len(), &first["metadata"]["total_matches"]), (20, &json!(30)));
    let (_, rest) = peer.send(Method::POST, "/images/list", &json!({"offset": 20, "length": 500})).await;
    assert_eq!(rest["entities"].as_array().unwrap().len(), 10);
    let (_, one) = peer.send(Method::POST, "/images/list", &json!({"filter": "name==image-7"})).await;
    assert_eq!(one["entities"][0]["status"]["name"], "image-7");
    assert_eq!(one["metadata"]["total_matches"], 1);
}

#[tokio::test]
async fn changes_show_only_when_their_task_has_ended() {
    let peer = Peer::new().await;
    let named = |name: &str| json!({"filter": format!("name=={name}")});
    let (_, created) = peer.send(Method::POST, "/images", &intent("a")).await;
    let uuid = created["metadata"]["uuid"].as_str().unwrap();
    let (_, listed) = peer.send(Method::POST, "/images/list", &named("a")).await;
    assert_eq!(listed["metadata"]["total_matches"], 0);
    peer.end_of(&created).await;
    let (_, listed) = peer.send(Method::POST, "/images/list", &named("a")).await;
    assert_eq!(listed["metadata"]["total_matches"], 1);

    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    let mut update = json!({"metadata": image["metadata"], "spec": image["spec"]});
    update["spec"]["name"] = json!("b");
    let (status, accepted) = peer.send(Method::PUT, &format!("/images/{uuid}"), &update).await;
    assert_eq!((status, peer.prism.names()), (202, vec!["a".to_owned()]));
    peer.end_of(&accepted).await;
    assert_eq!(peer.prism.names(), ["b"]);

    let (status, accepted) =
        answer(peer.request(Method::DELETE, &format!("/images/{uuid}")).send().await.unwrap()).await;
    assert_eq!((status, peer.prism.names().len()), (202, 1));
    peer.end_of(&accepted).await;
    assert_eq!(peer.prism.images(), []);
}

#[rstest]
#[case::stale("/metadata/spec_version", json!(7), 409, "SPEC_UPDATE_ERROR")]
#[case::no_version("/metadata/spec_version", Value::Null, 409, "SPEC_UPDATE_ERROR")]
#[case::other_uuid("/metadata/uuid", json!(CLUSTER_UUID), 422, "INVALID_REQUEST")]
#[case::other_contents("/spec/resources/image_type", json!("ISO_IMAGE"), 422, "INVALID_REQUEST")]
#[case::other_mapping("/metadata/categories_mapping", json!({"Environment": ["Staging"]}), 422, "INVALID_REQUEST")]
#[tokio::test]
async fn refuses_updates_that_change_what_can_not_change(
    #[case] field: &str,
    #[case] value: Value,
    #[case] status: u16,
    #[case] expected: &str,
) {
    let peer = Peer::new().await;
    let uuid = peer.create("a").await;
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    let mut update = json!({"metadata": image["metadata"], "spec": image["spec"]});
    let (parent, name) = field.rsplit_once('/').unwrap();
    update.pointer_mut(parent).unwrap()[name] = value;
    let (found, document) = peer.send(Method::PUT, &format!("/images/{uuid}"), &update).await;
    assert_eq!((found, reason(&document)), (status, expected), "{document}");
}

#[tokio::test]
async fn takes_contents_once_and_only_for_an_image_that_is_created() {
    let peer = Peer::new().await;
    let bytes = vec![7; 1024];
    let digest = hex::encode(Sha256::digest(&bytes));
    let (_, accepted) = peer.send(Method::POST, "/images", &intent("a")).await;
    let uuid = accepted["metadata"]["uuid"].as_str().unwrap();
    let (status, document) = peer.upload(uuid, &bytes, &digest).await;
    assert_eq!((status, reason(&document)), (422, "INVALID_REQUEST"), "it is not created yet");
    peer.end_of(&accepted).await;
    assert_eq!(peer.upload(uuid, &bytes, &digest).await.0, 200);
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    assert!(image["status"]["resources"]["size_bytes"].is_null(), "it is not taken over yet");
    let task = image["status"]["execution_context"]["task_uuid"][0].as_str().unwrap();
    assert_eq!(peer.end_of_task(task).await["status"], "SUCCEEDED");
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    assert_eq!(image["status"]["resources"]["size_bytes"], 1024);
    assert_eq!(peer.upload(uuid, &bytes, &digest).await.0, 422);
}

#[tokio::test]
async fn gives_the_raw_disk_and_no_parts_of_it() {
    let peer = Peer::new().await;
    let uuid = peer.create("a").await;
    let file = format!("/images/{uuid}/file");
    assert_eq!(peer.get(&file).await.0, 422, "it has no contents yet");
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = dir.path().join("disk");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1M").status().unwrap();
    assert!(made.success());
    let bytes = std::fs::read(&qcow2).unwrap();
    let digest = hex::encode(Sha256::digest(&bytes));
    assert_eq!(peer.upload(&uuid, &bytes, &digest).await.0, 200);
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    peer.end_of_task(image["status"]["execution_context"]["task_uuid"][0].as_str().unwrap()).await;
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    let checksum = json!({"checksum_algorithm": "SHA_256", "checksum_value": digest});
    assert_eq!(image["status"]["resources"]["checksum"], checksum, "of the file that was uploaded");

    let part = peer.request(Method::GET, &file).header("range", "bytes=10-").send().await.unwrap();
    assert_eq!(part.status(), 422);
    let whole = peer.request(Method::GET, &file).send().await.unwrap();
    assert_eq!((whole.status().as_u16(), whole.content_length()), (200, None));
    assert_eq!(whole.headers()["content-type"], "application/octet-stream");
    assert_eq!(whole.bytes().await.unwrap(), vec![0; 1 << 20]);
    let unknown = "/images/00000000-0000-0000-0000-000000000000/file";
    let (status, document) = peer.get(unknown).await;
    assert_eq!((status, reason(&document)), (404, "INVALID_ARGUMENT"));
}

#[tokio::test]
async fn wrong_checksum_fails_the_task_after_the_upload() {
    let peer = Peer::new().await;
    let uuid = peer.create("a").await;
    assert_eq!(peer.upload(&uuid, &[7; 1024], &"0".repeat(64)).await.0, 200);
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    let task = peer.end_of_task(image["status"]["execution_context"]["task_uuid"][0].as_str().unwrap()).await;
    assert_eq!(task["status"], "FAILED");
    assert!(task["error_detail"].as_str().unwrap().contains("checksum mismatch"), "{task}");
    let (_, image) = peer.get(&format!("/images/{uuid}")).await;
    assert_eq!(image["status"]["state"], "ERROR");
}

#[rstest]
#[case::no_type(None, Some("00"))]
#[case::no_bytes(Some("SHA_256"), None)]
#[case::short(Some("SHA_256"), Some("00"))]
#[case::other_type(Some("sha256"), Some("0000000000000000000000000000000000000000000000000000000000000000"))]
#[tokio::test]
async fn refuses_half_a_checksum(#[case] kind: Option<&str>, #[case] bytes: Option<&str>) {
    let peer = Peer::new().await;
    let uuid = peer.create("a").await;
    let mut request = peer
        .request(Method::PUT, &format!("/images/{uuid}/file"))
        .header("content-type", "application/octet-stream")
        .body("x");
    for (name, value) in [("x-nutanix-checksum-type", kind), ("x-nutanix-checksum-bytes", bytes)] {
        if let Some(value) = value {
            request = request.header(name, value);
        }
    }
    assert_eq!(answer(request.send().await.unwrap()).await.0, 422);
}

#[rstest]
#[case::image(Method::GET, "/images/00000000-0000-0000-0000-000000000000")]
#[case::image_to_delete(Method::DELETE, "/images/00000000-0000-0000-0000-000000000000")]
#[case::task(Method::GET, "/tasks/00000000-0000-0000-0000-000000000000")]
#[case::category(Method::GET, "/categories/Colour/Red")]
#[case::path(Method::GET, "/pictures")]
#[tokio::test]
async fn says_what_does_not_exist(#[case] method: Method, #[case] path: &str) {
    let peer = Peer::new().await;
    let (status, document) = answer(peer.request(method, path).send().await.unwrap()).await;
    assert_eq!((status, reason(&document)), (404, "ENTITY_NOT_FOUND"));
}

#[tokio::test]
async fn several_images_may_have_one_name() {
    let peer = Peer::new().await;
    assert_ne!(peer.create("a").await, peer.create("a").await);
    assert_eq!(peer.prism.names(), ["a", "a"]);
}
