//! Out of a pod: may the program carry this packet to a peer, and how?

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr, vxlan::VxlanHdr};

use crate::{
    frame::{Frame, Meta},
    header::{self, Ethernet, Header},
    layout::{LocalPod, MODE_VXLAN, NodeConfig, OutFlow, POD_IN_KERNEL, RemoteSubnet},
    learned::{self, Hit},
    outer::{INNER_IP, OVERHEAD},
    packet::Packet,
    reason::Reason,
    tables::Tables,
};

/// What becomes of a packet of a pod where ways are learned.
#[derive(Clone, Copy, Debug)]
pub enum Leave<'a> {
    /// Its flow has an entry.
    Known(Hit<'a, OutFlow>, Packet),
    /// No verdict carries it: see [`ask`], for TCP after the table of own connections.
    Unknown(Packet),
    /// The stack has it.
    Kernel(Reason),
}

/// Decides on a packet that a pod sent, where ways are learned, without changing it.
#[inline(always)]
pub fn leave<'a, F: Frame, T: Tables>(frame: &F, tables: &'a T, node: &NodeConfig) -> Leave<'a> {
    let meta = frame.meta();
    let (Some(ethernet), Some(ip)) = (frame.at::<Ethernet>(0), frame.at::<Ipv4Hdr>(Ethernet::LEN))
    else {
        return Leave::Kernel(Reason::OutNotIpv4);
    };
    if meta.vlan || ethernet.ether_type != header::IPV4 {
        return Leave::Kernel(Reason::OutNotIpv4);
    }
    let Some(packet) = Packet::read(frame, Ethernet::LEN) else {
        return Leave::Kernel(unfit(ip));
    };
    if u32::from(packet.len) + Ethernet::LEN as u32 != meta.len {
        return Leave::Kernel(Reason::OutMalformed);
    }
    if let Some(flow) = tables.flow_out(&packet.key) {
        let hit = learned::out(
            tables,
            node,
            flow,
            &packet,
            ethernet,
            meta.ifindex,
            meta.gso_size,
        );
        return Leave::Known(hit, packet);
    }
    Leave::Unknown(packet)
}

/// Is a packet that no verdict carries worth a note, because the stack may show what it does with
/// its flow?
///
/// # Errors
/// Why it is not.
#[inline(always)]
pub fn ask<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    node: &NodeConfig,
    packet: &Packet,
) -> Result<(), Reason> {
    let meta = frame.meta();
    if packet.is_boundary() {
        return Err(Reason::OutBoundary);
    }
    if let Some(reason) = learned::held_out(&tables.epoch(), packet) {
        return Err(reason);
    }
    if header::is_multicast(packet.key.dst) {
        return Err(Reason::OutMulticast);
    }
    let pod = tables
        .local_pod(packet.key.src)
        .filter(|pod| pod.ifindex == meta.ifindex)
        .ok_or(Reason::OutForeignSource)?;
    if pod.flags & POD_IN_KERNEL != 0 {
        return Err(Reason::OutPodInKernel);
    }
    let ethernet = frame.at::<Ethernet>(0).ok_or(Reason::OutMalformed)?;
    if ethernet.destination != pod.gateway_mac {
        return Err(Reason::OutNotForGateway);
    }
    if packet.ttl <= 1 {
        return Err(Reason::OutTtl);
    }
    if packet.segment_len(meta.gso_size) > node.pod_mtu {
        return Err(Reason::OutOverMtu);
    }
    Ok(())
}

/// Why a packet is none of a flow that could be learned.
#[inline(always)]
fn unfit(ip: &Ipv4Hdr) -> Reason {
    if ip.vihl != 0x45 {
        if ip.vihl >> 4 == 4 && ip.vihl & 0xf > 5 {
            Reason::OutIpOptions
        } else {
            Reason::OutMalformed
        }
    } else if header::is_multicast(ip.dst_addr) {
        Reason::OutMulticast
    } else if header::is_fragment(ip) {
        Reason::OutFragment
    } else if !header::has_ports(ip.proto) {
        Reason::OutProtocol
    } else {
        Reason::OutMalformed
    }
}

/// Is it a tunnel packet of our network with IPv4 inside, as it leaves by the uplink?
#[inline(always)]
pub fn is_tunnelled<F: Frame>(frame: &F, node: &NodeConfig) -> bool {
    const IP: usize = size_of::<Ethernet>();
    let (Some(ethernet), Some(outer), Some(udp), Some(vxlan), Some(inner)) = (
        frame.at::<Ethernet>(0),
        frame.at::<Ipv4Hdr>(IP),
        frame.at::<UdpHdr>(IP + Ipv4Hdr::LEN),
        frame.at::<VxlanHdr>(IP + Ipv4Hdr::LEN + UdpHdr::LEN),
        frame.at::<Ethernet>(INNER_IP - Ethernet::LEN),
    ) else {
        return false;
    };
    !frame.meta().vlan
        && ethernet.ether_type == header::IPV4
        && outer.vihl == 0x45
        && outer.proto == header::UDP
        && !header::is_fragment(outer)
        && udp.dst == node.port
        && vxlan.vni() == node.vni
        && inner.ether_type == header::IPV4
}

/// Everything needed to send one packet on; nothing has been changed yet.
#[derive(Clone, Copy, Debug)]
pub struct Encapsulation<'a> {
    /// This node.
    pub node: &'a NodeConfig,
    /// The pod.
    pub pod: &'a LocalPod,
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

/// May a packet that a pod sent go to the peer that owns its destination, and how? Changes
/// nothing. Whether its connection may is another question.
///
/// # Errors
/// The one reason for which the packet stays with the kernel.
#[inline(always)]
pub fn encapsulate<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &'a NodeConfig,
) -> Result<Encapsulation<'a>, Reason> {
    outward(frame, tables, node, header::has_ports)
}

/// The same for an ICMP error.
///
/// # Errors
/// As [`encapsulate`].
#[inline(always)]
pub fn encapsulate_error<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &'a NodeConfig,
) -> Result<Encapsulation<'a>, Reason> {
    outward(frame, tables, node, |protocol| protocol == header::ICMP)
}

#[inline(always)]
fn outward<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &'a NodeConfig,
    carries: impl Fn(u8) -> bool,
) -> Result<Encapsulation<'a>, Reason> {
    let meta = frame.meta();
    let ethernet = frame.at::<Ethernet>(0).ok_or(Reason::OutMalformed)?;
    if meta.vlan || ethernet.ether_type != header::IPV4 {
        return Err(Reason::OutNotIpv4);
    }
    let ip = frame
        .at::<Ipv4Hdr>(Ethernet::LEN)
        .ok_or(Reason::OutMalformed)?;
    if ip.vihl != 0x45 {
        return Err(unfit(ip));
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
    if !carries(ip.proto) {
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
    if inner_len > u16::MAX - OVERHEAD as u16 {
        return Err(Reason::OutGso);
    }
    Ok(Encapsulation {
        node,
        pod,
        remote,
        inner_len,
        inner_tos: ip.tos,
        ttl: ip.ttl,
        protocol: ip.proto,
        check: ip.check,
    })
}
