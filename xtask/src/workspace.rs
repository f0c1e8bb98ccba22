//! Where things are in this repository, and its cargo.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The top directory of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

/// What only this repository's tools put there; `flannel-user/build.rs` looks for the object here,
/// so it stays in the workspace whatever `CARGO_TARGET_DIR` says.
pub(crate) fn artifacts() -> PathBuf {
    root().join("target")
}

/// The kernel object that `flanneld` embeds.
pub(crate) fn kernel_object() -> PathBuf {
    artifacts().join("ebpf/flannel.o")
}

/// A binary of the release build.
pub(crate) fn release_binary(name: &str) -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(artifacts, |dir| root().join(dir));
    target.join("release").join(name)
}

/// Cargo of the toolchain that runs xtask, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}
