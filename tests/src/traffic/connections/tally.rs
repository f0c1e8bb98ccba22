//! What became of the connections.

use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::traffic::socket::is_timeout;

/// What became of the connections at one end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsReport {
    /// Begun (or accepted).
    pub begun: u64,
    /// Could not be established.
    pub failed: u64,
    /// Were established.
    pub established: u64,
    /// Ended as they were meant to.
    pub ended: u64,
    /// Were reset though nobody meant to.
    pub reset: u64,
    /// Stood still for longer than the patience.
    pub timeouts: u64,
    /// Brought wrong bytes, or ended too early.
    pub corrupt: u64,
    /// Bytes received, all of them right unless `corrupt` says otherwise.
    pub bytes: u64,
    /// The first thing that went wrong.
    pub first_error: Option<String>,
    /// Time of it all.
    pub seconds: f64,
}

impl ConnectionsReport {
    /// Whatever did not go as meant.
    #[must_use]
    pub fn troubles(&self) -> u64 {
        self.failed + self.reset + self.timeouts + self.corrupt
    }

    /// Demands that all went as meant.
    ///
    /// # Errors
    /// Says what did not.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.troubles() == 0 && self.ended == self.established,
            "not every connection went as meant: {self:?}"
        );
        Ok(())
    }
}

/// Counters that all threads of one end share.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) begun: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) established: AtomicU64,
    pub(super) ended: AtomicU64,
    pub(super) reset: AtomicU64,
    pub(super) timeouts: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) bytes: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Tally {
    pub(super) fn count(place: &AtomicU64) {
        place.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note(&self, outcome: io::Result<()>) {
        let Err(error) = outcome else {
            Self::count(&self.ended);
            return;
        };
        Self::count(match error.kind() {
            kind if kind == io::ErrorKind::InvalidData || kind == io::ErrorKind::UnexpectedEof => {
                &self.corrupt
            }
            _ if is_timeout(&error) => &self.timeouts,
            _ => &self.reset,
        });
        self.remember(&error);
    }

    pub(super) fn remember(&self, error: &io::Error) {
        let mut first = self
            .first_error
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        first.get_or_insert_with(|| error.to_string());
    }

    pub(super) fn report(&self, start: Instant) -> ConnectionsReport {
        let read = |place: &AtomicU64| place.load(Ordering::Relaxed);
        ConnectionsReport {
            begun: read(&self.begun),
            failed: read(&self.failed),
            established: read(&self.established),
            ended: read(&self.ended),
            reset: read(&self.reset),
            timeouts: read(&self.timeouts),
            corrupt: read(&self.corrupt),
            bytes: read(&self.bytes),
            first_error: self
                .first_error
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clone(),
            seconds: start.elapsed().as_secs_f64(),
        }
    }
}

/// Data that is not what was to come.
pub(super) fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
