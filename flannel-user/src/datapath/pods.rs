//! Which pods live on this node, found by route and link.

use std::net::Ipv4Addr;

use crate::mac::MacAddr;

/// One pod address behind one veth of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// The pod's address inside the own subnet.
    pub address: Ipv4Addr,
    /// Name of the veth's end on the host.
    pub interface: String,
    /// Its interface index.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: MacAddr,
    /// MAC address that the pod's packets to other nodes are sent to: the
    /// bridge's, or the veth's own where there is no bridge.
    pub gateway_mac: MacAddr,
    /// MTU of the veth's host end, in bytes.
    pub mtu: u32,
}
