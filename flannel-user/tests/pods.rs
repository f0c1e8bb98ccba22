//! Pods and kernel events against the real kernel, each test in namespaces of its own.

mod namespace;

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use flannel_user::datapath::{
    kernel_events::{KernelEvent, listen, next_batch},
    netlink::rtnl::Rtnl,
    pods::{Discovery, discover},
};
use ipnet::Ipv4Net;
use namespace::{Elsewhere, batch, in_new_namespace, run};

fn subnet() -> Ipv4Net {
    "10.244.1.0/24".parse().expect("a subnet")
}

fn bridge() {
    run("ip link add cni0 address 02:00:00:00:00:01 type bridge");
    run("ip addr add 10.244.1.1/24 dev cni0");
    run("ip link set cni0 up");
}

/// A pod namespace with `eth0` in it, whose host end is `name`.
fn pod(name: &str, address: &str, mac: &str) -> Elsewhere {
    let pod = Elsewhere::new();
    let pid = pod.pid();
    run(&format!(
        "ip link add {name} mtu 1450 type veth peer name eth0 address {mac} netns {pid}"
    ));
    run(&format!("ip link set {name} up"));
    pod.run("ip link set eth0 up");
    pod.run(&format!("ip addr add {address} dev eth0"));
    pod
}

async fn look() -> Discovery {
    let mut rtnl = Rtnl::open().expect("a socket");
    discover(&mut rtnl, subnet()).await.expect("a discovery")
}

fn text(discovery: &Discovery) -> Vec<String> {
    discovery
        .pods
        .iter()
        .map(|pod| {
            format!(
                "{} {} {} via {} mtu {}",
                pod.address, pod.interface, pod.mac, pod.gateway_mac, pod.mtu
            )
        })
        .collect()
}

#[test]
fn pods_on_a_bridge_and_routed_ones_are_found() {
    in_new_namespace(|| async {
        bridge();
        let _bridged = pod("vetha", "10.244.1.5/24", "02:00:00:00:00:05");
        run("ip link set vetha master cni0");
        let routed = pod("vethb", "10.244.1.6/32", "02:00:00:00:00:06");
        routed.run("ip addr add 10.244.1.66/32 dev eth0"); // has it, but no route leads there
        run("ip link set vethb address 02:00:00:00:00:0b");
        run("ip route add 10.244.1.6/32 dev vethb");
        let _neither = pod("vethc", "10.244.1.7/24", "02:00:00:00:00:07");
        // Both ends on this host: no pod.
        run("ip link add here type veth peer name there");
        run("ip link set here master cni0");
        run("ip addr add 10.244.1.8/32 dev there");

        let found = look().await;
        assert_eq!(
            text(&found),
            [
                "10.244.1.5 vetha 02:00:00:00:00:05 via 02:00:00:00:00:01 mtu 1450",
                "10.244.1.6 vethb 02:00:00:00:00:06 via 02:00:00:00:00:0b mtu 1450",
            ]
        );
        assert_eq!(found.ambiguous, []);
    });
}

#[test]
fn an_address_of_two_pods_is_left_out() {
    in_new_namespace(|| async {
        bridge();
        let _one = pod("vetha", "10.244.1.5/24", "02:00:00:00:00:05");
        let two = pod("vethb", "10.244.1.5/24", "02:00:00:00:00:06");
        two.run("ip addr add 10.244.1.6/24 dev eth0");
        run("ip link set vetha master cni0");
        run("ip link set vethb master cni0");
        let found = look().await;
        assert_eq!(text(&found).len(), 1);
        assert_eq!(found.pods[0].address, Ipv4Addr::new(10, 244, 1, 6));
        assert_eq!(found.ambiguous.len(), 1);
        assert_eq!(found.ambiguous[0].address, Ipv4Addr::new(10, 244, 1, 5));
        assert_eq!(found.ambiguous[0].interfaces, ["vetha", "vethb"]);
    });
}

#[test]
fn a_pod_may_vanish_at_any_moment() {
    in_new_namespace(|| async {
        bridge();
        let stays = pod("vetha", "10.244.1.5/24", "02:00:00:00:00:05");
        run("ip link set vetha master cni0");
        for round in 0..20 {
            // A name of its own: the host's end goes some time after the namespace.
            let name = format!("vethb{round}");
            let goes = pod(&name, "10.244.1.6/24", "02:00:00:00:00:06");
            run(&format!("ip link set {name} master cni0"));
            let vanish = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(200 * round));
                drop(goes);
            });
            let end = Instant::now() + Duration::from_secs(10);
            loop {
                let found = look().await;
                assert_eq!(found.pods[0].address, Ipv4Addr::new(10, 244, 1, 5));
                if found.pods.len() == 1 {
                    break;
                }
                assert!(Instant::now() < end, "the pod is still there: {found:?}");
            }
            vanish.join().expect("it ends");
        }
        drop(stays);
    });
}

