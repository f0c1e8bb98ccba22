//! When an own connection goes to conntrack, and as what. Pure.

use std::time::Duration;

use flannel_ebpf::{
    layout::{FlowKey, OwnFlow},
    own::{self, Stage},
    sighting::Way,
};

use super::super::{ends::end, epoch::Clock};
use crate::datapath::conntrack_table::{Entry, TcpState, Tuple, status};

/// How old a connection gets before conntrack has it.
pub(super) const YOUTH: Duration = Duration::from_secs(1);
/// How long a closed one is remembered for late packets.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Conntrack's timeouts in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timeouts {
    pub(super) syn_sent: u32,
    pub(super) syn_recv: u32,
    pub(super) established: u32,
    pub(super) close_wait: u32,
    pub(super) time_wait: u32,
    pub(super) close: u32,
}

/// The kernel's own.
impl Default for Timeouts {
    fn default() -> Self {
        Self {
            syn_sent: 120,
            syn_recv: 60,
            established: 432_000,
            close_wait: 60,
            time_wait: 120,
            close: 10,
        }
    }
}

impl Timeouts {
    /// As they are in the network namespace of the calling thread.
    pub(super) fn read() -> Self {
        let read = |name: &str, default: u32| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.trim().parse().unwrap_or(default)
        };
        let default = Self::default();
        Self {
            syn_sent: read("syn_sent", default.syn_sent),
            syn_recv: read("syn_recv", default.syn_recv),
            established: read("established", default.established),
            close_wait: read("close_wait", default.close_wait),
            time_wait: read("time_wait", default.time_wait),
            close: read("close", default.close),
        }
    }
}

/// What is to be done with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing yet.
    Stay,
    /// Conntrack gets it.
    HandOver,
    /// It is over, or the kernel's.
    Delete,
}

/// When a look begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment<'a> {
    pub(super) clock: &'a Clock,
    /// Programs give no entry away that closed before then, in jiffies.
    pub(super) expired: u32,
}

