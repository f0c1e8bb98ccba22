//! Between the table of own connections and conntrack.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use flannel_ebpf::{
    layout::{ClassKey, FlowKey, OwnFlow},
    own,
    reason::Reason,
    sighting::Way,
};
use tracing::{debug, warn};

use super::{
    handover::{self, Due, Extent, Timeouts},
    table::OwnTable,
};
use crate::datapath::{
    conntrack_table::{ConntrackTable, Entry, TableError, TcpState, Tuple, status},
    ebpf::epoch::Clock,
};

/// How long a RST may take from the program that has seen it to conntrack.
const RESET_UNDER_WAY: Duration = Duration::from_millis(50);
/// Connections that are asked for, and then told to be reset, in one go.
const RESETS_AT_ONCE: usize = 16;

/// Both tables.
pub(super) struct Exchange {
    table: OwnTable,
    conntrack: Option<ConntrackTable>,
    /// Flows that bypassed and that a RST has ended, as programs had told until `resets_taken`:
    /// conntrack may not have seen the RST by then.
    resets: Vec<FlowKey>,
    resets_taken: Instant,
}

/// What one look found and did.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Looked {
    /// Live connections that stayed.
    pub(super) live: usize,
    /// Closed ones that wait for late packets.
    pub(super) closed: usize,
    /// Given to conntrack.
    pub(super) handed_over: usize,
    /// Refused there; they stayed.
    pub(super) refused: usize,
}

/// How many classes there are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ClassCensus {
    pub(super) known: u64,
    /// Used of late.
    pub(super) in_use: u64,
}

impl Exchange {
    pub(super) fn new(table: OwnTable) -> Self {
        Self {
            table,
            conntrack: None,
            resets: Vec::new(),
            resets_taken: Instant::now(),
        }
    }

    /// How many connections have opened so far.
    pub(super) fn opened(&self) -> u64 {
        self.table.count(Reason::OwnOpened)
    }

    /// How many SYNs have asked the stack for their class so far.
    pub(super) fn asked(&self) -> u64 {
        self.table.count(Reason::OwnProbe)
    }

    /// How many SYNs have found no class so far.
    pub(super) fn classless(&self) -> u64 {
        self.table.count(Reason::OwnNoClass)
    }

    /// How many connections programs have called the agent for so far: only the kernel can carry
    /// them, or another one waits for their tuple.
    pub(super) fn called(&self) -> u64 {
        [Reason::OwnRecalled, Reason::OwnQuoted, Reason::OwnClashed]
            .into_iter()
            .map(|reason| self.table.count(reason))
            .sum()
    }

    /// Counts classes and those of which a SYN has passed the stack within `recent`; forgets those
    /// of which none has for `unused`.
    pub(super) fn count_classes(
        &mut self,
        clock: &Clock,
        recent: Duration,
        unused: Duration,
    ) -> ClassCensus {
        let (recent, unused) = (clock.ticks(recent), clock.ticks(unused));
        let now = clock.now();
        let mut old = Vec::new();
        let mut census = ClassCensus::default();
        let read = self.table.scan_classes(|key, class| {
            // A program may have read the clock just after us.
            let age = now.wrapping_sub(class.syn_seen).cast_signed().max(0);
            if age.cast_unsigned() > unused {
                old.push(*key);
                return;
            }
            census.known += 1;
            census.in_use += u64::from(age.cast_unsigned() <= recent);
        });
        if let Err(error) = read {
            debug!(%error, "cannot read classes");
        }
        for key in &old {
            self.table.delete_class(key);
        }
        census
    }

    pub(super) fn reach_conntrack(&mut self) -> Result<&mut ConntrackTable, TableError> {
        if self.conntrack.is_none() {
            self.conntrack = Some(ConntrackTable::open()?);
        }
        Ok(self.conntrack.as_mut().expect("opened just now"))
    }

    /// Connections through Services that are there already: the kernel has chosen their ports.
    pub(super) fn learn_translated(&mut self) -> Result<(), TableError> {
        let translated = self
            .reach_conntrack()?
            .dump(|entry| entry.status & status::DST_NAT != 0)?;
        let classes: BTreeSet<ClassKey> = translated
            .iter()
            .map(|entry| ClassKey {
                pod: entry.reply.destination.ip().octets(),
                peer: entry.reply.source.ip().octets(),
                port: entry.reply.source.port().to_be_bytes(),
                opener: Way::Out as u8,
                _pad: 0,
            })
            .collect();
        for class in &classes {
            if let Err(error) = self.table.mark_translated(class) {
                warn!(%error, "cannot note a connection through a Service");
            }
        }
        debug!(
            classes = classes.len(),
            "connections through Services noted"
        );
        Ok(())
    }

    /// Is there something to tell conntrack soon?
    pub(super) const fn has_resets(&self) -> bool {
        !self.resets.is_empty()
    }

