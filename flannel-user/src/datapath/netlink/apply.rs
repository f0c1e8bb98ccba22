//! Carries out a plan, in its order.

use std::{collections::BTreeSet, net::Ipv4Addr};

use tracing::info;

use super::{
    Device, Echo, Entries, Entry, NetlinkDatapath, Pass, PassError, RtnlError, plan::Plan,
};

impl NetlinkDatapath {
    /// Carries out `plan` in its order; a route waits for its peer's neighbour. Where the kernel
    /// refuses a next hop object, the route becomes plain, in `plan` as well.
    pub(super) async fn apply(
        &mut self,
        plan: &mut Plan,
        device: &Device,
        pass: &mut Pass,
    ) -> Result<(), RtnlError> {
        let index = device.index;
        let routes = |routes: &[_]| -> Vec<_> {
            let entries = routes.iter();
            entries
                .map(|&(subnet, form)| Entry::Route(subnet, form))
                .collect()
        };
        self.delete(routes(&plan.withdraw), index, pass).await?;

        let reach = plan.fdb.iter();
        let reach = reach.map(|&(mac, node)| Entry::Fdb(mac, Some(node)));
        let refused = self.set(reach.collect(), index, pass).await?;
        pass.errors.extend(refused.into_iter().map(could_not_set));

        let resolve = plan.neighbours.iter();
        let resolve = resolve.map(|&(base, mac)| Entry::Neighbour(base, Some(mac)));
        let refused = self.set(resolve.collect(), index, pass).await?;
        plan.without_routes(&bases(&refused));
        pass.errors.extend(refused.into_iter().map(could_not_set));

        let objects = plan.next_hops.iter().copied().map(Entry::NextHop);
        let refused = self.set(objects.collect(), index, pass).await?;
        if let Some((entry, error)) = refused.first() {
            info!(%entry, %error, count = refused.len(), "not to be had: these routes are made without");
        }
        plan.without_objects(&bases(&refused));

        let refused = self.set(routes(&plan.routes), index, pass).await?;
        pass.errors.extend(refused.into_iter().map(could_not_set));

        let next_hops = plan.stale_next_hops.iter().copied().map(Entry::NextHop);
        let neighbours = plan.stale_neighbours.iter();
        let neighbours = neighbours.map(|&base| Entry::Neighbour(base, None));
        let fdb = plan.stale_fdb.iter();
        let fdb = fdb.map(|&(mac, node)| Entry::Fdb(mac, node));
        let stale = next_hops.chain(neighbours).chain(fdb);
        self.delete(stale.collect(), index, pass).await
    }

    /// Sets every entry and counts it; returns the ones the kernel refused.
    async fn set(
        &mut self,
        entries: Vec<Entry>,
        device: u32,
        pass: &mut Pass,
    ) -> Result<Vec<(Entry, RtnlError)>, RtnlError> {
        let requests = entries.iter().map(|entry| entry.set(device)).collect();
        let failures = self.rtnl.batch(requests).await?;
        self.expect_echoes(&entries, Entry::echo_of_setting, failures.len());
        let repaired = entries
            .iter()
            .filter(|entry| self.programmed.has(entry))
            .count();
        let mut repaired_failed = 0;
        let mut refused = Vec::with_capacity(failures.len());
        for (position, source) in failures {
            let entry = entries[position];
            repaired_failed += usize::from(self.programmed.has(&entry));
            refused.push((entry, source));
        }
        pass.repaired += repaired - repaired_failed;
        pass.installed += entries.len() - repaired - (refused.len() - repaired_failed);
        Ok(refused)
    }

    /// Rather one look too many than one too few: any failure may have been of these.
    fn expect_echoes(&mut self, entries: &[Entry], of: fn(&Entry) -> Option<Echo>, failed: usize) {
        for kind in [Echo::Fdb, Echo::NeighbourGone] {
            let caused = entries.iter().filter(|entry| of(entry) == Some(kind));
            self.echoes
                .expect(kind, caused.count().saturating_sub(failed));
        }
    }

    /// Deletes every entry and counts it; one that is gone already is as good as deleted.
    async fn delete(
        &mut self,
        entries: Vec<Entry>,
        device: u32,
        pass: &mut Pass,
    ) -> Result<(), RtnlError> {
        let requests = entries.iter().map(|entry| entry.delete(device)).collect();
        let failures = self.rtnl.batch(requests).await?;
        self.expect_echoes(&entries, Entry::echo_of_deletion, failures.len());
        pass.removed += entries.len() - failures.len();
        for (position, source) in failures {
            if !source.is_gone() {
                pass.errors.push(PassError::Entry {
                    action: "delete",
                    entry: entries[position],
                    source,
                });
            }
        }
        Ok(())
    }
}

fn could_not_set((entry, source): (Entry, RtnlError)) -> PassError {
    PassError::Entry {
        action: "set",
        entry,
        source,
    }
}

/// The bases of neighbours and next hop objects.
fn bases(refused: &[(Entry, RtnlError)]) -> BTreeSet<Ipv4Addr> {
    let entries = refused.iter();
    entries
        .filter_map(|(entry, _)| match entry {
            Entry::Neighbour(base, _) | Entry::NextHop(base) => Some(*base),
            _ => None,
        })
        .collect()
}

impl Entry {
    fn echo_of_setting(&self) -> Option<Echo> {
        matches!(self, Self::Fdb(..)).then_some(Echo::Fdb)
    }

    fn echo_of_deletion(&self) -> Option<Echo> {
        match self {
            Self::Fdb(..) => Some(Echo::Fdb),
            Self::Neighbour(..) => Some(Echo::NeighbourGone),
            Self::NextHop(..) | Self::Route(..) => None,
        }
    }
}

impl Entries {
    /// The last good pass left this very entry in place.
    fn has(&self, entry: &Entry) -> bool {
        match entry {
            Entry::Fdb(mac, node) => node.is_some() && self.fdb.get(mac) == node.as_ref(),
            Entry::Neighbour(base, mac) => {
                mac.is_some() && self.neighbours.get(base) == mac.as_ref()
            }
            Entry::NextHop(base) => self.needs_object(*base),
            Entry::Route(subnet, _) => self.routes.contains_key(subnet),
        }
    }

    /// These entries less what could not be set.
    pub(super) fn without_failures(mut self, errors: &[PassError]) -> Self {
        for error in errors {
            match error {
                PassError::Entry {
                    action: "set",
                    entry: Entry::Fdb(mac, _),
                    ..
                } => drop(self.fdb.remove(mac)),
                PassError::Entry {
                    action: "set",
                    entry: Entry::Neighbour(base, _),
                    ..
                } => {
                    self.neighbours.remove(base);
                    self.routes.retain(|subnet, _| subnet.network() != *base);
                }
                PassError::Entry {
                    action: "set",
                    entry: Entry::Route(subnet, _),
                    ..
                } => drop(self.routes.remove(subnet)),
                _ => {}
            }
        }
        self
    }
}
