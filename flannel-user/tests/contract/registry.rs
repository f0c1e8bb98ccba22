//! Sections 5 and 6 where `tests/etcd*.rs` do not ask: names, values, and the client itself.

use std::time::Duration;

use flannel_user::{
    lease::{LeaseAttributes, SubnetKey, VxlanData},
    source::{LeaseSource, SourceError, etcd::EtcdSource},
};
use nix::sys::signal::Signal;
use rstest::rstest;
use tokio::io::AsyncReadExt as _;

use crate::{
    agent::{Node, until},
    etcd_server::{CONFIG, Etcd, SUBNETS, node, options},
    namespace::in_new_namespace,
};

const CONFIG_KEY: &str = "/coreos.com/network/config";

#[rstest]
#[case::vector1("10.12.13.0-24", true)]
#[case::vector2("10.12.13.0-24&fd00:12:13::-56", true)]
#[case::vector3("/coreos.com/network/subnets/10.5.52.0-24", true)]
#[case::vector4("10", false)]
#[case::vector5("10.12.13.0", false)]
#[case::vector6("10.12.13-24", false)]
#[case::vector7("10.12.13.300-24", false)]
#[case::vector8("10.12.13.0-24hi", false)]
#[case::vector9("&2001::-56", false)]
#[case::vector10("10.12.13.0-24&:12:13:-56", false)]
#[case::vector11("10.12.13.0-24&20011::-56", false)]
#[case::vector12("10.12.13.0-24&2001-56", false)]
#[case::vector13("10.12.13.0-24&2001::", false)]
#[case::vector14("10.12.13.0-24&2001::-56hi", false)]
fn s24_row03_subnet_keys(#[case] text: &str, #[case] is_valid: bool) {
    let key = text.parse::<SubnetKey>();
    assert_eq!(key.is_ok(), is_valid, "{key:?}");
    if let Ok(key) = key {
        assert!(text.ends_with(&key.to_string()), "{key}");
    }
}

/// What each backend of this version publishes, to the byte.
#[test]
fn s05_row10_backend_data_of_each_backend() {
    let address = "10.0.0.4".parse().expect("an address");
    let data = VxlanData {
        vni: Some(4096),
        vtep_mac: "C6:D2:32:6F:8F:44".parse().expect("a MAC"),
    };
    assert_eq!(
        LeaseAttributes::vxlan(address, data).to_json(),
        r#"{"PublicIP":"10.0.0.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":4096,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#
    );
    assert_eq!(
        LeaseAttributes::plain(address).to_json(),
        r#"{"PublicIP":"10.0.0.4","PublicIPv6":null}"#
    );
}

/// Steps 7 and 11 of section 1: what cannot be run ends the start, what is badly written is
/// waited for.
#[rstest]
#[case::row11_backend_not_yet(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#, true)]
#[case::row11_unknown_backend(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlna"}}"#, true)]
#[case::row07_no_family(r#"{"Network":"10.244.0.0/16","EnableIPv4":false}"#, true)]
#[case::ipv6_not_yet(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#, true)]
#[case::row30_bad_range(r#"{"Network":"10.244.0.0/29","Backend":{"Type":"vxlan"}}"#, false)]
#[case::row30_broken("{", false)]
#[tokio::test]
async fn s03_a_config_error_ends_the_start_or_is_waited_for(
    #[case] config: &str,
    #[case] is_final: bool,
) {
    let etcd = Etcd::start().await;
    etcd.put(CONFIG_KEY, config).await;
    let error = etcd.source().network_config().await.expect_err("refused");
    assert_eq!(matches!(error, SourceError::Fatal(_)), is_final, "{error}");
    assert!(error.to_string().contains(CONFIG_KEY), "{error}");
}

