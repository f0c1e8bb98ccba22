//! The etcd lease source while members of the cluster die, hang and lose their quorum.

mod etcd_server;
mod namespace;

use std::time::{Duration, Instant};

use etcd_server::{
    CONFIG, Etcd, Events, acquire, network, node, options, silent_server, until, within,
};
use flannel_user::source::{LeaseSource, etcd::EtcdSource};

const CONFIG_KEY: &str = "/coreos.com/network/config";

/// What the issue grants the first new lease after an outage.
const RECOVERY: Duration = Duration::from_secs(2);

/// Puts a lease until the cluster takes it: that is the recovery. The time from then on
/// until the event is here.
async fn first_lease_after_recovery(etcd: &Etcd, events: &mut Events) -> Duration {
    until("a put", || async {
        let put = async {
            let mut client = etcd_client::Client::connect([etcd.url(0)], None).await?;
            let name = format!("{}/10.244.77.0-24", etcd_server::SUBNETS);
            client.put(name, node(77).to_json(), None).await
        };
        matches!(
            tokio::time::timeout(Duration::from_millis(500), put).await,
            Ok(Ok(_))
        )
    })
    .await;
    let begun = Instant::now();
    // What was under way before may come first.
    while events.put().await.1 != 77 {}
    begun.elapsed()
}

#[tokio::test]
async fn one_of_three_members_is_killed() {
    let mut etcd = Etcd::with(3, &[]).await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    // A subnet of its own choice could be one of those below.
    let previous = Some("10.244.1.0/24".parse().expect("a subnet"));
    let lease = source.acquire(&network(), &node(1), previous).await;
    let lease = lease.expect("a lease");
    assert_eq!(events.put().await.1, 1);
    // Whichever the source uses and whichever leads: each dies once.
    for member in 0..3 {
        etcd.kill(member);
        let begun = Instant::now();
        let number = 100 + u8::try_from(member).expect("small");
        until("a put", || async {
            let mut client = etcd.client().await;
            let name = format!("{}/10.244.{number}.0-24", etcd_server::SUBNETS);
            let put = client.put(name, node(number).to_json(), None);
            matches!(
                tokio::time::timeout(Duration::from_secs(1), put).await,
                Ok(Ok(_))
            )
        })
        .await;
        let put = Instant::now();
        while events.put().await.1 != number {}
        println!(
            "member {member} killed: first put after {:?}, event {:?} later",
            put - begun,
            put.elapsed()
        );
        assert!(put.elapsed() < RECOVERY, "{:?}", put.elapsed());
        source.renew(&lease).await.expect("renewed");
        etcd.restart(member);
        etcd.until_it_answers().await;
    }
}

/// The 60 s where long loops are asked for.
fn outage() -> Duration {
    let is_full = std::env::var_os("FLANNEL_TEST_FULL").is_some();
    Duration::from_secs(if is_full { 60 } else { 12 })
}

