//! The kernel datapath against the real kernel, each test in a network namespace of its own.

mod namespace;
mod tunnel;

use std::time::Duration;

use flannel_user::{
    datapath::{
        kernel_events::{KernelEvent, Origin, listen},
        netlink::{DeviceError, DeviceSpec, NetlinkDatapath, PassError},
    },
    mac::MacAddr,
};
use namespace::{in_new_namespace, lines, run};
use tokio::sync::mpsc::Receiver;
use tunnel::{PEERS, assert_peers_are_programmed, index_of, news, settle, start, table, uplink};

#[test]
fn the_device_is_made_as_flannel_makes_it() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        let (_, device) = start(&spec).await;
        assert!(device.created);
        assert_eq!(device.mtu, 1450);
        assert_eq!(device.mac.0[0] & 3, 2, "local unicast");

        let text = run("ip -d link show dev flannel.1");
        for part in [
            "flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue",
            &format!("link/ether {} ", device.mac),
            "vxlan id 1 local 192.168.50.1 dev eth0 ",
            "dstport 8472 nolearning",
            "ttl auto ",
            " udpcsum ",
            "noudp6zerocsumtx noudp6zerocsumrx",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(
            !text.contains("qlen"),
            "queue length 0 is not shown:\n{text}"
        );
        assert!(!text.contains("gbp"), "{text}");
        let address = run("ip -o -4 addr show dev flannel.1");
        assert!(
            address.contains("inet 10.244.0.0/32 scope global flannel.1"),
            "{address}"
        );
        assert_eq!(lines(&run("ip route show dev flannel.1")), [""; 0]);
        // /proc/sys/net shows the namespace of the thread that opens it.
        let accept = std::fs::read_to_string("/proc/sys/net/ipv6/conf/flannel.1/accept_ra")
            .expect("the sysctl");
        assert_eq!(accept.trim(), "0");
    });
}

#[test]
fn port_gbp_learning_and_mac_are_passed_on_and_the_kernel_caps_the_mtu() {
    in_new_namespace(|| async {
        let mac = MacAddr([2, 0xaa, 0, 0, 0, 1]);
        let spec = DeviceSpec {
            vni: 4096,
            port: Some(4789),
            gbp: true,
            learning: true,
            mac: Some(mac),
            mtu: 8950,
            ..uplink(1500)
        };
        let (_, device) = start(&spec).await;
        assert_eq!(
            (device.mac, device.mtu),
            (mac, 1450),
            "the real MTU is reported"
        );
        let text = run("ip -d link show dev flannel.4096");
        for part in [
            "vxlan id 4096 ",
            "dstport 4789 ",
            " gbp",
            "02:aa:00:00:00:01",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(!text.contains("nolearning"), "{text}");
    });
}

#[test]
fn a_restart_takes_the_device_and_its_entries_over() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        let (mut first, made) = start(&spec).await;
        settle(&mut first, &table(PEERS)).await;
        drop(first);

        let other_mac = DeviceSpec {
            mac: Some(MacAddr([2, 9, 9, 9, 9, 9])),
            ..spec
        };
        let (mut second, taken) = start(&other_mac).await;
        assert!(!taken.created);
        assert_eq!((taken.index, taken.mac), (made.index, made.mac));
        let pass = second.reconcile(&table(PEERS)).await;
        assert!(pass.is_quiet(), "{pass:?}");
        assert_peers_are_programmed(PEERS);
    });
}

#[test]
fn the_mtu_of_a_device_taken_over_is_kept_even_when_it_has_to_be_made_anew() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        run(
            "ip link add flannel.1 mtu 1400 type vxlan id 1 dstport 8472 dev eth0 local 192.168.50.1 learning",
        );
        let (mut datapath, device) = start(&spec).await;
        assert_eq!((device.created, device.mtu), (false, 1400));
        run("ip link delete flannel.1");
        let pass = settle(&mut datapath, &table(PEERS)).await;
        let now = pass.device.expect("a device");
        assert_eq!((now.created, now.mtu, now.mac), (true, 1400, device.mac));

        // An uplink that shrank caps the next one; that is the MTU from then on.
        run("ip link delete flannel.1");
        run("ip link set eth0 mtu 1300");
        let pass = settle(&mut datapath, &table(PEERS)).await;
        assert_eq!(pass.device.expect("a device").mtu, 1250);

        let narrower = DeviceSpec { mtu: 1200, ..spec };
        let device = datapath.ensure_device(&narrower).await.expect("a device");
        assert_eq!(device.mtu, 1200, "a new config is applied");
        settle(&mut datapath, &table(PEERS)).await;
    });
}

