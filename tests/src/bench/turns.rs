//! Measures whose two ends share one CPU: the sides ask in turn, a twentieth of a second each.
//!
//! Such a CPU changes its speed by a fifth from one second to the next, with whatever its other
//! half and other machines on the same hardware do. Sides that were measured for a second each
//! met different speeds; those that take short turns meet the same.

use anyhow::{Context, Result, ensure};

use super::{
    measure::{Asked, Probe, Target},
    probe::{self, Measured, Outcome, Pace, Proof},
    proof::Flows,
    rounds::order,
    stage::{Passed, Port, Stage},
};
use crate::{
    ends::Ends,
    traffic::{
        request_response::{Protocol, ServeReport},
        short_connections::ServeReport as ConnectionsServed,
        timing::AskReport,
    },
};

/// Milliseconds of a turn: long enough that what another side left in the caches is forgotten.
const TURN: f64 = 50.0;

/// Both ends of one side, ready to ask.
struct Asking {
    asked: Asked,
    ends: Ends,
}

/// One side alone.
pub(super) fn alone(stage: &Stage, asked: Asked, target: Target, pace: Pace) -> Result<Measured> {
    let mut alone = [Asking::start(stage, asked, target, pace)?];
    take_turns(&mut alone, seconds_of(asked, pace))?;
    let [one] = alone;
    one.finish()
}

/// All sides, what came of each; the counters have proven its path.
pub(super) fn all(
    stages: &[&Stage],
    probe: &Probe,
    asked: Asked,
    target: Target,
    pace: Pace,
) -> Result<Vec<Outcome>> {
    let proofs = stages
        .iter()
        .map(|stage| Proof::begin(stage, probe, target))
        .collect::<Result<Vec<_>>>()?;
    let mut asking = stages
        .iter()
        .map(|stage| {
            let started = Asking::start(stage, asked, target, pace);
            started.with_context(|| format!("{} on side {}", probe.name, stage.side.name))
        })
        .collect::<Result<Vec<_>>>()?;
    take_turns(&mut asking, seconds_of(asked, pace)).with_context(|| probe.name)?;
    proofs
        .into_iter()
        .zip(asking)
        .map(|(proof, asking)| proof.end(asking.finish()))
        .collect()
}

/// How long each asks. Of every flow that was ever begun an entry stays in conntrack for a while.
fn seconds_of(asked: Asked, pace: Pace) -> f64 {
    match asked {
        Asked::ByFirstPackets => pace.seconds / 4.0,
        _ => pace.seconds,
    }
}

/// Each asks for so long in all, after a tenth of it to warm up.
fn take_turns(all: &mut [Asking], seconds: f64) -> Result<()> {
    let milliseconds = seconds * 1000.0;
    let turns = (milliseconds / TURN).round().max(1.0);
    for asking in all.iter_mut() {
        asking.turn(milliseconds / 10.0)?;
    }
    for turn in 0..turns as usize {
        for index in order(all.len(), turn) {
            all[index].turn(milliseconds / turns)?;
        }
    }
    Ok(())
}

impl Asking {
    fn start(stage: &Stage, asked: Asked, target: Target, pace: Pace) -> Result<Self> {
        let cpu = pace.cpu;
        let (port, serve, ask) = match asked {
            Asked::InOneFlow(protocol) => {
                let protocol = format!("--protocol {}", protocol.name());
                let (serve, ask) = (format!("rr-serve {protocol}"), format!("rr {protocol}"));
                (Port::RequestResponse, serve, ask)
            }
            Asked::ByConnections => (Port::Connections, "crr-serve".into(), "crr".into()),
            Asked::ByFirstPackets => {
                let serve = format!("rr-serve --protocol {}", Protocol::Udp.name());
                (Port::RequestResponse, serve, "rr-first".into())
            }
        };
        let ends = probe::start(
            stage,
            stage.way_to(port, target),
            &format!("{serve} --cpu {cpu}"),
            &format!("{ask} --in-turns --cpu {cpu}"),
        )?;
        Ok(Self { asked, ends })
    }

    fn turn(&mut self, milliseconds: f64) -> Result<()> {
        let client = &mut self.ends.client;
        client.tell(&milliseconds.round().to_string())?;
        let _made_so_far: u64 = client.next_report()?;
        Ok(())
    }

    fn finish(self) -> Result<Measured> {
        let (flows, packets_each) = match self.asked {
            Asked::InOneFlow(_) => (Flows::Long, 1),
            // SYN, request, FIN; their answers.
            Asked::ByConnections => (Flows::Short, 3),
            Asked::ByFirstPackets => (Flows::First, 1),
        };
        let report: AskReport = self.ends.client.finish()?;
        let all = report.all_transactions;
        if self.asked == Asked::ByConnections {
            let ConnectionsServed { served } = self.ends.server.finish()?;
            ensure!(
                served == all,
                "{served} connections were served, {all} made"
            );
        } else {
            let served: ServeReport = self.ends.server.finish()?;
            served.check(all)?;
        }
        let latency = report.latency;
        let figures = match self.asked {
            Asked::ByFirstPackets => vec![latency.p50_us, latency.p99_us],
            _ => vec![
                report.per_second,
                latency.p50_us,
                latency.p99_us,
                latency.p999_us,
            ],
        };
        let passed = Passed {
            there: packets_each * all,
            back: packets_each * all,
        };
        let outcome = Outcome {
            figures,
            latency: Some(latency),
            transactions: Some(all),
        };
        Ok((outcome, flows, passed))
    }
}
