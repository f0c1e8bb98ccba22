//! The lab proves itself on nodes that the original flannel would have made:
//! if one of these fails, no other scenario means anything.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{
    binaries,
    capture::{Capture, outer_headers},
    exchange::{self, RR_PORT},
    host::{self, HostState},
    lab::{Lab, Underlay},
    load::Load,
    node::{TUNNEL, UPLINK},
    original,
    paths::{Packets, Path, PathWatch, Way},
    pod::{Pod, Wiring},
    scenario::{scenario, scenario_over},
    traffic::request_response::Protocol,
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Two original-flannel nodes with a pod each.
fn with_two_pods(body: impl FnOnce(&Lab, &Pod, &Pod) -> Result<()>) {
    scenario(2, |lab| {
        original::configure_all(lab)?;
        let (a, b) = lab.pair();
        body(lab, &a.add_pod()?, &b.add_pod()?)
    });
}

#[test]
fn pings_and_datagrams_arrive_and_are_counted_one_by_one() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        client.ping(&server.address().to_string(), 3)?;
        let watch = PathWatch::start(&[a, b])?;
        exchange::udp_round_trips(client, server, 1000)?;
        watch.expect_exchange((a, Path::Kernel), (b, Path::Kernel), 1000, 1000)
    });
}

#[test]
fn a_false_claim_about_the_path_is_refused() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        client.ping(&server.address().to_string(), 1)?;
        let watch = PathWatch::start(&[a, b])?;
        exchange::udp_round_trips(client, server, 10)?;
        ensure!(watch.expect(a, Way::Out, Path::Ebpf, 10).is_err());
        ensure!(watch.expect(a, Way::Out, Path::Kernel, 9).is_err());
        ensure!(
            watch
                .expect(a, Way::Out, Path::Kernel, Packets::AtLeast(11))
                .is_err()
        );
        watch.expect(a, Way::Out, Path::Kernel, Packets::AtLeast(9))
    });
}

#[test]
fn a_loss_is_noticed() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let ping = exchange::RunningPing::start(client, server, 2000)?;
        std::thread::sleep(Duration::from_millis(200));
        let subnet = b.subnet()?;
        let route = a.namespace().ip(&format!("route show {subnet}"))?;
        // The node answers "no route", which the pinger takes as the loss it is.
        a.namespace()
            .ip(&format!("route replace blackhole {subnet}"))?;
        a.namespace().ip(&format!("route del blackhole {subnet}"))?;
        a.namespace()
            .ip(&format!("route replace {}", route.trim()))?;
        std::thread::sleep(Duration::from_millis(200));
        let reports = ping.finish()?;
        ensure!(reports.0.lost > 0, "{reports:?}");
        ensure!(reports.0.received > 400, "{reports:?}");
        ensure!(exchange::check_nothing_lost(&reports).is_err());
        Ok(())
    });
}

#[test]
fn a_standstill_is_noticed() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let load = Load::start(client, server)?;
        let subnet = b.subnet()?;
        let route = a.namespace().ip(&format!("route show {subnet}"))?;
        load.run_for(Duration::from_secs(1));
        a.namespace()
            .ip(&format!("route replace blackhole {subnet}"))?;
        load.run_for(Duration::from_millis(1200));
        a.namespace().ip(&format!("route del blackhole {subnet}"))?;
        a.namespace()
            .ip(&format!("route replace {}", route.trim()))?;
        load.run_for(Duration::from_secs(2));
        let report = load.finish()?;
        println!("{}", report.summary());
        ensure!(report.check_nothing_lost().is_err());
        // The connection lived on and its data is whole, but it stood still.
        report.stream.check(1)?;
        ensure!(report.stream.check_never_below_half_speed().is_err());
        Ok(())
    });
}

#[test]
fn a_kernel_only_cluster_carries_the_load() {
    with_two_pods(|_, client, server| {
        let load = Load::start(client, server)?;
        load.run_for(Duration::from_secs(4));
        let report = load.finish()?;
        println!("{}", report.summary());
        report.check()
    });
}

