//! Filters at clsact qdiscs, for kernels without tcx: a priority and handle of our own, behind
//! those of others. A filter stays by itself, and its program is swapped in one step. The qdisc is
//! left in place when we go: adding and removing it loses packets.

use anyhow::Context as _;
use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{
        NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle,
        qdisc_add_clsact,
    },
};
use tracing::debug;

use super::attach::Hook;

/// Filters with a lower number run first: whatever else is there has its say before us.
pub const CLSACT_PRIORITY: u16 = 0xc000;

/// Adds our filter, or puts `program` under the one that is there.
pub(super) fn attach(
    program: &mut SchedClassifier,
    handle: TcHandle,
    hook: Hook,
    interface: &str,
) -> anyhow::Result<()> {
    let id = match fresh(program, handle, hook, interface) {
        Ok(id) => id,
        // A filter with our priority and handle is there: swap its program.
        Err(error) => program
            .attach_to_link(found(handle, hook.attach_type(), interface)?)
            .with_context(|| format!("adding a filter failed before: {error}"))?,
    };
    keep(program, id)
}

/// Adds our filter again where somebody else removed it; `false` if it is in place.
pub(super) fn restore(
    program: &mut SchedClassifier,
    handle: TcHandle,
    hook: Hook,
    interface: &str,
) -> anyhow::Result<bool> {
    let Ok(id) = fresh(program, handle, hook, interface) else {
        return Ok(false);
    };
    keep(program, id)?;
    Ok(true)
}

/// Removes our filter; an interface that is gone took it along.
pub(super) fn detach(handle: TcHandle, attach_type: TcAttachType, interface: &str) {
    if let Ok(link) = found(handle, attach_type, interface) {
        let removed = aya::programs::links::Link::detach(link);
        debug!(interface, ok = removed.is_ok(), "clsact filter removed");
    }
}

fn fresh(
    program: &mut SchedClassifier,
    handle: TcHandle,
    hook: Hook,
    interface: &str,
) -> Result<SchedClassifierLinkId, ProgramError> {
    // Present already is fine: it may be ours or anybody's.
    if let Err(error) = qdisc_add_clsact(interface) {
        debug!(interface, %error, "clsact qdisc not added");
    }
    let options = NlOptions {
        priority: CLSACT_PRIORITY,
        handle,
        ..NlOptions::default()
    };
    program.attach_with_options(
        interface,
        hook.attach_type(),
        TcAttachOptions::Netlink(options),
    )
}

fn found(
    handle: TcHandle,
    attach_type: TcAttachType,
    interface: &str,
) -> anyhow::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, attach_type, CLSACT_PRIORITY, handle, None)
        .with_context(|| format!("interface {interface}"))
}

/// Lets a filter outlive this process; aya would remove it on drop.
fn keep(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> anyhow::Result<()> {
    std::mem::forget(program.take_link(id)?);
    Ok(())
}
