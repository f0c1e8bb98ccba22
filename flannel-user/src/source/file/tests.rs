use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    sync::Barrier,
    time::{SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;

use super::*;
use crate::lease::SubnetKey;

const TTL: Duration = Duration::from_secs(3600);
const CONFIG: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"alloc"}}"#;
/// Longer than a rescan: an event that inotify tells comes within milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

fn registry() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("config"), CONFIG).expect("written");
    directory
}

fn source(directory: &TempDir) -> FileSource {
    FileSource::new(directory.path().to_owned(), TTL).expect("usable")
}

fn node(number: u8) -> LeaseAttributes {
    LeaseAttributes::plain(Ipv4Addr::new(192, 168, 50, number))
}

fn key(text: &str) -> SubnetKey {
    text.parse().expect("a key")
}

fn lease_file(directory: &TempDir, key: &SubnetKey) -> std::path::PathBuf {
    directory.path().join("subnets").join(key.to_string())
}

fn expiry_file(directory: &TempDir, key: &SubnetKey) -> std::path::PathBuf {
    directory.path().join("expiry").join(key.to_string())
}

/// A lease of another node that ends `seconds` from now.
fn write_lease(directory: &TempDir, key: &SubnetKey, node: &LeaseAttributes, seconds: i64) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    let end = i64::try_from(now.as_secs()).expect("in range") + seconds;
    fs::create_dir_all(directory.path().join("expiry")).expect("made");
    fs::write(expiry_file(directory, key), format!("{end}\n")).expect("written");
    reserve(directory, key, node);
}

/// What an operator does with `echo`.
fn reserve(directory: &TempDir, key: &SubnetKey, node: &LeaseAttributes) {
    fs::create_dir_all(directory.path().join("subnets")).expect("made");
    let text = format!("{}\n", node.to_json());
    fs::write(lease_file(directory, key), text).expect("written");
}

async fn acquire(source: &FileSource, node: &LeaseAttributes, previous: Option<&str>) -> Lease {
    let config = source.network_config().await.expect("a config");
    let previous = previous.map(|text| text.parse().expect("a network"));
    source
        .acquire(&config, node, previous)
        .await
        .expect("a subnet")
}

async fn next(events: &mut mpsc::Receiver<LeaseEvent>) -> LeaseEvent {
    tokio::time::timeout(PATIENCE, events.recv())
        .await
        .expect("an event in time")
        .expect("the watch goes on")
}

async fn nothing_follows(events: &mut mpsc::Receiver<LeaseEvent>) {
    let event = tokio::time::timeout(Duration::from_millis(300), events.recv()).await;
    assert!(event.is_err(), "{event:?}");
}

fn says(error: &SourceError, texts: &[&str]) {
    let error = format!("{error}");
    for text in texts {
        assert!(error.contains(text), "{text:?} is missing in: {error}");
    }
}

#[test]
fn a_missing_directory_is_named_with_advice() {
    let error = FileSource::new("/nowhere/leases".into(), TTL).expect_err("missing");
    assert!(matches!(error, SourceError::Retry(_)));
    says(&error, &["/nowhere/leases", "--lease-dir"]);
    let error = FileSource::new("/dev/null".into(), TTL).expect_err("no directory");
    assert!(matches!(error, SourceError::Fatal(_)));
    says(&error, &["/dev/null is not a directory"]);
}

