//! Whom a policy denies gains nothing from a pod that it lets through: not beside it, not with its
//! address, not after it.
//!
//! SYNs are counted where they would arrive, in the server's pod: more than connections, which need
//! answers that nobody gives to a hand-made SYN.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    classes::{opened, serve},
    cluster::introduce,
    kube::{CONNECTIONS_PORT, Kube, Side, on, pause},
    node::Node,
    paths,
    pod::Pod,
    policy::{By, Policy},
    scenario::repetitions,
    task::Task,
    traffic::segments::{FLOOD_PORTS, SegmentsReport},
    wait,
};

use super::classes_flood::rush;

const SYN: u8 = 2;
const PER_SECOND: u32 = 20_000;
/// Last byte of the address that is given away again.
const AGAIN: u8 = 200;
/// How long a change of an ipset may take to be noticed.
const WITHOUT_EVENT: Duration = Duration::from_millis(1300);

fn count() -> u32 {
    repetitions(10_000, 100_000)
}

/// Counts hand-made SYNs in the server's pod: none else comes from these ports.
fn watch(kube: &Kube) -> Result<()> {
    let (first, last) = (FLOOD_PORTS.start, FLOOD_PORTS.end - 1);
    kube.server()
        .namespace()
        .run_with_input(
            &["nft", "-f", "-"],
            &format!(
                "table ip lab-watch {{ counter syns {{ }}; chain in {{ type filter hook prerouting priority -300; tcp sport {first}-{last} tcp flags & (syn | ack) == syn counter name syns; }}; }}\n"
            ),
        )
        .map(drop)
}

fn arrived(kube: &Kube) -> Result<u64> {
    let argv = ["nft", "list", "counter", "ip", "lab-watch", "syns"];
    let text = kube.server().namespace().run(&argv)?;
    let packets = text
        .split_whitespace()
        .skip_while(|word| *word != "packets")
        .nth(1)
        .context("no counter")?;
    Ok(packets.parse()?)
}

/// `count` SYNs from within `pod` that say they were `source`'s.
fn syns(kube: &Kube, pod: &Pod, source: &Pod, count: u32) -> Result<Task> {
    pod.tool(&format!(
        "segments --from {}:0 --to {} --flags {SYN} --count {count} --rate {PER_SECOND}",
        source.address(),
        kube.server().at(CONNECTIONS_PORT)
    ))
}

/// Connections of `pod`; on the side of classes they bypass when this returns.
fn busy(kube: &Kube, pod: &Pod) -> Result<Task> {
    let load = rush(pod, kube.server(), "")?;
    still_hot(kube)?;
    Ok(load)
}

fn still_hot(kube: &Kube) -> Result<()> {
    if kube.side() != Side::Classes {
        pause(0.2);
        return Ok(());
    }
    let (a, b) = kube.cluster.nodes();
    let before = [opened(a)?, opened(b)?];
    wait::until_true("classes are in use", Duration::from_secs(5), || {
        Ok(opened(a)? > before[0] + 50 && opened(b)? > before[1] + 50)
    })
    .with_context(|| paths::describe(a))
}

fn iptables(node: &Node, words: &str) -> Result<()> {
    let argv: Vec<&str> = std::iter::once("iptables")
        .chain(words.split_whitespace())
        .collect();
    node.namespace().run(&argv).map(drop)
}

fn denied_beside_an_allowed_one(kube: &Kube) -> Result<()> {
    watch(kube)?;
    let (a, b) = kube.cluster.nodes();
    let denied = a.add_pod()?;
    introduce(&denied)?;
    let server = serve(kube.server())?;
    let own_address = format!("FORWARD -s {} -j DROP", denied.address());
    // A source address says nothing of who sends: such policies go by the interface.
    let own_port = format!(
        "FORWARD -m physdev --physdev-in {} -j DROP",
        denied.interface()
    );
    for (what, node, rule, source) in [
        ("on its own node", a, &own_address, &denied),
        ("on the server's", b, &own_address, &denied),
        ("with the first pod's address", a, &own_port, kube.client()),
    ] {
        iptables(node, &format!("-I {rule}"))?;
        let load = busy(kube, kube.client())?;
        let before = arrived(kube)?;
        let sent: SegmentsReport = syns(kube, &denied, source, count())?.result()?;
        still_hot(kube)?;
        let arrived = arrived(kube)? - before;
        println!(
            "{:?} denied {what}: {arrived} of {} SYNs arrived",
            kube.side(),
            sent.sent
        );
        ensure!(
            arrived == 0 && sent.sent >= u64::from(count()) * 9 / 10,
            "{what}: {arrived} of {}\n{}",
            sent.sent,
            paths::describe(node)
        );
        drop(load);
        iptables(node, &format!("-D {rule}"))?;
    }
    // Allowed, the same SYNs arrive: else nothing was tested.
    let load = busy(kube, kube.client())?;
    let before = arrived(kube)?;
    let sent: SegmentsReport = syns(kube, &denied, &denied, 2000)?.result()?;
    let arrived = arrived(kube)? - before;
    ensure!(arrived * 10 > sent.sent * 9, "{arrived} of {}", sent.sent);
    drop((load, server));
    Ok(())
}

#[test]
fn no_syn_of_a_denied_pod_arrives_beside_an_allowed_one() {
    for side in [Side::Netlink, Side::Classes] {
        on(side, denied_beside_an_allowed_one);
    }
}

/// The first pod goes, and its address belongs at once to one that policy denies.
fn address_again(kube: &Kube, by: By) -> Result<()> {
    watch(kube)?;
    let (a, b) = kube.cluster.nodes();
    let server = serve(kube.server())?;
    for node in [a, b] {
        let first = a.add_pod_numbered(AGAIN)?;
        introduce(&first)?;
        let policy = Policy::prepare(node, by, first.address(), kube.server().address())?;
        drop(busy(kube, &first)?);
        drop(first);
        policy.deny()?;
        let second = a.add_pod_numbered(AGAIN)?;
        let begun = Instant::now();
        let task = syns(kube, &second, &second, count() + 2 * PER_SECOND)?;
        if by == By::Ipset {
            std::thread::sleep(WITHOUT_EVENT.saturating_sub(begun.elapsed()));
        }
        let before = arrived(kube)?;
        let sent: SegmentsReport = task.result()?;
        let arrived = arrived(kube)?;
        println!(
            "{:?} {by:?} on {}: {} of {} SYNs arrived, {before} of them in the first {:.1} s",
            kube.side(),
            node.name(),
            arrived,
            sent.sent,
            WITHOUT_EVENT.as_secs_f64()
        );
        let allowed = if by == By::Ipset { before } else { 0 };
        ensure!(arrived == allowed, "{arrived}\n{}", paths::describe(node));
        policy.allow()?;
        // What was denied is let through again.
        let load = busy(kube, &second)?;
        drop(load);
        drop(second);
    }
    drop(server);
    Ok(())
}

#[test]
fn no_syn_arrives_with_the_address_of_a_pod_that_is_gone() {
    for side in [Side::Netlink, Side::Classes] {
        on(side, |kube| address_again(kube, By::Nft));
    }
}

#[test]
fn no_syn_arrives_with_that_address_where_an_ipset_denies() {
    for side in [Side::Netlink, Side::Classes] {
        on(side, |kube| address_again(kube, By::Ipset));
    }
}
