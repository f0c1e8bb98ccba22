//! The thread that keeps own connections.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    Command, LAST_PASSES, LAST_PAUSE, OwnState, exchange::Exchange, handover::Extent, ipsec,
    table::OwnTable,
};
use crate::datapath::ebpf::epoch::Generation;

/// Between two looks while connections are young.
const PERIOD: Duration = Duration::from_millis(100);
/// The same while they are few: looking costs by the table's size.
const SLOW_PERIOD: Duration = Duration::from_millis(250);
/// How many are few.
const FEW: usize = 64;
/// How often the heartbeat is renewed.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How far it reaches.
const REACH: Duration = Duration::from_secs(3);

/// Everything that the thread works with.
pub(super) struct Keeper {
    exchange: Exchange,
    generation: Generation,
    received: Receiver<Command>,
    state: Arc<Mutex<OwnState>>,
    is_allowed: bool,
    /// When the heartbeat was renewed; `None` while none is due.
    beaten: Option<Instant>,
    looked: Instant,
    /// The counter at the last look.
    opened: Option<u64>,
    /// Entries after the last look.
    held: usize,
    complained: Option<String>,
}

impl Keeper {
    pub(super) fn new(
        table: OwnTable,
        generation: Generation,
        received: Receiver<Command>,
        state: Arc<Mutex<OwnState>>,
    ) -> Self {
        Self {
            exchange: Exchange::new(table),
            generation,
            received,
            state,
            is_allowed: false,
            beaten: None,
            looked: Instant::now(),
            opened: None,
            held: usize::MAX,
            complained: None,
        }
    }

    pub(super) fn run(mut self) {
        // What an agent before us left opens no more before we say so.
        self.generation.open_own(None);
        loop {
            let period = if self.held > FEW { PERIOD } else { SLOW_PERIOD };
            let wait = period.saturating_sub(self.looked.elapsed());
            match self.received.recv_timeout(wait) {
                Ok(Command::HandOver) => {
                    self.beat();
                    self.look(Wanted::Live);
                }
                Ok(Command::Allow(allowed)) => self.allow(allowed),
                Ok(Command::End) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if self
                        .beaten
                        .is_none_or(|beaten| beaten.elapsed() >= HEARTBEAT)
                    {
                        self.beat();
                    }
                    let opened = self.exchange.opened();
                    if self.held != 0 || self.opened != Some(opened) {
                        self.opened = Some(opened);
                        self.look(Wanted::Due);
                    } else {
                        self.looked = Instant::now();
                    }
                }
            }
        }
        self.end();
    }

    /// Nothing stays: whoever comes after us may not know how to carry it.
    fn end(&mut self) {
        self.is_allowed = false;
        self.generation.open_own(None);
        for _ in 0..LAST_PASSES {
            thread::sleep(LAST_PAUSE);
            self.look(Wanted::All);
            if self.held == 0 {
                break;
            }
        }
    }

    fn with_state(&self, change: impl FnOnce(&mut OwnState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn allow(&mut self, allowed: bool) {
        if self.is_allowed == allowed {
            return;
        }
        self.is_allowed = allowed;
        self.with_state(|state| state.wanted = allowed);
        if allowed {
            if let Err(error) = self.exchange.learn_translated() {
                self.complain(Some(format!("conntrack cannot be read: {error}")));
            }
            self.beat();
        } else {
            self.generation.open_own(None);
            self.look(Wanted::Live);
        }
    }

    /// Renews the heartbeat, unless something speaks against it.
    fn beat(&mut self) {
        self.beaten = Some(Instant::now());
        if !self.is_allowed {
            return;
        }
        let policies = ipsec::policies();
        let paused = if policies > 0 {
            Some(format!(
                "{policies} IPsec policies: only the stack can tell whom they concern"
            ))
        } else {
            self.exchange
                .reach_conntrack()
                .err()
                .map(|error| format!("connections could not be handed over to conntrack: {error}"))
        };
        self.generation.open_own(paused.is_none().then_some(REACH));
        if paused.is_some() {
            self.look(Wanted::Live);
        }
        self.complain(paused);
    }

    fn complain(&mut self, paused: Option<String>) {
        if self.complained != paused {
            match &paused {
                Some(reason) => warn!(reason, "no connection bypasses the stack from its SYN on"),
                None => info!("connections may bypass the stack from their SYN on"),
            }
            self.complained.clone_from(&paused);
            self.with_state(|state| state.paused = paused);
        }
    }

    /// Goes through the table once.
    fn look(&mut self, wanted: Wanted) {
        self.looked = Instant::now();
        let clock = self.generation.clock();
        let looked = self.exchange.look(match wanted {
            Wanted::Due => Extent::Due(&clock),
            Wanted::Live => Extent::Live(&clock),
            Wanted::All => Extent::All,
        });
        self.held = looked.live + looked.closed;
        self.with_state(|state| {
            state.live = looked.live as u64;
            state.closed = looked.closed as u64;
            state.handed_over += looked.handed_over as u64;
            state.refused += looked.refused as u64;
        });
    }
}

/// As [`Extent`], before the clock is read.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Due,
    Live,
    All,
}
