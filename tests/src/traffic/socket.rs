//! What the standard library's sockets cannot do: options, ancillary data, the error queue.

use std::{
    io,
    mem::{self, MaybeUninit},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::{AsRawFd, RawFd},
    ptr,
};

use socket2::{Domain, Socket, Type};

/// `ICMP_DEST_UNREACH` and its kin as the error queue reports them.
pub const ICMP_DESTINATION_UNREACHABLE: u8 = 3;
/// `ICMP_TIME_EXCEEDED`.
pub const ICMP_TIME_EXCEEDED: u8 = 11;
/// Enough that no receiver is the reason of a loss.
const ROOMY: libc::c_int = 8 << 20;

/// A TCP socket that has its own address and port before it listens or connects.
///
/// # Errors
/// When another one has them.
pub fn tcp_from(from: SocketAddrV4) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// A listener that does not block, with room for as many as `net.core.somaxconn` lets wait; the
/// standard library's have room for 128.
///
/// # Errors
/// When another one has the port.
pub fn tcp_listener(port: u16) -> io::Result<TcpListener> {
    let socket = tcp_from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    socket.set_nonblocking(true)?;
    socket.listen(i32::from(u16::MAX))?;
    Ok(socket.into())
}

/// Sets an integer option.
///
/// # Errors
/// When the kernel refuses.
pub fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_bytes(socket, level, name, &value.to_ne_bytes())
}

/// Sets an option that is a byte string.
///
/// # Errors
/// When the kernel refuses.
pub fn set_bytes(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives a socket buffers that hold a second of any test's traffic.
///
/// # Errors
/// Without root.
pub fn make_roomy(socket: &impl AsRawFd) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOMY)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, ROOMY)
}

/// Segments that a TCP connection had to send again.
///
/// # Errors
/// When the socket is no TCP socket.
pub fn retransmissions(socket: &impl AsRawFd) -> io::Result<u32> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = mem::size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `info`, all of whose bit patterns are valid.
    let info = unsafe {
        if libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        ) != 0
        {
            return Err(io::Error::last_os_error());
        }
        info.assume_init()
    };
    Ok(info.tcpi_total_retrans)
}

/// Asks for the received header fields that [`receive`] reports.
///
/// # Errors
/// When the kernel refuses.
pub fn report_headers(socket: &UdpSocket) -> io::Result<()> {
    for option in [libc::IP_RECVTOS, libc::IP_RECVTTL, libc::IP_RECVOPTS] {
        set_option(socket, libc::IPPROTO_IP, option, 1)?;
    }
    Ok(())
}

/// A datagram and what is known of its header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Datagram {
    /// Bytes written to the buffer.
    pub length: usize,
    /// Who sent it (of an error: where it was meant to go).
    pub peer: Option<Ipv4Addr>,
    /// Type of service with the ECN bits.
    pub tos: Option<u8>,
    /// Time to live on arrival.
    pub ttl: Option<u8>,
    /// IP options; empty when there are none.
    pub options: Vec<u8>,
    /// An error that the network or the kernel reported.
    pub error: Option<NetworkError>,
}

/// One entry of the error queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkError {
    /// The errno, for instance `EMSGSIZE`.
    pub errno: i32,
    /// Came as an ICMP message (or else from this host's own stack).
    pub from_icmp: bool,
    /// ICMP type.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// With `EMSGSIZE` the MTU of the path.
    pub info: u32,
    /// Who sent the message.
    pub offender: Option<Ipv4Addr>,
}

/// Receives a datagram (`flags` 0) or an entry of the error queue (`MSG_ERRQUEUE`).
///
/// # Errors
/// `WouldBlock` when a timeout is over or nothing is queued.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8], flags: libc::c_int) -> io::Result<Datagram> {
    receive_on(socket.as_raw_fd(), buffer, flags)
}

fn receive_on(fd: RawFd, buffer: &mut [u8], flags: libc::c_int) -> io::Result<Datagram> {
    // Aligned for cmsghdr, roomy for every option asked for.
    let mut control = [0_u64; 64];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all-zero bytes are a valid sockaddr_in of no family.
    let mut name: libc::sockaddr_in = unsafe { mem::zeroed() };
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = mem::size_of_val(&name) as _;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    // SAFETY: every pointer in `message` refers to a live local of the stated length.
    let length = unsafe { libc::recvmsg(fd, &raw mut message, flags) };
    let Ok(length) = usize::try_from(length) else {
        return Err(io::Error::last_os_error());
    };
    let mut datagram = Datagram {
        length,
        peer: (libc::c_int::from(name.sin_family) == libc::AF_INET)
            .then(|| Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr))),
        ..Datagram::default()
    };
    // SAFETY: the kernel filled `control` with well-formed messages, and the
    // CMSG functions stay inside `msg_controllen`.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let start = libc::CMSG_DATA(header);
            let size = (*header).cmsg_len as usize - (start as usize - header as usize);
            let data = std::slice::from_raw_parts(start, size);
            if (*header).cmsg_level == libc::IPPROTO_IP {
                datagram.note((*header).cmsg_type, data);
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(datagram)
}

impl Datagram {
    fn note(&mut self, kind: libc::c_int, data: &[u8]) {
        match kind {
            libc::IP_TOS => self.tos = data.first().copied(),
            // An int: its low byte comes first on little-endian machines only.
            libc::IP_TTL => {
                self.ttl = data
                    .first_chunk::<4>()
                    .and_then(|bytes| u8::try_from(i32::from_ne_bytes(*bytes)).ok());
            }
            libc::IP_RECVOPTS => self.options = data.to_vec(),
            libc::IP_RECVERR => self.error = network_error(data),
            _ => {}
        }
    }
}

/// `struct sock_extended_err`, then the offender's `sockaddr_in`.
fn network_error(data: &[u8]) -> Option<NetworkError> {
    if data.len() < mem::size_of::<libc::sock_extended_err>() {
        return None;
    }
    // SAFETY: the length was checked; the type holds integers only; no alignment is assumed.
    let error: libc::sock_extended_err = unsafe { ptr::read_unaligned(data.as_ptr().cast()) };
    let offender = data
        .get(mem::size_of::<libc::sock_extended_err>()..)
        .filter(|rest| rest.len() >= 8)
        .filter(|rest| u16::from_ne_bytes([rest[0], rest[1]]) == libc::AF_INET as u16)
        .map(|rest| Ipv4Addr::new(rest[4], rest[5], rest[6], rest[7]));
    Some(NetworkError {
        errno: error.ee_errno.cast_signed(),
        from_icmp: error.ee_origin == libc::SO_EE_ORIGIN_ICMP,
        kind: error.ee_type,
        code: error.ee_code,
        info: error.ee_info,
        offender,
    })
}

/// `WouldBlock` in both spellings that a timeout has.
#[must_use]
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
