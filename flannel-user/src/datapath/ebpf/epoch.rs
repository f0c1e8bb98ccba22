//! The generation of all verdicts, as the programs compare it.
//!
//! Raising it makes every live flow have its verdict confirmed by the stack;
//! one that nobody confirms within the grace ends.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData, MapError};
use flannel_ebpf::layout::{BYPASS_ANY, BYPASS_TCP, EPOCH, Epoch, GENERATIONS, generation_slot};
use nix::time::{ClockId, clock_getres};
use tracing::warn;

use super::{EbpfError, map_failed};

/// How long verdicts of the generation before hold while they are rechecked. With the way of the
/// event and a slow confirmation it stays far below the 100 ms that are promised.
pub const GRACE: Duration = Duration::from_millis(40);
/// Pause between two rechecks of one flow within the grace.
const RECHECK_GAP: Duration = Duration::from_millis(5);

/// The kernel's jiffies, carried on by our own clock between two readings.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    jiffies: u32,
    at: Instant,
    per_second: u32,
}

impl Clock {
    /// A clock that was just read from the kernel.
    #[must_use]
    pub fn new(jiffies: u32) -> Self {
        Self {
            jiffies,
            at: Instant::now(),
            per_second: ticks_per_second(),
        }
    }

    /// Jiffies now.
    #[must_use]
    pub fn now(&self) -> u32 {
        self.jiffies.wrapping_add(self.ticks(self.at.elapsed()))
    }

    /// A duration in jiffies, at least one.
    #[must_use]
    pub fn ticks(&self, duration: Duration) -> u32 {
        let ticks = duration.as_micros() * u128::from(self.per_second) / 1_000_000;
        u32::try_from(ticks).unwrap_or(u32::MAX).max(1)
    }

    /// Jiffies as a duration.
    #[must_use]
    pub fn duration(&self, ticks: u32) -> Duration {
        Duration::from_micros(u64::from(ticks) * 1_000_000 / u64::from(self.per_second))
    }
}

/// The kernel's tick: the resolution of its coarse clock.
fn ticks_per_second() -> u32 {
    let resolution = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map(|time| time.tv_nsec());
    match resolution {
        Ok(nanoseconds @ 1..) => {
            u32::try_from((1_000_000_000 + nanoseconds / 2) / nanoseconds).unwrap_or(1000)
        }
        _ => 1000,
    }
}

struct Inner {
    epoch: Array<MapData, Epoch>,
    generations: Array<MapData, u32>,
    value: Epoch,
    clock: Clock,
}

/// Shared by all that can change a verdict.
#[derive(Clone)]
pub struct Generation(Arc<Mutex<Inner>>);

impl Generation {
    /// Over the pinned maps of the directory `maps`. Whatever happened before nobody saw, so the
    /// generation is raised; nothing bypasses the stack before [`Generation::allow`].
    ///
    /// # Errors
    /// A map could not be opened, read or written.
    pub(super) fn open(maps: &Path, jiffies: u32, validity: Duration) -> Result<Self, EbpfError> {
        let epoch: Array<MapData, Epoch> = pinned(maps, EPOCH)?;
        let before = epoch.get(&0, 0).map_err(map_failed("read", EPOCH))?;
        let inner = Inner {
            epoch,
            generations: pinned(maps, GENERATIONS)?,
            value: before,
            clock: Clock::new(jiffies),
        };
        let generation = Self(Arc::new(Mutex::new(inner)));
        generation.renew(jiffies, validity);
        Ok(generation)
    }

