//! Subnet keys: the name of a lease in every registry (contract section 5.1).

use std::{fmt, net::Ipv6Addr, str::FromStr};

use ipnet::{Ipv4Net, Ipv6Net};

/// Longest IPv4 prefix a key may carry.
const MAX_V4_LEN: u8 = 31;
/// Longest IPv6 prefix a key may carry.
const MAX_V6_LEN: u8 = 127;

/// `10.5.52.0-24`, or with a second family `10.12.13.0-24&fd00:12:13::-56`.
///
/// Both networks hold their network address (host bits zero).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubnetKey {
    /// The IPv4 pod subnet.
    pub v4: Ipv4Net,
    /// The IPv6 pod subnet of a dual-stack lease.
    pub v6: Option<Ipv6Net>,
}

/// A text that ends in no subnet key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no subnet key (expected address-length, as in 10.5.52.0-24 or 10.12.13.0-24&fd00:12:13::-56)"
)]
pub struct InvalidSubnetKey(pub String);

impl SubnetKey {
    /// The key of an IPv4-only lease; host bits are masked off.
    #[must_use]
    pub fn from_v4(subnet: Ipv4Net) -> Self {
        Self {
            v4: subnet.trunc(),
            v6: None,
        }
    }

    /// True when the IPv4 parts have an address in common.
    #[must_use]
    pub fn overlaps(&self, subnet: &Ipv4Net) -> bool {
        self.v4.contains(subnet) || subnet.contains(&self.v4)
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.v4.network(), self.v4.prefix_len())?;
        match &self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.network(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

/// Reads the tail of the text; anything may stand before it, for instance
/// `/coreos.com/network/subnets/`.
impl FromStr for SubnetKey {
    type Err = InvalidSubnetKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        dual(text)
            .or_else(|| v4_tail(text).map(Self::from_v4))
            .ok_or_else(|| InvalidSubnetKey(text.to_owned()))
    }
}

fn dual(text: &str) -> Option<SubnetKey> {
    let (before, v6) = text.rsplit_once('&')?;
    Some(SubnetKey {
        v4: v4_tail(before)?.trunc(),
        v6: Some(v6_whole(v6)?.trunc()),
    })
}

/// The network at the end of `text`: the last four of the dotted numbers.
fn v4_tail(text: &str) -> Option<Ipv4Net> {
    let (before, len) = text.rsplit_once('-')?;
    let dotted = before
        .rfind(|c: char| c != '.' && !c.is_ascii_digit())
        .map_or(before, |other| {
            before[other..].trim_start_matches(|c: char| c != '.' && !c.is_ascii_digit())
        });
    let quad = dotted
        .rmatch_indices('.')
        .nth(3)
        .map_or(dotted, |(dot, _)| &dotted[dot + 1..]);
    Ipv4Net::new(quad.parse().ok()?, length(len, MAX_V4_LEN)?).ok()
}

fn v6_whole(text: &str) -> Option<Ipv6Net> {
    let (address, len) = text.rsplit_once('-')?;
    // Only the canonical lower-case form names a lease.
    if !address
        .bytes()
        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b':'))
    {
        return None;
    }
    let address: Ipv6Addr = address.parse().ok()?;
    Ipv6Net::new(address, length(len, MAX_V6_LEN)?).ok()
}

fn length(text: &str, max: u8) -> Option<u8> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|len| *len <= max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("10.12.13.0-24", "10.12.13.0-24")]
    #[case("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0-24&fd00:12:13::-56")]
    #[case("/coreos.com/network/subnets/10.5.52.0-24", "10.5.52.0-24")]
    #[case("/a&b/10.5.52.0-24", "10.5.52.0-24")]
    #[case("/a-1/é10.5.52.0-24", "10.5.52.0-24")]
    #[case("7.10.5.52.0-24", "10.5.52.0-24")]
    #[case("10.12.13.7-24", "10.12.13.0-24")]
    #[case(
        "10.12.13.7-24&fd00:12:13:0:0:0:0:1-56",
        "10.12.13.0-24&fd00:12:13::-56"
    )]
    #[case("0.0.0.0-0", "0.0.0.0-0")]
    #[case("10.0.0.2-31", "10.0.0.2-31")]
    #[case("10.0.0.0-8&::-0", "10.0.0.0-8&::-0")]
    #[case("10.0.0.0-8&fd00::2-127", "10.0.0.0-8&fd00::2-127")]
    fn a_valid_key_has_one_canonical_text(#[case] text: &str, #[case] canonical: &str) {
        let key: SubnetKey = text.parse().expect("valid");
        assert_eq!(key.to_string(), canonical);
    }

    #[rstest]
    #[case("")]
    #[case("10")]
    #[case("10.12.13.0")]
    #[case("10.12.13-24")]
    #[case("10.12.13.300-24")]
    #[case("10.12.13.0-24hi")]
    #[case("10.12.13.0-32")]
    #[case("10.12.13.0-+4")]
    #[case("10.12.13.0-")]
    #[case("&2001::-56")]
    #[case("10.12.13.0-24&:12:13:-56")]
    #[case("10.12.13.0-24&20011::-56")]
    #[case("10.12.13.0-24&2001-56")]
    #[case("10.12.13.0-24&2001::")]
    #[case("10.12.13.0-24&2001::-56hi")]
    #[case("10.12.13.0-24&2001::-128")]
    #[case("10.12.13.0-24&FD00::-56")]
    fn anything_else_is_named_in_the_error(#[case] text: &str) {
        assert_eq!(
            text.parse::<SubnetKey>(),
            Err(InvalidSubnetKey(text.to_owned()))
        );
    }

    proptest! {
        #[test]
        fn every_key_reads_back_as_itself(
            v4: u32, len in 0..=MAX_V4_LEN, v6: Option<u128>, len6 in 0..=MAX_V6_LEN,
        ) {
            let key = SubnetKey {
                v4: Ipv4Net::new(v4.into(), len).expect("length").trunc(),
                v6: v6.map(|v6| Ipv6Net::new(v6.into(), len6).expect("length").trunc()),
            };
            // An IPv4-mapped address is written with dots, which no key has.
            prop_assume!(key.v6.is_none_or(|v6| v6.network().to_ipv4_mapped().is_none()));
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<SubnetKey>();
        }
    }
}
