//! Which fields of a packet and of its connection a class holds, by nftables' numbers. Pure.

use super::{
    held::Part,
    xt::{Meaning, SOURCE_PORT},
};

/// Something of a packet that a class does not hold.
pub(super) fn varies(what: &str) -> Meaning {
    Meaning::Depends(Part::Varies, what.to_owned())
}

/// What `meta` tells.
pub(super) fn of_meta(key: u32) -> Meaning {
    match key {
        0 => varies("length"),
        2 => varies("priority"),
        20 => varies("processor"),
        24 => Meaning::Depends(Part::Counts, "random number".to_owned()),
        30..=32 => varies("time"),
        // Protocols, marks, interfaces, sockets (which forwarded packets lack), realm, type.
        1 | 3..=12 | 13 | 15..=19 | 21..=23 | 25..=29 | 33 | 34 => Meaning::Held,
        key => varies(&format!("meta key {key}")),
    }
}

/// What `ct` tells, of one direction if one is named.
pub(super) fn of_ct(key: u32, direction: Option<u8>) -> Meaning {
    const ORIGINAL: u8 = 0;
    match (key, direction) {
        // State, direction, status, mark, helper (who sets one is found by itself), protocols,
        // addresses, labels, zone.
        (0..=3 | 6..=10 | 13 | 17 | 19 | 20, _) => Meaning::Held,
        (11, Some(ORIGINAL) | None) | (12, Some(1..)) => varies(SOURCE_PORT),
        (11 | 12, _) => Meaning::Held,
        (14..=16, _) => Meaning::Depends(Part::Counts, "connbytes".to_owned()),
        (5, _) => varies("age of the connection"),
        (key, _) => varies(&format!("ct key {key}")),
    }
}

/// The byte of an IP header that a class does not hold.
pub(super) fn unheld_of_ip(byte: u32) -> Option<&'static str> {
    match byte {
        // Version and length, TOS, protocol, addresses.
        0 | 1 | 9 | 12..=19 => None,
        2 | 3 => Some("length"),
        4 | 5 => Some("identification"),
        6 | 7 => Some("fragment"),
        8 => Some("TTL"),
        10 | 11 => Some("checksum"),
        _ => Some("IP option"),
    }
}

/// The same of a TCP header.
pub(super) fn unheld_of_tcp(byte: u32) -> Option<&'static str> {
    match byte {
        0 | 1 => Some(SOURCE_PORT),
        // The service's port; what kind of packet it is.
        2 | 3 | 13 => None,
        _ => Some("field of the TCP header"),
    }
}
