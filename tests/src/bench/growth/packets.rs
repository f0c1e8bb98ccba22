//! Does a packet cost more in a larger cluster, or among more flows?

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Curve, Points,
    leases::{self, CONFIG, NETWORK, UNDERLAY},
};
use crate::{
    agent::Agent,
    bench::{
        measure::{PROBES, Target},
        probe::{self, Pace},
        program, proof,
        side::Side,
        stage::{Passed, Port, Stage},
    },
    ends::Ends,
    node::{Node, TUNNEL},
    traffic::{flows::FlowsReport, request_response::ServeReport},
};

/// Rounds at each point.
const ROUNDS: usize = 5;
/// As many flows as take longer to begin than conntrack keeps the first of them.
const VERY_MANY: u32 = 500_000;
/// Rounds among so many: each has to begin all of them first, which takes most of a minute.
const FEW_ROUNDS: usize = 2;
/// Seconds that conntrack keeps a UDP flow then.
const KEPT: &str = "600";
/// Packets to destinations all over the cluster.
const SCATTERED: u32 = 5000;
/// Longer than programming may take; Linux makes routes of all namespaces one after the other.
const LIMIT: Duration = Duration::from_secs(120);
/// Ports of the server in the test with many flows: as many sockets as one `epoll` likes.
const SERVER_PORTS: u32 = 16;
/// The same with [`VERY_MANY`] flows, so that the client needs no more sockets than it may have.
const MORE_SERVER_PORTS: u32 = 64;
/// Flows of earlier rounds stay for minutes, in conntrack and in our tables: with more than so many
/// a new stage is set.
const MOST_HELD: u32 = 196_608;

/// Each flow's turns before the measurement, so that what is learned from a flow's first packets
/// is learned: some share a place while they wait for it. With very many flows they would take
/// too long, and the tables do not hold them all either.
fn turns(flows: u32) -> u32 {
    (120_000 / flows).clamp(1, 8)
}

const fn rounds(flows: u32) -> usize {
    if flows < VERY_MANY {
        ROUNDS
    } else {
        FEW_ROUNDS
    }
}

const fn server_ports(flows: u32) -> u32 {
    if flows < VERY_MANY {
        SERVER_PORTS
    } else {
        MORE_SERVER_PORTS
    }
}

/// Transactions per second and nanoseconds of a lookup, at each of `sizes` subnets.
///
/// Sizes that the agents do not reach in two minutes are left out.
///
/// # Errors
/// When an agent fails, or packets take another path.
pub(super) fn subnets(sides: &[&Side], sizes: &[u32], pace: Pace) -> Result<Vec<Curve>> {
    let mut stages = sides
        .iter()
        .map(|side| {
            let stage = Stage::with_config(side, CONFIG, NETWORK)?;
            let (a, b) = stage.nodes().context("a side between nodes")?;
            for (one, other) in [(a, b), (b, a)] {
                let via = other.public_ip();
                one.namespace()
                    .ip(&format!("route add {UNDERLAY} via {via}"))?;
            }
            Ok(stage)
        })
        .collect::<Result<Vec<_>>>()?;
    let curves = subnets_on(&mut stages, sizes, pace)?;
    for stage in &mut stages {
        clear_away(stage)?;
    }
    Ok(curves)
}

/// Takes the routes before the namespaces go. Left to itself the kernel looks through all of them for
/// each next hop (`remove_nexthop`): minutes in which nobody can make or end a namespace.
fn clear_away(stage: &mut Stage) -> Result<()> {
    let (agents, _) = stage.agents().context("a side with agents")?;
    // They would put the routes back.
    signal_all(agents, Signal::SIGKILL)?;
    for agent in agents {
        let namespace = agent.node().namespace();
        let routes = namespace.ip(&format!("-4 route show dev {TUNNEL}"))?;
        let subnets = routes
            .lines()
            .filter_map(|route| route.split_whitespace().next());
        let lines: String = subnets
            .map(|subnet| format!("route del {subnet}\n"))
            .collect();
        namespace.ip_batch(&lines)?;
    }
    Ok(())
}

