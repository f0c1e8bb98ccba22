//! Carrying out a decision. Every step that can fail comes before the first
//! change, so that a refusal leaves the packet to the kernel as it was.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
    },
    helpers::{bpf_csum_level, bpf_get_hash_recalc, bpf_redirect_neigh, bpf_redirect_peer},
    programs::TcContext,
};
use flannel_ebpf::{
    decap::Delivery,
    encap::Encapsulation,
    header::{Ethernet, IPV4},
    outer::{OVERHEAD, Outer, next_hop_ttl},
    reason::Reason,
};

use super::{DROP, NEXT, maps, wire};

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
    let pod = *way.pod;
    let (tos, ttl, check) = way.next_hop();

    if context
        .adjust_room(-(OVERHEAD as i32), BPF_ADJ_ROOM_MAC, SHRINK)
        .is_err()
    {
        return (Reason::InNoRoom, NEXT);
    }
    // The tunnel device would have spent one checksum level, also for a zero outer checksum.
    // SAFETY: the context is valid. A packet without a verified checksum has no level to spend: ignored.
    let _ = unsafe { bpf_csum_level(context.as_ptr().cast(), CSUM_LEVEL_DEC) };
    let Some(headers) = wire::writable::<{ IP + 20 }>(context, 0) else {
        return (Reason::InLost, DROP);
    };
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
    (Reason::Decapsulated, verdict as i32)
}
