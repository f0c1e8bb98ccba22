//! Acquiring and renewing the own lease (contract sections 6.3 and 6.4).

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::bail;
use ipnet::Ipv4Net;

use super::{
    EtcdError, Shared,
    follower::{BadEntry, lease_of},
    registry::{Entry, Listing},
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
/// What is waited for at most, times the attempt, before the next list. Many agents that
/// start together would otherwise lose the same races again together.
const SPREAD: Duration = Duration::from_millis(20);

/// Decides from a fresh list at each attempt.
pub(super) async fn acquire(
    shared: &Arc<Shared>,
    config: &NetworkConfig,
    attributes: &LeaseAttributes,
    previous: Option<Ipv4Net>,
) -> Result<Lease, SourceError> {
    let retry = |error: EtcdError| SourceError::Retry(error.into());
    for attempt in 1..=ATTEMPTS {
        let listing = shared.registry.list().await.map_err(retry)?;
        let leases = leases_of(&listing);
        let decision = decide(
            config,
            &leases,
            attributes.public_ip,
            previous,
            &mut rand::rng(),
        )
        .map_err(|error| SourceError::Fatal(error.into()))?;
        drop(leases);
        let claimed = carry_out(shared, &listing, decision, attributes).await;
        if let Some(lease) = claimed.map_err(retry)? {
            shared.own.hold(&lease);
            return Ok(lease);
        }
        tracing::info!("another agent took the subnet first, trying again with a fresh list");
        let spread = SPREAD.as_millis() as u64 * attempt as u64;
        let pause = Duration::from_millis(rand::random_range(0..spread));
        tokio::time::sleep(pause).await;
    }
    Err(SourceError::Retry(anyhow::anyhow!(
        "other agents took the subnet first {ATTEMPTS} times in a row"
    )))
}

/// Everything that blocks a subnet. A bad value blocks its subnet too, as nobody's lease.
fn leases_of(listing: &Listing) -> Vec<Lease> {
    // When a lease ends does not matter here, only whether it does.
    let end = SystemTime::now();
    let lease = |entry: &Entry| match lease_of(entry, end) {
        Ok(lease) => Some(lease),
        Err(BadEntry::Name) => None,
        Err(BadEntry::Value { key, .. }) => Some(Lease {
            key,
            attributes: LeaseAttributes::plain(Ipv4Addr::UNSPECIFIED),
            expires: Some(end),
        }),
    };
    listing.entries.iter().filter_map(lease).collect()
}

/// `None` when somebody else was faster.
async fn carry_out(
    shared: &Arc<Shared>,
    listing: &Listing,
    decision: Decision,
    attributes: &LeaseAttributes,
) -> Result<Option<Lease>, EtcdError> {
    let new = match decision {
        Decision::Refresh(lease) => {
            let found = find(listing, &shared.registry.keys().lease(&lease.key));
            return extend(shared, &lease.key, found, attributes).await;
        }
        Decision::Replace { old, new } => {
            tracing::info!(%old, %new, "the own lease does not fit the network config any more");
            let stale = listing.entries.iter().filter(|entry| {
                lease_of(entry, SystemTime::now()).is_ok_and(|lease| {
                    lease.key == old && lease.attributes.public_ip == attributes.public_ip
                })
            });
            for entry in stale {
                let removed = shared.registry.remove(&entry.key, entry.mod_revision);
                if !removed.await? {
                    return Ok(None);
                }
            }
            new
        }
        Decision::Create(new) => new,
    };
    write(shared, &new, None, attributes, false).await
}

fn find<'a>(listing: &'a Listing, key: &str) -> Option<&'a Entry> {
    let found = |entry: &Entry| entry.key.as_slice().cmp(key.as_bytes());
    let index = listing.entries.binary_search_by(found).ok()?;
    listing.entries.get(index)
}