#[tokio::test]
async fn quorum_is_lost_and_comes_back() {
    let mut etcd = Etcd::with(3, &[]).await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    etcd.kill(1);
    etcd.kill(2);
    let before = cpu_time();
    let begun = Instant::now();
    events.expect_silence(outage()).await;
    let share = (cpu_time() - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!(
        "CPU while waiting: {:.2} % of a core (debug build)",
        share * 100.0
    );
    assert!(acquire(&source, &node(1)).await.is_err());
    etcd.restart(1);
    etcd.restart(2);
    let took = first_lease_after_recovery(&etcd, &mut events).await;
    println!("quorum back: first lease after {took:?}");
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test]
async fn everything_restarts_after_a_while() {
    let mut etcd = Etcd::with(3, &[]).await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    for member in 0..3 {
        etcd.kill(member);
    }
    events.expect_silence(Duration::from_secs(8)).await;
    for member in 0..3 {
        etcd.restart(member);
    }
    let took = first_lease_after_recovery(&etcd, &mut events).await;
    println!("cluster back: first lease after {took:?}");
    assert!(took < RECOVERY, "{took:?}");
}

/// Packets vanish without a word: TCP on the old connection would be silent for as long
/// again after the network is back.
#[test]
fn a_partition_heals() {
    namespace::in_new_namespace(|| async {
        let etcd = Etcd::start().await;
        let source = etcd.source();
        let mut events = Events::of(&source).await;
        events.snapshot().await;
        namespace::run("nft add table ip cut");
        namespace::run(
            "nft add chain ip cut in { type filter hook input priority 0 ; policy drop ; }",
        );
        events
            .expect_silence(outage() + Duration::from_secs(18))
            .await;
        namespace::run("nft delete table ip cut");
        let took = first_lease_after_recovery(&etcd, &mut events).await;
        println!("partition healed: first lease after {took:?}");
        assert!(took < RECOVERY, "{took:?}");
    });
}

#[tokio::test]
async fn a_frozen_server_thaws() {
    let etcd = Etcd::start().await;
    let source = etcd.source();
    let mut events = Events::of(&source).await;
    events.snapshot().await;
    etcd.freeze(0);
    events.expect_silence(Duration::from_secs(20)).await;
    etcd.thaw(0);
    let took = first_lease_after_recovery(&etcd, &mut events).await;
    println!("thawed: first lease after {took:?}");
    assert!(took < RECOVERY, "{took:?}");
}

#[tokio::test]
async fn a_frozen_member_is_left_for_one_that_answers() {
    let etcd = Etcd::with(3, &[]).await;
    let first = EtcdSource::new(&options(&etcd.urls())).expect("a source");
    let mut events = Events::of(&first).await;
    events.snapshot().await;
    // The search begins with the first one; that is the one in use.
    etcd.freeze(0);
    let mut others = etcd_client::Client::connect([etcd.url(1), etcd.url(2)], None)
        .await
        .expect("a client");
    let begun = Instant::now();
    until("a put", || {
        let mut client = others.clone();
        async move {
            let name = format!("{}/10.244.8.0-24", etcd_server::SUBNETS);
            let put = client.put(name, node(8).to_json(), None);
            matches!(
                tokio::time::timeout(Duration::from_secs(1), put).await,
                Ok(Ok(_))
            )
        }
    })
    .await;
    others.get("x", None).await.expect("a leader");
    within(Duration::from_secs(12), events.put()).await;
    println!("member frozen: event after {:?}", begun.elapsed());
    etcd.thaw(0);
}

#[tokio::test]
async fn a_hanging_endpoint_listed_first_costs_a_moment() {
    let etcd = Etcd::start().await;
    etcd.put(CONFIG_KEY, CONFIG).await;
    let (_silent, silent) = silent_server();
    let refusing = "http://127.0.0.1:1";
    let begun = Instant::now();
    let source = EtcdSource::new(&options(&format!("{silent},{refusing},{}", etcd.url(0))));
    let source = source.expect("a source");
    source.network_config().await.expect("read");
    println!(
        "config behind a hanging endpoint after {:?}",
        begun.elapsed()
    );
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    acquire(&source, &node(1)).await.expect("a lease");
}

#[tokio::test]
async fn when_nothing_answers_every_endpoint_is_named() {
    let (_silent, silent) = silent_server();
    let refusing = "http://127.0.0.1:1";
    let source = EtcdSource::new(&options(&format!("{silent},{refusing}"))).expect("a source");
    let begun = Instant::now();
    let error = source
        .network_config()
        .await
        .expect_err("nobody there")
        .to_string();
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        error.contains(&silent) && error.contains("does not answer"),
        "{error}"
    );
    assert!(
        error.contains(refusing) && error.contains("refused"),
        "{error}"
    );
    let begun = Instant::now();
    let source = EtcdSource::new(&options(refusing)).expect("a source");
    source.network_config().await.expect_err("nobody there");
    assert!(
        begun.elapsed() < Duration::from_millis(500),
        "refused at once: {:?}",
        begun.elapsed()
    );
}

/// Of this process; servers are others.
fn cpu_time() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD);
    let usage = usage.expect("usage");
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|time| {
            Duration::from_micros(
                u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0),
            )
        })
        .sum()
}
