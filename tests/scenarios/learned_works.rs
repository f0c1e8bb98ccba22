//! Every kind of connection works with the rules of a Kubernetes node, as on the
//! kernel path, and what lasts is bypassed.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode;
use lab::{
    closing::in_every_orderly_way,
    exchange::{self, ECHO_PORT, RECEIVE_PORT, RunningStream, STREAM_PORT},
    kube::{self, CONNECTIONS_PORT, Kube, SERVICE, Side, Via, compare, learned, pause},
    node::UPLINK,
    paths::{Packets, Path, PathWatch},
    policy::{By, Policy},
    scenario::{repetitions, scenario},
    task::Task,
    traffic::{
        datagrams::{ReceiveReport, SendReport},
        pinger::PingReport,
        request_response::Protocol,
    },
};

/// Of a long flow's packets so many take the fast path at least.
const MOST: f64 = 0.9;
const PLAIN_NIC: [&str; 6] = ["tso", "off", "gso", "off", "tx-udp_tnl-segmentation", "off"];

#[test]
fn the_rules_hold_what_they_promise() {
    scenario(2, |lab| {
        let kube = Kube::start(lab, Side::Netlink)?;
        let (a, b) = kube.cluster.nodes();
        let through_service = || -> Result<PingReport> {
            Ok(kube
                .ping(Via::Service, "--rate 1000 --count 50")?
                .result()?
                .0)
        };
        ensure!(through_service()?.lost == 0, "the Service loses datagrams");
        // A second commit changes the Services' chains and nothing else.
        kube.rules
            .clone()
            .without_service(SERVICE, ECHO_PORT, Protocol::Udp)
            .apply_to(&[a, b])?;
        ensure!(
            through_service()?.received == 0,
            "a deleted Service still answers"
        );
        kube.rules.apply_to(&[a, b])?;
        ensure!(
            through_service()?.lost == 0,
            "the Service did not come back"
        );
        for by in By::ALL {
            let policy = Policy::prepare(a, by, kube.client().address(), kube.server().address())?;
            ensure!(through_service()?.lost == 0, "{by:?} denies too early");
            policy.deny()?;
            ensure!(through_service()?.received == 0, "{by:?} does not deny");
            policy.allow()?;
            ensure!(through_service()?.lost == 0, "{by:?} does not allow again");
        }
        kube.rules.remove(a)?;
        kube.rules.remove(b)?;
        ensure!(through_service()?.received == 0, "rules are left");
        exchange::udp_round_trips(kube.client(), kube.server(), 100).map(drop)
    });
}

#[test]
fn every_connection_type_works() {
    let troubles = compare(every_connection_type);
    ensure_not_more(troubles.netlink, troubles.learned);
}

#[test]
fn every_connection_type_works_over_a_plain_nic() {
    let troubles = compare(|kube| {
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            let argv: Vec<&str> = ["ethtool", "-K", UPLINK]
                .into_iter()
                .chain(PLAIN_NIC)
                .collect();
            node.namespace().run(&argv)?;
        }
        every_connection_type(kube)
    });
    ensure_not_more(troubles.netlink, troubles.learned);
}

fn ensure_not_more(netlink: u64, learned: u64) {
    assert!(
        learned <= netlink,
        "{learned} connections failed or were reset, {netlink} on the kernel path"
    );
}

/// All of them, data checked; gives how many connections did not go as meant.
fn every_connection_type(kube: &Kube) -> Result<u64> {
    let mut troubles = 0;
    for via in Via::BOTH {
        troubles += inside(kube, via).with_context(|| format!("{via:?}"))?;
    }
    troubles += outside(kube).context("to the outside")?;
    Ok(troubles)
}

