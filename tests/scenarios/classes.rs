//! Short connections through the programs with policies intact: what the stack has let pass a few
//! times opens without asking, for as long as nothing has changed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::{
    classes::{
        established, opened, own, poll_status, rush, serve, until_hot, until_own_tables_are_empty,
    },
    conntrack,
    kube::{CONNECTIONS_PORT, Kube, Side, Via, learned, on, pause},
    paths,
    pod::Pod,
    policy::{By, Policy},
    scenario::repetitions,
    traffic::connections::{ConnectionsReport, Ending},
};

/// A rule set's event is dealt with before the command that made it returns.
const AT_ONCE: Duration = Duration::ZERO;
/// Nobody tells of the change: a class asks each second, and waits 250 ms for the answer.
const BY_ASKING: Duration = Duration::from_millis(1300);
/// Fast again after a rule that allows.
const AGAIN: Duration = Duration::from_secs(2);
/// The longest that is waited for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A few connections, with little patience.
fn try_connections(kube: &Kube, from: &Pod, count: u32) -> Result<ConnectionsReport> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    from.tool(&format!(
        "connections --to {target} --ending {} --count {count} --at-once 4 --exchanges 1 --size 64 --patience 0.2",
        Ending::ClientFin.name()
    ))?
    .result()
}

#[test]
fn short_connections_open_by_class_and_leave_nothing_behind() {
    on(Side::Classes, |kube| {
        let (a, b) = kube.cluster.nodes();
        let count = u64::from(repetitions(1500, 100_000));
        // A long loop leaves its ports in TIME_WAIT.
        kube.client().make_room()?;
        kube.server().make_room()?;
        for via in Via::BOTH {
            for ending in [Ending::ClientFin, Ending::ServerFin, Ending::HalfClose] {
                let before = opened(b)?;
                let (client, server) = kube.connections(
                    via,
                    ending,
                    &format!("--count {count} --at-once 8 --exchanges 2 --size 64"),
                )?;
                ensure!(
                    client.troubles() + server.troubles() + client.corrupt + server.corrupt == 0,
                    "{client:?} {server:?}"
                );
                let opened = opened(b)? - before;
                println!(
                    "{via:?} {ending:?}: {:.0}/s, {opened} opened by class on the server's node",
                    client.established as f64 / client.seconds
                );
                ensure!(opened > count / 2, "{}", paths::describe(b));
            }
        }
        until_own_tables_are_empty([a, b])?;
        for node in [a, b] {
            let census = conntrack::census(node.namespace())?;
            println!("{}: {census:?} {:?}", node.name(), own(node)?);
            let live = census.get("tcp ESTABLISHED").copied().unwrap_or(0);
            ensure!(live == 0, "{census:?}");
        }
        Ok(())
    });
}

/// Denies under full rate, on either node and in either direction.
fn deny(kube: &Kube, by: By, within: Duration) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    kube.client().make_room()?;
    let (client, server) = (kube.client().address(), kube.server().address());
    let places = [
        (a, client, server),
        (b, client, server),
        (a, server, client),
        (b, server, client),
    ];
    let mut slowest = Duration::ZERO;
    for (node, from, to) in places {
        let policy = Policy::prepare(node, by, from, to)?;
        for round in 0..repetitions(2, 20) {
            let server = serve(kube.server())?;
            let load = rush(kube)?;
            until_hot(kube)?;
            policy.deny()?;
            std::thread::sleep(within);
            let before = established(kube.server())?;
            pause(0.4);
            let after = established(kube.server())?;
            ensure!(
                before == after,
                "{by:?} on {}, round {round}: {} connections after the denial\n{}",
                node.name(),
                after - before,
                paths::describe(node)
            );
            let before = [opened(a)?, opened(b)?];
            policy.allow()?;
            let allowed = Instant::now();
            for (node, before) in [a, b].into_iter().zip(before) {
                poll_status(node, PATIENCE, |status| {
                    (status.packets("own_opened") > before + 3).then_some(())
                })?;
            }
            let back = allowed.elapsed();
            slowest = slowest.max(back);
            ensure!(
                back < AGAIN,
                "{by:?} on {}, round {round}: fast again after {back:?}\n{}",
                node.name(),
                paths::describe(node)
            );
            drop((load, server));
        }
        if by == By::Nft {
            node.namespace()
                .run(&["nft", "delete", "table", "ip", "lab-policy"])?;
        }
    }
    println!("{by:?}: fast again after {slowest:?} at most");
    Ok(())
}

#[test]
fn a_denial_by_nft_holds_at_once() {
    on(Side::Classes, |kube| deny(kube, By::Nft, AT_ONCE));
}

#[test]
fn a_denial_by_iptables_holds_at_once() {
    on(Side::Classes, |kube| deny(kube, By::Iptables, AT_ONCE));
}

#[test]
fn a_denial_by_ipset_holds_when_the_next_syn_has_asked() {
    on(Side::Classes, |kube| deny(kube, By::Ipset, BY_ASKING));
}

#[test]
fn a_denial_by_legacy_iptables_holds_when_the_next_syn_has_asked() {
    on(Side::Classes, |kube| deny(kube, By::Legacy, BY_ASKING));
}

#[test]
fn a_denied_pod_never_gets_in() {
    on(Side::Classes, |kube| {
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            let denied = a.add_pod()?;
            lab::cluster::introduce(&denied)?;
            let rule = format!("iptables -I FORWARD -s {} -j DROP", denied.address());
            let argv: Vec<&str> = rule.split_whitespace().collect();
            node.namespace().run(&argv)?;
            let server = serve(kube.server())?;
            let load = rush(kube)?;
            until_hot(kube)?;
            let report = try_connections(kube, &denied, repetitions(60, 2000))?;
            ensure!(
                report.established == 0,
                "denied on {}: {report:?}",
                node.name()
            );
            until_hot(kube)?;
            drop((load, server));
        }
        Ok(())
    });
}

#[test]
fn classes_can_be_switched_off() {
    learned(|kube| {
        let (client, server) = kube.connections(
            Via::Pod,
            Ending::ClientFin,
            "--count 300 --exchanges 2 --size 64",
        )?;
        ensure!(
            client.troubles() + server.troubles() == 0,
            "{client:?} {server:?}"
        );
        let (a, b) = kube.cluster.nodes();
        ensure!(opened(a)? + opened(b)? == 0, "{}", paths::describe(a));
        Ok(())
    });
}
