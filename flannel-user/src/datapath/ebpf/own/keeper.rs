//! The thread that keeps own connections.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    Command, LAST_PASSES, LAST_PAUSE, Opening, OwnState,
    commands::{Heard, Received},
    exchange::Exchange,
    handover::{Extent, LINGER, Moment},
    ipsec::Policies,
    rules::{Judgement, Rules},
    table::OwnTable,
};
use crate::datapath::ebpf::epoch::Generation;

/// Between two looks while connections are young.
const PERIOD: Duration = Duration::from_millis(100);
/// The same while they are few: looking costs by the table's size.
const SLOW_PERIOD: Duration = Duration::from_millis(250);
/// The same while there are none: the first ones may wait, but not until a SYN is sent again. Waking
/// up is most of what an idle agent does.
const IDLE_PERIOD: Duration = HEARTBEAT;
/// How many are few.
const FEW: usize = 64;
/// How many are so many that a look each [`PERIOD`] would cost a good part of what they save.
const MANY: usize = 4096;
/// How often the heartbeat is renewed.
const HEARTBEAT: Duration = Duration::from_millis(900);
/// How far it reaches.
const REACH: Duration = Duration::from_secs(3);
/// How long a program may need from reading what has expired to taking an entry over.
const PROGRAM: Duration = Duration::from_millis(1);
/// How long a class holds while few ask.
const SHORTEST_VALIDITY: Duration = Duration::from_secs(1);
/// The same, however many there are.
const LONGEST_VALIDITY: Duration = Duration::from_secs(60);
/// SYNs per second that may be spent on asking.
const ASKING_BUDGET: f64 = 85.0;
/// How long the answer to one may take.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often classes are counted, and unused ones looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// The same while no SYN asks for any.
const IDLE_SWEEP: Duration = Duration::from_secs(60);
/// How long a class is unused before it is forgotten.
const UNUSED: Duration = Duration::from_secs(300);

/// The validity at which so many classes, each of which asks once in it, keep to the budget.
fn validity_for(classes: f64) -> Duration {
    Duration::from_secs_f64(classes / ASKING_BUDGET).clamp(SHORTEST_VALIDITY, LONGEST_VALIDITY)
}

/// After `asked` SYNs have asked within a second: no two of them were of one class, so there are at
/// least as many classes. There may be more, which have asked before: that is for the next count.
fn lengthened(now: Duration, asked: f64) -> Duration {
    now.max(validity_for(asked))
}

/// After a count of the classes in use; down by halves.
fn counted(now: Duration, in_use: u64) -> Duration {
    validity_for(in_use as f64).max(now / 2)
}

/// How long after a count of the classes the next is due. While none is asked for, only their ages
/// change, and slowly against a long validity.
fn rest_after_count(validity: Duration, is_idle: bool) -> Duration {
    match (is_idle, validity > SHORTEST_VALIDITY) {
        (false, _) => SWEEP,
        (true, true) => SWEEP.max(validity / 4),
        (true, false) => IDLE_SWEEP,
    }
}

/// Everything that the thread works with.
pub(super) struct Keeper {
    exchange: Exchange,
    generation: Generation,
    received: Received,
    state: Arc<Mutex<OwnState>>,
    opening: Opening,
    rules: Rules,
    policies: Policies,
    /// How long a class holds.
    validity: Duration,
    /// SYNs that had asked the stack at the last heartbeat.
    asked: Option<u64>,
    /// When classes were last counted and unused ones forgotten.
    swept: Instant,
    /// SYNs that had looked for a class until then.
    sought: Option<u64>,
    /// When the heartbeat was renewed; `None`: it is due.
    beaten: Option<Instant>,
    /// When something was last done because it was time.
    ticked: Instant,
    looked: Instant,
    /// The counter at the last look.
    opened: Option<u64>,
    /// Connections that programs had called for until then.
    called: u64,
    /// Entries after the last look.
    held: usize,
    complained: Option<String>,
}

