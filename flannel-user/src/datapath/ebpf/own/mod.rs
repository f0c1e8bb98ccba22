//! Own connections, the agent's part: hands each over to conntrack before it
//! goes back to the stack, and deletes those that are over.
//!
//! A thread of its own, because ctnetlink blocks. It looks ten times a second
//! while many connections are young, and at once when rules change; when nothing
//! opens it reads one counter, twice a second. Its heartbeat lets new ones open: without it the
//! programs open none, and those that live go on.
//!
//! Handing over is: insert into conntrack, then take the entry out of the table
//! in one step, and if the connection went on in between, correct conntrack by
//! what the entry held in the end. From then on the connection is one that the
//! stack carries, and it is learned as any other.

mod commands;
mod exchange;
mod handover;
mod ipsec;
mod keeper;
mod listing;
#[cfg(test)]
mod property;
mod rules;
mod table;

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use flannel_ebpf::layout::{FAST_PATH_CLASSES, FAST_PATH_DIRECT, NodeConfig};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub(super) use self::{
    commands::{Command, Commands},
    listing::ClassTable,
};
use self::{exchange::Exchange, handover::Extent, keeper::Keeper, rules::Rules, table::OwnTable};
use super::{EbpfError, epoch::Generation};

/// How often everything is handed over at the end: packets under way may still change entries.
const LAST_PASSES: usize = 5;
/// Pause between those.
const LAST_PAUSE: Duration = Duration::from_millis(5);

/// Hands over what an agent before us has left in the pinned maps of the directory `maps`, where
/// nobody will keep it any more. Blocks for some milliseconds.
///
/// # Errors
/// A map could not be opened.
pub(super) fn hand_over_all(maps: &Path) -> Result<(), EbpfError> {
    super::epoch::close_own(maps)?;
    let mut exchange = Exchange::new(OwnTable::open(maps)?);
    for _ in 0..LAST_PASSES {
        thread::sleep(LAST_PAUSE);
        let looked = exchange.look(Extent::All);
        if looked.live + looked.closed + looked.handed_over == 0 {
            break;
        }
    }
    Ok(())
}

/// How own connections fare.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnState {
    /// May connections open at all?
    pub wanted: bool,
    /// Only where the stack lets such connections pass?
    pub by_class: bool,
    /// Classes that are known.
    pub classes: u64,
    /// Seconds that a class holds at present until it asks the stack.
    pub class_validity_seconds: f64,
    /// None opens at present, for this reason.
    pub paused: Option<String>,
    /// Live ones at the last look.
    pub live: u64,
    /// Closed ones that wait for late packets.
    pub closed: u64,
    /// Handed over since the agent opened the datapath.
    pub handed_over: u64,
    /// What conntrack refused since then.
    pub refused: u64,
}

/// Which connections may open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Opening {
    /// None.
    #[default]
    None,
    /// All between pods.
    Direct,
    /// Those of a class that the stack lets pass.
    Classes,
}

impl Opening {
    /// What the node's config asks for.
    pub(super) const fn of(node: &NodeConfig) -> Self {
        if node.flags & FAST_PATH_DIRECT != 0 {
            Self::Direct
        } else if node.flags & FAST_PATH_CLASSES != 0 {
            Self::Classes
        } else {
            Self::None
        }
    }
}

/// The running thread; dropping it hands everything over.
pub(super) struct OwnFlows {
    commands: Commands,
    thread: Option<JoinHandle<()>>,
    state: Arc<Mutex<OwnState>>,
}

impl OwnFlows {
    /// Starts in the network namespace of the calling thread. No connection opens before
    /// [`OwnFlows::allow`].
    ///
    /// # Errors
    /// A map could not be opened or the thread not started.
    pub(super) fn start(
        maps: &Path,
        generation: Generation,
        network: Ipv4Net,
    ) -> Result<Self, EbpfError> {
        let table = OwnTable::open(maps)?;
        let failed = |source| EbpfError::Watch { source };
        let (commands, received) = commands::commands().map_err(failed)?;
        let state = Arc::new(Mutex::new(OwnState::default()));
        let keeper = Keeper::new(
            table,
            generation,
            received,
            Arc::clone(&state),
            Rules::of(network),
        );
        let thread = thread::Builder::new()
            .name("own-flows".to_owned())
            .spawn(move || keeper.run())
            .map_err(failed)?;
        Ok(Self {
            commands,
            thread: Some(thread),
            state,
        })
    }

    /// Lets connections open, or no more.
    pub(super) fn allow(&self, opening: Opening) {
        self.commands.send(Command::Allow(opening));
    }

    /// A way to tell the thread of changed rules.
    pub(super) fn commands(&self) -> Commands {
        self.commands.clone()
    }

    /// How they fare.
    #[must_use]
    pub(super) fn state(&self) -> OwnState {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for OwnFlows {
    fn drop(&mut self) {
        // Others may hold a sender: the end is told, not inferred.
        self.commands.send(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
