//! What grows with the cluster, and how fast.

mod agent;
mod conntrack_room;
pub mod leases;
mod packets;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use self::conntrack_room::Room;
use super::{
    machine,
    probe::Pace,
    select::{Part, Selection},
    side::{DIRECT, FLOWS, NETLINK, Side},
    stats::Summary,
};

/// One measure over a growing number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// What is measured.
    pub measure: String,
    /// Name of the side, or of the lease source.
    pub side: String,
    /// Of the values.
    pub unit: String,
    /// What grows.
    pub over: String,
    /// In order of `x`.
    pub points: Vec<Point>,
}

/// One point of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// How many.
    pub x: u64,
    /// The value there.
    pub y: Summary,
}

/// Points on their way to being curves.
#[derive(Debug)]
struct Points {
    over: &'static str,
    curves: Vec<Curve>,
}

impl Points {
    const fn over(over: &'static str) -> Self {
        Self {
            over,
            curves: Vec::new(),
        }
    }

    fn add(&mut self, measure: &str, side: &str, unit: &str, x: u32, values: &[f64]) -> Result<()> {
        let y = Summary::of(values).with_context(|| format!("{measure}: nothing measured"))?;
        self.add_summary(measure, side, unit, x, y);
        Ok(())
    }

    fn add_summary(&mut self, measure: &str, side: &str, unit: &str, x: u32, y: Summary) {
        println!(
            "{measure:<32} {side:<10} at {x:>7} {}: {:.2} {unit} ({:.2} … {:.2})",
            self.over, y.median, y.min, y.max
        );
        let point = Point { x: x.into(), y };
        let known = self
            .curves
            .iter_mut()
            .find(|curve| curve.measure == measure && curve.side == side);
        match known {
            Some(curve) => curve.points.push(point),
            None => self.curves.push(Curve {
                measure: measure.to_owned(),
                side: side.to_owned(),
                unit: unit.to_owned(),
                over: self.over.to_owned(),
                points: vec![point],
            }),
        }
    }

    fn curves(self) -> Vec<Curve> {
        self.curves
    }
}

/// All that is selected; `quick` with small numbers only.
///
/// # Errors
/// When an agent does not get there, or packets take another path.
pub fn measure(
    sides: &[Side],
    selection: &Selection,
    quick: bool,
    pace: Pace,
) -> Result<Vec<Curve>> {
    let cluster: &[u32] = if quick {
        &[10, 1000]
    } else {
        &[10, 1000, 10_000]
    };
    let subnets: &[u32] = if quick {
        &[10, 1000]
    } else {
        &[10, 100, 1000, 10_000, 100_000]
    };
    let flows: &[u32] = if quick {
        &[1000]
    } else {
        &[1000, 10_000, 100_000, 1_000_000]
    };
    let chosen: Vec<&Side> = sides
        .iter()
        .filter(|side| selection.side(&side.name))
        .filter(|side| side.name == NETLINK || side.has_programs())
        // Long flows, to which classes are nothing.
        .filter(|side| side.name != FLOWS)
        .collect();
    let mut curves = Vec::new();
    if selection.part(Part::GrowthOfAgent) {
        curves.extend(agent::measure(cluster)?);
    }
    if selection.part(Part::GrowthOfFlows) {
        let room = Room::make(flows.iter().copied().max().unwrap_or_default())?;
        // UDP, which `direct` learns as `learned` does.
        let chosen: Vec<&Side> = chosen
            .iter()
            .filter(|side| side.name != DIRECT)
            .copied()
            .collect();
        let flows = bearable(flows, &room, chosen.len())?;
        curves.extend(packets::flows(&chosen, &flows, room.flows, pace)?);
    }
    // Last: Linux takes minutes to clear namespaces with that many routes, and lets nobody make a new
    // one meanwhile.
    if selection.part(Part::GrowthOfSubnets) {
        curves.extend(packets::subnets(&chosen, subnets, pace)?);
    }
    Ok(curves)
}

/// Those that conntrack and this machine's memory have room for.
fn bearable(flows: &[u32], room: &Room, stages: usize) -> Result<Vec<u32>> {
    let memory = machine::memory("MemAvailable")?.context("no MemAvailable in /proc/meminfo")?;
    let by_memory = conntrack_room::fitting(memory, stages.max(1) as u64);
    let most = u64::from(room.flows).min(by_memory);
    let (fit, too_many) = within(flows, most);
    for count in too_many {
        println!(
            "{count} flows are left out: conntrack has room for {}, and {} MB of memory for {by_memory}",
            room.flows,
            memory / 1_000_000
        );
    }
    Ok(fit)
}

fn within(flows: &[u32], most: u64) -> (Vec<u32>, Vec<u32>) {
    flows.iter().partition(|count| u64::from(**count) <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_one_measure_and_side_are_one_curve() {
        let mut points = Points::over("nodes");
        for (side, x, value) in [("a", 1, 5.0), ("b", 1, 6.0), ("a", 2, 7.0)] {
            points.add("time", side, "s", x, &[value]).expect("a value");
        }
        assert!(points.add("time", "a", "s", 3, &[]).is_err());
        let curves = points.curves();
        assert_eq!(curves.len(), 2);
        let xs: Vec<u64> = curves[0].points.iter().map(|point| point.x).collect();
        assert_eq!(xs, [1, 2]);
    }

    #[test]
    fn no_more_flows_than_there_is_room_for() {
        assert_eq!(
            within(&[1000, 190_000, 1_000_000], 196_608),
            (vec![1000, 190_000], vec![1_000_000])
        );
    }
}
