//! What one peer needs in the kernel, as values: an FDB entry, a neighbour, a route
//! (contract section 9.4).
//!
//! ```text
//! 02:11:22:33:44:55 dst 192.168.50.2 self permanent          FDB: tunnel MAC to node
//! 10.244.1.0 dev flannel.1 lladdr 02:11:22:33:44:55 PERMANENT   neighbour: subnet base to tunnel MAC
//! 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink          route: subnet through its base
//! ```
//!
//! Order: FDB and neighbour before the route, because the kernel would ask for the neighbour at
//! once; and the FDB entry before the neighbour, so that a peer which changes its MAC loses no
//! packet. What is not needed any more goes last, its route first.
//!
//! Ours, and therefore removed when no peer needs it, is on the tunnel device and of exactly this
//! form: routes of protocol boot through their own base, permanent neighbours, permanent
//! unicast FDB entries. Everything else there belongs to somebody else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

use crate::{
    forwarding::{Changes, ForwardingTable, Via},
    mac::MacAddr,
};

/// The entries of any number of peers. A route is told by its subnet alone: gateway
/// (the base), device and flags follow from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// Tunnel MAC → node.
    pub fdb: BTreeMap<MacAddr, Ipv4Addr>,
    /// Subnet base → tunnel MAC.
    pub neighbours: BTreeMap<Ipv4Addr, MacAddr>,
    /// Subnets.
    pub routes: BTreeSet<Ipv4Net>,
}

/// Two peers want the same entry with different values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// One MAC cannot stand for two nodes.
    #[error(
        "peer {subnet} publishes VTEP MAC {mac} of node {node}, but that MAC already stands for node {holder}; \
         restart flannel on one of the two nodes with a MAC of its own"
    )]
    Mac {
        /// The subnet that is left out.
        subnet: Ipv4Net,
        /// The MAC in question.
        mac: MacAddr,
        /// The node that comes too late.
        node: Ipv4Addr,
        /// The node that keeps the MAC.
        holder: Ipv4Addr,
    },
    /// One base address cannot stand for two MACs.
    #[error(
        "peer {subnet} shares its base address with the subnet of another node; remove one of the two leases"
    )]
    Base {
        /// The subnet that is left out.
        subnet: Ipv4Net,
    },
}

impl Entries {
    /// What `table` needs. Of peers in conflict the first in table order is kept.
    #[must_use]
    pub fn wanted(table: &ForwardingTable) -> (Self, Vec<Conflict>) {
        let mut wanted = Self::default();
        let mut conflicts = Vec::new();
        for (&subnet, via) in &table.0 {
            let Via::Vxlan { node, vtep_mac } = *via;
            let base = subnet.network();
            let holder = wanted.fdb.get(&vtep_mac).copied().unwrap_or(node);
            let neighbour = wanted.neighbours.get(&base).copied().unwrap_or(vtep_mac);
            if holder != node {
                conflicts.push(Conflict::Mac {
                    subnet,
                    mac: vtep_mac,
                    node,
                    holder,
                });
            } else if neighbour != vtep_mac {
                conflicts.push(Conflict::Base { subnet });
            } else {
                wanted.fdb.insert(vtep_mac, node);
                wanted.neighbours.insert(base, vtep_mac);
                wanted.routes.insert(subnet);
            }
        }
        (wanted, conflicts)
    }

    /// Base, MAC and node of the peer behind `subnet`, if it shares none of its entries.
    fn sole_peer(&self, subnet: &Ipv4Net) -> Option<(Ipv4Addr, MacAddr, Ipv4Addr)> {
        let base = subnet.network();
        let of_base = Ipv4Net::new(base, 0).ok()?..=Ipv4Net::new(base, 32).ok()?;
        let mac = *self.neighbours.get(&base)?;
        let node = *self.fdb.get(&mac)?;
        let users = self.neighbours.values().filter(|other| **other == mac);
        let is_sole = self.routes.contains(subnet)
            && self.routes.range(of_base).count() == 1
            && users.count() == 1;
        is_sole.then_some((base, mac, node))
    }

    /// What is programmed once `plan` was carried out.
    pub(super) fn follow(&mut self, plan: &Plan) {
        for subnet in &plan.withdraw {
            self.routes.remove(subnet);
        }
        for base in &plan.stale_neighbours {
            self.neighbours.remove(base);
        }
        for (mac, _) in &plan.stale_fdb {
            self.fdb.remove(mac);
        }
        self.fdb.extend(plan.fdb.iter().copied());
        self.neighbours.extend(plan.neighbours.iter().copied());
        self.routes.extend(plan.routes.iter().copied());
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.fdb.len() + self.neighbours.len() + self.routes.len()
    }

