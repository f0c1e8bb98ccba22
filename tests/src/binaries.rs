//! Where the programs under test lie: beside the running one, or where an
//! environment variable says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The `lab` binary itself, which is also namespace holder and traffic tool (or `$LAB`).
///
/// # Errors
/// When it was not built.
pub fn lab() -> Result<PathBuf> {
    find("lab", "LAB")
}

/// The agent (or `$FLANNELD`).
///
/// # Errors
/// When it was not built.
pub fn flanneld() -> Result<PathBuf> {
    find("flanneld", "FLANNELD")
}

/// The operator's command (or `$FLANNELCTL`).
///
/// # Errors
/// When it was not built.
pub fn flannelctl() -> Result<PathBuf> {
    find("flannelctl", "FLANNELCTL")
}

/// A test lies in `target/<profile>/deps`, the binaries one directory above.
fn find(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let exe = std::env::current_exe().context("cannot tell which program this is")?;
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no {name} beside {} (build it with the same profile, or set {variable})",
                exe.parent().unwrap_or_else(|| Path::new("/")).display()
            )
        })
}
