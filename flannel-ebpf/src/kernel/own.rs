//! Carrying own connections.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::{
    decap,
    encap::{self, INNER_IP},
    frame::Frame as _,
    layout::{FAST_PATH_DIRECT, FlowKey, LocalPod, NodeConfig, OwnFlow},
    own::{self, Meeting, Segment, opening},
    packet::Packet,
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
fn segment(wire: &Wire, ip: usize) -> Option<Segment> {
    let tcp = wire.at::<TcpHdr>(ip + Ipv4Hdr::LEN)?;
    Some(Segment {
        flags: flannel_ebpf::header::tcp_flags(tcp),
        seq: tcp.seq,
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
    if is_opening && node.flags & FAST_PATH_DIRECT == 0 {
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
    if is_opening && node.flags & FAST_PATH_DIRECT == 0 {
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
        let (Some(entry), Some(segment)) = (entry, segment(wire, ip)) else {
            return Err(Own::Stranger);
        };
        // SAFETY: a map's value that only the agent deletes, long after its last packet; each end
        // writes its own bytes.
        return if unsafe { own::advance(&mut *entry, way, segment, now) } {
            Ok(())
        } else {
            Err(Own::Stranger)
        };
    }
    let len = wire.meta().len;
    if let Err(reason) = opening::may_open(&KernelTables, node, pod, key, way) {
        counters::count(reason, len);
        return Err(refused(entry));
    }
    let epoch = KernelTables.epoch();
    let flow = own::opened(way, epoch.generation, now);
    let Some(entry) = entry else {
        if maps::open(key, &flow) {
            counters::count(Reason::OwnOpened, len);
            return Ok(());
        }
        counters::count(Reason::OwnFull, len);
        return Err(Own::Opening);
    };
    // SAFETY: as above.
    match unsafe { own::meets(&*entry, now, epoch.own_linger) } {
        Meeting::Reopens => {
            // SAFETY: as above.
            unsafe { *entry = flow };
            counters::count(Reason::OwnOpened, len);
            Ok(())
        }
        Meeting::Passes => Ok(()),
        Meeting::Refused => {
            counters::count(Reason::OwnEnding, len);
            Err(refused(Some(entry)))
        }
    }
}
