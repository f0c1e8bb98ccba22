//! The state machine of an own connection: its transitions one by one, then at random against a
//! model of what conntrack holds of the same packets.

use super::*;
use crate::sighting::Way::{In, Out};

const SYN_ACK: u8 = SYN | ACK;
const FIN_ACK: u8 = FIN | ACK;

/// A packet: way, flags, sequence and acknowledgement number.
type Sent = (Way, u8, u8, u8);

fn after(opener: Way, packets: &[Sent]) -> OwnFlow {
    let mut flow = opened(opener, 1000);
    for (at, packet) in packets.iter().enumerate() {
        step(&mut flow, *packet, 1001 + at as u32);
    }
    flow
}

fn step(flow: &mut OwnFlow, (way, flags, seq, ack): Sent, now: u32) -> bool {
    let segment = Segment {
        flags,
        seq: [0, 0, 0, seq],
        ack: [0, 0, 0, ack],
    };
    advance(flow, way, segment, now)
}

/// The client is the pod: its SYN has number 10, the peer's SYN-ACK 20.
const ANSWER: Sent = (In, SYN_ACK, 20, 11);
const ACKNOWLEDGED: Sent = (Out, ACK, 11, 21);

#[test]
fn an_acknowledgement_that_was_overtaken_changes_nothing() {
    let overtaken = [ANSWER, ACKNOWLEDGED, (In, ACK, 21, 14), (In, ACK, 21, 12)];
    let mut flow = after(Out, &overtaken);
    step(&mut flow, (Out, RST, 14, 0), 2000);
    assert_eq!(stage(&flow), Stage::Reset);

    // Numbers go round.
    let mut flow = after(Out, &[(In, SYN_ACK, 20, 255)]);
    flow.peer.ack = [255, 255, 255, 250];
    step(&mut flow, (In, ACK, 21, 3), 2000);
    assert_eq!(flow.peer.ack, [0, 0, 0, 3]);
}

/// What memory holds when two CPUs have each worked on what was there `before`: of every byte what
/// somebody changed, as each fact is stored without regard to the others.
fn merged(before: &OwnFlow, one: &OwnFlow, other: &OwnFlow) -> OwnFlow {
    let bytes = |flow: &OwnFlow| -> [u8; size_of::<OwnFlow>()] {
        bytemuck::bytes_of(flow).try_into().expect("its size")
    };
    let (before, one, other) = (bytes(before), bytes(one), bytes(other));
    let mut merged = before;
    for (index, byte) in merged.iter_mut().enumerate() {
        for written in [one[index], other[index]] {
            if written != before[index] {
                *byte = written;
            }
        }
    }
    *bytemuck::from_bytes(&merged)
}

#[test]
fn two_cpus_at_once_lose_nothing_of_each_other() {
    let packets: [Sent; 8] = [
        ANSWER,
        ACKNOWLEDGED,
        (In, ACK, 21, 12),
        (Out, FIN_ACK, 11, 21),
        (In, FIN_ACK, 21, 12),
        (Out, RST, 11, 0),
        (In, RST, 21, 0),
        (In, RST, 99, 0),
    ];
    for known in 0..3 {
        let before = after(Out, &[ANSWER, ACKNOWLEDGED][..known]);
        for first in packets {
            for second in packets {
                let (mut one, mut other) = (before, before);
                step(&mut one, first, 2000);
                step(&mut other, second, 2000);
                let both = merged(&before, &one, &other);
                for (flow, packet) in [(one, first), (other, second)] {
                    let facts = |end: OwnEnd| [end.shaken, end.fin, end.rst, end.doubtful_rst];
                    let kept = |end: OwnEnd, merged: OwnEnd| {
                        let pairs = facts(end).into_iter().zip(facts(merged));
                        pairs.into_iter().all(|(one, both)| one <= both)
                    };
                    assert!(
                        kept(flow.pod, both.pod) && kept(flow.peer, both.peer),
                        "{packet:?} of {first:?} and {second:?}: {both:?}"
                    );
                }
                // Whatever comes next finds the end that neither CPU saw.
                let mut later = both;
                step(&mut later, (In, ACK, 22, 12), 2001);
                assert!(!is_over(&later) || later.closed != 0, "{later:?}");
            }
        }
    }
}

