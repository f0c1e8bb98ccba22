//! The agent is restarted again and again under traffic that depends on its firewall rules: no
//! packet leaves with a pod's address, no connection breaks, nothing is lost. (The original's
//! chains are empty for some 50 ms at each start.)

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::Cluster,
    exchange::{self, RunningPing},
    namespace::Namespace,
    node::Node,
    pod::Pod,
    scenario::{repetitions, scenario},
    task::Task,
    traffic::pinger::{EchoReport, PingReport},
};

/// Restarts in a normal and in a long run.
const RESTARTS: (u32, u32) = (10, 100);
/// Datagrams a second.
const RATE: u32 = 1000;
/// How long an agent stays before it is restarted.
const STAY: Duration = Duration::from_millis(300);
const ECHO_PORT: u16 = 7;
const CONNECT_PORT: u16 = 7007;

#[test]
fn row_23_7_restarts_under_masqueraded_traffic_cost_nothing() {
    scenario(3, |lab| {
        // The third node is the world outside: no agent runs there.
        let (a, outside) = (lab[0].clone(), lab[2].clone());
        let options = with_rules(Ebpf).argument("--ip-masq");
        let mut agent = Agent::start(&a, &options)?;
        let pod = a.add_pod()?;
        pod.announce()?;
        let world = outside.namespace();
        // What leaves unmasked is answered too, so that it shows as that and not as lost.
        world.ip(&format!("route add 10.244.0.0/16 via {}", a.public_ip()))?;
        for rule in [
            "add table ip seen",
            "add chain ip seen in { type filter hook prerouting priority 0 ; }",
            "add rule ip seen in ip saddr 10.244.0.0/16 counter comment \"unmasked\"",
            "add rule ip seen in ip saddr 172.18.0.1 counter comment \"masked\"",
        ] {
            world.run(&["nft", rule])?;
        }
        let restarts = repetitions(RESTARTS.0, RESTARTS.1);
        let echo = Task::start(world, &format!("udp-echo --port {ECHO_PORT}"))?;
        let target = outside.public_ip();
        let ping = pod.tool(&format!("udp-ping --to {target}:{ECHO_PORT} --rate {RATE}"))?;
        let connections = under_new_connections(&pod, world, target, || {
            for number in 0..restarts {
                agent = restart(agent, &options, number)?;
                thread::sleep(STAY);
            }
            Ok(())
        })?;
        let report: (PingReport, EchoReport) = (ping.finish()?, echo.finish()?);
        let unmasked = seen(world, "unmasked")?;
        println!(
            "{restarts} restarts, masquerade: {} datagrams, {} lost; {} connections, {} broken; {unmasked} packets unmasked, {} masked",
            report.0.sent,
            report.0.lost,
            connections.made,
            connections.broken,
            seen(world, "masked")?
        );
        exchange::check_nothing_lost(&report)?;
        connections.check()?;
        ensure!(
            unmasked == 0,
            "{unmasked} packets left with a pod's address"
        );
        ensure!(
            seen(world, "masked")? > report.0.sent,
            "the counter is blind"
        );
        Ok(())
    });
}