fn inside(kube: &Kube, via: Via) -> Result<u64> {
    for direction in ["up", "down", "both"] {
        let before = kube.taken()?;
        let arguments = format!("--direction {direction} --seconds 0.8");
        let stream = kube.stream(via, &arguments)?.result()?;
        stream.check(10_000_000).context(direction)?;
        kube.expect_bypassed(&before, MOST)
            .with_context(|| format!("stream {direction}"))?;
    }
    let before = kube.taken()?;
    let reports = kube.ping(via, "--rate 2000 --count 2000")?.result()?;
    exchange::check_nothing_lost(&reports)?;
    kube.expect_bypassed(&before, MOST).context("datagrams")?;
    one_way(kube, via)?;
    in_every_orderly_way(&format!("{:?} {via:?}", kube.side()), |ending| {
        kube.connections(via, ending, "--count 30 --exchanges 12")
    })
}

/// Nobody answers, and still it is bypassed.
fn one_way(kube: &Kube, via: Via) -> Result<()> {
    const COUNT: u64 = 3000;
    let (a, b) = kube.cluster.nodes();
    let before = kube.taken()?;
    let receiver = kube
        .server()
        .tool(&format!("udp-receive --port {RECEIVE_PORT}"))?;
    let target = kube.target(via, RECEIVE_PORT);
    let sent: SendReport = kube
        .client()
        .tool(&format!("udp-send --to {target} --count {COUNT}"))?
        .result()?;
    pause(0.1);
    let received: ReceiveReport = receiver.finish()?;
    ensure!(
        sent.sent == COUNT && received.received == COUNT && received.corrupt == 0,
        "{sent:?} {received:?}"
    );
    let taken = kube.taken()?;
    let out = taken[0].since(before[0]).encapsulated;
    let came = taken[1].since(before[1]).decapsulated;
    ensure!(
        !kube.is_bypassing() || out.min(came) as f64 > MOST * COUNT as f64,
        "of {COUNT} datagrams of one way {out} and {came} were bypassed\n{}\n{}",
        lab::paths::describe(a),
        lab::paths::describe(b)
    );
    Ok(())
}

/// To a server on the other node itself: masqueraded, and never bypassed.
fn outside(kube: &Kube) -> Result<u64> {
    let (a, b) = kube.cluster.nodes();
    let at = |port| (b.namespace(), SocketAddrV4::new(b.public_ip(), port));
    let client = kube.client().namespace();
    let before = kube.taken()?;
    exchange::RunningStream::start_at(client, at(STREAM_PORT), "--direction both --seconds 1")?
        .result()?
        .check(10_000_000)?;
    let reports =
        exchange::RunningPing::start_at(client, at(ECHO_PORT), "--rate 2000 --count 500")?
            .result()?;
    exchange::check_nothing_lost(&reports)?;
    let receiver = Task::start(
        b.namespace(),
        &format!("udp-receive --port {RECEIVE_PORT} --count 10"),
    )?;
    let (_, target) = at(RECEIVE_PORT);
    let sender = kube
        .client()
        .tool(&format!("udp-send --to {target} --count 10"))?;
    let received: ReceiveReport = receiver.result()?;
    sender.result::<SendReport>()?;
    ensure!(
        received.senders.iter().eq([&a.public_ip()]),
        "the outside sees {:?} instead of the node",
        received.senders
    );
    let troubles = in_every_orderly_way("outside", |ending| {
        kube::connections(client, at(CONNECTIONS_PORT), ending, "--count 15")
    })?;
    let taken = kube.taken()?;
    let tunnelled = taken[0].since(before[0]).encapsulated + taken[1].since(before[1]).encapsulated;
    ensure!(
        tunnelled == 0,
        "{tunnelled} masqueraded packets were put into the tunnel"
    );
    Ok(troubles)
}

#[test]
fn a_stream_older_than_the_programs_is_bypassed() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            node.mode(Mode::Netlink)?;
        }
        let ping = kube.ping(Via::Service, "--rate 1000")?;
        let stream = kube.stream(Via::Pod, "--direction both --pace 0.5")?;
        pause(0.5);
        for node in [a, b] {
            node.mode(Mode::Ebpf)?;
        }
        pause(0.5);
        let before = kube.taken()?;
        pause(1.5);
        kube.expect_bypassed(&before, MOST)?;
        stream.finish()?.check(1_000_000)?;
        exchange::check_nothing_lost(&ping.finish()?)
    });
}

