//! More peers than plain routes are good for, against the real kernel, each test in a network
//! namespace of its own.

mod namespace;
mod tunnel;

use std::{net::Ipv4Addr, time::Duration};

use flannel_user::{
    datapath::netlink::DeviceSpec,
    forwarding::{Changes, ForwardingTable, Via},
    mac::MacAddr,
};
use ipnet::Ipv4Net;
use namespace::{batch, in_new_namespace, lines, run};
use nix::time::{ClockId, clock_gettime};
use tunnel::{settle, start, uplink};

/// More than enough for objects, and quick to set.
const MANY: u32 = 1100;

/// The uplink of [`uplink`] in a network with room for ten thousand peers.
fn wide_uplink() -> DeviceSpec {
    DeviceSpec {
        address: Some(Ipv4Addr::new(9, 255, 0, 0)),
        network: "8.0.0.0/6".parse().expect("a network"),
        ..uplink(1500)
    }
}

/// The base of the peer with this number.
fn base(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (number << 8))
}

/// The id of its next hop object.
fn id(number: u32) -> u32 {
    u32::from(base(number))
}

fn numbered(numbers: impl Iterator<Item = u32>) -> ForwardingTable {
    let peer = |number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        let via = Via::Vxlan {
            node: Ipv4Addr::from(0xac10_0000 + number),
            vtep_mac: MacAddr([2, 0, 0, a, b, c]),
        };
        (Ipv4Net::new_assert(base(number), 24), via)
    };
    ForwardingTable(numbers.map(peer).collect())
}

fn many(peers: u32) -> ForwardingTable {
    numbered(0..peers)
}

/// How many routes on the device go through objects, and how many are plain; each must be whole.
fn forms() -> (usize, usize) {
    let routes = lines(&run("ip route show dev flannel.1"));
    let through: Vec<_> = routes.iter().filter(|line| line.contains("nhid")).collect();
    for line in &routes {
        let words: Vec<&str> = line.split_whitespace().collect();
        let base = words[0].strip_suffix("/24").expect("a subnet");
        let number = u32::from(base.parse::<Ipv4Addr>().expect("an address"));
        let nhid = format!("nhid {number} ");
        let nhid = if line.contains("nhid") { &*nhid } else { "" };
        assert_eq!(
            line.trim_end(),
            format!("{base}/24 {nhid}via {base} onlink")
        );
    }
    (through.len(), routes.len() - through.len())
}

fn objects() -> Vec<String> {
    lines(&run("ip nexthop show"))
}

#[test]
fn many_peers_are_routed_through_objects_of_ours() {
    in_new_namespace(|| async {
        let spec = wide_uplink();
        let (mut datapath, _) = start(&spec).await;
        let pass = settle(&mut datapath, &many(MANY)).await;
        assert_eq!((pass.installed, pass.repaired), (4 * MANY as usize, 0));
        assert_eq!(forms(), (MANY as usize, 0));
        assert_eq!(objects().len(), MANY as usize);
        assert_eq!(
            lines(&run(&format!("ip -d nexthop show id {}", id(1)))),
            ["id 167772416 via 10.0.1.0 dev flannel.1 scope link proto 241 onlink"]
        );
        let route = run("ip -d route show 10.0.1.0/24");
        assert!(
            route.starts_with(
                "unicast 10.0.1.0/24 nhid 167772416 via 10.0.1.0 dev flannel.1 proto boot scope global onlink"
            ),
            "{route}"
        );
        let got = run("ip route get 10.0.1.9");
        assert!(
            got.contains("via 10.0.1.0 dev flannel.1 src 9.255.0.0"),
            "{got}"
        );

        // The next agent finds nothing to do, and the last peer leaves nothing.
        drop(datapath);
        let (mut next, _) = start(&spec).await;
        let pass = next.reconcile(&many(MANY)).await;
        assert!(pass.is_quiet(), "{pass:?}");
        let pass = settle(&mut next, &ForwardingTable::default()).await;
        assert_eq!(pass.removed, 4 * MANY as usize);
        assert_eq!((forms(), objects().len()), ((0, 0), 0));
    });
}

