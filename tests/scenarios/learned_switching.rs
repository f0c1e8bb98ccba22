//! Switching modes and killing agents under bypassed flows costs nothing.

use std::time::{Duration, Instant};

use anyhow::ensure;
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    agent::Agent,
    kube::{Kube, SERVICE, Side},
    load::Load,
    scenario::{repetitions, scenario},
};

/// Long enough for flows to be learned in between.
const PERIOD: Duration = Duration::from_millis(400);

#[test]
fn switches_and_kills_under_load_lose_nothing() {
    scenario(2, |lab| {
        let mut kube = Kube::start(lab, Side::Learned)?;
        let (a, b) = kube.cluster.nodes();
        let (a, b) = (a.clone(), b.clone());
        let load = Load::start_at(kube.client(), kube.server(), SERVICE)?;
        let start = Instant::now();
        let steps = repetitions(20, 50);
        let mut bypassed = 0;
        for number in 1..=steps {
            std::thread::sleep((PERIOD * number).saturating_sub(start.elapsed()));
            let mode = if number % 2 == 1 { Netlink } else { Ebpf };
            // Counters go with the programs.
            bypassed += kube.taken()?[0].encapsulated * u64::from(mode == Netlink);
            a.request_mode(mode)?;
            b.request_mode(mode)?;
            // Two of five steps, in either mode.
            if number % 5 < 2 {
                let index = usize::from(number % 2 == 0);
                let agent = kube.cluster.agents.remove(index);
                let node = agent.node().clone();
                agent.kill9()?;
                let mut agent = Agent::start(&node, &kube.side().options())?;
                agent.wait_for_peers(1)?;
                kube.cluster.agents.insert(index, agent);
            }
        }
        let report = load.finish()?;
        println!("{steps} switches: {}", report.summary());
        report.check_nothing_lost()?;
        ensure!(
            !kube.is_bypassing() || bypassed > 5000,
            "only {bypassed} packets were bypassed in between"
        );
        Ok(())
    });
}
