//! `--fast-path direct`: TCP between pods bypasses the stack from its SYN on, and whatever lives
//! on or comes back is in connection tracking as if it had been there all along.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flannel_user::observe::status::{
    BypassStatus,
    Mode::{Ebpf, Netlink},
};
use lab::{
    agent::Agent,
    closing::{Left, forget_resets_after, in_every_orderly_way},
    conntrack::Census,
    kube::{CONNECTIONS_PORT, Kube, SERVICE, Side, Via, on, pause},
    node::Node,
    pod::Pod,
    scenario::{repetitions, scenario},
    task::Task,
    traffic::connections::{ConnectionsReport, Ending},
    wait,
};

/// How own connections fare on a node.
fn own(node: &Node) -> Result<flannel_user::datapath::ebpf::OwnState> {
    let bypass: Option<BypassStatus> = node.status()?.bypass;
    let own = bypass.and_then(|bypass| bypass.own);
    own.ok_or_else(|| anyhow::anyhow!("{} has no own connections", node.name()))
}

/// Seconds that an entry stays after a reset.
const AFTER_RESET: u32 = 2;

/// Connections that end in every way.
fn close_in_every_way(kube: &Kube, via: Via) -> Result<Left> {
    let (a, b) = kube.cluster.nodes();
    forget_resets_after(kube, AFTER_RESET)?;
    let count = u64::from(repetitions(600, 10_000));
    let arguments = format!("--count {count} --at-once 16 --exchanges 4 --size 512");
    let what = format!("{:?} {via:?}", kube.side());
    let troubles = in_every_orderly_way(&what, |ending| kube.connections(via, ending, &arguments))?;
    if kube.side() == Side::Direct {
        let opened = b.status()?.packets("own_opened");
        ensure!(
            opened >= 6 * count * 9 / 10,
            "only {opened} connections bypassed from their SYN on\n{}",
            lab::paths::describe(b)
        );
        wait::until_true("the own tables are empty", Duration::from_secs(15), || {
            let (one, other) = (own(a)?, own(b)?);
            Ok(one.live + one.closed + other.live + other.closed == 0)
        })?;
        println!("{:?}\n{:?}", own(a)?, own(b)?);
    }
    pause(f64::from(AFTER_RESET) + 1.0);
    Left::now(kube, troubles)
}

fn check(reference: &Left, found: &Left) -> Result<()> {
    found.check_pods(reference)?;
    for index in 0..2 {
        let live = |census: &Census| {
            let rows = census.iter().filter(|(kind, _)| {
                kind.starts_with("tcp") && *kind != "tcp TIME_WAIT" && *kind != "tcp CLOSE"
            });
            rows.map(|(_, count)| count).sum::<u64>()
        };
        ensure!(
            live(&found.entries[index]) <= live(&reference.entries[index]) + 2,
            "connection tracking keeps {:?} instead of {:?}",
            found.entries[index],
            reference.entries[index]
        );
    }
    Ok(())
}

#[test]
fn every_ending_leaves_nothing_behind() {
    let netlink = on(Side::Netlink, |kube| close_in_every_way(kube, Via::Pod));
    let direct = on(Side::Direct, |kube| close_in_every_way(kube, Via::Pod));
    check(&netlink, &direct).unwrap_or_else(|error| panic!("{error:?}"));
}

/// Many connections at once that live for a while: some idle at their end, some half-closed.
fn live_ones(kube: &Kube, count: u32) -> Result<Vec<Task>> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    [Ending::ClientFin, Ending::HalfClose, Ending::ClientRst]
        .into_iter()
        .map(|ending| {
            kube.client().tool(&format!(
                "connections --to {target} --ending {} --count {count} --at-once {} --exchanges 6 --idle 0.7 --patience 15",
                ending.name(),
                count / 4
            ))
        })
        .collect()
}

fn serve(pod: &Pod) -> Result<Task> {
    pod.tool(&format!(
        "connections-serve --port {CONNECTIONS_PORT} --patience 15"
    ))
}

fn expect_all_well(tasks: Vec<Task>) -> Result<u64> {
    let mut ended = 0;
    for task in tasks {
        let report: ConnectionsReport = task.result()?;
        ensure!(report.troubles() == 0, "{report:?}");
        ended += report.ended;
    }
    Ok(ended)
}

