//! Section 16: each lookup against the real kernel.

use flannel_user::uplink::{UplinkChoice, UplinkError};
use rstest::rstest;

use crate::{
    namespace::{in_new_namespace, run},
    uplink_lookup::chosen,
};

/// `eth0` with two addresses, `eth1` with one and the default route, `bare0` with none.
fn host() {
    for name in ["eth0", "eth1", "bare0"] {
        run(&format!("ip link add {name} type veth peer name {name}w"));
        run(&format!("ip link set {name}w up"));
        run(&format!("ip link set {name} up"));
    }
    run("ip addr add 192.168.50.9/24 dev eth0");
    run("ip addr add 10.7.0.1/24 dev eth0");
    run("ip addr add 172.20.0.5/24 dev eth1");
    run("ip route add default via 172.20.0.254");
    run("ip route add 203.0.113.0/24 via 192.168.50.254 src 10.7.0.1");
}

fn choice(text: &str) -> UplinkChoice {
    let mut choice = UplinkChoice::default();
    for (flag, value) in text.split_whitespace().filter_map(|w| w.split_once('=')) {
        match flag {
            "iface" => choice.iface.push(value.to_owned()),
            "regex" => choice.iface_regex.push(value.to_owned()),
            "reach" => choice.iface_can_reach = Some(value.to_owned()),
            "public" => choice.public_ip = Some(value.to_owned()),
            _ => panic!("{flag}"),
        }
    }
    choice
}

/// Interface, its address, and what is published; or a part of the error.
#[rstest]
#[case::row01_nothing_given_is_the_default_route("", Ok(("eth1", "172.20.0.5", "172.20.0.5")))]
#[case::row01_public_ip_alone_is_looked_up("public=10.7.0.1", Ok(("eth0", "10.7.0.1", "10.7.0.1")))]
#[case::row02_public_ip_that_is_not_here("public=198.51.100.1", Err("198.51.100.1"))]
#[case::row03_first_success_wins("iface=wlan0 iface=eth0 iface=eth1", Ok(("eth0", "192.168.50.9", "192.168.50.9")))]
#[case::row03_regex_after_every_iface("regex=eth0 iface=eth1", Ok(("eth1", "172.20.0.5", "172.20.0.5")))]
#[case::row03_reach_after_every_regex("regex=wlan reach=203.0.113.7", Ok(("eth0", "10.7.0.1", "10.7.0.1")))]
#[case::row03_none("iface=wlan0 regex=wlan", Err("wlan0"))]
#[case::row04_iface_name("iface=eth0", Ok(("eth0", "192.168.50.9", "192.168.50.9")))]
#[case::row05_iface_address_becomes_the_address("iface=10.7.0.1", Ok(("eth0", "10.7.0.1", "10.7.0.1")))]
#[case::row06_iface_ipv6("iface=fd00::1", Err("IPv6"))]
#[case::row07_regex_over_addresses_first("regex=7\\.0", Ok(("eth0", "10.7.0.1", "10.7.0.1")))]
#[case::row07_regex_then_names("regex=th1$", Ok(("eth1", "172.20.0.5", "172.20.0.5")))]
#[case::row07_bad_expression("regex=(", Err("regular expression"))]
#[case::row08_can_reach_takes_the_preferred_source("reach=203.0.113.7", Ok(("eth0", "10.7.0.1", "10.7.0.1")))]
#[case::row10_index_order("regex=^eth.$", Ok(("eth0", "192.168.50.9", "192.168.50.9")))]
#[case::row11_first_by_preference_not_the_lowest("iface=eth0", Ok(("eth0", "192.168.50.9", "192.168.50.9")))]
#[case::row11_no_address("iface=bare0", Err("no usable IPv4 address"))]
#[case::row13_public_ip_is_published("iface=eth0 public=198.51.100.1", Ok(("eth0", "192.168.50.9", "198.51.100.1")))]
#[case::row13_public_ip_must_parse("iface=eth0 public=1.2.3", Err("--public-ip"))]
fn s16_lookup(
    #[case] given: &'static str,
    #[case] outcome: Result<(&'static str, &'static str, &'static str), &'static str>,
) {
    in_new_namespace(move || async move {
        host();
        match (chosen(choice(given)).await, outcome) {
            (Ok(found), Ok((name, address, public))) => assert_eq!(
                (
                    found.name.as_str(),
                    found.address.to_string().as_str(),
                    found.public_ip.to_string().as_str()
                ),
                (name, address, public)
            ),
            (Err(error), Err(says)) => {
                assert!(error.to_string().contains(says), "{error}");
            }
            (found, _) => panic!("{found:?}"),
        }
    });
}

#[test]
fn s16_row09_a_default_route_over_several_interfaces_is_refused() {
    in_new_namespace(|| async {
        host();
        run("ip route replace default nexthop via 172.20.0.254 nexthop via 192.168.50.254");
        let error = chosen(UplinkChoice::default()).await.expect_err("refused");
        assert!(matches!(error, UplinkError::MultipathDefault), "{error}");
    });
}

/// Also the last vector of section 24.
#[test]
fn s16_row11_global_before_link_local() {
    in_new_namespace(|| async {
        host();
        run("ip addr flush dev eth0");
        run("ip addr add 169.254.9.9/16 dev eth0 scope link");
        let only = chosen(choice("iface=eth0")).await.expect("the only one");
        assert_eq!(only.address.to_string(), "169.254.9.9");
        run("ip addr add 192.168.50.9/24 dev eth0");
        run("ip addr add 192.168.50.1/24 dev eth0");
        let best = chosen(choice("iface=eth0")).await.expect("a better one");
        assert_eq!(best.address.to_string(), "192.168.50.9");
    });
}
