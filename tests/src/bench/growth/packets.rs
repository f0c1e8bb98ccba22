//! Does a packet cost more in a larger cluster, or among more flows?

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    Curve, Points,
    leases::{self, CONFIG, NETWORK, UNDERLAY},
};
use crate::{
    bench::{
        measure::{PROBES, Target},
        probe::{self, Pace},
        program, proof,
        side::Side,
        stage::{Passed, Port, Stage},
    },
    task::Task,
    traffic::flows::{FlowsReport, ServeReport},
};

/// Rounds at each point.
const ROUNDS: usize = 5;
/// Packets to destinations all over the cluster.
const SCATTERED: u32 = 5000;
/// More than programming may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Ports of the server in the test with many flows: as many sockets as one `epoll` likes.
const SERVER_PORTS: u32 = 16;

/// Transactions per second and nanoseconds of a lookup, at each of `sizes` subnets.
///
/// # Errors
/// When the agents do not get there, or packets take another path.
pub(super) fn subnets(sides: &[&Side], sizes: &[u32], pace: Pace) -> Result<Vec<Curve>> {
    let mut points = Points::over("remote subnets");
    for side in sides {
        let mut stage = Stage::with_config(side, CONFIG, NETWORK)?;
        let (a, b) = stage.nodes().context("a side between nodes")?;
        let via = b.public_ip();
        a.namespace()
            .ip(&format!("route add {UNDERLAY} via {via}"))?;
        let via = a.public_ip();
        b.namespace()
            .ip(&format!("route add {UNDERLAY} via {via}"))?;
        let mut written = 0;
        for size in sizes {
            let (agents, directory) = stage.agents().context("a side with agents")?;
            while written < *size {
                leases::write(&directory, written)?;
                written += 1;
            }
            for agent in agents {
                wait_for_peers(agent.node(), *size as usize + 1)?;
            }
            let mut rates = Vec::new();
            for _ in 0..ROUNDS {
                rates.push(probe::run(&stage, &PROBES[0], Target::Pod, pace)?.figures[0]);
            }
            points.add("tcp_rr", &side.name, "1/s", *size, &rates)?;
            if side.has_programs() {
                let (client, server) = stage.pods().context("a side between pods")?;
                let destinations = leases::scattered(*size, SCATTERED);
                let packets = program::datagrams_to(client, server, &destinations)?;
                let cost = program::random_destinations(client, &packets)?;
                points.add_summary("from_pod to random subnets", &side.name, "ns", *size, cost);
            }
        }
    }
    Ok(points.curves())
}

fn wait_for_peers(node: &crate::node::Node, count: usize) -> Result<()> {
    let begin = Instant::now();
    loop {
        let status = node.status()?;
        if status.peers.len() == count && status.kernel.last_error.is_none() {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < LIMIT,
            "{}: {} peers instead of {count}, {:?}",
            node.name(),
            status.peers.len(),
            status.kernel.last_error
        );
        // With many peers the answer is long: asking costs the agent.
        thread::sleep(Duration::from_millis(500));
    }
}

/// Transactions per second among each of `sizes` flows, one after the other in no order.
///
/// # Errors
/// When a datagram is lost, or packets take another path.
pub(super) fn flows(sides: &[&Side], sizes: &[u32], pace: Pace) -> Result<Vec<Curve>> {
    let mut points = Points::over("flows");
    for side in sides {
        let stage = Stage::set(side)?;
        let (to, port) = stage.way_to(Port::Flows, Target::Pod);
        let (cpu, seconds) = (pace.cpu, pace.seconds);
        for size in sizes {
            let mut rates = Vec::new();
            for _ in 0..ROUNDS {
                let way = side.way(Target::Pod).context("a side between pods")?;
                stage.warm_up()?;
                let watch = stage.watch()?;
                let server = Task::start(
                    stage.server(),
                    &format!("flows-serve --port {port} --ports {SERVER_PORTS} --cpu {cpu}"),
                )?;
                let report: FlowsReport = Task::start(
                    stage.client(),
                    &format!(
                        "flows --to {to} --ports {SERVER_PORTS} --flows {size} --seconds {seconds} --cpu {cpu}"
                    ),
                )?
                .result()?;
                let served: ServeReport = server.finish()?;
                ensure!(
                    served.answered == report.all,
                    "{} requests were answered of {}",
                    served.answered,
                    report.all
                );
                let passed = Passed {
                    there: report.all,
                    back: report.all,
                };
                watch.expect(way, proof::Flows::Short, passed)?;
                rates.push(report.per_second);
            }
            points.add("udp_rr", &side.name, "1/s", *size, &rates)?;
        }
    }
    Ok(points.curves())
}
