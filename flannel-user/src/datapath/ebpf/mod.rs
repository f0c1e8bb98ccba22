//! The eBPF datapath: programs above the kernel path, filled and attached by us.
//!
//! Switching on is load, fill, attach; switching off is detach, then drop, though not at once:
//! see `parked`. All that must outlive the agent is pinned:
//!
//! ```text
//! <bpf-dir>/vni<VNI>/<layout>/maps/<NAME>
//!                            /programs/<name>
//!                            /links/<pod|uplink>_<ifindex>     (tcx only)
//! ```
//!
//! `<layout>` is the layout's version with a fingerprint of every map's shape,
//! so an agent can only ever reuse maps that are exactly like its own. A new
//! agent with the same layout takes the maps over and swaps the programs under
//! the pinned links; with another layout it fills maps of its own first and
//! then swaps, so packets never meet an empty table.

mod attach;
pub mod batch;
mod clsact;
mod counters;
mod ends;
pub mod epoch;
mod flows;
pub mod invalidation;
mod object;
mod own;
mod parked;
mod pins;
mod syscall;
mod tables;
mod tcx;
mod trace;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Receiver},
    },
    time::Duration,
};

use aya::maps::MapError;
use flannel_ebpf::{
    layout::{FAST_PATH_LEARNED, LocalPod, NodeConfig, POD_IN_KERNEL, Tally},
    reason::Reason,
};
use ipnet::Ipv4Net;
use tracing::debug;

use self::{
    attach::Attachments,
    epoch::{Clock, Generation},
    flows::{FlowTables, Learned},
    invalidation::{Bypass, Invalidation},
    own::{ClassTable, Opening, OwnFlows},
    pins::PinDir,
    tables::MapTables,
};
pub use self::{
    attach::{Places, TcAttach},
    clsact::CLSACT_PRIORITY,
    object::Programs,
    own::OwnState,
    parked::Parked,
    tables::Addresses,
};
use super::{conntrack::Conntrack, exclusion::Exclusions, pods::Pod, remotes::Remotes};
use crate::observe::{
    flows::{Filter, Flows},
    status::BypassStatus,
};

/// Why the eBPF datapath could not be opened or brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// A directory of the BPF file system could not be made, read or cleared.
    #[error("cannot {action} {path} (is a BPF file system mounted there?)")]
    Pin {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused the object.
    #[error("the kernel refused the eBPF object")]
    Load(#[from] aya::EbpfError),
    /// The kernel refused one program.
    #[error("the kernel refused program {program}")]
    Program {
        /// Which.
        program: &'static str,
        /// Verifier output included.
        #[source]
        source: aya::programs::ProgramError,
    },
    /// The object lacks a part that the agent knows.
    #[error("the eBPF object has no {kind} named {name}: it was built from other sources")]
    Missing {
        /// Map or program.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A map could not be read or written.
    #[error("cannot {action} map {map}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// Which.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: MapError,
    },
    /// What changes verdicts could not be watched.
    #[error("cannot watch what changes verdicts")]
    Watch {
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A program could not be attached.
    #[error("cannot attach {program} to {interface}")]
    Attach {
        /// Which.
        program: &'static str,
        /// Where.
        interface: String,
        /// What the kernel said.
        #[source]
        source: anyhow::Error,
    },
}

/// For `map_err`: what was tried with which map.
fn map_failed(action: &'static str, map: &'static str) -> impl FnOnce(MapError) -> EbpfError {
    move |source| EbpfError::Map {
        action,
        map,
        source,
    }
}

/// Where and how the programs live.
#[derive(Debug, Clone)]
pub struct EbpfOptions {
    /// Root of the pins, on a BPF file system.
    pub bpf_dir: PathBuf,
    /// Names the network on this host: several agents may run with one VNI each.
    pub vni: u32,
    /// All pod subnets.
    pub network: Ipv4Net,
    /// How programs are attached.
    pub attach: TcAttach,
    /// Flows of each direction that the tables hold.
    pub flows: u32,
    /// How long a confirmed verdict holds while flows are few.
    pub validity: Duration,
    /// File that remembers conntrack's settings as they were found.
    pub conntrack_memory: PathBuf,
    /// Version of the map layout; anything but
    /// [`flannel_ebpf::layout::LAYOUT_VERSION`] is for tests of an upgrade.
    pub layout_version: u32,
}

/// Everything the programs should know and where they should sit.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// This node.
    pub node: NodeConfig,
    /// Name of the uplink; its index is in `node`.
    pub uplink: String,
    /// Name of the tunnel device; its index is in `node`.
    pub tunnel: String,
    /// Peers, and which of them changed since the last [`EbpfDatapath::sync`] that succeeded.
    pub remotes: Remotes,
    /// Pods of this node.
    pub pods: Vec<Pod>,
    /// Pods that stay with the kernel, by the index of their veth, and why.
    pub kept: BTreeMap<u32, String>,
    /// What else is never bypassed.
    pub exclusions: Exclusions,
}

/// What one [`EbpfDatapath::sync`] could not do; everything else is in force.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Programs attached or swapped in this pass.
    pub attached: usize,
    /// One entry per interface without its program; pods there use the kernel path.
    pub failures: Vec<EbpfError>,
}

