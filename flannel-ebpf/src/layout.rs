//! Map names, keys and values: the whole contract between programs and agent.
//!
//! Addresses, ports and MAC addresses are byte arrays in network order, as on
//! the wire; plain integers are in host order. Padding is explicit and sizes
//! are checked, so both sides see the same bytes.

use bytemuck::{Pod, Zeroable};

/// Version of everything in this file. Maps of another version are never
/// reused: the agent fills new ones and moves the attached programs over.
pub const LAYOUT_VERSION: u32 = 1;

/// Name of the program at the ingress of a pod's host-side veth.
pub const FROM_POD: &str = "from_pod";
/// Name of the program at the ingress of the uplink.
pub const FROM_UPLINK: &str = "from_uplink";

/// Array with one [`NodeConfig`].
pub const NODE: &str = "NODE";
/// Longest-prefix map: pod subnet → [`RemoteSubnet`]. Never holds the own subnet.
pub const REMOTE_SUBNETS: &str = "REMOTE_SUBNETS";
/// Hash: pod address → [`LocalPod`].
pub const LOCAL_PODS: &str = "LOCAL_PODS";
/// Hash: public address of a peer → 1. Answers "is this node one of us".
pub const PEER_NODES: &str = "PEER_NODES";
/// Per-CPU array: index of a [`crate::reason::Reason`] → [`Tally`].
pub const COUNTERS: &str = "COUNTERS";
/// Per-CPU array with one `u32`: the next outer IP identification.
pub const IDENT: &str = "IDENT";

/// Most peers that the maps hold.
pub const MAX_REMOTE_SUBNETS: u32 = 131_072;
/// Most local pod addresses.
pub const MAX_LOCAL_PODS: u32 = 4_096;

/// [`NodeConfig::flags`]: a subnet match is enough to encapsulate and deliver.
pub const FAST_PATH_DIRECT: u32 = 1 << 0;
/// [`NodeConfig::flags`]: tunnel packets for our VNI that no known peer can
/// have sent are dropped; without it the kernel decides.
pub const DROP_FORGED: u32 = 1 << 1;

/// Value of `NODE`: what the programs know of their own node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct NodeConfig {
    /// Bits named above.
    pub flags: u32,
    /// Interface index of the uplink.
    pub uplink: u32,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// MTU of pods in bytes, without the Ethernet header: the tunnel device's.
    pub pod_mtu: u32,
    /// Outer source address: the tunnel device's local address.
    pub vtep_addr: [u8; 4],
    /// MAC address of the tunnel device.
    pub vtep_mac: [u8; 6],
    /// UDP destination port, network order.
    pub port: [u8; 2],
    /// First UDP source port.
    pub source_port_min: u16,
    /// How many UDP source ports follow it, the last excluded (as the kernel's
    /// `udp_flow_src_port` counts).
    pub source_port_span: u16,
    /// Outer TTL.
    pub outer_ttl: u8,
    /// Always zero.
    pub _pad: [u8; 3],
}
const _: () = assert!(size_of::<NodeConfig>() == 36);

/// Value of `REMOTE_SUBNETS`: the way to one peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct RemoteSubnet {
    /// Public address of the peer: outer destination, and the only outer
    /// source its pods' packets may come from.
    pub node: [u8; 4],
    /// Address to resolve on the uplink: the peer itself or a router.
    pub next_hop: [u8; 4],
    /// VXLAN network identifier.
    pub vni: u32,
    /// MAC address of the peer's tunnel device: inner destination.
    pub vtep_mac: [u8; 6],
    /// One of the `MODE_…` values.
    pub mode: u8,
    /// Always zero.
    pub _pad: u8,
}
const _: () = assert!(size_of::<RemoteSubnet>() == 20);

/// [`RemoteSubnet::mode`]: known, but the kernel carries it (no next hop at present).
pub const MODE_KERNEL: u8 = 0;
/// [`RemoteSubnet::mode`]: VXLAN.
pub const MODE_VXLAN: u8 = 1;

/// Value of `LOCAL_PODS`: one pod address on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LocalPod {
    /// Interface index of the veth's end on the host.
    pub ifindex: u32,
    /// MTU of the veth in bytes.
    pub mtu: u32,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// MAC address of the pod's gateway: the bridge, or the veth's end on the host.
    pub gateway_mac: [u8; 6],
}
const _: () = assert!(size_of::<LocalPod>() == 20);

/// Value of `COUNTERS`: packets with one outcome on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Tally {
    /// Packets as the hook sees them: a segmentation-offload packet is one.
    pub packets: u64,
    /// Their bytes from the Ethernet header on.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Tally>() == 16);

#[cfg(feature = "user")]
mod user {
    use super::{LocalPod, NodeConfig, RemoteSubnet, Tally};

    // SAFETY: all are `repr(C)`, free of padding (bytemuck checks that) and valid for any bytes.
    unsafe impl aya::Pod for NodeConfig {}
    // SAFETY: see above.
    unsafe impl aya::Pod for RemoteSubnet {}
    // SAFETY: see above.
    unsafe impl aya::Pod for LocalPod {}
    // SAFETY: see above.
    unsafe impl aya::Pod for Tally {}
}
