//! One connection as conntrack holds it, and its form in netlink messages. Pure.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Status, TCPFlags,
    Tuple as TuplePart,
};

/// Identity that the kernel gives an entry; the crate has no name for it.
const CTA_ID: u16 = 12;

/// Bits of [`Entry::status`].
pub mod status {
    /// Packets went both ways.
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// Worth keeping when the table is full.
    pub const ASSURED: u32 = 1 << 2;
    /// In the table; a change must name it.
    pub const CONFIRMED: u32 = 1 << 3;
    /// The source is translated.
    pub const SRC_NAT: u32 = 1 << 4;
    /// The destination is translated.
    pub const DST_NAT: u32 = 1 << 5;
}

/// Bits of [`TcpFlags`].
pub mod tcp_flags {
    /// Both ends may acknowledge selectively.
    pub const SACK_PERM: u8 = 0x02;
    /// Packets out of the window are let through.
    pub const BE_LIBERAL: u8 = 0x08;
}

/// The two ends of a TCP connection over IPv4, in the direction of one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Who sends.
    pub source: SocketAddrV4,
    /// Who receives.
    pub destination: SocketAddrV4,
}

impl Tuple {
    /// The same ends in the other direction.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
        }
    }

    fn attributes(self) -> Vec<TuplePart> {
        vec![
            TuplePart::Ip(vec![
                IPTuple::SourceAddress(IpAddr::V4(*self.source.ip())),
                IPTuple::DestinationAddress(IpAddr::V4(*self.destination.ip())),
            ]),
            TuplePart::Proto(vec![
                ProtoTuple::Protocol(Protocol::Tcp),
                ProtoTuple::SourcePort(self.source.port()),
                ProtoTuple::DestinationPort(self.destination.port()),
            ]),
        ]
    }

    /// `None` if it is not TCP over IPv4.
    fn read(parts: &[TuplePart]) -> Option<Self> {
        let mut addresses = [None::<Ipv4Addr>; 2];
        let mut ports = [None::<u16>; 2];
        let mut is_tcp = false;
        for part in parts {
            match part {
                TuplePart::Ip(ends) => {
                    for end in ends {
                        match end {
                            IPTuple::SourceAddress(IpAddr::V4(address)) => {
                                addresses[0] = Some(*address);
                            }
                            IPTuple::DestinationAddress(IpAddr::V4(address)) => {
                                addresses[1] = Some(*address);
                            }
                            _ => {}
                        }
                    }
                }
                TuplePart::Proto(fields) => {
                    for field in fields {
                        match field {
                            ProtoTuple::Protocol(protocol) => is_tcp = *protocol == Protocol::Tcp,
                            ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                            ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        is_tcp.then_some(())?;
        Some(Self {
            source: SocketAddrV4::new(addresses[0]?, ports[0]?),
            destination: SocketAddrV4::new(addresses[1]?, ports[1]?),
        })
    }
}

/// Conntrack's state of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
#[allow(missing_docs, reason = "named as in conntrack's listing")]
pub enum TcpState {
    #[default]
    None = 0,
    SynSent = 1,
    SynRecv = 2,
    Established = 3,
    FinWait = 4,
    CloseWait = 5,
    LastAck = 6,
    TimeWait = 7,
    Close = 8,
    SynSent2 = 9,
}

impl TcpState {
    /// Has the connection been answered, and has not come to its end?
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(
            self,
            Self::SynRecv | Self::Established | Self::FinWait | Self::CloseWait | Self::LastAck
        )
    }

    fn from_number(number: u8) -> Self {
        [
            Self::SynSent,
            Self::SynRecv,
            Self::Established,
            Self::FinWait,
            Self::CloseWait,
            Self::LastAck,
            Self::TimeWait,
            Self::Close,
            Self::SynSent2,
        ]
        .into_iter()
        .find(|state| *state as u8 == number)
        .unwrap_or_default()
    }
}

/// What conntrack notes about one direction of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpFlags {
    /// The values.
    pub flags: u8,
    /// Which of them to set; 0 in what was read.
    pub mask: u8,
}

/// A TCP connection over IPv4 in conntrack's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As the client sent the first packet.
    pub original: Tuple,
    /// As the answer comes: `original` reversed where nothing is translated.
    pub reply: Tuple,
    /// See [`status`].
    pub status: u32,
    /// Seconds until the entry ends if no packet comes.
    pub timeout: u32,
    /// How far the connection is.
    pub state: TcpState,
    /// Of the client's direction.
    pub flags_original: TcpFlags,
    /// Of the server's direction.
    pub flags_reply: TcpFlags,
    /// The kernel's identity of an entry that was read: another connection with the same tuple has
    /// another one. Not written.
    pub id: Option<u32>,
}

impl Entry {
    /// A connection past its handshake that conntrack has never seen, as it would have been. The
    /// flags stand for what its handshake would have told: without them, the unknown window scale
    /// ends a stream.
    #[must_use]
    pub fn established(original: Tuple, timeout: u32) -> Self {
        Self {
            status: status::SEEN_REPLY | status::ASSURED | status::CONFIRMED,
            state: TcpState::Established,
            ..Self::half_open(original, timeout)
        }
    }

    /// A connection whose SYN was answered and whose client has not acknowledged yet.
    #[must_use]
    pub fn half_open(original: Tuple, timeout: u32) -> Self {
        let flags = tcp_flags::BE_LIBERAL | tcp_flags::SACK_PERM;
        let both = TcpFlags { flags, mask: flags };
        Self {
            original,
            reply: original.reversed(),
            status: status::SEEN_REPLY | status::CONFIRMED,
            timeout,
            state: TcpState::SynRecv,
            flags_original: both,
            flags_reply: both,
            id: None,
        }
    }

    /// Is an address or a port translated?
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.reply != self.original.reversed()
    }

    pub(super) fn attributes(&self) -> Vec<ConntrackAttribute> {
        vec![
            ConntrackAttribute::CtaTupleOrig(self.original.attributes()),
            ConntrackAttribute::CtaTupleReply(self.reply.attributes()),
            ConntrackAttribute::CtaStatus(Status::from_bits_retain(self.status)),
            ConntrackAttribute::CtaTimeout(self.timeout),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![
                ProtoInfoTCP::State(self.state as u8),
                ProtoInfoTCP::OriginalFlags(written(self.flags_original)),
                ProtoInfoTCP::ReplyFlags(written(self.flags_reply)),
            ])]),
        ]
    }

    /// `None` if it is not TCP over IPv4.
    pub(super) fn read(attributes: &[ConntrackAttribute]) -> Option<Self> {
        let mut original = None;
        let mut reply = None;
        let mut entry = Self {
            status: 0,
            flags_original: TcpFlags::default(),
            flags_reply: TcpFlags::default(),
            state: TcpState::None,
            ..Self::half_open(NOWHERE, 0)
        };
        for attribute in attributes {
            match attribute {
                ConntrackAttribute::CtaTupleOrig(parts) => original = Tuple::read(parts),
                ConntrackAttribute::CtaTupleReply(parts) => reply = Tuple::read(parts),
                ConntrackAttribute::CtaStatus(status) => entry.status = status.bits(),
                ConntrackAttribute::CtaTimeout(seconds) => entry.timeout = *seconds,
                ConntrackAttribute::CtaProtoInfo(protocols) => {
                    for protocol in protocols {
                        if let ProtoInfo::TCP(facts) = protocol {
                            entry.read_tcp(facts);
                        }
                    }
                }
                ConntrackAttribute::Other(other) if other.kind() == CTA_ID => {
                    entry.id = number(other);
                }
                _ => {}
            }
        }
        entry.original = original?;
        entry.reply = reply?;
        Some(entry)
    }

    fn read_tcp(&mut self, facts: &[ProtoInfoTCP]) {
        for fact in facts {
            match fact {
                ProtoInfoTCP::State(state) => self.state = TcpState::from_number(*state),
                ProtoInfoTCP::OriginalFlags(flags) => self.flags_original = read(flags),
                ProtoInfoTCP::ReplyFlags(flags) => self.flags_reply = read(flags),
                _ => {}
            }
        }
    }
}

