//! Signatures of release documents, as EKS Anywhere's own command line verifies them (`pkg/signature` in
//! `aws/eks-anywhere`): ECDSA on P-256 over the SHA-256 of a canonical form of the document.
//!
//! The canonical form is the document as JSON with sorted keys, without the fields that are changed after signing. The
//! signature of a bundle manifest is one of its annotations; those of the EKS Distro manifests are too, one a channel.
//!
//! What they cover is AWS's choice. The bundle's covers the digests of containerd, crictl and etcdadm and the name of the
//! EKS Distro release, but not that manifest's URL. EKS Distro's covers its manifest's name, channel and number, but not
//! the list of files (`status`).

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde_json::{Map, Value, json};

use super::documents::{Bundles, DistroRelease, Document, value};

/// Annotation of a bundle manifest: its signature in base64.
const BUNDLE_SIGNATURE: &str = "anywhere.eks.amazonaws.com/signature";
/// Annotation of a bundle manifest: lines in base64, each the path of a field that is not signed.
const BUNDLE_EXCLUDES: &str = "anywhere.eks.amazonaws.com/excludes";
/// Beginning of annotations of a bundle manifest; the channel follows. The signature of its EKS Distro manifest.
const DISTRO_SIGNATURE: &str = "distro.eks.amazonaws.com/signature-";
/// Fields that no signature covers, of both kinds of documents.
const NEVER_SIGNED: [&str; 8] = [
    "/status",
    "/metadata/creationTimestamp",
    "/metadata/annotations",
    "/metadata/generation",
    "/metadata/managedFields",
    "/metadata/uid",
    "/metadata/resourceVersion",
    "/metadata/namespace",
];
/// Parts of a bundle that its signature leaves out, so that people can have other images of them.
const UNSIGNED_PARTS: [&str; 21] = [
    "bootstrap",
    "bottlerocketBootstrapContainers",
    "bottlerocketHostContainers",
    "certManager",
    "cilium",
    "cloudStack",
    "clusterAPI",
    "controlPlane",
    "docker",
    "eksa",
    "etcdadmBootstrap",
    "etcdadmController",
    "flux",
    "haproxy",
    "kindnetd",
    "nutanix",
    "packageController",
    "snow",
    "tinkerbell",
    "upgrader",
    "vSphere",
];
/// Fields of a bundle's EKS Distro release that newer signatures leave out.
const UNSIGNED_DISTRO_FIELDS: [&str; 2] = ["components", "manifestUrl"];
/// Parts of a bundle that the signer's types write even where they are empty; outer ones first.
const STRUCTURES: [&str; 12] = [
    "/eksD",
    "/eksD/ami",
    "/eksD/ami/bottlerocket",
    "/eksD/containerd",
    "/eksD/crictl",
    "/eksD/etcdadm",
    "/eksD/imagebuilder",
    "/eksD/kindNode",
    "/eksD/ova",
    "/eksD/ova/bottlerocket",
    "/eksD/raw",
    "/eksD/raw/bottlerocket",
];
/// Where paths in the annotation begin.
const EACH_BUNDLE: &str = ".spec.versionsBundles[].";

/// A DER `SubjectPublicKeyInfo` of P-256 up to its point.
const P256_HEADER: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// The keys of AWS, from `pkg/constants` in `aws/eks-anywhere`.
const BUNDLES_KEY: &str = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEFZU/Z6VVMU9HioT7rGkPdJg3frC2xyQZhWFIrz5HeZEfeQ2nAdnJMLrs2Qr3V9xVrJrHA54wnIHDoPGbEhojqg==";
const DISTRO_KEY: &str = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEfqjUloL1WPdxB5JPOY18mIgjx0zD0SyWe9N1Fxjv7A8JwyKQycqirw2us7zoxoC5bnWD4lT53uv8skx3E/cHaw==";

/// Who may sign what.
#[derive(Clone, Debug)]
pub struct SignatureKeys {
    bundles: Vec<u8>,
    distro: Vec<u8>,
}

