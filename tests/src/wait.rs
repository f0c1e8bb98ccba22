//! Waiting for a condition with a deadline, instead of sleeping and hoping.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Waits until `condition` gives a value, at most `limit`.
///
/// # Errors
/// Names `what` and the last reason when the time is over.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            match last {
                None => bail!("waited {limit:?} for this in vain: {what}"),
                Some(error) => {
                    return Err(error.context(format!("waited {limit:?} for this in vain: {what}")));
                }
            }
        }
        thread::sleep(PERIOD);
    }
}

/// Waits until `condition` is true, at most `limit`.
///
/// # Errors
/// As [`until`].
pub fn until_true(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    until(what, limit, || Ok(condition()?.then_some(())))
}
