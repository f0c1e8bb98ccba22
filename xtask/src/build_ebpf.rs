//! Builds the kernel programs: nightly, bpf-linker, and `core` built from source.

use std::{
    fs,
    path::{Path, PathBuf},
};

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
    /// Name source lines, which the verifier quotes where it refuses a program.
    #[arg(long)]
    lines: bool,
    /// Build flannel-slowed.o beside it instead, whose programs take 500 ns more.
    #[arg(long, conflicts_with = "trace")]
    slowed: bool,
}

/// The verb: get the tools, then build.
pub(crate) fn run(options: &Options) -> Result<()> {
    let tools = setup::build_tools()?;
    if options.slowed {
        println!("{}", build_slowed(&tools)?.display());
        return Ok(());
    }
    let object = build(&tools, options.trace, options.lines)?;
    println!("{object}");
    Ok(())
}

/// Builds the object and says where it is and how large.
pub(crate) fn build(toolchain: &Toolchain, trace: bool, lines: bool) -> Result<String> {
    let features = if trace { "kernel,trace" } else { "kernel" };
    let object = workspace::kernel_object();
    let size = build_with(toolchain, features, lines, &object)?;
    Ok(format!("{} ({size} bytes)", object.display()))
}

/// Builds the object whose programs take 500 ns more, beside the right one.
pub(crate) fn build_slowed(toolchain: &Toolchain) -> Result<PathBuf> {
    let object = workspace::kernel_object().with_file_name("flannel-slowed.o");
    build_with(toolchain, "kernel,slowed", false, &object)?;
    Ok(object)
}

fn build_with(toolchain: &Toolchain, features: &str, lines: bool, object: &Path) -> Result<usize> {
    let target_dir = workspace::artifacts().join("ebpf-build");
    let mut cargo = toolchain.kernel_cargo("build", lines);
    cargo
        .args(["--profile", "kernel"])
        .args(["--features", features])
        .arg("--target-dir")
        .arg(&target_dir);
    command::run(&mut cargo)?;

    let built = target_dir.join("bpfel-unknown-none/kernel/flannel-kernel");
    install(&built, object)
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
