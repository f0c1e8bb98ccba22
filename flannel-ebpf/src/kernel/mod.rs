//! The hooks.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a hook takes its context by value"
)]

mod apply;
mod counters;
mod handshake;
mod maps;
mod own;
mod slowed;
mod trace;
mod watch;
mod wire;

use aya_ebpf::{macros::classifier, programs::TcContext};
use flannel_ebpf::{
    decap::{self, Arrive},
    encap::{self, Leave},
    frame::Frame as _,
    header::{self, Ethernet},
    layout::{FAST_PATH_LEARNED, NodeConfig, Verdict},
    learned::Hit,
    outer::INNER_IP,
    own::opening,
    packet::{Packet, RST},
    reason::{Action, Reason},
    sighting::Way,
    tables::Tables as _,
};

use self::{
    maps::KernelTables,
    own::Own,
    wire::{Wire, sign},
};

/// Offset of the IP header behind the first Ethernet header.
const ETHERNET: usize = size_of::<Ethernet>();
/// `TC_ACT_UNSPEC`: the next program or filter of the hook decides, the stack at last.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`: freed.
const DROP: i32 = 2;

/// The node's config if ways are learned.
#[inline(always)]
fn learning() -> Option<&'static NodeConfig> {
    maps::node().filter(|node| node.flags & FAST_PATH_LEARNED != 0)
}

/// Ingress of a pod's host-side veth.
// A call of its own would cost 32 bytes of the 512 that Linux 6.1 allows a chain of calls.
#[inline(always)]
#[classifier]
pub(crate) fn from_pod(context: TcContext) -> i32 {
    let wire = Wire::new(&context);
    let len = wire.meta().len;
    let outcome = match learning() {
        Some(node) => leave(&context, &wire, node),
        None => Err(Reason::OutFastPathOff),
    };
    finish(&context, outcome, len)
}

/// A pod's packet that the stack has.
struct Left {
    reason: Reason,
    /// What the stack makes of it is of interest.
    note: bool,
}

/// From a pod, where ways are learned.
#[inline(always)]
fn leave(context: &TcContext, wire: &Wire, node: &NodeConfig) -> Result<(Reason, i32), Reason> {
    // A pod's own sign means nothing here.
    wire::set_sign(context, sign::NONE);
    // Each of `unknown_out` and `note` is there once: they are most of the program.
    let (packet, known) = match encap::leave(wire, &KernelTables, node) {
        Leave::Known(hit, packet) => match hit {
            Hit::Bypass { flow, probe: false } => {
                return Ok(apply::send_learned(context, flow, &packet));
            }
            // On the way out nothing queues between the two sightings: the packet itself asks.
            Hit::Bypass { flow, probe: true } => {
                apply::asked(&flow.verdict);
                (packet, Some(Reason::OutProbe))
            }
            Hit::Kernel { reason, note: true } => (packet, Some(reason)),
            Hit::Kernel { reason, .. } => return Err(reason),
            Hit::End(flow) => {
                end(Way::Out, &packet, &flow.verdict);
                (packet, None)
            }
        },
        Leave::Unknown(packet) => (packet, None),
        Leave::Kernel(reason) => {
            if reason == Reason::OutProtocol
                && let Some(outcome) = own::complained(context, wire, node)
            {
                return Ok(outcome);
            }
            return Err(reason);
        }
    };
    let left = match known {
        Some(reason) => Left { reason, note: true },
        None => match unknown_out(context, wire, node, &packet) {
            Ok(outcome) => return Ok(outcome),
            Err(left) => left,
        },
    };
    if left.note {
        watch::note(wire, ETHERNET, &packet, node, Way::Out, false);
    }
    Err(left.reason)
}

/// From a pod, and no verdict carries it.
#[inline(always)]
fn unknown_out(
    context: &TcContext,
    wire: &Wire,
    node: &NodeConfig,
    packet: &Packet,
) -> Result<(Reason, i32), Left> {
    let left = |reason, note| Err(Left { reason, note });
    if packet.key.protocol == header::TCP {
        match own::out(context, wire, node, packet) {
            Own::Carried(outcome) => return Ok(outcome),
            Own::Kernel(reason) => return left(reason, false),
            Own::Stranger | Own::Opening => {}
        }
        if packet.tcp_flags & RST != 0 {
            end_opposite(Way::Out, packet);
        }
        // What the stack makes of it tells whether the next may pass without asking, and whether
        // the kernel chooses its port.
        if packet.is_handshake() && opening::is_wanted(node) {
            return left(Reason::OutBoundary, true);
        }
    }
    match encap::ask(wire, &KernelTables, node, packet) {
        Ok(()) => left(Reason::OutUnlearned, watch::is_met(packet, node, Way::Out)),
        Err(reason) => left(reason, false),
    }
}

