//! Handshakes that do not go as usual, and segments that do not belong: connections that opened by
//! their class fare as those on the kernel path.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    cluster::introduce,
    conntrack::{self, Census},
    kube::{Kube, Side, on, pause},
    lab::Underlay,
    namespace::Namespace,
    paths,
    pod::Pod,
    scenario::{repetitions, scenario_over},
    task::Task,
    traffic::{
        connections::Ending,
        crossing::CrossReport,
        kept::{AliveReport, Kept, KeptReport},
        segments::{FLOOD_PORTS, SegmentsReport},
    },
    wait,
};

use lab::classes::{opened, until_own_tables_are_empty};

/// `kept-serve`.
pub(super) const KEPT_PORT: u16 = 6300;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// Retransmissions are timed by the end's own clock, and this machine is shared.
const LEEWAY_MS: f64 = 300.0;

pub(super) fn run(namespace: &Namespace, words: &str) -> Result<()> {
    let argv: Vec<&str> = words.split_whitespace().collect();
    namespace.run(&argv).map(drop)
}

/// On both nodes nothing begins in the middle: a connection that conntrack does not know is over.
pub(super) fn be_strict(kube: &Kube) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    for node in [a, b] {
        let rule = "iptables -I FORWARD -p tcp ! --syn -m conntrack --ctstate NEW -j DROP";
        run(node.namespace(), rule)?;
    }
    Ok(())
}

/// Connections between these pods have bypassed from their SYN on, on both nodes.
pub(super) fn heat(kube: &Kube, from: &Pod, to: &Pod) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    wait::until_true("classes are in use", Duration::from_secs(5), || {
        let before = [opened(a)?, opened(b)?];
        let report = kept(from, to, "--count 20")?.finish::<AliveReport>()?;
        ensure!(report.alive == 20, "{report:?}");
        Ok(kube.side() != Side::Classes
            || opened(a)? >= before[0] + 18 && opened(b)? >= before[1] + 18)
    })
    .with_context(|| paths::describe(b))
}

pub(super) fn kept(from: &Pod, to: &Pod, arguments: &str) -> Result<Task> {
    from.tool(&format!("kept --to {} {arguments}", to.at(KEPT_PORT)))
}

/// A segment that does not belong into a live connection.
struct Oddity {
    name: &'static str,
    /// Sent by the client's end.
    is_clients: bool,
    flags: u8,
    seq: fn(&Kept) -> u32,
}

const ODDITIES: [Oddity; 9] = [
    Oddity {
        name: "a blind RST of the client",
        is_clients: true,
        flags: RST,
        seq: |kept| kept.client_next.wrapping_add(1 << 30),
    },
    Oddity {
        name: "a blind RST of the server",
        is_clients: false,
        flags: RST,
        seq: |kept| kept.server_next.wrapping_add(1 << 30),
    },
    Oddity {
        name: "a RST of the client within the window",
        is_clients: true,
        flags: RST,
        seq: |kept| kept.client_next.wrapping_add(1000),
    },
    Oddity {
        name: "a RST of the server within the window",
        is_clients: false,
        flags: RST,
        seq: |kept| kept.server_next.wrapping_add(1000),
    },
    Oddity {
        name: "an old RST of the server",
        is_clients: false,
        flags: RST,
        seq: |kept| kept.server_next.wrapping_sub(40),
    },
    Oddity {
        name: "a right RST of the client",
        is_clients: true,
        flags: RST,
        seq: |kept| kept.client_next,
    },
    Oddity {
        name: "a SYN of the client",
        is_clients: true,
        flags: SYN,
        seq: |kept| kept.client_next.wrapping_add(1 << 30),
    },
    Oddity {
        name: "a SYN of the server",
        is_clients: false,
        flags: SYN,
        seq: |kept| kept.server_next.wrapping_add(1 << 30),
    },
    Oddity {
        name: "a SYN-ACK of the server",
        is_clients: false,
        flags: SYN | ACK,
        seq: |kept| kept.server_next.wrapping_sub(65),
    },
];

