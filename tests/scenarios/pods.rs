//! Pods come and go, bridged or routed, and the programs follow them.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Result, ensure};
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    cluster::{Cluster, introduce},
    exchange::{self, RunningPing},
    lab::Underlay,
    load::RATE,
    node::Node,
    paths::Path,
    pod::{Pod, Wiring},
    scenario::{scenario, scenario_over},
    wait,
};

fn wait_until_forgotten(node: &Node, address: Ipv4Addr) -> Result<()> {
    let what = format!("{} has forgotten {address}", node.name());
    wait::until_true(&what, Duration::from_secs(5), || {
        let pods = node.status()?.pods;
        Ok(pods.iter().all(|pod| pod.address != address))
    })
}

#[test]
fn new_pods_take_the_fast_path_and_departed_ones_are_forgotten() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        // One conversation that must not notice any of it.
        let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
        let addresses = {
            let mut pods: Vec<(Pod, Pod)> = Vec::new();
            for _ in 0..4 {
                let pair = (a.add_pod()?, b.add_pod()?);
                introduce(&pair.0)?;
                introduce(&pair.1)?;
                pods.push(pair);
            }
            for (client, server) in &pods {
                exchange::udp_round_trips(client, server, 100)?;
                exchange::stream(client, server, "both", 8_000_000)?;
            }
            pods.iter()
                .map(|(client, _)| client.address())
                .collect::<Vec<_>>()
        };
        for address in addresses {
            wait_until_forgotten(a, address)?;
        }
        exchange::check_nothing_lost(&ping.finish()?)?;
        let pair = (a.add_pod()?, b.add_pod()?);
        introduce(&pair.0)?;
        introduce(&pair.1)?;
        pair.0.ping(&pair.1.address().to_string(), 1)?;
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&pair.0, &pair.1, 500)?;
        watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 500, 500)
    });
}

#[test]
fn an_address_handed_out_again_reaches_the_new_pod() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (_, b) = cluster.nodes();
        for _ in 0..5 {
            let server = b.add_pod_numbered(200)?;
            introduce(&server)?;
            cluster.client.ping(&server.address().to_string(), 1)?;
            let watch = cluster.watch()?;
            exchange::udp_round_trips(&cluster.client, &server, 200)?;
            cluster.expect_paths_of_modes(&watch, 200, 200)?;
        }
        Ok(())
    });
}

#[test]
fn a_pod_is_reachable_before_its_agent_knows_it() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (_, b) = cluster.nodes();
        // Nothing announces it; the first packets may take the kernel path, but arrive.
        let server = b.add_pod()?;
        exchange::udp_round_trips(&cluster.client, &server, 500).map(drop)
    });
}

#[test]
fn pods_that_started_before_the_switch_are_found() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Netlink])?;
        let (a, b) = cluster.nodes();
        a.mode(Ebpf)?;
        b.mode(Ebpf)?;
        a.wait_until_pod_is_known(&cluster.client)?;
        b.wait_until_pod_is_known(&cluster.server)?;
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
        watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 500, 500)
    });
}

#[test]
fn routed_pods_take_the_fast_path_too() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let (routed_a, routed_b) = (
            a.add_pod_with(Wiring::Routed, None)?,
            b.add_pod_with(Wiring::Routed, None)?,
        );
        introduce(&routed_a)?;
        introduce(&routed_b)?;
        for (from, to) in [
            (&routed_a, &cluster.server),
            (&routed_a, &routed_b),
            (&cluster.client, &routed_b),
        ] {
            from.ping(&to.address().to_string(), 1)?;
            let watch = cluster.watch()?;
            exchange::udp_round_trips(from, to, 200)?;
            watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 200, 200)?;
            let sent = exchange::datagrams(from, to, 64, 50, "")?;
            ensure!(sent.received.ttl.get(&62) == Some(&50), "{sent:?}");
            exchange::stream(from, to, "both", 50_000_000)?;
        }
        Ok(())
    });
}

#[test]
fn pods_of_one_node_keep_talking_through_its_bridge() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let neighbour = a.add_pod()?;
        introduce(&neighbour)?;
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &neighbour, 200)?;
        let taken = watch.taken(a)?;
        ensure!(taken == lab::paths::Taken::default(), "{taken}");
        Ok(())
    });
}

#[test]
fn nodes_behind_a_router_are_reached_through_it() {
    scenario_over(Underlay::Router, 3, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
        watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 500, 500)?;
        exchange::stream(&cluster.client, &cluster.server, "both", 100_000_000)?;
        Ok(())
    });
}
