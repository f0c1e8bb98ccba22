//! How an agent behaves in large clusters: a real etcd with thousands of leases, one node with
//! the real agent, and a stopwatch.

use std::{
    fs,
    os::{fd::AsRawFd, unix::net::UnixDatagram},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use etcd_client::{PutOptions, Txn, TxnOp, WatchOptions};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use crate::{
    agent::{Agent, AgentOptions},
    binaries,
    etcd_cluster::{Etcd, SUBNETS, Security},
    lab::{Lab, Underlay},
    node::{Node, SUBNET_FILE},
    spawner,
};

/// Room for more than 10,000 nodes.
const CONFIG: &str =
    r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan","FastPath":"direct"}}"#;
/// Fifty agents of one host can only hold leases: they share its network.
const LEASES_ONLY: &str = r#"{"Network":"10.0.0.0/16","Backend":{"Type":"alloc"}}"#;
/// Leases are written so many to a transaction.
const PER_TRANSACTION: u32 = 100;
/// The longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at files and sockets.
const STEP: Duration = Duration::from_micros(300);

/// Arguments of `lab scale`.
#[derive(Debug, clap::Args)]
pub struct ScaleArgs {
    /// Leases of other nodes, one measurement each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 10_000])]
    leases: Vec<u32>,
    /// Starts of each kind; the median is told.
    #[arg(long, default_value_t = 5)]
    starts: usize,
    /// New leases that are timed one by one.
    #[arg(long, default_value_t = 200)]
    puts: u32,
    /// Agents that start at once.
    #[arg(long, default_value_t = 50)]
    agents: u32,
}

/// One line of the table.
struct Figures {
    subnet_file: Duration,
    ready: Duration,
    ready_again: Duration,
    puts: PutTimes,
    resident_mb: f64,
    peak_mb: f64,
}

/// Measures everything and prints it.
///
/// # Errors
/// When something does not work; figures are told, not judged.
pub fn run(args: &ScaleArgs) -> Result<()> {
    println!(
        "subnet.env, ready: from exec, median of {} (ready: every entry and map in the kernel; \
         again: all of it there already)\nput: until the route is there, {} leases one by one; \
         heard: until a client that only watches knows of it\n",
        args.starts, args.puts
    );
    println!(
        "{:>6} {:<8} {:>10} {:>9} {:>9} {:>20} {:>20} {:>20} {:>16}",
        "leases",
        "mode",
        "subnet.env",
        "ready",
        "again",
        "put median/p99",
        "answer median/p99",
        "heard median/p99",
        "RSS now/peak MB"
    );
    for leases in &args.leases {
        for mode in [Netlink, Ebpf] {
            let figures = measure(args, *leases, mode)?;
            println!("{}", figures.line(*leases, mode));
        }
    }
    at_once(args.agents)
}

impl Figures {
    fn line(&self, leases: u32, mode: Mode) -> String {
        let pair =
            |sorted: &[Duration]| format!("{} / {}", ms(share(sorted, 50)), ms(share(sorted, 99)));
        format!(
            "{leases:>6} {:<8} {:>10} {:>9} {:>9} {:>20} {:>20} {:>20} {:>7.1} / {:.1}",
            format!("{mode:?}").to_lowercase(),
            ms(self.subnet_file),
            ms(self.ready),
            ms(self.ready_again),
            pair(&self.puts.route),
            pair(&self.puts.after_answer),
            pair(&self.puts.heard),
            self.resident_mb,
            self.peak_mb
        )
    }
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1000.0)
}

