//! Carrying out a decision. Every step that can fail comes before the first
//! change, so that a refusal leaves the packet to the kernel as it was.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
    },
    helpers::{
        bpf_clone_redirect, bpf_csum_level, bpf_get_hash_recalc, bpf_l4_csum_replace, bpf_redirect,
        bpf_redirect_neigh, bpf_redirect_peer,
    },
    programs::TcContext,
};
use flannel_ebpf::{
    decap::Delivery,
    encap::Encapsulation,
    frame::Frame as _,
    hash,
    header::{self, Ethernet, IPV4},
    layout::{FlowKey, InFlow, LocalPod, OutFlow, TEMPLATE_LEN, Verdict},
    learned,
    outer::{INNER_IP, OVERHEAD, Outer, next_hop_ttl},
    packet::{Packet, furthest},
    reason::Reason,
};
use network_types::tcp::TcpHdr;

use super::{
    DROP, NEXT, maps,
    wire::{self, Wire},
};

/// Length of the inner Ethernet header alone: with the VXLAN header counted in,
/// segmentation of large TCP packets fails (the kernel wants 16 bytes between
/// the outer transport header and the inner MAC header).
const ENCAP_L2: u64 = (size_of::<Ethernet>() as u64) << 56;

const GROW: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
    | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64
    | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
    | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
    | ENCAP_L2;
const SHRINK: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64 | BPF_F_ADJ_ROOM_NO_CSUM_RESET as u64;

/// `BPF_F_PSEUDO_HDR`, `BPF_F_MARK_MANGLED_0` and `BPF_F_INGRESS`.
const PSEUDO_HEADER: u64 = 1 << 4;
const ZERO_STAYS_ZERO: u64 = 1 << 5;
const INGRESS: u64 = 1;

/// `BPF_CSUM_LEVEL_DEC`.
const CSUM_LEVEL_DEC: u64 = 2;
/// `AF_INET`.
const AF_INET: u32 = 2;

/// Offset of the IP header that follows the first Ethernet header.
const IP: usize = size_of::<Ethernet>();

/// Encapsulates and hands to the uplink; the kernel resolves the next hop's MAC.
#[inline(always)]
pub(super) fn send(context: &TcContext, way: &Encapsulation<'_>) -> (Reason, i32) {
    // SAFETY: the context is valid; the helper only reads the packet.
    let hash = unsafe { bpf_get_hash_recalc(context.as_ptr().cast()) };
    let outer = Outer::new(way, hash, maps::take_idents(wire::segments(context)));
    let (ttl, check) = next_hop_ttl(way.ttl, way.protocol, way.check);
    let mut next_hop = bpf_redir_neigh {
        nh_family: AF_INET,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
            ipv4_nh: u32::from_ne_bytes(way.remote.next_hop),
        },
    };
    let uplink = way.node.uplink;

    if context
        .adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, GROW)
        .is_err()
    {
        return (Reason::OutNoRoom, NEXT);
    }
    let Some(headers) = wire::writable::<{ OVERHEAD + 20 }>(context, IP) else {
        return (Reason::OutLost, DROP);
    };
    // SAFETY: `OVERHEAD + 20` writable bytes: the new headers and the inner IP header.
    unsafe {
        headers.cast::<Outer>().write_unaligned(outer);
        (*headers)[OVERHEAD + 8] = ttl;
        (*headers)[OVERHEAD + 10] = check[0];
        (*headers)[OVERHEAD + 11] = check[1];
    }
    wire::set_sign(context, wire::sign::BYPASSED);
    // SAFETY: the parameters live on the stack for the call, their size is the struct's.
    let verdict = unsafe {
        bpf_redirect_neigh(
            uplink,
            &raw mut next_hop,
            size_of::<bpf_redir_neigh>() as i32,
            0,
        )
    };
    (Reason::Encapsulated, verdict as i32)
}

/// Takes the outer headers off and puts the packet into the pod's namespace.
#[inline(always)]
pub(super) fn deliver(context: &TcContext, way: &Delivery<'_>) -> (Reason, i32) {
    let next = way.next_hop();

    if context
        .adjust_room(-(OVERHEAD as i32), BPF_ADJ_ROOM_MAC, SHRINK)
        .is_err()
    {
        return (Reason::InNoRoom, NEXT);
    }
    // The tunnel device would have spent one checksum level, also for a zero outer checksum.
    // SAFETY: the context is valid. A packet without a verified checksum has no level to spend: ignored.
    let _ = unsafe { bpf_csum_level(context.as_ptr().cast(), CSUM_LEVEL_DEC) };
    into_pod(context, way.pod, next, Reason::Decapsulated).unwrap_or((Reason::InLost, DROP))
}

/// Puts a packet that the kernel has taken out of the tunnel into the pod's namespace.
#[inline(always)]
pub(super) fn hand_in(context: &TcContext, way: &Delivery<'_>) -> (Reason, i32) {
    into_pod(context, way.pod, way.next_hop(), Reason::OwnWhole)
        .unwrap_or((Reason::InMalformed, NEXT))
}