impl SignatureKeys {
    /// Keys as DER `SubjectPublicKeyInfo` of P-256 in base64: one for bundle manifests, one for EKS Distro manifests.
    pub fn new(bundles: &str, distro: &str) -> Option<Self> {
        let point = |key| Some(STANDARD.decode(key).ok()?.strip_prefix(&P256_HEADER)?.to_vec());
        Some(Self { bundles: point(bundles)?, distro: point(distro)? })
    }

    /// The keys of AWS.
    pub(super) fn published() -> Self {
        // Without a key nothing would be valid; a test holds that these are keys.
        Self::new(BUNDLES_KEY, DISTRO_KEY).unwrap_or(Self { bundles: vec![], distro: vec![] })
    }
}

/// Why a document does not count as signed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Flaw {
    /// Nobody signed it.
    Missing,
    /// Its signature is not one of this document by this key.
    Invalid(String),
}

/// A document, with what its signature covers.
#[derive(Debug)]
pub(super) struct Signed<D> {
    pub(super) document: D,
    metadata: Map<String, Value>,
    canonical: Result<String, Flaw>,
    /// Whether a flaw of it was told.
    told: AtomicBool,
}

impl<D> Signed<D> {
    /// Whether this is the first time that a flaw of it is told.
    pub(super) fn tell_once(&self) -> bool {
        !self.told.swap(true, Ordering::Relaxed)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.metadata.get("annotations")?.get(name)?.as_str().filter(|text| !text.is_empty())
    }

    fn name(&self) -> &str {
        self.metadata.get("name").and_then(Value::as_str).unwrap_or_default()
    }

    fn verify(&self, signature: Option<&str>, key: &[u8]) -> Result<(), Flaw> {
        let signature = signature.ok_or(Flaw::Missing)?;
        let signature = STANDARD.decode(signature).map_err(|_| invalid("its signature is not base64"))?;
        let canonical = self.canonical.as_ref().map_err(Clone::clone)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
            .verify(canonical.as_bytes(), &signature)
            .map_err(|_| invalid("it was changed after it was signed, or somebody else signed it"))
    }
}

impl Signed<Bundles> {
    /// Whether EKS Anywhere signed this bundle manifest.
    pub(super) fn verify_bundles(&self, keys: &SignatureKeys) -> Result<(), Flaw> {
        self.verify(self.annotation(BUNDLE_SIGNATURE), &keys.bundles)
    }

    /// Whether EKS Distro signed `distro`, which this bundle manifest names `name`.
    pub(super) fn verify_distro(
        &self,
        distro: &Signed<DistroRelease>,
        name: &str,
        keys: &SignatureKeys,
    ) -> Result<(), Flaw> {
        let channel = &distro.document.spec.channel;
        distro.verify(self.annotation(&format!("{DISTRO_SIGNATURE}{channel}")), &keys.distro)?;
        if distro.name() == name {
            Ok(())
        } else {
            Err(invalid(format!("it is {}, and the bundle manifest names {name}", distro.name())))
        }
    }
}

impl<D: Document + Canonical> Document for Signed<D> {
    const EXPECTED: &'static str = D::EXPECTED;

    fn read(bytes: &[u8]) -> Result<Self, String> {
        let document = D::read(bytes)?;
        let mut fields = value(bytes)?;
        let metadata = fields.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
        for pointer in NEVER_SIGNED {
            remove(&mut fields, pointer);
        }
        let canonical = D::reduce(&mut fields, &metadata).map(|()| go_json(&fields));
        Ok(Self { document, metadata, canonical, told: AtomicBool::new(false) })
    }
}

/// Documents that are signed.
pub(super) trait Canonical {
    /// Takes away what is not signed, and writes what the signer's types write though it is not there.
    fn reduce(fields: &mut Value, metadata: &Map<String, Value>) -> Result<(), Flaw>;
}

impl Canonical for DistroRelease {
    fn reduce(fields: &mut Value, _metadata: &Map<String, Value>) -> Result<(), Flaw> {
        for part in ["/metadata", "/spec"] {
            fill(fields, part, json!({}));
            fields.pointer_mut(part).into_iter().for_each(drop_empty);
        }
        Ok(())
    }
}

