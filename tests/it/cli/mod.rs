//! The command line as a person or a script sees it: the program itself, its exit code and what it prints.

mod build;
mod download;
mod manifest;
mod nodeimage;
mod ordinary_user;
mod provider;
mod stop;

use std::{
    env,
    path::Path,
    process::{Output, Stdio},
};

use tokio::process::Command;

/// The program, in a directory and an environment that hold nothing else.
pub fn image_builder(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    command
        .current_dir(dir)
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

pub async fn run(dir: &Path, arguments: &[&str]) -> Output {
    image_builder(dir).args(arguments).output().await.unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Names of what is in the directory, hidden or not.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn every_command_explains_itself_and_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let written = run(dir.path(), &["man", "pages"]).await;
    assert!(written.status.success(), "{}", text(&written.stderr));
    let pages = names(&dir.path().join("pages"));
    for words in [
        &["build"][..],
        &["manifest"],
        &["download", "manifests"],
        &["download", "artifacts"],
        &["doctor"],
        &["status"],
        &["nodeimage", "list"],
    ] {
        let help = run(dir.path(), &[words, &["--help"]].concat()).await;
        assert!(help.status.success() && text(&help.stdout).contains("Usage: image-builder"), "{words:?}");
        let page = format!("image-builder-{}.1", words.join("-"));
        assert!(pages.contains(&page), "there is no {page} among {pages:?}");
    }
}

#[tokio::test]
async fn completion_scripts_know_the_flags() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&run(dir.path(), &["completion", shell]).await.stdout);
        assert!(script.contains("release-channel") && script.contains("manifest-tarball"), "{shell}: {script}");
    }
    // The shell itself takes it.
    let script = text(&run(dir.path(), &["completion", "bash"]).await.stdout);
    let checked = Command::new("bash").args(["-n", "-c", &script]).status().await.unwrap();
    assert!(checked.success());
}

#[tokio::test]
async fn version_is_one_word_for_scripts() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(text(&run(dir.path(), &["version"]).await.stdout), concat!("v", env!("CARGO_PKG_VERSION"), "\n"));
}

#[tokio::test]
async fn doctor_names_each_missing_tool_and_its_package() {
    let dir = tempfile::tempdir().unwrap();
    // Nothing answers at this proxy, so no server is reached.
    let output = image_builder(dir.path())
        .args(["doctor", "--work-dir", "."])
        .env("PATH", "/nonexistent")
        .env("HTTPS_PROXY", "http://127.0.0.1:9")
        .env("HTTP_PROXY", "http://127.0.0.1:9")
        .output()
        .await
        .unwrap();
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(69), "{shown}");
    for expected in ["mcopy", "apt-get install dosfstools", "HTTPS_PROXY is http://127.0.0.1:9", "GB are free in ."] {
        assert!(shown.contains(expected), "{expected} is not in {shown}");
    }
    let unreachable = shown.lines().filter(|line| line.contains("does not answer")).count();
    assert_eq!(unreachable, 5, "{shown}");
}
