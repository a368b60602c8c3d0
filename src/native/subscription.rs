//! Red Hat's subscription while packages are installed. The system is registered before, and given back after, also when
//! the build fails or is cancelled meanwhile.
//!
//! subscription-manager takes credentials as arguments, which every process of the machine may read; it asks for a password
//! at a terminal only, and never for an activation key. Its D-Bus service would take both, and needs a bus. So its program
//! is run by its own Python with arguments that come over standard input: they are arguments inside that process alone.

use std::time::Duration;

use secrecy::ExposeSecret;

use super::{
    chroot::Chroot,
    dnf,
    tree::{Tree, TreeError, within},
};
use crate::{
    contract::{BuildIdentity, Classified, FailureClass, Subscription},
    process::ProcessError,
    secret::{Credentials, SecretError},
};

const PROGRAM: &str = "/usr/sbin/subscription-manager";
/// Becomes the program, with the arguments that it reads.
const LAUNCHER: &str =
    "import json, runpy, sys\nsys.argv = json.load(sys.stdin)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n";
/// Settings of the subscription service, and where they are kept as they were.
const SETTINGS: &str = "/etc/rhsm/rhsm.conf";
const KEPT_SETTINGS: &str = "/run/image-builder/rhsm.conf";
/// The package of a Satellite server that brings its address and its authority.
const CONSUMER: &str = "/run/image-builder/katello-ca-consumer.rpm";
/// Says that the system is registered.
const IDENTITY: &str = "/etc/pki/consumer/cert.pem";
/// What a registered system has of its own. The subscription's other files belong to packages.
pub(super) const OWN: &[&str] = &["/etc/pki/consumer", "/etc/pki/entitlement", "/var/lib/rhsm"];
/// The package sources of the subscription.
pub(super) const REPOSITORIES: &str = "/etc/yum.repos.d/redhat.repo";
/// Longest time to register. Once begun it goes on to its end: a system that the service knows has to be given back, and
/// only the end tells by which identity.
const REGISTER: Duration = Duration::from_secs(180);
/// Longest time to give a system back: a cancelled pod has 60 seconds for everything.
const GIVE_BACK: Duration = Duration::from_secs(20);