impl Canonical for Bundles {
    fn reduce(fields: &mut Value, metadata: &Map<String, Value>) -> Result<(), Flaw> {
        let excludes = excludes(metadata)?;
        fill(fields, "/metadata", json!({}));
        fields.pointer_mut("/metadata").into_iter().for_each(drop_empty);
        fill(fields, "/spec/cliMaxVersion", json!(""));
        fill(fields, "/spec/cliMinVersion", json!(""));
        fill(fields, "/spec/number", json!(0));
        let bundles = fields.pointer_mut("/spec/versionsBundles").and_then(Value::as_array_mut);
        for bundle in bundles.into_iter().flatten() {
            for pointer in &excludes {
                remove(bundle, pointer);
            }
            for (field, content) in bundle.as_object_mut().into_iter().flatten() {
                if field != "kubeVersion" {
                    drop_empty(content);
                }
            }
            if let Some(fields) = bundle.as_object_mut() {
                fields.retain(|field, content| field == "kubeVersion" || !is_empty(content));
            }
            for structure in STRUCTURES {
                fill(bundle, structure, json!({}));
            }
        }
        Ok(())
    }
}

/// The fields of each bundle that are not signed, as pointers. The list differs between releases, so the document says
/// it; as nobody signs the list itself, it may name only what no image is made of, and no single bundle.
fn excludes(metadata: &Map<String, Value>) -> Result<Vec<String>, Flaw> {
    let annotation = metadata.get("annotations").and_then(|all| all.get(BUNDLE_EXCLUDES)).and_then(Value::as_str);
    let distro = || UNSIGNED_DISTRO_FIELDS.iter().map(|field| format!("eksD.{field}"));
    let known: Vec<String> = UNSIGNED_PARTS.iter().map(ToString::to_string).chain(distro()).collect();
    let pointer = |path: &str| format!("/{}", path.replace('.', "/"));
    let Some(annotation) = annotation else { return Ok(known.iter().map(|path| pointer(path)).collect()) };
    let text = STANDARD.decode(annotation).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let text = text.ok_or_else(|| invalid("its list of fields that are not signed is not text in base64"))?;
    let lines = text.lines().filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let path = line.strip_prefix(EACH_BUNDLE).filter(|path| known.iter().any(|known| known == path));
            let refused = || invalid(format!("its list of fields that are not signed has `{line}`, which is used"));
            path.map(pointer).ok_or_else(refused)
        })
        .collect()
}

fn invalid(problem: impl Into<String>) -> Flaw {
    Flaw::Invalid(problem.into())
}

/// Writes `zero` at a pointer where nothing is.
fn fill(value: &mut Value, pointer: &str, zero: Value) {
    if let Some((parent, field)) = pointer.rsplit_once('/')
        && let Some(fields) = value.pointer_mut(parent).and_then(Value::as_object_mut)
        && fields.get(field).is_none_or(Value::is_null)
    {
        fields.insert(field.to_owned(), zero);
    }
}

fn remove(value: &mut Value, pointer: &str) {
    if let Some((parent, field)) = pointer.rsplit_once('/')
        && let Some(fields) = value.pointer_mut(parent).and_then(Value::as_object_mut)
    {
        fields.remove(field);
    }
}

/// Takes away texts and lists without content, which the signer's types leave out, at any depth.
fn drop_empty(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.values_mut().for_each(drop_empty);
        fields.retain(|_, content| !is_empty(content));
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => false,
    }
}

/// JSON as Go writes it: sorted keys, no spaces, and characters of HTML escaped.
fn go_json(value: &Value) -> String {
    let mut text = String::new();
    for character in value.to_string().chars() {
        match character {
            // They stand in texts only.
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = fmt::Write::write_fmt(&mut text, format_args!("\\u{:04x}", u32::from(character)));
            }
            other => text.push(other),
        }
    }
    text
}

