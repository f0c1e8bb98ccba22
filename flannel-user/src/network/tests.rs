use proptest::prelude::*;
use rstest::rstest;

use super::*;

/// A config with `rest` beside a vxlan backend.
fn parse(rest: &str) -> Result<NetworkConfig, NetworkConfigError> {
    format!("{{{rest},\"Backend\":{{\"Type\":\"vxlan\"}}}}").parse()
}

fn parse_backend(backend: &str) -> Result<BackendConfig, NetworkConfigError> {
    let config: NetworkConfig =
        format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#).parse()?;
    Ok(config.backend)
}

fn vxlan_of(backend: &str) -> VxlanConfig {
    match parse_backend(backend).expect("valid") {
        BackendConfig::Vxlan(vxlan) => vxlan,
        BackendConfig::Alloc => panic!("{backend} is vxlan"),
    }
}

#[rstest]
#[case(r#""network":"10.3.0.0/16""#, 24, "10.3.1.0", "10.3.255.0")]
#[case(
    r#""Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28"#,
    28,
    "10.3.5.0",
    "10.3.8.0"
)]
#[case(r#""Network":"10.0.0.0/24""#, 26, "10.0.0.64", "10.0.0.192")]
#[case(r#""Network":"10.0.0.0/28""#, 30, "10.0.0.4", "10.0.0.12")]
#[case(r#""Network":"10.0.0.0/22""#, 24, "10.0.1.0", "10.0.3.0")]
#[case(r#""Network":"10.0.0.0/23""#, 25, "10.0.0.128", "10.0.1.128")]
#[case(
    r#""Network":"10.3.9.9/16","SUBNETLEN":18"#,
    18,
    "10.3.64.0",
    "10.3.192.0"
)]
#[case(
    r#""Network":"10.3.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0""#,
    24,
    "10.3.1.0",
    "10.3.255.0"
)]
#[case(
    r#""Network":"10.3.0.0/16","SubnetLen":null"#,
    24,
    "10.3.1.0",
    "10.3.255.0"
)]
#[case(
    r#""Network":"10.3.0.0/16","SubnetLen":30"#,
    30,
    "10.3.0.4",
    "10.3.255.252"
)]
#[case(
    r#""Network":"128.0.0.0/1","SubnetLen":3"#,
    3,
    "160.0.0.0",
    "224.0.0.0"
)]
#[case(
    r#""Network":"10.3.0.0/16","SubnetMin":"10.3.0.0""#,
    24,
    "10.3.0.0",
    "10.3.255.0"
)]
#[case(
    r#""Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.2.0""#,
    24,
    "10.3.9.0",
    "10.3.2.0"
)]
fn subnets_follow_from_the_network(
    #[case] rest: &str,
    #[case] len: u8,
    #[case] min: &str,
    #[case] max: &str,
) {
    let config = parse(rest).expect("valid");
    assert_eq!(config.subnet_len, len);
    assert_eq!(config.subnet_min.to_string(), min);
    assert_eq!(config.subnet_max.to_string(), max);
    assert_eq!(config.network, config.network.trunc());
}