#[test]
fn routes_that_are_there_stay_as_they_are_when_peers_come_and_go() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&wide_uplink()).await;
        settle(&mut datapath, &many(1000)).await;
        assert_eq!((forms(), objects().len()), ((0, 1000), 0));
        settle(&mut datapath, &many(1030)).await;
        assert_eq!((forms(), objects().len()), ((30, 1000), 30));

        // One by one, and of both forms.
        let mut table = many(1030);
        let steps = [numbered(0..1031), numbered(1..1031), numbered(1..1030)];
        for (wanted, forms_then) in steps.into_iter().zip([(31, 1000), (31, 999), (30, 999)]) {
            let changes = Changes::between(&table, &wanted);
            let pass = datapath.follow(&changes).await.expect("followed");
            assert!(pass.repaired == 0 && pass.errors.is_empty(), "{pass:?}");
            assert_eq!((forms(), objects().len()), (forms_then, forms_then.0));
            assert!(datapath.reconcile(&wanted).await.is_quiet());
            table = wanted;
        }

        // Fewer again: what goes through an object goes on so, what is new is plain.
        settle(&mut datapath, &numbered(1000..1020)).await;
        assert_eq!((forms(), objects().len()), ((20, 0), 20));
        let changes = Changes::between(&numbered(1000..1020), &numbered(1000..1021));
        assert!(datapath.follow(&changes).await.is_some());
        assert_eq!((forms(), objects().len()), ((20, 1), 20));
    });
}

#[test]
fn objects_and_routes_that_somebody_takes_away_come_back() {
    in_new_namespace(|| async {
        let (mut datapath, device) = start(&wide_uplink()).await;
        let peers = many(MANY);
        settle(&mut datapath, &peers).await;
        let all = MANY as usize;
        let (one, other) = (id(1), id(2));
        for (damage, repaired, installed) in [
            ("ip nexthop flush".to_owned(), 2 * all, 0),
            (format!("ip nexthop del id {one}"), 2, 0),
            ("ip route del 10.0.1.0/24".to_owned(), 1, 0),
            // The object is a stranger's now: the route becomes plain, and stays so.
            (
                format!("ip nexthop replace id {one} via 10.0.9.0 dev flannel.1 onlink"),
                1,
                0,
            ),
            (format!("ip nexthop del id {one}"), 0, 0),
            (format!("ip route replace 10.0.2.0/24 nhid {}", id(3)), 1, 0),
            (format!("ip nexthop del id {other}"), 2, 0),
            // Takes the neighbours and the plain route, which gets an object of its own again.
            ("ip addr flush dev flannel.1".to_owned(), all + 2, 1),
            ("ip link set flannel.1 down".to_owned(), 3 * all + 1, 0),
            ("ip link delete flannel.1".to_owned(), 4 * all + 1, 0),
        ] {
            run(&damage);
            let pass = settle(&mut datapath, &peers).await;
            assert_eq!(
                (pass.repaired, pass.installed),
                (repaired, installed),
                "{damage}"
            );
            let (through, plain) = forms();
            assert_eq!(through + plain, all, "{damage}");
            let now = pass.device.expect("a device");
            assert_eq!((now.mac, now.mtu), (device.mac, device.mtu), "{damage}");
        }
    });
}

/// The node was moved to the original flannel, which replaces every route, and back.
#[test]
fn plain_routes_of_the_original_are_taken_over_and_objects_without_a_route_removed() {
    in_new_namespace(|| async {
        let spec = wide_uplink();
        let (mut datapath, _) = start(&spec).await;
        settle(&mut datapath, &many(MANY)).await;
        drop(datapath);
        let replace = |number: u32| {
            let base = base(number);
            format!("route replace {base}/24 via {base} dev flannel.1 onlink\n")
        };
        batch("ip", &(0..MANY).map(replace).collect::<String>());
        assert_eq!(forms(), (0, MANY as usize), "one route each");

        let (mut datapath, _) = start(&spec).await;
        let pass = settle(&mut datapath, &many(MANY)).await;
        assert_eq!(
            (pass.installed, pass.removed, pass.repaired),
            (0, MANY as usize, 0)
        );
        assert_eq!((forms(), objects().len()), ((0, MANY as usize), 0));
    });
}

#[test]
fn an_id_that_somebody_else_holds_makes_the_route_plain() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&wide_uplink()).await;
        run(&format!(
            "ip nexthop add id {} via 192.168.50.9 dev eth0",
            id(5)
        ));
        run(&format!(
            "ip nexthop add id {} via 192.168.50.9 dev eth0",
            id(MANY)
        ));
        let mine = format!("via {} dev flannel.1 onlink", base(6));
        run(&format!("ip nexthop add id {} {mine}", id(6)));
        let strangers = objects();
        settle(&mut datapath, &many(MANY)).await;
        assert_eq!(forms(), (MANY as usize - 2, 2));
        // Of two more one is free, and one is there for no reason that we know.
        run(&format!(
            "ip nexthop add id {} via {} dev flannel.1 onlink proto 241",
            id(MANY + 1),
            base(MANY + 1)
        ));
        let changes = Changes::between(&many(MANY), &many(MANY + 3));
        let pass = datapath.follow(&changes).await.expect("followed");
        assert_eq!(pass.installed, 4 + 2 * 3);
        assert_eq!(forms(), (MANY as usize - 1, 4));
        let pass = settle(&mut datapath, &many(MANY + 3)).await;
        assert_eq!((pass.installed, pass.removed, pass.repaired), (0, 1, 0));

        settle(&mut datapath, &ForwardingTable::default()).await;
        assert_eq!((forms(), objects()), ((0, 0), strangers));
    });
}

