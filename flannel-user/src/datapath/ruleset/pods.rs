//! Can a condition hold for TCP from one pod to another?

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Addresses of all pods of the cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pods(pub(super) Ipv4Net);

impl Pods {
    /// Is some pod's address, masked, this value?
    pub(super) fn some_is(self, value: u32, mask: u32) -> bool {
        let common = mask & u32::from(self.0.netmask());
        value & !mask == 0 && value & common == u32::from(self.0.network()) & common
    }

    /// Is every pod's address, masked, this value?
    pub(super) fn each_is(self, value: u32, mask: u32) -> bool {
        mask & !u32::from(self.0.netmask()) == 0 && self.some_is(value, mask)
    }

    /// Does some pod's address lie between these two?
    pub(super) fn some_between(self, from: u32, to: u32) -> bool {
        from <= u32::from(self.0.broadcast()) && to >= u32::from(self.0.network())
    }

    /// Does every pod's address lie between these two?
    pub(super) fn each_between(self, from: u32, to: u32) -> bool {
        from <= u32::from(self.0.network()) && to >= u32::from(self.0.broadcast())
    }

    /// Can `address/mask`, perhaps negated, hold? What cannot be read can.
    pub(super) fn may_match(self, text: &str, negated: bool) -> bool {
        let (address, mask) = text.split_once('/').unwrap_or((text, "32"));
        let mask = match mask.parse::<u32>() {
            Ok(0) => Some(0),
            Ok(bits @ 1..=32) => Some(u32::MAX << (32 - bits)),
            _ => mask.parse::<Ipv4Addr>().ok().map(u32::from),
        };
        let (Ok(address), Some(mask)) = (address.parse::<Ipv4Addr>(), mask) else {
            return true;
        };
        let value = u32::from(address) & mask;
        if negated {
            !self.each_is(value, mask)
        } else {
            self.some_is(value, mask)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_compared_with_all_pods() {
        let pods = Pods("10.244.0.0/16".parse().expect("a network"));
        for (text, negated, expected) in [
            ("10.244.1.2/32", false, true),
            ("10.244.1.2", false, true),
            ("10.244.1.2/32", true, true),
            ("10.96.0.1/32", false, false),
            ("10.96.0.1/32", true, true),
            ("10.0.0.0/8", false, true),
            ("10.0.0.0/8", true, false),
            ("10.244.0.0/16", true, false),
            ("10.244.0.0/255.255.0.0", false, true),
            ("10.96.0.0/255.255.0.0", false, false),
            ("0.0.0.0/0", true, false),
            ("0.0.0.7/0.0.0.255", false, true),
            ("0.0.0.7/0.0.0.255", true, true),
            ("nonsense", false, true),
        ] {
            assert_eq!(pods.may_match(text, negated), expected, "{text} {negated}");
        }
    }

    #[test]
    fn ranges_are_compared_with_all_pods() {
        let pods = Pods("10.244.0.0/16".parse().expect("a network"));
        let at = |text: &str| u32::from(text.parse::<Ipv4Addr>().expect("an address"));
        assert!(pods.some_between(at("10.244.255.255"), at("10.245.0.9")));
        assert!(!pods.some_between(at("10.245.0.0"), at("10.245.0.9")));
        assert!(pods.each_between(at("10.0.0.0"), at("10.255.0.0")));
        assert!(!pods.each_between(at("10.244.0.1"), at("10.255.0.0")));
    }
}
