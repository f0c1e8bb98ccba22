//! May a SYN open an own connection?

use super::entry::ClassKey;
use crate::{
    layout::{
        BYPASS_ANY, BYPASS_TCP, Epoch, FAST_PATH_CLASSES, FAST_PATH_DIRECT, FlowKey,
        HAS_EXCLUSIONS, LocalPod, NodeConfig, POD_IN_KERNEL,
    },
    reason::Reason,
    sighting::Way,
    tables::Tables,
};

/// The class of a connection whose key is `pod`'s, as the pod of this node sends it.
#[inline(always)]
#[must_use]
pub const fn class(pod: &FlowKey, opener: Way) -> ClassKey {
    ClassKey {
        pod: pod.src,
        peer: pod.dst,
        port: match opener {
            Way::Out => pod.dport,
            Way::In => pod.sport,
        },
        opener: opener as u8,
        _pad: 0,
    }
}

/// Longest that the agent's heartbeat may reach ahead, in jiffies of the fastest clock: anything
/// further is one from before the counter's last turn.
const FARTHEST: u32 = 60_000;

/// Is the agent alive, and does it let connections open?
#[inline(always)]
#[must_use]
pub const fn is_open(epoch: &Epoch, now: u32) -> bool {
    let left = epoch.own_until.wrapping_sub(now);
    left != 0 && left <= FARTHEST
}

/// Do connections open at all on this node?
#[inline(always)]
#[must_use]
pub const fn is_wanted(node: &NodeConfig) -> bool {
    node.flags & (FAST_PATH_DIRECT | FAST_PATH_CLASSES) != 0
}

/// Must a class of the connection have been learned first?
#[inline(always)]
#[must_use]
pub const fn needs_class(node: &NodeConfig) -> bool {
    node.flags & FAST_PATH_DIRECT == 0
}

/// May a SYN that goes this way open a connection, whatever its class says? `pod` is the key as
/// the pod sends it.
///
/// # Errors
/// Why the stack has to have it.
#[inline(always)]
pub fn may_open<T: Tables>(
    tables: &T,
    node: &NodeConfig,
    local: &LocalPod,
    pod: &FlowKey,
    way: Way,
) -> Result<(), Reason> {
    let epoch = tables.epoch();
    let both = BYPASS_ANY | BYPASS_TCP;
    if epoch.flags & both != both || !is_open(&epoch, tables.jiffies()) {
        return Err(Reason::OwnPaused);
    }
    if local.flags & POD_IN_KERNEL != 0 {
        return Err(Reason::OwnExcluded);
    }
    if node.flags & HAS_EXCLUSIONS != 0
        && (tables.is_excluded_port(pod.sport)
            || tables.is_excluded_port(pod.dport)
            || tables.is_excluded_address(pod.src)
            || tables.is_excluded_address(pod.dst))
    {
        return Err(Reason::OwnExcluded);
    }
    // Only the client's node translates.
    if matches!(way, Way::Out) && tables.is_translated(&class(pod, way)) {
        return Err(Reason::OwnTranslated);
    }
    Ok(())
}
