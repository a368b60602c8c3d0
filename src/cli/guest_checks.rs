//! `image-builder guest-checks`: the part of the verification that runs inside the booted image.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::PathBuf,
    process::Command,
};

use anyhow::Context;
use clap::Args;

use crate::native::image_contract::GuestReport;

/// Checks the image contract in the system that this runs in, reports, and switches it off.
#[derive(Debug, Args)]
pub(super) struct GuestChecksArgs {
    /// What the image must be like, as JSON.
    #[arg(long, value_name = "FILE")]
    expected: PathBuf,
    /// Where the report is written.
    #[arg(long, value_name = "DEVICE")]
    report: PathBuf,
    /// Check one promise only, and leave the system on.
    #[arg(long, value_name = "PROMISE")]
    only: Option<String>,
}

pub(super) fn run(args: &GuestChecksArgs) -> anyhow::Result<()> {
    let text = fs::read(&args.expected).with_context(|| format!("can not read {}", args.expected.display()))?;
    let expected = serde_json::from_slice(&text).with_context(|| format!("can not use {}", args.expected.display()))?;
    if args.only.is_none() {
        // Whatever it ends as, the start has ended.
        let _ = Command::new("systemctl").args(["is-system-running", "--wait"]).output();
    }
    let report = GuestReport::make(&expected, args.only.as_deref());
    let place = || format!("can not write the report to {}", args.report.display());
    let mut device = OpenOptions::new().append(true).open(&args.report).with_context(place)?;
    device.write_all(report.to_line().as_bytes()).with_context(place)?;
    drop(device);
    if args.only.is_none() {
        Command::new("systemctl").arg("poweroff").status().context("can not switch the guest off")?;
    }
    Ok(())
}
