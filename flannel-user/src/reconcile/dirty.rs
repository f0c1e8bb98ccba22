//! What an event of the kernel makes worth another look.

use crate::datapath::kernel_events::KernelEvent;

/// What has to be looked at again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Dirty {
    pub(super) kernel: bool,
    pub(super) pods: bool,
    pub(super) next_hops: bool,
    /// Ask the kernel even where nothing is known to have changed.
    pub(super) thorough: bool,
}

impl Dirty {
    pub(super) const ALL: Self = Self {
        kernel: true,
        pods: true,
        next_hops: true,
        thorough: false,
    };

    pub(super) fn any(self) -> bool {
        self.kernel || self.pods || self.next_hops
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self {
            kernel: self.kernel || other.kernel,
            pods: self.pods || other.pods,
            next_hops: self.next_hops || other.next_hops,
            thorough: self.thorough || other.thorough,
        }
    }
}

/// Which parts an event concerns; `own` is the port of the kernel datapath's socket.
pub(super) fn concerns(event: &KernelEvent, device: u32, own: u32) -> Dirty {
    let Some(origin) = event.origin() else {
        return Dirty::ALL;
    };
    if origin.port == own {
        return Dirty::default();
    }
    let here = origin.namespace.is_none();
    match *event {
        // A pod's own link and addresses live in another namespace.
        KernelEvent::Links { .. } | KernelEvent::Addresses { .. } if !here => Dirty {
            pods: true,
            ..Dirty::default()
        },
        KernelEvent::Links { index, .. } | KernelEvent::Addresses { index, .. } => Dirty {
            kernel: index == device,
            ..Dirty::ALL
        },
        KernelEvent::Routes { .. } if here => Dirty::ALL,
        KernelEvent::NextHops { index, .. } if here => Dirty {
            kernel: index == Some(device),
            next_hops: index != Some(device),
            ..Dirty::default()
        },
        // Our own filters come with their interface; others must not be passed by.
        KernelEvent::Queueing { .. } if here => Dirty {
            pods: true,
            ..Dirty::default()
        },
        KernelEvent::Neighbours { index, .. } if here && index == device => Dirty {
            kernel: true,
            ..Dirty::default()
        },
        _ => Dirty::default(),
    }
}

/// Is this event worth waking the loop at all? Neighbours elsewhere come and go all the time.
#[must_use]
pub fn is_relevant(event: &KernelEvent) -> bool {
    match event {
        KernelEvent::Neighbours { origin, .. }
        | KernelEvent::Routes { origin, .. }
        | KernelEvent::NextHops { origin, .. }
        | KernelEvent::Queueing { origin, .. } => origin.namespace.is_none(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::kernel_events::Origin;

    const DEVICE: u32 = 7;
    const OWN: u32 = 4242;
    const HERE: Origin = Origin {
        namespace: None,
        port: 1,
    };
    const POD: Origin = Origin {
        namespace: Some(3),
        port: 1,
    };

    #[test]
    fn each_event_wakes_what_it_concerns() {
        let pods = Dirty {
            pods: true,
            ..Dirty::default()
        };
        let kernel = Dirty {
            kernel: true,
            ..Dirty::default()
        };
        let rows = [
            (KernelEvent::Overrun, Dirty::ALL),
            (
                KernelEvent::Links {
                    origin: HERE,
                    index: DEVICE,
                    removed: true,
                },
                Dirty::ALL,
            ),
            (
                KernelEvent::Links {
                    origin: HERE,
                    index: 9,
                    removed: false,
                },
                Dirty {
                    kernel: false,
                    ..Dirty::ALL
                },
            ),
            (
                KernelEvent::Addresses {
                    origin: POD,
                    index: 2,
                    removed: false,
                },
                pods,
            ),
            (
                KernelEvent::Routes {
                    origin: HERE,
                    index: None,
                    table: 254,
                    removed: true,
                },
                Dirty::ALL,
            ),
            (
                KernelEvent::Routes {
                    origin: POD,
                    index: None,
                    table: 254,
                    removed: true,
                },
                Dirty::default(),
            ),
            (
                KernelEvent::NextHops {
                    origin: HERE,
                    index: Some(DEVICE),
                },
                kernel,
            ),
            (
                KernelEvent::NextHops {
                    origin: HERE,
                    index: None,
                },
                Dirty {
                    next_hops: true,
                    ..Dirty::default()
                },
            ),
            (
                KernelEvent::Neighbours {
                    origin: HERE,
                    index: DEVICE,
                    fdb: true,
                    removed: true,
                },
                kernel,
            ),
            (
                KernelEvent::Neighbours {
                    origin: HERE,
                    index: 9,
                    fdb: false,
                    removed: false,
                },
                Dirty::default(),
            ),
        ];
        for (event, expected) in rows {
            assert_eq!(concerns(&event, DEVICE, OWN), expected, "{event:?}");
        }
    }

    #[test]
    fn our_own_changes_wake_nothing() {
        let origin = Origin {
            namespace: None,
            port: OWN,
        };
        let event = KernelEvent::Routes {
            origin,
            index: Some(DEVICE),
            table: 254,
            removed: false,
        };
        assert_eq!(concerns(&event, DEVICE, OWN), Dirty::default());
    }
}
