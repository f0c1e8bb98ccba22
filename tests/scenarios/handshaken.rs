//! Short connections through a Service. Only the kernel can say whom one reaches, so it sees
//! their handshakes and ends; what is in between the programs carry.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    classes::{established, own, poll_status, serve, until_own_tables_are_empty},
    closing::{Left, REMEMBERED, SETTLED, in_every_orderly_way, keep_resets},
    conntrack::{self, Census, check_alike},
    kube::{CONNECTIONS_PORT, Kube, Side, Via, on, pause},
    paths::{self, Way},
    scenario::repetitions,
    traffic::connections::Ending,
};

/// Requests of each connection, too few to be learned by packets in a row.
const EXCHANGES: u64 = 3;
/// Packets of one direction that the stack has to have: SYN or its answer, the last of the
/// handshake, FIN and the last acknowledgement, and one to spare.
const OF_THE_STACK: u64 = 5;

fn short(kube: &Kube, ending: Ending, count: u64) -> Result<()> {
    let (client, server) = kube.connections(
        Via::Service,
        ending,
        &format!("--count {count} --at-once 4 --exchanges {EXCHANGES} --size 64"),
    )?;
    ensure!(
        client.troubles() + server.troubles() == 0,
        "{client:?} {server:?}"
    );
    Ok(())
}

/// Demands that the programs of the client's node carry all but handshakes and ends.
fn carried_between(kube: &Kube) -> Result<()> {
    let (a, _) = kube.cluster.nodes();
    let count = u64::from(repetitions(500, 20_000));
    for ending in [Ending::ClientFin, Ending::ServerFin, Ending::ClientRst] {
        let before = kube.taken()?[0];
        short(kube, ending, count)?;
        let taken = kube.taken()?[0].since(before);
        for way in [Way::Out, Way::In] {
            let (programs, tunnel) = taken.on(way);
            println!(
                "{:?} {ending:?} {way:?}: of each connection {:.2} packets by the programs, {:.2} by the stack",
                kube.side(),
                programs as f64 / count as f64,
                tunnel as f64 / count as f64
            );
            ensure!(
                programs >= count * EXCHANGES * 9 / 10 && tunnel <= count * OF_THE_STACK,
                "{way:?}: {programs} by the programs, {tunnel} by the stack\n{}",
                paths::describe(a)
            );
        }
    }
    Ok(())
}

#[test]
fn the_stack_sees_handshakes_and_ends_and_no_more() {
    on(Side::Classes, carried_between);
}

#[test]
fn so_it_does_where_all_else_bypasses_from_the_syn_on() {
    on(Side::Direct, carried_between);
}

/// What connections that end in every way leave on the client's node.
fn closed(kube: &Kube) -> Result<Left> {
    keep_resets(kube, REMEMBERED)?;
    let count = u64::from(repetitions(150, 3_000));
    let what = format!("{:?}", kube.side());
    let troubles = in_every_orderly_way(&what, |ending| {
        // Ports of their own: how often the kernel takes one again is chance.
        let first = 20_000 + ending as u64 * count;
        kube.connections(
            Via::Service,
            ending,
            &format!(
                "--count {count} --at-once 8 --exchanges {EXCHANGES} --size 512 --first-port {first}"
            ),
        )
    })?;
    let (a, b) = kube.cluster.nodes();
    if kube.is_bypassing() {
        until_own_tables_are_empty([a, b])?;
        println!("{:?}", own(a)?);
    }
    pause(SETTLED);
    Left::now(kube, troubles)
}

#[test]
fn conntrack_ends_as_on_the_kernel_path() {
    let reference = on(Side::Netlink, closed);
    let found = on(Side::Classes, closed);
    let tcp = |census: &Census| -> Census {
        let rows = census.iter().filter(|(kind, _)| kind.starts_with("tcp"));
        rows.map(|(kind, count)| (kind.clone(), *count)).collect()
    };
    println!("{:?}\n{:?}", reference.entries, found.entries);
    found
        .check_pods(&reference)
        .and_then(|()| {
            // The server's node has own connections, which leave nothing.
            check_alike(
                "entries of the client's node",
                &tcp(&reference.entries[0]),
                &tcp(&found.entries[0]),
                2,
            )
        })
        .unwrap_or_else(|error| panic!("{error:?}"));
}

#[test]
fn a_rule_that_depends_on_more_sees_every_packet() {
    on(Side::Classes, |kube| {
        let (a, _) = kube.cluster.nodes();
        let count = u64::from(repetitions(100, 2_000));
        a.namespace().run(&[
            "iptables",
            "-I",
            "FORWARD",
            "-p",
            "tcp",
            "-m",
            "quota",
            "--quota",
            "999999999",
        ])?;
        poll_status(a, Duration::from_secs(2), |status| {
            let own = status.bypass.as_ref()?.own.as_ref()?;
            own.paused.is_some().then_some(())
        })?;
        let before = kube.taken()?[0];
        short(kube, Ending::ClientFin, count)?;
        let taken = kube.taken()?[0].since(before);
        let (out, _) = taken.on(Way::Out);
        let (inward, _) = taken.on(Way::In);
        ensure!(
            out + inward == 0,
            "{out} and {inward} packets passed by the rule\n{}",
            paths::describe(a)
        );
        Ok(())
    });
}

/// Denies what comes after the SYN and its answer, in either direction, on the client's node.
#[test]
fn a_handshake_that_does_not_end_teaches_nothing() {
    on(Side::Classes, |kube| {
        let (a, _) = kube.cluster.nodes();
        let (client, server) = (
            kube.client().address().to_string(),
            kube.server().address().to_string(),
        );
        a.namespace().run(&[
            "iptables",
            "-I",
            "FORWARD",
            "-s",
            &client,
            "-d",
            &server,
            "-p",
            "tcp",
            "--tcp-flags",
            "SYN,ACK",
            "ACK",
            "-j",
            "DROP",
        ])?;
        pause(0.5);
        let (taken, accepted) = (kube.taken()?[0], established(kube.server())?);
        let target = kube.target(Via::Service, CONNECTIONS_PORT);
        let server = serve(kube.server())?;
        let client: lab::traffic::connections::ConnectionsReport = kube
            .client()
            .tool(&format!(
                "connections --to {target} --ending {} --count 40 --at-once 8 --exchanges 2 --size 64 --patience 0.5",
                Ending::ClientFin.name()
            ))?
            .result()?;
        drop(server);
        // The client believes in its connections: the answer to its SYN came. Nobody else does.
        ensure!(client.ended == 0 && client.begun == 40, "{client:?}");
        let after = established(kube.server())?;
        ensure!(after == accepted, "{} were accepted", after - accepted);
        let (out, _) = kube.taken()?[0].since(taken).on(Way::Out);
        ensure!(out == 0, "{out} packets bypassed\n{}", paths::describe(a));
        println!("{:?}", conntrack::census(a.namespace())?);
        Ok(())
    });
}
