//! etcd may die, lose its quorum, forget, refuse and dawdle: pods do not notice, agents wait
//! quietly, and the first new lease afterwards is programmed at once.
//!
//! Node A is in ebpf mode and node B in netlink mode, so each fault meets both paths at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::Cluster,
    door::Door,
    etcd_cluster::{Certificates, Etcd, Security},
    lab::{DEFAULT_CONFIG, Lab, Underlay},
    load::{Load, RATE},
    node::Node,
    paths::{Packets, PathWatch},
    scenario::scenario_over,
    wait,
};

/// What the issue grants the first new lease after a recovery.
const RECOVERY: Duration = Duration::from_secs(2);
/// Share of a core that an agent may use while it waits.
const IDLE: f64 = 0.02;

/// How long nothing works: the issue's 60 s where long loops are asked for.
fn outage() -> Duration {
    let is_full = std::env::var_os("FLANNEL_TEST_FULL").is_some();
    Duration::from_secs(if is_full { 60 } else { 10 })
}

/// Agents that take their leases from an etcd, and pods under load.
struct Stage<'lab> {
    etcd: Etcd<'lab>,
    cluster: Cluster,
    load: Load,
    watch: PathWatch,
    started: Instant,
    /// Number of the next lease of a node that does not exist.
    next: u8,
}

impl<'lab> Stage<'lab> {
    fn set(lab: &'lab Lab, members: usize, security: Security) -> Result<Self> {
        let etcd = Etcd::start(lab, members, security, DEFAULT_CONFIG)?;
        let agent = |mode| etcd.agent(AgentOptions::in_mode(mode));
        let options = [agent(Ebpf), agent(Netlink)];
        Self::begin(lab, etcd, &options)
    }

    fn begin(lab: &'lab Lab, etcd: Etcd<'lab>, options: &[AgentOptions]) -> Result<Self> {
        let cluster = Cluster::start_with(lab, options)?;
        let watch = cluster.watch()?;
        let load = Load::start(&cluster.client, &cluster.server)?;
        Ok(Self {
            etcd,
            cluster,
            load,
            watch,
            started: Instant::now(),
            next: 200,
        })
    }

    /// Lets time pass while nothing works; agents must not burn it.
    fn wait_out(&self, time: Duration) -> Result<()> {
        let before = self.cpu_times()?;
        let begun = Instant::now();
        self.load.run_for(time);
        let passed = begun.elapsed().as_secs_f64();
        for (agent, (then, now)) in self
            .cluster
            .agents
            .iter()
            .zip(before.into_iter().zip(self.cpu_times()?))
        {
            let share = (now - then).as_secs_f64() / passed;
            let node = agent.node().name();
            println!(
                "{node}: {:.2} % of a core over {passed:.1} s",
                share * 100.0
            );
            ensure!(share < IDLE, "{node} used {:.1} % of a core", share * 100.0);
        }
        Ok(())
    }

    fn cpu_times(&self) -> Result<Vec<Duration>> {
        self.cluster.agents.iter().map(cpu_time).collect()
    }

    /// Writes a new lease until etcd takes it, then demands that both nodes have it in time.
    fn expect_new_lease_in_time(&mut self, what: &str) -> Result<()> {
        let number = self.next();
        wait::until_true("etcd takes a lease", Duration::from_secs(30), || {
            self.put(number).map(|()| true)
        })?;
        self.expect_lease(number, Instant::now(), RECOVERY, what)
    }

    fn next(&mut self) -> u8 {
        self.next += 1;
        self.next
    }

    fn put(&self, number: u8) -> Result<()> {
        let value = format!(
            r#"{{"PublicIP":"172.18.0.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:01:{number:02x}"}}}}"#
        );
        self.etcd
            .put_lease(&format!("10.244.{number}.0-24"), &value, 600)
    }

    fn expect_lease(&self, number: u8, since: Instant, limit: Duration, what: &str) -> Result<()> {
        let (a, b) = self.cluster.nodes();
        for node in [a, b] {
            let waiting = format!("{} has the lease {number}", node.name());
            wait::until_true(&waiting, Duration::from_secs(30), || {
                has_route(node, number)
            })?;
        }
        let took = since.elapsed();
        println!("{what}: first new lease programmed after {took:?}");
        ensure!(took < limit, "{what}: {took:?}, more than {limit:?}");
        Ok(())
    }

    /// Nothing lost, and each node's packets went by the path of its mode alone.
    fn end(self, what: &str) -> Result<()> {
        self.load.run_for(Duration::from_secs(1));
        let least = u64::from(RATE) * self.started.elapsed().as_secs();
        let report = self.load.finish()?;
        println!("{what}: {}", report.summary());
        report.check_nothing_lost().context(what.to_owned())?;
        ensure!(least > 0);
        self.cluster.expect_paths_of_modes(
            &self.watch,
            Packets::AtLeast(least),
            Packets::AtLeast(least),
        )
    }
}

fn has_route(node: &Node, number: u8) -> Result<bool> {
    let route = node
        .namespace()
        .ip(&format!("route show 10.244.{number}.0/24"))?;
    Ok(route.contains("dev flannel.1"))
}

/// User and system time of an agent.
fn cpu_time(agent: &Agent) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    let (_, fields) = stat.rsplit_once(')').context("no process name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // USER_HZ is 100 on every architecture that Linux has.
    Ok(Duration::from_millis(ticks * 10))
}

