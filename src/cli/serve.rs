//! `image-builder serve`: the artifact server.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use secrecy::SecretString;
use tokio_util::sync::CancellationToken;

use super::service::told_to_stop;
use crate::{
    contract::token::SigningKey,
    serve::{Config, Server},
};

/// Unfinished uploads are kept as long as the longest build may take to go on.
const UPLOAD_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Directory of the images.
    #[arg(long, env = "IMAGE_BUILDER_DATA_DIR", value_name = "DIR")]
    data_dir: PathBuf,
    /// Address and port to listen on.
    #[arg(long, env = "IMAGE_BUILDER_LISTEN", value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// File with the key that upload tokens are signed with, at least 32 bytes; the operator has the same.
    #[arg(long, env = "IMAGE_BUILDER_KEY_FILE", value_name = "FILE")]
    key_file: PathBuf,
    /// File with a token that allows uploading and deleting everything, for people.
    #[arg(long, env = "IMAGE_BUILDER_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Refuse uploads when less than this would stay free on the disk, in bytes.
    #[arg(long, env = "IMAGE_BUILDER_MIN_FREE_BYTES", value_name = "BYTES", default_value_t = 1 << 30)]
    min_free_bytes: u64,
}

pub(super) fn run(options: Options) -> anyhow::Result<()> {
    let Options { data_dir, listen, key_file, token_file, min_free_bytes } = options;
    let key = fs::read(&key_file).with_context(|| format!("can not read the signing key {}", key_file.display()))?;
    let key = SigningKey::new(&key).with_context(|| format!("the file {} is no key", key_file.display()))?;
    let admin_token = token_file.map(|file| admin_token(&file)).transpose()?;
    let config = Config { data_dir, listen, key, admin_token, min_free_bytes, upload_max_age: UPLOAD_MAX_AGE };
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let cancel = CancellationToken::new();
        let stop = told_to_stop()?;
        let server = Server::bind(config).await?;
        tracing::info!(address = %server.local_addr()?, "serving images");
        let signals = async {
            stop.await;
            tracing::info!("stopping");
            cancel.cancel();
            std::future::pending().await
        };
        tokio::select! {
            result = server.run(cancel.clone()) => Ok(result?),
            result = signals => result,
        }
    })
}

fn admin_token(file: &std::path::Path) -> anyhow::Result<SecretString> {
    let text = fs::read_to_string(file).with_context(|| format!("can not read the token {}", file.display()))?;
    let token = text.trim();
    // An empty file would let everybody in who sends an empty token.
    anyhow::ensure!(token.len() >= 16, "the token in {} has fewer than 16 characters", file.display());
    Ok(SecretString::from(token.to_owned()))
}
