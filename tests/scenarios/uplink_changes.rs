//! The uplink changes under a running agent: another address, another MTU, down and up, deleted
//! and made anew. Agent, lease, device, programs and `subnet.env` follow, without a restart.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    agent::AgentOptions,
    cluster::{Cluster, path_of},
    exchange::{self, RunningPing},
    lab::{Lab, Underlay},
    node::{Node, SUBNET_FILE, TUNNEL, UPLINK},
    scenario::{scenario, scenario_over},
    wait,
};

/// Datagrams a second, each way.
const RATE: u32 = 1000;
/// How long it may take to follow.
const LIMIT: Duration = Duration::from_secs(1);
/// How long traffic may stand still after the uplink is usable again. The kernel asks for a
/// neighbour once a second, and its first question may go out before the veth has a carrier.
const RESUMED: Duration = Duration::from_millis(2500);

#[test]
fn row_23_14_a_new_address_is_followed_and_published() {
    for mode in [Ebpf, Netlink] {
        scenario(2, |lab| {
            let cluster = Cluster::start(lab, &[mode])?;
            let (a, _) = cluster.nodes();
            let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
            pause();
            let start = Instant::now();
            // In this order: without the first address its network's others would go as well.
            a.namespace().ip_batch(&format!(
                "addr del {}/24 dev {UPLINK}\naddr add 172.18.0.101/24 brd + dev {UPLINK}\n",
                a.public_ip()
            ))?;
            published(a, "172.18.0.101")?;
            let took = start.elapsed();
            pause();
            let (report, _) = ping.finish()?;
            println!(
                "{mode:?}: address: published after {took:?}, {} of {} lost, longest gap {:.0} ms",
                report.lost, report.sent, report.longest_gap_ms
            );
            ensure!(took < LIMIT && report.longest_gap_ms < 1000.0, "{report:?}");
            let device = a.namespace().ip(&format!("-d link show {TUNNEL}"))?;
            ensure!(device.contains("local 172.18.0.101 "), "{device}");
            ensure!(
                a.status()?.kernel.repairs == 0,
                "its own work was taken for a repair"
            );
            resumed(&cluster, mode)?;
            same_agent(&cluster)
        });
    }
}

#[test]
fn an_address_beside_the_one_in_use_moves_nothing() {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[Ebpf])?;
        let (a, _) = cluster.nodes();
        let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
        let index = a.interface_index(TUNNEL)?;
        a.namespace()
            .ip(&format!("addr add 172.18.0.101/24 dev {UPLINK}"))?;
        pause();
        exchange::check_nothing_lost(&ping.finish()?)?;
        ensure!(
            a.interface_index(TUNNEL)? == index,
            "{TUNNEL} was made anew"
        );
        ensure!(a.status()?.node.public_ip == a.public_ip());
        resumed(&cluster, Ebpf)
    });
}

#[test]
fn row_23_14_another_mtu_is_followed_without_loss() {
    for mode in [Ebpf, Netlink] {
        scenario(2, |lab| {
            let cluster = Cluster::start(lab, &[mode])?;
            let (a, _) = cluster.nodes();
            let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
            for (link, pods) in [(1400, 1350), (1500, 1450)] {
                let start = Instant::now();
                a.namespace().ip(&format!("link set {UPLINK} mtu {link}"))?;
                has_mtu(a, pods)?;
                println!("{mode:?}: MTU {link} followed after {:?}", start.elapsed());
                ensure!(start.elapsed() < LIMIT);
            }
            exchange::check_nothing_lost(&ping.finish()?)?;
            resumed(&cluster, mode)?;
            same_agent(&cluster)
        });
    }
}

#[test]
fn a_link_smaller_than_the_configured_mtu_is_corrected_at_run_time_and_refused_at_start() {
    scenario(2, |lab| {
        lab.write_config(
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":1450,"FastPath":"direct"}}"#,
        )?;
        let mut cluster = Cluster::start(lab, &[Ebpf])?;
        let a = lab[0].clone();
        has_mtu(&a, 1400)?;
        a.namespace().ip(&format!("link set {UPLINK} mtu 1300"))?;
        has_mtu(&a, 1250)?;
        let log = cluster.agents[0].log();
        ensure!(
            log.contains("Backend.MTU is larger than the uplink's MTU now")
                && log.contains("configured=1450")
                && log.contains("link=1300"),
            "{log}"
        );
        cluster.agents.remove(0).terminate()?;
        let refused = lab::agent::Agent::launch(&a, &AgentOptions::in_mode(Ebpf))?
            .ends_within(Duration::from_secs(10))?;
        ensure!(refused.status.code() == Some(1), "{}", refused.status);
        ensure!(
            refused
                .log
                .contains("Backend.MTU 1450 is larger than the uplink's MTU 1300"),
            "{}",
            refused.log
        );
        // Put right, nothing of the smaller MTU is left.
        a.namespace().ip(&format!("link set {UPLINK} mtu 1500"))?;
        let agent = lab::agent::Agent::start(&a, &AgentOptions::in_mode(Ebpf))?;
        cluster.agents.insert(0, agent);
        resumed(&cluster, Ebpf)
    });
}