impl Oddity {
    fn send(&self, kube: &Kube, connections: &[Kept]) -> Result<()> {
        let each: Vec<String> = connections
            .iter()
            .map(|kept| format!("{}:{}", kept.port, (self.seq)(kept)))
            .collect();
        let (client, server) = (kube.client(), kube.server());
        let (sender, from, to) = if self.is_clients {
            (client, client.at(0), server.at(KEPT_PORT))
        } else {
            (server, server.at(KEPT_PORT), client.at(0))
        };
        let report: SegmentsReport = sender
            .tool(&format!(
                "segments --from {from} --to {to} --flags {} --rate 100000 --each {}",
                self.flags,
                each.join(",")
            ))?
            .result()?;
        ensure!(report.sent == connections.len() as u64, "{report:?}");
        Ok(())
    }
}

/// What became of the connections of each row, and what conntrack holds in the end.
#[derive(Debug)]
struct Ended {
    rows: Vec<(String, AliveReport)>,
    census: [Census; 2],
}

/// To connections of that age, each kind to its own ones, which then rest for a while.
fn happen_to(
    kube: &Kube,
    oddities: &[Oddity],
    age: f64,
    rest: f64,
) -> Result<Vec<(String, AliveReport)>> {
    let (a, b) = kube.cluster.nodes();
    let count = repetitions(10, 100);
    let before = [opened(a)?, opened(b)?];
    let mut tasks = Vec::new();
    for _ in oddities {
        let arguments = format!("--count {count} --age {age}");
        tasks.push(kept(kube.client(), kube.server(), &arguments)?);
    }
    let mut connections = Vec::new();
    for task in &mut tasks {
        let report: KeptReport = task.next_report()?;
        connections.push(report.connections);
    }
    let now = [opened(a)?, opened(b)?];
    if kube.side() == Side::Classes {
        let wanted = u64::from(count) * oddities.len() as u64 * 8 / 10;
        ensure!(
            (0..2).all(|node| now[node] >= before[node] + wanted),
            "opened {before:?}, then {now:?}\n{}",
            paths::describe(a)
        );
    }
    // The class is in use again: what comes now meets it open.
    if age > 0.0 {
        heat(kube, kube.client(), kube.server())?;
    }
    for (oddity, connections) in oddities.iter().zip(&connections) {
        oddity.send(kube, connections)?;
    }
    pause(rest.max(0.05));
    let mut rows = Vec::new();
    for (oddity, task) in oddities.iter().zip(tasks) {
        let report: AliveReport = task.finish()?;
        let name = format!(
            "{} after {age} s, {rest} s before the next word",
            oddity.name
        );
        println!("{:?} {name}: {report:?}", kube.side());
        rows.push((name, report));
    }
    Ok(rows)
}

fn happen(kube: &Kube) -> Result<Ended> {
    be_strict(kube)?;
    let (a, b) = kube.cluster.nodes();
    let server = kube
        .server()
        .tool(&format!("kept-serve --port {KEPT_PORT}"))?;
    let mut rows = Vec::new();
    // Seconds before, and after: while they are own, then when conntrack has had them for a while.
    for (age, rest) in [(0.0, 0.0), (0.0, 1.6), (1.6, 0.0), (1.6, 1.6)] {
        heat(kube, kube.client(), kube.server())?;
        if age + rest == 0.0 {
            for oddity in &ODDITIES {
                rows.extend(happen_to(kube, std::slice::from_ref(oddity), age, rest)?);
            }
        } else {
            rows.extend(happen_to(kube, &ODDITIES, age, rest)?);
        }
    }
    drop(server);
    if kube.side() == Side::Classes {
        until_own_tables_are_empty([a, b])?;
    }
    // A reset that conntrack believes only in part leaves its state, with ten seconds to live.
    pause(12.0);
    Ok(Ended {
        rows,
        census: [
            conntrack::census(a.namespace())?,
            conntrack::census(b.namespace())?,
        ],
    })
}

#[test]
fn segments_that_do_not_belong_do_what_they_do_on_the_kernel_path() {
    let [netlink, classes] = [Side::Netlink, Side::Classes].map(|side| on(side, happen));
    for ((name, wanted), (_, found)) in netlink.rows.iter().zip(&classes.rows) {
        assert_eq!(
            (wanted.alive, wanted.reset, wanted.silent),
            (found.alive, found.reset, found.silent),
            "{name}"
        );
        assert!(
            found.slowest_ms <= wanted.slowest_ms + LEEWAY_MS,
            "{name}: {wanted:?} {found:?}"
        );
    }
    println!("{:?}\n{:?}", netlink.census, classes.census);
    for (wanted, found) in netlink.census.iter().zip(&classes.census) {
        for state in ["ESTABLISHED", "SYN_SENT", "SYN_SENT2", "SYN_RECV"] {
            let count = |census: &Census| census.get(&format!("tcp {state}")).copied().unwrap_or(0);
            assert!(count(found) <= count(wanted) + 2, "{wanted:?} {found:?}");
        }
    }
}

