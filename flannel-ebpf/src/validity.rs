//! How long a learned verdict holds.
//!
//! The stack is asked again by two means. Every change that the agent hears of
//! (rules, routes, neighbours, policies of IPsec) raises the global generation:
//! each live flow then has its verdict confirmed at once, and one that nobody
//! confirms within the grace ends. What makes no event is covered by time: from
//! half the validity on one packet asks, from the full validity on all do.
//!
//! Times are the low 32 bits of the kernel's jiffies: reading them costs
//! nothing, and differences survive the wrap.

use crate::layout::{Epoch, Verdict};

/// What holds at the moment of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Jiffies.
    pub jiffies: u32,
    /// The global generation and its grace.
    pub epoch: Epoch,
    /// The pod's generation at present.
    pub pod: u32,
    /// The peer's.
    pub peer: u32,
}

/// May a verdict be used?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Yes.
    Good,
    /// Yes, and it is time to ask the stack with one packet.
    Probe,
    /// No: the stack decides.
    Stale,
}

/// Is `time` still to come?
#[inline(always)]
const fn is_ahead(time: u32, now: u32) -> bool {
    time.wrapping_sub(now) as i32 > 0
}

/// Where a verdict stands.
#[inline(always)]
#[must_use]
pub const fn standing(verdict: &Verdict, now: &Now) -> Standing {
    let epoch = &now.epoch;
    if verdict.pod_generation != now.pod || verdict.peer_generation != now.peer {
        return Standing::Stale;
    }
    let age = now.jiffies.wrapping_sub(verdict.seen);
    if age >= epoch.validity {
        return Standing::Stale;
    }
    let since_probe = now.jiffies.wrapping_sub(verdict.probed);
    if verdict.generation != epoch.generation {
        if !is_ahead(epoch.grace_until, now.jiffies) {
            return Standing::Stale;
        }
        return if since_probe >= epoch.recheck_gap {
            Standing::Probe
        } else {
            Standing::Good
        };
    }
    if age >= epoch.validity / 2 && since_probe >= epoch.probe_gap {
        return Standing::Probe;
    }
    Standing::Good
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::EPOCH;

    const SEEN: u32 = u32::MAX - 500; // across the wrap

    fn verdict() -> Verdict {
        Verdict {
            seen: SEEN,
            probed: SEEN,
            generation: 7,
            pod_generation: 3,
            peer_generation: 4,
            ..Verdict::default()
        }
    }

    fn at(after: u32) -> Now {
        Now {
            jiffies: SEEN.wrapping_add(after),
            epoch: EPOCH,
            pod: 3,
            peer: 4,
        }
    }

    #[test]
    fn time_alone_first_probes_then_ends_it() {
        let cases = [
            (0, Standing::Good),
            (999, Standing::Good),
            (1000, Standing::Probe),
            (1999, Standing::Probe),
            (2000, Standing::Stale),
            (100_000, Standing::Stale),
        ];
        for (after, expected) in cases {
            assert_eq!(standing(&verdict(), &at(after)), expected, "{after}");
        }
    }

    #[test]
    fn one_packet_asks_and_the_next_waits_for_its_answer() {
        let asked = Verdict {
            probed: SEEN.wrapping_add(1000),
            ..verdict()
        };
        assert_eq!(standing(&asked, &at(1001)), Standing::Good);
        assert_eq!(standing(&asked, &at(1250)), Standing::Probe);
    }

    #[test]
    fn another_generation_holds_only_during_its_grace() {
        let mut now = at(100);
        now.epoch = Epoch {
            generation: 8,
            grace_until: now.jiffies.wrapping_add(40),
            ..EPOCH
        };
        assert_eq!(standing(&verdict(), &now), Standing::Probe);
        let asked = Verdict {
            probed: now.jiffies,
            ..verdict()
        };
        assert_eq!(standing(&asked, &now), Standing::Good);
        now.jiffies = now.epoch.grace_until;
        assert_eq!(standing(&asked, &now), Standing::Stale);
    }

    #[test]
    fn a_changed_pod_or_peer_ends_it_at_once() {
        for (pod, peer) in [(9, 4), (3, 9)] {
            let now = Now { pod, peer, ..at(0) };
            assert_eq!(standing(&verdict(), &now), Standing::Stale);
        }
    }
}