/// The value below which `percent` of the sorted values lie.
fn share(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn measure(args: &ScaleArgs, leases: u32, mode: Mode) -> Result<Figures> {
    let lab = Lab::over(Underlay::Switch, 1)?;
    let node = &lab[0];
    let etcd = Etcd::start(&lab, 1, Security::Open, CONFIG)?;
    // A way to every peer, or the programs would leave them to the kernel.
    node.namespace().ip("route add default via 172.18.0.250")?;
    fill(&etcd, leases)?;
    let options = etcd.agent(AgentOptions::in_mode(mode));
    let (mut files, mut readies, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.starts {
        wipe(node)?;
        let (agent, file, ready) = start(&lab, node, &options)?;
        expect_everything(node, leases)?;
        files.push(file);
        readies.push(ready);
        agent.kill9()?;
        let (agent, _, ready) = start(&lab, node, &options)?;
        again.push(ready);
        agent.kill9()?;
    }
    let (agent, ..) = start(&lab, node, &options)?;
    thread::sleep(Duration::from_secs(1));
    let puts = time_puts(&etcd, node, args.puts)?;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let megabytes = |key: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        Ok(number.context("no such line")?.parse::<f64>()? / 1024.0)
    };
    Ok(Figures {
        subnet_file: median(files),
        ready: median(readies),
        ready_again: median(again),
        puts,
        resident_mb: megabytes("VmRSS:")?,
        peak_mb: megabytes("VmHWM:")?,
    })
}

/// Name and value of the lease of node `number`.
fn lease(number: u32, first_subnet: u32) -> (String, String) {
    let [_, a, b, c] = number.to_be_bytes();
    let subnet = std::net::Ipv4Addr::from(first_subnet + (number << 8));
    let value = format!(
        r#"{{"PublicIP":"172.{}.{b}.{c}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:{:02x}:00:{a:02x}:{b:02x}:{c:02x}"}}}}"#,
        20 + (first_subnet >> 16 & 1),
        first_subnet >> 16 & 0xff,
    );
    (format!("{SUBNETS}/{subnet}-24"), value)
}

fn fill(etcd: &Etcd, leases: u32) -> Result<()> {
    etcd.ask_within(PATIENCE, |mut client| async move {
        let id = client.lease_grant(86_400, None).await?.id();
        for first in (0..leases).step_by(PER_TRANSACTION as usize) {
            let puts = (first..leases.min(first + PER_TRANSACTION)).map(|number| {
                let (key, value) = lease(number, 0x0a40_0000);
                TxnOp::put(key, value, Some(PutOptions::new().with_lease(id)))
            });
            client
                .txn(Txn::new().and_then(puts.collect::<Vec<_>>()))
                .await?;
        }
        Ok(())
    })
}

/// As if no agent had ever run here; its lease stays.
fn wipe(node: &Node) -> Result<()> {
    let namespace = node.namespace();
    namespace.run(&["rm", "-rf", "/sys/fs/bpf/flannel", "/run/flannel"])?;
    // It may not be there.
    let _ = namespace.ip("link delete flannel.1");
    Ok(())
}

/// Starts an agent: the time until its subnet file, and until it says that it is ready.
fn start(lab: &Lab, node: &Node, options: &AgentOptions) -> Result<(Agent, Duration, Duration)> {
    let socket = lab.scratch().join("notify");
    let _ = fs::remove_file(&socket);
    let heard = UnixDatagram::bind(&socket)?;
    heard.set_nonblocking(true)?;
    let file = inside(node, SUBNET_FILE);
    let _ = fs::remove_file(&file);
    let path = socket.to_str().context("an odd path")?;
    let options = options.clone().variable("NOTIFY_SOCKET", path);
    let begun = Instant::now();
    let agent = Agent::launch(node, &options)?;
    let mut written = None;
    let mut buffer = [0; 64];
    loop {
        if written.is_none() && file.exists() {
            written = Some(begun.elapsed());
        }
        if heard.recv(&mut buffer).is_ok() {
            let written = written.context("ready before the subnet file")?;
            return Ok((agent, written, begun.elapsed()));
        }
        ensure!(begun.elapsed() < PATIENCE, "not ready: {}", agent.log());
        thread::sleep(STEP);
    }
}

/// A path of the node as the host sees it.
fn inside(node: &Node, path: &str) -> PathBuf {
    Path::new("/proc")
        .join(node.namespace().pid().to_string())
        .join("root")
        .join(path.trim_start_matches('/'))
}

fn expect_everything(node: &Node, leases: u32) -> Result<()> {
    let routes = node.namespace().ip("route show dev flannel.1")?;
    ensure!(
        routes.lines().count() == leases as usize,
        "ready with {} routes of {leases}",
        routes.lines().count()
    );
    Ok(())
}

/// How long new leases took, each list sorted.
struct PutTimes {
    /// From the call until the route is there.
    route: Vec<Duration>,
    /// From etcd's answer until then.
    after_answer: Vec<Duration>,
    /// From the call until a client that only watches has heard of it.
    heard: Vec<Duration>,
}

/// Writes leases one by one and waits for the route of each. What etcd and the machine take for
/// themselves is told by a bare watcher beside.
fn time_puts(etcd: &Etcd, node: &Node, puts: u32) -> Result<PutTimes> {
    let routes = new_routes(node)?;
    let (watcher, heard) = channel();
    thread::scope(|scope| {
        let watching = scope.spawn(|| watch(etcd, watcher, puts));
        let _watches: Instant = heard.recv().context("the bare watcher ended")?;
        let timed = etcd.ask_within(PATIENCE * 5, |mut client| async move {
            let mut times = Vec::new();
            for number in 0..puts {
                let (key, value) = lease(number, 0x0ac9_0000);
                let begun = Instant::now();
                client.put(key, value, None).await?;
                let answered = Instant::now();
                let (Ok(there), Ok(heard)) =
                    (routes.recv_timeout(PATIENCE), heard.recv_timeout(PATIENCE))
                else {
                    break;
                };
                times.push([
                    there.saturating_duration_since(begun),
                    there.saturating_duration_since(answered),
                    heard.saturating_duration_since(begun),
                ]);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(times)
        })?;
        ensure!(
            timed.len() == puts as usize,
            "a route or an event never came"
        );
        watching.join().expect("it does not panic")?;
        let sorted = |which: usize| {
            let mut times: Vec<Duration> = timed.iter().map(|times| times[which]).collect();
            times.sort_unstable();
            times
        };
        Ok(PutTimes {
            route: sorted(0),
            after_answer: sorted(1),
            heard: sorted(2),
        })
    })
}

/// Watches the leases and does nothing else: first the moment from which on it does, then one for
/// each of `puts` events.
fn watch(etcd: &Etcd, heard: Sender<Instant>, puts: u32) -> Result<()> {
    etcd.ask_within(PATIENCE * 5, |mut client| async move {
        let options = WatchOptions::new().with_prefix();
        let mut events = client.watch(SUBNETS, Some(options)).await?;
        let mut left = puts;
        let _ = heard.send(Instant::now());
        while left > 0
            && let Some(message) = events.message().await?
        {
            let now = Instant::now();
            for _ in message.events() {
                left = left.saturating_sub(1);
                let _ = heard.send(now);
            }
        }
        Ok(())
    })
}

/// The moment of each route that is made on the node from now on.
fn new_routes(node: &Node) -> Result<Receiver<Instant>> {
    const IPV4_ROUTES: u32 = 0x40;
    const NEW_ROUTE: u16 = 24;
    let socket = node.namespace().within(|| -> Result<_> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, IPV4_ROUTES))?;
        Ok(socket)
    })??;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            let now = Instant::now();
            let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
            if length >= 16 && kind == NEW_ROUTE && sender.send(now).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Starts many agents at the same moment and compares their subnets.
