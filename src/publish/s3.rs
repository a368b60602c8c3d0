//! S3 and stores that speak its protocol: a multipart upload, which becomes visible as a whole or not at all.

use std::time::Duration;

use futures::TryStreamExt;
use object_store::{
    Attribute, AttributeValue, Attributes, ClientOptions, ObjectStore, PutMultipartOptions, PutOptions, RetryConfig,
    WriteMultipart,
    aws::{AmazonS3, AmazonS3Builder},
    client::{HttpClient, HttpConnector},
    path::Path,
};
use reqwest::Client;
use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{PublishError, Step, below, checksum_line, checksum_name, content_type};
use crate::{
    contract::CredentialSlot,
    package::{ImageSource, Summary},
    secret::Credentials,
};

/// Bytes of a part. S3 takes at most 10,000 parts of at least 5 MiB.
const PART: usize = 8 << 20;
/// Parts on their way at once.
const PARTS: usize = 2;

/// A bucket and where in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'p> {
    pub(super) bucket: &'p str,
    pub(super) prefix: &'p str,
    pub(super) region: &'p str,
    pub(super) endpoint: Option<&'p Url>,
}

impl Place<'_> {
    pub(super) fn key(self, file_name: &str) -> String {
        if self.prefix.is_empty() { file_name.to_owned() } else { format!("{}/{file_name}", self.prefix) }
    }

    /// Where the store itself serves `key`.
    pub(super) fn url(self, key: &str) -> Result<Url, PublishError> {
        let Self { bucket, region, endpoint, .. } = self;
        match endpoint {
            Some(endpoint) => below(endpoint, &format!("{bucket}/{key}")),
            None => Url::parse(&format!("https://{bucket}.s3.{region}.amazonaws.com"))
                .map_err(|_| PublishError::InvalidTarget { target: format!("the bucket {bucket}") })
                .and_then(|base| below(&base, key)),
        }
    }

    /// Without a slot the store's usual sources of credentials are asked: those of the pod or the node.
    pub(super) fn store(
        self,
        client: &Client,
        credentials: &Credentials,
        slot: Option<&CredentialSlot>,
        patience: Duration,
    ) -> Result<AmazonS3, PublishError> {
        let plain = self.endpoint.is_some_and(|endpoint| endpoint.scheme() == "http");
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(self.bucket)
            .with_region(self.region)
            .with_http_connector(SharedClient(client.clone()))
            .with_retry(RetryConfig { retry_timeout: patience, max_retries: usize::MAX, ..RetryConfig::default() })
            .with_client_options(ClientOptions::new().with_allow_http(plain));
        if let Some(endpoint) = self.endpoint {
            builder = builder.with_endpoint(endpoint.as_str().trim_end_matches('/'));
        }
        if let Some(slot) = slot {
            builder = builder
                .with_access_key_id(credentials.require(slot, "accessKeyID")?.expose_secret())
                .with_secret_access_key(credentials.require(slot, "secretAccessKey")?.expose_secret());
            if let Some(token) = credentials.optional(slot, "sessionToken")? {
                builder = builder.with_token(token.expose_secret());
            }
        }
        builder.build().map_err(|error| self.explain(error))
    }

    fn explain(self, error: object_store::Error) -> PublishError {
        use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
        let target = format!("the bucket {}", self.bucket);
        match error {
            PermissionDenied { source, .. } | Unauthenticated { source, .. } => {
                PublishError::CredentialsRefused { target, answer: source.to_string() }
            }
            NotFound { source, .. } => PublishError::Refused {
                target,
                answer: format!("check that it exists in the region {}: {source}", self.region),
            },
            error => PublishError::StoreFailed { target, source: Box::new(error) },
        }
    }
}

/// One image on its way to its key.
pub(super) struct Upload<'p> {
    pub(super) store: AmazonS3,
    pub(super) place: Place<'p>,
    pub(super) cancel: &'p CancellationToken,
    pub(super) step: Step,
}

impl Upload<'_> {
    pub(super) async fn run(&self, key: &str, source: &ImageSource) -> Result<Summary, PublishError> {
        let attributes = Attributes::from_iter([(Attribute::ContentType, AttributeValue::from(content_type(source)))]);
        let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
        let (path, checksum_path) = (Path::from(key), Path::from(checksum_name(key)));
        let begin = self.store.put_multipart_opts(&path, options);
        let begun = self.interruptible(async { begin.await.map_err(|error| self.place.explain(error)) }).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(begun, PART);
        let summary = match self.interruptible(self.send(&mut upload, source)).await {
            Ok(summary) => summary,
            Err(error) => {
                if let Err(left) = upload.abort().await {
                    tracing::warn!("parts of an unfinished upload of {key} may remain in the bucket: {left}");
                }
                return Err(error);
            }
        };
        // Aborts by itself when it fails.
        upload.finish().await.map_err(|error| self.place.explain(error))?;
        let checksum = self.store.put_opts(
            &checksum_path,
            checksum_line(&summary, source.file_name()).into(),
            PutOptions {
                attributes: Attributes::from_iter([(Attribute::ContentType, AttributeValue::from("text/plain"))]),
                ..PutOptions::default()
            },
        );
        self.interruptible(async { checksum.await.map_err(|error| self.place.explain(error)) }).await?;
        Ok(summary)
    }

    async fn send(&self, upload: &mut WriteMultipart, source: &ImageSource) -> Result<Summary, PublishError> {
        let (mut bytes, done, summary) = source.open()?.split();
        // The summary says why the bytes were cut.
        while let Ok(Some(piece)) = bytes.try_next().await {
            upload.wait_for_capacity(PARTS).await.map_err(|error| self.place.explain(error))?;
            upload.put(piece);
            self.step.report(&done);
        }
        upload.wait_for_capacity(1).await.map_err(|error| self.place.explain(error))?;
        Ok(summary.get().await?)
    }

    async fn interruptible<T>(&self, work: impl Future<Output = Result<T, PublishError>>) -> Result<T, PublishError> {
        self.cancel.run_until_cancelled(work).await.unwrap_or(Err(PublishError::Cancelled))
    }
}

/// Gives the store the build's own client, with its proxy and certificate authorities.
#[derive(Debug)]
struct SharedClient(Client);

impl HttpConnector for SharedClient {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_url_that_the_store_serves() {
        let place = Place { bucket: "images", prefix: "a/b", region: "eu-west-1", endpoint: None };
        assert_eq!(
            place.url(&place.key("f.gz")).unwrap().as_str(),
            "https://images.s3.eu-west-1.amazonaws.com/a/b/f.gz"
        );
        let endpoint = Url::parse("http://minio:9000/").unwrap();
        let place = Place { prefix: "", endpoint: Some(&endpoint), ..place };
        assert_eq!(place.url(&place.key("f.gz")).unwrap().as_str(), "http://minio:9000/images/f.gz");
    }
}
