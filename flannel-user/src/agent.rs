//! The composition root: the only module that knows every part.
//!
//! Order of a start (contract section 1, with the better readiness it names):
//! source, network config, uplink, tunnel device, lease, device address, firewall,
//! subnet file, first snapshot in the kernel, then ready.

mod firewall;
mod peers;
mod republish;
mod signals;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use self::{republish::Announced, signals::Signals};
use crate::{
    backend::{alloc, vxlan},
    control::{self, Answer, Call},
    datapath::{
        ebpf::EbpfOptions,
        exclusion::Exclusions,
        kernel_events::{self, KernelEvent},
        netlink::{Device, DeviceSpec, NetlinkDatapath, Rtnl},
        switch::{Preference, Switch},
        tunnel_mtu::TunnelMtu,
    },
    health::{self, Health},
    lease::{Lease, LeaseAttributes},
    network::{BackendConfig, FastPath, NetworkConfig},
    reconcile::{self, Inputs, NodeSetup, Reconciler, Told, feed::feed},
    renewal,
    source::{LeaseSource, SourceError},
    subnet_file::{Previous, SubnetFile},
    uplink::{
        self, Uplink, UplinkChoice,
        follow::{self, Followed},
    },
};

/// How long after a failed read of the network config the next one follows.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// How long after a failed attempt a lease is asked for again.
const ACQUIRE_RETRY: Duration = Duration::from_secs(1);

/// Everything an agent is told.
pub struct Options {
    /// Where leases come from.
    pub source: Arc<dyn LeaseSource>,
    /// How the uplink is chosen.
    pub uplink: UplinkChoice,
    /// Where the result is written for the CNI plugin.
    pub subnet_file: PathBuf,
    /// `--ip-masq`.
    pub ip_masq: bool,
    /// Not `--ip-masq-fully-random-disable`.
    pub random_fully: bool,
    /// `--iptables-forward-rules`.
    pub forward_rules: bool,
    /// `--iptables-resync`.
    pub firewall_period: Duration,
    /// `--ip-blackhole-route`.
    pub blackhole_route: bool,
    /// How long before its end the lease is renewed.
    pub renew_margin: Duration,
    /// `--datapath`.
    pub datapath: Preference,
    /// `--fast-path`; the network config decides when absent.
    pub fast_path: Option<FastPath>,
    /// `--fast-path-classes auto`.
    pub classes: bool,
    /// `--forged-vxlan drop`.
    pub drop_forged: bool,
    /// `--fast-path-exclude`.
    pub exclusions: Exclusions,
    /// Where `flannelctl` finds this agent.
    pub control_socket: PathBuf,
    /// `--healthz-ip` and `--healthz-port`, if there is to be an answer.
    pub healthz: Option<(String, u16)>,
    /// Where and how programs live; the VNI is filled in from the network config.
    pub ebpf: EbpfOptions,
}

/// Runs one agent until it is told to stop. The datapath stays as it is then.
///
/// # Errors
/// The start failed; what was done until then stays (device, lease), so that a
/// restart goes on from there.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        result = serve(options) => result,
        name = signals.first() => {
            info!(signal = name, "told to stop; the datapath stays");
            Ok(())
        }
    }
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let (sender, mut calls) = mpsc::channel(16);
    control::serve(&options.control_socket, sender)?;
    let health = Arc::new(Health::default());
    if let Some((ip, port)) = &options.healthz {
        health::serve(ip, *port, Arc::clone(&health)).await?;
    }
    let phase = Phase::default();
    let started = {
        let starting = start(&options, &phase);
        tokio::pin!(starting);
        loop {
            tokio::select! {
                started = &mut starting => break started?,
                Some((_, answer)) = calls.recv() => {
                    let _ = answer.send(Answer::Error(format!("the agent is starting: {}", phase.get())));
                }
            }
        }
    };
    match started {
        Started::Forwarding(node) => forward(&options, *node, calls, health).await,
        Started::LeaseOnly(node) => lease_only(&options, *node, calls, health).await,
    }
}

