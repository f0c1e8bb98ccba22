//! The results of a run: rows of figures, ready for a file, a table or a plot.

use serde::{Deserialize, Serialize};

use super::{
    growth::Curve,
    machine::Machine,
    measure::{Figure, Probe, Target},
    program::ProgramCost,
    side::{HOST, HOST_NF, NETLINK},
    stats::{Better, Difference, Summary, best_ratio, ratio},
};
use crate::traffic::latency::Latency;

/// Every round's figure of one measure on one side.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Probe and suffix.
    pub measure: String,
    /// What it tells.
    pub figure: Figure,
    /// Name of the side.
    pub side: String,
    /// Where the traffic went.
    pub target: Target,
    /// One per round.
    pub values: Vec<f64>,
}

/// One measure of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Probe and suffix.
    pub measure: String,
    /// Name of the side.
    pub side: String,
    /// `pod` or `service`.
    pub to: String,
    /// Of median, lowest and highest.
    pub unit: String,
    /// Whether more is good.
    pub better: Better,
    /// Of all rounds.
    pub median: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
    /// Every round, in order.
    pub rounds: Vec<f64>,
    /// To the kernel path, round by round, the median.
    pub ratio_to_netlink: Option<f64>,
    /// The lowest and the highest of these ratios.
    pub ratio_to_netlink_spread: Option<[f64; 2]>,
    /// Best round over the kernel path's best: others on the machine only ever make a round
    /// worse, so this is what repeats.
    #[serde(default)]
    pub best_ratio_to_netlink: Option<f64>,
    /// To the bare nodes without rules.
    pub ratio_to_host: Option<f64>,
    /// To the nodes with the same rules.
    pub ratio_to_host_nf: Option<f64>,
    /// Whether the spreads of this side and of the kernel path are apart.
    pub difference_to_netlink: Option<Difference>,
}

/// The distribution of latencies of one probe on one side: the median of all
/// rounds at each share of [`crate::traffic::latency::CURVE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The probe.
    pub measure: String,
    /// Name of the side.
    pub side: String,
    /// `pod` or `service`.
    pub to: String,
    /// Microseconds.
    pub curve_us: Vec<f64>,
}

/// How the run was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `--quick`.
    pub quick: bool,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of each measurement.
    pub seconds: f64,
    /// The CPU of both ends where they share one.
    pub cpu: usize,
}

/// Everything: what `results.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// How.
    pub settings: Settings,
    /// One row per measure, side and target.
    pub results: Vec<Row>,
    /// Distributions of latencies.
    pub distributions: Vec<Distribution>,
    /// What the programs cost.
    pub programs: Vec<ProgramCost>,
    /// What grows with the cluster.
    pub growth: Vec<Curve>,
}

impl Report {
    /// The row of a measure, or `None`.
    #[must_use]
    pub fn row(&self, measure: &str, side: &str, to: &str) -> Option<&Row> {
        self.results
            .iter()
            .find(|row| row.measure == measure && row.side == side && row.to == to)
    }
}

/// Rows with their ratios to the sides that serve as bases.
#[must_use]
pub fn rows(all: &[Series]) -> Vec<Row> {
    all.iter()
        .filter_map(|one| {
            let base = |side: &str| {
                all.iter().find(|other| {
                    other.side == side && other.measure == one.measure && other.target == one.target
                })
            };
            let best_ratio = base(NETLINK)
                .and_then(|base| best_ratio(&one.values, &base.values, one.figure.better));
            let ratio_to = |side: &str| ratio(&one.values, &base(side)?.values);
            let Summary { median, min, max } = Summary::of(&one.values)?;
            let to_netlink = ratio_to(NETLINK);
            let difference = base(NETLINK)
                .filter(|base| base.side != one.side)
                .and_then(|base| {
                    let own = Summary::of(&one.values)?;
                    Some(own.against(&Summary::of(&base.values)?, one.figure.better))
                });
            Some(Row {
                measure: one.measure.clone(),
                side: one.side.clone(),
                to: one.target.name().to_owned(),
                unit: one.figure.unit.to_owned(),
                better: one.figure.better,
                median,
                min,
                max,
                rounds: one.values.clone(),
                ratio_to_netlink: to_netlink.map(|ratio| ratio.median),
                ratio_to_netlink_spread: to_netlink.map(|ratio| [ratio.min, ratio.max]),
                best_ratio_to_netlink: best_ratio,
                ratio_to_host: ratio_to(HOST).map(|ratio| ratio.median),
                ratio_to_host_nf: ratio_to(HOST_NF).map(|ratio| ratio.median),
                difference_to_netlink: difference,
            })
        })
        .collect()
}

/// The median of several rounds' distributions, share by share.
#[must_use]
pub fn distribution(
    probe: &Probe,
    side: &str,
    target: Target,
    rounds: &[Latency],
) -> Option<Distribution> {
    let shares = rounds.first()?.curve_us.len();
    let curve_us = (0..shares)
        .map(|share| {
            let at: Vec<f64> = rounds
                .iter()
                .filter_map(|round| round.curve_us.get(share).copied())
                .collect();
            Summary::of(&at).map(|summary| summary.median)
        })
        .collect::<Option<_>>()?;
    Some(Distribution {
        measure: probe.name.to_owned(),
        side: side.to_owned(),
        to: target.name().to_owned(),
        curve_us,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::measure::PROBES;

    /// A series of `tcp_rr` to a pod.
    pub(crate) fn series(side: &str, values: &[f64]) -> Series {
        Series {
            measure: "tcp_rr".to_owned(),
            figure: PROBES[0].traffic.figures()[0],
            side: side.to_owned(),
            target: Target::Pod,
            values: values.to_vec(),
        }
    }

    /// Of two rounds, with nothing beside these rows.
    pub(crate) fn report(series: &[Series]) -> Report {
        Report {
            machine: Machine::default(),
            settings: Settings {
                quick: true,
                rounds: 2,
                seconds: 1.0,
                cpu: 0,
            },
            results: rows(series),
            distributions: Vec::new(),
            programs: Vec::new(),
            growth: Vec::new(),
        }
    }

    #[test]
    fn ratios_to_each_base() {
        let all = [
            series("host", &[200.0, 200.0]),
            series("netlink", &[100.0, 80.0]),
            series("direct", &[180.0, 160.0]),
        ];
        let rows = rows(&all);
        let direct = &rows[2];
        assert_eq!(direct.ratio_to_netlink_spread, Some([1.8, 2.0]));
        assert!((direct.ratio_to_netlink.expect("a ratio") - 1.9).abs() < 1e-9);
        assert!((direct.ratio_to_host.expect("a ratio") - 0.85).abs() < 1e-9);
        assert_eq!(direct.ratio_to_host_nf, None);
        assert_eq!(direct.difference_to_netlink, Some(Difference::Better));
        assert_eq!(rows[1].difference_to_netlink, None);
    }

    #[test]
    fn a_services_rate_is_not_compared_with_a_pods() {
        let mut service = series("direct", &[1.0]);
        service.target = Target::Service;
        let rows = rows(&[series("netlink", &[1.0]), service]);
        assert_eq!(rows[1].ratio_to_netlink, None);
    }

    #[test]
    fn a_distribution_is_the_rounds_median() {
        let round = |value: u32| Latency::of(vec![value * 1000]).expect("a latency");
        let all = distribution(
            &PROBES[0],
            "direct",
            Target::Pod,
            &[round(1), round(9), round(2)],
        )
        .expect("rounds");
        assert!(all.curve_us.iter().all(|value| (value - 2.0).abs() < 1e-9));
    }
}
