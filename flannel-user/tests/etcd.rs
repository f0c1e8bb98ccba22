//! The etcd lease source against a real etcd, by rows of the contract.

mod etcd_server;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use etcd_client::{CompactionOptions, LeaseTimeToLiveOptions};
use etcd_server::{
    CONFIG, Etcd, Events, SUBNETS, acquire, key, network, node, options, subnet_and_node, until,
    within,
};
use flannel_user::{
    lease::LeaseAttributes,
    source::{LeaseEvent, LeaseSource, SourceError, etcd::EtcdSource},
};

const DAY: i64 = 86_400;
const CONFIG_KEY: &str = "/coreos.com/network/config";

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

fn cause(result: Result<impl std::fmt::Debug, SourceError>) -> String {
    match result.expect_err("refused") {
        SourceError::Retry(cause) => format!("{cause:#}"),
        SourceError::Fatal(cause) => panic!("fatal: {cause:#}"),
    }
}

#[tokio::test]
async fn row_6_1_the_config_is_read_and_its_absence_explained() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let says = cause(source.network_config().await);
    assert!(says.contains(CONFIG_KEY) && says.contains("v3"), "{says}");
    etcd.put(CONFIG_KEY, "{").await;
    let says = cause(source.network_config().await);
    assert!(says.contains(CONFIG_KEY) && says.contains("JSON"), "{says}");
    etcd.put(CONFIG_KEY, CONFIG).await;
    assert_eq!(source.network_config().await.expect("good"), network());
    assert_eq!(
        source.describe(),
        format!("etcd {} /coreos.com/network", etcd.url(0))
    );
}

#[tokio::test]
async fn row_6_2_keys_values_and_leases_are_flannels_bytes() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let before = SystemTime::now();
    let lease = acquire(&source, &node(1)).await.expect("a lease");
    let kvs = etcd.leases().await;
    assert_eq!(kvs.len(), 1);
    assert_eq!(
        text(kvs[0].key()),
        format!("/coreos.com/network/subnets/{}", lease.key)
    );
    assert_eq!(
        text(kvs[0].value()),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#
    );
    assert_eq!(kvs[0].version(), 1);
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let mut client = etcd.client().await;
    let ttl = client.lease_time_to_live(kvs[0].lease(), Some(options));
    let ttl = ttl.await.expect("a lease");
    assert_eq!(ttl.granted_ttl(), DAY);
    assert_eq!(ttl.keys().len(), 1);
    let left = lease.expires.expect("it ends").duration_since(before);
    let left = left.expect("in future").as_secs();
    assert!((86_399..=86_401).contains(&left), "{left}");

    // Renewal: a new grant and a put; the old one runs out with no key attached.
    let renewed = source.renew(&lease).await.expect("renewed");
    assert_eq!(renewed.key, lease.key);
    let now = etcd.leases().await;
    assert_ne!(now[0].lease(), kvs[0].lease());
    assert_eq!((now[0].version(), now[0].value()), (2, kvs[0].value()));
    assert_eq!(client.leases().await.expect("leases").leases().len(), 2);
}

#[tokio::test]
async fn row_24_a_lease_without_backend() {
    let etcd = Etcd::start().await;
    let attributes = LeaseAttributes::plain([1, 2, 3, 4].into());
    acquire(&etcd.source(), &attributes).await.expect("a lease");
    let kvs = etcd.leases().await;
    assert_eq!(
        text(kvs[0].value()),
        r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#
    );
}

#[tokio::test]
async fn row_6_3_own_lease_then_previous_subnet_then_a_free_one() {
    let etcd = Etcd::start().await;
    let ours = node(1);
    etcd.put_lease(
        "10.244.7.0-24",
        r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#,
        100,
    )
    .await;
    let previous = Some("10.244.9.0/24".parse().expect("a subnet"));
    let first = etcd.source().acquire(&network(), &ours, previous).await;
    assert_eq!(first.expect("own").key, key("10.244.7.0-24"));
    assert_eq!(text(etcd.leases().await[0].value()), ours.to_json());

    let second = etcd.source().acquire(&network(), &node(2), previous).await;
    assert_eq!(second.expect("previous").key, key("10.244.9.0-24"));
    let third = etcd.source().acquire(&network(), &node(3), previous).await;
    let third = third.expect("a free one").key;
    assert!(third != key("10.244.9.0-24") && network().is_compatible(&third));
    assert_eq!(etcd.leases().await.len(), 3);
}

