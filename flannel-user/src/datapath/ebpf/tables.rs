//! The maps as the agent keeps them: a mirror of each, and the difference to what is wanted.

use std::collections::BTreeMap;

use aya::{
    Pod,
    maps::{
        Array, HashMap, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
    util::nr_cpus,
};
use flannel_ebpf::{
    layout::{
        COUNTERS, IDENT, LOCAL_PODS, LocalPod, NODE, NodeConfig, PEER_NODES, REMOTE_SUBNETS,
        RemoteSubnet, Tally,
    },
    reason::Reason,
};
use ipnet::Ipv4Net;

use super::{EbpfError, epoch::Generation, object::Programs};

/// Addresses in network order, as map keys.
pub type Addresses<V> = BTreeMap<[u8; 4], V>;

/// A map with keys that can be listed, written and removed one by one.
trait Keyed<K, V> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError>;
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
}

impl<V: Pod> Keyed<[u8; 4], V> for HashMap<MapData, [u8; 4], V> {
    fn entries(&self) -> Result<Addresses<V>, MapError> {
        self.iter().collect()
    }
    fn put(&mut self, key: &[u8; 4], value: &V) -> Result<(), MapError> {
        self.insert(key, value, 0)
    }
    fn delete(&mut self, key: &[u8; 4]) -> Result<(), MapError> {
        self.remove(key)
    }
}

impl<V: Pod> Keyed<Ipv4Net, V> for LpmTrie<MapData, [u8; 4], V> {
    fn entries(&self) -> Result<BTreeMap<Ipv4Net, V>, MapError> {
        let mut entries = BTreeMap::new();
        for entry in self.iter() {
            let (key, value) = entry?;
            let prefix = u8::try_from(key.prefix_len()).unwrap_or(32).min(32);
            entries.insert(Ipv4Net::new_assert(key.data().into(), prefix), value);
        }
        Ok(entries)
    }
    fn put(&mut self, key: &Ipv4Net, value: &V) -> Result<(), MapError> {
        self.insert(&trie_key(key), value, 0)
    }
    fn delete(&mut self, key: &Ipv4Net) -> Result<(), MapError> {
        self.remove(&trie_key(key))
    }
}

fn trie_key(subnet: &Ipv4Net) -> Key<[u8; 4]> {
    Key::new(u32::from(subnet.prefix_len()), subnet.network().octets())
}

/// One map with what it holds. Only this agent writes it.
struct Mirror<M, K, V> {
    name: &'static str,
    map: M,
    held: BTreeMap<K, V>,
}

impl<M: Keyed<K, V>, K: Ord + Clone, V: PartialEq + Clone> Mirror<M, K, V> {
    fn open(name: &'static str, map: M) -> Result<Self, EbpfError> {
        let held = map.entries().map_err(|source| EbpfError::Map {
            action: "list",
            map: name,
            source,
        })?;
        Ok(Self { name, map, held })
    }

    /// Keys whose entry will go or be another.
    fn changes(&self, wanted: &BTreeMap<K, V>) -> Vec<K> {
        self.held
            .iter()
            .filter(|(key, held)| wanted.get(*key) != Some(*held))
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Values that will go or be replaced.
    fn changed_values(&self, wanted: &BTreeMap<K, V>) -> Vec<V> {
        self.held
            .iter()
            .filter(|(key, held)| wanted.get(*key) != Some(*held))
            .map(|(_, held)| held.clone())
            .collect()
    }

    /// Writes every entry that is new or different.
    fn add(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), EbpfError> {
        for (key, value) in wanted {
            if self.held.get(key) != Some(value) {
                self.map.put(key, value).map_err(|source| EbpfError::Map {
                    action: "write",
                    map: self.name,
                    source,
                })?;
                self.held.insert(key.clone(), value.clone());
            }
        }
        Ok(())
    }

    /// Removes every entry that is not wanted.
    fn trim(&mut self, wanted: &BTreeMap<K, V>) -> Result<(), EbpfError> {
        let stale: Vec<K> = self
            .held
            .keys()
            .filter(|key| !wanted.contains_key(*key))
            .cloned()
            .collect();
        for key in stale {
            match self.map.delete(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(EbpfError::Map {
                        action: "remove from",
                        map: self.name,
                        source,
                    });
                }
            }
            self.held.remove(&key);
        }
        Ok(())
    }
}

