//! Packets put together field by field, as they come and as they must go.

use super::fixture::{
    GATEWAY_MAC, NODE_A, NODE_B, POD_A, POD_B, POD_MAC, UPLINK_MAC, VTEP_A, VTEP_B,
};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// The Internet checksum of these bytes; of bytes that hold theirs, zero.
#[must_use]
pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from))
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
        let check = checksum(&header);
        header[10..12].copy_from_slice(&check);
        header.extend(&self.payload);
        header
    }
}

pub(super) fn tcp(payload: usize) -> Vec<u8> {
    let mut segment = vec![
        0xc0, 0x00, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10, 0x01, 0xf5, 0xab, 0xcd, 0, 0,
    ];
    segment.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    segment.extend((0..payload).map(|index| index as u8));
    segment
}

pub(super) fn udp(payload: usize) -> Vec<u8> {
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

pub(super) fn ethernet(
    destination: [u8; 6],
    source: [u8; 6],
    ether_type: u16,
    rest: &[u8],
) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend(source);
    frame.extend(ether_type.to_be_bytes());
    frame.extend(rest);
    frame
}

/// A pod's frame to its gateway.
pub(super) fn from_pod(packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, POD_MAC, 0x0800, packet)
}

/// A tunnel packet in the making.
#[derive(Clone, Debug)]
pub(super) struct Tunnel {
    pub(super) outer: Ip,
    pub(super) port: u16,
    pub(super) source_port: u16,
    pub(super) vxlan: [u8; 8],
    pub(super) inner_destination: [u8; 6],
    pub(super) inner_source: [u8; 6],
    pub(super) inner_type: u16,
    pub(super) outer_destination: [u8; 6],
}

impl Tunnel {
    pub(super) fn from_peer() -> Self {
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

    pub(super) fn bytes(&self, inner: &[u8]) -> Vec<u8> {
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

/// What encapsulation must make of `inner` (given before its hop is counted).
pub(super) fn encapsulated(inner: &Ip, outer_tos: u8) -> Vec<u8> {
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
pub(super) fn delivered(inner: &Ip, tos: u8) -> Vec<u8> {
    let next = Ip {
        ttl: inner.ttl - 1,
        tos,
        ..inner.clone()
    };
    ethernet(POD_MAC, GATEWAY_MAC, 0x0800, &next.bytes())
}
