//! Section 13: `subnet.env`, and what section 24 says of reading it back.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use flannel_user::subnet_file::{Previous, SubnetFile};
use nix::sys::signal::Signal;
use rstest::rstest;

use crate::{
    agent::{ADDRESS, Node, until},
    etcd_server::{Etcd, SUBNETS},
    namespace::{in_new_namespace, run},
};

const CONFIG_KEY: &str = "/coreos.com/network/config";

fn example() -> SubnetFile {
    SubnetFile {
        network: "10.42.0.0/16".parse().expect("a network"),
        subnet: "10.42.0.0/24".parse().expect("a network"),
        mtu: 1450,
        ip_masq: true,
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("there").permissions().mode() & 0o7777
}

#[test]
fn s13_row01_lines_order_and_ends() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("subnet.env");
    example().write(&path).expect("written");
    assert_eq!(
        std::fs::read(&path).expect("readable"),
        b"FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
}

#[test]
fn s13_row02_the_directory_is_made_and_modes_are_flannels() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("a/b/subnet.env");
    example().write(&path).expect("written");
    assert_eq!(mode(&directory.path().join("a/b")), 0o755);
    assert_eq!(mode(&path), 0o644);
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set");
    let before = path.metadata().expect("there").ino();
    example().write(&path).expect("written again");
    assert_eq!(mode(&path), 0o600, "an existing file keeps its mode");
    let after = path.metadata().expect("there").ino();
    assert_ne!(before, after, "replaced as a whole, not written into");
}

#[rstest]
#[case::row04_one("FLANNEL_SUBNET=10.244.1.1/24", Some("10.244.1.0/24"))]
#[case::row04_quotes_export_comment(
    "# x\nexport FLANNEL_SUBNET='10.244.1.1/24' # y",
    Some("10.244.1.0/24")
)]
#[case::row05_one_good_entry("FLANNEL_SUBNET=bad,10.244.1.1/24", Some("10.244.1.0/24"))]
#[case::row06_two_entries("FLANNEL_SUBNET=10.244.1.0/24,10.244.2.0/24", None)]
#[case::vector1("FLANNEL_SUBNET=10.244.1.0/24,not-a-cidr,10.244.2.0/24", None)]
#[case::vector2("FLANNEL_SUBNET=not-a-cidr", None)]
#[case::dual_stack_of_another_agent(
    "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    Some("10.42.0.0/24")
)]
fn s13_read_back(#[case] text: &str, #[case] subnet: Option<&str>) {
    let subnet = subnet.map(|subnet| subnet.parse().expect("a network"));
    assert_eq!(Previous::parse(text).subnet, subnet);
}

#[test]
fn s13_row03_written_at_start_whatever_the_umask_kept_at_the_end_and_read_back() {
    in_new_namespace(|| async {
        let etcd = Etcd::start().await;
        let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        etcd.put(CONFIG_KEY, config).await;
        let node = Node::new();
        let url = etcd.url(0).to_owned();
        let file = node.file("run/subnet.env");
        // The shell's umask is the agent's.
        let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let agent = node.start(&url, &["--ip-masq"]).await;
        nix::sys::stat::umask(old);
        assert_eq!(mode(&file), 0o644);
        let first = node.read("run/subnet.env");
        assert!(first.ends_with("\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"));
        assert!(agent.end(Signal::SIGTERM).await.success());
        assert_eq!(node.read("run/subnet.env"), first, "it stays");

        // Without its lease, the subnet of the file is taken again.
        let key = etcd.leases().await[0].key().to_vec();
        etcd.delete(std::str::from_utf8(&key).expect("text")).await;
        let agent = node.start(&url, &["--ip-masq"]).await;
        assert_eq!(node.read("run/subnet.env"), first);
        assert_eq!(etcd.leases().await[0].key(), key.as_slice());
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

/// A subnet file as the original left it, with its lease, device and entries: taken over as they
/// are.
#[test]
fn s13_row07_a_node_of_flannels_is_taken_over_as_it_is() {
    in_new_namespace(|| async {
        let etcd = Etcd::start().await;
        let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        etcd.put(CONFIG_KEY, config).await;
        let node = Node::new();
        std::fs::create_dir(node.file("run")).expect("made");
        let file = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";
        std::fs::write(node.file("run/subnet.env"), file).expect("written");
        let mac = "02:11:22:33:44:55";
        run(&format!(
            "ip link add flannel.1 address {mac} mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0 local {ADDRESS} dstport 8472 nolearning"
        ));
        run("ip addr add 10.244.7.0/32 dev flannel.1");
        run("ip link set flannel.1 up");
        let value = format!(
            r#"{{"PublicIP":"{ADDRESS}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        );
        etcd.put_lease("10.244.7.0-24", &value, 86_400).await;
        let before = run("ip -d link show dev flannel.1");
        let agent = node.start(etcd.url(0), &[]).await;
        assert_eq!(run("ip -d link show dev flannel.1"), before);
        assert_eq!(node.read("run/subnet.env"), file, "to the byte");
        let leases = etcd.leases().await;
        let name = format!("{SUBNETS}/10.244.7.0-24");
        assert_eq!(leases.len(), 1);
        assert_eq!(leases[0].key(), name.as_bytes());
        assert_eq!(leases[0].value(), value.as_bytes(), "to the byte");
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

#[test]
fn s13_row08_a_file_that_cannot_be_written_ends_nothing() {
    in_new_namespace(|| async {
        let etcd = Etcd::start().await;
        let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#;
        etcd.put(CONFIG_KEY, config).await;
        let node = Node::new();
        // A file where the directory should be.
        std::fs::write(node.file("run"), "").expect("written");
        let mut agent = node.spawn(etcd.url(0), &[]);
        let log = node.file("log");
        until(&mut agent, "it says so", || {
            std::fs::read_to_string(&log).is_ok_and(|log| log.contains("cannot write"))
        })
        .await;
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}