/// All maps that the agent fills, and the counters it reads.
pub(super) struct MapTables {
    node: Array<MapData, NodeConfig>,
    written_node: Option<NodeConfig>,
    remotes: Mirror<LpmTrie<MapData, [u8; 4], RemoteSubnet>, Ipv4Net, RemoteSubnet>,
    pods: Mirror<HashMap<MapData, [u8; 4], LocalPod>, [u8; 4], LocalPod>,
    peers: Mirror<HashMap<MapData, [u8; 4], u32>, [u8; 4], u32>,
    counters: PerCpuArray<MapData, Tally>,
}

impl MapTables {
    /// Takes the maps out of the object and reads what they hold.
    pub(super) fn open(programs: &mut Programs) -> Result<Self, EbpfError> {
        macro_rules! map {
            ($name:expr) => {
                programs
                    .take_map($name)?
                    .try_into()
                    .map_err(|source| EbpfError::Map {
                        action: "use",
                        map: $name,
                        source,
                    })?
            };
        }
        spread_idents(map!(IDENT))?;
        Ok(Self {
            node: map!(NODE),
            written_node: None,
            remotes: Mirror::open(REMOTE_SUBNETS, map!(REMOTE_SUBNETS))?,
            pods: Mirror::open(LOCAL_PODS, map!(LOCAL_PODS))?,
            peers: Mirror::open(PEER_NODES, map!(PEER_NODES))?,
            counters: map!(COUNTERS),
        })
    }

    /// Makes the maps hold exactly this. New entries come first and stale ones
    /// go last, so a packet in between finds the old or the new, never nothing.
    pub(super) fn fill(
        &mut self,
        node: &NodeConfig,
        remotes: &BTreeMap<Ipv4Net, RemoteSubnet>,
        pods: &Addresses<LocalPod>,
        generation: &Generation,
    ) -> Result<(), EbpfError> {
        let changed_pods = self.pods.changes(pods);
        let changed_peers = self.remotes.changed_values(remotes);
        let peers: Addresses<u32> = remotes.values().map(|remote| (remote.node, 1)).collect();
        self.peers.add(&peers)?;
        self.remotes.add(remotes)?;
        self.pods.add(pods)?;
        if self.written_node.as_ref() != Some(node) {
            self.node.set(0, node, 0).map_err(|source| EbpfError::Map {
                action: "write",
                map: NODE,
                source,
            })?;
            self.written_node = Some(*node);
            generation.raise();
        }
        self.remotes.trim(remotes)?;
        self.pods.trim(pods)?;
        self.peers.trim(&peers)?;
        // Last, so that nothing learned meanwhile rests on what was there before.
        for address in changed_pods {
            generation.raise_for(address);
        }
        for remote in changed_peers {
            generation.raise_for(remote.node);
        }
        Ok(())
    }

    /// Every outcome, summed over all CPUs.
    pub(super) fn counters(&self) -> Result<Vec<(Reason, Tally)>, EbpfError> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let per_cpu =
                    self.counters
                        .get(&reason.index(), 0)
                        .map_err(|source| EbpfError::Map {
                            action: "read",
                            map: COUNTERS,
                            source,
                        })?;
                let sum = per_cpu.iter().fold(Tally::default(), |sum, tally| Tally {
                    packets: sum.packets + tally.packets,
                    bytes: sum.bytes + tally.bytes,
                });
                Ok((*reason, sum))
            })
            .collect()
    }
}

/// Gives each CPU its own stretch of outer IP identifications, so that two of
/// them seldom use the same one at the same time. Running counters stay.
fn spread_idents(mut idents: PerCpuArray<MapData, u32>) -> Result<(), EbpfError> {
    let failed = |action| {
        move |source| EbpfError::Map {
            action,
            map: IDENT,
            source,
        }
    };
    let running = idents.get(&0, 0).map_err(failed("read"))?;
    if running.iter().any(|ident| *ident != 0) {
        return Ok(());
    }
    let cpus = nr_cpus().map_or(running.len(), |cpus| cpus).max(1);
    let stretch = (1 << 16) / cpus as u32;
    let starts: Vec<u32> = (0..running.len() as u32).map(|cpu| cpu * stretch).collect();
    let values = PerCpuValues::try_from(starts).map_err(|error| EbpfError::Map {
        action: "write",
        map: IDENT,
        source: MapError::IoError(error),
    })?;
    idents.set(0, values, 0).map_err(failed("write"))
}
