//! A frame over the BPF context.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    EbpfContext as _, bindings::__sk_buff, helpers::bpf_skb_load_bytes, programs::TcContext,
};
use flannel_ebpf::{
    frame::{Frame, Meta},
    header::Header,
};

/// The packet of one program run, as long as nothing moves its data.
pub(super) struct Wire {
    skb: *mut __sk_buff,
    data: usize,
    data_end: usize,
    meta: Meta,
}

/// Reads one context field by itself: merged loads are refused by the verifier.
macro_rules! field {
    ($skb:expr, $name:ident) => {
        // SAFETY: `skb` is the program's context.
        unsafe { read_volatile(addr_of!((*$skb).$name)) }
    };
}

impl Wire {
    #[inline(always)]
    pub(super) fn new(context: &TcContext) -> Self {
        let skb: *const __sk_buff = context.as_ptr().cast();
        Self {
            skb: context.as_ptr().cast(),
            data: context.data(),
            data_end: context.data_end(),
            meta: Meta {
                len: field!(skb, len),
                ifindex: field!(skb, ifindex),
                gso_size: field!(skb, gso_size),
                packet_type: field!(skb, pkt_type),
                vlan: field!(skb, vlan_present) != 0,
            },
        }
    }
}

impl Wire {
    /// Puts a sign on the packet.
    #[inline(always)]
    pub(super) fn set_sign(&self, sign: u32) {
        // SAFETY: the program's context; a field that programs at TC may write.
        unsafe { core::ptr::addr_of_mut!((*self.skb).tc_index).write_volatile(sign) }
    }
}

/// Segments of a segmentation-offload packet, at least 1.
#[inline(always)]
pub(super) fn segments(context: &TcContext) -> u32 {
    let skb: *const __sk_buff = context.as_ptr().cast();
    match field!(skb, gso_segs) {
        0 => 1,
        segments => segments,
    }
}

impl Frame for Wire {
    #[inline(always)]
    fn at<T: Header>(&self, offset: usize) -> Option<&T> {
        if self.data + offset + T::LEN > self.data_end {
            return None;
        }
        // SAFETY: inside the packet as checked; `Header` promises alignment 1 and no invalid value.
        Some(unsafe { &*((self.data + offset) as *const T) })
    }

    #[inline(always)]
    fn meta(&self) -> Meta {
        self.meta
    }

    #[inline(always)]
    fn start(&self, offset: usize, len: u32) -> [u8; 16] {
        let mut start = [0; 16];
        if len >= 16 {
            if let Some(bytes) = self.at::<[u8; 16]>(offset) {
                return *bytes;
            }
            // SAFETY: 16 bytes of room; a packet that is shorter leaves zeros.
            unsafe {
                bpf_skb_load_bytes(
                    self.skb.cast(),
                    offset as u32,
                    start.as_mut_ptr().cast(),
                    16,
                );
            }
            return start;
        }
        if len > 0 {
            // The verifier wants to see the bounds of the length at the call; the compiler, which
            // knows them, must not take the mask away.
            let len = (core::hint::black_box(len - 1) & 15) + 1;
            // SAFETY: 1 to 16 bytes into 16 bytes of room.
            unsafe {
                bpf_skb_load_bytes(
                    self.skb.cast(),
                    offset as u32,
                    start.as_mut_ptr().cast(),
                    len,
                );
            }
        }
        start
    }
}

/// Signs in `tc_index`, a field of the packet's metadata that nothing else here uses: they tell
/// our next hook what our last one knew. Packets from outside carry zero.
pub(super) mod sign {
    /// Nothing.
    pub(in crate::kernel) const NONE: u32 = 0;
    /// Took the fast way: the hook at the uplink's egress has nothing to learn.
    pub(in crate::kernel) const BYPASSED: u32 = 0xfb01;
    /// A copy that asks the stack.
    pub(in crate::kernel) const PROBE: u32 = 0xfb02;
    /// Noted on its way into the stack: its note is worth looking for where it leaves. Nothing else
    /// is, which keeps those hooks cheap for all other packets.
    pub(in crate::kernel) const NOTED: u32 = 0xfb03;
    /// From a peer, of a flow whose verdict the stack should confirm.
    pub(in crate::kernel) const KNOWN: u32 = 0xfb04;
    /// From a peer, of a flow without verdict.
    pub(in crate::kernel) const STRANGE: u32 = 0xfb05;
    /// A piece of a tunnel packet from a peer.
    pub(in crate::kernel) const PIECE: u32 = 0xfb06;
}

/// The packet's sign.
#[inline(always)]
pub(super) fn sign(context: &TcContext) -> u32 {
    let skb: *const __sk_buff = context.as_ptr().cast();
    field!(skb, tc_index)
}

/// Puts a sign on the packet.
#[inline(always)]
pub(super) fn set_sign(context: &TcContext, sign: u32) {
    let skb: *mut __sk_buff = context.as_ptr().cast();
    // SAFETY: a field that programs at TC may write.
    unsafe { core::ptr::addr_of_mut!((*skb).tc_index).write_volatile(sign) }
}

/// Mark and priority of the packet.
#[inline(always)]
pub(super) fn mark_and_priority(context: &TcContext) -> (u32, u32) {
    let skb: *const __sk_buff = context.as_ptr().cast();
    (field!(skb, mark), field!(skb, priority))
}

/// Sets mark and priority of the packet.
#[inline(always)]
pub(super) fn set_mark_and_priority(context: &TcContext, mark: u32, priority: u32) {
    let skb: *mut __sk_buff = context.as_ptr().cast();
    // SAFETY: fields that programs at TC may write.
    unsafe {
        core::ptr::addr_of_mut!((*skb).mark).write_volatile(mark);
        core::ptr::addr_of_mut!((*skb).priority).write_volatile(priority);
    }
}

/// The interface by which the packet came into this host, 0 for its own.
#[inline(always)]
pub(super) fn ingress(context: &TcContext) -> u32 {
    let skb: *const __sk_buff = context.as_ptr().cast();
    field!(skb, ingress_ifindex)
}

/// `N` writable bytes at `offset` of the packet as it is now.
#[inline(always)]
pub(super) fn writable<const N: usize>(context: &TcContext, offset: usize) -> Option<*mut [u8; N]> {
    let start = context.data() + offset;
    if start + N > context.data_end() {
        None
    } else {
        Some(start as *mut [u8; N])
    }
}