/// A connection ends or begins anew: both directions go back to the stack.
#[inline(always)]
fn end(way: Way, packet: &Packet, verdict: &Verdict) {
    let key = &packet.key;
    // Conntrack would compare it with an acknowledgement that may have bypassed.
    if packet.tcp_flags & RST != 0 && packet.seq == verdict.end {
        maps::tell_reset(key);
    }
    let mut opposite = key.reversed();
    match way {
        Way::Out => {
            opposite.src = verdict.far;
            opposite.sport = verdict.far_port;
            maps::forget_out(key);
            maps::forget_in(&opposite);
        }
        Way::In => {
            opposite.dst = verdict.far;
            opposite.dport = verdict.far_port;
            maps::forget_in(key);
            maps::forget_out(&opposite);
        }
    }
}

/// A RST whose own direction has not been learned: the other one goes back to the stack, unless its
/// far end is translated, which nothing here tells.
#[inline(always)]
fn end_opposite(way: Way, packet: &Packet) {
    let opposite = packet.key.reversed();
    let acknowledged = match way {
        Way::Out => KernelTables.flow_in(&opposite).map(|flow| flow.ack),
        Way::In => KernelTables.flow_out(&opposite).map(|flow| flow.ack),
    };
    let Some(acknowledged) = acknowledged else {
        return;
    };
    // What has bypassed conntrack is just what it would compare the RST with.
    if acknowledged == packet.seq {
        maps::tell_reset(&packet.key);
    }
    match way {
        Way::Out => maps::forget_in(&opposite),
        Way::In => maps::forget_out(&opposite),
    }
}

/// Ingress of the uplink.
#[classifier]
pub(crate) fn from_uplink(context: TcContext) -> i32 {
    let wire = Wire::new(&context);
    let len = wire.meta().len;
    let outcome = match learning() {
        Some(node) => arrive(&context, &wire, node),
        None => Err(Reason::InFastPathOff),
    };
    if let Err(reason) = &outcome
        && let Some(question) = watch::question(*reason)
    {
        wire.set_sign(question);
    }
    finish(&context, outcome, len)
}

/// From a peer, where ways are learned.
#[inline(always)]
fn arrive(context: &TcContext, wire: &Wire, node: &NodeConfig) -> Result<(Reason, i32), Reason> {
    if wire::sign(context) == sign::PROBE {
        return Err(Reason::InProbe);
    }
    let packet = match decap::arrive(wire, &KernelTables, node) {
        Arrive::Known(hit, packet, tos) => match hit {
            Hit::Bypass { flow, probe } => {
                if probe {
                    apply::ask(context, &flow.verdict, wire.meta().ifindex);
                }
                return Ok(apply::deliver_learned(context, flow, &packet, tos));
            }
            Hit::Kernel { reason, .. } => return Err(reason),
            Hit::End(flow) => {
                end(Way::In, &packet, &flow.verdict);
                packet
            }
        },
        Arrive::Unknown => Packet::read(wire, INNER_IP).ok_or(Reason::InMalformed)?,
        Arrive::Kernel(reason) => {
            if reason == Reason::InProtocol
                && let Some(outcome) = own::complained_of(context, wire, node)
            {
                return Ok(outcome);
            }
            if reason == Reason::InOuterForm && decap::is_piece(wire, &KernelTables, node) {
                wire.set_sign(sign::PIECE);
            }
            return Err(reason);
        }
    };
    unknown_in(context, wire, node, &packet)
}

/// From a peer, and no verdict carries it.
#[inline(always)]
fn unknown_in(
    context: &TcContext,
    wire: &Wire,
    node: &NodeConfig,
    packet: &Packet,
) -> Result<(Reason, i32), Reason> {
    if packet.key.protocol == header::TCP {
        match own::inward(context, wire, node, packet) {
            Own::Carried(outcome) => return Ok(outcome),
            Own::Kernel(reason) => return Err(reason),
            Own::Stranger | Own::Opening => {}
        }
        if packet.tcp_flags & RST != 0 {
            end_opposite(Way::In, packet);
        }
    }
    if packet.is_handshake() && opening::is_wanted(node) {
        wire.set_sign(sign::KNOWN);
    }
    Err(decap::unknown(packet))
}