    /// Begins anew at `jiffies`, after a time in which nobody saw what happened.
    pub(super) fn renew(&self, jiffies: u32, validity: Duration) {
        self.set_clock(jiffies);
        self.set_validity(validity);
        self.raise();
        self.raise_classes();
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn update(&self, change: impl FnOnce(&mut Epoch, &Clock)) {
        self.with(|inner| {
            let mut value = inner.value;
            change(&mut value, &inner.clock);
            if value == inner.value {
                return;
            }
            inner.value = value;
            if let Err(error) = inner.epoch.set(0, value, 0) {
                warn!(%error, "cannot write the generation: verdicts end by time alone");
            }
        });
    }

    /// Something changed that may change any verdict.
    pub fn raise(&self) {
        self.update(|epoch, clock| {
            epoch.generation = epoch.generation.wrapping_add(1);
            epoch.grace_until = clock.now().wrapping_add(clock.ticks(GRACE));
        });
    }

    /// The pod or peer with this address is another one now: its verdicts end at once.
    pub fn raise_for(&self, address: [u8; 4]) {
        let slot = generation_slot(address);
        self.with(|inner| {
            let next = inner
                .generations
                .get(&slot, 0)
                .map(|generation| generation.wrapping_add(1));
            let written = next.and_then(|next| inner.generations.set(slot, next, 0));
            if let Err(error) = written {
                warn!(%error, "cannot write a generation: verdicts end by time alone");
            }
        });
    }

    /// Which packets may bypass the stack at present.
    pub fn allow(&self, any: bool, tcp: bool) {
        self.update(|epoch, _| {
            epoch.flags = if any { BYPASS_ANY } else { 0 } | if tcp { BYPASS_TCP } else { 0 };
        });
    }

    /// How long a confirmed verdict holds.
    pub fn set_validity(&self, validity: Duration) {
        self.update(|epoch, clock| {
            epoch.validity = clock.ticks(validity);
            epoch.probe_gap = clock.ticks(validity / 8);
            epoch.recheck_gap = clock.ticks(RECHECK_GAP);
        });
    }

    /// Something changed that may change what a class stands for: without the pause that
    /// [`Generation::raise`] needs between two.
    pub(super) fn raise_classes(&self) {
        self.update(|epoch, _| epoch.class_generation = epoch.class_generation.wrapping_add(1));
    }

    /// How long a class holds until it asks again, and how long the answer may take.
    pub(super) fn set_class_validity(&self, validity: Duration, patience: Duration) {
        self.update(|epoch, clock| {
            epoch.class_validity = clock.ticks(validity);
            epoch.class_patience = clock.ticks(patience);
        });
    }

    /// Lets connections open for so long from now; nothing for not at all.
    pub(super) fn open_own(&self, reach: Option<Duration>) {
        self.update(|epoch, clock| {
            let now = clock.now();
            epoch.own_until = reach.map_or(now, |reach| now.wrapping_add(clock.ticks(reach)));
        });
    }

    /// Entries of own connections that have been closed for so long are no longer given to others:
    /// the moment before which they closed, in jiffies.
    pub(super) fn expire_own(&self, linger: Duration) -> u32 {
        self.update(|epoch, clock| {
            epoch.own_expired = clock.now().wrapping_sub(clock.ticks(linger));
        });
        self.own_expired()
    }

    /// That moment, as it was told last.
    pub(super) fn own_expired(&self) -> u32 {
        self.value().own_expired
    }

    /// Sets the clock anew: ours and the kernel's drift apart.
    pub fn set_clock(&self, jiffies: u32) {
        self.with(|inner| inner.clock = Clock::new(jiffies));
    }

    /// The clock.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.with(|inner| inner.clock)
    }

    /// What the programs see.
    #[must_use]
    pub fn value(&self) -> Epoch {
        self.with(|inner| inner.value)
    }
}

/// Lets no own connection open by the pinned maps of the directory `maps`, which nobody keeps.
///
/// # Errors
/// The map could not be opened, read or written.
pub(super) fn close_own(maps: &Path) -> Result<(), EbpfError> {
    let mut epoch: Array<MapData, Epoch> = pinned(maps, EPOCH)?;
    let mut value = epoch.get(&0, 0).map_err(map_failed("read", EPOCH))?;
    value.flags = 0;
    epoch.set(0, value, 0).map_err(map_failed("write", EPOCH))
}

/// A second handle on a pinned array.
pub(super) fn pinned<T>(maps: &Path, name: &'static str) -> Result<T, EbpfError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let data = MapData::from_pin(maps.join(name)).map_err(map_failed("open", name))?;
    let map = match name {
        flannel_ebpf::layout::COUNTERS => Map::PerCpuArray(data),
        _ => Map::Array(data),
    };
    map.try_into().map_err(map_failed("open", name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_is_one_that_linux_has() {
        assert!([100, 250, 300, 1000].contains(&ticks_per_second()));
    }

    #[test]
    fn durations_become_ticks_and_never_none() {
        let clock = Clock {
            jiffies: u32::MAX - 5,
            at: Instant::now(),
            per_second: 250,
        };
        assert_eq!(clock.ticks(Duration::from_secs(2)), 500);
        assert_eq!(clock.ticks(Duration::from_micros(1)), 1);
        assert_eq!(clock.duration(500), Duration::from_secs(2));
        assert!(clock.now().wrapping_sub(u32::MAX - 5) < 250);
    }
}