#[tokio::test]
async fn a_missing_or_bad_config_is_worth_another_try() {
    let directory = registry();
    let source = source(&directory);
    let path = directory.path().join("config");
    fs::write(&path, r#"{"Network":7}"#).expect("written");
    let error = source.network_config().await.expect_err("bad");
    assert!(matches!(error, SourceError::Retry(_)));
    says(&error, &[path.to_str().expect("UTF-8"), "Network is 7"]);
    fs::remove_file(&path).expect("removed");
    let error = source.network_config().await.expect_err("missing");
    assert!(matches!(error, SourceError::Retry(_)));
    says(&error, &[path.to_str().expect("UTF-8"), "write one"]);
    fs::write(&path, CONFIG).expect("written");
    source.network_config().await.expect("a config again");
}

#[tokio::test]
async fn a_lease_file_holds_flannels_bytes_and_nothing_else() {
    let directory = registry();
    let before = SystemTime::now();
    let lease = acquire(&source(&directory), &node(1), Some("10.3.9.0/24")).await;
    assert_eq!(lease.key, key("10.3.9.0-24"));
    assert_eq!(
        fs::read_to_string(lease_file(&directory, &lease.key)).expect("readable"),
        r#"{"PublicIP":"192.168.50.1","PublicIPv6":null}"#
    );
    let left = lease
        .expires
        .expect("an end")
        .duration_since(before)
        .expect("later");
    assert!((TTL - Duration::from_secs(1)..TTL + PATIENCE).contains(&left));
    let text = fs::read_to_string(expiry_file(&directory, &lease.key)).expect("readable");
    let expiry: f64 = text.trim().parse().expect("seconds");
    let end = lease.expires.expect("an end").duration_since(UNIX_EPOCH);
    assert!((expiry - end.expect("after 1970").as_secs_f64()).abs() < 0.001);
}

#[tokio::test]
async fn a_restarted_agent_gets_its_lease_again_with_new_attributes() {
    let directory = registry();
    let first = acquire(&source(&directory), &node(1), None).await;
    let mut attributes = node(1);
    attributes.backend_type = "vxlan".to_owned();
    let again = acquire(&source(&directory), &attributes, None).await;
    assert_eq!(again.key, first.key);
    let text = fs::read_to_string(lease_file(&directory, &first.key)).expect("readable");
    assert_eq!(text, attributes.to_json());
}

/// Threads with a source each: flock tells open files apart, not processes.
#[test]
fn fifty_agents_at_once_never_share_an_address() {
    const AGENTS: u8 = 50;
    let directory = registry();
    let start = Barrier::new(AGENTS.into());
    let leases: Vec<Lease> = std::thread::scope(|scope| {
        let agents: Vec<_> = (1..=AGENTS)
            .map(|number| {
                let (start, directory) = (&start, &directory);
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .expect("a runtime");
                    let source = source(directory);
                    // Subnets of two sizes overlap without having the same name, which
                    // only the lock can prevent.
                    let len = 24 + 2 * (number % 2);
                    let config = format!(
                        r#"{{"Network":"10.3.0.0/16","SubnetLen":{len},"SubnetMax":"10.3.63.0","Backend":{{"Type":"alloc"}}}}"#
                    );
                    let config = config.parse().expect("valid");
                    let previous = Some("10.3.9.0/24".parse().expect("a network"));
                    start.wait();
                    let attributes = node(number);
                    let lease = source.acquire(&config, &attributes, previous);
                    runtime.block_on(lease).expect("a subnet")
                })
            })
            .collect();
        let agents = agents.into_iter();
        agents.map(|agent| agent.join().expect("a lease")).collect()
    });
    for (i, a) in leases.iter().enumerate() {
        for b in &leases[i + 1..] {
            assert!(!a.key.overlaps(&b.key.v4), "{} and {}", a.key, b.key);
        }
        let text = fs::read_to_string(lease_file(&directory, &a.key)).expect("readable");
        assert_eq!(text, a.attributes.to_json(), "the file is the owner's");
    }
    let files = |sub: &str| {
        fs::read_dir(directory.path().join(sub))
            .expect("readable")
            .count()
    };
    assert_eq!(files("subnets"), usize::from(AGENTS));
    assert_eq!(files("expiry"), usize::from(AGENTS));
}

/// The second line of defence: a claim fails when the name exists, lock or no lock.
#[test]
fn of_two_claims_of_a_subnet_one_succeeds() {
    let directory = registry();
    let files = Directory::new(directory.path().to_owned());
    files.prepare().expect("made");
    let locked = files.lock().expect("free");
    let subnet = key("10.3.9.0-24");
    let end = SystemTime::now() + TTL;
    assert!(locked.create(&subnet, &node(1), end).expect("written"));
    assert!(!locked.create(&subnet, &node(2), end).expect("refused"));
    let text = fs::read_to_string(lease_file(&directory, &subnet)).expect("readable");
    assert_eq!(text, node(1).to_json());
}

