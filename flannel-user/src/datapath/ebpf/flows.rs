//! What was learned: the flow tables as an operator reads them.

use std::{
    collections::{BTreeMap, btree_map::Entry as MapEntry},
    net::Ipv4Addr,
    path::Path as FilePath,
};

use aya::{
    maps::{Array, MapData, MapError},
    util::nr_cpus,
};
use flannel_ebpf::{
    hash, header,
    layout::{
        BYPASS_ANY, BYPASS_TCP, Epoch, FLOWS_IN, FLOWS_OUT, FlowKey, GENERATIONS, InFlow, OutFlow,
        Verdict,
    },
    validity::{self, Now, Standing},
};

use super::{
    EbpfError, batch,
    ends::end,
    epoch::{Clock, pinned},
    map_failed,
};
use crate::observe::flows::{Direction, Ends, Filter, Flow, Path, Protocol, Table, Why};

/// Offset of the outer destination address in an entry's template.
const OUTER_DESTINATION: usize = 30;
/// Most unused entries that the kernel keeps for one CPU of a table of the least recently used.
const MOST_SPARE: u64 = 128;

/// Second handles on the tables that the programs fill.
pub(super) struct FlowTables {
    sent: MapData,
    received: MapData,
    generations: Array<MapData, u32>,
    capacity: u64,
    cpus: u64,
}

/// Both tables at one moment, the two directions of a connection in one flow.
#[derive(Debug, Default)]
pub(super) struct Learned {
    pub(super) table_out: Table,
    pub(super) table_in: Table,
    pub(super) flows: Vec<Flow>,
}

/// One entry, of either table.
struct Entry {
    ends: Ends,
    is_sent: bool,
    verdict: Verdict,
}

impl FlowTables {
    /// Opens the tables of `capacity` flows each that are pinned in `maps`.
    pub(super) fn open(maps: &FilePath, capacity: u32) -> Result<Self, EbpfError> {
        let open = |name: &'static str| {
            MapData::from_pin(maps.join(name)).map_err(map_failed("open", name))
        };
        Ok(Self {
            sent: open(FLOWS_OUT)?,
            received: open(FLOWS_IN)?,
            generations: pinned(maps, GENERATIONS)?,
            capacity: u64::from(capacity),
            cpus: nr_cpus().map_or(1, |cpus| cpus as u64),
        })
    }

    fn table(&self, flows: u64) -> Table {
        Table {
            flows,
            capacity: self.capacity,
            full: is_full(flows, self.capacity, self.cpus),
        }
    }

    /// How full the tables are: out, in.
    pub(super) fn fill(&self) -> Result<(Table, Table), EbpfError> {
        let (mut sent, mut received) = (0, 0);
        batch::for_each(&self.sent, |_: &FlowKey, _: &OutFlow| sent += 1)
            .map_err(unread(FLOWS_OUT))?;
        batch::for_each(&self.received, |_: &FlowKey, _: &InFlow| received += 1)
            .map_err(unread(FLOWS_IN))?;
        Ok((self.table(sent), self.table(received)))
    }

    /// Reads the flows that `filter` takes. `clock` is asked after the tables were read: no entry
    /// is newer than what it tells.
    pub(super) fn read(
        &self,
        filter: &Filter,
        epoch: Epoch,
        clock: impl FnOnce() -> Result<Clock, EbpfError>,
    ) -> Result<Learned, EbpfError> {
        let mut entries = Vec::new();
        let (mut sent, mut received) = (0, 0);
        batch::for_each(&self.sent, |key: &FlowKey, flow: &OutFlow| {
            sent += 1;
            entries.extend(sent_by_pod(key, flow).filter(|entry| filter.takes(&entry.ends)));
        })
        .map_err(unread(FLOWS_OUT))?;
        batch::for_each(&self.received, |key: &FlowKey, flow: &InFlow| {
            received += 1;
            entries.extend(received_by_pod(key, flow).filter(|entry| filter.takes(&entry.ends)));
        })
        .map_err(unread(FLOWS_IN))?;

        let mut generations = BTreeMap::new();
        for entry in &entries {
            for slot in [entry.verdict.pod_slot, entry.verdict.peer_slot] {
                if let MapEntry::Vacant(place) = generations.entry(slot) {
                    let generation = self.generations.get(&u32::from(slot), 0);
                    place.insert(generation.map_err(map_failed("read", GENERATIONS))?);
                }
            }
        }
        let clock = clock()?;
        let jiffies = clock.now();
        let directions = entries.into_iter().map(|entry| {
            let generation = |slot| generations.get(&slot).copied().unwrap_or_default();
            let now = Now {
                jiffies,
                epoch,
                pod: generation(entry.verdict.pod_slot),
                peer: generation(entry.verdict.peer_slot),
            };
            let direction = judged(&entry.verdict, entry.ends.protocol, &now, &clock);
            (entry.ends, entry.is_sent, direction)
        });
        Ok(Learned {
            table_out: self.table(sent),
            table_in: self.table(received),
            flows: joined(directions),
        })
    }
}

