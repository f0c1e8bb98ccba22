//! Firewall rules are kept: what other tools do to them is undone, and the blackhole route stays.

mod namespace;

use std::time::{Duration, Instant};

use flannel_user::firewall::{
    Firewall, Policy,
    iptables::{Iptables, Variant},
    nftables::Nftables,
    watch::{Resync, Watch},
};
use namespace::{in_new_namespace, run, try_run};

fn policy() -> Policy {
    Policy {
        network: "10.244.0.0/16".parse().expect("a network"),
        subnet: "10.244.1.0/24".parse().expect("a network"),
        masquerade: true,
        random_fully: true,
        forward: true,
    }
}

fn iptables(variant: Variant) -> Firewall {
    Firewall::Iptables(Iptables::with(variant, policy(), None))
}

fn nftables() -> Firewall {
    Firewall::Nftables(Nftables::new(policy(), None))
}

/// Long enough for no period to end.
const NEVER: Resync = Resync {
    period: Duration::from_secs(600),
    blackhole: None,
};

async fn until(what: &str, limit: Duration, reached: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < limit, "{what} took more than {limit:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}

#[test]
fn contract_23_8_what_another_tool_flushes_is_back_within_a_second() {
    in_new_namespace(|| async {
        for (mut firewall, probe) in [
            (
                iptables(Variant::Nft),
                "iptables-nft -t nat -S FLANNEL-POSTRTG",
            ),
            (nftables(), "nft list table ip flannel-ipv4"),
        ] {
            let watch = Watch::new(&firewall, NEVER);
            firewall.apply().await.expect("applied");
            let whole = run(probe);
            let keeper = tokio::spawn(watch.keep(firewall));
            tokio::time::sleep(Duration::from_millis(200)).await;
            run("nft flush ruleset");
            let back = || try_run(probe).is_ok_and(|text| text.len() == whole.len());
            let took = until("restoring", Duration::from_secs(1), back).await;
            println!("{probe}: back after {took:?}");
            keeper.abort();
            let _ = keeper.await;
            run("nft flush ruleset");
        }
    });
}

#[test]
fn contract_14_4_legacy_rules_are_back_after_a_period() {
    in_new_namespace(|| async {
        let mut firewall = iptables(Variant::Legacy);
        let watch = Watch::new(
            &firewall,
            Resync {
                period: Duration::from_secs(1),
                ..NEVER
            },
        );
        firewall.apply().await.expect("applied");
        let keeper = tokio::spawn(watch.keep(firewall));
        let listing = || run("iptables-legacy -w -t nat -S");
        let whole = listing();
        run("iptables-legacy -t nat -F");
        let back = || listing() == whole;
        until("restoring", Duration::from_secs(2), back).await;
        keeper.abort();
    });
}

#[test]
fn a_tool_that_fights_is_not_fought_in_a_tight_loop() {
    in_new_namespace(|| async {
        let mut firewall = nftables();
        let watch = Watch::new(&firewall, NEVER);
        firewall.apply().await.expect("applied");
        let keeper = tokio::spawn(watch.keep(firewall));
        let handle = || {
            let text = try_run("nft -a list chain ip flannel-ipv4 forward").unwrap_or_default();
            text.lines()
                .filter_map(|line| line.rsplit_once("handle ")?.1.parse::<u64>().ok())
                .max()
        };
        let end = Instant::now() + Duration::from_secs(8);
        let (mut repairs, mut last) = (0, handle());
        while Instant::now() < end {
            run("nft flush chain ip flannel-ipv4 forward");
            tokio::time::sleep(Duration::from_millis(50)).await;
            let now = handle();
            if now > last {
                repairs += 1;
            }
            last = last.max(now);
        }
        assert!((3..=9).contains(&repairs), "{repairs} repairs in 8 s");
        keeper.abort();
    });
}

#[test]
fn contract_2_the_blackhole_route_is_added_once_and_does_not_cut_off_pods() {
    in_new_namespace(|| async {
        run("ip link add cni0 type bridge");
        run("ip link set cni0 up");
        let resync = Resync {
            period: Duration::from_secs(1),
            blackhole: Some(policy().subnet),
        };
        let keeper = tokio::spawn(Watch::new(&Firewall::None, resync).keep(Firewall::None));
        let routes = || run("ip route show type blackhole");
        assert_eq!(routes(), "", "the first attempt is after one period");
        until("adding", Duration::from_secs(3), || {
            routes().starts_with("blackhole 10.244.1.0/24")
        })
        .await;
        run("ip addr add 10.244.1.1/24 dev cni0");
        assert!(run("ip route get 10.244.1.7").contains("dev cni0"));
        run("ip route flush type blackhole");
        run("ip route add blackhole 10.244.1.0/24 metric 5");
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(routes().lines().count(), 1, "somebody's is as good as ours");
        run("ip route flush type blackhole");
        until("adding", Duration::from_secs(3), || !routes().is_empty()).await;
        keeper.abort();
    });
}
