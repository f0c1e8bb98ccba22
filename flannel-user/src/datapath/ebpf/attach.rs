//! Which program sits where.
//!
//! tcx (Linux 6.6 and later): one pinned link per interface; the link survives
//! the agent and its program is swapped atomically. Older kernels: a filter at
//! a clsact qdisc with a priority and handle of our own, which stays by itself;
//! replacing it is atomic too. The qdisc is left in place when we go: adding
//! and removing it loses packets.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{
            NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle,
            qdisc_add_clsact,
        },
    },
    util::KernelVersion,
};
use flannel_ebpf::layout::{FROM_POD, FROM_UPLINK};
use tracing::{debug, info, warn};

use super::{EbpfError, SyncReport, Wanted, object::Programs, pins::PinDir};

/// How programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TcAttach {
    /// tcx where the kernel has it (6.6), else clsact.
    Auto,
    /// tcx links.
    Tcx,
    /// Filters at a clsact qdisc.
    Clsact,
}

/// Filters with a lower number run first: whatever else is there has its say before us.
const CLSACT_PRIORITY: u16 = 0xc000;

/// One place for one program.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    program: &'static str,
    interface: String,
}

impl Place {
    /// Name of the link's pin: stable over all layouts.
    fn pin_name(&self, ifindex: u32) -> String {
        let kind = if self.program == FROM_UPLINK {
            "uplink"
        } else {
            "pod"
        };
        format!("{kind}_{ifindex}")
    }
}

/// Everything attached by this agent, by interface index.
pub(super) struct Attachments {
    tcx: bool,
    handle: TcHandle,
    placed: BTreeMap<u32, Place>,
    /// Leftovers of earlier agents have been looked for.
    swept: bool,
}

impl Attachments {
    pub(super) fn new(attach: TcAttach, vni: u32) -> Self {
        let tcx = match attach {
            TcAttach::Tcx => true,
            TcAttach::Clsact => false,
            TcAttach::Auto => {
                KernelVersion::current().is_ok_and(|running| running >= KernelVersion::new(6, 6, 0))
            }
        };
        // 0 asks the kernel to choose, so VNI 0 must not be it.
        Self {
            tcx,
            handle: TcHandle::from(vni + 1),
            placed: BTreeMap::new(),
            swept: false,
        }
    }

    pub(super) fn is_attached(&self, ifindex: u32) -> bool {
        self.placed.contains_key(&ifindex)
    }

    /// Attaches what is missing, then detaches what is not wanted. A `thorough`
    /// pass also asks the kernel whether what was attached still is.
    pub(super) fn sync(
        &mut self,
        programs: &mut Programs,
        pins: &PinDir,
        wanted: &Wanted,
        thorough: bool,
    ) -> SyncReport {
        let mut places: BTreeMap<u32, Place> = wanted
            .pods
            .iter()
            .map(|pod| {
                (
                    pod.ifindex,
                    Place {
                        program: FROM_POD,
                        interface: pod.interface.clone(),
                    },
                )
            })
            .collect();
        places.insert(
            wanted.node.uplink,
            Place {
                program: FROM_UPLINK,
                interface: wanted.uplink.clone(),
            },
        );

        let mut report = SyncReport::default();
        for (ifindex, place) in &places {
            // A renamed interface keeps its program.
            let known = self
                .placed
                .get(ifindex)
                .is_some_and(|placed| placed.program == place.program);
            if known {
                if thorough {
                    match self.restore(programs, pins, *ifindex, place) {
                        Ok(false) => {}
                        Ok(true) => {
                            warn!(
                                program = place.program,
                                interface = place.interface,
                                "something had detached the program: attached again"
                            );
                            report.attached += 1;
                        }
                        // The interface is on its way out; its event follows.
                        Err(error) => {
                            debug!(interface = place.interface, %error, "cannot check the program")
                        }
                    }
                }
                continue;
            }
            match self.attach(programs, pins, *ifindex, place) {
                Ok(()) => {
                    debug!(
                        program = place.program,
                        interface = place.interface,
                        "program attached"
                    );
                    self.placed.insert(*ifindex, place.clone());
                    report.attached += 1;
                }
                Err(source) => report.failures.push(EbpfError::Attach {
                    program: place.program,
                    interface: place.interface.clone(),
                    source,
                }),
            }
        }
        let stale: Vec<u32> = self
            .placed
            .keys()
            .filter(|index| !places.contains_key(index))
            .copied()
            .collect();
        for ifindex in stale {
            if let Some(place) = self.placed.remove(&ifindex) {
                self.detach(pins, ifindex, &place);
            }
        }
        if !self.swept {
            self.sweep(pins);
            self.swept = true;
        }
        report
    }

