//! Map names, keys and values: the whole contract between programs and agent.
//!
//! Addresses, ports and MAC addresses are byte arrays in network order, as on
//! the wire; plain integers are in host order. Padding is explicit and sizes
//! are checked, so both sides see the same bytes.

use bytemuck::{Pod, Zeroable};

pub use crate::own::entry::*;

/// Version of everything in this file. Maps of another version are never
/// reused: the agent fills new ones and moves the attached programs over.
pub const LAYOUT_VERSION: u32 = 5;

/// Name of the program at the ingress of a pod's host-side veth.
pub const FROM_POD: &str = "from_pod";
/// Name of the program at the ingress of the uplink.
pub const FROM_UPLINK: &str = "from_uplink";
/// Name of the program at the egress of the uplink: what the stack made of a pod's packet.
pub const TO_UPLINK: &str = "to_uplink";
/// Name of the program at the ingress of the tunnel device: what the stack is about to judge.
pub const FROM_TUNNEL: &str = "from_tunnel";
/// Name of the program at the egress of a pod's host-side veth: what the stack made of it.
pub const TO_POD: &str = "to_pod";
/// Name of the program that only tells the time; see [`crate::validity`].
pub const CLOCK: &str = "clock";
/// Name of the program that does nothing: it keeps our places for a moment after switching off.
pub const PARKED: &str = "parked";

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

/// LRU hash: [`FlowKey`] as the pod sends it → [`OutFlow`].
pub const FLOWS_OUT: &str = "FLOWS_OUT";
/// LRU hash: [`FlowKey`] as it arrives inside the tunnel → [`InFlow`].
pub const FLOWS_IN: &str = "FLOWS_IN";
/// Per-CPU array: what came in by a pod's veth and is on its way through the stack.
pub const NOTES_OUT: &str = "NOTES_OUT";
/// Per-CPU array: what came in by the tunnel device and is on its way through the stack.
pub const NOTES_IN: &str = "NOTES_IN";
/// Per-CPU array: index of the last note without its far end, for packets that are translated.
pub const TRAILS_OUT: &str = "TRAILS_OUT";
/// Per-CPU array: as [`TRAILS_OUT`], for the way in.
pub const TRAILS_IN: &str = "TRAILS_IN";
/// Per-CPU array with two `u32`: how many notes each direction has made.
pub const NOTED: &str = "NOTED";
/// Per-CPU array of [`Candidate`]: flows that have not earned an entry yet.
pub const CANDIDATES_OUT: &str = "CANDIDATES_OUT";
/// Per-CPU array of [`Candidate`], way in.
pub const CANDIDATES_IN: &str = "CANDIDATES_IN";
/// Array of [`Answered`]: handshakes through a Service that have only their last packet to come.
pub const HANDSHAKES: &str = "HANDSHAKES";
/// Array with one [`Epoch`].
pub const EPOCH: &str = "EPOCH";
/// Array of `u32`: generation of whatever hashes there, see [`generation_slot`].
pub const GENERATIONS: &str = "GENERATIONS";
/// Hash: [`FlowKey`] as the pod sends it → [`OwnFlow`]: connections that conntrack does not know
/// yet, both directions in one entry. Nothing live is ever evicted; only the agent deletes.
pub const OWN: &str = "OWN";
/// Hash: [`ClassKey`] → [`Class`].
pub const CLASSES: &str = "CLASSES";
/// LRU hash: [`ClassKey`] of a server that the pod reaches through a Service too → 1. The kernel has
/// to choose the ports of all its connections there.
pub const TRANSLATED: &str = "TRANSLATED";
/// Ring of [`FlowKey`]: connections that bypassed and that a RST has ended, as the RST went to the
/// stack. Conntrack has not seen the acknowledgement that it compares a RST with.
pub const RESETS: &str = "RESETS";
/// Longest-prefix map: address that is never bypassed → 1.
pub const EXCLUDED_SUBNETS: &str = "EXCLUDED_SUBNETS";
/// Array of 1,024 `u64`: one bit per TCP or UDP port that is never bypassed.
pub const EXCLUDED_PORTS: &str = "EXCLUDED_PORTS";

/// Most peers that the maps hold.
pub const MAX_REMOTE_SUBNETS: u32 = 131_072;
/// Most local pod addresses.
pub const MAX_LOCAL_PODS: u32 = 4_096;

