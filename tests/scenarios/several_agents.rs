//! Several agents on each host, with leases, VNI and files of their own (contract section 17):
//! they share the uplink, its program hook and the firewall's chains, and nothing else.

use std::{net::Ipv4Addr, path::Path as FilePath, time::Duration};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::{Mode::Ebpf, Status};
use ipnet::Ipv4Net;
use lab::{
    agent::{Agent, AgentOptions},
    binaries,
    cluster::Cluster,
    exchange::{self, RunningPing},
    namespace::{Kind, Namespace},
    node::Node,
    scenario::scenario,
    task::Task,
    traffic::pinger::{EchoReport, PingReport},
    wait,
};

const RATE: u32 = 1000;
const SECOND_CONFIG: &str =
    r#"{"Network":"10.96.0.0/16","Backend":{"Type":"vxlan","VNI":2,"FastPath":"direct"}}"#;
const SECOND_SOCKET: &str = "/run/flannel-2/control.sock";
const SECOND_FILE: &str = "/run/flannel-2/subnet.env";

#[test]
fn contract_17_two_agents_on_each_host_do_not_disturb_each_other() {
    scenario(2, |lab| {
        let leases = lab.scratch().join("leases-2");
        std::fs::create_dir(&leases)?;
        std::fs::write(leases.join("config"), SECOND_CONFIG)?;
        let first = with_rules(AgentOptions::in_mode(Ebpf));
        let mut cluster = Cluster::start_with(lab, std::slice::from_ref(&first))?;
        let mut seconds = Vec::new();
        for node in lab.nodes() {
            seconds.push(Agent::launch(node, &second(&leases))?);
        }
        for agent in &seconds {
            is_ready(agent)?;
        }
        let (a, b) = (lab[0].clone(), lab[1].clone());
        let (client, server) = (SecondPod::start(&a)?, SecondPod::start(&b)?);
        client.is_known()?;
        server.is_known()?;

        // The first packet finds every neighbour.
        let address = server.address.to_string();
        let warm_up = ["ping", "-n", "-q", "-c", "2", "-W", "2", &address];
        client.namespace.run(&warm_up)?;

        // Each takes the programs of its own agent, and no tunnel device sees more than the first ones.
        let watch = cluster.watch()?;
        let before = (second_status(&a)?, a.interface_counters("flannel.2")?);
        let report = ping(&client, &server, "--rate 1000 --count 500")?.finish()?;
        exchange::check_nothing_lost(&report)?;
        let after = (second_status(&a)?, a.interface_counters("flannel.2")?);
        for way in ["encapsulated", "decapsulated"] {
            let grown = after.0.packets(way) - before.0.packets(way);
            ensure!(
                (490..=500).contains(&grown),
                "{grown} packets {way} by the second agent's programs"
            );
        }
        ensure!(
            after.1.sent - before.1.sent <= 10 && after.1.received - before.1.received <= 10,
            "flannel.2: {:?} → {:?}",
            before.1,
            after.1
        );
        exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
        cluster.expect_paths_of_modes(&watch, 500, 500)?;
        let idle = second_status(&a)?.packets("encapsulated");
        ensure!(
            idle == after.0.packets("encapsulated"),
            "the first agent's traffic counts twice"
        );

        // One is restarted, then the other; both networks go on.
        let of_first = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
        let of_second = ping(&client, &server, &format!("--rate {RATE}"))?;
        cluster.agents.remove(0).kill9()?;
        cluster.agents.insert(0, Agent::start(&a, &first)?);
        seconds.remove(0).terminate()?;
        seconds.insert(0, Agent::launch(&a, &second(&leases))?);
        is_ready(&seconds[0])?;
        std::thread::sleep(Duration::from_secs(1));
        exchange::check_nothing_lost(&of_first.finish()?).context("the first network")?;
        exchange::check_nothing_lost(&of_second.finish()?).context("the second network")?;

        // Both networks' rules stand in the shared chains, and nobody fights for them.
        for node in [&a, &b] {
            let rules = node.namespace().run(&["iptables-save"])?;
            for network in ["10.244.0.0/16", "10.96.0.0/16"] {
                for rule in [
                    format!("-A FLANNEL-POSTRTG -s {network} ! -d 224.0.0.0/4 "),
                    format!("-A FLANNEL-FWD -s {network} "),
                    format!("-A FLANNEL-FWD -d {network} "),
                ] {
                    let count = rules.matches(&rule).count();
                    ensure!(count == 1, "{rule:?} stands there {count} times:\n{rules}");
                }
            }
        }
        for agent in cluster.agents.iter().chain(&seconds) {
            let log = agent.log();
            ensure!(!log.contains("something else keeps changing"), "{log}");
        }
        ensure!(a.namespace().exists("/sys/fs/bpf/flannel/vni1")?);
        ensure!(a.namespace().exists("/sys/fs/bpf/flannel/vni2")?);
        Ok(())
    });
}

