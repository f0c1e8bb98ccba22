//! Something else deletes or changes what flannel needs: it is back within a
//! second, and in ebpf mode pods never notice.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode::{self, Ebpf, Netlink};
use lab::{
    agent::{Agent, AgentOptions},
    cluster::{Cluster, path_of},
    exchange::{self, RunningPing},
    load::RATE,
    node::{Node, TUNNEL},
    paths::PathWatch,
    scenario::scenario,
    wait,
};

/// How long a repair may take.
const LIMIT: Duration = Duration::from_secs(1);

/// Damage that is a new way for packets.
const MISROUTED: [&str; 2] = [
    "the peer's route is replaced by nonsense",
    "the peer's neighbour entry gets another MAC",
];

struct Damage {
    what: &'static str,
    program: &'static str,
    arguments: fn(&Peer) -> String,
}

/// What the damages refer to.
struct Peer {
    subnet: String,
    base: Ipv4Addr,
    mac: String,
    own_address: Ipv4Addr,
}

const DAMAGES: &[Damage] = &[
    Damage {
        what: "the tunnel device is deleted",
        program: "ip",
        arguments: |_| format!("link del {TUNNEL}"),
    },
    Damage {
        what: "the tunnel device is set down",
        program: "ip",
        arguments: |_| format!("link set {TUNNEL} down"),
    },
    Damage {
        what: "its MAC is changed",
        program: "ip",
        arguments: |_| format!("link set {TUNNEL} address 02:00:00:00:00:01"),
    },
    Damage {
        what: "its MTU is changed",
        program: "ip",
        arguments: |_| format!("link set {TUNNEL} mtu 1000"),
    },
    Damage {
        what: "its address becomes another one",
        program: "ip",
        arguments: |peer| {
            let [a, b, c, _] = peer.own_address.octets();
            format!("addr replace {a}.{b}.{c}.77/32 dev {TUNNEL}")
        },
    },
    Damage {
        what: "its address is removed",
        program: "ip",
        arguments: |peer| format!("addr del {}/32 dev {TUNNEL}", peer.own_address),
    },
    Damage {
        what: "the peer's route is deleted",
        program: "ip",
        arguments: |peer| format!("route del {}", peer.subnet),
    },
    Damage {
        what: MISROUTED[0],
        program: "ip",
        arguments: |peer| format!("route replace {} dev lo", peer.subnet),
    },
    Damage {
        what: "the peer's neighbour entry is deleted",
        program: "ip",
        arguments: |peer| format!("neigh del {} dev {TUNNEL}", peer.base),
    },
    Damage {
        what: MISROUTED[1],
        program: "ip",
        arguments: |peer| {
            format!(
                "neigh replace {} lladdr 02:00:00:00:00:01 dev {TUNNEL} nud permanent",
                peer.base
            )
        },
    },
    Damage {
        what: "the peer's FDB entry is deleted",
        program: "bridge",
        arguments: |peer| format!("fdb del {} dev {TUNNEL}", peer.mac),
    },
];

/// What concerns next hop objects, which many peers have.
const DAMAGES_OF_MANY: &[Damage] = &[
    Damage {
        what: "the peer's next hop object is deleted",
        program: "ip",
        arguments: |peer| format!("nexthop del id {}", u32::from(peer.base)),
    },
    Damage {
        what: "every next hop object is deleted",
        program: "ip",
        arguments: |_| "nexthop flush".to_owned(),
    },
    Damage {
        what: "the peer's route is deleted",
        program: "ip",
        arguments: |peer| format!("route del {}", peer.subnet),
    },
    Damage {
        what: "the tunnel device is set down",
        program: "ip",
        arguments: |_| format!("link set {TUNNEL} down"),
    },
    Damage {
        what: "the tunnel device is deleted",
        program: "ip",
        arguments: |_| format!("link del {TUNNEL}"),
    },
];

