//! Packets as data: what is given, what must come out.
//!
//! The same rows run against the pure decisions on the host and against the
//! loaded programs through BPF test_run. Expected bytes are put together here
//! field by field, not with the code under test.

mod fixture;
mod packets;
#[cfg(test)]
mod tests;
mod way_in;
mod way_out;

pub use self::{
    fixture::{
        EPOCH, Fixture, IFINDEX, NODE_A, NODE_B, NODE_C, POD_A, POD_A2, POD_B, POD_C, node, pods,
        remotes,
    },
    packets::{Ip, checksum, incoming, outgoing},
    way_in::way_in,
    way_out::way_out,
};
use crate::{
    frame::{Bytes, Meta},
    reason::{Direction, Reason},
};

/// What the program must make of a packet.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Forwarded; the packet is then exactly this. On the way out bytes 18..20
    /// (identification), 24..26 (outer checksum) and 34..36 (source port) are
    /// the program's choice and hold zeros here.
    Becomes(Vec<u8>),
    /// Not forwarded, bytes unchanged.
    Stays(Reason),
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// The case in a sentence.
    pub what: &'static str,
    /// Which hook.
    pub direction: Direction,
    /// The packet.
    pub given: Vec<u8>,
    /// Segment payload where segmentation is still to be done.
    pub gso_size: u32,
    /// Not a frame for this host.
    pub other_host: bool,
    /// What must come out.
    pub expect: Expect,
}

impl Row {
    /// The packet as the pure decisions take it.
    #[must_use]
    pub fn frame(&self) -> Bytes<'_> {
        Bytes {
            bytes: &self.given,
            meta: Meta {
                len: self.given.len() as u32,
                ifindex: IFINDEX,
                gso_size: self.gso_size,
                packet_type: if self.other_host { 3 } else { 0 },
                vlan: false,
            },
        }
    }
}
