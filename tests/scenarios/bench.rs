//! The benchmark believes counters, not assumptions.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode;
use lab::{
    bench::{
        measure::{PROBES, Probe, Target},
        peer,
        probe::{self, Pace},
        side::{self, Side},
        stage::Stage,
    },
    binaries,
    etcd::Etcd,
    lab::{DEFAULT_CONFIG, Lab},
};

const PACE: Pace = Pace {
    seconds: 0.2,
    cpu: 0,
    other_cpu: 1,
};

fn sides() -> Result<Vec<Side>> {
    Ok(side::available(&side::help_of(&binaries::flanneld()?)?))
}

fn stage(name: &str) -> Result<Stage> {
    let sides = sides()?;
    let side = sides.iter().find(|side| side.name == name);
    Stage::set(side.with_context(|| format!("no side {name}"))?)
}

fn probe(name: &str) -> &'static Probe {
    PROBES
        .iter()
        .find(|probe| probe.name == name)
        .expect("a probe of that name")
}

#[test]
fn every_side_is_measured_on_its_own_path() -> Result<()> {
    for side in sides()? {
        let stage = Stage::set(&side)?;
        for target in [Target::Pod, Target::Service] {
            if side.way(target).is_none() {
                continue;
            }
            for name in ["tcp_rr", "tcp_crr", "first_packet", "udp_64"] {
                let outcome = probe::run(&stage, probe(name), target, PACE)?;
                println!("{} {target:?} {name}: {:?}", side.name, outcome.figures);
                ensure!(outcome.figures[0] > 0.0, "{name}: nothing was measured");
            }
        }
    }
    Ok(())
}

#[test]
fn programs_detached_during_the_run_make_it_fail() -> Result<()> {
    let stage = stage("direct")?;
    let (_, b) = stage.nodes().context("two nodes")?;
    let pace = Pace {
        seconds: 1.0,
        ..PACE
    };
    probe::run(&stage, probe("tcp_rr"), Target::Pod, pace).context("left alone it passes")?;
    let outcome = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(400));
            b.request_mode(Mode::Netlink).expect("the agent switches");
        });
        probe::run(&stage, probe("tcp_rr"), Target::Pod, pace)
    });
    let error = outcome
        .err()
        .context("a figure of two paths was accepted")?;
    let text = format!("{error:#}");
    ensure!(
        text.contains("wrong path on the Server's node"),
        "failed for another reason: {text}"
    );
    Ok(())
}

#[test]
fn an_agent_that_knows_only_flannels_flags_is_a_peer() -> Result<()> {
    // Ours understands them too, and stands in for the original.
    let lab = Lab::with_nodes(2)?;
    let etcd = Etcd::start(&lab, DEFAULT_CONFIG)?;
    let agents = peer::start_with_etcd(&lab, &binaries::flanneld()?, &etcd)?;
    let (a, b) = lab.pair();
    let (client, server) = (a.add_pod()?, b.add_pod()?);
    client.ping(&server.address().to_string(), 2)?;
    drop(agents);
    Ok(())
}
