//! The programs after an operator has switched them off, in case that they are soon wanted again.
//!
//! Nothing of ours touches a packet and nothing is pinned: what is kept here
//! belongs to this process and ends with it. Loading costs a tenth of a second
//! of the verifier's time and attaching a grace period a place; both are spared.
//! What was learned is not kept: the tables are emptied before the programs
//! come back, because nobody saw what happened meanwhile.

use std::time::{Duration, Instant};

use aya::maps::MapData;
use flannel_ebpf::layout::{CLASSES, FLOWS_IN, FLOWS_OUT, OWN, TRANSLATED};

use super::{EbpfDatapath, EbpfError, tables::forget};

/// How long the places at the hooks are kept, by links with a program that does nothing.
const KEEP_PLACES: Duration = Duration::from_secs(10);
/// How long the programs and their maps, some 40 MB of kernel memory, stay loaded.
const KEEP_LOADED: Duration = Duration::from_secs(300);
/// What the programs have learned, and own connections that conntrack refused.
const LEARNED: [&str; 5] = [FLOWS_OUT, FLOWS_IN, OWN, CLASSES, TRANSLATED];

/// Loaded, but off.
pub struct Parked {
    datapath: EbpfDatapath,
    maps: Vec<(String, MapData)>,
    since: Instant,
}

impl EbpfDatapath {
    /// Takes every program of ours off its place and removes every pin: all packets take the
    /// kernel path. The programs stay loaded for a while.
    ///
    /// # Errors
    /// A pin could not be read or removed; the programs are off all the same.
    pub fn park(mut self) -> Result<Parked, EbpfError> {
        self.quiesce();
        self.attachments.park(&mut self.programs, &self.pins);
        let maps = self.pins.open_maps();
        self.pins.remove_all()?;
        Ok(Parked {
            datapath: self,
            maps: maps?,
            since: Instant::now(),
        })
    }
}

impl Parked {
    /// Gets ready to be filled and attached, as if just opened.
    ///
    /// # Errors
    /// A map could not be pinned or emptied.
    pub fn resume(self) -> Result<EbpfDatapath, EbpfError> {
        let Self {
            mut datapath, maps, ..
        } = self;
        for name in LEARNED {
            let map = maps.iter().find(|(found, _)| found == name);
            let (_, map) = map.ok_or_else(|| EbpfError::Missing {
                kind: "map",
                name: name.to_owned(),
            })?;
            forget(name, map)?;
        }
        datapath.tables.reset_counters()?;
        datapath.generation.allow(false, false);
        let jiffies = datapath.programs.jiffies()?;
        datapath
            .generation
            .renew(jiffies, datapath.options.validity);
        // Own connections went as it was parked.
        datapath.is_emptied = true;
        datapath.pins.make()?;
        datapath.pins.pin_maps(&maps)?;
        Ok(datapath)
    }

    /// When to call [`Parked::shrink`] next.
    #[must_use]
    pub fn until(&self) -> Instant {
        let keep = if self.datapath.attachments.keeps_places() {
            KEEP_PLACES
        } else {
            KEEP_LOADED
        };
        self.since + keep
    }

    /// Gives up what was kept for long enough; nothing in the end.
    #[must_use]
    pub fn shrink(mut self) -> Option<Self> {
        let kept = self.since.elapsed();
        if kept >= KEEP_PLACES {
            self.datapath.attachments.release();
        }
        (kept < KEEP_LOADED).then_some(self)
    }
}
