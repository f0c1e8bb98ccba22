//! What CI wants besides green tests: formatted, without lints, every link in the docs alive.

use anyhow::Result;

use crate::{build_ebpf, command, setup, workspace};

#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    command::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;

    let toolchain = setup::build_tools()?;
    // The agent embeds the object: nothing that depends on it compiles without.
    build_ebpf::build(&toolchain, false)?;
    command::run(
        workspace::cargo()
            .args(["clippy", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    command::run(
        workspace::cargo()
            .args(["doc", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    println!("check: formatting, lints and documentation are clean");
    Ok(())
}
