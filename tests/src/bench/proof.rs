//! Did the packets take the way that the figure speaks of?
//!
//! Each node has three counters: what the programs forwarded, what `flannel.1`
//! carried, and what passed the uplink. A side names the way, and every round
//! has to show it on both nodes and in both directions, or the run fails.

use std::fmt;

/// The way of a side's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The uplink, no tunnel.
    Uplink,
    /// The tunnel device, no program.
    Kernel,
    /// The programs, short flows as well.
    Programs,
    /// The programs, after the kernel has let a flow's first packets pass.
    Learned,
    /// As `Learned`, and most of short connections by the programs as well.
    Classes,
    /// By whatever another agent has: its programs or the tunnel device.
    Tunnelled,
    /// The veth between the ends; there is no node.
    Veth,
}

/// Whether a probe's flows live long enough to be learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flows {
    /// Thousands of packets each.
    Long,
    /// Long ones that take their turns, each of which has to be learned first.
    Many,
    /// TCP connections of a few packets each.
    Short,
    /// One packet of UDP each way.
    First,
}

/// Which of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The client's.
    Client,
    /// The server's.
    Server,
}

/// What the counters of one node show for one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Forwarded by the programs.
    pub programs: u64,
    /// Carried by the tunnel device.
    pub tunnel: u64,
    /// Passed the uplink (or the veth that joins two pods).
    pub link: u64,
}

impl Seen {
    /// What came on top since `before`; counters of programs start anew with their maps.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let grown = |now: u64, then: u64| now.checked_sub(then).unwrap_or(now);
        Self {
            programs: grown(self.programs, before.programs),
            tunnel: grown(self.tunnel, before.tunnel),
            link: grown(self.link, before.link),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "programs {}, flannel.1 {}, uplink {}",
            self.programs, self.tunnel, self.link
        )
    }
}

/// A flow of the programs may show the kernel one packet in so many.
const LEARNED_SHARE: u64 = 20;
/// But always so many: every one of a few flows begins and ends in the kernel, also where
/// segmentation offload makes few packets of it.
const BEGINNINGS: u64 = 150;

/// Of short connections at most one packet to so many of the programs.
const SHORT_SHARE: u64 = 5;

impl Way {
    /// Whether `seen` shows that at least `packets` went this way, and none by another.
    #[must_use]
    pub fn holds(self, flows: Flows, seen: Seen, packets: u64) -> bool {
        let Seen {
            programs,
            tunnel,
            link,
        } = seen;
        match self {
            Self::Uplink | Self::Veth => link >= packets && programs == 0 && tunnel == 0,
            Self::Kernel => tunnel >= packets && programs == 0,
            Self::Tunnelled => programs + tunnel >= packets,
            // Whose first packet it is nobody knows.
            Self::Programs | Self::Learned | Self::Classes if flows == Flows::First => {
                programs + tunnel >= packets
            }
            Self::Learned if flows == Flows::Short => programs + tunnel >= packets,
            Self::Classes if flows == Flows::Short => {
                programs + tunnel >= packets && programs >= tunnel
            }
            // Where a port comes back just when the entry of its last connection is forgotten, the
            // new one takes the stack: by turns that is one in ten.
            Self::Programs if flows == Flows::Short => {
                programs + tunnel >= packets && programs >= SHORT_SHARE * tunnel
            }
            Self::Programs | Self::Learned | Self::Classes if flows == Flows::Many => {
                programs + tunnel >= packets && programs >= tunnel / 4
            }
            Self::Programs | Self::Learned | Self::Classes => {
                programs + tunnel >= packets
                    && tunnel.saturating_mul(LEARNED_SHARE)
                        <= programs.max(LEARNED_SHARE * BEGINNINGS)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(programs: u64, tunnel: u64, link: u64) -> Seen {
        Seen {
            programs,
            tunnel,
            link,
        }
    }

    #[test]
    fn one_packet_on_the_wrong_way_is_enough() {
        let holds = |way: Way, seen| way.holds(Flows::Long, seen, 1000);
        assert!(holds(Way::Kernel, seen(0, 1000, 1000)));
        assert!(!holds(Way::Kernel, seen(1, 1000, 1000)));
        assert!(holds(Way::Uplink, seen(0, 0, 1000)));
        assert!(!holds(Way::Uplink, seen(0, 1, 1000)));
    }

    #[test]
    fn too_few_packets_prove_nothing() {
        for way in [Way::Uplink, Way::Kernel, Way::Programs, Way::Learned] {
            assert!(!way.holds(Flows::Long, seen(0, 0, 0), 1));
        }
        assert!(!Way::Programs.holds(Flows::Short, seen(999, 0, 0), 1000));
        assert!(!Way::Programs.holds(Flows::Short, seen(0, 1000, 0), 1000));
        assert!(Way::Programs.holds(Flows::Short, seen(900, 100, 0), 1000));
        assert!(!Way::Programs.holds(Flows::Short, seen(800, 200, 0), 1000));
    }

    #[test]
    fn a_learned_flow_may_start_in_the_kernel_and_no_more() {
        let holds =
            |flows, programs, tunnel| Way::Learned.holds(flows, seen(programs, tunnel, 0), 10_000);
        assert!(holds(Flows::Long, 9_990, 10));
        assert!(!holds(Flows::Long, 5_000, 5_000));
        assert!(!holds(Flows::Long, 0, 10_000));
        assert!(holds(Flows::Short, 0, 10_000));
    }

    #[test]
    fn classes_carry_most_short_connections() {
        let holds = |flows, programs, tunnel| {
            Way::Classes.holds(flows, seen(programs, tunnel, 0), programs + tunnel)
        };
        assert!(holds(Flows::Short, 9_000, 1_000));
        assert!(!holds(Flows::Short, 1_000, 9_000));
        assert!(holds(Flows::First, 0, 9_000));
    }

    #[test]
    fn maps_made_anew_count_from_nothing() {
        assert_eq!(seen(3, 8, 9).since(seen(5, 5, 5)), seen(3, 3, 4));
    }
}