/// Where handshake packets get lost: in whose namespace, by which device, and which of them.
#[derive(Debug, Clone, Copy)]
enum Loss {
    /// SYNs, before the server's node has seen them.
    SynOnTheWay,
    /// SYNs, after both nodes have seen them.
    SynInThePod,
    /// Answers, before the client's node has seen them.
    AnswerOnTheWay,
    /// Answers, after both nodes have seen them.
    AnswerInThePod,
}

const LOSSES: [Loss; 4] = [
    Loss::SynOnTheWay,
    Loss::SynInThePod,
    Loss::AnswerOnTheWay,
    Loss::AnswerInThePod,
];

impl Loss {
    /// One in four goes, in a namespace whose rules are none of the nodes'.
    fn arrange<'a>(self, kube: &'a Kube, fabric: &'a Namespace) -> Result<&'a Namespace> {
        let flags = match self {
            Self::SynOnTheWay | Self::SynInThePod => SYN,
            Self::AnswerOnTheWay | Self::AnswerInThePod => SYN | ACK,
        };
        let (namespace, device) = match self {
            Self::SynOnTheWay => (fabric, "port0"),
            Self::AnswerOnTheWay => (fabric, "port1"),
            Self::SynInThePod => (kube.server().namespace(), "eth0"),
            Self::AnswerInThePod => (kube.client().namespace(), "eth0"),
        };
        // The inner TCP header's flags, behind UDP, VXLAN, Ethernet and IP.
        let matched = if device == "eth0" {
            format!("tcp flags & (syn | ack) == {flags}")
        } else {
            format!("udp dport 8472 @th,504,8 & 18 == {flags}")
        };
        namespace.run_with_input(
            &["nft", "-f", "-"],
            &format!(
                "table netdev lab-loss {{ chain in {{ type filter hook ingress device \"{device}\" priority 0; {matched} numgen inc mod 4 == 0 counter drop; }}; }}\n"
            ),
        )?;
        Ok(namespace)
    }
}

/// Seconds that it took, for each kind of loss.
fn lose(side: Side) -> Vec<f64> {
    let mut took = Vec::new();
    scenario_over(Underlay::Switch, 2, |lab| {
        let kube = Kube::start(lab, side)?;
        be_strict(&kube)?;
        let fabric = lab.fabric().context("no switch")?;
        let (a, b) = kube.cluster.nodes();
        for loss in LOSSES {
            let warm = kube.connections(
                lab::kube::Via::Pod,
                Ending::ClientFin,
                "--count 200 --exchanges 1 --size 64",
            )?;
            warm.0.check()?;
            let before = [opened(a)?, opened(b)?];
            let namespace = loss.arrange(&kube, fabric)?;
            let count = u64::from(repetitions(200, 5000));
            let (client, server) = kube.connections(
                lab::kube::Via::Pod,
                Ending::ClientFin,
                &format!("--count {count} --at-once 100 --exchanges 2 --size 64 --patience 20"),
            )?;
            let rules = namespace.run(&["nft", "list", "table", "netdev", "lab-loss"])?;
            namespace.run(&["nft", "delete", "table", "netdev", "lab-loss"])?;
            let opened = [opened(a)? - before[0], opened(b)? - before[1]];
            println!(
                "{side:?} {loss:?}: {:.1} s, {} troubles, {opened:?} opened by class",
                client.seconds,
                client.troubles() + server.troubles()
            );
            ensure!(!rules.contains("packets 0 "), "nothing was lost\n{rules}");
            ensure!(
                client.troubles() + server.troubles() == 0,
                "{client:?} {server:?}"
            );
            // With every fourth SYN of a class the question may be lost, too.
            ensure!(
                side != Side::Classes || opened.iter().all(|opened| *opened > count / 10),
                "{opened:?}\n{}",
                paths::describe(b)
            );
            took.push(client.seconds);
        }
        if side == Side::Classes {
            until_own_tables_are_empty([a, b])?;
        }
        for node in [a, b] {
            let census = conntrack::census(node.namespace())?;
            let live = census.get("tcp ESTABLISHED").copied().unwrap_or(0);
            ensure!(live == 0, "{census:?}");
        }
        Ok(())
    });
    took
}

