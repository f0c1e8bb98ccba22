//! Debian packages: which are missing, and how they get here.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::machine;
use crate::command;

/// A package, and a program or file that shows that it (or an equal) is present.
pub(super) struct Package {
    name: &'static str,
    sign: &'static str,
}

const fn package(name: &'static str, sign: &'static str) -> Package {
    Package { name, sign }
}

impl Package {
    fn is_present(&self) -> bool {
        command::find(self.sign).is_some()
            || Path::new(self.sign).is_absolute() && Path::new(self.sign).exists()
    }
}

/// What building takes: the etcd client is generated from etcd's own definitions.
pub(super) const BUILD: [Package; 2] = [
    package("protobuf-compiler", "protoc"),
    package(
        "libprotobuf-dev",
        "/usr/include/google/protobuf/descriptor.proto",
    ),
];

/// What the demo and the scenarios use.
pub(super) const LAB: [Package; 15] = [
    package("etcd-server", "etcd"),
    package("iproute2", "ip"),
    package("openssl", "openssl"),
    package("iputils-ping", "ping"),
    package("traceroute", "traceroute"),
    package("tcpdump", "tcpdump"),
    package("ethtool", "ethtool"),
    package("iperf3", "iperf3"),
    package("nftables", "nft"),
    package("iptables", "iptables"),
    package("ipset", "ipset"),
    package("conntrack", "conntrack"),
    package("kmod", "modprobe"),
    package("procps", "sysctl"),
    package("util-linux", "nsenter"),
];

/// What booting a guest kernel uses.
pub(super) const EMULATOR: [Package; 4] = [
    package("qemu-system-x86", "qemu-system-x86_64"),
    package("busybox-static", "busybox"),
    package("cpio", "cpio"),
    package("kmod", "depmod"),
];

/// Installs what is not there; says which packages.
pub(super) fn install_missing(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages
        .iter()
        .filter(|package| !package.is_present())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if command::find("apt-get").is_none() {
        bail!("these are missing, and this is not Debian (no apt-get): {names}");
    }
    let by_hand = || format!("these Debian packages are missing: run `apt-get install {names}`");
    println!("installing Debian packages: {names}");
    if known(&missing) && install(&missing).is_ok() {
        return Ok(());
    }
    // Never updated, or lists so old that their versions left the mirror.
    run_as_root(&["apt-get", "update", "-qq"]).with_context(by_hand)?;
    install(&missing).with_context(by_hand)
}

fn install(packages: &[&str]) -> Result<()> {
    let mut words = vec![
        "apt-get",
        "install",
        "--yes",
        "--quiet=2",
        "--no-install-recommends",
    ];
    words.extend(packages);
    run_as_root(&words)
}

/// Runs `find` on what apt knows; while it says no, updates apt's lists once and asks again.
pub(crate) fn updated<T>(find: impl Fn() -> Result<T>) -> Result<T> {
    find().or_else(|_| {
        println!("updating apt's package lists");
        run_as_root(&["apt-get", "update", "-qq"])?;
        find()
    })
}

fn known(packages: &[&str]) -> bool {
    command::output(Command::new("apt-cache").arg("policy").args(packages))
        .is_ok_and(|answer| candidates(&answer) == packages.len())
}

/// How many of the packages in an `apt-cache policy` answer could be installed.
fn candidates(policy: &str) -> usize {
    policy
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Candidate:"))
        .filter(|version| version.trim() != "(none)")
        .count()
}

fn run_as_root(words: &[&str]) -> Result<()> {
    let prefix: &[&str] = if machine::is_root() {
        &[]
    } else {
        &["sudo", "-n"]
    };
    let words: Vec<_> = prefix.iter().chain(words).collect();
    // apt-get's chatter ("Selecting previously unselected …") goes; complaints stay.
    command::run(
        Command::new(words[0])
            .args(&words[1..])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null()),
    )
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn only_installable_packages_are_counted() {
        let policy = "cpio:\n  Installed: (none)\n  Candidate: 2.13+dfsg-7.1\n  Version table:\n\
                      ghost:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(candidates(policy), 1);
        assert_eq!(candidates(""), 0);
    }
}
