//! The kernel datapath: `flannel.<VNI>`, its address, routes, neighbours and FDB
//! (contract section 9), always complete, whatever the programs above it do.
//!
//! Reconciling is by value: observe what the kernel has, compare it with what the table wants,
//! apply the difference. A pass right after a good one changes nothing. Nothing is
//! retried inside a pass; what failed is reported, and the next pass tries it again.

mod apply;
mod device;
mod echoes;
mod entries;
mod kernel;
pub(in crate::datapath) mod next_hop_object;
mod plan;
pub mod rtnl;
pub(crate) mod socket;

pub(in crate::datapath) use device::local_address;
pub use device::{Device, DeviceError, DeviceSpec};
use echoes::{Echo, Echoes};
pub use entries::{Conflict, Entries, Form};
pub use kernel::Entry;
pub use next_hop_object::is_of_peer;
use plan::Plan;
pub use rtnl::{Rtnl, RtnlError};
use tracing::{debug, warn};

use super::kernel_events::KernelEvent;
use crate::forwarding::{Changes, ForwardingTable};

/// What a pass could not do.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The tunnel device is missing or wrong. Nothing was programmed in case it is missing.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// `reconcile` was called before `ensure_device`.
    #[error("the tunnel device has not been set up yet")]
    NoDevice,
    /// What the kernel has could not be read.
    #[error("cannot read the routes, neighbours and FDB of {device}")]
    Observe {
        /// The tunnel device.
        device: String,
        /// The kernel's answer.
        #[source]
        source: RtnlError,
    },
    /// Two peers contradict each other.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// One entry was refused.
    #[error("cannot {action} {entry}")]
    Entry {
        /// `set` or `delete`.
        action: &'static str,
        /// The entry.
        entry: Entry,
        /// The kernel's answer.
        #[source]
        source: RtnlError,
    },
    /// The socket failed in the middle of a batch.
    #[error("lost contact with the kernel while programming {device}")]
    Transport {
        /// The tunnel device.
        device: String,
        /// The socket's fault.
        #[source]
        source: RtnlError,
    },
}

/// What one pass did.
#[derive(Debug, Default)]
pub struct Pass {
    /// Entries set that had not been there after the last pass either.
    pub installed: usize,
    /// Entries deleted.
    pub removed: usize,
    /// Entries put back that the last pass had left in place, plus corrections of the
    /// device: somebody else took them away.
    pub repaired: usize,
    /// The device after this pass; `None` if there is none.
    pub device: Option<Device>,
    /// Everything that failed. The rest of the pass was done nevertheless.
    pub errors: Vec<PassError>,
}

impl Pass {
    /// Nothing had to be changed and nothing failed.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.installed == 0 && self.removed == 0 && self.repaired == 0 && self.errors.is_empty()
    }
}

/// The kernel datapath of one node. Holds what it last knew, so that it can tell a repair from
/// news; the truth is in the kernel.
#[derive(Debug)]
pub struct NetlinkDatapath {
    rtnl: Rtnl,
    spec: Option<DeviceSpec>,
    device: Option<Device>,
    programmed: Entries,
    /// The last pass was good: `programmed` is what its table needs.
    settled: bool,
    /// Routes can go through next hop objects.
    kernel_has_objects: bool,
    /// Events of own changes that do not name this socket.
    echoes: Echoes,
}

