//! Matches and targets of iptables-nft as the kernel stores them. Pure.
//!
//! Structures are those of `linux/netfilter/xt_*.h`, numbers in host byte order.

use super::{
    held::{self, Part},
    ipset::Sets,
};

/// What a part of a rule means for TCP between pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing that a class does not hold.
    Held,
    /// Such packets get no further in this rule.
    Excluded,
    /// Something a class does not hold.
    Depends(Part, String),
}

impl Meaning {
    fn varies(what: impl Into<String>) -> Self {
        Self::Depends(Part::Varies, what.into())
    }

    /// By name alone.
    pub(super) fn of(part: Part, what: impl FnOnce() -> String) -> Self {
        match part {
            Part::Held => Self::Held,
            part => Self::Depends(part, what()),
        }
    }
}

/// The client's port, which a class does not hold.
pub(super) const SOURCE_PORT: &str = "source port";
/// The same, where the rule leaves it to an ipset.
pub(super) const SOURCE_PORT_IN_IPSET: &str = "source port in an ipset";
/// The only address type of a pod, as a route has it and as a bit of `addrtype`.
pub(super) const UNICAST: u16 = 1;

fn half(info: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*info.get(offset..)?.first_chunk()?))
}

fn byte(info: &[u8], offset: usize) -> Option<u8> {
    info.get(offset).copied()
}

/// A match.
pub(super) fn of_match(name: &str, info: &[u8], sets: &Sets) -> Meaning {
    let looked_into = match name {
        "tcp" => tcp(info),
        "multiport" => multiport(info),
        "conntrack" => conntrack(info),
        "addrtype" => addrtype(info),
        "set" => set(info, sets),
        _ => Some(Meaning::of(held::of_match(name), || name.to_owned())),
    };
    looked_into.unwrap_or_else(|| Meaning::varies(format!("{name} of unknown form")))
}

fn tcp(info: &[u8]) -> Option<Meaning> {
    let (from, to) = (half(info, 0)?, half(info, 2)?);
    if (from, to) != (0, u16::MAX) {
        return Some(Meaning::varies(SOURCE_PORT));
    }
    // The number of a TCP option; 0 is none.
    Some(match byte(info, 8)? {
        0 => Meaning::Held,
        _ => Meaning::varies("TCP option"),
    })
}

fn multiport(info: &[u8]) -> Option<Meaning> {
    const DESTINATION: u8 = 1;
    Some(match byte(info, 0)? {
        DESTINATION => Meaning::Held,
        // Source, or either.
        _ => Meaning::varies(SOURCE_PORT),
    })
}

fn conntrack(info: &[u8]) -> Option<Meaning> {
    const STATE: u16 = 1;
    const EXPIRES: u16 = 1 << 7;
    const ORIGINAL_SOURCE_PORT: u16 = 1 << 8;
    const REPLY_DESTINATION_PORT: u16 = 1 << 11;
    const INVALID: u16 = 1;
    let (flags, inverted) = (half(info, 146)?, half(info, 148)?);
    if flags & STATE != 0 && inverted & STATE == 0 && byte(info, 150)? == INVALID as u8 {
        return Some(Meaning::Excluded);
    }
    Some(
        if flags & (ORIGINAL_SOURCE_PORT | REPLY_DESTINATION_PORT) != 0 {
            Meaning::varies(SOURCE_PORT)
        } else if flags & EXPIRES != 0 {
            Meaning::varies("age of the connection")
        } else {
            Meaning::Held
        },
    )
}

fn addrtype(info: &[u8]) -> Option<Meaning> {
    // Revision 0 has two numbers behind the masks, revision 1 bits in one.
    const INVERT_DESTINATION: u16 = 2;
    let destination = half(info, 2)?;
    let inverted = if info.len() >= 12 {
        half(info, 8)? != 0
    } else {
        half(info, 4)? & INVERT_DESTINATION != 0
    };
    let unicast = destination & (1 << UNICAST) != 0;
    Some(if destination != 0 && unicast == inverted {
        Meaning::Excluded
    } else {
        Meaning::Held
    })
}

