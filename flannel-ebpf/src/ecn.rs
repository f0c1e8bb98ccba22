//! Explicit congestion notification across the tunnel (RFC 6040, as Linux does it).
//!
//! A codepoint is the low two bits of the TOS byte.

/// Not ECN-capable.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable, codepoint 1.
pub const ECT_1: u8 = 0b01;
/// ECN-capable, codepoint 0.
pub const ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

const MASK: u8 = 0b11;

/// The outer TOS for an inner one: DSCP 0, the codepoint copied, except that
/// "congestion experienced" starts anew as ECT(0) (`INET_ECN_encapsulate`).
#[inline(always)]
#[must_use]
pub const fn outer_tos(inner_tos: u8) -> u8 {
    match inner_tos & MASK {
        CE => ECT_0,
        codepoint => codepoint,
    }
}

/// The inner TOS after the outer header is taken off; `None` where the packet
/// must be dropped (congestion outside, not ECN-capable inside).
#[inline(always)]
#[must_use]
pub const fn inner_tos(outer_tos: u8, inner_tos: u8) -> Option<u8> {
    match (outer_tos & MASK, inner_tos & MASK) {
        (CE, NOT_ECT) => None,
        (CE, _) => Some(inner_tos | CE),
        // INET_ECN_set_ect1
        (ECT_1, ECT_0) => Some((inner_tos & !MASK) | ECT_1),
        _ => Some(inner_tos),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encapsulation_copies_the_codepoint_and_restarts_ce() {
        for (inner, outer) in [(0xb8, 0), (0xb9, ECT_1), (0xba, ECT_0), (0xbb, ECT_0)] {
            assert_eq!(outer_tos(inner), outer, "inner {inner:#04x}");
        }
    }

    #[test]
    fn decapsulation_follows_the_table_of_rfc_6040() {
        // rows: inner; columns: outer Not-ECT, ECT(1), ECT(0), CE
        let table = [
            (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None]),
            (ECT_1, [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)]),
            (ECT_0, [Some(ECT_0), Some(ECT_1), Some(ECT_0), Some(CE)]),
            (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
        ];
        for (inner, row) in table {
            for (outer, expected) in [NOT_ECT, ECT_1, ECT_0, CE].into_iter().zip(row) {
                let dscp = 0xb8;
                assert_eq!(
                    inner_tos(outer, dscp | inner),
                    expected.map(|codepoint| dscp | codepoint),
                    "outer {outer} inner {inner}"
                );
            }
        }
    }
}
