//! Firewall rules under traffic: nothing leaves unmasked and nothing is lost while rules are applied
//! again and agents come and go.
//!
//! ```text
//! pod 10.244.1.2 ── cni0 (10.244.1.1) host (192.0.2.1) ── outside 192.0.2.2, echoes UDP
//! ```

mod alloc_agent;
mod namespace;

use std::{
    fs::File,
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use alloc_agent::{Host, stop};
use flannel_user::firewall::{
    Firewall, Policy, iptables::Iptables, iptables::Variant, nftables::Nftables,
};
use namespace::{Elsewhere, in_new_namespace, run};
use nix::sched::{CloneFlags, setns};

const OUTSIDE: &str = "192.0.2.2:7007";

fn policy() -> Policy {
    Policy {
        network: "10.244.0.0/16".parse().expect("a network"),
        subnet: "10.244.1.0/24".parse().expect("a network"),
        masquerade: true,
        random_fully: true,
        forward: true,
    }
}

/// Pod, host (this thread's namespace) and outside, with an echo server there.
struct Scene {
    pod: Elsewhere,
    outside: Elsewhere,
    /// For the pod's threads. The echo server ends after them, or its end would look like a loss.
    stop: Arc<AtomicBool>,
    server_stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    server: Option<JoinHandle<()>>,
}

/// Runs `work` on a thread in the network namespace of process `pid`.
fn inside(pid: u32, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let namespace = File::open(format!("/proc/{pid}/ns/net")).expect("a namespace");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
        work();
    })
}

/// What the pod saw.
#[derive(Default)]
struct Tally {
    answered: AtomicU64,
    lost: AtomicU64,
}

impl Scene {
    fn new() -> Self {
        let (pod, outside) = (Elsewhere::new(), Elsewhere::new());
        for (ours, theirs, namespace, host, address) in [
            ("cni0", "eth0", &pod, "10.244.1.1/24", "10.244.1.2/24"),
            ("uplink0", "eth0", &outside, "192.0.2.1/24", "192.0.2.2/24"),
        ] {
            let pid = namespace.pid();
            run(&format!(
                "ip link add {ours} type veth peer name {theirs} netns {pid}"
            ));
            run(&format!("ip addr add {host} dev {ours}"));
            run(&format!("ip link set {ours} up"));
            namespace.run("ip link set lo up");
            namespace.run(&format!("ip addr add {address} dev eth0"));
            namespace.run("ip link set eth0 up");
        }
        pod.run("ip route add default via 10.244.1.1");
        // Unmasked packets are answered too, so that they show as unmasked and not as lost.
        outside.run("ip route add 10.244.0.0/16 via 192.0.2.1");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding on");
        outside.run("nft add table ip seen");
        outside.run("nft add chain ip seen in { type filter hook prerouting priority 0 ; }");
        outside.run("nft add rule ip seen in ip saddr 10.244.0.0/16 counter");
        Self {
            pod,
            outside,
            stop: Arc::default(),
            server_stop: Arc::default(),
            threads: Vec::new(),
            server: None,
        }
    }

    /// Starts new connections all the time, and one that lasts.
    fn start_traffic(&mut self) -> Arc<Tally> {
        let ready = Arc::new(AtomicBool::new(false));
        let is_ready = Arc::clone(&ready);
        let stop = Arc::clone(&self.server_stop);
        self.server = Some(inside(self.outside.pid(), move || {
            let socket = UdpSocket::bind(OUTSIDE).expect("bound");
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .expect("set");
            is_ready.store(true, Relaxed);
            let mut bytes = [0; 64];
            while !stop.load(Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                    let _ = socket.send_to(&bytes[..length], from);
                }
            }
        }));
        while !ready.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let tally = Arc::new(Tally::default());
        for lasting in [true, false] {
            let tally = Arc::clone(&tally);
            let stop = Arc::clone(&self.stop);
            self.threads.push(inside(self.pod.pid(), move || {
                let socket = || {
                    let socket = UdpSocket::bind("10.244.1.2:0").expect("bound");
                    socket.connect(OUTSIDE).expect("connected");
                    socket
                        .set_read_timeout(Some(Duration::from_secs(5)))
                        .expect("set");
                    socket
                };
                let kept = socket();
                while !stop.load(Relaxed) {
                    let fresh;
                    let socket = if lasting {
                        &kept
                    } else {
                        fresh = socket();
                        &fresh
                    };
                    let answered = socket.send(b"?").is_ok() && is_answered(socket);
                    let counter = if answered {
                        &tally.answered
                    } else {
                        &tally.lost
                    };
                    counter.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }));
        }
        tally
    }

    /// Ends the traffic and checks it.
    fn assert_clean(mut self, tally: &Tally, at_least: u64) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("no panic");
        }
        self.server_stop.store(true, Relaxed);
        self.server
            .take()
            .map(JoinHandle::join)
            .transpose()
            .expect("no panic");
        let seen = self.outside.run("nft list table ip seen");
        let (answered, lost) = (tally.answered.load(Relaxed), tally.lost.load(Relaxed));
        println!("{answered} exchanges, {lost} lost");
        assert!(answered > at_least, "{answered} exchanges");
        let conntrack = std::fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack");
        assert_eq!(
            lost, 0,
            "lost of {answered}; connection tracking: {conntrack:?}"
        );
        assert!(
            seen.contains("packets 0 bytes 0"),
            "a pod address got out: {seen}"
        );
    }
}