#[test]
fn streams_are_checked_in_both_directions() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let bytes = 200_000_000;
        for direction in ["up", "down", "both"] {
            let watch = PathWatch::start(&[a, b])?;
            let stream = exchange::stream(client, server, direction, bytes)?;
            let segments = Packets::AtLeast(bytes / 65536);
            if direction != "down" {
                watch.expect(a, Way::Out, Path::Kernel, segments)?;
                watch.expect(b, Way::In, Path::Kernel, segments)?;
            }
            if direction != "up" {
                watch.expect(b, Way::Out, Path::Kernel, segments)?;
                watch.expect(a, Way::In, Path::Kernel, segments)?;
            }
            let half = stream.server.received.or(stream.client.received);
            let half = half.context("somebody received")?;
            println!("{direction}: {:.2} Gbit/s", half.gbit_per_second());
        }
        Ok(())
    });
}

#[test]
fn a_stream_runs_until_told() {
    with_two_pods(|_, client, server| {
        for direction in ["up", "down", "both"] {
            let arguments = format!("--direction {direction}");
            let stream = exchange::RunningStream::start(client, server, &arguments)?;
            std::thread::sleep(Duration::from_millis(300));
            stream.finish()?.check(1_000_000)?;
        }
        let timed = exchange::RunningStream::start(client, server, "--seconds 3")?.result()?;
        timed.check(1_000_000)?;
        timed.check_never_below_half_speed()
    });
}

#[test]
fn small_large_and_fragmented_datagrams_arrive_intact() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        for (size, fragments) in [(64, 1), (1400, 1), (4000, 3)] {
            let watch = PathWatch::start(&[a, b])?;
            exchange::datagrams(client, server, size, 500, "")?;
            watch.expect_exchange((a, Path::Kernel), (b, Path::Kernel), 500 * fragments, 0)?;
        }
        exchange::datagrams(client, server, 1000, 4000, "--segments 40")?;
        Ok(())
    });
}

#[test]
fn a_datagram_over_the_mtu_is_answered_with_the_mtu() {
    scenario(2, |lab| {
        original::configure_all(lab)?;
        let (a, b) = lab.pair();
        // A pod that does not know the tunnel's MTU learns it from the node's answer.
        let client = a.add_pod_with(Wiring::Bridged, Some(1500))?;
        let server = b.add_pod()?;
        let sent =
            exchange::try_datagrams(&client, &server, "--size 1450 --count 3 --fragmentation do")?;
        ensure!(sent.received.received == 0, "{sent:?}");
        ensure!(sent.sent.path_mtu == Some(1450), "{sent:?}");
        let gateway = a.subnet_file()?.gateway.addr();
        ensure!(sent.sent.complainant == Some(gateway), "{sent:?}");
        ensure!(sent.sent.too_long > 0, "the pod did not learn: {sent:?}");
        Ok(())
    });
}

#[test]
fn every_router_shows_itself() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let route = exchange::route(client, server.address())?;
        let expected: Vec<Option<Ipv4Addr>> = vec![
            Some(a.subnet_file()?.gateway.addr()),
            Some(b.subnet()?.network()),
            Some(server.address()),
        ];
        ensure!(route.reached && route.hops == expected, "{route:?}");
        let said = client.namespace().run(&[
            "traceroute",
            "-n",
            "-q",
            "1",
            &server.address().to_string(),
        ])?;
        for hop in expected.into_iter().flatten() {
            ensure!(said.contains(&hop.to_string()), "{said}");
        }
        Ok(())
    });
}

#[test]
fn header_fields_are_reported_as_they_arrive() {
    with_two_pods(|_, client, server| {
        for tos in [0, 1, 2, 3, 0xb8, 0xba] {
            let all = exchange::datagrams(client, server, 64, 5, &format!("--tos {tos}"))?;
            ensure!(all.received.tos.get(&tos) == Some(&5), "{all:?}");
            ensure!(all.received.ttl.get(&62) == Some(&5), "{all:?}");
            ensure!(all.received.options.is_empty(), "{all:?}");
            ensure!(
                all.received.senders == BTreeSet::from([client.address()]),
                "{all:?}"
            );
        }
        let nop = exchange::datagrams(client, server, 64, 5, "--options nop")?;
        ensure!(
            nop.received.options == BTreeSet::from(["01010101".to_owned()]),
            "{nop:?}"
        );
        let route = exchange::datagrams(client, server, 64, 1, "--options record-route")?;
        let recorded = route.received.options.first().context("no options")?;
        // Sender, tunnel device, bridge, receiver: everybody on the way has signed.
        ensure!(
            recorded.starts_with("0727140af401020af401000af402010af40202"),
            "{route:?}"
        );
        Ok(())
    });
}

