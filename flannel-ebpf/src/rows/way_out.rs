//! Rows for the way out.

use super::{
    Expect, Row,
    fixture::{GATEWAY_MAC, POD_A, POD_A2, POD_B, POD_C, POD_MAC},
    packets::{Ip, UDP, encapsulated, ethernet, from_pod, outgoing, tcp, udp},
};
use crate::reason::{Direction, Reason};

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