#[test]
fn transitions() {
    let open = [ANSWER, ACKNOWLEDGED];
    let rows: &[(&[Sent], Sent, Stage)] = &[
        (&[], ANSWER, Stage::Answered),
        // Data of the client before the answer is none of the handshake.
        (&[], (Out, ACK, 11, 0), Stage::Opening),
        // Both ends at once: the peer's SYN does not pass here, its SYN-ACK does.
        (&[], (Out, SYN_ACK, 10, 21), Stage::Opening),
        (&[], (In, RST | ACK, 0, 11), Stage::Reset),
        (&[ANSWER], ANSWER, Stage::Answered),
        (&[ANSWER], (In, ACK, 21, 11), Stage::Answered),
        (&[ANSWER], ACKNOWLEDGED, Stage::Established),
        (&[ANSWER], (Out, FIN_ACK, 11, 21), Stage::HalfClosed),
        (&[ANSWER], (Out, RST, 11, 0), Stage::Reset),
        (&open, (Out, ACK, 11, 21), Stage::Established),
        (&open, (In, ACK, 21, 12), Stage::Established),
        (&open, (Out, FIN_ACK, 11, 21), Stage::HalfClosed),
        (&open, (In, FIN_ACK, 21, 11), Stage::HalfClosed),
        // A RST counts at the number that the other end expects, and nowhere else.
        (&open, (Out, RST, 11, 0), Stage::Reset),
        (&open, (Out, RST, 12, 0), Stage::Established),
        (&open, (In, RST, 21, 0), Stage::Reset),
        (&open, (In, RST, 99, 0), Stage::Established),
        // Behind data that nobody has acknowledged yet, its own socket says how far it has read.
        (&open, (In, RST | ACK, 29, 11), Stage::Reset),
        (&open, (Out, RST | ACK, 19, 21), Stage::Reset),
        (&open, (Out, RST | ACK, 19, 20), Stage::Established),
        (&open, (Out, RST | ACK, 19, 22), Stage::Established),
        (&open, (Out, RST, 19, 21), Stage::Established),
        (&open, (Out, RST | ACK, 10, 21), Stage::Established),
    ];
    for (before, packet, expected) in rows {
        let mut flow = after(Out, before);
        assert!(step(&mut flow, *packet, 2000), "{before:?}");
        assert_eq!(stage(&flow), *expected, "{before:?}, then {packet:?}");
    }
}

#[test]
fn closing_takes_both_ends_in_whatever_order() {
    for order in [[Out, In], [In, Out]] {
        let mut flow = after(Out, &[ANSWER, ACKNOWLEDGED]);
        step(&mut flow, (order[0], FIN_ACK, 11, 21), 2000);
        // Sent again, it closes nothing more.
        step(&mut flow, (order[0], FIN_ACK, 11, 21), 2001);
        assert_eq!(stage(&flow), Stage::HalfClosed);
        step(&mut flow, (order[1], FIN_ACK, 21, 12), 2002);
        assert_eq!((stage(&flow), flow.closed), (Stage::Closed, 2002));
        // Late packets neither open it again nor keep it.
        step(&mut flow, (order[0], ACK, 12, 22), 2050);
        step(&mut flow, (order[1], FIN_ACK, 21, 12), 2060);
        assert_eq!((stage(&flow), flow.closed), (Stage::Closed, 2002));
    }
}

#[test]
fn a_doubtful_reset_calls_the_agent() {
    let mut flow = after(Out, &[ANSWER, ACKNOWLEDGED]);
    step(&mut flow, (In, RST, 99, 0), 2000);
    assert_eq!(flow.recalled, 1);
    assert_eq!(flow.peer.doubtful_rst, 1);

    // Both ends' packets show that it lives.
    for packet in [(Out, ACK, 11, 21), (In, ACK, 21, 11)] {
        let mut lives = flow;
        step(&mut lives, packet, 2001);
        assert_eq!(lives.peer.doubtful_rst, 2, "{packet:?}");
    }
}

#[test]
fn a_reset_of_the_past_changes_nothing() {
    let mut flow = after(Out, &[ANSWER, ACKNOWLEDGED]);
    let before = flow;
    step(&mut flow, (In, RST, 20, 0), 2000);
    assert_eq!(flow, before);
}

#[test]
fn the_server_may_be_here() {
    let flow = after(In, &[(Out, SYN_ACK, 20, 11), (In, ACK, 11, 21)]);
    assert_eq!(stage(&flow), Stage::Established);
}

