//! Section 3: the network config, with the first vectors of section 24.

use flannel_user::network::{BackendConfig, NetworkConfig};
use rstest::rstest;

fn parse(text: &str) -> Result<NetworkConfig, String> {
    text.parse::<NetworkConfig>().map_err(|e| e.to_string())
}

/// The vectors name no backend, which means udp and is not available.
fn with_backend(text: &str) -> Result<NetworkConfig, String> {
    let open = text.trim_end().strip_suffix('}').expect("an object");
    parse(&format!(r#"{open},"Backend":{{"Type":"vxlan"}}}}"#))
}

#[rstest]
#[case::vector1(r#"{"network":"10.3.0.0/16"}"#, 24, "10.3.1.0", "10.3.255.0")]
#[case::vector2(
    r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28}"#,
    28,
    "10.3.5.0",
    "10.3.8.0"
)]
#[case::vector3(r#"{"Network":"10.0.0.0/24"}"#, 26, "10.0.0.64", "10.0.0.192")]
#[case::vector4(r#"{"Network":"10.0.0.0/28"}"#, 30, "10.0.0.4", "10.0.0.12")]
fn s24_row01_config_gives_derived_values(
    #[case] text: &str,
    #[case] len: u8,
    #[case] min: &str,
    #[case] max: &str,
) {
    let config = with_backend(text).expect("valid");
    assert_eq!(
        (config.subnet_len, config.subnet_min, config.subnet_max),
        (
            len,
            min.parse().expect("an address"),
            max.parse().expect("an address")
        )
    );
}

#[rstest]
#[case::vector5(r#"{"Network":"10.0.0.0/29"}"#, "too small to be divided")]
#[case::vector6(r#"{"Network":"10.0.0.0/16","SubnetLen":17}"#, "SubnetLen")]
#[case::vector7(
    r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.5"}"#,
    "not on a boundary"
)]
#[case::vector8_not_yet(
    r#"{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}"#,
    "EnableIPv6 true is not available"
)]
fn s24_row02_config_is_refused(#[case] text: &str, #[case] says: &str) {
    let error = with_backend(text).expect_err("refused");
    assert!(error.contains(says), "{error}");
}

