//! Section 2: flags and environment.

use clap::CommandFactory;
use flannel_user::config::Flags;
use nix::sys::signal::Signal;
use rstest::rstest;

use crate::{
    agent::{Node, flanneld, until},
    namespace::in_new_namespace,
};

/// What becomes of a flag of flannel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It does what it does in flannel.
    Works,
    /// It is read, its value checked, and a warning says that it has no effect.
    Ignored,
    /// It is read, and the start ends with 1 and the reason.
    Refused,
}
use Fate::{Ignored, Refused, Works};

fn parse(args: &[String], env: &[(String, String)]) -> Result<Flags, String> {
    Flags::parse(args.to_vec(), env.to_vec()).map_err(|error| error.to_string())
}

/// Default, another value, and fate of each flag of the table in section 2. `None` stands for
/// flannel's default where it means "nothing given".
#[rstest]
#[case::row21_etcd_endpoints(
    "etcd-endpoints",
    Some("http://127.0.0.1:4001,http://127.0.0.1:2379"),
    "http://192.0.2.1:2379",
    Works
)]
#[case::row22_etcd_prefix("etcd-prefix", Some("/coreos.com/network"), "/other", Works)]
#[case::row23_etcd_keyfile("etcd-keyfile", None, "/key", Works)]
#[case::row24_etcd_certfile("etcd-certfile", None, "/cert", Works)]
#[case::row25_etcd_cafile("etcd-cafile", None, "/ca", Works)]
#[case::row26_etcd_username("etcd-username", None, "flannel", Works)]
#[case::row27_etcd_password("etcd-password", None, "hunter2", Works)]
#[case::row28_iface("iface", None, "eth0", Works)]
#[case::row29_iface_regex("iface-regex", None, "^eth", Works)]
#[case::row30_iface_can_reach("iface-can-reach", None, "192.0.2.1", Works)]
#[case::row31_subnet_file("subnet-file", Some("/run/flannel/subnet.env"), "/x", Works)]
#[case::row32_public_ip("public-ip", None, "192.0.2.1", Works)]
#[case::row33_public_ipv6("public-ipv6", None, "fd00::1", Refused)]
#[case::row34_subnet_lease_renew_margin("subnet-lease-renew-margin", Some("60"), "0x1e", Works)]
#[case::row35_ip_masq("ip-masq", Some("false"), "true", Works)]
#[case::row36_ip_masq_fully_random_disable(
    "ip-masq-fully-random-disable",
    Some("false"),
    "true",
    Works
)]
#[case::row37_kube_subnet_mgr("kube-subnet-mgr", None, "true", Refused)]
#[case::row38_kube_api_url("kube-api-url", None, "https://x", Refused)]
#[case::row39_kube_annotation_prefix("kube-annotation-prefix", None, "x.y", Ignored)]
#[case::row40_kubeconfig_file("kubeconfig-file", None, "/x", Refused)]
#[case::row44_iptables_resync("iptables-resync", Some("5"), "7", Works)]
#[case::row45_iptables_forward_rules("iptables-forward-rules", Some("true"), "false", Works)]
#[case::row46_ip_blackhole_route("ip-blackhole-route", Some("false"), "true", Works)]
#[case::row47_net_config_path("net-config-path", None, "/x", Ignored)]
#[case::row48_set_node_network_unavailable("set-node-network-unavailable", None, "true", Ignored)]
#[case::row49_v("v", Some("0"), "4", Works)]
#[case::row50_vmodule("vmodule", None, "a=1", Ignored)]
#[case::row51_log_backtrace_at("log_backtrace_at", None, "a:1", Ignored)]
fn s02_flag_as_in_the_table(
    #[case] name: &str,
    #[case] default: Option<&str>,
    #[case] value: &str,
    #[case] fate: Fate,
) {
    let command = Flags::command();
    let argument = command
        .get_arguments()
        .find(|argument| argument.get_long() == Some(name))
        .expect("the flag exists");
    let defaults: Vec<_> = argument.get_default_values().iter().collect();
    assert_eq!(defaults, default.iter().collect::<Vec<_>>());

    let variable = format!("FLANNELD_{}", name.to_uppercase().replace('-', "_"));
    let env = [(variable, value.to_owned())];
    let forms = [
        parse(&[format!("-{name}={value}")], &[]),
        parse(&[format!("--{name}={value}")], &[]),
        parse(&[], &env),
    ];
    for read in &forms {
        match (fate, read) {
            (Works, Ok(flags)) => {
                assert_eq!(flags.warnings, [""; 0]);
                assert_eq!(Ok(flags), forms[0].as_ref(), "each form means the same");
                assert_ne!(Ok(flags), parse(&[], &[]).as_ref(), "it has an effect");
            }
            (Ignored, Ok(flags)) => {
                let [warning] = flags.warnings.as_slice() else {
                    panic!("{:?}", flags.warnings);
                };
                assert!(warning.contains("has no effect: "), "{warning}");
            }
            (Refused, Err(error)) => {
                assert!(error.contains("not available in this version"), "{error}");
            }
            (_, read) => panic!("{name}: {read:?}"),
        }
    }
}

#[test]
fn s02_row03_help_ends_with_0_and_an_error_with_another_status() {
    let (status, stdout, stderr) = flanneld(&["-h"], &[]);
    assert_eq!((status, stderr.as_str()), (Some(0), ""));
    assert!(stdout.contains("--etcd-endpoints"), "{stdout}");
    let (status, stdout, stderr) = flanneld(&["--subnet-lease-renew-margin=x"], &[]);
    assert_eq!((status, stdout.as_str()), (Some(2), ""));
    for part in ["--subnet-lease-renew-margin", "'x'"] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn s02_row43_version_is_a_line_on_standard_error() {
    let env = [("FLANNELD_VERSION", "false"), ("FLANNELD_V", "loud")];
    let (status, stdout, stderr) = flanneld(&["-version"], &env);
    assert_eq!((status, stdout.as_str()), (Some(0), ""));
    assert_eq!(stderr, format!("{}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn s02_row34_a_margin_outside_1_to_1439_ends_with_1() {
    for minutes in ["0", "1440"] {
        let (status, _, stderr) = flanneld(&["--subnet-lease-renew-margin", minutes], &[]);
        assert_eq!(status, Some(1), "{stderr}");
        assert!(stderr.contains("--subnet-lease-renew-margin"), "{stderr}");
    }
}

#[test]
fn s02_row06_an_unreadable_variable_ends_with_2_and_is_named() {
    let (status, _, stderr) = flanneld(&[], &[("FLANNELD_IP_MASQ", "maybe")]);
    assert_eq!(status, Some(2));
    assert!(stderr.contains("FLANNELD_IP_MASQ=\"maybe\""), "{stderr}");
}

/// Also row 18 of section 23.
#[test]
fn s02_row60_logs_go_to_standard_error_and_hold_no_password() {
    in_new_namespace(|| async {
        let node = Node::new();
        let mut agent = node.spawn(
            "http://root:hunter2@127.0.0.1:1",
            &["--etcd-username=u", "--etcd-password=hunter3", "--v=10"],
        );
        let log = node.file("log");
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        until(&mut agent, "it says what it lacks", || {
            said().contains("no network config")
        })
        .await;
        assert!(agent.end(Signal::SIGTERM).await.success());
        assert!(!said().contains("hunter"), "{}", said());
        assert_eq!(node.read("stdout"), "");
    });
}