fn with_rules(options: AgentOptions) -> AgentOptions {
    options
        .argument("--iptables-forward-rules=true")
        .argument("--ip-masq")
}

fn second(leases: &FilePath) -> AgentOptions {
    with_rules(AgentOptions::in_mode(Ebpf))
        .argument(format!("--lease-dir={}", leases.display()))
        .argument(format!("--control-socket={SECOND_SOCKET}"))
        .argument(format!("--subnet-file={SECOND_FILE}"))
}

fn second_status(node: &Node) -> Result<Status> {
    let flannelctl = binaries::flannelctl()?;
    let flannelctl = flannelctl.to_str().context("an odd place")?;
    let argv = [
        flannelctl,
        "--socket",
        SECOND_SOCKET,
        "status",
        "-o",
        "json",
    ];
    let text = node.namespace().run(&argv)?;
    Ok(serde_json::from_str(&text)?)
}

fn is_ready(agent: &Agent) -> Result<()> {
    wait::until_true(
        "the second agent has its peer",
        Duration::from_secs(20),
        || {
            let status = second_status(agent.node())?;
            Ok(status.pid == agent.pid() && status.source.in_sync && status.peers.len() == 1)
        },
    )
    .with_context(|| agent.log())
}

/// A pod in the second agent's network, on a bridge of its own.
struct SecondPod {
    node: Node,
    namespace: Namespace,
    address: Ipv4Addr,
}

impl SecondPod {
    fn start(node: &Node) -> Result<Self> {
        let file = node.namespace().read(SECOND_FILE)?;
        let value = |key: &str| {
            let mut lines = file.lines();
            lines
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .with_context(|| format!("no {key} in\n{file}"))
        };
        let gateway: Ipv4Net = value("FLANNEL_SUBNET")?.parse()?;
        let mtu = value("FLANNEL_MTU")?;
        let address = Ipv4Addr::from(u32::from(gateway.network()) + 2);
        let namespace = Namespace::new(&format!("{}-second", node.name()), Kind::Network)?;
        node.namespace().ip_batch(&format!(
            "link add cni1 type bridge\n\
             addr add {gateway} brd + dev cni1\n\
             link set cni1 up\n\
             link add second0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
             link set second0 master cni1\n\
             link set second0 up\n",
            namespace.pid()
        ))?;
        namespace.ip_batch(&format!(
            "addr add {address}/24 brd + dev eth0\nlink set eth0 up\nroute add default via {}\n",
            gateway.addr()
        ))?;
        namespace.wait_until_up("eth0")?;
        node.namespace().wait_until_up("second0")?;
        Ok(Self {
            node: node.clone(),
            namespace,
            address,
        })
    }

    /// Its agent has a program on its veth, and the bridge forwards.
    fn is_known(&self) -> Result<()> {
        wait::until_true("the pod is known", Duration::from_secs(10), || {
            let gateway = Ipv4Addr::from(u32::from(self.address) - 1).to_string();
            let ping = ["ping", "-n", "-q", "-c", "1", "-W", "0.2", &gateway];
            let reached = self.namespace.output(&ping)?.status.success();
            let status = second_status(&self.node)?;
            let mut pods = status.pods.iter();
            Ok(reached && pods.any(|pod| pod.address == self.address && pod.attached))
        })
    }
}

/// Datagrams under way between two pods of the second network.
struct SecondPing {
    client: Task,
    echo: Task,
}

fn ping(from: &SecondPod, to: &SecondPod, arguments: &str) -> Result<SecondPing> {
    let echo = Task::start(&to.namespace, "udp-echo --port 7")?;
    let client = Task::start(
        &from.namespace,
        &format!("udp-ping --to {}:7 {arguments}", to.address),
    )?;
    Ok(SecondPing { client, echo })
}

impl SecondPing {
    fn finish(self) -> Result<(PingReport, EchoReport)> {
        std::thread::sleep(Duration::from_secs(1));
        Ok((self.client.finish()?, self.echo.finish()?))
    }
}
