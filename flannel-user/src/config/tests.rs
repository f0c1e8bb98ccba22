use rstest::rstest;

use super::*;

fn parse_with(args: &[&str], env: &[(&str, &str)]) -> Result<Flags, FlagsError> {
    Flags::parse(
        args.iter().map(|text| (*text).to_owned()),
        env.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    )
}

/// With a lease source, so that only what a test is about can be wrong.
fn parse(args: &[&str]) -> Result<Flags, FlagsError> {
    parse_with(args, &[("FLANNELD_LEASE_DIR", "/leases")])
}

#[test]
fn clap_finds_no_fault_in_the_flags() {
    Flags::command().debug_assert();
}

#[test]
fn defaults_are_flannels() {
    let flags = parse_with(&["--lease-dir", "/leases"], &[]).expect("valid");
    assert_eq!(flags.lease_dir, Some(PathBuf::from("/leases")));
    assert_eq!(flags.lease_ttl, Duration::from_secs(86_400));
    assert_eq!(flags.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
    assert_eq!(flags.renew_margin(), Duration::from_secs(3600));
    assert_eq!(
        flags.control_socket,
        PathBuf::from("/run/flannel/control.sock")
    );
    assert_eq!(flags.bpf_dir, PathBuf::from("/sys/fs/bpf/flannel"));
    assert!(flags.iface.is_empty() && flags.iface_regex.is_empty());
    assert_eq!((flags.public_ip, flags.iface_can_reach), (None, None));
    assert!(!flags.ip_masq && !flags.ip_masq_fully_random_disable && !flags.ip_blackhole_route);
    assert!(flags.iptables_forward_rules);
    assert_eq!(flags.firewall_period(), Duration::from_secs(5));
    assert_eq!(flags.datapath, Preference::Auto);
    assert_eq!(flags.fast_path, None);
    assert_eq!(flags.fast_path_classes, Classes::Auto);
    assert_eq!(flags.tc_attach, TcAttach::Auto);
    assert_eq!(flags.forged_vxlan, ForgedVxlan::Drop);
    assert_eq!(flags.log_filter(), "info");
    assert_eq!(flags.healthz(), None);
    assert_eq!(flags.warnings, [""; 0]);
}

#[rstest]
#[case(&["-iface", "eth0", "-iface=eth1", "--iface", "-x"])]
#[case(&["--iface=eth0", "--iface", "eth1", "-iface=-x"])]
fn one_dash_is_as_good_as_two(#[case] args: &[&str]) {
    assert_eq!(parse(args).expect("valid").iface, ["eth0", "eth1", "-x"]);
}

#[rstest]
#[case(&[], false)]
#[case(&["--ip-masq"], true)]
#[case(&["-ip-masq=true"], true)]
#[case(&["--ip-masq=1"], true)]
#[case(&["--ip-masq", "--ip-masq=F"], false)]
#[case(&["--ip-masq=false"], false)]
fn a_switch_is_turned_off_with_a_value(#[case] args: &[&str], #[case] on: bool) {
    let flags = parse(args).expect("valid");
    assert_eq!(flags.ip_masq, on);
    assert_eq!(flags.warnings, [""; 0]);
}

#[test]
fn the_last_of_several_values_counts() {
    let flags = parse(&["--subnet-file", "/a", "-subnet-file=/b"]).expect("valid");
    assert_eq!(flags.subnet_file, PathBuf::from("/b"));
}

#[test]
fn every_flag_is_read() {
    let flags = parse(&[
        "--lease-dir=/x",
        "--lease-ttl=0x3c",
        "--subnet-lease-renew-margin=1439",
        "--iface-regex=^eth",
        "--iface-can-reach=192.0.2.1",
        "--public-ip=192.168.50.1",
        "--datapath=Netlink",
        "--fast-path=direct",
        "--fast-path-classes=off",
        "--fast-path-revalidate=7",
        "--fast-path-flows=0x1000",
        "--fast-path-exclude=10.0.0.0/8",
        "--tc-attach=clsact",
        "--forged-vxlan=pass",
        "--ip-masq-fully-random-disable",
        "--iptables-forward-rules=false",
        "--iptables-resync=0x10",
        "--ip-blackhole-route",
        "--bpf-dir=/bpf",
        "--control-socket=/c.sock",
        "-v=4",
    ])
    .expect("valid");
    assert_eq!(flags.lease_dir, Some(PathBuf::from("/x")));
    assert_eq!(flags.lease_ttl, Duration::from_secs(60));
    assert_eq!(flags.subnet_lease_renew_margin, 1439);
    assert_eq!(
        flags.renew_margin(),
        Duration::from_secs(30),
        "half of the life"
    );
    assert_eq!(flags.iface_regex, ["^eth"]);
    assert_eq!(flags.iface_can_reach, Some(Ipv4Addr::new(192, 0, 2, 1)));
    assert_eq!(flags.public_ip, Some(Ipv4Addr::new(192, 168, 50, 1)));
    assert_eq!(flags.datapath, Preference::Netlink);
    assert_eq!(flags.fast_path, Some(FastPath::Direct));
    assert_eq!(flags.fast_path_classes, Classes::Off);
    assert_eq!(flags.fast_path_revalidate, Duration::from_secs(7));
    assert_eq!(flags.fast_path_flows, 4096);
    assert_eq!(
        flags.fast_path_exclude,
        ["10.0.0.0/8".parse().expect("a prefix")]
    );
    assert_eq!(flags.tc_attach, TcAttach::Clsact);
    assert_eq!(flags.forged_vxlan, ForgedVxlan::Pass);
    assert!(flags.ip_masq_fully_random_disable && flags.ip_blackhole_route);
    assert!(!flags.iptables_forward_rules);
    assert_eq!(flags.firewall_period(), Duration::from_secs(16));
    assert_eq!(flags.bpf_dir, PathBuf::from("/bpf"));
    assert_eq!(flags.control_socket, PathBuf::from("/c.sock"));
    assert!(flags.log_filter().contains("flannel_user=debug"));
}

#[test]
fn every_flag_has_a_variable_and_the_command_line_wins() {
    let env = [
        ("FLANNELD_LEASE_DIR", "/leases"),
        ("FLANNELD_IFACE", "eth0,eth1"),
        ("FLANNELD_SUBNET_FILE", "/env"),
        ("FLANNELD_IP_MASQ", "true"),
        ("FLANNELD_IPTABLES_FORWARD_RULES", "false"),
        ("FLANNELD_IPTABLES_RESYNC", "7"),
        ("FLANNELD_V", "10"),
        ("FLANNELD_PUBLIC_IP", ""),
        ("FLANNELD_LEASE_TTL", "60"),
        ("FLANNELD_VERSION", "true"),
        ("FLANNELD_HELP", "true"),
        ("FLANNELD_SERVICE_HOST", "10.0.0.1"),
    ];
    let flags = parse_with(&["--subnet-file=/line"], &env).expect("valid");
    assert_eq!(flags.subnet_file, PathBuf::from("/line"));
    assert_eq!(flags.iface, ["eth0,eth1"], "one entry, not split");
    assert!(flags.ip_masq && !flags.iptables_forward_rules);
    assert_eq!(flags.iptables_resync, 7);
    assert_eq!(flags.lease_ttl, Duration::from_secs(60));
    assert!(flags.log_filter().contains("flannel_user=trace"));
    let flags = parse_with(&["--iface=lo"], &env).expect("valid");
    assert_eq!(flags.iface, ["lo"]);
}

#[test]
fn a_flag_on_the_command_line_makes_a_bad_variable_irrelevant() {
    let env = [("FLANNELD_LEASE_DIR", "/leases"), ("FLANNELD_V", "loud")];
    assert_eq!(parse_with(&["-v", "2"], &env).expect("valid").verbosity, 2);
    assert!(parse_with(&[], &env).is_err());
}

#[test]
fn an_empty_value_is_no_value() {
    let flags = parse(&["--public-ip=", "--etcd-username", "", "--public-ipv6="]);
    assert_eq!(flags.expect("valid").public_ip, None);
}

#[rstest]
#[case("FLANNELD_IP_MASQ", "yes")]
#[case("FLANNELD_V", "-1")]
#[case("FLANNELD_LEASE_TTL", "0")]
#[case("FLANNELD_PUBLIC_IP", "fd00::1")]
#[case("FLANNELD_DATAPATH", "fast")]
#[case("FLANNELD_HEALTHZ_PORT", "http")]
fn an_unreadable_variable_is_named(#[case] name: &str, #[case] value: &str) {
    let env = [("FLANNELD_LEASE_DIR", "/leases"), (name, value)];
    let error = parse_with(&[], &env).expect_err("unreadable");
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains(&format!("{name}={value:?}")), "{text}");
}