#[test]
fn the_wire_format_is_that_of_the_contract() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let capture = Capture::start(a.namespace(), UPLINK, "udp port 8472", lab.scratch())?;
        exchange::datagrams(client, server, 64, 50, "--tos 186")?;
        let packets = capture.stop()?;
        ensure!(packets.len() == 50, "{} packets", packets.len());
        let headers = outer_headers(&packets);
        ensure!(headers.len() == 1, "one flow, one header: {headers:?}");
        let outer = headers.first().context("a header")?;
        ensure!(
            outer.addresses == (a.public_ip(), b.public_ip()),
            "{outer:?}"
        );
        ensure!(
            outer.macs == (a.mac(UPLINK)?.0, b.mac(UPLINK)?.0),
            "{outer:?}"
        );
        ensure!(outer.version_and_length == 0x45 && outer.checksum_is_right);
        // DSCP stays inside, ECT(0) shows.
        ensure!(
            outer.tos == 2 && outer.ttl == 64 && outer.fragment_field == 0,
            "{outer:?}"
        );
        ensure!(outer.vxlan == [8, 0, 0, 0, 0, 0, 1, 0], "{outer:?}");
        ensure!((32768..=60999).contains(&outer.ports.0) && outer.ports.1 == 8472);
        ensure!(
            outer.overhead == 36 && outer.udp_overhead == 16,
            "{outer:?}"
        );
        for packet in &packets {
            let inner = &packet.inner;
            ensure!(packet.is_udp_between(client.address(), server.address()));
            ensure!(
                inner.macs == (a.mac(TUNNEL)?.0, b.mac(TUNNEL)?.0),
                "{inner:?}"
            );
            ensure!(inner.tos == 186 && inner.ttl == 63 && inner.checksum_is_right);
        }
        Ok(())
    });
}

#[test]
fn requests_and_responses_are_timed() {
    with_two_pods(|_, client, server| {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let report = exchange::request_response(
                client.namespace(),
                (server.namespace(), server.at(RR_PORT)),
                protocol,
                0.3,
                0,
            )?;
            ensure!(
                report.transactions > 1000 && report.latency.p50_us > 1.0,
                "{report:?}"
            );
            println!("{}: {:.0} per second", protocol.name(), report.per_second);
        }
        Ok(())
    });
}

#[test]
fn hand_made_packets_are_delivered_by_the_kernel() {
    with_two_pods(|lab, client, server| {
        let (a, b) = lab.pair();
        let (from, to) = (a.mac(TUNNEL)?, b.mac(TUNNEL)?);
        let receiver = server.tool("udp-receive")?;
        let sent: lab::traffic::forged::ForgeReport = lab::task::Task::start(
            a.namespace(),
            &format!(
                "forge --node {} --inner-source-mac {from} --inner-destination-mac {to} \
                 --from {} --to {} --count 20 --outer-tos 3 --tos 2",
                b.public_ip(),
                client.address(),
                server.at(exchange::RECEIVE_PORT)
            ),
        )?
        .result()?;
        std::thread::sleep(Duration::from_millis(100));
        let received: lab::traffic::datagrams::ReceiveReport = receiver.finish()?;
        ensure!(sent.sent == 20 && received.received == 20, "{received:?}");
        // RFC 6040: congestion marked on the way is shown to the pod.
        ensure!(
            received.corrupt == 0 && received.tos.get(&3) == Some(&20),
            "{received:?}"
        );
        Ok(())
    });
}

#[test]
fn three_nodes_meet_at_a_switch_and_across_a_router() {
    for underlay in [Underlay::Switch, Underlay::Router] {
        scenario_over(underlay, 3, |lab| {
            original::configure_all(lab)?;
            let pods = lab
                .nodes()
                .iter()
                .map(|node| node.add_pod())
                .collect::<Result<Vec<_>>>()?;
            for from in &pods {
                for to in &pods {
                    exchange::udp_round_trips(from, to, 20)?;
                }
            }
            Ok(())
        });
    }
}

