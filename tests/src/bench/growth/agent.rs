//! The agent in a cluster of N nodes: how soon it is ready, what it needs, how
//! fast it follows.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixDatagram,
    path::PathBuf,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use aya::maps::{
    Map, MapData,
    lpm_trie::{Key, LpmTrie},
};
use flannel_ebpf::layout::{REMOTE_SUBNETS, RemoteSubnet};
use flannel_user::observe::status::Mode;

use super::{
    Curve, Points,
    leases::{self, UNDERLAY},
};
use crate::{
    agent::{Agent, AgentOptions},
    bench::{cpu, program},
    etcd::Etcd,
    lab::Lab,
    node::{Node, TUNNEL},
    wait,
};

/// Where the leases come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Directory,
    Etcd,
}

impl Source {
    const ALL: [Self; 2] = [Self::Directory, Self::Etcd];

    const fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Etcd => "etcd",
        }
    }
}

/// A source with leases in it.
enum Registry {
    Directory(PathBuf),
    Etcd(Etcd),
}

impl Registry {
    /// One with the leases of nodes 0 to `size`.
    fn with_leases(lab: &Lab, source: Source, size: u32) -> Result<Self> {
        match source {
            Source::Directory => {
                let directory = lab.lease_dir();
                for number in 0..size {
                    leases::write(&directory, number)?;
                }
                Ok(Self::Directory(directory))
            }
            Source::Etcd => {
                let etcd = Etcd::start(lab, leases::CONFIG)?;
                let all: Vec<_> = (0..size).map(leases::lease).collect();
                etcd.put_leases(&all)?;
                Ok(Self::Etcd(etcd))
            }
        }
    }

    fn options(&self, readiness: &Readiness) -> AgentOptions {
        AgentOptions {
            etcd: match self {
                Self::Directory(_) => None,
                Self::Etcd(etcd) => Some(etcd.at()),
            },
            ..readiness.options()
        }
    }

    fn add(&self, number: u32) -> Result<()> {
        match self {
            Self::Directory(directory) => Ok(leases::write(directory, number)?),
            Self::Etcd(etcd) => etcd.put_leases(&[leases::lease(number)]),
        }
    }

    fn remove(&self, number: u32) -> Result<()> {
        match self {
            Self::Directory(directory) => Ok(leases::remove(directory, number)?),
            Self::Etcd(etcd) => etcd.remove_lease(&leases::lease(number).0),
        }
    }
}

/// Starts of an agent per point.
const STARTS: usize = 3;
/// Single lease changes per point.
const EVENTS: u32 = 20;
/// Switches each way per point.
const TOGGLES: usize = 5;
/// Lease changes a second, and for how long.
const CHANGES_PER_SECOND: u32 = 100;
const CHANGING: Duration = Duration::from_secs(4);
/// More than any of this may take.
const LIMIT: Duration = Duration::from_secs(180);

/// All curves of the agent, at each of `sizes` nodes.
///
/// # Errors
/// When the agent does not get there.
pub(super) fn measure(sizes: &[u32]) -> Result<Vec<Curve>> {
    let mut points = Points::over("nodes");
    for size in sizes {
        for source in Source::ALL {
            start(*size, source, &mut points)
                .and_then(|()| follow(*size, source, &mut points))
                .with_context(|| format!("{size} leases in {}", source.name()))?;
        }
    }
    Ok(points.curves())
}

/// A lab whose first node can reach the nodes that do not exist.
fn lab() -> Result<Lab> {
    let lab = Lab::with_nodes(2)?;
    lab.write_config(leases::CONFIG)?;
    let (a, b) = lab.pair();
    a.namespace()
        .ip(&format!("route add {UNDERLAY} via {}", b.public_ip()))?;
    Ok(lab)
}

/// The moment at which an agent tells systemd that it is ready.
struct Readiness {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Readiness {
    fn listen(lab: &Lab) -> Result<Self> {
        let path = lab.scratch().join("notify");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(Self { socket, path })
    }

    fn options(&self) -> AgentOptions {
        AgentOptions::default().variable("NOTIFY_SOCKET", self.path.display().to_string())
    }

    fn wait(&self) -> Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let length = self.socket.recv(&mut buffer).context("never ready")?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            if text.lines().any(|line| line == "READY=1") {
                return Ok(());
            }
        }
    }
}

/// From the start of the process to ready, and to N programmed.
fn start(size: u32, source: Source, points: &mut Points) -> Result<()> {
    let (mut ready, mut programmed) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let lab = lab()?;
        let node = &lab[0];
        let registry = Registry::with_leases(&lab, source, size)?;
        let readiness = Readiness::listen(&lab)?;
        let options = registry.options(&readiness);
        let begin = Instant::now();
        let agent = Agent::launch(node, &options)?;
        readiness
            .wait()
            .with_context(|| format!("its log:\n{}", agent.log()))?;
        ready.push(begin.elapsed().as_secs_f64());
        wait_for_map(node, size)?;
        programmed.push(begin.elapsed().as_secs_f64());
        let routes = node.namespace().ip(&format!("route show dev {TUNNEL}"))?;
        let routes = routes.lines().count();
        if routes != size as usize {
            bail!("{routes} routes instead of {size}");
        }
    }
    points.add("start to ready", source.name(), "s", size, &ready)?;
    points.add(
        "start to all leases programmed",
        source.name(),
        "s",
        size,
        &programmed,
    )
}

