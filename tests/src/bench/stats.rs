//! What may be said of repeated measurements, and what not.

use serde::{Deserialize, Serialize};

/// Whether more is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Rates.
    Higher,
    /// Times and costs.
    Lower,
}

/// Median and spread of a series.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
}

/// What two series say of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difference {
    /// Every round of the one beat every round of the other.
    Better,
    /// The reverse.
    Worse,
    /// The spreads overlap: nothing may be claimed.
    Open,
}

impl Summary {
    /// Of values in any order; `None` without any.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, sorted[middle])
        };
        Some(Self {
            median,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }

    /// Whether both have a value in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }

    /// This one against `base`, a difference only where the spreads are apart.
    #[must_use]
    pub fn against(&self, base: &Self, better: Better) -> Difference {
        if self.overlaps(base) {
            return Difference::Open;
        }
        match (self.min > base.max, better) {
            (true, Better::Higher) | (false, Better::Lower) => Difference::Better,
            (true, Better::Lower) | (false, Better::Higher) => Difference::Worse,
        }
    }
}

/// `side` over `base`, round by round: what disturbs a round disturbs both.
/// `None` where a round of the base is 0, or the series differ in length.
#[must_use]
pub fn ratio(side: &[f64], base: &[f64]) -> Option<Summary> {
    if side.len() != base.len() || base.contains(&0.0) {
        return None;
    }
    let rounds: Vec<f64> = side
        .iter()
        .zip(base)
        .map(|(one, other)| one / other)
        .collect();
    Summary::of(&rounds)
}

/// The best of `side` over the best of `base`; `None` where that is no number.
#[must_use]
pub fn best_ratio(side: &[f64], base: &[f64], better: Better) -> Option<f64> {
    let best = |values: &[f64]| {
        let all = Summary::of(values)?;
        Some(match better {
            Better::Higher => all.max,
            Better::Lower => all.min,
        })
    };
    let ratio = best(side)? / best(base)?;
    ratio.is_finite().then_some(ratio)
}

/// How much of `base` a ratio has lost, 0.1 for a tenth; gains are negative.
#[must_use]
pub fn loss(ratio: f64, base: f64, better: Better) -> f64 {
    match better {
        Better::Higher => 1.0 - ratio / base,
        // Twice the time is half the worth.
        Better::Lower => 1.0 - base / ratio,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(values: &[f64]) -> Summary {
        Summary::of(values).expect("values")
    }

    #[test]
    fn the_best_rounds_ratio_ignores_disturbed_ones() {
        let ratio = best_ratio(&[9.0, 5.0, 30.0], &[40.0, 10.0], Better::Lower);
        assert_eq!(ratio, Some(0.5));
        assert_eq!(best_ratio(&[4.0, 1.0], &[2.0], Better::Higher), Some(2.0));
        assert_eq!(best_ratio(&[4.0], &[0.0], Better::Higher), None);
        assert_eq!(best_ratio(&[], &[1.0], Better::Higher), None);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // The machine was slow in the second round, for both.
        let ratio = ratio(&[200.0, 100.0, 300.0], &[100.0, 50.0, 100.0]).expect("a ratio");
        assert_eq!(ratio, summary(&[2.0, 2.0, 3.0]));
    }

    #[test]
    fn no_ratio_to_nothing() {
        assert_eq!(ratio(&[1.0, 2.0], &[0.0, 2.0]), None);
        assert_eq!(ratio(&[1.0], &[]), None);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert!((summary(&[9.0, 1.0, 4.0, 2.0]).median - 3.0).abs() < f64::EPSILON);
        assert!((summary(&[1.0]).median - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn overlapping_spreads_are_no_difference() {
        let base = summary(&[100.0, 110.0, 120.0]);
        let touching = summary(&[120.0, 130.0, 140.0]);
        let apart = summary(&[121.0, 130.0, 140.0]);
        assert_eq!(touching.against(&base, Better::Higher), Difference::Open);
        assert_eq!(apart.against(&base, Better::Higher), Difference::Better);
        assert_eq!(apart.against(&base, Better::Lower), Difference::Worse);
        assert_eq!(base.against(&apart, Better::Lower), Difference::Better);
        assert_eq!(base.against(&apart, Better::Higher), Difference::Worse);
    }

    #[test]
    fn a_loss_is_a_loss_in_both_senses() {
        assert!((loss(1.8, 2.0, Better::Higher) - 0.1).abs() < 1e-9);
        assert!((loss(0.5, 0.4, Better::Lower) - 0.2).abs() < 1e-9);
        assert!(loss(2.2, 2.0, Better::Higher) < 0.0);
        assert!(loss(0.4, 0.5, Better::Lower) < 0.0);
    }
}
