//! Finds or installs what the other verbs need; says one line for each thing it installs.

mod apt;
mod archive;
mod machine;
mod rust_src;
pub(crate) mod toolchain;

use anyhow::Result;

pub(crate) use apt::updated as apt_updated;
use toolchain::Toolchain;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Also what `cargo xtask kernels` needs (an emulator, about 150 MB).
    #[arg(long)]
    full: bool,
}

/// The verb: everything, with the machine checked as well.
pub(crate) fn run(options: &Options) -> Result<()> {
    build_tools()?;
    lab()?;
    if options.full {
        emulator()?;
    }
    println!("ready: compiler, linker, tools and kernel features are in place");
    Ok(())
}

/// What building takes.
pub(crate) fn build_tools() -> Result<Toolchain> {
    apt::install_missing(&apt::BUILD)?;
    Toolchain::find_or_install()
}

/// What running nodes and pods as namespaces takes.
pub(crate) fn lab() -> Result<()> {
    machine::check_root()?;
    apt::install_missing(&apt::LAB)?;
    machine::check_kernel()
}

/// What booting guest kernels takes.
pub(crate) fn emulator() -> Result<()> {
    apt::install_missing(&apt::EMULATOR)
}