#[rstest]
#[case::no_network(r#""EnableNFTables":true"#, "has no Network")]
#[case::everything(r#""Network":"0.0.0.0/0""#, "has no Network")]
#[case::ipv6_value(
    r#""Network":"fd00::/48""#,
    r#"Network is "fd00::/48", expected an IPv4 network"#
)]
#[case::no_prefix(r#""Network":"10.0.0.0""#, r#"Network is "10.0.0.0""#)]
#[case::network_of_another_type(r#""Network":7"#, "Network is 7")]
#[case::small_network(r#""Network":"10.0.0.0/29""#, "10.0.0.0/29 is too small to be divided")]
#[case::small_subnet(r#""Network":"10.0.0.0/16","SubnetLen":31"#, "SubnetLen is 31")]
#[case::huge_len(
    r#""Network":"10.0.0.0/16","SubnetLen":4294967320"#,
    "SubnetLen is 4294967320"
)]
#[case::two_subnets(
    r#""Network":"10.0.0.0/16","SubnetLen":17"#,
    "SubnetLen has to be 18 or more"
)]
#[case::smaller_than_a_subnet(
    r#""Network":"10.0.0.0/26","SubnetLen":24"#,
    "10.0.0.0/26 is too small for subnets of /24"
)]
#[case::one_address(
    r#""Network":"10.0.0.1/32","SubnetLen":30"#,
    "too small for subnets of /30"
)]
#[case::negative_len(
    r#""Network":"10.0.0.0/16","SubnetLen":-1"#,
    "SubnetLen is -1, expected a prefix length"
)]
#[case::text_len(
    r#""Network":"10.0.0.0/16","SubnetLen":"24""#,
    r#"SubnetLen is "24", expected a prefix length"#
)]
#[case::float_len(r#""Network":"10.0.0.0/16","SubnetLen":24.5"#, "SubnetLen is 24.5")]
#[case::min_unaligned(
    r#""Network":"10.0.0.0/16","SubnetMin":"10.0.1.5""#,
    "the nearest below is 10.0.1.0"
)]
#[case::max_unaligned(
    r#""Network":"10.0.0.0/16","SubnetMax":"10.0.1.5""#,
    "SubnetMax 10.0.1.5 is not on a boundary"
)]
#[case::min_outside(
    r#""Network":"10.0.0.0/16","SubnetMin":"10.1.0.0""#,
    "SubnetMin 10.1.0.0 lies outside"
)]
#[case::max_outside(
    r#""Network":"10.0.0.0/16","SubnetMax":"9.255.0.0""#,
    "SubnetMax 9.255.0.0 lies outside"
)]
#[case::text_for_flag(
    r#""Network":"10.0.0.0/16","EnableNFTables":"yes""#,
    r#"EnableNFTables is "yes", expected true or false"#
)]
#[case::unused_ipv6_type(
    r#""Network":"10.0.0.0/16","IPv6Network":"10.0.0.0/8""#,
    r#"IPv6Network is "10.0.0.0/8""#
)]
#[case::ipv6(
    r#""enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false"#,
    "EnableIPv6 true is not available"
)]
#[case::dual_stack(
    r#""Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48""#,
    "EnableIPv6 true is not available"
)]
#[case::no_family(
    r#""Network":"10.0.0.0/16","EnableIPv4":false"#,
    "neither IPv4 nor IPv6"
)]
fn a_refusal_names_what_is_wrong(#[case] rest: &str, #[case] says: &str) {
    let error = parse(rest).expect_err("refused");
    assert!(error.to_string().contains(says), "{error}");
}

