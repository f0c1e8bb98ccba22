//! Events that own changes cause, where the kernel does not say whose they are.
//!
//! Most events name the socket that asked for the change and are never heard. Two kinds come from
//! port 0: every change of the FDB (`vxlan_fdb_notify`), and the end of a neighbour that was
//! deleted (`neigh_cleanup_and_release`). Taken for somebody else's doing, each lease that goes
//! would cost a look at everything.

use std::time::{Duration, Instant};

use crate::datapath::kernel_events::KernelEvent;

/// How long after an own change its event may come.
const PATIENCE: Duration = Duration::from_millis(200);

/// Of what an event from port 0 tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Echo {
    /// An FDB entry was set or deleted.
    Fdb,
    /// A neighbour is gone. Somebody else's deletion is told from their port as well.
    NeighbourGone,
}

impl Echo {
    /// What an own change of `device` may have caused.
    pub(super) fn of(event: &KernelEvent, device: u32) -> Option<Self> {
        match *event {
            KernelEvent::Neighbours {
                origin,
                index,
                fdb,
                removed,
            } if origin.namespace.is_none() && origin.port == 0 && index == device => match fdb {
                true => Some(Self::Fdb),
                false => removed.then_some(Self::NeighbourGone),
            },
            _ => None,
        }
    }
}

/// How many are still to come.
#[derive(Debug)]
pub(super) struct Echoes {
    fdb: usize,
    neighbours_gone: usize,
    until: Instant,
}

impl Echoes {
    /// None.
    pub(super) fn none() -> Self {
        Self {
            fdb: 0,
            neighbours_gone: 0,
            until: Instant::now(),
        }
    }

    /// So many of this kind follow a change that was just made.
    pub(super) fn expect(&mut self, kind: Echo, count: usize) {
        self.forget_late();
        *self.of(kind) += count;
        self.until = Instant::now() + PATIENCE;
    }

    /// Whoever reads events does so only now.
    pub(super) fn wait_longer(&mut self) {
        self.until = Instant::now() + PATIENCE;
    }

    /// Takes one event as one of these, if it may be.
    pub(super) fn take(&mut self, kind: Echo) -> bool {
        self.forget_late();
        let left = self.of(kind);
        let taken = *left > 0;
        *left = left.saturating_sub(1);
        taken
    }

    fn forget_late(&mut self) {
        if Instant::now() > self.until {
            (self.fdb, self.neighbours_gone) = (0, 0);
        }
    }

    fn of(&mut self, kind: Echo) -> &mut usize {
        match kind {
            Echo::Fdb => &mut self.fdb,
            Echo::NeighbourGone => &mut self.neighbours_gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::kernel_events::Origin;

    #[test]
    fn only_what_the_device_told_without_a_port_may_be_an_echo() {
        let told = |port, index, fdb, removed| KernelEvent::Neighbours {
            origin: Origin {
                namespace: None,
                port,
            },
            index,
            fdb,
            removed,
        };
        let rows = [
            (told(0, 7, true, false), Some(Echo::Fdb)),
            (told(0, 7, true, true), Some(Echo::Fdb)),
            (told(0, 7, false, true), Some(Echo::NeighbourGone)),
            (told(0, 7, false, false), None),
            (told(1, 7, false, true), None),
            (told(0, 9, true, false), None),
            (KernelEvent::Overrun, None),
        ];
        for (event, expected) in rows {
            assert_eq!(Echo::of(&event, 7), expected, "{event:?}");
        }
    }

    #[test]
    fn one_event_more_than_expected_is_somebody_elses() {
        let mut echoes = Echoes::none();
        assert!(!echoes.take(Echo::Fdb));
        echoes.expect(Echo::Fdb, 2);
        echoes.expect(Echo::NeighbourGone, 1);
        assert!(echoes.take(Echo::Fdb) && echoes.take(Echo::Fdb));
        assert!(!echoes.take(Echo::Fdb));
        assert!(echoes.take(Echo::NeighbourGone));
        assert!(!echoes.take(Echo::NeighbourGone));
    }

    #[test]
    fn what_comes_late_is_somebody_elses() {
        let mut echoes = Echoes::none();
        echoes.expect(Echo::Fdb, 1);
        echoes.until = Instant::now() - Duration::from_millis(1);
        assert!(!echoes.take(Echo::Fdb));
        echoes.expect(Echo::NeighbourGone, 1);
        assert!(!echoes.take(Echo::Fdb), "forgotten");
    }
}
