//! What Packer says with `-machine-readable`, and how far it is. Pure.
//!
//! A line is `time,target,kind,data...`; commas and line ends in data are written in other ways. Packer 1.6 and later
//! ones agree on it.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{contract::Stage, progress::Reporter};

/// Error texts that are kept, and last lines of anything.
const KEPT: usize = 20;
/// Tasks of upstream's two playbooks for one image, roughly: progress is no promise.
const TASKS: f64 = 180.0;

/// One line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Line {
    /// The builder that it is about; often nothing, even where it is about one.
    pub target: String,
    /// e.g. `ui`, `error`, `artifact`.
    pub kind: String,
    pub data: Vec<String>,
}

impl Line {
    /// `None` for a line that is not Packer's own.
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(4, ',');
        let (time, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        if time.is_empty() || !time.bytes().all(|byte| byte.is_ascii_digit()) || kind.is_empty() {
            return None;
        }
        let data = fields.next().map(|rest| rest.split(',').map(unescape).collect()).unwrap_or_default();
        Some(Self { target: unescape(target), kind: kind.to_owned(), data })
    }

    /// What a person would read, and whether it is an error.
    fn text(&self) -> Option<(&str, bool)> {
        match (self.kind.as_str(), &self.data[..]) {
            ("ui", [level, text, ..]) => Some((text, level == "error")),
            ("error", [text, ..]) => Some((text, true)),
            (_, _) => None,
        }
    }
}

fn unescape(field: &str) -> String {
    field.replace("%!(PACKER_COMMA)", ",").replace("\\n", "\n").replace("\\r", "\r")
}

/// `text` as it stands in a field.
#[cfg(test)]
fn escape(text: &str) -> String {
    text.replace(',', "%!(PACKER_COMMA)").replace('\r', "\\r").replace('\n', "\\n")
}

/// What Packer has said about why it failed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Said {
    /// Errors, oldest first.
    pub errors: Vec<String>,
    /// The Ansible task that ran last.
    pub task: Option<String>,
    /// What Ansible said of a task that failed.
    pub fatal: Option<String>,
    /// The last lines.
    pub last: Vec<String>,
}

/// Types of the builders that upstream's recipes have.
const BUILDERS: [&str; 4] = ["qemu", "vsphere-iso", "vsphere-clone", "nutanix"];

/// Follows the output of one run.
#[derive(Debug)]
pub struct Watch {
    reporter: Reporter,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    since: Instant,
    took: Vec<(Stage, Duration)>,
    tasks: u32,
    said: Said,
    last: VecDeque<String>,
}

impl Watch {
    /// The run begins now.
    pub fn new(reporter: Reporter) -> Self {
        let state = State {
            stage: Stage::Fetch,
            since: Instant::now(),
            took: vec![],
            tasks: 0,
            said: Said::default(),
            last: VecDeque::new(),
        };
        Self { reporter, state: Mutex::new(state) }
    }

    /// Takes one line of output.
    pub fn see(&self, line: &str) {
        let parsed = Line::parse(line);
        let (text, is_error) = match &parsed {
            Some(parsed) => match parsed.text() {
                Some(said) => said,
                None => return,
            },
            None => (line, false),
        };
        for text in text.lines().map(plain).filter(|text| !text.is_empty()) {
            self.note(text, is_error);
        }
    }

    fn note(&self, text: &str, is_error: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.len() == KEPT {
            state.last.pop_front();
        }
        state.last.push_back(text.to_owned());
        if is_error && state.said.errors.len() < KEPT && !state.said.errors.iter().any(|error| error == text) {
            state.said.errors.push(text.to_owned());
        }
        if text.starts_with("fatal: ") || text.starts_with("failed: ") {
            state.said.fatal = Some(text.to_owned());
        }
        let task = task(text);
        if let Some(task) = task {
            state.tasks += 1;
            state.said.task = Some(task.to_owned());
        }
        let Some((stage, share)) = milestone(text, state.tasks) else { return };
        // A stage once left does not come back: the reboot between two playbooks is no new start.
        if stage > state.stage {
            let took = state.since.elapsed();
            let left = state.stage;
            state.took.push((left, took));
            (state.stage, state.since) = (stage, Instant::now());
        }
        // How far an earlier stage is says nothing of this one.
        let share = if stage < state.stage { 0.0 } else { share };
        self.reporter.report(state.stage, share, task.unwrap_or(text));
    }

    /// The stage that runs now.
    pub fn stage(&self) -> Stage {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stage
    }