/// Leases of nodes that are not there: with them routes go through next hop objects.
const MANY: u32 = 1100;

#[test]
fn netlink_mode_is_back_within_a_second() {
    every_damage_is_repaired(Netlink);
}

#[test]
fn ebpf_mode_loses_nothing() {
    every_damage_is_repaired(Ebpf);
}

#[test]
fn netlink_mode_with_many_peers_is_back_within_a_second() {
    every_damage_of_many_peers_is_repaired(Netlink);
}

#[test]
fn ebpf_mode_with_many_peers_loses_nothing() {
    every_damage_of_many_peers_is_repaired(Ebpf);
}

fn every_damage_of_many_peers_is_repaired(mode: Mode) {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[mode])?;
        let subnet = lab[1].subnet()?;
        let subnets = lab.lease_dir().join("subnets");
        let route = format!("route show {subnet}");
        let namespace = lab[0].namespace();
        ensure!(!namespace.ip(&route)?.contains("nhid"), "few peers");
        for number in 0..MANY {
            let [_, _, high, low] = number.to_be_bytes();
            std::fs::write(
                subnets.join(format!("10.{}.{low}.0-24", 128 + high)),
                format!(
                    r#"{{"PublicIP":"172.20.{high}.{low}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{high:02x}:{low:02x}"}}}}"#
                ),
            )?;
        }
        for agent in &mut cluster.agents {
            agent.wait_for_peers(MANY as usize + 1)?;
        }
        ensure!(
            !namespace.ip(&route)?.contains("nhid"),
            "it was there before"
        );
        namespace.ip(&format!("link del {TUNNEL}"))?;
        wait::until_true("every route has an object", Duration::from_secs(5), || {
            // The device may not be there yet.
            let routes = namespace.ip("route show").unwrap_or_default();
            Ok(routes.matches(" nhid ").count() == MANY as usize + 1)
        })?;
        let through = format!("nhid {} ", u32::from(subnet.network()));
        ensure!(namespace.ip(&route)?.contains(&through));
        for damage in DAMAGES_OF_MANY {
            repaired(&cluster, mode, damage).with_context(|| damage.what)?;
        }
        Ok(())
    });
}

fn every_damage_is_repaired(mode: Mode) {
    scenario(2, |lab| {
        let cluster = Cluster::start(lab, &[mode])?;
        for damage in DAMAGES {
            repaired(&cluster, mode, damage).with_context(|| damage.what)?;
        }
        Ok(())
    });
}

fn repaired(cluster: &Cluster, mode: Mode, damage: &Damage) -> Result<()> {
    let (a, b) = cluster.nodes();
    let before = a.status()?;
    let picture = picture(a)?;
    let peer = Peer {
        subnet: b.subnet()?.to_string(),
        base: b.subnet()?.network(),
        mac: b.mac(TUNNEL)?.to_string(),
        own_address: a.subnet()?.network(),
    };
    let ping = RunningPing::start(&cluster.client, &cluster.server, RATE)?;
    std::thread::sleep(Duration::from_millis(200));
    let arguments = (damage.arguments)(&peer);
    match damage.program {
        "bridge" => a.namespace().bridge(&arguments)?,
        _ => a.namespace().ip(&arguments)?,
    };
    let start = Instant::now();
    wait::until_true("everything is as before", Duration::from_secs(5), || {
        Ok(self::picture(a)? == picture)
    })
    .with_context(|| format!("before:\n{picture}\nnow:\n{:?}", self::picture(a)))?;
    let took = start.elapsed();
    std::thread::sleep(Duration::from_millis(200));
    let reports = ping.finish()?;
    let (report, _) = &reports;
    println!(
        "{mode:?}: {}: repaired in {took:?}, {} of {} lost, longest gap {:.0} ms",
        damage.what, report.lost, report.sent, report.longest_gap_ms
    );
    ensure!(took < LIMIT, "the repair took {took:?}");
    match mode {
        // A way that somebody changed takes effect: what asks the kernel meanwhile is lost.
        Ebpf => ensure!(
            (report.lost == 0
                || MISROUTED.contains(&damage.what) && report.lost * 50 <= report.sent)
                && report.duplicated == 0,
            "{report:?}"
        ),
        Netlink => ensure!(
            report.longest_gap_ms < LIMIT.as_secs_f64() * 1000.0,
            "{report:?}"
        ),
    }
    let after = a.status()?;
    ensure!(
        after.kernel.repairs > before.kernel.repairs,
        "the repair was not counted"
    );
    ensure!(after.kernel.last_error.is_none(), "{:?}", after.kernel);
    ensure!(
        after.node.vtep_mac == before.node.vtep_mac
            && a.mac(TUNNEL)?.to_string() == before.node.vtep_mac,
        "the MAC changed, which peers do not know"
    );
    let watch = PathWatch::start(&[a, b])?;
    exchange::udp_round_trips(&cluster.client, &cluster.server, 200)?;
    watch.expect_exchange((a, path_of(mode)), (b, path_of(mode)), 200, 200)
}