/// Publishes `attributes` under the lease that `found` holds: for another 24 h, or for
/// ever if it is a reservation.
async fn extend(
    shared: &Arc<Shared>,
    key: &SubnetKey,
    found: Option<&Entry>,
    attributes: &LeaseAttributes,
) -> Result<Option<Lease>, EtcdError> {
    let is_reservation = found.is_some_and(|entry| entry.lease == 0);
    if let Some(entry) = found.filter(|_| is_reservation)
        && entry.value == attributes.to_json().as_bytes()
    {
        shared.own.will_publish(attributes);
        return Ok(Some(Lease {
            key: *key,
            attributes: attributes.clone(),
            expires: None,
        }));
    }
    write(shared, key, found, attributes, is_reservation).await
}

/// Grants, writes on condition that nothing changed since the key was read (`None`: it
/// was not there), and gives the grant back where that failed.
async fn write(
    shared: &Arc<Shared>,
    key: &SubnetKey,
    found: Option<&Entry>,
    attributes: &LeaseAttributes,
    is_reservation: bool,
) -> Result<Option<Lease>, EtcdError> {
    let registry = &shared.registry;
    let grant = match is_reservation {
        true => None,
        false => Some(registry.grant().await?),
    };
    shared.own.will_publish(attributes);
    let (name, value) = (registry.keys().lease(key), attributes.to_json());
    let id = grant.map_or(0, |grant| grant.id);
    let written = match found {
        Some(entry) => {
            registry
                .replace(&name, entry.mod_revision, &value, id)
                .await
        }
        None => registry.create(&name, &value, id).await,
    };
    if !matches!(written, Ok(true))
        && let Some(grant) = grant
    {
        // Nobody waits for it: after an error etcd may not answer this either.
        let shared = Arc::clone(shared);
        tokio::spawn(async move { shared.registry.revoke(grant.id).await });
    }
    Ok(written?.then(|| Lease {
        key: *key,
        attributes: attributes.clone(),
        expires: grant.map(|grant| grant.expires),
    }))
}

/// Extends the own lease if it still is that, takes its subnet again if it is free, and
/// leaves everybody else's alone.
pub(super) async fn renew(shared: &Arc<Shared>, lease: &Lease) -> anyhow::Result<Lease> {
    let name = shared.registry.keys().lease(&lease.key);
    for _ in 0..ATTEMPTS {
        let found = shared.registry.read(&name).await?;
        match &found {
            Some(entry) => check_owner(shared, entry, lease)?,
            None => check_free(shared, lease).await?,
        }
        let renewed = extend(shared, &lease.key, found.as_ref(), &lease.attributes).await?;
        if let Some(renewed) = renewed {
            shared.own.hold(&renewed);
            return Ok(renewed);
        }
    }
    bail!(
        "the lease {} changed {ATTEMPTS} times while it was renewed",
        lease.key
    )
}

/// A value that nobody can read is written again; it names no other owner.
fn check_owner(shared: &Shared, entry: &Entry, lease: &Lease) -> anyhow::Result<()> {
    let Ok(found) = lease_of(entry, SystemTime::now()) else {
        return Ok(());
    };
    let node = found.attributes.public_ip;
    let held = shared.own.lease();
    let is_own = node == lease.attributes.public_ip
        || held.is_some_and(|held| held.attributes.public_ip == node);
    if !is_own {
        bail!(
            "subnet {} is node {node}'s now, and is left to it: restart this agent for another subnet, or stop that one",
            lease.key.v4
        );
    }
    Ok(())
}

/// The transaction only sees whether the same key exists.
async fn check_free(shared: &Shared, lease: &Lease) -> anyhow::Result<()> {
    let listing = shared.registry.list().await?;
    let holder = leases_of(&listing)
        .into_iter()
        .find(|other| other.key != lease.key && other.key.overlaps(&lease.key.v4));
    if let Some(holder) = holder {
        bail!(
            "subnet {} was removed from the registry and overlaps {} of node {} now: restart this agent for another subnet",
            lease.key.v4,
            holder.key.v4,
            holder.attributes.public_ip
        );
    }
    Ok(())
}
