//! Sections 1, 9 and 17: how a whole agent starts, runs and ends, with a real etcd.

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    agent::{ADDRESS, Agent, Node, until},
    etcd_server::{CONFIG, Etcd, SUBNETS, node},
    namespace::{in_new_namespace, lines, run},
};

const CONFIG_KEY: &str = "/coreos.com/network/config";

async fn etcd_with(config: &str) -> Etcd {
    let etcd = Etcd::start().await;
    etcd.put(CONFIG_KEY, config).await;
    etcd
}

/// Everything of ours in the kernel.
fn kernel() -> Vec<String> {
    [
        "ip -d link show dev flannel.1",
        "ip -o addr show dev flannel.1",
        "ip route show dev flannel.1",
        "ip neigh show dev flannel.1 nud permanent",
        "bridge fdb show dev flannel.1",
    ]
    .iter()
    .flat_map(|line| lines(&run(line)))
    .collect()
}

/// Key, value and revision of every lease.
async fn registry(etcd: &Etcd) -> Vec<(Vec<u8>, Vec<u8>, i64)> {
    let leases = etcd.leases().await;
    let whole = |kv: etcd_client::KeyValue| {
        let revision = kv.mod_revision();
        let (key, value) = kv.into_key_value();
        (key, value, revision)
    };
    leases.into_iter().map(whole).collect()
}

async fn refused(config: &str, args: &[&str], says: &[&str]) {
    let etcd = etcd_with(config).await;
    let host = Node::new();
    let mut agent = host.spawn(etcd.url(0), args);
    let status = agent.ended().await;
    assert_eq!(status.code(), Some(1), "{}", agent.log());
    for part in says {
        assert!(agent.log().contains(part), "no {part:?}: {}", agent.log());
    }
}

#[test]
fn s01_row17_ready_is_said_when_every_known_peer_is_programmed() {
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
            .await;
        let host = Node::new();
        let agent = host.start(etcd.url(0), &[]).await;
        assert_eq!(
            lines(&run("ip route show dev flannel.1")),
            ["10.244.2.0/24 via 10.244.2.0 onlink"]
        );
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

#[test]
fn s17_row10_both_signals_end_with_0_and_leave_everything_in_place() {
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
            .await;
        let host = Node::new();
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let agent = host.start(etcd.url(0), &[]).await;
            let (before, leases) = (kernel(), registry(&etcd).await);
            let file = host.read("run/subnet.env");
            assert!(before.len() >= 6 && leases.len() == 2 && !file.is_empty());
            assert!(agent.end(signal).await.success());
            assert_eq!(kernel(), before);
            assert_eq!(registry(&etcd).await, leases);
            assert_eq!(host.read("run/subnet.env"), file);
        }
    });
}

#[test]
fn s17_row13_a_failed_start_ends_with_1_and_says_why() {
    in_new_namespace(|| async {
        let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}"#;
        refused(config, &[], &["wireguard", "not available", CONFIG_KEY]).await;
    });
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        let host = Node::new();
        run("ip link delete eth0");
        let mut agent = host.spawn(etcd.url(0), &["--iface=wlan0"]);
        assert_eq!(agent.ended().await.code(), Some(1));
        let log = agent.log();
        assert!(
            log.contains("\"eth0\"") && log.contains("\"wlan0\""),
            "{log}"
        );
    });
    in_new_namespace(|| async {
        let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":9000}}"#;
        refused(config, &[], &["9000", "1500"]).await;
    });
}

/// The original leaves with 0 and its supervisor lets it be.
#[test]
fn s17_row12_a_removed_own_lease_is_taken_again_and_nothing_local_changes() {
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
            .await;
        let host = Node::new();
        let mut agent = host.start(etcd.url(0), &[]).await;
        let own = |leases: &[etcd_client::KeyValue]| {
            leases
                .iter()
                .find(|kv| String::from_utf8_lossy(kv.value()).contains(ADDRESS))
                .map(|kv| String::from_utf8_lossy(kv.key()).into_owned())
        };
        let name = own(&etcd.leases().await).expect("the own lease");
        let before = kernel();
        etcd.delete(&name).await;
        let begun = std::time::Instant::now();
        while own(&etcd.leases().await).as_ref() != Some(&name) {
            assert!(agent.is_alive() && begun.elapsed().as_secs() < 20);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        println!("taken again after {:?}", begun.elapsed());
        assert_eq!(kernel(), before);
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

#[test]
fn s09_row60_direct_routing_is_read_and_said_not_to_exist_yet() {
    in_new_namespace(|| async {
        let config =
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
        let etcd = etcd_with(config).await;
        etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
            .await;
        let host = Node::new();
        let agent = host.start(etcd.url(0), &[]).await;
        assert!(
            agent
                .log()
                .contains("DirectRouting is not available in this version"),
            "{}",
            agent.log()
        );
        let routes = run("ip route show 10.244.2.0/24");
        assert!(routes.contains("dev flannel.1 onlink"), "{routes}");
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

/// Daemons with another prefix, VNI and files do not touch each other.
#[test]
fn s17_row30_two_daemons_on_one_host() {
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        let other = r#"{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan","VNI":2}}"#;
        etcd.put("/other/config", other).await;
        let first = Node::new();
        let second = tempfile::tempdir().expect("a directory");
        let flag = |name: &str| format!("--{name}={}/{name}", second.path().display());
        let one = first.start(etcd.url(0), &[]).await;
        let before = kernel();
        let flags = ["subnet-file", "control-socket", "bpf-dir"].map(flag);
        let mut args: Vec<&str> = flags.iter().map(String::as_str).collect();
        args.push("--etcd-prefix=/other");
        let two = first.start(etcd.url(0), &args).await;
        assert_eq!(kernel(), before);
        let text = std::fs::read_to_string(second.path().join("subnet-file"));
        assert!(text.expect("written").starts_with("FLANNEL_NETWORK=10.99."));
        assert!(run("ip -d link show dev flannel.2").contains("vxlan id 2 "));
        assert!(first.read("run/subnet.env").contains("10.244.0.0/16"));
        for agent in [one, two] {
            assert!(agent.end(Signal::SIGTERM).await.success());
        }
        assert_eq!(kernel(), before);
    });
}

/// What the agent knows of itself, through the registry it reads and writes.
#[test]
fn s06_row33_another_nodes_claim_on_the_own_subnet_is_said_and_left() {
    in_new_namespace(|| async {
        let etcd = etcd_with(CONFIG).await;
        let host = Node::new();
        let mut agent: Agent = host.start(etcd.url(0), &[]).await;
        let own = String::from_utf8_lossy(etcd.leases().await[0].key()).into_owned();
        let name = own.strip_prefix(&format!("{SUBNETS}/")).expect("a lease");
        etcd.put_lease(name, &node(9).to_json(), 100).await;
        let log = host.file("log");
        until(&mut agent, "it says so", || {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            log.contains("another node wrote its address") && log.contains("192.0.2.9")
        })
        .await;
        let value: Value =
            serde_json::from_slice(etcd.leases().await[0].value()).expect("the other's lease");
        assert_eq!(value["PublicIP"], "192.0.2.9", "not overwritten");
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}
