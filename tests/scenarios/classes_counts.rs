//! Classes in great numbers: connections that share servers and ports with those of a Service, and
//! thousands of classes at a time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Status;
use lab::{
    classes::{own, serve, until_own_tables_are_empty},
    cluster::introduce,
    conntrack::{self, Census, alive},
    kube::{CONNECTIONS_PORT, Kube, Side, Via, on, pause},
    paths,
    pod::Pod,
    scenario::repetitions,
    task::Task,
    traffic::{
        connections::{ConnectionsReport, Ending},
        many_ports::PortsReport,
    },
    wait,
};

/// What is left when all connections are over.
#[derive(Debug)]
struct Left {
    troubles: u64,
    /// Connections that conntrack believes to be alive, on each node.
    alive: [Census; 2],
    /// Sockets that are neither listening nor waiting, in the server.
    sockets: Census,
}

/// What happens meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settings {
    /// Nothing.
    Usual,
    /// Conntrack takes up nothing in the middle (`tcp_loose`), and minds windows for a while
    /// (`be_liberal` from 0 to 1).
    Strict,
}

fn set_on_both(kube: &Kube, key: &str, value: &str) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    for node in [a, b] {
        let key = format!("net.netfilter.nf_conntrack_tcp_{key}");
        node.namespace().sysctl(&key, value)?;
    }
    Ok(())
}

/// The kinds of `census` for which `matches` holds.
fn only(census: Census, matches: impl Fn(&str) -> bool) -> Census {
    let rows = census.into_iter();
    rows.filter(|(kind, _)| matches(kind)).collect()
}

/// Four clients: one asks the pod, one the Service, and one pod does both, of which the server ends
/// all connections. Their few ports come again and again.
fn share(kube: &Kube, settings: Settings) -> Result<Left> {
    let (a, b) = kube.cluster.nodes();
    let count = repetitions(4_000, 500_000);
    let (through, both) = (a.add_pod()?, a.add_pod()?);
    for pod in [&through, &both] {
        introduce(pod)?;
    }
    for pod in [kube.client(), &through, &both] {
        let namespace = pod.namespace();
        namespace.sysctl("net.ipv4.ip_local_port_range", "40000 43999")?;
        namespace.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
    }
    if settings == Settings::Strict {
        set_on_both(kube, "loose", "0")?;
    }
    let server = serve(kube.server())?;
    // A SYN that meets in the server's TIME_WAIT what was there through the Service (with a clock of
    // its own, RFC 7323) is sent again after 1, 3, 7 and 15 s, on every path.
    let at_once = repetitions(6, 24);
    let start = |pod: &Pod, via: Via, ending: Ending| -> Result<Task> {
        let target = kube.target(via, CONNECTIONS_PORT);
        pod.tool(&format!(
            "connections --to {target} --ending {} --count {count} --at-once {at_once} --exchanges 1 --size 64 --patience 70",
            ending.name()
        ))
    };
    let clients = [
        start(kube.client(), Via::Pod, Ending::ClientFin)?,
        start(&through, Via::Service, Ending::ClientFin)?,
        start(&both, Via::Pod, Ending::ServerFin)?,
        start(&both, Via::Service, Ending::ServerFin)?,
    ];
    if settings == Settings::Strict {
        pause(1.0);
        set_on_both(kube, "be_liberal", "0")?;
        pause(1.5);
        // The agent does it by itself.
        if kube.side() == Side::Netlink {
            set_on_both(kube, "be_liberal", "1")?;
        }
    }
    let (mut troubles, mut ended) = (0, 0);
    for client in clients {
        let report: ConnectionsReport = client.result()?;
        ensure!(report.corrupt == 0, "{report:?}");
        if report.troubles() > 0 {
            println!("{:?} {settings:?}: {report:?}", kube.side());
        }
        troubles += report.troubles();
        ended += report.ended;
    }
    let served: ConnectionsReport = server.finish()?;
    ensure!(served.corrupt == 0, "{served:?}");
    troubles += served.troubles();
    if kube.side() == Side::Classes {
        let opened = [a, b].map(|node| node.status().map(|status| status.packets("own_opened")));
        let [at_client, at_server] = opened;
        let (at_client, at_server) = (at_client?, at_server?);
        println!(
            "{settings:?}: {ended} connections, opened by class: {at_client} on the client's node, {at_server} on the server's"
        );
        // On the client's node only the first pod's may; on the server's all of them.
        let part = if settings == Settings::Usual { 10 } else { 100 };
        ensure!(
            at_client > ended / 4 / part && at_server > ended / part,
            "{}\n{}",
            paths::describe(a),
            paths::describe(b)
        );
        until_own_tables_are_empty([a, b])?;
        println!("{:?}\n{:?}", own(a)?, own(b)?);
    }
    let sockets = conntrack::sockets(kube.server().namespace())?;
    let left = Left {
        troubles,
        alive: [alive(a.namespace())?, alive(b.namespace())?],
        sockets: only(sockets, |kind| kind != "TIME_WAIT" && kind != "LISTEN"),
    };
    println!("{:?} {settings:?}: {left:?}", kube.side());
    Ok(left)
}

