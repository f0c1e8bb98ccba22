//! What the programs themselves cost: time, instructions, memory.

use std::{
    fs,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use aya::{
    maps::MapInfo,
    programs::{ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions},
    sys::{Stats, enable_stats},
};
use flannel_ebpf::layout::{FROM_POD, FROM_UPLINK};
use flannel_user::mac::MacAddr;
use serde::{Deserialize, Serialize};

use super::{
    measure::{PROBES, Target},
    packet,
    probe::{self, Pace},
    stage::Stage,
    stats::Summary,
};
use crate::{
    namespace::Namespace,
    node::{BRIDGE, Node, UPLINK},
    pod::Pod,
    task::Task,
    traffic::request_response::{RrReport, ServeReport},
};

/// One program of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProgramCost {
    /// Name of the side.
    pub side: String,
    /// Name of the program.
    pub program: String,
    /// Instructions after the verifier.
    pub instructions: u32,
    /// Bytes of machine code.
    pub machine_code: u32,
    /// Instructions that the verifier walked through.
    pub verified: u32,
    /// Nanoseconds per run under `tcp_rr`, by the kernel's statistics (their own 20 ns included).
    pub statistics_ns: f64,
    /// Runs that this is the mean of.
    pub statistics_runs: u64,
    /// Nanoseconds of single runs of `BPF_PROG_TEST_RUN`, a fresh packet each, all of
    /// which were forwarded (the kernel's own tens of nanoseconds included). `None`
    /// where the program had not learned the packet's flow and left it to the kernel.
    pub test_run_ns: Option<Summary>,
    /// Memory of its maps.
    pub maps: Vec<MapCost>,
}

/// One map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapCost {
    /// Its name.
    pub map: String,
    /// Entries that it may hold.
    pub entries: u32,
    /// Bytes that the kernel has set aside for it.
    pub bytes: u64,
}

/// Where the agent's pins are unless told otherwise.
const PINS: &str = "/sys/fs/bpf/flannel";
/// Single runs in a batch; the median of each batch is one value.
const SINGLE_RUNS: usize = 2000;
/// Batches.
const BATCHES: usize = 7;
/// `TC_ACT_REDIRECT`: the program forwarded.
const REDIRECT: u32 = 7;
/// Offset of `ifindex` in the kernel's `struct __sk_buff` (include/uapi/linux/bpf.h).
const IFINDEX: usize = 40;

/// Weighs both programs of a side whose agents have some.
///
/// # Errors
/// When the programs cannot be found, or do not forward a packet of the client's.
pub fn weigh(stage: &Stage, pace: Pace) -> Result<Vec<ProgramCost>> {
    let (client, server) = stage.pods().context("this side has no pods")?;
    stage.warm_up()?;
    introduce_flow(client, server)?;
    let out = weigh_one(stage, FROM_POD, client, server, pace)?;
    let back = weigh_one(stage, FROM_UPLINK, client, server, pace)?;
    Ok(vec![out, back])
}

/// Real requests and responses in the flow of the packets made by hand: a fast
/// path that learns has to have seen it.
fn introduce_flow(client: &Pod, server: &Pod) -> Result<()> {
    let (from, to) = packet::PORTS;
    let serve = Task::start(
        server.namespace(),
        &format!("rr-serve --protocol udp --port {to}"),
    )?;
    let asked: RrReport = client
        .tool(&format!(
            "rr --protocol udp --to {} --from-port {from} --seconds 0.2",
            server.at(to)
        ))?
        .result()?;
    let served: ServeReport = serve.finish()?;
    ensure!(
        served.answered == asked.all_transactions,
        "{served:?} of {asked:?}"
    );
    Ok(())
}

