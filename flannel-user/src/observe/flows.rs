//! The flows document: what `flannelctl flows -o json` prints.

use std::{
    cmp::Reverse,
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
};

use serde::{Deserialize, Serialize};

use super::classes::ClassRow;

/// Which flows are asked for; what is not given does not matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Flows of the local pod with this address.
    pub pod: Option<Ipv4Addr>,
    /// Flows with this address at the far end, as the pod or as the wire sees it, or with pods of
    /// the node that has it.
    pub peer: Option<Ipv4Addr>,
    /// Flows with this port at either end.
    pub port: Option<u16>,
    /// At most so many, those with most packets first.
    pub limit: Option<usize>,
}

impl Filter {
    /// Is this flow asked for?
    #[must_use]
    pub fn takes(&self, ends: &Ends) -> bool {
        let Ends {
            pod, peer, wire, ..
        } = ends;
        self.pod.is_none_or(|wanted| wanted == *pod.ip())
            && self
                .peer
                .is_none_or(|wanted| [*peer.ip(), *wire.ip(), ends.node].contains(&wanted))
            && self
                .port
                .is_none_or(|wanted| [pod, peer, wire].iter().any(|end| end.port() == wanted))
    }

    /// The flows that are shown of those that are asked for.
    #[must_use]
    pub fn shown(&self, mut flows: Vec<Flow>) -> Vec<Flow> {
        flows.sort_by_key(|flow| (Reverse(flow.packets()), flow.ends));
        flows.truncate(self.limit.unwrap_or(usize::MAX));
        flows
    }
}

/// Everything that was learned, or what was asked for of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flows {
    /// Table of what pods send.
    pub table_out: Table,
    /// Table of what pods receive.
    pub table_in: Table,
    /// Nothing bypasses the stack at present, for this reason.
    pub held: Option<String>,
    /// TCP does not, for this reason.
    pub tcp_held: Option<String>,
    /// Flows that were asked for.
    pub matching: usize,
    /// Of these, those with most packets.
    pub flows: Vec<Flow>,
    /// Classes of connections that were asked for, those that opened most first.
    #[serde(default)]
    pub classes: Vec<ClassRow>,
    /// No class opens a connection at present, for this reason.
    #[serde(default)]
    pub classes_off: Option<String>,
}

/// How full a flow table is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Entries.
    pub flows: u64,
    /// Entries that it can hold.
    pub capacity: u64,
    /// A new flow displaces the one that was used least recently: `--fast-path-flows` is too low
    /// for what goes on here.
    pub full: bool,
}

/// The ends of a flow and how they are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ends {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The local pod.
    pub pod: SocketAddrV4,
    /// The far end as the pod sees it: of a Service its address.
    pub peer: SocketAddrV4,
    /// The far end as it is in the tunnel: of a Service the pod behind it.
    pub wire: SocketAddrV4,
    /// Public address of the node that has it.
    pub node: Ipv4Addr,
}

impl Ends {
    /// Does the stack translate the far end?
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.peer != self.wire
    }
}

/// What can be learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A connection, or one direction of it where only that was learned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// Between whom.
    #[serde(flatten)]
    pub ends: Ends,
    /// What the pod sends; `None`: not learned.
    #[serde(rename = "out")]
    pub sent: Option<Direction>,
    /// What it receives.
    #[serde(rename = "in")]
    pub received: Option<Direction>,
}

impl Flow {
    /// Packets that bypassed the stack, both directions.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.directions().map(|direction| direction.packets).sum()
    }

    /// The directions that were learned.
    pub fn directions(&self) -> impl Iterator<Item = &Direction> {
        self.sent.iter().chain(&self.received)
    }
}

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// The way of its next packet.
    pub path: Path,
    /// Why it is the kernel's.
    pub reason: Option<Why>,
    /// Packets that bypassed the stack; a segmentation-offload packet is one.
    pub packets: u64,
    /// Seconds since the verdict was made.
    pub age_seconds: f64,
    /// Seconds since the stack last confirmed it.
    pub confirmed_seconds: f64,
}

/// The two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// Past the stack.
    Fast,
    /// Through the stack.
    Kernel,
}