#[rstest]
#[case(&["--subnet-flie=/x"], "--subnet-file")]
#[case(&["--subnet-flie", "/x"], "--subnet-file")]
#[case(&["--v"], "--v")]
#[case(&["--v=loud"], "expected a whole number")]
#[case(&["--v", "+3"], "expected a whole number")]
#[case(&["--lease-ttl=0"], "at least one second")]
#[case(&["--public-ip=host"], "--public-ip")]
#[case(&["--ip-masq=maybe"], "expected true or false")]
#[case(&["--fast-path=lerned"], "off, learned, direct")]
#[case(&["--ip-masq", "true"], "--ip-masq=true")]
#[case(&["--", "x"], "\"x\"")]
#[case(&["-"], "\"-\"")]
fn an_unreadable_command_line_ends_with_2(#[case] args: &[&str], #[case] says: &str) {
    let error = parse(args).expect_err("unreadable");
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains(says), "{text}");
}

#[rstest]
#[case("0")]
#[case("1440")]
fn a_renew_margin_out_of_range_ends_with_1(#[case] minutes: &str) {
    let error = parse(&["--subnet-lease-renew-margin", minutes]).expect_err("out of range");
    assert_eq!(error.exit_code(), 1);
    let text = error.to_string();
    assert!(
        text.contains(&format!("is {minutes} minutes")) && text.contains("1439"),
        "{text}"
    );
}

