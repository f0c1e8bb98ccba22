//! What the stack has said about connections that are alike: same pod and peer, same port of the
//! server, same DSCP, same end that opens.
//!
//! A class opens connections by itself only while the stack has let such SYNs **and their
//! answers** pass, unchanged, in the present generation. The SYN alone would say too little: a
//! policy at the other node lets it pass here. Ever again one SYN asks the stack; until it and its
//! answer are through, every SYN takes the stack.

use super::entry::Class;
use crate::{layout::Epoch, reason::Reason};

/// SYNs that have to pass before a class opens connections.
pub const NEEDED: u8 = 3;
/// Connections that may be in their handshake at a time, or open within one period.
pub const HALF_OPEN: u32 = 256;

/// What holds at the moment of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Jiffies.
    pub jiffies: u32,
    /// Generations of the pod and of the peer's node.
    pub pod: u32,
    /// See `pod`.
    pub peer: u32,
}

/// May a SYN of this class open a connection?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Yes.
    Open,
    /// It asks the stack; whoever comes after it has to wait for what it finds.
    Ask,
}

/// Did `one` happen at or after `other`?
#[inline(always)]
const fn not_before(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() >= 0
}

/// Where a class stands.
///
/// # Errors
/// Why the SYN takes the stack.
#[inline(always)]
pub const fn standing(
    class: &Class,
    epoch: &Epoch,
    now: &Now,
    dscp: u8,
) -> Result<Standing, Reason> {
    if class.syns < NEEDED || class.dscp != dscp {
        return Err(Reason::OwnNoClass);
    }
    if class.generation != epoch.class_generation
        || class.pod_generation != now.pod
        || class.peer_generation != now.peer
    {
        return Err(Reason::OwnChanged);
    }
    if class.answered == 0 {
        return Err(Reason::OwnNoClass);
    }
    if class.pending != 0 {
        return Err(Reason::OwnPending);
    }
    if now.jiffies.wrapping_sub(class.syn_seen) > epoch.class_validity {
        return Ok(Standing::Ask);
    }
    if !not_before(class.answer_seen, class.waiting_since)
        && now.jiffies.wrapping_sub(class.waiting_since) > epoch.class_patience
    {
        return Err(Reason::OwnUnanswered);
    }
    if class.half_open >= HALF_OPEN
        && now.jiffies.wrapping_sub(class.half_open_since) <= epoch.class_patience * 4
    {
        return Err(Reason::OwnHalfOpen);
    }
    Ok(Standing::Open)
}

/// A connection opens by its class.
#[inline(always)]
pub const fn opens(class: &mut Class, epoch: &Epoch, now: u32) {
    if now.wrapping_sub(class.half_open_since) > epoch.class_patience * 4 {
        class.half_open_since = now;
        class.half_open = 0;
    }
    class.half_open += 1;
    class.opened = class.opened.wrapping_add(1);
}

/// A connection that its class opened is past its handshake.
#[inline(always)]
pub const fn settles(class: &mut Class) {
    class.half_open = class.half_open.saturating_sub(1);
}

/// The class after the stack let a SYN pass unchanged; `before` is what it was, if it was.
#[inline(always)]
#[must_use]
pub const fn syn_passed(before: Option<&Class>, generation: u32, now: &Now, dscp: u8) -> Class {
    let fresh = Class {
        syn_seen: now.jiffies,
        answer_seen: now.jiffies.wrapping_sub(1),
        waiting_since: now.jiffies,
        half_open_since: now.jiffies,
        generation,
        pod_generation: now.pod,
        peer_generation: now.peer,
        half_open: 0,
        since: now.jiffies,
        opened: 0,
        syns: 1,
        answered: 0,
        pending: 0,
        dscp,
    };
    let Some(before) = before else {
        return fresh;
    };
    // Another pod behind the address, or another node behind the peer's, is another class.
    if before.dscp != dscp || before.pod_generation != now.pod || before.peer_generation != now.peer
    {
        return fresh;
    }
    let same = before.generation == generation;
    Class {
        syn_seen: now.jiffies,
        waiting_since: if !same || not_before(before.answer_seen, before.waiting_since) {
            now.jiffies
        } else {
            before.waiting_since
        },
        answer_seen: if same {
            before.answer_seen
        } else {
            now.jiffies.wrapping_sub(1)
        },
        generation,
        syns: if before.syns < NEEDED {
            before.syns + 1
        } else {
            NEEDED
        },
        answered: if same { before.answered } else { 0 },
        pending: 0,
        half_open: if before.pending != 0 {
            0
        } else {
            before.half_open
        },
        ..*before
    }
}

