//! `--fast-path direct`: TCP between pods bypasses the stack from its SYN on, and whatever lives
//! on or comes back is in connection tracking as if it had been there all along.

use anyhow::{Result, ensure};
use lab::{
    classes::{own, until_own_tables_are_empty},
    closing::{Left, REMEMBERED, SETTLED, in_every_orderly_way, keep_resets},
    conntrack::Census,
    kube::{CONNECTIONS_PORT, Kube, SERVICE, Side, Via, on, pause},
    pod::Pod,
    scenario::{repetitions, scenario},
    task::Task,
    traffic::connections::{ConnectionsReport, Ending},
};

/// Connections that end in every way.
fn close_in_every_way(kube: &Kube, via: Via) -> Result<Left> {
    let (a, b) = kube.cluster.nodes();
    // An entry that is not called CLOSE after a reset has to be there to be seen.
    keep_resets(kube, REMEMBERED)?;
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
        until_own_tables_are_empty([a, b])?;
        println!("{:?}\n{:?}", own(a)?, own(b)?);
    }
    pause(SETTLED);
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

#[test]
fn services_and_pods_share_servers_and_ports() {
    scenario(2, |lab| {
        let kube = Kube::start(lab, Side::Direct)?;
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
