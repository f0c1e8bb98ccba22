//! Random packets, the same in each run.

use crate::{
    checksum,
    header::{TCP, UDP},
};

/// Length of an IP header without options.
const IP: usize = 20;

/// SplitMix64: the same packets each time.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of numbers of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> usize {
        (self.next() % limit) as usize
    }

    /// Any bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Sum of big-endian words, padded with zeros.
#[must_use]
pub fn sum(bytes: &[u8]) -> u32 {
    let mut sum = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    sum
}

/// An IP packet with every checksum anew; that of UDP stays away where it was.
#[must_use]
pub fn recomputed(mut ip: Vec<u8>) -> Vec<u8> {
    ip[10..12].fill(0);
    let check = !checksum::fold(sum(&ip[..IP]));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let at = IP + if ip[9] == TCP { 16 } else { 6 };
    if ip[9] == UDP && ip[at..at + 2] == [0; 2] {
        return ip;
    }
    ip[at..at + 2].fill(0);
    let length = (ip.len() - IP) as u32;
    let pseudo = sum(&ip[12..20]) + u32::from(ip[9]) + length;
    let check = match !checksum::fold(sum(&ip[IP..]) + pseudo) {
        0 if ip[9] == UDP => 0xffff,
        check => check,
    };
    ip[at..at + 2].copy_from_slice(&check.to_be_bytes());
    ip
}

/// An IP packet of a flow, all that may vary at random; TCP or UDP.
#[must_use]
pub fn packet(random: &mut Random, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let tcp = random.below(2) == 0;
    let header = if tcp { 20 + 4 * random.below(11) } else { 8 };
    let mut ip = vec![0; IP + header + random.below(40)];
    random.fill(&mut ip);
    let length = ip.len() as u16;
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    // DF or not, no fragment.
    ip[6] &= 0x40;
    ip[7] = 0;
    ip[8] = ip[8].max(2);
    ip[9] = if tcp { TCP } else { UDP };
    ip[12..16].copy_from_slice(&source);
    ip[16..20].copy_from_slice(&destination);
    if tcp {
        ip[IP + 12] = (header as u8 / 4) << 4;
        // Neither opens nor ends a connection.
        ip[IP + 13] = ip[IP + 13] & 0xf8 | 0x10;
    } else {
        let length = (ip.len() - IP) as u16;
        ip[IP + 4..IP + 6].copy_from_slice(&length.to_be_bytes());
        let has_checksum = random.below(8) != 0;
        ip[IP + 6..IP + 8].fill(u8::from(has_checksum));
    }
    recomputed(ip)
}
