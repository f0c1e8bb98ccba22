//! `--fast-path direct`: TCP between pods bypasses the stack from its SYN on, and whatever lives
//! on or comes back is in connection tracking as if it had been there all along.

use anyhow::{Result, ensure};
use flannel_user::observe::status::BypassStatus;
use lab::{
    conntrack::{self, Census, check_alike},
    kube::{Kube, Side, Via, on, pause},
    node::Node,
    scenario::repetitions,
    traffic::connections::Ending,
    wait,
};

/// How own connections fare on a node.
fn own(node: &Node) -> Result<flannel_user::datapath::ebpf::OwnState> {
    let bypass: Option<BypassStatus> = node.status()?.bypass;
    let own = bypass.and_then(|bypass| bypass.own);
    own.ok_or_else(|| anyhow::anyhow!("{} has no own connections", node.name()))
}

/// What is left when all connections are over.
#[derive(Debug)]
struct Left {
    troubles: u64,
    entries: [Census; 2],
    sockets: [Census; 2],
}

/// Connections that end in every way.
fn close_in_every_way(kube: &Kube, via: Via) -> Result<Left> {
    let count = u64::from(repetitions(600, 10_000));
    let arguments = format!("--count {count} --at-once 16 --exchanges 4 --size 512");
    let (a, b) = kube.cluster.nodes();
    let mut troubles = 0;
    for ending in Ending::ORDERLY {
        let (client, server) = kube.connections(via, ending, &arguments)?;
        println!(
            "{:?} {via:?} {ending:?}: {:.0}/s, client {} as meant, {} not; server {}, {}",
            kube.side(),
            client.established as f64 / client.seconds,
            client.ended,
            client.troubles(),
            server.ended,
            server.troubles()
        );
        ensure!(
            client.corrupt + server.corrupt == 0,
            "{client:?} {server:?}"
        );
        troubles += client.troubles() + server.troubles();
    }
    if kube.side() == Side::Direct {
        let opened = b.status()?.packets("own_opened");
        ensure!(
            opened >= 6 * count * 9 / 10,
            "only {opened} connections bypassed from their SYN on\n{}",
            lab::paths::describe(b)
        );
        wait::until_true(
            "the own tables are empty",
            std::time::Duration::from_secs(15),
            || {
                let (one, other) = (own(a)?, own(b)?);
                Ok(one.live + one.closed + other.live + other.closed == 0)
            },
        )?;
        println!("{:?}\n{:?}", own(a)?, own(b)?);
        println!("{}", lab::paths::describe(a));
    } else {
        pause(3.0);
    }
    let (client, server) = (kube.client().namespace(), kube.server().namespace());
    Ok(Left {
        troubles,
        entries: [
            conntrack::census(a.namespace())?,
            conntrack::census(b.namespace())?,
        ],
        sockets: [conntrack::sockets(client)?, conntrack::sockets(server)?],
    })
}

fn check(reference: &Left, found: &Left) -> Result<()> {
    println!("{reference:#?}\n{found:#?}");
    ensure!(
        found.troubles <= reference.troubles,
        "{} connections did not go as meant, {} on the kernel path",
        found.troubles,
        reference.troubles
    );
    for index in 0..2 {
        let live = |census: &Census| {
            let rows = census
                .iter()
                .filter(|(kind, _)| kind.starts_with("tcp") && !kind.ends_with("TIME_WAIT") && !kind.ends_with("CLOSE"));
            rows.map(|(_, count)| count).sum::<u64>()
        };
        ensure!(
            live(&found.entries[index]) <= live(&reference.entries[index]) + 2,
            "connection tracking keeps {:?} instead of {:?}",
            found.entries[index],
            reference.entries[index]
        );
        let without_time_wait = |census: &Census| -> Census {
            let rows = census.iter().filter(|(kind, _)| *kind != "TIME_WAIT");
            rows.map(|(kind, count)| (kind.clone(), *count)).collect()
        };
        check_alike(
            "sockets",
            &without_time_wait(&reference.sockets[index]),
            &without_time_wait(&found.sockets[index]),
            2,
        )?;
    }
    Ok(())
}

#[test]
fn every_ending_leaves_nothing_behind() {
    let netlink = on(Side::Netlink, |kube| close_in_every_way(kube, Via::Pod));
    let direct = on(Side::Direct, |kube| close_in_every_way(kube, Via::Pod));
    check(&netlink, &direct).unwrap_or_else(|error| panic!("{error:?}"));
}
