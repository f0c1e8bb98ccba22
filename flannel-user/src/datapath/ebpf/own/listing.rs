//! The classes as an operator reads them.

use std::{net::Ipv4Addr, path::Path};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use flannel_ebpf::{
    layout::{
        CLASSES, Class, ClassKey, Epoch, GENERATIONS, RemoteSubnet, TRANSLATED, generation_slot,
    },
    own::{
        self,
        class::{self, Now, Standing},
    },
    reason::Reason,
    sighting::Way,
};

use super::super::{
    EbpfError, batch,
    epoch::{Clock, pinned},
    map_failed,
};
use crate::observe::classes::{ClassRow, Client};

/// Handles of their own on the pinned maps.
pub(in super::super) struct ClassTable {
    classes: MapData,
    translated: HashMap<MapData, ClassKey, u32>,
    generations: Array<MapData, u32>,
}

impl ClassTable {
    pub(in super::super) fn open(maps: &Path) -> Result<Self, EbpfError> {
        let open = |name| MapData::from_pin(maps.join(name)).map_err(map_failed("open", name));
        Ok(Self {
            classes: open(CLASSES)?,
            translated: Map::LruHashMap(open(TRANSLATED)?)
                .try_into()
                .map_err(map_failed("open", TRANSLATED))?,
            generations: pinned(maps, GENERATIONS)?,
        })
    }

    /// Every class that `takes` wants, judged as the programs judge it. `peer` finds who has an
    /// address.
    pub(in super::super) fn read(
        &self,
        takes: impl Fn(&ClassRow) -> bool,
        peer: impl Fn(Ipv4Addr) -> Option<RemoteSubnet>,
        epoch: &Epoch,
        clock: &Clock,
    ) -> Result<Vec<ClassRow>, EbpfError> {
        let mut found = Vec::new();
        let read = batch::for_each(&self.classes, |key: &ClassKey, class: &Class| {
            found.push((*key, *class));
        });
        read.map_err(MapError::IoError)
            .map_err(map_failed("read", CLASSES))?;
        let jiffies = clock.now();
        let generation = |address| {
            let slot = generation_slot(address);
            self.generations.get(&slot, 0).unwrap_or_default()
        };
        let rows = found.into_iter().map(|(key, class)| {
            let node = peer(key.peer.into()).map_or([0; 4], |remote| remote.node);
            let now = Now {
                jiffies,
                pod: generation(key.pod),
                peer: generation(node),
            };
            let is_client = own::opener(key.opener) == Way::Out;
            let reason = if is_client && self.translated.get(&key, 0).is_ok() {
                Some(Reason::OwnTranslated)
            } else {
                match class::standing(&class, epoch, &now, class.dscp) {
                    Ok(Standing::Open) => None,
                    Ok(Standing::Ask) => Some(Reason::OwnProbe),
                    Err(reason) => Some(reason),
                }
            };
            let since = |then: u32| {
                let ticks = jiffies.wrapping_sub(then);
                clock.duration(ticks).as_secs_f64()
            };
            ClassRow {
                pod: key.pod.into(),
                peer: key.peer.into(),
                port: u16::from_be_bytes(key.port),
                client: if is_client { Client::Pod } else { Client::Peer },
                opened: u64::from(class.opened),
                age_seconds: since(class.since),
                asked_seconds: since(class.syn_seen),
                closed: reason.map(|reason| reason.label().to_owned()),
            }
        });
        Ok(rows.filter(takes).collect())
    }
}