#[test]
fn row_2_without_a_lease_source_it_is_etcd_as_in_flannel() {
    let flags = parse_with(&["--iface=lo"], &[]).expect("valid");
    assert_eq!(flags.lease_dir, None);
    let defaults = "http://127.0.0.1:4001,http://127.0.0.1:2379";
    assert_eq!(flags.etcd_endpoints, defaults.parse().expect("any text"));
    assert_eq!(flags.etcd_prefix, "/coreos.com/network");
    let etcd = flags.etcd();
    assert_eq!(
        (etcd.key_file, etcd.cert_file, etcd.ca_file),
        (None, None, None)
    );
    assert_eq!((etcd.username, etcd.password), (None, None));
    assert_eq!(etcd.lease_ttl, Duration::from_secs(86_400));
}

#[test]
fn row_2_every_etcd_flag_is_read() {
    let flags = parse_with(
        &[
            "-etcd-endpoints=https://a:2379,https://b:2379",
            "--etcd-prefix",
            "/other",
            "--etcd-keyfile=/key",
            "--etcd-certfile=/cert",
            "--etcd-cafile=/ca",
            "--etcd-username=flannel",
        ],
        &[("FLANNELD_ETCD_PASSWORD", "hunter2")],
    );
    let etcd = flags.expect("valid").etcd();
    assert_eq!(etcd.prefix, "/other");
    assert_eq!(etcd.key_file, Some("/key".into()));
    assert_eq!(etcd.cert_file, Some("/cert".into()));
    assert_eq!(etcd.ca_file, Some("/ca".into()));
    assert_eq!(etcd.username.as_deref(), Some("flannel"));
    assert_eq!(etcd.password, Some("hunter2".parse().expect("any text")));
}

#[test]
fn row_23_18_no_secret_prints() {
    let args = [
        "--etcd-password=hunter2",
        "--etcd-endpoints=http://root:hunter2@a:2379",
    ];
    let flags = parse_with(&args, &[]).expect("valid");
    let text = format!("{flags:?}{flags:#?}");
    assert!(!text.contains("hunter2"), "{text}");
    let error = parse(&args).expect_err("two sources").to_string();
    assert!(!error.contains("hunter2"), "{error}");
}

#[rstest]
#[case(&["--etcd-endpoints=http://127.0.0.1:2379"], &[], "--etcd-endpoints")]
#[case(&["--etcd-prefix=/x"], &[], "--etcd-prefix")]
#[case(&[], &[("FLANNELD_ETCD_PASSWORD", "hunter2")], "FLANNELD_ETCD_PASSWORD")]
fn etcd_and_a_directory_do_not_go_together(
    #[case] flags: &[&str],
    #[case] env: &[(&str, &str)],
    #[case] name: &str,
) {
    let args = [&["--lease-dir=/x"], flags].concat();
    let error = parse_with(&args, env).expect_err("two sources");
    assert_eq!(error.exit_code(), 1);
    let text = error.to_string();
    assert!(
        text.contains("--lease-dir") && text.contains(name),
        "{text}"
    );
}