fn compare(settings: Settings) {
    let reference = on(Side::Netlink, |kube| share(kube, settings));
    let found = on(Side::Classes, |kube| share(kube, settings));
    let sum = |census: &Census| census.values().sum::<u64>();
    assert!(
        found.troubles <= reference.troubles,
        "{found:?} instead of {reference:?}"
    );
    for index in 0..2 {
        assert!(
            sum(&found.alive[index]) <= sum(&reference.alive[index]),
            "{found:?} instead of {reference:?}"
        );
    }
    assert!(
        sum(&found.sockets) <= sum(&reference.sockets),
        "{found:?} instead of {reference:?}"
    );
}

#[test]
fn pods_and_services_share_servers_and_ports() {
    compare(Settings::Usual);
}

#[test]
fn pods_and_services_share_them_under_strict_conntrack() {
    compare(Settings::Strict);
}

/// Classes at a time.
const CLASSES: u32 = 5_000;
/// Connections a second that are wanted; a busy machine gives fewer.
const RATE: f64 = 10_000.0;
/// SYNs a second that may take the stack: 1 % of that, and a little.
const SLOW: f64 = 110.0;
/// Shares of a core that the agent may use at that rate, and when nothing happens.
const BUSY_SHARE: f64 = 0.05;
const IDLE_SHARE: f64 = 0.001;

/// SYNs that took the stack, and that opened by class.
fn slow_and_opened(status: &Status) -> (u64, u64) {
    let slow = [
        "own_no_class",
        "own_changed",
        "own_probe",
        "own_pending",
        "own_unanswered",
        "own_half_open",
        "own_paused",
        "own_full",
        "own_ending",
    ];
    let slow = slow.iter().map(|reason| status.packets(reason)).sum();
    (slow, status.packets("own_opened"))
}

#[test]
fn thousands_of_classes_cost_little() {
    on(Side::Classes, |kube| {
        let (a, b) = kube.cluster.nodes();
        let server = kube
            .server()
            .tool(&format!("ports-serve --ports {CLASSES}"))?;
        let target = kube.server().at(20_000);
        let load = |count: u64, rate: f64| {
            kube.client().tool(&format!(
                "ports --to {target} --ports {CLASSES} --count {count} --rate {rate} --at-once 8"
            ))
        };
        let warm_up: PortsReport = load(u64::from(CLASSES) * 4, RATE)?.result()?;
        ensure!(warm_up.failed == 0, "{warm_up:?}");
        wait::until_true("all classes are known", Duration::from_secs(15), || {
            let known = u64::from(CLASSES);
            Ok(own(a)?.classes >= known && own(b)?.classes >= known)
        })
        .with_context(|| format!("{:?}\n{:?}", own(a), own(b)))?;

        // Long enough for each class to ask once.
        let seconds = f64::from(repetitions(30, 120));
        let running = load((RATE * seconds * 2.0) as u64, RATE)?;
        // From a validity of a second to what so many need.
        pause(6.0);
        let before = [a.status()?, b.status()?].map(|status| slow_and_opened(&status));
        let used = kube.cluster.agents[0].cpu_time()?;
        let start = std::time::Instant::now();
        pause(seconds);
        let took = start.elapsed().as_secs_f64();
        let after = [a.status()?, b.status()?].map(|status| slow_and_opened(&status));
        let busy = (kube.cluster.agents[0].cpu_time()? - used).as_secs_f64() / took;
        drop(running);
        let mut rates = Vec::new();
        for (node, (before, after)) in [a, b].into_iter().zip(before.into_iter().zip(after)) {
            let (slow, opened) = (after.0 - before.0, after.1 - before.1);
            let (slow_rate, rate) = (slow as f64 / took, (slow + opened) as f64 / took);
            println!(
                "{}: {rate:.0} connections/s, {slow_rate:.0} slow SYNs/s: {:.2} %, {:?}",
                node.name(),
                100.0 * slow_rate / rate,
                own(node)?
            );
            ensure!(opened > u64::from(CLASSES), "{}", paths::describe(node));
            rates.push(slow_rate);
        }
        pause(5.0);
        let used = kube.cluster.agents[0].cpu_time()?;
        let seconds = f64::from(repetitions(5, 30));
        pause(seconds);
        let idle = (kube.cluster.agents[0].cpu_time()? - used).as_secs_f64() / seconds;
        println!(
            "the agent: {:.2} % of a core at that rate, {:.3} % when idle",
            busy * 100.0,
            idle * 100.0
        );
        ensure!(rates.iter().all(|rate| *rate <= SLOW), "{rates:?}");
        if repetitions(0, 1) == 1 {
            ensure!(busy <= BUSY_SHARE && idle <= IDLE_SHARE, "{busy} {idle}");
        }
        drop(server);
        Ok(())
    });
}
