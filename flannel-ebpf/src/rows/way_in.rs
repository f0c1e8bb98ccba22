//! Rows for the way in.

use super::{
    Expect, Row,
    fixture::{NODE_C, POD_A, POD_B, UPLINK_MAC, VTEP_B},
    packets::{Ip, TCP, Tunnel, UDP, delivered, ethernet, incoming, tcp, udp},
};
use crate::reason::{Direction, Reason};

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
