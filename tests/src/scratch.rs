//! The directory of a lab on the host: leases, logs, captures. Gone afterwards.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, OnceLock},
    thread,
};

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const PREFIX: &str = "flannel-lab-";

/// Directories to remove when Ctrl-C ends the process before `Drop` can run.
static LIVE: LazyLock<Mutex<Vec<PathBuf>>> = LazyLock::new(Mutex::default);

/// Where the signal handler writes; a byte there wakes the thread that cleans up.
static WAKE: OnceLock<OwnedFd> = OnceLock::new();

/// A directory that disappears with its value, at Ctrl-C, and at the latest
/// when the next lab starts (after a SIGKILL nobody is left to remove it).
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes `/tmp/flannel-lab-<pid>-<random>`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new() -> Result<Self> {
        sweep_orphans();
        clean_up_at_signals()?;
        let path = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir()
            .context("cannot make the lab's scratch directory")?
            .keep();
        live().push(path.clone());
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        live().retain(|path| *path != self.0);
        if thread::panicking() && std::env::var_os("LAB_KEEP").is_some() {
            eprintln!("kept for inspection: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Removes directories whose lab was killed.
fn sweep_orphans() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

extern "C" fn wake(_signal: libc::c_int) {
    if let Some(fd) = WAKE.get() {
        // write(2) is async-signal-safe; a full pipe means that the thread is awake already.
        let _ = nix::unistd::write(fd.as_fd(), b"!");
    }
}

/// On SIGINT, SIGTERM or SIGHUP: remove the scratch directories and exit.
/// The namespaces go with the process, because their holders do.
fn clean_up_at_signals() -> Result<()> {
    if WAKE.get().is_some() {
        return Ok(());
    }
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    if WAKE.set(writer).is_err() {
        return Ok(()); // another thread was faster
    }
    thread::Builder::new()
        .name("lab-signals".into())
        .spawn(move || {
            let mut byte = [0];
            loop {
                match nix::unistd::read(&reader, &mut byte) {
                    Err(nix::Error::EINTR) => {}
                    _ => break,
                }
            }
            for path in live().drain(..) {
                let _ = fs::remove_dir_all(path);
            }
            std::process::exit(130);
        })
        .map_err(io::Error::other)?;
    let action = SigAction::new(
        SigHandler::Handler(wake),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only reads a OnceLock and writes one byte to a pipe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}
