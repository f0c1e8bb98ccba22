//! Carrying own connections.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::{
    decap, encap,
    frame::Frame as _,
    header,
    layout::{Class, FlowKey, LocalPod, NodeConfig, OwnFlow, generation_slot},
    outer::INNER_IP,
    own::{
        self, Meeting, Segment,
        class::{self, Now, Standing},
        opening, quoted as quotation,
    },
    packet::{FIN, Packet, RST},
    reason::Reason,
    sighting::Way,
    tables::Tables as _,
};
use network_types::{ip::Ipv4Hdr, tcp::TcpHdr};

use super::{
    ETHERNET, apply, counters,
    maps::{self, KernelTables},
    wire::Wire,
};

/// What became of a TCP packet without a verdict.
pub(super) enum Own {
    /// It was sent on.
    Carried((Reason, i32)),
    /// It is an own connection's, but the stack has to have it.
    Kernel(Reason),
    /// A SYN that did not open an own connection.
    Opening,
    /// No own connection's.
    Stranger,
}

#[inline(always)]
fn segment(wire: &Wire, ip: usize, packet: &Packet) -> Option<Segment> {
    let tcp = wire.at::<TcpHdr>(ip + Ipv4Hdr::LEN)?;
    Some(Segment {
        flags: packet.tcp_flags,
        seq: packet.seq,
        ack: tcp.ack_seq,
    })
}

/// A packet that a pod sent.
#[inline(always)]
pub(super) fn out(context: &TcContext, wire: &Wire, node: &NodeConfig, packet: &Packet) -> Own {
    let entry = maps::own(&packet.key);
    let is_opening = own::is_opening(packet.tcp_flags);
    if entry.is_none() && !is_opening {
        return Own::Stranger;
    }
    if is_opening && !opening::is_wanted(node) {
        return refused(entry);
    }
    let way = match encap::encapsulate(wire, &KernelTables, node) {
        Ok(way) => way,
        Err(_) if is_opening => return refused(entry),
        Err(reason) => return recalled(entry, reason),
    };
    if let Err(answer) = admit(
        wire,
        node,
        way.pod,
        packet,
        &packet.key,
        Way::Out,
        ETHERNET,
        entry,
    ) {
        return answer;
    }
    Own::Carried(apply::send(context, &way))
}

/// A packet that a peer sent, and a genuine one.
#[inline(always)]
pub(super) fn inward(context: &TcContext, wire: &Wire, node: &NodeConfig, packet: &Packet) -> Own {
    let key = packet.key.reversed();
    let entry = maps::own(&key);
    let is_opening = own::is_opening(packet.tcp_flags);
    if entry.is_none() && !is_opening {
        return Own::Stranger;
    }
    if is_opening && !opening::is_wanted(node) {
        return refused(entry);
    }
    let way = match decap::deliver(wire, &KernelTables, node) {
        Ok(way) => way,
        Err(_) if is_opening => return refused(entry),
        Err(reason) => return recalled(entry, reason),
    };
    if let Err(answer) = admit(wire, node, way.pod, packet, &key, Way::In, INNER_IP, entry) {
        return answer;
    }
    Own::Carried(apply::deliver(context, &way))
}

/// A SYN that takes the stack.
#[inline(always)]
fn refused(entry: Option<*mut OwnFlow>) -> Own {
    if let Some(entry) = entry {
        // SAFETY: a map's value; single bytes, which nobody sets back.
        unsafe { own::leave_to_kernel(&mut *entry) };
    }
    Own::Opening
}

/// A packet of an own connection that only the stack can carry.
#[inline(always)]
fn recalled(entry: Option<*mut OwnFlow>, reason: Reason) -> Own {
    if let Some(entry) = entry {
        // SAFETY: a map's value; a single byte, which nobody sets back.
        unsafe { (*entry).recalled = 1 };
        counters::count(Reason::OwnRecalled, 0);
    }
    Own::Kernel(reason)
}

