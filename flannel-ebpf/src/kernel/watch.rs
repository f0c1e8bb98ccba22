//! Watching the stack: notes where a packet enters it, and what became of the
//! packet where it leaves.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::{
    candidate::{self, Counted},
    frame::Frame as _,
    hash,
    header::Ethernet,
    layout::{Candidate, FlowKey, NodeConfig, Note, TEMPLATE_LEN, Trail, Verdict},
    learn::{self, Arrived, Left, Shown},
    outer::INNER_IP,
    own::opening,
    packet::{Packet, furthest},
    reason::Reason,
    sighting::{self, Match, Way},
    tables::Tables as _,
};

use super::{
    ETHERNET, counters, handshake,
    maps::{self, KernelTables},
    wire::{self, Wire, sign},
};

/// Notes a packet on its way into the stack. `offset` is that of its IP header.
#[inline(always)]
pub(super) fn note(
    wire: &Wire,
    offset: usize,
    packet: &Packet,
    node: &NodeConfig,
    way: Way,
    probe: bool,
) {
    let Some(mut note) = sighting::note(wire, offset, packet) else {
        return;
    };
    note.at = maps::jiffies();
    let epoch = KernelTables.epoch();
    note.generation = if packet.is_handshake() {
        epoch.class_generation
    } else {
        epoch.generation
    };
    note.ifindex = wire.meta().ifindex;
    note.probe = u8::from(probe);
    let (Some(trail), Some(place)) = (
        maps::trail(way, sighting::trail_place(&note, way, node.seed)),
        maps::take_note(way),
    ) else {
        return;
    };
    // SAFETY: per-CPU values; programs at TC do not interrupt each other on one CPU.
    unsafe {
        let before = *trail;
        let held = if before.note == 0 {
            None
        } else {
            maps::note(way, u32::from(before.note) - 1).map(|held| &*held)
        };
        let laid: Trail = sighting::laid(before, held, &note, place, way);
        *trail = laid;
        if let Some(slot) = maps::note(way, place) {
            *slot = note;
        }
    }
    if !probe {
        wire.set_sign(sign::NOTED);
    }
}

/// Has a flow without verdict shown enough packets to be worth notes?
#[inline(always)]
pub(super) fn is_met(packet: &Packet, node: &NodeConfig, way: Way) -> bool {
    let strange = candidate::strange(packet.key.protocol);
    if strange == 0 {
        return true;
    }
    let flow = hash::flow(&packet.key, node.seed);
    if matches!(way, Way::Out) && handshake::is_last(flow, node) {
        return true;
    }
    let seen = times(way, Counted::Packets, flow, 0);
    seen.is_some_and(|(_, times)| times > strange)
}

/// How often the same was seen, this time included; `None` while others have its place.
#[inline(always)]
fn times(way: Way, counted: Counted, hash: u64, generation: u32) -> Option<(*mut Candidate, u8)> {
    let slot = maps::candidate(way, counted, hash)?;
    let (epoch, now) = (KernelTables.epoch(), maps::jiffies());
    // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
    unsafe {
        let found = *slot;
        let next = match candidate::again(found, hash, generation, &epoch, now, false) {
            Some(next) => next,
            None if maps::is_chosen() => {
                candidate::again(found, hash, generation, &epoch, now, true)?
            }
            None => return None,
        };
        *slot = next;
        Some((slot, next.times))
    }
}

/// What the tunnel device's hook should make of a packet from a peer that the stack has.
#[inline(always)]
pub(super) const fn question(reason: Reason) -> Option<u32> {
    match reason {
        Reason::InUnlearned => Some(sign::STRANGE),
        Reason::InStale | Reason::InOtherDscp => Some(sign::KNOWN),
        _ => None,
    }
}

/// What the trail of a packet that leaves leads to.
struct Trailed {
    note: *mut Note,
    /// How the two compare.
    outcome: Match,
    /// Another note may be meant as well.
    is_ambiguous: bool,
}

impl Trailed {
    /// No other packet is this note's.
    #[inline(always)]
    fn use_up(&self) {
        // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
        unsafe { (*self.note).live = 0 };
    }
}

#[inline(always)]
fn follow(leaving: &Note, node: &NodeConfig, way: Way) -> Option<Trailed> {
    let place = sighting::trail_place(leaving, way, node.seed);
    // SAFETY: per-CPU values; programs at TC do not interrupt each other on one CPU.
    unsafe {
        let trail = *maps::trail(way, place)?;
        if trail.note == 0 {
            return None;
        }
        let note = maps::note(way, u32::from(trail.note) - 1)?;
        Some(Trailed {
            note,
            outcome: sighting::compare(&*note, leaving, way),
            is_ambiguous: trail.ambiguous != 0,
        })
    }
}

