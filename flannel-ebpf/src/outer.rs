//! The headers around an encapsulated packet, as the kernel's VXLAN device makes them.
//!
//! One deliberate difference, which every VXLAN receiver accepts on IPv4
//! (RFC 7348 section 5, RFC 6935): the outer UDP checksum is zero. The
//! segmentation offload that `bpf_skb_adjust_room` sets up never fills it in.

use network_types::{ip::Ipv4Hdr, udp::UdpHdr, vxlan::VxlanHdr};

use crate::{
    checksum, ecn,
    encap::Encapsulation,
    flow,
    header::{Ethernet, IPV4, UDP},
};

/// Everything between the outer Ethernet header and the inner IP header.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Outer IPv4.
    pub ip: Ipv4Hdr,
    /// Outer UDP.
    pub udp: UdpHdr,
    /// VXLAN.
    pub vxlan: VxlanHdr,
    /// Inner Ethernet.
    pub ethernet: Ethernet,
}

/// Bytes that encapsulation adds.
pub const OVERHEAD: usize = size_of::<Outer>();
const _: () = assert!(OVERHEAD == 50 && align_of::<Outer>() == 1);

/// Offset of the inner IP header of a tunnel packet.
pub const INNER_IP: usize = size_of::<Ethernet>() + OVERHEAD;

/// The new inner TTL with its checksum: one hop further.
#[inline(always)]
#[must_use]
pub fn next_hop_ttl(ttl: u8, protocol: u8, check: [u8; 2]) -> (u8, [u8; 2]) {
    let next = ttl.wrapping_sub(1);
    (
        next,
        checksum::updated(check, [ttl, protocol], [next, protocol]),
    )
}

impl Outer {
    /// Headers for one packet. `hash` is the inner flow's, `ident` the outer IP
    /// identification (DF is clear, so it must differ between packets).
    #[inline(always)]
    #[must_use]
    pub fn new(way: &Encapsulation<'_>, hash: u32, ident: u16) -> Self {
        let node = way.node;
        let udp_len = way.inner_len + (OVERHEAD - Ipv4Hdr::LEN) as u16;
        let mut ip = Ipv4Hdr {
            vihl: 0x45,
            tos: ecn::outer_tos(way.inner_tos),
            tot_len: (way.inner_len + OVERHEAD as u16).to_be_bytes(),
            id: ident.to_be_bytes(),
            frags: [0; 2],
            ttl: node.outer_ttl,
            proto: UDP,
            check: [0; 2],
            src_addr: node.vtep_addr,
            dst_addr: way.remote.node,
        };
        // SAFETY: `Ipv4Hdr` is 20 bytes without padding, alignment 1.
        ip.check = checksum::ipv4(unsafe { &*(&raw const ip).cast::<[u8; 20]>() });
        let vni = way.remote.vni.to_be_bytes();
        Self {
            ip,
            udp: UdpHdr {
                src: flow::source_port(hash, node.source_port_min, node.source_port_span),
                dst: node.port,
                len: udp_len.to_be_bytes(),
                check: [0; 2],
            },
            vxlan: VxlanHdr {
                flags: network_types::vxlan::VXLAN_I_FLAG_MASK,
                _reserved1: [0; 3],
                vni: [vni[1], vni[2], vni[3]],
                _reserved2: 0,
            },
            ethernet: Ethernet {
                destination: way.remote.vtep_mac,
                source: node.vtep_mac,
                ether_type: IPV4,
            },
        }
    }
}
