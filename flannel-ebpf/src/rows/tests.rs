use super::{
    packets::{from_pod, tcp},
    *,
};
use crate::{decap, encap, header::Header as _, layout::DROP_FORGED, outer::Outer};

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
        checksum(&frame[14..34]),
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

#[test]
fn errors_are_carried_as_errors_and_as_nothing_else() {
    let fixture = Fixture::default();
    let mut seen = [0; 2];
    for row in way_out() {
        let as_error = encap::encapsulate_error(&row.frame(), &fixture, &fixture.node);
        match (&row.expect, as_error) {
            // ICMP, which nothing else speaks against.
            (Expect::Stays(Reason::OutProtocol), Ok(_)) => seen[0] += 1,
            (_, Ok(way)) => panic!("{}: {way:?}", row.what),
            (Expect::Becomes(_), Err(reason)) => assert_eq!(reason, Reason::OutProtocol),
            _ => {}
        }
    }
    for row in way_in() {
        let as_error = decap::deliver_error(&row.frame(), &fixture, &fixture.node);
        match (&row.expect, as_error) {
            (Expect::Stays(Reason::InProtocol), Ok(_)) => seen[1] += 1,
            (_, Ok(way)) => panic!("{}: {way:?}", row.what),
            (Expect::Becomes(_), Err(reason)) => assert_eq!(reason, Reason::InProtocol),
            _ => {}
        }
    }
    assert!(seen.iter().all(|seen| *seen > 0), "{seen:?}");
}

#[test]
fn what_the_kernel_made_whole_is_delivered_as_what_came_in_one_piece() {
    let fixture = Fixture::default();
    let mut seen = 0;
    for row in way_in() {
        // As the tunnel device has it: without the outer headers.
        let Some(inner) = row.given.get(50..) else {
            continue;
        };
        let one = decap::deliver(&row.frame(), &fixture, &fixture.node);
        let whole = decap::deliver_whole(&Bytes::plain(inner, IFINDEX), &fixture);
        if let (Ok(one), Ok(whole)) = (one, whole)
            && one.tos.0 == one.tos.1
        {
            assert_eq!(whole.pod, one.pod, "{}", row.what);
            assert_eq!(whole.next_hop(), one.next_hop(), "{}", row.what);
            seen += 1;
        }
        for len in 0..inner.len().min(54) {
            let cut = Bytes::plain(&inner[..len], IFINDEX);
            assert!(decap::deliver_whole(&cut, &fixture).is_err());
        }
    }
    assert!(seen > 0);
}

#[test]
fn pieces_are_fragments_of_peers_for_us() {
    let fixture = Fixture::default();
    let good = way_in();
    let good = good
        .iter()
        .find(|row| matches!(row.expect, Expect::Becomes(_)))
        .expect("something is delivered");
    let piece = |change: fn(&mut Vec<u8>)| {
        let mut frame = good.given.clone();
        // More fragments follow.
        frame[20] |= 0x20;
        change(&mut frame);
        decap::is_piece(&Bytes::plain(&frame, IFINDEX), &fixture, &fixture.node)
    };
    assert!(piece(|_| {}));
    assert!(piece(|frame| frame.truncate(34)), "the last may be short");
    assert!(!piece(|frame| frame[20] = 0), "no fragment");
    assert!(!piece(|frame| frame[23] = 6), "not UDP");
    assert!(!piece(|frame| frame[29] ^= 0x40), "from nobody we know");
    assert!(!piece(|frame| frame[33] ^= 0x40), "for somebody else");
    assert!(!piece(|frame| frame.truncate(33)));
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
