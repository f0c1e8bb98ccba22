//! What one peer needs in the kernel, as values: an FDB entry, a neighbour, a route
//! (contract section 9.4).
//!
//! ```text
//! 02:11:22:33:44:55 dst 192.168.50.2 self permanent          FDB: tunnel MAC to node
//! 10.244.1.0 dev flannel.1 lladdr 02:11:22:33:44:55 PERMANENT   neighbour: subnet base to tunnel MAC
//! 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink          route: subnet through its base
//! ```
//!
//! With very many peers a route names its next hop by an object (see [`Form`]):
//!
//! ```text
//! id 183763200 via 10.244.1.0 dev flannel.1 proto 241 onlink               next hop object
//! 10.244.1.0/24 nhid 183763200 via 10.244.1.0 dev flannel.1 onlink         route through it
//! ```
//!
//! Order: FDB and neighbour before the route, because the kernel would ask for the neighbour at
//! once; and the FDB entry before the neighbour, so that a peer which changes its MAC loses no
//! packet. What is not needed any more goes last, its route first: the kernel takes every route
//! away whose object goes.
//!
//! Ours, and therefore removed when no peer needs it, is on the tunnel device and of exactly this
//! form: routes of protocol boot through their own base, next hop objects of our protocol under
//! the id of their gateway, permanent neighbours, permanent unicast FDB entries. Everything else
//! there belongs to somebody else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

use super::plan::Plan;
use crate::{
    forwarding::{ForwardingTable, Via},
    mac::MacAddr,
};

/// With more peers than these, routes that are not there yet go through objects. At this number
/// a plain route costs the kernel some 30 µs more than the first one did.
const MANY_PEERS: usize = 1024;

/// How a route names its next hop. Packets cannot tell; both are ours, and what is there stays.
///
/// Plain is what flannel makes. But the kernel's hash of next hops leaves the gateway out, so
/// all plain routes lie in one chain, and each new one walks it to its end. Routes through
/// objects are hashed by the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Gateway and device stand in the route.
    Plain,
    /// They stand in a next hop object of ours.
    Object,
}

impl Form {
    /// How a new route is made where there are `peers` in all.
    pub(super) fn of_new_route(peers: usize, kernel_has_objects: bool) -> Self {
        if kernel_has_objects && peers > MANY_PEERS {
            Self::Object
        } else {
            Self::Plain
        }
    }
}