#[test]
fn a_device_that_does_not_fit_is_made_anew() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        for misfit in [
            "ip link add flannel.1 type bridge",
            "ip link add flannel.1 type vxlan id 2 dstport 8472 dev eth0 local 192.168.50.1",
            "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 local 192.168.50.9",
            "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0 local 192.168.50.1 gbp",
        ] {
            run(misfit);
            let before = index_of("flannel.1");
            let (_, device) = start(&spec).await;
            assert!(device.created, "{misfit}");
            assert_ne!(device.index, before, "{misfit}");
            run("ip link delete flannel.1");
        }
    });
}

#[test]
fn a_vni_in_use_is_named_with_its_holder() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        run("ip link add other0 type vxlan id 1 dstport 8472 dev eth0 local 192.168.50.1");
        let mut datapath = NetlinkDatapath::open().expect("a socket");
        let error = datapath
            .ensure_device(&spec)
            .await
            .expect_err("the VNI is taken");
        assert!(matches!(error, DeviceError::VniTaken { .. }), "{error:?}");
        assert!(
            error.to_string().contains("other0 already uses VNI 1"),
            "{error}"
        );
    });
}

#[test]
fn addresses_inside_the_network_are_replaced_and_others_stay() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        let without_lease = DeviceSpec {
            address: None,
            ..spec.clone()
        };
        let (mut datapath, _) = start(&without_lease).await;
        run("ip addr add 10.244.7.0/32 dev flannel.1");
        run("ip addr add 10.244.0.0/24 dev flannel.1");
        run("ip addr add 172.31.0.1/32 dev flannel.1");
        datapath
            .ensure_device(&without_lease)
            .await
            .expect("a device");
        assert_eq!(lines(&run("ip -o -4 addr show dev flannel.1")).len(), 3);
        datapath.ensure_device(&spec).await.expect("a device");
        let text = run("ip -o -4 addr show dev flannel.1");
        assert_eq!(lines(&text).len(), 2, "{text}");
        assert!(
            text.contains("172.31.0.1/32") && text.contains("10.244.0.0/32"),
            "{text}"
        );
    });
}

#[test]
fn peers_look_as_flannel_programs_them() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&uplink(1500)).await;
        let pass = settle(&mut datapath, &table(PEERS)).await;
        assert_eq!((pass.installed, pass.removed, pass.repaired), (6, 0, 0));
        assert_peers_are_programmed(PEERS);
        assert_eq!(
            lines(&run("ip -d route show 10.244.1.0/24")),
            ["unicast 10.244.1.0/24 via 10.244.1.0 dev flannel.1 proto boot scope global onlink"]
        );
        let got = run("ip route get 10.244.2.9");
        assert!(
            got.contains("via 10.244.2.0 dev flannel.1 src 10.244.0.0"),
            "{got}"
        );
    });
}

