//! Own connections: TCP that bypasses the stack from its SYN on, unknown to
//! conntrack for about a second.
//!
//! One entry for both directions says how far a connection is, as exactly as
//! the agent needs it to hand the connection over to conntrack, and no more:
//! what the two ends make of each other's packets is theirs. Whatever belongs
//! to a live entry is carried; the entry only ever learns from it.
//!
//! * [`entry`]: what the maps hold.
//! * [`opening`]: may a SYN open a connection?
//! * [`class`]: what the stack has said about connections that are alike.
//! * [`quoted`]: of which connection an ICMP error speaks.

pub mod class;
pub mod entry;
pub mod opening;
pub mod quoted;

use self::entry::{OwnEnd, OwnFlow};
use crate::{
    packet::{ACK, FIN, RST, SYN, is_later},
    sighting::Way,
};

/// What an entry wants to know of a TCP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Flags.
    pub flags: u8,
    /// Sequence number, as on the wire.
    pub seq: [u8; 4],
    /// Acknowledgement number, as on the wire.
    pub ack: [u8; 4],
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// A SYN was sent.
    Opening,
    /// And answered.
    Answered,
    /// And the answer acknowledged.
    Established,
    /// One end has sent its FIN.
    HalfClosed,
    /// Both have.
    Closed,
    /// A RST ended it.
    Reset,
}

/// Is it a SYN without an ACK: the first packet of a connection?
#[inline(always)]
#[must_use]
pub const fn is_opening(flags: u8) -> bool {
    flags & (SYN | ACK | RST | FIN) == SYN
}

/// The entry of a connection whose SYN goes this way.
#[inline(always)]
#[must_use]
pub fn opened(way: Way, now: u32) -> OwnFlow {
    OwnFlow {
        born: now,
        opener: way as u8,
        ..OwnFlow::default()
    }
}

/// Which way the SYN went, as an entry or a class notes it.
#[inline(always)]
#[must_use]
pub const fn opener(noted: u8) -> Way {
    if noted == Way::Out as u8 {
        Way::Out
    } else {
        Way::In
    }
}

/// The end that sent the SYN.
#[inline(always)]
const fn client(flow: &OwnFlow) -> &OwnEnd {
    match opener(flow.opener) {
        Way::Out => &flow.pod,
        Way::In => &flow.peer,
    }
}

/// The end that was called.
#[inline(always)]
const fn server(flow: &OwnFlow) -> &OwnEnd {
    match opener(flow.opener) {
        Way::Out => &flow.peer,
        Way::In => &flow.pod,
    }
}

/// How far it is.
#[inline(always)]
#[must_use]
pub const fn stage(flow: &OwnFlow) -> Stage {
    let (pod, peer) = (&flow.pod, &flow.peer);
    if pod.rst | peer.rst != 0 {
        Stage::Reset
    } else if pod.fin & peer.fin != 0 {
        Stage::Closed
    } else if pod.fin | peer.fin != 0 {
        Stage::HalfClosed
    } else if is_settled(flow) {
        Stage::Established
    } else if server(flow).shaken != 0 {
        Stage::Answered
    } else {
        Stage::Opening
    }
}

/// Is its handshake over: has the client acknowledged the answer?
#[inline(always)]
#[must_use]
pub const fn is_settled(flow: &OwnFlow) -> bool {
    client(flow).shaken != 0
}

/// Is it over?
#[inline(always)]
#[must_use]
pub const fn is_over(flow: &OwnFlow) -> bool {
    matches!(stage(flow), Stage::Closed | Stage::Reset)
}

/// Have the ends gone on with a connection that is older than this SYN, into which it does not
/// belong? Nobody has answered it, and yet somebody has acknowledged.
#[inline(always)]
#[must_use]
pub const fn is_older(flow: &OwnFlow) -> bool {
    (flow.pod.has_acknowledged() || flow.peer.has_acknowledged()) && server(flow).shaken == 0
}

/// Is a SYN that goes this way the called end's, to a connection that lives? Both ends may open one
/// at once; later it does not belong, and the other end says so. As with conntrack, it opens nothing.
#[inline(always)]
#[must_use]
pub const fn crosses(flow: &OwnFlow, way: Way) -> bool {
    flow.taken == 0 && !is_over(flow) && flow.opener != way as u8
}

/// What a SYN meets that may open a connection and finds an entry of its tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The connection is over: the entry is the new one's.
    Reopens,
    /// Sent again, by both ends at once, or a SYN on a live connection: carried, and nothing else
    /// changes. The other end knows what to say to it.
    Passes,
    /// The kernel has the tuple, or the agent is deleting the entry: the stack.
    Refused,
}