/// [`NodeConfig::flags`]: TCP between pods bypasses the stack from its SYN on. Always together
/// with [`FAST_PATH_LEARNED`], which carries what this cannot.
pub const FAST_PATH_DIRECT: u32 = 1 << 0;
/// [`NodeConfig::flags`]: tunnel packets for our VNI that no known peer can
/// have sent are dropped; without it the kernel decides.
pub const DROP_FORGED: u32 = 1 << 1;

/// [`NodeConfig::flags`]: flows whose way was learned may bypass the stack.
pub const FAST_PATH_LEARNED: u32 = 1 << 2;
/// [`NodeConfig::flags`]: some addresses or ports are never bypassed.
pub const HAS_EXCLUSIONS: u32 = 1 << 3;

/// [`NodeConfig::flags`]: TCP between pods bypasses the stack from its SYN on where the stack has
/// let connections of the same class pass.
pub const FAST_PATH_CLASSES: u32 = 1 << 4;

/// Flows of each direction that the tables hold unless a flag says otherwise.
pub const DEFAULT_FLOWS: u32 = 65_536;
/// Connections that the own table holds. Closed ones stay two seconds: enough for 30,000 a second.
pub const OWN_FLOWS: u32 = 65_536;
/// Classes that are remembered.
pub const MAX_CLASSES: u32 = 16_384;
/// Notes per CPU and direction, a ring. The stack takes packets in batches of up to 64
/// between the two sightings. Few, so that they stay in the CPU's nearest cache.
pub const NOTES: u32 = 128;
/// Trails per CPU and direction; a trail that another packet overwrote finds nothing.
pub const TRAILS: u32 = 2_048;
/// Candidates per CPU and direction, one half for packets and one for their outcomes. Even.
pub const CANDIDATES: u32 = 16_384;
/// Places in `HANDSHAKES`, for all CPUs together. One that another handshake took is none.
pub const HANDSHAKE_PLACES: u32 = 4_096;
/// Size of `RESETS` in bytes: a power of two and of whole pages, for 2,700 resets between two looks
/// of the agent. What finds no room is not told.
pub const RESETS_BYTES: u32 = 65_536;
/// Places in `GENERATIONS`. Two things in one place cost a needless look at the stack, no more.
pub const GENERATION_SLOTS: u32 = 4_096;
/// Words of `EXCLUDED_PORTS`.
pub const PORT_WORDS: u32 = 1_024;
/// Most prefixes in `EXCLUDED_SUBNETS`.
pub const MAX_EXCLUDED_SUBNETS: u32 = 1_024;

/// Where the generation of a pod or a peer is kept in `GENERATIONS`.
#[inline(always)]
#[must_use]
pub const fn generation_slot(address: [u8; 4]) -> u32 {
    u32::from_be_bytes(address).wrapping_mul(0x9e37_79b1) >> 20
}
const _: () = assert!(1 << (32 - 20) == GENERATION_SLOTS);

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
    /// Mixed into every hash, so that nobody outside can choose its place.
    pub seed: u32,
    /// Interface index of the tunnel device.
    pub tunnel: u32,
}
const _: () = assert!(size_of::<NodeConfig>() == 44);

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
    /// Bits named `POD_…`.
    pub flags: u32,
}
const _: () = assert!(size_of::<LocalPod>() == 24);

/// [`LocalPod::flags`]: never bypassed: its veth is shaped or carries somebody's filter, or the
/// operator said so.
pub const POD_IN_KERNEL: u32 = 1 << 0;

/// One direction of a flow: key of the flow tables. Aligned, so that copies of it on a program's
/// stack may be moved word by word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// Source port, network order.
    pub sport: [u8; 2],
    /// Destination port, network order.
    pub dport: [u8; 2],
    /// IP protocol: TCP or UDP.
    pub protocol: u8,
    /// Always zero.
    pub _pad: u8,
    /// Always zero.
    pub _end: u16,
}
const _: () = assert!(size_of::<FlowKey>() == 16);

impl FlowKey {
    /// The opposite direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            protocol: self.protocol,
            _pad: 0,
            _end: 0,
        }
    }
}

