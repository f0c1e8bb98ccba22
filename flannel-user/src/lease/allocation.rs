//! Which subnet a node gets (contract section 6.3), decided without I/O.

#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use rand::Rng;

use super::{Lease, SubnetKey};
use crate::network::NetworkConfig;

/// Free subnets that are collected before one of them is drawn.
const CANDIDATES: usize = 100;

/// What to do to hold a lease.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// The node has a lease that fits: publish the attributes under it again. A
    /// reservation (`expires` is `None`) stays one.
    Refresh(Lease),
    /// The node has a lease that does not fit the config any more: remove `old`, then
    /// create `new`.
    Replace {
        /// The lease that does not fit.
        old: SubnetKey,
        /// The subnet to claim.
        new: SubnetKey,
    },
    /// The node has no lease: create this one.
    Create(SubnetKey),
}

/// No lease is possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocationError {
    /// Every subnet of the range is taken.
    #[error(
        "out of subnets: {leases} leases leave no /{len} free from SubnetMin {min} to SubnetMax {max}; widen the range in the network config or remove leases of vanished nodes"
    )]
    OutOfSubnets {
        /// Network address of the first subnet.
        min: Ipv4Addr,
        /// Network address of the last one.
        max: Ipv4Addr,
        /// Prefix length of a subnet.
        len: u8,
        /// Number of leases there are.
        leases: usize,
    },
}

/// Decides from a fresh list of all leases. In this order: the lease that carries
/// `own_public_ip` (the first in order of the keys' text), the `previous` subnet of the
/// subnet file, a random free one.
///
/// Unlike the original, `previous` must be free altogether, not merely no lease's
/// exact subnet.
///
/// # Errors
/// When no subnet is free.
pub fn decide(
    config: &NetworkConfig,
    leases: &[Lease],
    own_public_ip: Ipv4Addr,
    previous: Option<Ipv4Net>,
    rng: &mut impl Rng,
) -> Result<Decision, AllocationError> {
    let own = leases
        .iter()
        .filter(|lease| lease.attributes.public_ip == own_public_ip)
        .filter(|lease| !lease.attributes.public_ip.is_unspecified())
        .min_by_key(|lease| lease.key.to_string());
    if let Some(own) = own.filter(|own| config.is_compatible(&own.key)) {
        return Ok(Decision::Refresh(own.clone()));
    }
    let new = previous
        .map(SubnetKey::from_v4)
        .filter(|previous| config.is_compatible(previous))
        .filter(|previous| !leases.iter().any(|lease| lease.key.overlaps(&previous.v4)))
        .map_or_else(|| draw(config, leases, rng), Ok)?;
    Ok(match own {
        Some(own) => Decision::Replace { old: own.key, new },
        None => Decision::Create(new),
    })
}

/// One of the first free subnets of the range, each with the same probability.
fn draw(
    config: &NetworkConfig,
    leases: &[Lease],
    rng: &mut impl Rng,
) -> Result<SubnetKey, AllocationError> {
    let candidates: Vec<Ipv4Net> = free(config, leases).take(CANDIDATES).collect();
    if candidates.is_empty() {
        return Err(AllocationError::OutOfSubnets {
            min: config.subnet_min,
            max: config.subnet_max,
            len: config.subnet_len,
            leases: leases.len(),
        });
    }
    let drawn = candidates[rng.random_range(0..candidates.len())];
    Ok(SubnetKey::from_v4(drawn))
}

/// The free subnets in order of their addresses. One walk over range and leases
/// together: a lease moves the walk to the first subnet behind it.
fn free(config: &NetworkConfig, leases: &[Lease]) -> impl Iterator<Item = Ipv4Net> {
    let len = config.subnet_len;
    let size = 1u64 << (32 - len);
    let max = u64::from(u32::from(config.subnet_max));
    let mut taken: Vec<(u64, u64)> = leases
        .iter()
        .map(|lease| {
            let (first, last) = (lease.key.v4.network(), lease.key.v4.broadcast());
            (u32::from(first).into(), u32::from(last).into())
        })
        .collect();
    taken.sort_unstable();
    let mut taken = taken.into_iter().peekable();
    let mut next = u64::from(u32::from(config.subnet_min));
    std::iter::from_fn(move || {
        while let Some((_, last)) = taken.next_if(|(first, _)| *first < next + size) {
            if last >= next {
                next = (last / size + 1) * size;
            }
        }
        if next > max {
            return None;
        }
        let subnet = Ipv4Net::new(Ipv4Addr::from(u32::try_from(next).ok()?), len).ok()?;
        next += size;
        Some(subnet)
    })
}
