//! The composition root: the only file that knows every part.
//!
//! Order of a start (contract section 1, with the better readiness it names):
//! source, network config, uplink, tunnel device, lease, device address, firewall,
//! subnet file, first snapshot in the kernel, then ready.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use tracing::{error, info, warn};

use crate::{
    backend::{alloc, vxlan},
    control::{self, Answer, Call},
    datapath::{
        ebpf::EbpfOptions,
        kernel_events::{self, KernelEvent},
        netlink::{Device, DeviceSpec, NetlinkDatapath, Rtnl},
        switch::{Preference, Switch},
    },
    firewall::{
        self, Firewall, Policy, System,
        watch::{Resync, Watch},
    },
    lease::{Lease, SubnetKey, table::LeaseTable},
    network::{BackendConfig, FastPath, NetworkConfig},
    reconcile::{self, Inputs, NodeSetup, Peers, Reconciler},
    renewal,
    source::{LeaseEvent, LeaseSource, SourceError},
    subnet_file::{Previous, SubnetFile},
    uplink::{self, Uplink, UplinkChoice},
};

/// Bytes that VXLAN over IPv4 adds to a packet.
const VXLAN_OVERHEAD: u32 = 50;
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
    /// `--forged-vxlan drop`.
    pub drop_forged: bool,
    /// Where `flannelctl` finds this agent.
    pub control_socket: PathBuf,
    /// Where and how programs live; the VNI is filled in from the network config.
    pub ebpf: EbpfOptions,
}

/// Runs one agent until it is told to stop. The datapath stays as it is then.
///
/// # Errors
/// The start failed; what was done until then stays (device, lease), so that a
/// restart goes on from there.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    tokio::select! {
        result = serve(options) => result,
        _ = interrupt.recv() => { info!("interrupted; the datapath stays"); Ok(()) }
        _ = terminate.recv() => { info!("told to stop; the datapath stays"); Ok(()) }
    }
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let (sender, mut calls) = mpsc::channel(16);
    control::serve(&options.control_socket, sender)?;
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
        Started::Forwarding(node) => forward(&options, *node, calls).await,
        Started::LeaseOnly(lease) => lease_only(&options, lease, calls).await,
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
    LeaseOnly(Lease),
}

/// A node that has its device and its lease, but no peers yet.
struct Node {
    setup: NodeSetup,
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
    check_firewall(options, &network)?;
    phase.enter("choosing the uplink");
    let chosen = choose_uplink(&options.uplink).await?;
    let previous = previous(&options.subnet_file);
    let BackendConfig::Vxlan(backend) = &network.backend else {
        phase.enter("waiting for a lease");
        let attributes = alloc::attributes(chosen.public_ip);
        let lease = acquire(source, &network, &attributes, previous.subnet).await?;
        info!(subnet = %lease.key.v4, "lease acquired; backend alloc forwards nothing");
        phase.enter("installing firewall rules");
        set_up_firewall(options, &network, lease.key.v4, &previous).await?;
        write_subnet_file(options, &network, lease.key.v4, chosen.mtu);
        return Ok(Started::LeaseOnly(lease));
    };

    let mut spec = DeviceSpec {
        vni: backend.vni,
        port: backend.port,
        uplink_index: chosen.index,
        local: chosen.public_ip,
        mtu: device_mtu(backend.mtu, chosen.mtu)?,
        gbp: backend.gbp,
        learning: backend.learning,
        mac: None,
        address: None,
        network: network.network,
    };
    // Listening starts before the first look at the kernel, so nothing falls in between.
    let events =
        kernel_events::listen(reconcile::is_relevant).context("listen for kernel events")?;
    let rtnl = Rtnl::open().context("open a netlink socket")?;
    let mut netlink = NetlinkDatapath::open().context("open a netlink socket")?;
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
    set_up_firewall(options, &network, subnet, &previous).await?;
    write_subnet_file(options, &network, subnet, device.mtu);

    let setup = NodeSetup {
        uplink: chosen,
        subnet,
        network: network.network,
        vni: backend.vni,
        port: backend.port,
        fast_path: options
            .fast_path
            .or(backend.fast_path)
            .unwrap_or(FastPath::Off),
        drop_forged: options.drop_forged,
        source: source.describe(),
    };
    Ok(Started::Forwarding(Box::new(Node {
        setup,
        rtnl,
        netlink,
        device,
        events,
        lease,
    })))
}

