//! Which tables the legacy interface of iptables has here, and whether they may have changed.
//!
//! That interface tells nobody about changes. Its programs take a lock first, so a
//! lock file that is closed means that one has run; others are noticed by the
//! number and size of the rules, which the kernel tells for next to nothing.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    process::Command,
};

use inotify::{Inotify, WatchMask};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use tracing::debug;

use crate::datapath::kernel_file::KernelFile;

/// Loaded tables, one name a line. By thread, because namespaces are.
const NAMES: &str = "/proc/thread-self/net/ip_tables_names";
const LOCK: &str = "/run/xtables.lock";

/// Number and size of a table's rules.
type Extent = (String, u32, u32);

/// The tables of one network namespace.
#[derive(Debug)]
pub(super) struct LegacyTables {
    lock: Option<Inotify>,
    names: KernelFile,
    socket: Option<OwnedFd>,
}

impl LegacyTables {
    /// Of the calling thread's namespace.
    pub(super) fn new() -> Self {
        let lock = watch_lock();
        if let Err(error) = &lock {
            debug!(%error, path = LOCK, "cannot watch the lock of iptables: changes are found later");
        }
        Self {
            lock: lock.ok(),
            names: KernelFile::at(NAMES),
            socket: None,
        }
    }

    /// Becomes readable when an iptables of the legacy kind has run.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(AsFd::as_fd)
    }

    /// Has one run since this was asked last?
    pub(super) fn was_locked(&mut self) -> bool {
        let Some(lock) = &mut self.lock else {
            return false;
        };
        let mut buffer = [0; 4096];
        let mut any = false;
        while lock
            .read_events(&mut buffer)
            .is_ok_and(|mut events| events.next().is_some())
        {
            any = true;
        }
        any
    }

    /// Names and extents of the tables that exist. Asking loads no module.
    pub(super) fn extents(&mut self) -> Vec<Extent> {
        let names = self.names.read().unwrap_or_default();
        names
            .lines()
            .map(|name| {
                let (rules, bytes) = self.extent(name).unwrap_or_default();
                (name.to_owned(), rules, bytes)
            })
            .collect()
    }

    fn extent(&mut self, table: &str) -> io::Result<(u32, u32)> {
        if self.socket.is_none() {
            let raw = socket(
                AddressFamily::Inet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::Raw,
            )?;
            self.socket = Some(raw);
        }
        match &self.socket {
            Some(socket) => table_extent(socket, table),
            None => Ok((0, 0)),
        }
    }
}

/// Watches the lock file, which the first iptables would make like this.
fn watch_lock() -> io::Result<Inotify> {
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(LOCK)?;
    let inotify = Inotify::init()?;
    inotify.watches().add(LOCK, WatchMask::CLOSE)?;
    Ok(inotify)
}

/// `struct ipt_getinfo`.
#[repr(C)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    rules: u32,
    bytes: u32,
}

fn table_extent(socket: &OwnedFd, table: &str) -> io::Result<(u32, u32)> {
    const GET_INFO: libc::c_int = 64;
    let mut info = Info {
        name: [0; 32],
        valid_hooks: 0,
        hook_entry: [0; 5],
        underflow: [0; 5],
        rules: 0,
        bytes: 0,
    };
    // The last byte stays zero.
    for (to, from) in info.name[..31].iter_mut().zip(table.bytes()) {
        *to = from;
    }
    let mut length = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` bytes of `info`, a structure of plain
    // numbers that lives until the call returns; the descriptor is open.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            GET_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    match outcome {
        0 => Ok((info.rules, info.bytes)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What `iptables-legacy-save` prints.
///
/// # Errors
/// There is no such tool, or it failed.
pub(super) fn save() -> io::Result<String> {
    match run("iptables-legacy-save") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        outcome => return outcome,
    }
    // Installations with one kind only have no suffix.
    let version = Command::new("iptables").arg("--version").output()?;
    if String::from_utf8_lossy(&version.stdout).contains("nf_tables") {
        return Err(io::ErrorKind::NotFound.into());
    }
    run("iptables-save")
}

fn run(program: &str) -> io::Result<String> {
    let output = Command::new(program).env("LC_ALL", "C").output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{program} failed ({}): {}",
        output.status,
        complaint.trim()
    )))
}