#[tokio::test]
async fn row_6_3_an_own_lease_that_does_not_fit_is_replaced() {
    let etcd = Etcd::start().await;
    etcd.put_lease("10.9.1.0-24", &node(1).to_json(), 100).await;
    let lease = acquire(&etcd.source(), &node(1)).await.expect("a lease");
    let kvs = etcd.leases().await;
    assert_eq!(kvs.len(), 1);
    assert!(text(kvs[0].key()).ends_with(&lease.key.to_string()));
    assert!(network().is_compatible(&lease.key));
}

#[tokio::test]
async fn row_6_3_no_subnet_left_is_fatal() {
    let etcd = Etcd::start().await;
    etcd.put_lease("10.244.0.0-16", &node(2).to_json(), 100)
        .await;
    let error = acquire(&etcd.source(), &node(1)).await.expect_err("full");
    assert!(matches!(error, SourceError::Fatal(_)), "{error}");
    assert!(error.to_string().contains("out of subnets"), "{error}");
    assert_eq!(etcd.leases().await.len(), 1);
}

#[tokio::test]
async fn row_6_5_a_reservation_stays_one() {
    let etcd = Etcd::start().await;
    let name = format!("{SUBNETS}/10.244.5.0-24");
    etcd.put(&name, r#"{"PublicIP":"192.0.2.1"}"#).await;
    let source = etcd.source();
    let lease = acquire(&source, &node(1)).await.expect("the reserved one");
    assert_eq!((lease.key, lease.expires), (key("10.244.5.0-24"), None));
    let kvs = etcd.leases().await;
    assert_eq!(
        (kvs[0].lease(), text(kvs[0].value())),
        (0, &*node(1).to_json())
    );
    let renewed = source.renew(&lease).await.expect("renewed");
    assert_eq!(renewed.expires, None);
    let again = etcd.leases().await;
    assert_eq!(
        (again[0].lease(), again[0].version()),
        (0, 2),
        "nothing to write"
    );
    let grants = etcd.client().await.leases().await.expect("leases");
    assert!(grants.leases().is_empty());
}

#[tokio::test]
async fn row_23_11_fifty_agents_at_once_get_fifty_subnets() {
    let etcd = Etcd::start().await;
    let begun = Instant::now();
    let agents: Vec<_> = (1..=50)
        .map(|number| {
            let source = etcd.source();
            tokio::spawn(async move { acquire(&source, &node(number)).await })
        })
        .collect();
    let mut subnets = BTreeSet::new();
    for agent in agents {
        let lease = agent.await.expect("no panic").expect("a lease");
        let is_clear = subnets
            .iter()
            .all(|other: &flannel_user::lease::SubnetKey| !other.overlaps(&lease.key.v4));
        assert!(is_clear, "{} overlaps", lease.key);
        subnets.insert(lease.key);
    }
    println!("50 leases in {:?}", begun.elapsed());
    assert_eq!((subnets.len(), etcd.leases().await.len()), (50, 50));
    // What lost a race was given back.
    let client = &etcd.client().await;
    until("50 etcd leases", || async move {
        client
            .clone()
            .leases()
            .await
            .expect("leases")
            .leases()
            .len()
            == 50
    })
    .await;
}

#[tokio::test]
async fn row_6_3_a_race_for_one_subnet_has_one_winner() {
    let etcd = Etcd::start().await;
    let narrow = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"SubnetMin":"10.244.3.0","SubnetMax":"10.244.3.0"}"#;
    let config = format!(
        r#"{},"Backend":{{"Type":"vxlan"}}}}"#,
        narrow.trim_end_matches('}')
    );
    let config = config.parse().expect("a config");
    let (first, second) = (etcd.source(), etcd.source());
    let (one, two) = (node(1), node(2));
    let (a, b) = tokio::join!(
        first.acquire(&config, &one, None),
        second.acquire(&config, &two, None)
    );
    assert_eq!(
        usize::from(a.is_ok()) + usize::from(b.is_ok()),
        1,
        "{a:?} {b:?}"
    );
    let loser = a.err().or(b.err()).expect("one");
    assert!(loser.to_string().contains("out of subnets"), "{loser}");
}

