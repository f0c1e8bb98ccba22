//! Which program sits where.
//!
//! tcx (Linux 6.6 and later): one pinned link per place; the link survives
//! the agent and its program is swapped atomically ([`super::tcx`]). Older kernels: filters at
//! clsact qdiscs ([`super::clsact`]).

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use aya::{
    programs::{SchedClassifier, TcAttachType, links::FdLink, tc::TcHandle},
    util::KernelVersion,
};
use flannel_ebpf::layout::{
    FAST_PATH_LEARNED, FROM_POD, FROM_TUNNEL, FROM_UPLINK, PARKED, TO_POD, TO_UPLINK,
};
use tracing::{debug, info, warn};

use super::{EbpfError, SyncReport, Wanted, clsact, object::Programs, pins::PinDir, tcx};

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

/// Where a program hooks in; those that only watch come first when attaching and last when
/// detaching, so that whoever acts is always watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    ToUplink,
    FromTunnel,
    ToPod,
    FromUplink,
    FromPod,
}

impl Hook {
    const fn program(self) -> &'static str {
        match self {
            Self::ToUplink => TO_UPLINK,
            Self::FromTunnel => FROM_TUNNEL,
            Self::ToPod => TO_POD,
            Self::FromUplink => FROM_UPLINK,
            Self::FromPod => FROM_POD,
        }
    }

    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::ToUplink | Self::ToPod => TcAttachType::Egress,
            _ => TcAttachType::Ingress,
        }
    }

    /// Beginning of the link's pin.
    const fn pin(self) -> &'static str {
        match self {
            Self::ToUplink => "uplink_egress",
            Self::FromTunnel => "tunnel",
            Self::ToPod => "pod_egress",
            Self::FromUplink => "uplink",
            Self::FromPod => "pod",
        }
    }
}

/// One place for one program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) hook: Hook,
    ifindex: u32,
}

impl Place {
    /// Name of the link's pin: stable over all layouts.
    pub(super) fn pin_name(self) -> String {
        format!("{}_{}", self.hook.pin(), self.ifindex)
    }
}