/// Everything that flannel has set up, as text without what may differ (interface index, ages).
fn picture(node: &Node) -> Result<String> {
    let namespace = node.namespace();
    let sorted = |text: String| -> String {
        let mut lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    let link = namespace.ip(&format!("-d link show {TUNNEL}"))?;
    let link = link.split_once(": ").map_or("", |(_, rest)| rest);
    Ok(format!(
        "{link}{}\n{}\n{}\n{}\n{}",
        sorted(namespace.ip(&format!("-o -4 addr show dev {TUNNEL} scope global"))?)
            .split_once(": ")
            .map_or("", |(_, rest)| rest),
        sorted(namespace.ip("route show table main")?),
        sorted(namespace.ip("nexthop show")?),
        sorted(namespace.ip(&format!("neigh show dev {TUNNEL} nud permanent"))?),
        sorted(namespace.bridge(&format!("fdb show dev {TUNNEL}"))?),
    ))
}

#[test]
fn what_a_vanished_peer_left_is_removed_at_start() {
    scenario(2, |lab| {
        let mut cluster = Cluster::start(lab, &[Netlink])?;
        let a = lab[0].clone();
        let namespace = a.namespace();
        let clean = picture(&a)?;
        // A third node joins, and goes while nobody is there to see it.
        let lease = a.lease_dir().join("subnets").join("10.244.199.0-24");
        std::fs::write(
            &lease,
            r#"{"PublicIP":"172.18.0.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#,
        )?;
        cluster.agents[0].wait_for_peers(2)?;
        cluster.agents.remove(0).kill9()?;
        std::fs::remove_file(lease)?;
        let left = picture(&a)?;
        for trace in [
            "10.244.199.0/24 via 10.244.199.0 dev flannel.1 onlink",
            "10.244.199.0 lladdr 02:00:00:00:00:99 PERMANENT",
            "02:00:00:00:00:99 dst 172.18.0.99 self permanent",
        ] {
            ensure!(left.contains(trace), "no {trace:?} in\n{left}");
        }
        // Somebody else's route is not ours to remove.
        let foreign = "10.99.0.0/24 via 172.18.0.2 dev eth0";
        namespace.ip(&format!("route add {foreign}"))?;
        let mut agent = Agent::start(&a, &AgentOptions::in_mode(Netlink))?;
        agent.wait_for_peers(1)?;
        ensure!(namespace.ip("route show")?.contains(foreign));
        namespace.ip(&format!("route del {foreign}"))?;
        wait::until_true("the leftovers are gone", Duration::from_secs(5), || {
            Ok(picture(&a)? == clean)
        })
        .with_context(|| format!("{clean}\n---\n{}", picture(&a).unwrap_or_default()))?;
        exchange::udp_round_trips(&cluster.client, &cluster.server, 100).map(drop)
    });
}
