//! A registry that many versions, systems and people have written to, row by row: what the
//! kernel gets of each key, whether it was there at the start or comes by the watch.

use nix::sys::signal::Signal;

use crate::{
    agent::{Agent, Node, until},
    etcd_server::{CONFIG, Etcd, SUBNETS},
    namespace::{in_new_namespace, lines, run},
};

/// Whether a key hangs on an etcd lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// For 100 s.
    Leased,
    /// For ever: a reservation.
    Reserved,
}
use Kept::{Leased, Reserved};

/// A key, its value, and the subnet, MAC and node that the kernel gets for it.
struct Row {
    what: &'static str,
    name: &'static str,
    value: &'static str,
    kept: Kept,
    way: Option<(&'static str, &'static str, &'static str)>,
}

const fn row(
    what: &'static str,
    name: &'static str,
    value: &'static str,
    kept: Kept,
    way: Option<(&'static str, &'static str, &'static str)>,
) -> Row {
    Row {
        what,
        name,
        value,
        kept,
        way,
    }
}

const ROWS: &[Row] = &[
    row(
        "flannel's bytes",
        "10.244.130.0-24",
        r#"{"PublicIP":"192.0.2.30","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:30"}}"#,
        Leased,
        Some(("10.244.130.0/24", "02:00:00:00:00:30", "192.0.2.30")),
    ),
    row(
        "no VNI and no PublicIPv6: an old version",
        "10.244.131.0-24",
        r#"{"PublicIP":"192.0.2.31","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:31"}}"#,
        Leased,
        Some(("10.244.131.0/24", "02:00:00:00:00:31", "192.0.2.31")),
    ),
    row(
        "another VNI, which Linux never compares",
        "10.244.132.0-24",
        r#"{"PublicIP":"192.0.2.32","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":4096,"VtepMAC":"02:00:00:00:00:32"}}"#,
        Leased,
        Some(("10.244.132.0/24", "02:00:00:00:00:32", "192.0.2.32")),
    ),
    row(
        "upper case, another order, unknown fields, white space",
        "10.244.133.0-24",
        "{ \"BackendData\": {\"VtepMAC\":\"02:AA:00:00:00:33\", \"Later\":[1]},\n \"backendtype\":\"vxlan\", \"PublicIP\":\"192.0.2.33\", \"Colour\":null }",
        Leased,
        Some(("10.244.133.0/24", "02:aa:00:00:00:33", "192.0.2.33")),
    ),
    row(
        "a reservation that its node has filled",
        "10.244.134.0-24",
        r#"{"PublicIP":"192.0.2.34","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:34"}}"#,
        Reserved,
        Some(("10.244.134.0/24", "02:00:00:00:00:34", "192.0.2.34")),
    ),
    row(
        "a reservation that waits for its node",
        "10.244.135.0-24",
        r#"{"PublicIP":"192.0.2.35"}"#,
        Reserved,
        None,
    ),
    row(
        "a dual-stack lease: its IPv4 half",
        "10.244.136.0-24&fd00:136::-64",
        r#"{"PublicIP":"192.0.2.36","PublicIPv6":"2001:db8::36","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:36"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:36"}}"#,
        Leased,
        Some(("10.244.136.0/24", "02:00:00:00:00:36", "192.0.2.36")),
    ),
    row(
        "another length, with a smaller one inside",
        "10.244.144.0-20",
        r#"{"PublicIP":"192.0.2.44","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:44"}}"#,
        Leased,
        Some(("10.244.144.0/20", "02:00:00:00:00:44", "192.0.2.44")),
    ),
    row(
        "inside the one before: both are programmed",
        "10.244.150.0-24",
        r#"{"PublicIP":"192.0.2.50","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:50"}}"#,
        Leased,
        Some(("10.244.150.0/24", "02:00:00:00:00:50", "192.0.2.50")),
    ),
    row(
        "host-gw",
        "10.244.160.0-24",
        r#"{"PublicIP":"192.0.2.60","PublicIPv6":null,"BackendType":"host-gw"}"#,
        Leased,
        None,
    ),
    row(
        "wireguard",
        "10.244.161.0-24",
        r#"{"PublicIP":"192.0.2.61","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"aGVsbG8=","Port":51820}}"#,
        Leased,
        None,
    ),
    row(
        "extension, whose data is a text",
        "10.244.162.0-24",
        r#"{"PublicIP":"192.0.2.62","PublicIPv6":null,"BackendType":"extension","BackendData":"$(reboot)"}"#,
        Leased,
        None,
    ),
    row(
        "alloc, udp: no type",
        "10.244.163.0-24",
        r#"{"PublicIP":"192.0.2.63","PublicIPv6":null}"#,
        Leased,
        None,
    ),
    row(
        "Windows' first lease: an empty MAC",
        "10.244.164.0-24",
        r#"{"PublicIP":"192.0.2.64","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":4096,"VtepMAC":""}}"#,
        Leased,
        None,
    ),
    row(
        "vxlan without data",
        "10.244.165.0-24",
        r#"{"PublicIP":"192.0.2.65","PublicIPv6":null,"BackendType":"vxlan"}"#,
        Leased,
        None,
    ),
    row(
        "no address",
        "10.244.166.0-24",
        r#"{"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:66"}}"#,
        Leased,
        None,
    ),
    row(
        "a MAC that is every device's",
        "10.244.167.0-24",
        r#"{"PublicIP":"192.0.2.67","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
        Leased,
        None,
    ),
    row(
        "an address that is every node's",
        "10.244.168.0-24",
        r#"{"PublicIP":"224.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:68"}}"#,
        Leased,
        None,
    ),
    row(
        "cut in half",
        "10.244.170.0-24",
        r#"{"PublicIP":"192.0.2.70","BackendType":"vx"#,
        Leased,
        None,
    ),
    row("empty", "10.244.171.0-24", "", Leased, None),
    row("no object", "10.244.172.0-24", "[]", Leased, None),
    row(
        "another type than its key demands",
        "10.244.173.0-24",
        r#"{"PublicIP":7}"#,
        Leased,
        None,
    ),
    row("junk", "junk", "x", Leased, None),
    row(
        "no subnet in the key",
        "10.244.174.0",
        r#"{"PublicIP":"192.0.2.74"}"#,
        Leased,
        None,
    ),
    row(
        "an impossible subnet in the key",
        "10.244.175.300-24",
        r#"{"PublicIP":"192.0.2.75"}"#,
        Leased,
        None,
    ),
];

async fn put(etcd: &Etcd, row: &Row) {
    match row.kept {
        Leased => etcd.put_lease(row.name, row.value, 100).await,
        Reserved => {
            etcd.put(&format!("{SUBNETS}/{}", row.name), row.value)
                .await
        }
    }
}

/// Routes, neighbours and FDB entries, each as the tools print it.
fn programmed() -> [Vec<String>; 3] {
    [
        "ip route show dev flannel.1",
        "ip neigh show dev flannel.1 nud permanent",
        "bridge fdb show dev flannel.1",
    ]
    .map(|line| {
        let mut all = lines(&run(line));
        all.retain(|line| !line.contains("NOARP"));
        all
    })
}

fn expected<'a>(rows: impl Iterator<Item = &'a Row>) -> [Vec<String>; 3] {
    let mut all: [Vec<String>; 3] = Default::default();
    for (subnet, mac, node) in rows.filter_map(|row| row.way) {
        let base = subnet.split('/').next().expect("a base");
        all[0].push(format!("{subnet} via {base} onlink"));
        all[1].push(format!("{base} lladdr {mac} PERMANENT"));
        all[2].push(format!("{mac} dst {node} self permanent"));
    }
    all.iter_mut().for_each(|lines| lines.sort());
    all
}

async fn until_programmed(agent: &mut Agent, what: &str, rows: &[&Row]) {
    let wanted = expected(rows.iter().copied());
    let mut found = programmed();
    let begun = std::time::Instant::now();
    while found != wanted && begun.elapsed().as_secs() < 10 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        found = programmed();
    }
    assert_eq!(found, wanted, "{what}: {}", agent.log());
    assert!(agent.is_alive());
}

