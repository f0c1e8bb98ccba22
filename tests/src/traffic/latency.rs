//! Many latencies, boiled down to what a table or a plot shows.

use serde::{Deserialize, Serialize};

/// The shares at which [`Latency::curve_us`] is taken.
pub const CURVE: [f64; 25] = [
    0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9,
    0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999,
];

/// Percentiles in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// One value for each entry of [`CURVE`].
    pub curve_us: Vec<f64>,
}

impl Latency {
    /// Of latencies in nanoseconds, in any order; `None` without any.
    #[must_use]
    pub fn of(mut nanoseconds: Vec<u32>) -> Option<Self> {
        nanoseconds.sort_unstable();
        let last = nanoseconds.len().checked_sub(1)?;
        let at = |share: f64| {
            let index = (last as f64 * share) as usize;
            f64::from(nanoseconds[index]) / 1000.0
        };
        Some(Self {
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: at(1.0),
            curve_us: CURVE.iter().map(|share| at(*share)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_thousand() {
        let all = (0..=1000).rev().map(|number| number * 1000).collect();
        let latency = Latency::of(all).expect("there are some");
        assert!((latency.p50_us - 500.0).abs() < 1e-9);
        assert!((latency.p99_us - 990.0).abs() < 1e-9);
        assert!((latency.p999_us - 999.0).abs() < 1e-9);
        assert!((latency.max_us - 1000.0).abs() < 1e-9);
        assert_eq!(latency.curve_us.len(), CURVE.len());
        assert!(latency.curve_us.is_sorted());
    }

    #[test]
    fn nothing_measured_has_no_median() {
        assert_eq!(Latency::of(Vec::new()), None);
    }
}