impl Keeper {
    pub(super) fn new(
        table: OwnTable,
        generation: Generation,
        received: Received,
        state: Arc<Mutex<OwnState>>,
        rules: Rules,
    ) -> Self {
        Self {
            exchange: Exchange::new(table),
            generation,
            received,
            state,
            opening: Opening::None,
            rules,
            policies: Policies::default(),
            validity: SHORTEST_VALIDITY,
            asked: None,
            swept: Instant::now(),
            sought: None,
            beaten: None,
            ticked: Instant::now(),
            looked: Instant::now(),
            opened: None,
            called: 0,
            held: usize::MAX,
            complained: None,
        }
    }

    pub(super) fn run(mut self) {
        // What an agent before us left opens no more before we say so.
        self.generation.open_own(None);
        self.generation.set_class_validity(self.validity, PATIENCE);
        // It may have been killed between telling conntrack of a connection and letting go of it:
        // one that has ended meanwhile would be alive in conntrack for days.
        self.look(Wanted::All);
        loop {
            let asks_rules = self.opening == Opening::Classes;
            let period = match self.held {
                _ if asks_rules && self.rules.are_unread() => PERIOD,
                _ if self.exchange.has_resets() => PERIOD,
                0 => IDLE_PERIOD,
                1..=FEW => SLOW_PERIOD,
                _ => PERIOD,
            };
            let wait = period.saturating_sub(self.ticked.elapsed());
            let news = self.rules.descriptor().filter(|_| asks_rules);
            let command = match self.received.wait(wait, news) {
                Heard::Command(command) => command,
                Heard::News | Heard::Nothing => {
                    self.tick();
                    continue;
                }
            };
            match command {
                Command::HandOver => {
                    // First what was allowed before, then what may be allowed from now on.
                    self.look_if_any(Wanted::Live);
                    self.beat();
                }
                Command::Allow(opening) => self.allow(opening),
                Command::End => break,
            }
        }
        self.end();
    }

    /// Nothing has happened, or rules may have changed that make no event.
    fn tick(&mut self) {
        self.ticked = Instant::now();
        self.exchange.tell_resets();
        let is_due = self.is_beat_due();
        // In any case, or the same news would end the next wait.
        let has_news = self.opening == Opening::Classes && self.rules.have_news();
        if is_due || has_news {
            self.beat();
        }
        if is_due && self.opening == Opening::Classes {
            self.adapt();
        }
        if self.is_look_due() {
            self.look_if_any(Wanted::Due);
        }
    }

    /// Looking costs by the table's size. In a large one most entries wait for late packets; those
    /// that cannot wait are counted.
    fn is_look_due(&mut self) -> bool {
        if self.held <= MANY || self.looked.elapsed() >= SLOW_PERIOD {
            return true;
        }
        let called = self.exchange.called();
        std::mem::replace(&mut self.called, called) != called
    }

