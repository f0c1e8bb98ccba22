//! Many flows at once are never slower than on the kernel path, at no moment.

use anyhow::{Context, Result};
use lab::{
    kube::{Kube, Via, compare},
    scenario::repetitions,
    traffic::{many_flows::ManyReport, request_response::Protocol},
};

/// The share of the kernel path's rate below which a second is slow: others use
/// this machine as well.
const NOISE: f64 = 0.9;

fn seconds() -> f64 {
    f64::from(repetitions(4, 20))
}

/// As many questions under way as the flows allow, but never more than the
/// kernel's queues hold.
fn run(kube: &Kube, via: Via, protocol: Protocol, flows: usize) -> Result<ManyReport> {
    let window = flows.min(256);
    let arguments = format!("--flows {flows} --window {window} --seconds {}", seconds());
    let before = kube.taken()?;
    let report = kube
        .many_flows(via, protocol, &arguments, None)
        .with_context(|| format!("{flows} {protocol:?} flows"))?;
    println!(
        "{:?} {flows} {protocol:?} flows: {:.0}/s, worst second {:.0}, longest {:.0} ms, {} lost",
        kube.side(),
        report.per_second(),
        report.worst_second(),
        report.longest_ms,
        report.lost
    );
    report.check()?;
    // The first round of each flow is on the kernel path, the rest is not.
    kube.expect_bypassed(&before, if flows > 1000 { 0.5 } else { 0.8 })?;
    Ok(report)
}

fn never_slower(protocol: Protocol, via: Via) {
    let all = compare(|kube| {
        [16, 256, 4096]
            .into_iter()
            .map(|flows| run(kube, via, protocol, flows))
            .collect::<Result<Vec<_>>>()
    });
    for (netlink, learned) in all.netlink.iter().zip(&all.learned) {
        assert!(
            learned.worst_second() >= NOISE * netlink.per_second(),
            "{} {protocol:?} flows: {:.0} in the worst second, the kernel path has {:.0} ({:.0} in its worst): {:?}",
            netlink.flows,
            learned.worst_second(),
            netlink.per_second(),
            netlink.worst_second(),
            learned.samples
        );
    }
}

#[test]
fn udp_flows_are_never_slower() {
    never_slower(Protocol::Udp, Via::Service);
}

#[test]
fn tcp_flows_are_never_slower() {
    never_slower(Protocol::Tcp, Via::Service);
}

#[test]
fn fifteen_thousand_flows_in_turn_gain() {
    const FLOWS: usize = 15_000;
    const CPU: usize = 1;
    let rates = compare(|kube| {
        // Long enough for every flow to have its turn often.
        let arguments = format!("--flows {FLOWS} --window 1 --seconds {}", 2.0 * seconds());
        let report = kube.many_flows(Via::Pod, Protocol::Udp, &arguments, Some(CPU))?;
        println!("{:?}: {:.0}/s", kube.side(), report.per_second());
        report.check()?;
        // The last half: what it is once all are learned.
        let later = &report.samples[report.samples.len() / 2..];
        Ok(later.iter().sum::<u64>() as f64 / later.len() as f64)
    });
    let ratio = rates.learned / rates.netlink;
    println!("ratio {ratio:.2}");
    assert!(ratio >= 1.7, "{ratio:.2} × the kernel path instead of 1.7");
}