#[tokio::test]
async fn a_reservation_is_found_by_public_ip_and_stays_one() {
    let directory = registry();
    reserve(&directory, &key("10.3.77.0-24"), &node(1));
    let source = source(&directory);
    let lease = acquire(&source, &node(1), Some("10.3.9.0/24")).await;
    assert_eq!((lease.key, lease.expires), (key("10.3.77.0-24"), None));
    assert_eq!(source.renew(&lease).await.expect("renewed").expires, None);
    assert!(!expiry_file(&directory, &lease.key).exists());
}

#[tokio::test]
async fn what_is_taken_damaged_or_reserved_is_not_handed_out_and_expired_is() {
    let directory = registry();
    let small = r#"{"Network":"10.3.0.0/24","SubnetMin":"10.3.0.0","Backend":{"Type":"alloc"}}"#;
    fs::write(directory.path().join("config"), small).expect("written");
    reserve(&directory, &key("10.3.0.0-26"), &node(7));
    write_lease(&directory, &key("10.3.0.64-26"), &node(8), 600);
    write_lease(&directory, &key("10.3.0.128-26"), &node(9), -5);
    write_lease(&directory, &key("10.3.0.192-26"), &node(10), 600);
    fs::write(lease_file(&directory, &key("10.3.0.192-26")), "{\"Publ").expect("written");

    let first = acquire(&source(&directory), &node(1), None).await;
    assert_eq!(first.key, key("10.3.0.128-26"));
    let source = source(&directory);
    let config = source.network_config().await.expect("a config");
    let error = source.acquire(&config, &node(2), None).await;
    let error = error.expect_err("full");
    assert!(matches!(error, SourceError::Fatal(_)));
    says(&error, &["out of subnets", "10.3.0.0"]);
}

#[tokio::test]
async fn a_lease_that_does_not_fit_any_more_is_replaced() {
    let directory = registry();
    write_lease(&directory, &key("10.4.1.0-24"), &node(1), 600);
    let lease = acquire(&source(&directory), &node(1), None).await;
    assert_ne!(lease.key, key("10.4.1.0-24"));
    assert!(!lease_file(&directory, &key("10.4.1.0-24")).exists());
    assert!(!expiry_file(&directory, &key("10.4.1.0-24")).exists());
}

#[tokio::test]
async fn renewing_moves_the_end_and_publishes_changes() {
    let directory = registry();
    let source = source(&directory);
    let mut lease = acquire(&source, &node(1), None).await;
    write_lease(&directory, &lease.key, &node(1), 60);
    lease.attributes.backend_type = "vxlan".to_owned();
    let renewed = source.renew(&lease).await.expect("renewed");
    let left = renewed
        .expires
        .expect("an end")
        .duration_since(SystemTime::now());
    assert!(left.expect("later") > TTL - Duration::from_secs(5));
    let text = fs::read_to_string(lease_file(&directory, &lease.key)).expect("readable");
    assert_eq!(text, lease.attributes.to_json());
}

#[tokio::test]
async fn a_changed_public_ip_is_published_under_the_same_lease() {
    let directory = registry();
    let source = source(&directory);
    let mut lease = acquire(&source, &node(1), None).await;
    lease.attributes = node(2);
    let renewed = source.renew(&lease).await.expect("still ours");
    assert_eq!(renewed.attributes, node(2));
    let text = fs::read_to_string(lease_file(&directory, &lease.key)).expect("readable");
    assert_eq!(text, node(2).to_json());
}

#[tokio::test]
async fn a_subnet_that_another_node_holds_is_left_to_it() {
    let directory = registry();
    let source = source(&directory);
    let lease = acquire(&source, &node(1), None).await;
    reserve(&directory, &lease.key, &node(2));
    let error = source.renew(&lease).await.expect_err("taken");
    assert!(matches!(error, SourceError::Retry(_)));
    says(
        &error,
        &["192.168.50.2", "192.168.50.1", &lease.key.to_string()],
    );
    let text = fs::read_to_string(lease_file(&directory, &lease.key)).expect("readable");
    assert_eq!(text.trim(), node(2).to_json());
}