/// What holds for a flow in one direction, and how long: head of the flow tables' values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Verdict {
    /// [`crate::hash::tag`] of the key. A least-recently-used table may hand an entry to another
    /// flow while a program looks at it: a reader compares this, and its twin at the end.
    pub tag: u32,
    /// When the stack last confirmed it, in jiffies.
    pub seen: u32,
    /// When a packet was last sent to ask the stack, in jiffies.
    pub probed: u32,
    /// Global generation of the last confirmation.
    pub generation: u32,
    /// Generation of the pod.
    pub pod_generation: u32,
    /// Generation of the peer.
    pub peer_generation: u32,
    /// When the entry was made, in jiffies.
    pub since: u32,
    /// The far end after translation: destination on the way out, source on the way in.
    pub far: [u8; 4],
    /// Packets that bypassed the stack.
    pub packets: u64,
    /// Its port, network order.
    pub far_port: [u8; 2],
    /// Place of the pod's generation.
    pub pod_slot: u16,
    /// Place of the peer's generation.
    pub peer_slot: u16,
    /// What the far end's change adds to the IP header's checksum, host order.
    pub ip_delta: u16,
    /// DSCP in the upper six bits: another one is another verdict.
    pub dscp: u8,
    /// Is the far end translated? 0 or 1.
    pub translated: u8,
    /// Always zero.
    pub _pad: u16,
    /// Of TCP: how far data has come in sequence space, network order; zero if none has. A RST of the
    /// same end that comes there is genuine.
    pub end: [u8; 4],
}
const _: () = assert!(size_of::<Verdict>() == 56);

/// Bytes from the outer Ethernet header to the inner one, both included.
pub const TEMPLATE_LEN: usize = 64;

/// Value of `FLOWS_OUT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct OutFlow {
    /// The verdict.
    pub verdict: Verdict,
    /// Interface that the pod's packets come in by.
    pub ingress: u32,
    /// Interface that they leave by.
    pub uplink: u32,
    /// Mark that the stack leaves on them.
    pub mark: u32,
    /// Priority that the stack gives them.
    pub priority: u32,
    /// MAC address that the pod sends them to.
    pub gateway_mac: [u8; 6],
    /// Always zero.
    pub _pad: [u8; 2],
    /// One's complement sum of the template's IP header, host order.
    pub outer_sum: u32,
    /// All headers before the inner IP header as the kernel made them; what differs between
    /// packets is zero: TOS, length, identification, checksums.
    pub template: [u8; TEMPLATE_LEN],
    /// [`Verdict::tag`] again.
    pub tag: u32,
    /// Of TCP: how far it has acknowledged the other direction's data, network order; zero if it has
    /// not. A RST of the other direction that comes there is genuine.
    pub ack: [u8; 4],
    /// Always zero.
    pub _end: u32,
}
const _: () = assert!(size_of::<OutFlow>() == 160);

/// Value of `FLOWS_IN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct InFlow {
    /// The verdict.
    pub verdict: Verdict,
    /// Interface of the pod's veth on the host.
    pub pod: u32,
    /// MTU of the pod in bytes.
    pub mtu: u32,
    /// Public address of the peer that owns the inner source: the only outer source.
    pub node: [u8; 4],
    /// Destination and source MAC address as the stack delivers.
    pub macs: [u8; 12],
    /// [`Verdict::tag`] again.
    pub tag: u32,
    /// As [`OutFlow::ack`].
    pub ack: [u8; 4],
}
const _: () = assert!(size_of::<InFlow>() == 88);

/// A packet at its first sighting. Aligned as [`FlowKey`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Note {
    /// Its flow.
    pub key: FlowKey,
    /// TCP sequence number; zero for UDP.
    pub seq: [u8; 4],
    /// TCP acknowledgement number; zero for UDP.
    pub ack: [u8; 4],
    /// The first bytes behind the fixed TCP or UDP header, zeros where there are fewer.
    pub start: [u8; 16],
    /// IP identification.
    pub id: [u8; 2],
    /// IP total length, network order.
    pub len: [u8; 2],
    /// TCP window; UDP length.
    pub window: [u8; 2],
    /// TCP flags; zero for UDP.
    pub tcp_flags: u8,
    /// TOS byte.
    pub tos: u8,
    /// TTL before the stack counts the hop.
    pub ttl: u8,
    /// 1 until it is matched.
    pub live: u8,
    /// A copy that only asks: the packet itself has gone the fast way.
    pub probe: u8,
    /// Always zero.
    pub _pad: u8,
    /// When, in jiffies.
    pub at: u32,
    /// Global generation then; of a packet of the handshake, that of classes.
    pub generation: u32,
    /// Interface it came in by.
    pub ifindex: u32,
}
const _: () = assert!(size_of::<Note>() == 64);