/// The stack let the answer to a SYN pass unchanged. One of another generation does not count.
#[inline(always)]
pub const fn answer_passed(class: &mut Class, generation: u32, now: u32) {
    if class.generation == generation {
        class.answer_seen = now;
        class.answered = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::EPOCH;

    const fn at(jiffies: u32) -> Now {
        Now {
            jiffies,
            pod: 3,
            peer: 4,
        }
    }

    /// Three SYNs and an answer at once.
    fn learned(now: u32) -> Class {
        let mut class = syn_passed(None, 7, &at(now), 0);
        for _ in 1..NEEDED {
            class = syn_passed(Some(&class), 7, &at(now), 0);
        }
        answer_passed(&mut class, 7, now);
        class
    }

    #[test]
    fn three_syns_and_an_answer_make_it() {
        let mut class = syn_passed(None, 7, &at(0), 0);
        for _ in 0..20 {
            assert_eq!(
                standing(&class, &EPOCH, &at(1), 0),
                Err(Reason::OwnNoClass),
                "{class:?}"
            );
            class = syn_passed(Some(&class), 7, &at(0), 0);
        }
        answer_passed(&mut class, 6, 0);
        assert_eq!(standing(&class, &EPOCH, &at(1), 0), Err(Reason::OwnNoClass));
        answer_passed(&mut class, 7, 0);
        assert_eq!(standing(&class, &EPOCH, &at(1), 0), Ok(Standing::Open));
        // The answer before the third SYN is as good.
        let mut class = syn_passed(None, 7, &at(0), 0);
        answer_passed(&mut class, 7, 0);
        assert_eq!(standing(&class, &EPOCH, &at(1), 0), Err(Reason::OwnNoClass));
    }

    #[test]
    fn whatever_changed_ends_it_at_once() {
        let class = learned(0);
        let other = |change: fn(&mut Epoch)| {
            let mut epoch = EPOCH;
            change(&mut epoch);
            standing(&class, &epoch, &at(1), 0)
        };
        assert_eq!(
            other(|epoch| epoch.class_generation = 8),
            Err(Reason::OwnChanged)
        );
        for (pod, peer) in [(9, 4), (3, 9)] {
            let now = Now { pod, peer, ..at(1) };
            assert_eq!(standing(&class, &EPOCH, &now, 0), Err(Reason::OwnChanged));
        }
        assert_eq!(standing(&class, &EPOCH, &at(1), 4), Err(Reason::OwnNoClass));
    }

    #[test]
    fn a_new_generation_needs_a_syn_and_its_answer_again() {
        let epoch = Epoch {
            class_generation: 8,
            ..EPOCH
        };
        let mut class = syn_passed(Some(&learned(0)), 8, &at(10), 0);
        assert_eq!(
            standing(&class, &epoch, &at(11), 0),
            Err(Reason::OwnNoClass)
        );
        // An answer to a SYN of before.
        answer_passed(&mut class, 7, 12);
        assert_eq!(
            standing(&class, &epoch, &at(13), 0),
            Err(Reason::OwnNoClass)
        );
        answer_passed(&mut class, 8, 14);
        assert_eq!(standing(&class, &epoch, &at(15), 0), Ok(Standing::Open));
        // Another pod with the same address starts from nothing.
        let other = Now { pod: 99, ..at(20) };
        assert_eq!(syn_passed(Some(&class), 8, &other, 0).syns, 1);
    }

    #[test]
    fn one_syn_asks_and_the_others_wait_for_it() {
        let mut class = learned(0);
        assert_eq!(standing(&class, &EPOCH, &at(1000), 0), Ok(Standing::Open));
        assert_eq!(standing(&class, &EPOCH, &at(1001), 0), Ok(Standing::Ask));
        class.pending = 1;
        assert_eq!(
            standing(&class, &EPOCH, &at(1002), 0),
            Err(Reason::OwnPending)
        );
        let mut class = syn_passed(Some(&class), 7, &at(1003), 0);
        // Its answer is waited for, but not for ever.
        assert_eq!(standing(&class, &EPOCH, &at(1004), 0), Ok(Standing::Open));
        assert_eq!(
            standing(&class, &EPOCH, &at(1003 + 251), 0),
            Err(Reason::OwnUnanswered)
        );
        // Further SYNs without answers do not buy time.
        class = syn_passed(Some(&class), 7, &at(1300), 0);
        assert_eq!(
            standing(&class, &EPOCH, &at(1301), 0),
            Err(Reason::OwnUnanswered)
        );
        answer_passed(&mut class, 7, 1302);
        assert_eq!(standing(&class, &EPOCH, &at(1303), 0), Ok(Standing::Open));
    }

    #[test]
    fn half_open_ones_are_bounded_and_counted_anew() {
        let mut class = learned(0);
        for _ in 0..HALF_OPEN {
            assert_eq!(standing(&class, &EPOCH, &at(10), 0), Ok(Standing::Open));
            opens(&mut class, &EPOCH, 10);
        }
        assert_eq!(
            standing(&class, &EPOCH, &at(10), 0),
            Err(Reason::OwnHalfOpen)
        );
        settles(&mut class);
        assert_eq!(standing(&class, &EPOCH, &at(10), 0), Ok(Standing::Open));
        opens(&mut class, &EPOCH, 10);
        // Counts may drift; a new period begins with none.
        class.syn_seen = 1100;
        class.answer_seen = 1100;
        assert_eq!(standing(&class, &EPOCH, &at(1101), 0), Ok(Standing::Open));
        opens(&mut class, &EPOCH, 1101);
        assert_eq!(class.half_open, 1);
    }
}
