//! Ends or rechecks verdicts when what they rest on changes.
//!
//! A thread of its own, so that a changed rule takes effect however busy the
//! agent is. It hears of changes of rule sets (nftables, and with it
//! iptables-nft), of IPsec policies and states, of routes and routing rules and
//! of neighbours; each raises the generation. Once a second it looks at what
//! makes no event: conntrack's settings, programs that take packets from
//! netfilter, and how many flows are confirmed, from which the validity follows.

mod events;

use std::{
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU32},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{MapData, PerCpuArray};
use flannel_ebpf::{
    layout::{COUNTERS, Tally},
    reason::Reason,
};
use thread_priority::{
    RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};
use tracing::{debug, info, warn};

use self::events::Events;
use super::{
    EbpfError, counters,
    epoch::{Generation, pinned},
    own::{Command, Commands},
};
use crate::datapath::{
    conntrack::{Conntrack, Standing},
    kernel_file::KernelFile,
};

/// Who takes packets from netfilter; by thread, because namespaces are.
const QUEUES: &str = "/proc/thread-self/net/netfilter/nfnetlink_queue";
/// How often the things without an event are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// The least time between two generations, while few flows have to be rechecked.
const LEAST_GAP: Duration = Duration::from_millis(50);
/// The most, however many there are.
const MOST_GAP: Duration = Duration::from_secs(1);
/// What one flow's recheck may take of the gap: about five times what it costs.
const RECHECK_COST: Duration = Duration::from_micros(50);
/// Confirmations per second, both directions of a flow counted, that may be spent on time alone.
const PROBE_BUDGET: f64 = 2_000.0;
/// The longest that a verdict may hold without being confirmed.
pub const LONGEST_VALIDITY: Duration = Duration::from_secs(30);
/// How long TCP stays with the stack after somebody changed conntrack's settings again.
const QUARREL: Duration = Duration::from_secs(10);

/// How the bypass fares.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bypass {
    /// Nothing bypasses the stack, for this reason.
    pub held: Option<String>,
    /// TCP does not, for this reason.
    pub tcp_held: Option<String>,
    /// How long a confirmed verdict holds.
    pub validity: Duration,
    /// How often the generation was raised since this agent opened the datapath.
    pub raised: u64,
}

/// The running watch; it ends when this is dropped.
pub struct Invalidation {
    _stop: UnixStream,
    state: Arc<Mutex<Bypass>>,
}

impl Invalidation {
    /// Starts watching in the network namespace of the calling thread. Before this returns
    /// conntrack has been prepared and the programs know what may bypass the stack.
    ///
    /// # Errors
    /// A socket could not be opened, a map not read, or the thread not started.
    pub(super) fn start(
        maps: &Path,
        generation: Generation,
        conntrack: Conntrack,
        validity: Duration,
        own: Option<Commands>,
        tunnel: Arc<AtomicU32>,
    ) -> Result<Self, EbpfError> {
        let counters = pinned(maps, COUNTERS)?;
        let failed = |source| EbpfError::Watch { source };
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let state = Arc::new(Mutex::new(Bypass {
            validity,
            ..Bypass::default()
        }));
        let mut watch = Watch {
            events: Events::listen(stopped, tunnel).map_err(failed)?,
            generation,
            own,
            conntrack,
            queues: KernelFile::at(QUEUES),
            counters,
            state: Arc::clone(&state),
            least_validity: validity,
            gap: LEAST_GAP,
            raised: Instant::now(),
            pending: false,
            looked: Instant::now(),
            confirmed: None,
            quarrel: None,
        };
        watch.look();
        thread::Builder::new()
            .name("invalidation".to_owned())
            .spawn(move || watch.run())
            .map_err(failed)?;
        Ok(Self { _stop: stop, state })
    }

    /// How the bypass fares now.
    #[must_use]
    pub fn state(&self) -> Bypass {
        of_state(&self.state, |state| state.clone())
    }
}