/// Runs `disturb` again and again under young live connections.
fn under_live_connections(side: Side, mut disturb: impl FnMut(&mut Kube, u32) -> Result<()>) {
    scenario(2, |lab| {
        let mut kube = Kube::start(lab, side)?;
        let server = serve(kube.server())?;
        let clients = live_ones(&kube, repetitions(400, 5000))?;
        let stream = kube.stream(Via::Pod, "--direction both --pace 0.3")?;
        let start = Instant::now();
        let mut rounds = 0;
        while start.elapsed() < Duration::from_secs(u64::from(repetitions(3, 60))) {
            rounds += 1;
            disturb(&mut kube, rounds)?;
        }
        let ended = expect_all_well(clients)?;
        stream.finish()?.check(1_000_000)?;
        let served: ConnectionsReport = server.finish()?;
        ensure!(served.troubles() == 0, "{served:?}");
        let (a, b) = kube.cluster.nodes();
        // None where the last round left netlink mode in force.
        for node in [a, b] {
            let own = node.status()?.bypass.and_then(|bypass| bypass.own);
            println!("{}: {own:?}", node.name());
        }
        println!("{rounds} rounds, {ended} connections");
        Ok(())
    });
}

#[test]
fn changed_rules_hand_over_what_lives() {
    change_rules(Side::Direct);
}

#[test]
fn changed_rules_hand_over_what_lives_by_class() {
    change_rules(Side::Classes);
}

fn change_rules(side: Side) {
    under_live_connections(side, |kube, round| {
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            let verb = if round % 2 == 1 { "add" } else { "delete" };
            node.namespace()
                .run(&["nft", verb, "table", "ip", "lab-noise"])?;
        }
        pause(0.1);
        Ok(())
    });
}

#[test]
fn switching_the_mode_hands_over_what_lives() {
    switch_modes(Side::Direct);
}

#[test]
fn switching_the_mode_hands_over_what_lives_by_class() {
    switch_modes(Side::Classes);
}

fn switch_modes(side: Side) {
    under_live_connections(side, |kube, round| {
        let mode = if round % 2 == 1 { Netlink } else { Ebpf };
        let (a, b) = kube.cluster.nodes();
        a.request_mode(mode)?;
        b.request_mode(mode)?;
        pause(0.25);
        if mode == Netlink {
            return Ok(());
        }
        for agent in &mut kube.cluster.agents {
            agent.wait_until("is back", |status| {
                let bypass = status.bypass.as_ref();
                status.mode == Ebpf && bypass.is_some_and(|bypass| bypass.own.is_some())
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_killed_agents_connections_are_handed_over_by_the_next() {
    kill_agents(Side::Direct);
}

#[test]
fn a_killed_agents_connections_are_handed_over_by_the_next_by_class() {
    kill_agents(Side::Classes);
}

fn kill_agents(side: Side) {
    under_live_connections(side, |kube, round| {
        let index = round as usize % 2;
        let agent = kube.cluster.agents.remove(index);
        let node = agent.node().clone();
        agent.kill9()?;
        // Sometimes after the heartbeat has ended.
        pause(if round % 5 == 4 { 3.5 } else { 0.1 });
        let mut agent = Agent::start(&node, &kube.side().options())?;
        agent.wait_for_peers(1)?;
        kube.cluster.agents.insert(index, agent);
        Ok(())
    });
}

#[test]
fn services_and_pods_share_servers_and_ports() {
    share_servers(Side::Direct);
}

#[test]
fn services_and_pods_share_servers_and_ports_by_class() {
    share_servers(Side::Classes);
}

fn share_servers(side: Side) {
    scenario(2, |lab| {
        let kube = Kube::start(lab, side)?;
        let (a, _) = kube.cluster.nodes();
        let server = serve(kube.server())?;
        let pod = kube.server().at(CONNECTIONS_PORT);
        // Few ports, so that both kinds meet on the same ones.
        let client = kube.client().namespace();
        client.sysctl("net.ipv4.ip_local_port_range", "40000 44000")?;
        let count = repetitions(1500, 1900);
        let start = |target: String, ending: Ending| {
            kube.client().tool(&format!(
                "connections --to {target} --ending {} --count {count} --at-once 8 --exchanges 2 --size 64",
                ending.name()
            ))
        };
        let clients = vec![
            start(pod.to_string(), Ending::ClientFin)?,
            start(format!("{SERVICE}:{CONNECTIONS_PORT}"), Ending::ClientFin)?,
            start(pod.to_string(), Ending::ServerFin)?,
            start(format!("{SERVICE}:{CONNECTIONS_PORT}"), Ending::ServerFin)?,
        ];
        let ended = expect_all_well(clients)?;
        println!("{ended} connections\n{}", lab::paths::describe(a));
        let served: ConnectionsReport = server.finish()?;
        ensure!(served.troubles() == 0, "{served:?}");
        Ok(())
    });
}
