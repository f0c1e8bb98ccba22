//! Whatever two pods say to each other is understood in all four pairings of
//! an ebpf and a netlink node, by the path of each node's mode, and header
//! fields arrive as through the kernel alone.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    cluster::{Cluster, introduce},
    exchange,
    paths::Packets,
    pod::Wiring,
    scenario::scenario,
};

/// One gigabyte, each way.
const GIGABYTE: u64 = 1_000_000_000;
/// The most that one segmentation-offload packet carries.
const LARGEST_SEGMENT: u64 = 65536;

#[test]
fn ebpf_to_ebpf() {
    everything_arrives(Ebpf, Ebpf);
}

#[test]
fn ebpf_to_netlink() {
    everything_arrives(Ebpf, Netlink);
}

#[test]
fn netlink_to_ebpf() {
    everything_arrives(Netlink, Ebpf);
}

#[test]
fn netlink_to_netlink() {
    everything_arrives(Netlink, Netlink);
}

fn everything_arrives(client: Mode, server: Mode) {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[client, server])?;
        pings_take_the_kernel_path(&cluster).context("ping")?;
        datagrams_of_all_sizes_arrive(&cluster).context("datagrams")?;
        a_gigabyte_arrives_each_way(&cluster).context("TCP")?;
        fragmentation_needed_comes_back(&cluster).context("DF over the MTU")?;
        every_router_shows_itself(&cluster).context("traceroute")?;
        ip_options_arrive(&cluster).context("IP options")?;
        ecn_and_ttl_arrive_as_by_the_kernel(&cluster).context("ECN and TTL")
    });
}

fn pings_take_the_kernel_path(cluster: &Cluster) -> Result<()> {
    let watch = cluster.watch()?;
    cluster
        .client
        .ping(&cluster.server.address().to_string(), 5)?;
    cluster.expect_kernel_path(&watch, 5, 5)
}

fn datagrams_of_all_sizes_arrive(cluster: &Cluster) -> Result<()> {
    let (client, server) = (&cluster.client, &cluster.server);
    for size in [64, 1400] {
        let watch = cluster.watch()?;
        exchange::datagrams(client, server, size, 1000, "")?;
        cluster.expect_paths_of_modes(&watch, 1000, 0)?;
        let watch = cluster.watch()?;
        exchange::datagrams(server, client, size, 1000, "")?;
        cluster.expect_paths_of_modes(&watch, 0, 1000)?;
    }
    // Fragments are the kernel's: three of each datagram.
    let watch = cluster.watch()?;
    exchange::datagrams(client, server, 4000, 500, "")?;
    exchange::datagrams(server, client, 4000, 500, "")?;
    cluster.expect_kernel_path(&watch, 1500, 1500)
}

fn a_gigabyte_arrives_each_way(cluster: &Cluster) -> Result<()> {
    for direction in ["up", "down"] {
        let watch = cluster.watch()?;
        let stream = exchange::stream(&cluster.client, &cluster.server, direction, GIGABYTE)?;
        // Data one way, acknowledgements the other.
        let data = Packets::AtLeast(GIGABYTE / LARGEST_SEGMENT);
        let answers = Packets::AtLeast(100);
        let (request, reply) = match direction {
            "up" => (data, answers),
            _ => (answers, data),
        };
        cluster.expect_paths_of_modes(&watch, request, reply)?;
        let half = stream.server.received.or(stream.client.received);
        println!(
            "{direction}: {:.2} Gbit/s",
            half.context("somebody received")?.gbit_per_second()
        );
    }
    Ok(())
}

fn fragmentation_needed_comes_back(cluster: &Cluster) -> Result<()> {
    let (a, _) = cluster.nodes();
    let mtu = a.subnet_file()?.mtu;
    let gateway = a.subnet_file()?.gateway.addr();
    // This pod believes in 1500 bytes until it is told otherwise.
    let ignorant = a.add_pod_with(Wiring::Bridged, Some(1500))?;
    introduce(&ignorant)?;
    let size = mtu + 1 - 28; // one byte too long with both headers
    let all = exchange::try_datagrams(
        &ignorant,
        &cluster.server,
        &format!("--size {size} --count 3 --fragmentation do"),
    )?;
    ensure!(
        all.received.received == 0
            && all.sent.fragmentation_needed > 0
            && all.sent.path_mtu == Some(mtu)
            && all.sent.complainant == Some(gateway),
        "frag-needed with MTU {mtu} was to come from {gateway}: {all:?}"
    );
    let fits = (mtu - 28) as usize;
    exchange::datagrams(&ignorant, &cluster.server, fits, 10, "--fragmentation do")?;
    Ok(())
}

