//! Flows that fall silent for longer than connection tracking remembers, and the
//! settings that bypassed connections need.

use std::thread;

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode;
use lab::{
    agent::Agent,
    exchange,
    kube::{Kube, Side, Via, pause},
    lab::Lab,
    node::Node,
    scenario::{repetitions, scenario},
    traffic::{connections::Ending, request_response::Protocol},
};

const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";
const IGNORE_RST: &str = "net.netfilter.nf_conntrack_tcp_ignore_invalid_rst";
const UNACKNOWLEDGED: &str = "net.netfilter.nf_conntrack_tcp_timeout_unacknowledged";
const MAX_RETRANS: &str = "net.netfilter.nf_conntrack_tcp_timeout_max_retrans";

/// Starts on nodes whose timeouts are short from the beginning.
fn with_short_timeouts(side: Side, body: impl FnOnce(&Kube) -> Result<()>) {
    scenario(2, |lab: &Lab| {
        for node in lab.nodes() {
            for (key, seconds) in [
                (UNACKNOWLEDGED, "3"),
                (MAX_RETRANS, "3"),
                ("net.netfilter.nf_conntrack_udp_timeout", "2"),
                ("net.netfilter.nf_conntrack_udp_timeout_stream", "3"),
            ] {
                node.namespace().sysctl(key, seconds)?;
            }
        }
        let kube = Kube::start(lab, side)?;
        body(&kube).with_context(|| format!("{side:?}"))
    });
}

#[test]
fn bulk_then_idle_then_a_request_is_alive() {
    for side in [Side::Netlink, Side::Learned] {
        with_short_timeouts(side, |kube| {
            let idle = repetitions(6, 30);
            for via in Via::BOTH {
                let before = kube.taken()?;
                let (client, server) = kube.connections(
                    via,
                    Ending::ClientFin,
                    &format!(
                        "--count 4 --at-once 4 --exchanges 6 --size 30000000 --idle {idle} --patience 5"
                    ),
                )?;
                client.check()?;
                // The server's patience is longer.
                ensure!(server.corrupt == 0, "{server:?}");
                kube.expect_bypassed(&before, 0.8)?;
            }
            Ok(())
        });
    }
}

#[test]
fn flows_idle_beyond_every_timeout_go_on() {
    const SHORT: u32 = 6;
    for (side, idle) in [
        (Side::Netlink, SHORT),
        (Side::Learned, repetitions(SHORT, 600)),
    ] {
        with_short_timeouts(side, |kube| {
            let before = kube.taken()?;
            thread::scope(|scope| {
                let both = [Protocol::Udp, Protocol::Tcp];
                let both = both.map(|protocol| scope.spawn(move || be_idle(kube, protocol, idle)));
                both.into_iter()
                    .try_for_each(|idle| idle.join().expect("no panic"))
            })?;
            kube.expect_bypassed(&before, 0.8)
        });
    }
}

/// Flows that are busy, then idle for so many seconds, then busy again.
fn be_idle(kube: &Kube, protocol: Protocol, idle: u32) -> Result<()> {
    let seconds = idle + 4;
    let arguments = format!("--flows 16 --rate 2000 --idle {idle} --seconds {seconds}");
    let report = kube.many_flows(Via::Service, protocol, &arguments, None)?;
    report.check().with_context(|| format!("{protocol:?}"))?;
    let after = &report.samples[report.samples.len().saturating_sub(10)..];
    ensure!(
        after.iter().all(|answers| *answers > 0),
        "{protocol:?}: {:?}",
        report.samples
    );
    Ok(())
}

fn settings(node: &Node) -> Result<[String; 4]> {
    let value = |key| node.namespace().sysctl_value(key);
    Ok([
        value(LIBERAL)?,
        value(IGNORE_RST)?,
        value(UNACKNOWLEDGED)?,
        value(MAX_RETRANS)?,
    ])
}

#[test]
fn netlink_mode_leaves_the_settings_alone() {
    scenario(2, |lab| {
        let before = settings(&lab[0])?;
        let kube = Kube::start(lab, Side::Netlink)?;
        kube.stream(Via::Service, "--direction up --seconds 1")?
            .result()?
            .check(1_000_000)?;
        ensure!(settings(&lab[0])? == before);
        ensure!(lab[0].status()?.conntrack_kept.is_none());
        Ok(())
    });
}

#[test]
fn the_settings_are_there_before_the_first_bypass_and_stay_while_flows_live() {
    scenario(2, |lab| {
        let before = settings(&lab[0])?;
        let mut kube = Kube::start(lab, Side::Learned)?;
        let during = settings(&lab[0])?;
        ensure!(
            during[0] == "1" && during[1] == "1",
            "be_liberal and ignore_invalid_rst are {during:?}"
        );
        let established = lab[0]
            .namespace()
            .sysctl_value("net.netfilter.nf_conntrack_tcp_timeout_established")?;
        ensure!(
            during[2] == established && during[3] == established,
            "timeouts of unacknowledged data are {during:?}, not {established}"
        );
        let stream = kube.stream(Via::Service, "--direction both --pace 0.3")?;
        pause(1.0);
        for node in lab.nodes() {
            node.mode(Mode::Netlink)?;
        }
        // A flow that was bypassed lives: the settings are what keeps it alive.
        pause(0.5);
        ensure!(
            settings(&lab[0])?[0] == "1",
            "restored under a flow that was bypassed"
        );
        // An agent that dies and comes back remembers what was before.
        kube.cluster.agents.remove(0).kill9()?;
        let agent = Agent::start(&lab[0], &kube.side().options())?;
        kube.cluster.agents.insert(0, agent);
        ensure!(settings(&lab[0])?[0] == "1");
        stream.finish()?.check(1_000_000)?;
        println!("before {before:?}, during {during:?}");
        Ok(())
    });
}

#[test]
fn what_somebody_sets_back_costs_no_stream() {
    scenario(2, |lab| {
        let kube = Kube::start(lab, Side::Learned)?;
        let stream = kube.stream(Via::Service, "--direction up --pace 0.5")?;
        let ping = kube.ping(Via::Service, "--rate 1000")?;
        pause(1.0);
        let before = kube.taken()?;
        pause(0.5);
        kube.expect_bypassed(&before, 0.8)?;
        lab[0].namespace().sysctl(LIBERAL, "0")?;
        // Noticed by a look now and then: nothing tells of it.
        pause(12.0);
        let status = lab[0].flannelctl(&["status"])?;
        ensure!(
            settings(&lab[0])?[0] == "1" || status.contains("be_liberal"),
            "neither set again nor said:\n{status}"
        );
        stream.finish()?.check(1_000_000)?;
        exchange::check_nothing_lost(&ping.finish()?)
    });
}
