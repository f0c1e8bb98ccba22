//! Waiting for many sockets at once.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

/// Events taken at once.
const BATCH: usize = 512;

/// An epoll instance; sockets are known by numbers of the caller's choice.
#[derive(Debug)]
pub struct Epoll {
    handle: OwnedFd,
}

impl Epoll {
    /// Makes one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointer is involved.
        let handle = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if handle < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the handle is new and nobody else's.
        let handle = unsafe { OwnedFd::from_raw_fd(handle) };
        Ok(Self { handle })
    }

    /// Reports `number` whenever `socket` can be read.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, socket: &impl AsRawFd, number: u64) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: number,
        };
        // SAFETY: both handles are open, and `event` outlives the call.
        let result = unsafe {
            libc::epoll_ctl(
                self.handle.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                socket.as_raw_fd(),
                &raw mut event,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Waits until a socket can be read, at most `limit`; puts the numbers into `readable`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wait(&self, limit: Duration, readable: &mut Vec<u64>) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pointer and the count describe `events`.
        let count = unsafe {
            libc::epoll_wait(
                self.handle.as_raw_fd(),
                events.as_mut_ptr(),
                BATCH as libc::c_int,
                limit,
            )
        };
        readable.clear();
        match usize::try_from(count) {
            Ok(count) => readable.extend(events[..count].iter().map(|event| event.u64)),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Allows this process as many open sockets as its hard limit says.
///
/// # Errors
/// When the kernel refuses.
pub fn allow_many_sockets() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(io::Error::from)
}
