//! Large packets stay large where they can, and arrive where they cannot.

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    cluster::Cluster,
    exchange,
    node::UPLINK,
    paths::{Packets, Way},
    scenario::scenario,
};

const BYTES: u64 = 300_000_000;

/// A NIC that can do nothing for tunnels.
const PLAIN_NIC: &[&str] = &[
    "tso",
    "off",
    "gso",
    "off",
    "gro",
    "on",
    "tx-udp_tnl-segmentation",
    "off",
];

fn set_offloads(cluster: &Cluster, settings: &[&str]) -> Result<()> {
    let (a, b) = cluster.nodes();
    for node in [a, b] {
        let argv: Vec<&str> = ["ethtool", "-K", UPLINK]
            .into_iter()
            .chain(settings.iter().copied())
            .collect();
        node.namespace().run(&argv)?;
    }
    Ok(())
}

fn streams_arrive(cluster: &Cluster) -> Result<()> {
    for direction in ["up", "down", "both"] {
        let watch = cluster.watch()?;
        let stream = exchange::stream(&cluster.client, &cluster.server, direction, BYTES)
            .with_context(|| direction)?;
        cluster.expect_paths_of_modes(&watch, Packets::AtLeast(100), Packets::AtLeast(100))?;
        let half = stream.server.received.or(stream.client.received);
        println!(
            "{direction}: {:.2} Gbit/s",
            half.context("somebody received")?.gbit_per_second()
        );
    }
    Ok(())
}

fn in_modes(a: Mode, b: Mode, settings: Option<&[&str]>) {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[a, b])?;
        if let Some(settings) = settings {
            set_offloads(&cluster, settings)?;
        }
        streams_arrive(&cluster)?;
        // 40,000 datagrams handed over 40 at a time.
        for (from, to) in [
            (&cluster.client, &cluster.server),
            (&cluster.server, &cluster.client),
        ] {
            exchange::datagrams(from, to, 1000, 20_000, "--segments 40 --rate 10000")?;
        }
        Ok(())
    });
}

#[test]
fn ebpf_with_offloads_as_they_are() {
    in_modes(Ebpf, Ebpf, None);
}

#[test]
fn ebpf_over_a_plain_nic() {
    in_modes(Ebpf, Ebpf, Some(PLAIN_NIC));
}

#[test]
fn ebpf_to_netlink_over_a_plain_nic() {
    in_modes(Ebpf, Netlink, Some(PLAIN_NIC));
}

#[test]
fn netlink_to_ebpf_over_a_plain_nic() {
    in_modes(Netlink, Ebpf, Some(PLAIN_NIC));
}

#[test]
fn netlink_over_a_plain_nic() {
    in_modes(Netlink, Netlink, Some(PLAIN_NIC));
}

#[test]
fn large_packets_stay_large_on_the_fast_path() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let watch = cluster.watch()?;
        exchange::stream(&cluster.client, &cluster.server, "up", BYTES)?;
        let (packets, _) = watch.taken(a)?.on(Way::Out);
        let average = BYTES / packets;
        ensure!(
            average > 15_000,
            "{packets} packets of {average} bytes each: segmentation offload is lost"
        );
        Ok(())
    });
}
