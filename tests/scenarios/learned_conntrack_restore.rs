//! Conntrack's settings go back once no flow that ever bypassed it can live, and TCP keeps to the
//! stack while somebody else holds them otherwise.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::{Mode, Status};
use lab::{
    agent::Agent,
    exchange::RunningStream,
    kube::{Kube, Side, Via, pause},
    lab::Lab,
    node::Node,
    paths::Way,
    scenario::scenario,
    wait,
};

const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";
const SETTINGS: [&str; 4] = [
    LIBERAL,
    "net.netfilter.nf_conntrack_tcp_ignore_invalid_rst",
    "net.netfilter.nf_conntrack_tcp_timeout_unacknowledged",
    "net.netfilter.nf_conntrack_tcp_timeout_max_retrans",
];
/// Two looks and a busy machine.
const SOON: Duration = Duration::from_secs(15);
const STREAM: &str = "--direction both --pace 0.3";

/// A stream to the server pod itself, one more beside others.
fn another(kube: &Kube, port: u16) -> Result<RunningStream> {
    let server = kube.server();
    let to = SocketAddrV4::new(server.address(), port);
    RunningStream::start_at(kube.client().namespace(), (server.namespace(), to), STREAM)
}

fn settings(node: &Node) -> Result<Vec<String>> {
    let values = SETTINGS.iter();
    values
        .map(|key| node.namespace().sysctl_value(key))
        .collect()
}

fn wait_until_kept(node: &Node) -> Result<Status> {
    wait::until("flows are counted that hold the settings", SOON, || {
        let status = node.status()?;
        let kept = status.conntrack_kept.as_ref();
        Ok(kept.is_some_and(|kept| kept.flows > 0).then_some(status))
    })
}

fn wait_until_restored(node: &Node, before: &[String]) -> Result<()> {
    wait::until_true("conntrack's settings are as they were", SOON, || {
        Ok(settings(node)? == before && node.status()?.conntrack_kept.is_none())
    })
    .with_context(|| format!("{:?}, before {before:?}", settings(node)))
}

fn bypassed(lab: &Lab, body: impl FnOnce(&mut Kube, &[String]) -> Result<()>) -> Result<()> {
    let before = settings(&lab[0])?;
    let mut kube = Kube::start(lab, Side::Learned)?;
    ensure!(settings(&lab[0])? != before, "{before:?}");
    body(&mut kube, &before)
}

#[test]
fn the_settings_go_back_with_the_last_flow_that_bypassed() {
    scenario(2, |lab| {
        bypassed(lab, |kube, before| {
            let direct = another(kube, 5101)?;
            let service = kube.stream(Via::Service, STREAM)?;
            pause(1.0);
            for node in lab.nodes() {
                node.mode(Mode::Netlink)?;
                wait_until_kept(node)?;
            }
            let said = lab[0].flannelctl(&["status"])?;
            ensure!(said.contains("settings kept for 2 flows"), "{said}");
            // One that never bypassed holds nothing.
            let young = another(kube, 5102)?;
            direct.finish()?.check(1_000_000)?;
            pause(5.0);
            ensure!(
                settings(&lab[0])?[0] == "1",
                "restored under a flow that was bypassed"
            );
            service.finish()?.check(1_000_000)?;
            for node in lab.nodes() {
                wait_until_restored(node, before)?;
            }
            let log = kube.cluster.agents[0].log();
            ensure!(
                log.contains("conntrack's settings are as they were"),
                "{log}"
            );
            young.finish()?.check(1_000_000)
        })
    });
}

#[test]
fn switching_back_on_keeps_the_settings() {
    scenario(2, |lab| {
        bypassed(lab, |kube, before| {
            let stream = kube.stream(Via::Service, STREAM)?;
            pause(1.0);
            lab[0].mode(Mode::Netlink)?;
            wait_until_kept(&lab[0])?;
            lab[0].mode(Mode::Ebpf)?;
            ensure!(lab[0].status()?.conntrack_kept.is_none());
            stream.finish()?.check(1_000_000)?;
            pause(6.0);
            ensure!(settings(&lab[0])?[0] == "1", "restored under a bypass");
            // The record is still that of the beginning.
            lab[0].mode(Mode::Netlink)?;
            wait_until_restored(&lab[0], before)
        })
    });
}

#[test]
fn an_agent_that_finds_the_record_of_another_restores() {
    scenario(2, |lab| {
        bypassed(lab, |kube, before| {
            let stream = kube.stream(Via::Service, STREAM)?;
            pause(1.0);
            kube.cluster.agents.remove(0).kill9()?;
            let agent = Agent::start(&lab[0], &Side::Netlink.options())?;
            kube.cluster.agents.insert(0, agent);
            wait_until_kept(&lab[0])?;
            ensure!(settings(&lab[0])?[0] == "1");
            stream.finish()?.check(1_000_000)?;
            wait_until_restored(&lab[0], before)
        })
    });
}

#[test]
fn tcp_keeps_to_the_stack_while_somebody_holds_the_settings() {
    scenario(2, |lab| {
        bypassed(lab, |kube, _| {
            let stream = kube.stream(Via::Service, STREAM)?;
            pause(1.0);
            let before = kube.taken()?;
            pause(0.5);
            kube.expect_bypassed(&before, 0.8)?;
            let mut young = None;
            let held =
                |status: &Status| status.bypass.as_ref().and_then(|one| one.tcp_held.clone());
            let mut reasons = 0;
            for round in 0..20 {
                lab[0].namespace().sysctl(LIBERAL, "0")?;
                pause(0.4);
                if round < 5 {
                    continue;
                }
                if young.is_none() {
                    // It never bypassed, so that it does not mind the setting.
                    young = Some(another(kube, 5101)?);
                }
                let status = lab[0].status()?;
                let reason = held(&status).context("TCP bypasses, and be_liberal is 0")?;
                ensure!(reason.contains("conntrack"), "{reason}");
                reasons += 1;
            }
            ensure!(reasons == 15);
            let before = kube.taken()?[0];
            pause(1.0);
            lab[0].namespace().sysctl(LIBERAL, "0")?;
            let taken = lab::paths::Taken::now(&lab[0])?.since(before);
            for way in [Way::Out, Way::In] {
                let (programs, tunnel) = taken.on(way);
                ensure!(programs * 10 < tunnel, "{way:?}: {programs} and {tunnel}");
            }
            let said = lab[0].flannelctl(&["status"])?;
            ensure!(said.contains("TCP DOES NOT bypass the stack"), "{said}");
            // They stay as they must be: TCP comes back.
            wait::until_true("TCP bypasses again", Duration::from_secs(20), || {
                Ok(held(&lab[0].status()?).is_none())
            })?;
            ensure!(settings(&lab[0])?[0] == "1");
            pause(1.0);
            let before = kube.taken()?;
            pause(0.5);
            kube.expect_bypassed(&before, 0.8)?;
            young.context("begun above")?.finish()?.check(1_000_000)?;
            stream.finish()?.check(1_000_000)
        })
    });
}
