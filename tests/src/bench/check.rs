//! Has anything become slower? Ratios against those of a committed run.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    measure::is_checked,
    results::Row,
    side,
    stats::{Better, loss},
};

/// A tenth may be lost before it is a failure.
const TOLERATED: f64 = 0.10;

/// A ratio as it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The measure.
    pub measure: String,
    /// The side.
    pub side: String,
    /// `pod` or `service`.
    pub to: String,
    /// Whether more is good.
    pub better: Better,
    /// To the kernel path: the median of the rounds.
    pub ratio_to_netlink: f64,
}

/// A ratio as it was and as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// As it was.
    pub before: Entry,
    /// As it is.
    pub now: f64,
    /// What was lost, 0.1 for a tenth; gains are negative.
    pub loss: f64,
}

impl Compared {
    /// Whether this is more than may be lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        // Not a number is no excuse.
        self.loss.is_nan() || self.loss > TOLERATED
    }
}

/// Sides that are ours to make slower, and figures whose ratios repeat.
fn counts(row: &Row) -> bool {
    let ours = side::all()
        .iter()
        .any(|side| side.name == row.side && side.has_programs());
    ours && is_checked(&row.measure)
}

/// What later runs are compared with.
#[must_use]
pub fn baseline(rows: &[Row]) -> Vec<Entry> {
    rows.iter()
        .filter(|row| counts(row))
        .filter_map(|row| {
            Some(Entry {
                measure: row.measure.clone(),
                side: row.side.clone(),
                to: row.to.clone(),
                better: row.better,
                ratio_to_netlink: row.ratio_to_netlink?,
            })
        })
        .collect()
}

/// Every ratio that both have.
#[must_use]
pub fn compare(baseline: &[Entry], rows: &[Row]) -> Vec<Compared> {
    baseline
        .iter()
        .filter_map(|before| {
            let row = rows.iter().find(|row| {
                row.measure == before.measure && row.side == before.side && row.to == before.to
            })?;
            let now = row.ratio_to_netlink?;
            Some(Compared {
                before: before.clone(),
                now,
                loss: loss(now, before.ratio_to_netlink, before.better),
            })
        })
        .collect()
}

/// Compares with the baseline in a file, tells, and fails where too much is lost.
///
/// # Errors
/// When a ratio has lost more than a tenth, or nothing could be compared.
pub fn check(path: &Path, rows: &[Row]) -> Result<()> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read the baseline {}", path.display()))?;
    let baseline: Vec<Entry> = serde_json::from_str(&text)
        .with_context(|| format!("{} is no baseline", path.display()))?;
    let compared = compare(&baseline, rows);
    ensure!(
        !compared.is_empty(),
        "nothing of this run is in the baseline {}",
        path.display()
    );
    println!("\nagainst {}:", path.display());
    for one in &compared {
        let Compared { before, now, loss } = one;
        println!(
            "  {:<14} {:<9} {:<8} {:>6.3} was {:>6.3}  {:>+6.1} %{}",
            before.measure,
            before.side,
            before.to,
            now,
            before.ratio_to_netlink,
            -100.0 * loss,
            if one.is_lost() { "  LOST" } else { "" }
        );
    }
    let lost = compared.iter().filter(|one| one.is_lost()).count();
    ensure!(
        lost == 0,
        "{lost} of {} ratios have lost more than {:.0} %",
        compared.len(),
        TOLERATED * 100.0
    );
    println!("  nothing has lost more than {:.0} %", TOLERATED * 100.0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{rows, tests::series};

    /// Rates: the kernel path's is 100.
    fn run(direct: f64) -> Vec<Row> {
        let mut all = [series("netlink", &[100.0]), series("direct", &[direct])];
        for one in &mut all {
            one.measure = "tcp_rr".to_owned();
            one.figure.better = Better::Higher;
        }
        rows(&all)
    }

    #[test]
    fn a_tenth_may_be_lost_and_no_more() {
        let baseline = baseline(&run(220.0));
        assert_eq!(baseline.len(), 1, "the base itself cannot lose");
        let lost = |direct| compare(&baseline, &run(direct))[0].is_lost();
        assert!(!lost(240.0));
        assert!(!lost(200.1));
        assert!(lost(197.9));
    }

    #[test]
    fn what_is_in_one_of_them_only_is_not_compared() {
        let baseline = baseline(&run(220.0));
        assert_eq!(compare(&baseline, &rows(&[series("netlink", &[1.0])])), []);
    }

    #[test]
    fn a_baseline_survives_its_file() {
        let baseline = baseline(&run(220.0));
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = serde_json::to_string(&baseline).expect("JSON");
        fs::write(&file, text).expect("written");
        assert!(check(file.path(), &run(210.0)).is_ok());
        assert!(check(file.path(), &run(150.0)).is_err());
        assert!(check(file.path(), &[]).is_err());
    }
}