/// Which entries have to go now.
#[derive(Debug, Clone, Copy)]
pub(super) enum Extent<'a> {
    /// Those whose time has come.
    Due(Moment<'a>),
    /// Every live one: rules have changed.
    Live(Moment<'a>),
    /// All: nothing stays.
    All,
}

/// Judges one entry.
pub(super) fn due(flow: &OwnFlow, extent: Extent<'_>) -> Due {
    if flow.taken != 0 {
        return Due::Delete;
    }
    let Moment { clock, expired } = match extent {
        Extent::Due(moment) | Extent::Live(moment) => moment,
        Extent::All => return Due::HandOver,
    };
    if own::is_over(flow) {
        return if own::is_older(flow) {
            // Conntrack may hold the older connection, and has not seen its end.
            Due::HandOver
        } else if own::is_expired(flow, expired) {
            Due::Delete
        } else {
            Due::Stay
        };
    }
    // A program may have read the clock just after us.
    let age = clock.now().wrapping_sub(flow.born).cast_signed().max(0);
    let age = clock.duration(age.cast_unsigned());
    if matches!(extent, Extent::Live(_)) || flow.recalled != 0 || age >= YOUTH {
        Due::HandOver
    } else {
        Due::Stay
    }
}

/// The way of a packet as conntrack names it.
pub(super) fn way(key: &FlowKey) -> Tuple {
    Tuple {
        source: end(key.src, key.sport),
        destination: end(key.dst, key.dport),
    }
}

/// The connection as conntrack names it: as the client sends.
pub(super) fn tuple(key: &FlowKey, flow: &OwnFlow) -> Tuple {
    let sent = way(key);
    match own::opener(flow.opener) {
        Way::Out => sent,
        Way::In => sent.reversed(),
    }
}

/// The entry that conntrack would have, had it seen the connection.
pub(super) fn entry(key: &FlowKey, flow: &OwnFlow, timeouts: &Timeouts) -> Entry {
    let tuple = tuple(key, flow);
    let over = |state, timeout| Entry {
        state,
        ..Entry::established(tuple, timeout)
    };
    let mut entry = match own::stage(flow) {
        Stage::Opening => Entry {
            state: TcpState::SynSent,
            status: status::CONFIRMED,
            ..Entry::half_open(tuple, timeouts.syn_sent)
        },
        Stage::Answered => Entry::half_open(tuple, timeouts.syn_recv),
        Stage::Established => Entry::established(tuple, timeouts.established),
        Stage::HalfClosed => over(TcpState::CloseWait, timeouts.close_wait),
        Stage::Closed => over(TcpState::TimeWait, timeouts.time_wait),
        Stage::Reset => over(TcpState::Close, timeouts.close),
    };
    if flow.pod.doubtful_rst == 1 || flow.peer.doubtful_rst == 1 {
        // If it lives, its next packet gives it its time back.
        entry.timeout = entry.timeout.min(timeouts.close);
    }
    entry
}

/// What conntrack has to be told of a connection that a RST has ended: it saw the RST, but not the
/// acknowledgement that it compares it with, and so kept the state and gave it the time of a RST.
pub(super) fn after_reset(entry: &Entry, timeouts: &Timeouts) -> Option<Entry> {
    let is_doubted = entry.state == TcpState::Established && entry.timeout <= timeouts.close;
    is_doubted.then(|| Entry {
        state: TcpState::Close,
        ..entry.clone()
    })
}

/// What conntrack has to be told once more, if the connection went on while it was told of it.
///
/// The state alone would not say: a doubtful RST changes nothing but the time.
pub(super) fn correction(told: &Entry, last: Entry) -> Option<Entry> {
    ((last.state, last.timeout) != (told.state, told.timeout)).then_some(last)
}

#[cfg(test)]
mod tests {
    use flannel_ebpf::own::{Segment, advance, opened};

    use super::*;

    const SYN_ACK: u8 = 0x12;
    const ACK: u8 = 0x10;
    const FIN_ACK: u8 = 0x11;
    const RST: u8 = 0x04;

    fn key() -> FlowKey {
        FlowKey {
            src: [10, 1, 1, 2],
            dst: [10, 1, 2, 2],
            sport: 80u16.to_be_bytes(),
            dport: 40_000u16.to_be_bytes(),
            protocol: 6,
            ..FlowKey::default()
        }
    }

    /// A connection from the peer to the pod after these packets of (way, flags).
    fn after(packets: &[(Way, u8)], born: u32) -> OwnFlow {
        let mut flow = opened(Way::In, born);
        for (way, flags) in packets {
            let segment = Segment {
                flags: *flags,
                seq: [0, 0, 0, 10],
                ack: [0, 0, 0, 9],
            };
            assert!(advance(&mut flow, *way, segment, born));
        }
        flow
    }

    /// A look now; what closed two seconds ago has expired.
    fn now(clock: &Clock) -> Moment<'_> {
        Moment {
            clock,
            expired: clock.now().wrapping_sub(clock.ticks(LINGER)),
        }
    }

    const OPEN: [(Way, u8); 2] = [(Way::Out, SYN_ACK), (Way::In, ACK)];

    #[test]
    fn conntrack_gets_what_it_would_have_seen() {
        let timeouts = Timeouts::default();
        let with = |more: &[(Way, u8)]| after(&[&OPEN[..], more].concat(), 0);
        let cases = [
            (after(&[], 0), TcpState::SynSent, 120),
            (after(&OPEN[..1], 0), TcpState::SynRecv, 60),
            (with(&[]), TcpState::Established, 432_000),
            (with(&[(Way::Out, FIN_ACK)]), TcpState::CloseWait, 60),
            (
                with(&[(Way::Out, FIN_ACK), (Way::In, FIN_ACK)]),
                TcpState::TimeWait,
                120,
            ),
            // Its sequence number is not the other end's last ACK, and it says nothing else.
            (with(&[(Way::Out, RST)]), TcpState::Established, 10),
            // It lives.
            (
                with(&[(Way::Out, RST), (Way::In, ACK)]),
                TcpState::Established,
                432_000,
            ),
        ];
        for (flow, state, timeout) in cases {
            let entry = entry(&key(), &flow, &timeouts);
            assert_eq!((entry.state, entry.timeout), (state, timeout), "{flow:?}");
            assert_eq!(
                entry.original.source.port(),
                40_000,
                "the peer is the client"
            );
            assert!(!entry.is_translated());
        }
    }

    #[test]
    fn a_doubted_reset_is_told_and_nothing_else() {
        let timeouts = Timeouts::default();
        let after = |state, timeout| {
            let entry = Entry {
                state,
                ..entry(&key(), &after(&OPEN, 0), &timeouts)
            };
            after_reset(&Entry { timeout, ..entry }, &timeouts)
        };
        let told = after(TcpState::Established, 10).expect("it was reset");
        assert_eq!((told.state, told.timeout), (TcpState::Close, 10));
        // It lives: a packet has come since, or another connection has the tuple.
        assert_eq!(after(TcpState::Established, 432_000), None);
        assert_eq!(after(TcpState::SynSent, 9), None);
        assert_eq!(after(TcpState::Close, 9), None);
    }

    #[test]
    fn what_comes_meanwhile_is_told_once_more() {
        let timeouts = Timeouts::default();
        let with = |more: &[(Way, u8)]| after(&[&OPEN[..], more].concat(), 0);
        let told = entry(&key(), &with(&[]), &timeouts);
        let last = |more: &[(Way, u8)]| entry(&key(), &with(more), &timeouts);
        assert_eq!(correction(&told, last(&[(Way::In, ACK)])), None);
        for end in [FIN_ACK, RST] {
            let last = last(&[(Way::Out, end)]);
            assert_eq!(correction(&told, last.clone()), Some(last));
        }
    }

    #[test]
    fn young_connections_stay_until_something_calls() {
        let clock = Clock::new(10_000);
        let second = clock.ticks(Duration::from_secs(1));
        let young = after(&OPEN, 10_000);
        let grown = after(&OPEN, 10_000 - second);
        let recalled = OwnFlow {
            recalled: 1,
            ..young
        };
        assert_eq!(due(&young, Extent::Due(now(&clock))), Due::Stay);
        assert_eq!(due(&young, Extent::Live(now(&clock))), Due::HandOver);
        assert_eq!(due(&grown, Extent::Due(now(&clock))), Due::HandOver);
        assert_eq!(due(&recalled, Extent::Due(now(&clock))), Due::HandOver);
        // A program's clock that is a moment ahead of ours is no age of years.
        let newborn = after(&OPEN, 10_003);
        assert_eq!(due(&newborn, Extent::Due(now(&clock))), Due::Stay);
    }

    #[test]
    fn closed_ones_stay_for_late_packets_and_then_go() {
        let clock = Clock::new(10_000);
        let second = clock.ticks(Duration::from_secs(1));
        let close = [&OPEN[..], &[(Way::Out, FIN_ACK), (Way::In, FIN_ACK)]].concat();
        let fresh = after(&close, 10_000 - second);
        let old = after(&close, 10_000 - 2 * second - 1);
        assert_eq!(due(&fresh, Extent::Live(now(&clock))), Due::Stay);
        assert_eq!(due(&fresh, Extent::All), Due::HandOver);
        assert_eq!(due(&old, Extent::Due(now(&clock))), Due::Delete);
        let taken = OwnFlow { taken: 1, ..fresh };
        assert_eq!(due(&taken, Extent::Due(now(&clock))), Due::Delete);
    }

    #[test]
    fn the_end_of_an_older_connection_is_for_conntrack() {
        let clock = Clock::new(10_000);
        // A SYN that does not belong, and then the connection that it met ends.
        let ended = after(&[(Way::Out, FIN_ACK), (Way::In, FIN_ACK)], 10_000);
        assert_eq!(due(&ended, Extent::Due(now(&clock))), Due::HandOver);
        let entry = entry(&key(), &ended, &Timeouts::default());
        assert_eq!(entry.state, TcpState::TimeWait);
    }
}
