//! The Job that runs one build.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{
            Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
            PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
        },
        core::v1::{
            AppArmorProfile, Capabilities, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, KeyToPath, PodSpec,
            PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretVolumeSource, SecurityContext, Toleration,
            Volume, VolumeMount,
        },
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};

use super::{
    super::references::{FILE_NAME, FILES_DIR, ObjectKind, Reference, Use},
    Identity,
    secret::{DOCUMENT, TOKEN},
};
use crate::contract::{
    BUILD_CONTAINER, BUILD_FILE, CREDENTIALS_DIR, CredentialSlot, FailureClass, USER_NAMESPACE_FLAG, WORK_DIR,
};

/// Directory of [`BUILD_FILE`].
const BUILD_DIR: &str = "/etc/image-builder/build";
/// Directory of the trust bundle, see [`crate::contract::TRUST_BUNDLE_FILE`].
const TRUST_DIR: &str = "/etc/image-builder/trust";
/// Time for the build to clean up after it is told to stop, in seconds.
const GRACE_SECONDS: i64 = 60;
/// The same for a build that has to wait for Packer.
const PACKER_GRACE_SECONDS: i64 = 300;
/// Where a build in upstream's image finds this program.
const PROGRAM_DIR: &str = "/opt/image-builder";
/// The user that copies it there.
const COPY_USER: i64 = 65532;
/// Only the owner, root, reads what comes from Secrets.
const SECRET_MODE: i32 = 0o400;

/// What a build does as root of its pod's user namespace: it mounts and enters the image's root (`SYS_ADMIN`, `SYS_CHROOT`),
/// gives its files owners, modes and capabilities, and lets package managers become other users and end them.
const CAPABILITIES: [&str; 10] =
    ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETFCAP", "SETGID", "SETUID", "SYS_ADMIN", "SYS_CHROOT"];

/// Exit codes that the build process uses, by class.
pub const EXIT_CODES: [FailureClass; 5] = [
    FailureClass::BadInput,
    FailureClass::Environment,
    FailureClass::Transient,
    FailureClass::Cancelled,
    FailureClass::Internal,
];

/// What a Job is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct JobInputs<'a> {
    pub identity: &'a Identity,
    /// Kept on the Job, so that the build can be judged when nothing else is left.
    pub annotations: BTreeMap<String, String>,
    pub image: &'a str,
    /// Image that the build runs in instead, with this program copied into it from `image`.
    pub upstream_image: Option<&'a str>,
    pub service_account: Option<&'a str>,
    pub references: &'a [Reference],
    /// Where the upload token goes, when there is one.
    pub token_slot: Option<&'a CredentialSlot>,
    pub resources: ResourceRequirements,
    /// Whether the pod's root is root of a user namespace only, and not privileged.
    pub user_namespace: bool,
    /// A device that the build needs, as the resource that nodes have of it.
    pub device: Option<&'a str>,
    pub node_selector: BTreeMap<String, String>,
    pub tolerations: Vec<Toleration>,
    pub timeout_seconds: u32,
    pub retries: u32,
}

