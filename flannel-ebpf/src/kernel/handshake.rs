//! Watching the stack's answer to SYNs and to their answers.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::{
    frame::Frame as _,
    header::Ethernet,
    layout::{FAST_PATH_CLASSES, FlowKey, MODE_VXLAN, NodeConfig, Note, generation_slot},
    own::{
        self,
        class::{self, Now},
        opening,
    },
    packet::Packet,
    reason::Reason,
    sighting::{Match, Way},
    tables::Tables as _,
};
use network_types::ip::Ipv4Hdr;

use super::{
    ETHERNET,
    maps::{self, KernelTables},
    watch,
    wire::{self, Wire},
};

/// What is known of a packet that leaves the stack.
struct Passed {
    /// Its note was found, so what the stack changed is known.
    is_matched: bool,
    /// Address and port of both ends are what they were.
    is_same: bool,
    /// And nothing else was changed, and no change of rules came in between.
    counts: bool,
}

#[inline(always)]
fn passed(leaving: &Note, wire: &FlowKey, pod: u32, node: &NodeConfig, way: Way) -> Passed {
    let Some((note, outcome)) = watch::matched(leaving, node, way) else {
        return Passed {
            is_matched: false,
            is_same: false,
            counts: false,
        };
    };
    // SAFETY: a per-CPU value that nothing writes during this run.
    let note = unsafe { &*note };
    let is_same = note.key == *wire;
    Passed {
        is_matched: true,
        is_same,
        counts: outcome == Match::Same
            && is_same
            && note.generation == KernelTables.epoch().class_generation
            // On the way out the pod's own veth; on the way in the tunnel.
            && (matches!(way, Way::In) || note.ifindex == pod),
    }
}

/// A SYN of a pod, or its answer to one, at the egress of the uplink.
#[inline(always)]
pub(super) fn left(
    context: &TcContext,
    frame: &Wire,
    packet: &Packet,
    leaving: &Note,
    node: &NodeConfig,
) -> Option<Reason> {
    let pod = KernelTables.local_pod(packet.key.src)?;
    let is_syn = own::is_opening(packet.tcp_flags);
    let passed = passed(leaving, &packet.key, pod.ifindex, node, Way::Out);
    if is_syn && let Some(reason) = tuple_taken(&packet.key, passed.is_matched && passed.is_same) {
        return Some(reason);
    }
    if !passed.counts || node.flags & FAST_PATH_CLASSES == 0 {
        return None;
    }
    // The way that own connections go must be the stack's.
    let outer = frame.at::<Ipv4Hdr>(ETHERNET)?;
    let peer = KernelTables.remote(packet.key.dst)?;
    if peer.node != outer.dst_addr
        || peer.mode != MODE_VXLAN
        || frame.meta().ifindex != node.uplink
        || wire::mark_and_priority(context) != (0, 0)
    {
        return None;
    }
    tell(&packet.key, packet, Way::Out, is_syn, peer.node);
    None
}

/// A SYN of a peer, or its answer to one, at the egress of a pod's veth.
#[inline(always)]
pub(super) fn arrived(
    frame: &Wire,
    packet: &Packet,
    leaving: &Note,
    node: &NodeConfig,
) -> Option<Reason> {
    let pod = KernelTables.local_pod(packet.key.dst)?;
    if !passed(leaving, &packet.key, pod.ifindex, node, Way::In).counts {
        return None;
    }
    let ethernet = frame.at::<Ethernet>(0)?;
    let peer = KernelTables.remote(packet.key.src)?;
    if pod.ifindex != frame.meta().ifindex
        || ethernet.destination != pod.mac
        || ethernet.source != pod.gateway_mac
    {
        return None;
    }
    let is_syn = own::is_opening(packet.tcp_flags);
    tell(&packet.key.reversed(), packet, Way::In, is_syn, peer.node);
    None
}

/// Tells the class what has passed. `key` is as the pod sends it.
#[inline(always)]
fn tell(key: &FlowKey, packet: &Packet, way: Way, is_syn: bool, peer: [u8; 4]) {
    // The answer goes against the way of its SYN.
    let opener = match (way, is_syn) {
        (Way::Out, true) | (Way::In, false) => Way::Out,
        _ => Way::In,
    };
    let class_key = opening::class(key, opener);
    let generation = KernelTables.epoch().class_generation;
    let now = Now {
        jiffies: maps::jiffies(),
        pod: KernelTables.generation(generation_slot(key.src)),
        peer: KernelTables.generation(generation_slot(peer)),
    };
    let entry = maps::class(&class_key);
    if !is_syn {
        if let Some(entry) = entry {
            // SAFETY: a map's value; the agent deletes only what was long unused.
            unsafe { class::answer_passed(&mut *entry, generation, now.jiffies) };
        }
        return;
    }
    let dscp = packet.tos & 0xfc;
    // SAFETY: as above.
    let after = class::syn_passed(
        entry.map(|entry| unsafe { &*entry }),
        generation,
        &now,
        dscp,
    );
    match entry {
        // SAFETY: as above. Whichever CPU writes last, it has seen a SYN pass.
        Some(entry) => unsafe { *entry = after },
        None => maps::make_class(&class_key, &after),
    }
}

/// A SYN of a pod took the stack. If it was translated, or nobody knows whether, the kernel
/// chooses the ports of all connections of this pod to this server from now on.
#[inline(always)]
fn tuple_taken(wire: &FlowKey, is_same: bool) -> Option<Reason> {
    if !is_same {
        maps::mark_translated(&opening::class(wire, Way::Out));
    }
    let entry = maps::own(wire)?;
    // SAFETY: a map's value; single bytes, which nobody sets back.
    unsafe {
        let flow = &mut *entry;
        own::leave_to_kernel(flow);
        if !is_same && flow.taken == 0 {
            // Two live connections with one tuple on the wire. Conntrack would have given this one
            // another port, had it known the other: the agent tells it, and the SYN comes again.
            flow.clashed = 1;
            return Some(Reason::OwnClashed);
        }
    }
    None
}
