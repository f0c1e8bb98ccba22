//! The kernel object: hooks only. What happens to a packet is decided in the
//! library, where the host can test it; here outcomes become actions.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is a kernel object: build it with `cargo xtask build-ebpf`");
    std::process::exit(2);
}