/// Why the subscription can not be used.
#[derive(Debug, thiserror::Error)]
pub enum SubscriptionError {
    #[error(
        "the base can not be registered, because it has no {missing}; correct spec.base, or leave spec.subscription out"
    )]
    NoManager { missing: &'static str },
    #[error("the Secret of spec.subscription has neither `activationKey` nor `username`; add one of them")]
    NoCredentials,
    #[error(
        "the subscription service refuses to register the system; correct the Secret of spec.subscription: {output}"
    )]
    Refused { output: String },
    #[error("the subscription service does not answer as it should: {output}")]
    Unavailable { output: String },
    #[error("can not get the package that registers with the Satellite server {server} from it: {output}")]
    Satellite { server: String, output: String },
    #[error("can not {step}")]
    Step { step: &'static str, source: ProcessError },
    #[error("the system stays registered as {name}; remove it in the console of the subscription service")]
    NotGivenBack { name: String, source: ProcessError },
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for SubscriptionError {
    fn class(&self) -> FailureClass {
        match self {
            Self::NoManager { .. } | Self::NoCredentials | Self::Refused { .. } => FailureClass::BadInput,
            Self::Unavailable { .. } | Self::Satellite { .. } | Self::NotGivenBack { .. } => FailureClass::Transient,
            Self::Step { source, .. } => source.class(),
            Self::Secret(error) => error.class(),
            Self::Tree(error) => error.class(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::NoManager { .. } => "NoSubscriptionManager",
            Self::NoCredentials => "SecretKeyMissing",
            Self::Refused { .. } => "SubscriptionRefused",
            Self::Unavailable { .. } | Self::Satellite { .. } => "SubscriptionServiceUnavailable",
            Self::Step { source: ProcessError::Failed { .. }, .. } => "SubscriptionFailed",
            Self::Step { source, .. } => source.reason(),
            Self::NotGivenBack { .. } => "SubscriptionNotGivenBack",
            Self::Secret(error) => error.reason(),
            Self::Tree(error) => error.reason(),
        }
    }
}

/// A system that is, or may be, registered. [`give_back`](Self::give_back) has to follow, however the build goes on.
#[derive(Debug)]
pub(super) struct Registration {
    /// The system's name at the service.
    name: String,
    /// Whether an identity in the tree is this build's.
    begun: bool,
    /// The Satellite server's package.
    consumer: Option<String>,
}

impl Registration {
    /// Nothing is registered yet.
    pub(super) fn new(identity: &BuildIdentity) -> Self {
        let BuildIdentity { namespace, name, build_id } = identity;
        Self { name: format!("image-builder-{namespace}-{name}-{build_id}"), begun: false, consumer: None }
    }

    /// Registers the system.
    pub(super) async fn register(
        &mut self,
        chroot: &Chroot,
        subscription: &Subscription,
        credentials: &Credentials,
        authorities: bool,
    ) -> Result<(), SubscriptionError> {
        let python = within(chroot.root(), interpreter)??;
        let arguments = self.arguments(subscription, credentials)?;
        within(chroot.root(), |tree| {
            // Of the machine that the base was taken from, which stays registered.
            forget(tree)?;
            match tree.read(SETTINGS)? {
                Some(text) => tree.write(KEPT_SETTINGS, text, 0o600),
                None => Ok(()),
            }
        })??;
        self.begun = true;
        if let Some(server) = &subscription.server {
            self.consumer = Some(trust_satellite(chroot, server, authorities).await?);
        }
        if let Some((host, port)) = &subscription.proxy {
            let (host, port) = (format!("--server.proxy_hostname={host}"), format!("--server.proxy_port={port}"));
            let step = "set the proxy of the subscription service";
            let set = chroot.run(PROGRAM, &["config", &host, &port]).await;
            set.map_err(|source| SubscriptionError::Step { step, source })?;
        }
        let input = serde_json::to_vec(&arguments).unwrap_or_default();
        let registered = chroot.run_uncancelled(&python, &["-c", LAUNCHER], Some(input), REGISTER).await;
        registered.map(drop).map_err(classify)
    }

    /// The program and its arguments, the credentials among them.
    fn arguments(
        &self,
        subscription: &Subscription,
        credentials: &Credentials,
    ) -> Result<Vec<String>, SubscriptionError> {
        let slot = &subscription.slot;
        let mut arguments: Vec<String> = [PROGRAM, "register", "--name", &self.name].map(str::to_owned).to_vec();
        let mut add = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
        if let Some(key) = credentials.optional(slot, "activationKey")? {
            add("--activationkey", key.expose_secret());
            add("--org", credentials.require(slot, "orgID")?.expose_secret());
        } else if let Some(user) = credentials.optional(slot, "username")? {
            add("--username", user.expose_secret());
            add("--password", credentials.require(slot, "password")?.expose_secret());
            if let Some(org) = credentials.optional(slot, "orgID")? {
                add("--org", org.expose_secret());
            }
        } else {
            return Err(SubscriptionError::NoCredentials);
        }
        if let Some(release) = &subscription.release_version {
            add("--release", release);
        }
        Ok(arguments)
    }

    /// Gives the system back and removes what the registration has left, also when the build is cancelled. Does nothing
    /// where nothing is registered.
    pub(super) async fn give_back(self, chroot: &Chroot) -> Result<(), SubscriptionError> {
        if !self.begun {
            return Ok(());
        }
        let registered = within(chroot.root(), |tree| tree.exists(IDENTITY))?;
        if registered {
            let name = self.name;
            let given_back = chroot.run_uncancelled(PROGRAM, &["unregister"], None, GIVE_BACK).await;
            given_back.map_err(|source| SubscriptionError::NotGivenBack { name, source })?;
            let step = "remove the data of the subscription";
            let cleaned = chroot.run_uncancelled(PROGRAM, &["clean"], None, GIVE_BACK).await;
            cleaned.map_err(|source| SubscriptionError::Step { step, source })?;
        }
        if let Some(package) = self.consumer {
            let step = "remove the package of the Satellite server";
            let removed = chroot.run_uncancelled("rpm", &["--erase", &package], None, GIVE_BACK).await;
            removed.map_err(|source| SubscriptionError::Step { step, source })?;
        }
        within(chroot.root(), |tree| match tree.read(KEPT_SETTINGS)? {
            Some(text) => tree.write(SETTINGS, text, 0o644),
            None => Ok(()),
        })??;
        Ok(())
    }
}

/// Removes what makes the tree a registered system. The service does not learn of it.
pub(super) fn forget(tree: &Tree) -> Result<(), TreeError> {
    for directory in OWN {
        for file in tree.files_below(directory)? {
            tree.remove(&file)?;
        }
    }
    tree.remove(REPOSITORIES)
}

/// The Python that the program names in its first line.
fn interpreter(tree: &Tree) -> Result<String, SubscriptionError> {
    let text = tree.read(PROGRAM)?.ok_or(SubscriptionError::NoManager { missing: PROGRAM })?;
    let first = text.lines().next().and_then(|line| line.strip_prefix("#!")).unwrap_or_default();
    match first.split_whitespace().next() {
        Some(python) if python.contains("python") => Ok(python.to_owned()),
        Some(_) | None => {
            Err(SubscriptionError::NoManager { missing: "subscription-manager that is a Python program" })
        }
    }
}

/// Installs the package with which a Satellite server makes systems its own, and gives its name.
async fn trust_satellite(chroot: &Chroot, server: &str, authorities: bool) -> Result<String, SubscriptionError> {
    let url = format!("https://{server}/pub/katello-ca-consumer-latest.noarch.rpm");
    dnf::download(chroot, &url, CONSUMER, authorities).await.map_err(|source| match source {
        ProcessError::Failed { output, .. } => SubscriptionError::Satellite { server: server.to_owned(), output },
        source => SubscriptionError::Step { step: "get the package of the Satellite server", source },
    })?;
    let told = |source| SubscriptionError::Step { step: "install the package of the Satellite server", source };
    let query = ["--query", "--nosignature", "--package", "--queryformat", "%{NAME}", CONSUMER];
    let name = chroot.run("rpm", &query).await.map_err(told)?.stdout;
    // Its server was asked over TLS; the package itself is not signed.
    chroot.run("rpm", &["--upgrade", "--replacepkgs", "--nosignature", CONSUMER]).await.map_err(told)?;
    Ok(name.trim().to_owned())
}

/// The program's messages, which it does not translate here, tell who has to act.
fn classify(error: ProcessError) -> SubscriptionError {
    const REFUSED: &[&str] = &[
        "Invalid username or password",
        "Invalid Credentials",
        "Invalid credentials",
        "None of the activation keys",
        "activation keys are not",
        "Organization",
        "organization",
        "Unauthorized",
        "Forbidden",
    ];
    const UNAVAILABLE: &[&str] = &[
        "Unable to reach the server",
        "Unable to verify server",
        "Network error",
        "Connection refused",
        "Connection reset",
        "timed out",
        "Proxy",
        "proxy",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Bad Gateway",
        "Service Unavailable",
        "Remote server error",
        "server error",
    ];
    let ProcessError::Failed { output, .. } = &error else {
        return SubscriptionError::Step { step: "register the system", source: error };
    };
    let has = |texts: &[&str]| texts.iter().any(|text| output.contains(text));
    if has(UNAVAILABLE) {
        SubscriptionError::Unavailable { output: output.clone() }
    } else if has(REFUSED) {
        SubscriptionError::Refused { output: output.clone() }
    } else {
        SubscriptionError::Step { step: "register the system", source: error }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use secrecy::SecretString;

    use super::*;
    use crate::{contract::CredentialSlot, secret::Redactor};

    fn subscription() -> Subscription {
        Subscription {
            slot: CredentialSlot("rhsm".into()),
            server: None,
            release_version: Some("9.4".into()),
            proxy: None,
        }
    }

    fn credentials(values: &[(&str, &str)]) -> Credentials {
        let values = values.iter().map(|(key, value)| {
            (CredentialSlot("rhsm".into()), (*key).to_owned(), SecretString::from((*value).to_owned()))
        });
        Credentials::given(Redactor::default(), values.collect::<Vec<_>>())
    }

    fn registration() -> Registration {
        let identity = BuildIdentity { namespace: "ns".into(), name: "n".into(), build_id: "0123456789".into() };
        Registration::new(&identity)
    }

    #[rstest]
    #[case::user(&[("username", "u"), ("password", "p")], "--username u --password p")]
    #[case::user_of_several(&[("username", "u"), ("password", "p"), ("orgID", "o")], "--username u --password p --org o")]
    #[case::key(&[("activationKey", "k"), ("orgID", "o")], "--activationkey k --org o")]
    fn registers_with_a_user_or_with_a_key(#[case] values: &[(&str, &str)], #[case] expected: &str) {
        let arguments = registration().arguments(&subscription(), &credentials(values)).unwrap().join(" ");
        assert_eq!(
            arguments,
            format!("{PROGRAM} register --name image-builder-ns-n-0123456789 {expected} --release 9.4")
        );
    }

    #[rstest]
    #[case::nothing(&[], "SecretKeyMissing")]
    #[case::half_a_key(&[("activationKey", "k")], "SecretKeyMissing")]
    #[case::half_a_user(&[("username", "u")], "SecretKeyMissing")]
    fn half_of_the_credentials_are_not_enough(#[case] values: &[(&str, &str)], #[case] reason: &str) {
        let error = registration().arguments(&subscription(), &credentials(values)).unwrap_err();
        assert_eq!((error.reason(), error.class()), (reason, FailureClass::BadInput));
    }

    #[rstest]
    #[case("Invalid username or password. To create a login, please visit https://x", "SubscriptionRefused")]
    #[case("None of the activation keys specified exist for this org.", "SubscriptionRefused")]
    #[case(
        "Unable to reach the server at subscription.rhsm.redhat.com:443/subscription",
        "SubscriptionServiceUnavailable"
    )]
    #[case("Traceback (most recent call last)", "SubscriptionFailed")]
    fn its_messages_tell_who_has_to_act(#[case] output: &str, #[case] reason: &str) {
        let failed = ProcessError::Failed {
            program: PROGRAM.into(),
            status: "exit status: 70".into(),
            code: Some(70),
            output: output.into(),
        };
        assert_eq!(classify(failed).reason(), reason);
    }

    #[test]
    fn the_programs_own_python_runs_it() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        assert_eq!(interpreter(&tree).unwrap_err().reason(), "NoSubscriptionManager");
        tree.write(PROGRAM, "#!/usr/libexec/platform-python -sP\nimport sys\n", 0o755).unwrap();
        assert_eq!(interpreter(&tree).unwrap(), "/usr/libexec/platform-python");
        tree.write(PROGRAM, "\u{7f}ELF", 0o755).unwrap();
        assert!(interpreter(&tree).unwrap_err().to_string().contains("Python program"));
    }

    #[test]
    fn a_tree_forgets_whose_system_it_was_and_keeps_what_belongs_to_packages() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::at(dir.path());
        for path in [IDENTITY, "/etc/pki/entitlement/1-key.pem", "/var/lib/rhsm/facts/facts.json", REPOSITORIES] {
            tree.write(path, "x", 0o600).unwrap();
        }
        tree.write("/etc/rhsm/ca/redhat-uep.pem", "x", 0o644).unwrap();
        forget(&tree).unwrap();
        assert!(!tree.exists(IDENTITY) && !tree.exists(REPOSITORIES));
        assert!(tree.path("/var/lib/rhsm/facts").is_dir() && tree.exists("/etc/rhsm/ca/redhat-uep.pem"));
    }
}
