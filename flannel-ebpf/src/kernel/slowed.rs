//! A delay, in objects built with the feature `slowed` only: the benchmark has to
//! notice it, or its check is worth nothing.

/// Nanoseconds that each run takes longer.
#[cfg(feature = "slowed")]
const DELAY: u64 = 500;

#[cfg(feature = "slowed")]
#[inline(always)]
pub(super) fn delay() {
    // SAFETY: a helper without arguments.
    let start = unsafe { aya_ebpf::helpers::bpf_ktime_get_ns() };
    // The verifier wants an end in sight; asking for the time takes tens of nanoseconds.
    for _ in 0..100 {
        // SAFETY: see above.
        if unsafe { aya_ebpf::helpers::bpf_ktime_get_ns() } - start >= DELAY {
            break;
        }
    }
}

#[cfg(not(feature = "slowed"))]
#[inline(always)]
pub(super) fn delay() {}
