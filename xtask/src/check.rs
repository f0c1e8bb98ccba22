//! What CI wants besides green tests: formatted, without lints, every link in the docs alive.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{build_ebpf, command, setup, workspace};

#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    let toolchain = setup::build_tools()?;
    // The agent embeds the object: nothing that depends on it compiles without.
    build_ebpf::build(&toolchain, false, false)?;

    let mut format = workspace::cargo();
    format.args(["fmt", "--all", "--check"]);
    let mut lints = workspace::cargo();
    lints
        .args(["clippy", "--workspace", "--all-targets"])
        .args(["--", "-D", "warnings"]);
    let mut kernel_lints = toolchain.kernel_cargo("clippy", false);
    kernel_lints
        .args(["--profile", "kernel", "--features", "kernel,trace,slowed"])
        .arg("--target-dir")
        .arg(workspace::artifacts().join("ebpf-build"))
        .args(["--", "-D", "warnings"]);
    let mut documentation = workspace::cargo();
    documentation
        .args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings");

    all([
        ("formatting", format),
        ("lints", lints),
        ("lints of the kernel programs", kernel_lints),
        ("documentation", documentation),
    ])
}

/// Runs every check, so that one round shows all there is to mend.
fn all<const N: usize>(checks: [(&'static str, Command); N]) -> Result<()> {
    let mut failed = Vec::new();
    for (name, mut check) in checks {
        if let Err(error) = command::run(&mut check) {
            eprintln!("{error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("not clean: {}", failed.join(", "));
    }
    println!("check: formatting, lints and documentation are clean");
    Ok(())
}
