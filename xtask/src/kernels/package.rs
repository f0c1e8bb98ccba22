//! Debian's cloud kernels: found by series, downloaded and unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{command, setup};

/// An unpacked kernel package.
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) version: String,
    /// Ours to write to: the package is unpacked in `root` below.
    pub(super) directory: PathBuf,
}

impl Kernel {
    pub(super) fn vmlinuz(&self) -> PathBuf {
        self.root().join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The package's files.
    pub(super) fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.root().join("lib/modules").join(&self.version)
    }
}

/// The newest kernel of `series` that apt offers, in `cache`.
pub(super) fn newest(series: &str, cache: &Path) -> Result<Kernel> {
    let name = setup::apt_updated(|| offered(series))?;
    let version = kernel_version(&name).context("the package is named after its version")?;
    let kernel = Kernel {
        version: version.to_owned(),
        directory: cache.join(version),
    };
    if kernel.modules().join("modules.dep").is_file() {
        return Ok(kernel);
    }
    println!("downloading {name}");
    fs::create_dir_all(&kernel.directory)?;
    setup::apt_updated(|| {
        command::output(
            Command::new("apt-get")
                .args(["download", "--quiet=2", &name])
                .current_dir(&kernel.directory),
        )
    })?;
    let deb = fs::read_dir(&kernel.directory)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|suffix| suffix == "deb"))
        .with_context(|| format!("{name} was not downloaded"))?;
    command::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&deb)
            .arg(kernel.root()),
    )?;
    fs::remove_file(&deb)?;
    // Comes last: its result tells that the rest is complete.
    let depmod = command::find("depmod").context("depmod is missing: install kmod")?;
    command::output(
        Command::new(depmod)
            .arg("--basedir")
            .arg(kernel.root())
            .arg(&kernel.version),
    )?;
    Ok(kernel)
}

fn offered(series: &str) -> Result<String> {
    let pattern = format!("^linux-image-{}\\.", series.replace('.', "\\."));
    let answer =
        command::output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    newest_name(&answer)
        .map(str::to_owned)
        .with_context(|| format!("apt offers no cloud kernel {series}"))
}

/// The highest version; of two packages with the same one, the signed.
fn newest_name(search: &str) -> Option<&str> {
    search
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| kernel_version(name).is_some())
        .max_by_key(|name| (numbers(name), !name.ends_with("-unsigned")))
}

fn kernel_version(package: &str) -> Option<&str> {
    let name = package.strip_prefix("linux-image-")?;
    let name = name.strip_suffix("-unsigned").unwrap_or(name);
    name.ends_with("-cloud-amd64").then_some(name)
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_taken_by_number_not_by_letter() {
        let search = "\
linux-image-6.1.0-9-cloud-amd64 - Linux 6.1 (signed)
linux-image-6.1.0-56-cloud-amd64-unsigned - Linux 6.1
linux-image-6.1.0-56-cloud-amd64 - Linux 6.1 (signed)
linux-image-6.1.0-56-cloud-amd64-dbg - Debug symbols
linux-image-6.1.0-57-rt-amd64 - Linux 6.1
";
        assert_eq!(
            newest_name(search),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(newest_name("linux-image-6.1.0-57-amd64 - Linux\n"), None);
    }

    #[test]
    fn a_backport_and_an_unsigned_package_are_understood() {
        assert_eq!(
            kernel_version("linux-image-6.12.117+deb12-cloud-amd64-unsigned"),
            Some("6.12.117+deb12-cloud-amd64")
        );
    }
}