/// The map of peers of the one agent on a node.
fn peers(node: &Node) -> Result<LpmTrie<MapData, [u8; 4], RemoteSubnet>> {
    let pin = program::pinned_map(node.namespace(), REMOTE_SUBNETS)?;
    let data = node.namespace().within(|| MapData::from_pin(&pin))??;
    Ok(LpmTrie::try_from(Map::LpmTrie(data))?)
}

/// Whether the map has the subnet of a node, with a way to it.
fn has(peers: &LpmTrie<MapData, [u8; 4], RemoteSubnet>, number: u32) -> bool {
    let subnet = leases::subnet(number);
    peers
        .get(
            &Key::new(u32::from(subnet.prefix_len()), subnet.network().octets()),
            0,
        )
        .is_ok()
}

/// Waits until the programs know nodes 0 to `size`. The map comes into being with
/// the agent's first pass.
fn wait_for_map(node: &Node, size: u32) -> Result<()> {
    let what = format!("all {size} peers are in the map");
    // Each one is looked at once: what is there stays there.
    let mut known = 0;
    let deadline = Instant::now() + LIMIT;
    let map = wait::until(&what, LIMIT, || Ok(peers(node).ok()))?;
    while known < size {
        if has(&map, known) {
            known += 1;
        } else if Instant::now() > deadline {
            bail!("waited in vain: {what}, {known} are");
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// What a running agent needs, and how fast it follows.
fn follow(size: u32, source: Source, points: &mut Points) -> Result<()> {
    let lab = lab()?;
    let node = &lab[0];
    let registry = Registry::with_leases(&lab, source, size)?;
    let readiness = Readiness::listen(&lab)?;
    let agent = Agent::launch(node, &registry.options(&readiness))?;
    readiness.wait()?;
    wait_for_map(node, size)?;

    let (mut routes, mut map_entries) = (Vec::new(), Vec::new());
    for event in 0..EVENTS {
        let (route, entry) = one_more(node, &registry, size + event)?;
        routes.push(route);
        map_entries.push(entry);
    }
    let name = source.name();
    points.add("one lease to its route", name, "ms", size, &routes)?;
    points.add("one lease to its map entry", name, "ms", size, &map_entries)?;
    let memory = cpu::resident(agent.pid())? as f64 / f64::from(1 << 20);
    points.add("resident memory", name, "MiB", size, &[memory])?;

    // The switch does not ask where the leases came from.
    if source == Source::Directory {
        let (mut off, mut on) = (Vec::new(), Vec::new());
        for _ in 0..TOGGLES {
            for (mode, times) in [(Mode::Netlink, &mut off), (Mode::Ebpf, &mut on)] {
                let begin = Instant::now();
                node.request_mode(mode)?;
                times.push(begin.elapsed().as_secs_f64() * 1000.0);
            }
        }
        points.add("switch to netlink", name, "ms", size, &off)?;
        points.add("switch to ebpf", name, "ms", size, &on)?;
    }
    let share = under_changes(&registry, &agent, size + EVENTS)?;
    points.add(
        "CPU at 100 lease changes/s",
        name,
        "% of one",
        size,
        &[share],
    )
}

/// Milliseconds from a lease's appearance to its route, and to its map entry.
fn one_more(node: &Node, registry: &Registry, number: u32) -> Result<(f64, f64)> {
    let map = peers(node)?;
    let mut command = node.namespace().command("ip");
    command
        .args(["-4", "monitor", "route"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut monitor = node.namespace().spawn(command)?;
    let lines = BufReader::new(monitor.stdout.take().context("ip without stdout")?).lines();
    // It says nothing when it is ready to listen.
    thread::sleep(Duration::from_millis(50));
    let wanted = leases::subnet(number).to_string();
    let begin = Instant::now();
    let (route, entry) = thread::scope(|scope| {
        let routes = scope.spawn(move || {
            let mut lines = lines;
            lines
                .any(|line| line.is_ok_and(|line| line.starts_with(&wanted)))
                .then(|| begin.elapsed())
        });
        registry.add(number)?;
        let entry = loop {
            if has(&map, number) {
                break begin.elapsed();
            }
            if begin.elapsed() > LIMIT {
                let _ = monitor.kill();
                bail!("lease {number} never came into the map");
            }
            thread::sleep(Duration::from_micros(200));
        };
        // The kernel path comes first, so the route is there.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !routes.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let _ = monitor.kill();
        let route = routes.join().expect("the reader does not panic");
        Ok((route.context("no route for the new lease")?, entry))
    })?;
    let _ = monitor.wait();
    Ok((route.as_secs_f64() * 1000.0, entry.as_secs_f64() * 1000.0))
}

/// The agent's share of one processor while leases come and go.
fn under_changes(registry: &Registry, agent: &Agent, first: u32) -> Result<f64> {
    let before = cpu::of_process(agent.pid())?;
    let begin = Instant::now();
    let mut change = 0;
    while begin.elapsed() < CHANGING {
        let number = first + change / 2;
        if change % 2 == 0 {
            registry.add(number)?;
        } else {
            registry.remove(number)?;
        }
        change += 1;
        let due = Duration::from_secs_f64(f64::from(change) / f64::from(CHANGES_PER_SECOND));
        thread::sleep(due.saturating_sub(begin.elapsed()));
    }
    let spent = cpu::of_process(agent.pid())? - before;
    Ok(100.0 * spent / begin.elapsed().as_secs_f64())
}
