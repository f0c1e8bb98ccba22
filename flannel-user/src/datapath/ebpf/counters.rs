//! The programs' counters: each CPU has its own.

use aya::maps::{MapData, MapError, PerCpuArray};
use flannel_ebpf::{layout::Tally, reason::Reason};

/// How often that has happened so far, summed over all CPUs.
///
/// # Errors
/// What the kernel says.
pub(super) fn total(
    counters: &PerCpuArray<MapData, Tally>,
    reason: Reason,
) -> Result<Tally, MapError> {
    let per_cpu = counters.get(&reason.index(), 0)?;
    Ok(per_cpu.iter().fold(Tally::default(), |sum, tally| Tally {
        packets: sum.packets + tally.packets,
        bytes: sum.bytes + tally.bytes,
    }))
}