/// Runs the loops of a node until one of them fails.
async fn forward(options: &Options, node: Node, calls: mpsc::Receiver<Call>) -> anyhow::Result<()> {
    let Node {
        setup,
        rtnl,
        netlink,
        device,
        events,
        lease,
    } = node;
    let source = Arc::clone(&options.source);
    let ebpf = EbpfOptions {
        vni: setup.vni,
        ..options.ebpf.clone()
    };
    let switch = Switch::new(
        ebpf,
        options.datapath,
        options.control_socket.with_extension("mode"),
    );
    if !switch.wants_ebpf() {
        switch.clear();
    }

    let (peers_sender, peers) = watch::channel(Peers::default());
    let (lease_sender, own_lease) = watch::channel(lease);
    let (ready, became_ready) = oneshot::channel();
    let inputs = Inputs {
        peers,
        events,
        calls,
        ready,
    };
    let reconciler = Reconciler::new(setup, rtnl, netlink, device, switch, own_lease.clone());
    let mut reconciler = tokio::spawn(reconciler.run(inputs));

    let (revoked_sender, revoked) = mpsc::channel(1);
    tokio::spawn(renewal::keep(
        Arc::clone(&source),
        lease_sender,
        revoked,
        options.renew_margin,
    ));
    let own_key = own_lease.borrow().key;
    let mut follow = tokio::spawn(follow(source, own_key, peers_sender, revoked_sender));
    tokio::spawn(async move {
        if became_ready.await.is_ok() {
            info!("ready: every known peer is in the kernel");
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

/// Backend `alloc`: a lease and a subnet file, no forwarding.
async fn lease_only(
    options: &Options,
    lease: Lease,
    mut calls: mpsc::Receiver<Call>,
) -> anyhow::Result<()> {
    tell_systemd();
    let (sender, _own) = watch::channel(lease);
    let (_revoked, revocations) = mpsc::channel(1);
    let renewal = renewal::keep(
        Arc::clone(&options.source),
        sender,
        revocations,
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

/// MTU of the tunnel device in bytes.
fn device_mtu(configured: Option<u32>, link: u32) -> anyhow::Result<u32> {
    let outer = configured.unwrap_or(link);
    if outer > link {
        bail!(
            "Backend.MTU {outer} is larger than the uplink's MTU {link}: lower it to {link} or less, or raise the uplink's"
        );
    }
    match outer.checked_sub(VXLAN_OVERHEAD) {
        // The smallest MTU of IPv4 (RFC 791).
        Some(mtu) if mtu >= 68 => Ok(mtu),
        _ => bail!("MTU {outer} leaves no room for VXLAN's {VXLAN_OVERHEAD} bytes and a packet"),
    }
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
    attributes: &crate::lease::LeaseAttributes,
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

fn packet_filter(network: &NetworkConfig) -> System {
    if network.enable_nftables {
        System::Nftables
    } else {
        System::Iptables
    }
}

fn policy(options: &Options, network: &NetworkConfig, subnet: Ipv4Net) -> Policy {
    Policy {
        network: network.network,
        subnet,
        masquerade: options.ip_masq,
        random_fully: options.random_fully,
        forward: options.forward_rules,
    }
}

/// What can be known before anything on this host is changed.
fn check_firewall(options: &Options, network: &NetworkConfig) -> anyhow::Result<()> {
    // No lease yet: whether there are rules at all does not depend on the subnet.
    let policy = policy(options, network, network.network);
    Ok(firewall::check_bridge_netfilter(
        packet_filter(network),
        &policy,
    )?)
}

/// Installs the rules, removes what another run left in the other packet filter, and keeps it so
/// from here on.
async fn set_up_firewall(
    options: &Options,
    network: &NetworkConfig,
    subnet: Ipv4Net,
    previous: &Previous,
) -> anyhow::Result<()> {
    let policy = policy(options, network, subnet);
    let mut firewall = Firewall::open(packet_filter(network), policy, previous.network).await?;
    let watch = Watch::new(
        &firewall,
        Resync {
            period: options.firewall_period,
            blackhole: options.blackhole_route.then_some(subnet),
        },
    );
    let changed = firewall.apply().await.context("install firewall rules")?;
    info!(?changed, "firewall rules are in order");
    if let Err(error) = firewall.clean_other().await {
        warn!(
            error = &error as &dyn std::error::Error,
            "rules of the packet filter not in use may be left"
        );
    }
    tokio::spawn(watch.keep(firewall));
    Ok(())
}

/// A file that cannot be written costs new pods, not the ones that run.
fn write_subnet_file(options: &Options, network: &NetworkConfig, subnet: Ipv4Net, mtu: u32) {
    let file = SubnetFile {
        network: network.network,
        subnet,
        mtu,
        ip_masq: options.ip_masq,
    };
    if let Err(cause) = file.write(&options.subnet_file) {
        error!(
            error = &cause as &dyn std::error::Error,
            "new pods cannot be set up"
        );
    }
}

/// Carries lease events into the wanted state, and tells the renewal when the own lease went.
async fn follow(
    source: Arc<dyn LeaseSource>,
    own_key: SubnetKey,
    peers: watch::Sender<Peers>,
    revoked: mpsc::Sender<()>,
) {
    let mut table = LeaseTable::new(&own_key);
    let mut ways = vxlan::Ways::default();
    loop {
        let mut events = match source.watch().await {
            Ok(events) => events,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "cannot watch leases; trying again"
                );
                peers.send_modify(|peers| peers.in_sync = false);
                tokio::time::sleep(CONFIG_RETRY).await;
                continue;
            }
        };
        while let Some(event) = events.recv().await {
            let had_own = table.own().is_some();
            let about = match &event {
                LeaseEvent::Snapshot(_) => None,
                LeaseEvent::Put(lease) => Some(lease.key),
                LeaseEvent::Removed(key) => Some(*key),
            };
            let changed = table.apply(event);
            if had_own && table.own().is_none() {
                let _ = revoked.try_send(());
            }
            if !changed && peers.borrow().in_sync {
                continue;
            }
            for lease in ways.follow(&table, about.as_ref()) {
                let (subnet, reason) = (lease.key, lease.reason.to_string());
                warn!(%subnet, reason, "lease left out");
            }
            peers.send_modify(|peers| {
                peers.table = ways.table();
                peers.in_sync = true;
            });
        }
        warn!("the watch on leases ended; starting it again");
        peers.send_modify(|peers| peers.in_sync = false);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tunnel_takes_fifty_bytes_of_the_link() {
        assert_eq!(device_mtu(None, 1500).expect("fits"), 1450);
        assert_eq!(device_mtu(Some(1400), 1500).expect("fits"), 1350);
    }

    #[test]
    fn an_mtu_that_cannot_be_is_refused_by_name() {
        let too_large = device_mtu(Some(9000), 1500)
            .expect_err("larger than the link")
            .to_string();
        assert!(
            too_large.contains("9000") && too_large.contains("1500"),
            "{too_large}"
        );
        assert!(device_mtu(Some(60), 1500).is_err());
    }
}
