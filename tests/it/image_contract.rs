//! The image contract's document is the one that the table makes.

use std::{fs, path::Path};

use node_image_builder::native::image_contract;

#[test]
fn the_document_is_made_from_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/image-contract.md");
    let document = fs::read_to_string(path).unwrap_or_default();
    assert!(
        document == image_contract::document(),
        "docs/image-contract.md is stale: run `cargo run -- image-contract > docs/image-contract.md`"
    );
}