fn weigh_one(
    stage: &Stage,
    program: &str,
    client: &Pod,
    server: &Pod,
    pace: Pace,
) -> Result<ProgramCost> {
    // The client's node sends, the server's receives: the packet of one is the other's.
    let sent = outgoing(client, server)?;
    let (node, given, interface) = if program == FROM_POD {
        (client.node(), sent, client.interface())
    } else {
        // Where it is not encapsulated, there is nothing to deliver either: as it is, it
        // is no tunnel packet and stays with the kernel.
        let encapsulated = encapsulate(client, &sent)?.unwrap_or_else(|| sent.clone());
        let mac = server.node().mac(UPLINK)?;
        let arriving = packet::addressed_to(encapsulated, mac.0);
        (server.node(), arriving, UPLINK)
    };
    let pin = pinned(node.namespace(), program)?;
    let index = node.interface_index(interface)?;
    let mut batches = Vec::new();
    for _ in 0..BATCHES {
        let runs = node
            .namespace()
            .within(|| single_runs(&pin, &given, index, SINGLE_RUNS))??;
        // A packet of a flow that nobody has opened or learned stays with the kernel.
        if let Some(runs) = runs {
            batches.push(Summary::of(&runs.nanoseconds).context("no runs")?.median);
        }
    }
    let (statistics_ns, statistics_runs) = under_load(stage, node, &pin, pace)?;
    let info = node.namespace().within(|| ProgramInfo::from_pin(&pin))??;
    Ok(ProgramCost {
        side: stage.side.name.clone(),
        program: program.to_owned(),
        instructions: info.size_translated().unwrap_or_default() / 8,
        machine_code: info.size_jitted(),
        verified: info.verified_instruction_count().unwrap_or_default(),
        statistics_ns,
        statistics_runs,
        test_run_ns: Summary::of(&batches),
        maps: maps(&info)?,
    })
}

/// A datagram of the client's as the host side of its veth receives it.
fn outgoing(client: &Pod, server: &Pod) -> Result<Vec<u8>> {
    let gateway = client.node().mac(BRIDGE)?;
    let own: MacAddr = client
        .namespace()
        .ip("-o link show dev eth0")?
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .context("the pod's eth0 has no MAC address")?
        .parse()?;
    Ok(packet::datagram(
        (own.0, client.address()),
        (gateway.0, server.address()),
        64,
    ))
}

/// What `from_pod` makes of a packet, if it takes it.
fn encapsulate(client: &Pod, given: &[u8]) -> Result<Option<Vec<u8>>> {
    let node = client.node();
    let pin = pinned(node.namespace(), FROM_POD)?;
    let index = node.interface_index(client.interface())?;
    let runs = node
        .namespace()
        .within(|| single_runs(&pin, given, index, 1))??;
    Ok(runs.map(|runs| runs.last_packet))
}

struct Runs {
    nanoseconds: Vec<f64>,
    last_packet: Vec<u8>,
}

/// `None` as soon as the program leaves a packet to the kernel.
fn single_runs(pin: &Path, given: &[u8], interface: u32, count: usize) -> Result<Option<Runs>> {
    let program = SchedClassifier::from_pin(pin)?;
    let mut context = [0; IFINDEX + 4];
    context[IFINDEX..].copy_from_slice(&interface.to_ne_bytes());
    let mut nanoseconds = Vec::with_capacity(count);
    let mut last_packet = vec![0; given.len() + 256];
    for _ in 0..count {
        last_packet.resize(given.len() + 256, 0);
        let result = program.test_run(TestRunOptions {
            data_in: Some(given),
            data_out: Some(&mut last_packet),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        })?;
        if result.return_value != REDIRECT {
            return Ok(None);
        }
        last_packet.truncate(result.data_size_out as usize);
        nanoseconds.push(result.duration.as_nanos() as f64);
    }
    Ok(Some(Runs {
        nanoseconds,
        last_packet,
    }))
}

