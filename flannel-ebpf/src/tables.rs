//! What the decisions ask of the maps and of the clock.

use crate::layout::{
    ClassKey, Epoch, FlowKey, InFlow, LocalPod, NodeConfig, OutFlow, RemoteSubnet,
};

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
    /// What was learned of a flow that a pod sends.
    fn flow_out(&self, key: &FlowKey) -> Option<&OutFlow>;
    /// What was learned of a flow that arrives.
    fn flow_in(&self, key: &FlowKey) -> Option<&InFlow>;
    /// Does the pod reach this server through a Service too?
    fn is_translated(&self, class: &ClassKey) -> bool;
    /// The global generation.
    fn epoch(&self) -> Epoch;
    /// The generation at one place.
    fn generation(&self, slot: u32) -> u32;
    /// The low 32 bits of the jiffies.
    fn jiffies(&self) -> u32;
    /// Is this address never bypassed?
    fn is_excluded_address(&self, address: [u8; 4]) -> bool;
    /// Is this port (network order) never bypassed?
    fn is_excluded_port(&self, port: [u8; 2]) -> bool;
}