/// What a start is waiting for, as `flannelctl` is told.
#[derive(Default)]
struct Phase(Mutex<&'static str>);

impl Phase {
    fn enter(&self, phase: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    fn get(&self) -> &'static str {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a start came to.
enum Started {
    /// A node with a tunnel device.
    Forwarding(Box<Node>),
    /// Backend `alloc`.
    LeaseOnly(Box<LeaseOnly>),
}

/// A node that holds a lease and forwards nothing.
struct LeaseOnly {
    uplink: Uplink,
    lease: Lease,
    announced: Announced,
}

/// A node that has its device and its lease, but no peers yet.
struct Node {
    setup: NodeSetup,
    announced: Announced,
    rtnl: Rtnl,
    netlink: NetlinkDatapath,
    device: Device,
    events: mpsc::Receiver<KernelEvent>,
    lease: Lease,
}

async fn start(options: &Options, phase: &Phase) -> anyhow::Result<Started> {
    let source = options.source.as_ref();
    phase.enter("waiting for the network config");
    let network = network_config(source).await?;
    firewall::check(options, &network)?;
    phase.enter("choosing the uplink");
    let chosen = choose_uplink(&options.uplink).await?;
    let previous = previous(&options.subnet_file);
    let BackendConfig::Vxlan(backend) = &network.backend else {
        phase.enter("waiting for a lease");
        let attributes = alloc::attributes(chosen.public_ip);
        let lease = acquire(source, &network, &attributes, previous.subnet).await?;
        info!(subnet = %lease.key.v4, "lease acquired; backend alloc forwards nothing");
        phase.enter("installing firewall rules");
        firewall::set_up(options, &network, lease.key.v4, &previous).await?;
        let announced = announce(options, &network, lease.key.v4, chosen.mtu);
        return Ok(Started::LeaseOnly(Box::new(LeaseOnly {
            uplink: chosen,
            lease,
            announced,
        })));
    };

    let mtu = TunnelMtu {
        configured: backend.mtu,
    };
    let mut spec = DeviceSpec {
        vni: backend.vni,
        port: backend.port,
        uplink_index: chosen.index,
        local: chosen.public_ip,
        mtu: mtu.at_start(chosen.mtu)?,
        gbp: backend.gbp,
        learning: backend.learning,
        mac: None,
        address: None,
        network: network.network,
    };
    let rtnl = Rtnl::open().context("open a netlink socket")?;
    let mut netlink = NetlinkDatapath::open().context("open a netlink socket")?;
    // Listening starts before the first look at the kernel, so nothing falls in between.
    let own = netlink.port();
    let events = kernel_events::listen(Some(own), reconcile::is_relevant);
    let events = events.context("listen for kernel events")?;
    let device = netlink.ensure_device(&spec).await?;
    info!(device = device.name, mac = %device.mac, mtu = device.mtu, created = device.created, "tunnel device");

    phase.enter("waiting for a lease");
    let attributes = vxlan::attributes(chosen.public_ip, device.mac, backend.vni);
    let lease = acquire(source, &network, &attributes, previous.subnet).await?;
    let subnet = lease.key.v4;
    info!(%subnet, "lease acquired");

    spec.address = Some(subnet.network());
    let device = netlink.ensure_device(&spec).await?;
    phase.enter("installing firewall rules");
    firewall::set_up(options, &network, subnet, &previous).await?;
    let announced = announce(options, &network, subnet, device.mtu);

    let setup = NodeSetup {
        uplink: chosen,
        subnet,
        network: network.network,
        vni: backend.vni,
        port: backend.port,
        mtu,
        fast_path: options
            .fast_path
            .or(backend.fast_path)
            .unwrap_or(FastPath::Learned),
        classes: options.classes,
        drop_forged: options.drop_forged,
        exclusions: options.exclusions.clone(),
        source: source.describe(),
    };
    Ok(Started::Forwarding(Box::new(Node {
        setup,
        announced,
        rtnl,
        netlink,
        device,
        events,
        lease,
    })))
}

/// Runs the loops of a node until one of them fails.
async fn forward(
    options: &Options,
    node: Node,
    calls: mpsc::Receiver<Call>,
    health: Arc<Health>,
) -> anyhow::Result<()> {
    let Node {
        setup,
        announced,
        rtnl,
        netlink,
        device,
        events,
        lease,
    } = node;
    let source = Arc::clone(&options.source);
    let ebpf = EbpfOptions {
        vni: setup.vni,
        network: setup.network,
        conntrack_memory: options.control_socket.with_extension("conntrack"),
        ..options.ebpf.clone()
    };
    let mut switch = Switch::new(
        ebpf,
        options.datapath,
        options.control_socket.with_extension("mode"),
        setup.network,
    );
    if switch.wants_ebpf() {
        switch.prepare();
    } else {
        switch.clear();
    }

    let (feeder, peers) = feed();
    let (lease_sender, own_lease) = watch::channel(lease);
    let (ready, became_ready) = oneshot::channel();
    let told = Told {
        public_ip: setup.uplink.public_ip,
        vtep_mac: Some(device.mac),
        mtu: device.mtu,
    };
    let (told_sender, told) = watch::channel(told);
    let uplink = follow_uplink(options, &setup.uplink);
    let attributes = republish(
        told,
        own_lease.borrow().attributes.clone(),
        Some(setup.vni),
        announced,
        &health,
    );
    let inputs = Inputs {
        peers,
        uplink,
        events,
        calls,
        ready,
        health: Arc::clone(&health),
    };
    let reconciler = Reconciler::new(
        setup,
        rtnl,
        netlink,
        device,
        switch,
        own_lease.clone(),
        told_sender,
    );
    let mut reconciler = tokio::spawn(reconciler.run(inputs));

    let (revoked_sender, revoked) = mpsc::channel(1);
    tokio::spawn(renewal::keep(
        Arc::clone(&source),
        lease_sender,
        revoked,
        attributes,
        options.renew_margin,
    ));
    let own_key = own_lease.borrow().key;
    let mut follow = tokio::spawn(peers::follow(source, own_key, feeder, revoked_sender));
    tokio::spawn(async move {
        if became_ready.await.is_ok() {
            info!("ready: every known peer is in the kernel");
            health.peers_are_programmed();
            tell_systemd();
        }
    });

    tokio::select! {
        ended = &mut reconciler => ended.context("the reconcile loop failed")?,
        ended = &mut follow => ended.context("following the leases failed")?,
    }
    bail!("a part of the agent ended by itself")
}

fn tell_systemd() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(%error, "cannot tell systemd");
    }
}

/// Starts following the uplink.
fn follow_uplink(options: &Options, uplink: &Uplink) -> watch::Receiver<Followed> {
    let (sender, receiver) = watch::channel(Followed::from(uplink.clone()));
    let choice = options.uplink.clone();
    tokio::spawn(async move {
        if let Err(error) = follow::keep(choice, sender).await {
            error!(%error, "changes of the uplink are not followed: restart the agent after one");
        }
    });
    receiver
}

/// Starts telling peers and pods what changes; gives what the lease has to say.
fn republish(
    told: watch::Receiver<Told>,
    published: LeaseAttributes,
    vni: Option<u32>,
    announced: Announced,
    health: &Arc<Health>,
) -> watch::Receiver<LeaseAttributes> {
    let (sender, attributes) = watch::channel(published);
    tokio::spawn(republish::keep(
        told,
        sender,
        vni,
        announced,
        Arc::clone(health),
    ));
    attributes
}

/// Backend `alloc`: a lease and a subnet file, no forwarding.
async fn lease_only(
    options: &Options,
    node: LeaseOnly,
    mut calls: mpsc::Receiver<Call>,
    health: Arc<Health>,
) -> anyhow::Result<()> {
    health.peers_are_programmed();
    tell_systemd();
    let told = Told {
        public_ip: node.uplink.public_ip,
        vtep_mac: None,
        mtu: node.uplink.mtu,
    };
    let (told_sender, told) = watch::channel(told);
    let uplink = follow_uplink(options, &node.uplink);
    tokio::spawn(republish::tell_of_uplink(uplink, told_sender));
    let attributes = republish(
        told,
        node.lease.attributes.clone(),
        None,
        node.announced,
        &health,
    );
    let (sender, _own) = watch::channel(node.lease);
    let (_revoked, revocations) = mpsc::channel(1);
    let renewal = renewal::keep(
        Arc::clone(&options.source),
        sender,
        revocations,
        attributes,
        options.renew_margin,
    );
    let refusal = async {
        while let Some((_, answer)) = calls.recv().await {
            let _ = answer.send(Answer::Error(
                "backend alloc forwards nothing: there is no datapath".to_owned(),
            ));
        }
    };
    tokio::join!(renewal, refusal);
    bail!("a part of the agent ended by itself")
}

async fn choose_uplink(choice: &UplinkChoice) -> anyhow::Result<Uplink> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
    tokio::spawn(connection);
    Ok(uplink::choose(&handle, choice).await?)
}

