//! `GET` and `HEAD` of complete images: one range, strong entity tags.

use std::{io::SeekFrom, sync::Arc};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::{blocking, error::Refusal, path::ImagePath, store::Store};
use crate::contract::upload::{CHECKSUM_SUFFIX, UNCOMPRESSED_SIZE};

/// Bytes read from disk at once.
const READ_SIZE: usize = 256 << 10;

pub(super) async fn serve(
    store: Arc<Store>,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    if let Some(image) = path.strip_suffix(CHECKSUM_SUFFIX) {
        let image = ImagePath::parse(image)?;
        let text = blocking(move || store.checksum_file(&image)).await?;
        return Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response());
    }
    let image = ImagePath::parse(path)?;
    let content_type = content_type(&image);
    let (file, details) = blocking(move || store.image(&image)).await?;
    let size = file.metadata()?.len();
    let tag = format!("\"{}\"", details.sha256);

    let mut answer = HeaderMap::new();
    answer.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    answer.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer.insert(header::ETAG, HeaderValue::try_from(&tag).map_err(std::io::Error::other)?);
    if let Some(size) = details.uncompressed_size {
        answer.insert(HeaderName::from_static(UNCOMPRESSED_SIZE), HeaderValue::from(size));
    }
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_NONE_MATCH).is_some_and(|tags| names(tags, &tag)) {
        return Ok((StatusCode::NOT_MODIFIED, answer).into_response());
    }
    // A range of another version of the file is worth nothing.
    let range = text(header::RANGE).filter(|_| text(header::IF_RANGE).is_none_or(|condition| condition.trim() == tag));
    let (status, first, length) = match range.map_or(Wanted::All, |range| wanted(range, size)) {
        Wanted::All => (StatusCode::OK, 0, size),
        Wanted::Nothing => return Err(Refusal::Range { size }),
        Wanted::Part { first, last } => {
            let value = HeaderValue::try_from(format!("bytes {first}-{last}/{size}")).map_err(std::io::Error::other)?;
            answer.insert(header::CONTENT_RANGE, value);
            (StatusCode::PARTIAL_CONTENT, first, last - first + 1)
        }
    };
    answer.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if method == Method::HEAD {
        return Ok((status, answer).into_response());
    }
    let mut file = tokio::fs::File::from_std(file);
    file.seek(SeekFrom::Start(first)).await?;
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(length), READ_SIZE));
    Ok((status, answer, body).into_response())
}

fn content_type(image: &ImagePath) -> &'static str {
    match image.as_str().rsplit('.').next() {
        Some("gz") => "application/gzip",
        _ => "application/octet-stream",
    }
}

/// Whether a list of entity tags names `tag`.
fn names(tags: &str, tag: &str) -> bool {
    tags.split(',').map(str::trim).any(|each| each == "*" || each.strip_prefix("W/").unwrap_or(each) == tag)
}

#[derive(Debug, Eq, PartialEq)]
enum Wanted {
    All,
    Part {
        first: u64,
        last: u64,
    },
    /// The range lies behind the end.
    Nothing,
}

/// RFC 9110 section 14: what is not one range of bytes is ignored.
fn wanted(range: &str, size: u64) -> Wanted {
    let Some((first, last)) = range.trim().strip_prefix("bytes=").and_then(|spec| spec.trim().split_once('-')) else {
        return Wanted::All;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if last < first => Wanted::All,
        (Ok(first), _) if first >= size && (last.is_empty() || last.parse::<u64>().is_ok()) => Wanted::Nothing,
        (Ok(first), Ok(last)) => Wanted::Part { first, last: last.min(size - 1) },
        (Ok(first), Err(_)) if last.is_empty() => Wanted::Part { first, last: size - 1 },
        (Err(_), Ok(0)) if first.is_empty() => Wanted::Nothing,
        (Err(_), Ok(_)) if first.is_empty() && size == 0 => Wanted::Nothing,
        (Err(_), Ok(suffix)) if first.is_empty() => Wanted::Part { first: size.saturating_sub(suffix), last: size - 1 },
        _ => Wanted::All,
    }
}

/// A part is in the file; the first bytes are the file's size.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((size, range)) = bytes.split_first_chunk() else { return };
    let (size, range) = (u64::from_le_bytes(*size), String::from_utf8_lossy(range));
    if let Wanted::Part { first, last } = wanted(&range, size) {
        assert!(first <= last && last < size, "{first} to {last} of {size}");
    }
    let _ = names(&range, "\"tag\"");
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::both_ends("bytes=0-4", 10, Wanted::Part { first: 0, last: 4 })]
    #[case::open_end("bytes=4-", 10, Wanted::Part { first: 4, last: 9 })]
    #[case::suffix("bytes=-3", 10, Wanted::Part { first: 7, last: 9 })]
    #[case::long_suffix("bytes=-30", 10, Wanted::Part { first: 0, last: 9 })]
    #[case::end_behind_the_file("bytes=5-99", 10, Wanted::Part { first: 5, last: 9 })]
    #[case::behind_the_file("bytes=10-", 10, Wanted::Nothing)]
    #[case::empty_suffix("bytes=-0", 10, Wanted::Nothing)]
    #[case::empty_file("bytes=0-", 0, Wanted::Nothing)]
    #[case::suffix_of_empty_file("bytes=-1", 0, Wanted::Nothing)]
    #[case::several("bytes=0-1,3-4", 10, Wanted::All)]
    #[case::backwards("bytes=4-2", 10, Wanted::All)]
    #[case::other_unit("lines=0-1", 10, Wanted::All)]
    #[case::nonsense("bytes=a-b", 10, Wanted::All)]
    fn range_header(#[case] range: &str, #[case] size: u64, #[case] expected: Wanted) {
        assert_eq!(wanted(range, size), expected);
    }
}