#[test]
fn two_hundred_pods_are_found_quickly() {
    in_new_namespace(|| async {
        bridge();
        let pods: Vec<_> = (2..202).map(|number| (number, Elsewhere::new())).collect();
        let mut links = String::new();
        for (number, pod) in &pods {
            links += &format!(
                "link add veth{number} type veth peer name eth0 netns {}\nlink set veth{number} master cni0 up\n",
                pod.pid()
            );
        }
        batch("ip", &links);
        for (number, pod) in &pods {
            pod.run(&format!("ip addr add 10.244.1.{number}/24 dev eth0"));
        }
        let begin = Instant::now();
        let found = look().await;
        let took = begin.elapsed();
        assert_eq!(found.pods.len(), 200);
        eprintln!("200 pods found in {took:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
    });
}

/// Collects until `wanted` is among the events, at most 5 s.
async fn until(
    events: &mut tokio::sync::mpsc::Receiver<KernelEvent>,
    wanted: impl Fn(&KernelEvent) -> bool,
) {
    let mut seen = Vec::new();
    let found = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            let batch = next_batch(events, Duration::from_millis(2))
                .await
                .expect("the listener lives");
            let hit = batch.iter().any(&wanted);
            seen.extend(batch);
            if hit {
                break;
            }
        }
    });
    assert!(found.await.is_ok(), "no such event among {seen:?}");
}

#[test]
fn events_come_from_here_and_from_inside_pods() {
    in_new_namespace(|| async {
        bridge();
        let mut events = listen(None, |_| true).expect("a listener");
        let pod = pod("vetha", "10.244.1.5/24", "02:00:00:00:00:05");
        until(&mut events, |event| {
            matches!(event, KernelEvent::Links { origin, removed: false, .. } if origin.namespace.is_none())
        })
        .await;
        pod.run("ip addr add 10.244.1.6/24 dev eth0");
        until(&mut events, |event| {
            matches!(event, KernelEvent::Addresses { origin, removed: false, .. } if origin.namespace.is_some())
        })
        .await;
        pod.run("ip link set eth0 address 02:00:00:00:00:77");
        until(&mut events, |event| {
            matches!(event, KernelEvent::Links { origin, .. } if origin.namespace.is_some())
        })
        .await;
        run("ip route add 10.9.0.0/16 via 10.244.1.9 dev cni0 onlink");
        until(&mut events, |event| {
            matches!(event, KernelEvent::Routes { index: Some(_), table: 254, removed: false, origin } if origin.namespace.is_none())
        })
        .await;
        run("ip neigh add 10.244.1.9 lladdr 02:00:00:00:00:09 dev cni0 nud permanent");
        until(&mut events, |event| {
            matches!(
                event,
                KernelEvent::Neighbours {
                    fdb: false,
                    removed: false,
                    ..
                }
            )
        })
        .await;
        run("ip link set vetha master cni0");
        until(&mut events, |event| {
            matches!(
                event,
                KernelEvent::Neighbours {
                    fdb: true,
                    removed: false,
                    ..
                }
            )
        })
        .await;
        run("ip link delete vetha");
        until(&mut events, |event| {
            matches!(event, KernelEvent::Links { origin, removed: true, .. } if origin.namespace.is_none())
        })
        .await;
    });
}

#[test]
fn refused_events_wake_nobody_and_lost_ones_are_reported() {
    in_new_namespace(|| async {
        bridge();
        let mut quiet = listen(None, |event| {
            !matches!(event, KernelEvent::Neighbours { .. })
        })
        .expect("a listener");
        let mut all = listen(None, |_| true).expect("a listener");
        let noise: String = (0..60_000)
            .map(|number: u32| {
                format!(
                    "neigh replace 10.244.{}.{} lladdr 02:00:00:00:00:09 dev cni0 nud permanent\n",
                    number % 60_000 / 250 % 250,
                    number % 250 + 1
                )
            })
            .collect();
        batch("ip", &noise); // nobody reads meanwhile: this runtime has one thread
        until(&mut all, |event| *event == KernelEvent::Overrun).await;
        // The same flood overran the socket of the other listener, which says so and nothing else.
        while let Ok(Some(event)) =
            tokio::time::timeout(Duration::from_millis(200), quiet.recv()).await
        {
            assert_eq!(event, KernelEvent::Overrun);
        }
        run("ip link set cni0 mtu 1400");
        until(&mut quiet, |event| {
            matches!(event, KernelEvent::Links { .. })
        })
        .await;
    });
}
