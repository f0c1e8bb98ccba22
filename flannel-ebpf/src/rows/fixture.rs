//! The world of the rows: this node, its pods and peers, as plain collections.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    layout::{
        BYPASS_ANY, BYPASS_TCP, ClassKey, DROP_FORGED, Epoch, FAST_PATH_DIRECT, FAST_PATH_LEARNED,
        FlowKey, InFlow, LocalPod, MODE_KERNEL, MODE_VXLAN, NodeConfig, OutFlow, RemoteSubnet,
    },
    tables::Tables,
};

/// Our node, the peers and other addresses of the rows.
pub const NODE_A: [u8; 4] = [172, 18, 0, 1];
/// The peer.
pub const NODE_B: [u8; 4] = [172, 18, 0, 2];
/// Another peer, whose subnet the kernel carries.
pub const NODE_C: [u8; 4] = [172, 18, 0, 3];
/// Our pod.
pub const POD_A: [u8; 4] = [10, 244, 1, 2];
/// Another pod of ours, behind another veth.
pub const POD_A2: [u8; 4] = [10, 244, 1, 3];
/// The peer's pod.
pub const POD_B: [u8; 4] = [10, 244, 2, 2];
/// A pod of the peer that the kernel carries.
pub const POD_C: [u8; 4] = [10, 244, 3, 2];

pub(super) const POD_MAC: [u8; 6] = [0x0a, 0, 0, 0, 0, 0x02];
/// `cni0` of our node. All zero, as `lo`'s: test_run takes the frame for one
/// to this host only then, and it must be so for both hooks.
pub(super) const GATEWAY_MAC: [u8; 6] = [0; 6];
pub(super) const VTEP_A: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
pub(super) const VTEP_B: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];
/// The uplink's own address, and a frame's next hop.
pub(super) const UPLINK_MAC: [u8; 6] = [0; 6];

/// The interface index that every packet comes in by: `lo` under test_run.
pub const IFINDEX: u32 = 1;

/// A generation that was not raised lately. By it alone nothing bypasses the stack, nor opens.
pub const EPOCH: Epoch = Epoch {
    generation: 7,
    grace_until: 0,
    flags: 0,
    validity: 2_000,
    probe_gap: 250,
    recheck_gap: 5,
    own_until: 0,
    own_expired: 0,
    class_generation: 7,
    class_validity: 1_000,
    class_patience: 250,
};

/// This node as the rows need it.
#[must_use]
pub fn node() -> NodeConfig {
    NodeConfig {
        flags: FAST_PATH_LEARNED | FAST_PATH_DIRECT | DROP_FORGED,
        uplink: IFINDEX,
        vni: 1,
        pod_mtu: 1450,
        vtep_addr: NODE_A,
        vtep_mac: VTEP_A,
        port: 8472u16.to_be_bytes(),
        source_port_min: 32768,
        source_port_span: 28231,
        outer_ttl: 64,
        _pad: [0; 3],
        seed: 0x5eed,
        tunnel: IFINDEX + 7,
    }
}

/// Peers by prefix.
#[must_use]
pub fn remotes() -> Vec<([u8; 4], u32, RemoteSubnet)> {
    let remote = |node, vtep_mac, mode| RemoteSubnet {
        node,
        next_hop: node,
        vni: 1,
        vtep_mac,
        mode,
        _pad: 0,
    };
    vec![
        ([10, 244, 2, 0], 24, remote(NODE_B, VTEP_B, MODE_VXLAN)),
        ([10, 244, 3, 0], 24, remote(NODE_C, VTEP_B, MODE_KERNEL)),
    ]
}

/// Local pods by address.
#[must_use]
pub fn pods() -> BTreeMap<[u8; 4], LocalPod> {
    let pod = |ifindex| LocalPod {
        ifindex,
        mtu: 1450,
        mac: POD_MAC,
        gateway_mac: GATEWAY_MAC,
        flags: 0,
    };
    BTreeMap::from([(POD_A, pod(IFINDEX)), (POD_A2, pod(IFINDEX + 1))])
}

/// The rows' maps as plain collections.
#[derive(Debug)]
pub struct Fixture {
    /// This node.
    pub node: NodeConfig,
    /// Peers by prefix.
    pub remotes: Vec<([u8; 4], u32, RemoteSubnet)>,
    /// Local pods by address.
    pub pods: BTreeMap<[u8; 4], LocalPod>,
    /// What was learned of flows that pods send.
    pub flows_out: BTreeMap<FlowKey, OutFlow>,
    /// What was learned of flows that arrive.
    pub flows_in: BTreeMap<FlowKey, InFlow>,
    /// Servers that a pod reaches through a Service too.
    pub translated: BTreeSet<ClassKey>,
    /// The global generation.
    pub epoch: Epoch,
    /// Generations by place.
    pub generations: BTreeMap<u32, u32>,
    /// The time.
    pub jiffies: u32,
    /// Addresses that are never bypassed.
    pub excluded_addresses: Vec<[u8; 4]>,
    /// Ports that are never bypassed.
    pub excluded_ports: Vec<u16>,
}

impl Default for Fixture {
    fn default() -> Self {
        Self {
            node: node(),
            remotes: remotes(),
            pods: pods(),
            flows_out: BTreeMap::new(),
            flows_in: BTreeMap::new(),
            translated: BTreeSet::new(),
            epoch: Epoch {
                generation: 1,
                class_generation: 1,
                flags: BYPASS_ANY | BYPASS_TCP,
                own_until: 3_000,
                ..EPOCH
            },
            generations: BTreeMap::new(),
            jiffies: 0,
            excluded_addresses: Vec::new(),
            excluded_ports: Vec::new(),
        }
    }
}

impl Tables for Fixture {
    fn node(&self) -> Option<&NodeConfig> {
        Some(&self.node)
    }

    fn remote(&self, address: [u8; 4]) -> Option<&RemoteSubnet> {
        let address = u32::from_be_bytes(address);
        self.remotes
            .iter()
            .filter(|(base, len, _)| (address ^ u32::from_be_bytes(*base)) >> (32 - len) == 0)
            .max_by_key(|(_, len, _)| *len)
            .map(|(_, _, remote)| remote)
    }

    fn local_pod(&self, address: [u8; 4]) -> Option<&LocalPod> {
        self.pods.get(&address)
    }

    fn is_peer(&self, address: [u8; 4]) -> bool {
        self.remotes
            .iter()
            .any(|(_, _, remote)| remote.node == address)
    }

    fn flow_out(&self, key: &FlowKey) -> Option<&OutFlow> {
        self.flows_out.get(key)
    }

    fn flow_in(&self, key: &FlowKey) -> Option<&InFlow> {
        self.flows_in.get(key)
    }

    fn is_translated(&self, class: &ClassKey) -> bool {
        self.translated.contains(class)
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn generation(&self, slot: u32) -> u32 {
        self.generations.get(&slot).copied().unwrap_or(0)
    }

    fn jiffies(&self) -> u32 {
        self.jiffies
    }

    fn is_excluded_address(&self, address: [u8; 4]) -> bool {
        self.excluded_addresses.contains(&address)
    }

    fn is_excluded_port(&self, port: [u8; 2]) -> bool {
        self.excluded_ports.contains(&u16::from_be_bytes(port))
    }
}
