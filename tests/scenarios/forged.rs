//! Only peers deliver into pods, only a pod's own address leaves by the fast path.

use std::time::Duration;

use anyhow::{Result, ensure};
use flannel_user::observe::status::{Mode::Ebpf, Status};
use lab::{
    agent::AgentOptions,
    cluster::{Cluster, introduce},
    exchange::{self, RECEIVE_PORT},
    lab::{Lab, Underlay},
    node::{Node, TUNNEL},
    paths::{Path, PathWatch, Way},
    scenario::{scenario, scenario_over},
    task::Task,
    traffic::{datagrams::ReceiveReport, forged::ForgeReport},
};

const FORGED: u64 = 20;

/// What the programs of a node have dropped so far, in all.
fn dropped(status: &Status) -> u64 {
    let rows = status.counters.iter();
    rows.filter(|row| row.action == "dropped")
        .map(|row| row.packets)
        .sum()
}

/// Sends forged packets from `attacker` and gives what the server pod got.
fn forge(cluster: &Cluster, attacker: &Node, extra: &str) -> Result<ReceiveReport> {
    let (a, b) = cluster.nodes();
    let receiver = cluster
        .server
        .tool(&format!("udp-receive --port {RECEIVE_PORT}"))?;
    let command = format!(
        "forge --node {} --inner-source-mac {} --inner-destination-mac {} --to {} --count {FORGED} {extra}",
        b.public_ip(),
        a.mac(TUNNEL)?,
        b.mac(TUNNEL)?,
        cluster.server.at(RECEIVE_PORT)
    );
    let sent: ForgeReport = Task::start(attacker.namespace(), &command)?.result()?;
    ensure!(sent.sent == FORGED);
    std::thread::sleep(Duration::from_millis(100));
    receiver.finish()
}

/// Three nodes at a switch; the third one is nobody's peer.
fn with_a_stranger(options: &AgentOptions, body: impl FnOnce(&Lab, &Cluster) -> Result<()>) {
    scenario_over(Underlay::Switch, 3, |lab| {
        let mut agents = Vec::new();
        for node in &lab.nodes()[..2] {
            agents.push(lab::agent::Agent::start(node, options)?);
        }
        for agent in &mut agents {
            agent.wait_for_peers(1)?;
        }
        let cluster = Cluster {
            agents,
            client: lab[0].add_pod()?,
            server: lab[1].add_pod()?,
        };
        cluster.warm_up()?;
        body(lab, &cluster)
    });
}

#[test]
fn vxlan_from_a_stranger_is_dropped_and_counted() {
    with_a_stranger(&AgentOptions::in_mode(Ebpf), |lab, cluster| {
        let (_, b) = cluster.nodes();
        let before = dropped(&b.status()?);
        let watch = PathWatch::start(&[b])?;
        let source = format!("--from {}", cluster.client.address());
        let received = forge(cluster, &lab[2], &source)?;
        ensure!(received.received == 0, "delivered: {received:?}");
        let counted = dropped(&b.status()?) - before;
        ensure!(counted == FORGED, "{counted} counted as dropped");
        let taken = watch.taken(b)?;
        ensure!(taken == lab::paths::Taken::default(), "{taken}");
        Ok(())
    });
}

#[test]
fn a_peer_speaks_for_its_own_subnet_only() {
    scenario(3, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let before = dropped(&b.status()?);
        // The client's address, but from the third node.
        let source = format!("--from {}", cluster.client.address());
        let received = forge(&cluster, &lab[2], &source)?;
        ensure!(received.received == 0, "delivered: {received:?}");
        ensure!(dropped(&b.status()?) - before == FORGED);
        // The same packets from the right node arrive: what is refused is the sender.
        let received = forge(&cluster, a, &source)?;
        ensure!(received.received == FORGED, "{received:?}");
        Ok(())
    });
}

#[test]
fn passing_on_request_leaves_the_decision_to_the_kernel() {
    let options = AgentOptions::in_mode(Ebpf)
        .argument("--forged-vxlan")
        .argument("pass");
    with_a_stranger(&options, |lab, cluster| {
        let (_, b) = cluster.nodes();
        let watch = PathWatch::start(&[b])?;
        let source = format!("--from {}", cluster.client.address());
        let received = forge(cluster, &lab[2], &source)?;
        ensure!(received.received == FORGED, "{received:?}");
        watch.expect(b, Way::In, Path::Kernel, FORGED)
    });
}

#[test]
fn another_vni_or_mac_is_not_delivered() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let source = format!("--from {}", cluster.client.address());
        let received = forge(&cluster, a, &format!("{source} --vni 2"))?;
        ensure!(received.received == 0, "VNI 2 was delivered: {received:?}");
        Ok(())
    });
}

#[test]
fn a_spoofed_pod_address_is_not_taken_by_the_fast_path() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let second = a.add_pod()?;
        introduce(&second)?;
        // The second pod pretends to be the client.
        let stolen = cluster.client.address();
        second
            .namespace()
            .ip(&format!("addr add {stolen}/32 dev lo"))?;
        let watch = cluster.watch()?;
        exchange::try_datagrams(
            &second,
            &cluster.server,
            &format!("--from {stolen} --count 100"),
        )?;
        // The kernel forwards it as flannel does; the programs refuse.
        watch.expect(a, Way::Out, Path::Kernel, 100)?;
        let arrived = watch.taken(b)?;
        ensure!(
            arrived.decapsulated + arrived.tunnel.received >= 100 && arrived.decapsulated > 90,
            "{arrived}"
        );
        Ok(())
    });
}
