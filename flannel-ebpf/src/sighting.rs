//! Tying two sightings of one packet together.
//!
//! A packet is noted where it enters the stack and looked for where it leaves.
//! Both happen on one CPU, in batches, so each CPU has a table of notes. The
//! pod's own end never changes on the way, nor does anything but the far end,
//! the TTL and the checksums. So a note is found by a *trail* that leaves the
//! far end out. Two live notes that only their far ends tell apart make the
//! trail ambiguous, and then neither is matched: one of them may be a packet
//! that the stack has dropped, and the other a way to be taken for it.

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{
    frame::Frame,
    hash, header,
    layout::{FlowKey, NOTES, Note, TRAILS, Trail},
    packet::Packet,
};

/// Which end of the flow is the local pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The pod is the source.
    Out,
    /// The pod is the destination.
    In,
}

/// How long a note waits for its packet, in jiffies; a batch takes far less than one.
const PATIENCE: u32 = 20;

/// The note of one packet whose IP header is at `offset`.
#[inline(always)]
pub fn note<F: Frame>(frame: &F, offset: usize, packet: &Packet) -> Option<Note> {
    let behind = offset + Ipv4Hdr::LEN;
    let mut note = Note {
        key: packet.key,
        id: packet.id,
        len: packet.len.to_be_bytes(),
        tos: packet.tos,
        ttl: packet.ttl,
        tcp_flags: packet.tcp_flags,
        live: 1,
        ..Note::default()
    };
    let fixed = if packet.key.protocol == header::TCP {
        let tcp = frame.at::<TcpHdr>(behind)?;
        note.seq = tcp.seq;
        note.ack = tcp.ack_seq;
        note.window = tcp.window;
        TcpHdr::LEN
    } else {
        note.window = frame.at::<UdpHdr>(behind)?.len;
        UdpHdr::LEN
    };
    let rest = u32::from(packet.len).saturating_sub((Ipv4Hdr::LEN + fixed) as u32);
    note.start = frame.start(behind + fixed, rest);
    Some(note)
}

/// The pod's end of a flow: address and port.
#[inline(always)]
const fn pod_end(way: Way, key: &FlowKey) -> ([u8; 4], [u8; 2]) {
    match way {
        Way::Out => (key.src, key.sport),
        Way::In => (key.dst, key.dport),
    }
}

/// Everything that neither translation nor routing touches.
#[inline(always)]
const fn constant(note: &Note, way: Way, seed: u32) -> u64 {
    let (address, port) = pod_end(way, &note.key);
    let place = (u32::from_ne_bytes(address) as u64) << 32
        | (u16::from_ne_bytes(port) as u64) << 16
        | u16::from_ne_bytes(note.id) as u64;
    let tcp = (u32::from_ne_bytes(note.seq) as u64) << 32 | u32::from_ne_bytes(note.ack) as u64;
    let rest = (u16::from_ne_bytes(note.len) as u64) << 8 | note.key.protocol as u64;
    let hash = hash::mix(hash::mix(hash::mix(seed as u64, place), tcp), rest);
    hash::mix(
        hash::mix(hash, hash::eight(&note.start, 0)),
        hash::eight(&note.start, 1),
    )
}

/// Where a note belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Of the note itself.
    pub note: u32,
    /// Of its trail.
    pub trail: u32,
}

/// The places of a note.
#[inline(always)]
#[must_use]
pub const fn places(note: &Note, way: Way, seed: u32) -> Places {
    let constant = constant(note, way, seed);
    let whole = hash::mix(constant, hash::flow(&note.key, seed));
    Places {
        note: (whole >> 40) as u32 % NOTES,
        trail: (constant >> 40) as u32 % TRAILS,
    }
}

/// Is this note still waiting for its packet?
#[inline(always)]
const fn is_waiting(note: &Note, now: u32) -> bool {
    note.live != 0 && now.wrapping_sub(note.at) <= PATIENCE
}

#[inline(always)]
fn equal_beside_the_far_end(one: &Note, other: &Note, way: Way) -> bool {
    pod_end(way, &one.key) == pod_end(way, &other.key)
        && one.key.protocol == other.key.protocol
        && one.seq == other.seq
        && one.ack == other.ack
        && one.start == other.start
        && one.id == other.id
        && one.len == other.len
        && one.window == other.window
        && one.tcp_flags == other.tcp_flags
}

/// The trail after one more note at `place`: `held` is the note that the trail named before.
#[inline(always)]
#[must_use]
pub fn laid(trail: Trail, held: Option<&Note>, new: &Note, place: u32, way: Way) -> Trail {
    let twin = trail.note != 0
        && held.is_some_and(|held| {
            is_waiting(held, new.at)
                && equal_beside_the_far_end(held, new, way)
                && held.key != new.key
        });
    // Ambiguity outlives a note that was matched: a third twin may be on its way.
    let still = trail.ambiguous != 0
        && held.is_some_and(|held| {
            new.at.wrapping_sub(held.at) <= PATIENCE && equal_beside_the_far_end(held, new, way)
        });
    Trail {
        note: place as u16 + 1,
        ambiguous: u16::from(twin || still),
    }
}

