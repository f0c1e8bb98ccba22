//! The outer UDP source port: one flow, one port.

/// Where in the source port range a flow with this hash lands, network order.
///
/// As the kernel's `udp_flow_src_port`: the upper half is mixed in because
/// switches may use only the lower, then the range is scaled.
#[inline(always)]
#[must_use]
pub const fn source_port(hash: u32, min: u16, span: u16) -> [u8; 2] {
    let mixed = hash ^ (hash << 16);
    let offset = ((mixed as u64 * span as u64) >> 32) as u16;
    min.wrapping_add(offset).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn follows_the_kernel_formula() {
        // (hash ^ hash << 16) * (60999 - 32768) >> 32, plus 32768
        assert_eq!(source_port(0, 32768, 28231), 32768u16.to_be_bytes());
        assert_eq!(
            source_port(0x1234_5678, 32768, 28231),
            (32768u16 + 7531).to_be_bytes()
        );
    }

    proptest! {
        #[test]
        fn stays_in_range(hash: u32, min in 1024u16..60000, span in 1u16..5000) {
            let port = u16::from_be_bytes(source_port(hash, min, span));
            prop_assert!(port >= min && port < min + span);
        }
    }
}
