//! Nobody gets a packet anywhere by the fast path that the kernel path refuses.

use anyhow::{Result, ensure};
use lab::{
    cluster::introduce,
    exchange::RECEIVE_PORT,
    kube::{Kube, SERVICE, Side, Via, learned, pause},
    lab::Underlay,
    node::{Node, TUNNEL},
    pod::Pod,
    policy::{By, Policy},
    scenario::{repetitions, scenario_over},
    task::Task,
    traffic::{datagrams::ReceiveReport, forged::ForgeReport, raw_udp::RawReport},
};

/// Source port of all, that of forged packets included.
const PORT: u16 = 40_000;
/// The CPU on which all of them pass.
const CPU: usize = 1;

fn count() -> u64 {
    u64::from(repetitions(4000, 40_000))
}

/// Sends as `source` from within `pod`.
fn send(pod: &Pod, source: &Pod, to: std::net::SocketAddrV4, extra: &str) -> Result<Task> {
    pod.tool(&format!(
        "raw-udp --from {} --to {to} --cpu {CPU} {extra}",
        source.at(PORT)
    ))
}

fn receiver(pod: &Pod) -> Result<Task> {
    pod.tool(&format!("udp-receive --port {RECEIVE_PORT}"))
}

fn settled(receiver: Task) -> Result<ReceiveReport> {
    pause(0.2);
    receiver.finish()
}

/// The kinds of packets that are hard to tell apart.
const ALIKE: [&str; 3] = [
    // Connected sockets, or hostile ones: identifications and payloads in step.
    "",
    // Unconnected sockets: no identification.
    "--id 0",
    // And always the same payload.
    "--id 0 --number 7",
];

#[test]
fn a_denied_pod_gains_nothing_from_an_allowed_one() {
    learned(|kube| {
        let (a, _) = kube.cluster.nodes();
        let denied = a.add_pod()?;
        introduce(&denied)?;
        Policy::prepare(a, By::Nft, denied.address(), kube.server().address())?.deny()?;
        for via in Via::BOTH {
            for alike in ALIKE {
                let receiver = receiver(kube.server())?;
                let to = kube.target(via, RECEIVE_PORT);
                let extra = format!("--count {} --burst 8 {alike}", count());
                let bad = send(&denied, &denied, to, &extra)?;
                let good = send(kube.client(), kube.client(), to, &extra)?;
                let (bad, good): (RawReport, RawReport) = (bad.result()?, good.result()?);
                ensure!(bad.sent == count() && good.sent == count());
                // Alone once more, while what was learned is still fresh.
                send(&denied, &denied, to, &format!("--count 200 {alike}"))?
                    .result::<RawReport>()?;
                let received = settled(receiver)?;
                ensure!(
                    received.senders.iter().eq([&kube.client().address()]),
                    "{via:?} {alike:?}: packets came from {:?}",
                    received.senders
                );
                ensure!(
                    received.received == good.sent,
                    "{via:?} {alike:?}: of {} allowed packets {} came",
                    good.sent,
                    received.received
                );
            }
        }
        Ok(())
    });
}

#[test]
fn a_denied_receiver_gets_nothing_meant_for_another() {
    learned(|kube| {
        let (_, b) = kube.cluster.nodes();
        let denied = b.add_pod()?;
        introduce(&denied)?;
        Policy::prepare(b, By::Nft, kube.client().address(), denied.address())?.deny()?;
        for alike in ALIKE {
            let (good, bad) = (receiver(kube.server())?, receiver(&denied)?);
            let extra = format!("--count {} --burst 8 {alike}", count());
            let client = kube.client();
            let one = send(client, client, kube.server().at(RECEIVE_PORT), &extra)?;
            let other = send(client, client, denied.at(RECEIVE_PORT), &extra)?;
            one.result::<RawReport>()?;
            other.result::<RawReport>()?;
            let (good, bad) = (settled(good)?, settled(bad)?);
            ensure!(bad.received == 0, "{alike:?}: denied, but got {bad:?}");
            ensure!(good.received == count(), "{alike:?}: {}", good.received);
        }
        Ok(())
    });
}