/// The Job. Kubernetes owns attempts, deadline and lost pods.
pub fn job(inputs: JobInputs<'_>) -> Job {
    let JobInputs {
        identity,
        annotations,
        image,
        upstream_image,
        service_account,
        references,
        token_slot,
        mut resources,
        user_namespace,
        device,
        node_selector,
        tolerations,
        timeout_seconds,
        retries,
    } = inputs;
    if let Some(device) = device {
        // Who set another number in the resource wants that.
        let limits = resources.limits.get_or_insert_default();
        limits.entry(device.to_owned()).or_insert_with(|| Quantity("1".to_owned()));
    }
    let mut mounts = Mounts::default();
    mounts.add(work_volume(), WORK_DIR.to_owned(), false);
    let build_secret = identity.object_name();
    mounts.document(&build_secret);
    if let Some(slot) = token_slot {
        let volume = secret_volume(&format!("slot-{}", slot.0), &build_secret, &[(TOKEN, "token")]);
        mounts.add(volume, format!("{CREDENTIALS_DIR}/{}", slot.0), true);
    }
    mounts.references(references);
    if upstream_image.is_some() {
        mounts.add(empty_volume("program"), PROGRAM_DIR.to_owned(), true);
    }
    let Mounts { volumes, mounts } = mounts;

    let mut args = ["run", "--build", BUILD_FILE].map(str::to_owned).to_vec();
    if user_namespace {
        args.push(USER_NAMESPACE_FLAG.to_owned());
    }
    let container = Container {
        name: BUILD_CONTAINER.to_owned(),
        image: Some(upstream_image.unwrap_or(image).to_owned()),
        command: upstream_image.map(|_| vec![program()]),
        args: Some(args),
        working_dir: Some(WORK_DIR.to_owned()),
        resources: Some(resources),
        volume_mounts: Some(mounts),
        security_context: Some(rights(user_namespace)),
        termination_message_policy: Some("File".to_owned()),
        ..Container::default()
    };
    let pod = PodSpec {
        init_containers: upstream_image.map(|_| vec![copy_program(image)]),
        containers: vec![container],
        host_users: user_namespace.then_some(false),
        volumes: Some(volumes),
        restart_policy: Some("Never".to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        service_account_name: service_account.map(str::to_owned),
        node_selector: (!node_selector.is_empty()).then_some(node_selector),
        tolerations: (!tolerations.is_empty()).then_some(tolerations),
        termination_grace_period_seconds: Some(if upstream_image.is_some() {
            PACKER_GRACE_SECONDS
        } else {
            GRACE_SECONDS
        }),
        ..PodSpec::default()
    };
    let mut metadata = identity.metadata();
    metadata.annotations.get_or_insert_default().extend(annotations);
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(i32::try_from(retries).unwrap_or(i32::MAX)),
            active_deadline_seconds: Some(i64::from(timeout_seconds)),
            pod_failure_policy: Some(PodFailurePolicy { rules: failure_rules() }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(identity.labels()), ..ObjectMeta::default() }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Rights of the build container.
fn rights(user_namespace: bool) -> SecurityContext {
    let root = SecurityContext { run_as_user: Some(0), ..SecurityContext::default() };
    if !user_namespace {
        // Mounting file systems in a chroot, and /dev/kvm, need it.
        return SecurityContext { privileged: Some(true), ..root };
    }
    SecurityContext {
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".to_owned()]),
            add: Some(CAPABILITIES.map(str::to_owned).to_vec()),
        }),
        // The kernel lets a user namespace mount another /proc only where nothing of the pod's own is hidden.
        proc_mount: Some("Unmasked".to_owned()),
        // The runtime's profile for seccomp goes by the capabilities; that for AppArmor forbids all mounts.
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        app_armor_profile: Some(AppArmorProfile { type_: "Unconfined".to_owned(), localhost_profile: None }),
        ..root
    }
}

/// Whether the build of a Job is one by Packer: only such a Job has this program copied into another image.
pub fn runs_packer(job: &Job) -> bool {
    let pod = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    pod.and_then(|pod| pod.init_containers.as_ref()).is_some_and(|containers| !containers.is_empty())
}

/// Volumes and where the container finds them.
#[derive(Default)]
pub(super) struct Mounts {
    pub(super) volumes: Vec<Volume>,
    pub(super) mounts: Vec<VolumeMount>,
}

impl Mounts {
    fn add(&mut self, volume: Volume, path: String, read_only: bool) {
        self.mounts.push(VolumeMount {
            name: volume.name.clone(),
            mount_path: path,
            read_only: read_only.then_some(true),
            ..VolumeMount::default()
        });
        self.volumes.push(volume);
    }

    /// The build document, which is in the build's own Secret.
    pub(super) fn document(&mut self, build_secret: &str) {
        self.add(secret_volume("build", build_secret, &[(DOCUMENT, DOCUMENT)]), BUILD_DIR.to_owned(), true);
    }

