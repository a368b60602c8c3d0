//! What is done to images in Prism Central.

use reqwest::Method;
use serde_json::{Value, json};

use super::{
    NutanixError,
    documents::{COMPLETE, ERROR, Entity},
    prism::{LONGEST_PAUSE, Prism, joined, pauses},
};
use crate::package::Summary;

/// The images of this very name.
pub(super) async fn named(prism: &Prism, name: &str) -> Result<Vec<Entity>, NutanixError> {
    let mut images = prism.list("image", Some(format!("name=={name}"))).await?;
    images.retain(|image| image.status.name == name);
    Ok(images)
}

/// Removes an image; one that is gone is no error.
pub(super) async fn remove(prism: &Prism, uuid: &str) -> Result<(), NutanixError> {
    let action = "delete an image";
    let accepted = prism.begin(action, Method::DELETE, &["images", uuid], None::<&()>).await?;
    match accepted {
        Some(accepted) => prism.finish(action, &accepted).await,
        None => Ok(()),
    }
}

/// Removes all images of this name.
pub(super) async fn remove_named(prism: &Prism, name: &str) -> Result<(), NutanixError> {
    for image in named(prism, name).await? {
        remove(prism, &image.metadata.uuid).await?;
    }
    Ok(())
}

/// Gives an image another name. An update repeats everything that is to stay.
pub(super) async fn rename(prism: &Prism, uuid: &str, name: &str) -> Result<(), NutanixError> {
    let (action, path) = ("rename an image", ["images", uuid]);
    let gone = || NutanixError::Failed {
        server: prism.server.clone(),
        action: action.to_owned(),
        message: format!("somebody has removed the image {uuid}"),
    };
    let mut image: Value = prism.get("read an image", &path).await?.ok_or_else(gone)?;
    image["spec"]["name"] = json!(name);
    let update = json!({ "metadata": image["metadata"], "spec": image["spec"] });
    let accepted = prism.begin(action, Method::PUT, &path, Some(&update)).await?.ok_or_else(gone)?;
    prism.finish(action, &accepted).await
}

/// Waits until Prism Central has taken over an image that was sent, and checks what it says about it. `tell` is told
/// what it does.
pub(super) async fn await_whole(
    prism: &Prism,
    uuid: &str,
    summary: &Summary,
    tell: impl Fn(&str),
) -> Result<(), NutanixError> {
    let action = "take over the image";
    let server = || prism.server.clone();
    let failed = |message: String| NutanixError::Failed { server: server(), action: action.to_owned(), message };
    let (mut pauses, mut patience) = (pauses(), prism.patience());
    loop {
        let image: Option<Entity> = prism.get("read an image", &["images", uuid]).await?;
        let status = image.ok_or_else(|| failed(format!("somebody has removed the image {uuid}")))?.status;
        for task in status.execution_context.tasks() {
            prism.wait_for_task(action, task, &tell).await?;
        }
        match (status.state.as_str(), status.resources.size_bytes) {
            (ERROR, _) => return Err(failed(joined(&status.message_list))),
            (COMPLETE, Some(size)) if size == summary.virtual_size => return Ok(()),
            (COMPLETE, Some(size)) => {
                let answer = format!("it says that the disk has {size} bytes and not {}", summary.virtual_size);
                return Err(NutanixError::Corrupted { server: server(), answer });
            }
            (COMPLETE, None) => patience.wait("it does not say how large the image's disk is").await?,
            _ => tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await,
        }
    }
}
