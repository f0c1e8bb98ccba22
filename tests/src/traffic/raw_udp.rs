//! UDP packets of which every header field is the sender's choice: several pods
//! can send packets that differ in nothing but the source address.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use flannel_ebpf::rows::checksum;
use serde::{Deserialize, Serialize};

use super::{datagrams, pin_to, ready};

/// Arguments. The payload is that of `udp-send`, number by number or always the same.
#[derive(Debug, clap::Args)]
pub struct RawArgs {
    /// Source; need not be an address of the sender.
    #[arg(long)]
    from: SocketAddrV4,
    /// Destination.
    #[arg(long)]
    to: SocketAddrV4,
    /// IP identification of every packet; counts up from 1 when missing.
    #[arg(long)]
    id: Option<u16>,
    /// Every packet has the payload of this number; each its own when missing.
    #[arg(long)]
    number: Option<u64>,
    /// How many; packets of one turn go out back to back.
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// Packets in one turn.
    #[arg(long, default_value_t = 8)]
    burst: u64,
    /// Turns per second.
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Bytes of payload.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU, where others' packets pass.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawReport {
    /// Packets that the kernel took.
    pub sent: u64,
    /// Packets that a rule of the sender's own node refused.
    pub refused: u64,
}

/// Sends.
///
/// # Errors
/// Without root, or when the socket fails.
pub fn send(args: &RawArgs) -> Result<RawReport> {
    pin_to(args.cpu)?;
    let socket = raw_socket().context("cannot open a raw socket")?;
    ready()?;
    let mut report = RawReport {
        sent: 0,
        refused: 0,
    };
    let start = Instant::now();
    for index in 0..args.count {
        let turn = index / args.burst.max(1);
        let due = start + Duration::from_secs_f64(turn as f64 / args.rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let id = args.id.unwrap_or((index + 1) as u16);
        let bytes = packet(args, id, args.number.unwrap_or(index));
        match send_one(&socket, *args.to.ip(), &bytes) {
            Ok(()) => report.sent += 1,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => report.refused += 1,
            Err(error) => return Err(error).context("cannot send"),
        }
    }
    Ok(report)
}

/// A socket for packets whose IP header is in them.
pub(super) fn raw_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is involved.
    let socket = unsafe {
        libc::socket(
            libc::AF_INET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::IPPROTO_RAW,
        )
    };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the handle is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn send_one(socket: &OwnedFd, to: Ipv4Addr, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid sockaddr_in.
    let mut name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    name.sin_family = libc::AF_INET as libc::sa_family_t;
    name.sin_addr.s_addr = u32::from(to).to_be();
    // SAFETY: both pointers refer to live values of the stated lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            (&raw const name).cast(),
            std::mem::size_of_val(&name) as libc::socklen_t,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// IPv4 and UDP with right checksums; the kernel fills in the header's own.
fn packet(args: &RawArgs, id: u16, number: u64) -> Vec<u8> {
    let payload = datagrams::payload(number, args.size);
    let length = (8 + payload.len()) as u16;
    let mut bytes = Vec::with_capacity(28 + payload.len());
    bytes.extend([0x45, 0]);
    bytes.extend((20 + length).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend([0x40, 0, 64, 17, 0, 0]);
    bytes.extend(args.from.ip().octets());
    bytes.extend(args.to.ip().octets());
    let mut datagram = Vec::with_capacity(length.into());
    datagram.extend(args.from.port().to_be_bytes());
    datagram.extend(args.to.port().to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let checksum = udp_checksum(*args.from.ip(), *args.to.ip(), &datagram);
    datagram[6..8].copy_from_slice(&checksum);
    bytes.extend(datagram);
    bytes
}

/// The checksum of UDP or TCP between two addresses, before UDP's own meaning of zero.
pub(super) fn transport_checksum(
    protocol: u8,
    (from, to): (Ipv4Addr, Ipv4Addr),
    segment: &[u8],
) -> [u8; 2] {
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [
        &from.octets()[..],
        &to.octets()[..],
        &[0, protocol],
        &length[..],
    ];
    checksum(&[&pseudo.concat()[..], segment].concat())
}

fn udp_checksum(from: Ipv4Addr, to: Ipv4Addr, datagram: &[u8]) -> [u8; 2] {
    match transport_checksum(17, (from, to), datagram) {
        [0, 0] => [0xff, 0xff],
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_makes_the_sum_vanish() {
        let (from, to) = (Ipv4Addr::new(10, 244, 1, 2), Ipv4Addr::new(10, 244, 2, 2));
        let mut datagram = vec![0x9c, 0x40, 0x23, 0x28, 0, 13, 0, 0, 1, 2, 3, 4, 5];
        let checksum = udp_checksum(from, to, &datagram);
        datagram[6..8].copy_from_slice(&checksum);
        // Summed over itself it is what an all-ones sum turns into.
        assert_eq!(udp_checksum(from, to, &datagram), [0xff, 0xff]);
    }
}