#[tokio::test]
async fn row_6_4_renewal_never_overwrites_another_nodes_claim() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let lease = acquire(&source, &node(1)).await.expect("a lease");
    etcd.put_lease(&lease.key.to_string(), &node(9).to_json(), 100)
        .await;
    let says = cause(source.renew(&lease).await);
    assert!(
        says.contains("192.0.2.9") && says.contains(&lease.key.v4.to_string()),
        "{says}"
    );
    assert_eq!(text(etcd.leases().await[0].value()), node(9).to_json());
}

#[tokio::test]
async fn row_6_4_changed_attributes_are_published_under_the_own_lease() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let mut lease = acquire(&source, &node(1)).await.expect("a lease");
    lease.attributes = node(2);
    let lease = source.renew(&lease).await.expect("renewed");
    assert_eq!(text(etcd.leases().await[0].value()), node(2).to_json());
    // A value that was destroyed names no other owner.
    etcd.put_lease(&lease.key.to_string(), "{", 100).await;
    source.renew(&lease).await.expect("repaired");
    assert_eq!(text(etcd.leases().await[0].value()), node(2).to_json());
}

#[tokio::test]
async fn row_6_4_a_removed_own_lease_is_told_and_taken_again() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let lease = acquire(&source, &node(1)).await.expect("a lease");
    let mut events = Events::of(&source).await;
    assert_eq!(events.snapshot().await, [subnet_and_node(&lease)]);
    etcd.delete(&format!("{SUBNETS}/{}", lease.key)).await;
    assert_eq!(events.removed().await, lease.key.to_string());
    let again = source.renew(&lease).await.expect("taken again");
    assert_eq!(again.key, lease.key);
    assert_eq!(events.put().await, subnet_and_node(&lease));

    etcd.delete(&format!("{SUBNETS}/{}", lease.key)).await;
    etcd.put_lease("10.244.0.0-16", &node(9).to_json(), 100)
        .await;
    let says = cause(source.renew(&lease).await);
    assert!(says.contains("overlaps 10.244.0.0/16"), "{says}");
    assert_eq!(etcd.leases().await.len(), 1);
}

#[tokio::test]
async fn row_6_6_a_snapshot_then_puts_deletes_and_expiries() {
    let etcd = Etcd::start().await;
    etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
        .await;
    let mut events = Events::of(&etcd.source()).await;
    assert_eq!(events.snapshot().await, [("10.244.2.0-24".to_owned(), 2)]);
    etcd.put_lease("10.244.3.0-24", &node(3).to_json(), 1).await;
    assert_eq!(events.put().await, ("10.244.3.0-24".to_owned(), 3));
    etcd.put_lease("10.244.2.0-24", &node(4).to_json(), 100)
        .await;
    assert_eq!(events.put().await, ("10.244.2.0-24".to_owned(), 4));
    etcd.delete(&format!("{SUBNETS}/10.244.2.0-24")).await;
    assert_eq!(events.removed().await, "10.244.2.0-24");
    assert_eq!(events.removed().await, "10.244.3.0-24", "it ran out");
}

