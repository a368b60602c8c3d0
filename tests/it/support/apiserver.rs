//! A real etcd and kube-apiserver: started by the first test that asks, shared by all of the process, one namespace a
//! test. There are no controllers and no kubelet: Jobs stay as they are, and a test that needs a pod writes its status
//! itself.
//!
//! A small shell keeps both programs. It waits at a pipe that this process holds open, so however the tests end, it
//! kills them and removes their directory. etcd listens on Unix sockets; the API server's port is reserved by a socket
//! that this process keeps bound and that the server shares. A test that takes the API server down has one of its own.

use std::{
    env, fmt, fs,
    io::{self, Read, Seek, SeekFrom},
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        authentication::v1::{TokenRequest, TokenRequestSpec},
        core::v1::{Namespace, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    config::{AuthInfo, KubeConfigOptions, Kubeconfig},
};
use kube_runtime::wait::{await_condition, conditions::is_crd_established};
use node_image_builder::api::v1alpha1::{self, NodeImageBuild};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::{net::TcpSocket, sync::OnceCell, time::timeout};

use super::chart;

/// Release and namespace of the operator that tests run: its service account has the rights that the chart gives.
pub const RELEASE: &str = "node-image-builder";
/// The directory with `etcd` and `kube-apiserver`, named as in other projects that test against them.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// Longest time until the API server is ready; two seconds are usual.
const START: Duration = Duration::from_secs(120);

const KEEPER: &str = r#"
exec 3<&0 </dev/null
cd "$DIR"
exec 2>keeper.log
"$ASSETS/etcd" --data-dir data --unsafe-no-fsync --logger zap \
	--listen-client-urls unix://client.sock:0 --advertise-client-urls unix://client.sock:0 \
	--listen-peer-urls unix://peer.sock:0 --initial-advertise-peer-urls unix://peer.sock:0 \
	--initial-cluster default=unix://peer.sock:0 >etcd.log 2>&1 3<&- &
etcd=$!
serve() {
	"$ASSETS/kube-apiserver" --etcd-servers unix://client.sock:0 --bind-address 127.0.0.1 --secure-port "$PORT" \
		--permit-port-sharing --tls-cert-file tls.crt --tls-private-key-file tls.key --token-auth-file tokens.csv \
		--service-account-issuer https://kubernetes.default.svc --service-account-signing-key-file account.key \
		--service-account-key-file account.pub --service-cluster-ip-range 10.0.0.0/24 --endpoint-reconciler-type none \
		--authorization-mode RBAC --allow-privileged --disable-admission-plugins ServiceAccount \
		--enable-admission-plugins OwnerReferencesPermissionEnforcement \
		--audit-policy-file audit-policy.json --audit-log-path audit.log --audit-log-maxsize 0 \
		--profiling=false >>kube-apiserver.log 2>&1 3<&- &
	apiserver=$!
	echo "$apiserver" >apiserver.pid
}
serve
(read -r _ <&3) &
tests=$!
while wait -n $etcd $apiserver $tests; [ -e down ] && kill -0 $etcd $tests 2>/dev/null; do
	# A test took the API server down: it says when it is to come back.
	touch is-down
	while [ -e down ] && kill -0 $tests 2>/dev/null; do sleep 0.05; done
	rm is-down
	serve
done
kill -KILL $etcd $apiserver
touch stopped
wait $tests
cd / && rm -rf "$DIR"
"#;

/// The running server.
pub struct ApiServer {
    dir: PathBuf,
    /// Keeps the port from everybody else. Bound, never listening: no connection ends here.
    _port: TcpSocket,
    /// Its standard input is the pipe that ends with this process.
    _keeper: Child,
    /// When it served already, but not all that it knows was there again, e.g. the rights.
    returns: Mutex<Vec<RangeInclusive<Timestamp>>>,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("dir", &self.dir).finish_non_exhaustive()
    }
}

static SERVER: OnceCell<ApiServer> = OnceCell::const_new();

/// The shared server with the definition of `NodeImageBuild` installed.
async fn server() -> &'static ApiServer {
    SERVER.get_or_init(|| async { own().await }).await
}