impl NetlinkDatapath {
    /// Opens the socket in the network namespace of the calling thread. Changes nothing.
    ///
    /// # Errors
    /// The socket's. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, RtnlError> {
        Ok(Self {
            rtnl: Rtnl::open()?,
            spec: None,
            device: None,
            programmed: Entries::default(),
            settled: false,
            kernel_has_objects: false,
            echoes: Echoes::none(),
        })
    }

    /// Takes over the device that `spec` describes, or makes it. Later calls may give another
    /// `spec` (the lease's address, a new uplink); the MAC stays the one of the first call,
    /// even if the device has to be made anew, and so does the MTU unless `spec` asks for another.
    ///
    /// # Errors
    /// Names the device and the step; the former state of the agent's knowledge stays.
    pub async fn ensure_device(&mut self, spec: &DeviceSpec) -> Result<Device, DeviceError> {
        let other_device = |old: &DeviceSpec| old.vni != spec.vni;
        let mut known = self.device.clone();
        if self.spec.as_ref().is_some_and(other_device) {
            known = None;
        }
        let other_mtu = self.spec.as_ref().is_some_and(|old| old.mtu != spec.mtu);
        if let Some(known) = known.as_mut().filter(|_| other_mtu) {
            known.mtu = spec.mtu;
        }
        let converged = device::converge(&mut self.rtnl, spec, known.as_ref()).await?;
        for error in &converged.errors {
            warn!(
                error = error as &dyn std::error::Error,
                "the device is not quite as wanted"
            );
        }
        if converged.device.created {
            // What went with the old device is not for others to be blamed for.
            self.programmed = Entries::default();
        }
        self.spec = Some(spec.clone());
        self.device = Some(converged.device.clone());
        Ok(converged.device)
    }

    /// The device as of the last call.
    #[must_use]
    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// What the device was last asked to be.
    #[must_use]
    pub fn spec(&self) -> Option<&DeviceSpec> {
        self.spec.as_ref()
    }

    /// The netlink port under which most of this datapath's own changes appear in kernel events;
    /// for the others see [`Self::takes_echo`].
    #[must_use]
    pub fn port(&self) -> u32 {
        self.rtnl.port()
    }

    /// Takes an event that does not name its cause as caused by this datapath, if it may be.
    pub fn takes_echo(&mut self, event: &KernelEvent) -> bool {
        let device = self.device.as_ref().map(|device| device.index);
        let kind = device.and_then(|device| Echo::of(event, device));
        kind.is_some_and(|kind| self.echoes.take(kind))
    }

    /// Carries out `changes` of the table since the last pass, without a look at what the
    /// kernel has: with thousands of peers that look takes a hundred times as long. `None`
    /// where that does not do, because peers touch each other or something failed: a full
    /// pass has to follow.
    pub async fn follow(&mut self, changes: &Changes) -> Option<Pass> {
        if !std::mem::take(&mut self.settled) {
            return None;
        }
        let device = self.device.clone()?;
        let peers = self.programmed.routes.len() + changes.upsert.len();
        let form = Form::of_new_route(peers, self.kernel_has_objects);
        let mut plan = Plan::of_changes(changes, &self.programmed, form)?;
        let mut pass = Pass::default();
        let applied = self.apply(&mut plan, &device, &mut pass).await;
        if applied.is_err() || !pass.errors.is_empty() {
            return None;
        }
        self.programmed.follow(&plan);
        self.settled = true;
        debug!(
            installed = pass.installed,
            removed = pass.removed,
            "followed changes of peers"
        );
        Some(pass)
    }

    /// One full pass: device, then every entry of `table` and nothing else of ours.
    pub async fn reconcile(&mut self, table: &ForwardingTable) -> Pass {
        self.settled = false;
        let pass = self.whole_pass(table).await;
        self.settled = pass.errors.is_empty();
        pass
    }

    async fn whole_pass(&mut self, table: &ForwardingTable) -> Pass {
        let mut pass = Pass::default();
        let Some(spec) = self.spec.clone() else {
            pass.errors.push(PassError::NoDevice);
            return pass;
        };
        match device::converge(&mut self.rtnl, &spec, self.device.as_ref()).await {
            Ok(converged) => {
                pass.repaired += converged.repaired;
                pass.errors
                    .extend(converged.errors.into_iter().map(Into::into));
                let mut device = converged.device;
                pass.device = Some(device.clone());
                // What the next pass has to defend stays what peers and pods were told.
                // A new device is the exception: it may be capped lower than the old one was.
                if let Some(known) = self.device.as_ref().filter(|_| !device.created) {
                    (device.mac, device.mtu) = (known.mac, known.mtu);
                }
                self.device = Some(device);
            }
            Err(error) => {
                pass.errors.push(error.into());
                return pass;
            }
        }
        let device = self.device.clone().expect("set above");
        let (mut wanted, conflicts) = Entries::wanted(table);
        pass.errors.extend(conflicts.into_iter().map(Into::into));

        let actual = match kernel::observe(&mut self.rtnl, device.index).await {
            Ok(actual) => actual,
            Err(source) => {
                let device = device.name;
                pass.errors.push(PassError::Observe { device, source });
                return pass;
            }
        };
        wanted.choose_forms(&actual);
        self.kernel_has_objects = actual.next_hops.is_some();
        let mut plan = Plan::between(&actual, &wanted);
        if plan.is_empty() {
            self.programmed = wanted;
        } else {
            let applied = self.apply(&mut plan, &device, &mut pass).await;
            if let Err(source) = applied {
                let device = device.name;
                pass.errors.push(PassError::Transport { device, source });
            } else {
                // The kernel may have refused some objects.
                wanted.routes.extend(plan.routes.iter().copied());
                self.programmed = wanted.without_failures(&pass.errors);
            }
            // Events wait until this is over.
            self.echoes.wait_longer();
            debug!(
                installed = pass.installed,
                removed = pass.removed,
                repaired = pass.repaired,
                errors = pass.errors.len(),
                "kernel datapath changed"
            );
        }
        pass
    }
}
