//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are taken over big-endian words and never byte-swapped.

/// Folds a 32-bit sum of 16-bit words into 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(mut sum: u32) -> u16 {
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Checksum of an IPv4 header without options whose checksum field is zero.
#[inline(always)]
#[must_use]
pub fn ipv4(header: &[u8; 20]) -> [u8; 2] {
    let mut sum = 0u32;
    let mut word = 0;
    while word < 10 {
        sum += u16::from_be_bytes([header[2 * word], header[2 * word + 1]]) as u32;
        word += 1;
    }
    (!fold(sum)).to_be_bytes()
}

/// The checksum after one 16-bit word of the summed bytes changed from `old` to `new`.
///
/// RFC 1624 equation 3, so that `0xffff` and `0x0000` come out as from a full sum.
#[inline(always)]
#[must_use]
pub fn updated(check: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    let sum = u32::from(!u16::from_be_bytes(check))
        + u32::from(!u16::from_be_bytes(old))
        + u32::from(u16::from_be_bytes(new));
    (!fold(sum)).to_be_bytes()
}

/// What replacing `old` by `new` adds to the sum behind a checksum, for [`shifted`].
#[inline(always)]
#[must_use]
pub fn difference(old: [u8; 4], new: [u8; 4]) -> u16 {
    let words = |bytes: [u8; 4]| {
        (
            u16::from_be_bytes([bytes[0], bytes[1]]),
            u16::from_be_bytes([bytes[2], bytes[3]]),
        )
    };
    let ((old_high, old_low), (new_high, new_low)) = (words(old), words(new));
    fold(u32::from(!old_high) + u32::from(!old_low) + u32::from(new_high) + u32::from(new_low))
}

/// What one hop adds to the sum of an IPv4 header: the TTL is the upper byte of its word.
pub const ONE_HOP: u16 = 0xfeff;

/// The checksum after `deltas` were added to the summed bytes.
#[inline(always)]
#[must_use]
pub fn shifted(check: [u8; 2], deltas: u32) -> [u8; 2] {
    (!fold(u32::from(!u16::from_be_bytes(check)) + deltas)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn valid(header: &[u8; 20]) -> bool {
        let sum: u32 = header
            .chunks(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        fold(sum) == 0xffff
    }

    #[test]
    fn a_known_header_has_the_known_checksum() {
        // The example of RFC 1071 discussions: 45 00 00 73 00 00 40 00 40 11 …, checksum b861.
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(ipv4(&header), [0xb8, 0x61]);
    }

    proptest! {
        #[test]
        fn a_translated_hop_equals_recomputation(mut header: [u8; 20], far: [u8; 4], ttl in 2u8..) {
            header[8] = ttl;
            header[10..12].fill(0);
            let check = ipv4(&header);
            let old = [header[16], header[17], header[18], header[19]];
            header[16..20].copy_from_slice(&far);
            header[8] -= 1;
            let new = shifted(check, u32::from(difference(old, far)) + u32::from(ONE_HOP));
            header[10..12].copy_from_slice(&new);
            prop_assert!(valid(&header));
        }

        #[test]
        fn update_equals_recomputation(mut header: [u8; 20], word in 0usize..10, new: [u8; 2]) {
            prop_assume!(word != 5);
            header[10..12].fill(0);
            let check = ipv4(&header);
            let old = [header[2 * word], header[2 * word + 1]];
            header[2 * word..2 * word + 2].copy_from_slice(&new);
            let incremental = updated(check, old, new);
            header[10..12].copy_from_slice(&incremental);
            prop_assert!(valid(&header) || header.iter().all(|byte| *byte == 0));
        }
    }
}