/// Mean time of a run while requests and responses pass.
fn under_load(stage: &Stage, node: &Node, pin: &Path, pace: Pace) -> Result<(f64, u64)> {
    let info = || {
        let info = node.namespace().within(|| ProgramInfo::from_pin(pin))??;
        Ok::<_, anyhow::Error>((info.run_time().as_nanos() as f64, info.run_count()))
    };
    let statistics = enable_stats(Stats::RunTime).context("cannot switch BPF statistics on")?;
    let before = info()?;
    probe::run(stage, &PROBES[0], Target::Pod, pace)?;
    let after = info()?;
    drop(statistics);
    let runs = after.1 - before.1;
    ensure!(runs > 0, "{} did not run", pin.display());
    Ok(((after.0 - before.0) / runs as f64, runs))
}

fn pinned(namespace: &Namespace, name: &str) -> Result<PathBuf> {
    find_pin(namespace, "programs", name)
}

/// Where the one agent on a node has pinned its map `name`.
///
/// # Errors
/// When there is none.
pub fn pinned_map(namespace: &Namespace, name: &str) -> Result<PathBuf> {
    find_pin(namespace, "maps", name)
}

fn find_pin(namespace: &Namespace, kind: &str, name: &str) -> Result<PathBuf> {
    let found = namespace.within(|| {
        let inside = |path: PathBuf| -> Vec<PathBuf> {
            fs::read_dir(path)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect()
        };
        inside(PINS.into())
            .into_iter()
            .flat_map(inside)
            .map(|layout| layout.join(kind).join(name))
            .find(|path| path.exists())
    })?;
    found.with_context(|| format!("{}: no {name} is pinned", namespace.name()))
}

fn maps(program: &ProgramInfo) -> Result<Vec<MapCost>> {
    let ids = program.map_ids()?.unwrap_or_default();
    let mut maps = ids
        .into_iter()
        .map(|id| {
            let info = MapInfo::from_id(id)?;
            let fd = info.fd()?;
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            Ok(MapCost {
                map: info.name_as_str().unwrap_or("?").to_owned(),
                entries: info.max_entries(),
                bytes: memory(&fs::read_to_string(path)?)
                    .context("the kernel does not tell a map's memory")?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    maps.sort_by(|one, other| one.map.cmp(&other.map));
    Ok(maps)
}

/// `memlock:\t4096` of a map's fdinfo.
fn memory(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))?
        .trim()
        .parse()
        .ok()
}

/// Nanoseconds of `from_pod` for packets to the given destinations, one each, at
/// the sending node as it is now: what a lookup costs that no cache knows.
///
/// # Errors
/// When a packet is not forwarded.
pub fn random_destinations(client: &Pod, given: &[Vec<u8>]) -> Result<Summary> {
    let node = client.node();
    let pin = pinned(node.namespace(), FROM_POD)?;
    let index = node.interface_index(client.interface())?;
    let mut batches = Vec::new();
    for _ in 0..BATCHES {
        let all = node.namespace().within(|| {
            let mut all = Vec::with_capacity(given.len());
            for packet in given {
                let runs = single_runs(&pin, packet, index, 1)?
                    .context("a packet to a peer's subnet was left to the kernel")?;
                all.extend(runs.nanoseconds);
            }
            Ok::<_, anyhow::Error>(all)
        })??;
        batches.push(Summary::of(&all).context("no packets")?.median);
    }
    Summary::of(&batches).context("no batches")
}

/// A datagram of `client` to any address, for [`random_destinations`].
///
/// # Errors
/// When the pod's addresses cannot be read.
pub fn datagrams_to(client: &Pod, server: &Pod, destinations: &[Ipv4Addr]) -> Result<Vec<Vec<u8>>> {
    let like = outgoing(client, server)?;
    Ok(destinations
        .iter()
        .map(|destination| packet::sent_to(&like, *destination))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::memory;

    #[test]
    fn memory_of_a_map() {
        let text = "pos:\t0\nmap_type:\t2\nmemlock:\t4096\nmap_id:\t7\n";
        assert_eq!(memory(text), Some(4096));
        assert_eq!(memory("pos:\t0\n"), None);
    }
}
