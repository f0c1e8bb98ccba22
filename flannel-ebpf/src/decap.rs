//! In from a peer: may the program deliver this packet to a local pod?
//!
//! Only known peers may deliver: the outer source is the public address of the
//! peer that owns the inner source, the VNI is ours and the inner frame is
//! addressed to our tunnel device.

use network_types::{ip::Ipv4Hdr, udp::UdpHdr, vxlan::VxlanHdr};

use crate::{
    ecn,
    encap::segment_len,
    frame::Frame,
    header::{self, Ethernet},
    layout::{DROP_FORGED, InFlow, LocalPod, NodeConfig},
    learned::{self, Hit},
    outer::INNER_IP,
    packet::Packet,
    reason::Reason,
    tables::Tables,
};

/// Everything needed to deliver one packet; nothing has been changed yet.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The pod.
    pub pod: &'a LocalPod,
    /// TTL before the hop is counted.
    pub ttl: u8,
    /// Protocol of the inner packet.
    pub protocol: u8,
    /// TOS before and after congestion marks of the outer header are carried over.
    pub tos: (u8, u8),
    /// Inner header checksum before any change.
    pub check: [u8; 2],
}

/// Offsets of the headers of a tunnel packet without options.
const OUTER_IP: usize = size_of::<Ethernet>();
const OUTER_UDP: usize = OUTER_IP + Ipv4Hdr::LEN;
const VXLAN: usize = OUTER_UDP + size_of::<UdpHdr>();
const INNER_ETHERNET: usize = VXLAN + VxlanHdr::LEN;
const _: () = assert!(INNER_IP == INNER_ETHERNET + size_of::<Ethernet>());

/// What to do with a tunnel packet that no known peer can have sent.
#[inline(always)]
fn forged(node: &NodeConfig) -> Reason {
    if node.flags & DROP_FORGED != 0 {
        Reason::InForged
    } else {
        Reason::InForgedPassed
    }
}

/// The headers of a tunnel packet of our network, addressed to us.
struct Tunnel<'f> {
    outer: &'f Ipv4Hdr,
    udp: &'f UdpHdr,
    inner: &'f Ipv4Hdr,
    inner_type: [u8; 2],
}

/// Is it a tunnel packet of our network, addressed to us?
#[inline(always)]
fn tunnel<'f, F: Frame>(frame: &'f F, node: &NodeConfig) -> Result<Tunnel<'f>, Reason> {
    let meta = frame.meta();
    // One bounds check for the whole stack of headers; shorter frames are no tunnel packets.
    let inner = frame.at::<Ipv4Hdr>(INNER_IP).ok_or(Reason::InNotTunnel)?;
    let ethernet = frame.at::<Ethernet>(0).ok_or(Reason::InNotTunnel)?;
    let outer = frame.at::<Ipv4Hdr>(OUTER_IP).ok_or(Reason::InNotTunnel)?;
    if ethernet.ether_type != header::IPV4 || meta.vlan || outer.proto != header::UDP {
        return Err(Reason::InNotTunnel);
    }
    let udp = frame.at::<UdpHdr>(OUTER_UDP).ok_or(Reason::InNotTunnel)?;
    if outer.vihl != 0x45 || header::is_fragment(outer) {
        // Whether this is our port cannot be told here.
        return Err(Reason::InOuterForm);
    }
    if udp.dst != node.port {
        return Err(Reason::InNotTunnel);
    }
    if meta.packet_type != 0 {
        return Err(Reason::InNotForHost);
    }
    if outer.dst_addr != node.vtep_addr {
        return Err(Reason::InOtherAddress);
    }
    let vxlan = frame.at::<VxlanHdr>(VXLAN).ok_or(Reason::InNotTunnel)?;
    if vxlan.flags != network_types::vxlan::VXLAN_I_FLAG_MASK
        || vxlan._reserved1 != [0; 3]
        || vxlan._reserved2 != 0
    {
        return Err(Reason::InVxlanFlags);
    }
    if vxlan.vni() != node.vni {
        return Err(Reason::InOtherVni);
    }
    let inner_ethernet = frame
        .at::<Ethernet>(INNER_ETHERNET)
        .ok_or(Reason::InMalformed)?;
    if inner_ethernet.destination != node.vtep_mac {
        return Err(Reason::InOtherVtep);
    }
    Ok(Tunnel {
        outer,
        udp,
        inner,
        inner_type: inner_ethernet.ether_type,
    })
}

