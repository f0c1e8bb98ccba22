//! Watching the stack's answer to SYNs and to their answers.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::{
    frame::Frame as _,
    handshaken::{self, End},
    hash,
    header::Ethernet,
    layout::{FAST_PATH_CLASSES, FlowKey, MODE_VXLAN, NodeConfig, Note, generation_slot},
    learn::{Arrived, Shown},
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
    /// Nothing was changed but, perhaps, address and port of the far end, and no change of rules
    /// came in between.
    is_whole: bool,
    /// The far end before.
    far: End,
}

#[inline(always)]
fn passed(leaving: &Note, wire: &FlowKey, pod: u32, node: &NodeConfig, way: Way) -> Passed {
    let Some((note, outcome)) = watch::matched(leaving, node, way) else {
        return Passed {
            is_matched: false,
            is_same: false,
            is_whole: false,
            far: ([0; 4], [0; 2]),
        };
    };
    // SAFETY: a per-CPU value that nothing writes during this run.
    let note = unsafe { &*note };
    Passed {
        is_matched: true,
        is_same: note.key == *wire,
        is_whole: outcome == Match::Same
            && note.generation == KernelTables.epoch().class_generation
            // On the way out the pod's own veth; on the way in the tunnel.
            && (matches!(way, Way::In) || note.ifindex == pod),
        far: match way {
            Way::Out => (note.key.dst, note.key.dport),
            Way::In => (note.key.src, note.key.sport),
        },
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
    if !(passed.is_whole && passed.is_same) || node.flags & FAST_PATH_CLASSES == 0 {
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
    let passed = passed(leaving, &packet.key, pod.ifindex, node, Way::In);
    if !passed.is_whole {
        return None;
    }
    let ethernet = frame.at::<Ethernet>(0)?;
    let peer = KernelTables.remote(passed.far.0)?;
    if pod.ifindex != frame.meta().ifindex
        || ethernet.destination != pod.mac
        || ethernet.source != pod.gateway_mac
    {
        return None;
    }
    let is_syn = own::is_opening(packet.tcp_flags);
    let key = packet.key.reversed();
    if !passed.is_same {
        if !is_syn {
            await_last(&key, passed.far, packet.tos & 0xfc, node);
        }
    } else if node.flags & FAST_PATH_CLASSES != 0 {
        tell(&key, packet, Way::In, is_syn, peer.node);
    }
    None
}

/// The answer to a SYN that a pod sent to a Service has come out of the stack: see [`handshaken`].
/// `key` is the connection as the pod sends it, `wire` who answered it as the tunnel knows him.
#[inline(always)]
fn await_last(key: &FlowKey, wire: End, dscp: u8, node: &NodeConfig) {
    let flow = hash::flow(key, node.seed);
    let Some(place) = maps::handshake(flow) else {
        return;
    };
    let generation = KernelTables.epoch().class_generation;
    // SAFETY: a map's value; what two CPUs write at once fits no handshake.
    unsafe { *place = handshaken::answered(flow, wire, generation, dscp) };
}

/// Is a packet that a pod sends the last of such a handshake, and does the agent let connections
/// bypass from their beginning on?
#[inline(always)]
pub(super) fn is_last(flow: u64, node: &NodeConfig) -> bool {
    if !opening::is_wanted(node) || !opening::is_open(&KernelTables.epoch(), maps::jiffies()) {
        return false;
    }
    maps::handshake(flow).is_some_and(|noted| {
        // SAFETY: a map's value; plain words.
        handshaken::is_awaited(unsafe { &*noted }, flow)
    })
}

/// A pod's packet of no known flow, `key` as the pod sent it, has come out of the stack bound for
/// `wire`. If its connection's handshake is over with that: the DSCP of the other direction.
#[inline(always)]
pub(super) fn ended(key: &FlowKey, wire: End, node: &NodeConfig) -> Option<u8> {
    let flow = hash::flow(key, node.seed);
    if !is_last(flow, node) {
        return None;
    }
    let noted = maps::handshake(flow)?;
    let generation = KernelTables.epoch().class_generation;
    // SAFETY: as in `await_last`.
    unsafe {
        if !handshaken::is_over(&*noted, flow, wire, generation) {
            return None;
        }
        // The place is free for the next one.
        (*noted).flow = 0;
        Some((*noted).dscp)
    }
}

/// Learns the way in of a connection whose handshake is over, by what the answer to its SYN has
/// shown: it was delivered as the pod's own headers say, see [`arrived`].
#[inline(always)]
pub(super) fn learn_answers(note: &Note, wire: &FlowKey, dscp: u8, now: u32) -> Result<(), Reason> {
    let pod = KernelTables
        .local_pod(note.key.src)
        .ok_or(Reason::LearnInNotPod)?;
    let (to, from) = (pod.mac, pod.gateway_mac);
    let arrived = Arrived {
        far: note.key.dst,
        far_port: note.key.dport,
        pod: pod.ifindex,
        macs: [
            to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
            from[5],
        ],
    };
    let shown = Shown {
        key: wire.reversed(),
        generation: note.generation,
        tos: dscp,
    };
    let entry = maps::scratch_in().ok_or(Reason::LearnInNoRoom)?;
    // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
    let entry = unsafe { &mut *entry };
    arrived.entry(&shown, &KernelTables, now, entry)?;
    if maps::keep_in(&shown.key, entry) {
        Ok(())
    } else {
        Err(Reason::LearnInNoRoom)
    }
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