    fn attach(
        &self,
        programs: &mut Programs,
        pins: &PinDir,
        ifindex: u32,
        place: &Place,
    ) -> anyhow::Result<()> {
        let program = programs.classifier(place.program)?;
        pin_program(program, &pins.programs().join(place.program));
        if self.tcx {
            attach_tcx(program, pins, ifindex, place)
        } else {
            self.attach_clsact(program, &place.interface)
        }
    }

    /// Attaches again what somebody else detached; `false` if it is in place.
    fn restore(
        &self,
        programs: &mut Programs,
        pins: &PinDir,
        ifindex: u32,
        place: &Place,
    ) -> anyhow::Result<bool> {
        let program = programs.classifier(place.program)?;
        if self.tcx {
            // The kernel refuses one program twice on one hook.
            let Ok(link) = fresh_tcx(program, &place.interface) else {
                return Ok(false);
            };
            pin_link(link, &pins.links().join(place.pin_name(ifindex)))?;
            return Ok(true);
        }
        let Ok(id) = self.fresh_clsact(program, &place.interface) else {
            return Ok(false);
        };
        keep_filter(program, id)?;
        Ok(true)
    }

    fn fresh_clsact(
        &self,
        program: &mut SchedClassifier,
        interface: &str,
    ) -> Result<SchedClassifierLinkId, ProgramError> {
        // Present already is fine: it may be ours or anybody's.
        if let Err(error) = qdisc_add_clsact(interface) {
            debug!(interface, %error, "clsact qdisc not added");
        }
        let options = NlOptions {
            priority: CLSACT_PRIORITY,
            handle: self.handle,
            ..NlOptions::default()
        };
        program.attach_with_options(
            interface,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(options),
        )
    }

    fn attach_clsact(&self, program: &mut SchedClassifier, interface: &str) -> anyhow::Result<()> {
        let id = match self.fresh_clsact(program, interface) {
            Ok(id) => id,
            // A filter with our priority and handle is there: swap its program.
            Err(error) => program
                .attach_to_link(self.clsact_link(interface)?)
                .with_context(|| format!("adding a filter failed before: {error}"))?,
        };
        keep_filter(program, id)
    }

