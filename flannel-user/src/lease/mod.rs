//! Leases: which node owns which pod subnet, in flannel's own formats.

pub mod allocation;
pub mod attributes;
pub mod key;
pub mod table;

use std::time::SystemTime;

pub use attributes::{LeaseAttributes, VxlanData};
pub use key::SubnetKey;

/// One node's claim on one pod subnet.
#[derive(Debug, Clone, PartialEq)]
pub struct Lease {
    /// The subnet, which is also the lease's name in every registry.
    pub key: SubnetKey,
    /// What the owning node published.
    pub attributes: LeaseAttributes,
    /// When the claim ends unless renewed; `None` is a reservation, which never ends.
    pub expires: Option<SystemTime>,
}