    /// Tells conntrack which RST was genuine, of those that programs have told of for a while.
    pub(super) fn tell_resets(&mut self) {
        if self.resets_taken.elapsed() < RESET_UNDER_WAY {
            return;
        }
        self.resets_taken = Instant::now();
        let news = self.table.take_resets();
        let resets = std::mem::replace(&mut self.resets, news);
        if resets.is_empty() {
            return;
        }
        let timeouts = Timeouts::read();
        let conntrack = match self.reach_conntrack() {
            Ok(conntrack) => conntrack,
            Err(error) => {
                debug!(%error, resets = resets.len(), "conntrack is not told of resets");
                return;
            }
        };
        let tuples: Vec<Tuple> = resets.iter().map(handover::way).collect();
        // What is read is not old when it is written back: the port may be used again.
        for tuples in tuples.chunks(RESETS_AT_ONCE) {
            let ended: Vec<Entry> = conntrack
                .get_many(tuples)
                .into_iter()
                .filter_map(|answer| handover::after_reset(&answer.ok()??, &timeouts))
                .collect();
            for result in conntrack.update(&ended) {
                if let Err(error) = result {
                    debug!(%error, "conntrack refused the end of a connection");
                }
            }
        }
    }

    /// Goes through the table once.
    pub(super) fn look(&mut self, extent: Extent<'_>) -> Looked {
        let mut over = Vec::new();
        let mut due = Vec::new();
        let (mut live, mut closed) = (0, 0);
        let scanned = self
            .table
            .scan(|key, flow| match handover::due(flow, extent) {
                Due::Stay if own::is_over(flow) => closed += 1,
                Due::Stay => live += 1,
                Due::HandOver => due.push((*key, *flow)),
                Due::Delete => over.push(*key),
            });
        if let Err(error) = scanned {
            warn!(%error, "cannot read the table of own connections");
        }
        for key in &over {
            self.table.delete(key);
        }
        let (handed_over, refused) = self.hand_over(&due);
        Looked {
            live: live + due.len() - handed_over,
            closed,
            handed_over,
            refused,
        }
    }

    /// Hands connections over: how many went, and how many conntrack refused. Those stay ours.
    fn hand_over(&mut self, due: &[(FlowKey, OwnFlow)]) -> (usize, usize) {
        if due.is_empty() {
            return (0, 0);
        }
        let timeouts = Timeouts::read();
        let entries: Vec<Entry> = due
            .iter()
            .map(|(key, flow)| handover::entry(key, flow, &timeouts))
            .collect();
        let conntrack = match self.reach_conntrack() {
            Ok(conntrack) => conntrack,
            Err(error) => {
                warn!(%error, "connections stay out of conntrack");
                return (0, due.len());
            }
        };
        // A translated connection has the tuple: it goes, its client sends its SYN again and gets
        // another port.
        let clashed: Vec<_> = due
            .iter()
            .zip(&entries)
            .filter(|((_, flow), _)| flow.clashed != 0)
            .map(|(_, entry)| entry.reply)
            .collect();
        conntrack.delete(&clashed);
        let is_known = known(conntrack, &entries);
        let strange: Vec<Entry> = entries
            .iter()
            .zip(&is_known)
            .filter(|(_, known)| !**known)
            .map(|(entry, _)| entry.clone())
            .collect();
        let mut inserted = conntrack.insert(&strange).into_iter();
        let results = is_known.iter().map(|known| {
            let result = if *known { None } else { inserted.next() };
            result.unwrap_or(Ok(()))
        });

        let (mut handed_over, mut refused) = (0, 0);
        for (((key, _), entry), result) in due.iter().zip(&entries).zip(results) {
            if let Err(error) = result {
                debug!(connection = ?entry.original, %error, "conntrack refused a connection");
                refused += 1;
                continue;
            }
            // While the entry is there conntrack sees nothing by itself, and what it is told undoes
            // nothing. So as little as possible is left for a correction after that: a connection
            // that ended just then would stay as it was before.
            let newer = self
                .table
                .get(key)
                .and_then(|now| handover::correction(entry, handover::entry(key, &now, &timeouts)));
            if let Some(newer) = &newer {
                self.correct(newer);
            }
            match self.table.take(key) {
                Ok(Some(last)) => {
                    let told = newer.as_ref().unwrap_or(entry);
                    let last = handover::entry(key, &last, &timeouts);
                    if let Some(correction) = handover::correction(told, last) {
                        self.correct(&correction);
                    }
                    handed_over += 1;
                }
                Ok(None) => handed_over += 1,
                Err(error) => {
                    warn!(%error, "cannot take a connection out of the table");
                    refused += 1;
                }
            }
        }
        (handed_over, refused)
    }

    /// Tells conntrack at once: it is about to see the connection's packets itself, or does already,
    /// and what it learns from them must not be undone.
    fn correct(&mut self, correction: &Entry) {
        let Some(conntrack) = &mut self.conntrack else {
            return;
        };
        for result in conntrack.update(std::slice::from_ref(correction)) {
            if let Err(error) = result {
                debug!(%error, "conntrack refused a correction");
            }
        }
    }
}

/// Of which unanswered SYNs conntrack knows better: it holds a connection of that tuple that lives,
/// into which the SYN does not belong.
fn known(conntrack: &mut ConntrackTable, entries: &[Entry]) -> Vec<bool> {
    let unanswered: Vec<usize> = (0..entries.len())
        .filter(|index| entries[*index].state == TcpState::SynSent)
        .collect();
    let tuples: Vec<Tuple> = unanswered
        .iter()
        .map(|index| entries[*index].original)
        .collect();
    let mut known = vec![false; entries.len()];
    for (index, answer) in unanswered.into_iter().zip(conntrack.get_many(&tuples)) {
        known[index] = matches!(answer, Ok(Some(entry)) if entry.state.is_alive());
    }
    known
}
