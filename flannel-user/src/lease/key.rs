//! Subnet keys: the name of a lease in every registry (contract section 5.1).

use ipnet::{Ipv4Net, Ipv6Net};

/// `10.5.52.0-24`, or with a second family `10.12.13.0-24&fd00:12:13::-56`.
///
/// Both networks hold their network address (host bits zero).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubnetKey {
    /// The IPv4 pod subnet.
    pub v4: Ipv4Net,
    /// The IPv6 pod subnet of a dual-stack lease.
    pub v6: Option<Ipv6Net>,
}
