//! What the node must know to reach every peer, and the difference between two such tables.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

use crate::mac::MacAddr;

/// How one peer's pod subnet is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// VXLAN to the node's public address.
    Vxlan {
        /// Outer destination.
        node: Ipv4Addr,
        /// MAC address of the peer's tunnel device: FDB entry and inner destination.
        vtep_mac: MacAddr,
    },
}

/// Pod subnet of a peer → the way there. The own subnet is never in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ForwardingTable(pub BTreeMap<Ipv4Net, Via>);

/// What turns one table into another.
///
/// No subnet is in both lists, so their order does not matter. An entry whose way
/// changed is only in `upsert`: whoever applies it replaces every part of the old way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Entries to install or overwrite.
    pub upsert: Vec<(Ipv4Net, Via)>,
    /// Entries to withdraw, with the way they had.
    pub remove: Vec<(Ipv4Net, Via)>,
}

impl Changes {
    /// The difference, in order of the subnets. Whole entries are compared, and both
    /// tables are walked side by side, so that nothing left over survives.
    #[must_use]
    pub fn between(actual: &ForwardingTable, wanted: &ForwardingTable) -> Self {
        let mut changes = Self::default();
        let mut old = actual.0.iter().peekable();
        for (subnet, via) in &wanted.0 {
            while let Some((gone, was)) = old.next_if(|(other, _)| *other < subnet) {
                changes.remove.push((*gone, *was));
            }
            let same = old.next_if(|(other, _)| *other == subnet);
            if same.is_none_or(|(_, was)| was != via) {
                changes.upsert.push((*subnet, *via));
            }
        }
        changes
            .remove
            .extend(old.map(|(subnet, via)| (*subnet, *via)));
        changes
    }

    /// True when the tables were equal.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.upsert.is_empty() && self.remove.is_empty()
    }
}

impl ForwardingTable {
    /// Takes over changes as a datapath does.
    pub fn apply(&mut self, changes: &Changes) {
        for (subnet, _) in &changes.remove {
            self.0.remove(subnet);
        }
        self.0.extend(changes.upsert.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        /// Few subnets and few nodes, so that tables share some of both.
        fn tables()(
            entries in prop::collection::btree_map(0u8..8, (0u8..3, 0u8..3), 0..8),
        ) -> ForwardingTable {
            ForwardingTable(entries.into_iter().map(|(subnet, (node, mac))| (
                Ipv4Net::new(Ipv4Addr::new(10, 244, subnet, 0), 24).expect("length"),
                Via::Vxlan {
                    node: Ipv4Addr::new(192, 168, 50, node),
                    vtep_mac: MacAddr([2, 0, 0, 0, 0, mac]),
                },
            )).collect())
        }
    }

    proptest! {
        #[test]
        fn applied_changes_give_what_is_wanted(actual in tables(), wanted in tables()) {
            let changes = Changes::between(&actual, &wanted);
            let mut table = actual.clone();
            table.apply(&changes);
            prop_assert_eq!(&table, &wanted);
            prop_assert_eq!(changes.is_empty(), actual == wanted);
            prop_assert!(Changes::between(&table, &wanted).is_empty());
        }

        #[test]
        fn changes_touch_nothing_that_is_right(actual in tables(), wanted in tables()) {
            let changes = Changes::between(&actual, &wanted);
            for (subnet, via) in &changes.upsert {
                prop_assert_ne!(actual.0.get(subnet), Some(via));
            }
            for (subnet, via) in &changes.remove {
                prop_assert_eq!(actual.0.get(subnet), Some(via));
            }
            let upserted: BTreeSet<_> = changes.upsert.iter().map(|(subnet, _)| subnet).collect();
            prop_assert!(changes.remove.iter().all(|(subnet, _)| !upserted.contains(subnet)));
        }
    }
}