async fn cluster() -> (Etcd, Node) {
    let etcd = Etcd::start().await;
    etcd.put("/coreos.com/network/config", CONFIG).await;
    (etcd, Node::new())
}

#[test]
fn s06_row50_a_mixed_registry_in_the_first_list() {
    in_new_namespace(|| async {
        let (etcd, host) = cluster().await;
        for row in ROWS {
            put(&etcd, row).await;
        }
        let mut agent = host.start(etcd.url(0), &[]).await;
        let all: Vec<&Row> = ROWS.iter().collect();
        until_programmed(&mut agent, "all rows at once", &all).await;
        // What was left out is named once, with its key.
        let log = agent.log();
        for row in ROWS.iter().filter(|row| row.way.is_none()) {
            let subnet = row.name.split('&').next().expect("a name");
            assert!(log.contains(subnet), "{} is not named: {log}", row.what);
        }
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

#[test]
fn s06_row51_a_mixed_registry_row_by_row_through_the_watch() {
    in_new_namespace(|| async {
        let (etcd, host) = cluster().await;
        let mut agent = host.start(etcd.url(0), &[]).await;
        let mut there: Vec<&Row> = Vec::new();
        for row in ROWS {
            put(&etcd, row).await;
            there.push(row);
            // Whatever a row is, it costs none of those before it.
            until_programmed(&mut agent, row.what, &there).await;
        }
        for row in ROWS {
            etcd.delete(&format!("{SUBNETS}/{}", row.name)).await;
            there.retain(|other| other.name != row.name);
            until_programmed(&mut agent, &format!("{} deleted", row.what), &there).await;
        }
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

/// A good lease that turns bad keeps its way: better an old one than none.
#[test]
fn s06_row52_a_lease_that_turns_bad_keeps_its_last_good_way() {
    in_new_namespace(|| async {
        let (etcd, host) = cluster().await;
        let good = &ROWS[0];
        put(&etcd, good).await;
        let mut agent = host.start(etcd.url(0), &[]).await;
        for bad in ["", "{\"PublicIP\":", "[]"] {
            etcd.put_lease(good.name, bad, 100).await;
        }
        let marker = &ROWS[1];
        put(&etcd, marker).await;
        until_programmed(&mut agent, "after the bad values", &[good, marker]).await;
        let log = host.file("log");
        until(&mut agent, "it is named", || {
            std::fs::read_to_string(&log).is_ok_and(|log| log.contains("skipped a key"))
        })
        .await;
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}
