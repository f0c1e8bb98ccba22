//! A packet of a flow whose way was learned: may it go that way, and what does
//! it look like then? Nothing is changed here.

use crate::{
    checksum, ecn, hash,
    header::{self, Ethernet},
    layout::{BYPASS_ANY, BYPASS_TCP, Epoch, InFlow, NodeConfig, OutFlow, TEMPLATE_LEN, Verdict},
    outer::OVERHEAD,
    packet::Packet,
    reason::Reason,
    tables::Tables,
    validity::{self, Now, Standing},
};

/// What a packet of a known flow meets.
#[derive(Clone, Copy, Debug)]
pub enum Hit<'a, F> {
    /// It goes the learned way; with `probe` the stack is to be asked by it or by a copy.
    Bypass {
        /// The entry.
        flow: &'a F,
        /// Time to ask.
        probe: bool,
    },
    /// The stack has it. With a note, if it can confirm the verdict.
    Kernel {
        /// Why.
        reason: Reason,
        /// Worth noting.
        note: bool,
    },
    /// It opens or ends a connection: the stack has it and the flow's entries go.
    End(&'a F),
}

/// Is the entry the packet's flow's? A table of the least recently used may give an entry away
/// while somebody looks at it.
#[inline(always)]
fn is_of(packet: &Packet, head: u32, tail: u32) -> bool {
    let tag = hash::tag(&packet.key);
    head == tag && tail == tag
}

#[inline(always)]
fn now<T: Tables>(tables: &T, epoch: Epoch, verdict: &Verdict) -> Now {
    Now {
        jiffies: tables.jiffies(),
        epoch,
        pod: tables.generation(u32::from(verdict.pod_slot)),
        peer: tables.generation(u32::from(verdict.peer_slot)),
    }
}

/// Why nothing of this kind may bypass the stack at present, if so.
#[inline(always)]
pub(crate) fn held_out(epoch: &Epoch, packet: &Packet) -> Option<Reason> {
    if epoch.flags & BYPASS_ANY == 0 {
        Some(Reason::OutHeld)
    } else if packet.key.protocol == header::TCP && epoch.flags & BYPASS_TCP == 0 {
        Some(Reason::OutConntrack)
    } else {
        None
    }
}

/// A packet of a pod whose flow has an entry.
#[inline(always)]
pub fn out<'a, T: Tables>(
    tables: &T,
    node: &NodeConfig,
    flow: &'a OutFlow,
    packet: &Packet,
    ethernet: &Ethernet,
    ifindex: u32,
    gso_size: u32,
) -> Hit<'a, OutFlow> {
    let kernel = |reason, note| Hit::Kernel { reason, note };
    if !is_of(packet, flow.verdict.tag, flow.tag) {
        return kernel(Reason::OutUnlearned, true);
    }
    if flow.ingress != ifindex {
        return kernel(Reason::OutForeignSource, false);
    }
    if ethernet.destination != flow.gateway_mac {
        return kernel(Reason::OutNotForGateway, false);
    }
    if packet.is_boundary() {
        return Hit::End(flow);
    }
    let epoch = tables.epoch();
    if let Some(reason) = held_out(&epoch, packet) {
        return kernel(reason, false);
    }
    if packet.ttl <= 1 {
        return kernel(Reason::OutTtl, false);
    }
    if packet.segment_len(gso_size) > node.pod_mtu {
        return kernel(Reason::OutOverMtu, false);
    }
    if packet.len > u16::MAX - OVERHEAD as u16 {
        return kernel(Reason::OutGso, false);
    }
    if packet.tos & 0xfc != flow.verdict.dscp {
        return kernel(Reason::OutOtherDscp, true);
    }
    match validity::standing(&flow.verdict, &now(tables, epoch, &flow.verdict)) {
        Standing::Good => Hit::Bypass { flow, probe: false },
        Standing::Probe => Hit::Bypass { flow, probe: true },
        Standing::Stale => kernel(Reason::OutStale, true),
    }
}

/// The headers before the inner IP header for one packet.
#[inline(always)]
#[must_use]
pub fn outer_headers(flow: &OutFlow, packet: &Packet, ident: u16) -> [u8; TEMPLATE_LEN] {
    let mut headers = flow.template;
    let len = packet.len + OVERHEAD as u16;
    let udp_len = (len - 20).to_be_bytes();
    let ecn = ecn::outer_tos(packet.tos);
    let sum = flow.outer_sum + u32::from(len) + u32::from(ident) + u32::from(ecn);
    let check = (!checksum::fold(sum)).to_be_bytes();
    let (len, ident) = (len.to_be_bytes(), ident.to_be_bytes());
    headers[15] |= ecn;
    headers[16] = len[0];
    headers[17] = len[1];
    headers[18] = ident[0];
    headers[19] = ident[1];
    headers[24] = check[0];
    headers[25] = check[1];
    headers[38] = udp_len[0];
    headers[39] = udp_len[1];
    headers
}

/// TTL and checksum of the IP header one hop further, its far end translated and its TOS byte
/// set to `tos`.
#[inline(always)]
#[must_use]
pub fn next_hop(verdict: &Verdict, packet: &Packet, tos: u8) -> (u8, [u8; 2]) {
    // The TOS byte is the lower one of its word: its own change is what the sum changes by.
    let deltas = u32::from(verdict.ip_delta)
        + u32::from(checksum::ONE_HOP)
        + u32::from(!u16::from(packet.tos))
        + u32::from(tos);
    (
        packet.ttl.wrapping_sub(1),
        checksum::shifted(packet.check, deltas),
    )
}

/// A packet of a peer whose flow has an entry.
#[inline(always)]
pub fn inbound<'a, T: Tables>(
    tables: &T,
    flow: &'a InFlow,
    packet: &Packet,
    gso_size: u32,
) -> Hit<'a, InFlow> {
    let kernel = |reason, note| Hit::Kernel { reason, note };
    if !is_of(packet, flow.verdict.tag, flow.tag) {
        return kernel(Reason::InUnlearned, false);
    }
    if packet.is_boundary() {
        return Hit::End(flow);
    }
    let epoch = tables.epoch();
    if epoch.flags & BYPASS_ANY == 0 {
        return kernel(Reason::InHeld, false);
    }
    if packet.key.protocol == header::TCP {
        if epoch.flags & BYPASS_TCP == 0 {
            return kernel(Reason::InConntrack, false);
        }
    } else if gso_size != 0 {
        return kernel(Reason::InUdpGso, false);
    }
    if packet.ttl <= 1 {
        return kernel(Reason::InTtl, false);
    }
    if packet.segment_len(gso_size) > flow.mtu {
        return kernel(Reason::InOverMtu, false);
    }
    if packet.tos & 0xfc != flow.verdict.dscp {
        return kernel(Reason::InOtherDscp, false);
    }
    match validity::standing(&flow.verdict, &now(tables, epoch, &flow.verdict)) {
        Standing::Good => Hit::Bypass { flow, probe: false },
        Standing::Probe => Hit::Bypass { flow, probe: true },
        Standing::Stale => kernel(Reason::InStale, false),
    }
}
