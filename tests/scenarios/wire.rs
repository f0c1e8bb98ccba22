//! On the underlay nobody can tell the two datapaths apart, but for the outer
//! UDP checksum (0 by the programs, a named deviation) and the IP id.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    capture::{Capture, Inner, VxlanPacket, outer_headers},
    cluster::Cluster,
    exchange::{self, RECEIVE_PORT},
    node::{Node, TUNNEL, UPLINK},
    scenario::scenario,
    task::Task,
    traffic::{datagrams::ReceiveReport, datagrams::SendReport, forged::ForgeReport},
};

/// Demands one outer and one inner header for the whole flow, made by both datapaths.
fn expect_one_header(packets: &[&VxlanPacket]) -> Result<()> {
    let by_programs = packets.iter().filter(|packet| packet.udp_checksum == 0);
    let by_programs = by_programs.count();
    let by_kernel = packets.len() - by_programs;
    ensure!(
        by_programs > 50 && by_kernel > 50,
        "{by_programs} packets without outer UDP checksum, {by_kernel} with one"
    );
    let outer = outer_headers(packets.iter().copied());
    ensure!(
        outer.len() == 1,
        "one flow, {} outer headers: {outer:#?}",
        outer.len()
    );
    let inner: BTreeSet<&Inner> = packets.iter().map(|packet| &packet.inner).collect();
    ensure!(
        inner.len() == 1,
        "one flow, {} inner headers: {inner:#?}",
        inner.len()
    );
    Ok(())
}

fn switch_a_few_times(node: &Node) -> Result<()> {
    for mode in [Netlink, Ebpf, Netlink, Ebpf] {
        std::thread::sleep(Duration::from_millis(250));
        node.mode(mode)?;
    }
    std::thread::sleep(Duration::from_millis(250));
    Ok(())
}

#[test]
fn one_udp_flow_has_one_outer_header_whoever_sends_it() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let (client, server) = (&cluster.client, &cluster.server);
        for tos in [0_u8, 1, 2, 3, 0xb8 | 2] {
            let capture = Capture::start(a.namespace(), UPLINK, "udp port 8472", lab.scratch())?;
            let receiver = server.tool(&format!("udp-receive --port {RECEIVE_PORT}"))?;
            let sender = client.tool(&format!(
                "udp-send --to {} --rate 500 --count 750 --tos {tos}",
                server.at(RECEIVE_PORT)
            ))?;
            switch_a_few_times(a)?;
            let sent: SendReport = sender.result()?;
            let received: ReceiveReport = receiver.finish()?;
            ensure!(sent.sent == received.received, "{sent:?} {received:?}");
            ensure!(
                received.tos == BTreeMap::from([(tos, sent.sent)]),
                "{received:?}"
            );
            let packets = capture.stop()?;
            let flow: Vec<&VxlanPacket> = packets
                .iter()
                .filter(|packet| packet.is_udp_between(client.address(), server.address()))
                .collect();
            ensure!(flow.len() as u64 == sent.sent, "{} captured", flow.len());
            expect_one_header(&flow).with_context(|| format!("TOS {tos:#04x}"))?;
        }
        Ok(())
    });
}

#[test]
fn one_tcp_connection_has_one_outer_header_whoever_sends_it() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let (client, server) = (&cluster.client, &cluster.server);
        let capture = Capture::start(a.namespace(), UPLINK, "udp port 8472", lab.scratch())?;
        let answering = server.tool("rr-serve --protocol tcp --port 6000")?;
        let asking = client.tool(&format!(
            "rr --protocol tcp --to {} --seconds 1.3",
            server.at(6000)
        ))?;
        switch_a_few_times(a)?;
        let _: lab::traffic::timing::AskReport = asking.result()?;
        drop(answering);
        let packets = capture.stop()?;
        let flow: Vec<&VxlanPacket> = packets
            .iter()
            .filter(|packet| packet.inner.addresses == (client.address(), server.address()))
            .filter(|packet| packet.inner.protocol == 6)
            .collect();
        expect_one_header(&flow)
    });
}

