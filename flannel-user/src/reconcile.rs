//! The loop that keeps the kernel as it should be: the only caller of a datapath.
//!
//! Wanted state arrives by a watch channel, where the latest wins: states in
//! between may be skipped, the last one is always applied. Kernel events, the
//! control socket and a slow timer only wake the loop.

mod uplink;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use flannel_ebpf::layout::{MODE_KERNEL, MODE_VXLAN, RemoteSubnet};
use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use crate::{
    control::{Answer, Call, Request},
    datapath::{
        ebpf::Wanted,
        exclusion::Exclusions,
        kernel_events::KernelEvent,
        netlink::{Device, NetlinkDatapath, Pass, Rtnl},
        next_hop,
        node_config::{self, KernelSettings, NodeFacts},
        pods::{self, Ambiguous, Pod},
        shaping,
        switch::{Preference, Switch},
        tunnel_mtu::TunnelMtu,
    },
    forwarding::{ForwardingTable, Via},
    health::Health,
    lease::Lease,
    network::FastPath,
    observe::{
        flows::Filter,
        status::{
            ConflictStatus, CounterStatus, KernelStatus, NodeStatus, PeerStatus, PodStatus,
            SourceStatus, Status, fast_path_text,
        },
    },
    source::Conflict,
    uplink::{Uplink, follow::Followed},
};

pub use self::uplink::Told;

/// Everything is looked at again this often even when nothing happens.
const SLOW_CHECK: Duration = Duration::from_secs(10);
/// Kernel events come in bursts; the loop lets one settle for this long.
const BURST: Duration = Duration::from_millis(10);

/// The wanted state, from the leases.
#[derive(Debug, Clone, Default)]
pub struct Peers {
    /// The way to each peer.
    pub table: Arc<ForwardingTable>,
    /// Claims of other agents on what this one holds.
    pub conflicts: Vec<Conflict>,
    /// A snapshot has been applied and the source has no known fault.
    pub in_sync: bool,
}

/// What the agent was set up with; only the uplink changes while it lives.
#[derive(Debug, Clone)]
pub struct NodeSetup {
    /// The chosen uplink and the published address.
    pub uplink: Uplink,
    /// The own pod subnet.
    pub subnet: Ipv4Net,
    /// All pod subnets.
    pub network: Ipv4Net,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port; `None` for the kernel's default.
    pub port: Option<u16>,
    /// MTU of the tunnel.
    pub mtu: TunnelMtu,
    /// Which packets the programs may take.
    pub fast_path: FastPath,
    /// `--forged-vxlan drop`.
    pub drop_forged: bool,
    /// `--fast-path-exclude`.
    pub exclusions: Exclusions,
    /// Name of the lease source.
    pub source: String,
}

/// What has to be looked at again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Dirty {
    kernel: bool,
    pods: bool,
    next_hops: bool,
    /// Ask the kernel even where nothing is known to have changed.
    thorough: bool,
}

impl Dirty {
    const ALL: Self = Self {
        kernel: true,
        pods: true,
        next_hops: true,
        thorough: false,
    };

    fn any(self) -> bool {
        self.kernel || self.pods || self.next_hops
    }

    fn and(self, other: Self) -> Self {
        Self {
            kernel: self.kernel || other.kernel,
            pods: self.pods || other.pods,
            next_hops: self.next_hops || other.next_hops,
            thorough: self.thorough || other.thorough,
        }
    }
}

/// Which parts an event concerns; `own` is the port of the kernel datapath's socket.
fn concerns(event: &KernelEvent, device: u32, own: u32) -> Dirty {
    let Some(origin) = event.origin() else {
        return Dirty::ALL;
    };
    if origin.port == own {
        return Dirty::default();
    }
    let here = origin.namespace.is_none();
    match *event {
        // A pod's own link and addresses live in another namespace.
        KernelEvent::Links { .. } | KernelEvent::Addresses { .. } if !here => Dirty {
            pods: true,
            ..Dirty::default()
        },
        KernelEvent::Links { index, .. } | KernelEvent::Addresses { index, .. } => Dirty {
            kernel: index == device,
            ..Dirty::ALL
        },
        KernelEvent::Routes { .. } if here => Dirty::ALL,
        // Our own filters come with their interface; others must not be passed by.
        KernelEvent::Queueing { .. } if here => Dirty {
            pods: true,
            ..Dirty::default()
        },
        KernelEvent::Neighbours { index, .. } if here && index == device => Dirty {
            kernel: true,
            ..Dirty::default()
        },
        _ => Dirty::default(),
    }
}