#[tokio::test]
async fn a_removed_lease_is_taken_again_if_it_is_free() {
    let directory = registry();
    let source = source(&directory);
    let lease = acquire(&source, &node(1), Some("10.3.8.0/24")).await;
    fs::remove_file(lease_file(&directory, &lease.key)).expect("removed");
    let renewed = source.renew(&lease).await.expect("free");
    assert_eq!(renewed.key, lease.key);
    assert!(lease_file(&directory, &lease.key).exists());
    fs::remove_file(lease_file(&directory, &lease.key)).expect("removed");
    reserve(&directory, &key("10.3.8.0-23"), &node(2));
    let error = source.renew(&lease).await.expect_err("overlapped");
    says(&error, &["192.168.50.2", "10.3.8.0-23"]);
}

#[tokio::test]
async fn the_own_damaged_lease_is_written_again_at_renewal() {
    let directory = registry();
    let source = source(&directory);
    let lease = acquire(&source, &node(1), None).await;
    let path = lease_file(&directory, &lease.key);
    fs::write(&path, "{").expect("written");
    source.renew(&lease).await.expect("renewed");
    assert_eq!(
        fs::read_to_string(&path).expect("readable"),
        node(1).to_json()
    );
}

#[tokio::test]
async fn a_watch_begins_with_a_snapshot_and_tells_every_change() {
    let directory = registry();
    let own = source(&directory);
    let lease = acquire(&own, &node(1), None).await;
    let mut events = own.watch().await.expect("watching");
    assert_eq!(
        next(&mut events).await,
        LeaseEvent::Snapshot(vec![lease.clone()])
    );

    let other = source(&directory);
    let mut peer = acquire(&other, &node(2), None).await;
    assert_eq!(next(&mut events).await, LeaseEvent::Put(peer.clone()));
    peer.attributes.backend_type = "host-gw".to_owned();
    let peer = other.renew(&peer).await.expect("renewed");
    // Expiry and attributes are two files; the last event has both.
    while next(&mut events).await != LeaseEvent::Put(peer.clone()) {}
    fs::remove_file(lease_file(&directory, &peer.key)).expect("removed");
    assert_eq!(next(&mut events).await, LeaseEvent::Removed(peer.key));
    nothing_follows(&mut events).await;
    let expiry = expiry_file(&directory, &peer.key);
    assert!(!expiry.exists(), "an expiry without a lease is tidied away");
}

#[tokio::test]
async fn expired_leases_are_removed_and_reported_but_not_the_own() {
    let directory = registry();
    let own = FileSource::new(directory.path().to_owned(), Duration::from_millis(200));
    let own = own.expect("usable");
    let lease = acquire(&own, &node(1), Some("10.3.9.0/24")).await;
    write_lease(&directory, &key("10.3.20.0-24"), &node(2), 1);
    reserve(&directory, &key("10.3.30.0-24"), &node(3));
    let mut events = own.watch().await.expect("watching");
    let LeaseEvent::Snapshot(leases) = next(&mut events).await else {
        panic!("a snapshot comes first");
    };
    assert_eq!(leases.len(), 3);
    assert_eq!(
        next(&mut events).await,
        LeaseEvent::Removed(key("10.3.20.0-24"))
    );
    nothing_follows(&mut events).await;
    assert!(!lease_file(&directory, &key("10.3.20.0-24")).exists());
    assert!(lease_file(&directory, &key("10.3.30.0-24")).exists());
    assert!(lease_file(&directory, &lease.key).exists());
}