fn unread(map: &'static str) -> impl FnOnce(std::io::Error) -> EbpfError {
    move |source| map_failed("read", map)(MapError::IoError(source))
}

/// Does a new entry displace one? Each CPU keeps some unused ones aside, so a table never fills
/// to its last place.
fn is_full(flows: u64, capacity: u64, cpus: u64) -> bool {
    // As the kernel's bpf_lru_list counts.
    let spare = (capacity / cpus.max(1) / 2).clamp(1, MOST_SPARE);
    flows + spare * cpus >= capacity
}

fn protocol(key: &FlowKey) -> Option<Protocol> {
    match key.protocol {
        header::TCP => Some(Protocol::Tcp),
        header::UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// An entry that is not another flow's by half, as programs check it too.
fn is_whole(key: &FlowKey, verdict: &Verdict, tail: u32) -> bool {
    let tag = hash::tag(key);
    verdict.tag == tag && tail == tag
}

fn sent_by_pod(key: &FlowKey, flow: &OutFlow) -> Option<Entry> {
    let verdict = flow.verdict;
    let mut node = [0; 4];
    node.copy_from_slice(&flow.template[OUTER_DESTINATION..OUTER_DESTINATION + 4]);
    let ends = Ends {
        protocol: protocol(key)?,
        pod: end(key.src, key.sport),
        peer: end(key.dst, key.dport),
        wire: end(verdict.far, verdict.far_port),
        node: Ipv4Addr::from(node),
    };
    is_whole(key, &verdict, flow.tag).then_some(Entry {
        ends,
        is_sent: true,
        verdict,
    })
}

fn received_by_pod(key: &FlowKey, flow: &InFlow) -> Option<Entry> {
    let verdict = flow.verdict;
    let ends = Ends {
        protocol: protocol(key)?,
        pod: end(key.dst, key.dport),
        peer: end(verdict.far, verdict.far_port),
        wire: end(key.src, key.sport),
        node: flow.node.into(),
    };
    is_whole(key, &verdict, flow.tag).then_some(Entry {
        ends,
        is_sent: false,
        verdict,
    })
}

/// What the programs would do with the flow's next packet.
fn judged(verdict: &Verdict, protocol: Protocol, now: &Now, clock: &Clock) -> Direction {
    let reason = why_kernel(verdict, protocol, now);
    let since = |then: u32| clock.duration(now.jiffies.wrapping_sub(then)).as_secs_f64();
    Direction {
        path: if reason.is_some() {
            Path::Kernel
        } else {
            Path::Fast
        },
        reason,
        packets: verdict.packets,
        age_seconds: since(verdict.since),
        confirmed_seconds: since(verdict.seen),
    }
}

/// Asks what the programs ask, in their order.
fn why_kernel(verdict: &Verdict, protocol: Protocol, now: &Now) -> Option<Why> {
    if now.epoch.flags & BYPASS_ANY == 0 {
        return Some(Why::Held);
    }
    if protocol == Protocol::Tcp && now.epoch.flags & BYPASS_TCP == 0 {
        return Some(Why::Conntrack);
    }
    match validity::standing(verdict, now) {
        Standing::Good | Standing::Probe => None,
        Standing::Stale => Some(why_stale(verdict, now)),
    }
}

fn why_stale(verdict: &Verdict, now: &Now) -> Why {
    if verdict.pod_generation != now.pod {
        Why::PodChanged
    } else if verdict.peer_generation != now.peer {
        Why::PeerChanged
    } else if now.jiffies.wrapping_sub(verdict.seen) >= now.epoch.validity {
        Why::Stale
    } else {
        Why::OtherGeneration
    }
}

/// One flow of both directions of a connection; where they are translated otherwise, two.
fn joined(directions: impl Iterator<Item = (Ends, bool, Direction)>) -> Vec<Flow> {
    let mut flows: BTreeMap<Ends, Flow> = BTreeMap::new();
    for (ends, is_sent, direction) in directions {
        let flow = flows.entry(ends).or_insert(Flow {
            ends,
            sent: None,
            received: None,
        });
        let place = if is_sent {
            &mut flow.sent
        } else {
            &mut flow.received
        };
        *place = Some(direction);
    }
    flows.into_values().collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytemuck::Zeroable as _;
    use flannel_ebpf::layout::TEMPLATE_LEN;

    use super::*;

    const POD: [u8; 4] = [10, 1, 1, 2];
    const SERVICE: [u8; 4] = [10, 96, 0, 10];
    const SERVER: [u8; 4] = [10, 1, 2, 2];
    const NODE: [u8; 4] = [192, 0, 2, 2];
    const POD_PORT: [u8; 2] = 40000u16.to_be_bytes();
    const SERVICE_PORT: [u8; 2] = 80u16.to_be_bytes();
    const SERVER_PORT: [u8; 2] = 8080u16.to_be_bytes();

    fn verdict(key: &FlowKey, far: [u8; 4], far_port: [u8; 2], packets: u64) -> Verdict {
        Verdict {
            tag: hash::tag(key),
            far,
            far_port,
            packets,
            ..Verdict::default()
        }
    }

    fn request() -> (FlowKey, OutFlow) {
        let key = FlowKey {
            src: POD,
            dst: SERVICE,
            sport: POD_PORT,
            dport: SERVICE_PORT,
            protocol: header::TCP,
            ..FlowKey::default()
        };
        let mut template = [0; TEMPLATE_LEN];
        template[OUTER_DESTINATION..OUTER_DESTINATION + 4].copy_from_slice(&NODE);
        let flow = OutFlow {
            verdict: verdict(&key, SERVER, SERVER_PORT, 3),
            template,
            tag: hash::tag(&key),
            ..OutFlow::zeroed()
        };
        (key, flow)
    }

    fn reply() -> (FlowKey, InFlow) {
        let key = FlowKey {
            src: SERVER,
            dst: POD,
            sport: SERVER_PORT,
            dport: POD_PORT,
            protocol: header::TCP,
            ..FlowKey::default()
        };
        let flow = InFlow {
            verdict: verdict(&key, SERVICE, SERVICE_PORT, 4),
            node: NODE,
            tag: hash::tag(&key),
            ..InFlow::zeroed()
        };
        (key, flow)
    }

    fn now() -> Now {
        Now {
            jiffies: 1000,
            epoch: Epoch {
                flags: BYPASS_ANY | BYPASS_TCP,
                validity: 2000,
                ..Epoch::default()
            },
            pod: 0,
            peer: 0,
        }
    }

    fn direction(entry: &Entry) -> (Ends, bool, Direction) {
        let clock = Clock::new(1000);
        let judged = judged(&entry.verdict, entry.ends.protocol, &now(), &clock);
        (entry.ends, entry.is_sent, judged)
    }

    #[test]
    fn both_directions_of_a_connection_through_a_service_are_one_flow() {
        let (key, flow) = request();
        let sent = sent_by_pod(&key, &flow).expect("whole");
        let (key, flow) = reply();
        let received = received_by_pod(&key, &flow).expect("whole");
        let flows = joined([direction(&sent), direction(&received)].into_iter());
        let [flow] = flows.as_slice() else {
            panic!("one flow, not {flows:?}");
        };
        let ends = Ends {
            protocol: Protocol::Tcp,
            pod: end(POD, POD_PORT),
            peer: end(SERVICE, SERVICE_PORT),
            wire: end(SERVER, SERVER_PORT),
            node: NODE.into(),
        };
        assert_eq!(flow.ends, ends);
        assert!(flow.ends.is_translated());
        let packets = |direction: Option<Direction>| direction.map(|one| one.packets);
        assert_eq!(
            (packets(flow.sent), packets(flow.received)),
            (Some(3), Some(4))
        );
    }

    #[test]
    fn directions_that_are_translated_otherwise_stay_apart() {
        let (key, flow) = request();
        let sent = sent_by_pod(&key, &flow).expect("whole");
        let (key, mut flow) = reply();
        flow.verdict.far = SERVER;
        flow.verdict.far_port = SERVER_PORT;
        let received = received_by_pod(&key, &flow).expect("whole");
        let flows = joined([direction(&sent), direction(&received)].into_iter());
        assert_eq!(flows.len(), 2);
        assert!(
            flows
                .iter()
                .all(|flow| flow.sent.is_some() != flow.received.is_some())
        );
    }

    #[test]
    fn an_entry_that_is_another_flows_by_half_is_left_out() {
        let (key, mut flow) = request();
        flow.tag ^= 2;
        assert!(sent_by_pod(&key, &flow).is_none());
        let (key, mut flow) = reply();
        flow.verdict.tag ^= 2;
        assert!(received_by_pod(&key, &flow).is_none());
    }

    #[test]
    fn the_path_is_what_the_programs_would_decide() {
        let verdict = Verdict::default();
        let with = |change: fn(&mut Now)| {
            let mut now = now();
            change(&mut now);
            now
        };
        let cases = [
            (with(|_| ()), Protocol::Tcp, None),
            (
                with(|now| now.epoch.flags = 0),
                Protocol::Udp,
                Some(Why::Held),
            ),
            (
                with(|now| now.epoch.flags = BYPASS_ANY),
                Protocol::Tcp,
                Some(Why::Conntrack),
            ),
            (
                with(|now| now.epoch.flags = BYPASS_ANY),
                Protocol::Udp,
                None,
            ),
            (
                with(|now| now.pod = 1),
                Protocol::Tcp,
                Some(Why::PodChanged),
            ),
            (
                with(|now| now.peer = 1),
                Protocol::Tcp,
                Some(Why::PeerChanged),
            ),
            (
                with(|now| now.jiffies = 2000),
                Protocol::Tcp,
                Some(Why::Stale),
            ),
            (
                with(|now| now.epoch.generation = 1),
                Protocol::Tcp,
                Some(Why::OtherGeneration),
            ),
            // Within the grace it still holds.
            (
                with(|now| {
                    now.epoch.generation = 1;
                    now.epoch.grace_until = 1001;
                }),
                Protocol::Tcp,
                None,
            ),
        ];
        for (now, protocol, expected) in cases {
            assert_eq!(why_kernel(&verdict, protocol, &now), expected, "{now:?}");
        }
    }

    #[test]
    fn times_count_from_now_across_the_wrap() {
        let clock = Clock::new(100);
        let verdict = Verdict {
            since: 0u32.wrapping_sub(clock.ticks(Duration::from_secs(3))),
            seen: 0,
            ..Verdict::default()
        };
        let now = Now {
            jiffies: clock.ticks(Duration::from_secs(1)),
            ..now()
        };
        let direction = judged(&verdict, Protocol::Udp, &now, &clock);
        assert!((direction.age_seconds - 4.0).abs() < 0.02, "{direction:?}");
        assert!(
            (direction.confirmed_seconds - 1.0).abs() < 0.02,
            "{direction:?}"
        );
    }

    #[test]
    fn a_table_is_full_when_only_spare_entries_are_left() {
        assert!(!is_full(0, 65_536, 2));
        assert!(!is_full(65_536 - 257, 65_536, 2));
        assert!(is_full(65_536 - 256, 65_536, 2));
        // Small tables keep less aside.
        assert!(!is_full(100, 1024, 256));
        assert!(is_full(512, 1024, 256));
    }
}
