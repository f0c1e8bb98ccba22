//! How fast repairs may follow each other.

use std::time::Duration;

use tokio::time::Instant;

/// So many repairs in a row come at once: several tools may run while a host starts.
const FREE: u32 = 4;
/// A row of repairs ends when nothing had to be repaired for this long.
const CALM: Duration = Duration::from_secs(30);
/// The first pause, doubled with every further repair in the row.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Keeps two tools that want different rules from driving each other round.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    row: u32,
}

impl Pace {
    /// Notes a repair. True when it is the first that has to be followed by a pause: the moment
    /// to say that something else keeps changing the rules.
    pub(super) fn repaired(&mut self, now: Instant) -> bool {
        let calm = self
            .last
            .is_none_or(|last| now.duration_since(last) > CALM + self.pause());
        self.row = if calm { 1 } else { self.row.saturating_add(1) };
        self.last = Some(now);
        self.row == FREE
    }

    /// Before this time nothing may be repaired.
    pub(super) fn not_before(&self) -> Option<Instant> {
        self.last.map(|last| last + self.pause())
    }

    /// No repair has to wait.
    pub(super) fn is_calm(&self) -> bool {
        self.row < FREE
    }

    fn pause(&self) -> Duration {
        match self.row.checked_sub(FREE) {
            None => Duration::ZERO,
            Some(more) => (FIRST_PAUSE * 2_u32.saturating_pow(more.min(16))).min(LONGEST_PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_repairs_are_free_then_pauses_grow_and_it_is_said_once() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.not_before(), None);
        let mut now = start;
        let mut said = Vec::new();
        let mut pauses = Vec::new();
        for _ in 0..14 {
            said.push(pace.repaired(now));
            let next = pace.not_before().expect("repaired once");
            pauses.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(pauses[..8], [0, 0, 0, 500, 1000, 2000, 4000, 8000]);
        assert_eq!(pauses.last(), Some(&60_000));
        assert_eq!(said.iter().filter(|said| **said).count(), 1);
        assert!(said[3]);
    }

    #[test]
    fn calm_ends_the_row() {
        let start = Instant::now();
        let mut pace = Pace::default();
        for _ in 0..6 {
            pace.repaired(start);
        }
        let later = start + Duration::from_secs(60);
        pace.repaired(later);
        assert_eq!(pace.not_before(), Some(later));
    }
}
