//! Header types that may be laid over packet bytes at any offset.

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr, vxlan::VxlanHdr};

/// A header whose every byte pattern is valid and whose alignment is 1.
///
/// # Safety
/// The implementor has no padding, no invalid values and `align_of::<Self>() == 1`.
pub unsafe trait Header: Copy {
    /// Length in bytes.
    const LEN: usize = size_of::<Self>();
}

/// Ethernet II without a VLAN tag. (The type in network-types holds its
/// EtherType as an aligned integer, so it cannot lie over arbitrary bytes.)
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Destination.
    pub destination: [u8; 6],
    /// Source.
    pub source: [u8; 6],
    /// EtherType, network order.
    pub ether_type: [u8; 2],
}

/// EtherType of IPv4.
pub const IPV4: [u8; 2] = [0x08, 0x00];
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Does a header of the protocol begin with two ports, and can its packets be of a flow?
#[must_use]
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

macro_rules! headers {
    ($($header:ty = $len:literal),*) => { $(
        const _: () = assert!(align_of::<$header>() == 1 && size_of::<$header>() == $len);
        // SAFETY: made of byte arrays only, alignment checked above.
        unsafe impl Header for $header {}
    )* };
}
headers!(
    [u8; 16] = 16,
    [u8; 64] = 64,
    Ethernet = 14,
    Ipv4Hdr = 20,
    UdpHdr = 8,
    TcpHdr = 20,
    VxlanHdr = 8
);

/// More-fragments bit and fragment offset: anything set means a fragment.
#[inline(always)]
#[must_use]
pub fn is_fragment(ip: &Ipv4Hdr) -> bool {
    ip.frags[0] & 0x3f != 0 || ip.frags[1] != 0
}

/// Multicast (224/4), reserved (240/4) or broadcast: nothing one pod owns.
#[inline(always)]
#[must_use]
pub fn is_multicast(address: [u8; 4]) -> bool {
    address[0] >= 0xe0
}

/// The flags byte of a TCP header.
#[inline(always)]
#[must_use]
pub fn tcp_flags(tcp: &TcpHdr) -> u8 {
    // SAFETY: 20 bytes of alignment 1 as checked above.
    unsafe { (&raw const *tcp).cast::<[u8; 20]>().as_ref() }.map_or(0, |bytes| bytes[13])
}

/// Length of a TCP header in bytes, options included, as its data offset says.
#[inline(always)]
#[must_use]
pub fn tcp_len(tcp: &TcpHdr) -> u32 {
    u32::from(tcp.doff()) * 4
}
