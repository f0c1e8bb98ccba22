//! The ends of flows and connections, as people and conntrack name them.

use std::net::SocketAddrV4;

/// An address and a port as the maps hold them, both in network order.
pub(super) fn end(address: [u8; 4], port: [u8; 2]) -> SocketAddrV4 {
    SocketAddrV4::new(address.into(), u16::from_be_bytes(port))
}