/// Is this event worth waking the loop at all? Neighbours elsewhere come and go all the time.
#[must_use]
pub fn is_relevant(event: &KernelEvent) -> bool {
    match event {
        KernelEvent::Neighbours { origin, .. }
        | KernelEvent::Routes { origin, .. }
        | KernelEvent::Queueing { origin, .. } => origin.namespace.is_none(),
        _ => true,
    }
}

/// The loop's state.
pub struct Reconciler {
    setup: NodeSetup,
    rtnl: Rtnl,
    netlink: NetlinkDatapath,
    device: Device,
    switch: Switch,
    peers: Peers,
    pods: Vec<Pod>,
    ambiguous: Vec<Ambiguous>,
    /// Pods that stay with the kernel, by the index of their veth.
    kept: BTreeMap<u32, String>,
    next_hops: BTreeMap<Ipv4Addr, Ipv4Addr>,
    /// No route has changed since `next_hops` was made.
    routes_settled: bool,
    kernel: KernelStatus,
    own_lease: watch::Receiver<Lease>,
    /// Why the uplink cannot be used.
    uplink_fault: Option<String>,
    /// Why the device does not fit the uplink yet.
    fit_failure: Option<String>,
    told: watch::Sender<Told>,
    /// The first snapshot of leases has been seen: before it nothing may be removed.
    seeded: bool,
    /// Mixed into the programs' hashes.
    seed: u32,
}

/// What wakes the loop.
pub struct Inputs {
    /// The wanted state; the loop does nothing before the first `in_sync`.
    pub peers: watch::Receiver<Peers>,
    /// The uplink as it changes.
    pub uplink: watch::Receiver<Followed>,
    /// Kernel events.
    pub events: mpsc::Receiver<KernelEvent>,
    /// The control socket.
    pub calls: mpsc::Receiver<Call>,
    /// Told at each turn of the loop.
    pub health: Arc<Health>,
    /// Told once when the first snapshot is in the kernel.
    pub ready: oneshot::Sender<()>,
}

impl Reconciler {
    /// A loop over a device that exists already.
    #[must_use]
    pub fn new(
        setup: NodeSetup,
        rtnl: Rtnl,
        netlink: NetlinkDatapath,
        device: Device,
        switch: Switch,
        own_lease: watch::Receiver<Lease>,
        told: watch::Sender<Told>,
    ) -> Self {
        Self {
            setup,
            rtnl,
            netlink,
            device,
            switch,
            peers: Peers::default(),
            pods: Vec::new(),
            ambiguous: Vec::new(),
            kept: BTreeMap::new(),
            next_hops: BTreeMap::new(),
            routes_settled: false,
            kernel: KernelStatus::default(),
            own_lease,
            uplink_fault: None,
            fit_failure: None,
            told,
            seeded: false,
            seed: rand::random(),
        }
    }