fn set(info: &[u8], sets: &Sets) -> Option<Meaning> {
    let (index, dimensions, flags) = (half(info, 0)?, byte(info, 2)?, byte(info, 3)?);
    // Bit 0 inverts, bit n is set where dimension n is a source.
    let sources: Vec<bool> = (1..=dimensions.min(7))
        .map(|dimension| flags & (1 << dimension) != 0)
        .collect();
    Some(if sets.asks_for_source_port(index, &sources) {
        Meaning::varies(SOURCE_PORT_IN_IPSET)
    } else {
        Meaning::Held
    })
}

/// A target.
pub(super) fn of_target(name: &str, info: &[u8]) -> Meaning {
    // Flags, zone and two masks of events come first.
    const HELPER: usize = 12;
    if name == "CT" && byte(info, HELPER).is_some_and(|first| first != 0) {
        return helper();
    }
    Meaning::of(held::of_target(name), || name.to_owned())
}

/// A connection that a helper reads must reach it whole.
pub(super) fn helper() -> Meaning {
    Meaning::Depends(Part::Counts, "helper that reads connections".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, info: &[u8]) -> Meaning {
        of_match(name, info, &Sets::default())
    }

    fn conntrack_info(flags: u16, inverted: u16, state: u16) -> Vec<u8> {
        let mut info = vec![0; 164];
        info[146..148].copy_from_slice(&flags.to_ne_bytes());
        info[148..150].copy_from_slice(&inverted.to_ne_bytes());
        info[150..152].copy_from_slice(&state.to_ne_bytes());
        info
    }

    #[test]
    fn ports_of_the_client_are_told_from_those_of_the_service() {
        let tcp = |from: u16, to: u16, option| {
            let mut info: Vec<u8> = [from, to, 80, 80]
                .iter()
                .flat_map(|port| port.to_ne_bytes())
                .collect();
            info.extend([option, 0, 0, 0]);
            of("tcp", &info)
        };
        assert_eq!(tcp(0, u16::MAX, 0), Meaning::Held);
        assert_eq!(tcp(1000, 1000, 0), Meaning::varies(SOURCE_PORT));
        assert_eq!(tcp(0, u16::MAX, 2), Meaning::varies("TCP option"));
        assert_eq!(of("multiport", &[1, 2]), Meaning::Held);
        for either in [0, 2] {
            assert_eq!(of("multiport", &[either, 2]), Meaning::varies(SOURCE_PORT));
        }
    }

    #[test]
    fn states_are_held_and_invalid_is_no_connection() {
        assert_eq!(of("conntrack", &conntrack_info(1, 0, 6)), Meaning::Held);
        assert_eq!(of("conntrack", &conntrack_info(1, 0, 1)), Meaning::Excluded);
        assert_eq!(of("conntrack", &conntrack_info(1, 1, 1)), Meaning::Held);
        assert_eq!(
            of("conntrack", &conntrack_info(1 << 8, 0, 0)),
            Meaning::varies(SOURCE_PORT)
        );
        assert!(matches!(
            of("conntrack", &conntrack_info(1 << 7, 0, 0)),
            Meaning::Depends(..)
        ));
    }

    #[test]
    fn no_pod_is_a_local_address() {
        let info = |destination: u16, flags: u32| {
            let mut info = vec![0; 2];
            info.extend(destination.to_ne_bytes());
            info.extend(flags.to_ne_bytes());
            info
        };
        let local = 1 << 2;
        assert_eq!(of("addrtype", &info(local, 0)), Meaning::Excluded);
        assert_eq!(of("addrtype", &info(local, 2)), Meaning::Held);
        assert_eq!(of("addrtype", &info(local | 2, 0)), Meaning::Held);
        assert_eq!(of("addrtype", &info(2, 2)), Meaning::Excluded);
        assert_eq!(of("addrtype", &info(0, 0)), Meaning::Held);
    }

    #[test]
    fn what_is_cut_or_unknown_is_not_held() {
        for name in ["tcp", "multiport", "conntrack", "addrtype", "set", "u32"] {
            assert!(matches!(of(name, &[]), Meaning::Depends(..)), "{name}");
        }
    }

    #[test]
    fn a_helper_is_seen_in_the_target_that_sets_it() {
        let mut info = vec![0; 64];
        assert_eq!(of_target("CT", &info), Meaning::Held);
        info[12] = b'f';
        assert_eq!(of_target("CT", &info), helper());
        assert!(matches!(
            of_target("NFQUEUE", &[]),
            Meaning::Depends(Part::Counts, _)
        ));
    }
}
