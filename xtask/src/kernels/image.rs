//! The guest's file system: busybox, the programs of this host with their libraries, modules.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{modules, package::Kernel};
use crate::{command, workspace};

/// Tools of the host that the scenario calls.
const HOST_PROGRAMS: [&str; 15] = [
    "sh",
    "busybox",
    "modprobe",
    "ip",
    "tc",
    "bridge",
    "ss",
    "nsenter",
    "unshare",
    "ping",
    "traceroute",
    "tcpdump",
    "ethtool",
    "iperf3",
    "nft",
];
const OUR_PROGRAMS: [&str; 3] = ["flanneld", "flannelctl", "lab"];

/// Builds the initramfs for `kernel`, whose init runs `guest_command`.
pub(super) fn build(kernel: &Kernel, guest_command: &str) -> Result<PathBuf> {
    let staging = kernel.directory.join("initramfs");
    if staging.exists() {
        fs::remove_dir_all(&staging)?;
    }
    fs::create_dir_all(&staging)?;

    add_programs(&staging)?;
    let modules = add_modules(kernel, &staging)?;
    write(&staging, "guest-modules", &modules)?;
    write(&staging, "guest-command", guest_command)?;
    write(&staging, "init", include_str!("init.sh"))?;
    fs::set_permissions(staging.join("init"), fs::Permissions::from_mode(0o755))?;

    let initramfs = kernel.directory.join("initramfs.cpio");
    // Not compressed: reading it takes the guest less time than unpacking would.
    command::output(
        Command::new("sh")
            .args([
                "-c",
                "find . | cpio --quiet --create --format=newc > \"$0\"",
            ])
            .arg(&initramfs)
            .current_dir(&staging),
    )?;
    Ok(initramfs)
}

fn write(staging: &Path, name: &str, text: &str) -> Result<()> {
    fs::write(staging.join(name), text).with_context(|| format!("cannot write the guest's {name}"))
}

fn add_programs(staging: &Path) -> Result<()> {
    let mut files = BTreeSet::new();
    for name in HOST_PROGRAMS {
        let program = command::find(name)
            .with_context(|| format!("the guest needs {name}, which is missing here"))?;
        let inside = Path::new("/usr/bin").join(name);
        copy(&program, staging, &inside)?;
        files.extend(libraries(&program)?);
    }
    for name in OUR_PROGRAMS {
        let program = workspace::release_binary(name);
        // A lab of one's own making (`--command`) may do without some of them.
        if program.is_file() {
            copy(&program, staging, &Path::new("/usr/bin").join(name))?;
            files.extend(libraries(&program)?);
        }
    }
    for library in files {
        copy(&library, staging, &library)?;
    }
    // The kernel calls it by this name to load modules on demand.
    fs::create_dir_all(staging.join("sbin"))?;
    std::os::unix::fs::symlink("/usr/bin/modprobe", staging.join("sbin/modprobe"))?;
    fs::create_dir_all(staging.join("bin"))?;
    Ok(())
}

/// Copies the modules we want; answers their names, those a kernel has built in included.
fn add_modules(kernel: &Kernel, staging: &Path) -> Result<String> {
    let inside = Path::new("/lib/modules").join(&kernel.version);
    let modules_dep = fs::read_to_string(kernel.modules().join("modules.dep"))?;
    for module in modules::with_dependencies(&modules_dep, &modules::WANTED) {
        copy(
            &kernel.modules().join(module),
            staging,
            &inside.join(module),
        )?;
    }
    for entry in fs::read_dir(kernel.modules())?.flatten() {
        if entry.file_type()?.is_file() {
            copy(&entry.path(), staging, &inside.join(entry.file_name()))?;
        }
    }
    Ok(modules::WANTED.join("\n"))
}

fn copy(from: &Path, staging: &Path, inside: &Path) -> Result<()> {
    let to = staging.join(inside.strip_prefix("/").unwrap_or(inside));
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::copy(from, &to)
        .map(drop)
        .with_context(|| format!("cannot copy {} into the guest", from.display()))
}

/// The shared libraries and the loader of `program`; none for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let answer = Command::new("ldd")
        .arg(program)
        .stderr(Stdio::null())
        .output()
        .context("cannot run ldd")?;
    let answer = String::from_utf8_lossy(&answer.stdout);
    if answer.contains("not found") {
        bail!("{} lacks a library: {answer}", program.display());
    }
    Ok(library_paths(&answer))
}

/// From lines such as `libc.so.6 => /lib/…/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library_paths(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .filter(|path| !path.ends_with(':'))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                   \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            library_paths(ldd),
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2"),
            ]
        );
        assert!(library_paths("\tnot a dynamic executable\n").is_empty());
    }
}