/// Writes the headers of the hop into the pod to a plain packet and puts it there: TOS, TTL and
/// header checksum as of [`Delivery::next_hop`]. Nothing is changed if there is no room to write.
#[inline(always)]
fn into_pod(
    context: &TcContext,
    pod: &LocalPod,
    (tos, ttl, check): (u8, u8, [u8; 2]),
    done: Reason,
) -> Option<(Reason, i32)> {
    let pod = *pod;
    let headers = wire::writable::<{ IP + 20 }>(context, 0)?;
    // SAFETY: an Ethernet and an IPv4 header's worth of writable bytes.
    unsafe {
        headers.cast::<Ethernet>().write_unaligned(Ethernet {
            destination: pod.mac,
            source: pod.gateway_mac,
            ether_type: IPV4,
        });
        (*headers)[IP + 1] = tos;
        (*headers)[IP + 8] = ttl;
        (*headers)[IP + 10] = check[0];
        (*headers)[IP + 11] = check[1];
    }
    // SAFETY: a helper without memory arguments.
    let verdict = unsafe { bpf_redirect_peer(pod.ifindex, 0) };
    Some((done, verdict as i32))
}

/// Where the far end of a flow stands in a packet.
#[derive(Clone, Copy)]
enum FarEnd {
    Destination,
    Source,
}

/// Writes the far end's new address and port; the checksum of TCP or UDP follows it, whether it
/// is whole, still to be finished by the device, or absent. `ip` is the offset of the IP header.
#[inline(always)]
fn translate(
    context: &TcContext,
    ip: usize,
    key: &FlowKey,
    verdict: &Verdict,
    far: FarEnd,
) -> Result<(), ()> {
    let l4 = ip + 20;
    let (check, flags) = if key.protocol == header::TCP {
        (l4 + 16, 0)
    } else {
        (l4 + 6, ZERO_STAYS_ZERO)
    };
    let (address, port, old_address, old_port) = match far {
        FarEnd::Destination => (ip + 16, l4 + 2, key.dst, key.dport),
        FarEnd::Source => (ip + 12, l4, key.src, key.sport),
    };
    let Some(bytes) = wire::writable::<4>(context, address) else {
        return Err(());
    };
    // SAFETY: four writable bytes.
    unsafe { *bytes = verdict.far };
    let Some(bytes) = wire::writable::<2>(context, port) else {
        return Err(());
    };
    // SAFETY: two writable bytes.
    unsafe { *bytes = verdict.far_port };
    let words = |bytes| u64::from(u32::from_ne_bytes(bytes));
    let halves = |bytes| u64::from(u16::from_ne_bytes(bytes));
    // SAFETY: helpers without memory arguments.
    let failed = unsafe {
        bpf_l4_csum_replace(
            context.as_ptr().cast(),
            check as u32,
            words(old_address),
            words(verdict.far),
            flags | PSEUDO_HEADER | 4,
        ) != 0
            || bpf_l4_csum_replace(
                context.as_ptr().cast(),
                check as u32,
                halves(old_port),
                halves(verdict.far_port),
                flags | 2,
            ) != 0
    };
    if failed { Err(()) } else { Ok(()) }
}

/// One more packet that bypassed the stack; `ip` is the offset of its IP header, `ack` where the
/// entry holds how far the direction has acknowledged.
#[inline(always)]
fn tally(context: &TcContext, ip: usize, verdict: &Verdict, ack: &[u8; 4], packet: &Packet) {
    // SAFETY: a map's value. Two CPUs at once may lose a count, which nothing depends on. Volatile,
    // because others change the value as well: the reference alone would say nobody does.
    unsafe {
        let packets = (&raw const verdict.packets).cast_mut();
        packets.write_volatile(packets.read_volatile().wrapping_add(1));
    }
    if packet.key.protocol == header::TCP {
        reach(&verdict.end, packet.end());
        if let Some(tcp) = Wire::new(context).at::<TcpHdr>(ip + 20) {
            reach(ack, tcp.ack_seq);
        }
    }
}

/// Notes in an entry how far data, or its acknowledgement, has come.
#[inline(always)]
fn reach(place: &[u8; 4], told: [u8; 4]) {
    let place = (&raw const *place).cast_mut().cast::<u32>();
    // SAFETY: four aligned bytes of a map's value. Of two CPUs at once one may be lost: the next
    // packet says it again. Volatile as in `tally`.
    unsafe {
        let known = place.read_volatile().to_ne_bytes();
        place.write_volatile(u32::from_ne_bytes(furthest(known, told)));
    }
}

