//! Boots Debian's kernels in an emulator and runs the lab's short scenario in each.

mod image;
mod modules;
mod package;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{command, lab, setup, workspace};

/// The oldest kernel we promise, and the one of the current Debian.
const DEFAULT_KERNELS: [&str; 2] = ["6.1", "6.12"];
/// What /init prints when the scenario is over, followed by its exit code.
const VERDICT: &str = "guest exit code: ";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which kernel series; can be given several times [default: 6.1 and 6.12].
    #[arg(long = "kernel", value_name = "SERIES")]
    series: Vec<String>,
    /// What the guest runs, as a shell command.
    #[arg(long, default_value = Options::COMMAND)]
    command: String,
    /// How the guest runs. Where this machine is itself a guest, `kvm` can be present and yet
    /// stop at the first instruction it does not know; emulation takes seconds longer, anywhere.
    #[arg(long, default_value = Options::ACCELERATOR, value_parser = ["tcg", "kvm"])]
    accelerator: String,
    /// A guest that is not done after so many seconds has failed.
    #[arg(long, default_value_t = Options::LIMIT, value_name = "SECONDS")]
    timeout: u64,
}

impl Options {
    const COMMAND: &str = "lab guest";
    const ACCELERATOR: &str = "tcg";
    /// Emulation without hardware support is some twenty times slower.
    const LIMIT: u64 = 300;
}

impl Default for Options {
    fn default() -> Self {
        Self {
            series: Vec::new(),
            command: Self::COMMAND.to_owned(),
            accelerator: Self::ACCELERATOR.to_owned(),
            timeout: Self::LIMIT,
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("guest kernels are emulated on x86-64 only");
    }
    setup::emulator()?;
    lab::build()?;

    let series: Vec<&str> = if options.series.is_empty() {
        DEFAULT_KERNELS.to_vec()
    } else {
        options.series.iter().map(String::as_str).collect()
    };
    let mut failed = 0;
    for series in series {
        if let Err(error) = try_kernel(series, options) {
            println!("kernel {series}: FAILED: {error:#}");
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} of the guest kernels failed");
    }
    Ok(())
}

fn try_kernel(series: &str, options: &Options) -> Result<()> {
    let kernel = package::newest(series, &workspace::artifacts().join("kernels"))?;
    let initramfs = image::build(&kernel, &options.command)?;
    let serial = kernel.directory.join("serial.log");

    let started = Instant::now();
    let finished = boot(
        &options.accelerator,
        &kernel.vmlinuz(),
        &initramfs,
        &serial,
        Duration::from_secs(options.timeout),
    );
    // The serial line is no UTF-8 contract: firmware writes what it likes.
    let log = String::from_utf8_lossy(&fs::read(&serial).unwrap_or_default()).into_owned();
    for line in told(&log) {
        println!("    {line}");
    }
    let report = || format!("kernel {}, log {}", kernel.version, serial.display());
    finished.with_context(report)?;
    match verdict(&log) {
        Some(0) => {
            let took = started.elapsed().as_secs_f64();
            println!("kernel {}: passed in {took:.1} s", kernel.version);
            Ok(())
        }
        Some(code) => bail!("{}: exit code {code}", report()),
        None => bail!("{}: the guest ended before its scenario did", report()),
    }
}

fn boot(
    accelerator: &str,
    vmlinuz: &Path,
    initramfs: &Path,
    serial: &Path,
    limit: Duration,
) -> Result<()> {
    command::run_within(
        Command::new("qemu-system-x86_64")
            .args(["-accel", accelerator])
            .args(["-cpu", "max", "-smp", "2", "-m", "1024"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(vmlinuz)
            .arg("-initrd")
            .arg(initramfs)
            // A panic ends the guest at once instead of waiting for the limit.
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-serial")
            .arg(format!("file:{}", serial.display()))
            .stdin(Stdio::null()),
        limit,
    )
}

/// The scenario's own lines.
fn told(log: &str) -> impl Iterator<Item = &str> {
    log.lines()
        .map(str::trim_end)
        .filter(|line| line.starts_with("ok ") || line.starts_with("FAIL "))
}

fn verdict(log: &str) -> Option<i32> {
    log.lines()
        .rev()
        .find_map(|line| line.trim_end().strip_prefix(VERDICT)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "[    0.1] boot\r\nok ping\r\nFAIL stream: 3 lost\r\nguest exit code: 1\r\n";

    #[test]
    fn the_verdict_is_the_guests_exit_code() {
        assert_eq!(verdict(LOG), Some(1));
        assert_eq!(verdict("[    0.1] Kernel panic\r\n"), None);
    }

    #[test]
    fn only_the_scenarios_lines_are_told() {
        let lines: Vec<_> = told(LOG).collect();
        assert_eq!(lines, ["ok ping", "FAIL stream: 3 lost"]);
    }
}
