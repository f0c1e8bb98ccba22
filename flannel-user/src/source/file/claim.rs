//! Acquiring and renewing the own lease.

use std::{net::Ipv4Addr, time::SystemTime};

use anyhow::{anyhow, bail};
use ipnet::Ipv4Net;

use super::{
    Shared,
    directory::{Entry, Expiry, Locked},
};
use crate::{
    lease::{
        Lease, LeaseAttributes, SubnetKey,
        allocation::{Decision, decide},
    },
    network::NetworkConfig,
    source::SourceError,
};

/// Lost races after which to give up for now (contract section 6.3).
const ATTEMPTS: usize = 10;

/// Decides under the lock, from a fresh list at each attempt.
pub(super) fn acquire(
    shared: &Shared,
    config: &NetworkConfig,
    attributes: &LeaseAttributes,
    previous: Option<Ipv4Net>,
) -> Result<Lease, SourceError> {
    shared.directory.prepare().map_err(SourceError::Retry)?;
    for _ in 0..ATTEMPTS {
        let locked = shared.directory.lock().map_err(SourceError::Retry)?;
        let now = locked.now();
        let leases =
            live_leases(shared, &locked, now, attributes.public_ip).map_err(SourceError::Retry)?;
        let decision = decide(
            config,
            &leases,
            attributes.public_ip,
            previous,
            &mut rand::rng(),
        )
        .map_err(|error| SourceError::Fatal(error.into()))?;
        let claimed = carry_out(shared, &locked, decision, attributes, now);
        if let Some(lease) = claimed.map_err(SourceError::Retry)? {
            return Ok(lease);
        }
        tracing::info!("another agent took the subnet first, trying again with a fresh list");
    }
    Err(SourceError::Retry(anyhow!(
        "other agents took the subnet first {ATTEMPTS} times in a row"
    )))
}

/// Every lease that blocks its subnet; expired ones are removed on the way. A damaged
/// file blocks its subnet too, as nobody's lease.
fn live_leases(
    shared: &Shared,
    locked: &Locked<'_>,
    now: SystemTime,
    own: Ipv4Addr,
) -> anyhow::Result<Vec<Lease>> {
    locked.tidy()?;
    let mut leases = Vec::new();
    for (key, entry) in shared.directory.list()?.entries {
        let attributes = entry
            .attributes
            .unwrap_or_else(|_| LeaseAttributes::plain(Ipv4Addr::UNSPECIFIED));
        if entry.expiry.is_over(now) && attributes.public_ip != own {
            locked.remove(&key)?;
            tracing::info!(subnet = %key, node = %attributes.public_ip, "removed an expired lease");
            continue;
        }
        leases.push(Lease {
            key,
            attributes,
            expires: entry.expiry.moment(),
        });
    }
    Ok(leases)
}

/// `None` when the subnet was taken first after all.
fn carry_out(
    shared: &Shared,
    locked: &Locked<'_>,
    decision: Decision,
    attributes: &LeaseAttributes,
    now: SystemTime,
) -> anyhow::Result<Option<Lease>> {
    let key = match decision {
        Decision::Refresh(lease) => {
            let expiry = shared.directory.read_expiry(&lease.key);
            let same = lease.attributes == *attributes;
            return extend(shared, locked, &lease.key, attributes, same, &expiry, now).map(Some);
        }
        Decision::Replace { old, new } => {
            tracing::info!(%old, %new, "the own lease does not fit the network config any more");
            locked.remove(&old)?;
            new
        }
        Decision::Create(new) => new,
    };
    create(shared, locked, &key, attributes, now)
}

fn create(
    shared: &Shared,
    locked: &Locked<'_>,
    key: &SubnetKey,
    attributes: &LeaseAttributes,
    now: SystemTime,
) -> anyhow::Result<Option<Lease>> {
    let end = now + shared.lease_ttl;
    Ok(locked.create(key, attributes, end)?.then(|| Lease {
        key: *key,
        attributes: attributes.clone(),
        expires: Some(end),
    }))
}

/// Keeps the lease that there is; a reservation stays one. The expiry goes first: if the
/// second step fails, the lease is still held with its old attributes.
fn extend(
    shared: &Shared,
    locked: &Locked<'_>,
    key: &SubnetKey,
    attributes: &LeaseAttributes,
    published: bool,
    expiry: &Expiry,
    now: SystemTime,
) -> anyhow::Result<Lease> {
    let end = match expiry {
        Expiry::Never => None,
        Expiry::At(_) | Expiry::Unreadable(_) => Some(now + shared.lease_ttl),
    };
    if let Some(end) = end {
        locked.set_expiry(key, end)?;
    }
    if !published {
        locked.publish(key, attributes)?;
    }
    Ok(Lease {
        key: *key,
        attributes: attributes.clone(),
        expires: end,
    })
}

/// Extends the own lease, writes it again if it is damaged, and takes the same subnet
/// again if somebody removed it and it is still free.
pub(super) fn renew(shared: &Shared, lease: &Lease) -> anyhow::Result<Lease> {
    let Lease {
        key, attributes, ..
    } = lease;
    let own = shared.own.lease().filter(|own| own.key == *key);
    shared.directory.prepare()?;
    let locked = shared.directory.lock()?;
    let now = locked.now();
    let Some(Entry {
        attributes: found,
        expiry,
    }) = shared.directory.read(key)
    else {
        return take_again(shared, &locked, lease, now);
    };
    let published = match found {
        Ok(found) => {
            let is_ours = found.public_ip == attributes.public_ip
                || own.is_some_and(|own| own.attributes.public_ip == found.public_ip);
            if !is_ours {
                bail!(
                    "subnet {key} is held by node {} now, not by this one ({})",
                    found.public_ip,
                    attributes.public_ip
                );
            }
            found == *attributes
        }
        Err(cause) if own.is_some() => {
            tracing::warn!(subnet = %key, cause, "the own lease file is damaged, writing it again");
            false
        }
        Err(cause) => bail!(
            "cannot tell who holds subnet {key}: {}: {cause}",
            shared.directory.lease_path(key).display()
        ),
    };
    extend(shared, &locked, key, attributes, published, &expiry, now)
}

fn take_again(
    shared: &Shared,
    locked: &Locked<'_>,
    lease: &Lease,
    now: SystemTime,
) -> anyhow::Result<Lease> {
    let Lease {
        key, attributes, ..
    } = lease;
    let others = live_leases(shared, locked, now, attributes.public_ip)?;
    if let Some(other) = others.iter().find(|other| other.key.overlaps(&key.v4)) {
        bail!(
            "the own lease {key} was removed and node {} holds {} now",
            other.attributes.public_ip,
            other.key
        );
    }
    tracing::warn!(subnet = %key, "the own lease was removed, taking the same subnet again");
    create(shared, locked, key, attributes, now)?
        .ok_or_else(|| anyhow!("the own lease {key} was removed and another agent took it"))
}