fn subnets_on(stages: &mut [Stage], sizes: &[u32], pace: Pace) -> Result<Vec<Curve>> {
    let mut points = Points::over("remote subnets");
    let mut written = 0;
    for size in sizes {
        for stage in &mut *stages {
            let (agents, directory) = stage.agents().context("a side with agents")?;
            // One at a time is not how a cluster of this size comes to a node.
            signal_all(agents, Signal::SIGSTOP)?;
            for number in written..*size {
                leases::write(&directory, number)?;
            }
            signal_all(agents, Signal::SIGCONT)?;
            let begin = Instant::now();
            for agent in agents {
                if !has_peers(agent.node(), *size as usize + 1, begin)? {
                    println!(
                        "{size} subnets are left out: {} does not have them after {} s",
                        agent.node().name(),
                        LIMIT.as_secs()
                    );
                    return Ok(points.curves());
                }
            }
        }
        written = *size;
        let mut rates = vec![Vec::new(); stages.len()];
        for _ in 0..ROUNDS {
            for (stage, rates) in stages.iter().zip(&mut rates) {
                rates.push(probe::run(stage, &PROBES[0], Target::Pod, pace)?.figures[0]);
            }
        }
        for (stage, rates) in stages.iter().zip(&rates) {
            let side = &stage.side;
            points.add("tcp_rr", &side.name, "1/s", *size, rates)?;
            // Nobody else forwards a connection's first packet at once.
            if side.to_pod == proof::Way::Programs {
                let (client, _) = stage.pods().context("a side between pods")?;
                let destinations = leases::scattered(*size, SCATTERED);
                let packets = program::openings_to(client, &destinations)?;
                let cost = program::random_destinations(client, &packets)?;
                points.add_summary("from_pod to random subnets", &side.name, "ns", *size, cost);
            }
        }
    }
    Ok(points.curves())
}

fn signal_all(agents: &[Agent], signal: Signal) -> Result<()> {
    for agent in agents {
        kill(Pid::from_raw(i32::try_from(agent.pid())?), signal)?;
    }
    Ok(())
}

/// Waits until an agent has programmed `count` peers; `false` when that takes too long.
fn has_peers(node: &Node, count: usize, begin: Instant) -> Result<bool> {
    loop {
        let status = node.status()?;
        if status.peers.len() == count && status.kernel.last_error.is_none() {
            return Ok(true);
        }
        if begin.elapsed() > LIMIT {
            return Ok(false);
        }
        // With many peers the answer is long: asking costs the agent.
        thread::sleep(Duration::from_secs(1));
    }
}

/// Transactions per second among each of `sizes` flows, one after the other in no order. Conntrack
/// has room for `room` at a time.
///
/// # Errors
/// When a datagram is lost, or packets take another path.
pub(super) fn flows(sides: &[&Side], sizes: &[u32], room: u32, pace: Pace) -> Result<Vec<Curve>> {
    let mut points = Points::over("flows");
    let mut stages = sides
        .iter()
        .map(|side| Ok((Stage::set(side)?, 0)))
        .collect::<Result<Vec<_>>>()?;
    for size in sizes {
        let mut rates = vec![Vec::new(); stages.len()];
        for _ in 0..rounds(*size) {
            for ((stage, held), rates) in stages.iter_mut().zip(&mut rates) {
                // A full table loses packets.
                if *held > 0 && *held + size > room.min(MOST_HELD) {
                    (*stage, *held) = (Stage::set(&stage.side)?, 0);
                }
                if *size >= VERY_MANY {
                    keep_flows(stage)?;
                }
                *held += size;
                rates.push(among(stage, *size, pace)?);
            }
        }
        for ((stage, _), rates) in stages.iter().zip(&rates) {
            points.add("udp_rr", &stage.side.name, "1/s", *size, rates)?;
        }
    }
    Ok(points.curves())
}

/// Lets conntrack keep UDP flows for longer than beginning them all takes.
fn keep_flows(stage: &Stage) -> Result<()> {
    let (a, b) = stage.nodes().context("a side with nodes")?;
    for node in [a, b] {
        for key in [
            "nf_conntrack_udp_timeout",
            "nf_conntrack_udp_timeout_stream",
        ] {
            let key = format!("net.netfilter.{key}");
            node.namespace().sysctl(&key, KEPT)?;
        }
    }
    Ok(())
}

fn among(stage: &Stage, flows: u32, pace: Pace) -> Result<f64> {
    let to = stage.way_to(Port::Flows, Target::Pod);
    let (cpu, seconds) = (pace.cpu, pace.seconds);
    let (turns, ports) = (turns(flows), server_ports(flows));
    let way = stage.side.way(Target::Pod).context("a side between pods")?;
    stage.warm_up()?;
    let watch = stage.watch()?;
    let (report, served): (FlowsReport, ServeReport) = Ends::start(
        stage.client(),
        (stage.server(), to),
        &format!("flows-serve --ports {ports} --cpu {cpu}"),
        &format!(
            "flows --ports {ports} --flows {flows} --turns {turns} --seconds {seconds} --cpu {cpu}"
        ),
    )?
    .result()?;
    served.check(report.all)?;
    let passed = Passed {
        there: report.all,
        back: report.all,
    };
    // With more of them than the tables hold, some take the kernel again and again.
    watch.expect(way, proof::Flows::First, passed)?;
    Ok(report.per_second)
}
