//! What the pictures show, apart from how it is drawn.

use crate::{
    bench::{
        growth::Curve,
        results::{Report, Row},
        stats::Better,
    },
    traffic::latency::CURVE,
};

/// The measures that a reader wants first, and their names in words.
pub const HEADLINES: [(&str, &str); 6] = [
    ("tcp_rr_p50", "TCP request and response"),
    ("udp_rr_p50", "UDP request and response"),
    ("tcp_crr_p50", "a TCP connection for each request"),
    ("first_packet", "first packet of a flow"),
    ("udp_64", "UDP, 64 bytes, one way"),
    ("tcp_stream", "one TCP stream"),
];

/// One bar with its spread.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// The side.
    pub side: String,
    /// How many times the speed of the kernel path.
    pub value: f64,
    /// In the worst and in the best round.
    pub spread: [f64; 2],
}

impl Bar {
    /// What the side is, in a word or two.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.side.as_str() {
            "host" => "no rules",
            "host-nf" => "rules",
            "netlink" => "flannel's",
            "learned" => "default",
            "flows" => "no classes",
            "direct" => "blind",
            "veth" => "no node",
            _ => "another agent",
        }
    }
}

/// The bars of one measure.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// In words.
    pub title: String,
    /// One per side.
    pub bars: Vec<Bar>,
}

/// A line with a name.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// For the legend.
    pub name: String,
    /// The side, which decides the colour.
    pub side: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// Lines in one coordinate system.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// In words.
    pub title: String,
    /// Of the horizontal axis.
    pub x: String,
    /// Of the vertical axis.
    pub y: String,
    /// All of them.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The largest value upwards.
    #[must_use]
    pub fn top(&self) -> f64 {
        let points = self.lines.iter().flat_map(|line| &line.points);
        points.map(|(_, y)| *y).fold(0.0, f64::max)
    }

    /// The smallest and largest value to the right.
    #[must_use]
    pub fn width(&self) -> (f64, f64) {
        let points = self.lines.iter().flat_map(|line| &line.points);
        points.fold((f64::INFINITY, 0.0), |(low, high), (x, _)| {
            (low.min(*x), high.max(*x))
        })
    }
}

/// A row's speed over that of the kernel path, so that more is always better; worst and best round.
#[must_use]
pub fn speed(row: &Row) -> Option<(f64, [f64; 2])> {
    let (value, [low, high]) = (row.ratio_to_netlink?, row.ratio_to_netlink_spread?);
    Some(match row.better {
        Better::Higher => (value, [low, high]),
        // A third of the time is three times the speed.
        Better::Lower => (1.0 / value, [1.0 / high, 1.0 / low]),
    })
}

/// The bars of each headline.
#[must_use]
pub fn ratios(report: &Report, to: &str) -> Vec<Panel> {
    HEADLINES
        .iter()
        .filter_map(|(measure, title)| {
            let bars: Vec<Bar> = report
                .results
                .iter()
                .filter(|row| row.measure == *measure && row.to == to)
                .filter_map(|row| {
                    let (value, spread) = speed(row)?;
                    Some(Bar {
                        side: row.side.clone(),
                        value,
                        spread,
                    })
                })
                .collect();
            (!bars.is_empty()).then(|| Panel {
                title: (*title).to_owned(),
                bars,
            })
        })
        .collect()
}

/// The share of transactions done within a time, of one probe.
#[must_use]
pub fn distribution(report: &Report, measure: &str) -> Option<Chart> {
    let lines: Vec<Line> = report
        .distributions
        .iter()
        .filter(|one| one.measure == measure && one.to == "pod")
        .map(|one| {
            // The last shares are single packets; they are in the tables.
            let points: Vec<(f64, f64)> = one
                .curve_us
                .iter()
                .zip(CURVE)
                .filter(|(_, share)| *share <= 0.99)
                .map(|(latency, share)| (*latency, share * 100.0))
                .collect();
            let median = points
                .iter()
                .find(|(_, share)| *share >= 50.0)
                .map_or(f64::NAN, |(latency, _)| *latency);
            Line {
                name: format!("{}, median {median:.1} µs", one.side),
                side: one.side.clone(),
                points,
            }
        })
        .collect();
    (!lines.is_empty()).then(|| Chart {
        title: "TCP request and response, 64 bytes, both ends on one CPU".to_owned(),
        x: "time from request to response, µs".to_owned(),
        y: "% of all requests answered".to_owned(),
        lines,
    })
}