/// Can a known peer have sent it?
#[inline(always)]
fn is_genuine<T: Tables>(tunnel: &Tunnel<'_>, node: &NodeConfig, tables: &T) -> Result<(), Reason> {
    if tunnel.inner_type != header::IPV4 {
        return Err(if tables.is_peer(tunnel.outer.src_addr) {
            Reason::InNotIpv4
        } else {
            forged(node)
        });
    }
    match tables.remote(tunnel.inner.src_addr) {
        Some(remote) if remote.node == tunnel.outer.src_addr && remote.vni == node.vni => Ok(()),
        Some(_) => Err(forged(node)),
        None if tables.is_peer(tunnel.outer.src_addr) => Err(Reason::InSourceUnknown),
        None => Err(forged(node)),
    }
}

/// Do the lengths of all headers agree?
#[inline(always)]
fn is_whole(tunnel: &Tunnel<'_>, len: u32) -> bool {
    u32::from(tunnel.outer.tot_len()) + OUTER_IP as u32 == len
        && u32::from(u16::from_be_bytes(tunnel.udp.len)) + OUTER_UDP as u32 == len
        && u32::from(tunnel.inner.tot_len()) + INNER_IP as u32 == len
}

/// What becomes of a packet from the uplink where ways are learned.
#[derive(Clone, Copy, Debug)]
pub enum Arrive<'a> {
    /// Its flow has an entry. With the packet comes the inner TOS byte afterwards.
    Known(Hit<'a, InFlow>, Packet, u8),
    /// Genuine, but no verdict carries it; TCP may be of an own connection. (Without the packet:
    /// in two places of one enum it would be copied in pieces that the verifier refuses.)
    Unknown,
    /// The stack has it, or it is forged.
    Kernel(Reason),
}

/// Decides on a packet that came in by the uplink, where ways are learned, without changing it.
#[inline(always)]
pub fn arrive<'a, F: Frame, T: Tables>(frame: &F, tables: &'a T, node: &NodeConfig) -> Arrive<'a> {
    let meta = frame.meta();
    let tunnel = match tunnel(frame, node) {
        Ok(tunnel) => tunnel,
        Err(reason) => return Arrive::Kernel(reason),
    };
    if tunnel.inner_type == header::IPV4
        && let Some(packet) = Packet::read(frame, INNER_IP)
        && let Some(flow) = tables.flow_in(&packet.key)
        // Only its peer may use a flow's entry; whoever else says so is asked below who he is.
        && flow.node == tunnel.outer.src_addr
    {
        if !is_whole(&tunnel, meta.len) {
            return Arrive::Kernel(Reason::InOuterForm);
        }
        let Some(tos) = ecn::inner_tos(tunnel.outer.tos, packet.tos) else {
            return Arrive::Kernel(Reason::InEcn);
        };
        return Arrive::Known(
            learned::inbound(tables, flow, &packet, meta.gso_size),
            packet,
            tos,
        );
    }
    if let Err(reason) = is_genuine(&tunnel, node, tables) {
        return Arrive::Kernel(reason);
    }
    match Packet::read(frame, INNER_IP) {
        Some(_) => Arrive::Unknown,
        None => Arrive::Kernel(unfit(tunnel.inner)),
    }
}

/// Why the stack has a packet that nothing carries.
#[inline(always)]
#[must_use]
pub const fn unknown(packet: &Packet) -> Reason {
    if packet.is_boundary() {
        Reason::InBoundary
    } else {
        Reason::InUnlearned
    }
}

/// Why a packet is none of a flow that could be learned.
#[inline(always)]
fn unfit(inner: &Ipv4Hdr) -> Reason {
    if inner.vihl != 0x45 {
        if inner.vihl >> 4 == 4 && inner.vihl & 0xf > 5 {
            Reason::InIpOptions
        } else {
            Reason::InMalformed
        }
    } else if header::is_multicast(inner.dst_addr) {
        Reason::InMulticast
    } else if header::is_fragment(inner) {
        Reason::InFragment
    } else if !header::has_ports(inner.proto) {
        Reason::InProtocol
    } else {
        Reason::InMalformed
    }
}

/// May a packet from the uplink go to the pod that has its destination, and how? Changes nothing.
/// Whether its connection may is another question.
///
/// # Errors
/// The one reason for which the packet is not delivered here.
#[inline(always)]
pub fn deliver<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &NodeConfig,
) -> Result<Delivery<'a>, Reason> {
    inward(frame, tables, node, header::has_ports)
}