#[test]
fn what_somebody_takes_away_comes_back_as_a_repair() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&uplink(1500)).await;
        let peers = table(PEERS);
        settle(&mut datapath, &peers).await;
        for (damage, repaired) in [
            ("ip route del 10.244.1.0/24", 1),
            ("ip neigh del 10.244.1.0 dev flannel.1", 1),
            (
                "ip neigh replace 10.244.1.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
                1,
            ),
            (
                "ip neigh replace 10.244.1.0 lladdr 02:11:22:33:44:55 dev flannel.1 nud reachable",
                1,
            ),
            ("bridge fdb del 02:11:22:33:44:55 dev flannel.1", 1),
            (
                "bridge fdb replace 02:11:22:33:44:55 dst 192.168.50.77 dev flannel.1",
                1,
            ),
            (
                "bridge fdb replace 02:11:22:33:44:55 dst 192.168.50.2 port 99 dev flannel.1",
                1,
            ),
            ("ip addr del 10.244.0.0/32 dev flannel.1", 5), // the last address takes all along
            ("ip addr flush dev flannel.1", 5),
            ("ip link set flannel.1 mtu 1300", 1),
            ("ip link set flannel.1 address 02:00:00:00:00:01", 3), // drops the neighbours
            ("ip link set flannel.1 down", 5),                      // drops routes and neighbours
            ("ip route flush dev flannel.1", 2),
            ("ip link delete flannel.1", 7),
        ] {
            run(damage);
            let pass = settle(&mut datapath, &peers).await;
            assert_eq!(
                (pass.repaired, pass.installed, pass.removed),
                (repaired, 0, 0),
                "{damage}"
            );
            assert_peers_are_programmed(PEERS);
            let now = pass.device.expect("a device");
            assert_eq!((now.mac, now.mtu), (device.mac, device.mtu), "{damage}");
            let link = run("ip link show dev flannel.1");
            assert!(link.contains(&device.mac.to_string()), "{damage}: {link}");
            assert!(link.contains("UP,LOWER_UP> mtu 1450"), "{damage}: {link}");
            let address = run("ip -o -4 addr show dev flannel.1");
            assert!(address.contains("10.244.0.0/32"), "{damage}: {address}");
        }
    });
}

#[test]
fn a_device_replaced_by_a_wrong_one_comes_back_with_the_same_mac() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&uplink(1500)).await;
        settle(&mut datapath, &table(PEERS)).await;
        run("ip link delete flannel.1");
        run("ip link add flannel.1 type bridge");
        let pass = settle(&mut datapath, &table(PEERS)).await;
        let now = pass.device.expect("a device");
        assert!(now.created);
        assert_eq!(now.mac, device.mac);
        assert_peers_are_programmed(PEERS);
    });
}

#[test]
fn while_the_uplink_is_away_the_pass_says_so_and_the_next_recovers() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        let (mut datapath, device) = start(&spec).await;
        settle(&mut datapath, &table(PEERS)).await;
        run("ip link delete eth0"); // takes flannel.1 along
        let pass = datapath.reconcile(&table(PEERS)).await;
        assert!(
            matches!(
                pass.errors[..],
                [PassError::Device(DeviceError::Step {
                    action: "create",
                    ..
                })]
            ),
            "{pass:?}"
        );
        run("ip link add eth0 mtu 1500 type veth peer name wire0");
        run("ip addr add 192.168.50.1/24 dev eth0");
        run("ip link set eth0 up");
        let moved = DeviceSpec {
            uplink_index: index_of("eth0"),
            ..spec
        };
        let again = datapath.ensure_device(&moved).await.expect("a device");
        assert_eq!(again.mac, device.mac);
        // The caller asked for another device: nobody else is to blame for what went with the old one.
        let pass = settle(&mut datapath, &table(PEERS)).await;
        assert_eq!((pass.installed, pass.repaired), (6, 0));
        assert_peers_are_programmed(PEERS);
    });
}

#[test]
fn entries_of_peers_that_vanished_before_the_start_are_removed() {
    in_new_namespace(|| async {
        let spec = uplink(1500);
        let (mut first, _) = start(&spec).await;
        settle(&mut first, &table(PEERS)).await;
        drop(first);
        // What is not ours stays.
        run("ip route add 10.99.0.0/16 via 10.99.7.7 dev flannel.1 onlink proto static");
        run("ip route add 10.98.0.0/16 via 192.168.50.9 dev eth0");
        run("bridge fdb append 00:00:00:00:00:00 dst 192.168.50.40 dev flannel.1");

        let (mut second, _) = start(&spec).await;
        let pass = settle(&mut second, &table(&PEERS[..1])).await;
        assert_eq!((pass.installed, pass.removed, pass.repaired), (0, 3, 0));
        let routes = lines(&run("ip route show"));
        assert!(
            routes.iter().any(|line| line.starts_with("10.99.0.0/16")),
            "{routes:?}"
        );
        assert!(
            routes.iter().any(|line| line.starts_with("10.98.0.0/16")),
            "{routes:?}"
        );
        assert!(
            !routes.iter().any(|line| line.starts_with("10.244.2.0/24")),
            "{routes:?}"
        );
        let fdb = run("bridge fdb show dev flannel.1");
        assert!(fdb.contains("00:00:00:00:00:00 dst 192.168.50.40"), "{fdb}");
        run("ip route del 10.99.0.0/16");
        run("bridge fdb del 00:00:00:00:00:00 dst 192.168.50.40 dev flannel.1");
        assert_peers_are_programmed(&PEERS[..1]);
    });
}

