//! Flows whose first packets went through the stack bypass it, both ways and on both nodes.

use anyhow::{Context as _, Result};
use lab::{agent::AgentOptions, cluster::Cluster, exchange, node::Node, scenario::scenario};

fn learned() -> AgentOptions {
    AgentOptions {
        fast_path: "learned",
        ..AgentOptions::default()
    }
}

fn print_counters(node: &Node) -> Result<()> {
    let status = node.status()?;
    for row in status.counters.iter().filter(|row| row.packets > 0) {
        println!("{} {:>24} {:>10}", node.name(), row.reason, row.packets);
    }
    Ok(())
}

#[test]
fn long_flows_bypass_the_stack_both_ways() {
    scenario(2, |lab| {
        let cluster = Cluster::start_with(lab, &[learned()])?;
        let (a, b) = cluster.nodes();
        let outcome = (|| -> Result<()> {
            for direction in ["up", "down"] {
                let watch = cluster.watch()?;
                let stream =
                    exchange::stream(&cluster.client, &cluster.server, direction, 1_000_000_000)?;
                for node in [a, b] {
                    println!("{direction} {}: {}", node.name(), watch.taken(node)?);
                }
                let half = stream.server.received.or(stream.client.received);
                println!("{:.2} Gbit/s", half.context("received")?.gbit_per_second());
            }
            let watch = cluster.watch()?;
            exchange::datagrams(&cluster.client, &cluster.server, 64, 1000, "")?;
            for node in [a, b] {
                println!("udp {}: {}", node.name(), watch.taken(node)?);
            }
            Ok(())
        })();
        print_counters(a)?;
        print_counters(b)?;
        outcome
    });
}
