//! The source of `core` for the nightly compiler: build-std compiles it for the BPF target.
//!
//! Three places, the nearest first: the toolchain itself, rustup, and Debian's `rust-src` of a
//! suite newer than ours, whose version fits the nightly.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    archive::{self, PrivateApt},
    toolchain,
};
use crate::command;

/// Rustup answers within seconds, or it has no way out.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);
/// Newest last: the first one that fits ends the search. Stable comes first since one day it will
/// be as new as the nightly.
const SUITES: [&str; 3] = ["stable", "testing", "sid"];

/// Makes sure that `nightly` has its library source.
pub(super) fn ensure(nightly: &str) -> Result<()> {
    let sysroot =
        command::output(toolchain::rustup_run(nightly, "rustc").args(["--print", "sysroot"]))?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
    if is_complete(&library) {
        return Ok(());
    }
    println!("installing rust-src for {nightly}");
    let Err(from_rustup) = add_component(nightly, &library) else {
        return Ok(());
    };
    take_from_debian(nightly, &library).with_context(|| {
        format!(
            "the library source of {nightly} is missing: run `rustup component add rust-src \
             --toolchain {nightly}` (tried: {from_rustup:#}), or put a matching `library` \
             directory at {}",
            library.display()
        )
    })
}

/// What build-std reads first; a half-copied tree has no lock file.
fn is_complete(library: &Path) -> bool {
    library.join("core/src/lib.rs").is_file() && library.join("Cargo.lock").is_file()
}

fn add_component(nightly: &str, library: &Path) -> Result<()> {
    command::run_within(
        Command::new("rustup")
            .args(["component", "add", "rust-src", "--toolchain", nightly])
            .stdin(Stdio::null())
            .stderr(Stdio::null()),
        RUSTUP_LIMIT,
    )?;
    if !is_complete(library) {
        bail!("rustup takes the component for installed, but its files are not there");
    }
    Ok(())
}

fn take_from_debian(nightly: &str, library: &Path) -> Result<()> {
    let compiler = command::output(toolchain::rustup_run(nightly, "rustc").arg("--version"))?;
    let wanted = Version::of_compiler(&compiler)
        .with_context(|| format!("cannot read a version from {compiler:?}"))?;
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let archive = debian_release(&release)
        .and_then(|release| archive::configured(&release))
        .context("apt is not configured with a Debian archive here")?;

    let scratch = Scratch::new()?;
    let mut offers = Vec::new();
    for suite in SUITES {
        let directory = scratch.0.join(suite);
        // A mirror need not carry every suite.
        let Ok(apt) = PrivateApt::update(&archive, suite, &directory) else {
            continue;
        };
        if let Ok(name) = apt.version("rust-src")
            && let Some(version) = Version::of_package(&name)
        {
            offers.push((suite, version));
            if version.release() == wanted.release() && version >= wanted {
                break;
            }
        }
    }
    let (suite, version) = *nearest(wanted, &offers).with_context(|| {
        format!("no suite of the Debian archive has a rust-src that fits {wanted:?}: {offers:?}")
    })?;

    let directory = scratch.0.join(suite);
    let unpacked = PrivateApt {
        directory: &directory,
    }
    .unpack("rust-src")?;
    let source = unpacked.join(format!("usr/src/rustc-{version}/library"));
    place(&source, library)?;
    println!("took rust-src {version} from Debian {suite}");
    Ok(())
}

/// Copies the tree beside its place and moves it in: a copy cut short is never taken for complete.
fn place(source: &Path, library: &Path) -> Result<()> {
    if !is_complete(source) {
        bail!("Debian's rust-src has no {}", source.display());
    }
    let parent = library.parent().context("the library has a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot write to {}", parent.display()))?;
    let partial = parent.join(format!("library.{}", process::id()));
    command::run(
        Command::new("cp")
            .args(["--recursive", "--dereference"])
            .arg(source)
            .arg(&partial),
    )?;
    if library.exists() {
        fs::remove_dir_all(library)?;
    }
    fs::rename(&partial, library)?;
    Ok(())
}

/// The suite this Debian machine runs.
fn debian_release(os_release: &str) -> Option<String> {
    let value = |key: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
    };
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME"))?
}

/// The nearest version whose library a compiler of `wanted` can build: not more than one release
/// away, and rather the newer.
fn nearest<'a>(
    wanted: Version,
    offers: &'a [(&'static str, Version)],
) -> Option<&'a (&'static str, Version)> {
    offers
        .iter()
        .filter(|(_, offer)| offer.major == wanted.major && offer.minor.abs_diff(wanted.minor) <= 1)
        .min_by_key(|(_, offer)| {
            (
                offer.minor.abs_diff(wanted.minor),
                *offer < wanted,
                offer.patch.abs_diff(wanted.patch),
            )
        })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// From `rustc 1.97.0-nightly (…)`.
    fn of_compiler(answer: &str) -> Option<Self> {
        Self::parse(answer.split_whitespace().nth(1)?)
    }

    /// From a Debian version such as `1.97.1+dfsg1-2`.
    fn of_package(version: &str) -> Option<Self> {
        let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
        Self::parse(upstream)
    }

    fn parse(text: &str) -> Option<Self> {
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Self {
            major: next()?,
            minor: next()?,
            patch: next()?,
        })
    }

    fn release(self) -> (u32, u32) {
        (self.major, self.minor)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A temporary directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("flannel-xtask-{}", process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::of_package(text).unwrap()
    }

    #[test]
    fn versions_are_read_from_compilers_and_packages() {
        let compiler = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)";
        assert_eq!(Version::of_compiler(compiler), Some(version("1.97.0")));
        assert_eq!(version("1:1.97.1+dfsg1-2~bpo12+1"), version("1.97.1"));
        assert_eq!(Version::of_package("(none)"), None);
    }

    #[test]
    fn the_nearest_version_rather_newer_is_taken() {
        let pick = |offers: &[&'static str]| {
            let offers: Vec<_> = offers.iter().map(|text| (*text, version(text))).collect();
            nearest(version("1.97.0"), &offers).map(|(text, _)| *text)
        };
        assert_eq!(pick(&["1.85.0", "1.97.1", "1.98.0"]), Some("1.97.1"));
        assert_eq!(pick(&["1.96.0", "1.98.0"]), Some("1.98.0"));
        assert_eq!(pick(&["1.97.2", "1.97.1"]), Some("1.97.1"));
        assert_eq!(pick(&["1.96.1"]), Some("1.96.1"));
        assert_eq!(pick(&["1.85.0", "1.99.0"]), None);
    }

    #[test]
    fn only_debian_has_debians_suites() {
        let bookworm = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(debian_release(bookworm).as_deref(), Some("bookworm"));
        assert_eq!(debian_release("ID=fedora\nVERSION_CODENAME=\"\"\n"), None);
    }
}
