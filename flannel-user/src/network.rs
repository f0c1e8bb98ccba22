//! The network config that all nodes share (contract section 3), validated.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// A validated network config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// All pod addresses of the cluster; host bits are zero.
    pub network: Ipv4Net,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// Network address of the first subnet that may be handed out.
    pub subnet_min: Ipv4Addr,
    /// Network address of the last one.
    pub subnet_max: Ipv4Addr,
    /// `EnableNFTables`.
    pub enable_nftables: bool,
    /// How packets reach other nodes.
    pub backend: BackendConfig,
}

/// The `Backend` object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendConfig {
    /// VXLAN through `flannel.<VNI>`.
    Vxlan(VxlanConfig),
    /// Leases only, no forwarding.
    Alloc,
}

/// Keys of the vxlan backend (contract section 4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanConfig {
    /// VXLAN network identifier, also the suffix of the device name.
    pub vni: u32,
    /// UDP port in host byte order; `None` leaves the choice to the kernel (8472).
    pub port: Option<u16>,
    /// Outer MTU in bytes; `None` takes the uplink's. 50 bytes are the tunnel's.
    pub mtu: Option<u32>,
    /// Group-based-policy extension on the device.
    pub gbp: bool,
    /// MAC learning on the device.
    pub learning: bool,
    /// `FastPath`: our own key; which packets the programs may take.
    pub fast_path: Option<FastPath>,
}

/// Which packets the eBPF programs may take from the stack.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum FastPath {
    /// None: programs are loaded and count, the kernel forwards.
    Off,
    /// Every packet whose destination lies in a peer's subnet, from the first on.
    /// Right only where netfilter has nothing to say about pod traffic.
    Direct,
}
