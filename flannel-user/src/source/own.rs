//! What this agent holds, to notice others who lay hands on it (contract section 6.4).

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    net::Ipv4Addr,
    sync::{Mutex, PoisonError},
};

use super::LeaseEvent;
use crate::lease::{Lease, LeaseAttributes, SubnetKey};

/// Own values remembered: an event may still show an older one.
const REMEMBERED: usize = 4;

/// Two agents want the same. Nothing of the other's is overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// The lease in question.
    pub subnet: SubnetKey,
    /// The node that it names.
    pub node: Ipv4Addr,
    /// What both want.
    pub quarrel: Quarrel,
}

/// What two agents want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quarrel {
    /// Another node's address stands in the own lease.
    SubnetTaken,
    /// Somebody else writes the own lease in this node's name.
    SecondWriter,
    /// Another lease carries this node's address.
    SecondLease,
}

impl fmt::Display for Quarrel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SubnetTaken => {
                "another node wrote its address into this node's lease: two nodes use one subnet; it is not overwritten, stop one of them"
            }
            Self::SecondWriter => {
                "somebody else changed this node's lease in this node's name: is there a second agent with this public IP?"
            }
            Self::SecondLease => {
                "another lease carries this node's public IP: a second agent with the same address, or a leftover"
            }
        })
    }
}

/// The own lease, and which claims of others were already complained of.
#[derive(Debug, Default)]
pub(super) struct Own(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    lease: Option<Lease>,
    /// What this agent wrote, or is about to.
    published: VecDeque<LeaseAttributes>,
    /// Every lease's node: which ones are in the way may change with the own address.
    nodes: BTreeMap<SubnetKey, Ipv4Addr>,
    said: BTreeMap<SubnetKey, Conflict>,
}

impl Own {
    /// The lease held, as last acquired or renewed.
    pub(super) fn lease(&self) -> Option<Lease> {
        self.state().lease.clone()
    }

    /// Before writing: the event may come before the answer.
    pub(super) fn will_publish(&self, attributes: &LeaseAttributes) {
        let mut state = self.state();
        if !state.published.contains(attributes) {
            state.published.push_back(attributes.clone());
            if state.published.len() > REMEMBERED {
                state.published.pop_front();
            }
        }
    }

    /// After writing.
    pub(super) fn hold(&self, lease: &Lease) {
        let mut state = self.state();
        let node = lease.attributes.public_ip;
        let moved = state
            .lease
            .as_ref()
            .is_some_and(|held| held.attributes.public_ip != node);
        state.lease = Some(lease.clone());
        if moved {
            state.look_again(lease);
        }
    }

    /// Looks at what the registry says and complains, once per quarrel.
    pub(super) fn observe(&self, event: &LeaseEvent) {
        let mut state = self.state();
        match event {
            LeaseEvent::Snapshot(leases) => {
                state.nodes.clear();
                let listed: Vec<_> = leases.iter().map(|lease| lease.key).collect();
                state.said.retain(|key, _| listed.contains(key));
                for lease in leases {
                    state.note(lease);
                }
            }
            LeaseEvent::Put(lease) => state.note(lease),
            LeaseEvent::Removed(key) => {
                state.nodes.remove(key);
                state.settle(*key, None);
            }
        }
    }

