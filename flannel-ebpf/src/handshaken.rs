//! Connections that a pod opens through a Service: only the stack can say whom their SYN reaches.
//!
//! Once the answer to the SYN has come out of the stack, the pod's acknowledgement is all that is
//! missing. Where that comes out of it too, the stack has shown both ways of the connection and
//! conntrack calls it established: what follows needs no further proof. So a short connection
//! sends through the stack its handshake and its end, and no more.

use crate::{
    hash,
    layout::{Answered, HANDSHAKE_PLACES},
};

/// A far end: address and port.
pub type End = ([u8; 4], [u8; 2]);

/// Where the handshake of the connection with this [`hash::flow`] is noted.
#[inline(always)]
#[must_use]
pub const fn place(flow: u64) -> u32 {
    (flow >> 40) as u32 % HANDSHAKE_PLACES
}

#[inline(always)]
const fn way(flow: u64, wire: End, generation: u32) -> u32 {
    let far = (u32::from_ne_bytes(wire.0) as u64) << 16 | u16::from_ne_bytes(wire.1) as u64;
    (hash::mix(hash::mix(flow, far), generation as u64) >> 16) as u32
}

/// The answer to the SYN of `flow` has come out of the stack. `wire` is who sent it, as it came in
/// by the tunnel; `generation` is that of classes, which every change of rules raises at once.
#[inline(always)]
#[must_use]
pub const fn answered(flow: u64, wire: End, generation: u32, dscp: u8) -> Answered {
    Answered {
        flow,
        way: way(flow, wire, generation),
        dscp,
        _pad: [0; 3],
    }
}

/// Does this connection's handshake wait for its last packet?
#[inline(always)]
#[must_use]
pub const fn is_awaited(noted: &Answered, flow: u64) -> bool {
    noted.flow == flow && flow != 0
}

/// A packet of `flow` leaves for `wire`: is its handshake over with that, all of it in this
/// generation of classes?
#[inline(always)]
#[must_use]
pub const fn is_over(noted: &Answered, flow: u64, wire: End, generation: u32) -> bool {
    is_awaited(noted, flow) && noted.way == way(flow, wire, generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: u64 = 0x1234_5678_9abc_def0;
    const WIRE: End = ([10, 244, 2, 2], [0x1f, 0x90]);

    #[test]
    fn only_the_same_way_in_the_same_generation_ends_a_handshake() {
        let noted = answered(FLOW, WIRE, 7, 0x28);
        assert_eq!(noted.dscp, 0x28);
        assert!(is_awaited(&noted, FLOW));
        assert!(is_over(&noted, FLOW, WIRE, 7));
        assert!(!is_over(&noted, FLOW + 1, WIRE, 7), "another connection");
        assert!(!is_over(&noted, FLOW, WIRE, 8), "rules changed meanwhile");
        let other = ([10, 244, 2, 3], WIRE.1);
        assert!(!is_over(&noted, FLOW, other, 7), "another pod answered");
        let other = (WIRE.0, [0x1f, 0x91]);
        assert!(!is_over(&noted, FLOW, other, 7), "another port answered");
    }

    #[test]
    fn nobody_waits_in_an_empty_place() {
        assert!(!is_awaited(&Answered::default(), FLOW));
        assert!(!is_awaited(&Answered::default(), 0));
    }

    #[test]
    fn what_two_cpus_wrote_at_once_is_no_handshake() {
        let (one, other) = (answered(FLOW, WIRE, 7, 0), answered(!FLOW, WIRE, 7, 0));
        let torn = Answered {
            way: other.way,
            ..one
        };
        assert!(!is_over(&torn, FLOW, WIRE, 7));
    }

    #[test]
    fn every_place_is_in_the_table() {
        assert!(place(u64::MAX) < HANDSHAKE_PLACES);
        assert_ne!(place(FLOW), place(FLOW << 8));
    }
}