/// Judges a SYN by the entry of its tuple; see [`is_expired`] for `expired`.
#[inline(always)]
#[must_use]
pub const fn meets(flow: &OwnFlow, expired: u32) -> Meeting {
    if flow.taken != 0 {
        return Meeting::Refused;
    }
    if !is_over(flow) {
        return Meeting::Passes;
    }
    if is_expired(flow, expired) {
        Meeting::Refused
    } else {
        Meeting::Reopens
    }
}

/// Did this connection close before `expired`, a moment in jiffies?
///
/// The agent tells the moment to all programs before it looks for entries to delete. So neither do
/// they give an entry to a new connection that is about to be deleted, nor are there more of those
/// than it takes milliseconds to delete what has expired.
#[inline(always)]
#[must_use]
pub const fn is_expired(flow: &OwnFlow, expired: u32) -> bool {
    is_over(flow) && flow.closed.wrapping_sub(expired).cast_signed() < 0
}

/// A SYN of this tuple takes the stack: what becomes of the entry.
#[inline(always)]
pub const fn leave_to_kernel(flow: &mut OwnFlow) {
    match stage(flow) {
        // Nothing lives here that the kernel does not begin anew.
        Stage::Opening | Stage::Closed | Stage::Reset => flow.taken = 1,
        // A SYN on a live connection. Conntrack has to know that connection before it can judge.
        _ => flow.recalled = 1,
    }
}

/// A packet of the tuple that opens nothing: notes what it tells. `false` if the kernel has the
/// tuple, and so the packet.
#[inline(always)]
pub const fn advance(flow: &mut OwnFlow, way: Way, segment: Segment, now: u32) -> bool {
    if flow.taken != 0 {
        return false;
    }
    let was_over = is_over(flow);
    let is_client = flow.opener == way as u8;
    let (own, other): (&mut OwnEnd, &mut OwnEnd) = match way {
        Way::Out => (&mut flow.pod, &mut flow.peer),
        Way::In => (&mut flow.peer, &mut flow.pod),
    };
    if segment.flags & RST != 0 {
        match judged(own, other, segment) {
            Judged::Ends => own.rst = 1,
            Judged::Doubtful => {
                if own.doubtful_rst == 0 {
                    own.doubtful_rst = 1;
                }
                flow.recalled = 1;
            }
            Judged::Old => {}
        }
    } else {
        // Whoever was meant by a doubtful one lives.
        if flow.recalled != 0 {
            if own.doubtful_rst == 1 {
                own.doubtful_rst = 2;
            }
            if other.doubtful_rst == 1 {
                other.doubtful_rst = 2;
            }
        }
        if segment.flags & ACK != 0 {
            // On two CPUs an older one may come last.
            if !own.has_acknowledged() || is_later(segment.ack, own.ack) {
                own.ack = segment.ack;
            }
            let is_syn = segment.flags & SYN != 0;
            // The server's SYN-ACK, or what the client says to it.
            if is_syn != is_client && (is_syn || other.shaken != 0) {
                own.shaken = 1;
            }
        }
        if segment.flags & FIN != 0 {
            own.fin = 1;
        }
    }
    // Two CPUs that close it at once may each miss what the other writes; the next packet does not.
    if is_over(flow) && (!was_over || flow.closed == 0) {
        flow.closed = now;
    }
    true
}

/// What a RST means to a connection.
#[derive(Clone, Copy)]
enum Judged {
    /// Its end.
    Ends,
    /// Perhaps that: the other end knows.
    Doubtful,
    /// Nothing: the other end has had its place.
    Old,
}

/// Judges a RST of one end.
#[inline(always)]
const fn judged(own: &OwnEnd, other: &OwnEnd, segment: Segment) -> Judged {
    // It counts where it meets the other end's last ACK (RFC 5961 section 3.2); so does one to an
    // end that has acknowledged nothing: the answer to a SYN.
    if !other.has_acknowledged() || equal(segment.seq, other.ack) {
        return Judged::Ends;
    }
    if is_later(other.ack, segment.seq) {
        return Judged::Old;
    }
    // Behind data that is not acknowledged yet its place cannot be known without noting where each
    // packet ends. But the socket that gives up says once more how far it has read, which nobody
    // can guess either, and is gone whatever the other end makes of it.
    if segment.flags & ACK != 0 && own.has_acknowledged() && equal(segment.ack, own.ack) {
        return Judged::Ends;
    }
    Judged::Doubtful
}

#[inline(always)]
const fn equal(one: [u8; 4], other: [u8; 4]) -> bool {
    u32::from_ne_bytes(one) == u32::from_ne_bytes(other)
}

#[cfg(test)]
mod tests;