/// Reads the config until it can be had: it may not have been written yet.
async fn network_config(source: &dyn LeaseSource) -> anyhow::Result<NetworkConfig> {
    let mut last_said = String::new();
    loop {
        match source.network_config().await {
            Ok(config) => return Ok(config),
            Err(SourceError::Fatal(cause)) => return Err(cause),
            Err(SourceError::Retry(cause)) => {
                let text = format!("{cause:#}");
                if text != last_said {
                    error!(
                        error = text,
                        source = source.describe(),
                        "no network config; trying again each second"
                    );
                    last_said = text;
                }
                tokio::time::sleep(CONFIG_RETRY).await;
            }
        }
    }
}

async fn acquire(
    source: &dyn LeaseSource,
    network: &NetworkConfig,
    attributes: &LeaseAttributes,
    previous: Option<Ipv4Net>,
) -> anyhow::Result<Lease> {
    loop {
        match source.acquire(network, attributes, previous).await {
            Ok(lease) => return Ok(lease),
            Err(SourceError::Fatal(cause)) => return Err(cause.context("no lease")),
            Err(SourceError::Retry(cause)) => {
                warn!(error = format!("{cause:#}"), "no lease yet; trying again");
                tokio::time::sleep(ACQUIRE_RETRY).await;
            }
        }
    }
}

/// What an earlier agent wrote, as far as it can be read.
fn previous(path: &Path) -> Previous {
    Previous::read(path).unwrap_or_else(|cause| {
        warn!(
            error = &cause as &dyn std::error::Error,
            "the previous subnet is not known"
        );
        Previous::default()
    })
}

fn announce(options: &Options, network: &NetworkConfig, subnet: Ipv4Net, mtu: u32) -> Announced {
    let file = SubnetFile {
        network: network.network,
        subnet,
        mtu,
        ip_masq: options.ip_masq,
    };
    Announced::begin(options.subnet_file.clone(), file)
}
