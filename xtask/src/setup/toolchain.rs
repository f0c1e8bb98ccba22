//! The compiler and the linker of the kernel object.

use std::{env, path::PathBuf, process::Command, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::rust_src;
use crate::{command, workspace};

/// Chooses another nightly, for those who keep several.
const TOOLCHAIN_VARIABLE: &str = "FLANNEL_NIGHTLY";
/// Installed where no nightly is present: the day whose LLVM our bpf-linker is known to fit.
const KNOWN_GOOD_NIGHTLY: &str = "nightly-2026-05-20";
const LINKER_VERSION: &str = "0.10.3";
/// A whole toolchain over a slow line.
const INSTALL_LIMIT: Duration = Duration::from_secs(15 * 60);

/// A nightly with `rust-src`, and a linker that fits it.
pub(crate) struct Toolchain {
    name: String,
    linker: PathBuf,
}

impl Toolchain {
    /// Looks first, installs what is missing.
    pub(crate) fn find_or_install() -> Result<Self> {
        let name = nightly()?;
        rust_src::ensure(&name)?;
        let linker = match find_linker() {
            Some(linker) => linker,
            None => install_linker()?,
        };
        Ok(Self { name, linker })
    }

    /// `cargo VERB` for the kernel's binary, with the flags that the verifier needs. With `lines` the
    /// object names source lines (BTF), which the verifier and bpftool then quote; without, it is a
    /// quarter as large and as long to read, and every agent reads it at its start.
    ///
    /// The unaligned-access feature halves the code that touches headers; loaded and measured on
    /// kernels 6.1 to 6.18. `-C target-cpu=v3` is understood by all of them.
    pub(crate) fn kernel_cargo(&self, verb: &str, lines: bool) -> Command {
        let mut flags = vec![
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            format!("-Cdebuginfo={}", if lines { 2 } else { 0 }),
            "-Ctarget-cpu=v3".to_owned(),
            "-Ctarget-feature=+allows-misaligned-mem-access".to_owned(),
            format!("-Clinker={}", self.linker.display()),
        ];
        if lines {
            flags.push("-Clink-arg=--btf".to_owned());
        }
        let mut cargo = rustup_run(&self.name, "cargo");
        cargo
            .arg(verb)
            .args(["--package", "flannel-ebpf", "--bin", "flannel-kernel"])
            .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core"])
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        cargo
    }
}

/// `PROGRAM` of the toolchain `name`, without what the cargo that started us left in the environment.
pub(super) fn rustup_run(name: &str, program: &str) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", name, program])
        .current_dir(workspace::root());
    for left_over in ["CARGO", "RUSTC", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
        command.env_remove(left_over);
    }
    command
}

fn nightly() -> Result<String> {
    if command::find("rustup").is_none() {
        bail!(
            "rustup is missing: the kernel programs need a nightly compiler beside the stable one, install rustup first"
        );
    }
    let listing = command::output(Command::new("rustup").args(["toolchain", "list"]))?;
    let wanted = env::var(TOOLCHAIN_VARIABLE).ok();
    if let Some(name) = choose_nightly(&listing, wanted.as_deref()) {
        return Ok(name.to_owned());
    }
    let name = wanted.as_deref().unwrap_or(KNOWN_GOOD_NIGHTLY);
    println!("installing the Rust toolchain {name}");
    command::run_within(
        Command::new("rustup")
            .args(["toolchain", "install", name, "--profile", "minimal"])
            .stdin(Stdio::null()),
        INSTALL_LIMIT,
    )
    .with_context(|| {
        format!("a nightly compiler is missing: run `rustup toolchain install {name}`")
    })?;
    Ok(name.to_owned())
}

/// The toolchain asked for, else the one known to fit, else the user's own nightly.
fn choose_nightly<'a>(listing: &'a str, wanted: Option<&'a str>) -> Option<&'a str> {
    let installed = |wanted: &str| {
        listing.lines().any(|line| {
            let name = line.split_whitespace().next().unwrap_or_default();
            name == wanted
                || name
                    .strip_prefix(wanted)
                    .and_then(|rest| rest.strip_prefix('-'))
                    // "nightly-2026-05-20-…" is not the toolchain "nightly"
                    .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    let candidates = match wanted {
        Some(wanted) => vec![wanted],
        None => vec![KNOWN_GOOD_NIGHTLY, "nightly"],
    };
    candidates.into_iter().find(|name| installed(name))
}

fn find_linker() -> Option<PathBuf> {
    [
        tools().join("bin/bpf-linker"),
        cargo_home().join("bin/bpf-linker"),
    ]
    .into_iter()
    .chain(command::find("bpf-linker"))
    .find(is_wanted_linker)
}

fn is_wanted_linker(linker: &PathBuf) -> bool {
    command::output(Command::new(linker).arg("--version"))
        .is_ok_and(|answer| answer.trim() == format!("bpf-linker {LINKER_VERSION}"))
}

fn install_linker() -> Result<PathBuf> {
    // Another version may serve another project: leave it alone.
    let root = if cargo_home().join("bin/bpf-linker").exists() {
        tools()
    } else {
        cargo_home()
    };
    println!("installing bpf-linker {LINKER_VERSION} (a few minutes)");
    command::run(
        workspace::cargo()
            .args(["install", "--quiet", "--locked", "bpf-linker"])
            .args(["--version", &format!("={LINKER_VERSION}")])
            .arg("--root")
            .arg(&root)
            .env_remove("CARGO_TARGET_DIR"),
    )
    .with_context(|| {
        format!("bpf-linker is missing: run `cargo install bpf-linker --locked --version ={LINKER_VERSION}`")
    })?;
    Ok(root.join("bin/bpf-linker"))
}

fn tools() -> PathBuf {
    workspace::artifacts().join("tools")
}

fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "stable-x86_64-unknown-linux-gnu (active, default)\n\
                           nightly-x86_64-unknown-linux-gnu\n";

    #[test]
    fn the_users_nightly_serves() {
        assert_eq!(choose_nightly(LISTING, None), Some("nightly"));
    }

    #[test]
    fn the_known_good_nightly_goes_first() {
        let listing = format!("{LISTING}{KNOWN_GOOD_NIGHTLY}-x86_64-unknown-linux-gnu\n");
        assert_eq!(choose_nightly(&listing, None), Some(KNOWN_GOOD_NIGHTLY));
    }

    #[test]
    fn a_dated_nightly_is_not_the_nightly() {
        let listing = "nightly-2025-01-01-x86_64-unknown-linux-gnu\n";
        assert_eq!(choose_nightly(listing, None), None);
    }

    #[test]
    fn a_wanted_toolchain_is_taken_or_nothing() {
        let listing = format!("{LISTING}mine\n");
        assert_eq!(choose_nightly(&listing, Some("mine")), Some("mine"));
        assert_eq!(choose_nightly(&listing, Some("other")), None);
    }
}
