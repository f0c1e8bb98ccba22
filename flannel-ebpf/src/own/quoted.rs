//! Of which connection an ICMP error speaks.

use network_types::{ip::Ipv4Hdr, udp::UdpHdr};

use crate::{frame::Frame, header, layout::FlowKey};

/// Length of the ICMP header before the quoted packet.
const ICMP_HEADER: usize = 8;

/// An ICMP error about a TCP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotation {
    /// Who complains.
    pub sender: [u8; 4],
    /// The packet's flow, in the packet's own direction.
    pub flow: FlowKey,
}

/// The error at hand, if it is one and goes back to whoever sent the packet. `ip` is the offset of
/// the error's own IP header.
#[inline(always)]
pub fn read<F: Frame>(frame: &F, ip: usize) -> Option<Quotation> {
    let outer = frame.at::<Ipv4Hdr>(ip)?;
    if outer.vihl != 0x45 || outer.proto != header::ICMP || header::is_fragment(outer) {
        return None;
    }
    let icmp = frame.at::<UdpHdr>(ip + Ipv4Hdr::LEN)?;
    // The type: destination unreachable (with fragmentation needed), time exceeded, parameter.
    if !matches!(icmp.src[0], 3 | 11 | 12) {
        return None;
    }
    let quoted = ip + Ipv4Hdr::LEN + ICMP_HEADER;
    let inner = frame.at::<Ipv4Hdr>(quoted)?;
    if inner.vihl != 0x45 || inner.proto != header::TCP || inner.src_addr != outer.dst_addr {
        return None;
    }
    // TCP's ports are where UDP's are, and no more than eight bytes need be quoted.
    let ports = frame.at::<UdpHdr>(quoted + Ipv4Hdr::LEN)?;
    Some(Quotation {
        sender: outer.src_addr,
        flow: FlowKey {
            src: inner.src_addr,
            dst: inner.dst_addr,
            sport: ports.src,
            dport: ports.dst,
            protocol: header::TCP,
            _pad: 0,
            _end: 0,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{frame::Bytes, packet::Packet, rows};

    fn error(kind: u8, quoted: &[u8]) -> Vec<u8> {
        let mut payload = vec![kind, 4, 0, 0, 0, 0, 5, 0];
        payload.extend(quoted);
        let packet = rows::Ip {
            addresses: (rows::POD_B, rows::POD_A),
            protocol: header::ICMP,
            payload,
            ..rows::incoming()
        };
        [vec![0; 14], packet.bytes()].concat()
    }

    #[test]
    fn the_quoted_connection_is_found_and_nothing_is_read_past_the_end() {
        let quoted = rows::outgoing().bytes();
        let whole = error(3, &quoted[..28]);
        let sent = [vec![0; 14], quoted].concat();
        let key = Packet::read(&Bytes::plain(&sent, 1), 14).map(|packet| packet.key);
        let found = read(&Bytes::plain(&whole, 1), 14);
        assert_eq!(found.map(|found| found.flow), key);
        assert_eq!(found.map(|found| found.sender), Some(rows::POD_B));
        for len in 0..whole.len() {
            assert_eq!(read(&Bytes::plain(&whole[..len], 1), 14), None, "{len}");
        }
    }

    #[test]
    fn an_error_for_somebody_else_is_none() {
        let quoted = rows::incoming().bytes();
        assert_eq!(read(&Bytes::plain(&error(3, &quoted), 1), 14), None);
    }

    #[test]
    fn an_echo_quotes_nothing() {
        let quoted = rows::outgoing().bytes();
        for kind in [0, 8] {
            assert_eq!(read(&Bytes::plain(&error(kind, &quoted), 1), 14), None);
        }
    }
}
