//! The loop that keeps the kernel as it should be: the only caller of a datapath.
//!
//! Wanted state arrives by a watch channel, where the latest wins: states in
//! between may be skipped, the last one is always applied. Kernel events, the
//! control socket and a slow timer only wake the loop.

mod dirty;
pub mod feed;
mod pods;
mod status;
mod uplink;
mod ways;

use std::{sync::Arc, time::Duration};

use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tracing::{info, warn};

pub use self::dirty::is_relevant;
use self::{
    dirty::{Dirty, concerns},
    feed::{Feed, News},
    pods::Pods,
    ways::Ways,
};
use crate::{
    control::{Answer, Call, Request},
    datapath::{
        ebpf::Wanted,
        exclusion::Exclusions,
        kernel_events::KernelEvent,
        netlink::{Device, NetlinkDatapath, Pass, Rtnl},
        node_config::{self, KernelSettings, NodeFacts},
        switch::{Preference, Switch},
        tunnel_mtu::TunnelMtu,
    },
    forwarding::{Changes, ForwardingTable},
    health::Health,
    lease::Lease,
    network::FastPath,
    observe::status::KernelStatus,
    source::Conflict,
    uplink::{Uplink, follow::Followed},
};

pub use self::uplink::Told;

/// Everything is looked at again this often even when nothing happens.
const SLOW_CHECK: Duration = Duration::from_secs(10);
/// With this many peers less often: looking takes tenths of a second, and news has to wait.
const MANY_PEERS: usize = 2000;
/// Then it may take one part in so many of the time.
const CHECKS_SHARE: u32 = 200;
/// Kernel events come in bursts; one may settle for this long. Leases do not wait meanwhile.
const BURST: Duration = Duration::from_millis(10);
/// What must not be passed by may settle for this long: ten gigabit are a megabyte in it.
const PROMPT: Duration = Duration::from_millis(1);

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
    /// `--fast-path-classes auto`.
    pub classes: bool,
    /// `--forged-vxlan drop`.
    pub drop_forged: bool,
    /// `--fast-path-exclude`.
    pub exclusions: Exclusions,
    /// Name of the lease source.
    pub source: String,
}

