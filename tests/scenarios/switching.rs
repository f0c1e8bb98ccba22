//! Switching between the datapaths costs no packet and no connection.

use std::time::{Duration, Instant};

use anyhow::ensure;
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    cluster::{Cluster, path_of},
    exchange,
    load::Load,
    paths::{Path, Taken},
    scenario::scenario,
};

const SWITCHES: u32 = 50;
const PERIOD: Duration = Duration::from_millis(200);

#[test]
fn fifty_switches_under_load_lose_nothing() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let load = Load::start(&cluster.client, &cluster.server)?;
        let mut by_programs = [0; 2];
        let mut by_kernel = [0; 2];
        let mut before = [Taken::now(a)?, Taken::now(b)?];
        let start = Instant::now();
        for number in 1..=SWITCHES {
            let due = PERIOD * number;
            std::thread::sleep(due.saturating_sub(start.elapsed()));
            // What the programs took is read before they go: their counters go with them.
            for (index, node) in [a, b].into_iter().enumerate() {
                let taken = Taken::now(node)?.since(before[index]);
                by_programs[index] += taken.encapsulated;
                by_kernel[index] += taken.tunnel.sent;
            }
            let mode = if number % 2 == 1 { Netlink } else { Ebpf };
            a.request_mode(mode)?;
            b.request_mode(mode)?;
            before = [Taken::now(a)?, Taken::now(b)?];
        }
        let took = start.elapsed();
        let report = load.finish()?;
        println!(
            "{SWITCHES} switches of both nodes in {took:?}: {}",
            report.summary()
        );
        report.check()?;
        ensure!(
            took < PERIOD * SWITCHES + Duration::from_secs(2),
            "the switches took {took:?}, so they were not one each {PERIOD:?}"
        );
        // Half of the time each: 2,000 packets a second and the stream on top.
        for (index, node) in [a, b].into_iter().enumerate() {
            ensure!(
                by_programs[index] > 5000 && by_kernel[index] > 5000,
                "{}: {} packets by the programs, {} by the kernel",
                node.name(),
                by_programs[index],
                by_kernel[index]
            );
        }
        Ok(())
    });
}

#[test]
fn a_switch_moves_every_packet_to_the_other_path() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        for (mode_a, mode_b) in [
            (Ebpf, Ebpf),
            (Netlink, Ebpf),
            (Netlink, Netlink),
            (Ebpf, Netlink),
            (Ebpf, Ebpf),
        ] {
            a.mode(mode_a)?;
            b.mode(mode_b)?;
            let watch = cluster.watch()?;
            exchange::udp_round_trips(&cluster.client, &cluster.server, 1000)?;
            watch.expect_exchange((a, path_of(mode_a)), (b, path_of(mode_b)), 1000, 1000)?;
        }
        Ok(())
    });
}

#[test]
fn switching_to_the_mode_in_force_changes_nothing() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        for mode in [Ebpf, Netlink, Netlink] {
            a.mode(mode)?;
        }
        let status = a.status()?;
        ensure!(status.pods.iter().all(|pod| !pod.attached), "{status:?}");
        a.mode(Ebpf)?;
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100)?;
        watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 100, 100)
    });
}
