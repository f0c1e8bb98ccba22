//! What the maps hold of own connections: part of the contract in [`crate::layout`].

use bytemuck::{Pod, Zeroable};

/// What one end of an own connection has sent.
///
/// Packets may be under way on two CPUs at once, even those of one end: every fact has a byte of
/// its own that is only ever set, so that neither CPU undoes what the other has noted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct OwnEnd {
    /// Its highest acknowledgement number, as on the wire; zero for none.
    pub ack: [u8; 4],
    /// 1: its part of the handshake: the server's SYN-ACK, or the client's ACK after it.
    pub shaken: u8,
    /// 1: a FIN.
    pub fin: u8,
    /// 1: a RST that ended the connection.
    pub rst: u8,
    /// 1: a RST of which it is not known whether the other end took it; 2: packets have come since.
    pub doubtful_rst: u8,
}
const _: () = assert!(size_of::<OwnEnd>() == 8);

impl OwnEnd {
    /// Has it acknowledged anything? One number in four thousand million passes for none.
    #[inline(always)]
    #[must_use]
    pub const fn has_acknowledged(&self) -> bool {
        u32::from_ne_bytes(self.ack) != 0
    }
}

/// Value of `OWN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct OwnFlow {
    /// When its SYN came, in jiffies.
    pub born: u32,
    /// When it closed, in jiffies; means nothing before, and 0 is no time.
    pub closed: u32,
    /// What the pod has sent.
    pub pod: OwnEnd,
    /// What the peer has sent.
    pub peer: OwnEnd,
    /// Always zero. What each packet of both ends would write here costs a stream a tenth: data and
    /// acknowledgements are on two CPUs.
    pub _pad: u32,
    /// 0: the pod is the client; 1: the peer is.
    pub opener: u8,
    /// 1: the kernel has this tuple; the entry carries nothing any more.
    pub taken: u8,
    /// 1: the agent should hand it over at once.
    pub recalled: u8,
    /// 1: a translated connection wants the same tuple.
    pub clashed: u8,
}
const _: () = assert!(size_of::<OwnFlow>() == 32);

/// What connections are alike in: key of `CLASSES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ClassKey {
    /// Address of the pod of this node.
    pub pod: [u8; 4],
    /// Address of the peer.
    pub peer: [u8; 4],
    /// Port of the server, network order.
    pub port: [u8; 2],
    /// 0: the pod is the client; 1: the peer is.
    pub opener: u8,
    /// Always zero.
    pub _pad: u8,
}
const _: () = assert!(size_of::<ClassKey>() == 12);

/// Value of `CLASSES`: what the stack has said about connections that are alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Class {
    /// When a SYN last passed the stack unchanged, in jiffies.
    pub syn_seen: u32,
    /// When the answer to one did.
    pub answer_seen: u32,
    /// Since when an answer is waited for.
    pub waiting_since: u32,
    /// When `half_open` began to count.
    pub half_open_since: u32,
    /// Generation of classes at the last SYN.
    pub generation: u32,
    /// Generation of the pod then.
    pub pod_generation: u32,
    /// Generation of the peer's node then.
    pub peer_generation: u32,
    /// Connections that have opened since then and not got past their handshake. Two CPUs may
    /// lose a count; the next period begins anew.
    pub half_open: u32,
    /// When the class was made, in jiffies.
    pub since: u32,
    /// Connections that it has opened.
    pub opened: u32,
    /// SYNs that passed, up to what is needed.
    pub syns: u8,
    /// 1: an answer has passed in this generation.
    pub answered: u8,
    /// 1: a SYN is on its way to ask the stack.
    pub pending: u8,
    /// DSCP of the SYNs, in the upper six bits.
    pub dscp: u8,
}
const _: () = assert!(size_of::<Class>() == 44);
