//! The `lab` binary: built here and run as a child, since xtask must compile before the kernel
//! object exists, and whatever depends on `flannel-user` cannot.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Error, Result};

use crate::{build_ebpf, command, setup, workspace};

/// Everything that the lab's verbs run, built for release.
pub(crate) fn build() -> Result<()> {
    build_ebpf::build(&setup::build_tools()?, false, false)?;
    command::run(workspace::cargo().args([
        "build",
        "--release",
        "--package=flannel-user",
        "--package=lab",
    ]))
}

/// Builds the lab and becomes `lab VERB ARGUMENTS…`; returns only with an error.
pub(crate) fn become_it(verb: &str, arguments: &[String]) -> Result<()> {
    setup::lab()?;
    build()?;
    let mut lab = Command::new(workspace::release_binary("lab"));
    lab.arg(verb).args(arguments);
    let failure = lab.exec();
    Err(Error::new(failure)).with_context(|| format!("cannot start {lab:?}"))
}
