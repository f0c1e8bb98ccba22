//! What an operator changes in the node's rules holds for live, bypassed flows.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    classes::serve,
    exchange::RunningPing,
    kube::{self, CONNECTIONS_PORT, Kube, SERVICE, Via, compare, learned, pause},
    node::Node,
    pod::Pod,
    policy::{By, Policy},
    scenario::scenario,
    traffic::{
        connections::{ConnectionsReport, Ending},
        request_response::Protocol,
    },
    wait,
};

/// Time for a change that the agent is told of.
const WITH_EVENT: Duration = Duration::from_millis(100);
/// Time for a change that nobody is told of: the validity, and the way of one packet.
const WITHOUT_EVENT: Duration = Duration::from_millis(2100);
/// How long it is watched that nothing comes any more.
const WATCHED: Duration = Duration::from_millis(600);

/// Packets that have reached the pod, by whichever path.
fn arrived(pod: &Pod) -> Result<u64> {
    let path = "/proc/thread-self/net/dev";
    let text = pod.namespace().read(path)?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"));
    let received = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(received.context("no eth0 in the pod")?.parse()?)
}

/// Waits until a flow has been bypassed for a while.
fn until_bypassed(kube: &Kube) -> Result<()> {
    pause(0.7);
    let before = kube.taken()?;
    pause(0.3);
    kube.expect_bypassed(&before, 0.5)
}

/// Both kinds of live flow are stopped, stay so, and come back.
fn deny_and_allow(kube: &Kube, node: &Node, by: By, via: Via) -> Result<()> {
    let policy = Policy::prepare(node, by, kube.client().address(), kube.server().address())?;
    let ping = kube.ping(via, "--rate 2000")?;
    let stream = kube.stream(via, "--direction up --pace 0.5")?;
    until_bypassed(kube)?;
    policy.deny()?;
    let denied = Instant::now();
    let limit = if by.is_silent() {
        WITHOUT_EVENT
    } else {
        WITH_EVENT
    };
    std::thread::sleep(limit.saturating_sub(denied.elapsed()));
    let before = arrived(kube.server())?;
    std::thread::sleep(WATCHED);
    let after = arrived(kube.server())?;
    ensure!(
        // A neighbour may be asked for.
        after - before <= 3,
        "{} packets arrived later than {limit:?} after the denial\n{}\n{}",
        after - before,
        lab::paths::describe(kube.client().node()),
        lab::paths::describe(kube.server().node())
    );
    policy.allow()?;
    let allowed = Instant::now();
    wait::until_true("packets arrive again", Duration::from_secs(1), || {
        Ok(arrived(kube.server())? > after + 20)
    })?;
    println!(
        "{:?} {by:?} {via:?} on {}: back after {:?}",
        kube.side(),
        node.name(),
        allowed.elapsed()
    );
    // TCP has to wait for its own timer.
    pause(if by.is_silent() { 4.0 } else { 1.5 });
    let before = kube.taken()?;
    pause(0.5);
    kube.expect_bypassed(&before, 0.8)
        .context("after the denial has gone")?;
    stream.finish()?.check(1_000_000)?;
    let (report, _) = ping.finish()?;
    ensure!(report.lost > 0 && report.duplicated == 0, "{report:?}");
    Ok(())
}

fn every_way(by: By) {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        // At the sender's node and at the receiver's.
        deny_and_allow(kube, a, by, Via::Pod)?;
        deny_and_allow(kube, b, by, Via::Service)
    });
}

#[test]
fn a_denial_by_nft_holds_within_100_ms() {
    every_way(By::Nft);
}

#[test]
fn a_denial_by_iptables_holds_within_100_ms() {
    every_way(By::Iptables);
}

#[test]
fn a_denial_by_ipset_holds_within_the_validity() {
    every_way(By::Ipset);
}

#[test]
fn the_kernel_path_denies_as_expected() {
    // The measure itself, where nothing can be bypassed.
    scenario(2, |lab| {
        let kube = Kube::start(lab, kube::Side::Netlink)?;
        let (a, _) = kube.cluster.nodes();
        deny_and_allow(&kube, a, By::Nft, Via::Service)
    });
}

#[test]
fn a_changed_endpoint_takes_new_connections_at_once() {
    let moved = compare(|kube| {
        let (a, b) = kube.cluster.nodes();
        let other = b.add_pod()?;
        lab::cluster::introduce(&other)?;
        let (old, new) = (serve(kube.server())?, serve(&other)?);
        let run = || -> Result<ConnectionsReport> {
            let target = kube.target(Via::Service, CONNECTIONS_PORT);
            kube.client()
                .tool(&format!(
                    "connections --to {target} --ending {} --count 100 --exchanges 10",
                    Ending::ClientFin.name()
                ))?
                .result()
        };
        // A long flow of the same Service is bypassed meanwhile.
        let ping = kube.ping(Via::Service, "--rate 500")?;
        pause(0.5);
        let first = run()?;
        kube::with_endpoint(kube.rules.clone(), &other).apply_to(&[a, b])?;
        let second = run()?;
        let (old, new): (ConnectionsReport, ConnectionsReport) = (old.finish()?, new.finish()?);
        ensure!(
            old.begun == 100 && new.begun == 100,
            "{} went to the old endpoint, {} to the new one",
            old.begun,
            new.begun
        );
        let (ping, _) = ping.finish()?;
        Ok((first.troubles() + second.troubles(), ping.lost))
    });
    assert!(
        moved.learned <= moved.netlink,
        "(troubles, lost) {:?} instead of {:?}",
        moved.learned,
        moved.netlink
    );
}

#[test]
fn a_deleted_service_leaves_live_flows_as_the_kernel_does() {
    let alive = compare(|kube| {
        let (a, b) = kube.cluster.nodes();
        let ping = kube.ping(Via::Service, "--rate 500")?;
        let stream = kube.stream(Via::Service, "--direction both --pace 0.2")?;
        pause(1.0);
        let mut rules = kube.rules.clone();
        for port in [lab::exchange::STREAM_PORT, CONNECTIONS_PORT] {
            rules = rules.without_service(SERVICE, port, Protocol::Tcp);
        }
        rules
            .without_service(SERVICE, lab::exchange::ECHO_PORT, Protocol::Udp)
            .apply_to(&[a, b])?;
        pause(3.0);
        let lost = finish(ping)?;
        let bytes = stream
            .finish()
            .and_then(|stream| stream.check(1_000_000))
            .is_ok();
        let target = kube.target(Via::Service, CONNECTIONS_PORT);
        let refused: ConnectionsReport = kube
            .client()
            .tool(&format!(
                "connections --to {target} --ending {} --count 3 --patience 0.5",
                Ending::ClientFin.name()
            ))?
            .result()?;
        Ok((lost, bytes, refused.established))
    });
    assert_eq!(
        alive.learned, alive.netlink,
        "(lost, stream alive, new ones)"
    );
}

fn finish(ping: RunningPing) -> Result<u64> {
    Ok(ping.finish()?.0.lost)
}
