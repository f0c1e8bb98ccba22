//! Backends: (leases, node) → forwarding table, and what this node publishes.

pub mod alloc;
pub mod vxlan;
