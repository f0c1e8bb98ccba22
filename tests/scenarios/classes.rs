//! Short connections through the programs with policies intact: what the stack has let pass a few
//! times opens without asking, for as long as nothing has changed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_user::datapath::ebpf::OwnState;
use lab::{
    conntrack,
    exchange::snmp,
    kube::{CONNECTIONS_PORT, Kube, Side, Via, learned, on, pause},
    node::Node,
    paths,
    pod::Pod,
    policy::{By, Policy},
    scenario::repetitions,
    task::Task,
    traffic::connections::{ConnectionsReport, Ending},
    wait,
};

/// A rule set's event is dealt with before the command that made it returns.
const AT_ONCE: Duration = Duration::ZERO;

/// How own connections fare on a node.
pub(super) fn own(node: &Node) -> Result<OwnState> {
    let own = node.status()?.bypass.and_then(|bypass| bypass.own);
    own.with_context(|| format!("{} has no own connections", node.name()))
}

pub(super) fn opened(node: &Node) -> Result<u64> {
    Ok(node.status()?.packets("own_opened"))
}

pub(super) fn serve(pod: &Pod) -> Result<Task> {
    pod.tool(&format!("connections-serve --port {CONNECTIONS_PORT}"))
}

/// A few connections, with little patience.
fn try_connections(kube: &Kube, from: &Pod, count: u32) -> Result<ConnectionsReport> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    from.tool(&format!(
        "connections --to {target} --ending {} --count {count} --at-once 4 --exchanges 1 --size 64 --patience 0.2",
        Ending::ClientFin.name()
    ))?
    .result()
}

/// Connections without end, dropped with the task.
fn rush(kube: &Kube) -> Result<Task> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    kube.client().tool(&format!(
        "connections --to {target} --ending {} --count 100000000 --at-once 4 --exchanges 1 --size 64 --patience 0.2",
        Ending::ClientFin.name()
    ))
}

/// Handshakes that a pod's servers have seen to their end.
pub(super) fn established(pod: &Pod) -> Result<u64> {
    let text = pod.namespace().read("/proc/thread-self/net/snmp")?;
    snmp(&text, "Tcp", "PassiveOpens").context("no PassiveOpens")
}

/// Waits until connections open without asking on both nodes.
pub(super) fn until_hot(kube: &Kube) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    let before = [opened(a)?, opened(b)?];
    wait::until_true("classes are in use", Duration::from_secs(5), || {
        Ok(opened(a)? > before[0] + 50 && opened(b)? > before[1] + 50)
    })
    .with_context(|| {
        format!(
            "{}\n{}\n{:?}",
            paths::describe(a),
            paths::describe(b),
            own(a)
        )
    })
}

#[test]
fn short_connections_open_by_class_and_leave_nothing_behind() {
    on(Side::Classes, |kube| {
        let (a, b) = kube.cluster.nodes();
        let count = u64::from(repetitions(1500, 100_000));
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
        wait::until_true("the own tables are empty", Duration::from_secs(15), || {
            let (one, other) = (own(a)?, own(b)?);
            Ok(one.live + one.closed + other.live + other.closed == 0)
        })?;
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
    let (client, server) = (kube.client().address(), kube.server().address());
    let places = [
        (a, client, server),
        (b, client, server),
        (a, server, client),
        (b, server, client),
    ];
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
            policy.allow()?;
            let allowed = Instant::now();
            until_hot(kube)?;
            let back = allowed.elapsed();
            ensure!(back < Duration::from_secs(3), "fast again after {back:?}");
            drop((load, server));
        }
        if by == By::Ipset {
            // Its place is prepared once a node.
            break;
        }
        if by == By::Nft {
            node.namespace()
                .run(&["nft", "delete", "table", "ip", "lab-policy"])?;
        }
    }
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
    on(Side::Classes, |kube| {
        deny(kube, By::Ipset, Duration::from_millis(1300))
    });
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
fn rules_that_no_class_can_stand_for_switch_classes_off() {
    on(Side::Classes, |kube| {
        let (a, _) = kube.cluster.nodes();
        let server = serve(kube.server())?;
        let load = rush(kube)?;
        let run = |words: &str| -> Result<()> {
            let argv: Vec<&str> = words.split_whitespace().collect();
            a.namespace().run(&argv).map(drop)
        };
        let port = CONNECTIONS_PORT;
        for (what, rule) in [
            ("spt", "-p tcp --sport 1:1000 -j DROP".to_owned()),
            (
                "limit",
                format!("-p tcp --dport {port} -m limit --limit 9000/s -j ACCEPT"),
            ),
            (
                "connlimit",
                "-p tcp -m connlimit --connlimit-above 100000 -j DROP".to_owned(),
            ),
            (
                "statistic",
                "-p tcp -m statistic --mode random --probability 0.000001 -j DROP".to_owned(),
            ),
        ] {
            until_hot(kube)?;
            run(&format!("iptables -I FORWARD {rule}"))?;
            let ruled = Instant::now();
            wait::until_true("classes are off", Duration::from_secs(1), || {
                Ok(own(a)?.paused.is_some())
            })?;
            let took = ruled.elapsed();
            let reason = own(a)?.paused.unwrap_or_default();
            println!("{what}: off after {took:?}: {reason}");
            ensure!(took < Duration::from_millis(600), "{what}: {took:?}");
            let before = opened(a)?;
            pause(0.3);
            ensure!(
                opened(a)? == before,
                "{what}: connections still open by class"
            );
            run(&format!("iptables -D FORWARD {rule}"))?;
        }
        until_hot(kube)?;
        drop((load, server));
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
