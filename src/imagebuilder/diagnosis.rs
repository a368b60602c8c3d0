//! Why Packer failed, from what it said. Pure.

use super::packer::Said;
use crate::contract::{FailureClass, shorten};

/// Longest text of an error that is shown, in bytes.
pub(super) const SHOWN: usize = 1200;

/// A kind of failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Diagnosis {
    pub class: FailureClass,
    pub reason: &'static str,
    /// What happened and what to do.
    pub advice: &'static str,
}

/// Texts of Packer, its builders and Ansible, in lower case, and what they mean. The first one that fits counts: what is
/// more certain stands higher.
const TABLE: &[(&[&str], Diagnosis)] = &[
    (
        &["no space left on device", "not enough space on the disk"],
        Diagnosis {
            class: FailureClass::Environment,
            reason: "DiskFull",
            advice: "there is no space left; give the build more disk (spec.build.resources), or the image (spec.diskSize)",
        },
    ),
    (
        &["invalid username or password", "invalid credentials", "incorrect user name or password", "invalid login"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "LoginRefused",
            advice: "user name or password is refused; correct the Secret that spec.subscription names, or spec.vsphere",
        },
    ),
    (
        &["error finding vm to clone"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "TemplateNotFound",
            advice: "vCenter has no such template in the datacenter; write its name or its path below the folder for virtual \
                     machines as spec.vsphere.template",
        },
    ),
    (
        &["but template has no snapshots"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "TemplateUnsuitable",
            advice: "a linked clone starts from a snapshot; make one of the template, or leave spec.vsphere.linkedClone out",
        },
    ),
    (
        &["goss validation failed", "goss test", "goss failed", "failed goss"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "GossFailed",
            advice: "upstream's own checks (goss) do not pass in the machine; look at its report in the log",
        },
    ),
    (
        &[
            "timeout waiting for ip",
            "waiting for ip address",
            "no ip address",
            "error getting vm ip",
            "get guest ip",
            "not able to get ip address",
        ],
        Diagnosis {
            class: FailureClass::Transient,
            reason: "NoAddress",
            advice: "the machine got no IP address; does the network have DHCP, and did the installer start?",
        },
    ),
    (
        &[
            "timeout waiting for ssh",
            "handshake failed",
            "banner exchange",
            "ssh: unable to authenticate",
            "waiting for ssh",
            "failed to connect to the host via ssh",
            "waiting for privilege escalation prompt",
        ],
        Diagnosis {
            class: FailureClass::Transient,
            reason: "SshTimedOut",
            advice: "the machine did not answer by SSH in time; raise spec.imageBuilder.sshTimeoutSeconds where it is only slow, \
                     else look whether its installer got as far as that, or whether sshPassword is that of spec.vsphere.template",
        },
    ),
    (
        &["checksums did not match", "checksum did not match", "checksum mismatch", "the checksum for"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "ChecksumMismatch",
            advice: "a file is not the one that its digest describes; put the right file there, or correct the digest",
        },
    ),
    (
        &[
            "connection timed out",
            "connection refused",
            "temporary failure",
            "timed out",
            "connection reset",
            "no route to host",
            "bad response code: 5",
            "http error 5",
            "could not resolve",
            "urlopen error",
            "unable to connect",
            "i/o timeout",
            "no such host",
            "failed to fetch",
            "failed to update apt cache",
        ],
        Diagnosis {
            class: FailureClass::Transient,
            reason: "NetworkFailed",
            advice: "a server did not answer the machine that is built in; can it reach the server, by spec.proxy where it needs one?",
        },
    ),
    (
        &["http error 40", "bad response code: 40", "404 not found", "404: not found", "status code was -1"],
        Diagnosis {
            class: FailureClass::BadInput,
            reason: "NotFound",
            advice: "a file is not where the build looks for it; correct the URL, or the mirror",
        },
    ),
    (
        &["could not find a supported cpu accelerator", "could not access kvm", "failed to initialize kvm"],
        Diagnosis {
            class: FailureClass::Environment,
            reason: "KvmUnavailable",
            advice: "KVM runs no machine on this node; use a node with KVM (spec.build.nodeSelector)",
        },
    ),
    (
        &[
            "failed to parse template",
            "required variable not set",
            "failed to initialize build",
            "unknown configuration key",
            "unknown builder",
            "no plugin",
            "failed to load plugin",
            "unknown plugin",
            "error(s) decoding",
            "could not find playbook",
            "ansible-playbook: error:",
            "the role '",
        ],
        Diagnosis {
            class: FailureClass::Environment,
            reason: "RecipeUnusable",
            advice: "upstream's recipe in the image of the build pod does not work with this build; use the version of the image \
                     that docs/engines.md names (operator.imageBuilderImage of the chart)",
        },
    ),
];