#[test]
fn s03_row30_a_bad_config_is_read_again_each_second() {
    in_new_namespace(|| async {
        let etcd = Etcd::start().await;
        etcd.put(CONFIG_KEY, "{").await;
        let host = Node::new();
        let mut agent = host.spawn(etcd.url(0), &[]);
        let log = host.file("log");
        let says = |text: &str| std::fs::read_to_string(&log).is_ok_and(|log| log.contains(text));
        until(&mut agent, "it complains", || says("no network config")).await;
        etcd.put(CONFIG_KEY, CONFIG).await;
        let begun = std::time::Instant::now();
        let file = host.file("run/subnet.env");
        until(&mut agent, "a subnet", || file.exists()).await;
        // A second of the pause, and time to start on a busy machine.
        assert!(begun.elapsed() < Duration::from_secs(4));
        assert!(agent.end(Signal::SIGTERM).await.success());
    });
}

/// The first message of TLS says which versions the client takes.
#[tokio::test]
async fn s06_row12_tls_is_1_2_or_later() {
    let directory = tempfile::tempdir().expect("a directory");
    let [key, cert] = ["key.pem", "cert.pem"].map(|name| directory.path().join(name));
    let made = std::process::Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=c", "-keyout",
        ])
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()
        .expect("openssl cannot be run: `apt-get install openssl`");
    assert!(made.status.success());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let mut told = options(&format!("https://127.0.0.1:{port}"));
    (told.key_file, told.cert_file) = (Some(key), Some(cert));
    let source = EtcdSource::new(&told).expect("a source");
    let asking = tokio::spawn(async move { source.network_config().await.is_ok() });
    let (mut stream, _) = listener.accept().await.expect("a connection");
    let mut hello = vec![0; 5];
    stream.read_exact(&mut hello).await.expect("a record");
    assert_eq!(hello[0], 22, "a handshake");
    let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
    hello = vec![0; length];
    stream.read_exact(&mut hello).await.expect("a message");
    asking.abort();
    let versions = offered_versions(&hello);
    assert!(!versions.is_empty());
    assert!(versions.iter().all(|v| *v >= 0x0303), "{versions:x?}");
}

/// The extension `supported_versions` (43) of a `ClientHello`.
fn offered_versions(hello: &[u8]) -> Vec<u16> {
    let number = |at: usize| usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    // Header 4, version 2, random 32, then session id, cipher suites, compression methods.
    let mut at = 38;
    at += 1 + usize::from(hello[at]);
    at += 2 + number(at);
    at += 1 + usize::from(hello[at]);
    at += 2;
    while at + 4 <= hello.len() {
        let (kind, length) = (number(at), number(at + 2));
        let body = &hello[at + 4..at + 4 + length];
        if kind == 43 {
            let pairs = body[1..].chunks_exact(2);
            return pairs.map(|v| u16::from_be_bytes([v[0], v[1]])).collect();
        }
        at += 4 + length;
    }
    Vec::new()
}

/// Section 6.3, step 2: also by the address of another interface that is published.
#[tokio::test]
async fn s06_row21_the_own_lease_is_found_by_its_public_ip_whatever_its_age() {
    let etcd = Etcd::start().await;
    // No VNI, no PublicIPv6, unknown fields: as an old version or another tool wrote it.
    let old = r#"{"BackendData":{"VtepMAC":"02:00:00:00:00:01"},"Colour":1,"BackendType":"vxlan","PublicIP":"192.0.2.1"}"#;
    etcd.put_lease("10.244.9.0-24", old, 100).await;
    let config = CONFIG.parse().expect("a config");
    let lease = etcd.source().acquire(&config, &node(1), None).await;
    assert_eq!(lease.expect("own").key.to_string(), "10.244.9.0-24");
    let leases = etcd.leases().await;
    assert_eq!(leases.len(), 1);
    let name = format!("{SUBNETS}/10.244.9.0-24");
    assert_eq!(leases[0].key(), name.as_bytes());
    assert_eq!(leases[0].value(), node(1).to_json().as_bytes());
}