fn scenario(body: impl FnOnce(&Lab) -> Result<()>) {
    scenario_over(Underlay::Switch, 2, body);
}

#[test]
fn one_of_three_members_killed() {
    scenario(|lab| {
        let mut stage = Stage::set(lab, 3, Security::Open)?;
        // Whichever is in use and whichever leads: each dies once.
        for member in 0..3 {
            stage.etcd.kill(member);
            stage.expect_new_lease_in_time(&format!("member {member} killed"))?;
            stage.wait_out(Duration::from_secs(2))?;
            stage.etcd.restart(member)?;
            stage.etcd.until_it_answers()?;
        }
        stage.end("one of three members killed")
    });
}

#[test]
fn quorum_lost_and_back() {
    scenario(|lab| {
        let mut stage = Stage::set(lab, 3, Security::Open)?;
        for member in [0, 1] {
            stage.etcd.kill(member);
        }
        stage.wait_out(outage())?;
        stage.etcd.restart(0)?;
        stage.expect_new_lease_in_time("quorum back")?;
        stage.end("quorum lost")
    });
}

#[test]
fn every_member_restarts() {
    scenario(|lab| {
        let mut stage = Stage::set(lab, 3, Security::Open)?;
        for member in 0..3 {
            stage.etcd.kill(member);
        }
        stage.wait_out(outage() / 2)?;
        for member in 0..3 {
            stage.etcd.restart(member)?;
        }
        stage.expect_new_lease_in_time("cluster back")?;
        stage.end("full restart")
    });
}

/// Agents that know the members by doors alone.
fn behind_doors(lab: &Lab) -> Result<(Stage<'_>, Vec<Door>)> {
    let etcd = Etcd::start(lab, 3, Security::Open, DEFAULT_CONFIG)?;
    let doors: Vec<Door> = (0..3).map(|i| etcd.door(i)).collect::<Result<_>>()?;
    let urls: Vec<String> = doors.iter().map(Door::url).collect();
    let registry = vec![format!("--etcd-endpoints={}", urls.join(","))];
    let options =
        [Ebpf, Netlink].map(|mode| AgentOptions::in_mode(mode).registry(registry.clone()));
    Ok((Stage::begin(lab, etcd, &options)?, doors))
}

#[test]
fn compacted_while_disconnected() {
    scenario(|lab| {
        let (mut stage, doors) = behind_doors(lab)?;
        let vanishing = stage.next();
        stage.put(vanishing)?;
        stage.expect_lease(vanishing, Instant::now(), RECOVERY, "before the fault")?;
        doors.iter().for_each(Door::shut);
        stage
            .etcd
            .delete_lease(&format!("10.244.{vanishing}.0-24"))?;
        let missed = stage.next();
        stage.put(missed)?;
        stage.etcd.compact()?;
        stage.wait_out(outage() / 2)?;
        doors.iter().for_each(Door::reopen);
        stage.expect_lease(missed, Instant::now(), RECOVERY, "history gone")?;
        for node in lab.nodes() {
            wait::until_true("what was deleted meanwhile goes", RECOVERY, || {
                Ok(!has_route(node, vanishing)?)
            })?;
        }
        stage.expect_new_lease_in_time("watching again")?;
        stage.end("compaction while disconnected")
    });
}

#[test]
fn five_seconds_on_every_call() {
    scenario(|lab| {
        let (mut stage, doors) = behind_doors(lab)?;
        let late = Duration::from_secs(5);
        doors.iter().for_each(|door| door.delay(late));
        stage.wait_out(outage())?;
        let number = stage.next();
        stage.put(number)?;
        stage.expect_lease(number, Instant::now(), late + RECOVERY, "5 s of latency")?;
        stage.wait_out(outage() / 2)?;
        doors.iter().for_each(|door| door.delay(Duration::ZERO));
        stage.expect_new_lease_in_time("fast again")?;
        stage.end("5 s of latency on every call")
    });
}

#[test]
fn client_certificate_runs_out() {
    scenario(|lab| {
        let certificates = Certificates::new(lab)?;
        let security = Security::Certificates(certificates.directory().to_owned());
        let mut stage = Stage::set(lab, 1, security)?;
        // A connection that exists goes on; the next one is refused.
        certificates.renew_client(-1)?;
        stage.etcd.restart(0)?;
        stage.etcd.until_it_answers()?;
        let waiting = stage.next();
        stage.put(waiting)?;
        stage.wait_out(outage() / 2)?;
        let (a, b) = stage.cluster.nodes();
        for node in [a, b] {
            ensure!(
                !has_route(node, waiting)?,
                "the old certificate still works"
            );
        }
        certificates.renew_client(2)?;
        stage.expect_lease(waiting, Instant::now(), RECOVERY, "certificate renewed")?;
        for agent in &stage.cluster.agents {
            ensure!(agent.log().contains("run out"), "{}", agent.log());
        }
        stage.end("expired client certificate")
    });
}

#[test]
fn tokens_run_out() {
    scenario(|lab| {
        let mut stage = Stage::set(lab, 1, Security::Users { token_seconds: 2 })?;
        stage.wait_out(Duration::from_secs(7))?;
        stage.expect_new_lease_in_time("tokens have run out")?;
        // After a restart etcd knows none of them.
        stage.etcd.restart(0)?;
        stage.etcd.until_it_answers()?;
        stage.expect_new_lease_in_time("tokens are unknown")?;
        stage.end("auth tokens run out")
    });
}