/// How a packet that leaves compares with a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Another packet's, or none.
    None,
    /// This packet's, and the stack changed at most the far end.
    Same,
    /// This packet's, but the TOS byte is another.
    OtherTos,
    /// This packet's, but the TTL went down by other than one.
    OtherTtl,
}

/// Compares a waiting note with a packet at its second sighting.
#[inline(always)]
#[must_use]
pub fn compare(noted: &Note, leaving: &Note, way: Way) -> Match {
    if !is_waiting(noted, leaving.at) || !equal_beside_the_far_end(noted, leaving, way) {
        return Match::None;
    }
    if noted.tos != leaving.tos {
        return Match::OtherTos;
    }
    if noted.ttl != leaving.ttl.wrapping_add(1) {
        return Match::OtherTtl;
    }
    Match::Same
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Bytes;

    fn noted(bytes: &[u8]) -> Note {
        let mut frame = vec![0; 14];
        frame.extend(bytes);
        let frame = Bytes::plain(&frame, 1);
        let packet = Packet::read(&frame, 14).expect("a packet of a flow");
        note(&frame, 14, &packet).expect("whole headers")
    }

    fn one() -> Note {
        Note {
            at: 1000,
            ..noted(&crate::rows::outgoing().bytes())
        }
    }

    fn routed(note: &Note) -> Note {
        Note {
            ttl: note.ttl - 1,
            ..*note
        }
    }

    #[test]
    fn a_routed_packet_is_its_notes() {
        let note = one();
        assert_eq!(compare(&note, &routed(&note), Way::Out), Match::Same);
        assert_eq!(compare(&note, &note, Way::Out), Match::OtherTtl);
        let marked = Note {
            tos: 4,
            ..routed(&note)
        };
        assert_eq!(compare(&note, &marked, Way::Out), Match::OtherTos);
    }

    #[test]
    fn translation_of_the_far_end_is_found() {
        let note = one();
        let mut leaving = routed(&note);
        leaving.key.dst = [10, 244, 9, 9];
        leaving.key.dport = [1, 2];
        assert_eq!(compare(&note, &leaving, Way::Out), Match::Same);
        let seed = 77;
        assert_eq!(
            places(&note, Way::Out, seed).trail,
            places(&leaving, Way::Out, seed).trail
        );
        // On the way in that is the pod's end, which never changes.
        assert_eq!(compare(&note, &leaving, Way::In), Match::None);
    }

    #[test]
    fn a_note_does_not_wait_for_ever_nor_match_twice() {
        let note = one();
        let late = Note {
            at: note.at + PATIENCE + 1,
            ..routed(&note)
        };
        assert_eq!(compare(&note, &late, Way::Out), Match::None);
        let used = Note { live: 0, ..note };
        assert_eq!(compare(&used, &routed(&note), Way::Out), Match::None);
    }

    #[test]
    fn twins_with_other_far_ends_void_the_trail() {
        let first = one();
        let mut second = first;
        second.key.dst = [10, 244, 2, 77];
        let trail = laid(Trail::default(), None, &first, 5, Way::Out);
        assert_eq!((trail.note, trail.ambiguous), (6, 0));
        let trail = laid(trail, Some(&first), &second, 9, Way::Out);
        assert_eq!((trail.note, trail.ambiguous), (10, 1));
        // A third one within the patience does not clear it, whatever became of the others.
        let used = Note { live: 0, ..second };
        let trail = laid(trail, Some(&used), &first, 5, Way::Out);
        assert_eq!(trail.ambiguous, 1);
        let later = Note {
            at: first.at + PATIENCE + 1,
            ..first
        };
        assert_eq!(laid(trail, Some(&used), &later, 5, Way::Out).ambiguous, 0);
    }

    #[test]
    fn a_stranger_in_the_trail_takes_neither_its_place_nor_its_doubt() {
        let first = one();
        let mut stranger = first;
        stranger.seq = [9; 4];
        let doubtful = Trail {
            note: 6,
            ambiguous: 1,
        };
        let trail = laid(doubtful, Some(&first), &stranger, 7, Way::Out);
        assert_eq!((trail.note, trail.ambiguous), (8, 0));
    }

    #[test]
    fn the_same_flow_again_is_no_twin() {
        let first = one();
        let trail = laid(Trail::default(), None, &first, 5, Way::Out);
        assert_eq!(laid(trail, Some(&first), &first, 5, Way::Out).ambiguous, 0);
    }

    proptest! {
        /// Whatever differs beside far end, TTL and checksums: no match.
        #[test]
        fn one_changed_byte_is_another_packet(at in 0usize..72, flip in 1u8..) {
            let bytes = crate::rows::outgoing().bytes();
            let mut other = bytes.clone();
            prop_assume!(at < other.len());
            other[at] ^= flip;
            // Version and length, fragment bits and protocol decide whether it is a packet of a
            // flow at all; TTL, checksums, TOS and addresses have tests of their own.
            prop_assume!(!matches!(at, 0 | 1 | 6..=11 | 16..=19 | 22..=23));
            // Beyond what is compared: data offset, checksum, urgent pointer, the 17th payload byte on.
            prop_assume!(!matches!(at, 32 | 36..=39 | 56..));
            let leaving = routed(&Note { at: 1000, ..noted(&other) });
            prop_assert_eq!(compare(&one(), &leaving, Way::Out), Match::None);
        }
    }
}
