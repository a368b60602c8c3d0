//! What is published beside an image: what is in it, and where it comes from.

use std::{fs, path::Path};

use jiff::Timestamp;
use url::Url;

use super::{
    BuildError, provenance,
    provenance::Subject,
    sbom,
    workspace::{Workspace, WorkspaceError},
};
use crate::{
    contract::{BuildRequest, ImageReport},
    native::Assembled,
    package::{Format, ImageSource},
    publish::Publisher,
};

/// Where the documents of an image are: at the target that its own URL leads to.
#[derive(Debug, Default)]
pub(super) struct Documents {
    pub(super) sbom: Option<Url>,
    pub(super) provenance: Option<Url>,
}

/// Writes the documents of a published image and puts them beside it, at every target.
pub(super) async fn publish(
    publisher: &Publisher,
    request: &BuildRequest,
    workspace: &Workspace,
    assembled: &Assembled,
    base: Option<&Url>,
    (file_name, image): (&str, &ImageReport),
    started: Timestamp,
) -> Result<Documents, BuildError> {
    let sbom = sbom::document(request, &assembled.packages, assembled.images(), file_name, &image.sha256);
    let subject = Subject { file_name, sha256: &image.sha256 };
    let provenance =
        provenance::document(request, (base, image.base_digest.as_deref()), subject, started, Timestamp::now());
    let file = |text: Vec<u8>, suffix: &str, media_type| {
        let stem = format!("{file_name}.{suffix}");
        let path = workspace.dir().join(&stem);
        write(&path, &text)?;
        Ok::<_, BuildError>(ImageSource::new(path, &stem, Format::Json { media_type }))
    };
    let sbom = file(sbom, sbom::SUFFIX, sbom::MEDIA_TYPE)?;
    let provenance = file(provenance, provenance::SUFFIX, provenance::MEDIA_TYPE)?;
    let mut documents = Documents::default();
    for target in &request.publish {
        let sbom = publisher.publish_beside(target, &sbom).await?.url;
        let provenance = publisher.publish_beside(target, &provenance).await?.url;
        documents.sbom.get_or_insert(sbom);
        documents.provenance.get_or_insert(provenance);
    }
    Ok(documents)
}

fn write(path: &Path, text: &[u8]) -> Result<(), WorkspaceError> {
    fs::write(path, text).map_err(|source| WorkspaceError::Create { path: path.to_owned(), source })
}