    /// No peer needs anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An FDB entry of the tunnel device as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundFdb {
    /// Outer destination, if it is an IPv4 address.
    pub(super) node: Option<Ipv4Addr>,
    /// Permanent, and without a port, VNI or device of its own.
    pub(super) ours: bool,
}

/// A neighbour on the tunnel device as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundNeighbour {
    /// Its MAC, if it has one.
    pub(super) mac: Option<MacAddr>,
    /// Of state PERMANENT.
    pub(super) permanent: bool,
}

/// A route of the main table without TOS and metric, the key that ours have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundRoute {
    /// Exactly the route of section 9.4.
    pub(super) ours: bool,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Actual {
    /// Unicast FDB entries of the device.
    pub(super) fdb: BTreeMap<MacAddr, FoundFdb>,
    /// IPv4 neighbours on the device.
    pub(super) neighbours: BTreeMap<Ipv4Addr, FoundNeighbour>,
    /// Routes by destination; the kernel uses the first of each list.
    pub(super) routes: BTreeMap<Ipv4Net, Vec<FoundRoute>>,
}

/// What turns [`Actual`] into [`Entries`], in the order in which it is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Routes of ours to delete first: their peer is gone, or a stranger's route is in front.
    pub(super) withdraw: Vec<Ipv4Net>,
    /// FDB entries to set.
    pub(super) fdb: Vec<(MacAddr, Ipv4Addr)>,
    /// Neighbours to set.
    pub(super) neighbours: Vec<(Ipv4Addr, MacAddr)>,
    /// Routes to set; a stranger's route of the same key is replaced.
    pub(super) routes: Vec<Ipv4Net>,
    /// Neighbours to delete.
    pub(super) stale_neighbours: Vec<Ipv4Addr>,
    /// FDB entries to delete.
    pub(super) stale_fdb: Vec<(MacAddr, Option<Ipv4Addr>)>,
}

impl Plan {
    /// The difference.
    #[must_use]
    pub(super) fn between(actual: &Actual, wanted: &Entries) -> Self {
        let mut plan = Self::default();

        for (&mac, &node) in &wanted.fdb {
            let right = FoundFdb {
                node: Some(node),
                ours: true,
            };
            if actual.fdb.get(&mac) != Some(&right) {
                plan.fdb.push((mac, node));
            }
        }
        for (&mac, found) in &actual.fdb {
            if found.ours && !wanted.fdb.contains_key(&mac) {
                plan.stale_fdb.push((mac, found.node));
            }
        }

        for (&base, &mac) in &wanted.neighbours {
            let right = FoundNeighbour {
                mac: Some(mac),
                permanent: true,
            };
            if actual.neighbours.get(&base) != Some(&right) {
                plan.neighbours.push((base, mac));
            }
        }
        for (&base, found) in &actual.neighbours {
            if found.permanent && !wanted.neighbours.contains_key(&base) {
                plan.stale_neighbours.push(base);
            }
        }

        for &subnet in &wanted.routes {
            let found = actual.routes.get(&subnet).map_or(&[][..], Vec::as_slice);
            if found.first().is_some_and(|route| route.ours) {
                continue;
            }
            // The kernel refuses to put a route in front that stands further back.
            if found.iter().any(|route| route.ours) {
                plan.withdraw.push(subnet);
            }
            plan.routes.push(subnet);
        }
        for (&subnet, found) in &actual.routes {
            if found.iter().any(|route| route.ours) && !wanted.routes.contains(&subnet) {
                plan.withdraw.push(subnet);
            }
        }
        plan
    }

