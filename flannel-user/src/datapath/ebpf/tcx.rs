//! Links at tcx hooks: one on each place, pinned, its program swapped in one step.
//!
//! A new link costs a grace period of the kernel (8 ms and more, one after the
//! other under the lock of all interfaces), another program under a link next to
//! nothing. So links outlive a switch to netlink mode for a moment, with a
//! program that does nothing and without pins: they end with the agent.

use std::{fs, io, path::Path};

use anyhow::{Context as _, anyhow};
use aya::programs::{
    LinkOrder, SchedClassifier,
    links::{FdLink, PinnedLink},
    tc::{SchedClassifierLink, TcAttachOptions},
};
use tracing::debug;

use super::{
    attach::{Hook, Place},
    pins::PinDir,
};

/// Puts `program` under the pinned link of a place, and takes the pin away.
pub(super) fn park(
    program: &mut SchedClassifier,
    pins: &PinDir,
    place: Place,
) -> anyhow::Result<FdLink> {
    let path = pins.links().join(place.pin_name());
    let link = swap(program, &path)?;
    fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    Ok(link)
}

/// Puts `program` under a link that was parked, and pins it again.
pub(super) fn resume(
    program: &mut SchedClassifier,
    pins: &PinDir,
    place: Place,
    link: FdLink,
) -> anyhow::Result<()> {
    let link = put_under(program, link)?;
    pin(link, &pins.links().join(place.pin_name()))
}

/// Attaches by a pinned tcx link, or swaps the program under the link that a
/// previous agent, of whatever layout, left there.
pub(super) fn attach(
    program: &mut SchedClassifier,
    pins: &PinDir,
    place: Place,
    interface: &str,
) -> anyhow::Result<()> {
    let name = place.pin_name();
    let target = pins.links().join(&name);
    for found in pins
        .all_links()
        .into_iter()
        .map(|directory| directory.join(&name))
    {
        if !found.exists() {
            continue;
        }
        match swap(program, &found) {
            Ok(link) => {
                if found != target {
                    // The pin moves; the link itself stays attached all along.
                    link.pin(&target)
                        .with_context(|| format!("pin {}", target.display()))?;
                    fs::remove_file(&found)
                        .with_context(|| format!("remove {}", found.display()))?;
                }
                return Ok(());
            }
            Err(error) => {
                // Its interface is gone, or it is no link of ours.
                debug!(link = %found.display(), %error, "pinned link not usable");
                fs::remove_file(&found).with_context(|| format!("remove {}", found.display()))?;
            }
        }
    }
    pin(fresh(program, place.hook, interface)?, &target)
}

/// A link of its own, behind all others on the hook.
pub(super) fn fresh(
    program: &mut SchedClassifier,
    hook: Hook,
    interface: &str,
) -> anyhow::Result<FdLink> {
    let id = program.attach_with_options(
        interface,
        hook.attach_type(),
        TcAttachOptions::TcxOrder(LinkOrder::last()),
    )?;
    Ok(program.take_link(id)?.try_into()?)
}

/// Pins a link in place of whatever is pinned there.
pub(super) fn pin(link: FdLink, target: &Path) -> anyhow::Result<()> {
    match fs::remove_file(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", target.display()));
        }
        _ => {}
    }
    link.pin(target)
        .with_context(|| format!("pin {}", target.display()))?;
    Ok(())
}

/// Puts `program` under the pinned link and hands the link back.
fn swap(program: &mut SchedClassifier, pin: &Path) -> anyhow::Result<FdLink> {
    put_under(program, PinnedLink::from_pin(pin)?.into())
}

/// Puts `program` under the link and hands the link back.
fn put_under(program: &mut SchedClassifier, link: FdLink) -> anyhow::Result<FdLink> {
    let link: SchedClassifierLink = link.try_into()?;
    let id = program.attach_to_link(link)?;
    let link: FdLink = program
        .take_link(id)?
        .try_into()
        .map_err(|_| anyhow!("not a tcx link"))?;
    Ok(link)
}