    /// How long each stage took, and what was said. The run has ended.
    pub fn finish(self) -> (Vec<(Stage, Duration)>, Said) {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let State { stage, since, mut took, mut said, last, .. } = state;
        took.push((stage, since.elapsed()));
        said.last = last.into();
        (took, said)
    }
}

/// Without the mark of the builder that speaks: `==> qemu: `, `    qemu: `; from Packer 1.7 on `==> vsphere-iso.vsphere: `
/// where its name is not that of its type.
fn plain(line: &str) -> &str {
    let text = line.trim();
    let text = text.strip_prefix("==> ").or_else(|| text.strip_prefix("--> ")).unwrap_or(text);
    let Some((builder, rest)) = text.split_once(": ") else { return text };
    let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    let is_builder = match builder.split_once('.') {
        Some((kind, name)) => BUILDERS.contains(&kind) && is_name(name),
        None => is_name(builder),
    };
    match builder {
        // Ansible's words, which stand after the builder's name.
        "fatal" | "failed" | "ok" | "changed" | "skipping" => text,
        _ if is_builder => rest.trim(),
        _ => text,
    }
}

/// The task that Ansible says it begins: `TASK [role : what it does] ****`.
fn task(text: &str) -> Option<&str> {
    text.strip_prefix("TASK [")?.rsplit_once(']').map(|(task, _)| task)
}

/// Which stage a text belongs to, and how much of it is done then.
fn milestone(text: &str, tasks: u32) -> Option<(Stage, f64)> {
    const MARKS: &[(&str, Stage, f64)] = &[
        ("Retrieving ISO", Stage::Fetch, 0.2),
        ("Uploading ", Stage::Fetch, 0.6),
        ("Starting HTTP server", Stage::Install, 0.0),
        ("Creating VM", Stage::Install, 0.0),
        ("Creating virtual machine", Stage::Install, 0.0),
        ("Cloning VM", Stage::Install, 0.0),
        ("Copying hard drive", Stage::Install, 0.0),
        ("Resizing hard drive", Stage::Install, 0.0),
        ("Starting VM", Stage::Install, 0.02),
        ("Power on VM", Stage::Install, 0.02),
        ("Typing the boot command", Stage::Install, 0.04),
        ("Waiting for IP", Stage::Install, 0.06),
        ("Waiting for SSH", Stage::Install, 0.06),
        ("Using SSH communicator", Stage::Install, 0.06),
        ("Connected to SSH", Stage::Install, 0.3),
        ("Provisioning with Goss", Stage::Seal, 0.8),
        ("Gracefully halting", Stage::Assemble, 0.0),
        ("Executing shutdown command", Stage::Assemble, 0.0),
        ("Shutting down VM", Stage::Assemble, 0.0),
        ("Converting hard drive", Stage::Assemble, 0.4),
        ("Starting export", Stage::Assemble, 0.2),
        ("Downloading: ", Stage::Assemble, 0.3),
        ("Exporting", Stage::Assemble, 0.9),
    ];
    if let Some(task) = task(text) {
        return Some(if task.starts_with("sysprep") {
            (Stage::Seal, 0.3)
        } else {
            (Stage::Install, 0.3 + 0.7 * (f64::from(tasks) / TASKS).min(1.0))
        });
    }
    MARKS.iter().find(|(mark, _, _)| text.starts_with(mark)).map(|(_, stage, share)| (*stage, *share))
}