/// A server of one test's own, for what would disturb the others.
pub async fn own() -> ApiServer {
    let server = ApiServer::start().await;
    let client = server.client().await;
    install_definition(&client).await;
    let objects = chart::render(RELEASE, RELEASE, &chart::chart().join("ci/minimal.yaml"), &[]).unwrap();
    create_namespace(&client, RELEASE).await;
    install_rights(&client, &objects).await;
    server
}

/// The shared server.
pub async fn shared() -> &'static ApiServer {
    server().await
}

/// A server of one test's own, with nothing of ours.
pub async fn bare() -> ApiServer {
    ApiServer::start().await
}

/// An administrator's client, for the runtime of the calling test.
pub async fn client() -> Client {
    server().await.client().await
}

/// A file that gives a program an administrator's access.
pub async fn kubeconfig() -> PathBuf {
    server().await.kubeconfig()
}

/// A new namespace for one test, e.g. `refused-7`.
pub async fn namespace(client: &Client, prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    create_namespace(client, &name).await;
    name
}

/// Makes sure of a namespace that several tests may speak of, e.g. an example and the chart.
pub async fn create_namespace(client: &Client, name: &str) {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    let api: Api<Namespace> = Api::all(client.clone());
    api.patch(name, &PatchParams::apply("tests"), &Patch::Apply(&namespace)).await.unwrap();
}

/// Creates the service accounts and rights among the chart's objects, and nothing else of them.
pub async fn install_rights(client: &Client, objects: &[Value]) {
    for object in objects {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        match object["kind"].as_str().unwrap() {
            "ServiceAccount" => create::<ServiceAccount>(Api::namespaced(client.clone(), namespace), object).await,
            "Role" => create::<Role>(Api::namespaced(client.clone(), namespace), object).await,
            "RoleBinding" => create::<RoleBinding>(Api::namespaced(client.clone(), namespace), object).await,
            "ClusterRole" => create::<ClusterRole>(Api::all(client.clone()), object).await,
            "ClusterRoleBinding" => create::<ClusterRoleBinding>(Api::all(client.clone()), object).await,
            _ => {}
        }
    }
}

async fn create<K>(api: Api<K>, object: &Value)
where
    K: DeserializeOwned + Serialize + Clone + fmt::Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object.clone()).unwrap()).await.unwrap();
}

impl ApiServer {
    async fn start() -> Self {
        let Some(assets) = env::var_os(ASSETS).map(PathBuf::from) else {
            panic!(
                "{ASSETS} is not set: run `make unit`, which builds what the tests need and names its directory, or set \
                 it to a directory that holds etcd, kube-apiserver and kubectl"
            )
        };
        for program in ["etcd", "kube-apiserver", "kubectl"] {
            assert!(assets.join(program).is_file(), "there is no {program} in {}: run `make unit`", assets.display());
        }
        let _ = rustls::crypto::ring::default_provider().install_default();

        let port = TcpSocket::new_v4().unwrap();
        port.set_reuseport(true).unwrap();
        port.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let number = port.local_addr().unwrap().port();
        let dir = tempfile::Builder::new().prefix("node-image-builder-apiserver-").tempdir().unwrap().keep();
        write_credentials(&dir, number);

        let keeper = Command::new("bash")
            .args(["-c", KEEPER])
            .env("DIR", &dir)
            .env("ASSETS", &assets)
            .env("PORT", number.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A terminal's Ctrl-C is for the tests; the keeper then sees them end.
            .process_group(0)
            .spawn()
            .unwrap();
        let server = Self { dir, _port: port, _keeper: keeper, returns: Mutex::default() };
        timeout(START, server.wait_until_ready())
            .await
            .unwrap_or_else(|_| panic!("the API server is not ready after {START:?}\n{}", server.logs()));
        server
    }

    /// Kills the API server, as a node failure does; etcd keeps what it has.
    pub async fn take_down(&self) {
        fs::write(self.dir.join("down"), "").unwrap();
        let pid: i32 = fs::read_to_string(self.dir.join("apiserver.pid")).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        let mut again = tokio::time::interval(Duration::from_millis(10));
        while !self.dir.join("is-down").exists() {
            again.tick().await;
        }
    }

    /// Starts it again on its address, and waits until it serves.
    pub async fn bring_back(&self) {
        let begin = Timestamp::now();
        fs::remove_file(self.dir.join("down")).unwrap();
        timeout(START, self.wait_until_ready())
            .await
            .unwrap_or_else(|_| panic!("the API server does not come back within {START:?}\n{}", self.logs()));
        self.returns.lock().unwrap().push(begin..=Timestamp::now());
    }

    async fn wait_until_ready(&self) {
        let client = self.client().await;
        let mut again = tokio::time::interval(Duration::from_millis(50));
        loop {
            again.tick().await;
            assert!(!self.dir.join("stopped").exists(), "etcd or kube-apiserver ended\n{}", self.logs());
            let request = axum::http::Request::get("/readyz").body(vec![]).unwrap();
            if client.request_text(request).await.is_ok() {
                return;
            }
        }
    }

    pub async fn client(&self) -> Client {
        Client::try_from(self.config().await).unwrap()
    }

    /// An administrator's access.
    pub async fn config(&self) -> Config {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        // A test sees an error as it is.
        config.default_retry = false;
        config
    }

    /// The access of a service account: exactly what the API server lets its pods do.
    pub async fn config_of(&self, namespace: &str, account: &str) -> Config {
        let request = TokenRequest {
            spec: TokenRequestSpec { expiration_seconds: Some(7200), ..TokenRequestSpec::default() },
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await, namespace);
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
        let mut config = self.config().await;
        config.auth_info = AuthInfo { token: Some(answer.status.unwrap().token.into()), ..AuthInfo::default() };
        config
    }

    /// Where the API server writes what service accounts asked of it; not there before the first asked.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.join("audit.log")
    }

