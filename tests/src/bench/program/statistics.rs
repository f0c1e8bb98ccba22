//! How often each program runs for a transaction and how long, by the kernel's
//! own statistics while real traffic passes.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};
use serde::{Deserialize, Serialize};

use super::{PROGRAMS, pinned};
use crate::bench::{
    measure::{Probe, Target},
    probe::{self, Pace},
    stage::Stage,
};

/// One program under one kind of traffic, both nodes together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnderLoad {
    /// The measure whose traffic passed.
    pub measure: String,
    /// Where it went: `pod` or `service`.
    pub to: String,
    /// Nanoseconds of a run, the statistics' own 20 or so included.
    pub ns: f64,
    /// Runs that this is the mean of.
    pub runs: u64,
    /// Runs for one transaction.
    pub runs_per_transaction: f64,
}

/// Every program's share of a probe's traffic, by its name. A program that does not
/// run has none.
pub(super) fn under(
    stage: &Stage,
    probe: &Probe,
    target: Target,
    pace: Pace,
) -> Result<BTreeMap<&'static str, UnderLoad>> {
    let statistics = enable_stats(Stats::RunTime).context("cannot switch BPF statistics on")?;
    let before = spent(stage)?;
    let outcome = probe::run(stage, probe, target, pace)?;
    let after = spent(stage)?;
    drop(statistics);
    let transactions = outcome
        .transactions
        .with_context(|| format!("{} has no transactions", probe.name))?;
    Ok(PROGRAMS
        .iter()
        .zip(before.into_iter().zip(after))
        .filter(|(_, ((_, before), (_, after)))| after > before)
        .map(|(name, ((time_before, runs_before), (time, runs)))| {
            let runs = runs - runs_before;
            let load = UnderLoad {
                measure: probe.name.to_owned(),
                to: target.name().to_owned(),
                ns: (time - time_before) / runs as f64,
                runs,
                runs_per_transaction: runs as f64 / transactions as f64,
            };
            (*name, load)
        })
        .collect())
}

/// Nanoseconds and runs of each of [`PROGRAMS`] so far.
fn spent(stage: &Stage) -> Result<Vec<(f64, u64)>> {
    let (a, b) = stage.nodes().context("this side has no nodes")?;
    PROGRAMS
        .iter()
        .map(|name| {
            let (mut time, mut runs) = (0.0, 0);
            for node in [a, b] {
                // What a side has no use for is not pinned.
                let Ok(pin) = pinned(node.namespace(), name) else {
                    continue;
                };
                let info = node.namespace().within(|| ProgramInfo::from_pin(&pin))??;
                time += info.run_time().as_nanos() as f64;
                runs += info.run_count();
            }
            Ok((time, runs))
        })
        .collect()
}