/// Stages go forward only, little is kept, and whatever was said is judged in few words.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    use super::diagnosis::{SHOWN, diagnose};
    use crate::progress::Style;

    let text = String::from_utf8_lossy(bytes);
    let watch = Watch::new(Reporter::new(Style::Json, Box::new(std::io::sink())));
    let mut stage = watch.stage();
    for line in text.lines() {
        watch.see(line);
        assert!(watch.stage() >= stage, "{line} leads back");
        stage = watch.stage();
    }
    let (took, said) = watch.finish();
    assert!(took.is_sorted_by(|(earlier, _), (later, _)| earlier < later), "{took:?}");
    assert!(said.errors.len() <= KEPT && said.last.len() <= KEPT, "{said:?}");
    let (_, told) = diagnose(&said);
    assert!(told.len() <= SHOWN, "{told}");
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::progress::Style;

    /// A line of Packer, or of a program that it runs, with words that mean something here and words that do not.
    fn output() -> impl Strategy<Value = String> {
        let words = prop_oneof![
            ".{0,60}",
            "(==> qemu: |    qemu: |--> |)(Retrieving ISO|Creating VM|Connected to SSH!|Gracefully halting|Exporting)",
            "    qemu: TASK \\[(sysprep : )?[a-z :\\[\\]]{0,20}\\]? \\*\\*",
            "    qemu: (fatal|failed|ok): \\[default\\]: FAILED! => .{0,40}",
        ];
        let line = ("[0-9]{0,10}", "(qemu|)", "(ui|error|artifact|)", "(say|message|error|)", words, any::<bool>());
        line.prop_map(
            |(time, target, kind, level, words, of_packer)| {
                if of_packer { format!("{time},{target},{kind},{level},{}", escape(&words)) } else { words }
            },
        )
    }

    fn watch(lines: &[&str]) -> (Stage, Said) {
        let watch = Watch::new(Reporter::new(Style::Json, Box::new(std::io::sink())));
        for line in lines {
            watch.see(line);
        }
        (watch.stage(), watch.finish().1)
    }

    #[test]
    fn commas_and_line_ends_come_back() {
        let line = Line::parse("1795708057,qemu,ui,message,    qemu: a%!(PACKER_COMMA) b\\nc").unwrap();
        assert_eq!((line.target.as_str(), line.kind.as_str()), ("qemu", "ui"));
        assert_eq!(line.data, ["message", "    qemu: a, b\nc"]);
        assert_eq!(Line::parse("no line of Packer's"), None);
        assert_eq!(Line::parse("2026/11/26 [INFO] x, y, z"), None);
    }

    proptest! {
        #[test]
        fn any_line_is_read_or_not_without_harm(line in ".{0,200}") {
            drop(Line::parse(&line));
            watch(&[&line]);
        }

        #[test]
        fn whatever_is_said_stages_go_forward_only_and_little_is_kept(lines in vec(output(), 0..80)) {
            let watch = Watch::new(Reporter::new(Style::Json, Box::new(std::io::sink())));
            let mut stage = watch.stage();
            for line in &lines {
                watch.see(line);
                prop_assert!(watch.stage() >= stage, "{line}");
                stage = watch.stage();
            }
            let (took, said) = watch.finish();
            prop_assert!(took.is_sorted_by(|(earlier, _), (later, _)| earlier < later), "{took:?}");
            prop_assert!(said.errors.len() <= KEPT && said.last.len() <= KEPT);
        }

        #[test]
        fn any_text_comes_back_as_it_was(text in "[^\\\\]{0,80}", target in "[a-z-]{0,12}") {
            let line = format!("1,{target},ui,say,{}", escape(&text));
            let parsed = Line::parse(&line).unwrap();
            prop_assert_eq!(parsed.target, target);
            prop_assert_eq!(&parsed.data[1], &text);
        }
    }

    #[test]
    fn stages_go_forward_only() {
        let run = [
            "1,,ui,say,==> qemu: Retrieving ISO",
            "1,,ui,say,==> qemu: Starting VM%!(PACKER_COMMA) booting disk image",
            "1,,ui,say,==> qemu: Connected to SSH!",
            "1,,ui,message,    qemu: TASK [sysprep : Truncate logs] ****",
            "1,,ui,message,    qemu: TASK [late : another] ****",
        ];
        assert_eq!(watch(&run[..1]).0, Stage::Fetch);
        assert_eq!(watch(&run[..3]).0, Stage::Install);
        assert_eq!(watch(&run).0, Stage::Seal);
    }

    #[test]
    fn who_speaks_is_no_part_of_what_is_said() {
        for (line, text) in [
            ("==> qemu: Retrieving ISO", "Retrieving ISO"),
            ("==> vsphere-iso.vsphere: Waiting for IP...", "Waiting for IP..."),
            ("    nutanix: Found IP", "Found IP"),
            ("fatal: [default]: FAILED!", "fatal: [default]: FAILED!"),
            ("main.yml: no such file", "main.yml: no such file"),
        ] {
            assert_eq!(plain(line), text);
        }
    }

    #[test]
    fn the_failing_task_and_its_words_are_kept() {
        let (_, said) = watch(&[
            "1,,ui,message,    qemu: TASK [kubernetes : Download CNI tarball] ****",
            "1,,ui,message,    qemu: fatal: [default]: FAILED! => {\"msg\": \"Request failed\"}",
            "1,,ui,error,Build 'qemu' errored after 3 minutes: Error executing Ansible: exit status 2",
            "1,qemu,error,Error executing Ansible: exit status 2",
        ]);
        assert_eq!(said.task.as_deref(), Some("kubernetes : Download CNI tarball"));
        assert!(said.fatal.unwrap().contains("Request failed"));
        assert_eq!(said.errors.len(), 2);
    }
}
