//! Choice of the uplink against the real kernel, each test in a network namespace of its own.

mod namespace;
mod uplink_lookup;

use flannel_user::uplink::{UplinkChoice, UplinkError};
use namespace::{in_new_namespace, run};
use uplink_lookup::chosen;

fn two_uplinks() {
    for (name, mtu, mac) in [
        ("eth0", 1500, "02:00:00:00:00:01"),
        ("eth1", 9000, "02:00:00:00:00:02"),
    ] {
        run(&format!(
            "ip link add {name} mtu {mtu} address {mac} type veth peer name {name}wire"
        ));
        run(&format!("ip link set {name}wire up"));
        run(&format!("ip link set {name} up"));
    }
    run("ip addr add 192.168.50.1/24 dev eth0");
    run("ip addr add 192.168.50.7/24 dev eth0");
    run("ip addr add 172.20.0.5/24 dev eth1");
}

#[test]
fn the_default_route_of_least_metric_tells_the_uplink() {
    in_new_namespace(|| async {
        two_uplinks();
        let error = chosen(UplinkChoice::default())
            .await
            .expect_err("no default route");
        assert!(
            error
                .to_string()
                .contains("eth0 (192.168.50.1 192.168.50.7)"),
            "{error}"
        );
        run("ip route add default via 192.168.50.254 metric 200");
        run("ip route add default via 172.20.0.254 metric 100");
        let uplink = chosen(UplinkChoice::default()).await.expect("an uplink");
        assert_eq!((uplink.name.as_str(), uplink.mtu), ("eth1", 9000));
        assert_eq!(uplink.mac.to_string(), "02:00:00:00:00:02");
        assert_eq!(uplink.public_ip.to_string(), "172.20.0.5");
        run(
            "ip route replace default metric 50 nexthop via 192.168.50.254 nexthop via 172.20.0.254",
        );
        let error = chosen(UplinkChoice::default())
            .await
            .expect_err("multipath");
        assert!(matches!(error, UplinkError::MultipathDefault), "{error}");
    });
}

#[test]
fn the_kernel_is_asked_which_way_an_address_is_reached() {
    in_new_namespace(|| async {
        two_uplinks();
        run("ip route add 10.0.0.0/8 via 192.168.50.254 src 192.168.50.7");
        let reach = |target: &str| UplinkChoice {
            iface_can_reach: Some(target.to_owned()),
            ..UplinkChoice::default()
        };
        let uplink = chosen(reach("10.1.2.3")).await.expect("an uplink");
        assert_eq!(
            (uplink.name.as_str(), uplink.address.to_string().as_str()),
            ("eth0", "192.168.50.7")
        );
        let error = chosen(reach("8.8.8.8")).await.expect_err("no route");
        assert!(
            error.to_string().contains("Network is unreachable"),
            "{error}"
        );
    });
}

#[test]
fn a_public_address_on_the_host_finds_its_interface() {
    in_new_namespace(|| async {
        two_uplinks();
        let choice = UplinkChoice {
            public_ip: Some("192.168.50.7".into()),
            ..UplinkChoice::default()
        };
        let uplink = chosen(choice).await.expect("an uplink");
        assert_eq!(
            (uplink.name.as_str(), uplink.address.to_string().as_str()),
            ("eth0", "192.168.50.7")
        );
        let missing = UplinkChoice {
            iface: vec!["wlan0".into()],
            ..UplinkChoice::default()
        };
        let error = chosen(missing).await.expect_err("no such interface");
        assert!(
            error.to_string().contains("\"wlan0\"; this host has lo"),
            "{error}"
        );
    });
}
