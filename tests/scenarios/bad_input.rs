//! Bad input: one clear message, the right end or degradation, and nothing
//! half-applied. What ran before goes on running.

use std::{collections::BTreeSet, fs, path::Path as FilePath, time::Duration};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::Cluster,
    exchange,
    lab::DEFAULT_CONFIG,
    load::Load,
    node::{Node, SUBNET_FILE, TUNNEL},
    paths::Path,
    scenario::scenario,
    wait,
};

/// What becomes of an agent that was told nonsense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It says why and leaves with this exit code.
    Leaves(i32),
    /// It says why and waits for a better config, as flannel does.
    Waits,
}

struct Row {
    what: &'static str,
    config: &'static str,
    uplink: &'static str,
    /// All of these in one line of the log.
    message: &'static [&'static str],
    outcome: Outcome,
}

const ROWS: &[Row] = &[
    Row {
        what: "a config that is no JSON",
        config: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan""#,
        uplink: "eth0",
        message: &["config"],
        outcome: Outcome::Waits,
    },
    Row {
        what: "a field of the wrong type",
        config: r#"{"Network":"10.244.0.0/16","SubnetLen":"twenty-four","Backend":{"Type":"vxlan"}}"#,
        uplink: "eth0",
        message: &["config", "SubnetLen"],
        outcome: Outcome::Waits,
    },
    Row {
        what: "a network smaller than one subnet",
        config: r#"{"Network":"10.244.1.0/26","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
        uplink: "eth0",
        message: &["config", "10.244.1.0/26"],
        outcome: Outcome::Waits,
    },
    Row {
        what: "an unknown backend",
        config: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#,
        uplink: "eth0",
        message: &["carrier-pigeon"],
        outcome: Outcome::Leaves(1),
    },
    Row {
        what: "an uplink that is not there",
        config: DEFAULT_CONFIG,
        uplink: "eth7",
        message: &["eth7"],
        outcome: Outcome::Leaves(1),
    },
];

#[test]
fn nonsense_is_named_and_nothing_is_half_applied() {
    scenario(2, |lab| {
        for row in ROWS {
            check(&lab[0], row).with_context(|| row.what)?;
        }
        Ok(())
    });
}

fn check(node: &Node, row: &Row) -> Result<()> {
    let config = node.lease_dir().join("config");
    fs::write(&config, row.config)?;
    let options = AgentOptions {
        uplink: row.uplink,
        ..AgentOptions::default()
    };
    let agent = Agent::launch(node, &options)?;
    match row.outcome {
        Outcome::Leaves(code) => {
            let ended = agent.ends_within(Duration::from_secs(10))?;
            ensure!(
                ended.status.code() == Some(code),
                "{} instead of exit code {code}\n{}",
                ended.status,
                ended.log
            );
            expect_one_message(&ended.log, row.message)?;
            expect_untouched(node)
        }
        Outcome::Waits => {
            wait::until_true("it says so", Duration::from_secs(10), || {
                Ok(!messages(&agent.log(), row.message).is_empty())
            })
            .with_context(|| agent.log())?;
            // Long enough for a second try, which must not flood the log with variants.
            std::thread::sleep(Duration::from_millis(1500));
            expect_one_message(&agent.log(), row.message)?;
            expect_untouched(node)?;
            // The config is read again: no restart is needed once it is right.
            fs::write(&config, DEFAULT_CONFIG)?;
            let mut agent = agent;
            agent.wait_until("starts with the repaired config", |status| {
                status.source.in_sync
            })?;
            agent.kill9()?;
            sweep(node)
        }
    }
}

/// The different texts (without their time) that hold all of `words`.
fn messages(log: &str, words: &[&str]) -> BTreeSet<String> {
    log.lines()
        .filter(|line| words.iter().all(|word| line.contains(word)))
        .map(|line| {
            // Letters of the text proper start behind the stamp of klog or tracing.
            line.split_once("] ")
                .or_else(|| line.split_once("Z "))
                .map_or(line, |(_, text)| text)
                .to_owned()
        })
        .collect()
}

fn expect_one_message(log: &str, words: &[&str]) -> Result<()> {
    let found = messages(log, words);
    ensure!(
        found.len() == 1,
        "one message with {words:?} was expected, found {found:?} in\n{log}"
    );
    ensure!(!log.contains("panicked"), "a panic is no message:\n{log}");
    Ok(())
}

fn expect_untouched(node: &Node) -> Result<()> {
    ensure!(
        !node
            .namespace()
            .exists(&format!("/sys/class/net/{TUNNEL}"))?,
        "{TUNNEL} was made"
    );
    ensure!(
        !node.namespace().exists(SUBNET_FILE)?,
        "{SUBNET_FILE} was written"
    );
    let leases = leases(node.lease_dir())?;
    ensure!(leases.is_empty(), "a lease was taken: {leases:?}");
    let pins = "/sys/fs/bpf/flannel";
    let pinned = node.namespace().within(|| {
        fs::read_dir(pins).map_or(0, |versions| {
            versions
                .flatten()
                .filter_map(|version| fs::read_dir(version.path()).ok())
                .map(Iterator::count)
                .sum::<usize>()
        })
    })?;
    ensure!(pinned == 0, "{pinned} objects are pinned in {pins}");
    Ok(())
}

fn leases(directory: &FilePath) -> Result<Vec<String>> {
    let subnets = directory.join("subnets");
    if !subnets.exists() {
        return Ok(Vec::new());
    }
    Ok(fs::read_dir(subnets)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect())
}

