//! A frame over the BPF context.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{EbpfContext as _, bindings::__sk_buff, programs::TcContext};
use flannel_ebpf::{
    frame::{Frame, Meta},
    header::Header,
};

/// The packet of one program run, as long as nothing moves its data.
pub(super) struct Wire {
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
