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

    /// Becomes what `update` says and tells what that changed. News of a few subnets
    /// cost nothing for the others.
    pub fn update(&mut self, update: Update) -> Changes {
        let news = match update {
            Update::Whole(table) => {
                let changes = Changes::between(self, &table);
                *self = table;
                return changes;
            }
            Update::Some(news) => news,
        };
        let mut changes = Changes::default();
        for (subnet, way) in news {
            match way {
                Some(via) => {
                    if self.0.insert(subnet, via) != Some(via) {
                        changes.upsert.push((subnet, via));
                    }
                }
                None => {
                    let was = self.0.remove(&subnet);
                    changes.remove.extend(was.map(|via| (subnet, via)));
                }
            }
        }
        changes
    }
}

/// News of the wanted table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// All of it.
    Whole(ForwardingTable),
    /// The way to each of these subnets; `None` where there is none any more.
    Some(BTreeMap<Ipv4Net, Option<Via>>),
}

impl Default for Update {
    fn default() -> Self {
        Self::Some(BTreeMap::new())
    }
}

impl Update {
    /// What this and then `later` come to.
    pub fn then(&mut self, later: Self) {
        match (&mut *self, later) {
            (_, whole @ Self::Whole(_)) => *self = whole,
            (Self::Whole(table), later @ Self::Some(_)) => {
                table.update(later);
            }
            (Self::Some(news), Self::Some(later)) => news.extend(later),
        }
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

    prop_compose! {
        fn updates()(whole in any::<bool>(), table in tables(), gone in prop::collection::vec(0u8..8, 0..4))
            -> Update {
            if whole {
                return Update::Whole(table);
            }
            let subnet = |number| Ipv4Net::new(Ipv4Addr::new(10, 244, number, 0), 24).expect("length");
            let mut news: BTreeMap<_, _> =
                table.0.into_iter().map(|(subnet, via)| (subnet, Some(via))).collect();
            news.extend(gone.into_iter().map(|number| (subnet(number), None)));
            Update::Some(news)
        }
    }

    proptest! {
        #[test]
        fn an_update_tells_exactly_what_it_changed(before in tables(), update in updates()) {
            let mut after = before.clone();
            let mut changes = after.update(update);
            let mut expected = Changes::between(&before, &after);
            for list in [&mut changes.upsert, &mut changes.remove, &mut expected.upsert, &mut expected.remove] {
                list.sort_by_key(|(subnet, _)| *subnet);
            }
            prop_assert_eq!(changes, expected);
        }

        #[test]
        fn updates_in_one_are_updates_in_turn(
            before in tables(),
            updates in prop::collection::vec(updates(), 0..5),
        ) {
            let (mut in_turn, mut at_once) = (before.clone(), before);
            let mut sum = Update::default();
            for update in updates {
                in_turn.update(update.clone());
                sum.then(update);
            }
            at_once.update(sum);
            prop_assert_eq!(at_once, in_turn);
        }

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