fn of_state<T>(state: &Mutex<Bypass>, work: impl FnOnce(&mut Bypass) -> T) -> T {
    work(&mut state.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Puts the calling thread before all ordinary ones: a command that denies something wakes it, and
/// it is done before the command returns, however busy the node is.
fn hurry() {
    let outcome = set_thread_priority_and_policy(
        thread_native_id(),
        ThreadPriority::Min,
        ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin),
    );
    if let Err(error) = outcome {
        info!(
            ?error,
            "no real-time priority (CAP_SYS_NICE): on a busy node changed rules take effect some milliseconds later"
        );
    }
}

struct Watch {
    events: Events,
    generation: Generation,
    /// Who hands over what conntrack does not know yet.
    own: Option<Commands>,
    conntrack: Conntrack,
    queues: KernelFile,
    counters: PerCpuArray<MapData, Tally>,
    state: Arc<Mutex<Bypass>>,
    least_validity: Duration,
    gap: Duration,
    raised: Instant,
    pending: bool,
    looked: Instant,
    confirmed: Option<u64>,
    quarrel: Option<Instant>,
}

impl Watch {
    fn run(mut self) {
        hurry();
        loop {
            let until_look = PERIOD.saturating_sub(self.looked.elapsed());
            let until_raise = self.gap.saturating_sub(self.raised.elapsed());
            let wait = if self.pending {
                until_look.min(until_raise)
            } else {
                until_look
            };
            let Some(changed) = self.events.wait(wait) else {
                return;
            };
            if changed.rules || changed.ways {
                self.generation.raise_classes();
                self.hand_over_own();
                self.pending = true;
            }
            if changed.rules {
                self.events.discard_rules();
                // For what came after the first time and was discarded with the rest.
                self.generation.raise_classes();
                // A program may have been put before the rules it serves.
                self.hold_while_queued();
            }
            if self.pending && self.raised.elapsed() >= self.gap {
                self.generation.raise();
                self.raised = Instant::now();
                self.pending = false;
                self.with_state(|state| state.raised += 1);
            }
            if self.looked.elapsed() >= PERIOD {
                self.look();
            }
        }
    }

    fn hand_over_own(&self) {
        if let Some(own) = &self.own {
            own.send(Command::HandOver);
        }
    }

    fn with_state<T>(&self, work: impl FnOnce(&mut Bypass) -> T) -> T {
        of_state(&self.state, work)
    }

    /// Lets the programs know what may bypass the stack.
    fn allow(&self) {
        let (any, tcp) = self.with_state(|state| (state.held.is_none(), state.tcp_held.is_none()));
        self.generation.allow(any, any && tcp);
    }

    /// Everything that makes no event.
    fn look(&mut self) {
        self.looked = Instant::now();
        self.hold_while_queued();
        self.keep_conntrack();
        self.allow();
        self.adapt();
    }

    /// A packet that netfilter gives to a program leaves the stack later and from elsewhere; as
    /// its flow cannot be told from others, nothing bypasses while there is such a program.
    fn hold_while_queued(&mut self) {
        let held = bound_queue(&self.queues.read().unwrap_or_default()).map(|(queue, pid)| {
            format!(
                "process {pid} takes packets from netfilter (NFQUEUE {queue}): they all take the stack"
            )
        });
        let changed = self.with_state(|state| {
            let changed = state.held != held;
            state.held.clone_from(&held);
            changed
        });
        if changed {
            self.allow();
            self.hand_over_own();
            match held {
                Some(reason) => warn!(reason, "no packet bypasses the stack"),
                None => info!("packets may bypass the stack"),
            }
        }
    }

    /// Keeps conntrack's settings, and TCP with the stack where somebody else holds them otherwise.
    fn keep_conntrack(&mut self) {
        let standing = match (self.conntrack.standing(), self.quarrel) {
            (Standing::Fit, None) => Standing::Fit,
            (Standing::Fit, Some(since)) if since.elapsed() >= QUARREL => {
                self.quarrel = None;
                Standing::Fit
            }
            (Standing::Fit, Some(_)) => Standing::Unfit(
                "conntrack's settings were changed by somebody else and set again; waiting to see whether they stay".to_owned(),
            ),
            (Standing::Unfit(_), _) => {
                // Flows that are under way must not meet the stack unprepared, nor the stack them.
                let any = self.with_state(|state| state.held.is_none());
                self.generation.allow(any, false);
                self.hand_over_own();
                let first = !self.conntrack.is_changed();
                match self.conntrack.prepare() {
                    Standing::Fit if first => Standing::Fit,
                    Standing::Fit => {
                        self.quarrel = Some(Instant::now());
                        Standing::Unfit(
                            "somebody else changed conntrack's settings; they were set again"
                                .to_owned(),
                        )
                    }
                    unfit => unfit,
                }
            }
        };
        let reason = match standing {
            Standing::Fit => None,
            Standing::Unfit(reason) => Some(reason),
        };
        self.with_state(|state| {
            if state.tcp_held != reason {
                match &reason {
                    Some(reason) => warn!(reason, "TCP does not bypass the stack"),
                    None => info!("TCP may bypass the stack"),
                }
                state.tcp_held = reason;
            }
        });
    }

    /// The validity follows from how many flows there are: each is confirmed about twice per
    /// validity, and only so many confirmations may be spent.
    fn adapt(&mut self) {
        let confirmed = match self.confirmations() {
            Ok(confirmed) => confirmed,
            Err(error) => {
                debug!(%error, "cannot read counters");
                return;
            }
        };
        let Some(before) = self.confirmed.replace(confirmed) else {
            return;
        };
        let rate = confirmed.saturating_sub(before) as f64 / PERIOD.as_secs_f64();
        let now = self.with_state(|state| state.validity);
        let validity = adapted(now, rate, self.least_validity);
        // One direction is confirmed each half validity.
        let flows = rate * now.as_secs_f64() / 2.0;
        self.gap = RECHECK_COST.mul_f64(flows).clamp(LEAST_GAP, MOST_GAP);
        if validity != now {
            self.generation.set_validity(validity);
            self.with_state(|state| state.validity = validity);
        }
    }

    fn confirmations(&self) -> Result<u64, aya::maps::MapError> {
        let mut sum = 0;
        for reason in [Reason::LearnOutConfirmed, Reason::LearnInConfirmed] {
            sum += counters::total(&self.counters, reason)?.packets;
        }
        Ok(sum)
    }
}

/// The validity at which `rate` confirmations per second become the budget.
fn adapted(now: Duration, rate: f64, least: Duration) -> Duration {
    let wanted = now.mul_f64(rate / PROBE_BUDGET);
    let most = LONGEST_VALIDITY.max(least);
    // Down by halves: a pause of one second is not yet a quiet network.
    let wanted = wanted.max(now / 2).clamp(least, most);
    // Small steps are not worth a write.
    if wanted.abs_diff(now) * 8 < now && wanted != least {
        now
    } else {
        wanted
    }
}

/// First netfilter queue that a process has bound: its number and the process.
fn bound_queue(text: &str) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_queue_is_found() {
        assert_eq!(bound_queue(""), None);
        let text = "    3  12345     0 2 65531     0     0        0  1\n";
        assert_eq!(bound_queue(text), Some((3, 12345)));
    }

    #[test]
    fn the_validity_follows_the_number_of_flows() {
        let least = Duration::from_secs(2);
        assert_eq!(adapted(least, 0.0, least), least);
        // 2,000 flows, two directions, confirmed every second: twice the budget's share.
        assert_eq!(adapted(least, 2_000.0, least), least);
        assert_eq!(adapted(least, 30_000.0, least), Duration::from_secs(30));
        assert_eq!(
            adapted(LONGEST_VALIDITY, 1_000_000.0, least),
            LONGEST_VALIDITY
        );
        // Quiet again: back by halves.
        assert_eq!(
            adapted(LONGEST_VALIDITY, 0.0, least),
            Duration::from_secs(15)
        );
        assert_eq!(adapted(Duration::from_secs(3), 0.0, least), least);
    }

    #[test]
    fn a_validity_that_the_operator_made_long_stays() {
        let long = Duration::from_secs(60);
        assert_eq!(adapted(long, 1_000_000.0, long), long);
    }
}
