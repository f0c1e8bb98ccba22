//! What an operator keeps off the fast path: `--fast-path-exclude`.

use std::{collections::BTreeSet, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;

/// One thing that is never bypassed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exclusion {
    /// Every packet with one end in this prefix; a pod by its address.
    Subnet(Ipv4Net),
    /// Every TCP or UDP packet with this port at one end.
    Port(u16),
    /// Every packet of the pod behind this interface of the host.
    Interface(String),
}

/// Why a value is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is nothing that can be excluded: expected a prefix (10.1.0.0/16), an address, port:NUMBER or interface:NAME"
)]
pub struct UnknownExclusion(String);

impl FromStr for Exclusion {
    type Err = UnknownExclusion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownExclusion(text.to_owned());
        if let Some(port) = text.strip_prefix("port:") {
            return port.parse().map(Self::Port).map_err(|_| unknown());
        }
        if let Some(name) = text.strip_prefix("interface:") {
            // IFNAMSIZ is 16, the last for the end.
            return if name.is_empty() || name.len() > 15 {
                Err(unknown())
            } else {
                Ok(Self::Interface(name.to_owned()))
            };
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Subnet(address.into()));
        }
        text.parse::<Ipv4Net>()
            .map(|net| Self::Subnet(net.trunc()))
            .map_err(|_| unknown())
    }
}

/// All of them, in the programs' terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Prefixes.
    pub subnets: BTreeSet<Ipv4Net>,
    /// Ports.
    pub ports: BTreeSet<u16>,
    /// Names of interfaces.
    pub interfaces: BTreeSet<String>,
}

impl Exclusions {
    /// Is there anything that a program has to look up?
    #[must_use]
    pub fn concern_packets(&self) -> bool {
        !self.subnets.is_empty() || !self.ports.is_empty()
    }
}

impl FromIterator<Exclusion> for Exclusions {
    fn from_iter<T: IntoIterator<Item = Exclusion>>(all: T) -> Self {
        let mut exclusions = Self::default();
        for one in all {
            match one {
                Exclusion::Subnet(subnet) => {
                    exclusions.subnets.insert(subnet);
                }
                Exclusion::Port(port) => {
                    exclusions.ports.insert(port);
                }
                Exclusion::Interface(name) => {
                    exclusions.interfaces.insert(name);
                }
            }
        }
        exclusions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read() {
        let rows = [
            (
                "10.1.2.3",
                Exclusion::Subnet("10.1.2.3/32".parse().expect("a prefix")),
            ),
            (
                "10.1.2.3/16",
                Exclusion::Subnet("10.1.0.0/16".parse().expect("a prefix")),
            ),
            ("port:53", Exclusion::Port(53)),
            ("interface:veth7", Exclusion::Interface("veth7".to_owned())),
        ];
        for (text, expected) in rows {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_named_with_what_would_be_right() {
        for text in [
            "",
            "port:",
            "port:70000",
            "interface:",
            "10.1.2.3/33",
            "web",
            "interface:longer-than-any-interface",
        ] {
            let error = text.parse::<Exclusion>().expect_err(text).to_string();
            assert!(
                error.contains(&format!("{text:?}")) && error.contains("port:NUMBER"),
                "{error}"
            );
        }
    }
}