/// Each key: a value that works, and what a value of another type is told.
#[rstest]
#[case::row01_enable_ipv4("EnableIPv4", "true", r#""yes""#)]
#[case::row02_enable_ipv6("EnableIPv6", "false", "1")]
#[case::row03_enable_nftables("EnableNFTables", "true", r#""yes""#)]
#[case::row04_network("Network", r#""10.9.7.7/16""#, r#""fd00::/48""#)]
#[case::row05_ipv6_network("IPv6Network", r#""fd00::1/48""#, r#""10.0.0.0/8""#)]
#[case::row06_subnet_len("SubnetLen", "25", r#""25""#)]
#[case::row07_subnet_min("SubnetMin", r#""10.9.7.0""#, "7")]
#[case::row08_subnet_max("SubnetMax", r#""10.9.7.0""#, r#""fd00::1""#)]
#[case::row09_ipv6_subnet_len("IPv6SubnetLen", "64", "-1")]
#[case::row10_ipv6_subnet_min("IPv6SubnetMin", r#""fd00::""#, r#""10.9.0.0""#)]
#[case::row11_ipv6_subnet_max("IPv6SubnetMax", r#""fd00::""#, "true")]
#[case::row12_backend("Backend", r#"{"Type":"VXLAN"}"#, r#""vxlan""#)]
fn s03_key_in_any_case_and_of_its_type(#[case] key: &str, #[case] good: &str, #[case] bad: &str) {
    let config = |key: &str, value: &str| {
        let mut members = vec![format!(r#""{key}":{value}"#), r#""Unknown":[{}]"#.into()];
        for (name, usual) in [
            ("Network", r#""10.9.0.0/16""#),
            ("Backend", r#"{"Type":"vxlan"}"#),
        ] {
            if !key.eq_ignore_ascii_case(name) {
                members.push(format!(r#""{name}":{usual}"#));
            }
        }
        parse(&format!("{{{}}}", members.join(",")))
    };
    let read = config(key, good).expect("valid");
    assert_eq!(config(&key.to_lowercase(), good).as_ref(), Ok(&read));
    assert_eq!(config(&key.to_uppercase(), good).as_ref(), Ok(&read));
    assert_eq!(read.network.to_string(), "10.9.0.0/16", "host bits are off");
    let error = config(key, bad).expect_err("another type");
    assert!(error.contains(&format!("{key} is {bad}")), "{error}");
}

/// Every row of the table in 3.2; `Err` holds a part of the message.
#[rstest]
#[case::row20_network_missing("", Err("no Network"))]
#[case::row21_subnet_len_over_30(
    r#""Network":"10.9.0.0/16","SubnetLen":31"#,
    Err("SubnetLen is 31")
)]
#[case::row22_fewer_than_four_subnets(
    r#""Network":"10.9.0.0/16","SubnetLen":17"#,
    Err("at least four")
)]
#[case::row22_four_subnets(r#""Network":"10.9.0.0/16","SubnetLen":18"#, Ok((18, "10.9.64.0", "10.9.192.0")))]
#[case::row23_network_too_small(r#""Network":"10.9.0.0/29""#, Err("too small"))]
#[case::row24_prefix_up_to_22_gives_24(r#""Network":"10.9.0.0/22""#, Ok((24, "10.9.1.0", "10.9.3.0")))]
#[case::row25_prefix_23_gives_25(r#""Network":"10.9.0.0/23""#, Ok((25, "10.9.0.128", "10.9.1.128")))]
#[case::row25_prefix_28_gives_30(r#""Network":"10.9.0.0/28""#, Ok((30, "10.9.0.4", "10.9.0.12")))]
#[case::row26_first_subnet_is_skipped(r#""Network":"10.9.0.0/16""#, Ok((24, "10.9.1.0", "10.9.255.0")))]
#[case::row27_last_subnet_is_the_last_one_inside(
    r#""Network":"10.9.0.0/24","SubnetLen":28,"SubnetMin":"10.9.0.0""#,
    Ok((28, "10.9.0.0", "10.9.0.240"))
)]
#[case::row28_min_outside(r#""Network":"10.9.0.0/16","SubnetMin":"10.8.0.0""#, Err("outside"))]
#[case::row28_max_outside(r#""Network":"10.9.0.0/16","SubnetMax":"10.10.0.0""#, Err("outside"))]
#[case::row29_min_unaligned(r#""Network":"10.9.0.0/16","SubnetMin":"10.9.1.1""#, Err("boundary"))]
#[case::row29_max_unaligned(r#""Network":"10.9.0.0/16","SubnetMax":"10.9.1.1""#, Err("boundary"))]
#[case::row31_inverted_range_is_no_error(
    r#""Network":"10.9.0.0/16","SubnetMin":"10.9.9.0","SubnetMax":"10.9.2.0""#,
    Ok((24, "10.9.9.0", "10.9.2.0"))
)]
fn s03_validation(#[case] members: &str, #[case] verdict: Result<(u8, &str, &str), &str>) {
    let comma = if members.is_empty() { "" } else { "," };
    let config = parse(&format!(
        r#"{{{members}{comma}"Backend":{{"Type":"vxlan"}}}}"#
    ));
    match verdict {
        Ok((len, min, max)) => {
            let config = config.expect("valid");
            let derived = (
                config.subnet_len,
                config.subnet_min.to_string(),
                config.subnet_max.to_string(),
            );
            assert_eq!(derived, (len, min.to_owned(), max.to_owned()));
        }
        Err(says) => {
            let error = config.expect_err("refused");
            assert!(error.contains(says), "{error}");
        }
    }
}

/// What flannel has and this version lacks is named, and so is the way out.
#[rstest]
#[case::row13_absent("", "udp")]
#[case::row13_no_type(r#","Backend":{}"#, "no Type")]
#[case::row14_host_gw(r#","Backend":{"Type":"host-gw"}"#, "host-gw")]
#[case::row14_wireguard(r#","Backend":{"Type":"wireguard"}"#, "wireguard")]
#[case::row14_ipip(r#","Backend":{"Type":"ipip"}"#, "ipip")]
#[case::row14_udp(r#","Backend":{"Type":"UDP"}"#, "UDP")]
#[case::row14_ipsec(r#","Backend":{"Type":"ipsec"}"#, "ipsec")]
#[case::row14_extension(r#","Backend":{"Type":"extension"}"#, "extension")]
#[case::row14_tencent(r#","Backend":{"Type":"tencent-vpc"}"#, "tencent-vpc")]
fn s03_backend_not_yet(#[case] backend: &str, #[case] names: &str) {
    let error = format!(r#"{{"Network":"10.9.0.0/16"{backend}}}"#)
        .parse::<NetworkConfig>()
        .expect_err("refused");
    let text = error.to_string();
    assert!(text.contains(names) && text.contains("vxlan"), "{text}");
    assert!(error.is_final(), "waiting does not help: {text}");
}

#[test]
fn s03_row15_alloc_and_vxlan_work() {
    let backend = |name: &str| {
        let text = format!(r#"{{"Network":"10.9.0.0/16","Backend":{{"Type":"{name}"}}}}"#);
        parse(&text).expect("valid").backend
    };
    assert_eq!(backend("Alloc"), BackendConfig::Alloc);
    assert!(matches!(backend("VxLAN"), BackendConfig::Vxlan(_)));
}
