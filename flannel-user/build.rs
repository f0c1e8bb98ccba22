//! Puts the kernel object where `flanneld` embeds it from: `OUT_DIR/flannel.o`.

use std::{env, fs, path::PathBuf};

/// Another object than the one that `cargo xtask build-ebpf` made.
const OBJECT_VARIABLE: &str = "FLANNEL_EBPF_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={OBJECT_VARIABLE}");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let object = env::var_os(OBJECT_VARIABLE).map_or_else(
        || manifest.join("../target/ebpf/flannel.o"),
        |object| manifest.join("..").join(object),
    );
    println!("cargo::rerun-if-changed={}", object.display());

    let embedded = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("flannel.o");
    if let Err(error) = fs::copy(&object, &embedded) {
        let object = object.display();
        println!(
            "cargo::error=run `cargo xtask build-ebpf` first: no kernel object {object} ({error})"
        );
    }
}
