//! Netlink sockets of the network namespace of the thread that opens them, which they stay with.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_sys::{Socket, SocketAddr};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};
use tokio::io::unix::AsyncFd;

/// Seconds that the kernel may take for a part of its answer.
const PATIENCE: i64 = 5;

/// A netlink socket that lends its descriptor safely; `netlink_sys` gives out the raw one only.
#[derive(Debug)]
pub(crate) struct NetlinkFd(pub(crate) Socket);

impl AsFd for NetlinkFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the socket, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for NetlinkFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl NetlinkFd {
    /// Has a new socket hear the events of `groups`, of which `room` bytes may wait. It does not
    /// block.
    pub(crate) fn listening(mut socket: Socket, room: usize, groups: &[u32]) -> io::Result<Self> {
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        let socket = Self(socket);
        // Before the first event may come.
        socket.receive_buffer(room)?;
        for group in groups {
            socket.0.add_membership(*group)?;
        }
        Ok(socket)
    }

    /// A socket for questions to the kernel. It waits for answers, but not for ever.
    pub(crate) fn asking(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let socket = Self(socket);
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        Ok(socket)
    }

    /// Hands the socket, which must not block, to the tokio runtime.
    pub(crate) fn register(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: `as_raw_fd` names the descriptor that the socket owns, the same one from here
        // until the socket is dropped together with its registration.
        Ok(unsafe { AsyncFd::register(self) }?)
    }

    /// Sets the receive buffer to `bytes`, beyond `net.core.rmem_max` where `CAP_NET_ADMIN`
    /// (which every change needs as well) allows it.
    pub(crate) fn receive_buffer(&self, bytes: usize) -> io::Result<()> {
        setsockopt(self, sockopt::RcvBufForce, &bytes)
            .or_else(|_| setsockopt(self, sockopt::RcvBuf, &bytes))
            .map_err(io::Error::from)
    }
}