/// Back to a node on which no agent has ever run.
fn sweep(node: &Node) -> Result<()> {
    for directory in ["subnets", "expiry"] {
        let path = node.lease_dir().join(directory);
        if path.exists() {
            fs::remove_dir_all(path)?;
        }
    }
    node.namespace().ip(&format!("link del {TUNNEL}"))?;
    node.namespace().within(|| {
        // Pinned links would keep programs on eth0.
        let _ = fs::remove_dir_all("/sys/fs/bpf/flannel");
        fs::remove_dir_all("/run/flannel")
    })??;
    Ok(())
}

#[test]
fn a_lease_file_cut_in_half_costs_nobody_anything() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, b) = cluster.nodes();
        let subnet = b.subnet()?;
        let file = b.lease_dir().join("subnets").join(format!(
            "{}-{}",
            subnet.network(),
            subnet.prefix_len()
        ));
        let whole = fs::read(&file)?;
        let load = Load::start(&cluster.client, &cluster.server)?;
        let watch = cluster.watch()?;
        fs::write(&file, &whole[..whole.len() / 2])?;
        let name = file.file_name().context("a name")?.to_string_lossy();
        wait::until_true("the damaged lease is named", Duration::from_secs(5), || {
            Ok(!messages(&cluster.agents[0].log(), &[&name]).is_empty())
        })?;
        load.run_for(Duration::from_secs(2));
        let status = a.status()?;
        ensure!(status.peers.len() == 1, "the peer was given up: {status:?}");
        expect_one_message(&cluster.agents[0].log(), &[&name])?;
        fs::write(&file, &whole)?;
        let report = load.finish()?;
        println!("half a lease: {}", report.summary());
        report.check()?;
        // All of it by the programs, but for the few that ask the kernel.
        let taken = watch.taken(a)?;
        ensure!(
            taken.tunnel.sent < 100 && taken.tunnel.received < 100,
            "{taken}"
        );
        Ok(())
    });
}

#[test]
fn a_damaged_lease_does_not_keep_others_from_starting() {
    scenario(2, |lab| {
        let subnets = lab.lease_dir().join("subnets");
        fs::create_dir_all(&subnets)?;
        fs::write(
            subnets.join("10.244.77.0-24"),
            r#"{"PublicIP":"172.18.0.77","Publ"#,
        )?;
        let cluster = Cluster::start(lab, &[Ebpf])?;
        expect_one_message(&cluster.agents[0].log(), &["10.244.77.0-24"])?;
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
        cluster.expect_paths_of_modes(&watch, 500, 500)
    });
}

#[test]
fn a_kernel_that_refuses_programs_gets_the_kernel_path() {
    scenario(2, |lab| {
        let auto = AgentOptions {
            datapath: "auto",
            ..AgentOptions::default()
        };
        let refused = auto.clone().without_bpf();
        let cluster = Cluster::start_with(lab, &[refused, auto])?;
        let (a, b) = cluster.nodes();
        let status = a.status()?;
        ensure!(status.mode == Netlink, "{status:?}");
        ensure!(b.status()?.mode == Ebpf);
        // Status says why, and the log says it once.
        ensure!(status.mode_reason.len() > 20, "{:?}", status.mode_reason);
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 1000)?;
        watch.expect_exchange((a, Path::Kernel), (b, Path::Ebpf), 1000, 1000)?;
        // Asking for it by hand is refused with the reason, and changes nothing.
        ensure!(a.request_mode(Ebpf).is_err());
        ensure!(a.status()?.mode == Netlink);
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100).map(drop)
    });
}

#[test]
fn traffic_keeps_running_when_the_next_agent_is_refused_its_programs() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let a = lab[0].clone();
        let load = Load::start(&cluster.client, &cluster.server)?;
        cluster.agents.remove(0).kill9()?;
        let options = AgentOptions {
            datapath: "auto",
            ..AgentOptions::default()
        }
        .without_bpf();
        let agent = Agent::start(&a, &options)?;
        load.run_for(Duration::from_secs(1));
        cluster.agents.insert(0, agent);
        let report = load.finish()?;
        println!("refused: {}", report.summary());
        report.check()?;
        ensure!(a.status()?.mode == Netlink);
        let watch = cluster.watch()?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
        cluster.expect_paths_of_modes(&watch, 500, 500)
    });
}

#[test]
fn row_23_11_claims_of_others_show_in_the_status() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        ensure!(a.status()?.conflicts.is_empty());
        let subnets = a.lease_dir().join("subnets");
        let own = subnets.join(format!("{}-24", a.subnet()?.network()));
        let lease = fs::read_to_string(&own)?;

        // A second lease with this node's address.
        let second = subnets.join("10.244.222.0-24");
        fs::write(&second, &lease)?;
        in_conflict(a, &["10.244.222.0/24", "carries this node's public IP"])?;
        fs::remove_file(&second)?;
        without_conflict(a)?;

        // Another node in this node's lease.
        let address = a.public_ip().to_string();
        fs::write(&own, lease.replace(&address, "172.18.0.77"))?;
        in_conflict(a, &["172.18.0.77", "two nodes use one subnet"])?;
        fs::write(&own, &lease)?;
        without_conflict(a)?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100).map(drop)
    });
}

fn in_conflict(node: &Node, says: &[&str]) -> Result<()> {
    wait::until_true("the status names it", Duration::from_secs(5), || {
        let text = node.flannelctl(&["status"])?;
        let mut lines = text.lines().filter(|line| line.contains("CONFLICT over"));
        Ok(lines.any(|line| says.iter().all(|word| line.contains(word))))
    })
}

fn without_conflict(node: &Node) -> Result<()> {
    wait::until_true("it is over", Duration::from_secs(5), || {
        Ok(node.status()?.conflicts.is_empty())
    })
}
