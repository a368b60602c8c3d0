//! What goes wrong on the way: told apart, waited out where that helps, and never left behind.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::Method;
use node_image_builder::contract::FailureClass;
use rstest::rstest;

use super::{Lab, NAME, prism::Fault, told};

const MIB: usize = 1 << 20;

/// Each ends a build for good, wherever it comes.
#[rstest]
#[case::credentials(Fault::status(401), FailureClass::BadInput, "PrismCredentialsRefused", "credentialsSecretRef")]
#[case::right(Fault::error(403, "ACCESS_DENIED", "not you"), FailureClass::BadInput, "PrismAccessDenied", "not you")]
#[case::request(
    Fault::error(422, "VALIDATION_ERROR", "bad words"),
    FailureClass::BadInput,
    "PrismRefused",
    "bad words"
)]
#[case::request_400(Fault::error(400, "INVALID_ARGUMENT", "bad"), FailureClass::BadInput, "PrismRefused", "bad")]
#[case::exists(Fault::error(409, "ENTITY_ALREADY_EXISTS", "twice"), FailureClass::BadInput, "PrismRefused", "twice")]
#[case::room(
    Fault::error(422, "RESOURCE_SHORTAGE", "no space"),
    FailureClass::Environment,
    "PrismClusterFull",
    "no space"
)]
#[tokio::test]
async fn answers_that_no_attempt_cures_end_the_build_and_leave_nothing(
    #[case] fault: Fault,
    #[case] class: FailureClass,
    #[case] reason: &str,
    #[case] text: &str,
    #[values((Method::POST, "/images"), (Method::PUT, "/file"), (Method::GET, "/tasks/"))] at: (Method, &'static str),
) {
    let lab = Lab::new().await;
    lab.prism.arm(at.0, at.1, 1, fault);
    let (found_class, found_reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((found_class, found_reason), (class, reason), "{message}");
    assert!(message.contains(text), "{message}");
    assert_eq!(lab.prism.images(), []);
}

/// Each passes, wherever it comes.
#[rstest]
#[case::away(Fault::status(503))]
#[case::answer_lost(Fault::SwallowAnswer)]
#[tokio::test]
async fn answers_that_pass_are_waited_out(
    #[case] fault: Fault,
    #[values(
        (Method::POST, "/clusters/list", 0), (Method::POST, "/images/list", 0), (Method::POST, "/images", 0),
        (Method::PUT, "/file", 0), (Method::GET, "/tasks/", 0), (Method::GET, "/images/", 0),
        // The first one is the upload.
        (Method::PUT, "/images/", 1),
        (Method::DELETE, "/images/", 0)
    )]
    at: (Method, &'static str, usize),
) {
    let mut lab = Lab::new().await;
    lab.target.replace_existing = true;
    lab.prism.add_image(NAME, "of last month");
    lab.prism.arm_after(at.2, at.0, at.1, 2, fault);
    let image = lab.publish().await.unwrap();
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), image.uuid)]);
}

#[rstest]
#[case::slow(408)]
#[case::conflict(409)]
#[case::busy(429)]
#[case::unwell(500)]
#[case::bad_gateway(502)]
#[tokio::test]
async fn statuses_that_pass_are_waited_out(#[case] status: u16) {
    let lab = Lab::new().await;
    lab.prism.arm(Method::POST, "/clusters/list", 1, Fault::status(status));
    lab.preflight().await.unwrap();
    assert_eq!(lab.prism.count(&Method::POST, "/clusters/list"), 2);
}

#[tokio::test]
async fn retry_after_is_kept() {
    let lab = Lab::new().await;
    lab.prism.arm(Method::POST, "/clusters/list", 1, Fault::status(429).retry_after(2));
    lab.preflight().await.unwrap();
    let asked: Vec<_> = lab.prism.seen().into_iter().filter(|seen| seen.path.ends_with("/clusters/list")).collect();
    assert_eq!(asked.len(), 2);
    let pause = asked[1].at - asked[0].at;
    assert!(pause >= Duration::from_secs(2), "it asked again after {pause:?}");
}

#[tokio::test]
async fn server_that_stays_away_is_given_up_with_its_last_answer() {
    let mut lab = Lab::new().await;
    lab.patience = Duration::from_millis(500);
    lab.prism.arm(Method::POST, "/clusters/list", 1000, Fault::error(503, "SERVICE_UNAVAILABLE", "upgrading"));
    let (class, reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismUnavailable"));
    assert!(message.contains("upgrading"), "{message}");
}

#[tokio::test]
async fn upload_that_breaks_off_is_begun_anew_with_a_new_image() {
    let lab = Lab::new().await;
    lab.prism.arm(Method::PUT, "/file", 2, Fault::CutAfter(MIB));
    let image = lab.publish().await.unwrap();
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), image.uuid)]);
    let mut uploads: Vec<_> =
        lab.prism.seen().into_iter().filter(|seen| seen.path.ends_with("/file")).map(|seen| seen.path).collect();
    uploads.dedup();
    assert_eq!(uploads.len(), 3, "a beginning can not be continued");
}

