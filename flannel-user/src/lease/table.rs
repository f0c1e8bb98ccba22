//! Every known lease, kept from a snapshot and the changes after it.
//!
//! The own lease is kept apart: whatever a source reports about it never makes
//! this node its own peer, and never counts as a change (contract section 8).

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use super::{Lease, SubnetKey};
use crate::source::LeaseEvent;

/// The leases of all nodes as of the last event.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    own_subnet: Ipv4Net,
    own: Option<Lease>,
    peers: BTreeMap<SubnetKey, Lease>,
}

impl LeaseTable {
    /// An empty table of the node that holds `own`.
    #[must_use]
    pub fn new(own: &SubnetKey) -> Self {
        Self {
            own_subnet: own.v4,
            own: None,
            peers: BTreeMap::new(),
        }
    }

    /// Takes over one event. True when it changed what peers there are or what
    /// any of them publishes; a renewal alone does not.
    pub fn apply(&mut self, event: LeaseEvent) -> bool {
        match event {
            LeaseEvent::Snapshot(leases) => self.replace(leases),
            LeaseEvent::Put(lease) => self.put(lease),
            LeaseEvent::Removed(key) => self.remove(&key),
        }
    }

    /// The leases of all other nodes, in order of their subnets.
    pub fn peers(&self) -> impl Iterator<Item = &Lease> {
        self.peers.values()
    }

    /// The leases of other nodes with exactly this IPv4 subnet, in the same order.
    pub fn peers_at(&self, subnet: &Ipv4Net) -> impl Iterator<Item = &Lease> {
        let first = SubnetKey {
            v4: *subnet,
            v6: None,
        };
        self.peers
            .range(first..)
            .map(|(_, lease)| lease)
            .take_while(move |lease| lease.key.v4 == first.v4)
    }

    /// The own lease as the source last reported it; `None` after its removal.
    /// Another node's public IP in it means that the subnet was taken away.
    #[must_use]
    pub fn own(&self) -> Option<&Lease> {
        self.own.as_ref()
    }

    fn replace(&mut self, leases: Vec<Lease>) -> bool {
        let before = std::mem::take(&mut self.peers);
        self.own = None;
        for lease in leases {
            self.put(lease);
        }
        let same = |(a, b): (&Lease, &Lease)| a.key == b.key && a.attributes == b.attributes;
        before.len() != self.peers.len() || !before.values().zip(self.peers.values()).all(same)
    }

    fn put(&mut self, lease: Lease) -> bool {
        if self.is_own(&lease.key) {
            self.own = Some(lease);
            return false;
        }
        let attributes = lease.attributes.clone();
        self.peers
            .insert(lease.key, lease)
            .is_none_or(|old| old.attributes != attributes)
    }

    fn remove(&mut self, key: &SubnetKey) -> bool {
        if self.is_own(key) {
            self.own = None;
            return false;
        }
        self.peers.remove(key).is_some()
    }

    fn is_own(&self, key: &SubnetKey) -> bool {
        key.v4 == self.own_subnet
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        time::{Duration, SystemTime},
    };

    use proptest::prelude::*;

    use super::*;
    use crate::lease::LeaseAttributes;

    fn key(subnet: u8) -> SubnetKey {
        format!("10.244.{subnet}.0-24").parse().expect("a key")
    }

    fn lease(subnet: u8, node: u8) -> Lease {
        Lease {
            key: key(subnet),
            attributes: LeaseAttributes::plain(Ipv4Addr::new(192, 168, 50, node)),
            expires: Some(SystemTime::UNIX_EPOCH),
        }
    }

    fn peers(table: &LeaseTable) -> Vec<(SubnetKey, u8)> {
        table
            .peers()
            .map(|lease| (lease.key, lease.attributes.public_ip.octets()[3]))
            .collect()
    }

    fn table_of_node_1() -> LeaseTable {
        let mut table = LeaseTable::new(&key(1));
        table.apply(LeaseEvent::Snapshot(vec![
            lease(3, 3),
            lease(1, 1),
            lease(2, 2),
        ]));
        table
    }