fn every_router_shows_itself(cluster: &Cluster) -> Result<()> {
    let (a, b) = cluster.nodes();
    let there = exchange::route(&cluster.client, cluster.server.address())?;
    let expected = vec![
        Some(a.subnet_file()?.gateway.addr()),
        Some(b.subnet()?.network()),
        Some(cluster.server.address()),
    ];
    ensure!(
        there.reached && there.hops == expected,
        "{:?} instead of {expected:?}",
        there.hops
    );
    let back = exchange::route(&cluster.server, cluster.client.address())?;
    let expected = vec![
        Some(b.subnet_file()?.gateway.addr()),
        Some(a.subnet()?.network()),
        Some(cluster.client.address()),
    ];
    ensure!(
        back.reached && back.hops == expected,
        "{:?} instead of {expected:?}",
        back.hops
    );
    Ok(())
}

fn ip_options_arrive(cluster: &Cluster) -> Result<()> {
    let watch = cluster.watch()?;
    let (client, server) = (&cluster.client, &cluster.server);
    let nop = exchange::datagrams(client, server, 64, 10, "--options nop")?;
    ensure!(
        nop.received.options == BTreeSet::from(["01010101".to_owned()]),
        "{nop:?}"
    );
    let route = exchange::datagrams(client, server, 64, 10, "--options record-route")?;
    let hex = |address: std::net::Ipv4Addr| -> String {
        address.octets().map(|byte| format!("{byte:02x}")).concat()
    };
    let (a, b) = cluster.nodes();
    let signed = format!(
        "072714{}{}{}{}",
        hex(client.address()),
        hex(a.subnet()?.network()),
        hex(b.subnet_file()?.gateway.addr()),
        hex(server.address())
    );
    ensure!(
        route.received.options.len() == 1
            && route
                .received
                .options
                .iter()
                .all(|options| options.starts_with(&signed)),
        "{route:?} instead of {signed}"
    );
    let stamps = exchange::datagrams(client, server, 64, 10, "--options timestamp")?;
    ensure!(
        stamps
            .received
            .options
            .iter()
            .all(|options| options.starts_with("4428")),
        "{stamps:?}"
    );
    cluster.expect_kernel_path(&watch, 30, 0)
}

fn ecn_and_ttl_arrive_as_by_the_kernel(cluster: &Cluster) -> Result<()> {
    let pods = (&cluster.client, &cluster.server);
    for (from, to) in [pods, (pods.1, pods.0)] {
        for codepoint in 0..4_u8 {
            // DSCP 46 must stay what it is.
            let tos = 46 << 2 | codepoint;
            let watch = cluster.watch()?;
            let all = exchange::datagrams(from, to, 64, 20, &format!("--tos {tos}"))?;
            ensure!(all.received.tos.get(&tos) == Some(&20), "{all:?}");
            // Two nodes routed it: 64 - 2.
            ensure!(all.received.ttl.get(&62) == Some(&20), "{all:?}");
            let (request, reply) = if from.address() == pods.0.address() {
                (20, 0)
            } else {
                (0, 20)
            };
            cluster.expect_paths_of_modes(&watch, request, reply)?;
        }
    }
    // A packet that dies on the way dies in the same place: one hop short.
    let short = exchange::try_datagrams(pods.0, pods.1, "--ttl 2 --count 5")?;
    ensure!(short.received.received == 0, "{short:?}");
    let enough = exchange::datagrams(pods.0, pods.1, 64, 5, "--ttl 3")?;
    ensure!(enough.received.ttl.get(&1) == Some(&5), "{enough:?}");
    Ok(())
}
