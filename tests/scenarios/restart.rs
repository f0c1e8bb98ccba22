//! The agent may die, restart, or be replaced by another version: the packets
//! do not notice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::Cluster,
    exchange,
    load::{Load, RATE},
    node::{InterfaceCounters, Node, TUNNEL},
    paths::Path,
    scenario::{repetitions, scenario},
};

/// Makes `flanneld` use another pin directory, as a release with another map layout does.
const LAYOUT_VERSION: &str = "FLANNEL_TEST_LAYOUT_VERSION";
/// How long nobody is in charge.
const OUTAGE: Duration = Duration::from_secs(2);

#[test]
fn programs_outlive_their_agent_and_are_taken_over() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let a = lab[0].clone();
        let load = Load::start(&cluster.client, &cluster.server)?;
        for _ in 0..repetitions(1, 20) {
            kill_and_take_over(&mut cluster, &a, &load)?;
        }
        let report = load.finish()?;
        println!("kill -9: {}", report.summary());
        report.check()
    });
}

/// Single packets ask the kernel whether their flow may still bypass it; nothing else goes there.
fn expect_few(a: &Node, before: InterfaceCounters) -> Result<()> {
    let now = a.interface_counters(TUNNEL)?;
    let few = |now: u64, before: u64| now - before < 100;
    ensure!(
        few(now.sent, before.sent) && few(now.received, before.received),
        "flannel.1 went from {before:?} to {now:?}"
    );
    Ok(())
}

fn kill_and_take_over(cluster: &mut Cluster, a: &Node, load: &Load) -> Result<()> {
    let before = a.status()?;
    let tunnel = a.interface_counters(TUNNEL)?;
    let index = a.interface_index(TUNNEL)?;
    cluster.agents.remove(0).kill9()?;
    load.run_for(OUTAGE);
    let agent = Agent::start(a, &AgentOptions::in_mode(Ebpf))?;
    cluster.agents.insert(0, agent);
    load.run_for(Duration::from_secs(1));
    let after = a.status()?;
    // Pods' traffic went past flannel.1, nobody made it anew, and the
    // programs' counters went on from where they were.
    expect_few(a, tunnel)?;
    ensure!(
        a.interface_index(TUNNEL)? == index,
        "flannel.1 was recreated"
    );
    ensure!(
        before.node == after.node,
        "{:?} became {:?}",
        before.node,
        after.node
    );
    let grown = after.packets("encapsulated") - before.packets("encapsulated");
    let least = u64::from(RATE) * OUTAGE.as_secs();
    ensure!(grown > least, "{grown} packets encapsulated, not {least}");
    Ok(())
}

#[test]
fn an_orderly_end_is_hitless_too() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let a = lab[0].clone();
        let load = Load::start(&cluster.client, &cluster.server)?;
        let tunnel = a.interface_counters(TUNNEL)?;
        let ended = cluster.agents.remove(0).terminate()?;
        ensure!(ended.status.success(), "{}: {}", ended.status, ended.log);
        load.run_for(OUTAGE);
        expect_few(&a, tunnel)?;
        let agent = Agent::start(&a, &AgentOptions::in_mode(Ebpf))?;
        load.run_for(Duration::from_secs(1));
        cluster.agents.push(agent);
        let report = load.finish()?;
        println!("SIGTERM: {}", report.summary());
        report.check()
    });
}

#[test]
fn netlink_mode_outlives_its_agent_as_well() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Netlink])?;
        let a = lab[0].clone();
        let load = Load::start(&cluster.client, &cluster.server)?;
        let (index, mac) = (a.interface_index(TUNNEL)?, a.mac(TUNNEL)?);
        cluster.agents.remove(0).kill9()?;
        load.run_for(OUTAGE);
        let agent = Agent::start(&a, &AgentOptions::in_mode(Netlink))?;
        load.run_for(Duration::from_secs(1));
        ensure!(a.interface_index(TUNNEL)? == index && a.mac(TUNNEL)? == mac);
        cluster.agents.push(agent);
        let report = load.finish()?;
        println!("netlink, kill -9: {}", report.summary());
        report.check()
    });
}

#[test]
fn an_agent_with_another_map_layout_takes_over() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let a = lab[0].clone();
        let old_pins = pins(&a)?;
        let load = Load::start(&cluster.client, &cluster.server)?;
        cluster.agents.remove(0).kill9()?;
        load.run_for(Duration::from_millis(500));
        let options = AgentOptions::in_mode(Ebpf).variable(LAYOUT_VERSION, "99");
        let mut agent = Agent::start(&a, &options)?;
        agent.wait_for_peers(1)?;
        a.wait_until_pod_is_known(&cluster.client)?;
        load.run_for(Duration::from_secs(1));
        let report = load.finish()?;
        println!("another layout: {}", report.summary());
        report.check()?;
        let new_pins = pins(&a)?;
        ensure!(
            new_pins.iter().all(|pin| !old_pins.contains(pin)),
            "of {old_pins:?} some are still there: {new_pins:?}"
        );
        ensure!(!new_pins.is_empty(), "nothing is pinned");
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 1000)?;
        let (a, b) = cluster.nodes();
        watch.expect_exchange((a, Path::Ebpf), (b, Path::Ebpf), 1000, 1000)
    });
}

/// Every layout's directory below the agent's place in bpffs.
fn pins(node: &Node) -> Result<Vec<String>> {
    const PLACE: &str = "/sys/fs/bpf/flannel/vni1";
    node.namespace()
        .within(|| -> Result<Vec<String>> {
            std::fs::read_dir(PLACE)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        })?
        .with_context(|| format!("cannot list {PLACE}"))
}
