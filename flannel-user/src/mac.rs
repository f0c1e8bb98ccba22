//! An Ethernet address as operators and leases write it.

use std::{fmt, str::FromStr};

/// An Ethernet address, bytes in transmission order; text is lower case with colons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an Ethernet address (expected six hexadecimal bytes, as in 02:11:22:33:44:55)"
)]
pub struct InvalidMac(pub String);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| {
                    part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit())
                })
                .ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(invalid()),
        }
    }
}

impl MacAddr {
    /// A random unicast address with the locally-administered bit set, as
    /// flannel gives its tunnel device (contract section 9.1).
    #[must_use]
    pub fn random_local() -> Self {
        let mut bytes: [u8; 6] = rand::random();
        bytes[0] = (bytes[0] & 0xfe) | 0x02;
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_is_lower_case() {
        let mac: MacAddr = "C6:d2:32:6F:8f:44".parse().expect("valid");
        assert_eq!(mac.to_string(), "c6:d2:32:6f:8f:44");
    }

    #[test]
    fn anything_else_is_named_in_the_error() {
        for text in [
            "",
            "c6:d2:32:6f:8f",
            "c6:d2:32:6f:8f:44:00",
            "c6-d2-32-6f-8f-44",
            "+6:d2:32:6f:8f:44",
            "zz:d2:32:6f:8f:44",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(InvalidMac(text.to_owned())));
        }
    }

    #[test]
    fn random_addresses_are_local_unicast() {
        for _ in 0..100 {
            assert_eq!(MacAddr::random_local().0[0] & 0x03, 0x02);
        }
    }
}
