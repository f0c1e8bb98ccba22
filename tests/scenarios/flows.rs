//! What was learned can be seen: `flannelctl flows` and the bypass in the status.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Context as _, Result, ensure};
use flannel_user::observe::flows::{Flow, Flows, Path, Protocol};
use lab::{
    agent::AgentOptions,
    cluster::Cluster,
    exchange::{ECHO_PORT, STREAM_PORT},
    kube::{Kube, SERVICE, Via, learned},
    node::Node,
    scenario::scenario,
    wait,
};

fn flows(node: &Node, filters: &[&str]) -> Result<Flows> {
    let arguments: Vec<&str> = ["flows", "-o", "json"]
        .into_iter()
        .chain(filters.iter().copied())
        .collect();
    let text = node.flannelctl(&arguments)?;
    serde_json::from_str(&text).with_context(|| format!("this is no flows document:\n{text}"))
}

/// Waits for the flow with these filters of which both directions bypass the stack.
fn whole_flow(node: &Node, filters: &[&str]) -> Result<Flow> {
    let is_fast = |flow: &Flow| {
        flow.directions().count() == 2
            && flow
                .directions()
                .all(|one| one.path == Path::Fast && one.packets > 0)
    };
    wait::until(
        &format!("{}: one fast flow {filters:?}", node.name()),
        Duration::from_secs(5),
        || {
            let found = flows(node, filters)?.flows;
            Ok(match found.as_slice() {
                [flow] if is_fast(flow) => Some(*flow),
                _ => None,
            })
        },
    )
}

fn ensure_ends(
    flow: &Flow,
    protocol: Protocol,
    peer: SocketAddrV4,
    wire: SocketAddrV4,
    node: &Node,
) -> Result<()> {
    let ends = &flow.ends;
    ensure!(
        (ends.protocol, ends.peer, ends.wire, ends.node)
            == (protocol, peer, wire, node.public_ip()),
        "{protocol} to {peer} on the wire {wire} at {}, but {flow:?}",
        node.public_ip()
    );
    Ok(())
}

#[test]
fn learned_flows_are_seen_with_their_translation() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        let client = kube.client().address().to_string();
        let through_service = kube.ping(Via::Service, "--rate 500")?;
        let direct = kube.stream(Via::Pod, "--direction both --pace 0.5")?;

        let server = kube.server().address().to_string();
        let echo_port = ECHO_PORT.to_string();
        let echo = kube.server().at(ECHO_PORT);
        let udp = whole_flow(a, &["--port", &echo_port])?;
        let service = SocketAddrV4::new(SERVICE, ECHO_PORT);
        ensure_ends(&udp, Protocol::Udp, service, echo, b)?;
        ensure!(*udp.ends.pod.ip() == kube.client().address(), "{udp:?}");
        let stream_port = STREAM_PORT.to_string();
        let tcp = whole_flow(a, &["--pod", &client, "--port", &stream_port])?;
        let stream = kube.server().at(STREAM_PORT);
        ensure_ends(&tcp, Protocol::Tcp, stream, stream, b)?;

        // The server's node sees the same flow from the other end, where nothing is translated.
        let at_server = whole_flow(b, &["--pod", &server, "--port", &echo_port])?;
        ensure_ends(&at_server, Protocol::Udp, udp.ends.pod, udp.ends.pod, a)?;
        ensure!(at_server.ends.pod == echo, "{at_server:?}");

        filters_take_what_they_say(kube, &udp, &tcp)?;
        let status = a.status()?.bypass.context("the status has no bypass")?;
        ensure!(
            status.table_out.flows >= 2 && status.table_in.flows >= 2 && !status.table_out.full,
            "{status:?}"
        );
        ensure!(
            status.held.is_none() && status.tcp_held.is_none() && status.validity_seconds >= 2.0,
            "{status:?}"
        );
        drop((through_service, direct));
        Ok(())
    });
}

fn filters_take_what_they_say(kube: &Kube, udp: &Flow, tcp: &Flow) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    let (service, server) = (SERVICE.to_string(), kube.server().address().to_string());
    let node = b.public_ip().to_string();
    let both = [udp.ends, tcp.ends];
    let cases: [(&[&str], usize); 5] = [
        (&["--peer", &service], 1),
        (&["--peer", &server], 2),
        (&["--peer", &node], 2),
        (&["--pod", &server], 0),
        (&["--peer", &node, "--limit", "1"], 1),
    ];
    for (filters, expected) in cases {
        let answer = flows(a, filters)?;
        ensure!(
            answer.flows.len() == expected
                && answer.flows.iter().all(|flow| both.contains(&flow.ends)),
            "{filters:?} takes {answer:?}"
        );
    }
    ensure!(
        flows(a, &["--peer", &node, "--limit", "1"])?.matching == 2,
        "what a limit cuts off is not counted"
    );
    let text = a.flannelctl(&["flows"])?;
    for part in [udp.ends.peer, udp.ends.wire, udp.ends.pod, tcp.ends.peer] {
        ensure!(text.contains(&part.to_string()), "no {part} in:\n{text}");
    }
    Ok(())
}

#[test]
fn an_idle_flow_is_with_the_kernel_and_direct_says_what_it_is_blind_to() {
    learned(|kube| {
        let (a, _) = kube.cluster.nodes();
        kube.ping(Via::Pod, "--rate 500 --count 100")?.result()?;
        let port = ECHO_PORT.to_string();
        wait::until_true("the flow is stale", Duration::from_secs(10), || {
            let text = a.flannelctl(&["flows", "--port", &port])?;
            Ok(text.contains("kernel:stale"))
        })
    });
    scenario(2, |lab| {
        let cluster = Cluster::start_with(lab, &[AgentOptions::default().fast_path("direct")])?;
        let (a, _) = cluster.nodes();
        a.flannelctl(&["flows"])?;
        let text = a.flannelctl(&["status"])?;
        ensure!(text.contains("BLIND TO POLICIES"), "{text}");
        ensure!(text.contains("from the SYN on"), "{text}");
        Ok(())
    });
}
