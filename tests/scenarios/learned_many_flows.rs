//! Many flows at once are never slower than on the kernel path, at no moment.

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::{Mode, Status};
use lab::{
    kube::{Kube, Side, Via, learned, pause},
    policy::{By, Policy},
    scenario::{repetitions, scenario},
    traffic::{many_flows::ManyReport, request_response::Protocol},
};

/// The share of the kernel path's rate below which a second is slow: others use
/// this machine as well.
const NOISE: f64 = 0.9;

/// Length of one round; the two sides take turns, so that both have the same machine.
const ROUND: f64 = 2.6;

/// Figures of both sides by turns.
#[derive(Debug, Default)]
struct Rounds {
    netlink: Vec<ManyReport>,
    learned: Vec<ManyReport>,
}

/// The median.
fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Rounds {
    fn run(
        kube: &Kube,
        count: u32,
        body: impl Fn(&Kube, Mode) -> Result<ManyReport>,
    ) -> Result<Self> {
        let (a, b) = kube.cluster.nodes();
        let mut rounds = Self::default();
        for number in 0..2 * count {
            let mode = if number % 2 == 0 {
                Mode::Netlink
            } else {
                Mode::Ebpf
            };
            for node in [a, b] {
                node.mode(mode)?;
            }
            let report = body(kube, mode)?;
            println!(
                "{mode:?} {} flows: {:.0}/s, worst second {:.0}, longest {:.0} ms, {} lost",
                report.flows,
                report.per_second(),
                report.worst_second(),
                report.longest_ms,
                report.lost
            );
            report.check()?;
            match mode {
                Mode::Netlink => rounds.netlink.push(report),
                Mode::Ebpf => rounds.learned.push(report),
            }
        }
        Ok(rounds)
    }

    fn kernel_rate(&self) -> f64 {
        middle(self.netlink.iter().map(ManyReport::per_second))
    }

    /// Demands that no second was slower than the kernel path.
    fn check_never_slower(&self) -> Result<()> {
        let kernel = self.kernel_rate();
        for report in &self.learned {
            ensure!(
                report.worst_second() >= NOISE * kernel,
                "{} flows: {:.0} in the worst second, the kernel path has {kernel:.0}: {:?}",
                report.flows,
                report.worst_second(),
                report.samples
            );
        }
        Ok(())
    }
}

/// As many questions under way as the flows allow, but never more than the
/// kernel's queues hold.
fn round(kube: &Kube, mode: Mode, protocol: Protocol, flows: usize) -> Result<ManyReport> {
    let window = flows.min(256);
    let arguments = format!("--flows {flows} --window {window} --seconds {ROUND}");
    let before = kube.taken()?;
    let report = kube
        .many_flows(Via::Service, protocol, &arguments, None)
        .with_context(|| format!("{flows} {protocol:?} flows"))?;
    if mode == Mode::Ebpf {
        // The first rounds of each flow are on the kernel path, the rest is not.
        kube.expect_bypassed(&before, if flows > 1000 { 0.3 } else { 0.8 })?;
    }
    Ok(report)
}

fn never_slower(protocol: Protocol) {
    learned(|kube| {
        for flows in [16, 256, 4096] {
            Rounds::run(kube, repetitions(2, 8), |kube, mode| {
                round(kube, mode, protocol, flows)
            })?
            .check_never_slower()
            .with_context(|| format!("{protocol:?}"))?;
        }
        Ok(())
    });
}

#[test]
fn udp_flows_are_never_slower() {
    never_slower(Protocol::Udp);
}

#[test]
fn tcp_flows_are_never_slower() {
    never_slower(Protocol::Tcp);
}

#[test]
fn fifteen_thousand_flows_in_turn_gain() {
    const FLOWS: usize = 15_000;
    const CPU: usize = 1;
    learned(|kube| {
        let rounds = Rounds::run(kube, repetitions(2, 7), |kube, _| {
            // Long enough for every flow to have its turn often.
            let arguments = format!("--flows {FLOWS} --window 1 --seconds 6");
            kube.many_flows(Via::Pod, Protocol::Udp, &arguments, Some(CPU))
        })?;
        // The second half: what it is once all are learned.
        let late = |report: &ManyReport| {
            let later = &report.samples[report.samples.len() / 2..];
            later.iter().sum::<u64>() as f64 / later.len() as f64
        };
        let ratio =
            middle(rounds.learned.iter().map(late)) / middle(rounds.netlink.iter().map(late));
        println!("ratio {ratio:.2}");
        ensure!(ratio >= 1.7, "{ratio:.2} × the kernel path instead of 1.7");
        Ok(())
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
        let rounds = Rounds::run(&kube, repetitions(2, 8), |kube, _| {
            let arguments = format!("--flows 4096 --window 256 --seconds {ROUND}");
            kube.many_flows(Via::Service, Protocol::Udp, &arguments, None)
        })?;
        rounds.check_never_slower()?;
        // Few flows are learned in the full table at once.
        let before = kube.taken()?;
        kube.many_flows(Via::Service, Protocol::Udp, "--flows 16 --seconds 2", None)?
            .check()?;
        kube.expect_bypassed(&before, 0.8)
    });
}