const NOWHERE: Tuple = Tuple {
    source: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
    destination: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
};

/// What names a connection in a question or a deletion.
pub(super) fn key(original: Tuple) -> Vec<ConntrackAttribute> {
    vec![ConntrackAttribute::CtaTupleOrig(original.attributes())]
}

fn written(flags: TcpFlags) -> TCPFlags {
    TCPFlags::parse(&[flags.flags, flags.mask]).expect("two bytes are what it is made of")
}

fn read(flags: &TCPFlags) -> TcpFlags {
    TcpFlags {
        flags: flags.flags,
        mask: flags.mask,
    }
}

fn number(attribute: &DefaultNla) -> Option<u32> {
    let mut bytes = [0; 4];
    (attribute.value_len() == bytes.len()).then(|| {
        attribute.emit_value(&mut bytes);
        u32::from_be_bytes(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple() -> Tuple {
        Tuple {
            source: "10.244.1.2:40000".parse().expect("an end"),
            destination: "10.244.2.3:80".parse().expect("an end"),
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut translated = Entry::half_open(tuple(), 60);
        translated.reply.source = "10.244.9.9:8080".parse().expect("an end");
        for entry in [Entry::established(tuple(), 432_000), translated] {
            assert_eq!(Entry::read(&entry.attributes()), Some(entry));
        }
    }

    #[test]
    fn only_what_differs_is_translated() {
        let mut entry = Entry::established(tuple(), 1);
        assert!(!entry.is_translated());
        entry.reply.source.set_port(8080);
        assert!(entry.is_translated());
    }

    #[test]
    fn other_protocols_are_no_entries() {
        let mut attributes = Entry::established(tuple(), 1).attributes();
        attributes[0] =
            ConntrackAttribute::CtaTupleOrig(vec![TuplePart::Proto(vec![ProtoTuple::Protocol(
                Protocol::Udp,
            )])]);
        assert_eq!(Entry::read(&attributes), None);
    }
}
