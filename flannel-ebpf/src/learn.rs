//! From sightings to a verdict: what the stack did with a packet, and whether
//! it did so often enough.

use crate::{
    checksum, hash,
    header::Ethernet,
    layout::{
        FlowKey, HAS_EXCLUSIONS, InFlow, LocalPod, MODE_VXLAN, Note, OutFlow, POD_IN_KERNEL,
        TEMPLATE_LEN, Verdict, generation_slot,
    },
    reason::Reason,
    tables::Tables,
};

/// The packet that a verdict rests on.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Its flow, as it came into the stack.
    pub key: FlowKey,
    /// Global generation then.
    pub generation: u32,
    /// TOS byte.
    pub tos: u8,
}

impl Shown {
    /// A packet that was noted.
    #[inline(always)]
    #[must_use]
    pub const fn by(note: &Note) -> Self {
        Self {
            key: note.key,
            generation: note.generation,
            tos: note.tos,
        }
    }
}

/// What the stack made of a pod's packet, in full.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    /// Far end afterwards.
    pub far: [u8; 4],
    /// Its port.
    pub far_port: [u8; 2],
    /// Interface it leaves by.
    pub uplink: u32,
    /// Its mark.
    pub mark: u32,
    /// Its priority.
    pub priority: u32,
    /// The headers around it, with what varies set to zero.
    pub template: &'a [u8; TEMPLATE_LEN],
}

/// Where the outer UDP source port is in the template. It is the flow's hash, which a socket may
/// change on a retransmission: no change of the verdict.
const SOURCE_PORT: usize = 34;

/// Offset of the outer IP header in the template.
const OUTER_IP: usize = size_of::<Ethernet>();

/// Sets to zero what differs between the packets of one flow: outer ECN, length, identification
/// and checksum, UDP length and checksum.
#[inline(always)]
pub fn neutralize(template: &mut [u8; TEMPLATE_LEN]) {
    template[OUTER_IP + 1] &= 0xfc;
    template[OUTER_IP + 2] = 0;
    template[OUTER_IP + 3] = 0;
    template[OUTER_IP + 4] = 0;
    template[OUTER_IP + 5] = 0;
    template[OUTER_IP + 10] = 0;
    template[OUTER_IP + 11] = 0;
    template[38] = 0;
    template[39] = 0;
    template[40] = 0;
    template[41] = 0;
}

/// Sum of the template's IP header, for [`checksum::fold`] with what is filled in.
#[inline(always)]
fn outer_sum(template: &[u8; TEMPLATE_LEN]) -> u32 {
    let mut sum = 0u32;
    let mut word = 0;
    while word < 10 {
        let at = OUTER_IP + 2 * word;
        sum += u32::from(u16::from_be_bytes([template[at], template[at + 1]]));
        word += 1;
    }
    sum
}

impl Left<'_> {
    /// One number for flow and outcome.
    #[inline(always)]
    #[must_use]
    pub fn hash(&self, key: &FlowKey, seed: u32) -> u64 {
        let mut hash = hash::flow(key, seed);
        hash = hash::mix(
            hash,
            u64::from(u32::from_ne_bytes(self.far)) << 16
                | u64::from(u16::from_ne_bytes(self.far_port)),
        );
        hash = hash::mix(hash, u64::from(self.mark) << 32 | u64::from(self.priority));
        let mut at = 0;
        while at < TEMPLATE_LEN {
            let mut word = [0; 8];
            let mut byte = 0;
            while byte < 8 {
                if at + byte != SOURCE_PORT && at + byte != SOURCE_PORT + 1 {
                    word[byte] = self.template[at + byte];
                }
                byte += 1;
            }
            hash = hash::mix(hash, u64::from_ne_bytes(word));
            at += 8;
        }
        hash
    }

    /// Does an entry say just this?
    #[inline(always)]
    #[must_use]
    pub fn agrees(&self, note: &Note, flow: &OutFlow) -> bool {
        flow.verdict.far == self.far
            && flow.verdict.far_port == self.far_port
            && flow.verdict.dscp == note.tos & 0xfc
            && flow.ingress == note.ifindex
            && flow.uplink == self.uplink
            && flow.mark == self.mark
            && flow.priority == self.priority
            && flow.template[..SOURCE_PORT] == self.template[..SOURCE_PORT]
            && flow.template[SOURCE_PORT + 2..] == self.template[SOURCE_PORT + 2..]
    }

    /// Writes the entry for a flow that has shown itself often enough into `entry` (which does
    /// not fit a program's stack beside the rest).
    ///
    /// # Errors
    /// Why it does not get one.
    #[inline(always)]
    pub fn entry<T: Tables>(
        &self,
        note: &Note,
        tables: &T,
        now: u32,
        entry: &mut OutFlow,
    ) -> Result<(), Reason> {
        let node = tables.node().ok_or(Reason::LearnOutNotPod)?;
        let pod = tables
            .local_pod(note.key.src)
            .filter(|pod| may_bypass(pod, note.ifindex))
            .ok_or(Reason::LearnOutNotPod)?;
        let peer = [
            self.template[30],
            self.template[31],
            self.template[32],
            self.template[33],
        ];
        tables
            .remote(self.far)
            .filter(|remote| remote.node == peer && remote.mode == MODE_VXLAN)
            .ok_or(Reason::LearnOutNotPeer)?;
        if node.flags & HAS_EXCLUSIONS != 0
            && is_excluded(tables, &note.key, self.far, self.far_port)
        {
            return Err(Reason::LearnOutExcluded);
        }
        let (before, far) = ((note.key.dst, note.key.dport), (self.far, self.far_port));
        entry.verdict = verdict(
            &Shown::by(note),
            tables,
            now,
            note.key.src,
            peer,
            before,
            far,
        );
        entry.ingress = note.ifindex;
        entry.uplink = self.uplink;
        entry.mark = self.mark;
        entry.priority = self.priority;
        entry.gateway_mac = pod.gateway_mac;
        entry._pad = [0; 2];
        entry.outer_sum = outer_sum(self.template);
        entry.template = *self.template;
        entry.tag = entry.verdict.tag;
        entry.ack = [0; 4];
        entry._end = 0;
        Ok(())
    }
}