#[test]
fn a_peer_may_change_its_mac_and_its_address() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&uplink(1500)).await;
        settle(&mut datapath, &table(PEERS)).await;
        for (node, mac) in [
            ("192.168.50.2", "02:11:22:33:44:77"),
            ("192.168.50.9", "02:11:22:33:44:77"),
            ("192.168.50.10", "02:11:22:33:44:88"),
        ] {
            let rows = [("10.244.1.0/24", node, mac), PEERS[1]];
            let pass = settle(&mut datapath, &table(&rows)).await;
            assert_eq!(pass.repaired, 0);
            assert_peers_are_programmed(&rows);
        }
        let pass = settle(&mut datapath, &table(&[])).await;
        assert_eq!(pass.removed, 6);
        assert_peers_are_programmed(&[]);
    });
}

#[test]
fn peers_that_come_and_go_are_followed_without_a_look() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&uplink(1500)).await;
        let origin = Origin {
            namespace: None,
            port: 0,
        };
        let of_fdb = KernelEvent::Neighbours {
            origin,
            index: device.index,
            fdb: true,
            removed: false,
        };
        let unknown = datapath.follow(&news(&[], PEERS)).await;
        assert!(unknown.is_none(), "nothing is known before the first pass");
        settle(&mut datapath, &table(PEERS)).await;
        tokio::time::sleep(Duration::from_millis(250)).await;

        let third = ("10.244.3.0/24", "192.168.50.4", "02:11:22:33:44:77");
        let three = [PEERS[0], PEERS[1], third];
        let pass = datapath.follow(&news(PEERS, &three)).await;
        let pass = pass.expect("followed");
        assert_eq!((pass.installed, pass.removed, pass.repaired), (3, 0, 0));
        assert_peers_are_programmed(&three);
        // One FDB entry was set: one event of it is our own, and only for a moment.
        assert!(datapath.takes_echo(&of_fdb) && !datapath.takes_echo(&of_fdb));
        let pass = datapath.follow(&news(&three, &three[1..])).await;
        assert_eq!(pass.expect("followed").removed, 3);
        assert_peers_are_programmed(&three[1..]);
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(!datapath.takes_echo(&of_fdb));
        assert!(datapath.reconcile(&table(&three[1..])).await.is_quiet());

        // A known peer by another way: entry by entry what changed, and nothing of the old.
        let mut rows = [PEERS[1], third];
        for (node, mac, sum) in [
            ("192.168.50.9", third.2, (1, 0)),
            ("192.168.50.9", "02:11:22:33:44:88", (2, 1)),
            ("192.168.50.4", third.2, (2, 1)),
        ] {
            let moved = [PEERS[1], (third.0, node, mac)];
            let pass = datapath.follow(&news(&rows, &moved)).await;
            let pass = pass.expect("followed");
            assert_eq!((pass.installed, pass.removed), sum, "{node} {mac}");
            assert_peers_are_programmed(&moved);
            assert!(datapath.reconcile(&table(&moved)).await.is_quiet());
            rows = moved;
        }

        // Another's MAC, and a device that is gone, need the whole.
        let taken = [PEERS[1], (third.0, PEERS[1].1, PEERS[1].2)];
        assert!(datapath.follow(&news(&rows, &taken)).await.is_none());
        settle(&mut datapath, &table(&rows)).await;
        run("ip link delete flannel.1");
        let more = [PEERS[0], rows[0], rows[1]];
        assert!(datapath.follow(&news(&rows, &more)).await.is_none());
        settle(&mut datapath, &table(&more)).await;
        assert_peers_are_programmed(&more);
    });
}

#[test]
fn a_strangers_route_to_a_peers_subnet_is_replaced() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&uplink(1500)).await;
        run("ip route add 10.244.1.0/24 via 192.168.50.9 dev eth0");
        settle(&mut datapath, &table(PEERS)).await;
        assert_eq!(
            lines(&run("ip route show 10.244.1.0/24")),
            ["10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink"]
        );
        // In front of ours, which the kernel then refuses to replace in place.
        run("ip route prepend 10.244.1.0/24 via 192.168.50.9 dev eth0");
        settle(&mut datapath, &table(PEERS)).await;
        assert_eq!(
            lines(&run("ip route show 10.244.1.0/24")),
            ["10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink"]
        );
        assert_peers_are_programmed(PEERS);
    });
}

