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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Entries to install or overwrite.
    pub upsert: Vec<(Ipv4Net, Via)>,
    /// Entries to withdraw, with the way they had.
    pub remove: Vec<(Ipv4Net, Via)>,
}
