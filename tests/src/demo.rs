//! The demo: a cluster on this machine, told as a short story whose every
//! claim is measured. A claim that does not hold ends it with an error.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};

use crate::{
    agent::{Agent, AgentOptions},
    binaries,
    cluster::{Cluster, introduce, path_of},
    exchange::{self, RR_PORT},
    lab::Lab,
    load::{Load, RATE},
    node::Node,
    paths::{Path, PathWatch},
    pod::Pod,
    scratch,
    traffic::request_response::Protocol,
};

/// Arguments of `lab demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Nodes in the cluster.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=8))]
    nodes: u8,
    /// Leave everything up at the end and say how to enter, until Ctrl-C.
    #[arg(long)]
    hold: bool,
}

/// Datagrams sent there and back where packets are counted.
const COUNTED: u64 = 2000;
/// Rounds of each measurement; the modes take turns.
const ROUNDS: usize = 3;
/// The CPU that client and server share when latency is measured.
const CPU: usize = 0;
/// Live switches under load.
const SWITCHES: u32 = 20;
/// Time from one to the next.
const PERIOD: Duration = Duration::from_millis(200);
/// How long the agent stays dead.
const OUTAGE: Duration = Duration::from_secs(1);

/// Tells the story.
///
/// # Errors
/// When something does not work, or a claim does not hold.
pub fn run(args: &DemoArgs) -> Result<()> {
    println!(
        "flannel-ebpf, a demo: {} nodes on this machine, each a network namespace with its own agent.\n\
         Your own network is not touched; everything disappears at the end.\n",
        args.nodes
    );
    let lab = Lab::with_nodes(args.nodes)?;
    let mut cluster = Cluster::start_with(&lab, &[options()])?;
    let others = lab.nodes()[2..]
        .iter()
        .map(|node| {
            let pod = node.add_pod()?;
            introduce(&pod)?;
            Ok(pod)
        })
        .collect::<Result<Vec<Pod>>>()?;

    heading(1, "A cluster");
    introduce_nodes(&lab)?;
    everybody_reaches_everybody(&cluster, &others)?;
    heading(2, "Which path do packets take? Two counters tell");
    paths_in_both_modes(&cluster)?;
    heading(3, "What it is worth");
    compare(&cluster)?;
    heading(4, "Switching while traffic runs");
    switch_under_load(&cluster)?;
    heading(5, "The agent dies");
    kill_and_restart(&mut cluster)?;

    println!("\nEvery figure above was measured just now, every claim was checked.");
    if args.hold {
        hold(&lab, &cluster, &others)?;
    }
    Ok(())
}

/// As a user starts it; whether this kernel can is part of the story.
fn options() -> AgentOptions {
    AgentOptions {
        datapath: "auto",
        ..AgentOptions::default()
    }
}

fn heading(number: u8, text: &str) {
    println!("\n{number}. {text}");
}

fn word(mode: Mode) -> &'static str {
    match mode {
        Ebpf => "ebpf",
        Netlink => "netlink",
    }
}

fn introduce_nodes(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        let status = node.status()?;
        println!(
            "   {}  address {:<11} pods {:<16} {} peers, mode {} ({})",
            node.name(),
            node.public_ip(),
            status.node.subnet,
            status.peers.len(),
            word(status.mode),
            status.mode_reason
        );
        ensure!(
            status.mode == Ebpf,
            "this kernel does not run the programs, so there is nothing to compare"
        );
    }
    Ok(())
}

fn everybody_reaches_everybody(cluster: &Cluster, others: &[Pod]) -> Result<()> {
    let pods: Vec<&Pod> = [&cluster.client, &cluster.server]
        .into_iter()
        .chain(others)
        .collect();
    let mut conversations = 0;
    for from in &pods {
        for to in pods.iter().filter(|to| to.address() != from.address()) {
            from.ping(&to.address().to_string(), 1)?;
            exchange::udp_round_trips(from, to, 20)?;
            conversations += 1;
        }
    }
    println!(
        "   every pod reaches every other one: {conversations} pairs, ping and UDP, nothing lost"
    );
    Ok(())
}

fn set_modes(cluster: &Cluster, mode: Mode) -> Result<()> {
    let (a, b) = cluster.nodes();
    a.mode(mode)?;
    b.mode(mode)
}

fn paths_in_both_modes(cluster: &Cluster) -> Result<()> {
    let (a, b) = cluster.nodes();
    println!(
        "   {COUNTED} datagrams from pod {} to pod {} and back:",
        cluster.client.address(),
        cluster.server.address()
    );
    println!("   mode      node      programs out      in    flannel.1 out      in");
    for mode in [Ebpf, Netlink] {
        set_modes(cluster, mode)?;
        cluster.warm_up()?;
        let watch = PathWatch::start(&[a, b])?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, COUNTED)?;
        for node in [a, b] {
            let taken = watch.taken(node)?;
            println!(
                "   {:<9} {:<9} {:>12} {:>7}    {:>13} {:>7}",
                word(mode),
                node.name(),
                taken.encapsulated,
                taken.decapsulated,
                taken.tunnel.sent,
                taken.tunnel.received
            );
        }
        watch.expect_exchange((a, path_of(mode)), (b, path_of(mode)), COUNTED, COUNTED)?;
    }
    println!(
        "   In ebpf mode flannel.1 stays flat and the programs count every packet; in netlink mode the reverse."
    );
    Ok(())
}