#[tokio::test]
async fn a_damaged_file_costs_no_peer() {
    let directory = registry();
    write_lease(&directory, &key("10.3.20.0-24"), &node(2), 600);
    fs::write(directory.path().join("subnets/README"), "hello").expect("written");
    fs::write(directory.path().join("subnets/10.3.20.1-24"), "{}").expect("written");
    let own = source(&directory);
    let mut events = own.watch().await.expect("watching");
    let LeaseEvent::Snapshot(leases) = next(&mut events).await else {
        panic!("a snapshot comes first");
    };
    assert_eq!(leases.len(), 1, "foreign files are no leases");

    let path = lease_file(&directory, &key("10.3.20.0-24"));
    let text = fs::read(&path).expect("readable");
    for torn in [&text[..text.len() / 2], b"", b"\xff\xfe"] {
        fs::write(&path, torn).expect("written");
        nothing_follows(&mut events).await;
    }
    fs::write(expiry_file(&directory, &key("10.3.20.0-24")), "soon").expect("written");
    nothing_follows(&mut events).await;
    // A good neighbour is seen beside it, and the file itself once it is whole again.
    reserve(&directory, &key("10.3.30.0-24"), &node(3));
    assert!(
        matches!(next(&mut events).await, LeaseEvent::Put(lease) if lease.key == key("10.3.30.0-24"))
    );
    reserve(&directory, &key("10.3.20.0-24"), &node(4));
    assert!(
        matches!(next(&mut events).await, LeaseEvent::Put(lease) if lease.attributes == node(4))
    );
    fs::remove_file(&path).expect("removed");
    assert_eq!(
        next(&mut events).await,
        LeaseEvent::Removed(key("10.3.20.0-24"))
    );
}

#[test]
fn each_fault_is_complained_of_once() {
    let directory = registry();
    reserve(&directory, &key("10.3.20.0-24"), &node(2));
    let path = lease_file(&directory, &key("10.3.20.0-24"));
    let shared = source(&directory).0;
    shared.directory.prepare().expect("made");
    let mut follower = watch::Follower::new(shared);
    let scan = |follower: &mut watch::Follower| {
        let log = Log::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(log.clone())
            .with_ansi(false)
            .finish();
        tracing::subscriber::with_default(subscriber, || follower.scan()).expect("readable");
        let bytes = log.0.lock().expect("whole").clone();
        String::from_utf8(bytes).expect("UTF-8")
    };
    assert_eq!(scan(&mut follower), "");
    fs::write(&path, "{\"PublicIP\"").expect("written");
    let said = scan(&mut follower);
    assert!(said.contains(path.to_str().expect("UTF-8")), "{said}");
    assert!(said.contains("line 1 column 11"), "{said}");
    assert_eq!(scan(&mut follower), "");
    reserve(&directory, &key("10.3.20.0-24"), &node(2));
    assert!(scan(&mut follower).contains("readable again"));
    assert_eq!(scan(&mut follower), "");
}

#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("whole").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn a_vanished_directory_costs_no_peer() {
    let directory = registry();
    reserve(&directory, &key("10.3.20.0-24"), &node(2));
    let own = source(&directory);
    let mut events = own.watch().await.expect("watching");
    assert!(matches!(next(&mut events).await, LeaseEvent::Snapshot(_)));
    let away = directory.path().with_extension("away");
    fs::rename(directory.path().join("subnets"), &away).expect("moved");
    // A peer joins meanwhile, which wakes the watch, and nobody may be removed for it.
    fs::write(away.join("10.3.30.0-24"), node(3).to_json()).expect("written");
    nothing_follows(&mut events).await;
    fs::rename(away, directory.path().join("subnets")).expect("moved back");
    let event = next(&mut events).await;
    assert!(
        matches!(&event, LeaseEvent::Put(lease) if lease.key == key("10.3.30.0-24")),
        "{event:?}"
    );
}

#[tokio::test]
async fn a_crash_leaves_nothing_behind_for_long() {
    let directory = registry();
    let orphan = key("10.3.40.0-24");
    write_lease(&directory, &orphan, &node(9), -5);
    fs::remove_file(lease_file(&directory, &orphan)).expect("removed");
    let rest = directory.path().join("subnets/.new-abc");
    fs::write(&rest, "{").expect("written");
    acquire(&source(&directory), &node(1), Some("10.3.9.0/24")).await;
    assert!(!rest.exists());
    assert!(!expiry_file(&directory, &orphan).exists());
    let names: BTreeSet<_> = fs::read_dir(directory.path().join("subnets"))
        .expect("readable")
        .map(|file| file.expect("readable").file_name())
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
}