#[test]
fn routed_pods_reach_bridged_ones() {
    scenario(2, |lab| {
        original::configure_all(lab)?;
        let (a, b) = lab.pair();
        let routed = a.add_pod_with(Wiring::Routed, None)?;
        let bridged = b.add_pod()?;
        routed.announce()?;
        exchange::udp_round_trips(&routed, &bridged, 100)?;
        let all = exchange::datagrams(&bridged, &routed, 1400, 100, "")?;
        ensure!(all.received.ttl.get(&62) == Some(&100), "{all:?}");
        Ok(())
    });
}

#[test]
fn a_pod_takes_its_interface_along() {
    with_two_pods(|lab, client, server| {
        let (a, _) = lab.pair();
        let second = a.add_pod()?;
        ensure!(second.address() != client.address());
        exchange::udp_round_trips(&second, server, 20)?;
        let path = format!("/sys/class/net/{}", second.interface());
        ensure!(a.namespace().exists(&path)?);
        drop(second);
        ensure!(!a.namespace().exists(&path)?);
        exchange::udp_round_trips(client, server, 20).map(drop)
    });
}

#[test]
fn the_host_is_as_clean_after_as_before() -> Result<()> {
    let before = HostState::now()?;
    with_two_pods(|_, client, server| exchange::udp_round_trips(client, server, 20).map(drop));
    host::expect_unchanged(&before)?;
    let panicked = std::panic::catch_unwind(|| {
        with_two_pods(|_, _, _| panic!("as a failing scenario does"));
    });
    ensure!(panicked.is_err());
    host::expect_unchanged(&before)
}

/// `lab up` in another process, ended by `signal`: nothing may survive.
fn nothing_survives(signal: Signal) -> Result<()> {
    let before = HostState::now()?;
    let mut command = Command::new(binaries::lab()?);
    command
        .args(["up", "--nodes", "3"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut up = lab::spawner::spawn(command)?;
    let said = BufReader::new(up.stdout.take().context("lab up without stdout")?);
    ensure!(
        said.lines()
            .any(|line| line.is_ok_and(|line| line.starts_with("ready"))),
        "lab up did not get ready"
    );
    let namespaces = namespaces_of_children(up.id())?;
    // Three nodes with two namespaces each, three pods, one switch.
    ensure!(namespaces.len() == 10, "{} namespaces", namespaces.len());
    ensure!(host::inhabitants(&namespaces)?.len() == 7);
    kill(Pid::from_raw(up.id().cast_signed()), signal)?;
    let status = up.wait()?;
    if signal == Signal::SIGKILL {
        ensure!(status.signal() == Some(signal as i32), "{status}");
    } else {
        // 130 if the signal came before it was waited for.
        ensure!(matches!(status.code(), Some(0 | 130)), "{status}");
    }
    wait::until_true("everything is gone", Duration::from_secs(5), || {
        Ok(host::inhabitants(&namespaces)?.is_empty())
    })?;
    host::expect_unchanged(&before)?;
    let left = || -> Result<bool> {
        let mark = format!("flannel-lab-{}-", up.id());
        Ok(std::fs::read_dir(std::env::temp_dir())?
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with(&mark)))
    };
    if signal == Signal::SIGKILL {
        // Only files stay, and only until the next lab starts.
        ensure!(left()?);
        Lab::with_nodes(2)?;
    }
    ensure!(!left()?, "a scratch directory is left");
    Ok(())
}

/// Namespaces of the children of `parent` that are not our own.
fn namespaces_of_children(parent: u32) -> Result<BTreeSet<u64>> {
    let inode = |pid: &str, kind: &str| -> Result<u64> {
        Ok(std::fs::metadata(format!("/proc/{pid}/ns/{kind}"))?.ino())
    };
    let children = std::fs::read_dir(format!("/proc/{parent}/task"))?
        .map(|thread| {
            let path = thread?.path().join("children");
            Ok(std::fs::read_to_string(path)?)
        })
        .collect::<Result<String>>()?;
    let mut found = BTreeSet::new();
    for child in children.split_whitespace() {
        for kind in ["net", "mnt"] {
            let theirs = inode(child, kind)?;
            if theirs != inode("self", kind)? {
                found.insert(theirs);
            }
        }
    }
    Ok(found)
}

#[test]
fn nothing_survives_a_killed_lab() -> Result<()> {
    nothing_survives(Signal::SIGKILL)
}

#[test]
fn nothing_survives_ctrl_c() -> Result<()> {
    nothing_survives(Signal::SIGINT)
}