#[rstest]
#[case("", "line 1 column 0")]
#[case("{\n  \"Network\": \"10.0.0.0/16\",\n}", "line 3 column 1")]
#[case("[]", "a JSON object")]
#[case("{} {}", "trailing characters at line 1 column 4")]
fn unreadable_json_is_located(#[case] text: &str, #[case] says: &str) {
    let error = text.parse::<NetworkConfig>().expect_err("refused");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn a_backend_has_flannels_defaults() {
    let defaults = VxlanConfig {
        vni: 1,
        port: None,
        mtu: None,
        gbp: false,
        learning: false,
        fast_path: None,
    };
    assert_eq!(vxlan_of(r#"{"Type":"vxlan"}"#), defaults);
    assert_eq!(
        vxlan_of(r#"{"type":"VXLAN","Port":0,"MTU":0,"VNI":null,"Name":"x","MacPrefix":"0E-2A"}"#),
        defaults
    );
}

#[test]
fn every_backend_key_is_read_without_regard_to_case() {
    assert_eq!(
        vxlan_of(
            r#"{"TYPE":"vxlan","vni":4096,"PORT":4789,"mtu":1400,"gbp":true,"LEARNING":true,"fastpath":"Direct"}"#
        ),
        VxlanConfig {
            vni: 4096,
            port: Some(4789),
            mtu: Some(1400),
            gbp: true,
            learning: true,
            fast_path: Some(FastPath::Direct),
        }
    );
    assert_eq!(vxlan_of(r#"{"Type":"vxlan","VNI":0}"#).vni, 0);
    assert_eq!(vxlan_of(r#"{"Type":"vxlan","VNI":16777215}"#).vni, MAX_VNI);
    assert_eq!(
        vxlan_of(r#"{"Type":"vxlan","FastPath":"OFF"}"#).fast_path,
        Some(FastPath::Off)
    );
    assert_eq!(
        parse_backend(r#"{"Type":"alloc","VNI":"ignored"}"#).expect("valid"),
        BackendConfig::Alloc
    );
}

#[rstest]
#[case(r#"{}"#, "Backend has no Type")]
#[case(r#"{"Type":""}"#, "Backend has no Type")]
#[case(r#"{"Type":"vxlna"}"#, r#"unknown backend type "vxlna""#)]
#[case(
    r#"{"Type":"WireGuard"}"#,
    r#"Backend.Type "WireGuard" is not available"#
)]
#[case("null", r#"absent, which means Type "udp""#)]
#[case(r#""vxlan""#, r#"Backend is "vxlan", expected an object"#)]
#[case(r#"{"Type":7}"#, "Backend.Type is 7")]
#[case(
    r#"{"Type":"vxlan","VNI":16777216}"#,
    "Backend.VNI is 16777216, expected 0 to"
)]
#[case(r#"{"Type":"vxlan","VNI":-1}"#, "Backend.VNI is -1")]
#[case(
    r#"{"Type":"vxlan","VNI":"1"}"#,
    r#"Backend.VNI is "1", expected a number"#
)]
#[case(r#"{"Type":"vxlan","Port":65536}"#, "Backend.Port is 65536")]
#[case(r#"{"Type":"vxlan","MTU":100}"#, "Backend.MTU is 100")]
#[case(r#"{"Type":"vxlan","MTU":-1}"#, "Backend.MTU is -1")]
#[case(
    r#"{"Type":"vxlan","GBP":1}"#,
    "Backend.GBP is 1, expected true or false"
)]
#[case(
    r#"{"Type":"vxlan","DirectRouting":"yes"}"#,
    r#"Backend.DirectRouting is "yes""#
)]
#[case(
    r#"{"Type":"vxlan","FastPath":"lerned"}"#,
    r#"Backend.FastPath is "lerned", expected "learned", "direct" or "off""#
)]
#[case(r#"{"Type":"vxlan","FastPath":true}"#, "Backend.FastPath is true")]
fn a_refused_backend_names_what_is_wrong(#[case] backend: &str, #[case] says: &str) {
    let error = parse_backend(backend).expect_err("refused");
    assert!(error.to_string().contains(says), "{error}");
}

#[rstest]
#[case("10.3.1.0-24", true)]
#[case("10.3.255.0-24", true)]
#[case("10.3.0.0-24", false)]
#[case("10.3.1.0-25", false)]
#[case("10.4.1.0-24", false)]
#[case("10.3.1.0-24&fd00::-64", false)]
fn compatible_is_what_could_have_been_handed_out(#[case] key: &str, #[case] compatible: bool) {
    let config = parse(r#""Network":"10.3.0.0/16""#).expect("valid");
    assert_eq!(
        config.is_compatible(&key.parse().expect("a key")),
        compatible
    );
}

proptest! {
    /// Whatever is accepted lies in the network, aligned, with room for four subnets.
    #[test]
    fn accepted_networks_have_aligned_ranges_inside(base: u32, prefix in 0u8..=32, len in 0u8..=32) {
        let network = Ipv4Net::new(base.into(), prefix).expect("length");
        let Ok(config) = parse(&format!(r#""Network":"{network}","SubnetLen":{len}"#)) else {
            let roomy = prefix <= 28 && (len == 0 || (prefix + 2 <= len && len <= 30));
            prop_assert!(!roomy || network.trunc() == Ipv4Net::default());
            return Ok(());
        };
        prop_assert!(config.subnet_len <= 30 && config.subnet_len >= prefix + 2);
        prop_assert!(config.subnet_min < config.subnet_max);
        for address in [config.subnet_min, config.subnet_max] {
            let subnet = Ipv4Net::new(address, config.subnet_len).expect("length");
            prop_assert_eq!(subnet.network(), address);
            prop_assert!(config.network.contains(&subnet));
        }
    }

    #[test]
    fn no_text_panics(text: String) {
        let _ = text.parse::<NetworkConfig>();
    }
}
