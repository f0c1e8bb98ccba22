//! A pod floods a server that it may reach with SYNs: what bypasses is bounded, and other pods
//! connect as fast as they do on the kernel path under the same flood.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::{classes::Client, flows::Flows};
use lab::{
    cluster::introduce,
    kube::{CONNECTIONS_PORT, Kube, Side, on, pause},
    node::Node,
    paths,
    pod::Pod,
    scenario::repetitions,
    task::Task,
    traffic::{connections::Ending, segments::SegmentsReport},
    wait,
};

use lab::classes::{established, opened, own, until_own_tables_are_empty};

/// SYNs that may bypass in each second, and in the one that has begun.
const PER_SECOND: u64 = 256;
const SYN: u8 = 2;
/// The flood is worked off by one CPU, as by a queue of a card. Its sender and all others are on
/// another: where a veth pair leaves packets to the CPU that sent them, no flood can be faster than
/// what it floods.
const OTHERS_CPU: usize = 0;
const FLOODED: u32 = 0b10;

/// What the flooding pod makes of the answers to its SYNs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answers {
    /// Its kernel knows of no connection, and resets.
    Reset,
    /// Nothing: the handshake stays half done.
    Ignored,
}

/// Connections without end, dropped with the task; `more` are arguments of the client.
pub(super) fn rush(from: &Pod, to: &Pod, more: &str) -> Result<Task> {
    let target = to.at(CONNECTIONS_PORT);
    from.tool(&format!(
        "connections --to {target} --ending {} --count 100000000 --at-once 16 --exchanges 1 --size 64 --patience 2 {more}",
        Ending::ClientFin.name()
    ))
}

/// Connections of `pod` to `server` that its class has opened; `None` before there is one.
fn opened_by_class(node: &Node, pod: &Pod, server: &Pod) -> Result<Option<u64>> {
    let text = node.flannelctl(&["flows", "-o", "json", "--limit", "0"])?;
    let flows: Flows = serde_json::from_str(&text)?;
    let class = flows.classes.iter().find(|class| {
        class.pod == pod.address() && class.peer == server.address() && class.client == Client::Pod
    });
    Ok(class.map(|class| class.opened))
}

/// Other pods' connections per second, before the flood and under it.
#[derive(Debug)]
struct Fared {
    before: f64,
    under: f64,
}

fn rate(server: &Pod, time: Duration) -> Result<f64> {
    let (begun, before) = (Instant::now(), established(server)?);
    std::thread::sleep(time);
    Ok((established(server)? - before) as f64 / begun.elapsed().as_secs_f64())
}

fn under_flood(kube: &Kube, answers: Answers) -> Result<Fared> {
    let (a, b) = kube.cluster.nodes();
    let (flooder, other) = (a.add_pod()?, b.add_pod()?);
    introduce(&flooder)?;
    introduce(&other)?;
    let there = format!("--cpu {OTHERS_CPU}");
    let serve = |pod: &Pod| {
        pod.tool(&format!(
            "connections-serve --port {CONNECTIONS_PORT} {there}"
        ))
    };
    let servers = [serve(kube.server())?, serve(&other)?];
    let is_by_class = kube.side() == Side::Classes;

    // The flooder is let through, and so its class is open.
    let heat = rush(&flooder, kube.server(), &there)?;
    if is_by_class {
        wait::until_true("the class is open", Duration::from_secs(5), || {
            Ok(opened_by_class(a, &flooder, kube.server())?.unwrap_or(0) > 50)
        })?;
    } else {
        pause(0.5);
    }
    drop(heat);
    if answers == Answers::Ignored {
        flooder.namespace().run(
            &"iptables -A OUTPUT -p tcp --tcp-flags RST RST -j DROP"
                .split_whitespace()
                .collect::<Vec<_>>(),
        )?;
    }
    a.steer(flooder.interface(), FLOODED)?;
    kube.client().make_room()?;
    let load = rush(kube.client(), &other, &there)?;
    pause(0.5);
    let seconds = f64::from(repetitions(2, 10));
    let before = rate(&other, Duration::from_secs_f64(seconds))?;

    let per_second = repetitions(20_000, 100_000);
    let opened_now = || -> Result<(u64, [u64; 2])> {
        if !is_by_class {
            return Ok((0, [0; 2]));
        }
        let by_class = opened_by_class(a, &flooder, kube.server())?.context("no class")?;
        Ok((by_class, [opened(a)?, opened(b)?]))
    };
    let (class_before, all_before) = opened_now()?;
    let begun = Instant::now();
    let flood = flooder.tool(&format!(
        "segments --from {}:0 --to {} --flags {SYN} --count 1000000000 --seconds {} --rate {per_second} {there}",
        flooder.address(),
        kube.server().at(CONNECTIONS_PORT),
        seconds + 1.0
    ))?;
    pause(0.5);
    let under = rate(&other, Duration::from_secs_f64(seconds))?;
    let flood: SegmentsReport = flood.result()?;
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{:?} {answers:?}: {:.0} SYNs/s; other pods {before:.0} connections/s before, {under:.0} under the flood",
        kube.side(),
        flood.sent as f64 / flood.seconds
    );
    if is_by_class {
        let (class, all) = opened_now()?;
        let class = class - class_before;
        let all = [all[0] - all_before[0], all[1] - all_before[1]];
        let state = own(a)?;
        println!("  {class} of the flood opened in {took:.1} s, {all:?} of all; {state:?}");
        let most = PER_SECOND * (took.ceil() as u64 + 1);
        ensure!(
            class <= most && class > 0,
            "{class} SYNs of the flood bypassed in {took:.1} s\n{}",
            paths::describe(a)
        );
        ensure!(
            state.live <= 3 * PER_SECOND,
            "{} live own connections\n{}",
            state.live,
            paths::describe(a)
        );
        let wanted = (under * seconds / 2.0) as u64;
        ensure!(
            all[0] > wanted && all[1] > wanted,
            "the others' connections did not bypass: {all:?}\n{}",
            paths::describe(a)
        );
    }
    drop((load, servers));
    if is_by_class {
        until_own_tables_are_empty([a, b])?;
    }
    Ok(Fared { before, under })
}

fn compare(answers: Answers) {
    let [netlink, classes] =
        [Side::Netlink, Side::Classes].map(|side| on(side, |kube| under_flood(kube, answers)));
    let ratio = classes.under / netlink.under;
    println!(
        "{answers:?}: {ratio:.2} × the kernel path under the flood, {:.2} × without",
        classes.before / netlink.before
    );
    if repetitions(0, 1) == 1 {
        assert!(ratio >= 0.9, "{netlink:?} {classes:?}");
    }
}

#[test]
fn a_flood_whose_answers_are_ignored_stays_bounded() {
    compare(Answers::Ignored);
}

#[test]
fn a_flood_whose_answers_are_reset_stays_bounded() {
    compare(Answers::Reset);
}
