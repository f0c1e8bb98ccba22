//! What cannot be installed: rights and features of the running kernel.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::command;

/// One probe in a network and mount namespace of its own, and what its failure means.
struct Feature {
    probe: &'static str,
    without: &'static str,
}

const FEATURES: [Feature; 5] = [
    Feature {
        probe: "true",
        without: "network and mount namespaces are not allowed here: nodes and pods of the lab are namespaces",
    },
    Feature {
        probe: "mount -t bpf flannel-probe /tmp",
        without: "the BPF file system cannot be mounted: the kernel needs CONFIG_BPF_SYSCALL, and a container the right to mount",
    },
    Feature {
        probe: "ip link add probe0 type veth peer name probe1",
        without: "veth devices cannot be made: load the kernel module `veth`",
    },
    Feature {
        probe: "ip link add probe0 type bridge",
        without: "bridges cannot be made: load the kernel module `bridge`",
    },
    Feature {
        probe: "ip link add probe0 type vxlan id 1 dstport 8472",
        without: "VXLAN devices cannot be made: load the kernel module `vxlan`",
    },
];

pub(super) fn check_root() -> Result<()> {
    if !is_root() {
        bail!(
            "this needs root (namespaces, network devices, eBPF): run it as root, or with `sudo -E env PATH=\"$PATH\" cargo xtask …`"
        );
    }
    Ok(())
}

/// Root in this process, by its effective user id.
pub(super) fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| effective_user(&status) == Some("0"))
}

fn effective_user(status: &str) -> Option<&str> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1)
}

pub(super) fn check_kernel() -> Result<()> {
    for feature in &FEATURES {
        command::output(
            Command::new("unshare")
                .args(["--net", "--mount", "sh", "-c", feature.probe])
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        )
        .context(feature.without)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::effective_user;

    #[test]
    fn the_effective_user_is_the_second_number() {
        let status = "Name:\txtask\nUid:\t1000\t0\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\n";
        assert_eq!(effective_user(status), Some("0"));
        assert_eq!(effective_user("Name:\txtask\n"), None);
    }
}
