//! What the programs themselves cost: time, instructions, memory.

mod memory;
mod single;
mod statistics;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramInfo;
use flannel_ebpf::layout::{FROM_POD, FROM_TUNNEL, FROM_UPLINK, TO_POD, TO_UPLINK};
use serde::{Deserialize, Serialize};

pub use self::{
    memory::MapCost,
    single::{openings_to, random_destinations},
    statistics::UnderLoad,
};
use super::{
    measure::{PROBES, Target},
    probe::Pace,
    stage::Stage,
    stats::Summary,
};
use crate::namespace::Namespace;

/// All of them, in the order in which a packet meets them.
const PROGRAMS: [&str; 5] = [FROM_POD, TO_UPLINK, FROM_UPLINK, FROM_TUNNEL, TO_POD];
/// The ones that forward: they can be run by themselves.
const FORWARDING: [&str; 2] = [FROM_POD, FROM_UPLINK];
/// Under whose traffic they are watched, in the order of the table's columns.
pub const LOADS: [(&str, Target); 4] = [
    ("tcp_rr", Target::Pod),
    ("tcp_crr", Target::Pod),
    ("tcp_crr", Target::Service),
    ("first_packet", Target::Pod),
];

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
    /// Under traffic, by the kernel's statistics; nothing where it did not run.
    pub under_load: Vec<UnderLoad>,
    /// Nanoseconds of single runs of `BPF_PROG_TEST_RUN`, a fresh packet each, all of
    /// which were forwarded (the kernel's own tens of nanoseconds included). `None`
    /// for programs that only watch.
    pub test_run_ns: Option<Summary>,
    /// Memory of its maps.
    pub maps: Vec<MapCost>,
}

/// Where the agent's pins are unless told otherwise.
const PINS: &str = "/sys/fs/bpf/flannel";

/// Weighs the programs of a side whose agents have some; those that never run there
/// are left out.
///
/// # Errors
/// When the programs cannot be found, or do not forward a packet of the client's.
pub fn weigh(stage: &Stage, pace: Pace) -> Result<Vec<ProgramCost>> {
    let (client, server) = stage.pods().context("this side has no pods")?;
    stage.warm_up()?;
    let loads = LOADS
        .iter()
        .map(|(name, target)| {
            let probe = PROBES.iter().find(|probe| probe.name == *name);
            let probe = probe.with_context(|| format!("no measure {name}"))?;
            statistics::under(stage, probe, *target, pace)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut costs = Vec::new();
    for name in PROGRAMS {
        let under_load: Vec<UnderLoad> = loads
            .iter()
            .filter_map(|load| load.get(name).cloned())
            .collect();
        ensure!(
            !under_load.is_empty() || !FORWARDING.contains(&name),
            "{name} did not run on side {}",
            stage.side.name
        );
        if under_load.is_empty() {
            continue;
        }
        let node = client.node().namespace();
        let pin = pinned(node, name)?;
        let info = node.within(|| ProgramInfo::from_pin(&pin))??;
        let test_run_ns = if FORWARDING.contains(&name) {
            Some(single::weigh(name, client, server)?)
        } else {
            None
        };
        costs.push(ProgramCost {
            side: stage.side.name.clone(),
            program: name.to_owned(),
            instructions: info.size_translated().unwrap_or_default() / 8,
            machine_code: info.size_jitted(),
            verified: info.verified_instruction_count().unwrap_or_default(),
            under_load,
            test_run_ns,
            maps: memory::maps(&info)?,
        });
    }
    Ok(costs)
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