#[test]
fn a_syn_meets_an_entry() {
    let open = [ANSWER, ACKNOWLEDGED];
    let closed = [&open[..], &[(Out, FIN_ACK, 11, 21), (In, FIN_ACK, 21, 12)]].concat();
    let reset = [&open[..], &[(Out, RST, 11, 0)]].concat();
    // What has expired, by when the connection closed.
    let rows: &[(&[Sent], i32, Meeting)] = &[
        (&[], -100, Meeting::Passes),
        (&[], 100_000, Meeting::Passes),
        (&open, 100_000, Meeting::Passes),
        (&closed, -100_000, Meeting::Reopens),
        (&closed, 0, Meeting::Reopens),
        (&closed, 1, Meeting::Refused),
        (&closed, 100_000, Meeting::Refused),
        (&reset, 0, Meeting::Reopens),
        (&reset, 1, Meeting::Refused),
    ];
    for (packets, later, expected) in rows {
        let flow = after(Out, packets);
        let expired = flow.closed.wrapping_add_signed(*later);
        assert_eq!(meets(&flow, expired), *expected, "{packets:?} {later}");
        let taken = OwnFlow { taken: 1, ..flow };
        assert_eq!(meets(&taken, expired), Meeting::Refused);
    }
}

#[test]
fn the_called_ends_syn_belongs_to_what_lives() {
    let open = [ANSWER, ACKNOWLEDGED];
    let reset = [&open[..], &[(Out, RST, 11, 0)]].concat();
    for (packets, expected) in [
        (&[][..], true),
        (&open[..1], true),
        (&open[..], true),
        (&reset[..], false),
    ] {
        let flow = after(Out, packets);
        assert_eq!(crosses(&flow, In), expected, "{packets:?}");
        assert!(!crosses(&flow, Out), "{packets:?}");
        let taken = OwnFlow { taken: 1, ..flow };
        assert!(!crosses(&taken, In), "{packets:?}");
    }
}

#[test]
fn only_the_clients_acknowledgement_settles() {
    for (packets, expected) in [
        (&[][..], false),
        (&[ANSWER][..], false),
        // A flood's sender knows of no connection.
        (&[ANSWER, (Out, RST, 11, 0)][..], false),
        (&[ANSWER, ACKNOWLEDGED][..], true),
        (&[ANSWER, ACKNOWLEDGED, (Out, RST, 11, 0)][..], true),
    ] {
        assert_eq!(is_settled(&after(Out, packets)), expected, "{packets:?}");
    }
}

#[test]
fn who_acknowledges_without_an_answer_goes_on_with_an_older_connection() {
    for (packets, expected) in [
        (&[][..], false),
        // Refused.
        (&[(In, RST | ACK, 0, 11)][..], false),
        (&[(In, ACK, 99, 50)][..], true),
        (&[(In, ACK, 99, 50), (Out, RST, 50, 0)][..], true),
        (&[(Out, ACK, 50, 99)][..], true),
        (&[ANSWER, ACKNOWLEDGED][..], false),
    ] {
        assert_eq!(is_older(&after(Out, packets)), expected, "{packets:?}");
    }
}

#[test]
fn a_syn_that_the_kernel_has_takes_the_tuple_or_calls_the_agent() {
    let open = [ANSWER, ACKNOWLEDGED];
    let closed = [&open[..], &[(Out, FIN_ACK, 11, 21), (In, FIN_ACK, 21, 12)]].concat();
    let rows: &[(&[Sent], (u8, u8))] = &[
        (&[], (1, 0)),
        (&closed, (1, 0)),
        (&open[..1], (0, 1)),
        (&open, (0, 1)),
    ];
    for (packets, expected) in rows {
        let mut flow = after(Out, packets);
        leave_to_kernel(&mut flow);
        assert_eq!((flow.taken, flow.recalled), *expected, "{packets:?}");
        // What the kernel has is no longer ours.
        assert_eq!(step(&mut flow, ANSWER, 2000), flow.taken == 0);
    }
}

#[test]
fn only_a_bare_syn_opens() {
    for (flags, expected) in [
        (SYN, true),
        (SYN | 0xc0, true), // with congestion notification
        (SYN_ACK, false),
        (SYN | RST, false),
        (SYN | FIN, false),
        (ACK, false),
        (0, false),
    ] {
        assert_eq!(is_opening(flags), expected, "{flags:#x}");
    }
}