    /// Every quarrel there is now, in order of the leases.
    pub(super) fn conflicts(&self) -> Vec<Conflict> {
        self.state().said.values().copied().collect()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn note(&mut self, seen: &Lease) {
        self.nodes.insert(seen.key, seen.attributes.public_ip);
        let quarrel = self.quarrel(seen);
        self.settle(
            seen.key,
            quarrel.map(|quarrel| Conflict {
                subnet: seen.key,
                node: seen.attributes.public_ip,
                quarrel,
            }),
        );
    }

    /// This node has another address now: other leases are in its way.
    fn look_again(&mut self, own: &Lease) {
        let others: Vec<_> = self
            .nodes
            .iter()
            .filter(|(key, _)| key.v4 != own.key.v4)
            .map(|(key, node)| (*key, *node))
            .collect();
        for (subnet, node) in others {
            let quarrel = self.second_lease(own, node);
            self.settle(
                subnet,
                quarrel.map(|quarrel| Conflict {
                    subnet,
                    node,
                    quarrel,
                }),
            );
        }
    }

    fn settle(&mut self, key: SubnetKey, now: Option<Conflict>) {
        let said = self.said.get(&key).copied();
        if said == now {
            return;
        }
        match now {
            Some(conflict) => {
                let Conflict { node, quarrel, .. } = conflict;
                if quarrel == Quarrel::SecondLease {
                    tracing::warn!(subnet = %key, %node, "{quarrel}");
                } else {
                    tracing::error!(subnet = %key, %node, "{quarrel}");
                }
                self.said.insert(key, conflict);
            }
            None => {
                tracing::info!(subnet = %key, "no longer claimed twice");
                self.said.remove(&key);
            }
        }
    }

    fn quarrel(&self, seen: &Lease) -> Option<Quarrel> {
        let own = self.lease.as_ref()?;
        let node = seen.attributes.public_ip;
        if seen.key.v4 != own.key.v4 {
            return self.second_lease(own, node);
        }
        let in_own_name = self
            .published
            .iter()
            .any(|published| published.public_ip == node);
        if self.published.contains(&seen.attributes) {
            None
        } else if in_own_name {
            Some(Quarrel::SecondWriter)
        } else {
            Some(Quarrel::SubnetTaken)
        }
    }

    fn second_lease(&self, own: &Lease, node: Ipv4Addr) -> Option<Quarrel> {
        let same = node == own.attributes.public_ip && !node.is_unspecified();
        same.then_some(Quarrel::SecondLease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(subnet: u8, node: u8) -> Lease {
        Lease {
            key: format!("10.244.{subnet}.0-24").parse().expect("a key"),
            attributes: LeaseAttributes::plain(Ipv4Addr::new(192, 0, 2, node)),
            expires: None,
        }
    }

    fn quarrel(own: &Own, seen: &Lease) -> Option<Quarrel> {
        own.observe(&LeaseEvent::Put(seen.clone()));
        quarrel_over(own, &seen.key)
    }

    fn quarrel_over(own: &Own, key: &SubnetKey) -> Option<Quarrel> {
        let conflicts = own.conflicts();
        let found = conflicts.iter().find(|conflict| conflict.subnet == *key);
        found.map(|conflict| conflict.quarrel)
    }

    #[test]
    fn row_23_11_two_claims_on_one_subnet_or_address_are_noticed() {
        let own = Own::default();
        assert_eq!(quarrel(&own, &lease(1, 9)), None, "nothing is held yet");
        own.will_publish(&lease(1, 1).attributes);
        own.hold(&lease(1, 1));
        assert_eq!(quarrel(&own, &lease(1, 1)), None);
        assert_eq!(quarrel(&own, &lease(2, 2)), None);
        let taken = Some(Quarrel::SubnetTaken);
        assert_eq!(quarrel(&own, &lease(1, 9)), taken);
        assert_eq!(quarrel(&own, &lease(1, 1)), None, "over");
        assert_eq!(quarrel(&own, &lease(3, 1)), Some(Quarrel::SecondLease));
        own.observe(&LeaseEvent::Removed(lease(3, 1).key));
        assert_eq!(quarrel_over(&own, &lease(3, 1).key), None);
        let mut second = lease(1, 1);
        second.attributes.backend_type = "vxlan".to_owned();
        assert_eq!(quarrel(&own, &second), Some(Quarrel::SecondWriter));
        own.will_publish(&second.attributes);
        assert_eq!(quarrel(&own, &second), None);
    }
    #[test]
    fn a_snapshot_and_a_new_own_address_are_looked_at_whole() {
        let own = Own::default();
        own.will_publish(&lease(1, 1).attributes);
        own.hold(&lease(1, 1));
        own.observe(&LeaseEvent::Snapshot(vec![
            lease(1, 1),
            lease(2, 1),
            lease(3, 7),
        ]));
        assert_eq!(
            quarrel_over(&own, &lease(2, 1).key),
            Some(Quarrel::SecondLease)
        );
        // The node moves to an address that another lease has already.
        own.will_publish(&lease(1, 7).attributes);
        own.hold(&lease(1, 7));
        assert_eq!(quarrel_over(&own, &lease(2, 1).key), None);
        assert_eq!(
            quarrel_over(&own, &lease(3, 7).key),
            Some(Quarrel::SecondLease)
        );
        own.observe(&LeaseEvent::Snapshot(vec![lease(1, 7)]));
        assert_eq!(own.conflicts(), []);
    }
}
