//! How a client that asks again and again is timed: once for a while, or in turns with others.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::latency::Latency;

/// Room for what a second gives, so that nothing is moved meanwhile.
const ROOM: usize = 250_000;

/// When a client asks.
#[derive(Debug, clap::Args)]
pub struct TimingArgs {
    /// Seconds to measure, after a tenth of it to warm up.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Ask only when told: each line of standard input says for how many milliseconds, and is
    /// answered when they are over. The first one warms up; the end of input ends the run.
    #[arg(long, conflicts_with = "seconds")]
    in_turns: bool,
}

/// What the client measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AskReport {
    /// Transactions within the measured time.
    pub transactions: u64,
    /// Transactions in all, warming up included.
    pub all_transactions: u64,
    /// The measured time.
    pub seconds: f64,
    /// Transactions per second.
    pub per_second: f64,
    /// Of each transaction.
    pub latency: Latency,
}

/// What was measured so far.
#[derive(Default)]
struct Tally {
    times: Vec<u32>,
    took: Duration,
}

impl Tally {
    /// Asks for so long.
    fn run(
        &mut self,
        length: Duration,
        ask: &mut impl FnMut(Instant) -> Result<Instant>,
    ) -> Result<()> {
        let start = Instant::now();
        let mut now = start;
        while now - start < length {
            let begun = ask(now)?;
            now = Instant::now();
            let took = (now - begun).as_nanos();
            self.times.push(u32::try_from(took).unwrap_or(u32::MAX));
        }
        self.took += now - start;
        Ok(())
    }
}

impl TimingArgs {
    /// Calls `ask` with the present moment, again and again; it gives the moment at which what is
    /// to be timed began.
    ///
    /// # Errors
    /// The first one of `ask`, and when no time was given.
    pub(super) fn measure(
        &self,
        mut ask: impl FnMut(Instant) -> Result<Instant>,
    ) -> Result<AskReport> {
        let mut warm_up = Tally::default();
        let mut tally = Tally {
            times: Vec::with_capacity(ROOM),
            ..Tally::default()
        };
        if self.in_turns {
            for (number, line) in io::stdin().lines().enumerate() {
                let line = line?;
                let milliseconds = line.trim().parse();
                let milliseconds = milliseconds
                    .with_context(|| format!("{line:?} is no number of milliseconds"))?;
                let into = if number == 0 {
                    &mut warm_up
                } else {
                    &mut tally
                };
                into.run(Duration::from_millis(milliseconds), &mut ask)?;
                println!("{}", into.times.len());
                io::stdout().flush()?;
            }
        } else {
            warm_up.run(Duration::from_secs_f64(self.seconds / 10.0), &mut ask)?;
            tally.run(Duration::from_secs_f64(self.seconds), &mut ask)?;
        }
        let (measured, seconds) = (tally.times.len(), tally.took.as_secs_f64());
        Ok(AskReport {
            transactions: measured as u64,
            all_transactions: (measured + warm_up.times.len()) as u64,
            seconds,
            per_second: measured as f64 / seconds,
            latency: Latency::of(tally.times).context("no transaction was made")?,
        })
    }
}
