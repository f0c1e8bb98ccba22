//! Lease attributes: what a node publishes about itself (contract section 5.2).

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::value::RawValue;

use crate::mac::MacAddr;

/// The value of a lease. The JSON text is byte-identical to flannel's.
#[derive(Debug, Clone)]
pub struct LeaseAttributes {
    /// Where other nodes reach this one.
    pub public_ip: Ipv4Addr,
    /// The same for an IPv6 underlay.
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw`, …; empty when absent.
    pub backend_type: String,
    /// What the backend needs to know of the peer, verbatim.
    pub backend_data: Option<Box<RawValue>>,
    /// The same for the IPv6 tunnel.
    pub backend_v6_data: Option<Box<RawValue>>,
}

/// `BackendData` of a vxlan lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanData {
    /// VXLAN network identifier; old leases lack it.
    pub vni: Option<u32>,
    /// MAC address of the node's tunnel device.
    pub vtep_mac: MacAddr,
}

impl PartialEq for LeaseAttributes {
    fn eq(&self, other: &Self) -> bool {
        let raw =
            |data: &Option<Box<RawValue>>| data.as_deref().map(RawValue::get).map(str::to_owned);
        self.public_ip == other.public_ip
            && self.public_ipv6 == other.public_ipv6
            && self.backend_type == other.backend_type
            && raw(&self.backend_data) == raw(&other.backend_data)
            && raw(&self.backend_v6_data) == raw(&other.backend_v6_data)
    }
}