    fn clsact_link(&self, interface: &str) -> anyhow::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(
            interface,
            TcAttachType::Ingress,
            CLSACT_PRIORITY,
            self.handle,
            None,
        )
        .with_context(|| format!("interface {interface}"))
    }

    fn detach(&self, pins: &PinDir, ifindex: u32, place: &Place) {
        if self.tcx {
            let _ = fs::remove_file(pins.links().join(place.pin_name(ifindex)));
        } else {
            self.detach_clsact(&place.interface);
        }
        debug!(
            program = place.program,
            interface = place.interface,
            "program detached"
        );
    }

    /// Removes our filter; an interface that is gone took it along.
    fn detach_clsact(&self, interface: &str) {
        if let Ok(link) = self.clsact_link(interface) {
            let removed = aya::programs::links::Link::detach(link);
            debug!(interface, ok = removed.is_ok(), "clsact filter removed");
        }
    }

    /// Removes leftovers of earlier agents: links of interfaces that are not
    /// ours any more, and the other kind of attachment after a change of kind.
    fn sweep(&self, pins: &PinDir) {
        let ours = pins.links();
        for path in link_pins(pins) {
            let wanted = self.tcx
                && path.parent() == Some(&ours)
                && self
                    .placed
                    .iter()
                    .any(|(ifindex, place)| path.ends_with(place.pin_name(*ifindex)));
            if !wanted {
                info!(link = %path.display(), "a link of an earlier agent is not wanted any more");
                let _ = fs::remove_file(&path);
            }
        }
        for interface in interfaces() {
            let wanted = !self.tcx
                && self
                    .placed
                    .values()
                    .any(|place| place.interface == interface);
            if !wanted {
                self.detach_clsact(&interface);
            }
        }
    }

    /// Detaches everything, whoever of us attached it.
    pub(super) fn detach_all(self, pins: &PinDir) {
        for path in link_pins(pins) {
            if let Err(error) = fs::remove_file(&path) {
                warn!(link = %path.display(), %error, "cannot detach");
            }
        }
        for interface in interfaces() {
            self.detach_clsact(&interface);
        }
    }
}

/// Every pinned link of this network.
fn link_pins(pins: &PinDir) -> Vec<PathBuf> {
    let entries = pins
        .all_links()
        .into_iter()
        .filter_map(|directory| fs::read_dir(directory).ok());
    entries
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

/// Names of all interfaces of this namespace.
fn interfaces() -> Vec<String> {
    match nix::net::if_::if_nameindex() {
        Ok(all) => all
            .iter()
            .map(|one| one.name().to_string_lossy().into_owned())
            .collect(),
        Err(error) => {
            warn!(%error, "cannot list interfaces");
            Vec::new()
        }
    }
}

/// Attaches by a pinned tcx link, or swaps the program under the link that a
/// previous agent, of whatever layout, left there.
fn attach_tcx(
    program: &mut SchedClassifier,
    pins: &PinDir,
    ifindex: u32,
    place: &Place,
) -> anyhow::Result<()> {
    let name = place.pin_name(ifindex);
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
    pin_link(fresh_tcx(program, &place.interface)?, &target)
}

/// A link of its own, behind all others on the hook.
fn fresh_tcx(program: &mut SchedClassifier, interface: &str) -> anyhow::Result<FdLink> {
    let id = program.attach_with_options(
        interface,
        TcAttachType::Ingress,
        TcAttachOptions::TcxOrder(LinkOrder::last()),
    )?;
    Ok(program.take_link(id)?.try_into()?)
}

/// Pins a link in place of whatever is pinned there.
fn pin_link(link: FdLink, target: &Path) -> anyhow::Result<()> {
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

/// Lets a filter outlive this process; aya would remove it on drop.
fn keep_filter(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> anyhow::Result<()> {
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Puts `program` under the pinned link and hands the link back.
fn swap(program: &mut SchedClassifier, pin: &Path) -> anyhow::Result<FdLink> {
    let link: SchedClassifierLink = FdLink::from(PinnedLink::from_pin(pin)?).try_into()?;
    let id = program.attach_to_link(link)?;
    let link: FdLink = program
        .take_link(id)?
        .try_into()
        .map_err(|_| anyhow!("not a tcx link"))?;
    Ok(link)
}

/// Pins the program itself, so that other tools find it by name. Not needed for forwarding.
fn pin_program(program: &mut SchedClassifier, path: &Path) {
    if path.exists() && program.info().ok().map(|info| info.id()) == pinned_program_id(path) {
        return;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path = %path.display(), %error, "cannot replace the pinned program");
        }
        _ => {
            if let Err(error) = program.pin(path) {
                warn!(path = %path.display(), %error, "cannot pin the program");
            }
        }
    }
}

fn pinned_program_id(path: &Path) -> Option<u32> {
    aya::programs::ProgramInfo::from_pin(path)
        .ok()
        .map(|info| info.id())
}
