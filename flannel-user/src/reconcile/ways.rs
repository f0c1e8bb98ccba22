//! The way to each peer as the programs take it. Only eBPF needs it, so that nothing here
//! costs netlink mode anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use flannel_ebpf::layout::{MODE_KERNEL, MODE_VXLAN, RemoteSubnet};
use ipnet::Ipv4Net;
use tracing::warn;

use crate::{
    datapath::{netlink::Rtnl, next_hop, remotes::Remotes},
    forwarding::{Changes, ForwardingTable, Via},
};

/// Next hops, and what follows from them.
#[derive(Debug, Default)]
pub(super) struct Ways {
    remotes: Remotes,
    /// By node; `None` where no route by the uplink leads there.
    next_hops: BTreeMap<Ipv4Addr, Option<Ipv4Addr>>,
    /// Subnets whose way changed since [`Ways::find`]; `None`: any may have.
    pending: Option<BTreeSet<Ipv4Net>>,
    /// No route has changed since.
    routes_settled: bool,
}

impl Ways {
    /// The table changed like this.
    pub(super) fn note(&mut self, changes: &Changes) {
        if let Some(pending) = &mut self.pending {
            let changed = changes.upsert.iter().chain(&changes.remove);
            pending.extend(changed.map(|(subnet, _)| *subnet));
        }
    }

    /// Routes changed: each next hop may be another.
    pub(super) fn routes_changed(&mut self) {
        self.routes_settled = false;
    }

    /// Nobody needs it for now.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// The address to resolve on the uplink to reach `node`.
    pub(super) fn next_hop(&self, node: &Ipv4Addr) -> Option<Ipv4Addr> {
        self.next_hops.get(node).copied().flatten()
    }

    /// Hands the peers out as the programs are to know them.
    pub(super) fn take_remotes(&mut self) -> Remotes {
        std::mem::take(&mut self.remotes)
    }

    /// Takes them back.
    pub(super) fn put_back(&mut self, remotes: Remotes) {
        self.remotes = remotes;
    }

    /// Brings everything in line with `table`: after routes changed all of it, else what changed.
    pub(super) async fn find(
        &mut self,
        table: &ForwardingTable,
        rtnl: &mut Rtnl,
        uplink: u32,
        vni: u32,
    ) {
        let pending = self.pending.replace(BTreeSet::new());
        match pending.filter(|_| self.routes_settled) {
            Some(pending) => {
                let nodes = pending.iter().filter_map(|subnet| table.0.get(subnet));
                let nodes: BTreeSet<Ipv4Addr> = nodes.map(node_of).collect();
                let unknown = nodes
                    .into_iter()
                    .filter(|node| !self.next_hops.contains_key(node));
                let unknown = unknown.collect();
                self.resolve(rtnl, uplink, unknown).await;
                for subnet in pending {
                    self.set(subnet, table.0.get(&subnet), vni);
                }
            }
            None => {
                let nodes: BTreeSet<Ipv4Addr> = table.0.values().map(node_of).collect();
                self.next_hops.retain(|node, _| nodes.contains(node));
                self.resolve(rtnl, uplink, nodes.into_iter().collect())
                    .await;
                let gone = self.remotes.subnets().keys();
                let gone: Vec<Ipv4Net> = gone
                    .filter(|subnet| !table.0.contains_key(subnet))
                    .copied()
                    .collect();
                for subnet in gone {
                    self.remotes.set(subnet, None);
                }
                for (subnet, via) in &table.0 {
                    self.set(*subnet, Some(via), vni);
                }
                self.routes_settled = true;
            }
        }
    }

    fn set(&mut self, subnet: Ipv4Net, via: Option<&Via>, vni: u32) {
        let left = self.remotes.subnets().get(&subnet).map(|old| old.node);
        let remote = via.map(|Via::Vxlan { node, vtep_mac }| {
            let next_hop = self.next_hop(node);
            RemoteSubnet {
                node: node.octets(),
                next_hop: next_hop.unwrap_or(Ipv4Addr::UNSPECIFIED).octets(),
                vni,
                vtep_mac: vtep_mac.0,
                mode: if next_hop.is_some() {
                    MODE_VXLAN
                } else {
                    MODE_KERNEL
                },
                _pad: 0,
            }
        });
        self.remotes.set(subnet, remote);
        if let Some(left) = left
            && !self.remotes.nodes().contains_key(&left)
        {
            self.next_hops.remove(&Ipv4Addr::from(left));
        }
    }

    async fn resolve(&mut self, rtnl: &mut Rtnl, uplink: u32, nodes: Vec<Ipv4Addr>) {
        if nodes.is_empty() {
            return;
        }
        let answers = match next_hop::resolve(rtnl, uplink, &nodes).await {
            Ok(answers) => answers,
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot look up routes: the kernel path decides"
                );
                for node in nodes {
                    self.next_hops.remove(&node);
                }
                return;
            }
        };
        for (node, answer) in nodes.into_iter().zip(answers) {
            let hop = answer.unwrap_or_else(|error| {
                warn!(%node, error = &error as &dyn std::error::Error, "cannot look up the route");
                None
            });
            let before = self.next_hops.insert(node, hop).flatten();
            if hop.is_none() && before.is_some() {
                warn!(%node, "no route by the uplink any more: the kernel path decides");
            }
        }
    }
}

fn node_of(via: &Via) -> Ipv4Addr {
    let Via::Vxlan { node, .. } = via;
    *node
}
