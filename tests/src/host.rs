//! Is the host as clean after a lab as before?

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use anyhow::{Result, ensure};

use crate::wait;

/// What a lab must not change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState {
    /// Interfaces of the host's own network namespace.
    pub interfaces: BTreeSet<String>,
    /// Everything pinned in the host's own bpffs.
    pub pins: BTreeSet<String>,
    /// Mount points.
    pub mounts: BTreeSet<String>,
    /// Addresses, routes and forwarding of the host.
    pub forwarding: String,
}

impl HostState {
    /// Looks at the host.
    ///
    /// # Errors
    /// When /proc or /sys cannot be read.
    pub fn now() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        Ok(Self {
            interfaces: names_in("/sys/class/net")?,
            pins: names_in("/sys/fs/bpf").unwrap_or_default(),
            mounts: mounts
                .lines()
                .filter_map(|line| line.split(' ').nth(1).map(str::to_owned))
                .collect(),
            forwarding: fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?,
        })
    }
}

fn names_in(directory: &str) -> Result<BTreeSet<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Processes that live in one of these namespaces (inode numbers of `/proc/<pid>/ns`).
///
/// # Errors
/// When /proc cannot be read.
pub fn inhabitants(namespaces: &BTreeSet<u64>) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for name in names_in("/proc")? {
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        for kind in ["net", "mnt"] {
            // A process may end while it is looked at.
            let inode = fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|meta| meta.ino());
            if inode.is_ok_and(|inode| namespaces.contains(&inode)) {
                found.push(pid);
                break;
            }
        }
    }
    Ok(found)
}

/// Demands that nobody lives in the lab's namespaces any more and that its files are gone.
///
/// # Errors
/// Names what is left.
pub fn expect_deserted(namespaces: &BTreeSet<u64>, scratch: &Path) -> Result<()> {
    wait::until_true(
        "no process is left in the lab's namespaces",
        Duration::from_secs(5),
        || Ok(inhabitants(namespaces)?.is_empty()),
    )?;
    ensure!(
        !scratch.exists(),
        "the scratch directory {} is still there",
        scratch.display()
    );
    Ok(())
}

/// Demands that the host is as it was.
///
/// # Errors
/// Names the difference.
pub fn expect_unchanged(before: &HostState) -> Result<()> {
    let after = HostState::now()?;
    ensure!(
        after == *before,
        "the host is not as before: {before:?} became {after:?}"
    );
    Ok(())
}