/// The loaded programs with their maps and attachments.
pub struct EbpfDatapath {
    programs: Programs,
    tables: MapTables,
    attachments: Attachments,
    generation: Generation,
    flows: FlowTables,
    classes: ClassTable,
    /// Interface index of the tunnel device, for whoever watches routes.
    tunnel: Arc<AtomicU32>,
    /// While ways are learned.
    invalidation: Option<Invalidation>,
    /// The same: what an agent before us opened is handed over even if nothing opens any more.
    own: Option<OwnFlows>,
    /// What an earlier agent had left of own connections was handed over.
    is_emptied: bool,
    options: EbpfOptions,
    pins: PinDir,
    _trace: Option<trace::Trace>,
}

impl EbpfDatapath {
    /// Loads the programs, taking over the maps of a previous agent where they
    /// are alike. Nothing is attached or swapped yet.
    ///
    /// # Errors
    /// The kernel cannot run the programs, or the BPF file system is not usable.
    pub fn open(options: &EbpfOptions) -> Result<Self, EbpfError> {
        Self::open_beside(options, &mpsc::channel().1)
    }

    /// The same; places that are told while it loads are taken already, by a program that does
    /// nothing.
    ///
    /// # Errors
    /// As [`EbpfDatapath::open`].
    pub fn open_beside(options: &EbpfOptions, told: &Receiver<Places>) -> Result<Self, EbpfError> {
        let pins = PinDir::prepare(options)?;
        let mut attachments = Attachments::new(options.attach, options.vni);
        let mut programs =
            Programs::load_beside(Some(&pins.maps()), options.flows, |parked, is_loading| {
                attachments.take_places(parked, &pins, told, is_loading);
            })?;
        let trace = trace::follow(&mut programs);
        let tables = MapTables::open(&mut programs)?;
        let jiffies = programs.jiffies()?;
        let generation = Generation::open(&pins.maps(), jiffies, options.validity)?;
        let flows = FlowTables::open(&pins.maps(), options.flows)?;
        let classes = ClassTable::open(&pins.maps())?;
        Ok(Self {
            programs,
            tables,
            attachments,
            generation,
            flows,
            classes,
            tunnel: Arc::default(),
            invalidation: None,
            own: None,
            is_emptied: false,
            options: options.clone(),
            pins,
            _trace: trace,
        })
    }

    /// Fills the maps, then attaches what is missing, then withdraws what is
    /// not wanted any more. A pass without differences makes no system call
    /// for the maps. A `thorough` pass also finds programs that something else detached.
    ///
    /// # Errors
    /// A map could not be written. A program that cannot be attached is
    /// reported instead: other pods keep theirs.
    pub fn sync(&mut self, wanted: &Wanted, thorough: bool) -> Result<SyncReport, EbpfError> {
        let pods: BTreeMap<[u8; 4], LocalPod> = wanted
            .pods
            .iter()
            .map(|pod| {
                let kept = wanted.kept.contains_key(&pod.ifindex);
                (pod.address.octets(), local_pod(pod, kept))
            })
            .collect();
        if thorough {
            let jiffies = self.programs.jiffies()?;
            self.generation.set_clock(jiffies);
        }
        self.tunnel.store(wanted.node.tunnel, Ordering::Relaxed);
        // Before anything may bypass the stack, the stack is made ready and watched.
        let learned = wanted.node.flags & FAST_PATH_LEARNED != 0;
        if !learned {
            self.invalidation = None;
            self.own = None;
            // The programs will carry nothing: whatever an agent before us opened goes first.
            if !std::mem::replace(&mut self.is_emptied, true) {
                own::hand_over_all(&self.pins.maps())?;
            }
        } else if self.own.is_none() {
            self.own = Some(OwnFlows::start(
                &self.pins.maps(),
                self.generation.clone(),
                self.options.network,
            )?);
        }
        if learned && self.invalidation.is_none() {
            self.invalidation = Some(Invalidation::start(
                &self.pins.maps(),
                self.generation.clone(),
                Conntrack::new(self.options.conntrack_memory.clone()),
                self.options.validity,
                self.own.as_ref().map(OwnFlows::commands),
                Arc::clone(&self.tunnel),
            )?);
        }
        self.tables.exclude(&wanted.exclusions)?;
        self.tables
            .fill(&wanted.node, &wanted.remotes, &pods, &self.generation)?;
        let report = self
            .attachments
            .sync(&mut self.programs, &self.pins, wanted, thorough);
        // Now that every SYN which takes the stack is seen.
        if let Some(own) = &self.own {
            own.allow(Opening::of(&wanted.node));
        }
        if report.failures.is_empty() {
            self.pins.forget_other_layouts()?;
        }
        Ok(report)
    }

