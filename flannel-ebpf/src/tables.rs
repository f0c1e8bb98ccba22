//! What the decisions ask of the maps.

use crate::layout::{LocalPod, NodeConfig, RemoteSubnet};

/// The maps in the kernel, plain collections in tests.
pub trait Tables {
    /// This node; `None` until the agent has written it.
    fn node(&self) -> Option<&NodeConfig>;
    /// The peer whose subnet holds `address`, by longest prefix.
    fn remote(&self, address: [u8; 4]) -> Option<&RemoteSubnet>;
    /// The local pod with exactly this address.
    fn local_pod(&self, address: [u8; 4]) -> Option<&LocalPod>;
    /// Is this the public address of a peer?
    fn is_peer(&self, address: [u8; 4]) -> bool;
}
