//! All maps, and the questions the decisions ask of them.

use aya_ebpf::{
    helpers::{bpf_get_prandom_u32, bpf_jiffies64},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
};
use flannel_ebpf::{
    candidate::{self, Counted},
    handshaken,
    layout::{
        Answered, CANDIDATES, Candidate, Class, ClassKey, DEFAULT_FLOWS, Epoch, FlowKey,
        GENERATION_SLOTS, HANDSHAKE_PLACES, InFlow, LocalPod, MAX_CLASSES, MAX_EXCLUDED_SUBNETS,
        MAX_LOCAL_PODS, MAX_REMOTE_SUBNETS, NOTES, NodeConfig, Note, OWN_FLOWS, OutFlow, OwnFlow,
        PORT_WORDS, RESETS_BYTES, RemoteSubnet, TEMPLATE_LEN, TRAILS, Tally, Trail,
    },
    reason::Reason,
    sighting::Way,
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

/// The agent may set another size.
#[map]
static FLOWS_OUT: LruHashMap<FlowKey, OutFlow> = LruHashMap::with_max_entries(DEFAULT_FLOWS, 0);

/// As `FLOWS_OUT`.
#[map]
static FLOWS_IN: LruHashMap<FlowKey, InFlow> = LruHashMap::with_max_entries(DEFAULT_FLOWS, 0);

#[map]
static OWN: HashMap<FlowKey, OwnFlow> = HashMap::with_max_entries(OWN_FLOWS, BPF_F_NO_PREALLOC);

#[map]
static CLASSES: HashMap<ClassKey, Class> =
    HashMap::with_max_entries(MAX_CLASSES, BPF_F_NO_PREALLOC);

#[map]
static TRANSLATED: LruHashMap<ClassKey, u32> = LruHashMap::with_max_entries(MAX_CLASSES, 0);

#[map]
static NOTES_OUT: PerCpuArray<Note> = PerCpuArray::with_max_entries(NOTES, 0);

#[map]
static NOTES_IN: PerCpuArray<Note> = PerCpuArray::with_max_entries(NOTES, 0);

#[map]
static TRAILS_OUT: PerCpuArray<Trail> = PerCpuArray::with_max_entries(TRAILS, 0);

#[map]
static TRAILS_IN: PerCpuArray<Trail> = PerCpuArray::with_max_entries(TRAILS, 0);

#[map]
static NOTED: PerCpuArray<u32> = PerCpuArray::with_max_entries(2, 0);

#[map]
static CANDIDATES_OUT: PerCpuArray<Candidate> = PerCpuArray::with_max_entries(CANDIDATES, 0);

#[map]
static CANDIDATES_IN: PerCpuArray<Candidate> = PerCpuArray::with_max_entries(CANDIDATES, 0);

#[map]
static HANDSHAKES: Array<Answered> = Array::with_max_entries(HANDSHAKE_PLACES, 0);

#[map]
static RESETS: RingBuf = RingBuf::with_byte_size(RESETS_BYTES, 0);

/// Room beside the stack.
#[map]
static SCRATCH_TEMPLATE: PerCpuArray<[u8; TEMPLATE_LEN]> = PerCpuArray::with_max_entries(1, 0);

/// Room beside the stack.
#[map]
static SCRATCH_OUT: PerCpuArray<OutFlow> = PerCpuArray::with_max_entries(1, 0);

/// Room beside the stack.
#[map]
static SCRATCH_IN: PerCpuArray<InFlow> = PerCpuArray::with_max_entries(1, 0);

#[map]
static EPOCH: Array<Epoch> = Array::with_max_entries(1, 0);

#[map]
static GENERATIONS: Array<u32> = Array::with_max_entries(GENERATION_SLOTS, 0);

#[map]
static EXCLUDED_SUBNETS: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_EXCLUDED_SUBNETS, 0);

#[map]
static EXCLUDED_PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);

/// A table that is mostly empty should not cost its full size.
const BPF_F_NO_PREALLOC: u32 = 1;
/// Only where there is no entry yet.
const BPF_NOEXIST: u64 = 1;
/// Nobody is woken: the agent looks by itself.
const BPF_RB_NO_WAKEUP: u64 = 1;

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

    #[inline(always)]
    fn flow_out(&self, key: &FlowKey) -> Option<&OutFlow> {
        // SAFETY: the table may give the entry to another flow meanwhile: readers compare the tags.
        unsafe { FLOWS_OUT.get(key) }
    }

    #[inline(always)]
    fn flow_in(&self, key: &FlowKey) -> Option<&InFlow> {
        // SAFETY: see above.
        unsafe { FLOWS_IN.get(key) }
    }

    #[inline(always)]
    fn is_translated(&self, class: &ClassKey) -> bool {
        // SAFETY: only presence is looked at.
        unsafe { TRANSLATED.get(class) }.is_some()
    }

    #[inline(always)]
    fn epoch(&self) -> Epoch {
        EPOCH.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn generation(&self, slot: u32) -> u32 {
        GENERATIONS.get(slot).map_or(0, |generation| *generation)
    }

    #[inline(always)]
    fn jiffies(&self) -> u32 {
        jiffies()
    }

    #[inline(always)]
    fn is_excluded_address(&self, address: [u8; 4]) -> bool {
        EXCLUDED_SUBNETS.get(Key::new(32, address)).is_some()
    }

    #[inline(always)]
    fn is_excluded_port(&self, port: [u8; 2]) -> bool {
        let port = u32::from(u16::from_be_bytes(port));
        EXCLUDED_PORTS
            .get(port >> 6)
            .is_some_and(|word| word >> (port & 63) & 1 != 0)
    }
}

