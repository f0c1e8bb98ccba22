//! Pauses between attempts to reach etcd again.

use std::time::Duration;

/// The first pause, as flannel's.
const FIRST: Duration = Duration::from_millis(100);
/// The longest. flannel goes to 5 s, so the first lease after an outage comes 5 to 6.5 s
/// late; we owe it within 2 s, and an attempt is one small request.
const LONGEST: Duration = Duration::from_secs(1);

/// Doubles from pause to pause.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Backoff {
    /// How long to wait now.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST);
        pause
    }

    /// After a good response.
    pub(super) fn reset(&mut self) {
        self.0 = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second_and_start_again() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..6).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(), FIRST);
    }
}