#[tokio::test]
async fn row_6_6_a_put_arrives_in_milliseconds() {
    let etcd = Etcd::start().await;
    let mut events = Events::of(&etcd.source()).await;
    events.snapshot().await;
    let mut client = etcd.client().await;
    let mut times: Vec<Duration> = Vec::new();
    for subnet in 1..=100 {
        let name = format!("{SUBNETS}/10.244.{subnet}.0-24");
        client
            .put(name, node(2).to_json(), None)
            .await
            .expect("put");
        let begun = Instant::now();
        events.put().await;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    println!(
        "put answered → event: median {:?}, p99 {:?}",
        times[50], times[98]
    );
    assert!(times[50] < Duration::from_millis(50), "{times:?}");
}

#[tokio::test]
async fn row_23_3a_bad_keys_and_values_cost_no_peer() {
    let etcd = Etcd::start().await;
    etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
        .await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    for (name, value) in [
        ("junk", "x"),
        ("10.244.2.0-24", "{\"PublicIP\":"),
        ("10.244.2.0-24", ""),
        ("10.244.9.0-24", "not json"),
        ("10.244.2.0-99", "{}"),
    ] {
        etcd.put(&format!("{SUBNETS}/{name}"), value).await;
    }
    etcd.delete(&format!("{SUBNETS}/junk")).await;
    etcd.put_lease("10.244.3.0-24", &node(3).to_json(), 100)
        .await;
    assert_eq!(events.put().await, ("10.244.3.0-24".to_owned(), 3));
    // Bad values block their subnets for others all the same.
    let previous = Some("10.244.9.0/24".parse().expect("a subnet"));
    let lease = source.acquire(&network(), &node(1), previous).await;
    assert_ne!(lease.expect("another").key, key("10.244.9.0-24"));
}

#[tokio::test]
async fn row_6_6_a_mixed_registry_is_listed_row_by_row() {
    let etcd = Etcd::start().await;
    for (name, value) in [
        (
            "10.244.2.0-24",
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:02"}}"#,
        ),
        (
            "10.244.3.0-24",
            r#"{"PublicIP":"192.0.2.3","PublicIPv6":null,"BackendType":"host-gw"}"#,
        ),
        (
            "10.244.4.0-24&fd00:4::-64",
            r#"{"PublicIP":"192.0.2.4","PublicIPv6":"2001:db8::4","BackendType":"vxlan"}"#,
        ),
        ("garbage", "{}"),
        ("10.244.5.0-24", "{"),
    ] {
        etcd.put(&format!("{SUBNETS}/{name}"), value).await;
    }
    etcd.put(&format!("{SUBNETS}-old/10.244.6.0-24"), &node(6).to_json())
        .await;
    etcd.put("/coreos.com/network/other", "x").await;
    let mut events = Events::of(&etcd.source()).await;
    let names: Vec<u8> = events
        .snapshot()
        .await
        .iter()
        .map(|(_, node)| *node)
        .collect();
    assert_eq!(names, [2, 3, 4, 6]);
}

#[tokio::test]
async fn row_6_6_thousands_of_leases_come_in_one_snapshot() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    for subnet in 0..2500_u32 {
        let name = format!("{SUBNETS}/10.{}.{}.0-24", 100 + subnet / 256, subnet % 256);
        client
            .put(name, node(2).to_json(), None)
            .await
            .expect("put");
    }
    let begun = Instant::now();
    let mut events = Events::of(&etcd.source()).await;
    assert_eq!(events.snapshot().await.len(), 2500);
    println!("snapshot of 2500 leases in {:?}", begun.elapsed());
}

#[tokio::test]
async fn row_6_6_a_restart_of_etcd_loses_no_event() {
    let mut etcd = Etcd::start().await;
    etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
        .await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    etcd.kill(0);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let says = cause(acquire(&source, &node(1)).await);
    assert!(says.contains(etcd.url(0)), "{says}");
    etcd.restart(0);
    etcd.until_it_answers().await;
    etcd.put_lease("10.244.3.0-24", &node(3).to_json(), 100)
        .await;
    assert_eq!(
        events.put().await,
        ("10.244.3.0-24".to_owned(), 3),
        "no new snapshot"
    );
}

#[tokio::test]
async fn row_6_6_a_compaction_while_disconnected_means_a_new_snapshot() {
    let mut etcd = Etcd::start().await;
    etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
        .await;
    etcd.put_lease("10.244.4.0-24", &node(4).to_json(), 100)
        .await;
    // The source knows the server by a door that can be shut.
    let door = Door::open(etcd.url(0)).await;
    let source = EtcdSource::new(&options(&door.url)).expect("a source");
    let mut events = Events::of(&source).await;
    assert_eq!(events.snapshot().await.len(), 2);
    door.shut();
    etcd.delete(&format!("{SUBNETS}/10.244.2.0-24")).await;
    etcd.put(&format!("{SUBNETS}/10.244.4.0-24"), "broken")
        .await;
    etcd.put_lease("10.244.3.0-24", &node(3).to_json(), 100)
        .await;
    let mut client = etcd.client().await;
    let revision = client.get("x", None).await.expect("a read");
    let revision = revision.header().expect("a header").revision();
    let physical = CompactionOptions::new().with_physical();
    client
        .compact(revision, Some(physical))
        .await
        .expect("compacted");
    events.expect_silence(Duration::from_millis(300)).await;
    door.reopen();
    let both = [
        ("10.244.3.0-24".to_owned(), 3),
        ("10.244.4.0-24".to_owned(), 4),
    ];
    assert_eq!(events.snapshot().await, both, "and the last good value");
    etcd.put_lease("10.244.5.0-24", &node(5).to_json(), 100)
        .await;
    assert_eq!(events.put().await, ("10.244.5.0-24".to_owned(), 5));
    etcd.kill(0);
}

