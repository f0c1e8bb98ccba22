//! TCP segments without a connection, every field the sender's choice: floods of SYNs, and what does
//! not belong into a connection that others have.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd, OwnedFd},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    be_nice, pin_to,
    raw_udp::{raw_socket, transport_checksum},
    ready, socket,
};

/// Segments in one system call.
const BATCH: usize = 64;
/// IPv4 and TCP without options.
const LENGTH: usize = 40;
const TCP: u8 = 6;
/// The ports that a flood goes through: none that a socket chooses by itself.
pub const FLOOD_PORTS: std::ops::Range<u16> = 1024..32_768;

/// A port and a sequence number, as `40000:123456`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    port: u16,
    seq: u32,
}

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (port, seq) = text.split_once(':').context("no colon")?;
        Ok(Self {
            port: port.parse()?,
            seq: seq.parse()?,
        })
    }
}

/// Arguments. Port 0 of either end stands for one that varies.
#[derive(Debug, clap::Args)]
pub struct SegmentsArgs {
    /// Source; need not be an address of the sender.
    #[arg(long)]
    from: SocketAddrV4,
    /// Destination.
    #[arg(long)]
    to: SocketAddrV4,
    /// TCP flags.
    #[arg(long)]
    flags: u8,
    /// Acknowledgement number.
    #[arg(long, default_value_t = 0)]
    ack: u32,
    /// What the varying port and the sequence number are, one segment each.
    #[arg(long, value_delimiter = ',')]
    each: Vec<Place>,
    /// Without such a list: how many, from one port after the other.
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// End after so many seconds, even if some are left.
    #[arg(long, default_value_t = f64::MAX)]
    seconds: f64,
    /// How many a second.
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// CPU to stay on.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentsReport {
    /// Segments that the kernel took.
    pub sent: u64,
    /// The time it took.
    pub seconds: f64,
}

/// Sends.
///
/// # Errors
/// Without root, or when the socket fails.
pub fn send(args: &SegmentsArgs) -> Result<SegmentsReport> {
    pin_to(args.cpu)?;
    if args.cpu.is_some() {
        // Those who share the CPU do not set the pace; what they leave is the measure.
        be_nice(-10)?;
    }
    let socket = raw_socket().context("cannot open a raw socket")?;
    // A flood does not wait for those who cannot follow.
    socket::make_roomy(&socket)?;
    let count = if args.each.is_empty() {
        args.count
    } else {
        args.each.len() as u64
    };
    // Made beforehand: a flood has no time for it.
    let segments: Vec<[u8; LENGTH]> = (0..count.min(FLOOD_PORTS.len() as u64))
        .map(|number| segment(args, place(args, number)))
        .collect();
    ready()?;
    let start = Instant::now();
    let mut report = SegmentsReport {
        sent: 0,
        seconds: 0.0,
    };
    let mut index = 0;
    while index < count && start.elapsed().as_secs_f64() < args.seconds {
        let due = start + Duration::from_secs_f64(index as f64 / args.rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // Whoever comes late has more to send at once.
        let owed = (start.elapsed().as_secs_f64() * args.rate) as u64;
        let size = (owed.max(index + 1).min(count) - index).min(BATCH as u64);
        let first = index as usize % segments.len();
        let batch = &segments[first..(first + size as usize).min(segments.len())];
        report.sent += send_all(&socket, *args.to.ip(), batch)?;
        index += batch.len() as u64;
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

fn place(args: &SegmentsArgs, number: u64) -> Place {
    let ports = FLOOD_PORTS.len() as u64;
    args.each.get(number as usize).copied().unwrap_or(Place {
        port: FLOOD_PORTS.start + (number % ports) as u16,
        seq: number as u32,
    })
}

/// How many the kernel took; it may find its queue full.
fn send_all(socket: &OwnedFd, to: Ipv4Addr, batch: &[[u8; LENGTH]]) -> Result<u64> {
    // SAFETY: all-zero bytes are a valid sockaddr_in.
    let mut name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    name.sin_family = libc::AF_INET as libc::sa_family_t;
    name.sin_addr.s_addr = u32::from(to).to_be();
    let mut parts: Vec<libc::iovec> = batch
        .iter()
        .map(|bytes| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: an all-zero mmsghdr is a valid empty one.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_name = (&raw mut name).cast();
            message.msg_hdr.msg_namelen = std::mem::size_of_val(&name) as libc::socklen_t;
            message
        })
        .collect();
    // SAFETY: every pointer refers to a live local of the stated length; the kernel only reads them.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as libc::c_uint,
            0,
        )
    };
    if let Ok(sent) = u64::try_from(sent) {
        return Ok(sent);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
        error => bail!("cannot send: {error}"),
    }
}

/// The kernel fills in the IP header's identification and checksum.
fn segment(args: &SegmentsArgs, place: Place) -> [u8; LENGTH] {
    let port = |end: SocketAddrV4| match end.port() {
        0 => place.port,
        port => port,
    };
    let mut bytes = [0; LENGTH];
    bytes[0] = 0x45;
    bytes[3] = LENGTH as u8;
    bytes[6] = 0x40;
    bytes[8] = 64;
    bytes[9] = TCP;
    bytes[12..16].copy_from_slice(&args.from.ip().octets());
    bytes[16..20].copy_from_slice(&args.to.ip().octets());
    let tcp = &mut bytes[20..];
    tcp[..2].copy_from_slice(&port(args.from).to_be_bytes());
    tcp[2..4].copy_from_slice(&port(args.to).to_be_bytes());
    tcp[4..8].copy_from_slice(&place.seq.to_be_bytes());
    tcp[8..12].copy_from_slice(&args.ack.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = args.flags;
    tcp[14..16].copy_from_slice(&1024_u16.to_be_bytes());
    let checksum = transport_checksum(TCP, (*args.from.ip(), *args.to.ip()), tcp);
    tcp[16..18].copy_from_slice(&checksum);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_whole() {
        let args = SegmentsArgs {
            from: "10.244.1.2:0".parse().expect("an address"),
            to: "10.244.2.2:80".parse().expect("an address"),
            flags: 2,
            ack: 0,
            each: vec!["40000:7".parse().expect("a place")],
            count: 0,
            seconds: f64::MAX,
            rate: 1.0,
            cpu: None,
        };
        let bytes = segment(&args, place(&args, 0));
        assert_eq!(bytes[20..24], [0x9c, 0x40, 0, 80]);
        assert_eq!(bytes[24..28], [0, 0, 0, 7]);
        let ends = (*args.from.ip(), *args.to.ip());
        assert_eq!(transport_checksum(TCP, ends, &bytes[20..]), [0; 2]);
        // Without a list, one port after the other.
        let flood = SegmentsArgs {
            each: Vec::new(),
            ..args
        };
        assert_ne!(place(&flood, 0).port, place(&flood, 1).port);
    }
}