/// What the stack made of a peer's packet, in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Far end afterwards.
    pub far: [u8; 4],
    /// Its port.
    pub far_port: [u8; 2],
    /// Interface of the pod's veth.
    pub pod: u32,
    /// Destination and source MAC address.
    pub macs: [u8; 12],
}

impl Arrived {
    /// One number for flow and outcome.
    #[inline(always)]
    #[must_use]
    pub fn hash(&self, key: &FlowKey, seed: u32) -> u64 {
        let far = u64::from(u32::from_ne_bytes(self.far)) << 16
            | u64::from(u16::from_ne_bytes(self.far_port));
        let m = &self.macs;
        let first = u64::from_ne_bytes([m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]]);
        let last = u64::from(u32::from_ne_bytes([m[8], m[9], m[10], m[11]]));
        let hash = hash::mix(hash::flow(key, seed), far);
        hash::mix(hash::mix(hash, first), last << 32 | u64::from(self.pod))
    }

    /// Does an entry say just this?
    #[inline(always)]
    #[must_use]
    pub fn agrees(&self, note: &Note, flow: &InFlow) -> bool {
        flow.verdict.far == self.far
            && flow.verdict.far_port == self.far_port
            && flow.verdict.dscp == note.tos & 0xfc
            && flow.pod == self.pod
            && flow.macs == self.macs
    }

    /// Writes the entry for a flow that has shown itself often enough into `entry`, as
    /// [`Left::entry`].
    ///
    /// # Errors
    /// Why it does not get one.
    #[inline(always)]
    pub fn entry<T: Tables>(
        &self,
        shown: &Shown,
        tables: &T,
        now: u32,
        entry: &mut InFlow,
    ) -> Result<(), Reason> {
        let node = tables.node().ok_or(Reason::LearnInNotPod)?;
        let pod = tables
            .local_pod(shown.key.dst)
            .filter(|pod| may_bypass(pod, self.pod))
            .ok_or(Reason::LearnInNotPod)?;
        let peer = tables
            .remote(shown.key.src)
            .filter(|remote| remote.vni == node.vni)
            .ok_or(Reason::LearnInNotPeer)?
            .node;
        if node.flags & HAS_EXCLUSIONS != 0
            && is_excluded(tables, &shown.key, self.far, self.far_port)
        {
            return Err(Reason::LearnInExcluded);
        }
        let (before, far) = ((shown.key.src, shown.key.sport), (self.far, self.far_port));
        entry.verdict = verdict(shown, tables, now, shown.key.dst, peer, before, far);
        entry.pod = self.pod;
        entry.mtu = pod.mtu;
        entry.node = peer;
        entry.macs = self.macs;
        entry.tag = entry.verdict.tag;
        entry.ack = [0; 4];
        Ok(())
    }
}

#[inline(always)]
const fn may_bypass(pod: &LocalPod, ifindex: u32) -> bool {
    pod.ifindex == ifindex && pod.flags & POD_IN_KERNEL == 0
}

#[inline(always)]
fn is_excluded<T: Tables>(tables: &T, key: &FlowKey, far: [u8; 4], far_port: [u8; 2]) -> bool {
    tables.is_excluded_port(key.sport)
        || tables.is_excluded_port(key.dport)
        || tables.is_excluded_port(far_port)
        || tables.is_excluded_address(key.src)
        || tables.is_excluded_address(key.dst)
        || tables.is_excluded_address(far)
}

/// An address and a port.
type End = ([u8; 4], [u8; 2]);

/// The part that both directions have alike. The far end was `before` and is `far` afterwards.
#[inline(always)]
fn verdict<T: Tables>(
    shown: &Shown,
    tables: &T,
    now: u32,
    pod: [u8; 4],
    peer: [u8; 4],
    before: End,
    far: End,
) -> Verdict {
    let (pod_slot, peer_slot) = (generation_slot(pod), generation_slot(peer));
    Verdict {
        far: far.0,
        far_port: far.1,
        ip_delta: checksum::difference(before.0, far.0),
        translated: u8::from(far != before),
        tag: hash::tag(&shown.key),
        seen: now,
        probed: now,
        generation: shown.generation,
        pod_generation: tables.generation(pod_slot),
        peer_generation: tables.generation(peer_slot),
        since: now,
        pod_slot: pod_slot as u16,
        peer_slot: peer_slot as u16,
        dscp: shown.tos & 0xfc,
        ..Verdict::default()
    }
}