#[tokio::test]
async fn a_registry_that_was_set_back_is_listed_again() {
    let etcd = Etcd::start().await;
    for _ in 0..20 {
        etcd.put_lease("10.244.2.0-24", &node(2).to_json(), 100)
            .await;
    }
    let door = Door::open(etcd.url(0)).await;
    let source = EtcdSource::new(&options(&door.url)).expect("a source");
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    etcd.put_lease("10.244.2.0-24", &node(4).to_json(), 100)
        .await;
    events.put().await;
    door.shut();
    let other = Etcd::start().await;
    other
        .put_lease("10.244.3.0-24", &node(3).to_json(), 100)
        .await;
    door.lead_to(other.url(0));
    door.reopen();
    assert_eq!(events.snapshot().await, [("10.244.3.0-24".to_owned(), 3)]);
}

#[tokio::test]
async fn five_seconds_of_latency_are_waited_for() {
    let etcd = Etcd::start().await;
    etcd.put(CONFIG_KEY, CONFIG).await;
    let door = Door::open(etcd.url(0)).await;
    door.delay(Duration::from_secs(5));
    let source = EtcdSource::new(&options(&door.url)).expect("a source");
    within(Duration::from_secs(14), source.network_config())
        .await
        .expect("late but good");
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    etcd.put_lease("10.244.3.0-24", &node(3).to_json(), 100)
        .await;
    assert_eq!(events.put().await, ("10.244.3.0-24".to_owned(), 3));
}

#[tokio::test]
async fn the_watch_ends_with_its_receiver() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    assert_eq!(events.next().await, LeaseEvent::Snapshot(Vec::new()));
    drop(events);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    assert!(tasks < 12, "{tasks} tasks are left");
}

/// A way to a server that can be shut, slowed down, and led elsewhere.
struct Door {
    url: String,
    state: std::sync::Arc<std::sync::Mutex<DoorState>>,
    shut: tokio::sync::watch::Sender<bool>,
}

struct DoorState {
    to: String,
    delay: Duration,
}

impl Door {
    async fn open(to: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = DoorState {
            to: address(to),
            delay: Duration::ZERO,
        };
        let state = std::sync::Arc::new(std::sync::Mutex::new(state));
        let (shut, is_shut) = tokio::sync::watch::channel(false);
        let through = std::sync::Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut is_shut = is_shut.clone();
                if *is_shut.borrow() {
                    continue;
                }
                let (to, delay) = {
                    let state = through.lock().expect("no panic");
                    (state.to.clone(), state.delay)
                };
                tokio::spawn(async move {
                    let Ok(server) = tokio::net::TcpStream::connect(to).await else {
                        return;
                    };
                    let (from_client, to_client) = stream.into_split();
                    let (from_server, to_server) = server.into_split();
                    tokio::select! {
                        () = carry(from_client, to_server, Duration::ZERO) => {}
                        () = carry(from_server, to_client, delay) => {}
                        _ = is_shut.wait_for(|shut| *shut) => {}
                    }
                });
            }
        });
        Self { url, state, shut }
    }

    fn shut(&self) {
        self.shut.send_replace(true);
    }

    fn reopen(&self) {
        self.shut.send_replace(false);
    }

    fn lead_to(&self, url: &str) {
        self.state.lock().expect("no panic").to = address(url);
    }

    fn delay(&self, delay: Duration) {
        self.state.lock().expect("no panic").delay = delay;
    }
}

fn address(url: &str) -> String {
    url.trim_start_matches("http://").to_owned()
}

/// Carries bytes, each `delay` later than it came.
async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (sender, mut late) =
        tokio::sync::mpsc::unbounded_channel::<(tokio::time::Instant, Vec<u8>)>();
    let read = async move {
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let at = tokio::time::Instant::now() + delay;
            if sender.send((at, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, bytes)) = late.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}
