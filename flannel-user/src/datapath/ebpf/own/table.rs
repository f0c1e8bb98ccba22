//! The table of own connections as the agent works on it.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use flannel_ebpf::{
    layout::{
        CLASSES, COUNTERS, Class, ClassKey, FlowKey, OWN, OwnFlow, RESETS, TRANSLATED, Tally,
    },
    reason::Reason,
};

use super::super::{EbpfError, batch, counters, epoch::pinned, map_failed, syscall::bpf};

/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM`; for hashes since Linux 5.14, as TCP that bypasses is.
const LOOKUP_AND_DELETE: libc::c_long = 21;

/// Handles of their own on the pinned maps.
pub(super) struct OwnTable {
    flows: MapData,
    entries: HashMap<MapData, FlowKey, OwnFlow>,
    translated: HashMap<MapData, ClassKey, u32>,
    class_data: MapData,
    classes: HashMap<MapData, ClassKey, Class>,
    counters: PerCpuArray<MapData, Tally>,
    resets: RingBuf<MapData>,
}

/// `union bpf_attr` of the commands on one element.
#[repr(C)]
struct Attributes {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl OwnTable {
    pub(super) fn open(maps: &Path) -> Result<Self, EbpfError> {
        let open = |name| MapData::from_pin(maps.join(name)).map_err(map_failed("open", name));
        Ok(Self {
            flows: open(OWN)?,
            entries: Map::HashMap(open(OWN)?)
                .try_into()
                .map_err(map_failed("open", OWN))?,
            translated: Map::LruHashMap(open(TRANSLATED)?)
                .try_into()
                .map_err(map_failed("open", TRANSLATED))?,
            class_data: open(CLASSES)?,
            classes: Map::HashMap(open(CLASSES)?)
                .try_into()
                .map_err(map_failed("open", CLASSES))?,
            counters: pinned(maps, COUNTERS)?,
            resets: Map::RingBuf(open(RESETS)?)
                .try_into()
                .map_err(map_failed("open", RESETS))?,
        })
    }

    /// Every entry.
    pub(super) fn scan(&self, mut visit: impl FnMut(&FlowKey, &OwnFlow)) -> io::Result<()> {
        batch::for_each(&self.flows, &mut visit)
    }

    /// Every class.
    pub(super) fn scan_classes(&self, mut visit: impl FnMut(&ClassKey, &Class)) -> io::Result<()> {
        batch::for_each(&self.class_data, &mut visit)
    }

    /// Forgets a class; that it is gone already is fine.
    pub(super) fn delete_class(&mut self, key: &ClassKey) {
        let _ = self.classes.remove(key);
    }

    /// How often that has happened so far.
    pub(super) fn count(&self, reason: Reason) -> u64 {
        counters::total(&self.counters, reason).map_or(0, |tally| tally.packets)
    }

    /// An entry as it is now.
    pub(super) fn get(&self, key: &FlowKey) -> Option<OwnFlow> {
        self.entries.get(key, 0).ok()
    }

    /// Takes an entry out in one step: what it held in the end.
    pub(super) fn take(&self, key: &FlowKey) -> io::Result<Option<OwnFlow>> {
        let mut value = OwnFlow::default();
        let mut attributes = Attributes {
            map: self.flows.fd().as_fd().as_raw_fd().cast_unsigned(),
            _pad: 0,
            key: (&raw const *key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        // SAFETY: key and value are of the sizes that the map was pinned with, and live until the
        // kernel returns.
        match unsafe { bpf(LOOKUP_AND_DELETE, &mut attributes) } {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes one entry; that it is gone already is fine.
    pub(super) fn delete(&mut self, key: &FlowKey) {
        let _ = self.entries.remove(key);
    }

    /// What programs have told since the last call: flows that a RST has ended, as it went.
    pub(super) fn take_resets(&mut self) -> Vec<FlowKey> {
        let mut resets = Vec::new();
        while let Some(item) = self.resets.next() {
            resets.extend(bytemuck::try_pod_read_unaligned::<FlowKey>(&item).ok());
        }
        resets
    }

    /// The kernel chooses the ports of connections of this class.
    pub(super) fn mark_translated(&mut self, class: &ClassKey) -> Result<(), MapError> {
        self.translated.insert(class, 1, 0)
    }
}
