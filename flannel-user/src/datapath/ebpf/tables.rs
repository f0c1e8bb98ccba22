//! The maps as the agent keeps them: a mirror of each, and the difference to what is wanted.

use std::collections::{BTreeMap, BTreeSet};

use aya::{
    Pod,
    maps::{
        Array, HashMap, IterableMap as _, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
    util::nr_cpus,
};
use flannel_ebpf::{
    layout::{
        COUNTERS, EXCLUDED_PORTS, EXCLUDED_SUBNETS, FLOWS_IN, FLOWS_OUT, FlowKey, IDENT, InFlow,
        LOCAL_PODS, LocalPod, NODE, NodeConfig, OutFlow, PEER_NODES, PORT_WORDS, REMOTE_SUBNETS,
        RemoteSubnet, Tally,
    },
    reason::Reason,
};
use ipnet::Ipv4Net;
use tracing::debug;

use super::{EbpfError, batch, counters, epoch::Generation, map_failed, object::Programs};
use crate::datapath::{exclusion::Exclusions, remotes::Remotes};

/// From so many new entries on they are written in batches.
const MANY: usize = 32;

/// Addresses in network order, as map keys.
pub type Addresses<V> = BTreeMap<[u8; 4], V>;

/// A map with keys that can be listed, written and removed one by one.
trait Keyed<K, V> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError>;
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    /// Writes many at once, as far as this kernel can.
    fn put_all(&mut self, entries: &[(K, V)]) -> std::io::Result<()>;
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
}

impl<V: Pod> Keyed<[u8; 4], V> for HashMap<MapData, [u8; 4], V> {
    fn entries(&self) -> Result<Addresses<V>, MapError> {
        self.iter().collect()
    }
    fn put(&mut self, key: &[u8; 4], value: &V) -> Result<(), MapError> {
        self.insert(key, value, 0)
    }
    fn put_all(&mut self, entries: &[([u8; 4], V)]) -> std::io::Result<()> {
        let (keys, values): (Vec<_>, Vec<_>) = entries.iter().copied().unzip();
        batch::update(self.map(), &keys, &values)
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
    fn put_all(&mut self, entries: &[(Ipv4Net, V)]) -> std::io::Result<()> {
        let keys: Vec<_> = entries.iter().map(|(key, _)| trie_key(key)).collect();
        let values: Vec<V> = entries.iter().map(|(_, value)| *value).collect();
        batch::update(self.map(), &keys, &values)
    }
    fn delete(&mut self, key: &Ipv4Net) -> Result<(), MapError> {
        self.remove(&trie_key(key))
    }
}

impl<M, V> Mirror<M, Ipv4Net, V> {
    /// Is there a new subnet inside one that is there? Only those of `keys` are looked at, if given.
    fn splits(&self, wanted: &BTreeMap<Ipv4Net, V>, keys: Option<&BTreeSet<Ipv4Net>>) -> bool {
        let splits_one = |subnet: &Ipv4Net| {
            let mut wider = std::iter::successors(subnet.supernet(), Ipv4Net::supernet);
            !self.held.contains_key(subnet) && wider.any(|wider| self.held.contains_key(&wider))
        };
        if self.held.is_empty() {
            return false;
        }
        match keys {
            None => wanted.keys().any(splits_one),
            Some(keys) => keys
                .iter()
                .any(|key| wanted.contains_key(key) && splits_one(key)),
        }
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
        let held = map.entries().map_err(map_failed("list", name))?;
        Ok(Self { name, map, held })
    }

    /// Entries that will go or be replaced; only those of `keys` are looked at, if given.
    fn changed(&self, wanted: &BTreeMap<K, V>, keys: Option<&BTreeSet<K>>) -> Vec<(K, V)> {
        let differs = |(key, held): &(&K, &V)| wanted.get(*key) != Some(*held);
        let owned = |(key, held): (&K, &V)| (key.clone(), held.clone());
        match keys {
            None => self.held.iter().filter(differs).map(owned).collect(),
            Some(keys) => keys
                .iter()
                .filter_map(|key| self.held.get_key_value(key))
                .filter(differs)
                .map(owned)
                .collect(),
        }
    }

