//! The choice as rows: options in, interface or message out.

use super::*;

fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

fn permanent(text: &str) -> Address {
    Address {
        ip: ip(text),
        permanent: true,
        temporary: false,
        deprecated: false,
    }
}

fn link(name: &str, addresses: &[Address]) -> Link {
    Link {
        name: name.into(),
        up: true,
        mtu: 1500,
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        addresses: addresses.to_vec(),
    }
}

fn host() -> Host {
    Host {
        links: BTreeMap::from([
            (1, link("lo", &[permanent("127.0.0.1")])),
            (
                2,
                link("eth0", &[permanent("192.168.50.1"), permanent("10.7.0.1")]),
            ),
            (
                3,
                link("eth1", &[permanent("169.254.3.3"), permanent("172.20.0.5")]),
            ),
            (4, link("bare0", &[])),
        ]),
        defaults: vec![DefaultRoute::WithoutInterface, DefaultRoute::Through(3)],
        reach: BTreeMap::from([
            (
                ip("8.8.8.8"),
                Ok(Reached {
                    index: 2,
                    source: Some(ip("10.7.0.1")),
                }),
            ),
            (ip("203.0.113.1"), Err("Network is unreachable".to_owned())),
        ]),
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn choice(iface: &[&str], regex: &[&str], reach: &str, public: &str) -> UplinkChoice {
    UplinkChoice {
        iface: strings(iface),
        iface_regex: strings(regex),
        iface_can_reach: Some(reach.to_owned()),
        public_ip: Some(public.to_owned()),
    }
}

#[test]
fn lookups_in_the_order_of_section_16() {
    for (what, choice, name, address, public_ip) in [
        (
            "nothing given: default route, best address",
            choice(&[], &[], "", ""),
            "eth1",
            "172.20.0.5",
            "172.20.0.5",
        ),
        (
            "public address alone is looked up",
            choice(&[], &[], "", "10.7.0.1"),
            "eth0",
            "10.7.0.1",
            "10.7.0.1",
        ),
        (
            "by name",
            choice(&["eth0"], &[], "", ""),
            "eth0",
            "192.168.50.1",
            "192.168.50.1",
        ),
        (
            "by address, which is kept",
            choice(&["10.7.0.1"], &[], "", ""),
            "eth0",
            "10.7.0.1",
            "10.7.0.1",
        ),
        (
            "foreign public address with a name",
            choice(&["eth0"], &[], "", "203.0.113.9"),
            "eth0",
            "192.168.50.1",
            "203.0.113.9",
        ),
        (
            "first success wins",
            choice(&["wlan0", "eth1"], &["eth0"], "", ""),
            "eth1",
            "172.20.0.5",
            "172.20.0.5",
        ),
        (
            "expression after names",
            choice(&["wlan0"], &["eth0"], "", ""),
            "eth0",
            "192.168.50.1",
            "192.168.50.1",
        ),
        (
            "addresses before names, not anchored",
            choice(&[], &["7\\.0"], "", ""),
            "eth0",
            "10.7.0.1",
            "10.7.0.1",
        ),
        (
            "index order, loopback has no usable address",
            choice(&[], &["^1"], "", ""),
            "eth0",
            "192.168.50.1",
            "192.168.50.1",
        ),
        (
            "reachability last",
            choice(&[], &["wlan"], "8.8.8.8", ""),
            "eth0",
            "10.7.0.1",
            "10.7.0.1",
        ),
    ] {
        let found = host().choose(&choice).expect(what);
        assert_eq!(
            (found.name.as_str(), found.address, found.public_ip),
            (name, ip(address), ip(public_ip)),
            "{what}"
        );
    }
}

#[test]
fn errors_name_the_value_and_what_there_is() {
    let existing =
        "lo (127.0.0.1), eth0 (192.168.50.1 10.7.0.1), eth1 (169.254.3.3 172.20.0.5), bare0";
    for (choice, parts) in [
        (choice(&["wlan0"], &[], "", ""), vec!["\"wlan0\"", existing]),
        (
            choice(&["10.0.0.9"], &[], "", ""),
            vec!["10.0.0.9", existing],
        ),
        (
            choice(&["fd00::1"], &[], "", ""),
            vec!["fd00::1 is an IPv6 address"],
        ),
        (
            choice(&[], &[], "", "203.0.113.9"),
            vec!["203.0.113.9", "needs --iface", existing],
        ),
        (choice(&[], &["wl.*"], "", ""), vec!["\"wl.*\"", existing]),
        (
            choice(&[], &["("], "", ""),
            vec!["\"(\" is no regular expression"],
        ),
        (
            choice(&[], &[], "8.8.8", ""),
            vec!["\"8.8.8\" is no IPv4 address"],
        ),
        (
            choice(&[], &[], "203.0.113.1", ""),
            vec!["203.0.113.1", "Network is unreachable"],
        ),
        (
            choice(&["bare0"], &[], "", ""),
            vec!["bare0 has no usable IPv4 address"],
        ),
        (
            choice(&["lo"], &[], "", ""),
            vec!["lo has no usable IPv4 address"],
        ),
        (
            choice(&["eth0"], &[], "", "1.2.3"),
            vec!["--public-ip \"1.2.3\""],
        ),
        (
            choice(&["wlan0", "wlan1"], &[], "", ""),
            vec!["none of", "\"wlan0\"", "\"wlan1\""],
        ),
    ] {
        let error = host().choose(&choice).expect_err("no uplink").to_string();
        for part in parts {
            assert!(error.contains(part), "no {part:?} in {error:?}");
        }
    }
    let without = Host {
        defaults: vec![DefaultRoute::WithoutInterface],
        ..host()
    };
    let error = without
        .choose(&UplinkChoice::default())
        .expect_err("no uplink");
    assert!(error.to_string().contains(existing), "{error}");
    let multipath = Host {
        defaults: vec![DefaultRoute::Multipath],
        ..host()
    };
    let error = multipath.choose(&UplinkChoice::default());
    assert!(matches!(error, Err(UplinkError::MultipathDefault)));
    let mut zero = host();
    zero.links.get_mut(&3).expect("eth1").mtu = 0;
    let error = zero.choose(&UplinkChoice::default());
    assert!(matches!(error, Err(UplinkError::ZeroMtu { .. })));
}

#[test]
fn the_best_address_is_the_first_by_preference_not_the_lowest() {
    let dynamic = |text| Address {
        permanent: false,
        ..permanent(text)
    };
    let temporary = |text| Address {
        temporary: true,
        ..permanent(text)
    };
    let deprecated = |text| Address {
        deprecated: true,
        ..permanent(text)
    };
    for (addresses, best) in [
        (
            vec![permanent("192.168.9.9"), permanent("10.0.0.1")],
            Some("192.168.9.9"),
        ),
        (
            vec![permanent("169.254.1.1"), dynamic("10.0.0.1")],
            Some("10.0.0.1"),
        ),
        (
            vec![dynamic("10.0.0.1"), permanent("10.0.0.2")],
            Some("10.0.0.2"),
        ),
        (
            vec![temporary("10.0.0.1"), permanent("10.0.0.2")],
            Some("10.0.0.2"),
        ),
        (
            vec![dynamic("10.0.0.1"), temporary("10.0.0.2")],
            Some("10.0.0.2"),
        ),
        (
            vec![deprecated("10.0.0.1"), permanent("169.254.1.1")],
            Some("169.254.1.1"),
        ),
        (vec![deprecated("10.0.0.1"), permanent("127.0.0.1")], None),
    ] {
        assert_eq!(
            link("eth0", &addresses).best_address(),
            best.map(ip),
            "{addresses:?}"
        );
    }
}