#[test]
fn an_uplink_set_down_and_up_carries_on() {
    for mode in [Ebpf, Netlink] {
        scenario(2, |lab| {
            let cluster = Cluster::start(lab, &[mode])?;
            let (a, _) = cluster.nodes();
            let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
            a.namespace().ip(&format!("link set {UPLINK} down"))?;
            faulty(a, "is down")?;
            a.namespace().ip(&format!("link set {UPLINK} up"))?;
            let start = Instant::now();
            flows_again(&cluster)?;
            let took = start.elapsed();
            sound(a)?;
            let (report, _) = ping.finish()?;
            println!("{mode:?}: up: traffic after {took:?}, {} lost", report.lost);
            ensure!(took < RESUMED, "traffic came back after {took:?}");
            resumed(&cluster, mode)?;
            same_agent(&cluster)
        });
    }
}

#[test]
fn an_uplink_made_anew_is_taken_up() {
    for mode in [Ebpf, Netlink] {
        scenario_over(Underlay::Switch, 2, |lab| {
            let cluster = Cluster::start(lab, &[mode])?;
            let (a, _) = cluster.nodes();
            let old = a.interface_index(UPLINK)?;
            let mac = a.mac(TUNNEL)?;
            let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
            a.namespace().ip(&format!("link del {UPLINK}"))?;
            faulty(a, "interface eth0 is gone")?;
            plug_in(lab, a)?;
            let start = Instant::now();
            flows_again(&cluster)?;
            let took = start.elapsed();
            sound(a)?;
            let (report, _) = ping.finish()?;
            println!(
                "{mode:?}: made anew: traffic after {took:?}, {} lost",
                report.lost
            );
            ensure!(took < RESUMED, "traffic came back after {took:?}");
            ensure!(a.interface_index(UPLINK)? != old, "the same index again");
            ensure!(a.mac(TUNNEL)? == mac, "peers know another MAC");
            ensure!(a.status()?.node.uplink_attached == (mode == Ebpf));
            resumed(&cluster, mode)?;
            same_agent(&cluster)
        });
    }
}

/// A new cable from the switch, with the address that the node had.
fn plug_in(lab: &Lab, node: &Node) -> Result<()> {
    let switch = lab.fabric().context("a lab with a switch")?;
    let holder = node.namespace().pid();
    switch.ip_batch(&format!(
        "link add port9 type veth peer name {UPLINK} netns {holder}\n\
         link set port9 master br0\n\
         link set port9 up\n"
    ))?;
    node.namespace().ip_batch(&format!(
        "addr add {}/24 brd + dev {UPLINK}\nlink set {UPLINK} up\n",
        node.public_ip()
    ))
}

fn pause() {
    std::thread::sleep(Duration::from_millis(500));
}

/// The lease names `address`, and every node acts on it.
fn published(node: &Node, address: &str) -> Result<()> {
    let subnet = node.subnet()?;
    let name = format!("{}-{}", subnet.network(), subnet.prefix_len());
    let lease = node.lease_dir().join("subnets").join(name);
    wait::until_true("the address is published", Duration::from_secs(5), || {
        Ok(std::fs::read_to_string(&lease)?.contains(&format!(r#""PublicIP":"{address}""#)))
    })
}

/// Device, status and subnet file agree.
fn has_mtu(node: &Node, mtu: u32) -> Result<()> {
    wait::until_true(&format!("MTU {mtu}"), Duration::from_secs(5), || {
        let device = node.namespace().ip(&format!("link show {TUNNEL}"))?;
        let file = node.namespace().read(SUBNET_FILE)?;
        Ok(device.contains(&format!(" mtu {mtu} "))
            && file.contains(&format!("FLANNEL_MTU={mtu}\n"))
            && node.status()?.node.mtu == mtu)
    })
}

fn faulty(node: &Node, says: &str) -> Result<()> {
    wait::until_true("the status says so", Duration::from_secs(5), || {
        let fault = node.status()?.node.uplink_fault;
        Ok(fault.is_some_and(|fault| fault.contains(says)))
    })?;
    let text = node.flannelctl(&["status"])?;
    ensure!(text.contains(says), "{text}");
    Ok(())
}

fn sound(node: &Node) -> Result<()> {
    wait::until_true("the status is sound", Duration::from_secs(2), || {
        let status = node.status()?;
        Ok(status.node.uplink_fault.is_none() && status.kernel.last_error.is_none())
    })
    .with_context(|| format!("{:?}", node.status()))
}

/// Waits for a first ping to come through.
fn flows_again(cluster: &Cluster) -> Result<()> {
    let to = cluster.server.address().to_string();
    wait::until_true("pods reach each other", Duration::from_secs(10), || {
        let argv = ["ping", "-n", "-q", "-c", "1", "-W", "0.1", &to];
        Ok(cluster.client.namespace().output(&argv)?.status.success())
    })
}

/// Everything that is sent arrives, on each node by the path of its mode.
fn resumed(cluster: &Cluster, mode: Mode) -> Result<()> {
    cluster.warm_up()?;
    let (a, b) = cluster.nodes();
    let watch = cluster.watch()?;
    exchange::udp_round_trips(&cluster.client, &cluster.server, 500)?;
    watch.expect_exchange((a, path_of(mode)), (b, path_of(mode)), 500, 500)
}

fn same_agent(cluster: &Cluster) -> Result<()> {
    let (a, _) = cluster.nodes();
    ensure!(
        a.status()?.pid == cluster.agents[0].pid(),
        "it was restarted"
    );
    Ok(())
}
