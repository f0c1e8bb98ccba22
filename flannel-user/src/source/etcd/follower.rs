//! What the registry holds, kept from a list and the changes after it, without I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use super::{
    keys::Keys,
    registry::{Entry, Listing},
};
use crate::{
    lease::{Lease, LeaseAttributes, SubnetKey},
    source::LeaseEvent,
};

/// Leases by name, and what was complained of.
#[derive(Debug)]
pub(super) struct Follower {
    keys: Keys,
    /// Name → last good value. The name is what stands behind `<prefix>/subnets/`.
    known: BTreeMap<String, Known>,
    /// Names that are not how their subnet is written (`junk10.1.2.0-24`). flannel reads
    /// them as leases, but what happens to one must not touch the lease proper.
    aliases: BTreeSet<String>,
    /// Name → what is wrong with its value, each said once.
    complaints: BTreeMap<String, String>,
}

/// Kept as text, which is a third of the size of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    value: Box<str>,
    is_reservation: bool,
}

/// Why a key is no lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadEntry {
    /// Not even its subnet is known.
    #[error("its name is no subnet key")]
    Name,
    /// It holds the subnet, but nobody knows for whom.
    #[error("{cause}")]
    Value { key: SubnetKey, cause: String },
}

/// Reads a lease. `latest_end` is when it ends at the latest, if ever.
pub(super) fn lease_of(entry: &Entry, latest_end: SystemTime) -> Result<Lease, BadEntry> {
    let key: SubnetKey = std::str::from_utf8(&entry.key)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or(BadEntry::Name)?;
    let value = std::str::from_utf8(&entry.value).map_err(|error| error.to_string());
    let attributes = value
        .and_then(|text| LeaseAttributes::from_json(text).map_err(|error| error.to_string()))
        .map_err(|cause| BadEntry::Value { key, cause })?;
    Ok(Lease {
        key,
        attributes,
        expires: (entry.lease != 0).then_some(latest_end),
    })
}

impl Follower {
    pub(super) fn new(keys: Keys) -> Self {
        Self {
            keys,
            known: BTreeMap::new(),
            aliases: BTreeSet::new(),
            complaints: BTreeMap::new(),
        }
    }

    /// Takes over a whole list. A value that is bad now counts as the last good one.
    pub(super) fn replace(&mut self, listing: Listing, latest_end: SystemTime) -> LeaseEvent {
        let before = std::mem::take(&mut self.known);
        self.aliases.clear();
        let complaints = std::mem::take(&mut self.complaints);
        let mut leases = BTreeMap::new();
        for entry in listing.entries {
            let name = self.name(&entry.key);
            let lease = match lease_of(&entry, latest_end) {
                Ok(lease) => {
                    self.remember(&name, &entry, &lease.key);
                    lease
                }
                Err(bad) => {
                    self.complain(&name, &bad, &complaints);
                    let Some(good) = before.get(&name) else {
                        continue;
                    };
                    let Some(lease) = good.lease(&name, latest_end) else {
                        continue;
                    };
                    self.known.insert(name.clone(), good.clone());
                    self.note_alias(&name, &lease.key);
                    lease
                }
            };
            // The lease proper wins over an alias.
            if self.aliases.contains(&name) {
                leases.entry(lease.key).or_insert(lease);
            } else {
                leases.insert(lease.key, lease);
            }
        }
        LeaseEvent::Snapshot(leases.into_values().collect())
    }

    /// A key was put.
    pub(super) fn put(&mut self, entry: &Entry, latest_end: SystemTime) -> Option<LeaseEvent> {
        let name = self.name(&entry.key);
        let lease = match lease_of(entry, latest_end) {
            Ok(lease) => lease,
            Err(bad) => {
                let said = self.complaints.clone();
                self.complain(&name, &bad, &said);
                return None;
            }
        };
        if self.complaints.remove(&name).is_some() {
            tracing::info!(key = name, "the lease is readable again");
        }
        self.remember(&name, entry, &lease.key);
        let is_hidden =
            self.aliases.contains(&name) && self.known.contains_key(&lease.key.to_string());
        (!is_hidden).then_some(LeaseEvent::Put(lease))
    }

    /// A key was deleted, or its etcd lease ran out.
    pub(super) fn delete(&mut self, key: &[u8], latest_end: SystemTime) -> Option<LeaseEvent> {
        let name = self.name(key);
        self.complaints.remove(&name);
        self.known.remove(&name);
        let was_alias = self.aliases.remove(&name);
        let key: SubnetKey = name.parse().ok()?;
        if was_alias && self.known.contains_key(&key.to_string()) {
            return None;
        }
        let other = self
            .aliases
            .iter()
            .find(|alias| alias.parse() == Ok(key))
            .and_then(|alias| self.known.get(alias)?.lease(alias, latest_end));
        Some(other.map_or(LeaseEvent::Removed(key), LeaseEvent::Put))
    }

    /// How many values are bad.
    #[cfg(test)]
    fn complaints(&self) -> usize {
        self.complaints.len()
    }

    fn name(&self, key: &[u8]) -> String {
        let text = String::from_utf8_lossy(key);
        let below = text
            .strip_prefix(&self.keys.subnets)
            .and_then(|rest| rest.strip_prefix('/'));
        below.unwrap_or(&text).to_owned()
    }

    fn remember(&mut self, name: &str, entry: &Entry, key: &SubnetKey) {
        let known = Known {
            value: String::from_utf8_lossy(&entry.value).into(),
            is_reservation: entry.lease == 0,
        };
        self.known.insert(name.to_owned(), known);
        self.note_alias(name, key);
    }

