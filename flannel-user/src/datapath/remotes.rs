//! Peers as the programs know them: kept from change to change, so that one costs as little
//! with ten thousand peers as with ten.

use std::collections::{BTreeMap, BTreeSet};

use flannel_ebpf::layout::RemoteSubnet;
use ipnet::Ipv4Net;

/// What changed since the programs' tables were last brought in line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Touched {
    /// Nobody knows: compare everything.
    #[default]
    Everything,
    /// Only the entries of these subnets and nodes.
    Only {
        /// Keys of the subnets' table.
        subnets: BTreeSet<Ipv4Net>,
        /// Keys of the nodes' table.
        nodes: BTreeSet<[u8; 4]>,
    },
}

impl Touched {
    const NOTHING: Self = Self::Only {
        subnets: BTreeSet::new(),
        nodes: BTreeSet::new(),
    };

    /// Keys of the subnets' table; `None` for all.
    #[must_use]
    pub fn subnets(&self) -> Option<&BTreeSet<Ipv4Net>> {
        match self {
            Self::Everything => None,
            Self::Only { subnets, .. } => Some(subnets),
        }
    }

    /// Keys of the nodes' table; `None` for all.
    #[must_use]
    pub fn nodes(&self) -> Option<&BTreeSet<[u8; 4]>> {
        match self {
            Self::Everything => None,
            Self::Only { nodes, .. } => Some(nodes),
        }
    }
}

/// Both tables, and what changed in them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Remotes {
    subnets: BTreeMap<Ipv4Net, RemoteSubnet>,
    nodes: BTreeMap<[u8; 4], u32>,
    touched: Touched,
}

impl Remotes {
    /// The way to each pod subnet.
    #[must_use]
    pub fn subnets(&self) -> &BTreeMap<Ipv4Net, RemoteSubnet> {
        &self.subnets
    }

    /// Nodes by address, with the number of subnets behind each.
    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<[u8; 4], u32> {
        &self.nodes
    }

    /// What changed since [`Remotes::settle`].
    #[must_use]
    pub fn touched(&self) -> &Touched {
        &self.touched
    }

    /// The tables of the programs are as these.
    pub fn settle(&mut self) {
        self.touched = Touched::NOTHING;
    }

    /// Nobody knows how the programs' tables are.
    pub fn unsettle(&mut self) {
        self.touched = Touched::Everything;
    }

    /// The way to `subnet` is this from now on; `None`: there is none any more.
    pub fn set(&mut self, subnet: Ipv4Net, remote: Option<RemoteSubnet>) {
        let before = match remote {
            Some(remote) => self.subnets.insert(subnet, remote),
            None => self.subnets.remove(&subnet),
        };
        if before == remote {
            return;
        }
        if let Some(remote) = remote {
            *self.nodes.entry(remote.node).or_default() += 1;
        }
        if let Some(before) = before
            && let Some(count) = self.nodes.get_mut(&before.node)
        {
            *count -= 1;
            if *count == 0 {
                self.nodes.remove(&before.node);
            }
        }
        if let Touched::Only { subnets, nodes } = &mut self.touched {
            subnets.insert(subnet);
            nodes.extend(before.into_iter().chain(remote).map(|remote| remote.node));
        }
    }
}

#[cfg(test)]
mod tests {
    use flannel_ebpf::layout::MODE_VXLAN;
    use proptest::prelude::*;

    use super::*;

    fn subnet(number: u8) -> Ipv4Net {
        Ipv4Net::new_assert([10, 244, number, 0].into(), 24)
    }

    fn remote(node: u8, hop: u8) -> RemoteSubnet {
        RemoteSubnet {
            node: [192, 168, 50, node],
            next_hop: [192, 168, 50, hop],
            vni: 1,
            vtep_mac: [2, 0, 0, 0, 0, node],
            mode: MODE_VXLAN,
            _pad: 0,
        }
    }

    proptest! {
        #[test]
        fn nodes_and_touched_follow_the_subnets(
            before in prop::collection::vec((0u8..6, prop::option::of((0u8..3, 0u8..2))), 0..12),
            after in prop::collection::vec((0u8..6, prop::option::of((0u8..3, 0u8..2))), 0..12),
        ) {
            let mut remotes = Remotes::default();
            for (number, way) in before {
                remotes.set(subnet(number), way.map(|(node, hop)| remote(node, hop)));
            }
            prop_assert_eq!(remotes.touched(), &Touched::Everything);
            let old = remotes.clone();
            remotes.settle();
            for (number, way) in after {
                remotes.set(subnet(number), way.map(|(node, hop)| remote(node, hop)));
            }
            let mut nodes = BTreeMap::new();
            for remote in remotes.subnets().values() {
                *nodes.entry(remote.node).or_insert(0) += 1;
            }
            prop_assert_eq!(remotes.nodes(), &nodes);
            let touched = remotes.touched().clone();
            for number in 0..6 {
                let key = subnet(number);
                prop_assert!(
                    old.subnets().get(&key) == remotes.subnets().get(&key)
                        || touched.subnets().expect("only some").contains(&key)
                );
            }
            for node in 0..3 {
                let key = [192, 168, 50, node];
                prop_assert!(
                    old.nodes().get(&key) == remotes.nodes().get(&key)
                        || touched.nodes().expect("only some").contains(&key)
                );
            }
        }
    }
}