/// Lets the packet into its connection's entry, or a SYN make one. `key` is as the pod sends it.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined: no call is made")]
fn admit(
    wire: &Wire,
    node: &NodeConfig,
    pod: &LocalPod,
    packet: &Packet,
    key: &FlowKey,
    way: Way,
    ip: usize,
    entry: Option<*mut OwnFlow>,
) -> Result<(), Own> {
    let now = maps::jiffies();
    if !own::is_opening(packet.tcp_flags) {
        let (Some(entry), Some(segment)) = (entry, segment(wire, ip, packet)) else {
            return Err(Own::Stranger);
        };
        // SAFETY: a map's value that only the agent deletes, long after its last packet; each end
        // writes its own bytes.
        let flow = unsafe { &mut *entry };
        let before = own::is_settled(flow);
        if !own::advance(flow, way, segment, now) {
            return Err(Own::Stranger);
        }
        // The agent may have taken the entry out since it was found: conntrack has the connection,
        // and would never hear of its end.
        if packet.tcp_flags & (FIN | RST) != 0 && maps::own(key).is_none() {
            return Err(Own::Stranger);
        }
        if !before && own::is_settled(flow) && opening::needs_class(node) {
            let opener = own::opener(flow.opener);
            if let Some(class) = maps::class(&opening::class(key, opener)) {
                // SAFETY: a map's value; a lost count is found again.
                unsafe { class::settles(&mut *class) };
            }
        }
        return Ok(());
    }
    // SAFETY: as above.
    if entry.is_some_and(|entry| own::crosses(unsafe { &*entry }, way)) {
        return Ok(());
    }
    let len = wire.meta().len;
    if let Err(reason) = opening::may_open(&KernelTables, node, pod, key, way) {
        counters::count(reason, len);
        return Err(refused(entry));
    }
    let epoch = KernelTables.epoch();
    // Null for none: beside an Option's tag older verifiers (Linux 6.1) lose what it points to.
    let class = if opening::needs_class(node) {
        match ask_class(packet, key, way, now) {
            Ok(class) => class,
            Err(reason) => {
                counters::count(reason, len);
                return Err(refused(entry));
            }
        }
    } else {
        core::ptr::null_mut()
    };
    let opens = || {
        counters::count(Reason::OwnOpened, len);
        if !class.is_null() {
            // SAFETY: a map's value; a lost count is found again.
            unsafe { class::opens(&mut *class, &epoch, now) };
        }
    };
    let flow = own::opened(way, now);
    let Some(entry) = entry else {
        if maps::open(key, &flow) {
            opens();
            return Ok(());
        }
        counters::count(Reason::OwnFull, len);
        return Err(Own::Opening);
    };
    // SAFETY: as above.
    match unsafe { own::meets(&*entry, epoch.own_expired) } {
        Meeting::Reopens => {
            // SAFETY: as above.
            unsafe { *entry = flow };
            opens();
            Ok(())
        }
        Meeting::Passes => Ok(()),
        Meeting::Refused => {
            counters::count(Reason::OwnEnding, len);
            Err(refused(Some(entry)))
        }
    }
}

/// May a SYN of this class open a connection? If so, the class.
#[inline(always)]
fn ask_class(packet: &Packet, key: &FlowKey, way: Way, now: u32) -> Result<*mut Class, Reason> {
    let entry = maps::class(&opening::class(key, way)).ok_or(Reason::OwnNoClass)?;
    let peer = KernelTables.remote(key.dst).ok_or(Reason::OwnNoClass)?;
    let now = Now {
        jiffies: now,
        pod: KernelTables.generation(generation_slot(key.src)),
        peer: KernelTables.generation(generation_slot(peer.node)),
    };
    // SAFETY: a map's value; the agent deletes only what was long unused.
    let class = unsafe { &mut *entry };
    match class::standing(class, &KernelTables.epoch(), &now, packet.tos & 0xfc)? {
        Standing::Open => Ok(entry),
        Standing::Ask => {
            class.pending = 1;
            Err(Reason::OwnProbe)
        }
    }
}

/// An ICMP error that a pod sent about an own connection: conntrack would call it INVALID.
#[inline(always)]
pub(super) fn complained(
    context: &TcContext,
    wire: &Wire,
    node: &NodeConfig,
) -> Option<(Reason, i32)> {
    let quotation = quotation::read(wire, ETHERNET)?;
    recall(&quotation.flow.reversed(), wire.meta().len)?;
    if quotation.sender != quotation.flow.dst {
        return None;
    }
    let way = encap::encapsulate_error(wire, &KernelTables, node).ok()?;
    Some(apply::send(context, &way))
}

/// One that came from the peer's node.
#[inline(always)]
pub(super) fn complained_of(
    context: &TcContext,
    wire: &Wire,
    node: &NodeConfig,
) -> Option<(Reason, i32)> {
    let quotation = quotation::read(wire, INNER_IP)?;
    recall(&quotation.flow, wire.meta().len)?;
    let peer = KernelTables.remote(quotation.flow.dst)?;
    if KernelTables.remote(quotation.sender)?.node != peer.node {
        return None;
    }
    let way = decap::deliver_error(wire, &KernelTables, node).ok()?;
    Some(apply::deliver(context, &way))
}

/// Hands over the connection that an ICMP error speaks of, if it is an own one; what comes later is
/// for conntrack to judge.
#[inline(always)]
fn recall(key: &FlowKey, len: u32) -> Option<()> {
    let entry = maps::own(key)?;
    // SAFETY: a map's value; a single byte, which nobody sets back.
    unsafe {
        if (*entry).taken != 0 {
            return None;
        }
        (*entry).recalled = 1;
    }
    counters::count(Reason::OwnQuoted, len);
    Some(())
}

/// A packet that came in pieces and that the kernel has made whole and taken out of the tunnel.
#[inline(always)]
pub(super) fn whole(context: &TcContext, wire: &Wire, node: &NodeConfig) -> Option<i32> {
    let packet = Packet::read(wire, ETHERNET)?;
    if packet.key.protocol != header::TCP || own::is_opening(packet.tcp_flags) {
        return None;
    }
    let key = packet.key.reversed();
    let entry = maps::own(&key)?;
    let way = decap::deliver_whole(wire, &KernelTables).ok()?;
    let len = wire.meta().len;
    admit(
        wire,
        node,
        way.pod,
        &packet,
        &key,
        Way::In,
        ETHERNET,
        Some(entry),
    )
    .ok()?;
    let (reason, verdict) = apply::hand_in(context, &way);
    counters::count(reason, len);
    Some(verdict)
}
