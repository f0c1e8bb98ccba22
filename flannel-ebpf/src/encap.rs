//! Out of a pod: may the program carry this packet to a peer, and how?

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr};

use crate::{
    frame::{Frame, Meta},
    header::{self, Ethernet, Header},
    layout::{FAST_PATH_DIRECT, MODE_VXLAN, NodeConfig, RemoteSubnet},
    reason::Reason,
    tables::Tables,
};

/// Everything needed to send one packet on; nothing has been changed yet.
#[derive(Clone, Copy, Debug)]
pub struct Encapsulation<'a> {
    /// This node.
    pub node: &'a NodeConfig,
    /// The peer.
    pub remote: &'a RemoteSubnet,
    /// Total length of the inner IP packet in bytes.
    pub inner_len: u16,
    /// Its TOS byte.
    pub inner_tos: u8,
    /// Its TTL before the hop is counted.
    pub ttl: u8,
    /// Its protocol.
    pub protocol: u8,
    /// Its header checksum before the hop is counted.
    pub check: [u8; 2],
}

/// Length in bytes of the longest IP packet that a packet becomes on the wire,
/// or `None` for segmentation offload of an unknown kind.
#[inline(always)]
pub(crate) fn segment_len<F: Frame>(
    frame: &F,
    ip: &Ipv4Hdr,
    ip_offset: usize,
    meta: &Meta,
) -> Option<u32> {
    if meta.gso_size == 0 {
        return Some(u32::from(ip.tot_len()));
    }
    let l4 = ip_offset + Ipv4Hdr::LEN;
    match ip.proto {
        header::TCP => {
            let tcp = frame.at::<TcpHdr>(l4)?;
            Some(<Ipv4Hdr as Header>::LEN as u32 + header::tcp_len(tcp) + meta.gso_size)
        }
        header::UDP => Some(<Ipv4Hdr as Header>::LEN as u32 + 8 + meta.gso_size),
        _ => None,
    }
}

/// Decides on a packet that a pod sent, without changing it.
///
/// # Errors
/// The one reason for which the packet stays with the kernel.
#[inline(always)]
pub fn encapsulate<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
) -> Result<Encapsulation<'a>, Reason> {
    let meta = frame.meta();
    let node = tables.node().ok_or(Reason::OutFastPathOff)?;
    if node.flags & FAST_PATH_DIRECT == 0 {
        return Err(Reason::OutFastPathOff);
    }
    let ethernet = frame.at::<Ethernet>(0).ok_or(Reason::OutMalformed)?;
    if meta.vlan || ethernet.ether_type != header::IPV4 {
        return Err(Reason::OutNotIpv4);
    }
    let ip = frame
        .at::<Ipv4Hdr>(Ethernet::LEN)
        .ok_or(Reason::OutMalformed)?;
    if ip.vihl != 0x45 {
        return Err(if ip.vihl >> 4 == 4 && ip.vihl & 0xf > 5 {
            Reason::OutIpOptions
        } else {
            Reason::OutMalformed
        });
    }
    if header::is_multicast(ip.dst_addr) {
        return Err(Reason::OutMulticast);
    }
    let remote = tables.remote(ip.dst_addr).ok_or(Reason::OutNotRemote)?;
    if remote.mode != MODE_VXLAN {
        return Err(Reason::OutPeerInKernel);
    }
    let pod = tables
        .local_pod(ip.src_addr)
        .ok_or(Reason::OutForeignSource)?;
    if pod.ifindex != meta.ifindex {
        return Err(Reason::OutForeignSource);
    }
    if ethernet.destination != pod.gateway_mac {
        return Err(Reason::OutNotForGateway);
    }
    if header::is_fragment(ip) {
        return Err(Reason::OutFragment);
    }
    if ip.proto != header::TCP && ip.proto != header::UDP {
        return Err(Reason::OutProtocol);
    }
    if ip.ttl <= 1 {
        return Err(Reason::OutTtl);
    }
    let inner_len = ip.tot_len();
    if u32::from(inner_len) + Ethernet::LEN as u32 != meta.len {
        return Err(Reason::OutMalformed);
    }
    let segment = segment_len(frame, ip, Ethernet::LEN, &meta).ok_or(Reason::OutGso)?;
    if segment > node.pod_mtu {
        return Err(Reason::OutOverMtu);
    }
    // A segmentation-offload packet may fill the 16-bit length on its own.
    if inner_len > u16::MAX - crate::outer::OVERHEAD as u16 {
        return Err(Reason::OutGso);
    }
    Ok(Encapsulation {
        node,
        remote,
        inner_len,
        inner_tos: ip.tos,
        ttl: ip.ttl,
        protocol: ip.proto,
        check: ip.check,
    })
}