    /// The same from what changed and from what was programmed last. `None` where entries of two
    /// peers touch each other: then the whole has to be looked at.
    pub(super) fn of_changes(changes: &Changes, programmed: &Entries) -> Option<Self> {
        let mut plan = Self::default();
        for (subnet, _) in &changes.remove {
            let (base, mac, node) = programmed.sole_peer(subnet)?;
            plan.withdraw.push(*subnet);
            plan.stale_neighbours.push(base);
            plan.stale_fdb.push((mac, Some(node)));
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
                plan.routes.push(*subnet);
            } else {
                // A known peer by another way: its route stays.
                let (_, old, _) = programmed.sole_peer(subnet)?;
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

    /// Nothing to do.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a network")
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().expect("an address")
    }

    fn mac(last: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, last])
    }

    fn table(rows: &[(&str, &str, u8)]) -> ForwardingTable {
        ForwardingTable(
            rows.iter()
                .map(|(subnet, node, last)| {
                    let via = Via::Vxlan {
                        node: ip(node),
                        vtep_mac: mac(*last),
                    };
                    (net(subnet), via)
                })
                .collect(),
        )
    }

    /// The kernel state in which nothing but `entries` exists.
    fn as_found(entries: &Entries) -> Actual {
        Actual {
            fdb: entries
                .fdb
                .iter()
                .map(|(&mac, &node)| {
                    let found = FoundFdb {
                        node: Some(node),
                        ours: true,
                    };
                    (mac, found)
                })
                .collect(),
            neighbours: entries
                .neighbours
                .iter()
                .map(|(&base, &mac)| {
                    let found = FoundNeighbour {
                        mac: Some(mac),
                        permanent: true,
                    };
                    (base, found)
                })
                .collect(),
            routes: entries
                .routes
                .iter()
                .map(|&subnet| (subnet, vec![FoundRoute { ours: true }]))
                .collect(),
        }
    }

    fn wanted(rows: &[(&str, &str, u8)]) -> Entries {
        let (entries, conflicts) = Entries::wanted(&table(rows));
        assert_eq!(conflicts, []);
        entries
    }

    const TWO: &[(&str, &str, u8)] = &[
        ("10.244.1.0/24", "192.168.50.1", 1),
        ("10.244.2.0/24", "192.168.50.2", 2),
    ];

    #[test]
    fn an_empty_kernel_gets_everything_and_a_right_one_nothing() {
        let entries = wanted(TWO);
        let plan = Plan::between(&Actual::default(), &entries);
        assert_eq!(
            plan.fdb.len() + plan.neighbours.len() + plan.routes.len(),
            6
        );
        assert!(plan.withdraw.is_empty() && plan.stale_fdb.is_empty());
        assert!(Plan::between(&as_found(&entries), &entries).is_empty());
    }

    /// A few changes give the plan and the entries of a whole look, or no plan at all.
    #[test]
    fn the_plan_of_a_few_changes_is_that_of_the_whole() {
        const THIRD: (&str, &str, u8) = ("10.244.3.0/24", "192.168.50.3", 3);
        let more = [TWO[0], TWO[1], THIRD];
        let rows: &[(&[_], &[_], bool)] = &[
            (TWO, &more, true),
            (&more, TWO, true),
            (TWO, &[TWO[0], THIRD], true),
            (TWO, &[], true),
            // Another address, another MAC, both.
            (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.9", 2)], true),
            (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.2", 9)], true),
            (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.9", 9)], true),
            // Two that change places, another's MAC, a MAC that goes from one to another.
            (
                TWO,
                &[
                    ("10.244.1.0/24", "192.168.50.2", 2),
                    ("10.244.2.0/24", "192.168.50.1", 1),
                ],
                false,
            ),
            (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.1", 1)], false),
            (TWO, &[("10.244.2.0/24", "192.168.50.1", 1)], false),
            // A MAC that is in use, a base that is in use, a MAC that stays in use.
            (
                TWO,
                &[TWO[0], TWO[1], ("10.244.3.0/24", "192.168.50.2", 2)],
                false,
            ),
            (
                TWO,
                &[TWO[0], TWO[1], ("10.244.2.0/25", "192.168.50.3", 3)],
                false,
            ),
            (
                &[TWO[0], ("10.244.3.0/24", "192.168.50.1", 1)],
                &TWO[..1],
                false,
            ),
        ];
        for (before, after, is_simple) in rows {
            let mut programmed = wanted(before);
            let changes = Changes::between(&table(before), &table(after));
            let plan = Plan::of_changes(&changes, &programmed);
            assert_eq!(plan.is_some(), *is_simple, "{after:?}");
            let Some(plan) = plan else { continue };
            programmed.follow(&plan);
            let whole = Plan::between(&as_found(&wanted(before)), &wanted(after));
            let sorted = |mut plan: Plan| {
                plan.stale_fdb.sort();
                plan.fdb.sort();
                plan
            };
            assert_eq!(sorted(plan), sorted(whole), "{after:?}");
            assert_eq!(programmed, wanted(after));
        }
    }

    #[test]
    fn a_vanished_peer_leaves_nothing() {
        let plan = Plan::between(&as_found(&wanted(TWO)), &wanted(&TWO[..1]));
        assert_eq!(
            plan,
            Plan {
                withdraw: vec![net("10.244.2.0/24")],
                stale_neighbours: vec![ip("10.244.2.0")],
                stale_fdb: vec![(mac(2), Some(ip("192.168.50.2")))],
                ..Plan::default()
            }
        );
    }

    #[test]
    fn a_new_mac_replaces_the_neighbour_and_the_old_fdb_entry() {
        let after = wanted(&[TWO[0], ("10.244.2.0/24", "192.168.50.2", 9)]);
        let plan = Plan::between(&as_found(&wanted(TWO)), &after);
        assert_eq!(
            plan,
            Plan {
                fdb: vec![(mac(9), ip("192.168.50.2"))],
                neighbours: vec![(ip("10.244.2.0"), mac(9))],
                stale_fdb: vec![(mac(2), Some(ip("192.168.50.2")))],
                ..Plan::default()
            }
        );
    }

    #[test]
    fn a_new_address_replaces_the_fdb_entry_alone() {
        let after = wanted(&[TWO[0], ("10.244.2.0/24", "192.168.50.7", 2)]);
        let plan = Plan::between(&as_found(&wanted(TWO)), &after);
        assert_eq!(
            plan,
            Plan {
                fdb: vec![(mac(2), ip("192.168.50.7"))],
                ..Plan::default()
            }
        );
    }

    #[test]
    fn a_strangers_route_in_front_is_replaced_and_elsewhere_left_alone() {
        let entries = wanted(TWO);
        let mut actual = as_found(&entries);
        let stranger = FoundRoute { ours: false };
        actual.routes.insert(net("10.244.1.0/24"), vec![stranger]);
        actual.routes.insert(
            net("10.244.2.0/24"),
            vec![stranger, FoundRoute { ours: true }],
        );
        actual.routes.insert(net("0.0.0.0/0"), vec![stranger]);
        assert_eq!(
            Plan::between(&actual, &entries),
            Plan {
                withdraw: vec![net("10.244.2.0/24")],
                routes: vec![net("10.244.1.0/24"), net("10.244.2.0/24")],
                ..Plan::default()
            }
        );
    }

    #[test]
    fn what_others_put_on_the_device_stays_unless_a_peer_needs_the_key() {
        let entries = wanted(TWO);
        let mut actual = as_found(&entries);
        let learned = |node| FoundFdb {
            node: Some(ip(node)),
            ours: false,
        };
        actual.fdb.insert(mac(1), learned("192.168.50.66"));
        actual.fdb.insert(mac(77), learned("192.168.50.77"));
        let failed = FoundNeighbour {
            mac: None,
            permanent: false,
        };
        actual.neighbours.insert(ip("10.244.1.0"), failed);
        actual.neighbours.insert(ip("10.244.1.9"), failed);
        assert_eq!(
            Plan::between(&actual, &entries),
            Plan {
                fdb: vec![(mac(1), ip("192.168.50.1"))],
                neighbours: vec![(ip("10.244.1.0"), mac(1))],
                ..Plan::default()
            }
        );
    }

    #[test]
    fn peers_in_conflict_do_not_flap_and_are_named() {
        let (entries, conflicts) = Entries::wanted(&table(&[
            ("10.244.1.0/24", "192.168.50.1", 1),
            ("10.244.2.0/24", "192.168.50.2", 1),
            ("10.244.3.0/24", "192.168.50.3", 3),
            ("10.244.3.0/25", "192.168.50.4", 4),
        ]));
        assert_eq!(
            entries.routes,
            BTreeSet::from([net("10.244.1.0/24"), net("10.244.3.0/24")])
        );
        assert_eq!(
            conflicts,
            [
                Conflict::Mac {
                    subnet: net("10.244.2.0/24"),
                    mac: mac(1),
                    node: ip("192.168.50.2"),
                    holder: ip("192.168.50.1"),
                },
                Conflict::Base {
                    subnet: net("10.244.3.0/25")
                },
            ]
        );
    }

    #[test]
    fn one_node_may_hold_two_subnets() {
        let (entries, conflicts) = Entries::wanted(&table(&[
            ("10.244.1.0/24", "192.168.50.1", 1),
            ("10.244.2.0/24", "192.168.50.1", 1),
        ]));
        assert_eq!(conflicts, []);
        assert_eq!((entries.fdb.len(), entries.routes.len()), (1, 2));
    }
}