#[test]
fn a_pod_that_may_use_a_service_only_gains_no_other_way() {
    learned(|kube| {
        // The server is open to those who come by the Service, closed to all others.
        let (a, _) = kube.cluster.nodes();
        let server = kube.server().address();
        a.namespace().run_with_input(
            &["nft", "-f", "-"],
            &format!(
                "table ip closed {{ chain before {{ type filter hook prerouting priority -300; policy accept; \
                 iifname != \"flannel.1\" ip daddr {server} udp dport {RECEIVE_PORT} drop; }}; }}\n"
            ),
        )?;
        for alike in ALIKE {
            let receiver = receiver(kube.server())?;
            let client = kube.client();
            let extra = format!("--count {} --burst 8 {alike}", count());
            let direct = kube.target(Via::Pod, RECEIVE_PORT);
            let good = send(
                client,
                client,
                kube.target(Via::Service, RECEIVE_PORT),
                &extra,
            )?;
            let bad = send(client, client, direct, &extra)?;
            let (good, bad): (RawReport, RawReport) = (good.result()?, bad.result()?);
            ensure!(bad.sent == count());
            send(client, client, direct, &format!("--count 200 {alike}"))?.result::<RawReport>()?;
            let received = settled(receiver)?;
            ensure!(
                received.received == good.sent,
                "{alike:?}: {} packets came, {} went to {SERVICE}",
                received.received,
                good.sent
            );
        }
        Ok(())
    });
}

/// Sends VXLAN packets with the tuple of a learned flow from `attacker`.
fn forge(kube: &Kube, attacker: &lab::namespace::Namespace, first: u64) -> Result<u64> {
    const FORGED: u64 = 50;
    let (a, b) = kube.cluster.nodes();
    let report: ForgeReport = Task::start(
        attacker,
        &format!(
            "forge --node {} --inner-source-mac {} --inner-destination-mac {} --from {} --to {} --count {FORGED} --first {first}",
            b.public_ip(),
            a.mac(TUNNEL)?,
            b.mac(TUNNEL)?,
            kube.client().address(),
            kube.server().at(RECEIVE_PORT)
        ),
    )?
    .result()?;
    Ok(report.sent)
}

#[test]
fn forged_packets_of_a_learned_flow_are_not_delivered() {
    scenario_over(Underlay::Switch, 3, |lab| {
        let kube = Kube::start(lab, Side::Learned)?;
        let stranger = lab.fabric().expect("a switch has a namespace");
        stranger.ip("addr add 172.18.0.200/24 dev br0")?;
        let receiver = receiver(kube.server())?;
        let client = kube.client();
        let before = kube.taken()?;
        let flow = send(
            client,
            client,
            kube.server().at(RECEIVE_PORT),
            "--count 4000 --burst 1 --rate 1000",
        )?;
        pause(1.0);
        // A peer that owns another subnet, and somebody who is no peer.
        let mut forged = forge(&kube, lab[2].namespace(), 1_000_000)?;
        forged += forge(&kube, stranger, 2_000_000)?;
        // The right node's own packets pass: what is refused is the sender.
        let right = forge(&kube, lab[0].namespace(), 3_000_000)?;
        flow.result::<RawReport>()?;
        let received = settled(receiver)?;
        let of = |from: u64, to: u64| received.tos_by_number.range(from..to).count() as u64;
        ensure!(
            of(1_000_000, 3_000_000) == 0,
            "of {forged} forged packets {} were delivered",
            of(1_000_000, 3_000_000)
        );
        ensure!(
            of(0, 1_000_000) == 4000 && of(3_000_000, u64::MAX) == right,
            "{} of the flow, {} of the right node",
            of(0, 1_000_000),
            of(3_000_000, u64::MAX)
        );
        let bypassed = kube.taken()?[1].since(before[1]).decapsulated;
        ensure!(
            !kube.is_bypassing() || bypassed > 3000,
            "only {bypassed} packets were bypassed: nothing was tested"
        );
        Ok(())
    });
}

#[test]
fn a_spoofed_source_gains_nothing() {
    learned(|kube| {
        let (a, _) = kube.cluster.nodes();
        let second = a.add_pod()?;
        introduce(&second)?;
        refuse_all_of(a, &second)?;
        let receiver = receiver(kube.server())?;
        let client = kube.client();
        let to = kube.target(Via::Service, RECEIVE_PORT);
        let flow = send(
            client,
            client,
            to,
            "--count 3000 --burst 1 --rate 1000 --number 1",
        )?;
        pause(1.0);
        let spoofed: RawReport = send(
            &second,
            client,
            to,
            "--count 1000 --burst 1 --rate 1000 --number 2",
        )?
        .result()?;
        ensure!(spoofed.sent == 1000);
        flow.result::<RawReport>()?;
        let received = settled(receiver)?;
        // Number 2 is that of the spoofed ones.
        ensure!(
            received.received == 3000 && !received.tos_by_number.contains_key(&2),
            "{received:?}"
        );
        Ok(())
    });
}

/// Whatever comes in by that pod's veth is dropped, whatever address it bears.
fn refuse_all_of(node: &Node, pod: &Pod) -> Result<()> {
    node.namespace()
        .run(&[
            "iptables",
            "-I",
            "FORWARD",
            "-m",
            "physdev",
            "--physdev-in",
            pod.interface(),
            "-j",
            "DROP",
        ])
        .map(drop)
}
