//! What a machine is good for. Pure.

use std::{collections::BTreeSet, fmt};

use super::machine::{Kvm, Machine, OVMF_PACKAGE};
use crate::cli::user_namespace::{Lack, Privileges};

const GB: u64 = 1_000_000_000;
/// What builds have room in, with every kind of image; what is really needed is told when it is missing.
const DISK: u64 = 50 * GB;
const CPUS: usize = 2;
const MEMORY: u64 = 8 * GB;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Level {
    Fine,
    /// Builds run, but slowly, or not all of them.
    Advised,
    /// No build runs without.
    Needed,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    /// What was found.
    what: String,
    /// What to do about it.
    instead: Option<String>,
}

impl Finding {
    fn fine(what: impl Into<String>) -> Self {
        Self { level: Level::Fine, what: what.into(), instead: None }
    }

    fn short(level: Level, what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { level, what: what.into(), instead: Some(instead.into()) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.level {
            Level::Fine => "ok     ",
            Level::Advised => "advice ",
            Level::Needed => "MISSING",
        };
        write!(f, "{mark}  {}", self.what)?;
        self.instead.iter().try_for_each(|instead| write!(f, ": {instead}"))
    }
}

/// All findings, in the order they are shown.
pub(crate) fn judge(machine: &Machine) -> Vec<Finding> {
    let mut findings = privileges(machine);
    findings.extend([disk(machine), cpus(machine), memory(machine)]);
    findings.extend(tools(machine));
    findings.push(kvm(machine));
    findings.extend(machine.proxies.iter().map(|proxy| match &proxy.shown {
        Some(url) => Finding::fine(format!("{} is {url}", proxy.name)),
        None => Finding::short(
            Level::Needed,
            format!("{} is not a URL", proxy.name),
            "write it as http://host:port, or unset it",
        ),
    }));
    findings.extend(machine.endpoints.iter().map(|(url, result)| match result {
        Ok(()) => Finding::fine(format!("{url} answers")),
        Err(why) => Finding::short(
            Level::Advised,
            format!("{url} does not answer ({why})"),
            "open the way to it, set HTTPS_PROXY, or build with private mirrors (--air-gapped)",
        ),
    }));
    findings
}

fn privileges(machine: &Machine) -> Vec<Finding> {
    let lacks = match &machine.privileges {
        Privileges::Root => return vec![Finding::fine("runs as root")],
        Privileges::Namespace(_) => {
            return vec![Finding::fine("does not run as root; builds run in a user namespace")];
        }
        Privileges::Lacking(lacks) => lacks,
    };
    let explained = lacks.iter().map(Lack::explain);
    explained
        .map(|(what, instead)| Finding::short(Level::Needed, format!("does not run as root, and {what}"), instead))
        .collect()
}

fn disk(machine: &Machine) -> Finding {
    let dir = machine.work_dir.display();
    match machine.free_bytes {
        Some(free) if free >= DISK => Finding::fine(format!("{} GB are free in {dir}", free / GB)),
        Some(free) => Finding::short(
            Level::Advised,
            format!("{} GB are free in {dir}, builds may need {}", free / GB, DISK / GB),
            "free space, or name another directory with --work-dir",
        ),
        None => {
            Finding::short(Level::Needed, format!("{dir} can not be used"), "name another directory with --work-dir")
        }
    }
}

fn cpus(machine: &Machine) -> Finding {
    match machine.cpus {
        cpus if cpus >= CPUS => Finding::fine(format!("{cpus} CPUs")),
        cpus => Finding::short(Level::Advised, format!("{cpus} CPU, {CPUS} are usual"), "expect builds to take longer"),
    }
}

fn memory(machine: &Machine) -> Finding {
    match machine.memory_bytes {
        Some(bytes) if bytes >= MEMORY => Finding::fine(format!("{} GB of memory", bytes / GB)),
        Some(bytes) => Finding::short(
            Level::Advised,
            format!("{} GB of memory, {} are usual", bytes / GB, MEMORY / GB),
            "end other programs, or add memory",
        ),
        None => Finding::short(Level::Advised, "the size of the memory is unknown", "see that there are 8 GB"),
    }
}

fn tools(machine: &Machine) -> Vec<Finding> {
    let mut packages: BTreeSet<&str> = machine.missing_tools.iter().map(|tool| tool.package).collect();
    let mut names: Vec<&str> = machine.missing_tools.iter().map(|tool| tool.program).collect();
    if !machine.firmware {
        packages.insert(OVMF_PACKAGE);
        names.push("the EFI firmware for virtual machines");
    }
    if names.is_empty() {
        return vec![Finding::fine("all tools are installed")];
    }
    let packages: Vec<&str> = packages.into_iter().collect();
    let what = format!("{} not installed", list(&names));
    let instead = format!("run `apt-get install {}`, or what your distribution calls it", packages.join(" "));
    vec![Finding::short(Level::Needed, what, instead)]
}

fn kvm(machine: &Machine) -> Finding {
    let slow = "the finished image is then booted in software, which takes minutes";
    match machine.kvm {
        Kvm::Usable => Finding::fine("/dev/kvm can be used"),
        Kvm::Refused => Finding::short(
            Level::Advised,
            format!("/dev/kvm may not be used ({slow})"),
            "run as root, or add yourself to the group kvm",
        ),
        Kvm::Absent => Finding::short(
            Level::Advised,
            format!("there is no /dev/kvm ({slow})"),
            "switch on virtualisation in the machine's firmware, or nested virtualisation for a virtual machine",
        ),
    }
}

/// `a is`, `a and b are`, `a, b and c are`.
fn list(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("{one} is"),
        [most @ .., last] => format!("{} and {last} are", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{
        super::machine::{ProxyVariable, TOOLS},
        *,
    };

    /// A machine that has everything.
    fn machine() -> Machine {
        Machine {
            work_dir: "/work".into(),
            free_bytes: Some(DISK),
            cpus: CPUS,
            memory_bytes: Some(MEMORY),
            privileges: Privileges::Root,
            missing_tools: vec![],
            firmware: true,
            kvm: Kvm::Usable,
            proxies: vec![ProxyVariable { name: "HTTPS_PROXY".into(), shown: Some("http://proxy:3128/".into()) }],
            endpoints: vec![("https://a.test/".into(), Ok(()))],
        }
    }

    #[test]
    fn nothing_is_missing_on_a_machine_that_has_everything() {
        let findings = judge(&machine());
        assert!(findings.iter().all(|finding| finding.level == Level::Fine), "{findings:?}");
    }

    #[rstest]
    #[case::user(|m: &mut Machine| m.privileges = Privileges::Lacking(vec![Lack::Namespace]), Level::Needed, "sudo")]
    #[case::disk(|m: &mut Machine| m.free_bytes = Some(DISK - 1), Level::Advised, "49 GB are free in /work")]
    #[case::directory(|m: &mut Machine| m.free_bytes = None, Level::Needed, "--work-dir")]
    #[case::cpu(|m: &mut Machine| m.cpus = 1, Level::Advised, "1 CPU")]
    #[case::memory(|m: &mut Machine| m.memory_bytes = Some(4 * GB), Level::Advised, "4 GB of memory")]
    #[case::tool(|m: &mut Machine| m.missing_tools = vec![TOOLS[3]], Level::Needed, "apt-get install mtools")]
    #[case::tools(|m: &mut Machine| m.missing_tools = TOOLS[..2].to_vec(), Level::Needed, "apt-get install e2fsprogs`")]
    #[case::firmware(|m: &mut Machine| m.firmware = false, Level::Needed, "apt-get install ovmf")]
    #[case::kvm(|m: &mut Machine| m.kvm = Kvm::Absent, Level::Advised, "virtualisation")]
    #[case::kvm_refused(|m: &mut Machine| m.kvm = Kvm::Refused, Level::Advised, "group kvm")]
    #[case::proxy(|m: &mut Machine| m.proxies[0].shown = None, Level::Needed, "HTTPS_PROXY is not a URL")]
    #[case::network(
        |m: &mut Machine| m.endpoints[0].1 = Err("refused".into()), Level::Advised, "https://a.test/ does not answer (refused)"
    )]
    fn each_shortfall_says_what_to_do(#[case] change: fn(&mut Machine), #[case] level: Level, #[case] text: &str) {
        let mut machine = machine();
        change(&mut machine);
        let short: Vec<_> = judge(&machine).into_iter().filter(|finding| finding.level != Level::Fine).collect();
        assert_eq!(short.len(), 1, "{short:?}");
        assert_eq!(short[0].level, level);
        assert!(short[0].to_string().contains(text) && short[0].instead.is_some(), "{}", short[0]);
    }
}