/// What is used of a document is what its signature covers, where both are texts.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let covered = |canonical: &Result<String, Flaw>| {
        let text = canonical.as_deref().unwrap_or("{}");
        let Ok(fields) = serde_json::from_str::<Value>(text) else { panic!("the canonical form is no JSON: {text}") };
        fields
    };
    let same = |fields: &Value, pointer: &str, used: Option<&str>| {
        if let Some(Value::String(signed)) = fields.pointer(pointer) {
            assert_eq!(Some(signed.as_str()), used, "{pointer} is not what is signed");
        }
    };
    if let Ok(signed) = Signed::<Bundles>::read(bytes) {
        let fields = covered(&signed.canonical);
        for (number, bundle) in signed.document.spec.versions_bundles.iter().enumerate() {
            let distro = &bundle.eks_d;
            let at = |field: &str| format!("/spec/versionsBundles/{number}/{field}");
            same(&fields, &at("kubeVersion"), Some(&bundle.kube_version));
            same(&fields, &at("eksD/name"), Some(&distro.name));
            for (tool, archive) in
                [("etcdadm", &distro.etcdadm), ("crictl", &distro.crictl), ("containerd", &distro.containerd)]
            {
                let digest = archive.as_ref().and_then(|archive| archive.sha256.as_deref());
                same(&fields, &at(&format!("eksD/{tool}/sha256")), digest);
            }
        }
        let _ = signed.verify_bundles(&SignatureKeys::published());
    }
    if let Ok(signed) = Signed::<DistroRelease>::read(bytes) {
        let fields = covered(&signed.canonical);
        same(&fields, "/metadata/name", Some(signed.name()));
        same(&fields, "/spec/channel", Some(&signed.document.spec.channel));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ring::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair},
    };
    use rstest::rstest;

    use super::{
        super::{ReleaseQuery, Resolver},
        *,
    };
    use crate::contract::{Classified, Signatures};

    const BUNDLES: &str = include_str!("../../tests/it/documents/bundles.yaml");
    const DISTRO: &str = include_str!("../../tests/it/documents/kubernetes-1-31-eks-47.yaml");
    const NAME: &str = "kubernetes-1-31-eks-47";

    /// Somebody who signs.
    struct Signer(EcdsaKeyPair);

    impl Signer {
        fn new() -> Self {
            let random = SystemRandom::new();
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
            Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap())
        }

        fn key(&self) -> String {
            STANDARD.encode([&P256_HEADER, self.0.public_key().as_ref()].concat())
        }

        fn sign<D>(&self, document: &Signed<D>) -> String {
            let canonical = document.canonical.as_ref().unwrap();
            STANDARD.encode(self.0.sign(&SystemRandom::new(), canonical.as_bytes()).unwrap())
        }
    }

    fn bundles(text: &str) -> Signed<Bundles> {
        Signed::read(text.as_bytes()).unwrap()
    }

    fn distro(text: &str) -> Signed<DistroRelease> {
        Signed::read(text.as_bytes()).unwrap()
    }

    /// The bundle manifest with both signatures in it, and the keys they are made with.
    fn signed() -> (String, SignatureKeys) {
        let (anywhere, releases) = (Signer::new(), Signer::new());
        let line = "anywhere.eks.amazonaws.com/signature: MEUCIQDnotarealsignature";
        assert!(BUNDLES.contains(line));
        let signatures = format!(
            "{BUNDLE_SIGNATURE}: {}\n    {DISTRO_SIGNATURE}1-31: {}",
            anywhere.sign(&bundles(BUNDLES)),
            releases.sign(&distro(DISTRO))
        );
        let keys = SignatureKeys::new(&anywhere.key(), &releases.key()).unwrap();
        (BUNDLES.replace(line, &signatures), keys)
    }

    /// Signed by AWS for the tests of `aws/eks-anywhere` (`pkg/validations`, `pkg/signature`).
    #[test]
    fn what_aws_signed_is_valid_by_the_published_keys() {
        let keys = SignatureKeys::published();
        let bundle = |signature: &str, eks_d: &str| {
            bundles(&format!(
                "apiVersion: anywhere.eks.amazonaws.com/v1alpha1\nkind: Bundles\nmetadata:\n  annotations:\n    \
                 {BUNDLE_SIGNATURE}: {signature}\n  name: bundles-1\nspec:\n  number: 1\n  versionsBundles:\n  - \
                 kubeVersion: \"1.31\"\n    endOfStandardSupport: \"2026-12-31\"\n    eksD:\n      name: {eks_d}\n      \
                 channel: \"1-31\"\n      manifestUrl: https://a.test/anything.yaml\n"
            ))
        };
        let signature =
            "MEQCICjq1rZmhH0FYOlruZmh6QADCrr5ccrN6hE7Lu0vaXGrAiBhV+kfh64sqLblBt98DvIfHMerEqJVhHzpGy1YJthZQw==";
        assert_eq!(bundle(signature, "test").verify_bundles(&keys), Ok(()));
        assert!(matches!(bundle(signature, "other").verify_bundles(&keys), Err(Flaw::Invalid(_))));

        let release = distro(
            "apiVersion: distro.eks.amazonaws.com/v1alpha1\nkind: Release\nmetadata:\n  name: kubernetes-1-28-46\n  \
             namespace: eksa-system\nspec:\n  channel: 1-28\n  number: 46\nstatus:\n  components: []\n",
        );
        let signature =
            "MEUCIQC3uP3Dhfb/nhCeir0Hwtf4bddKVfVIauFWBidT18XZOwIgHjzH1mOxBm1N2l2w9wBVy9W1o6CQXpdDz7UcbCszZYc=";
        assert_eq!(release.verify(Some(signature), &keys.distro), Ok(()));
        assert!(release.verify(Some(signature), &keys.bundles).is_err());
    }

    #[test]
    fn signed_documents_are_valid_by_the_keys_that_signed_them_alone() {
        let (text, keys) = signed();
        let (bundles, distro) = (bundles(&text), distro(DISTRO));
        assert_eq!(bundles.verify_bundles(&keys), Ok(()));
        assert_eq!(bundles.verify_distro(&distro, NAME, &keys), Ok(()));
        let others = SignatureKeys::published();
        assert!(matches!(bundles.verify_bundles(&others), Err(Flaw::Invalid(_))));
        assert!(matches!(bundles.verify_distro(&distro, NAME, &others), Err(Flaw::Invalid(_))));
    }

    #[rstest]
    #[case::digest_of_containerd("98c8e350d5ca91be42df585dc920a5a0839cf96e5eddaefeb20f2262dbec795c", "00", false)]
    #[case::url_of_etcdadm("artifacts/etcdadm/v0.1.5/etcdadm", "artifacts/etcdadm/v0.1.4/etcdadm", false)]
    #[case::release("name: kubernetes-1-31-eks-47", "name: kubernetes-1-31-eks-46", false)]
    #[case::number("number: 112", "number: 111", false)]
    #[case::signature("signature: ME", "signature: AA", false)]
    #[case::no_base64("signature: M", "signature: x*M", false)]
    #[case::what_people_may_change("kubeadm-bootstrap-controller:v1.10.2", "mine:v1", true)]
    #[case::time("1970-01-01T00:00:00Z", "2026-01-01T00:00:00Z", true)]
    #[case::url_of_the_release_manifest("https://distro.eks.amazonaws.com/kubernetes-1-31", "https://a.test", true)]
    fn a_changed_bundle_manifest_is_noticed(#[case] from: &str, #[case] to: &str, #[case] valid: bool) {
        let (text, keys) = signed();
        let changed = text.replace(from, to);
        assert_ne!(changed, text);
        let flaw = bundles(&changed).verify_bundles(&keys);
        assert_eq!(flaw.is_ok(), valid, "{flaw:?}");
    }

    #[test]
    fn documents_without_a_signature_are_told_from_changed_ones() {
        let (text, keys) = signed();
        let unsigned = text.replace(BUNDLE_SIGNATURE, "example.com/other").replace(DISTRO_SIGNATURE, "example.com/x-");
        assert_eq!(bundles(&unsigned).verify_bundles(&keys), Err(Flaw::Missing));
        assert_eq!(bundles(&unsigned).verify_distro(&distro(DISTRO), NAME, &keys), Err(Flaw::Missing));
        // Another release, signed as well, is not the one that is named.
        let flaw = bundles(&text).verify_distro(&distro(DISTRO), "kubernetes-1-31-eks-46", &keys);
        assert!(matches!(&flaw, Err(Flaw::Invalid(problem)) if problem.contains("eks-46")), "{flaw:?}");
        let changed = DISTRO.replace("number: 47", "number: 48");
        assert!(bundles(&text).verify_distro(&distro(&changed), NAME, &keys).is_err());
    }

    #[rstest]
    #[case::older(&[".spec.versionsBundles[].vSphere", ".spec.versionsBundles[].bootstrap"], true)]
    #[case::newer(&[".spec.versionsBundles[].eksD.manifestUrl", ".spec.versionsBundles[].vSphere"], true)]
    #[case::what_is_used(&[".spec.versionsBundles[].eksD.containerd"], false)]
    #[case::one_bundle(&[".spec.versionsBundles[0]"], false)]
    #[case::everything(&[".spec"], false)]
    fn a_document_may_not_say_that_what_is_used_is_not_signed(#[case] excludes: &[&str], #[case] taken: bool) {
        let signer = Signer::new();
        let list = format!("{BUNDLE_EXCLUDES}: {}", STANDARD.encode(excludes.join("\n")));
        let text = BUNDLES.replace("anywhere.eks.amazonaws.com/signature: MEUCIQDnotarealsignature", &list);
        let document = bundles(&text);
        assert_eq!(document.canonical.is_ok(), taken, "{:?}", document.canonical);
        if taken {
            let signature = signer.sign(&document);
            let keys = SignatureKeys::new(&signer.key(), DISTRO_KEY).unwrap();
            let text = text.replace(&list, &format!("{list}\n    {BUNDLE_SIGNATURE}: {signature}"));
            assert_eq!(bundles(&text).verify_bundles(&keys), Ok(()));
        }
    }

    /// A directory that is a mirror, and what is asked of it.
    fn mirror(bundles: &str) -> (tempfile::TempDir, ReleaseQuery) {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/releases/eks-a/manifest.yaml", include_str!("../../tests/it/documents/eks-a-release.yaml"));
        write("a/releases/bundles/112/manifest.yaml", bundles);
        write("d/kubernetes-1-31/kubernetes-1-31-eks-47.yaml", DISTRO);
        for image in ["coredns", "etcd", "kube-proxy", "pause"] {
            let file = format!("kubernetes/v1.31.14/bin/linux/amd64/{image}.tar.sha256");
            write(&format!("d/kubernetes-1-31/releases/47/artifacts/{file}"), &"ab".repeat(32));
        }
        let at = |part: &str| format!("file://{}/{part}", dir.path().display());
        let rewrite = vec![
            ("https://anywhere-assets.eks.amazonaws.com".to_owned(), at("a")),
            ("https://distro.eks.amazonaws.com".to_owned(), at("d")),
        ];
        let query = ReleaseQuery { rewrite, signatures: Signatures::Require, ..ReleaseQuery::new("1-31") };
        (dir, query)
    }

    #[tokio::test]
    async fn a_release_whose_documents_are_all_signed_is_built_of_and_a_changed_one_is_not() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (text, keys) = signed();
        let client = crate::http::client(&crate::contract::Proxy::default(), None).unwrap();
        let resolver = || Resolver::new(client.clone()).allow_local_files().with_signature_keys(keys.clone());
        let (_dir, query) = mirror(&text);
        let release = resolver().resolve(&query).await.unwrap();
        assert_eq!(release.eksd_name, NAME);

        for (from, to, reason) in [
            ("artifacts/etcdadm/v0.1.5/etcdadm", "artifacts/etcdadm/v0.1.4/etcdadm", "SignatureInvalid"),
            (DISTRO_SIGNATURE, "example.com/x-", "SignatureMissing"),
        ] {
            let (_dir, query) = mirror(&text.replace(from, to));
            let error = resolver().resolve(&query).await.unwrap_err();
            assert_eq!(error.reason(), reason, "{error}");
            // Without a demand for signatures the same is only told.
            resolver().resolve(&ReleaseQuery { signatures: Signatures::Warn, ..query }).await.unwrap();
        }
    }

    #[test]
    fn characters_of_html_are_escaped_as_go_does() {
        assert_eq!(
            go_json(&json!({ "b": "<a> & \"ü\"\u{2028}", "a": 1 })),
            r#"{"a":1,"b":"\u003ca\u003e \u0026 \"ü\"\u2028"}"#
        );
    }
}