/// The note of a packet that leaves, used up, and how the two compare; without a note, or where
/// two may be meant, nothing is known of the packet.
#[inline(always)]
pub(super) fn matched(leaving: &Note, node: &NodeConfig, way: Way) -> Option<(*const Note, Match)> {
    let trailed = follow(leaving, node, way)?;
    if trailed.is_ambiguous || trailed.outcome == Match::None {
        return None;
    }
    trailed.use_up();
    Some((trailed.note, trailed.outcome))
}

/// The note of a packet that leaves, used up, if the stack did nothing to it that is not learned.
#[inline(always)]
fn find(leaving: &Note, node: &NodeConfig, way: Way) -> Result<*const Note, Reason> {
    let reason = |out, inward| match way {
        Way::Out => out,
        Way::In => inward,
    };
    let unmatched = reason(Reason::LearnOutUnmatched, Reason::LearnInUnmatched);
    let trailed = follow(leaving, node, way).ok_or(unmatched)?;
    if trailed.is_ambiguous && trailed.outcome != Match::None {
        return Err(reason(Reason::LearnOutAmbiguous, Reason::LearnInAmbiguous));
    }
    match trailed.outcome {
        Match::None => return Err(unmatched),
        Match::OtherTos => return Err(reason(Reason::LearnOutOtherTos, Reason::LearnInOtherTos)),
        Match::OtherTtl => return Err(reason(Reason::LearnOutOtherTtl, Reason::LearnInOtherTtl)),
        Match::Same => {}
    }
    trailed.use_up();
    // SAFETY: as in `follow`.
    if unsafe { (*trailed.note).generation } != KernelTables.epoch().generation {
        return Err(reason(
            Reason::LearnOutOldGeneration,
            Reason::LearnInOldGeneration,
        ));
    }
    Ok(trailed.note)
}

/// Is the entry of this flow, and of its pod and peer as they are now?
#[inline(always)]
fn is_current(verdict: &Verdict, tail: u32, key: &FlowKey) -> bool {
    let tag = hash::tag(key);
    verdict.tag == tag
        && tail == tag
        && verdict.pod_generation == KernelTables.generation(u32::from(verdict.pod_slot))
        && verdict.peer_generation == KernelTables.generation(u32::from(verdict.peer_slot))
}

/// The verdict holds on from now, when this packet has come out of the stack as `leaving`; `ack` is
/// how far the direction has acknowledged.
#[inline(always)]
fn refresh(
    verdict: *mut Verdict,
    ack: *mut [u8; 4],
    packet: &Packet,
    leaving: &Note,
    generation: u32,
) {
    // SAFETY: a map's value that the caller has just compared; single words.
    unsafe {
        (*verdict).seen = leaving.at;
        (*verdict).probed = leaving.at;
        (*verdict).generation = generation;
        (*verdict).end = furthest((*verdict).end, packet.end());
        *ack = furthest(*ack, leaving.ack);
    }
}

/// One more sighting; `true` when the flow has shown itself often enough.
#[inline(always)]
fn enough(way: Way, outcome: u64, note: &Note) -> bool {
    match times(way, Counted::Outcomes, outcome, note.generation) {
        Some((slot, times)) if times >= candidate::NEEDED => {
            // SAFETY: as in `times`. The place is free for the next one.
            unsafe { (*slot).times = 0 };
            true
        }
        _ => false,
    }
}

