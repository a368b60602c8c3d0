//! The tags by which EKS Anywhere recognises a template: `os:<name>` in the category `os`, and
//! `eksdRelease:<release>` in the category `eksdRelease`.

use serde::Deserialize;
use serde_json::json;

use super::{VsphereError, rest::Rest, soap::Moref};
use crate::contract::BuildRequest;

const CATEGORIES: &str = "cis/tagging/category";
const TAGS: &str = "cis/tagging/tag";

#[derive(Deserialize)]
struct Named {
    id: String,
    name: String,
}

/// Categories and tags of a build's image.
fn tags(request: &BuildRequest) -> [(&'static str, String); 2] {
    [("os", format!("os:{}", request.os.name)), ("eksdRelease", format!("eksdRelease:{}", request.release.eksd_name))]
}

/// Gives `machine` its tags; categories and tags that are missing are made.
pub(super) async fn attach(rest: &Rest<'_>, request: &BuildRequest, machine: &Moref) -> Result<(), VsphereError> {
    for (category, name) in tags(request) {
        let category = category_id(rest, category).await?;
        let tag = tag_id(rest, &category, &name).await?;
        let path = format!("cis/tagging/tag-association/id:{tag}?~action=attach");
        let object = json!({"object_id": {"id": machine.id, "type": machine.kind}});
        rest.send(&format!("attach the tag `{name}`"), reqwest::Method::POST, &path, Some(object)).await?;
    }
    Ok(())
}

async fn category_id(rest: &Rest<'_>, name: &str) -> Result<String, VsphereError> {
    let list = || find(rest, CATEGORIES, CATEGORIES, name);
    if let Some(id) = list().await? {
        return Ok(id);
    }
    // Templates that serve several releases carry several tags of one category.
    let create = json!({"create_spec": {
        "name": name, "description": "", "cardinality": "MULTIPLE", "associable_types": ["VirtualMachine"],
    }});
    match rest.post(&format!("create the tag category `{name}`"), CATEGORIES, create).await {
        // Another build was faster.
        Err(error) if is_taken(&error) => list().await?.ok_or(error),
        result => result,
    }
}

async fn tag_id(rest: &Rest<'_>, category: &str, name: &str) -> Result<String, VsphereError> {
    let listing = format!("{TAGS}/id:{category}?~action=list-tags-for-category");
    let list = || find(rest, &listing, TAGS, name);
    if let Some(id) = list().await? {
        return Ok(id);
    }
    let create = json!({"create_spec": {"name": name, "description": "", "category_id": category}});
    match rest.post(&format!("create the tag `{name}`"), TAGS, create).await {
        Err(error) if is_taken(&error) => list().await?.ok_or(error),
        result => result,
    }
}

/// The one of the objects that `listing` names which is called `name`.
async fn find(rest: &Rest<'_>, listing: &str, place: &str, name: &str) -> Result<Option<String>, VsphereError> {
    let action = "list tags";
    let ids: Option<Vec<String>> = if listing.contains('?') {
        rest.post(action, listing, json!({})).await?
    } else {
        rest.get(action, listing).await?
    };
    for id in ids.unwrap_or_default() {
        match rest.get::<Named>(action, &format!("{place}/id:{id}")).await {
            Ok(found) if found.name == name => return Ok(Some(found.id)),
            Ok(_) => {}
            // It went while the list was read.
            Err(VsphereError::Fault { kind, .. }) if kind == "not_found" || kind.starts_with("404") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn is_taken(error: &VsphereError) -> bool {
    matches!(error, VsphereError::Fault { kind, .. } if kind == "already_exists")
}
