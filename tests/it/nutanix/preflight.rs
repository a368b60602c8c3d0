//! What is found before anything is built.

use std::time::{Duration, Instant};

use axum::http::Method;
use node_image_builder::contract::{ClusterReference, FailureClass};
use rstest::rstest;

use super::{
    Lab, NAME,
    prism::{CLUSTER, CLUSTER_UUID, Fault},
    told,
};

#[tokio::test]
async fn finds_nothing_wrong_within_seconds_and_changes_nothing() {
    let lab = Lab::new().await;
    let begin = Instant::now();
    lab.preflight().await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5));
    let changes = lab.prism.seen().into_iter().filter(|seen| {
        seen.method == "PUT" || seen.method == "DELETE" || seen.method == "POST" && !seen.path.ends_with("/list")
    });
    assert_eq!(changes.count(), 0);
}

#[tokio::test]
async fn wrong_password_is_named_and_not_shown() {
    let lab = Lab::new().await;
    lab.set_password("a wrong password");
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismCredentialsRefused"));
    assert!(message.contains("credentialsSecretRef") && !message.contains("a wrong password"), "{message}");
}

#[tokio::test]
async fn certificate_of_an_unknown_authority_is_refused() {
    let mut lab = Lab::new().await;
    lab.trust_bundle = None;
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismUntrusted"));
    assert!(message.contains("spec.trustBundle"), "{message}");
    assert!(lab.prism.seen().is_empty(), "the password was sent to a stranger");
    lab.target.insecure = true;
    lab.preflight().await.unwrap();
}

#[tokio::test]
async fn address_where_nobody_listens_is_given_up_in_time() {
    let mut lab = Lab::new().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    lab.target.port = unused.local_addr().unwrap().port();
    drop(unused);
    lab.patience = Duration::from_millis(300);
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismUnavailable"));
    assert!(message.contains(&format!("localhost:{}", lab.target.port)), "{message}");
}

#[rstest]
#[case::no_host("")]
#[case::a_path("localhost/prism")]
#[case::a_user("user:secret@localhost")]
#[tokio::test]
async fn endpoint_that_is_no_host_is_refused(#[case] endpoint: &str) {
    let mut lab = Lab::new().await;
    lab.target.endpoint = endpoint.to_owned();
    let (class, reason, _) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "InvalidPrismAddress"));
}

#[rstest]
#[case::a_page(200, "<html>hello</html>")]
#[case::not_found(404, "nothing here")]
#[case::not_allowed(405, "no POST here")]
#[tokio::test]
async fn server_that_is_no_prism_central_is_told_from_one(#[case] status: u16, #[case] body: &str) {
    let lab = Lab::new().await;
    let fault = Fault::Answer { status, headers: vec![], body: body.to_owned() };
    lab.prism.arm(Method::POST, "/clusters/list", 1, fault);
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "NotAPrismCentral"));
    assert!(message.contains("spec.nutanix.endpoint"), "{message}");
}

#[tokio::test]
async fn everything_that_is_missing_is_told_at_once_with_what_is_there() {
    let mut lab = Lab::new().await;
    lab.target.cluster = ClusterReference::Name("pe-cluster-11".into());
    lab.target.subnet = Some("vm-netwrok".into());
    lab.target.categories.extend([("Environment".into(), "Prod".into()), ("Team".into(), "a/b".into())]);
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismObjectNotFound"));
    for expected in [
        &format!("cluster.name `pe-cluster-11`: there is {CLUSTER} ({CLUSTER_UUID}), pe-cluster-2"),
        "subnet `vm-netwrok`: there is vm-network,",
        "categories `Environment: Prod`",
        "categories `Team: a/b`",
    ] {
        assert!(message.contains(expected), "no {expected} in {message}");
    }
    assert!(!message.contains("prism-central"), "Prism Central is no place for images: {message}");
}

#[tokio::test]
async fn cluster_uuid_that_is_missing_is_told_with_what_is_there() {
    let mut lab = Lab::new().await;
    lab.target.cluster = ClusterReference::Uuid("00000000-0000-0000-0000-000000000000".into());
    let (_, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!(reason, "PrismObjectNotFound");
    assert!(message.contains(CLUSTER_UUID), "{message}");
}

#[tokio::test]
async fn cluster_name_that_two_have_is_never_chosen_from() {
    let lab = Lab::new().await;
    let other = lab.prism.add_cluster(CLUSTER);
    let (_, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!(reason, "PrismObjectNotFound");
    assert!(
        message.contains("cluster.uuid") && message.contains(&other) && message.contains(CLUSTER_UUID),
        "{message}"
    );
}

#[tokio::test]
async fn cluster_is_found_behind_the_first_part_of_the_list() {
    let mut lab = Lab::new().await;
    for number in 0..250 {
        lab.prism.add_cluster(&format!("edge-{number}"));
    }
    lab.target.cluster = ClusterReference::Name("edge-249".into());
    lab.target.subnet = None;
    lab.preflight().await.unwrap();
    assert_eq!(lab.prism.count(&Method::POST, "/clusters/list"), 3);
}

#[tokio::test]
async fn cluster_that_is_away_is_worth_another_attempt() {
    let lab = Lab::new().await;
    lab.prism.take_cluster_away(CLUSTER);
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismClusterUnavailable"));
    assert!(message.contains(CLUSTER), "{message}");
}

#[rstest]
#[case::of_the_cluster("vm-network", None)]
#[case::of_no_cluster("overlay", None)]
#[case::of_another_cluster("far-network", Some("it is a subnet of another cluster"))]
#[tokio::test]
async fn subnet_belongs_to_the_cluster_or_to_none(#[case] subnet: &str, #[case] problem: Option<&str>) {
    let mut lab = Lab::new().await;
    lab.target.subnet = Some(subnet.to_owned());
    match (lab.preflight().await, problem) {
        (Ok(()), None) => {}
        (Err(error), Some(problem)) => assert!(told(&error).2.contains(problem), "{error}"),
        (result, problem) => panic!("{result:?} and not {problem:?}"),
    }
}

#[rstest]
#[case::kept(false, 1, Some("ImageNameTaken"))]
#[case::replaced(true, 1, None)]
#[case::ambiguous(true, 2, Some("ImageNameAmbiguous"))]
#[tokio::test]
async fn name_that_is_taken_is_found_before_the_build(
    #[case] replace: bool,
    #[case] images: usize,
    #[case] expected: Option<&str>,
) {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = replace;
    for _ in 0..images {
        lab.prism.add_image(NAME, "by hand");
    }
    assert_eq!(lab.preflight().await.err().map(|error| told(&error).1), expected);
}

#[tokio::test]
async fn user_without_the_right_is_told_what_it_is() {
    let lab = Lab::new().await;
    let fault = Fault::error(403, "ACCESS_DENIED", "no permission to view subnets");
    lab.prism.arm(Method::POST, "/subnets/list", 1, fault);
    let (class, reason, message) = told(&lab.preflight().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::BadInput, "PrismAccessDenied"));
    assert!(message.contains("list subnets") && message.contains("no permission to view subnets"), "{message}");
}