    /// Runs until the sender of the wanted state is gone. Everything stays in
    /// the kernel as it is then.
    pub async fn run(mut self, inputs: Inputs) {
        let Inputs {
            mut peers,
            mut uplink,
            mut events,
            mut calls,
            ready,
            health,
        } = inputs;
        let mut ready = Some(ready);
        let mut tick = tokio::time::interval_at(Instant::now() + SLOW_CHECK, SLOW_CHECK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            health.beat();
            let mut dirty = Dirty::default();
            tokio::select! {
                biased;
                call = calls.recv() => match call {
                    Some((request, answer)) => {
                        let _ = answer.send(self.answer(request).await);
                    }
                    None => return,
                },
                changed = peers.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.peers = peers.borrow_and_update().clone();
                    let kernel = ready.is_some() || !self.follow_peers().await;
                    dirty = Dirty { kernel, pods: ready.is_some(), ..Dirty::ALL };
                }
                Ok(()) = uplink.changed() => {
                    dirty = self.take_up(uplink.borrow_and_update().clone());
                }
                event = events.recv() => match event {
                    Some(event) => {
                        dirty = self.affected(&event);
                        if dirty.any() {
                            tokio::time::sleep(BURST).await;
                        }
                        while let Ok(event) = events.try_recv() {
                            dirty = dirty.and(self.affected(&event));
                        }
                    }
                    None => {
                        warn!("kernel events ended: relying on the slow check");
                        events = mpsc::channel(1).1;
                        std::future::pending::<()>().await;
                    }
                },
                _ = tick.tick() => {
                    self.routes_settled = false;
                    dirty = Dirty { thorough: true, ..Dirty::ALL };
                }
            }
            self.seeded |= self.peers.in_sync;
            if dirty.any() && self.seeded {
                self.pass(dirty).await;
                if let Some(ready) = ready.take() {
                    let _ = ready.send(());
                }
            }
        }
    }

    /// Which parts an event concerns.
    fn affected(&mut self, event: &KernelEvent) -> Dirty {
        if matches!(event, KernelEvent::Neighbours { fdb: true, origin, .. } if origin.port == 0)
            && self.netlink.takes_echo()
        {
            return Dirty::default();
        }
        let dirty = concerns(event, self.device.index, self.netlink.port());
        if dirty.next_hops {
            self.routes_settled = false;
        }
        dirty
    }

    /// Brings the kernel in line with what is wanted, kernel path first.
    async fn pass(&mut self, dirty: Dirty) {
        if dirty.kernel {
            self.fit_device().await;
            let table = Arc::clone(&self.peers.table);
            let pass = self.netlink.reconcile(&table).await;
            self.note(&pass);
            self.tell();
        }
        if dirty.pods {
            self.find_pods().await;
        }
        if dirty.next_hops && self.switch.wants_ebpf() {
            self.find_next_hops().await;
        }
        let wanted = self.wanted();
        self.switch.apply(&wanted, dirty.thorough);
    }

    /// Programs peers that came or went and nothing else; false where a full pass has to.
    async fn follow_peers(&mut self) -> bool {
        let table = Arc::clone(&self.peers.table);
        match self.netlink.follow(&table).await {
            Some(pass) => {
                self.note(&pass);
                true
            }
            None => false,
        }
    }

    fn note(&mut self, pass: &Pass) {
        if let Some(device) = &pass.device {
            self.device = device.clone();
        }
        self.kernel.repairs += pass.repaired as u64;
        if pass.repaired > 0 {
            warn!(
                count = pass.repaired,
                "something else had changed the kernel path: put back"
            );
        }
        let errors: Vec<String> = pass
            .errors
            .iter()
            .map(|error| format!("{error:#}"))
            .collect();
        let last_error = (!errors.is_empty()).then(|| errors.join("; "));
        if last_error != self.kernel.last_error {
            match &last_error {
                Some(errors) => warn!(errors, "the kernel path is not complete; trying on"),
                None => info!("the kernel path is complete again"),
            }
        }
        self.kernel.last_error = last_error;
    }

    async fn find_pods(&mut self) {
        match pods::discover(&mut self.rtnl, self.setup.subnet).await {
            Ok(found) => {
                for claim in found
                    .ambiguous
                    .iter()
                    .filter(|claim| !self.ambiguous.contains(claim))
                {
                    let interfaces = claim.interfaces.join(", ");
                    warn!(address = %claim.address, interfaces, "claimed more than once: the kernel forwards it");
                }
                self.ambiguous = found.ambiguous;
                if self.pods.len() != found.pods.len() {
                    debug!(pods = found.pods.len(), "pods on this node");
                }
                self.pods = found.pods;
                self.find_kept().await;
            }
            // Better the pods known so far than none.
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "cannot look for pods"
            ),
        }
    }

    /// Finds the pods whose packets must not pass by their veth's queue and filters.
    async fn find_kept(&mut self) {
        match shaping::find(&mut self.rtnl, &self.pods, self.setup.vni).await {
            Ok(mut kept) => {
                for pod in &self.pods {
                    if self.setup.exclusions.interfaces.contains(&pod.interface) {
                        kept.insert(
                            pod.ifindex,
                            "--fast-path-exclude names its interface".to_owned(),
                        );
                    }
                }
                for (ifindex, reason) in &kept {
                    if self.kept.get(ifindex) != Some(reason) {
                        info!(ifindex, reason, "a pod stays with the kernel");
                    }
                }
                self.kept = kept;
            }
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "cannot look for shaped pods"
            ),
        }
    }

    /// Resolves every node anew after routes changed, and only new ones otherwise.
    async fn find_next_hops(&mut self) {
        let nodes: BTreeSet<Ipv4Addr> = self
            .peers
            .table
            .0
            .values()
            .map(|Via::Vxlan { node, .. }| *node)
            .collect();
        self.next_hops.retain(|node, _| nodes.contains(node));
        for node in nodes {
            if self.routes_settled && self.next_hops.contains_key(&node) {
                continue;
            }
            match next_hop::resolve(&mut self.rtnl, self.setup.uplink.index, node).await {
                Ok(Some(hop)) => {
                    self.next_hops.insert(node, hop);
                }
                Ok(None) => {
                    if self.next_hops.remove(&node).is_some() {
                        warn!(%node, "no route by the uplink any more: the kernel path decides");
                    }
                }
                Err(error) => {
                    warn!(%node, error = &error as &dyn std::error::Error, "cannot look up the route");
                    self.next_hops.remove(&node);
                }
            }
        }
        self.routes_settled = true;
    }

    fn wanted(&self) -> Wanted {
        let facts = NodeFacts {
            uplink: self.setup.uplink.index,
            tunnel: self.device.index,
            seed: self.seed,
            vni: self.setup.vni,
            port: self.setup.port,
            pod_mtu: self.device.mtu,
            vtep_addr: self.setup.uplink.public_ip,
            vtep_mac: self.device.mac,
            fast_path: self.setup.fast_path,
            has_exclusions: self.setup.exclusions.concern_packets(),
            drop_forged: self.setup.drop_forged && self.peers.in_sync,
        };
        let remotes = self
            .peers
            .table
            .0
            .iter()
            .map(|(subnet, Via::Vxlan { node, vtep_mac })| {
                let next_hop = self.next_hops.get(node);
                let remote = RemoteSubnet {
                    node: node.octets(),
                    next_hop: next_hop.copied().unwrap_or(Ipv4Addr::UNSPECIFIED).octets(),
                    vni: self.setup.vni,
                    vtep_mac: vtep_mac.0,
                    mode: if next_hop.is_some() {
                        MODE_VXLAN
                    } else {
                        MODE_KERNEL
                    },
                    _pad: 0,
                };
                (*subnet, remote)
            });
        Wanted {
            node: node_config::compose(&facts, &KernelSettings::read()),
            uplink: self.setup.uplink.name.clone(),
            tunnel: self.device.name.clone(),
            remotes: remotes.collect(),
            pods: self.pods.clone(),
            kept: self.kept.clone(),
            exclusions: self.setup.exclusions.clone(),
        }
    }

    async fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::Status => Answer::from(self.status()),
            Request::Flows(filter) => self.flows(&filter),
            Request::Mode { datapath } => {
                let preference = match <Preference as clap::ValueEnum>::from_str(&datapath, false) {
                    Ok(preference) => preference,
                    Err(_) => {
                        return Answer::Error(format!(
                            "{datapath:?} is no datapath: expected auto, ebpf or netlink"
                        ));
                    }
                };
                self.switch.choose(preference);
                if self.seeded {
                    self.pass(Dirty {
                        kernel: false,
                        ..Dirty::ALL
                    })
                    .await;
                }
                Answer::from(self.status())
            }
        }
    }

    fn flows(&mut self, filter: &Filter) -> Answer {
        let learned = self.switch.ebpf_mut().map(|ebpf| ebpf.flows(filter));
        match learned.transpose() {
            Ok(Some(Some(flows))) => Answer::from(flows),
            Ok(Some(None)) => Answer::Error(format!(
                "nothing is learned with this fast path: {}",
                fast_path_text(self.setup.fast_path)
            )),
            Ok(None) => Answer::Error(format!(
                "nothing is learned in netlink mode ({})",
                self.switch.reason()
            )),
            Err(cause) => Answer::Error(format!("{:#}", anyhow::Error::from(cause))),
        }
    }

    fn status(&self) -> Status {
        let ebpf = self.switch.ebpf();
        let counters = ebpf
            .map(|ebpf| ebpf.counters())
            .transpose()
            .unwrap_or_else(|error| {
                warn!(error = &error as &dyn std::error::Error, "no counters");
                None
            });
        let bypass = ebpf
            .map(|ebpf| ebpf.bypass_status())
            .transpose()
            .unwrap_or_else(|error| {
                warn!(error = &error as &dyn std::error::Error, "no flows");
                None
            });
        let peers = self
            .peers
            .table
            .0
            .iter()
            .map(|(subnet, Via::Vxlan { node, vtep_mac })| PeerStatus {
                subnet: *subnet,
                node: *node,
                vtep_mac: vtep_mac.to_string(),
                next_hop: ebpf.and(self.next_hops.get(node).copied()),
            });
        let pods = self.pods.iter().map(|pod| PodStatus {
            address: pod.address,
            interface: pod.interface.clone(),
            attached: ebpf.is_some_and(|ebpf| ebpf.is_attached(pod.ifindex)),
            kept: self.kept.get(&pod.ifindex).cloned(),
        });
        let counters = counters
            .unwrap_or_default()
            .into_iter()
            .map(|(reason, tally)| CounterStatus {
                reason: reason.label().to_owned(),
                direction: reason.direction().label().to_owned(),
                action: reason.action().label().to_owned(),
                packets: tally.packets,
                bytes: tally.bytes,
                text: reason.text().to_owned(),
            });
        let conflicts = self.peers.conflicts.iter().map(|conflict| ConflictStatus {
            subnet: conflict.subnet.v4,
            node: conflict.node,
            text: conflict.quarrel.to_string(),
        });
        let expires = self.own_lease.borrow().expires;
        let expires = expires.and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            mode: self.switch.mode(),
            mode_reason: self.switch.reason().to_owned(),
            fast_path: self.setup.fast_path,
            fast_path_text: fast_path_text(self.setup.fast_path).to_owned(),
            bypass: bypass.flatten(),
            node: NodeStatus {
                subnet: self.setup.subnet,
                network: self.setup.network,
                public_ip: self.setup.uplink.public_ip,
                uplink: self.setup.uplink.name.clone(),
                uplink_fault: self.uplink_fault.clone(),
                device: self.device.name.clone(),
                vtep_mac: self.device.mac.to_string(),
                mtu: self.device.mtu,
                uplink_attached: ebpf.is_some_and(|ebpf| ebpf.is_attached(self.setup.uplink.index)),
            },
            source: SourceStatus {
                source: self.setup.source.clone(),
                in_sync: self.peers.in_sync,
                lease_expires: expires.map(|expires| expires.as_secs()),
            },
            conflicts: conflicts.collect(),
            peers: peers.collect(),
            pods: pods.collect(),
            counters: counters.collect(),
            kernel: self.kernel.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::kernel_events::Origin;

    const DEVICE: u32 = 7;
    const OWN: u32 = 4242;
    const HERE: Origin = Origin {
        namespace: None,
        port: 1,
    };
    const POD: Origin = Origin {
        namespace: Some(3),
        port: 1,
    };

    #[test]
    fn each_event_wakes_what_it_concerns() {
        let pods = Dirty {
            pods: true,
            ..Dirty::default()
        };
        let kernel = Dirty {
            kernel: true,
            ..Dirty::default()
        };
        let rows = [
            (KernelEvent::Overrun, Dirty::ALL),
            (
                KernelEvent::Links {
                    origin: HERE,
                    index: DEVICE,
                    removed: true,
                },
                Dirty::ALL,
            ),
            (
                KernelEvent::Links {
                    origin: HERE,
                    index: 9,
                    removed: false,
                },
                Dirty {
                    kernel: false,
                    ..Dirty::ALL
                },
            ),
            (
                KernelEvent::Addresses {
                    origin: POD,
                    index: 2,
                    removed: false,
                },
                pods,
            ),
            (
                KernelEvent::Routes {
                    origin: HERE,
                    index: None,
                    table: 254,
                    removed: true,
                },
                Dirty::ALL,
            ),
            (
                KernelEvent::Routes {
                    origin: POD,
                    index: None,
                    table: 254,
                    removed: true,
                },
                Dirty::default(),
            ),
            (
                KernelEvent::Neighbours {
                    origin: HERE,
                    index: DEVICE,
                    fdb: true,
                    removed: true,
                },
                kernel,
            ),
            (
                KernelEvent::Neighbours {
                    origin: HERE,
                    index: 9,
                    fdb: false,
                    removed: false,
                },
                Dirty::default(),
            ),
        ];
        for (event, expected) in rows {
            assert_eq!(concerns(&event, DEVICE, OWN), expected, "{event:?}");
        }
    }

    #[test]
    fn our_own_changes_wake_nothing() {
        let origin = Origin {
            namespace: None,
            port: OWN,
        };
        let event = KernelEvent::Routes {
            origin,
            index: Some(DEVICE),
            table: 254,
            removed: false,
        };
        assert_eq!(concerns(&event, DEVICE, OWN), Dirty::default());
    }
}