#[test]
fn a_refused_peer_does_not_block_the_others() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&uplink(1500)).await;
        let mut rows = PEERS.to_vec();
        // The kernel takes no route through the address 0.0.0.0.
        rows.push(("0.0.0.0/8", "192.168.50.8", "02:11:22:33:44:99"));
        let pass = datapath.reconcile(&table(&rows)).await;
        assert_eq!(pass.errors.len(), 1, "{:?}", pass.errors);
        assert_eq!(
            pass.errors[0].to_string(),
            "cannot set route 0.0.0.0/8 via 0.0.0.0"
        );
        let again = datapath.reconcile(&table(&rows)).await;
        assert_eq!(again.errors.len(), 1, "tried again: {:?}", again.errors);
        let routes = lines(&run("ip route show dev flannel.1"));
        assert_eq!(
            routes
                .iter()
                .filter(|line| line.starts_with("10.244."))
                .count(),
            2
        );
    });
}

#[test]
fn the_events_of_a_pass_are_told_apart_from_others() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&uplink(1500)).await;
        let on_device = move |event: &KernelEvent| match event {
            KernelEvent::Routes { index, .. } => *index == Some(device.index),
            KernelEvent::Neighbours { index, .. } => *index == device.index,
            _ => false,
        };
        let mut heard = listen(None, on_device).expect("a listener");
        let own = datapath.port();
        let mut deaf = listen(Some(own), on_device).expect("a listener");

        settle(&mut datapath, &table(PEERS)).await;
        let expected = [
            (false, own),
            (false, own),
            (false, own),
            (false, own),
            (true, 0),
            (true, 0),
        ];
        assert_eq!(collect(&mut heard).await, expected);
        assert_eq!(collect(&mut deaf).await, [(true, 0), (true, 0)]);

        run("ip route del 10.244.1.0/24");
        run("ip neigh del 10.244.1.0 dev flannel.1");
        let strangers = collect(&mut heard).await;
        assert_eq!(collect(&mut deaf).await, strangers);
        assert!(!strangers.is_empty());
        assert!(
            strangers.iter().all(|(_, port)| *port != own),
            "{strangers:?}"
        );
    });
}

#[test]
fn no_event_of_a_change_that_was_followed_asks_for_a_look() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&uplink(1500)).await;
        let index = device.index;
        let on_device = move |event: &KernelEvent| matches!(event, KernelEvent::Neighbours { index: told, .. } if *told == index);
        settle(&mut datapath, &table(PEERS)).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        let mut heard = listen(Some(datapath.port()), on_device).expect("a listener");
        for (before, after, neighbour_gone) in
            [(PEERS, &PEERS[1..], true), (&PEERS[1..], PEERS, false)]
        {
            let pass = datapath.follow(&news(before, after)).await;
            assert_eq!(pass.expect("followed").errors.len(), 0);
            let mut told = Vec::new();
            while let Ok(Some(event)) =
                tokio::time::timeout(Duration::from_millis(100), heard.recv()).await
            {
                assert!(datapath.takes_echo(&event), "{event:?}");
                told.push(matches!(event, KernelEvent::Neighbours { fdb: false, .. }));
            }
            // Otherwise nothing was tested.
            assert!(told.contains(&false));
            assert_eq!(told.contains(&true), neighbour_gone);
        }
        run("ip neigh del 10.244.1.0 dev flannel.1");
        let event = heard.recv().await.expect("a stranger's change is told");
        assert!(!datapath.takes_echo(&event), "{event:?}");
    });
}

async fn collect(events: &mut Receiver<KernelEvent>) -> Vec<(bool, u32)> {
    let mut found = Vec::new();
    while let Ok(Some(event)) =
        tokio::time::timeout(Duration::from_millis(300), events.recv()).await
    {
        let fdb = matches!(event, KernelEvent::Neighbours { fdb: true, .. });
        found.push((fdb, event.origin().expect("an origin").port));
    }
    found.sort_unstable();
    found
}
