//! The first benchmark: what a request and its response cost on each path.
//!
//! Client and server share one CPU, so a transaction's time is the time of all
//! code it passes, and nothing of the scheduler's luck. The sides run in turn,
//! round by round, so that a machine whose speed drifts drifts for all of them;
//! what is compared is ratios. Before a figure counts, the counters of both
//! nodes have to say that the packets took the side's path.

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode;

use crate::{
    agent::AgentOptions,
    cluster::{Cluster, path_of},
    exchange,
    lab::Lab,
    paths::Packets,
    traffic::request_response::Protocol,
};

/// Arguments of `lab bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Rounds; each runs every side once.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds that each side is measured per round.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// The CPU that client and server share.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// Fail unless TCP request/response reaches this multiple of the kernel path.
    #[arg(long)]
    at_least: Option<f64>,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Between the nodes' own addresses: no tunnel, no bridge.
    Host,
    /// Pod to pod through `flannel.1`: what flannel does.
    Netlink,
    /// Pod to pod through the programs, from the first packet on.
    Direct,
}

const SIDES: [Side; 3] = [Side::Host, Side::Netlink, Side::Direct];

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Netlink => "netlink",
            Self::Direct => "direct",
        }
    }

    const fn mode(self) -> Option<Mode> {
        match self {
            Self::Host => None,
            Self::Netlink => Some(Mode::Netlink),
            Self::Direct => Some(Mode::Ebpf),
        }
    }
}

/// Every round's figure of one side, in transactions per second.
#[derive(Debug, Clone, Default)]
struct Series(Vec<f64>);

impl Series {
    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    fn median(&self) -> f64 {
        median(&self.sorted())
    }
}

fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
    }
}

/// Ratios round by round: lowest, median, highest.
fn ratios(side: &Series, base: &Series) -> (f64, f64, f64) {
    let mut all: Vec<f64> = side
        .0
        .iter()
        .zip(&base.0)
        .map(|(one, other)| one / other)
        .collect();
    all.sort_by(f64::total_cmp);
    (
        all.first().copied().unwrap_or(f64::NAN),
        median(&all),
        all.last().copied().unwrap_or(f64::NAN),
    )
}

/// Runs the benchmark and prints its table.
///
/// # Errors
/// When packets took another path than the side's, or `--at-least` is not reached.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds 0 measures nothing");
    let lab = Lab::with_nodes(2)?;
    let cluster = Cluster::start_with(&lab, &[AgentOptions::in_mode(Mode::Ebpf)])?;
    println!(
        "same-CPU request/response, 64 bytes, CPU {}, {} rounds of {} s a side, no netfilter rules\n",
        args.cpu, args.rounds, args.seconds
    );
    println!("measure  side      median/s       min       max   to netlink (min … max)   to host");
    let mut tcp_ratio = f64::NAN;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut series: [Series; 3] = Default::default();
        for _ in 0..args.rounds {
            for (side, series) in SIDES.into_iter().zip(&mut series) {
                let rate = measure(&cluster, side, protocol, args)
                    .with_context(|| format!("{protocol:?} on side {}", side.name()))?;
                series.0.push(rate);
            }
        }
        let [host, netlink, direct] = &series;
        for (side, one) in SIDES.iter().zip(&series) {
            let sorted = one.sorted();
            let (low, mid, high) = ratios(one, netlink);
            println!(
                "{:<8} {:<8} {:>10.0} {:>9.0} {:>9.0}   {mid:>5.2} ({low:.2} … {high:.2})        {:>5.2}",
                format!("{}_rr", protocol.name()),
                side.name(),
                one.median(),
                sorted[0],
                sorted[sorted.len() - 1],
                ratios(one, host).1
            );
        }
        if protocol == Protocol::Tcp {
            tcp_ratio = ratios(direct, netlink).1;
        }
    }
    println!("\nEvery figure's path was proven by the counters of both nodes.");
    if let Some(floor) = args.at_least {
        ensure!(
            tcp_ratio >= floor,
            "tcp_rr direct is {tcp_ratio:.2} x netlink, not {floor} x"
        );
    }
    Ok(())
}

/// One side for one round, in transactions per second.
fn measure(cluster: &Cluster, side: Side, protocol: Protocol, args: &BenchArgs) -> Result<f64> {
    let (a, b) = cluster.nodes();
    if let Some(mode) = side.mode() {
        a.mode(mode)?;
        b.mode(mode)?;
        cluster.warm_up()?;
    }
    let watch = cluster.watch()?;
    let (protocol, seconds, cpu) = (protocol.name(), args.seconds, args.cpu);
    let report = match side {
        Side::Host => {
            let to = (b.namespace(), b.public_ip());
            exchange::request_response(a.namespace(), to, protocol, seconds, cpu)?
        }
        Side::Netlink | Side::Direct => {
            let (client, server) = (&cluster.client, &cluster.server);
            let to = (server.namespace(), server.address());
            exchange::request_response(client.namespace(), to, protocol, seconds, cpu)?
        }
    };
    match side.mode() {
        Some(mode) => {
            // TCP's handshake, acknowledgements and close come on top of a packet per message.
            let packets = || Packets::AtLeast(report.all_transactions);
            let path = path_of(mode);
            watch.expect_exchange((a, path), (b, path), packets(), packets())?;
        }
        None => {
            for node in [a, b] {
                let taken = watch.taken(node)?;
                let tunnelled = taken.encapsulated + taken.decapsulated + taken.tunnel.sent;
                ensure!(
                    tunnelled < 50,
                    "{}: traffic of the host went into the tunnel: {taken}",
                    node.name()
                );
            }
        }
    }
    Ok(report.per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let fast = Series(vec![200.0, 100.0, 300.0]);
        let slow = Series(vec![100.0, 50.0, 100.0]);
        assert_eq!(ratios(&fast, &slow), (2.0, 2.0, 3.0));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert!((median(&[1.0, 2.0, 4.0, 9.0]) - 3.0).abs() < f64::EPSILON);
    }
}
