//! However connections end, sockets and connection tracking end as on the kernel path.

use anyhow::{Context, Result, ensure};
use lab::{
    closing::{Left, REMEMBERED, SETTLED, check_doubts, in_every_orderly_way, keep_resets},
    conntrack::{self, Census, check_alike},
    kube::{CONNECTIONS_PORT, Kube, Via, compare, learned, pause},
    scenario::repetitions,
    traffic::connections::{ConnectionsReport, Ending},
};

/// Source ports of the connections. Each is used once: conntrack keeps one entry per port, and
/// how often the kernel chooses a port again is chance.
const FIRST_PORT: u64 = 20_000;

/// Every ending that the client brings about, then clients that vanish.
fn close_in_every_way(kube: &Kube, via: Via) -> Result<Left> {
    keep_resets(kube, REMEMBERED)?;
    let count = u64::from(repetitions(1050, 10_000)) / 7;
    let ports = |ending| format!("--first-port {}", FIRST_PORT + ending as u64 * count);
    let before = kube.taken()?;
    let what = format!("{:?} {via:?}", kube.side());
    let troubles = in_every_orderly_way(&what, |ending| {
        let arguments = format!(
            "--count {count} --at-once 16 --exchanges 24 --size 512 {}",
            ports(ending)
        );
        kube.connections(via, ending, &arguments)
    })?;
    // Short as they are, each is bypassed for a while: else nothing is tested.
    kube.expect_bypassed(&before, 0.2)?;
    vanish(kube, via, count, &ports(Ending::Silent))?;
    pause(f64::from(repetitions(0, 10)) + SETTLED);
    check_doubts(kube)?;
    Left::now(kube, troubles)
}

/// Clients fall silent for ever: their pod loses its link before they are killed.
fn vanish(kube: &Kube, via: Via, count: u64, ports: &str) -> Result<()> {
    let server = kube.server().tool(&format!(
        "connections-serve --port {CONNECTIONS_PORT} --patience 2"
    ))?;
    let target = kube.target(via, CONNECTIONS_PORT);
    let mut client = kube.client().tool(&format!(
        "connections --to {target} --ending {} --count {count} {ports}",
        Ending::Silent.name()
    ))?;
    let report: ConnectionsReport = client.next_report()?;
    report.check()?;
    // Acknowledgements may wait for 40 ms; with data outstanding no FIN would follow.
    pause(0.3);
    kube.client().namespace().ip("link set eth0 down")?;
    drop(client);
    let served: ConnectionsReport = server.finish()?;
    ensure!(served.ended == count, "{served:?}");
    Ok(())
}

fn check(reference: &Left, found: &Left) -> Result<()> {
    found.check_pods(reference)?;
    for (index, name) in ["first", "second"].into_iter().enumerate() {
        let of = |what: &str| format!("{what} of the {name} node");
        println!(
            "{name}: {:?}\n   and {:?}\n   sockets {:?}\n   and {:?}; {:?} and {:?}",
            reference.entries[index],
            found.entries[index],
            reference.sockets[index],
            found.sockets[index],
            reference.refusals[index],
            found.refusals[index]
        );
        let mut tcp = [reference, found].map(|left| only_tcp(&left.entries[index]));
        let doubted = tcp.each_mut().map(forget_doubts);
        let resets = tcp[0].get("tcp CLOSE").copied().unwrap_or(0);
        // Here nearly one flow in ten finds its place among the candidates taken.
        ensure!(
            doubted[1] <= doubted[0] + resets / 8,
            "{}: {} of {resets} resets are doubted: {found:?}",
            of("entries"),
            doubted[1]
        );
        check_alike(&of("entries"), &tcp[0], &tcp[1], 2)?;
        let (one, other) = (
            reference.refusals[index].invalid,
            found.refusals[index].invalid,
        );
        ensure!(
            other <= one + (one / 100).max(2),
            "{}: {other} instead of {one}",
            of("invalid packets")
        );
    }
    Ok(())
}

/// Pings and the agents' own traffic come and go.
fn only_tcp(census: &Census) -> Census {
    let rows = census.iter().filter(|(kind, _)| kind.starts_with("tcp"));
    rows.map(|(kind, count)| (kind.clone(), *count)).collect()
}

/// Takes connections that were reset and that conntrack forgets as soon as others, but under their last
/// state, for what they are; says how many there were. One direction may be learned long before the
/// other, and of a RST of that other one the programs cannot always tell whether it is genuine.
fn forget_doubts(census: &mut Census) -> u64 {
    let doubted = census.remove("tcp ESTABLISHED").unwrap_or(0);
    *census.entry("tcp CLOSE".to_owned()).or_default() += doubted;
    doubted
}

fn closed_through(via: Via) {
    let left = compare(|kube| close_in_every_way(kube, via));
    check(&left.netlink, &left.learned).unwrap_or_else(|error| panic!("{error:?}"));
}

#[test]
fn every_ending_between_pods_leaves_what_the_kernel_path_leaves() {
    closed_through(Via::Pod);
}

#[test]
fn every_ending_through_a_service_leaves_what_the_kernel_path_leaves() {
    closed_through(Via::Service);
}

#[test]
fn a_reset_after_three_gigabytes_ends_the_entry() {
    // More than half of the sequence space: only with tcp_ignore_invalid_rst is it believed.
    let left = |kube: &Kube| {
        keep_resets(kube, REMEMBERED)?;
        let before = kube.taken()?;
        let (client, server) = kube.connections(
            Via::Service,
            Ending::ClientRst,
            "--count 1 --exchanges 1 --size 3100000000 --response 64 --patience 60",
        )?;
        client.check()?;
        server.check().context("the reset did not arrive")?;
        kube.expect_bypassed(&before, 0.9)?;
        pause(SETTLED);
        let (a, b) = kube.cluster.nodes();
        let states = |census: Census| {
            ["ESTABLISHED", "CLOSE"]
                .map(|state| census.get(&format!("tcp {state}")).copied().unwrap_or(0))
        };
        Ok([
            states(conntrack::census(a.namespace())?),
            states(conntrack::census(b.namespace())?),
        ])
    };
    if repetitions(0, 1) == 1 {
        let states = compare(left);
        assert_eq!(
            states.learned, states.netlink,
            "entries ESTABLISHED and CLOSE, on each node"
        );
    } else {
        // What the kernel path leaves is known.
        learned(|kube| {
            let states = left(kube)?;
            ensure!(
                states == [[0, 1]; 2],
                "entries ESTABLISHED and CLOSE, on each node: {states:?}"
            );
            Ok(())
        });
    }
}
