//! What the benchmarks of whole builds share: the release of a mirror, a build document, a place for uploads.

use std::{collections::BTreeMap, env};

use axum::{Router, extract::Request, http::StatusCode};
use futures::StreamExt;
use node_image_builder::{
    contract::{
        Accelerator, Archive, Base, BaseChecksum, BootVerification, BuildIdentity, BuildRequest, Engine, Firmware, Os,
        OsName, Packages, Provider, Proxy, PublishTarget, Stage, VERSION, Verify,
    },
    http,
    release::{ReleaseQuery, Resolver},
};
use tokio::runtime::Runtime;

pub const DISK_SIZE_MIB: u64 = 6656;

/// What a benchmark runs in.
pub struct Bench {
    pub runtime: Runtime,
    pub mirror: String,
    /// A server that takes uploads.
    pub uploads: String,
    pub work: tempfile::TempDir,
}

impl Bench {
    /// `script` is what starts the benchmark as it is meant.
    pub fn start(script: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mirror = env::var("NIB_BENCH_MIRROR").unwrap_or_else(|_| panic!("set NIB_BENCH_MIRROR, or run {script}"));
        let work = tempfile::tempdir_in(env::var_os("NIB_BENCH_DIR").unwrap_or_else(|| "/var/tmp".into())).unwrap();
        let runtime = Runtime::new().unwrap();
        let uploads = runtime.block_on(serve_uploads());
        Self { runtime, mirror, uploads, work }
    }

    /// A build of the engine `Native`, of the mirror's release on its Debian; nothing is booted.
    pub fn request(&self) -> BuildRequest {
        let Self { runtime, mirror, uploads, .. } = self;
        let client = http::client(&Proxy::default(), None).unwrap();
        let query = ReleaseQuery {
            manifest_url: format!("{mirror}/releases/eks-a/manifest.yaml"),
            ..ReleaseQuery::new(env::var("NIB_BENCH_CHANNEL").unwrap_or_else(|_| "1-34".into()))
        };
        BuildRequest {
            version: VERSION.into(),
            identity: BuildIdentity { namespace: "bench".into(), name: "bench".into(), build_id: "0123456789".into() },
            os: Os { name: OsName::Debian, version: "12".into() },
            provider: Provider::Baremetal,
            firmware: Firmware::Efi,
            release: runtime.block_on(Resolver::new(client).resolve(&query)).unwrap(),
            engine: Engine::Native,
            base: Base::Archive(Archive {
                url: format!("{mirror}/base/debian-12-rootfs.tar.zst").parse().unwrap(),
                checksum: BaseChecksum::Sha256Sums(format!("{mirror}/base/SHA256SUMS").parse().unwrap()),
            }),
            disk_size_mib: DISK_SIZE_MIB,
            packages: Packages::default(),
            subscription: None,
            files: vec![],
            proxy: Proxy::default(),
            trust_bundle: None,
            verify: Verify { boot: BootVerification::Never, accelerator: Accelerator::Any, timeout_seconds: 1800 },
            provider_target: None,
            publish: vec![PublishTarget::Http { url: uploads.parse().unwrap(), public_url: None, slot: None }],
        }
    }
}

/// A server that takes `PUT` and keeps nothing.
async fn serve_uploads() -> String {
    let router = Router::new().fallback(|request: Request| async move {
        let mut body = request.into_body().into_data_stream();
        while body.next().await.is_some() {}
        StatusCode::CREATED
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

/// Prints how long the stages of a build took.
pub fn print_stages(what: &str, stage_seconds: &BTreeMap<Stage, f64>) {
    println!("{what}, seconds a stage:");
    for (stage, seconds) in stage_seconds {
        println!("  {:<10} {seconds:>7.1}", stage.to_string());
    }
}