/// The same for an ICMP error.
///
/// # Errors
/// As [`deliver`].
#[inline(always)]
pub fn deliver_error<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &NodeConfig,
) -> Result<Delivery<'a>, Reason> {
    inward(frame, tables, node, |protocol| protocol == header::ICMP)
}

/// Is it a piece of a packet that a peer sent through the tunnel, as far as pieces can tell?
#[inline(always)]
pub fn is_piece<F: Frame, T: Tables>(frame: &F, tables: &T, node: &NodeConfig) -> bool {
    frame.at::<Ipv4Hdr>(OUTER_IP).is_some_and(|outer| {
        outer.proto == header::UDP
            && header::is_fragment(outer)
            && outer.dst_addr == node.vtep_addr
            && tables.is_peer(outer.src_addr)
    })
}

/// The same as [`deliver`] for a packet that the kernel has made whole of pieces and taken out of
/// the tunnel. Of the outer header nothing is left: see [`is_piece`].
///
/// # Errors
/// As [`deliver`].
#[inline(always)]
pub fn deliver_whole<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
) -> Result<Delivery<'a>, Reason> {
    let meta = frame.meta();
    let ip = frame.at::<Ipv4Hdr>(OUTER_IP).ok_or(Reason::InMalformed)?;
    if ip.vihl != 0x45 || header::is_fragment(ip) || ip.proto != header::TCP {
        return Err(unfit(ip));
    }
    tables.remote(ip.src_addr).ok_or(Reason::InSourceUnknown)?;
    let pod = tables.local_pod(ip.dst_addr).ok_or(Reason::InNotLocalPod)?;
    if ip.ttl <= 1 {
        return Err(Reason::InTtl);
    }
    if u32::from(ip.tot_len()) + OUTER_IP as u32 != meta.len {
        return Err(Reason::InMalformed);
    }
    if segment_len(frame, ip, OUTER_IP, &meta).ok_or(Reason::InMalformed)? > pod.mtu {
        return Err(Reason::InOverMtu);
    }
    Ok(Delivery {
        pod,
        ttl: ip.ttl,
        protocol: ip.proto,
        // The tunnel device has carried congestion marks over.
        tos: (ip.tos, ip.tos),
        check: ip.check,
    })
}

#[inline(always)]
fn inward<'a, F: Frame, T: Tables>(
    frame: &F,
    tables: &'a T,
    node: &NodeConfig,
    carries: impl Fn(u8) -> bool,
) -> Result<Delivery<'a>, Reason> {
    let meta = frame.meta();
    let tunnel = tunnel(frame, node)?;
    is_genuine(&tunnel, node, tables)?;
    let inner = tunnel.inner;
    if inner.vihl != 0x45 {
        return Err(unfit(inner));
    }
    if header::is_multicast(inner.dst_addr) {
        return Err(Reason::InMulticast);
    }
    let pod = tables
        .local_pod(inner.dst_addr)
        .ok_or(Reason::InNotLocalPod)?;
    if header::is_fragment(inner) {
        return Err(Reason::InFragment);
    }
    if !carries(inner.proto) {
        return Err(Reason::InProtocol);
    }
    if meta.gso_size != 0 && inner.proto == header::UDP {
        return Err(Reason::InUdpGso);
    }
    if inner.ttl <= 1 {
        return Err(Reason::InTtl);
    }
    if !is_whole(&tunnel, meta.len) {
        return Err(Reason::InOuterForm);
    }
    if segment_len(frame, inner, INNER_IP, &meta).ok_or(Reason::InMalformed)? > pod.mtu {
        return Err(Reason::InOverMtu);
    }
    let tos = ecn::inner_tos(tunnel.outer.tos, inner.tos).ok_or(Reason::InEcn)?;
    Ok(Delivery {
        pod,
        ttl: inner.ttl,
        protocol: inner.proto,
        tos: (inner.tos, tos),
        check: inner.check,
    })
}

impl Delivery<'_> {
    /// The inner header's new TOS, TTL and checksum: one hop further.
    #[inline(always)]
    #[must_use]
    pub fn next_hop(&self) -> (u8, u8, [u8; 2]) {
        let (ttl, check) = crate::outer::next_hop_ttl(self.ttl, self.protocol, self.check);
        let (old, new) = self.tos;
        (
            new,
            ttl,
            crate::checksum::updated(check, [0x45, old], [0x45, new]),
        )
    }
}