/// Everything attached by this agent.
pub(super) struct Attachments {
    tcx: bool,
    handle: TcHandle,
    /// With the name of each interface.
    placed: BTreeMap<Place, String>,
    /// Links with the program that does nothing, while the others are switched off.
    parked: BTreeMap<Place, FdLink>,
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
            parked: BTreeMap::new(),
            swept: false,
        }
    }

    /// Is the program there that takes packets in, from a pod or from other nodes?
    pub(super) fn is_attached(&self, ifindex: u32) -> bool {
        let takes = [Hook::FromPod, Hook::FromUplink];
        takes
            .into_iter()
            .any(|hook| self.placed.contains_key(&Place { hook, ifindex }))
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
        let places = places(wanted);
        let mut report = SyncReport::default();
        for (place, interface) in &places {
            let program = place.hook.program();
            // A renamed interface keeps its program.
            if self.placed.contains_key(place) {
                if thorough {
                    match self.restore(programs, pins, *place, interface) {
                        Ok(false) => {}
                        Ok(true) => {
                            warn!(
                                program,
                                interface, "something had detached the program: attached again"
                            );
                            report.attached += 1;
                        }
                        // The interface is on its way out; its event follows.
                        Err(error) => debug!(interface, %error, "cannot check the program"),
                    }
                }
                continue;
            }
            match self.attach(programs, pins, *place, interface) {
                Ok(()) => {
                    debug!(program, interface, "program attached");
                    self.placed.insert(*place, interface.clone());
                    report.attached += 1;
                }
                Err(source) => report.failures.push(EbpfError::Attach {
                    program,
                    interface: interface.clone(),
                    source,
                }),
            }
        }
        let stale: Vec<Place> = self
            .placed
            .keys()
            .rev()
            .filter(|place| !places.contains_key(place))
            .copied()
            .collect();
        for place in stale {
            if let Some(interface) = self.placed.remove(&place) {
                self.detach(pins, place, &interface);
            }
        }
        // Places that nobody wants any more.
        self.parked.clear();
        if !self.swept {
            self.sweep(pins);
            self.swept = true;
        }
        report
    }

    fn attach(
        &mut self,
        programs: &mut Programs,
        pins: &PinDir,
        place: Place,
        interface: &str,
    ) -> anyhow::Result<()> {
        let name = place.hook.program();
        let program = programs.classifier(name)?;
        pin_program(program, &pins.programs().join(name));
        if !self.tcx {
            return clsact::attach(program, self.handle, place.hook, interface);
        }
        if let Some(link) = self.parked.remove(&place) {
            match tcx::resume(program, pins, place, link) {
                Ok(()) => return Ok(()),
                // The interface is another one now, or something detached the link.
                Err(error) => debug!(interface, %error, "parked link not usable"),
            }
        }
        tcx::attach(program, pins, place, interface)
    }

    /// Takes every program of ours away from its place and every pin. At tcx hooks the links
    /// stay for a moment, with a program that does nothing: see [`Attachments::release`].
    pub(super) fn park(&mut self, programs: &mut Programs, pins: &PinDir) {
        let placed = std::mem::take(&mut self.placed);
        if self.tcx && self.swept {
            // Those who act go first.
            for (place, interface) in placed.into_iter().rev() {
                let link = programs
                    .classifier(PARKED)
                    .map_err(anyhow::Error::from)
                    .and_then(|program| tcx::park(program, pins, place));
                match link {
                    Ok(link) => {
                        self.parked.insert(place, link);
                    }
                    // Its interface is gone, or the link is detached below.
                    Err(error) => debug!(interface, %error, "link not parked"),
                }
            }
            remove_links(pins);
        } else {
            self.detach_all(pins);
        }
    }

    /// Takes free places as soon as they are told, with the program that does nothing: each new
    /// link takes the kernel some time. Ends when the others are loaded.
    pub(super) fn take_places(
        &mut self,
        parked: &mut SchedClassifier,
        pins: &PinDir,
        told: &Receiver<Places>,
        is_loading: &dyn Fn() -> bool,
    ) {
        let Places(places) = loop {
            match told.recv_timeout(TELLING) {
                Ok(places) => break places,
                Err(RecvTimeoutError::Timeout) if is_loading() => {}
                Err(_) => return,
            }
        };
        if !self.tcx {
            return;
        }
        let taken = pins.all_links();
        let is_taken = |place: Place| {
            let name = place.pin_name();
            taken.iter().any(|links| links.join(&name).exists())
        };
        for (place, interface) in places {
            if !is_loading() {
                return;
            }
            if is_taken(place) {
                continue;
            }
            match tcx::fresh(parked, place.hook, &interface) {
                Ok(link) => {
                    self.parked.insert(place, link);
                }
                // It is said when the program itself is attached.
                Err(error) => debug!(interface, %error, "place not taken"),
            }
        }
    }

    /// Are there links that only keep places?
    pub(super) fn keeps_places(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Gives the places up that were kept.
    pub(super) fn release(&mut self) {
        self.parked.clear();
    }

    /// Attaches again what somebody else detached; `false` if it is in place.
    fn restore(
        &self,
        programs: &mut Programs,
        pins: &PinDir,
        place: Place,
        interface: &str,
    ) -> anyhow::Result<bool> {
        let program = programs.classifier(place.hook.program())?;
        if self.tcx {
            // The kernel refuses one program twice on one hook.
            let Ok(link) = tcx::fresh(program, place.hook, interface) else {
                return Ok(false);
            };
            tcx::pin(link, &pins.links().join(place.pin_name()))?;
            return Ok(true);
        }
        clsact::restore(program, self.handle, place.hook, interface)
    }

    fn detach(&self, pins: &PinDir, place: Place, interface: &str) {
        if self.tcx {
            let _ = fs::remove_file(pins.links().join(place.pin_name()));
        } else {
            clsact::detach(self.handle, place.hook.attach_type(), interface);
        }
        debug!(
            program = place.hook.program(),
            interface, "program detached"
        );
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
                    .any(|(place, _)| path.ends_with(place.pin_name()));
            if !wanted {
                info!(link = %path.display(), "a link of an earlier agent is not wanted any more");
                let _ = fs::remove_file(&path);
            }
        }
        for interface in interfaces() {
            for attach_type in SIDES {
                let wanted = !self.tcx
                    && self.placed.iter().any(|(place, name)| {
                        *name == interface && place.hook.attach_type() == attach_type
                    });
                if !wanted {
                    clsact::detach(self.handle, attach_type, &interface);
                }
            }
        }
    }

    /// Detaches everything, whoever of us attached it.
    pub(super) fn detach_all(&self, pins: &PinDir) {
        remove_links(pins);
        for interface in interfaces() {
            for attach_type in SIDES {
                clsact::detach(self.handle, attach_type, &interface);
            }
        }
    }
}

/// Between two looks whether everything is loaded.
const TELLING: Duration = Duration::from_millis(2);

/// Places that want a program, with the names of their interfaces.
pub struct Places(BTreeMap<Place, String>);

impl Places {
    /// All that `wanted` has.
    #[must_use]
    pub fn of(wanted: &Wanted) -> Self {
        Self(places(wanted))
    }
}

/// Both sides of an interface.
const SIDES: [TcAttachType; 2] = [TcAttachType::Ingress, TcAttachType::Egress];

/// Every place that wants a program, with the name of its interface.
fn places(wanted: &Wanted) -> BTreeMap<Place, String> {
    let mut places = BTreeMap::new();
    let mut add = |hook, ifindex, interface: &str| {
        places.insert(Place { hook, ifindex }, interface.to_owned());
    };
    let learned = wanted.node.flags & FAST_PATH_LEARNED != 0;
    for pod in &wanted.pods {
        add(Hook::FromPod, pod.ifindex, &pod.interface);
        if learned {
            add(Hook::ToPod, pod.ifindex, &pod.interface);
        }
    }
    add(Hook::FromUplink, wanted.node.uplink, &wanted.uplink);
    if learned {
        add(Hook::ToUplink, wanted.node.uplink, &wanted.uplink);
        add(Hook::FromTunnel, wanted.node.tunnel, &wanted.tunnel);
    }
    places
}

/// Removes every pinned link of this network, and with it the link where nobody else holds it.
fn remove_links(pins: &PinDir) {
    for path in link_pins(pins) {
        if let Err(error) = fs::remove_file(&path) {
            warn!(link = %path.display(), %error, "cannot detach");
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
