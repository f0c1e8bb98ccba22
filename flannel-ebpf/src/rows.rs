//! Packets as data: what is given, what must come out.
//!
//! The same rows run against the pure decisions on the host and against the
//! loaded programs through BPF test_run. Expected bytes are put together here
//! field by field, not with the code under test.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    frame::{Bytes, Meta},
    layout::{
        BYPASS_ANY, BYPASS_TCP, ClassKey, DROP_FORGED, Epoch, FAST_PATH_DIRECT, FAST_PATH_LEARNED,
        FlowKey, InFlow, LocalPod, MODE_KERNEL, MODE_VXLAN, NodeConfig, OutFlow, RemoteSubnet,
    },
    reason::{Direction, Reason},
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

const POD_MAC: [u8; 6] = [0x0a, 0, 0, 0, 0, 0x02];
/// `cni0` of our node. All zero, as `lo`'s: test_run takes the frame for one
/// to this host only then, and it must be so for both hooks.
const GATEWAY_MAC: [u8; 6] = [0; 6];
const VTEP_A: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
const VTEP_B: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];
/// The uplink's own address, and a frame's next hop.
const UPLINK_MAC: [u8; 6] = [0; 6];

/// The interface index that every packet comes in by: `lo` under test_run.
pub const IFINDEX: u32 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A generation that was not raised lately. By it alone nothing bypasses the stack, nor opens.
pub const EPOCH: Epoch = Epoch {
    generation: 7,
    grace_until: 0,
    flags: 0,
    validity: 2_000,
    probe_gap: 250,
    recheck_gap: 5,
    own_until: 0,
    own_linger: 0,
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
                own_linger: 1_900,
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

/// One's complement sum over a whole header, folded and inverted.
fn full_checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IPv4 packet in the making.
#[derive(Clone, Debug)]
pub struct Ip {
    /// Source and destination.
    pub addresses: ([u8; 4], [u8; 4]),
    /// TOS byte.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub frags: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub protocol: u8,
    /// Options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// Everything behind the header.
    pub payload: Vec<u8>,
}

impl Ip {
    /// The packet's bytes, checksum filled in.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let total = (header_len + self.payload.len()) as u16;
        let mut header = vec![0x40 | (header_len / 4) as u8, self.tos];
        header.extend(total.to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(self.frags.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(self.addresses.0);
        header.extend(self.addresses.1);
        header.extend(&self.options);
        let check = full_checksum(&header);
        header[10..12].copy_from_slice(&check);
        header.extend(&self.payload);
        header
    }
}

fn tcp(payload: usize) -> Vec<u8> {
    let mut segment = vec![
        0xc0, 0x00, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10, 0x01, 0xf5, 0xab, 0xcd, 0, 0,
    ];
    segment.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    segment.extend((0..payload).map(|index| index as u8));
    segment
}

fn udp(payload: usize) -> Vec<u8> {
    let mut datagram = vec![0xc0, 0x00, 0x00, 0x35];
    datagram.extend((8 + payload as u16).to_be_bytes());
    datagram.extend([0x12, 0x34]);
    datagram.extend((0..payload).map(|index| index as u8));
    datagram
}

/// A TCP packet from our pod to the peer's.
#[must_use]
pub fn outgoing() -> Ip {
    Ip {
        addresses: (POD_A, POD_B),
        tos: 0,
        id: 0x1234,
        frags: 0x4000,
        ttl: 64,
        protocol: TCP,
        options: Vec::new(),
        payload: tcp(64),
    }
}

/// A TCP packet from the peer's pod to ours, after the peer counted its hop.
#[must_use]
pub fn incoming() -> Ip {
    Ip {
        addresses: (POD_B, POD_A),
        ttl: 63,
        ..outgoing()
    }
}

fn ethernet(destination: [u8; 6], source: [u8; 6], ether_type: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend(source);
    frame.extend(ether_type.to_be_bytes());
    frame.extend(rest);
    frame
}

/// A pod's frame to its gateway.
fn from_pod(packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, POD_MAC, 0x0800, packet)
}

/// A tunnel packet in the making.
#[derive(Clone, Debug)]
struct Tunnel {
    outer: Ip,
    port: u16,
    source_port: u16,
    vxlan: [u8; 8],
    inner_destination: [u8; 6],
    inner_source: [u8; 6],
    inner_type: u16,
    outer_destination: [u8; 6],
}

impl Tunnel {
    fn from_peer() -> Self {
        Self {
            outer: Ip {
                addresses: (NODE_B, NODE_A),
                tos: 0,
                id: 7,
                frags: 0,
                ttl: 64,
                protocol: UDP,
                options: Vec::new(),
                payload: Vec::new(),
            },
            port: 8472,
            source_port: 40000,
            vxlan: [8, 0, 0, 0, 0, 0, 1, 0],
            inner_destination: VTEP_A,
            inner_source: VTEP_B,
            inner_type: 0x0800,
            outer_destination: UPLINK_MAC,
        }
    }

    fn bytes(&self, inner: &[u8]) -> Vec<u8> {
        let mut payload = self.source_port.to_be_bytes().to_vec();
        payload.extend(self.port.to_be_bytes());
        payload.extend((8 + 8 + 14 + inner.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
        payload.extend(self.vxlan);
        payload.extend(ethernet(
            self.inner_destination,
            self.inner_source,
            self.inner_type,
            inner,
        ));
        let outer = Ip {
            payload,
            ..self.outer.clone()
        };
        ethernet(self.outer_destination, [6; 6], 0x0800, &outer.bytes())
    }
}

/// What the program must make of a packet.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Forwarded; the packet is then exactly this. On the way out bytes 18..20
    /// (identification), 24..26 (outer checksum) and 34..36 (source port) are
    /// the program's choice and hold zeros here.
    Becomes(Vec<u8>),
    /// Not forwarded, bytes unchanged.
    Stays(Reason),
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// The case in a sentence.
    pub what: &'static str,
    /// Which hook.
    pub direction: Direction,
    /// The packet.
    pub given: Vec<u8>,
    /// Segment payload where segmentation is still to be done.
    pub gso_size: u32,
    /// Not a frame for this host.
    pub other_host: bool,
    /// What must come out.
    pub expect: Expect,
}

impl Row {
    /// The packet as the pure decisions take it.
    #[must_use]
    pub fn frame(&self) -> Bytes<'_> {
        Bytes {
            bytes: &self.given,
            meta: Meta {
                len: self.given.len() as u32,
                ifindex: IFINDEX,
                gso_size: self.gso_size,
                packet_type: if self.other_host { 3 } else { 0 },
                vlan: false,
            },
        }
    }
}

/// What encapsulation must make of `inner` (given before its hop is counted).
fn encapsulated(inner: &Ip, outer_tos: u8) -> Vec<u8> {
    let next = Ip {
        ttl: inner.ttl - 1,
        ..inner.clone()
    };
    let tunnel = Tunnel {
        outer: Ip {
            addresses: (NODE_A, NODE_B),
            tos: outer_tos,
            id: 0,
            ..Tunnel::from_peer().outer
        },
        source_port: 0,
        inner_destination: VTEP_B,
        inner_source: VTEP_A,
        ..Tunnel::from_peer()
    };
    let mut frame = tunnel.bytes(&next.bytes());
    // The outer Ethernet header is written by the kernel after redirect_neigh.
    frame[..6].copy_from_slice(&GATEWAY_MAC);
    frame[6..12].copy_from_slice(&POD_MAC);
    frame[24..26].fill(0);
    frame
}

/// What delivery must make of `inner` (given as it came out of the tunnel).
fn delivered(inner: &Ip, tos: u8) -> Vec<u8> {
    let next = Ip {
        ttl: inner.ttl - 1,
        tos,
        ..inner.clone()
    };
    ethernet(POD_MAC, GATEWAY_MAC, 0x0800, &next.bytes())
}

/// Rows for the way out.
#[must_use]
pub fn way_out() -> Vec<Row> {
    let row = |what, given: Vec<u8>, expect| Row {
        what,
        direction: Direction::Out,
        given,
        gso_size: 0,
        other_host: false,
        expect,
    };
    let ip = |what, packet: Ip, expect| row(what, from_pod(&packet.bytes()), expect);
    let stays =
        |what, packet: Ip, reason| row(what, from_pod(&packet.bytes()), Expect::Stays(reason));
    let out = outgoing;
    let mut rows = vec![
        ip(
            "TCP to a peer's pod is encapsulated",
            out(),
            Expect::Becomes(encapsulated(&out(), 0)),
        ),
        {
            let packet = Ip {
                protocol: UDP,
                payload: udp(64),
                frags: 0,
                id: 0,
                ..out()
            };
            ip(
                "UDP as well",
                packet.clone(),
                Expect::Becomes(encapsulated(&packet, 0)),
            )
        },
        {
            let packet = Ip {
                protocol: UDP,
                payload: udp(1450 - 28),
                ..out()
            };
            ip(
                "a packet of exactly the pod MTU goes",
                packet.clone(),
                Expect::Becomes(encapsulated(&packet, 0)),
            )
        },
        {
            let packet = Ip { ttl: 2, ..out() };
            ip(
                "TTL 2 still has a hop to go",
                packet.clone(),
                Expect::Becomes(encapsulated(&packet, 0)),
            )
        },
    ];
    for (tos, outer, what) in [
        (0xb8, 0, "the inner DSCP stays inside"),
        (0xb9, 1, "ECT(1) is copied"),
        (0x02, 2, "ECT(0) is copied"),
        (0x03, 2, "CE starts anew as ECT(0)"),
    ] {
        let packet = Ip { tos, ..out() };
        rows.push(ip(
            what,
            packet.clone(),
            Expect::Becomes(encapsulated(&packet, outer)),
        ));
    }
    rows.extend([
        stays(
            "one byte over the pod MTU: the kernel answers",
            Ip {
                protocol: UDP,
                payload: udp(1450 - 27),
                ..out()
            },
            Reason::OutOverMtu,
        ),
        stays("TTL 1 ends here", Ip { ttl: 1, ..out() }, Reason::OutTtl),
        stays("TTL 0 as well", Ip { ttl: 0, ..out() }, Reason::OutTtl),
        stays(
            "IP options",
            Ip {
                options: vec![7, 7, 4, 0, 0, 0, 0, 0],
                ..out()
            },
            Reason::OutIpOptions,
        ),
        stays(
            "a first fragment",
            Ip {
                frags: 0x2000,
                ..out()
            },
            Reason::OutFragment,
        ),
        stays(
            "a last fragment",
            Ip {
                frags: 0x00b9,
                ..out()
            },
            Reason::OutFragment,
        ),
        stays(
            "ICMP",
            Ip {
                protocol: 1,
                payload: vec![8, 0, 0, 0, 0, 0, 0, 0],
                ..out()
            },
            Reason::OutProtocol,
        ),
        stays(
            "SCTP",
            Ip {
                protocol: 132,
                ..out()
            },
            Reason::OutProtocol,
        ),
        stays(
            "multicast",
            Ip {
                addresses: (POD_A, [224, 0, 0, 251]),
                ..out()
            },
            Reason::OutMulticast,
        ),
        stays(
            "broadcast",
            Ip {
                addresses: (POD_A, [255; 4]),
                ..out()
            },
            Reason::OutMulticast,
        ),
        stays(
            "the world outside",
            Ip {
                addresses: (POD_A, [192, 0, 2, 1]),
                ..out()
            },
            Reason::OutNotRemote,
        ),
        stays(
            "a pod of our own",
            Ip {
                addresses: (POD_A, POD_A2),
                ..out()
            },
            Reason::OutNotRemote,
        ),
        stays(
            "a peer without a route",
            Ip {
                addresses: (POD_A, POD_C),
                ..out()
            },
            Reason::OutPeerInKernel,
        ),
        stays(
            "another pod's address as source",
            Ip {
                addresses: (POD_A2, POD_B),
                ..out()
            },
            Reason::OutForeignSource,
        ),
        stays(
            "a source that is no pod's",
            Ip {
                addresses: ([10, 244, 1, 77], POD_B),
                ..out()
            },
            Reason::OutForeignSource,
        ),
        row(
            "ARP",
            ethernet([255; 6], POD_MAC, 0x0806, &[0; 28]),
            Expect::Stays(Reason::OutNotIpv4),
        ),
        row(
            "IPv6",
            ethernet(GATEWAY_MAC, POD_MAC, 0x86dd, &[0x60; 40]),
            Expect::Stays(Reason::OutNotIpv4),
        ),
        row(
            "a frame to another machine of the bridge",
            ethernet([2, 2, 2, 2, 2, 2], POD_MAC, 0x0800, &out().bytes()),
            Expect::Stays(Reason::OutNotForGateway),
        ),
        row(
            "a header cut short",
            ethernet(GATEWAY_MAC, POD_MAC, 0x0800, &out().bytes()[..12]),
            Expect::Stays(Reason::OutMalformed),
        ),
        row(
            "bytes behind the packet",
            from_pod(&[out().bytes(), vec![0; 6]].concat()),
            Expect::Stays(Reason::OutMalformed),
        ),
        {
            let mut packet = out().bytes();
            packet[0] = 0x44;
            row(
                "a header length below 20",
                from_pod(&packet),
                Expect::Stays(Reason::OutMalformed),
            )
        },
        {
            let packet = Ip {
                payload: tcp(3000),
                ..out()
            };
            Row {
                gso_size: 1398,
                ..ip(
                    "a large TCP packet whose segments fit",
                    packet.clone(),
                    Expect::Becomes(encapsulated(&packet, 0)),
                )
            }
        },
        Row {
            gso_size: 1399,
            ..stays(
                "a large TCP packet whose segments are a byte too long",
                Ip {
                    payload: tcp(3000),
                    ..out()
                },
                Reason::OutOverMtu,
            )
        },
    ]);
    rows
}

/// Rows for the way in.
#[must_use]
pub fn way_in() -> Vec<Row> {
    let row = |what, given: Vec<u8>, expect| Row {
        what,
        direction: Direction::In,
        given,
        gso_size: 0,
        other_host: false,
        expect,
    };
    let tunnel = Tunnel::from_peer;
    let inn = incoming;
    let stays = |what, tunnel: Tunnel, inner: Ip, reason| {
        row(what, tunnel.bytes(&inner.bytes()), Expect::Stays(reason))
    };
    let outer = |change: fn(&mut Ip)| {
        let mut tunnel = tunnel();
        change(&mut tunnel.outer);
        tunnel
    };
    let mut rows = vec![
        row(
            "a peer's TCP packet is delivered",
            tunnel().bytes(&inn().bytes()),
            Expect::Becomes(delivered(&inn(), 0)),
        ),
        {
            let packet = Ip {
                protocol: UDP,
                payload: udp(32),
                ..inn()
            };
            row(
                "UDP as well",
                tunnel().bytes(&packet.bytes()),
                Expect::Becomes(delivered(&packet, 0)),
            )
        },
        {
            let other = Tunnel {
                source_port: 1,
                ..tunnel()
            };
            row(
                "any outer source port",
                other.bytes(&inn().bytes()),
                Expect::Becomes(delivered(&inn(), 0)),
            )
        },
    ];
    for (outside, inside, after, what) in [
        (
            3u8,
            2u8,
            Some(3u8),
            "congestion outside marks ECT(0) inside",
        ),
        (3, 1, Some(3), "congestion outside marks ECT(1) inside"),
        (1, 2, Some(1), "ECT(1) outside carries over to ECT(0)"),
        (2, 0xb8, Some(0xb8), "DSCP inside is kept"),
        (
            3,
            0,
            None,
            "congestion outside without ECN inside: the kernel drops it",
        ),
    ] {
        let mut marked = tunnel();
        marked.outer.tos = outside;
        let packet = Ip {
            tos: inside,
            ..inn()
        };
        let expect = match after {
            Some(tos) => Expect::Becomes(delivered(&packet, tos)),
            None => Expect::Stays(Reason::InEcn),
        };
        rows.push(row(what, marked.bytes(&packet.bytes()), expect));
    }
    rows.extend([
        row(
            "ARP on the uplink",
            ethernet([255; 6], [6; 6], 0x0806, &[0; 80]),
            Expect::Stays(Reason::InNotTunnel),
        ),
        row(
            "a short packet",
            ethernet(UPLINK_MAC, [6; 6], 0x0800, &inn().bytes()[..52]),
            Expect::Stays(Reason::InNotTunnel),
        ),
        stays(
            "another port",
            Tunnel {
                port: 4789,
                ..tunnel()
            },
            inn(),
            Reason::InNotTunnel,
        ),
        stays(
            "TCP outside",
            outer(|ip| ip.protocol = TCP),
            inn(),
            Reason::InNotTunnel,
        ),
        stays(
            "an outer fragment",
            outer(|ip| ip.frags = 0x2000),
            inn(),
            Reason::InOuterForm,
        ),
        stays(
            "another address of ours outside",
            outer(|ip| ip.addresses.1 = [172, 18, 0, 9]),
            inn(),
            Reason::InOtherAddress,
        ),
        stays(
            "another VNI",
            Tunnel {
                vxlan: [8, 0, 0, 0, 0, 0, 2, 0],
                ..tunnel()
            },
            inn(),
            Reason::InOtherVni,
        ),
        stays(
            "no VNI bit",
            Tunnel {
                vxlan: [0, 0, 0, 0, 0, 0, 1, 0],
                ..tunnel()
            },
            inn(),
            Reason::InVxlanFlags,
        ),
        stays(
            "group policy bits",
            Tunnel {
                vxlan: [0x88, 0, 0, 5, 0, 0, 1, 0],
                ..tunnel()
            },
            inn(),
            Reason::InVxlanFlags,
        ),
        stays(
            "a set reserved byte",
            Tunnel {
                vxlan: [8, 0, 0, 0, 0, 0, 1, 1],
                ..tunnel()
            },
            inn(),
            Reason::InVxlanFlags,
        ),
        stays(
            "an inner frame to another device",
            Tunnel {
                inner_destination: VTEP_B,
                ..tunnel()
            },
            inn(),
            Reason::InOtherVtep,
        ),
        stays(
            "an inner broadcast",
            Tunnel {
                inner_destination: [255; 6],
                ..tunnel()
            },
            inn(),
            Reason::InOtherVtep,
        ),
        stays(
            "inner IPv6 of a peer",
            Tunnel {
                inner_type: 0x86dd,
                ..tunnel()
            },
            inn(),
            Reason::InNotIpv4,
        ),
        stays(
            "an unknown node",
            outer(|ip| ip.addresses.0 = [172, 18, 0, 66]),
            inn(),
            Reason::InForged,
        ),
        stays(
            "a peer with another peer's pod inside",
            outer(|ip| ip.addresses.0 = NODE_C),
            inn(),
            Reason::InForged,
        ),
        stays(
            "an unknown node with a foreign address inside",
            outer(|ip| ip.addresses.0 = [172, 18, 0, 66]),
            Ip {
                addresses: ([192, 0, 2, 1], POD_A),
                ..inn()
            },
            Reason::InForged,
        ),
        stays(
            "a peer with a foreign address inside",
            tunnel(),
            Ip {
                addresses: ([192, 0, 2, 1], POD_A),
                ..inn()
            },
            Reason::InSourceUnknown,
        ),
        stays(
            "an unknown pod",
            tunnel(),
            Ip {
                addresses: (POD_B, [10, 244, 1, 99]),
                ..inn()
            },
            Reason::InNotLocalPod,
        ),
        stays(
            "inner multicast",
            tunnel(),
            Ip {
                addresses: (POD_B, [224, 0, 0, 1]),
                ..inn()
            },
            Reason::InMulticast,
        ),
        stays(
            "inner options",
            tunnel(),
            Ip {
                options: vec![1; 4],
                ..inn()
            },
            Reason::InIpOptions,
        ),
        stays(
            "an inner fragment",
            tunnel(),
            Ip {
                frags: 0x2000,
                ..inn()
            },
            Reason::InFragment,
        ),
        stays(
            "inner ICMP",
            tunnel(),
            Ip {
                protocol: 1,
                ..inn()
            },
            Reason::InProtocol,
        ),
        stays(
            "inner TTL 1",
            tunnel(),
            Ip { ttl: 1, ..inn() },
            Reason::InTtl,
        ),
        stays(
            "over the pod's MTU",
            tunnel(),
            Ip {
                payload: tcp(1400),
                ..inn()
            },
            Reason::InOverMtu,
        ),
        Row {
            gso_size: 512,
            ..stays(
                "UDP that is still to be segmented",
                tunnel(),
                Ip {
                    protocol: UDP,
                    payload: udp(1024),
                    ..inn()
                },
                Reason::InUdpGso,
            )
        },
        {
            let mut given = tunnel().bytes(&inn().bytes());
            given.extend([0; 4]);
            row(
                "bytes behind the outer packet",
                given,
                Expect::Stays(Reason::InOuterForm),
            )
        },
        {
            let mut inner = inn().bytes();
            inner[0] = 0x44;
            row(
                "an inner header length below 20",
                tunnel().bytes(&inner),
                Expect::Stays(Reason::InMalformed),
            )
        },
        {
            let mut inner = inn().bytes();
            inner.extend([0; 4]);
            row(
                "bytes behind the inner packet",
                tunnel().bytes(&inner),
                Expect::Stays(Reason::InOuterForm),
            )
        },
        Row {
            other_host: true,
            ..stays(
                "a frame to another host",
                Tunnel {
                    outer_destination: [2, 9, 9, 9, 9, 9],
                    ..tunnel()
                },
                inn(),
                Reason::InNotForHost,
            )
        },
        {
            let packet = Ip {
                payload: tcp(3000),
                ..inn()
            };
            Row {
                gso_size: 1398,
                ..row(
                    "a large TCP packet",
                    tunnel().bytes(&packet.bytes()),
                    Expect::Becomes(delivered(&packet, 0)),
                )
            }
        },
    ]);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{decap, encap, header::Header as _, outer::Outer};

    /// Applies an encapsulation as `kernel/apply.rs` does.
    fn applied(row: &Row, way: &encap::Encapsulation<'_>) -> Vec<u8> {
        let outer = Outer::new(way, 0, 0);
        // SAFETY: 50 bytes without padding.
        let outer: [u8; 50] = unsafe { std::mem::transmute(outer) };
        let mut frame = [&row.given[..14], &outer[..], &row.given[14..]].concat();
        let (ttl, check) = crate::outer::next_hop_ttl(way.ttl, way.protocol, way.check);
        frame[64 + 8] = ttl;
        frame[64 + 10..64 + 12].copy_from_slice(&check);
        assert_eq!(
            full_checksum(&frame[14..34]),
            [0, 0],
            "outer checksum of {}",
            row.what
        );
        frame[18..20].fill(0);
        frame[24..26].fill(0);
        frame[34..36].fill(0);
        frame
    }

    #[test]
    fn the_way_out_row_by_row() {
        let fixture = Fixture::default();
        for row in way_out() {
            let outcome = encap::encapsulate(&row.frame(), &fixture, &fixture.node);
            match (&row.expect, outcome) {
                (Expect::Becomes(expected), Ok(way)) => {
                    assert_eq!(applied(&row, &way), *expected, "{}", row.what)
                }
                (Expect::Stays(expected), Err(reason)) => {
                    assert_eq!(reason, *expected, "{}", row.what)
                }
                (expected, outcome) => {
                    panic!("{}: expected {expected:?}, got {outcome:?}", row.what)
                }
            }
        }
    }

    #[test]
    fn the_way_in_row_by_row() {
        let fixture = Fixture::default();
        for row in way_in() {
            let outcome = decap::deliver(&row.frame(), &fixture, &fixture.node);
            match (&row.expect, outcome) {
                (Expect::Becomes(expected), Ok(way)) => {
                    let mut frame = row.given[50..].to_vec();
                    frame[..6].copy_from_slice(&way.pod.mac);
                    frame[6..12].copy_from_slice(&way.pod.gateway_mac);
                    let (tos, ttl, check) = way.next_hop();
                    frame[15] = tos;
                    frame[22] = ttl;
                    frame[24..26].copy_from_slice(&check);
                    assert_eq!(frame, *expected, "{}", row.what);
                }
                (Expect::Stays(expected), Err(reason)) => {
                    assert_eq!(reason, *expected, "{}", row.what)
                }
                (expected, outcome) => {
                    panic!("{}: expected {expected:?}, got {outcome:?}", row.what)
                }
            }
        }
    }

    #[test]
    fn forged_packets_pass_to_the_kernel_when_asked() {
        let mut fixture = Fixture::default();
        fixture.node.flags &= !DROP_FORGED;
        let forged = way_in()
            .into_iter()
            .filter(|row| matches!(row.expect, Expect::Stays(Reason::InForged)));
        let mut seen = 0;
        for row in forged {
            seen += 1;
            assert_eq!(
                decap::deliver(&row.frame(), &fixture, &fixture.node).err(),
                Some(Reason::InForgedPassed),
                "{}",
                row.what
            );
        }
        assert!(seen >= 3);
    }

    #[test]
    fn every_reason_that_a_packet_can_meet_has_a_row() {
        // Refusals of the kernel and vanished data need a kernel; off and passed have tests above.
        let elsewhere = [
            Reason::OutFastPathOff,
            Reason::OutNoRoom,
            Reason::OutLost,
            Reason::InFastPathOff,
            Reason::InNoRoom,
            Reason::InLost,
            Reason::InForgedPassed,
            Reason::OutGso,
            // What learned flows meet has tests beside `learned` and `learn`.
            Reason::OutUnlearned,
            Reason::OutProbe,
            Reason::OutStale,
            Reason::OutBoundary,
            Reason::OutOtherDscp,
            Reason::OutPodInKernel,
            Reason::OutHeld,
            Reason::OutConntrack,
            Reason::InUnlearned,
            Reason::InProbe,
            Reason::InStale,
            Reason::InBoundary,
            Reason::InOtherDscp,
            Reason::InHeld,
            Reason::InConntrack,
        ];
        let met: Vec<Reason> = way_out()
            .into_iter()
            .chain(way_in())
            .map(|row| match (row.expect, row.direction) {
                (Expect::Stays(reason), _) => reason,
                (Expect::Becomes(_), Direction::Out) => Reason::Encapsulated,
                (Expect::Becomes(_), _) => Reason::Decapsulated,
            })
            .collect();
        let packets = Reason::ALL
            .iter()
            .filter(|reason| matches!(reason.direction(), Direction::Out | Direction::In));
        for reason in packets {
            assert!(
                met.contains(reason) || elsewhere.contains(reason),
                "no row for {reason:?}"
            );
        }
    }

    #[test]
    fn a_packet_whose_outer_length_would_overflow_stays() {
        let packet = Ip {
            payload: tcp(65_535 - 20 - 32 - 49),
            ..outgoing()
        };
        let given = from_pod(&packet.bytes());
        let meta = Meta {
            len: given.len() as u32,
            ifindex: IFINDEX,
            gso_size: 1398,
            ..Meta::default()
        };
        let frame = Bytes {
            bytes: &given,
            meta,
        };
        let fixture = Fixture::default();
        assert_eq!(
            encap::encapsulate(&frame, &fixture, &fixture.node).err(),
            Some(Reason::OutGso)
        );
    }

    #[test]
    fn whatever_the_bytes_nothing_is_read_past_the_end() {
        let fixture = Fixture::default();
        for row in way_out().into_iter().chain(way_in()) {
            for len in 0..row.given.len().min(140) {
                let frame = Bytes::plain(&row.given[..len], IFINDEX);
                let _ = encap::encapsulate(&frame, &fixture, &fixture.node);
                let _ = decap::deliver(&frame, &fixture, &fixture.node);
            }
        }
        assert_eq!(crate::header::Ethernet::LEN, 14);
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_are_never_delivered_nor_sent(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let fixture = Fixture::default();
            let frame = Bytes::plain(&bytes, IFINDEX);
            proptest::prop_assert!(encap::encapsulate(&frame, &fixture, &fixture.node).is_err());
            proptest::prop_assert!(decap::deliver(&frame, &fixture, &fixture.node).is_err());
        }
    }
}