#[test]
fn lost_syns_and_answers_cost_what_they_cost_on_the_kernel_path() {
    let (netlink, classes) = (lose(Side::Netlink), lose(Side::Classes));
    for ((loss, wanted), found) in LOSSES.iter().zip(netlink).zip(classes) {
        // Chance decides whether one is lost twice or three times.
        assert!(
            found <= wanted * 2.0 + 4.0,
            "{loss:?}: {found} s, {wanted} s"
        );
    }
}

/// Both ends connect to each other, where nobody may connect to the client's pod.
fn cross(kube: &Kube) -> Result<[CrossReport; 2]> {
    const FIRST: u16 = 20_000;
    be_strict(kube)?;
    let (a, b) = kube.cluster.nodes();
    let (client, server) = (a.add_pod()?, b.add_pod()?);
    introduce(&client)?;
    introduce(&server)?;
    run(
        a.namespace(),
        &format!(
            "iptables -I FORWARD -d {} -p tcp -m conntrack --ctstate NEW -j DROP",
            client.address()
        ),
    )?;
    // A SYN to a port that is not open yet must not end the other end's attempt.
    for pod in [&client, &server] {
        run(
            pod.namespace(),
            "iptables -A OUTPUT -p tcp --tcp-flags RST RST -j DROP",
        )?;
    }
    let listener = server.tool(&format!("kept-serve --port {KEPT_PORT}"))?;
    heat(kube, &client, &server)?;
    drop(listener);
    let before = opened(a)?;
    let count = 20;
    let one = client.tool(&format!(
        "cross --from {} --to {} --count {count}",
        client.at(FIRST),
        server.at(KEPT_PORT)
    ))?;
    let other = server.tool(&format!(
        "cross --from {} --to {} --count {count} --theirs",
        server.at(KEPT_PORT),
        client.at(FIRST)
    ))?;
    let reports: [CrossReport; 2] = [one.result()?, other.result()?];
    let opened = opened(a)? - before;
    println!("{:?}: {reports:?}, {opened} opened by class", kube.side());
    ensure!(
        kube.side() != Side::Classes || opened >= count / 2,
        "{opened}\n{}",
        paths::describe(a)
    );
    ensure!(
        reports.iter().all(|report| report.established == count),
        "{reports:?}\n{}",
        paths::describe(a)
    );
    Ok(reports)
}

#[test]
fn both_ends_may_open_a_connection() {
    let [netlink, classes] = [Side::Netlink, Side::Classes].map(|side| on(side, cross));
    for (wanted, found) in netlink.iter().zip(&classes) {
        assert!(
            found.slowest_ms <= wanted.slowest_ms + LEEWAY_MS,
            "{wanted:?} {found:?}"
        );
    }
}

/// How many RSTs of no connection arrive in the server's pod.
fn stray(kube: &Kube) -> Result<u64> {
    let server = kube
        .server()
        .tool(&format!("kept-serve --port {KEPT_PORT}"))?;
    heat(kube, kube.client(), kube.server())?;
    let (first, last) = (FLOOD_PORTS.start, FLOOD_PORTS.end - 1);
    let namespace = kube.server().namespace();
    namespace.run_with_input(
        &["nft", "-f", "-"],
        &format!(
            "table ip lab-watch {{ counter resets {{ }}; chain in {{ type filter hook prerouting priority -300; tcp sport {first}-{last} tcp flags rst counter name resets; }}; }}\n"
        ),
    )?;
    let count = repetitions(5000, 100_000);
    let report: SegmentsReport = kube
        .client()
        .tool(&format!(
            "segments --from {} --to {} --flags {RST} --count {count} --rate 20000",
            kube.client().at(0),
            kube.server().at(KEPT_PORT)
        ))?
        .result()?;
    let text = namespace.run(&["nft", "list", "counter", "ip", "lab-watch", "resets"])?;
    let packets = text
        .split_whitespace()
        .skip_while(|word| *word != "packets")
        .nth(1)
        .context("no counter")?
        .parse()?;
    println!(
        "{:?}: {packets} of {} stray RSTs arrived",
        kube.side(),
        report.sent
    );
    drop(server);
    Ok(packets)
}

#[test]
fn a_stray_reset_goes_the_kernels_way() {
    let [netlink, classes] = [Side::Netlink, Side::Classes].map(|side| on(side, stray));
    assert_eq!(netlink, classes);
}