#[test]
fn agents_of_two_networks_do_not_disturb_each_other() {
    in_new_namespace(|| async {
        let spec = wide_uplink();
        let (mut first, _) = start(&spec).await;
        let (mut second, _) = start(&DeviceSpec {
            vni: 2,
            address: Some(Ipv4Addr::new(10, 255, 0, 0)),
            ..spec
        })
        .await;
        let (one, other) = (many(MANY), numbered(MANY..2 * MANY));
        settle(&mut first, &one).await;
        settle(&mut second, &other).await;
        assert_eq!(objects().len(), 2 * MANY as usize);
        assert!(first.reconcile(&one).await.is_quiet());
        settle(&mut first, &ForwardingTable::default()).await;
        assert!(second.reconcile(&other).await.is_quiet());
        assert_eq!(
            lines(&run("ip route show dev flannel.2")).len(),
            MANY as usize
        );

        // A peer that both claim: the kernel has one route and one object for it.
        settle(&mut second, &one).await;
        let contested = many(1);
        for datapath in [&mut first, &mut second] {
            let pass = datapath.reconcile(&contested).await;
            assert!(pass.errors.is_empty(), "{pass:?}");
        }
    });
}

/// With this setting the kernel tells the id of a route's object, but not what is in it.
#[test]
fn routes_are_recognised_when_the_kernel_tells_only_the_id() {
    in_new_namespace(|| async {
        run("sysctl -qw net.ipv4.nexthop_compat_mode=0");
        let (mut datapath, _) = start(&wide_uplink()).await;
        settle(&mut datapath, &many(MANY)).await;
        run("ip route del 10.0.1.0/24");
        let pass = settle(&mut datapath, &many(MANY)).await;
        assert_eq!(pass.repaired, 1);
        settle(&mut datapath, &ForwardingTable::default()).await;
        assert_eq!(
            (lines(&run("ip route show")).len(), objects().len()),
            (1, 0)
        );
    });
}

/// Each peer costs the same, however many there are. Times are of this thread's processor, in
/// which the kernel's part is counted, since other tests run meanwhile.
#[test]
fn ten_thousand_peers_cost_no_more_each_than_two_thousand() {
    in_new_namespace(|| async {
        let (mut datapath, _) = start(&wide_uplink()).await;
        let mut one_of_few = None;
        for peers in [2_000_u32, 10_000] {
            let table = many(peers);
            let entries = 4 * peers as usize;
            settle(&mut datapath, &ForwardingTable::default()).await;
            let begin = spent();
            let pass = datapath.reconcile(&table).await;
            let install = spent() - begin;
            assert!(pass.errors.is_empty(), "{:?}", pass.errors.first());
            assert_eq!(pass.installed, entries);
            let begin = spent();
            let quiet = datapath.reconcile(&table).await;
            let check = spent() - begin;
            assert!(quiet.is_quiet());

            let one_more = many(peers + 1);
            let there = Changes::between(&table, &one_more);
            let back = Changes::between(&one_more, &table);
            let mut follow = Duration::MAX;
            for _ in 0..10 {
                let begin = spent();
                let pass = datapath.follow(&there).await.expect("followed");
                follow = follow.min(spent() - begin);
                assert_eq!(pass.installed, 4);
                assert!(datapath.follow(&back).await.is_some());
            }
            assert!(follow < check / 3, "{follow:?} against a look of {check:?}");
            let of_few = *one_of_few.get_or_insert(follow);
            assert!(
                follow < 3 * of_few,
                "one more: {follow:?} with {peers}, {of_few:?} with few"
            );

            run("ip link delete flannel.1");
            let begin = spent();
            let pass = datapath.reconcile(&table).await;
            let reprogram = spent() - begin;
            assert_eq!(pass.repaired, entries + 1);
            let begin = spent();
            let pass = datapath.reconcile(&ForwardingTable::default()).await;
            let remove = spent() - begin;
            assert_eq!(pass.removed, entries);
            eprintln!(
                "{peers} peers: install {install:?}, quiet pass {check:?}, one more {follow:?}, device deleted and all put back {reprogram:?}, remove {remove:?}"
            );
            assert!(install.as_secs() < 2, "{peers} peers took {install:?}");
        }
    });
}

/// What this thread has had of a processor.
fn spent() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock");
    now.into()
}
