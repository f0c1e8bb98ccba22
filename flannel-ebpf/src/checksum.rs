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
