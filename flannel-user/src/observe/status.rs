//! The status document: what `flannelctl status -o json` prints and the lab asserts on.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::flows::Table;
use crate::{datapath::ebpf::OwnState, network::FastPath};

/// Which datapath carries pod traffic now. The kernel path is complete in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// eBPF programs are attached; what they leave goes through the kernel.
    Ebpf,
    /// No program is attached; everything goes through `flannel.<VNI>`.
    Netlink,
}

/// The whole state of one agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of `flanneld`.
    pub version: String,
    /// Process id of the agent.
    pub pid: u32,
    /// The datapath in force.
    pub mode: Mode,
    /// Why it is that one, in a sentence.
    pub mode_reason: String,
    /// Which packets the programs may take.
    pub fast_path: FastPath,
    /// The same in a sentence, with what it does not respect.
    #[serde(default)]
    pub fast_path_text: String,
    /// How the bypass of learned flows fares; `None` where nothing is learned.
    #[serde(default)]
    pub bypass: Option<BypassStatus>,
    /// Nothing bypasses conntrack any more, and its settings still are those for a bypass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conntrack_kept: Option<KeptSettings>,
    /// This node.
    pub node: NodeStatus,
    /// The lease source.
    pub source: SourceStatus,
    /// Claims of other agents on this node's subnet or address.
    #[serde(default)]
    pub conflicts: Vec<ConflictStatus>,
    /// Every peer, in order of its subnet.
    pub peers: Vec<PeerStatus>,
    /// Every local pod, in order of its address.
    pub pods: Vec<PodStatus>,
    /// One row per outcome of the programs, in order of their index; empty in netlink mode.
    pub counters: Vec<CounterStatus>,
    /// How the kernel datapath fares.
    pub kernel: KernelStatus,
}

/// What this node is and publishes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The own pod subnet.
    pub subnet: Ipv4Net,
    /// All pod subnets.
    pub network: Ipv4Net,
    /// The address that peers send to.
    pub public_ip: Ipv4Addr,
    /// Name of the uplink.
    pub uplink: String,
    /// Why no packet can leave by the uplink, if that is so.
    #[serde(default)]
    pub uplink_fault: Option<String>,
    /// Name of the tunnel device.
    pub device: String,
    /// Its MAC address.
    pub vtep_mac: String,
    /// MTU of pods, in bytes.
    pub mtu: u32,
    /// In ebpf mode: the program of the uplink is in place.
    pub uplink_attached: bool,
}

/// The lease source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Kind and place, without secrets.
    pub source: String,
    /// A snapshot has been applied and no fault is known since.
    pub in_sync: bool,
    /// Seconds since 1970 at which the own lease ends; `None` for a reservation.
    pub lease_expires: Option<u64>,
}

/// Two agents want the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictStatus {
    /// The lease in question.
    pub subnet: Ipv4Net,
    /// The node that it names.
    pub node: Ipv4Addr,
    /// What both want and what to do, in a sentence.
    pub text: String,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its pod subnet.
    pub subnet: Ipv4Net,
    /// Its public address.
    pub node: Ipv4Addr,
    /// MAC address of its tunnel device.
    pub vtep_mac: String,
    /// Next hop on the uplink; `None` while there is no route (kernel path only).
    pub next_hop: Option<Ipv4Addr>,
}

/// One local pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its address.
    pub address: Ipv4Addr,
    /// The host side of its veth.
    pub interface: String,
    /// A program is attached there.
    pub attached: bool,
    /// Why the pod's packets never bypass the stack, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

/// Packets with one outcome, summed over all CPUs since the maps were made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CounterStatus {
    /// The outcome's label, for instance `encapsulated` or `decapsulated`.
    pub reason: String,
    /// `out` (pod to peer) or `in` (peer to pod).
    pub direction: String,
    /// `forwarded`, `kernel` (left untouched to the stack) or `dropped`.
    pub action: String,
    /// Packets; a large segmentation-offload packet counts once.
    pub packets: u64,
    /// Bytes of those packets from the Ethernet header on, as the hook saw them.
    pub bytes: u64,
    /// The outcome in a sentence.
    pub text: String,
}

/// The bypass of learned flows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BypassStatus {
    /// Nothing bypasses the stack at present, for this reason.
    pub held: Option<String>,
    /// TCP does not, for this reason.
    pub tcp_held: Option<String>,
    /// How long a verdict holds at present that nobody confirms.
    pub validity_seconds: f64,
    /// How often rules, routes or policies changed since this agent opened the datapath; changes
    /// within one gap count once.
    pub generations: u64,
    /// Table of what pods send.
    pub table_out: Table,
    /// Table of what pods receive.
    pub table_in: Table,
    /// Connections that bypass from their SYN on.
    #[serde(default)]
    pub own: Option<OwnState>,
}

/// Settings of conntrack that stay until no flow that bypassed it can live.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSettings {
    /// Connections that may have bypassed it; 0 as long as they are not counted.
    pub flows: usize,
    /// Why they cannot be counted or the settings not be restored, if so.
    #[serde(default)]
    pub fault: Option<String>,
}

/// What a fast path means, in a sentence.
#[must_use]
pub const fn fast_path_text(fast_path: FastPath) -> &'static str {
    match fast_path {
        FastPath::Off => "programs count, the kernel forwards; switch on with --fast-path learned",
        FastPath::Learned => "flows go the way that the kernel has shown",
        FastPath::Direct => {
            "TCP between pods from its SYN on; BLIND TO POLICIES: neither NetworkPolicy nor any other rule of netfilter holds for new connections"
        }
    }
}

/// The kernel datapath.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// Objects that something else removed or changed and that were put back since start.
    pub repairs: u64,
    /// The last fault, if the last pass did not end well.
    pub last_error: Option<String>,
}

impl Status {
    /// Packets with the outcome `reason`, 0 when it is not listed.
    #[must_use]
    pub fn packets(&self, reason: &str) -> u64 {
        self.counters
            .iter()
            .filter(|row| row.reason == reason)
            .map(|row| row.packets)
            .sum()
    }
}