/// A tool that ends interrupts whoever waits in this process: that is no loss.
fn is_answered(socket: &UdpSocket) -> bool {
    loop {
        match socket.recv(&mut [0; 8]) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            received => return received.is_ok(),
        }
    }
}

/// The test can fail: without rules, pod addresses do get out.
#[test]
fn without_rules_pod_addresses_are_seen_outside() {
    in_new_namespace(|| async {
        let mut scene = Scene::new();
        let tally = scene.start_traffic();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(tally.answered.load(Relaxed) > 0);
        let seen = scene.outside.run("nft list table ip seen");
        assert!(!seen.contains("packets 0 bytes 0"), "{seen}");
        scene.stop.store(true, Relaxed);
        scene.server_stop.store(true, Relaxed);
    });
}

async fn reapplied_under_load(variant: Option<Variant>) {
    let mut scene = Scene::new();
    let open = || match variant {
        Some(variant) => Firewall::Iptables(Iptables::with(variant, policy(), None)),
        None => Firewall::Nftables(Nftables::new(policy(), None)),
    };
    open().apply().await.expect("applied");
    if let Some(variant) = variant {
        let tool = tool(variant);
        run(&format!("{tool} -P FORWARD DROP"));
    }
    let tally = scene.start_traffic();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(30)).await;
        // Spoiled without harm, so that every chain is written again.
        match variant {
            Some(variant) => {
                let tool = tool(variant);
                run(&format!(
                    "{tool} -t nat -A FLANNEL-POSTRTG -s 10.9.9.9 -j RETURN"
                ));
                run(&format!("{tool} -A FLANNEL-FWD -s 10.9.9.9 -j RETURN"));
            }
            None => {
                run("nft add rule ip flannel-ipv4 postrtg ip saddr 10.9.9.9 return");
                run("nft add rule ip flannel-ipv4 forward ip saddr 10.9.9.9 return");
            }
        }
        assert_eq!(open().apply().await.expect("applied").len(), 2);
    }
    scene.assert_clean(&tally, 200);
}

fn tool(variant: Variant) -> &'static str {
    match variant {
        Variant::Legacy => "iptables-legacy",
        Variant::Nft | Variant::Plain { .. } => "iptables-nft",
    }
}

#[test]
fn contract_23_7_no_gap_while_iptables_nft_rules_are_written_again() {
    in_new_namespace(|| reapplied_under_load(Some(Variant::Nft)));
}

#[test]
fn contract_23_7_no_gap_while_iptables_legacy_rules_are_written_again() {
    in_new_namespace(|| reapplied_under_load(Some(Variant::Legacy)));
}

#[test]
fn contract_23_7_no_gap_while_nftables_rules_are_written_again() {
    in_new_namespace(|| reapplied_under_load(None));
}

#[test]
fn contract_14_5_no_gap_while_the_packet_filter_is_switched() {
    in_new_namespace(|| async {
        let mut scene = Scene::new();
        let open = |round: i32| match round % 3 {
            0 => Firewall::Iptables(Iptables::with(Variant::Nft, policy(), None)),
            1 => Firewall::Nftables(Nftables::new(policy(), None)),
            _ => Firewall::Iptables(Iptables::with(Variant::Legacy, policy(), None)),
        };
        open(0).apply().await.expect("applied");
        let tally = scene.start_traffic();
        for round in 1..=21 {
            tokio::time::sleep(Duration::from_millis(30)).await;
            let mut firewall = open(round);
            assert_eq!(firewall.apply().await.expect("applied").len(), 2);
            assert_eq!(firewall.clean_other().await.expect("cleaned"), 2, "{round}");
        }
        scene.assert_clean(&tally, 200);
    });
}

/// Every other agent is killed, at any moment of its start; the others end by SIGTERM when
/// they have written the subnet file.
fn restarted_under_load(nftables: bool) {
    in_new_namespace(move || async move {
        let mut scene = Scene::new();
        let host = Host::new(nftables);
        let start = || host.start("uplink0", &["--ip-masq"], None);
        stop(start());
        if !nftables {
            run("iptables -P FORWARD DROP");
        }
        let tally = scene.start_traffic();
        for round in 0..100 {
            if round % 2 == 0 {
                stop(start());
            } else {
                let mut agent = host.spawn("uplink0", &["--ip-masq"], None);
                std::thread::sleep(Duration::from_millis(round % 50));
                agent.kill().expect("killed");
                agent.wait().expect("it ends");
            }
        }
        scene.assert_clean(&tally, 1000);
    });
}

#[test]
fn contract_17_a_hundred_restarts_with_iptables_cost_nothing() {
    restarted_under_load(false);
}

#[test]
fn contract_17_a_hundred_restarts_with_nftables_cost_nothing() {
    restarted_under_load(true);
}
