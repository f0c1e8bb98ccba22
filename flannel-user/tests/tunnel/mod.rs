//! An uplink with a tunnel device above it, and what peers look like on it.

#![allow(dead_code, reason = "each test file uses its part")]

use std::net::Ipv4Addr;

use flannel_user::{
    datapath::netlink::{Device, DeviceSpec, NetlinkDatapath, Pass},
    forwarding::{Changes, ForwardingTable, Via},
};

use crate::namespace::{lines, run};

pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);

/// An uplink `eth0` with address [`NODE`] and the device to put above it.
pub(crate) fn uplink(mtu: u32) -> DeviceSpec {
    run(&format!(
        "ip link add eth0 mtu {mtu} type veth peer name wire0"
    ));
    run("ip link set wire0 up");
    run("ip addr add 192.168.50.1/24 dev eth0");
    run("ip link set eth0 up");
    DeviceSpec {
        vni: 1,
        port: None,
        uplink_index: index_of("eth0"),
        local: NODE,
        mtu: mtu - 50,
        gbp: false,
        learning: false,
        mac: None,
        address: Some(Ipv4Addr::new(10, 244, 0, 0)),
        network: "10.244.0.0/16".parse().expect("a network"),
    }
}

pub(crate) fn index_of(name: &str) -> u32 {
    let text = run(&format!("ip -o link show dev {name}"));
    text.split(':')
        .next()
        .expect("an index")
        .parse()
        .expect("a number")
}

pub(crate) fn table(rows: &[(&str, &str, &str)]) -> ForwardingTable {
    let via = |node: &str, mac: &str| Via::Vxlan {
        node: node.parse().expect("an address"),
        vtep_mac: mac.parse().expect("a MAC"),
    };
    ForwardingTable(
        rows.iter()
            .map(|(subnet, node, mac)| (subnet.parse().expect("a subnet"), via(node, mac)))
            .collect(),
    )
}

pub(crate) const PEERS: &[(&str, &str, &str)] = &[
    ("10.244.1.0/24", "192.168.50.2", "02:11:22:33:44:55"),
    ("10.244.2.0/24", "192.168.50.3", "02:11:22:33:44:66"),
];

pub(crate) async fn start(spec: &DeviceSpec) -> (NetlinkDatapath, Device) {
    let mut datapath = NetlinkDatapath::open().expect("a socket");
    let device = datapath.ensure_device(spec).await.expect("a device");
    (datapath, device)
}

/// A pass without errors, and a second one that has nothing left to do.
pub(crate) async fn settle(datapath: &mut NetlinkDatapath, table: &ForwardingTable) -> Pass {
    let pass = datapath.reconcile(table).await;
    assert!(pass.errors.is_empty(), "{:?}", pass.errors);
    let again = datapath.reconcile(table).await;
    assert!(again.is_quiet(), "the second pass is not quiet: {again:?}");
    pass
}

pub(crate) fn assert_peers_are_programmed(rows: &[(&str, &str, &str)]) {
    let expected = |text: &dyn Fn(&(&str, &str, &str)) -> String| {
        lines(&rows.iter().map(|row| text(row) + "\n").collect::<String>())
    };
    let base = |subnet: &str| subnet.split('/').next().expect("a base").to_owned();
    assert_eq!(
        lines(&run("ip route show dev flannel.1")),
        expected(&|(subnet, ..)| format!("{subnet} via {} onlink", base(subnet)))
    );
    assert_eq!(
        lines(&run("ip neigh show dev flannel.1 nud permanent"))
            .into_iter()
            .filter(|line| !line.contains("NOARP"))
            .collect::<Vec<_>>(),
        expected(&|(subnet, _, mac)| format!("{} lladdr {mac} PERMANENT", base(subnet)))
    );
    assert_eq!(
        lines(&run("bridge fdb show dev flannel.1")),
        expected(&|(_, node, mac)| format!("{mac} dst {node} self permanent"))
    );
}

/// What makes the one table of the other.
pub(crate) fn news(before: &[(&str, &str, &str)], after: &[(&str, &str, &str)]) -> Changes {
    Changes::between(&table(before), &table(after))
}
