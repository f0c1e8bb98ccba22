//! What the fast path would pass by is never bypassed: queues at a pod's veth,
//! IPsec policies, programs behind NFQUEUE.

use anyhow::{Context, Result, ensure};
use lab::{
    exchange::{self, ECHO_PORT},
    kube::{Kube, Side, Via, learned, pause},
    pod::Pod,
    scenario::scenario,
    task::Task,
    traffic::{queue::QueueReport, stream::Half},
};

/// Rate of the token bucket.
const MEGABITS: f64 = 200.0;

fn shape(pod: &Pod) -> Result<()> {
    let words = format!(
        "tc qdisc add dev {} root tbf rate {MEGABITS}mbit burst 64kb latency 50ms",
        pod.interface()
    );
    let argv: Vec<&str> = words.split_whitespace().collect();
    pod.node().namespace().run(&argv).map(drop)
}

fn unshape(pod: &Pod) -> Result<()> {
    let argv = ["tc", "qdisc", "del", "dev", pod.interface(), "root"];
    pod.node().namespace().run(&argv).map(drop)
}

fn megabits(kube: &Kube, via: Via) -> Result<f64> {
    let stream = kube.stream(via, "--direction up --seconds 2")?.result()?;
    stream.check(1_000_000)?;
    let received: Half = stream.server.received.context("the server receives")?;
    Ok(received.gbit_per_second() * 1000.0)
}

#[test]
fn a_shaped_pod_keeps_its_rate() {
    learned(|kube| {
        let free = megabits(kube, Via::Service)?;
        ensure!(
            free > 3.0 * MEGABITS,
            "only {free:.0} Mbit/s without a limit"
        );
        shape(kube.server())?;
        for via in Via::BOTH {
            let shaped = megabits(kube, via)?;
            println!("{free:.0} Mbit/s without the limit, {shaped:.0} with it");
            ensure!(
                (0.7 * MEGABITS..1.1 * MEGABITS).contains(&shaped),
                "{shaped:.0} Mbit/s through a bucket of {MEGABITS}"
            );
        }
        unshape(kube.server())?;
        pause(1.0);
        let before = kube.taken()?;
        let again = megabits(kube, Via::Service)?;
        ensure!(again > 3.0 * MEGABITS, "{again:.0} Mbit/s after the limit");
        kube.expect_bypassed(&before, 0.8)
    });
}

#[test]
fn a_limit_takes_hold_of_a_live_stream() {
    learned(|kube| {
        let stream = kube.stream(Via::Service, "--direction up --seconds 6")?;
        pause(2.0);
        shape(kube.server())?;
        let stream = stream.result()?;
        stream.check(1_000_000)?;
        let samples = stream.server.received.context("received")?.samples;
        // From one second after the change on; samples are of 100 ms.
        let later = &samples[30..samples.len().min(60) - 1];
        let rate = later.iter().sum::<u64>() as f64 * 80.0 / later.len() as f64 / 1e6;
        ensure!(
            rate < 1.15 * MEGABITS,
            "{rate:.0} Mbit/s although limited to {MEGABITS}: {samples:?}"
        );
        Ok(())
    });
}