    /// Length of the audit log, in bytes.
    pub fn audited(&self) -> u64 {
        fs::metadata(self.audit_log()).map_or(0, |file| file.len())
    }

    /// What service accounts asked of the API server since the audit log had this length, but for what it answered before
    /// it was ready: it refuses by rights that it has not read yet.
    pub fn audit(&self, since: u64) -> Vec<Value> {
        let mut file = match fs::File::open(self.audit_log()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return vec![],
            file => file.unwrap(),
        };
        file.seek(SeekFrom::Start(since)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        // The first and the last line may be half of one.
        let returns = self.returns.lock().unwrap();
        let ready = |entry: &Value| {
            let received: Timestamp = entry["requestReceivedTimestamp"].as_str().unwrap().parse().unwrap();
            !returns.iter().any(|returning| returning.contains(&received))
        };
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(ready).collect()
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    fn logs(&self) -> String {
        let tail = |name| {
            let text = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().rev().take(20).collect();
            lines.into_iter().rev().fold(format!("last lines of {name}:\n"), |text, line| text + line + "\n")
        };
        tail("keeper.log") + &tail("etcd.log") + &tail("kube-apiserver.log")
    }
}

/// Certificate, keys, token and kubeconfig of one server.
fn write_credentials(dir: &Path, port: u16) {
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();

    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let authority_certificate = authority.self_signed(&authority_key).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST))];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
    write("tls.crt", &certificate.pem());
    write("tls.key", &key.serialize_pem());
    write("ca.crt", &authority_certificate.pem());

    let account = KeyPair::generate().unwrap();
    write("account.key", &account.serialize_pem());
    write("account.pub", &account.public_key_pem());

    let mut random = [0; 16];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
    let token = hex::encode(random);
    write("tokens.csv", &format!("{token},admin,admin,system:masters\n"));
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "test",
            "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "certificate-authority": dir.join("ca.crt"),
            },
        }],
        "users": [{ "name": "admin", "user": { "token": token } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "admin" } }],
        "current-context": "test",
    });
    write("kubeconfig", &kubeconfig.to_string());
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{ "level": "Metadata", "userGroups": ["system:serviceaccounts"] }, { "level": "None" }],
    });
    write("audit-policy.json", &policy.to_string());
}

async fn install_definition(client: &Client) {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = v1alpha1::definition();
    definitions.create(&PostParams::default(), &definition).await.unwrap();
    let name = definition.metadata.name.unwrap();
    timeout(START, await_condition(definitions, &name, is_crd_established()))
        .await
        .expect("the definition is not established")
        .unwrap();
    // Established is said before the last handler is in place.
    let builds: Api<NodeImageBuild> = Api::all(client.clone());
    let mut again = tokio::time::interval(Duration::from_millis(20));
    timeout(START, async {
        while builds.list(&ListParams::default().limit(1)).await.is_err() {
            again.tick().await;
        }
    })
    .await
    .expect("the definition is not served");
}
