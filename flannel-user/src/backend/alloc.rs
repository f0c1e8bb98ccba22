//! The alloc backend: leases only. For clouds that route pod subnets themselves.

use std::net::Ipv4Addr;

use crate::lease::LeaseAttributes;

/// What a node publishes: its address, no backend type, no data (contract section 5.2).
#[must_use]
pub fn attributes(public_ip: Ipv4Addr) -> LeaseAttributes {
    LeaseAttributes::plain(public_ip)
}