    /// What the specification names, where the document says that it is.
    pub(super) fn references(&mut self, references: &[Reference]) {
        for reference in references {
            let (name, path, items): (String, String, Vec<(&str, &str)>) = match &reference.used_as {
                Use::Credentials(slot) => (format!("slot-{}", slot.0), format!("{CREDENTIALS_DIR}/{}", slot.0), vec![]),
                Use::File { index, key } => {
                    (format!("file-{index}"), format!("{FILES_DIR}/{index}"), vec![(key, FILE_NAME)])
                }
                Use::TrustBundle { key } => ("trust".to_owned(), TRUST_DIR.to_owned(), vec![(key, "ca.crt")]),
            };
            let volume = match reference.kind {
                ObjectKind::Secret => secret_volume(&name, &reference.name, &items),
                ObjectKind::ConfigMap => config_map_volume(&name, &reference.name, &items),
            };
            self.add(volume, path, true);
        }
    }
}

/// Read in order. A pod that the cluster takes away is replaced and does not use up an attempt; a build that can not
/// succeed ends its Job. One that was told to stop does use one up: kubelet also tells so a pod that outgrew its own
/// limits, and the next one would as well.
pub(super) fn failure_rules() -> Vec<PodFailurePolicyRule> {
    let hopeless: Vec<i32> = EXIT_CODES
        .into_iter()
        .filter(|class| !class.is_retryable() && *class != FailureClass::Cancelled)
        .map(|class| i32::from(class.exit_code()))
        .collect();
    vec![
        PodFailurePolicyRule {
            action: "Ignore".to_owned(),
            on_exit_codes: None,
            on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                type_: "DisruptionTarget".to_owned(),
                status: "True".to_owned(),
            }]),
        },
        PodFailurePolicyRule {
            action: "FailJob".to_owned(),
            on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                container_name: Some(BUILD_CONTAINER.to_owned()),
                operator: "In".to_owned(),
                values: hopeless,
            }),
            on_pod_conditions: None,
        },
    ]
}

fn work_volume() -> Volume {
    empty_volume("work")
}

fn empty_volume(name: &str) -> Volume {
    Volume { name: name.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }
}

fn program() -> String {
    format!("{PROGRAM_DIR}/image-builder")
}

