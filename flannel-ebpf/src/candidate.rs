//! Flows that have not earned an entry: how often each has shown the same.
//!
//! The table is small and each place has room for one. Whoever is there keeps
//! the place as long as it shows up, so that many flows that take turns get
//! their verdicts one after the other instead of driving each other out for
//! ever. Now and then a newcomer gets the place all the same: a flow that never
//! gets a verdict does not block it.

use crate::{
    header,
    layout::{CANDIDATES, Candidate, Epoch},
};

/// Sightings with the same outcome in a row that make a verdict: a flow of two packets never pays
/// for an entry.
pub const NEEDED: u8 = 3;

/// Packets of a flow, beside TCP's opening and closing ones, before it is worth notes. A connection
/// for one request and its answer has four: it pays for a look into this table and no more. UDP
/// flows are noted at once: thousands of them may take turns, and each waits for its place once.
#[inline(always)]
#[must_use]
pub const fn strange(protocol: u8) -> u8 {
    if protocol == header::TCP { 4 } else { 0 }
}

/// What is counted of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Its packets: the hash is [`crate::hash::flow`].
    Packets,
    /// What the stack made of them: the hash is of the outcome.
    Outcomes,
}

/// Places for each.
const HALF: u32 = CANDIDATES / 2;

/// The place in the table of a hash. A flow counts its packets and their outcomes at the same time,
/// so that the two must never share a place: they would drive each other out for as long as the
/// flow lives. Each kind has one half, so that a CPU's cache holds what is used of it.
#[inline(always)]
#[must_use]
pub const fn place(counted: Counted, hash: u64) -> u32 {
    let place = (hash >> 40) as u32 % HALF;
    match counted {
        Counted::Packets => place,
        Counted::Outcomes => place + HALF,
    }
}

/// How long a place is kept for somebody who does not show up, in jiffies.
#[inline(always)]
const fn stay(epoch: &Epoch) -> u16 {
    if epoch.validity > 30_000 {
        30_000
    } else {
        epoch.validity as u16
    }
}

/// The candidate after one more packet that shows `outcome`; `None` while its place is another's
/// and it does not insist.
#[inline(always)]
#[must_use]
pub const fn again(
    found: Candidate,
    outcome: u64,
    generation: u32,
    epoch: &Epoch,
    now: u32,
    insists: bool,
) -> Option<Candidate> {
    let (outcome, generation, now) = (outcome as u32, generation as u8, now as u16);
    let is_own = found.times != 0 && found.outcome == outcome;
    if is_own && found.generation == generation {
        return Some(Candidate {
            times: found.times.saturating_add(1),
            at: now,
            ..found
        });
    }
    let is_kept = found.times != 0 && now.wrapping_sub(found.at) <= stay(epoch);
    if is_kept && !is_own && !insists {
        return None;
    }
    Some(Candidate {
        outcome,
        generation,
        times: 1,
        at: now,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::rows::EPOCH;

    /// Just before the low 16 bits of the jiffies wrap.
    const NOW: u32 = 0x2_fff0;

    fn next(found: Candidate, outcome: u64, now: u32) -> Option<Candidate> {
        again(found, outcome, EPOCH.generation, &EPOCH, now, false)
    }

    fn times(count: usize, outcome: u64) -> Candidate {
        (0..count).fold(Candidate::default(), |found, _| {
            next(found, outcome, NOW).expect("its own place")
        })
    }

    #[test]
    fn packets_and_outcomes_have_places_of_their_own_and_use_all() {
        let places = |counted| -> BTreeSet<u32> {
            (0..u64::from(CANDIDATES))
                .map(|hash| place(counted, hash << 40 | 0xff_ffff_ffff))
                .collect()
        };
        let (packets, outcomes) = (places(Counted::Packets), places(Counted::Outcomes));
        assert!(packets.is_disjoint(&outcomes));
        assert_eq!(packets.union(&outcomes).count(), CANDIDATES as usize);
        assert!(
            packets
                .iter()
                .chain(&outcomes)
                .all(|place| *place < CANDIDATES)
        );
    }

    #[test]
    fn the_same_again_is_counted() {
        assert_eq!(times(3, 42).times, 3);
        assert_eq!(times(300, 42).times, u8::MAX, "and does not wrap");
    }

    #[test]
    fn another_outcome_starts_anew_when_the_place_is_free_and_not_before() {
        let found = times(2, 42);
        assert_eq!(next(found, 43, NOW + 2000), None);
        let taken = next(found, 43, NOW + 2001).expect("nobody showed up");
        assert_eq!((taken.outcome, taken.times), (43, 1));
    }

    #[test]
    fn another_generation_starts_anew_at_once() {
        let found = times(2, 42);
        let next = again(found, 42, 8, &EPOCH, NOW, false).expect("its own place");
        assert_eq!((next.generation, next.times), (8, 1));
    }

    #[test]
    fn who_insists_gets_the_place() {
        let next = again(times(2, 42), 43, 7, &EPOCH, NOW, true).expect("it insists");
        assert_eq!((next.outcome, next.times), (43, 1));
    }

    #[test]
    fn flows_in_turn_get_their_verdicts_one_after_the_other() {
        let mut place = Candidate::default();
        let mut waiting = vec![1, 2, 3, 4, 5];
        let mut turns = 0;
        while !waiting.is_empty() {
            turns += 1;
            waiting.retain(|flow| match next(place, *flow, NOW + turns * 300) {
                Some(candidate) if candidate.times >= NEEDED => {
                    place = Candidate::default();
                    false
                }
                Some(candidate) => {
                    place = candidate;
                    true
                }
                None => true,
            });
            assert!(turns <= 5 * u32::from(NEEDED), "{waiting:?} wait for ever");
        }
    }
}
