//! The part of a packet that flows are made of.

use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{frame::Frame, header, layout::FlowKey};

/// TCP flags of a packet that opens or ends a connection: FIN, SYN and RST.
pub const BOUNDARY: u8 = 0b111;
/// TCP flag FIN.
pub const FIN: u8 = 0b001;
/// TCP flag RST.
pub const RST: u8 = 0b100;
/// TCP flag SYN.
pub const SYN: u8 = 0b010;
/// TCP flag ACK.
pub const ACK: u8 = 0b1_0000;

/// Does the one number come after the other in sequence space (RFC 9293 section 3.4)? Both in
/// network order.
#[inline(always)]
#[must_use]
pub const fn is_later(one: [u8; 4], other: [u8; 4]) -> bool {
    u32::from_be_bytes(one)
        .wrapping_sub(u32::from_be_bytes(other))
        .cast_signed()
        > 0
}

/// How far data has come that came to `known` before (zero for nowhere), with a packet that says
/// `told`. What is sent again, or asks whether the other end lives, says less.
#[inline(always)]
#[must_use]
pub const fn furthest(known: [u8; 4], told: [u8; 4]) -> [u8; 4] {
    if u32::from_ne_bytes(known) == 0 || is_later(told, known) {
        told
    } else {
        known
    }
}

/// A TCP or UDP packet over IPv4, neither a fragment nor with IP options.
///
/// Order and alignment matter: the compiler may move neighbouring fields as one word, and the
/// verifier refuses such a word on the stack where it is not aligned.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Packet {
    /// Its flow.
    pub key: FlowKey,
    /// IP total length in bytes.
    pub len: u16,
    /// IP identification.
    pub id: [u8; 2],
    /// IP header checksum.
    pub check: [u8; 2],
    /// TOS byte.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// TCP flags, 0 for UDP.
    pub tcp_flags: u8,
    /// Length of the TCP or UDP header in bytes.
    pub header_len: u8,
    /// Always zero.
    pub _pad: [u8; 2],
    /// TCP sequence number; zero for UDP.
    pub seq: [u8; 4],
}

impl Packet {
    /// Reads the packet whose IP header is at `offset`; `None` where it is of another kind.
    #[inline(always)]
    pub fn read<F: Frame>(frame: &F, offset: usize) -> Option<Self> {
        let ip = frame.at::<Ipv4Hdr>(offset)?;
        if ip.vihl != 0x45 || header::is_fragment(ip) {
            return None;
        }
        let behind = offset + Ipv4Hdr::LEN;
        let (sport, dport, seq, tcp_flags, header_len) = match ip.proto {
            header::TCP => {
                let tcp = frame.at::<TcpHdr>(behind)?;
                (
                    tcp.source,
                    tcp.dest,
                    tcp.seq,
                    header::tcp_flags(tcp),
                    header::tcp_len(tcp) as u8,
                )
            }
            header::UDP => {
                let udp = frame.at::<UdpHdr>(behind)?;
                (udp.src, udp.dst, [0; 4], 0, UdpHdr::LEN as u8)
            }
            _ => return None,
        };
        Some(Self {
            key: FlowKey {
                src: ip.src_addr,
                dst: ip.dst_addr,
                sport,
                dport,
                protocol: ip.proto,
                _pad: 0,
                _end: 0,
            },
            len: ip.tot_len(),
            tos: ip.tos,
            ttl: ip.ttl,
            check: ip.check,
            id: ip.id,
            tcp_flags,
            header_len,
            _pad: [0; 2],
            seq,
        })
    }

    /// Where its data ends in TCP's sequence space, network order: there the next packet of its
    /// sender begins.
    #[inline(always)]
    #[must_use]
    pub const fn end(&self) -> [u8; 4] {
        let headers = <Ipv4Hdr as crate::header::Header>::LEN as u32 + self.header_len as u32;
        u32::from_be_bytes(self.seq)
            .wrapping_add(self.len as u32)
            .wrapping_sub(headers)
            .to_be_bytes()
    }

    /// Does it open or end a connection? Conntrack must see those.
    #[inline(always)]
    #[must_use]
    pub const fn is_boundary(&self) -> bool {
        self.tcp_flags & BOUNDARY != 0
    }

    /// Is it a SYN or the answer to one?
    #[inline(always)]
    #[must_use]
    pub const fn is_handshake(&self) -> bool {
        self.tcp_flags & (SYN | FIN | RST) == SYN
    }

    /// Length in bytes of the longest IP packet that this one becomes on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn segment_len(&self, gso_size: u32) -> u32 {
        if gso_size == 0 {
            self.len as u32
        } else {
            <Ipv4Hdr as crate::header::Header>::LEN as u32 + self.header_len as u32 + gso_size
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_ends_behind_all_headers_and_round_the_circle() {
        let mut packet = Packet {
            key: FlowKey::default(),
            len: 20 + 32 + 100,
            id: [0; 2],
            check: [0; 2],
            tos: 0,
            ttl: 64,
            tcp_flags: ACK,
            header_len: 32,
            _pad: [0; 2],
            seq: 1000u32.to_be_bytes(),
        };
        assert_eq!(packet.end(), 1100u32.to_be_bytes());
        packet.seq = (u32::MAX - 9).to_be_bytes();
        assert_eq!(packet.end(), 90u32.to_be_bytes());
        assert!(is_later(packet.end(), packet.seq));
        assert!(!is_later(packet.seq, packet.seq));
    }

    #[test]
    fn what_is_sent_again_goes_no_further() {
        for (known, told, reached) in [
            (0, 4_000_000_000, 4_000_000_000),
            (500, 600, 600),
            (500, 499, 500),
            (u32::MAX, 10, 10),
        ] {
            let reached: u32 = reached;
            assert_eq!(
                furthest(u32::to_be_bytes(known), u32::to_be_bytes(told)),
                reached.to_be_bytes()
            );
        }
    }
}