/// What the stack made of a pod's packet: sighting at the egress of the uplink.
#[inline(always)]
pub(super) fn left(context: &TcContext, wire: &Wire, node: &NodeConfig) -> Option<Reason> {
    let packet = Packet::read(wire, INNER_IP)?;
    let is_handshake = opening::is_wanted(node) && packet.is_handshake();
    if packet.is_boundary() && !is_handshake {
        return None;
    }
    let mut leaving = sighting::note(wire, INNER_IP, &packet)?;
    leaving.at = maps::jiffies();
    if is_handshake {
        return handshake::left(context, wire, &packet, &leaving, node);
    }
    let note = match find(&leaving, node, Way::Out) {
        // SAFETY: a per-CPU value that nothing writes during this run.
        Ok(note) => unsafe { &*note },
        Err(reason) => return Some(reason),
    };
    let (mark, priority) = wire::mark_and_priority(context);
    // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
    let template = unsafe { &mut *maps::scratch_template()? };
    *template = *wire.at::<[u8; TEMPLATE_LEN]>(0)?;
    learn::neutralize(template);
    let left = Left {
        far: packet.key.dst,
        far_port: packet.key.dport,
        uplink: wire.meta().ifindex,
        mark,
        priority,
        template,
    };

    let mut known = false;
    if let Some(entry) = maps::flow_out(&note.key) {
        // SAFETY: a map's value; `is_current` finds out if it has become another flow's.
        let flow = unsafe { &*entry };
        if left.agrees(note, flow) {
            if is_current(&flow.verdict, flow.tag, &note.key) {
                // SAFETY: as above. A flow's hash may have changed without its way.
                unsafe {
                    (*entry).template[34] = left.template[34];
                    (*entry).template[35] = left.template[35];
                    refresh(
                        &raw mut (*entry).verdict,
                        &raw mut (*entry).ack,
                        &packet,
                        &leaving,
                        note.generation,
                    );
                }
                return Some(Reason::LearnOutConfirmed);
            }
            known = true;
        } else {
            maps::forget_out(&note.key);
            return Some(Reason::LearnOutChanged);
        }
    }
    let answers = if known {
        None
    } else {
        handshake::ended(&note.key, (left.far, left.far_port), node)
    };
    if !known && answers.is_none() && !enough(Way::Out, left.hash(&note.key, node.seed), note) {
        return Some(Reason::LearnOutCounted);
    }
    if let Some(dscp) = answers {
        let learned = handshake::learn_answers(note, &packet.key, dscp, leaving.at);
        let reason = learned.map_or_else(|reason| reason, |()| Reason::LearnInLearned);
        counters::count(reason, 0);
    }
    // SAFETY: as the template.
    let entry = unsafe { &mut *maps::scratch_out()? };
    let made = left.entry(note, &KernelTables, leaving.at, entry);
    entry.verdict.end = packet.end();
    entry.ack = leaving.ack;
    Some(match made {
        Ok(()) if maps::keep_out(&note.key, entry) => Reason::LearnOutLearned,
        Ok(()) => Reason::LearnOutNoRoom,
        Err(reason) => {
            if known {
                maps::forget_out(&note.key);
            }
            reason
        }
    })
}

/// What the stack made of a peer's packet: sighting at the egress of a pod's veth. With the
/// outcome comes whether it was a copy that only asked.
#[inline(always)]
pub(super) fn arrived(wire: &Wire, node: &NodeConfig) -> Option<Reason> {
    let packet = Packet::read(wire, ETHERNET)?;
    let is_handshake = opening::is_wanted(node) && packet.is_handshake();
    if packet.is_boundary() && !is_handshake {
        return None;
    }
    let mut leaving = sighting::note(wire, ETHERNET, &packet)?;
    leaving.at = maps::jiffies();
    if is_handshake {
        return handshake::arrived(wire, &packet, &leaving, node);
    }
    let note = match find(&leaving, node, Way::In) {
        // SAFETY: a per-CPU value that nothing writes during this run.
        Ok(note) => unsafe { &*note },
        Err(reason) => return Some(reason),
    };
    let ethernet = wire.at::<Ethernet>(0)?;
    let (to, from) = (ethernet.destination, ethernet.source);
    let arrived = Arrived {
        far: packet.key.src,
        far_port: packet.key.sport,
        pod: wire.meta().ifindex,
        macs: [
            to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
            from[5],
        ],
    };

    let mut known = false;
    if let Some(entry) = maps::flow_in(&note.key) {
        // SAFETY: a map's value; `is_current` finds out if it has become another flow's.
        let flow = unsafe { &*entry };
        if arrived.agrees(note, flow) {
            if is_current(&flow.verdict, flow.tag, &note.key) {
                // SAFETY: as above.
                unsafe {
                    refresh(
                        &raw mut (*entry).verdict,
                        &raw mut (*entry).ack,
                        &packet,
                        &leaving,
                        note.generation,
                    );
                };
                return Some(Reason::LearnInConfirmed);
            }
            known = true;
        } else {
            maps::forget_in(&note.key);
            return Some(Reason::LearnInChanged);
        }
    }
    if !known && !enough(Way::In, arrived.hash(&note.key, node.seed), note) {
        return Some(Reason::LearnInCounted);
    }
    // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
    let entry = unsafe { &mut *maps::scratch_in()? };
    let made = arrived.entry(&Shown::by(note), &KernelTables, leaving.at, entry);
    entry.verdict.end = packet.end();
    entry.ack = leaving.ack;
    Some(match made {
        Ok(()) if maps::keep_in(&note.key, entry) => Reason::LearnInLearned,
        Ok(()) => Reason::LearnInNoRoom,
        Err(reason) => {
            if known {
                maps::forget_in(&note.key);
            }
            reason
        }
    })
}