    fn note_alias(&mut self, name: &str, key: &SubnetKey) {
        if key.to_string() != name {
            self.aliases.insert(name.to_owned());
        }
    }

    fn complain(&mut self, name: &str, bad: &BadEntry, said: &BTreeMap<String, String>) {
        let cause = bad.to_string();
        if said.get(name) != Some(&cause) {
            tracing::warn!(
                key = name,
                cause,
                "skipped a key below the subnets; what is known of other leases, and of this one, stays in force"
            );
        }
        self.complaints.insert(name.to_owned(), cause);
    }
}

impl Known {
    fn lease(&self, name: &str, latest_end: SystemTime) -> Option<Lease> {
        Some(Lease {
            key: name.parse().ok()?,
            attributes: LeaseAttributes::from_json(&self.value).ok()?,
            expires: (!self.is_reservation).then_some(latest_end),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rstest::rstest;

    use super::*;

    const END: SystemTime = SystemTime::UNIX_EPOCH;

    fn entry(name: &str, value: &str) -> Entry {
        Entry {
            key: format!("/n/subnets/{name}").into_bytes(),
            value: value.as_bytes().to_vec(),
            mod_revision: 7,
            lease: 1,
        }
    }

    fn value(node: u8) -> String {
        LeaseAttributes::plain(Ipv4Addr::new(192, 0, 2, node)).to_json()
    }

    fn lease(name: &str, node: u8) -> Lease {
        lease_of(&entry(name, &value(node)), END).expect("a lease")
    }

    fn follower(entries: &[(&str, &str)]) -> (Follower, LeaseEvent) {
        let mut follower = Follower::new(Keys::under("/n"));
        let entries = entries.iter().map(|(name, value)| entry(name, value));
        let listing = Listing {
            revision: 7,
            entries: entries.collect(),
        };
        let snapshot = follower.replace(listing, END);
        (follower, snapshot)
    }

    #[test]
    fn a_list_becomes_a_snapshot_and_changes_follow() {
        let (mut follower, snapshot) =
            follower(&[("10.1.2.0-24", &value(2)), ("10.1.1.0-24", &value(1))]);
        let leases = vec![lease("10.1.1.0-24", 1), lease("10.1.2.0-24", 2)];
        assert_eq!(snapshot, LeaseEvent::Snapshot(leases));
        let moved = follower.put(&entry("10.1.2.0-24", &value(3)), END);
        assert_eq!(moved, Some(LeaseEvent::Put(lease("10.1.2.0-24", 3))));
        let key = "10.1.2.0-24".parse().expect("a key");
        let gone = follower.delete(b"/n/subnets/10.1.2.0-24", END);
        assert_eq!(gone, Some(LeaseEvent::Removed(key)));
    }

    #[test]
    fn row_6_5_a_key_without_etcd_lease_never_ends() {
        let mut reservation = entry("10.1.2.0-24", &value(2));
        assert_eq!(
            lease_of(&reservation, END).expect("good").expires,
            Some(END)
        );
        reservation.lease = 0;
        assert_eq!(lease_of(&reservation, END).expect("good").expires, None);
    }

    #[rstest]
    #[case::broken("{\"PublicIP\":")]
    #[case::empty("")]
    #[case::other_type("{\"PublicIP\":7}")]
    #[case::no_object("[]")]
    fn row_23_3a_a_bad_value_costs_nobody_anything(#[case] bad: &str) {
        let (mut follower, _) = follower(&[("10.1.1.0-24", &value(1)), ("10.1.2.0-24", &value(2))]);
        assert_eq!(follower.put(&entry("10.1.2.0-24", bad), END), None);
        assert_eq!(follower.put(&entry("10.1.9.0-24", bad), END), None);
        assert_eq!(follower.put(&entry("junk", &value(9)), END), None);
        assert_eq!(follower.complaints(), 3);
        let listing = Listing {
            revision: 9,
            entries: vec![
                entry("10.1.1.0-24", &value(1)),
                entry("10.1.2.0-24", bad),
                entry("10.1.9.0-24", bad),
                entry("junk", &value(9)),
            ],
        };
        let still = vec![lease("10.1.1.0-24", 1), lease("10.1.2.0-24", 2)];
        assert_eq!(follower.replace(listing, END), LeaseEvent::Snapshot(still));
        assert_eq!(follower.complaints(), 3);
        assert!(
            follower
                .put(&entry("10.1.2.0-24", &value(2)), END)
                .is_some()
        );
        assert_eq!(follower.delete(b"/n/subnets/junk", END), None);
        assert_eq!(follower.complaints(), 1);
    }

    #[test]
    fn what_only_looks_like_a_lease_never_replaces_it() {
        let (mut follower, snapshot) =
            follower(&[("10.1.2.0-24", &value(2)), ("old10.1.2.0-24", &value(9))]);
        let proper = lease("10.1.2.0-24", 2);
        assert_eq!(snapshot, LeaseEvent::Snapshot(vec![proper.clone()]));
        assert_eq!(follower.put(&entry("old10.1.2.0-24", &value(8)), END), None);
        let gone = follower.delete(b"/n/subnets/10.1.2.0-24", END);
        let Some(LeaseEvent::Put(other)) = gone else {
            panic!("the other one counts now: {gone:?}");
        };
        assert_eq!(other.attributes.public_ip, Ipv4Addr::new(192, 0, 2, 8));
        let put = follower.put(&entry("10.1.2.0-24", &value(2)), END);
        assert_eq!(put, Some(LeaseEvent::Put(proper)));
        assert_eq!(follower.delete(b"/n/subnets/old10.1.2.0-24", END), None);
    }
}