/// One mode's figures, one entry per round.
#[derive(Debug, Default)]
struct Figures {
    per_second: Vec<f64>,
    latency_us: Vec<f64>,
    gbit: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The median of the ratios round by round: what disturbs a round disturbs both sides of it.
fn ratio(side: &[f64], base: &[f64]) -> f64 {
    let rounds: Vec<f64> = side
        .iter()
        .zip(base)
        .map(|(one, other)| one / other)
        .collect();
    median(&rounds)
}

fn compare(cluster: &Cluster) -> Result<()> {
    let (client, server) = (&cluster.client, &cluster.server);
    let (mut netlink, mut ebpf) = (Figures::default(), Figures::default());
    for _ in 0..ROUNDS {
        for (mode, figures) in [(Netlink, &mut netlink), (Ebpf, &mut ebpf)] {
            set_modes(cluster, mode)?;
            cluster.warm_up()?;
            let rr = exchange::request_response(
                client.namespace(),
                (server.namespace(), server.at(RR_PORT)),
                Protocol::Tcp,
                0.7,
                CPU,
            )?;
            figures.per_second.push(rr.per_second);
            figures.latency_us.push(rr.latency.p50_us);
            let stream = exchange::stream(client, server, "up", 400_000_000)?;
            let received = stream.server.received.context("the server received")?;
            figures.gbit.push(received.gbit_per_second());
        }
    }
    println!(
        "   medians of {ROUNDS} rounds, the modes in turn, ratios round by round; latency with both ends on one CPU"
    );
    println!("   mode      TCP request and response                 one TCP stream, data checked");
    for (name, figures) in [("netlink", &netlink), ("ebpf", &ebpf)] {
        println!(
            "   {name:<9} {:>6.1} µs, {:>7.0} a second               {:>6.2} Gbit/s",
            median(&figures.latency_us),
            median(&figures.per_second),
            median(&figures.gbit)
        );
    }
    let requests = ratio(&ebpf.per_second, &netlink.per_second);
    println!(
        "   ratio     {requests:>6.2} ×                                {:>6.2} ×",
        ratio(&ebpf.gbit, &netlink.gbit)
    );
    ensure!(
        requests > 1.0,
        "requests and responses are not faster in ebpf mode: {requests:.2} ×"
    );
    Ok(())
}

fn switch_under_load(cluster: &Cluster) -> Result<()> {
    let (a, b) = cluster.nodes();
    println!(
        "   {RATE} packets a second each way and a TCP stream; both nodes switch every {} ms …",
        PERIOD.as_millis()
    );
    let load = Load::start_at_full_speed(&cluster.client, &cluster.server)?;
    let start = Instant::now();
    for number in 1..=SWITCHES {
        let mode = if number % 2 == 1 { Netlink } else { Ebpf };
        a.request_mode(mode)?;
        b.request_mode(mode)?;
        thread::sleep((PERIOD * number).saturating_sub(start.elapsed()));
    }
    let report = load.finish()?;
    println!("   {SWITCHES} switches: {}", report.summary());
    report.check_nothing_lost()
}

fn kill_and_restart(cluster: &mut Cluster) -> Result<()> {
    let a: Node = cluster.nodes().0.clone();
    set_modes(cluster, Ebpf)?;
    println!(
        "   kill -9 of flanneld on {}, the same load; {} s later it is started again …",
        a.name(),
        OUTAGE.as_secs()
    );
    let load = Load::start_at_full_speed(&cluster.client, &cluster.server)?;
    let before = a.status()?;
    cluster.agents.remove(0).kill9()?;
    load.run_for(OUTAGE);
    let agent = Agent::start(&a, &options())?;
    cluster.agents.insert(0, agent);
    let report = load.finish()?;
    println!("   {}", report.summary());
    let grown = a
        .status()?
        .packets("encapsulated")
        .saturating_sub(before.packets("encapsulated"));
    println!(
        "   the programs went on alone and were taken over: {grown} more packets on the same counter"
    );
    report.check_nothing_lost()?;
    ensure!(
        grown > u64::from(RATE) * OUTAGE.as_secs(),
        "the programs stood still"
    );
    let watch = cluster.watch()?;
    exchange::udp_round_trips(&cluster.client, &cluster.server, COUNTED)?;
    let (a, b) = cluster.nodes();
    watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), COUNTED, COUNTED)
}

fn hold(lab: &Lab, cluster: &Cluster, others: &[Pod]) -> Result<()> {
    println!("\nAll of it stays up. To look around, in another terminal:");
    for node in lab.nodes() {
        println!("   {:<8} {}", node.name(), node.namespace().nsenter_line());
    }
    for pod in [&cluster.client, &cluster.server].into_iter().chain(others) {
        println!(
            "   pod {:<15} {}",
            pod.address(),
            pod.namespace().nsenter_line()
        );
    }
    println!(
        "On a node: {0} status, {0} mode netlink, ip route, bridge fdb show dev flannel.1.\n\
         From a pod: ping another one's address. Ctrl-C takes everything down.",
        binaries::flannelctl()?.display()
    );
    scratch::wait_for_ctrl_c()?;
    println!("\ngone");
    Ok(())
}