/// This node; `None` until the agent has written it.
#[inline(always)]
pub(super) fn node() -> Option<&'static NodeConfig> {
    NODE.get(0)
}

/// The low 32 bits of the jiffies.
#[inline(always)]
pub(super) fn jiffies() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() as u32 }
}

/// This CPU's note at one place.
#[inline(always)]
pub(super) fn note(way: Way, place: u32) -> Option<*mut Note> {
    match way {
        Way::Out => NOTES_OUT.get_ptr_mut(place),
        Way::In => NOTES_IN.get_ptr_mut(place),
    }
}

/// The place of this CPU's next note.
#[inline(always)]
pub(super) fn take_note(way: Way) -> Option<u32> {
    let noted = NOTED.get_ptr_mut(way as u32)?;
    // SAFETY: a per-CPU value; programs at TC do not interrupt each other on one CPU.
    unsafe {
        let next = *noted;
        *noted = next.wrapping_add(1);
        Some(next % NOTES)
    }
}

/// This CPU's trail at one place.
#[inline(always)]
pub(super) fn trail(way: Way, place: u32) -> Option<*mut Trail> {
    match way {
        Way::Out => TRAILS_OUT.get_ptr_mut(place),
        Way::In => TRAILS_IN.get_ptr_mut(place),
    }
}

/// This CPU's room for a template.
#[inline(always)]
pub(super) fn scratch_template() -> Option<*mut [u8; TEMPLATE_LEN]> {
    SCRATCH_TEMPLATE.get_ptr_mut(0)
}

/// This CPU's room for an entry.
#[inline(always)]
pub(super) fn scratch_out() -> Option<*mut OutFlow> {
    SCRATCH_OUT.get_ptr_mut(0)
}

/// This CPU's room for an entry.
#[inline(always)]
pub(super) fn scratch_in() -> Option<*mut InFlow> {
    SCRATCH_IN.get_ptr_mut(0)
}

/// This CPU's candidate for one hash.
#[inline(always)]
pub(super) fn candidate(way: Way, counted: Counted, hash: u64) -> Option<*mut Candidate> {
    let place = candidate::place(counted, hash);
    match way {
        Way::Out => CANDIDATES_OUT.get_ptr_mut(place),
        Way::In => CANDIDATES_IN.get_ptr_mut(place),
    }
}

/// What is noted where the handshake of a connection with this [`flannel_ebpf::hash::flow`] is.
#[inline(always)]
pub(super) fn handshake(flow: u64) -> Option<*mut Answered> {
    HANDSHAKES.get_ptr_mut(handshaken::place(flow))
}

/// One in sixteen, by chance.
#[inline(always)]
pub(super) fn is_chosen() -> bool {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_prandom_u32() }.is_multiple_of(16)
}

/// The entry of a flow that a pod sends, to be refreshed.
#[inline(always)]
pub(super) fn flow_out(key: &FlowKey) -> Option<*mut OutFlow> {
    FLOWS_OUT.get_ptr_mut(key)
}

/// The entry of a flow that arrives, to be refreshed.
#[inline(always)]
pub(super) fn flow_in(key: &FlowKey) -> Option<*mut InFlow> {
    FLOWS_IN.get_ptr_mut(key)
}

/// Makes an entry; `false` if the table takes no more.
#[inline(always)]
pub(super) fn keep_out(key: &FlowKey, flow: &OutFlow) -> bool {
    FLOWS_OUT.insert(key, flow, 0).is_ok()
}

/// Makes an entry; `false` if the table takes no more.
#[inline(always)]
pub(super) fn keep_in(key: &FlowKey, flow: &InFlow) -> bool {
    FLOWS_IN.insert(key, flow, 0).is_ok()
}

/// The own connection with this key, as the pod sends it.
#[inline(always)]
pub(super) fn own(key: &FlowKey) -> Option<*mut OwnFlow> {
    OWN.get_ptr_mut(key)
}

/// Makes the entry of an own connection; `false` if there is one, or no room.
#[inline(always)]
pub(super) fn open(key: &FlowKey, flow: &OwnFlow) -> bool {
    OWN.insert(key, flow, BPF_NOEXIST).is_ok()
}

/// A class, to be changed in place.
#[inline(always)]
pub(super) fn class(key: &ClassKey) -> Option<*mut Class> {
    CLASSES.get_ptr_mut(key)
}

/// Makes a class; without room there is none.
#[inline(always)]
pub(super) fn make_class(key: &ClassKey, class: &Class) {
    let _ = CLASSES.insert(key, class, BPF_NOEXIST);
}

/// The pod reaches this server through a Service.
#[inline(always)]
pub(super) fn mark_translated(class: &ClassKey) {
    // SAFETY: only presence is looked at.
    if unsafe { TRANSLATED.get(class) }.is_some() {
        return;
    }
    // A constant behind a reference would become a section of the object, and so a map.
    let value = core::hint::black_box(1);
    let _ = TRANSLATED.insert(class, value, 0);
}

/// Tells the agent of a connection that bypassed and was reset. Without room it is not told:
/// conntrack forgets the connection all the same.
#[inline(always)]
pub(super) fn tell_reset(key: &FlowKey) {
    let _ = RESETS.output::<FlowKey>(key, BPF_RB_NO_WAKEUP);
}

/// Withdraws the entry of a flow that a pod sends.
#[inline(always)]
pub(super) fn forget_out(key: &FlowKey) {
    let _ = FLOWS_OUT.remove(key);
}

/// Withdraws the entry of a flow that arrives.
#[inline(always)]
pub(super) fn forget_in(key: &FlowKey) {
    let _ = FLOWS_IN.remove(key);
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
