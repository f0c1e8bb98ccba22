//! Builds the kernel programs: nightly, bpf-linker, and `core` built from source.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    command,
    setup::{self, toolchain::Toolchain},
    workspace,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Log a line for each packet that is left to the kernel (slow).
    #[arg(long)]
    trace: bool,
}

/// The verb: get the tools, then build.
pub(crate) fn run(options: &Options) -> Result<()> {
    let object = build(&setup::build_tools()?, options.trace)?;
    println!("{object}");
    Ok(())
}

/// Builds the object and says where it is and how large.
pub(crate) fn build(toolchain: &Toolchain, trace: bool) -> Result<String> {
    let target_dir = workspace::artifacts().join("ebpf-build");
    let features = if trace { "kernel,trace" } else { "kernel" };
    let mut cargo = toolchain.kernel_cargo("build");
    cargo
        .args(["--profile", "kernel"])
        .args(["--features", features])
        .arg("--target-dir")
        .arg(&target_dir);
    command::run(&mut cargo)?;

    let built = target_dir.join("bpfel-unknown-none/kernel/flannel-kernel");
    let object = workspace::kernel_object();
    let size = install(&built, &object)?;
    Ok(format!("{} ({size} bytes)", object.display()))
}

/// Puts the object in place in one step, and not at all when nothing changed: cargo rebuilds
/// `flanneld` by the file's time.
fn install(built: &Path, object: &Path) -> Result<usize> {
    let bytes = fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    if fs::read(object).is_ok_and(|present| present == bytes) {
        return Ok(bytes.len());
    }
    let directory = object.parent().context("the object has a directory")?;
    fs::create_dir_all(directory)?;
    let partial = object.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, &bytes)
        .and_then(|()| fs::rename(&partial, object))
        .with_context(|| format!("cannot write {}", object.display()))?;
    Ok(bytes.len())
}
