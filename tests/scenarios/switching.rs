//! Switching between the datapaths costs no packet and no connection.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use flannel_ebpf::layout::PARKED;
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    cluster::{Cluster, path_of},
    exchange,
    load::{Load, LoadReport},
    node::{Node, TUNNEL, UPLINK},
    paths::{Path, Taken},
    pod::Pod,
    scenario::{repetitions, scenario},
    wait,
};

/// Switches in a normal and in a long run.
const SWITCHES: (u32, u32) = (50, 500);
/// Between two switches of both nodes.
const PERIOD: Duration = Duration::from_millis(200);

#[test]
fn fifty_switches_under_load_lose_nothing() {
    fifty_switches(Load::start, LoadReport::check);
}

#[test]
fn fifty_switches_under_a_stream_at_full_speed_lose_nothing() {
    fifty_switches(Load::start_at_full_speed, LoadReport::check_nothing_lost);
}

fn fifty_switches(
    start_load: impl FnOnce(&Pod, &Pod) -> Result<Load>,
    check: impl FnOnce(&LoadReport) -> Result<()>,
) {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let load = start_load(&cluster.client, &cluster.server)?;
        let mut by_programs = [0; 2];
        let mut by_kernel = [0; 2];
        let mut before = [Taken::now(a)?, Taken::now(b)?];
        let start = Instant::now();
        let switches = repetitions(SWITCHES.0, SWITCHES.1);
        for number in 1..=switches {
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
            "{switches} switches of both nodes in {took:?}: {}",
            report.summary()
        );
        check(&report)?;
        ensure!(
            took < PERIOD * switches + Duration::from_secs(2),
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

/// Where the agents of the lab pin their programs.
const PINS: &str = "/sys/fs/bpf/flannel";

/// Programs at the tcx hooks of the uplink, the tunnel and the pods' veths of a node.
fn programs(node: &Node) -> Result<Vec<String>> {
    let mut interfaces = vec![UPLINK.to_owned(), TUNNEL.to_owned()];
    let links = node.namespace().ip("-o link show type veth")?;
    interfaces.extend(links.lines().filter_map(|line| {
        let name = line.split_whitespace().nth(1)?;
        let name = name.trim_end_matches(':').split('@').next()?;
        (name != UPLINK).then(|| name.to_owned())
    }));
    node.namespace().within(|| {
        let mut found = Vec::new();
        for interface in &interfaces {
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, programs) = SchedClassifier::query_tcx(interface, side)?;
                let names = programs.iter().filter_map(|program| program.name_as_str());
                found.extend(names.map(str::to_owned));
            }
        }
        Ok(found)
    })?
}

#[test]
fn what_is_switched_off_touches_nothing_and_goes_by_itself() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let (a, b) = (a.clone(), b.clone());
        let at_work = programs(&a)?.len();
        ensure!(at_work >= 4, "{at_work} programs in ebpf mode");
        for node in [&a, &b] {
            node.mode(Netlink)?;
            ensure!(!node.namespace().exists(PINS)?, "pins are left");
            let left = programs(node)?;
            ensure!(
                left.len() <= at_work && left.iter().all(|name| name == PARKED),
                "in netlink mode: {left:?}"
            );
        }
        // By its own clock, or with the agent.
        cluster.agents.remove(1).kill9()?;
        wait::until_true("links end with the agent", Duration::from_secs(3), || {
            Ok(programs(&b)?.is_empty())
        })?;
        wait::until_true("links end by themselves", Duration::from_secs(14), || {
            Ok(programs(&a)?.is_empty())
        })?;
        // What stayed loaded is as good as new.
        a.mode(Ebpf)?;
        ensure!(
            programs(&a)?.len() == at_work,
            "after switching on again: {:?}",
            programs(&a)?
        );
        let taken = Taken::now(&a)?;
        ensure!(taken.encapsulated == 0, "counters went on: {taken:?}");
        Ok(())
    });
}