/// The entries of any number of peers. A route is told by its subnet and form: gateway
/// (the base), device and flags follow from it, and so does its next hop object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// Tunnel MAC → node.
    pub fdb: BTreeMap<MacAddr, Ipv4Addr>,
    /// Subnet base → tunnel MAC.
    pub neighbours: BTreeMap<Ipv4Addr, MacAddr>,
    /// Subnets.
    pub routes: BTreeMap<Ipv4Net, Form>,
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
    /// What `table` needs, with plain routes. Of peers in conflict the first in table order is
    /// kept.
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
                wanted.routes.insert(subnet, Form::Plain);
            }
        }
        (wanted, conflicts)
    }

    /// Leaves every route as it is; those that are missing become what suits the number of peers.
    pub(super) fn choose_forms(&mut self, actual: &Actual) {
        let new = Form::of_new_route(self.routes.len(), actual.next_hops.is_some());
        for (subnet, form) in &mut self.routes {
            let first = actual.routes.get(subnet).and_then(|found| found.first());
            *form = first.and_then(|route| route.ours).unwrap_or(new);
        }
    }

    /// Base, MAC, node and form of the peer behind `subnet`, if it shares none of its entries.
    pub(super) fn sole_peer(&self, subnet: &Ipv4Net) -> Option<SolePeer> {
        let form = *self.routes.get(subnet)?;
        let base = subnet.network();
        let mac = *self.neighbours.get(&base)?;
        let node = *self.fdb.get(&mac)?;
        let users = self.neighbours.values().filter(|other| **other == mac);
        let is_sole = self.routes_through(base).count() == 1 && users.count() == 1;
        is_sole.then_some(SolePeer {
            base,
            mac,
            node,
            form,
        })
    }

    /// The forms of all routes through `base`.
    fn routes_through(&self, base: Ipv4Addr) -> impl Iterator<Item = Form> {
        let shortest = Ipv4Net::new_assert(base, 0);
        let longest = Ipv4Net::new_assert(base, 32);
        self.routes.range(shortest..=longest).map(|(_, form)| *form)
    }

    /// Does a route need the next hop object of `base`?
    pub(super) fn needs_object(&self, base: Ipv4Addr) -> bool {
        self.routes_through(base).any(|form| form == Form::Object)
    }

    /// What is programmed once `plan` was carried out.
    pub(super) fn follow(&mut self, plan: &Plan) {
        for (subnet, _) in &plan.withdraw {
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
}

/// A peer that shares none of its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SolePeer {
    pub(super) base: Ipv4Addr,
    pub(super) mac: MacAddr,
    pub(super) node: Ipv4Addr,
    /// Of its route.
    pub(super) form: Form,
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
    /// Exactly the route of section 9.4, in this form.
    pub(super) ours: Option<Form>,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Actual {
    /// Unicast FDB entries of the device.
    pub(super) fdb: BTreeMap<MacAddr, FoundFdb>,
    /// IPv4 neighbours on the device.
    pub(super) neighbours: BTreeMap<Ipv4Addr, FoundNeighbour>,
    /// Bases that have a next hop object of ours; `None`: the kernel knows no such objects.
    pub(super) next_hops: Option<BTreeSet<Ipv4Addr>>,
    /// Routes by destination; the kernel uses the first of each list.
    pub(super) routes: BTreeMap<Ipv4Net, Vec<FoundRoute>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a network")
    }

    fn table(rows: &[(&str, u8, u8)]) -> ForwardingTable {
        let via = |node: u8, last: u8| Via::Vxlan {
            node: [192, 168, 50, node].into(),
            vtep_mac: MacAddr([2, 0, 0, 0, 0, last]),
        };
        let rows = rows.iter();
        ForwardingTable(
            rows.map(|(subnet, node, last)| (net(subnet), via(*node, *last)))
                .collect(),
        )
    }

    #[test]
    fn peers_in_conflict_do_not_flap_and_are_named() {
        let (entries, conflicts) = Entries::wanted(&table(&[
            ("10.244.1.0/24", 1, 1),
            ("10.244.2.0/24", 2, 1),
            ("10.244.3.0/24", 3, 3),
            ("10.244.3.0/25", 4, 4),
        ]));
        assert_eq!(
            entries.routes,
            BTreeMap::from([
                (net("10.244.1.0/24"), Form::Plain),
                (net("10.244.3.0/24"), Form::Plain)
            ])
        );
        assert_eq!(
            conflicts,
            [
                Conflict::Mac {
                    subnet: net("10.244.2.0/24"),
                    mac: MacAddr([2, 0, 0, 0, 0, 1]),
                    node: [192, 168, 50, 2].into(),
                    holder: [192, 168, 50, 1].into(),
                },
                Conflict::Base {
                    subnet: net("10.244.3.0/25")
                },
            ]
        );
    }

    #[test]
    fn one_node_may_hold_two_subnets() {
        let (entries, conflicts) =
            Entries::wanted(&table(&[("10.244.1.0/24", 1, 1), ("10.244.2.0/24", 1, 1)]));
        assert_eq!(conflicts, []);
        assert_eq!((entries.fdb.len(), entries.routes.len()), (1, 2));
    }

    #[test]
    fn routes_that_are_there_keep_their_form_and_many_new_ones_go_through_objects() {
        let subnets = |count: usize| {
            (0..count).map(|number| {
                let number = u32::try_from(number).expect("few");
                Ipv4Net::new_assert((0x0a00_0000 + (number << 8)).into(), 24)
            })
        };
        let found = |form| vec![FoundRoute { ours: form }];
        let actual = Actual {
            next_hops: Some(BTreeSet::new()),
            routes: BTreeMap::from([
                (net("10.0.1.0/24"), found(Some(Form::Plain))),
                (net("10.0.2.0/24"), found(Some(Form::Object))),
                (net("10.0.3.0/24"), found(None)),
            ]),
            ..Actual::default()
        };
        for (count, new) in [(MANY_PEERS, Form::Plain), (MANY_PEERS + 1, Form::Object)] {
            let mut wanted = Entries {
                routes: subnets(count).map(|subnet| (subnet, Form::Plain)).collect(),
                ..Entries::default()
            };
            wanted.choose_forms(&actual);
            assert_eq!(wanted.routes[&net("10.0.1.0/24")], Form::Plain);
            assert_eq!(wanted.routes[&net("10.0.2.0/24")], Form::Object);
            assert_eq!(wanted.routes[&net("10.0.3.0/24")], new, "{count}");
            assert_eq!(wanted.routes[&net("10.0.4.0/24")], new, "{count}");
            assert!(wanted.needs_object([10, 0, 2, 0].into()));
            assert!(!wanted.needs_object([10, 0, 1, 0].into()));

            wanted.choose_forms(&Actual::default());
            assert!(wanted.routes.values().all(|form| *form == Form::Plain));
        }
    }
}