    #[test]
    fn the_own_lease_is_never_a_peer() {
        let mut table = table_of_node_1();
        assert_eq!(peers(&table), [(key(2), 2), (key(3), 3)]);
        assert_eq!(table.own(), Some(&lease(1, 1)));
        assert!(!table.apply(LeaseEvent::Put(lease(1, 9))));
        assert_eq!(table.own(), Some(&lease(1, 9)));
        assert!(!table.apply(LeaseEvent::Removed(key(1))));
        assert_eq!(table.own(), None);
        assert_eq!(peers(&table), [(key(2), 2), (key(3), 3)]);
    }

    #[test]
    fn a_dual_stack_lease_of_the_own_subnet_is_own() {
        let mut table = table_of_node_1();
        let mut dual = lease(1, 1);
        dual.key = "10.244.1.0-24&fd00::-64".parse().expect("a key");
        assert!(!table.apply(LeaseEvent::Put(dual)));
        assert_eq!(peers(&table).len(), 2);
    }

    #[test]
    fn changed_attributes_are_a_change_in_an_event_and_in_a_snapshot() {
        let mut table = table_of_node_1();
        assert!(table.apply(LeaseEvent::Put(lease(2, 7))));
        assert!(!table.apply(LeaseEvent::Put(lease(2, 7))));
        let again = vec![lease(1, 1), lease(2, 7), lease(3, 3)];
        assert!(!table.apply(LeaseEvent::Snapshot(again)));
        let moved = vec![lease(1, 1), lease(2, 8), lease(3, 3)];
        assert!(table.apply(LeaseEvent::Snapshot(moved)));
        assert_eq!(peers(&table), [(key(2), 8), (key(3), 3)]);
    }

    #[test]
    fn a_renewal_is_kept_but_is_no_change() {
        let mut table = table_of_node_1();
        let mut renewed = lease(2, 2);
        renewed.expires = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(60));
        assert!(!table.apply(LeaseEvent::Put(renewed.clone())));
        assert_eq!(table.peers().next(), Some(&renewed));
    }

    #[test]
    fn a_snapshot_drops_what_it_does_not_name() {
        let mut table = table_of_node_1();
        assert!(table.apply(LeaseEvent::Snapshot(vec![lease(3, 3)])));
        assert_eq!(peers(&table), [(key(3), 3)]);
        assert_eq!(table.own(), None);
    }

    #[test]
    fn a_removal_counts_once() {
        let mut table = table_of_node_1();
        assert!(table.apply(LeaseEvent::Removed(key(2))));
        assert!(!table.apply(LeaseEvent::Removed(key(2))));
        assert_eq!(peers(&table), [(key(3), 3)]);
    }

    proptest! {
        /// Events applied one by one give what a snapshot of their outcome gives,
        /// and `apply` is true exactly when the peers differ.
        #[test]
        fn changes_add_up_to_the_snapshot(steps in prop::collection::vec((0u8..6, 0u8..3), 0..40)) {
            let mut table = LeaseTable::new(&key(0));
            let mut model = BTreeMap::new();
            for (subnet, node) in steps {
                let before = peers(&table);
                let changed = if node == 0 {
                    model.remove(&subnet);
                    table.apply(LeaseEvent::Removed(key(subnet)))
                } else {
                    model.insert(subnet, node);
                    table.apply(LeaseEvent::Put(lease(subnet, node)))
                };
                prop_assert_eq!(changed, before != peers(&table));
            }
            let mut fresh = LeaseTable::new(&key(0));
            fresh.apply(LeaseEvent::Snapshot(
                model.iter().map(|(subnet, node)| lease(*subnet, *node)).collect(),
            ));
            prop_assert_eq!(peers(&table), peers(&fresh));
            prop_assert_eq!(table.own(), fresh.own());
        }
    }
}