    /// Writes every entry that is new or different; only those of `keys`, if given.
    fn add(
        &mut self,
        wanted: &BTreeMap<K, V>,
        keys: Option<&BTreeSet<K>>,
    ) -> Result<(), EbpfError> {
        let differs = |(key, value): &(&K, &V)| self.held.get(*key) != Some(*value);
        let owned = |(key, value): (&K, &V)| (key.clone(), value.clone());
        let news: Vec<(K, V)> = match keys {
            None => wanted.iter().filter(differs).map(owned).collect(),
            Some(keys) => keys
                .iter()
                .filter_map(|key| wanted.get_key_value(key))
                .filter(differs)
                .map(owned)
                .collect(),
        };
        // Not every kernel takes batches for every kind of map.
        let is_done = news.len() >= MANY
            && self
                .map
                .put_all(&news)
                .inspect_err(|error| debug!(map = self.name, %error, "no batch: one by one"))
                .is_ok();
        for (key, value) in news {
            if !is_done {
                self.map
                    .put(&key, &value)
                    .map_err(map_failed("write", self.name))?;
            }
            self.held.insert(key, value);
        }
        Ok(())
    }

    /// Removes every entry that is not wanted; only those of `keys`, if given.
    fn trim(
        &mut self,
        wanted: &BTreeMap<K, V>,
        keys: Option<&BTreeSet<K>>,
    ) -> Result<(), EbpfError> {
        let is_stale = |key: &&K| !wanted.contains_key(*key);
        let stale: Vec<K> = match keys {
            None => self.held.keys().filter(is_stale).cloned().collect(),
            Some(keys) => keys
                .iter()
                .filter(|key| self.held.contains_key(*key))
                .filter(is_stale)
                .cloned()
                .collect(),
        };
        for key in stale {
            absent(self.map.delete(&key)).map_err(map_failed("remove from", self.name))?;
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
    excluded_subnets: Mirror<LpmTrie<MapData, [u8; 4], u32>, Ipv4Net, u32>,
    excluded_ports: Array<MapData, u64>,
    /// What the array holds.
    ports: Vec<u64>,
    written_exclusions: Option<Exclusions>,
    flows_out: HashMap<MapData, FlowKey, OutFlow>,
    flows_in: HashMap<MapData, FlowKey, InFlow>,
}

impl MapTables {
    /// Takes the maps out of the object and reads what they hold.
    pub(super) fn open(programs: &mut Programs) -> Result<Self, EbpfError> {
        macro_rules! map {
            ($name:expr) => {
                programs
                    .take_map($name)?
                    .try_into()
                    .map_err(map_failed("use", $name))?
            };
        }
        spread_idents(map!(IDENT))?;
        let excluded_ports: Array<MapData, u64> = map!(EXCLUDED_PORTS);
        Ok(Self {
            excluded_subnets: Mirror::open(EXCLUDED_SUBNETS, map!(EXCLUDED_SUBNETS))?,
            ports: port_words(&excluded_ports)?,
            excluded_ports,
            written_exclusions: None,
            flows_out: map!(FLOWS_OUT),
            flows_in: map!(FLOWS_IN),
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
        remotes: &Remotes,
        pods: &Addresses<LocalPod>,
        generation: &Generation,
    ) -> Result<(), EbpfError> {
        let touched = remotes.touched();
        let (subnets, nodes) = (remotes.subnets(), remotes.nodes());
        let changed_pods = self.pods.changed(pods, None);
        let changed_peers = self.remotes.changed(subnets, touched.subnets());
        let has_split = self.remotes.splits(subnets, touched.subnets());
        self.peers.add(nodes, touched.nodes())?;
        self.remotes.add(subnets, touched.subnets())?;
        self.pods.add(pods, None)?;
        if self.written_node.as_ref() != Some(node) {
            self.node
                .set(0, node, 0)
                .map_err(map_failed("write", NODE))?;
            self.written_node = Some(*node);
            generation.raise();
        }
        self.remotes.trim(subnets, touched.subnets())?;
        self.pods.trim(pods, None)?;
        self.peers.trim(nodes, touched.nodes())?;
        // Last, so that nothing learned meanwhile rests on what was there before.
        for (address, _) in changed_pods {
            generation.raise_for(address);
        }
        for (_, remote) in changed_peers {
            generation.raise_for(remote.node);
        }
        // What went to the peer of the wider subnet may go to another one now.
        if has_split {
            generation.raise();
        }
        Ok(())
    }

    /// Makes the programs leave these to the kernel. Where that changes anything all flows are
    /// forgotten: a verdict that was learned before would hold on.
    pub(super) fn exclude(&mut self, exclusions: &Exclusions) -> Result<(), EbpfError> {
        if self.written_exclusions.as_ref() == Some(exclusions) {
            return Ok(());
        }
        let subnets: BTreeMap<Ipv4Net, u32> = exclusions
            .subnets
            .iter()
            .map(|subnet| (*subnet, 1))
            .collect();
        let mut ports = vec![0_u64; PORT_WORDS as usize];
        for port in &exclusions.ports {
            ports[usize::from(port >> 6)] |= 1 << (port & 63);
        }
        // An agent before us may have left just that.
        if self.excluded_subnets.held != subnets || self.ports != ports {
            self.excluded_subnets.add(&subnets, None)?;
            self.excluded_subnets.trim(&subnets, None)?;
            for (index, word) in (0_u32..).zip(&ports) {
                self.excluded_ports
                    .set(index, word, 0)
                    .map_err(map_failed("write", EXCLUDED_PORTS))?;
            }
            self.ports = ports;
            forget(FLOWS_OUT, self.flows_out.map())?;
            forget(FLOWS_IN, self.flows_in.map())?;
        }
        self.written_exclusions = Some(exclusions.clone());
        Ok(())
    }

    /// Who has an address.
    pub(super) fn remote(&self, address: std::net::Ipv4Addr) -> Option<RemoteSubnet> {
        let key = Key::new(32, address.octets());
        self.remotes.map.get(&key, 0).ok()
    }

    /// Every counter starts at 0 again.
    pub(super) fn reset_counters(&mut self) -> Result<(), EbpfError> {
        let cpus = self.counters.get(&0, 0);
        let cpus = cpus.map_err(map_failed("read", COUNTERS))?.len();
        for reason in Reason::ALL {
            let zeros = PerCpuValues::try_from(vec![Tally::default(); cpus]);
            zeros
                .map_err(MapError::IoError)
                .and_then(|zeros| self.counters.set(reason.index(), zeros, 0))
                .map_err(map_failed("write", COUNTERS))?;
        }
        Ok(())
    }

    /// Every outcome, summed over all CPUs.
    pub(super) fn counters(&self) -> Result<Vec<(Reason, Tally)>, EbpfError> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let tally = counters::total(&self.counters, *reason);
                Ok((*reason, tally.map_err(map_failed("read", COUNTERS))?))
            })
            .collect()
    }
}

/// Reads the whole array.
fn port_words(ports: &Array<MapData, u64>) -> Result<Vec<u64>, EbpfError> {
    let mut words = vec![0; PORT_WORDS as usize];
    batch::for_each(ports.map(), |index: &u32, word: &u64| {
        words[*index as usize] = *word;
    })
    .map_err(MapError::IoError)
    .map_err(map_failed("read", EXCLUDED_PORTS))?;
    Ok(words)
}

/// Empties a table of what was learned; its flows take the stack and are learned again.
pub(super) fn forget(name: &'static str, learned: &MapData) -> Result<(), EbpfError> {
    batch::empty(learned)
        .map_err(MapError::IoError)
        .map_err(map_failed("empty", name))
}

/// What came of a removal: that the entry is gone already is fine.
fn absent(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Gives each CPU its own stretch of outer IP identifications, so that two of
/// them seldom use the same one at the same time. Running counters stay.
fn spread_idents(mut idents: PerCpuArray<MapData, u32>) -> Result<(), EbpfError> {
    let running = idents.get(&0, 0).map_err(map_failed("read", IDENT))?;
    if running.iter().any(|ident| *ident != 0) {
        return Ok(());
    }
    let cpus = nr_cpus().map_or(running.len(), |cpus| cpus).max(1);
    let stretch = (1 << 16) / cpus as u32;
    let starts: Vec<u32> = (0..running.len() as u32).map(|cpu| cpu * stretch).collect();
    let values = PerCpuValues::try_from(starts)
        .map_err(MapError::IoError)
        .map_err(map_failed("write", IDENT))?;
    idents.set(0, values, 0).map_err(map_failed("write", IDENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnets(names: &[&str]) -> BTreeMap<Ipv4Net, ()> {
        let names = names.iter();
        names
            .map(|name| (name.parse().expect("a subnet"), ()))
            .collect()
    }

    #[test]
    fn a_subnet_splits_the_wider_one_that_is_there() {
        let mirror = |held: &[&str]| Mirror {
            name: "a map",
            map: (),
            held: subnets(held),
        };
        let splits = |held: &[&str], wanted: &[&str], keys: Option<&[&str]>| {
            let keys = keys.map(|keys| subnets(keys).into_keys().collect());
            mirror(held).splits(&subnets(wanted), keys.as_ref())
        };
        let wide = "10.244.0.0/22";
        assert!(splits(&[wide], &[wide, "10.244.1.0/24"], None));
        assert!(splits(
            &[wide],
            &[wide, "10.244.1.0/24"],
            Some(&["10.244.1.0/24"])
        ));
        // Beside it, there already, gone, around it, or the first of all.
        assert!(!splits(&[wide], &[wide, "10.244.4.0/24"], None));
        let both = [wide, "10.244.1.0/24"];
        assert!(!splits(&both, &both, None));
        assert!(!splits(&both, &[wide], Some(&["10.244.1.0/24"])));
        assert!(!splits(&["10.244.1.0/24"], &both, None));
        assert!(!splits(&[], &both, None));
    }
}