/// A measure that grows, in words.
fn in_words(measure: &str) -> &str {
    match measure {
        "tcp_rr" => "TCP requests and responses",
        "udp_rr" => "UDP requests, one flow after the other",
        "from_pod to random subnets" => "the sending program, random peers",
        other => other,
    }
}

/// A chart per measure that grows, sides and sources together.
#[must_use]
pub fn growth(curves: &[Curve]) -> Vec<Chart> {
    let mut charts: Vec<Chart> = Vec::new();
    for curve in curves.iter().filter(|curve| curve.points.len() > 1) {
        let line = Line {
            name: curve.side.clone(),
            side: curve.side.clone(),
            points: curve
                .points
                .iter()
                .map(|point| (point.x as f64, point.y.median))
                .collect(),
        };
        let known = charts
            .iter_mut()
            .find(|chart| chart.title == in_words(&curve.measure) && chart.x == curve.over);
        match known {
            Some(chart) => chart.lines.push(line),
            None => charts.push(Chart {
                title: in_words(&curve.measure).to_owned(),
                x: curve.over.clone(),
                y: curve.unit.clone(),
                lines: vec![line],
            }),
        }
    }
    charts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        growth::Point,
        results::tests::{report, series},
        stats::Summary,
    };

    fn two_headlines() -> Report {
        let [mut slow, mut fast] = [series("netlink", &[2.0]), series("direct", &[1.0])];
        for one in [&mut slow, &mut fast] {
            one.measure = "tcp_rr_p50".to_owned();
            one.figure.better = Better::Lower;
        }
        let mut first = series("direct", &[10.0, 20.0]);
        let mut base = series("netlink", &[40.0, 40.0]);
        for one in [&mut first, &mut base] {
            one.measure = "first_packet".to_owned();
            one.figure.better = Better::Lower;
        }
        report(&[slow, fast, base, first])
    }

    #[test]
    fn less_time_is_more_speed() {
        let panels = ratios(&two_headlines(), "pod");
        assert_eq!(panels.len(), 2);
        assert!((panels[0].bars[1].value - 2.0).abs() < 1e-9);
        let first = &panels[1].bars[1];
        assert_eq!(first.spread, [2.0, 4.0]);
        assert!(first.spread[0] <= first.value && first.value <= first.spread[1]);
        assert_eq!(ratios(&two_headlines(), "service"), []);
    }

    #[test]
    fn sides_of_one_measure_share_a_chart() {
        let point = |x| Point {
            x,
            y: Summary {
                median: x as f64,
                min: 0.0,
                max: 9.0,
            },
        };
        let curve = |measure: &str, side: &str, points: &[u64]| Curve {
            measure: measure.to_owned(),
            side: side.to_owned(),
            unit: "s".to_owned(),
            over: "nodes".to_owned(),
            points: points.iter().map(|x| point(*x)).collect(),
        };
        let charts = growth(&[
            curve("a", "x", &[1, 10]),
            curve("b", "x", &[1, 10]),
            curve("a", "y", &[1, 100]),
            curve("c", "x", &[1]),
        ]);
        assert_eq!(charts.len(), 2, "one point is no curve");
        assert_eq!(charts[0].lines.len(), 2);
        assert!((charts[0].top() - 100.0).abs() < 1e-9);
        assert!((charts[0].width().0 - 1.0).abs() < 1e-9);
    }
}