#[tokio::test]
async fn upload_that_always_breaks_off_is_given_up_and_leaves_nothing() {
    let lab = Lab::new().await;
    lab.prism.arm(Method::PUT, "/file", 1000, Fault::CutAfter(MIB));
    let (class, reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "UploadCorrupted"));
    assert!(message.contains("3 times"), "{message}");
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn upload_that_does_not_move_is_begun_anew() {
    let mut lab = Lab::new().await;
    // More than what fits into the buffers on the way.
    crate::package::sparse_disk(&lab.disk(), 64 << 20, &[(1 << 20, 40 * MIB)]);
    lab.patience = Duration::from_secs(2);
    lab.prism.arm(Method::PUT, "/file", 1, Fault::StallAfter(MIB));
    let begin = Instant::now();
    let image = lab.publish().await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20), "the kernel gave it up, not we");
    assert_eq!(lab.prism.images(), [(NAME.to_owned(), image.uuid)]);
}

#[rstest]
#[case::create(Method::POST, "/images", "create an image")]
#[case::contents(Method::PUT, "/file", "take over the image")]
#[case::rename(Method::PUT, "/images/", "rename an image")]
#[tokio::test]
async fn failed_task_ends_the_build_with_its_reason_and_leaves_nothing(
    #[case] method: Method,
    #[case] path: &'static str,
    #[case] action: &str,
) {
    let lab = Lab::new().await;
    let failure = Fault::FailTask { code: "INTERNAL_ERROR", detail: "the image format is not supported" };
    // The first request of the kind is the upload.
    let skip = usize::from(action == "rename an image");
    lab.prism.arm_after(skip, method, path, 1, failure);
    let (class, reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismTaskFailed"), "{message}");
    assert!(message.contains(action) && message.contains("the image format is not supported"), "{message}");
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn task_that_finds_no_room_says_who_has_to_act() {
    let lab = Lab::new().await;
    let failure = Fault::FailTask { code: "RESOURCE_SHORTAGE", detail: "storage container is full" };
    lab.prism.arm(Method::PUT, "/file", 1, failure);
    let (class, reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Environment, "PrismClusterFull"));
    assert!(message.contains("storage container is full"), "{message}");
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn disk_of_another_size_is_not_taken_for_the_image() {
    let lab = Lab::new().await;
    lab.prism.report_size(1 << 20);
    let (class, reason, message) = told(&lab.publish().await.unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "UploadCorrupted"));
    assert!(message.contains("1048576") && message.contains("67108864"), "{message}");
    assert_eq!(lab.prism.images(), []);
}

/// Where a build is when it is told to stop.
#[rstest]
#[case::while_it_is_created(Method::POST, "/images")]
#[case::while_its_creation_is_awaited(Method::GET, "/tasks/")]
#[case::while_it_is_taken_over(Method::PUT, "/file")]
#[tokio::test]
async fn cancelled_build_leaves_nothing(#[case] method: Method, #[case] path: &'static str) {
    let lab = Arc::new(Lab::new().await);
    lab.prism.arm(method, path, 1, Fault::HoldAnswer);
    let publishing = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { lab.publish().await }
    });
    lab.prism.held().await;
    lab.cancel.cancel();
    lab.prism.release();
    let (class, reason, _) = told(&publishing.await.unwrap().unwrap_err());
    assert_eq!((class, reason), (FailureClass::Cancelled, "Cancelled"));
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn build_that_is_cancelled_in_the_middle_of_the_upload_leaves_nothing() {
    let lab = Arc::new(Lab::new().await);
    lab.prism.arm(Method::PUT, "/file", 1, Fault::StallAfter(MIB));
    let publishing = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { lab.publish().await }
    });
    lab.prism.stalled().await;
    assert_eq!(lab.prism.images().len(), 1, "so this proves nothing");
    lab.cancel.cancel();
    let (class, ..) = told(&publishing.await.unwrap().unwrap_err());
    assert_eq!(class, FailureClass::Cancelled);
    assert_eq!(lab.prism.images(), []);
}

#[tokio::test]
async fn image_that_somebody_removes_meanwhile_is_a_failure_and_not_a_success() {
    let lab = Arc::new(Lab::new().await);
    lab.prism.arm(Method::PUT, "/file", 1, Fault::HoldAnswer);
    let publishing = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { lab.publish().await }
    });
    lab.prism.held().await;
    lab.prism.remove_images();
    lab.prism.release();
    let (class, reason, message) = told(&publishing.await.unwrap().unwrap_err());
    assert_eq!((class, reason), (FailureClass::Transient, "PrismTaskFailed"));
    assert!(message.contains("somebody has removed"), "{message}");
}