fn at_once(agents: u32) -> Result<()> {
    let lab = Lab::over(Underlay::Switch, 1)?;
    let node = &lab[0];
    let etcd = Etcd::start(&lab, 1, Security::Open, LEASES_ONLY)?;
    let directory = lab.scratch().join("agents");
    let file = |number: u32, name: &str| directory.join(format!("{number}-{name}"));
    fs::create_dir(&directory)?;
    let mut running = Vec::new();
    let begun = Instant::now();
    for number in 1..=agents {
        let mut command = node.namespace().command(binaries::flanneld()?);
        command
            .arg(format!("--etcd-endpoints={}", etcd.urls()))
            .args(["--iface=eth0", "--iptables-forward-rules=false"])
            .arg(format!("--public-ip=172.21.0.{number}"))
            .arg(format!("--subnet-file={}", file(number, "env").display()))
            .arg(format!(
                "--control-socket={}",
                file(number, "sock").display()
            ))
            .stderr(fs::File::create(file(number, "log"))?);
        running.push(Running(spawner::spawn(command)?));
    }
    let mut subnets = Vec::new();
    for number in 1..=agents {
        let path = file(number, "env");
        while !path.exists() {
            if begun.elapsed() > PATIENCE {
                let log = fs::read_to_string(file(number, "log"))?;
                bail!("agent {number} has no subnet: {log}");
            }
            thread::sleep(STEP);
        }
        let text = fs::read_to_string(&path)?;
        let line = text
            .lines()
            .find(|line| line.starts_with("FLANNEL_SUBNET="));
        subnets.push(line.context("no subnet")?.to_owned());
    }
    let took = begun.elapsed();
    subnets.sort();
    subnets.dedup();
    println!(
        "\n{agents} agents started at once: {} different subnets after {}",
        subnets.len(),
        ms(took)
    );
    ensure!(
        subnets.len() == agents as usize,
        "two agents share a subnet"
    );
    Ok(())
}

/// Killed when dropped.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