/// Ansible ended a task with an error that is none of those.
const ANSIBLE: Diagnosis = Diagnosis {
    class: FailureClass::BadInput,
    reason: "AnsibleFailed",
    advice: "an Ansible task failed; correct the role, package or repository that it is about",
};
/// Nothing that is known.
const UNKNOWN: Diagnosis = Diagnosis {
    class: FailureClass::Internal,
    reason: "PackerFailed",
    advice: "Packer ended with an error; the log of the pod has all that it said",
};

/// Judges what was said. The text of a failing Ansible task is looked at first: it is the cause of everything after it.
pub fn diagnose(said: &Said) -> (Diagnosis, String) {
    let of_task = said.fatal.as_deref().map(|fatal| (known(fatal).unwrap_or(ANSIBLE), fatal));
    let errors = said.errors.join("; ");
    let (diagnosis, text) = if let Some((diagnosis, fatal)) = of_task {
        let task = said.task.as_deref().unwrap_or("a task");
        (diagnosis, format!("in the task `{task}`: {fatal}"))
    } else {
        let diagnosis = known(&errors).or_else(|| known(&said.last.join("\n"))).unwrap_or(UNKNOWN);
        (diagnosis, if errors.is_empty() { said.last.join("; ") } else { errors })
    };
    (diagnosis, shorten(&text, SHOWN))
}

fn known(text: &str) -> Option<Diagnosis> {
    let text = text.to_lowercase();
    TABLE.iter().find(|(marks, _)| marks.iter().any(|mark| text.contains(mark))).map(|(_, diagnosis)| *diagnosis)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};
    use rstest::rstest;

    use super::*;

    proptest! {
        #[test]
        fn any_words_are_judged_and_shown_shortened(
            errors in vec(".{0,400}", 0..20), task in option::of(".{0,400}"), fatal in option::of(".{0,2000}"),
            last in vec(".{0,400}", 0..20),
        ) {
            let (diagnosis, text) = diagnose(&Said { errors, task, fatal, last });
            prop_assert!(text.len() <= SHOWN, "{} bytes", text.len());
            prop_assert!(!diagnosis.advice.is_empty());
        }
    }

    #[rstest]
    #[case("Timeout waiting for SSH.", "SshTimedOut")]
    #[case("Timeout waiting for IP address", "NoAddress")]
    #[case("HTTP error (401 - Unauthorized): Invalid username or password.", "LoginRefused")]
    #[case("goss validation failed", "GossFailed")]
    #[case("Checksums did not match for /tmp/x.", "ChecksumMismatch")]
    #[case("1 error occurred:\n\t* required variable not set: a", "RecipeUnusable")]
    #[case("write /work/build/disk: no space left on device", "DiskFull")]
    #[case("Error finding vm to clone: vm 'golden' not found", "TemplateNotFound")]
    #[case("`linked_clone=true`, but template has no snapshots", "TemplateUnsuitable")]
    #[case("something new", "PackerFailed")]
    fn errors_are_told_apart(#[case] error: &str, #[case] reason: &str) {
        let said = Said { errors: vec![error.to_owned()], ..Said::default() };
        let (diagnosis, text) = diagnose(&said);
        assert_eq!(diagnosis.reason, reason);
        assert!(text.contains(error));
    }

    #[rstest]
    #[case("fatal: [default]: FAILED! => {\"msg\": \"HTTP Error 404: Not Found\"}", "NotFound")]
    #[case("fatal: [default]: FAILED! => {\"msg\": \"No package matching 'x' is available\"}", "AnsibleFailed")]
    fn a_failing_task_counts_before_what_packer_makes_of_it(#[case] fatal: &str, #[case] reason: &str) {
        let said = Said {
            errors: vec!["Error executing Ansible: exit status 2".to_owned()],
            task: Some("kubernetes : Download CNI tarball".to_owned()),
            fatal: Some(fatal.to_owned()),
            last: vec![],
        };
        let (diagnosis, text) = diagnose(&said);
        assert_eq!(diagnosis.reason, reason);
        assert!(text.contains("Download CNI tarball") && text.contains("default"), "{text}");
    }
}
