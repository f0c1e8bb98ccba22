//! The sides in turn, round by round: a machine whose speed drifts drifts for
//! all of them.

use std::time::Instant;

use anyhow::Result;

use super::{
    measure::{Probe, Target, Traffic},
    probe::{self, Outcome, Pace},
    results::{Distribution, Series, distribution},
    stage::Stage,
    stats::{Summary, ratio},
    turns,
};
use crate::traffic::latency::Latency;

/// What all rounds of all probes gave.
#[derive(Debug, Default)]
pub struct Measured {
    /// Every round's figures.
    pub series: Vec<Series>,
    /// Distributions of latencies.
    pub distributions: Vec<Distribution>,
}

struct Cell<'a> {
    stage: &'a Stage,
    target: Target,
    figures: Vec<Vec<f64>>,
    latencies: Vec<Latency>,
}

/// Runs a probe on every stage that it applies to.
///
/// # Errors
/// When a measurement fails or took a wrong path.
pub fn measure(
    stages: &[Stage],
    probe: &Probe,
    targets: &[Target],
    rounds: usize,
    pace: Pace,
    all: &mut Measured,
) -> Result<()> {
    let start = Instant::now();
    for stage in stages {
        stage.set_offloads(probe.offloads)?;
    }
    for target in targets {
        let mut cells: Vec<Cell<'_>> = stages
            .iter()
            .filter(|stage| stage.side.way(*target).is_some())
            .filter(|stage| stage.side.is_concerned_by(probe.traffic))
            .map(|stage| Cell {
                stage,
                target: *target,
                figures: vec![Vec::new(); probe.traffic.figures().len()],
                latencies: Vec::new(),
            })
            .collect();
        for round in 0..rounds {
            for (index, outcome) in self::round(&cells, probe, *target, round, pace)? {
                let cell = &mut cells[index];
                for (series, value) in cell.figures.iter_mut().zip(outcome.figures) {
                    series.push(value);
                }
                cell.latencies.extend(outcome.latency);
            }
        }
        tell(probe, *target, &cells, start);
        for cell in cells {
            let side = &cell.stage.side.name;
            for (figure, values) in probe.traffic.figures().iter().zip(cell.figures) {
                all.series.push(Series {
                    measure: format!("{}{}", probe.name, figure.suffix),
                    figure: *figure,
                    side: side.clone(),
                    target: cell.target,
                    values,
                });
            }
            all.distributions
                .extend(distribution(probe, side, cell.target, &cell.latencies));
        }
    }
    Ok(())
}

/// One round: what came of it in each cell.
fn round(
    cells: &[Cell<'_>],
    probe: &Probe,
    target: Target,
    round: usize,
    pace: Pace,
) -> Result<Vec<(usize, Outcome)>> {
    if let Traffic::Asked(asked) = probe.traffic {
        let stages: Vec<&Stage> = cells.iter().map(|cell| cell.stage).collect();
        let outcomes = turns::all(&stages, probe, asked, target, pace)?;
        return Ok(outcomes.into_iter().enumerate().collect());
    }
    order(cells.len(), round)
        .map(|index| {
            let outcome = probe::run(cells[index].stage, probe, target, pace)?;
            Ok((index, outcome))
        })
        .collect()
}

/// Each round begins with another side: none is always the one after the slowest.
pub(super) fn order(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |index| (index + round) % count)
}

/// A line as soon as a probe is done.
fn tell(probe: &Probe, target: Target, cells: &[Cell<'_>], start: Instant) {
    let base = cells
        .iter()
        .find(|cell| cell.stage.side.name == super::side::NETLINK);
    let figures: Vec<String> = cells
        .iter()
        .filter_map(|cell| {
            let own = Summary::of(&cell.figures[0])?;
            let ratio = base
                .and_then(|base| ratio(&cell.figures[0], &base.figures[0]))
                .map_or(String::new(), |ratio| format!(" ({:.2})", ratio.median));
            let digits = if own.median < 100.0 { 2 } else { 0 };
            Some(format!(
                "{} {:.digits$}{ratio}",
                cell.stage.side.name, own.median
            ))
        })
        .collect();
    if !figures.is_empty() {
        println!(
            "{:<17} {:<8} {:>6.1} s  {}",
            probe.name,
            target.name(),
            start.elapsed().as_secs_f64(),
            figures.join("  ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn every_side_once_a_round_and_each_first_in_turn() {
        for round in 0..6 {
            let mut all: Vec<usize> = order(3, round).collect();
            assert_eq!(all[0], round % 3);
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2]);
        }
        assert_eq!(order(0, 1).count(), 0);
    }
}