/// Value of `TRAILS_…`: where the note of a packet is that may be translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Trail {
    /// Index of the note, plus 1; 0 for none.
    pub note: u16,
    /// Two packets that only their far ends tell apart: neither may be matched by it.
    pub ambiguous: u16,
}
const _: () = assert!(size_of::<Trail>() == 4);

/// Value of `HANDSHAKES`: the answer to a pod's SYN has come out of the stack, translated. Two CPUs
/// that write to one place at once leave something that fits neither handshake.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Answered {
    /// [`crate::hash::flow`] of the connection as the pod sends it.
    pub flow: u64,
    /// Hash of where the stack takes the answer from, and of the generation of classes then.
    pub way: u32,
    /// DSCP of the answer, in the upper six bits.
    pub dscp: u8,
    /// Always zero.
    pub _pad: [u8; 3],
}
const _: () = assert!(size_of::<Answered>() == 16);

/// What was not seen often enough yet: a flow, or a flow with one outcome.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Candidate {
    /// Low half of the hash of flow or outcome; the high one is its place.
    pub outcome: u32,
    /// When it was last seen: the low bits of the jiffies.
    pub at: u16,
    /// Low bits of the global generation of the first time.
    pub generation: u8,
    /// How often in a row; 0 for a place that nobody has.
    pub times: u8,
}
const _: () = assert!(size_of::<Candidate>() == 8);

/// Value of `EPOCH`: how long verdicts hold, and whether they may be used at all.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Epoch {
    /// Raised by everything that can change a verdict.
    pub generation: u32,
    /// Until then, in jiffies, verdicts of the generation before hold while they are rechecked.
    pub grace_until: u32,
    /// Bits `BYPASS_ANY` and `BYPASS_TCP`.
    pub flags: u32,
    /// How long a confirmed verdict holds, in jiffies.
    pub validity: u32,
    /// Pause between two probes of a flow that nobody answered, in jiffies.
    pub probe_gap: u32,
    /// The same while a flow still has the verdict of an older generation, in jiffies.
    pub recheck_gap: u32,
    /// Until then, in jiffies, connections may bypass from their SYN on: the agent's heartbeat.
    pub own_until: u32,
    /// Entries of own connections that closed before then, in jiffies, are being deleted: the next
    /// connections of their tuples must not have them.
    pub own_expired: u32,
    /// Generation of classes: raised with the change itself, not after a pause.
    pub class_generation: u32,
    /// How long a class holds until one of its SYNs has to ask the stack again, in jiffies.
    pub class_validity: u32,
    /// How long the answer to such a SYN may take, in jiffies.
    pub class_patience: u32,
}
const _: () = assert!(size_of::<Epoch>() == 44);

/// [`Epoch::flags`]: verdicts may be used.
pub const BYPASS_ANY: u32 = 1 << 0;
/// [`Epoch::flags`]: conntrack can stand TCP that comes back to it.
pub const BYPASS_TCP: u32 = 1 << 1;

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
    use super::{
        Class, ClassKey, Epoch, FlowKey, InFlow, LocalPod, NodeConfig, OutFlow, OwnFlow,
        RemoteSubnet, Tally,
    };

    // SAFETY: all are `repr(C)`, free of padding (bytemuck checks that) and valid for any bytes.
    unsafe impl aya::Pod for NodeConfig {}
    // SAFETY: see above.
    unsafe impl aya::Pod for RemoteSubnet {}
    // SAFETY: see above.
    unsafe impl aya::Pod for LocalPod {}
    // SAFETY: see above.
    unsafe impl aya::Pod for Tally {}
    // SAFETY: see above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: see above.
    unsafe impl aya::Pod for Epoch {}
    // SAFETY: see above.
    unsafe impl aya::Pod for OutFlow {}
    // SAFETY: see above.
    unsafe impl aya::Pod for InFlow {}
    // SAFETY: see above.
    unsafe impl aya::Pod for OwnFlow {}
    // SAFETY: see above.
    unsafe impl aya::Pod for ClassKey {}
    // SAFETY: see above.
    unsafe impl aya::Pod for Class {}
}
