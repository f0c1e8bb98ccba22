//! All maps, and the questions the decisions ask of them.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use flannel_ebpf::{
    layout::{LocalPod, MAX_LOCAL_PODS, MAX_REMOTE_SUBNETS, NodeConfig, RemoteSubnet, Tally},
    reason::Reason,
    tables::Tables,
};

#[map]
static NODE: Array<NodeConfig> = Array::with_max_entries(1, 0);

#[map]
static REMOTE_SUBNETS: LpmTrie<[u8; 4], RemoteSubnet> =
    LpmTrie::with_max_entries(MAX_REMOTE_SUBNETS, 0);

#[map]
static LOCAL_PODS: HashMap<[u8; 4], LocalPod> = HashMap::with_max_entries(MAX_LOCAL_PODS, 0);

#[map]
static PEER_NODES: HashMap<[u8; 4], u32> =
    HashMap::with_max_entries(MAX_REMOTE_SUBNETS, BPF_F_NO_PREALLOC);

#[map]
static COUNTERS: PerCpuArray<Tally> = PerCpuArray::with_max_entries(Reason::COUNT, 0);

#[map]
static IDENT: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// A table that is mostly empty should not cost its full size.
const BPF_F_NO_PREALLOC: u32 = 1;

/// The maps as the decisions see them.
pub(super) struct KernelTables;

impl Tables for KernelTables {
    #[inline(always)]
    fn node(&self) -> Option<&NodeConfig> {
        NODE.get(0)
    }

    #[inline(always)]
    fn remote(&self, address: [u8; 4]) -> Option<&RemoteSubnet> {
        REMOTE_SUBNETS.get(Key::new(32, address))
    }

    #[inline(always)]
    fn local_pod(&self, address: [u8; 4]) -> Option<&LocalPod> {
        // SAFETY: the agent replaces whole values; the kernel frees an old one only
        // after the program has left (RCU).
        unsafe { LOCAL_PODS.get(address) }
    }

    #[inline(always)]
    fn is_peer(&self, address: [u8; 4]) -> bool {
        // SAFETY: only presence is looked at.
        unsafe { PEER_NODES.get(address) }.is_some()
    }
}

/// This CPU's counter of one outcome.
#[inline(always)]
pub(super) fn tally(reason: Reason) -> Option<*mut Tally> {
    COUNTERS.get_ptr_mut(reason.index())
}

/// Takes `count` outer IP identifications; the first one is the answer.
#[inline(always)]
pub(super) fn take_idents(count: u32) -> u16 {
    match IDENT.get_ptr_mut(0) {
        Some(next) => {
            // SAFETY: a valid per-CPU value; programs of one CPU do not interrupt each other at TC.
            unsafe {
                let first = *next;
                *next = first.wrapping_add(count);
                first as u16
            }
        }
        None => 0,
    }
}