#[rstest]
#[case("--kube-subnet-mgr", "Kubernetes")]
#[case("--kube-api-url=https://x", "Kubernetes")]
#[case("--kubeconfig-file=/x", "Kubernetes")]
#[case("--public-ipv6=fd00::1", "IPv6")]
fn what_is_not_there_yet_is_refused_by_name(#[case] flag: &str, #[case] what: &str) {
    for env in [&[][..], &[("FLANNELD_LEASE_DIR", "/leases")]] {
        let error = parse_with(&[flag], env).expect_err("refused");
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        let name = flag.split('=').next().expect("a name");
        assert!(text.starts_with(name) && text.contains(what), "{text}");
        assert!(text.contains("not available in this version"), "{text}");
    }
}

#[test]
fn a_refused_variable_is_named_without_its_value() {
    let error = parse_with(&[], &[("FLANNELD_KUBE_API_URL", "hunter2")]).expect_err("refused");
    let text = error.to_string();
    assert!(text.contains("FLANNELD_KUBE_API_URL"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[rstest]
#[case("--iptables-resync=0", true)]
#[case("--iptables-resync=5", false)]
#[case("--iptables-forward-rules=false", false)]
#[case("--ip-blackhole-route", false)]
#[case("--kube-subnet-mgr=false", false)]
#[case("--kube-annotation-prefix=x", true)]
#[case("--net-config-path=/x", true)]
#[case("--set-node-network-unavailable=false", false)]
#[case("-vmodule=a=1", true)]
#[case("-log_backtrace_at=a:1", true)]
fn what_has_no_effect_is_said(#[case] flag: &str, #[case] said: bool) {
    let warnings = parse(&[flag]).expect("works without").warnings;
    assert_eq!(!warnings.is_empty(), said, "{warnings:?}");
    let name = flag.trim_start_matches('-').split('=').next();
    let name = name.expect("a name");
    assert!(warnings.iter().all(|text| text.contains(name)));
}

#[rstest]
#[case("-version")]
#[case("--version")]
#[case("--version=true")]
fn the_version_needs_nothing_else(#[case] flag: &str) {
    let error = parse_with(&[flag], &[("FLANNELD_V", "loud")]).expect_err("only the version");
    assert_eq!(
        error,
        FlagsError::Version(env!("CARGO_PKG_VERSION").to_owned())
    );
    assert_eq!(error.exit_code(), 0);
    assert!(parse(&["--version=false"]).is_ok());
}

#[rstest]
#[case("-h")]
#[case("-help")]
#[case("--help")]
fn help_lists_every_flag_in_groups(#[case] flag: &str) {
    let error = parse_with(&[flag], &[]).expect_err("only the help");
    assert_eq!(error.exit_code(), 0);
    let FlagsError::Help(text) = error else {
        panic!("{error} is no help");
    };
    for heading in ["Leases:", "Uplink:", "Datapath:", "Firewall:", "Operation:"] {
        assert!(text.contains(heading), "{heading} is missing in: {text}");
    }
    for arg in Flags::command().get_arguments() {
        let name = arg.get_long().expect("every flag is long");
        assert!(text.contains(&format!("--{name}")), "{name}");
    }
    assert!(text.contains("FLANNELD_SUBNET_FILE"));
}

#[rstest]
#[case("0", Some(0))]
#[case("10", Some(10))]
#[case("0x1F", Some(31))]
#[case("010", Some(8))]
#[case("0o17", Some(15))]
#[case("0b11", Some(3))]
#[case("", None)]
#[case("0x", None)]
#[case("0x+1", None)]
#[case("08", None)]
#[case("-1", None)]
#[case("99999999999999999999", None)]
fn numbers_are_gos(#[case] text: &str, #[case] value: Option<u64>) {
    assert_eq!(go_flags::integer(text).ok(), value);
}

#[rstest]
#[case(&["--healthz-port=8081"], Some(("0.0.0.0", 8081)))]
#[case(&["--healthz-port=0x50", "-healthz-ip", "127.0.0.1"], Some(("127.0.0.1", 80)))]
#[case(&["--healthz-ip=", "--healthz-port=1"], Some(("0.0.0.0", 1)))]
#[case(&["--healthz-ip=127.0.0.1"], None)]
#[case(&["--healthz-port=0"], None)]
fn contract_2_health_checks_are_served_where_a_port_is_given(
    #[case] args: &[&str],
    #[case] expected: Option<(&str, u16)>,
) {
    assert_eq!(parse(args).expect("valid").healthz(), expected);
}

#[test]
fn a_health_port_beyond_65535_is_an_error() {
    let error = parse(&["--healthz-port=65536"]).expect_err("too large");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("65536"), "{error}");
}