#[test]
fn a_foreign_filter_sees_every_packet() {
    const COUNT: u64 = 2000;
    learned(|kube| {
        let server = kube.server();
        let node = server.node().namespace();
        let veth = server.interface();
        // Copies everything somewhere and lets it pass.
        node.ip_batch("link add copies type ifb\nlink set copies up\n")?;
        for words in [
            format!("tc qdisc add dev {veth} clsact"),
            format!(
                "tc filter add dev {veth} egress pref 5 protocol ip u32 match u32 0 0 \
                 action mirred egress mirror dev copies"
            ),
        ] {
            let argv: Vec<&str> = words.split_whitespace().collect();
            let output = node.output(&argv)?;
            // On old kernels the programs sit at that qdisc themselves.
            ensure!(
                output.status.success() || words.contains("clsact"),
                "{words}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        pause(1.0);
        let reports = kube
            .ping(Via::Service, &format!("--rate 2000 --count {COUNT}"))?
            .result()?;
        exchange::check_nothing_lost(&reports)?;
        let shown = node.run(&["tc", "-s", "filter", "show", "dev", veth, "egress"])?;
        let seen = shown
            .split_once(" pkt")
            .and_then(|(before, _)| before.rsplit(' ').next()?.parse::<u64>().ok())
            .with_context(|| format!("no count in\n{shown}"))?;
        ensure!(seen >= COUNT, "the filter saw {seen} of {COUNT} packets");
        Ok(())
    });
}

#[test]
fn an_ipsec_block_on_the_tunnel_blocks() {
    learned(|kube| {
        let (a, b) = kube.cluster.nodes();
        let ping = kube.ping(Via::Pod, "--rate 2000")?;
        pause(1.0);
        let before = kube.taken()?;
        pause(0.3);
        kube.expect_bypassed(&before, 0.8)?;
        let policy = format!(
            "src {}/32 dst {}/32 proto udp dport 8472 dir out",
            a.public_ip(),
            b.public_ip()
        );
        a.namespace()
            .ip(&format!("xfrm policy add {policy} action block"))?;
        pause(0.1);
        let before = kube.taken()?;
        pause(0.6);
        let passed = kube.taken()?[1].since(before[1]);
        ensure!(
            passed.decapsulated + passed.tunnel.received <= 3,
            "packets went past the policy: {passed}"
        );
        a.namespace().ip(&format!("xfrm policy delete {policy}"))?;
        pause(1.5);
        let before = kube.taken()?;
        pause(0.3);
        kube.expect_bypassed(&before, 0.8)?;
        ensure!(ping.finish()?.0.lost > 0);
        Ok(())
    });
}

#[test]
fn a_program_behind_nfqueue_sees_every_packet() {
    const COUNT: u64 = 1000;
    learned(|kube| {
        let (a, _) = kube.cluster.nodes();
        let queue = Task::start(a.namespace(), "queue --number 0")?;
        let port = ECHO_PORT.to_string();
        // Before kube-proxy's rules accept what is established.
        a.namespace().run(&[
            "iptables",
            "-I",
            "FORWARD",
            "-p",
            "udp",
            "--dport",
            &port,
            "-j",
            "NFQUEUE",
            "--queue-num",
            "0",
        ])?;
        let reports = kube
            .ping(Via::Pod, &format!("--rate 1000 --count {COUNT}"))?
            .result()?;
        let seen = queue.finish::<QueueReport>()?.seen;
        exchange::check_nothing_lost(&reports)?;
        ensure!(seen == COUNT, "of {COUNT} packets the program saw {seen}");
        // Nobody behind the rule any more: what it matches is dropped, bypassed or not.
        let (report, _) = kube.ping(Via::Pod, "--rate 1000 --count 50")?.result()?;
        ensure!(report.received == 0, "{report:?}");
        Ok(())
    });
}

#[test]
fn what_an_operator_excludes_is_never_bypassed() {
    scenario(2, |lab| {
        let options = Side::Learned
            .options()
            .argument(format!("--fast-path-exclude=port:{ECHO_PORT}"))
            .argument("--fast-path-exclude=198.51.100.0/24");
        let kube = Kube::start_with(lab, Side::Learned, &options)?;
        for via in Via::BOTH {
            let before = kube.taken()?;
            let reports = kube.ping(via, "--rate 1000 --count 500")?.result()?;
            exchange::check_nothing_lost(&reports)?;
            for (now, before) in kube.taken()?.into_iter().zip(before) {
                let since = now.since(before);
                ensure!(
                    since.encapsulated + since.decapsulated == 0,
                    "{via:?}: an excluded port was bypassed: {since}"
                );
            }
        }
        // Everything else is as fast as ever.
        let before = kube.taken()?;
        kube.stream(Via::Service, "--direction both --seconds 1")?
            .result()?
            .check(1_000_000)?;
        kube.expect_bypassed(&before, 0.8)
    });
}