/// Sends a packet the way that the stack has sent its flow's packets.
#[inline(always)]
pub(super) fn send_learned(context: &TcContext, entry: &OutFlow, packet: &Packet) -> (Reason, i32) {
    let headers = learned::outer_headers(entry, packet, maps::take_idents(wire::segments(context)));
    let (ttl, check) = learned::next_hop(&entry.verdict, packet, packet.tos);
    let verdict = entry.verdict;
    let (uplink, mark, priority) = (entry.uplink, entry.mark, entry.priority);
    // Only now is it certain that all of this was one flow's.
    if verdict.tag != hash::tag(&packet.key) || entry.tag != verdict.tag {
        return (Reason::OutUnlearned, NEXT);
    }
    tally(context, IP, &entry.verdict, &entry.ack, packet);

    if context
        .adjust_room(OVERHEAD as i32, BPF_ADJ_ROOM_MAC, GROW)
        .is_err()
    {
        return (Reason::OutNoRoom, NEXT);
    }
    let Some(bytes) = wire::writable::<{ TEMPLATE_LEN + 20 }>(context, 0) else {
        return (Reason::OutLost, DROP);
    };
    // SAFETY: `TEMPLATE_LEN + 20` writable bytes: the new headers and the inner IP header.
    unsafe {
        bytes.cast::<[u8; TEMPLATE_LEN]>().write_unaligned(headers);
        (*bytes)[TEMPLATE_LEN + 8] = ttl;
        (*bytes)[TEMPLATE_LEN + 10] = check[0];
        (*bytes)[TEMPLATE_LEN + 11] = check[1];
    }
    if verdict.translated != 0
        && translate(
            context,
            TEMPLATE_LEN,
            &packet.key,
            &verdict,
            FarEnd::Destination,
        )
        .is_err()
    {
        return (Reason::OutLost, DROP);
    }
    wire::set_mark_and_priority(context, mark, priority);
    wire::set_sign(context, wire::sign::BYPASSED);
    // SAFETY: a helper without memory arguments.
    let answer = unsafe { bpf_redirect(uplink, 0) };
    (Reason::Encapsulated, answer as i32)
}

/// A packet of the flow is on its way to ask the stack.
#[inline(always)]
pub(super) fn asked(verdict: &Verdict) {
    // SAFETY: a map's value; whichever CPU asks last is fine. Volatile as in `tally`.
    unsafe {
        (&raw const verdict.probed)
            .cast_mut()
            .write_volatile(maps::jiffies());
    }
}

/// Lets a copy of a packet that came in by the uplink come in once more, to ask the stack.
///
/// The packet itself must not go there: it would queue behind the tunnel device while the ones
/// after it overtake it.
#[inline(always)]
pub(super) fn ask(context: &TcContext, verdict: &Verdict, ifindex: u32) {
    asked(verdict);
    wire::set_sign(context, wire::sign::PROBE);
    // SAFETY: a helper without memory arguments. Failing to ask now, the flow asks again later.
    let _ = unsafe { bpf_clone_redirect(context.as_ptr().cast(), ifindex, INGRESS) };
    wire::set_sign(context, wire::sign::NONE);
}

/// Delivers a packet as the stack has delivered its flow's packets.
#[inline(always)]
pub(super) fn deliver_learned(
    context: &TcContext,
    entry: &InFlow,
    packet: &Packet,
    tos: u8,
) -> (Reason, i32) {
    let verdict = entry.verdict;
    let (pod, macs) = (entry.pod, entry.macs);
    if verdict.tag != hash::tag(&packet.key) || entry.tag != verdict.tag {
        return (Reason::InUnlearned, NEXT);
    }
    let (ttl, check) = learned::next_hop(&verdict, packet, tos);
    tally(context, INNER_IP, &entry.verdict, &entry.ack, packet);

    if context
        .adjust_room(-(OVERHEAD as i32), BPF_ADJ_ROOM_MAC, SHRINK)
        .is_err()
    {
        return (Reason::InNoRoom, NEXT);
    }
    // SAFETY: the context is valid; see `deliver`.
    let _ = unsafe { bpf_csum_level(context.as_ptr().cast(), CSUM_LEVEL_DEC) };
    let Some(bytes) = wire::writable::<{ IP + 20 }>(context, 0) else {
        return (Reason::InLost, DROP);
    };
    // SAFETY: an Ethernet and an IPv4 header's worth of writable bytes.
    unsafe {
        bytes.cast::<[u8; 12]>().write_unaligned(macs);
        (*bytes)[12] = IPV4[0];
        (*bytes)[13] = IPV4[1];
        (*bytes)[IP + 1] = tos;
        (*bytes)[IP + 8] = ttl;
        (*bytes)[IP + 10] = check[0];
        (*bytes)[IP + 11] = check[1];
    }
    if verdict.translated != 0
        && translate(context, IP, &packet.key, &verdict, FarEnd::Source).is_err()
    {
        return (Reason::InLost, DROP);
    }
    // The stack clears both where a packet enters another namespace.
    wire::set_mark_and_priority(context, 0, 0);
    // SAFETY: a helper without memory arguments.
    let answer = unsafe { bpf_redirect_peer(pod, 0) };
    (Reason::Decapsulated, answer as i32)
}