/// The loop's state.
pub struct Reconciler {
    setup: NodeSetup,
    rtnl: Rtnl,
    netlink: NetlinkDatapath,
    device: Device,
    switch: Switch,
    /// The way to each peer that the leases name.
    table: ForwardingTable,
    /// Claims of other agents on what this one holds.
    conflicts: Vec<Conflict>,
    /// A snapshot has been applied and the source has no known fault.
    in_sync: bool,
    pods: Pods,
    ways: Ways,
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
    pub peers: Feed,
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
            table: ForwardingTable::default(),
            conflicts: Vec::new(),
            in_sync: false,
            pods: Pods::default(),
            ways: Ways::default(),
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
            events,
            mut calls,
            ready,
            health,
        } = inputs;
        let mut ready = Some(ready);
        let mut events = Some(events);
        let mut next_check = Instant::now() + SLOW_CHECK;
        let mut burst: Option<Burst> = None;
        let mut settled = Instant::now();
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
                news = peers.next() => {
                    let Some(news) = news else { return };
                    let changes = self.take_over(news);
                    let kernel = ready.is_some() || !self.follow_peers(&changes).await;
                    dirty = Dirty { kernel, pods: ready.is_some(), ..Dirty::ALL };
                }
                Ok(()) = uplink.changed() => {
                    dirty = self.take_up(uplink.borrow_and_update().clone());
                }
                () = due(burst.as_ref().map(|burst| burst.until)) => {
                    dirty = burst.take().map(|burst| burst.dirty).unwrap_or_default();
                    settled = Instant::now();
                }
                event = next(&mut events) => match event {
                    Some(event) => {
                        let mut concerned = self.affected(&event);
                        let mut pause = settle(&event);
                        while let Some(Ok(event)) = events.as_mut().map(|events| events.try_recv()) {
                            concerned = concerned.and(self.affected(&event));
                            pause = pause.min(settle(&event));
                        }
                        if concerned.any() {
                            // However many there are, no more passes than bursts.
                            let until = (Instant::now() + pause).max(settled + BURST);
                            burst = Some(Burst::grown(burst, concerned, until));
                        }
                    }
                    None => {
                        warn!("kernel events ended: relying on the slow check");
                        events = None;
                    }
                },
                () = due(self.switch.parked_until().map(Into::into)) => self.switch.shrink(),
                () = tokio::time::sleep_until(next_check) => {
                    self.ways.routes_changed();
                    dirty = Dirty { thorough: true, ..Dirty::ALL };
                }
            }
            self.seeded |= self.in_sync;
            if dirty.thorough && !self.seeded {
                next_check = Instant::now() + SLOW_CHECK;
            }
            if dirty.any() && self.seeded {
                let begun = Instant::now();
                self.pass(dirty).await;
                if dirty.thorough {
                    let fair = match self.table.0.len() {
                        MANY_PEERS.. => begun.elapsed() * CHECKS_SHARE,
                        _ => SLOW_CHECK,
                    };
                    next_check = Instant::now() + fair.max(SLOW_CHECK);
                }
                if let Some(ready) = ready.take() {
                    let _ = ready.send(());
                }
            }
        }
    }

    /// Which parts an event concerns.
    fn affected(&mut self, event: &KernelEvent) -> Dirty {
        if self.netlink.takes_echo(event) {
            return Dirty::default();
        }
        let dirty = concerns(event, self.device.index, self.netlink.port());
        if dirty.next_hops {
            self.ways.routes_changed();
        }
        dirty
    }

    /// Brings the kernel in line with what is wanted, kernel path first.
    async fn pass(&mut self, dirty: Dirty) {
        if dirty.kernel {
            self.fit_device().await;
            let pass = self.netlink.reconcile(&self.table).await;
            self.note(&pass);
            self.tell();
        }
        if dirty.pods {
            let NodeSetup {
                subnet,
                vni,
                exclusions,
                ..
            } = &self.setup;
            let pods = &mut self.pods;
            pods.find(&mut self.rtnl, *subnet, *vni, exclusions).await;
        }
        if !self.switch.wants_ebpf() {
            self.switch.turn_off().await;
            self.ways.forget();
            return;
        }
        if dirty.next_hops {
            let (uplink, vni) = (self.setup.uplink.index, self.setup.vni);
            let ways = &mut self.ways;
            ways.find(&self.table, &mut self.rtnl, uplink, vni).await;
        }
        let mut wanted = self.wanted();
        if self.switch.ebpf().is_none() {
            wanted.remotes.unsettle();
        }
        if self.switch.apply(&wanted, dirty.thorough).await {
            wanted.remotes.settle();
        }
        self.ways.put_back(wanted.remotes);
    }

    /// Notes what the leases tell; gives what that changes.
    fn take_over(&mut self, news: News) -> Changes {
        if let Some(conflicts) = news.conflicts {
            self.conflicts = conflicts;
        }
        self.in_sync = news.in_sync.unwrap_or(self.in_sync);
        let changes = self.table.update(news.update);
        self.ways.note(&changes);
        changes
    }

    /// Programs what changed and nothing else; false where a full pass has to.
    async fn follow_peers(&mut self, changes: &Changes) -> bool {
        match self.netlink.follow(changes).await {
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

    fn wanted(&mut self) -> Wanted {
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
            classes: self.setup.classes,
            has_exclusions: self.setup.exclusions.concern_packets(),
            drop_forged: self.setup.drop_forged && self.in_sync,
        };
        Wanted {
            node: node_config::compose(&facts, &KernelSettings::read()),
            uplink: self.setup.uplink.name.clone(),
            tunnel: self.device.name.clone(),
            remotes: self.ways.take_remotes(),
            pods: self.pods.all.clone(),
            kept: self.pods.kept.clone(),
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
}

/// Kernel events that are looked at together.
struct Burst {
    until: Instant,
    dirty: Dirty,
}

impl Burst {
    fn grown(before: Option<Self>, dirty: Dirty, until: Instant) -> Self {
        match before {
            Some(before) => Self {
                dirty: before.dirty.and(dirty),
                until: before.until.min(until),
            },
            None => Self { until, dirty },
        }
    }
}

/// How long others may follow an event before it is looked at.
const fn settle(event: &KernelEvent) -> Duration {
    match event {
        KernelEvent::Queueing { .. } => PROMPT,
        _ => BURST,
    }
}

/// Waits until then; for ever without a time.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The next event; never, once there are none any more.
async fn next(events: &mut Option<mpsc::Receiver<KernelEvent>>) -> Option<KernelEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}