#[test]
fn congestion_marks_and_hop_counts_on_the_way_in_are_read_as_by_the_kernel() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (_, b) = cluster.nodes();
        let mut seen = Vec::new();
        for mode in [Netlink, Ebpf] {
            b.mode(mode)?;
            seen.push(every_mark(&cluster, mode)?);
        }
        ensure!(
            seen[0] == seen[1],
            "(outer ECN, inner ECN, TTL) → what the pod saw; kernel:\n{:?}\nprograms:\n{:?}",
            seen[0],
            seen[1]
        );
        // The kernel follows RFC 6040, so this test compares with something.
        ensure!(
            seen[0].get(&(3, 0, 60)) == Some(&None),
            "not-ECT with CE outside is dropped"
        );
        ensure!(
            seen[0].get(&(3, 2, 60)) == Some(&Some((3, 59))),
            "CE is shown to the pod"
        );
        Ok(())
    });
}

type Marks = BTreeMap<(u8, u8, u8), Option<(u8, u8)>>;

/// Sends a hand-made packet for every outer and inner codepoint, from the peer's own address.
fn every_mark(cluster: &Cluster, mode: Mode) -> Result<Marks> {
    let (a, b) = cluster.nodes();
    let (from, to) = (a.mac(TUNNEL)?, b.mac(TUNNEL)?);
    let mut marks = Marks::new();
    let combinations = (0..4_u8)
        .flat_map(|outer| (0..4_u8).map(move |inner| (outer, inner, 60)))
        .chain([(0, 0, 3), (0, 0, 2), (0, 0, 1)]);
    for (outer, inner, ttl) in combinations {
        let receiver = cluster
            .server
            .tool(&format!("udp-receive --port {RECEIVE_PORT}"))?;
        let forge = format!(
            "forge --node {} --inner-source-mac {from} --inner-destination-mac {to} --from {} --to {} \
             --outer-tos {outer} --tos {inner} --ttl {ttl} --count 3",
            b.public_ip(),
            cluster.client.address(),
            cluster.server.at(RECEIVE_PORT)
        );
        let sent: ForgeReport = Task::start(a.namespace(), &forge)?.result()?;
        std::thread::sleep(Duration::from_millis(30));
        let received: ReceiveReport = receiver.finish()?;
        let complete = received.received == 0 || received.received == sent.sent;
        ensure!(
            complete && received.corrupt == 0,
            "{mode:?} {forge}: {received:?}"
        );
        let first = |counts: &BTreeMap<u8, u64>| counts.keys().next().copied();
        let what = first(&received.tos).zip(first(&received.ttl));
        marks.insert((outer, inner, ttl), what);
    }
    Ok(marks)
}

#[test]
fn both_datapaths_split_a_flow_of_big_packets_alike() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (client, server) = (&cluster.client, &cluster.server);
        let (a, b) = cluster.nodes();
        // As a NIC without tunnel offloads would show them on the wire.
        for node in [a, b] {
            node.namespace().run(&[
                "ethtool",
                "-K",
                UPLINK,
                "tso",
                "off",
                "gso",
                "off",
                "tx-udp_tnl-segmentation",
                "off",
            ])?;
        }
        let mut sizes = Vec::new();
        for mode in [Netlink, Ebpf] {
            a.mode(mode)?;
            let capture = Capture::start(a.namespace(), UPLINK, "udp port 8472", lab.scratch())?;
            exchange::stream(client, server, "up", 4_000_000)?;
            let packets = capture.stop()?;
            let flow = packets
                .iter()
                .filter(|packet| packet.inner.addresses.0 == client.address())
                .filter(|packet| packet.inner.protocol == 6);
            let flow: Vec<&VxlanPacket> = flow.collect();
            ensure!(flow.iter().all(|packet| packet.outer.checksum_is_right));
            ensure!(flow.iter().all(|packet| packet.inner.checksum_is_right));
            ensure!(
                flow.iter()
                    .all(|packet| packet.outer.overhead == 36 && packet.outer.udp_overhead == 16),
                "a length field is wrong in {mode:?} mode"
            );
            let longest = flow.iter().map(|packet| packet.length).max();
            sizes.push(longest);
        }
        ensure!(
            sizes[0] == sizes[1] && sizes[0] == Some(1500),
            "longest packet by the kernel and by the programs: {sizes:?}"
        );
        Ok(())
    });
}
