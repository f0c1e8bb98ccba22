//! The path between two nodes, or behind one of them, takes no more packets of full size: young
//! connections that opened by their class stand still no longer than those on the kernel path.

use anyhow::{Context, Result, ensure};
use lab::{
    classes::opened,
    cluster::introduce,
    kube::{Kube, Side},
    lab::{Lab, Underlay},
    namespace::{Kind, Namespace},
    paths,
    pod::Pod,
    scenario::{repetitions, scenario_over},
    task::Task,
    traffic::kept::{AliveReport, KeptReport},
    wait,
};

use super::classes_handshakes::{KEPT_PORT, be_strict, run};

/// What may be added to the kernel path's longest standstill.
const MORE_MS: f64 = 50.0;
/// Bytes of a question and of its answer: several full segments.
const SIZE: u32 = 8000;
const MTU: u32 = 1300;

/// Where the path gets narrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Narrow {
    /// A router between the nodes cuts the tunnel's packets into fragments.
    Underlay,
    /// A router between the server's node and the server refuses the pods' packets.
    Behind,
}

/// A server, behind a router of its own or not.
struct Server {
    pod: Pod,
    /// What is behind the pod, if it is a router.
    behind: Option<Namespace>,
    address: std::net::SocketAddrV4,
}

impl Server {
    fn start(kube: &Kube, narrow: Narrow) -> Result<Self> {
        let (_, b) = kube.cluster.nodes();
        let pod = b.add_pod()?;
        introduce(&pod)?;
        if narrow == Narrow::Underlay {
            let address = pod.at(KEPT_PORT);
            return Ok(Self {
                pod,
                behind: None,
                address,
            });
        }
        let behind = Namespace::new("behind", Kind::Network)?;
        let gateway = b.subnet_file()?.gateway;
        let octets = gateway.addr().octets();
        let far = std::net::Ipv4Addr::new(octets[0], octets[1], octets[2], 200);
        let router = pod.namespace();
        router.sysctl("net.ipv4.ip_forward", "1")?;
        router.sysctl("net.ipv4.conf.eth0.proxy_arp", "1")?;
        router.ip_batch(&format!(
            "link add inner type veth peer name eth0 netns {}\nlink set inner up\nroute add {far}/32 dev inner\n",
            behind.pid()
        ))?;
        behind.ip_batch(&format!(
            "addr add {far}/32 dev eth0\nlink set eth0 mtu 1450\nlink set eth0 up\nroute add {} dev eth0\nroute add default via {} dev eth0\n",
            pod.address(),
            pod.address()
        ))?;
        behind.wait_until_up("eth0")?;
        behind.run(&[
            "ping",
            "-n",
            "-q",
            "-c",
            "2",
            "-W",
            "2",
            &gateway.addr().to_string(),
        ])?;
        let address = std::net::SocketAddrV4::new(far, KEPT_PORT);
        Ok(Self {
            pod,
            behind: Some(behind),
            address,
        })
    }

    fn serve(&self) -> Result<Task> {
        let namespace = self.behind.as_ref().unwrap_or(self.pod.namespace());
        Task::start(namespace, &format!("kept-serve --port {KEPT_PORT}"))
    }

    fn narrow(&self, lab: &Lab, mtu: u32) -> Result<()> {
        if self.behind.is_some() {
            let far = self.address.ip();
            let words = format!("ip route replace {far}/32 dev inner mtu lock {mtu}");
            return run(self.pod.namespace(), &words);
        }
        let router = lab.fabric().context("no router")?;
        for index in [1, 2] {
            let words = format!(
                "ip route replace 172.18.{index}.0/24 dev port{} mtu lock {mtu}",
                index - 1
            );
            run(router, &words)?;
        }
        Ok(())
    }
}

fn heat(kube: &Kube, client: &Pod, server: &Server) -> Result<()> {
    let (a, b) = kube.cluster.nodes();
    let what = "classes are in use";
    wait::until_true(what, std::time::Duration::from_secs(5), || {
        let before = [opened(a)?, opened(b)?];
        let report: AliveReport = client
            .tool(&format!("kept --to {} --count 20", server.address))?
            .finish()?;
        ensure!(report.alive == 20, "{report:?}");
        // The server's node takes nobody for a pod who is behind one.
        Ok(kube.side() != Side::Classes
            || opened(a)? >= before[0] + 18
                && (server.behind.is_some() || opened(b)? >= before[1] + 18))
    })
    .with_context(|| format!("{}\n{}", paths::describe(a), paths::describe(b)))
}

/// The slowest answer of each round in milliseconds.
fn stand_still(side: Side, narrow: Narrow) -> Vec<f64> {
    let mut slowest = Vec::new();
    scenario_over(Underlay::Router, 2, |lab| {
        let kube = Kube::start(lab, side)?;
        let (a, b) = kube.cluster.nodes();
        be_strict(&kube)?;
        let server = Server::start(&kube, narrow)?;
        let serving = server.serve()?;
        let rounds = repetitions(5, 20);
        let mut young = 0;
        for round in 0..rounds {
            // Nobody remembers the path's MTU.
            let client = a.add_pod()?;
            introduce(&client)?;
            server.narrow(lab, 1500)?;
            heat(&kube, &client, &server)?;
            let before = opened(a)?;
            let mut task = client.tool(&format!(
                "kept --to {} --count 1 --size {SIZE} --seconds 2",
                server.address
            ))?;
            let _: KeptReport = task.next_report()?;
            let opened = opened(a)? - before;
            server.narrow(lab, MTU)?;
            let report: AliveReport = task.finish()?;
            println!(
                "{side:?} {narrow:?} round {round}: {:.1} ms at most, {} answers; {opened} opened by class",
                report.slowest_ms, report.answers
            );
            ensure!(
                report.alive == 1,
                "{report:?}\n{}\n{}",
                paths::describe(a),
                paths::describe(b)
            );
            slowest.push(report.slowest_ms);
            young += opened;
        }
        if side == Side::Classes {
            // One in a second asks the stack instead.
            ensure!(
                young * 2 > u64::from(rounds),
                "only {young} of {rounds} were own"
            );
            let (whole, quoted) = (
                b.status()?.packets("own_whole"),
                a.status()?.packets("own_quoted"),
            );
            println!("{whole} packets made whole, {quoted} errors about own connections");
            ensure!(
                match narrow {
                    Narrow::Underlay => whole > 0,
                    Narrow::Behind => quoted > 0,
                },
                "{}\n{}",
                paths::describe(a),
                paths::describe(b)
            );
        }
        drop(serving);
        Ok(())
    });
    slowest
}

fn compare(narrow: Narrow) {
    let [mut netlink, mut classes] =
        [Side::Netlink, Side::Classes].map(|side| stand_still(side, narrow));
    // One round may meet somebody else's build.
    for slowest in [&mut netlink, &mut classes] {
        slowest.sort_by(f64::total_cmp);
    }
    let middle = |slowest: &[f64]| slowest[slowest.len() / 2];
    println!("{narrow:?}: {netlink:.1?} ms, by class {classes:.1?} ms");
    assert!(
        middle(&classes) <= middle(&netlink) + MORE_MS,
        "{netlink:?} {classes:?}"
    );
}

#[test]
fn a_path_that_cuts_tunnel_packets_stalls_no_young_connection() {
    compare(Narrow::Underlay);
}

#[test]
fn a_path_that_refuses_large_packets_stalls_no_young_connection() {
    compare(Narrow::Behind);
}