/// Why a packet of a learned flow would take the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Nothing bypasses at present.
    Held,
    /// TCP does not at present.
    Conntrack,
    /// The pod's address is another pod's now, or its veth changed.
    PodChanged,
    /// The same of the peer.
    PeerChanged,
    /// Rules, routes or policies changed and no packet has shown since what holds now.
    OtherGeneration,
    /// No packet within the validity.
    Stale,
}

impl Why {
    /// The word of tables.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Conntrack => "conntrack",
            Self::PodChanged => "pod-changed",
            Self::PeerChanged => "peer-changed",
            Self::OtherGeneration => "other-generation",
            Self::Stale => "stale",
        }
    }

    /// In a sentence.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Held => "nothing bypasses the stack at present",
            Self::Conntrack => "TCP stays with the stack at present",
            Self::PodChanged => {
                "the local pod or its veth changed; its next packets show the way anew"
            }
            Self::PeerChanged => "the peer changed; the next packets show the way anew",
            Self::OtherGeneration => {
                "rules, routes or policies changed since; the next packet through the stack confirms it or ends it"
            }
            Self::Stale => {
                "not confirmed within the validity, mostly because it is idle; the next packet confirms it"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> SocketAddrV4 {
        text.parse().expect("address and port")
    }

    fn ends() -> Ends {
        Ends {
            protocol: Protocol::Tcp,
            pod: end("10.1.1.2:40000"),
            peer: end("10.96.0.10:80"),
            wire: end("10.1.2.2:8080"),
            node: [192, 0, 2, 2].into(),
        }
    }

    fn with(packets: u64, port: u16) -> Flow {
        let mut ends = ends();
        ends.pod.set_port(port);
        let direction = Direction {
            path: Path::Fast,
            reason: None,
            packets,
            age_seconds: 1.0,
            confirmed_seconds: 0.5,
        };
        Flow {
            ends,
            sent: Some(direction),
            received: Some(direction),
        }
    }

    #[test]
    fn each_filter_takes_every_name_of_an_end() {
        let pod = |text: &str| Filter {
            pod: Some(text.parse().expect("address")),
            ..Filter::default()
        };
        let peer = |text: &str| Filter {
            peer: Some(text.parse().expect("address")),
            ..Filter::default()
        };
        let port = |port| Filter {
            port: Some(port),
            ..Filter::default()
        };
        let cases = [
            (Filter::default(), true),
            (pod("10.1.1.2"), true),
            (pod("10.1.2.2"), false),
            (peer("10.96.0.10"), true),
            (peer("10.1.2.2"), true),
            (peer("192.0.2.2"), true),
            (peer("10.1.1.2"), false),
            (port(40000), true),
            (port(80), true),
            (port(8080), true),
            (port(81), false),
        ];
        for (filter, expected) in cases {
            assert_eq!(filter.takes(&ends()), expected, "{filter:?}");
        }
        let both = Filter {
            port: Some(81),
            ..pod("10.1.1.2")
        };
        assert!(!both.takes(&ends()), "all that is given has to hold");
    }

    #[test]
    fn the_busiest_come_first_and_the_rest_is_cut_off() {
        let filter = Filter {
            limit: Some(2),
            ..Filter::default()
        };
        let shown = filter.shown(vec![with(1, 1), with(7, 2), with(7, 1)]);
        assert_eq!(shown, [with(7, 1), with(7, 2)]);
        assert_eq!(shown[0].packets(), 14);
        assert_eq!(Filter::default().shown(vec![with(1, 1)]).len(), 1);
    }

    #[test]
    fn the_document_names_directions_as_the_status_does() {
        let flow = Flow {
            received: None,
            ..with(3, 9)
        };
        let value = serde_json::to_value(flow).expect("JSON");
        assert_eq!(value["out"]["path"], "fast");
        assert_eq!(value["in"], serde_json::Value::Null);
        assert_eq!(value["pod"], "10.1.1.2:9");
        assert_eq!(value["wire"], "10.1.2.2:8080");
        assert_eq!(
            serde_json::from_value::<Flow>(value).expect("the same"),
            flow
        );
    }
}