    /// Is the program in place that takes packets in at this pod's veth, or at the uplink?
    #[must_use]
    pub fn is_attached(&self, ifindex: u32) -> bool {
        self.attachments.is_attached(ifindex)
    }

    /// How the bypass of learned flows fares; `None` where nothing is learned.
    #[must_use]
    pub fn bypass(&self) -> Option<Bypass> {
        self.invalidation.as_ref().map(Invalidation::state)
    }

    /// The same with the fill of the flow tables, for the status; `None` where nothing is learned.
    ///
    /// # Errors
    /// A flow table could not be read.
    pub fn bypass_status(&self) -> Result<Option<BypassStatus>, EbpfError> {
        let Some(bypass) = self.bypass() else {
            return Ok(None);
        };
        let (table_out, table_in) = self.flows.fill()?;
        Ok(Some(BypassStatus {
            held: bypass.held,
            tcp_held: bypass.tcp_held,
            validity_seconds: bypass.validity.as_secs_f64(),
            generations: bypass.raised,
            table_out,
            table_in,
            own: self.own.as_ref().map(OwnFlows::state),
        }))
    }

    /// What was learned; `None` where nothing is learned.
    ///
    /// # Errors
    /// A flow table or the clock could not be read.
    pub fn flows(&mut self, filter: &Filter) -> Result<Option<Flows>, EbpfError> {
        let Some(bypass) = self.bypass() else {
            return Ok(None);
        };
        let programs = &mut self.programs;
        let epoch = self.generation.value();
        let Learned {
            table_out,
            table_in,
            flows,
        } = self
            .flows
            .read(filter, epoch, || programs.jiffies().map(Clock::new))?;
        let own = self.own.as_ref().map(OwnFlows::state).unwrap_or_default();
        let mut classes = self.classes.read(
            |row| row.is_taken(filter),
            |address| self.tables.remote(address),
            &epoch,
            &Clock::new(programs.jiffies()?),
        )?;
        classes.sort_by_key(|row| std::cmp::Reverse(row.opened));
        classes.truncate(filter.limit.unwrap_or(usize::MAX));
        Ok(Some(Flows {
            table_out,
            table_in,
            held: bypass.held,
            tcp_held: bypass.tcp_held,
            matching: flows.len(),
            flows: filter.shown(flows),
            classes,
            classes_off: own.paused.filter(|_| own.by_class),
        }))
    }

    /// Sums every outcome over all CPUs, in order of its index.
    ///
    /// # Errors
    /// The counter map could not be read.
    pub fn counters(&self) -> Result<Vec<(Reason, Tally)>, EbpfError> {
        self.tables.counters()
    }

    /// What is under way comes to its end, and nothing bypasses the stack any more.
    fn quiesce(&mut self) {
        // What conntrack does not know yet is handed over while the programs still carry it.
        self.own = None;
        // Nothing bypasses the stack any more while the programs go one by one.
        self.generation.allow(false, false);
        self.invalidation = None;
    }

    /// Detaches every program and removes every pin: all packets take the kernel path.
    ///
    /// # Errors
    /// A pin could not be removed; the programs are detached all the same where
    /// that was possible.
    pub fn close(mut self) -> Result<(), EbpfError> {
        self.quiesce();
        self.attachments.detach_all(&self.pins);
        self.pins.remove_all()
    }

    /// Detaches and removes what an agent of this network left behind.
    ///
    /// # Errors
    /// A pin could not be removed.
    pub fn clear(options: &EbpfOptions) -> Result<(), EbpfError> {
        let Some(pins) = PinDir::existing(options) else {
            return Ok(());
        };
        if let Err(error) = own::hand_over_all(&pins.maps()) {
            debug!(%error, "an agent of another version left its connections to the stack");
        }
        Attachments::new(options.attach, options.vni).detach_all(&pins);
        pins.remove_all()
    }
}

fn local_pod(pod: &Pod, kept: bool) -> LocalPod {
    LocalPod {
        ifindex: pod.ifindex,
        mtu: pod.mtu,
        mac: pod.mac.0,
        gateway_mac: pod.gateway_mac.0,
        flags: if kept { POD_IN_KERNEL } else { 0 },
    }
}