#[test]
fn flows_of_two_packets_pay_for_no_entry() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        let before = [a.status()?, b.status()?];
        // In turn and slowly: no flow asks a third time.
        let arguments = "--flows 2000 --rate 2000 --seconds 1.9";
        let report = kube.many_flows(Via::Service, Protocol::Udp, arguments, None)?;
        ensure!(
            report.lost == 0 && report.corrupt == 0 && report.sent > 2500,
            "{report:?}"
        );
        for (node, before) in [a, b].into_iter().zip(&before) {
            let status = node.status()?;
            let since = |reason: &str| status.packets(reason) - before.packets(reason);
            ensure!(since("out_unlearned") > 2500, "{:?}", status.counters);
            for reason in ["learn_out_learned", "learn_in_learned"] {
                let made = since(reason);
                ensure!(made == 0, "{}: {made} {reason}", node.name());
            }
        }
        Ok(())
    });
}

/// On one CPU, where only a change of the path reorders.
#[test]
fn bulk_is_not_sent_again_more_often() {
    learned(|kube| {
        bulk_in_both_modes(kube, || {
            kube.stream_on_one_cpu(Via::Service, "--direction up --seconds 3.5")
        })
    });
}

/// Mask of two CPUs.
const BOTH: u32 = 0b11;

/// On two CPUs, which where packets come into a node are chosen by flow, as a card with several
/// queues does (RSS). A veth pair leaves them on the CPU of whoever sent them; a TCP socket sends from
/// its process and from where its acknowledgements arrive, and what one CPU has queued is overtaken
/// by the other, on every path: the shorter the round trip the sooner TCP takes that for a loss
/// (RFC 8985, section 7.1; bare hosts send most again).
#[test]
fn bulk_on_two_cpus_is_not_sent_again_more_often() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        for node in [a, b] {
            // Not the devices on the way through the kernel: it would queue packets once more.
            node.steer(UPLINK, BOTH)?;
        }
        for pod in [kube.client(), kube.server()] {
            pod.node().steer(pod.interface(), BOTH)?;
        }
        bulk_in_both_modes(kube, || {
            kube.stream(Via::Service, "--direction up --seconds 3.5")
        })
    });
}

/// Of each gigabyte in ebpf mode at most 1.2 times as much is sent again as in netlink mode.
fn bulk_in_both_modes(kube: &Kube, start: impl Fn() -> Result<RunningStream>) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    let mut sent_again = [0.0_f64; 2];
    let mut gigabytes = [0.0; 2];
    for round in 0..2 * repetitions(3, 10) {
        let side = (round % 2) as usize;
        for node in [a, b] {
            node.mode([Mode::Netlink, Mode::Ebpf][side])?;
        }
        let watch = PathWatch::start(&[a, b])?;
        // Longer than the validity, so that revalidation is part of it.
        let stream = start()?.result()?;
        stream.check(100_000_000)?;
        let path = [Path::Kernel, Path::Ebpf][side];
        let many = Packets::AtLeast(1000);
        watch.expect_exchange((a, path), (b, path), many, many)?;
        let sent = stream.client.sent.context("the client sends")?;
        println!(
            "{}: {} segments sent again, {:.2} Gbit/s",
            ["netlink", "learned"][side],
            sent.retransmissions,
            sent.gbit_per_second()
        );
        sent_again[side] += f64::from(sent.retransmissions);
        gigabytes[side] += sent.bytes as f64 / 1e9;
    }
    let [netlink, learned] = [0, 1].map(|side| sent_again[side] / gigabytes[side]);
    // Of a million segments or so in a gigabyte, ten are chance: they make no ratio.
    ensure!(
        learned <= (1.2 * netlink).max(netlink + 10.0),
        "{learned:.1} segments per gigabyte sent again, {netlink:.1} on the kernel path"
    );
    Ok(())
}