/// Ingress of the tunnel device: the packet is whole again, and the stack is about to judge it.
/// The uplink's hook has said whether that is of interest.
#[classifier]
pub(crate) fn from_tunnel(context: TcContext) -> i32 {
    let question = wire::sign(&context);
    if question == sign::PIECE {
        return made_whole(&context);
    }
    if question != sign::PROBE && question != sign::KNOWN && question != sign::STRANGE {
        return NEXT;
    }
    let wire = Wire::new(&context);
    let probe = question == sign::PROBE;
    if !probe {
        wire.set_sign(sign::NONE);
    }
    if let Some(node) = learning()
        && let Some(ethernet) = wire.at::<Ethernet>(0)
        && ethernet.ether_type == flannel_ebpf::header::IPV4
        && let Some(packet) = Packet::read(&wire, ETHERNET)
        && (packet.is_handshake()
            || !packet.is_boundary()
                && (question != sign::STRANGE || watch::is_met(&packet, node, Way::In)))
    {
        watch::note(&wire, ETHERNET, &packet, node, Way::In, probe);
    }
    NEXT
}

/// A packet came in pieces, which nobody but the kernel could make whole. Conntrack does not know
/// an own connection, so the packet must not go on to it.
#[inline(always)]
fn made_whole(context: &TcContext) -> i32 {
    let wire = Wire::new(context);
    wire.set_sign(sign::NONE);
    learning()
        .and_then(|node| own::whole(context, &wire, node))
        .unwrap_or(NEXT)
}

/// Egress of a pod's host-side veth: what the stack made of a peer's packet.
#[classifier]
pub(crate) fn to_pod(context: TcContext) -> i32 {
    let sign = wire::sign(&context);
    if sign != sign::NOTED && sign != sign::PROBE {
        return NEXT;
    }
    let Some(node) = learning() else {
        return absorb(&context);
    };
    // Everything else that a pod receives is none of the tunnel's; a copy goes no further even if
    // the tunnel device was made anew meanwhile.
    if wire::ingress(&context) != node.tunnel {
        return absorb(&context);
    }
    let wire = Wire::new(&context);
    let len = wire.meta().len;
    if let Some(reason) = watch::arrived(&wire, node) {
        counters::count(reason, len);
    }
    absorb(&context)
}

/// A copy that only asked goes no further: the packet itself was delivered.
#[inline(always)]
fn absorb(context: &TcContext) -> i32 {
    if wire::sign(context) == sign::PROBE {
        DROP
    } else {
        NEXT
    }
}

/// Egress of the uplink: what the stack made of a pod's packet.
#[classifier]
pub(crate) fn to_uplink(context: TcContext) -> i32 {
    let sign = wire::sign(&context);
    if sign == sign::BYPASSED {
        wire::set_sign(&context, sign::NONE);
    }
    if sign == sign::NOTED
        && let Some(node) = learning()
    {
        let wire = Wire::new(&context);
        // Another agent's hook, of another network, may be behind ours: its packets stay signed.
        if !encap::is_tunnelled(&wire, node) {
            return NEXT;
        }
        wire::set_sign(&context, sign::NONE);
        let len = wire.meta().len;
        if let Some(reason) = watch::left(&context, &wire, node) {
            counters::count(reason, len);
            if reason.action() == Action::Dropped {
                return DROP;
            }
        }
    }
    NEXT
}

/// Tells the time that the programs go by; run by the agent through test_run.
#[classifier]
pub(crate) fn clock(_context: TcContext) -> i32 {
    maps::jiffies() as i32
}

/// Does nothing, in the place of any of the others, while an operator has switched them off.
#[classifier]
pub(crate) fn parked(_context: TcContext) -> i32 {
    NEXT
}

/// Counts the outcome once and turns it into the hook's answer.
#[inline(always)]
fn finish(context: &TcContext, outcome: Result<(Reason, i32), Reason>, len: u32) -> i32 {
    slowed::delay();
    let (reason, redirect) = match outcome {
        Ok((reason, verdict)) => (reason, verdict),
        Err(reason) => (reason, NEXT),
    };
    counters::count(reason, len);
    match reason.action() {
        Action::Forwarded => redirect,
        Action::Kernel => {
            trace::left_to_kernel(context, reason);
            NEXT
        }
        Action::Dropped => DROP,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers used are GPL-only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub(crate) static LICENSE: [u8; 4] = *b"GPL\0";
