//! Many flows at once: each is answered, each gets its verdict.

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Status;
use lab::{
    kube::{Kube, Side, Via, learned, pause},
    policy::{By, Policy},
    scenario::{repetitions, scenario},
    traffic::request_response::Protocol,
};

/// Turns of a flow until its verdict at most, where it does not have to wait for a place.
const FIRST_TURNS: f64 = 12.0;
/// Flows that can be on their way to a verdict at a time.
const PLACES: f64 = 1024.0;

/// As many questions under way as the flows allow, but never more than the
/// kernel's queues hold. How fast that is, second by second, beside the kernel
/// path, is a measure of `cargo xtask bench`.
fn all_answered_and_bypassed(protocol: Protocol) {
    learned(|kube| {
        for flows in [16_u32, 256, 4096] {
            let window = flows.min(256);
            let seconds = repetitions(2, 8);
            let arguments = format!("--flows {flows} --window {window} --seconds {seconds}");
            let before = kube.taken()?;
            let report = kube.many_flows(Via::Service, protocol, &arguments, None)?;
            println!(
                "{protocol:?} {flows} flows: {:.0}/s, worst second {:.0}, longest {:.0} ms",
                report.per_second(),
                report.worst_second(),
                report.longest_ms
            );
            let described = || format!("{flows} {protocol:?} flows");
            report.check().with_context(described)?;
            // Each flow's first turns are on the kernel path; on a slow machine that is most.
            let turns = report.transactions as f64 / f64::from(flows);
            let first = FIRST_TURNS * (f64::from(flows) / PLACES).max(1.0);
            let share = 0.8 * (1.0 - first / turns);
            kube.expect_bypassed(&before, share.max(0.02))
                .with_context(described)?;
        }
        Ok(())
    });
}

#[test]
fn udp_flows_are_all_answered_and_bypassed() {
    all_answered_and_bypassed(Protocol::Udp);
}

#[test]
fn tcp_flows_are_all_answered_and_bypassed() {
    all_answered_and_bypassed(Protocol::Tcp);
}

#[test]
fn thousands_of_flows_in_turn_are_learned() {
    const FLOWS: usize = 15_000;
    learned(|kube| {
        // Many under way, so that each has its turn often enough on any machine.
        let arguments = format!("--flows {FLOWS} --window 256 --seconds 10");
        let before = kube.taken()?;
        kube.many_flows(Via::Pod, Protocol::Udp, &arguments, None)?
            .check()?;
        kube.expect_bypassed(&before, 0.2)
    });
}

/// Packets of all reasons whose name begins so and ends in one of `kinds`.
fn learned_as(status: &Status, way: &str, kinds: &[&str]) -> u64 {
    kinds
        .iter()
        .map(|kind| status.packets(&format!("learn_{way}_{kind}")))
        .sum()
}

#[test]
fn slow_packets_of_many_flows_are_recognised() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        // Each change of rules sends every flow through the stack once.
        let stranger = "192.0.2.1".parse()?;
        let policy = Policy::prepare(a, By::Nft, stranger, stranger)?;
        let before = [a.status()?, b.status()?];
        std::thread::scope(|scope| -> Result<()> {
            let flows = scope.spawn(|| {
                let arguments = "--flows 256 --seconds 6";
                kube.many_flows(Via::Service, Protocol::Udp, arguments, None)
            });
            for _ in 0..2 {
                pause(1.2);
                policy.deny()?;
                pause(1.2);
                policy.allow()?;
            }
            flows.join().expect("no panic")?.check()
        })?;
        for (node, before) in [a, b].into_iter().zip(&before) {
            let after = node.status()?;
            for way in ["out", "in"] {
                let since = |kinds: &[&str]| {
                    learned_as(&after, way, kinds) - learned_as(before, way, kinds)
                };
                let matched = since(&["confirmed", "counted", "learned", "changed"]);
                let not = since(&["unmatched", "ambiguous"]);
                println!("{} {way}: {matched} recognised, {not} not", node.name());
                ensure!(
                    !kube.is_bypassing()
                        || matched > 1000 && matched as f64 >= 0.95 * (matched + not) as f64,
                    "{} {way}: {matched} slow packets recognised, {not} not\n{}",
                    node.name(),
                    lab::paths::describe(node)
                );
            }
        }
        Ok(())
    });
}

#[test]
fn more_flows_than_the_table_holds_go_on() {
    scenario(2, |lab| {
        let options = Side::Learned.options().argument("--fast-path-flows=1024");
        let kube = Kube::start_with(lab, Side::Learned, &options)?;
        let seconds = repetitions(3, 10);
        let arguments = format!("--flows 4096 --window 256 --seconds {seconds}");
        kube.many_flows(Via::Service, Protocol::Udp, &arguments, None)?
            .check()?;
        // Few flows are learned in the full table at once.
        let before = kube.taken()?;
        kube.many_flows(Via::Service, Protocol::Udp, "--flows 16 --seconds 2", None)?
            .check()?;
        kube.expect_bypassed(&before, 0.8)
    });
}