/// Copies this program from its own image to where the build finds it.
fn copy_program(image: &str) -> Container {
    let requests = [("cpu", "10m"), ("memory", "32Mi")];
    Container {
        name: "copy-program".to_owned(),
        image: Some(image.to_owned()),
        args: Some(vec!["copy-program".to_owned(), program()]),
        resources: Some(ResourceRequirements {
            requests: Some(requests.map(|(key, value)| (key.to_owned(), Quantity(value.to_owned()))).into()),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(vec![VolumeMount {
            name: "program".to_owned(),
            mount_path: PROGRAM_DIR.to_owned(),
            ..VolumeMount::default()
        }]),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            run_as_user: Some(COPY_USER),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

fn items(keys: &[(&str, &str)]) -> Option<Vec<KeyToPath>> {
    let item = |&(key, path): &(&str, &str)| KeyToPath { key: key.to_owned(), path: path.to_owned(), mode: None };
    (!keys.is_empty()).then(|| keys.iter().map(item).collect())
}

fn secret_volume(name: &str, secret: &str, keys: &[(&str, &str)]) -> Volume {
    Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            items: items(keys),
            default_mode: Some(SECRET_MODE),
            optional: Some(false),
        }),
        ..Volume::default()
    }
}

fn config_map_volume(name: &str, config_map: &str, keys: &[(&str, &str)]) -> Volume {
    Volume {
        name: name.to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: config_map.to_owned(),
            items: items(keys),
            optional: Some(false),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    use super::*;

    fn pod(upstream_image: Option<&str>, device: Option<&str>) -> PodSpec {
        pod_with(upstream_image, device, false)
    }

    fn pod_with(upstream_image: Option<&str>, device: Option<&str>, user_namespace: bool) -> PodSpec {
        let identity = Identity {
            namespace: "images".into(),
            name: "ubuntu".into(),
            build_id: "0123456789".into(),
            owner: OwnerReference::default(),
        };
        let job = job(JobInputs {
            identity: &identity,
            annotations: BTreeMap::new(),
            image: "ours",
            upstream_image,
            service_account: None,
            references: &[],
            token_slot: None,
            resources: ResourceRequirements::default(),
            user_namespace,
            device,
            node_selector: BTreeMap::new(),
            tolerations: vec![],
            timeout_seconds: 60,
            retries: 0,
        });
        job.spec.unwrap().template.spec.unwrap()
    }

    #[test]
    fn a_build_in_upstreams_image_gets_this_program_from_ours() {
        let pod = pod(Some("upstreams"), None);
        let [before] = &pod.init_containers.unwrap()[..] else { panic!("not one init container") };
        let [build] = &pod.containers[..] else { panic!("not one container") };
        assert_eq!((before.image.as_deref(), build.image.as_deref()), (Some("ours"), Some("upstreams")));
        let program = "/opt/image-builder/image-builder".to_owned();
        assert_eq!(build.command.as_deref().unwrap(), std::slice::from_ref(&program));
        assert_eq!(before.args.as_ref().unwrap(), &["copy-program".to_owned(), program]);
        let at = |container: &Container| {
            let mounts = container.volume_mounts.clone().unwrap();
            mounts.into_iter().find(|mount| mount.name == "program").map(|mount| (mount.mount_path, mount.read_only))
        };
        assert_eq!(at(before), Some((PROGRAM_DIR.to_owned(), None)));
        assert_eq!(at(build), Some((PROGRAM_DIR.to_owned(), Some(true))));
        // Packer removes what it made when the pod is told to stop.
        assert_eq!(pod.termination_grace_period_seconds, Some(PACKER_GRACE_SECONDS));
    }

    #[test]
    fn a_native_build_runs_in_our_image_alone() {
        let pod = pod(None, None);
        assert_eq!(pod.init_containers, None);
        assert_eq!((pod.containers[0].image.as_deref(), &pod.containers[0].command), (Some("ours"), &None));
    }

    #[test]
    fn a_build_in_a_user_namespace_is_not_privileged_and_makes_sure_of_its_namespace() {
        let rights = |pod: &PodSpec| pod.containers[0].security_context.clone().unwrap();
        let flagged = |pod: &PodSpec| pod.containers[0].args.clone().unwrap().contains(&USER_NAMESPACE_FLAG.to_owned());
        let privileged = pod_with(None, None, false);
        assert_eq!((privileged.host_users, rights(&privileged).privileged), (None, Some(true)));
        assert!(!flagged(&privileged));
        let pod = pod_with(None, None, true);
        let SecurityContext { privileged, run_as_user, capabilities, proc_mount, .. } = rights(&pod);
        assert_eq!((pod.host_users, privileged, run_as_user), (Some(false), None, Some(0)));
        assert!(flagged(&pod));
        assert_eq!(proc_mount.as_deref(), Some("Unmasked"));
        let Capabilities { add, drop } = capabilities.unwrap();
        assert_eq!(drop.unwrap(), ["ALL"]);
        // What reaches beyond the namespace, or only looks as if.
        for beyond in ["SYS_MODULE", "SYS_RAWIO", "SYS_PTRACE", "NET_ADMIN", "NET_RAW", "MKNOD"] {
            assert!(!add.as_ref().unwrap().contains(&beyond.to_owned()), "{beyond}");
        }
    }

    #[test]
    fn a_build_asks_for_the_device_that_it_needs() {
        let limits = |device| pod(None, device).containers[0].resources.clone().unwrap().limits;
        assert_eq!(limits(None), None);
        let asked = limits(Some("example.com/kvm")).unwrap();
        assert_eq!(asked, BTreeMap::from([("example.com/kvm".to_owned(), Quantity("1".to_owned()))]));
    }
}