#[test]
fn row_23_7_restarts_under_a_forward_policy_of_drop_cost_nothing() {
    scenario(2, |lab| {
        for node in lab.nodes() {
            node.namespace()
                .run(&["iptables", "-P", "FORWARD", "DROP"])?;
        }
        let options = with_rules(Netlink);
        let mut cluster = Cluster::start_with(lab, std::slice::from_ref(&options))?;
        let (a, b) = (lab[0].clone(), lab[1].clone());
        let restarts = repetitions(RESTARTS.0, RESTARTS.1);
        let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
        let mut agents = std::mem::take(&mut cluster.agents);
        let server = cluster.server.namespace();
        let connections =
            under_new_connections(&cluster.client, server, cluster.server.address(), || {
                for number in 0..restarts {
                    // Now this node, now that one.
                    let agent = agents.remove(0);
                    agents.push(restart(agent, &options, number / 2)?);
                    thread::sleep(STAY);
                }
                Ok(())
            })?;
        let report = ping.finish()?;
        println!(
            "{restarts} restarts, FORWARD policy DROP: {} datagrams, {} lost; {} connections, {} broken",
            report.0.sent, report.0.lost, connections.made, connections.broken
        );
        exchange::check_nothing_lost(&report)?;
        connections.check()?;
        // Without flannel's rules nothing would have passed.
        for node in [&a, &b] {
            let rules = node.namespace().run(&["iptables", "-S", "FORWARD"])?;
            ensure!(rules.contains("-P FORWARD DROP"), "{rules}");
            node.namespace().run(&["iptables", "-F", "FLANNEL-FWD"])?;
        }
        let argv = ["ping", "-n", "-c", "1", "-W", "0.005"];
        let to = cluster.server.address().to_string();
        let lost = (0..20).any(|_| {
            let _ = a.namespace().run(&["iptables", "-F", "FLANNEL-FWD"]);
            let output = cluster
                .client
                .namespace()
                .output(&[&argv[..], &[&to]].concat());
            output.is_ok_and(|output| !output.status.success())
        });
        ensure!(
            lost,
            "packets pass without flannel's rules: the policy is not asked"
        );
        Ok(())
    });
}

fn with_rules(mode: Mode) -> AgentOptions {
    AgentOptions::in_mode(mode).argument("--iptables-forward-rules=true")
}

/// By SIGTERM and by SIGKILL in turn.
fn restart(agent: Agent, options: &AgentOptions, number: u32) -> Result<Agent> {
    let node: Node = agent.node().clone();
    if number.is_multiple_of(2) {
        let ended = agent.terminate()?;
        ensure!(ended.status.success(), "{}: {}", ended.status, ended.log);
    } else {
        agent.kill9()?;
    }
    Agent::start(&node, options)
}

/// Packets that the outside has seen by the rule with this comment.
fn seen(world: &Namespace, comment: &str) -> Result<u64> {
    let rules = world.run(&["nft", "list", "table", "ip", "seen"])?;
    let line = rules
        .lines()
        .find(|line| line.contains(&format!("\"{comment}\"")))
        .with_context(|| format!("no rule {comment} in\n{rules}"))?;
    let count = line.split("counter packets ").nth(1);
    let count = count.and_then(|rest| rest.split(' ').next());
    Ok(count
        .with_context(|| format!("no counter in {line}"))?
        .parse()?)
}

/// New connections while something happened.
struct Connections {
    made: u64,
    broken: u64,
}

impl Connections {
    fn check(&self) -> Result<()> {
        ensure!(
            self.broken == 0 && self.made > 100,
            "{} connections, {} broken",
            self.made,
            self.broken
        );
        Ok(())
    }
}

/// Opens a TCP connection from `pod` to `address` in `world` every few milliseconds, each of
/// which has to bring a byte there and back, while `work` is done.
fn under_new_connections(
    pod: &Pod,
    world: &Namespace,
    address: Ipv4Addr,
    work: impl FnOnce() -> Result<()>,
) -> Result<Connections> {
    let listener = world.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONNECT_PORT)))??;
    listener.set_nonblocking(true)?;
    let (made, broken) = (AtomicU64::new(0), AtomicU64::new(0));
    let (stop, client_left) = (AtomicBool::new(false), AtomicBool::new(false));
    let target = SocketAddr::from((address, CONNECT_PORT));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !client_left.load(Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let _ = answer(stream);
                    }
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        scope.spawn(|| {
            let entered = pod.namespace().within(|| {
                while !stop.load(Relaxed) {
                    let tally = if exchange_a_byte(target).is_ok() {
                        &made
                    } else {
                        &broken
                    };
                    tally.fetch_add(1, Relaxed);
                    thread::sleep(Duration::from_millis(5));
                }
            });
            if entered.is_err() {
                broken.fetch_add(1, Relaxed);
            }
            client_left.store(true, Relaxed);
        });
        let outcome = work();
        stop.store(true, Relaxed);
        outcome
    })?;
    Ok(Connections {
        made: made.load(Relaxed),
        broken: broken.load(Relaxed),
    })
}

fn exchange_a_byte(target: SocketAddr) -> std::io::Result<()> {
    // A lost SYN is sent again after a second, which counts as broken.
    let patience = Duration::from_millis(900);
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}
