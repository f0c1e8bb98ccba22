//! The difference between what the kernel has and what peers need, in the order in which it is
//! to be done.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::entries::{Actual, Entries, Form, FoundFdb, FoundNeighbour};
use crate::{
    forwarding::{Changes, Via},
    mac::MacAddr,
};

/// What turns [`Actual`] into [`Entries`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Routes of ours to delete first: their peer is gone, or a stranger's route is in front.
    pub(super) withdraw: Vec<(Ipv4Net, Form)>,
    /// FDB entries to set.
    pub(super) fdb: Vec<(MacAddr, Ipv4Addr)>,
    /// Neighbours to set.
    pub(super) neighbours: Vec<(Ipv4Addr, MacAddr)>,
    /// Bases whose next hop objects are to be made.
    pub(super) next_hops: Vec<Ipv4Addr>,
    /// Routes to set; a stranger's route of the same key is replaced.
    pub(super) routes: Vec<(Ipv4Net, Form)>,
    /// Bases whose next hop objects are to be deleted.
    pub(super) stale_next_hops: Vec<Ipv4Addr>,
    /// Neighbours to delete.
    pub(super) stale_neighbours: Vec<Ipv4Addr>,
    /// FDB entries to delete.
    pub(super) stale_fdb: Vec<(MacAddr, Option<Ipv4Addr>)>,
}

impl Plan {
    /// The difference. `wanted` has routes of the forms that [`Entries::choose_forms`] gave them.
    #[must_use]
    pub(super) fn between(actual: &Actual, wanted: &Entries) -> Self {
        let mut plan = Self::default();
        plan.compare_fdb(actual, wanted);
        plan.compare_neighbours(actual, wanted);
        plan.compare_routes(actual, wanted);
        plan.compare_next_hops(actual.next_hops.as_ref(), wanted);
        plan
    }

    fn compare_fdb(&mut self, actual: &Actual, wanted: &Entries) {
        for (&mac, &node) in &wanted.fdb {
            let right = FoundFdb {
                node: Some(node),
                ours: true,
            };
            if actual.fdb.get(&mac) != Some(&right) {
                self.fdb.push((mac, node));
            }
        }
        for (&mac, found) in &actual.fdb {
            if found.ours && !wanted.fdb.contains_key(&mac) {
                self.stale_fdb.push((mac, found.node));
            }
        }
    }

    fn compare_neighbours(&mut self, actual: &Actual, wanted: &Entries) {
        for (&base, &mac) in &wanted.neighbours {
            let right = FoundNeighbour {
                mac: Some(mac),
                permanent: true,
            };
            if actual.neighbours.get(&base) != Some(&right) {
                self.neighbours.push((base, mac));
            }
        }
        for (&base, found) in &actual.neighbours {
            if found.permanent && !wanted.neighbours.contains_key(&base) {
                self.stale_neighbours.push(base);
            }
        }
    }

    fn compare_routes(&mut self, actual: &Actual, wanted: &Entries) {
        let ours = |subnet: &Ipv4Net| {
            let found = actual.routes.get(subnet).into_iter().flatten();
            found.filter_map(|route| route.ours)
        };
        for (&subnet, &form) in &wanted.routes {
            let first = actual.routes.get(&subnet).and_then(|found| found.first());
            if first.is_some_and(|route| route.ours == Some(form)) {
                continue;
            }
            // The kernel refuses to put a route in front that stands further back.
            self.withdraw
                .extend(ours(&subnet).map(|form| (subnet, form)));
            self.routes.push((subnet, form));
        }
        for &subnet in actual.routes.keys() {
            if !wanted.routes.contains_key(&subnet) {
                self.withdraw
                    .extend(ours(&subnet).map(|form| (subnet, form)));
            }
        }
    }

    fn compare_next_hops(&mut self, actual: Option<&BTreeSet<Ipv4Addr>>, wanted: &Entries) {
        let Some(actual) = actual else { return };
        let through_objects = wanted
            .routes
            .iter()
            .filter(|(_, form)| **form == Form::Object);
        let needed: BTreeSet<_> = through_objects
            .map(|(subnet, _)| subnet.network())
            .collect();
        self.next_hops.extend(needed.difference(actual));
        self.stale_next_hops.extend(actual.difference(&needed));
    }

    /// The same from what changed and from what was programmed last; new routes take the form
    /// `new`. `None` where entries of two peers touch each other: then the whole has to be
    /// looked at.
    pub(super) fn of_changes(changes: &Changes, programmed: &Entries, new: Form) -> Option<Self> {
        let mut plan = Self::default();
        for (subnet, _) in &changes.remove {
            let peer = programmed.sole_peer(subnet)?;
            plan.withdraw.push((*subnet, peer.form));
            if peer.form == Form::Object {
                plan.stale_next_hops.push(peer.base);
            }
            plan.stale_neighbours.push(peer.base);
            plan.stale_fdb.push((peer.mac, Some(peer.node)));
        }
        let (mut macs, mut bases) = (BTreeSet::new(), BTreeSet::new());
        for (subnet, Via::Vxlan { node, vtep_mac }) in &changes.upsert {
            let base = subnet.network();
            if !macs.insert(*vtep_mac) || !bases.insert(base) {
                return None;
            }
            if !programmed.neighbours.contains_key(&base) {
                if programmed.fdb.contains_key(vtep_mac) {
                    return None;
                }
                if new == Form::Object {
                    plan.next_hops.push(base);
                }
                plan.routes.push((*subnet, new));
            } else {
                // A known peer by another way: its route stays.
                let old = programmed.sole_peer(subnet)?.mac;
                if old != *vtep_mac {
                    if programmed.fdb.contains_key(vtep_mac) {
                        return None;
                    }
                    plan.stale_fdb
                        .push((old, programmed.fdb.get(&old).copied()));
                }
            }
            plan.fdb.push((*vtep_mac, *node));
            if programmed.neighbours.get(&base) != Some(vtep_mac) {
                plan.neighbours.push((base, *vtep_mac));
            }
        }
        // What one peer leaves another may have taken up.
        let taken_up = |(mac, _): &(MacAddr, _)| macs.contains(mac);
        if plan.stale_fdb.iter().any(taken_up) {
            return None;
        }
        Some(plan)
    }

    /// Nothing is made for these bases that needs their neighbours, which the kernel refused.
    pub(super) fn without_routes(&mut self, unresolved: &BTreeSet<Ipv4Addr>) {
        self.next_hops.retain(|base| !unresolved.contains(base));
        self.routes
            .retain(|(subnet, _)| !unresolved.contains(&subnet.network()));
    }

    /// The routes of these bases are made plain: the kernel refused their objects.
    pub(super) fn without_objects(&mut self, refused: &BTreeSet<Ipv4Addr>) {
        for (subnet, form) in &mut self.routes {
            if refused.contains(&subnet.network()) {
                *form = Form::Plain;
            }
        }
    }

    /// Nothing to do.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests;
