//! A log line per packet that was left to the kernel, in objects built with
//! the feature `trace` only: it costs microseconds per packet.

use aya_ebpf::programs::TcContext;
use flannel_ebpf::reason::Reason;

#[cfg(feature = "trace")]
#[inline(always)]
pub(super) fn left_to_kernel(context: &TcContext, reason: Reason) {
    aya_log_ebpf::debug!(context, "{}", reason.label());
}

#[cfg(not(feature = "trace"))]
#[inline(always)]
pub(super) fn left_to_kernel(_context: &TcContext, _reason: Reason) {}