    /// Nothing stays: whoever comes after us may not know how to carry it.
    fn end(&mut self) {
        self.opening = Opening::None;
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

    fn allow(&mut self, opening: Opening) {
        if self.opening == opening {
            return;
        }
        let before = std::mem::replace(&mut self.opening, opening);
        self.with_state(|state| {
            state.wanted = opening != Opening::None;
            state.by_class = opening == Opening::Classes;
        });
        if opening == Opening::None {
            self.generation.open_own(None);
            self.look(Wanted::Live);
            return;
        }
        if before == Opening::None
            && let Err(error) = self.exchange.learn_translated()
        {
            self.complain(Some(format!("conntrack cannot be read: {error}")));
        }
        self.beaten = None;
        self.beat();
    }

    fn is_beat_due(&self) -> bool {
        self.beaten
            .is_none_or(|beaten| beaten.elapsed() >= HEARTBEAT)
    }

    /// What speaks against opening connections at present.
    fn objection(&mut self) -> Option<String> {
        let policies = self.policies.count();
        if policies > 0 {
            return Some(format!(
                "{policies} IPsec policies: only the stack can tell whom they concern"
            ));
        }
        if let Err(error) = self.exchange.reach_conntrack() {
            return Some(format!(
                "connections could not be handed over to conntrack: {error}"
            ));
        }
        if self.opening != Opening::Classes {
            return None;
        }
        match self.rules.judge() {
            Judgement::Fit => None,
            Judgement::Unfit(reason) => Some(reason),
        }
    }

    /// Renews the heartbeat, unless something speaks against it.
    fn beat(&mut self) {
        if self.opening == Opening::None {
            self.beaten = Some(Instant::now());
            return;
        }
        let paused = self.objection();
        if paused.is_some() {
            self.generation.open_own(None);
            self.beaten = Some(Instant::now());
            if self.complained != paused {
                self.look(Wanted::Live);
            }
        } else if self.complained.is_some() || self.is_beat_due() {
            self.generation.open_own(Some(REACH));
            self.beaten = Some(Instant::now());
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

    /// Each class asks the stack once in its validity: that follows from how many ask.
    fn adapt(&mut self) {
        let mut validity = self.validity;
        let asked = self.exchange.asked();
        if let Some(before) = self.asked.replace(asked) {
            let rate = asked.saturating_sub(before) as f64 / HEARTBEAT.as_secs_f64();
            validity = lengthened(validity, rate);
        }
        // While it stays, so do the classes and who uses them.
        let sought = asked + self.exchange.classless();
        let rest = rest_after_count(validity, self.sought == Some(sought));
        if self.swept.elapsed() >= rest {
            self.swept = Instant::now();
            self.sought = Some(sought);
            let clock = self.generation.clock();
            // Who is used has asked within its validity, or is about to.
            let census = self
                .exchange
                .count_classes(&clock, validity + HEARTBEAT, UNUSED);
            self.with_state(|state| state.classes = census.known);
            validity = counted(validity, census.in_use);
        }
        if validity != self.validity {
            self.validity = validity;
            self.generation.set_class_validity(validity, PATIENCE);
        }
        self.with_state(|state| state.class_validity_seconds = validity.as_secs_f64());
    }

    /// Looks unless there is nothing to see.
    fn look_if_any(&mut self, wanted: Wanted) {
        let opened = self.exchange.opened();
        let has_opened = self.opened.replace(opened) != Some(opened);
        if has_opened || self.held != 0 {
            self.look(wanted);
        } else {
            self.looked = Instant::now();
        }
    }

    /// Goes through the table once.
    fn look(&mut self, wanted: Wanted) {
        self.looked = Instant::now();
        self.called = self.exchange.called();
        let expired = match wanted {
            Wanted::Due => {
                let expired = self.generation.expire_own(LINGER);
                thread::sleep(PROGRAM);
                expired
            }
            // What was told long ago: nothing waits.
            Wanted::Live | Wanted::All => self.generation.own_expired(),
        };
        let clock = self.generation.clock();
        let moment = Moment {
            clock: &clock,
            expired,
        };
        let looked = self.exchange.look(match wanted {
            Wanted::Due => Extent::Due(moment),
            Wanted::Live => Extent::Live(moment),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_validity_of_classes_follows_their_number() {
        assert_eq!(validity_for(0.0), SHORTEST_VALIDITY);
        assert_eq!(validity_for(ASKING_BUDGET), SHORTEST_VALIDITY);
        assert_eq!(validity_for(ASKING_BUDGET * 50.0), Duration::from_secs(50));
        assert_eq!(validity_for(16_384.0), LONGEST_VALIDITY);
    }

    #[test]
    fn classes_are_counted_seldom_while_nobody_asks_for_one() {
        assert_eq!(rest_after_count(LONGEST_VALIDITY, false), SWEEP);
        assert_eq!(rest_after_count(SHORTEST_VALIDITY, false), SWEEP);
        assert_eq!(
            rest_after_count(LONGEST_VALIDITY, true),
            LONGEST_VALIDITY / 4
        );
        assert_eq!(rest_after_count(SHORTEST_VALIDITY * 2, true), SWEEP);
        assert_eq!(rest_after_count(SHORTEST_VALIDITY, true), IDLE_SWEEP);
    }

    #[test]
    fn a_second_without_questions_shortens_nothing() {
        // All have asked in the first second; nobody has to for the rest of the validity.
        let long = lengthened(SHORTEST_VALIDITY, 5_000.0);
        assert!(5_000.0 / long.as_secs_f64() <= 100.0, "{long:?}");
        assert_eq!(lengthened(long, 0.0), long);
        assert_eq!(counted(long, 5_000), long);
        // They are used no more.
        assert_eq!(counted(long, 40), long / 2);
        assert_eq!(counted(Duration::from_millis(1_500), 0), SHORTEST_VALIDITY);
    }
}
