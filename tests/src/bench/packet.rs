//! Packets made by hand, for single runs of a program.

use std::net::Ipv4Addr;

use flannel_ebpf::rows::checksum;

const ETHERNET: usize = 14;
const IP: usize = 20;
const UDP: usize = 8;
/// Offset in the frame.
const CHECKSUM: usize = ETHERNET + 10;

/// Source and destination port of every datagram made here.
pub const PORTS: (u16, u16) = (40_000, 6000);

/// A UDP datagram in an Ethernet frame, without UDP checksum.
#[must_use]
pub fn datagram(
    (source_mac, source): ([u8; 6], Ipv4Addr),
    (destination_mac, destination): ([u8; 6], Ipv4Addr),
    payload: u8,
) -> Vec<u8> {
    let length = UDP as u16 + u16::from(payload);
    let mut frame = Vec::with_capacity(ETHERNET + IP + usize::from(length));
    frame.extend(destination_mac);
    frame.extend(source_mac);
    frame.extend([8, 0]);
    frame.extend([0x45, 0]);
    frame.extend((IP as u16 + length).to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(PORTS.0.to_be_bytes());
    frame.extend(PORTS.1.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(vec![0; payload.into()]);
    with_checksum(frame)
}

/// The first packet of a TCP connection, in an Ethernet frame; its TCP checksum is for whoever
/// receives it, which nobody does.
#[must_use]
pub fn opening(
    (source_mac, source): ([u8; 6], Ipv4Addr),
    (destination_mac, destination): ([u8; 6], Ipv4Addr),
) -> Vec<u8> {
    const TCP: u8 = 20;
    // As a datagram of the same length, but for protocol and header.
    let mut frame = datagram(
        (source_mac, source),
        (destination_mac, destination),
        TCP - UDP as u8,
    );
    frame[ETHERNET + 9] = 6;
    let tcp = &mut frame[ETHERNET + IP + 4..];
    tcp.fill(0);
    // Sequence number 1, header of five words, SYN, some window.
    tcp[3] = 1;
    tcp[8] = 5 << 4;
    tcp[9] = 2;
    tcp[10] = 64;
    with_checksum(frame)
}

/// The same frame to another MAC address.
#[must_use]
pub fn addressed_to(mut frame: Vec<u8>, mac: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&mac);
    frame
}

fn with_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    frame[CHECKSUM..CHECKSUM + 2].fill(0);
    let sum = checksum(&frame[ETHERNET..ETHERNET + IP]);
    frame[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_is_a_tcp_header_alone() {
        let (one, other) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let frame = opening(([2; 6], one), ([4; 6], other));
        assert_eq!(frame.len(), 14 + 20 + 20);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        assert_eq!((frame[23], frame[46] >> 4, frame[47]), (6, 5, 2));
        assert_eq!(u16::from_be_bytes([frame[36], frame[37]]), PORTS.1);
    }

    #[test]
    fn lengths_and_checksums_agree() {
        let (one, other) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let frame = datagram(([2; 6], one), ([4; 6], other), 64);
        assert_eq!(frame.len(), 14 + 20 + 8 + 64);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        assert_eq!(u16::from_be_bytes([frame[16], frame[17]]), 92);
        assert_eq!(
            addressed_to(frame, [9; 6])[..12],
            [9, 9, 9, 9, 9, 9, 2, 2, 2, 2, 2, 2]
        );
    }
}
