//! What this agent holds, to notice others who lay hands on it (contract section 6.4).

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    sync::{Mutex, PoisonError},
};

use crate::lease::{Lease, LeaseAttributes, SubnetKey};

/// Own values remembered: an event may still show an older one.
const REMEMBERED: usize = 4;

/// The own lease, and which claims of others were already complained of.
#[derive(Debug, Default)]
pub(super) struct Own(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    lease: Option<Lease>,
    /// What this agent wrote, or is about to.
    published: VecDeque<LeaseAttributes>,
    said: BTreeMap<SubnetKey, Quarrel>,
}

/// Two agents want the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quarrel {
    /// Another node's address stands in the own lease.
    SubnetTaken(Ipv4Addr),
    /// Somebody else writes the own lease in this node's name.
    SecondWriter,
    /// Another lease carries this node's address.
    SecondLease,
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
        self.state().lease = Some(lease.clone());
    }

    /// Looks at what the registry says of a lease and complains, once per quarrel.
    pub(super) fn observe(&self, seen: &Lease) {
        let mut state = self.state();
        let quarrel = state.quarrel(seen);
        if state.said.get(&seen.key).copied() == quarrel {
            return;
        }
        let subnet = seen.key;
        match quarrel {
            Some(Quarrel::SubnetTaken(node)) => {
                tracing::error!(%subnet, %node, "another node wrote its address into this node's lease: two nodes now use one subnet; it is not overwritten, stop one of them");
            }
            Some(Quarrel::SecondWriter) => {
                tracing::error!(%subnet, node = %seen.attributes.public_ip, "somebody else changed this node's lease in this node's name: is there a second agent with this public IP?");
            }
            Some(Quarrel::SecondLease) => {
                tracing::warn!(%subnet, node = %seen.attributes.public_ip, "another lease carries this node's public IP: a second agent with the same address, or a leftover");
            }
            None => tracing::info!(%subnet, "no longer claimed twice"),
        }
        match quarrel {
            Some(quarrel) => state.said.insert(seen.key, quarrel),
            None => state.said.remove(&seen.key),
        };
    }

    /// The lease is gone from the registry, and with it any quarrel.
    pub(super) fn observe_removal(&self, key: &SubnetKey) {
        self.state().said.remove(key);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn quarrel(&self, seen: &Lease) -> Option<Quarrel> {
        let own = self.lease.as_ref()?;
        let node = seen.attributes.public_ip;
        let in_own_name = self
            .published
            .iter()
            .any(|published| published.public_ip == node);
        if seen.key.v4 != own.key.v4 {
            let same = node == own.attributes.public_ip && !node.is_unspecified();
            return same.then_some(Quarrel::SecondLease);
        }
        if self.published.contains(&seen.attributes) {
            None
        } else if in_own_name {
            Some(Quarrel::SecondWriter)
        } else {
            Some(Quarrel::SubnetTaken(node))
        }
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
        own.observe(seen);
        own.state().said.get(&seen.key).copied()
    }

    #[test]
    fn row_23_11_two_claims_on_one_subnet_or_address_are_noticed() {
        let own = Own::default();
        assert_eq!(quarrel(&own, &lease(1, 9)), None, "nothing is held yet");
        own.will_publish(&lease(1, 1).attributes);
        own.hold(&lease(1, 1));
        assert_eq!(quarrel(&own, &lease(1, 1)), None);
        assert_eq!(quarrel(&own, &lease(2, 2)), None);
        let taken = Some(Quarrel::SubnetTaken(Ipv4Addr::new(192, 0, 2, 9)));
        assert_eq!(quarrel(&own, &lease(1, 9)), taken);
        assert_eq!(quarrel(&own, &lease(1, 1)), None, "over");
        assert_eq!(quarrel(&own, &lease(3, 1)), Some(Quarrel::SecondLease));
        own.observe_removal(&lease(3, 1).key);
        let mut second = lease(1, 1);
        second.attributes.backend_type = "vxlan".to_owned();
        assert_eq!(quarrel(&own, &second), Some(Quarrel::SecondWriter));
        own.will_publish(&second.attributes);
        assert_eq!(quarrel(&own, &second), None);
    }
}
