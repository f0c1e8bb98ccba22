//! Connections that bypass from their SYN on are handed over to conntrack while they live: no
//! matter why, none is lost, and they end there as any other.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    agent::Agent,
    conntrack,
    kube::{CONNECTIONS_PORT, Kube, Side, Via, pause},
    scenario::{repetitions, scenario},
    task::Task,
    traffic::connections::{ConnectionsReport, Ending},
    wait,
};

/// How connections end: after an idle time of which they are young for the first second.
const ENDINGS: [Ending; 3] = [Ending::ClientFin, Ending::HalfClose, Ending::ClientRst];

/// Live connections of one kind of ending; 5,000 in all in the long run.
fn at_once() -> u32 {
    repetitions(100, 1_700)
}

/// Seconds that each is idle. Five thousand that come again every second are more than the traffic
/// tools of two CPUs can open.
fn idle() -> &'static str {
    if at_once() > 1000 { "3.6" } else { "1.2" }
}

fn live_ones(kube: &Kube) -> Result<Vec<Task>> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    ENDINGS
        .into_iter()
        .map(|ending| {
            kube.client().tool(&format!(
                "connections --to {target} --ending {} --count 100000000 --at-once {} --exchanges 3 --idle {} --patience 15",
                ending.name(),
                at_once(),
                idle()
            ))
        })
        .collect()
}

/// Live own connections as each agent has counted them last; none in netlink mode.
fn live(kube: &Kube) -> Result<u64> {
    let (a, b) = kube.cluster.nodes();
    let mut least = u64::MAX;
    for node in [a, b] {
        let own = node.status()?.bypass.and_then(|bypass| bypass.own);
        least = least.min(own.map_or(0, |own| own.live));
    }
    Ok(least)
}

/// What conntrack believes to be alive, on both nodes. An entry that has seen both FINs is none: the
/// last ACK may have bypassed it, with own connections as without.
fn left(kube: &Kube) -> Result<Vec<String>> {
    let (a, b) = kube.cluster.nodes();
    let mut left = Vec::new();
    for node in [a, b] {
        let open = conntrack::open(node.namespace())?;
        left.extend(
            open.into_iter()
                .map(|line| format!("{}: {line}", node.name())),
        );
    }
    Ok(left)
}

/// Runs `disturb` again and again, each time under young live connections on both nodes.
fn under_live_connections(side: Side, mut disturb: impl FnMut(&mut Kube, u32) -> Result<()>) {
    scenario(2, |lab| {
        let mut kube = Kube::start(lab, side)?;
        kube.client().make_room()?;
        kube.server().make_room()?;
        let server = kube.server().tool(&format!(
            "connections-serve --port {CONNECTIONS_PORT} --patience 15"
        ))?;
        let clients = live_ones(&kube)?;
        let stream = kube.stream(Via::Pod, "--direction both --pace 0.3")?;
        let wanted = u64::from(at_once()) / 2;
        let (mut met, mut rounds) = (Vec::new(), 0);
        while rounds < repetitions(6, 50) {
            rounds += 1;
            let young = wait::until("young connections live", Duration::from_secs(15), || {
                let young = live(&kube)?;
                Ok((young >= wanted).then_some(young))
            });
            let young = young.with_context(|| {
                format!(
                    "round {rounds}\n{}",
                    lab::paths::describe(kube.cluster.nodes().0)
                )
            })?;
            met.push(young);
            disturb(&mut kube, rounds)?;
        }
        let mut ended = 0;
        for client in clients {
            let report: ConnectionsReport = client.finish()?;
            report.check()?;
            ended += report.ended;
        }
        stream.finish()?.check(1_000_000)?;
        let served: ConnectionsReport = server.finish()?;
        ensure!(served.troubles() == 0, "{served:?}");
        met.sort_unstable();
        println!(
            "{side:?}: {rounds} rounds, each under {} to {} young connections ({} live); {ended} connections, none lost",
            met[0],
            met[met.len() - 1],
            at_once() * 3
        );
        // Those of the last second are handed over when their time has come. Conntrack takes the
        // ends of all for what they are: one that it doubted would stay for ten seconds.
        wait::until_true(
            "nothing is left in conntrack",
            Duration::from_secs(8),
            || Ok(left(&kube)?.is_empty()),
        )
        .with_context(|| {
            let left = left(&kube).unwrap_or_default();
            let some = &left[..left.len().min(10)];
            format!("{} are, as\n{}", left.len(), some.join("\n"))
        })
    });
}

#[test]
fn age_hands_over_what_lives() {
    under_live_connections(Side::Classes, |_, _| {
        pause(1.2);
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
    under_live_connections(side, |kube, _| {
        for mode in [Netlink, Ebpf] {
            let (a, b) = kube.cluster.nodes();
            a.request_mode(mode)?;
            b.request_mode(mode)?;
            pause(0.25);
        }
        Ok(())
    });
}

/// Ends the agent of one node by `end` and starts another one of `side`.
fn replace(
    kube: &mut Kube,
    index: usize,
    side: Side,
    end: impl FnOnce(Agent) -> Result<()>,
) -> Result<()> {
    let agent = kube.cluster.agents.remove(index);
    let node = agent.node().clone();
    end(agent)?;
    let mut agent = Agent::start(&node, &side.options())?;
    agent.wait_for_peers(1)?;
    kube.cluster.agents.insert(index, agent);
    Ok(())
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
        replace(kube, round as usize % 2, side, |agent| {
            agent.kill9()?;
            // Sometimes after the heartbeat has ended.
            pause(if round % 5 == 4 { 3.5 } else { 0.1 });
            Ok(())
        })
    });
}

#[test]
fn agents_that_restart_hand_over_what_lives() {
    under_live_connections(Side::Classes, |kube, round| {
        replace(kube, round as usize % 2, Side::Classes, |agent| {
            agent.terminate().map(drop)
        })
    });
}

#[test]
fn from_direct_to_learned_and_back_nothing_is_lost() {
    let mut sides = [Side::Direct; 2];
    under_live_connections(Side::Direct, move |kube, round| {
        let index = round as usize % 2;
        sides[index] = match sides[index] {
            Side::Direct => Side::Classes,
            _ => Side::Direct,
        };
        replace(kube, index, sides[index], |agent| {
            agent.terminate().map(drop)
        })
    });
}
