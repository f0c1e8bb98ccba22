//! One counter per outcome and CPU.

use flannel_ebpf::reason::Reason;

use super::maps;

/// Counts one packet of `len` bytes.
#[inline(always)]
pub(super) fn count(reason: Reason, len: u32) {
    if let Some(tally) = maps::tally(reason) {
        // SAFETY: a valid per-CPU value that only this CPU writes.
        unsafe {
            (*tally).packets += 1;
            (*tally).bytes += u64::from(len);
        }
    }
}
