//! Mixing of words, for places in tables that the agent does not fill.

use crate::layout::FlowKey;

const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// One more word into a hash.
#[inline(always)]
#[must_use]
pub const fn mix(hash: u64, word: u64) -> u64 {
    let mixed = (hash ^ word).wrapping_mul(FACTOR);
    mixed ^ (mixed >> 29)
}

#[inline(always)]
const fn word(high: [u8; 4], low: [u8; 4]) -> u64 {
    (u32::from_ne_bytes(high) as u64) << 32 | u32::from_ne_bytes(low) as u64
}

#[inline(always)]
const fn ports(key: &FlowKey) -> u64 {
    (u16::from_ne_bytes(key.sport) as u64) << 32
        | (u16::from_ne_bytes(key.dport) as u64) << 8
        | key.protocol as u64
}

/// Hash of a flow.
#[inline(always)]
#[must_use]
pub const fn flow(key: &FlowKey, seed: u32) -> u64 {
    mix(mix(seed as u64, word(key.src, key.dst)), ports(key))
}

/// A short sign of a flow, never zero: tells whether a table's entry is still this flow's.
#[inline(always)]
#[must_use]
pub const fn tag(key: &FlowKey) -> u32 {
    (flow(key, 0) >> 16) as u32 | 1
}

/// Eight bytes of anything.
#[inline(always)]
#[must_use]
pub const fn eight(bytes: &[u8; 16], half: usize) -> u64 {
    let at = half * 8;
    u64::from_ne_bytes([
        bytes[at],
        bytes[at + 1],
        bytes[at + 2],
        bytes[at + 3],
        bytes[at + 4],
        bytes[at + 5],
        bytes[at + 6],
        bytes[at + 7],
    ])
}
